// The reverse proxy's own requests: active health checks.

package outboundauth

import (
	"net/http"
	"slices"

	"go.uber.org/zap"

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
	dial, _ := reverseproxy.GetDialInfo(req.Context())
	checked := dialAddressOf(req.Context())
	r, listed := t.routes[checked]
	switch {
	case listed:
	case slices.Contains(t.dials, checked) && !t.listedOnly: // the same route as a request
		r = t.fallback
	default:
		r = t.routeByHost(dial.Host)
	}
	if r.block == nil || redirectedElsewhere(req) || t.exposes(req, dial) {
		return t.send(req, nil, nil)
	}
	tok := r.source.Peek()
	if r.started.Load() { // false while Caddy only validates the config: it sends checks even then
		tok = r.source.PeekOrFetch()
	}
	out, err := t.outbound(req, r.block, tok)
	if err != nil {
		return t.fail(req, http.StatusBadGateway, err)
	}
	res, err := t.send(out, r.block, tok)
	if err == nil && tok != nil && t.refusesCheck(r.block, res.StatusCode) {
		r.replaceAfterCheck(req.Context(), tok)
	}
	return res, err
}

// maxCheckRedirects is how many redirects a check follows: more lead in a circle.
const maxCheckRedirects = 9

// keepFromLog returns the result of a check. It makes sure that Caddy logs no address
// that an upstream has chosen. net/http puts such an address into the error of a
// redirect that it can't read, and of a redirected check. So a redirected check that
// fails counts as answered, with a status that no check expects.
func (t *Transport) keepFromLog(req *http.Request, res *http.Response, err error) (*http.Response, error) {
	redirects := 0
	for hop := req; hop.Response != nil && hop.Response.Request != nil; hop = hop.Response.Request {
		redirects++
	}
	switch {
	case err == nil:
		if _, err := req.URL.Parse(res.Header.Get("Location")); err != nil || redirects == maxCheckRedirects {
			res.Header.Del("Location")
		}
	case redirects > 0:
		t.logger.Info("a health check that the upstream has redirected failed",
			zap.String("upstream", dialAddressOf(req.Context()).address), zap.Error(err))
		return &http.Response{Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Body: http.NoBody, Request: req}, nil
	}
	return res, err
}

// refusesCheck reports whether the answer to a health check says that the
// upstream does not accept the token. The upstream is then down, and gets no
// requests. So only a check can have the token replaced. If the check expects
// this status, the status says nothing about the token.
func (t *Transport) refusesCheck(b *block, status int) bool {
	expected := t.healthStatus != 0 && caddyhttp.StatusCodeMatches(status, t.healthStatus)
	return b.refuses(status) && !expected
}

// routeByHost returns the route of a health check whose address is not that of
// an upstream. The check may go to another port of an upstream's host
// (health_port). So routeByHost returns the route that all upstreams on this
// host have. If they have different routes, or if there are none, it returns the
// zero route. Without upstream blocks, all checks have the fallback.
func (t *Transport) routeByHost(host string) route {
	if len(t.routes) == 0 {
		return t.fallback
	}
	var found route
	for i, upstream := range t.byHost[host] {
		if i > 0 && upstream != found {
			return route{}
		}
		found = upstream
	}
	return found
}

// redirectedElsewhere reports whether a health check follows a redirect to
// another host. That host must not get the upstream's token.
func redirectedElsewhere(req *http.Request) bool {
	first := req
	for first.Response != nil && first.Response.Request != nil {
		first = first.Response.Request
	}
	return first.URL.Host != req.URL.Host
}
