// One OAuth client at work, and what it does about a refused token.

package outboundauth

import (
	"context"
	"crypto/sha256"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
)

// A client is an OAuth client at work. It has the source of its token, and the
// endpoint from which the source gets the token.
type client struct {
	key      sourceKey
	source   *tokenSource
	endpoint *endpoint

	replacements replacements // spaces out the replacements after refused requests
	checks       replacements // spaces out the replacements after refused checks, which must not delay the others

	spare   bool          // no upstream needs the client: all have credentials of their own
	started chan struct{} // closed when the config runs
	start   func()        // closes started; it may be called again
	kept    bool          // health checks need the token
}

// newClient makes a client of e. transportConfig describes the transport of e. The
// caller has to release the client, and the client then releases e.
func newClient(e *endpoint, transportConfig []byte) (*client, error) {
	shape, err := e.credentials.shape(transportConfig)
	if err != nil {
		return nil, err
	}
	cl := &client{key: sha256.Sum256(shape), endpoint: e, started: make(chan struct{})}
	cl.start = sync.OnceFunc(func() {
		cl.source.begin(e)
		close(cl.started)
	})
	source, _, err := sources.LoadOrNew(cl.key, func() (caddy.Destructor, error) {
		return newTokenSource(), nil
	})
	if err != nil {
		return nil, err
	}
	cl.source = source.(*tokenSource)
	cl.source.attach(e, e.credentials.lifecycle())
	return cl, nil
}

// keep has the token renewed until the client is released, for the health checks of its
// upstreams. It may be called again.
func (cl *client) keep() {
	if !cl.kept {
		cl.kept = true
		cl.source.keep()
	}
}

// release gives the client's share of the source back. Requests that are still on
// their way can go on using the client.
func (cl *client) release() error {
	if cl.kept {
		cl.source.unkeep()
	}
	cl.source.detach(cl.endpoint, func() { _, _ = sources.Delete(cl.key) })
	return cl.endpoint.release()
}

// tokenForCheck returns the token for a health check: what Token returns to a request.
// But Caddy begins checks before the config runs, and even if it only validates the
// config. Until the config runs, there is no token request. waited reports whether the
// check has spent some of its time.
func (cl *client) tokenForCheck(ctx context.Context) (tok *token, waited bool, err error) {
	select {
	case <-cl.started:
	default:
		waited = true
		select {
		case <-cl.started:
		case <-ctx.Done():
			return nil, waited, ctx.Err()
		}
	}
	tok, got, err := cl.source.Token(ctx)
	return tok, waited || got.wait > 0, err
}

// replace returns a new token for one that an upstream has refused. It returns nil
// if there is no other token, or if it is too early to request one.
func (cl *client) replace(ctx context.Context, refused *token) *token {
	if !cl.retire(ctx, refused) {
		return nil
	}
	fresh, got, err := cl.source.other(ctx, refused)
	if got.wait > 0 {
		cl.endpoint.metrics.waitedAgain(ctx, got.wait)
	}
	if err != nil || fresh.is(refused) {
		return nil // the source has logged why
	}
	return fresh
}

// replaceLater replaces a refused token without waiting for the new one.
func (cl *client) replaceLater(ctx context.Context, refused *token) {
	if cl.retire(ctx, refused) {
		cl.source.Warm()
	}
}

// retire takes a refused token out of use, unless another has replaced it already.
// It reports whether the refused token may be replaced now.
func (cl *client) retire(ctx context.Context, refused *token) bool {
	if refused.inReserve(time.Now()) {
		return true // it has expired by the upstream's clock, and its renewal is due
	}
	cl.source.places.refused(dialAddressOf(ctx))
	if current := cl.source.Peek(); current != nil && !current.is(refused) {
		return true
	}
	if !cl.replacements.allow(refused) {
		return false
	}
	cl.refuse(ctx, refused)
	return true
}

// replaceAfterCheck replaces a token after an upstream has refused it in a health
// check, unless it is too early.
func (cl *client) replaceAfterCheck(ctx context.Context, refused *token) {
	if refused.inReserve(time.Now()) {
		return
	}
	cl.source.places.refused(dialAddressOf(ctx))
	if cl.checks.allow(refused) {
		cl.refuse(ctx, refused)
		cl.source.Warm()
	}
}

// refuse takes a token out of use after the upstream of a request has refused it.
// It tells operators about the first refusal of a token.
func (cl *client) refuse(ctx context.Context, refused *token) {
	if !cl.source.Refuse(refused) {
		return
	}
	cl.endpoint.metrics.refusedTokens.Inc()
	upstream := dialAddressOf(ctx).String()
	cl.endpoint.logger.Warn("the upstream refused the token", append(cl.endpoint.logFields(), zap.String("upstream", upstream))...)
	// The handlers run in their own goroutine: the request must not wait for them.
	go cl.endpoint.events.emit(eventRefused, map[string]any{"client": cl.endpoint.metrics.name, "upstream": upstream})
}
