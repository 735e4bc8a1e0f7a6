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
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// sendHealthCheck sends an active health check. The check carries the token of its
// upstream, and waits for it as a request does. A missing token does not make the
// upstream unhealthy. Then nothing is sent, and the upstream keeps its verdict.
func (t *Transport) sendHealthCheck(req *http.Request) (*http.Response, error) {
	dial, ok := reverseproxy.GetDialInfo(req.Context())
	if !ok {
		return t.fail(req, http.StatusBadGateway, errNotProxied)
	}
	target := t.health.target(req, dial)
	if redirectedElsewhere(req) {
		t.health.note(target, healthAnswer{failed: true})
		return t.fail(req, http.StatusBadGateway, errRedirected)
	}
	res, err := t.check(addressed(req, dial), dial, target)
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
func (t *Transport) check(req *http.Request, dial reverseproxy.DialInfo, target checkTarget) (*http.Response, error) {
	b, proxy := t.routeOfCheck(dial).ofChecks(), t.proxyOf(req)
	if b == nil || t.exposes(req, dial, proxy) {
		return t.sendCheck(req, nil, nil)
	}
	if err := checkProxied(req, dial, proxy); err != nil {
		return t.fail(req, http.StatusBadGateway, err)
	}
	tok, waited, err := b.tokenForCheck(req.Context())
	if err != nil {
		return t.repeatAnswer(req, target)
	}
	res, sent, err := t.checkWith(req, b, tok)
	waited = waited || sent != tok
	if err != nil && waited && outOfTime(req.Context()) {
		return t.repeatAnswer(req, target) // the upstream had too little of the check's time
	}
	if err == nil && sent.inReserve(time.Now()) && t.refusesCheck(b, res) {
		_ = res.Body.Close()
		return t.repeatAnswer(req, target) // the token has expired by the upstream's clock
	}
	t.health.watch(req, target, res, err)
	return res, err
}

// checkWith sends a check with a token, and once more if the upstream has refused the
// token and there is another one: otherwise it would be down until the next check. It
// returns the token that was sent last.
func (t *Transport) checkWith(req *http.Request, b *block, tok *token) (*http.Response, *token, error) {
	out, err := t.outbound(req, b, tok)
	if err != nil {
		res, err := t.fail(req, http.StatusBadGateway, err)
		return res, tok, err
	}
	p := passage{Transport: t, block: b, req: req, isCheck: true}
	first := b.sending(out, tok, true)
	res, err := p.send(out, tok)
	switch {
	case err != nil:
		return nil, tok, err
	case !t.refusesCheck(b, res):
		b.heard(first, res)
		return res, tok, nil
	}
	next, refused := b.replace(first, res)
	if next == nil {
		return res, tok, nil
	}
	res, err = p.sendAgain(next, refused, res)
	return res, next, err
}

// repeatAnswer answers a check that is not sent. The time of the check may be over.
// net/http accepts the answer all the same, because all of it is in memory.
func (t *Transport) repeatAnswer(req *http.Request, target checkTarget) (*http.Response, error) {
	answer := t.health.last(target)
	t.logger.Debug("no token for a health check: the upstream keeps its verdict",
		zap.String("upstream", target.address), zap.Bool("up", t.health.accepts(answer)))
	if answer.failed {
		return t.fail(req, http.StatusServiceUnavailable, errNoTokenForCheck)
	}
	closeBody(req)
	return answer.response(req), nil
}

// errNoTokenForCheck does not repeat the error: the proxy has logged it.
var errNoTokenForCheck = errors.New("no token for a health check; its last check ended with an error")

// outOfTime reports whether the time of a check is over. Nobody asks whether ctx has
// ended: net/http has another timer as well, which may be faster.
func outOfTime(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ok && !time.Now().Before(deadline)
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

// refusesCheck reports whether the answer to a health check says that the upstream does
// not accept the token. If the check expects this status, it says nothing about the
// token.
func (t *Transport) refusesCheck(b *block, res *http.Response) bool {
	return b.refuses(res) && !t.health.expects(res.StatusCode)
}

// redirectedElsewhere reports whether a health check follows a redirect to another host
// or port, or from http to https. The host is the host of the URL or, as the upstream
// itself sees it, the host in the field Host.
func redirectedElsewhere(req *http.Request) bool {
	first := firstOf(req)
	to := origin(req.URL.Scheme, req.URL.Host)
	return to != origin(first.URL.Scheme, first.URL.Host) && to != origin(first.URL.Scheme, first.Host)
}

// origin returns a scheme and a host such that two of one origin are equal
// (RFC 6454 §4).
func origin(scheme, host string) string {
	host = strings.TrimSuffix(host, map[string]string{"http": ":80", "https": ":443"}[scheme])
	return scheme + "://" + strings.ToLower(host)
}
