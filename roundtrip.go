// The way of a request: its token, its headers, its upstream, and a refusal.

package outboundauth

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/replay"
)

// RoundTrip implements http.RoundTripper. The request's header is left as it
// is: the proxy sends the same to the next upstream when it retries, and logs
// it.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	// As the http transport would do later, on the same URL: exposes and
	// boundTransport need it now.
	t.SetScheme(req)
	ctx := req.Context()
	if isHealthCheck(ctx) {
		return t.sendHealthCheck(req)
	}
	r, err := t.routeOf(req)
	if err != nil {
		return t.fail(req, http.StatusBadGateway, err)
	}
	if r.off {
		forgetUse(ctx) // of another upstream that was tried before
		return t.send(req, nil, nil)
	}
	tok, got, err := r.source.Token(ctx)
	r.endpoint.metrics.requested(ctx, got)
	if err != nil {
		if ctxErr := ctx.Err(); ctxErr != nil && errors.Is(err, context.Canceled) {
			closeBody(req)
			return nil, ctxErr // the client went away
		}
		return t.fail(req, statusOf(err), err)
	}
	return t.roundTrip(req, r.block, tok)
}

// routeOf returns where a request leads. It is an error if the config does not
// say, or if the token would travel unencrypted.
func (t *Transport) routeOf(req *http.Request) (route, error) {
	dial, ok := reverseproxy.GetDialInfo(req.Context())
	if !ok {
		return route{}, errors.New("transport oauth2 serves requests of reverse_proxy only")
	}
	r, listed := t.routes[dialAddress{dial.Network, dial.Address}]
	if !listed && !t.listedOnly {
		r = t.fallback
	}
	if r.unknown() {
		return route{}, fmt.Errorf("upstream %s has no credentials: add `upstream %s { … }` or `upstream %s off` to transport oauth2",
			dial.Address, dial.Address, dial.Address)
	}
	if !r.off && t.exposes(req, dial) {
		return route{}, plaintextError(dial.Address)
	}
	return r, nil
}

// exposes reports whether others could read on the way what req says, and that
// was not allowed.
func (t *Transport) exposes(req *http.Request, dial reverseproxy.DialInfo) bool {
	return req.URL.Scheme != "https" && !t.plaintext && !staysOnMachine(dial.Network, dial.Host, t.proxied)
}

// roundTrip sends req with a token. If the upstream refuses the token, it is
// replaced, and the request sent once more.
func (t *Transport) roundTrip(req *http.Request, b *block, tok *token) (*http.Response, error) {
	out, err := t.outbound(req, b, tok)
	if err != nil {
		return t.fail(req, http.StatusBadGateway, err)
	}
	body, trailer := t.record(out, req, b)
	if body != nil {
		defer body.Commit(req.Context())
		out = b.announce(out, body)
	}
	res, err := t.send(out, b, tok)
	if body != nil && body.Ignored() {
		b.source.places.unheard(dialAddressOf(req.Context()))
	}
	if err != nil {
		return nil, conceal(err, tok)
	}

	next := tok
	switch b.judge(req.Context(), res, body) {
	case accept:
		return res, nil
	case giveUp:
		if b.refuses(res.StatusCode) {
			b.endpoint.metrics.refused(req.Context(), refusalNotRepeatable)
			b.replaceLater(req.Context(), tok) // for the next request
		}
		return res, nil
	case replace:
		if next = b.replace(req.Context(), tok); next == nil {
			b.endpoint.metrics.refused(req.Context(), refusalNoToken)
			return res, nil // as the upstream answered
		}
	case resend:
	}

	if out, err = t.outbound(req, b, next); err != nil {
		return res, nil //nolint:nilerr // the same headers could be set the first time
	}
	if body != nil {
		t.setBody(out, body.Again(), trailer)
	}
	go discard(res.Body)
	res, err = t.send(out, b, next)
	if next != tok {
		b.settle(req.Context(), res, err)
	}
	if err != nil {
		return nil, conceal(sentBefore(err, body), next)
	}
	return res, nil
}

// outbound returns req as it goes upstream: a shallow copy but for its header.
func (t *Transport) outbound(req *http.Request, b *block, tok *token) (*http.Request, error) {
	out := new(http.Request)
	*out = *req
	out.Header = t.reserved.without(req.Header)
	return out, b.dress(out, tok)
}

