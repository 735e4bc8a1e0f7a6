// One block of credentials at work: what goes to its upstreams, and what their answers mean.

package outboundauth

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/replay"
	"github.com/outboundauth/caddy-outbound-auth/internal/verdict"
)

// A block is one block of credentials of the config at work. Each block has a client
// of its own. If the upstreams of two blocks get the same token, they share a source.
type block struct {
	*client

	bearerField  string
	bearerPrefix string // the scheme and a space; "" without a scheme
	identity     []headerTemplate

	retryOn     []int // the statuses that refuse a token, and retryGRPC
	replayLimit int   // in bytes
	announces   bool  // larger bodies are always announced

	bound  *boundTransport // nil without bind_certificate
	proves bool            // with dpop: the tokens are bound to a key

	// The header with the latest token. It is made once for all requests. They
	// share its values, and nobody writes to them.
	bearer atomic.Pointer[bearer]
}

type bearer struct {
	of     *token
	values []string
	hash   string // of the token, for proofs; "" if it is bound to no key
}

// newBlock returns the block whose client is cl.
func newBlock(cl *client) *block {
	c := &cl.endpoint.credentials
	field, scheme := c.BearerHeader.withDefaults()
	b := &block{client: cl, bearerField: http.CanonicalHeaderKey(field), proves: c.DPoP != ""}
	if b.proves {
		scheme = dpop.Scheme
	}
	if scheme != "" {
		b.bearerPrefix = scheme + " "
	}
	b.retryOn = c.RetryOn
	if len(c.RetryOn) == 0 {
		b.retryOn = []int{http.StatusUnauthorized, retryGRPC}
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

// dress adds the bearer and identity headers to a request that goes upstream, and the proof
// if the token is bound to a key. The request must have a header map of its own.
func (b *block) dress(out *http.Request, t *token) error {
	for i := range b.identity {
		if err := b.identity[i].set(out.Context(), out.Header); err != nil {
			return err
		}
	}
	current := b.bearer.Load()
	if current == nil || current.of != t {
		current = &bearer{of: t, values: []string{b.bearerPrefix + t.value}}
		if t.key != nil {
			current.hash = dpop.Hash(t.value)
		}
		b.bearer.Store(current)
		b.source.Traced(out.Context()) // noted only here, because a new token is rare
	}
	out.Header[b.bearerField] = current.values
	if t.key == nil {
		return nil
	}
	return t.key.Prove(out, current.hash, b.source.nonces.Of(dialAddressOf(out.Context())))
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
	if !body.MayOutgrow(out) || !b.source.wantsAnnouncement(dialAddressOf(out.Context()), always) {
		return out
	}
	return body.Announce(out)
}

// A course is what is done about an upstream's answer.
type course int

const (
	accept  course = iota // the client gets the answer
	resend                // send the request once more, with the same token
	replace               // send the request once more, with a new token
	giveUp                // the request can't be sent once more: the client gets the answer
)

// judge returns what is done about an upstream's first answer. ctx and body belong to
// the request; body is nil if no body is recorded. Before the request is sent once
// more, judge stops the first attempt from reading the body. Otherwise the attempt
// could read more of the body than is recorded.
func (b *block) judge(ctx context.Context, res *http.Response, body *replay.Body) course {
	next := accept
	switch {
	case b.refuses(res):
		next = replace
	case res.StatusCode == http.StatusExpectationFailed && body != nil && body.Expected():
		// The expectation was ours, so the client must not get this answer.
		// RFC 9110 §10.1.1 says: repeat the request without the expectation.
		b.source.unheard(dialAddressOf(ctx))
		next = resend
	}
	if next != accept && body != nil && !body.Hold() {
		return giveUp
	}
	return next
}

// refuses reports whether an answer means that the upstream does not accept the token.
func (b *block) refuses(res *http.Response) bool {
	refused := slices.Contains(b.retryOn, res.StatusCode) || (refusedCall(res) && slices.Contains(b.retryOn, retryGRPC))
	return refused && !b.refusesProof(res)
}

// refusesProof reports whether an answer means that the upstream does not accept the proof.
func (b *block) refusesProof(res *http.Response) bool { return b.proves && refusesProof(res) }

// A sending is a request on its way to its upstream. The answer is evidence for and
// against the token.
type sending struct {
	*http.Request
	tok   *token
	check bool      // it is an active health check
	again bool      // it was refused before
	sent  time.Time // zero if no upstream has a place yet: then nothing is to be noted
}

// sending returns a request that is about to be sent.
func (b *block) sending(out *http.Request, tok *token, check bool) sending {
	s := sending{Request: out, tok: tok, check: check}
	if !b.source.places.none() {
		s.sent = time.Now()
	}
	return s
}

// kind is computed only if the upstream has a place.
func (s sending) kind() verdict.Kind { return verdict.KindOf(s.Method, s.URL.Path, s.check) }

// heard notes an answer that the client gets, and that does not refuse the token so far. A
// gRPC call says in its trailers how it ended. It is too late then to send it again, but
// those that come next need not be refused.
func (b *block) heard(s sending, res *http.Response) {
	replaces := slices.Contains(b.retryOn, retryGRPC)
	switch {
	case !isGRPC(res.Header):
		b.accepted(s, res)
	case replaces || !s.sent.IsZero():
		watchCall(res, func(refused bool) {
			switch {
			case !refused:
				b.accepted(s, res)
			case b.proves && (isAboutProof(res.Header) || isAboutProof(res.Trailer)): // it is too late for another proof
			case replaces:
				b.replaceLater(s, res)
			}
		})
	}
}

// succeeded reports whether an answer says that the upstream has accepted the request. A
// redirect may lead to a login.
func succeeded(res *http.Response) bool {
	return res.StatusCode/100 == 2 || res.StatusCode == http.StatusNotModified || res.StatusCode == http.StatusSwitchingProtocols
}

// accepted notes an answer that does not refuse the token. It is evidence only if it says
// that the upstream has seen the token: a cache, for example, has not.
func (b *block) accepted(s sending, res *http.Response) {
	if s.sent.IsZero() || !succeeded(res) || s.Method == http.MethodOptions || res.Header["Age"] != nil {
		return
	}
	if at := b.source.places.find(dialAddressOf(s.Context())); at != nil {
		b.source.accepted(at, verdict.Acceptance{Kind: s.kind(), Token: s.tok.value, Check: s.check, Again: s.again, Sent: s.sent})
	}
}

// refusal returns the refusal of a token, or nil if the upstream says that the token is
// good, but not for this request. All refusals come through here: so operators are told here
// of an upstream that wants bound tokens.
func (b *block) refusal(s sending, res *http.Response) *refusal {
	says := challengeError(res.Header)
	if says == "insufficient_scope" {
		return nil
	}
	if !b.proves && wantsBoundTokens(res.Header) {
		b.tellUnbound(s.Context())
	}
	return &refusal{of: s.tok, Refusal: verdict.Refusal{
		Kind: s.kind(), Token: s.tok.value, Check: s.check, InvalidToken: says == "invalid_token",
	}}
}

// replace returns the token with which a refused request is sent once more, and the
// refusal. It returns no token if the client gets the upstream's answer.
func (b *block) replace(s sending, res *http.Response) (*token, *refusal) {
	r := b.refusal(s, res)
	if r == nil {
		if !s.check {
			b.endpoint.metrics.refused(s.Context(), refusalPath)
		}
		return nil, nil
	}
	return b.another(s.Context(), r), r
}

// replaceLater replaces a refused token for the requests that come next.
func (b *block) replaceLater(s sending, res *http.Response) {
	outcome := refusalNotRepeatable
	r := b.refusal(s, res)
	if r != nil {
		b.anotherLater(s.Context(), r)
	}
	if r == nil || r.isPath {
		outcome = refusalPath
	}
	if !s.check {
		b.endpoint.metrics.refused(s.Context(), outcome)
	}
}

// settle notes how a request ended after it was sent once more with a new token. It ended
// with an answer, which may refuse the token again, or with err. Of some errors nobody
// knows whether the upstream has looked at the token.
func (b *block) settle(s sending, r *refusal, res *http.Response, again bool, err error) {
	outcome := refusalRecovered
	switch {
	case err != nil:
		outcome = refusalNoAnswer
		b.source.unsettled(r)
	case b.refusesProof(res): // which is counted already
		b.source.unsettled(r)
		return
	case again:
		outcome = refusalRefusedAgain
		b.settled(s.Context(), r, false, s.tok)
	case succeeded(res):
		b.heard(s, res)
		b.settled(s.Context(), r, true, s.tok)
	default:
		b.source.unsettled(r)
	}
	if !s.check {
		b.endpoint.metrics.refused(s.Context(), outcome)
	}
}

// unrepeatable reports whether a request with a body probably can't be sent once more.
func (b *block) unrepeatable(req *http.Request) bool {
	return len(b.retryOn) > 0 && replay.MayOutgrow(req, b.replayLimit)
}
