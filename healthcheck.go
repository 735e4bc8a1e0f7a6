// The reverse proxy's own requests: active health checks.

package outboundauth

import (
	"cmp"
	"context"
	"errors"
	"math/big"
	"net/http"
	"net/url"
	"strings"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// sendHealthCheck sends an active health check. The check carries the token of
// its upstream if the token is at hand. A missing token does not make the
// upstream unhealthy, so the check neither waits for the token nor fails without
// it. But the check has the token fetched for the next check. Otherwise an
// upstream that refuses checks without a token would stay down: no request would
// go there and fetch one.
func (t *Transport) sendHealthCheck(req *http.Request) (*http.Response, error) {
	dial, ok := reverseproxy.GetDialInfo(req.Context())
	if !ok {
		return t.fail(req, http.StatusBadGateway, errNotProxied)
	}
	if redirectedElsewhere(req) {
		return t.fail(req, http.StatusBadGateway, errRedirected)
	}
	res, err := t.check(addressed(req, dial), dial)
	if res != nil {
		res.Request = req // what a redirect is compared with
	}
	return res, err
}

// errRedirected does not say where to: the proxy logs that beside it.
var errRedirected = errors.New("health_follow_redirects: the upstream redirects its health check to another host, and nothing is sent there; " +
	"set health_uri to a path that the upstream answers itself, or remove health_follow_redirects")

// addressed returns a check whose URL has the address that is dialed as its host.
// net/http keeps connections by that host. The reverse proxy's own URLs would mix
// them: all Unix sockets are `localhost` there.
func addressed(req *http.Request, dial reverseproxy.DialInfo) *http.Request {
	out, to := new(http.Request), new(url.URL)
	*out, *to = *req, *req.URL
	out.URL = to
	out.Host = cmp.Or(req.Host, req.URL.Host) // as it would be without a copy
	to.Host = dial.Address
	if caddy.IsUnixNetwork(dial.Network) || caddy.IsFdNetwork(dial.Network) {
		// A path is no host. Over TLS, the server's name is localhost, as in the
		// reverse proxy's URL. The port tells one socket from another: it is the path,
		// read as a number. Nobody dials it.
		to.Host = "localhost:" + new(big.Int).SetBytes([]byte(dial.Network+"/"+dial.Address)).String()
	}
	return out
}

// check sends a check to the upstream that dial names.
func (t *Transport) check(req *http.Request, dial reverseproxy.DialInfo) (*http.Response, error) {
	r, proxy := t.routeOfCheck(dial), t.proxyOf(req)
	if r.block == nil || t.exposes(req, dial, proxy) {
		return t.sendCheck(req, nil, nil)
	}
	if err := checkProxied(req, dial, proxy); err != nil {
		return t.fail(req, http.StatusBadGateway, err)
	}
	tok := r.source.Peek()
	if r.started.Load() { // false while Caddy only validates the config: it sends checks even then
		tok = r.source.PeekOrFetch()
	}
	out, err := t.outbound(req, r.block, tok)
	if err != nil {
		return t.fail(req, http.StatusBadGateway, err)
	}
	res, err := t.sendCheck(out, r.block, tok)
	if err == nil && tok != nil && t.refusesCheck(r.block, res.StatusCode) {
		r.replaceAfterCheck(req.Context(), tok)
	}
	return res, err
}

// keepFromLog returns the result of a check. It makes sure that Caddy logs no address
// that an upstream has chosen. net/http puts such an address into the error of a
// redirect that it can't read, and of a redirected check. So a redirected check that
// fails counts as answered, with a status that no check expects.
func (t *Transport) keepFromLog(req *http.Request, res *http.Response, err error) (*http.Response, error) {
	switch {
	case err == nil:
		if _, err := req.URL.Parse(res.Header.Get("Location")); err != nil {
			res.Header.Del("Location")
		}
	case req.Response != nil:
		t.logger.Info("a health check that the upstream has redirected failed",
			zap.Stringer("upstream", dialAddressOf(req.Context())), zap.Error(err))
		return &http.Response{Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Body: http.NoBody, Request: req}, nil
	}
	return res, err
}

// sendCheck sends a check with variables, as a request has them. If net/http connects
// to a proxy, Caddy notes that in the variables. Without them, Caddy would dial the
// upstream instead. net/http would keep that connection as one to the proxy, and send
// the requests for other upstreams over it.
func (t *Transport) sendCheck(req *http.Request, b *block, tok *token) (*http.Response, error) {
	ctx := context.WithValue(req.Context(), caddyhttp.VarsCtxKey, make(map[string]any))
	return t.send(req.WithContext(ctx), b, tok)
}

// refusesCheck reports whether the answer to a health check says that the
// upstream does not accept the token. The upstream is then down, and gets no
// requests. So only a check can have the token replaced. If the check expects
// this status, the status says nothing about the token.
func (t *Transport) refusesCheck(b *block, status int) bool {
	expected := t.healthStatus != 0 && caddyhttp.StatusCodeMatches(status, t.healthStatus)
	return b.refuses(status) && !expected
}

// redirectedElsewhere reports whether a health check follows a redirect to another host
// or port, or from http to https. The host is the host of the URL or, as the upstream
// itself sees it, the host in the field Host.
func redirectedElsewhere(req *http.Request) bool {
	first := req
	for first.Response != nil && first.Response.Request != nil {
		first = first.Response.Request
	}
	to := origin(req.URL.Scheme, req.URL.Host)
	return to != origin(first.URL.Scheme, first.URL.Host) && to != origin(first.URL.Scheme, first.Host)
}

// origin returns a scheme and a host such that two of one origin are equal
// (RFC 6454 §4).
func origin(scheme, host string) string {
	host = strings.TrimSuffix(host, map[string]string{"http": ":80", "https": ":443"}[scheme])
	return scheme + "://" + strings.ToLower(host)
}
