package outboundauth

import (
	"context"
	"io"
	"net/http"
	"net/http/httptrace"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// maxDrain is how much of a refusal's body is read so that its connection can
// be used again.
const maxDrain = 64 << 10

// maxPause is how long a large body waits for an upstream that does not say
// whether it wants it.
const maxPause = 100 * time.Millisecond

// renewals holds back the renewal of tokens that an upstream refuses although
// they are new: otherwise an upstream that refuses everything would make the
// gateway ask the authorization server for a token for each request.
type renewals struct {
	mu      sync.Mutex // guards all below
	failed  int        // in a row: the upstream refused the new token too
	last    time.Time  // of them
	until   time.Time  // no renewal before
	refused *token     // the last new token that was refused, counted once

	backingOff atomic.Bool // failed > 0; spares the other requests the lock
}

// allowed tells whether a token that was refused may be replaced now.
func (r *renewals) allowed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !time.Now().Before(r.until)
}

// fail notes that t was refused, which had just replaced a refused token.
func (r *renewals) fail(t *token) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.refused == t {
		return // another request with the same token
	}
	r.refused = t
	r.last = time.Now()
	r.until = r.last.Add(backoff(r.failed, permanentBackoff, maxPermanentBackoff))
	r.failed++
	r.backingOff.Store(true)
}

// succeed notes that the upstream accepted a token. That ends the back-off,
// but for its first interval: an upstream may accept a token for some paths
// and refuse any for others.
func (r *renewals) succeed() {
	if !r.backingOff.Load() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed, r.refused = 0, nil
	r.until = r.last.Add(permanentBackoff)
	r.backingOff.Store(false)
}

// roundTrip sends req with a token. If the upstream refuses the token, it is
// replaced, and the request sent once more.
func (t *Transport) roundTrip(req *http.Request, cl *client, tok *token) (*http.Response, error) {
	out, err := t.outbound(req, cl, tok)
	if err != nil {
		return t.refuse(req, http.StatusBadGateway, err)
	}
	var body *replayBody
	if hasBody(req) && len(cl.retryOn) > 0 {
		body = newReplayBody(out.Body, cl.replayLimit)
		defer body.commit()
		out.Body = body.first()
		if req.ContentLength > int64(cl.replayLimit) {
			out = expectContinue(out, body)
		}
	}
	res, err := t.send(out)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(cl.retryOn, res.StatusCode) {
		cl.renewals.succeed()
		return res, nil
	}

	// While the new token is fetched, the first attempt must not go on
	// reading the body, or there would be too little left to send it again.
	if body != nil && !body.hold() {
		cl.discard(tok) // for the next request
		return res, nil
	}
	fresh := cl.renew(req.Context(), tok)
	if fresh == nil {
		return res, nil // as the upstream answered
	}
	if out, err = t.outbound(req, cl, fresh); err != nil {
		return res, nil //nolint:nilerr // it was possible before
	}
	if body != nil {
		out.Body = body.again()
	}
	_, _ = io.CopyN(io.Discard, res.Body, maxDrain)
	_ = res.Body.Close()

	res, err = t.send(out)
	if err != nil {
		return nil, err
	}
	if slices.Contains(cl.retryOn, res.StatusCode) {
		cl.renewals.fail(fresh)
	} else {
		cl.renewals.succeed()
	}
	return res, nil
}

// expectContinue asks the upstream to say whether it wants the body of out
// (RFC 9110 §10.1.1), which is longer than what is kept of it: the body waits
// for that where the recording ends. Once more had been sent, it would be
// too late to send it again.
func expectContinue(out *http.Request, body *replayBody) *http.Request {
	out.Header["Expect"] = []string{"100-continue"}
	body.pause = maxPause
	trace := &httptrace.ClientTrace{Got100Continue: body.proceed}
	return out.WithContext(httptrace.WithClientTrace(out.Context(), trace))
}

// renew replaces a token that an upstream has refused. It returns nil if
// there is no other token, or if it is too early to ask for one.
func (cl *client) renew(ctx context.Context, refused *token) *token {
	if !cl.drop(refused) {
		return nil
	}
	fresh, err := cl.source.Token(ctx)
	if err != nil {
		return nil // the source has logged it
	}
	if fresh.value == refused.value { // from a cache of the server's
		cl.renewals.fail(fresh)
		return nil
	}
	return fresh
}

// discard replaces a refused token without waiting for the new one.
func (cl *client) discard(refused *token) {
	if cl.drop(refused) {
		cl.source.Warm()
	}
}

// drop takes a refused token out of use, unless it has been replaced already.
// It returns false if it is too early for that.
func (cl *client) drop(refused *token) bool {
	if current := cl.source.Cached(); current != nil && current != refused {
		return true
	}
	if !cl.renewals.allowed() {
		return false
	}
	cl.source.Invalidate(refused)
	return true
}
