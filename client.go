// One OAuth client at work, and what it does about a refused token.

package outboundauth

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"net/http"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/replay"
)

// A client is Credentials at work: the source of the token, and the headers
// as they are sent.
type client struct {
	key      sourceKey
	source   *tokenSource
	endpoint *endpoint

	spare bool // no upstream needs it: all have credentials of their own

	bearerField  string
	bearerPrefix string // with the space, if there is a scheme
	identity     []headerTemplate

	retryOn     []int // statuses
	replayLimit int   // bytes
	renewals    renewals
	checks      renewals // after health checks, which must not hold up those after requests

	started atomic.Bool // the config runs

	expectsNothing atomic.Bool // the upstream has failed an expectation

	bound *boundTransport // bind_certificate; nil without it

	// The header of the latest token, made once for all requests. Its values
	// are shared by them and never written to.
	bearer atomic.Pointer[bearer]
}

type bearer struct {
	of     *token
	values []string
}

// newClient makes a client of e and its credentials, which are resolved and
// complete. transportConfig describes the transport of e. The client has to be
// released.
func newClient(e *endpoint, transportConfig []byte) (*client, error) {
	c := e.credentials
	life := lifecycle{
		refreshBefore:   time.Duration(c.RefreshBefore),
		defaultLifetime: cmp.Or(time.Duration(c.DefaultLifetime), defaultTokenLifetime),
		fetchTimeout:    cmp.Or(time.Duration(c.TokenTimeout), defaultTokenTimeout),
	}
	shape, err := c.shape(life, transportConfig)
	if err != nil {
		return nil, err
	}
	cl := &client{key: sha256.Sum256(shape), endpoint: e}

	e.metrics = metricsOf(c.name())
	field, scheme := c.BearerHeader.withDefaults()
	cl.bearerField = http.CanonicalHeaderKey(field)
	if scheme != "" {
		cl.bearerPrefix = scheme + " "
	}
	cl.retryOn = c.RetryOn
	if len(c.RetryOn) == 0 {
		cl.retryOn = []int{http.StatusUnauthorized}
	} else if c.RetryOn[0] == retryOff {
		cl.retryOn = nil
	}
	cl.replayLimit = int(max(0, cmp.Or(c.ReplayBody, defaultReplayBody)))
	if c.Tenant != nil {
		cl.identity = append(cl.identity, newHeaderTemplate(c.Tenant.field(), c.Tenant.Value))
	}
	for _, field := range sortedKeys(c.Headers) {
		cl.identity = append(cl.identity, newHeaderTemplate(field, c.Headers[field]))
	}

	if e.discovery != nil {
		if e.discovery.issuerMetadata, err = acquireIssuer(&c, transportConfig); err != nil {
			return nil, err
		}
	}
	source, _, err := sources.LoadOrNew(cl.key, func() (caddy.Destructor, error) {
		return newTokenSource(life), nil
	})
	if err != nil {
		return nil, err
	}
	cl.source = source.(*tokenSource)
	cl.source.attach(e)
	return cl, nil
}

// release gives the client's share of the source back. The client stays
// usable for the requests that are still on their way.
func (cl *client) release() error {
	cl.source.detach(cl.endpoint)
	_, err := sources.Delete(cl.key)
	if d := cl.endpoint.discovery; d != nil {
		err = errors.Join(err, d.release())
	}
	return err
}

// header sets the bearer and identity headers for the request that ctx
// belongs to. t may be nil: then only the identity is sent.
func (cl *client) header(ctx context.Context, out http.Header, t *token) error {
	for i := range cl.identity {
		if err := cl.identity[i].set(ctx, out); err != nil {
			return err
		}
	}
	if t == nil {
		return nil
	}
	b := cl.bearer.Load()
	if b == nil || b.of != t {
		b = &bearer{of: t, values: []string{cl.bearerPrefix + t.value}}
		cl.bearer.Store(b)
		cl.source.Traced(ctx) // asked here, as it is rare
	}
	out[cl.bearerField] = b.values
	return nil
}

// fields adds the names of all headers that the client sends to s.
func (cl *client) fields(s *fieldSet) {
	s.add(cl.bearerField)
	for i := range cl.identity {
		s.add(cl.identity[i].field)
	}
}

// renew replaces a token that an upstream has refused. It returns nil if
// there is no other token, or if it is too early to ask for one.
func (cl *client) renew(ctx context.Context, refused *token) *token {
	if !cl.drop(ctx, refused) {
		return nil
	}
	fresh, got, err := cl.source.obtain(ctx)
	if got.wait > 0 {
		cl.endpoint.metrics.waitedAgain(ctx, got.wait)
	}
	if err != nil || fresh.value == refused.value {
		return nil // the source has logged why
	}
	return fresh
}

// replace replaces a refused token without waiting for the new one.
func (cl *client) replace(ctx context.Context, refused *token) {
	if cl.drop(ctx, refused) {
		cl.source.Warm()
	}
}

// drop marks a token as refused, unless it has been replaced already.
// It returns false if it is too early for that.
func (cl *client) drop(ctx context.Context, refused *token) bool {
	if current := cl.source.Cached(); current != nil && current != refused {
		return true
	}
	if !cl.renewals.allow(refused) {
		return false
	}
	cl.invalidate(ctx, refused)
	return true
}

// invalidate takes a token out of use that the upstream of a request has
// refused. The first to do so tells operators.
func (cl *client) invalidate(ctx context.Context, refused *token) {
	if !cl.source.Invalidate(refused) {
		return
	}
	cl.endpoint.metrics.dropped.Inc()
	dial, _ := reverseproxy.GetDialInfo(ctx)
	cl.endpoint.logger.Warn("the upstream refused the token", append(cl.endpoint.logFields(), zap.String("upstream", dial.Address))...)
	// In a goroutine of its own: the request goes on, however slow the
	// handlers are.
	go cl.endpoint.events.emit(eventRejected, map[string]any{"client": cl.endpoint.metrics.name, "upstream": dial.Address})
}

// announce has the upstream asked whether it wants the body of out, if that may
// be longer than what can be kept of it, and the upstream heeds such questions.
func (cl *client) announce(out *http.Request, body *replay.Body) *http.Request {
	if cl.replayLimit == 0 || cl.expectsNothing.Load() {
		return out
	}
	return body.Announce(out)
}
