// One OAuth client at work, and what it does about a refused token.

package outboundauth

import (
	"context"
	"crypto/sha256"
	"net/http"
	"slices"
	"strings"
	"sync"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/verdict"
)

// A client is an OAuth client at work. It has the source of its token, and the
// endpoint from which the source gets the token.
type client struct {
	key      sourceKey
	source   *tokenSource
	endpoint *endpoint

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

// another returns the token with which a refused request is sent once more. It returns
// nil if the client of the gateway gets the upstream's answer. ctx is the context of the
// request.
func (cl *client) another(ctx context.Context, r *refusal) *token {
	fresh, waited := cl.source.another(ctx, dialAddressOf(ctx), r)
	if waited > 0 && !r.Check {
		cl.endpoint.metrics.waitedAgain(ctx, waited)
	}
	if fresh == nil && !r.Check {
		outcome := refusalNoToken
		if r.isPath {
			outcome = refusalPath
		}
		cl.endpoint.metrics.refused(ctx, outcome)
	}
	cl.tellNews(ctx, r)
	return fresh
}

// anotherLater gets another token if one was refused, for a request that can't be sent
// again.
func (cl *client) anotherLater(ctx context.Context, r *refusal) {
	if cl.source.anotherLater(dialAddressOf(ctx), r) {
		cl.tellRefused(ctx)
	}
	cl.tellNews(ctx, r)
}

// settled notes how a request ended that was sent once more with a new token.
func (cl *client) settled(ctx context.Context, r *refusal, accepted bool, fresh *token) {
	if cl.source.settled(r, accepted, fresh) == verdict.Token {
		cl.tellRefused(ctx)
	}
	cl.tellNews(ctx, r)
}

// tellRefused tells operators that an upstream has refused a token, and that another one
// replaces it.
func (cl *client) tellRefused(ctx context.Context) {
	cl.endpoint.metrics.refusedTokens.Inc()
	upstream := dialAddressOf(ctx).String()
	cl.endpoint.logger.Warn("the upstream refused the token", append(cl.endpoint.logFields(), zap.String("upstream", upstream))...)
	// The handlers run in their own goroutine: the request must not wait for them.
	go cl.endpoint.events.emit(eventRefused, map[string]any{"client": cl.endpoint.metrics.name, "upstream": upstream})
}

// tellProof tells operators of an upstream that refuses one proof after the other, if it is
// time for that. out is the request that had the last one.
func (cl *client) tellProof(out *http.Request, res *http.Response) {
	upstream := dialAddressOf(out.Context())
	if !cl.source.noticeProof(upstream) {
		return
	}
	alg := cl.endpoint.credentials.DPoP
	listed := strings.Fields(challengeParameter(res.Header, "algs", dpop.Scheme))
	advice := "check that it sees the same URL as the gateway, even behind a balancer; and that the clocks agree"
	switch {
	case challengeParameter(res.Header, "error", dpop.Scheme) == dpop.CodeUseNonce:
		advice = "it does not accept the nonce that it sends, or sends none (DPoP-Nonce); ask its operator"
	case len(listed) > 0 && !slices.Contains(listed, alg):
		advice = "it does not list the algorithm of dpop; set another"
	}
	cl.endpoint.logger.Warn("the upstream refuses the proofs of dpop: "+advice, append(cl.endpoint.logFields(),
		zap.Stringer("upstream", upstream), zap.String("htm", out.Method), zap.String("htu", dpop.URI(out)), zap.String("alg", alg))...)
}

// tellUnbound tells operators of an upstream that accepts bound tokens only, if it is time for
// that.
func (cl *client) tellUnbound(ctx context.Context) {
	if upstream := dialAddressOf(ctx); cl.source.noticeProof(upstream) {
		cl.endpoint.logger.Warn("the upstream wants tokens that are bound to a key: add dpop",
			append(cl.endpoint.logFields(), zap.Stringer("upstream", upstream))...)
	}
}

// tellNews tells operators of an upstream that refuses requests whatever the token, if it
// is time for that.
func (cl *client) tellNews(ctx context.Context, r *refusal) {
	if !r.news {
		return
	}
	r.news = false
	cl.endpoint.logger.Info("the upstream refuses requests whatever the token",
		append(cl.endpoint.logFields(), zap.Stringer("upstream", dialAddressOf(ctx)))...)
}
