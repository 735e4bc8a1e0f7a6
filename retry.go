package outboundauth

import (
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

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
			defer body.commit(req.Context())
			reader = body.first()
		}
		t.setBody(out, reader, trailer)
	}
	if body != nil {
		out = cl.announce(out, body)
	}
	res, err = t.send(out, cl, tok)
	if body != nil && body.ignored.Load() {
		cl.expectsNothing.Store(true)
	}
	if err != nil {
		return nil, conceal(err, tok)
	}

	next := tok
	switch {
	case slices.Contains(cl.retryOn, res.StatusCode):
		// While the new token is fetched, the first attempt must not go on
		// reading the body, or too much of it would be gone.
		if body != nil && !body.hold() {
			cl.endpoint.metrics.refused(req.Context(), rejectionNotRepeatable)
			cl.replace(req.Context(), tok) // for the next request
			return res, nil
		}
		if next = cl.renew(req.Context(), tok); next == nil {
			cl.endpoint.metrics.refused(req.Context(), rejectionNoToken)
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
		return res, nil
	}

	if out, err = t.outbound(req, cl, next); err != nil {
		return res, nil //nolint:nilerr // it was possible before
	}
	if body != nil {
		t.setBody(out, body.again(), trailer)
	}
	go discard(res.Body)
	res, err = t.send(out, cl, next)
	if err != nil {
		if next != tok {
			cl.endpoint.metrics.refused(req.Context(), rejectionNoAnswer)
		}
		return nil, conceal(sentBefore(err, body), next)
	}
	switch {
	case next == tok:
	case slices.Contains(cl.retryOn, res.StatusCode):
		cl.endpoint.metrics.refused(req.Context(), rejectionRefusedAgain)
	default:
		cl.endpoint.metrics.refused(req.Context(), rejectionRecovered)
		cl.renewals.help()
	}
	return res, nil
}

// sentBefore returns the error of a second attempt. To the proxy, an error of
// the dialer says that nothing was sent, so that it goes on to the next
// upstream; but what the first attempt sent of the body is not there any more.
func sentBefore(err error, body *replayBody) error {
	if _, ok := errors.AsType[reverseproxy.DialError](err); ok && body != nil {
		return errors.New(err.Error())
	}
	return err
}

// conceal returns the error of an upstream without the token. net/http quotes
// answers that are not HTTP, and an upstream may send back what it got.
func conceal(err error, t *token) error {
	if strings.Contains(err.Error(), t.value) {
		return errors.New("the upstream's answer is not HTTP, and repeats the token")
	}
	return err
}

// setBody makes body the one of out, with trailers of its own: those that came
// in are filled in when the body ends, which the attempt before may still be
// reading.
func (t *Transport) setBody(out *http.Request, body io.ReadCloser, announced http.Header) {
	in := out.Trailer
	out.Trailer = maps.Clone(announced)
	out.Body = &trailerBody{ReadCloser: body, from: in, to: out.Trailer, reserved: &t.reserved}
}

// announce has the upstream asked whether it wants the body of out, if that may
// be longer than what can be kept of it, and the upstream heeds such questions.
func (cl *client) announce(out *http.Request, body *replayBody) *http.Request {
	if cl.replayLimit == 0 || cl.expectsNothing.Load() {
		return out
	}
	switch {
	case out.ContentLength > int64(cl.replayLimit):
		return expectContinue(out, body)
	case out.ContentLength < 0 && mayBeLarge(out):
		body.pauseAt = cl.replayLimit // what can be kept need not wait
		return expectContinue(out, body)
	}
	return out
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
