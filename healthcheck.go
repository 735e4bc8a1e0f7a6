// The reverse proxy's own requests: active health checks.

package outboundauth

import (
	"net/http"
	"slices"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// sendHealthCheck sends an active health check. It carries the token of its
// upstream if there is one at hand: an upstream is not unhealthy because its
// token is missing, so a check neither waits for one nor fails for lack of one.
// It has one fetched for the next: an upstream that lets nobody in without a
// token, and is therefore down, gets no request that would fetch one.
func (t *Transport) sendHealthCheck(req *http.Request) (*http.Response, error) {
	dial, _ := reverseproxy.GetDialInfo(req.Context())
	checked := dialAddressOf(req.Context())
	r, listed := t.routes[checked]
	switch {
	case listed:
	case slices.Contains(t.dials, checked) && !t.listedOnly: // as for a request
		r = t.fallback
	default:
		r = t.routeByHost(dial.Host)
	}
	if r.block == nil || redirectedElsewhere(req) || t.exposes(req, dial) {
		return t.send(req, nil, nil)
	}
	tok := r.source.Peek()
	if r.started.Load() { // and not just being validated: Caddy checks before it runs a config
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

// refusesCheck reports whether a check was answered as a request is whose token
// the upstream does not accept. It is down then, so that there will be no
// request by which the token is replaced. A check that expects this answer
// says nothing about the token.
func (t *Transport) refusesCheck(b *block, status int) bool {
	expected := t.healthStatus != 0 && caddyhttp.StatusCodeMatches(status, t.healthStatus)
	return b.refuses(status) && !expected
}

// routeByHost returns the route of a check whose address is none of an
// upstream: that of all the proxy's upstreams on this host, as a check may go to
// another port of theirs (health_port). If they differ, or there are none, and
// there are several routes, nobody can tell.
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

// redirectedElsewhere reports whether a check follows a redirect to a host other
// than the one that was to be checked: its token is not for that one.
func redirectedElsewhere(req *http.Request) bool {
	first := req
	for first.Response != nil && first.Response.Request != nil {
		first = first.Response.Request
	}
	return first.URL.Host != req.URL.Host
}