// record makes the body of req that of out, recorded if it may be sent again, and
// returns it with the trailers that it announces; nil if it is not recorded.
func (t *Transport) record(out, req *http.Request, b *block) (body *replay.Body, trailer http.Header) {
	if !hasBody(req) {
		return nil, nil
	}
	trailer = t.reserved.without(req.Trailer)
	reader := req.Body
	if len(b.retryOn) > 0 {
		body = replay.New(req.Body, b.replayLimit)
		reader = body.First()
	}
	t.setBody(out, reader, trailer)
	return body, trailer
}

// send sends a request upstream with Caddy's own transport or, for a block that
// binds its tokens, on a connection with the token's certificate. What the upstream sends in the field of
// the mark is removed. b and tok may be nil.
func (t *Transport) send(req *http.Request, b *block, tok *token) (res *http.Response, err error) {
	if b != nil && b.bound != nil {
		certificate := b.endpoint.certificates.Latest() // of a health check without a token
		if tok != nil && tok.binding != nil {
			certificate = tok.binding
		}
		res, err = b.bound.send(req, certificate)
	} else {
		res, err = t.HTTPTransport.RoundTrip(req)
	}
	if err == nil {
		delete(res.Header, failureField)
	}
	return res, err
}

// setBody makes body the one of out, with trailers of its own: those that came
// in are filled in when the body ends, which the attempt before may still be
// reading.
func (t *Transport) setBody(out *http.Request, body io.ReadCloser, announced http.Header) {
	in := out.Trailer
	out.Trailer = maps.Clone(announced)
	out.Body = &trailerBody{ReadCloser: body, from: in, to: out.Trailer, reserved: &t.reserved}
}

// sentBefore returns the error of a second attempt. To the proxy, an error of
// the dialer says that nothing was sent, so that it goes on to the next
// upstream; but what the first attempt sent of the body is not there any more.
func sentBefore(err error, body *replay.Body) error {
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

// isHealthCheck recognizes the reverse proxy's own requests: unlike those
// that the server has received, they have no variables.
func isHealthCheck(ctx context.Context) bool {
	return ctx.Value(caddyhttp.VarsCtxKey) == nil
}

// fail answers a request that does not go upstream, with an error that has
// this status when it reaches handle_errors.
func (t *Transport) fail(req *http.Request, status int, err error) (*http.Response, error) {
	closeBody(req)
	ctx := req.Context()
	repl, ok := replacerOf(ctx)
	if !t.marksFailures || !ok || isHealthCheck(ctx) {
		return nil, caddyhttp.Error(status, err)
	}
	setFailurePlaceholders(repl, err)
	repl.Set(phFailure, caddyhttp.Error(status, err))
	repl.Set(phFailed, true)
	return &http.Response{
		Status:     "200 OK", // of no consequence, so that nothing is counted
		StatusCode: http.StatusOK,
		Proto:      "HTTP/1.1",
		ProtoMajor: 1,
		ProtoMinor: 1,
		Header:     http.Header{failureField: {failureMark}},
		Body:       http.NoBody,
		Request:    req,
	}, nil
}

// statusOf tells a client of the proxy why there is no token: 504 if it did
// not come in time, otherwise 503.
func statusOf(err error) int {
	failure, ok := errors.AsType[*tokenError](err)
	if errors.Is(err, context.DeadlineExceeded) || (ok && failure.Code == codeTimeout) {
		return http.StatusGatewayTimeout
	}
	return http.StatusServiceUnavailable
}

// maxDrain is how much of a refusal's body is read so that its connection can
// be used again.
const maxDrain = 64 << 10

// discard ends an answer that nobody wants. In a goroutine of its own: it may
// come slowly, and over HTTP/2 its end waits until the request's body is not
// being read any more. The request's context ends it in any case.
func discard(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, maxDrain)
	_ = body.Close()
}

// hasBody reports whether a request has a body to be sent.
func hasBody(req *http.Request) bool { return req.Body != nil && req.Body != http.NoBody }

// closeBody does what a RoundTripper owes to a request that it does not send.
func closeBody(req *http.Request) {
	if req.Body != nil {
		_ = req.Body.Close()
	}
}
