package outboundauth

import (
	"context"
	"net"
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// isHealthCheck recognizes the reverse proxy's own requests: unlike those
// that the server has received, they have no variables.
func isHealthCheck(ctx context.Context) bool {
	return ctx.Value(caddyhttp.VarsCtxKey) == nil
}

// sendHealthCheck sends an active health check. It carries the token of its
// upstream if there is one at hand: an upstream is not unhealthy because its
// token is missing, so a check neither waits for one nor fails for lack of one.
func (t *Transport) sendHealthCheck(req *http.Request) (*http.Response, error) {
	dial, _ := reverseproxy.GetDialInfo(req.Context())
	cl, listed := t.clients[dialAddress{dial.Network, dial.Address}]
	if !listed {
		if cl = t.clientByHost(dial.Host); cl == nil {
			cl = t.fallback
		}
	}
	if cl == nil || redirectedElsewhere(req) || t.exposes(req, dial) {
		return t.send(req)
	}
	out, err := t.outbound(req, cl, cl.source.Cached())
	if err != nil {
		return t.refuse(req, http.StatusBadGateway, err)
	}
	return t.send(out)
}

// clientByHost returns the client of the upstream block that names the host of
// a check, for checks of another port (health_port). If blocks with different
// credentials name it, nobody can tell.
func (t *Transport) clientByHost(host string) *client {
	var found *client
	for address, cl := range t.clients {
		named, _, err := net.SplitHostPort(address.address)
		if err != nil || named != host || cl == found {
			continue
		}
		if found != nil {
			return nil
		}
		found = cl
	}
	return found
}

// redirectedElsewhere tells whether a check follows a redirect to a host other
// than the one that was to be checked: its token is not for that one.
func redirectedElsewhere(req *http.Request) bool {
	first := req
	for first.Response != nil && first.Response.Request != nil {
		first = first.Response.Request
	}
	return first.URL.Host != req.URL.Host
}
