package outboundauth

import (
	"context"
	"io"
	"maps"
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
func (t *Transport) roundTrip(req *http.Request, cl *client, tok *token) (res *http.Response, err error) {
	out, err := t.outbound(req, cl, tok)
	if err != nil {
		return t.refuse(req, http.StatusBadGateway, err)
	}
	var body *replayBody
	var trailer http.Header // as announced
	if hasBody(req) {
		trailer = t.reserved.without(req.Trailer)
		reader := req.Body
		if len(cl.retryOn) > 0 {
			body = newReplayBody(req.Body, cl.replayLimit)
			defer body.commit()
			reader = body.first()
		}
		t.setBody(out, reader, trailer)
	}
	if body != nil && req.ContentLength > int64(cl.replayLimit) && !cl.expectsNothing.Load() {
		out = expectContinue(out, body)
	}
	if res, err = t.send(out); err != nil {
		return nil, err
	}

	next := tok
	switch {
	case slices.Contains(cl.retryOn, res.StatusCode):
		// While the new token is fetched, the first attempt must not go on
		// reading the body, or too much of it would be gone.
		if body != nil && !body.hold() {
			cl.replace(tok) // for the next request
			return res, nil
		}
		if next = cl.renew(req.Context(), tok); next == nil {
			return res, nil // as the upstream answered
		}
	case res.StatusCode == http.StatusExpectationFailed && body != nil && body.expected:
		// The expectation was ours, so this is not for the client. RFC 9110
		// §10.1.1: repeat the request without it.
		cl.expectsNothing.Store(true)
		if !body.hold() {
			return res, nil
		}
	default:
		cl.renewals.succeed()
		return res, nil
	}

	if out, err = t.outbound(req, cl, next); err != nil {
		return res, nil //nolint:nilerr // it was possible before
	}
	if body != nil {
		t.setBody(out, body.again(), trailer)
	}
	go discard(res.Body)
	if res, err = t.send(out); err != nil {
		return nil, err
	}
	switch {
	case !slices.Contains(cl.retryOn, res.StatusCode):
		cl.renewals.succeed()
	case next == tok:
		cl.replace(tok)
	default:
		cl.renewals.fail(next)
	}
	return res, nil
}

// setBody makes body the one of out, with trailers of its own: those that came
// in are filled in when the body ends, which the attempt before may still be
// reading.
func (t *Transport) setBody(out *http.Request, body io.ReadCloser, announced http.Header) {
	in := out.Trailer
	out.Trailer = maps.Clone(announced)
	out.Body = &trailerBody{ReadCloser: body, from: in, to: out.Trailer, reserved: &t.reserved}
}

// expectContinue asks the upstream to say whether it wants the body of out
// (RFC 9110 §10.1.1), which is longer than what is kept of it: the body waits
// for that where the recording ends. Once more had been sent, it would be
// too late to send it again.
func expectContinue(out *http.Request, body *replayBody) *http.Request {
	body.expected = out.Header.Get("Expect") == ""
	body.pause = maxPause
	out.Header["Expect"] = []string{"100-continue"}
	trace := &httptrace.ClientTrace{Got100Continue: body.proceed}
	return out.WithContext(httptrace.WithClientTrace(out.Context(), trace))
}

// discard ends an answer that nobody wants. In a goroutine of its own: it may
// come slowly, and over HTTP/2 its end waits until the request's body is not
// being read any more. The request's context ends it in any case.
func discard(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, maxDrain)
	_ = body.Close()
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

// replace replaces a refused token without waiting for the new one.
func (cl *client) replace(refused *token) {
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
