// One block of credentials at work: what goes to its upstreams, and what their answers mean.

package outboundauth

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"sync/atomic"

	"github.com/outboundauth/caddy-outbound-auth/internal/replay"
)

// A block is one block of credentials of the config at work. Each block has a client
// of its own. If the upstreams of two blocks get the same token, they share a source.
type block struct {
	*client

	bearerField  string
	bearerPrefix string // the scheme and a space; "" without a scheme
	identity     []headerTemplate

	retryOn     []int // the statuses that refuse a token
	replayLimit int   // in bytes
	announces   bool  // larger bodies are always announced

	bound *boundTransport // nil without bind_certificate

	// The header with the latest token. It is made once for all requests. They
	// share its values, and nobody writes to them.
	bearer atomic.Pointer[bearer]
}

type bearer struct {
	of     *token
	values []string
}

// newBlock returns the block whose client is cl.
func newBlock(cl *client) *block {
	c := &cl.endpoint.credentials
	field, scheme := c.BearerHeader.withDefaults()
	b := &block{client: cl, bearerField: http.CanonicalHeaderKey(field)}
	if scheme != "" {
		b.bearerPrefix = scheme + " "
	}
	b.retryOn = c.RetryOn
	if len(c.RetryOn) == 0 {
		b.retryOn = []int{http.StatusUnauthorized}
	} else if c.neverRetries() {
		b.retryOn = nil
	}
	b.replayLimit = defaultReplayBody
	if r := c.ReplayBody; r != nil {
		b.replayLimit = int(max(0, cmp.Or(r.Size, defaultReplayBody)))
		b.announces = r.Announce
	}
	if c.Tenant != nil {
		b.identity = append(b.identity, newHeaderTemplate(c.Tenant.field(), c.Tenant.Value))
	}
	for _, field := range sortedKeys(c.Headers) {
		b.identity = append(b.identity, newHeaderTemplate(field, c.Headers[field]))
	}
	return b
}

// dress adds the bearer and identity headers to a request that goes upstream. The
// request must have a header map of its own.
func (b *block) dress(out *http.Request, t *token) error {
	for i := range b.identity {
		if err := b.identity[i].set(out.Context(), out.Header); err != nil {
			return err
		}
	}
	current := b.bearer.Load()
	if current == nil || current.of != t {
		current = &bearer{of: t, values: []string{b.bearerPrefix + t.value}}
		b.bearer.Store(current)
		b.source.Traced(out.Context()) // noted only here, because a new token is rare
	}
	out.Header[b.bearerField] = current.values
	return nil
}

// fields adds the names of all headers that the block sends to s.
func (b *block) fields(s *fieldSet) {
	s.add(b.bearerField)
	for i := range b.identity {
		s.add(b.identity[i].field)
	}
}

// announce has the upstream asked whether it wants the body of out, if the body may
// be larger than the part that is kept. The upstream can then refuse the token
// before it gets the body. The question costs a round trip, and not every server
// understands it. So the upstream is not asked without need.
func (b *block) announce(out *http.Request, body *replay.Body) *http.Request {
	always := b.announces || out.Header.Get("Expect") != "" // or the caller wants it asked
	if b.replayLimit == 0 && !always {
		return out // whoever wants nothing kept wants no questions asked either
	}
	if !body.MayOutgrow(out) || !b.source.places.wantsAnnouncement(dialAddressOf(out.Context()), always) {
		return out
	}
	return body.Announce(out)
}

// A verdict is what an upstream's answer means for its request.
type verdict int

const (
	accept  verdict = iota // the client gets the answer
	resend                 // send the request once more, with the same token
	replace                // send the request once more, with a new token
	giveUp                 // the request can't be sent once more: the client gets the answer
)

// judge returns the verdict on an upstream's first answer. ctx and body belong to
// the request; body is nil if no body is recorded. Before the request is sent once
// more, judge stops the first attempt from reading the body. Otherwise the attempt
// could read more of the body than is recorded.
func (b *block) judge(ctx context.Context, res *http.Response, body *replay.Body) verdict {
	v := accept
	switch {
	case b.refuses(res.StatusCode):
		v = replace
	case res.StatusCode == http.StatusExpectationFailed && body != nil && body.Expected():
		// The expectation was ours, so the client must not get this answer.
		// RFC 9110 §10.1.1 says: repeat the request without the expectation.
		b.source.places.unheard(dialAddressOf(ctx))
		v = resend
	}
	if v != accept && body != nil && !body.Hold() {
		return giveUp
	}
	return v
}

// refuses reports whether an answer with this status means that the upstream does
// not accept the token.
func (b *block) refuses(status int) bool { return slices.Contains(b.retryOn, status) }

// settle counts how a request ended after it was sent once more with a new token. It
// ended with an answer, or with err. If the new token helped, another replacement
// may follow soon.
func (b *block) settle(ctx context.Context, res *http.Response, err error) {
	switch {
	case err != nil:
		b.endpoint.metrics.refused(ctx, refusalNoAnswer)
	case b.refuses(res.StatusCode):
		b.endpoint.metrics.refused(ctx, refusalRefusedAgain)
	default:
		b.endpoint.metrics.refused(ctx, refusalRecovered)
		b.replacements.help()
	}
}
