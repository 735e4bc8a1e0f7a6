// The placeholders that the transport sets.

package outboundauth

import (
	"context"

	"github.com/caddyserver/caddy/v2"
)

const (
	// For handle_errors: why there is no token.
	phError       = "http.oauth2.error"
	phDescription = "http.oauth2.error_description"
	phStatus      = "http.oauth2.status"

	// For logs: whose token the request has, and how it got it.
	phKey     = "http.oauth2.key"
	phClient  = "http.oauth2.client"
	phToken   = "http.oauth2.token"
	phWait    = "http.oauth2.wait_ms"
	phRetried = "http.oauth2.retried"

	// Only for the response route of failures (failure.go): the error, and
	// whether there is one.
	phFailure = "http.oauth2.failure"
	phFailed  = "http.oauth2.failed"

	// Only for the next attempt: whose turn it is to read the body (turn.go). Handlers
	// that are nested in one another share the replacer of a request. The variables of
	// a request won't do: a connection that is still being made may read them.
	phTurn = "http.oauth2.turn"
)

// replacerOf returns the replacer of the request that ctx belongs to. The
// replacer of an active health check knows nothing about any request.
func replacerOf(ctx context.Context) (*caddy.Replacer, bool) {
	repl, ok := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	return repl, ok
}
