// One block of credentials at work: what its upstreams are sent, and what their answers mean.

package outboundauth

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"sync/atomic"

	"github.com/outboundauth/caddy-outbound-auth/internal/replay"
)

// A block is the credentials of one block of the config at work. Blocks whose
// upstreams are sent the same token have a client each, and share its source.
type block struct {
	*client

	bearerField  string
	bearerPrefix string // with the space, if there is a scheme
	identity     []headerTemplate

	retryOn     []int // statuses
	replayLimit int   // bytes
	announces   bool  // larger bodies, always

	bound *boundTransport // bind_certificate; nil without it

	// The header of the latest token, made once for all requests. Its values
	// are shared by them and never written to.
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

// dress gives a request that goes upstream the bearer and identity headers. Its
// header map must be its own. t may be nil: then only the identity is sent.
func (b *block) dress(out *http.Request, t *token) error {
	for i := range b.identity {
		if err := b.identity[i].set(out.Context(), out.Header); err != nil {
			return err
		}
	}
	if t == nil {
		return nil
	}
	current := b.bearer.Load()
	if current == nil || current.of != t {
		current = &bearer{of: t, values: []string{b.bearerPrefix + t.value}}
		b.bearer.Store(current)
		b.source.Traced(out.Context()) // asked here, as it is rare
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

// announce has the upstream asked whether it wants the body of out, if more may come
// than what is kept of it: the upstream can then refuse the token before that. It is
// not asked without need, as that costs a round trip, and not every server knows
// such questions.
func (b *block) announce(out *http.Request, body *replay.Body) *http.Request {
	if !body.MayOutgrow(out) || !b.source.places.wantsAnnouncement(dialAddressOf(out.Context()), b.announces) {
		return out
	}
	return body.Announce(out)
}

// A verdict is what an upstream's answer means for the request that it answers.
type verdict int

const (
	accept  verdict = iota // it is the client's
	resend                 // send the request once more, with the same token
	replace                // send it once more, with a token that replaces this one
	giveUp                 // it can't be sent once more: the answer is the client's
)

// judge returns the verdict of an upstream's first answer. ctx and body are those of
// the request; body is nil if none is recorded. If it is to be sent once more, its
// first attempt does not go on reading it meanwhile, or too much of it would be gone.
func (b *block) judge(ctx context.Context, res *http.Response, body *replay.Body) verdict {
	v := accept
	switch {
	case b.refuses(res.StatusCode):
		v = replace
	case res.StatusCode == http.StatusExpectationFailed && body != nil && body.Expected():
		// The expectation was ours, so this is not for the client. RFC 9110
		// §10.1.1: repeat the request without it.
		b.source.places.unheard(dialAddressOf(ctx))
		v = resend
	}
	if v != accept && body != nil && !body.Hold() {
		return giveUp
	}
	return v
}

// refuses reports whether an upstream that answers with this status does not
// accept the token.
func (b *block) refuses(status int) bool { return slices.Contains(b.retryOn, status) }

// settle counts how a request ended that was sent once more, with a token that
// replaces the refused one: with an answer, or with err. If the new token helped,
// the next may be replaced soon.
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
