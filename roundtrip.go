// The way of a request: its token, its headers, its upstream, and what follows a refusal.

package outboundauth

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/replay"
)

// RoundTrip implements http.RoundTripper. It does not change the request's header:
// the proxy logs the header, and sends it to the next upstream when it retries.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	// The http transport would set the scheme later, on the same URL. But exposes
	// and boundTransport need it now.
	t.SetScheme(req)
	ctx := req.Context()
	if isHealthCheck(ctx) {
		res, err := t.sendHealthCheck(req)
		return t.keepFromLog(req, res, err)
	}
	req = takeTurn(req)
	r, err := t.routeOf(req)
	if err != nil {
		return t.fail(req, http.StatusBadGateway, err)
	}
	if r.off {
		forgetUse(ctx) // the proxy may have tried an upstream with a token before
		return t.send(asItIs(req), nil, nil)
	}
	if err := checkMethod(req.Method); err != nil {
		return t.fail(req, http.StatusMethodNotAllowed, err)
	}
	if !targetsPath(req) {
		return t.fail(req, http.StatusBadRequest, errOpaque)
	}
	if r.choice != nil {
		if r, err = choose(req, r.choice); err != nil {
			return t.fail(req, http.StatusForbidden, err)
		}
		if r.off {
			return t.sendBare(req)
		}
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
	if hasBody(req) && r.unrepeatable(req) {
		sure, wait := r.source.sure(ctx, dialAddressOf(ctx), tok)
		if wait > 0 {
			r.endpoint.metrics.waitedAgain(ctx, wait)
		}
		tok = sure
	}
	res, err := t.roundTrip(req, r.block, tok)
	if r.proves && res != nil {
		delete(res.Header, dpop.NonceHeader) // the caller makes no proofs
	}
	return res, err
}

// routeOf returns the route of a request. It returns an error if the config says
// nothing about the upstream, if the token would travel unencrypted, or if a proxy
// would take it elsewhere.
func (t *Transport) routeOf(req *http.Request) (route, error) {
	dial, ok := reverseproxy.GetDialInfo(req.Context())
	if !ok {
		return route{}, errNotProxied
	}
	to := dialAddress{dial.Network, dial.Address}
	r := t.routeTo(to)
	if r.unknown() {
		return route{}, fmt.Errorf("upstream %s has no credentials: add `upstream %s { … }` or `upstream %s off` to transport oauth2", to, to, to)
	}
	if r.off {
		return r, nil
	}
	proxy := t.proxyOf(req)
	if t.exposes(req, dial, proxy) {
		return route{}, plaintextError(to.String())
	}
	return r, checkProxied(req, dial, proxy)
}

// choose returns the route of a request by its client key, and notes the key.
func choose(req *http.Request, c *choice) (route, error) {
	ctx := req.Context()
	r, key, err := c.of(ctx)
	if refused, ok := errors.AsType[keyError](err); ok {
		refusedKeysTotal.WithLabelValues(refused.reason).Inc()
	}
	if err != nil || r.off {
		forgetUse(ctx) // of another proxy, or of an earlier try
	}
	if repl, ok := replacerOf(ctx); ok && err == nil {
		repl.Set(phKey, key)
	}
	return r, err
}

// targetsPath reports whether the target that net/http would write is a path, or the
// `*` of OPTIONS. A caller may send `GET http:http://evil.example/`, and a rewrite may
// leave `@evil.example/` of a path: behind the host, in a request to a proxy, that is
// another host. An upstream or a proxy believes the target, whatever Host says (RFC
// 9112 §3.2.2).
func targetsPath(req *http.Request) bool {
	path := req.URL.EscapedPath()
	return req.URL.Opaque == "" &&
		(path == "" || path[0] == '/' || (path == "*" && req.Method == http.MethodOptions))
}

var errOpaque = errors.New("the request target is neither a path nor a URL with a host; send a path")

var errNotProxied = errors.New("transport oauth2 serves requests of reverse_proxy only")

// exposes reports whether others could read req on its way, although the config does
// not allow that. proxy is the proxy that req goes through, or nil.
func (t *Transport) exposes(req *http.Request, dial reverseproxy.DialInfo, proxy *url.URL) bool {
	return req.URL.Scheme != "https" && !t.plaintext && !staysOnMachine(dial.Network, dial.Host, proxy != nil)
}

// roundTrip sends req with a token. If the upstream refuses the token, roundTrip
// replaces the token, and sends the request once more.
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
	p := passage{Transport: t, block: b, req: req, body: body, trailer: trailer}
	first := b.sending(out, tok, false)
	res, err := p.send(out, tok)
	if body != nil && body.Ignored() {
		b.source.unheard(dialAddressOf(req.Context()))
	}
	if err != nil {
		return nil, err
	}

	next := tok
	var refused *refusal
	switch b.judge(req.Context(), res, body) {
	case accept:
		b.heard(first, res)
		return res, nil
	case giveUp:
		if b.refuses(res) {
			b.replaceLater(first, res)
		}
		return res, nil
	case replace:
		if next, refused = b.replace(first, res); next == nil {
			return res, nil // the client gets the upstream's answer
		}
	case resend:
	}
	return p.sendAgain(next, refused, res)
}

// A passage is one request on its way to its upstream. It is sent once, and at most once more
// with another token, and once more with another proof.
type passage struct {
	*Transport
	*block
	req *http.Request // as it came

	body     *replay.Body // of a request; nil if it has none that can be sent again
	trailer  http.Header  // as the request announces it
	isCheck  bool         // it is an active health check
	proved   bool         // another proof was sent
	replaced bool         // another token was sent
}

// sendAgain sends a request once more, after the upstream's answer to the first token.
func (p *passage) sendAgain(tok *token, refused *refusal, res *http.Response) (*http.Response, error) {
	p.replaced = true
	out, err := p.outbound(p.req, p.block, tok)
	if err != nil || !p.rewind(out) {
		if refused != nil {
			p.source.unsettled(refused)
		}
		return res, nil //nolint:nilerr // unlikely: the same headers and the body could be had before
	}
	go discard(res.Body)
	second := p.sending(out, tok, p.isCheck)
	second.again = true
	res, err = p.send(withOwnVars(out), tok)
	if refused != nil {
		p.settle(second, refused, res, err == nil && p.refuses(res), err)
	}
	if err != nil {
		return nil, sentBefore(err, p.body)
	}
	return res, nil
}

// refusesProof reports whether an answer means that the upstream does not accept the proof. If a
// check expects this status, nothing is wrong.
func (p *passage) refusesProof(res *http.Response) bool {
	expected := p.isCheck && p.health.expects(res.StatusCode)
	return p.block.refusesProof(res) && !expected
}

// refuses reports whether an answer means that the upstream does not accept the token.
func (p *passage) refuses(res *http.Response) bool {
	if p.isCheck {
		return p.refusesCheck(p.block, res)
	}
	return p.block.refuses(res)
}

// send sends a request with a token. If the upstream refuses the proof, send sends the
// request once more with another one, and the same token: nobody has judged the token yet.
func (p *passage) send(out *http.Request, tok *token) (*http.Response, error) {
	res, err := p.sendOnce(out, tok)
	if err != nil || !p.refusesProof(res) {
		return res, err
	}
	if p.proved {
		p.refusedProof(out, res)
		return res, nil
	}
	p.proved = true
	held := p.body == nil || p.body.Hold() // at once: the first attempt may go on reading
	again, err := p.outbound(p.req, p.block, tok)
	// The nonce that others have brought meanwhile may be of use only once.
	if nonce := dpop.Nonce(res.Header); err == nil && nonce != "" {
		err = tok.key.Prove(again, dpop.Hash(tok.value), nonce)
	}
	if err != nil || !held || !p.rewind(again) {
		p.source.challenged(dialAddressOf(p.req.Context()))
		p.noteOutcome(refusalNotRepeatable)
		return res, nil //nolint:nilerr // the client gets the upstream's answer
	}
	p.noteOutcome(refusalProof)
	go discard(res.Body)
	if res, err = p.sendOnce(withOwnVars(again), tok); err != nil {
		return nil, sentBefore(err, p.body)
	}
	if p.refusesProof(res) {
		p.refusedProof(again, res)
	}
	return res, nil
}

// refusedProof notes that the client gets the refusal of a proof. out is the request that had
// it.
func (p *passage) refusedProof(out *http.Request, res *http.Response) {
	p.noteOutcome(refusalProofAgain)
	p.tellProof(out, res)
}

// noteOutcome counts how the refusal of a proof has ended.
func (p *passage) noteOutcome(outcome string) {
	if !p.isCheck {
		p.endpoint.metrics.refused(p.req.Context(), outcome)
	}
}

// sendOnce sends a request once, and keeps the nonce of its answer.
func (p *passage) sendOnce(out *http.Request, tok *token) (res *http.Response, err error) {
	if p.isCheck {
		res, err = p.sendCheck(out, p.block, tok)
	} else {
		res, err = p.Transport.send(out, p.block, tok)
	}
	if err == nil && p.proves {
		address := dialAddressOf(p.req.Context())
		p.source.nonces.Keep(address, res.Header)
		if !p.refusesProof(res) {
			p.source.provedTo(address)
		}
	}
	return res, err
}

// rewind gives out the body of the request from its beginning. It returns false if that is
// gone.
func (p *passage) rewind(out *http.Request) bool {
	switch {
	case p.isCheck:
		if p.req.GetBody != nil {
			var err error
			out.Body, err = p.req.GetBody()
			return err == nil
		}
	case p.body == nil:
		out.Trailer = nil // see record
	case !p.body.Hold():
		return false
	default:
		last := !p.proves || (p.proved && p.replaced)
		setBody(out, p.body.Again(last), p.trailer, &p.reserved)
	}
	return true
}

// withOwnVars returns a request with a copy of its variables. net/http may begin to dial
// for it, and send it on a connection that is free at last. Caddy's dial function reads
// the variables then, while the next handler of the request may write some: Go would end
// the server.
func withOwnVars(out *http.Request) *http.Request {
	ctx := out.Context()
	vars, _ := ctx.Value(caddyhttp.VarsCtxKey).(map[string]any)
	return out.WithContext(context.WithValue(ctx, caddyhttp.VarsCtxKey, maps.Clone(vars)))
}

// outbound returns the request that goes upstream: a shallow copy of req with its
// own header.
func (t *Transport) outbound(req *http.Request, b *block, tok *token) (*http.Request, error) {
	out := t.bare(req, 1+len(b.identity))
	return out, b.dress(out, tok)
}

// bare returns a shallow copy of req without the headers that only the transport sets, and with
// room for more. It still has the body of req.
func (t *Transport) bare(req *http.Request, more int) *http.Request {
	out := new(http.Request)
	*out = *req
	out.Header = t.reserved.without(req.Header, more)
	keepHTTP(out.Header)
	return out
}

// sendBare sends the request of a client that is off. It goes over the connections of requests
// that have a token. So what holds for these, holds for it: without that, its body could become
// the beginning of the next request, or its answer a tunnel to the upstream.
func (t *Transport) sendBare(req *http.Request) (*http.Response, error) {
	out := t.bare(req, 0)
	t.record(out, req, nil)
	res, err := t.send(out, nil, nil)
	if err != nil {
		return nil, err
	}
	return checkSwitch(out, res)
}

// record makes the body of req the body of out. If it may be sent again, it is
// recorded. record returns the recorded body and the trailers that req announces.
// If the body is not recorded, body is nil. Without a token, b is nil.
func (t *Transport) record(out, req *http.Request, b *block) (body *replay.Body, trailer http.Header) {
	if !hasBody(req) {
		out.Trailer = nil // nobody fills it, and its names are the caller's
		return nil, nil
	}
	trailer = t.reserved.without(req.Trailer, 0)
	reader := req.Body
	if b != nil && (len(b.retryOn) > 0 || b.proves) {
		body = replay.New(req.Body, b.replayLimit)
		if req.ProtoMajor > 1 { // over HTTP/1, net/http's server closes no body that is being read
			body.CloseEndsReads()
		}
		reader = body.First()
	}
	setBody(out, reader, trailer, &t.reserved)
	return body, trailer
}

// send sends a request upstream with Caddy's own transport. If the block binds
// its tokens, send uses a connection with the token's certificate. It removes
// failureField from the upstream's answer. No error repeats what the upstream says.
// Without a token, b and tok are nil.
func (t *Transport) send(req *http.Request, b *block, tok *token) (res *http.Response, err error) {
	if b != nil && b.bound != nil {
		res, err = b.bound.send(req, tok.binding)
	} else {
		res, err = t.HTTPTransport.RoundTrip(req)
	}
	if err != nil {
		return nil, upstreamFailure(req.Context(), err)
	}
	delete(res.Header, failureField)
	if b != nil {
		if res, err = checkSwitch(req, res); err != nil {
			return nil, err
		}
	}
	if res.StatusCode != http.StatusSwitchingProtocols && res.Body != http.NoBody { // or it is a connection
		res.Body = foreignBody{res.Body, req.Context()}
	}
	return res, nil
}

// checkSwitch returns res, or an error if it switches to a protocol that nobody asked for.
func checkSwitch(req *http.Request, res *http.Response) (*http.Response, error) {
	if res.StatusCode == http.StatusSwitchingProtocols && !switchesAsAsked(req, res) {
		_ = res.Body.Close()
		return nil, errSwitched
	}
	return res, nil
}

// errSwitched does not say to which protocol: that is the upstream's word.
var errSwitched = errors.New("the upstream switches to a protocol that it was not asked for")

// switchesAsAsked reports whether a 101 answers the upgrade in req. The proxy compares it
// with the upgrade that the caller asked for, but keepHTTP may have removed that.
func switchesAsAsked(req *http.Request, res *http.Response) bool {
	asked := req.Header.Get("Upgrade")
	return asked != "" && strings.EqualFold(asked, res.Header.Get("Upgrade"))
}

// asItIs returns the request for an upstream that is off. It has trailers of its own,
// see setBody.
func asItIs(req *http.Request) *http.Request {
	if !hasBody(req) {
		return req
	}
	out := new(http.Request)
	*out = *req
	setBody(out, req.Body, req.Trailer, new(fieldSet))
	return out
}

// setBody sets the body and the trailers of out. The trailers have a map of their
// own: the server fills the map of the incoming trailers when the body ends, and
// the attempt before may still be reading the body at that time.
func setBody(out *http.Request, body io.ReadCloser, announced http.Header, reserved *fieldSet) {
	in := out.Trailer
	out.Trailer = maps.Clone(announced)
	out.Body = ownBody{&trailerBody{ReadCloser: body, from: in, to: out.Trailer, reserved: reserved}}
}

// sentBefore returns the error of a second attempt. To the proxy, an error of the
// dialer means that nothing was sent, and it goes on to the next upstream. But
// the first attempt has sent a part of the body, and this part is gone. So
// sentBefore turns the dialer's error into another one.
func sentBefore(err error, body *replay.Body) error {
	if _, ok := errors.AsType[reverseproxy.DialError](err); ok && body != nil {
		return errors.New(err.Error())
	}
	return err
}

// isHealthCheck recognizes the reverse proxy's own requests. They have no
// variables, but requests that the server has received do.
func isHealthCheck(ctx context.Context) bool {
	return ctx.Value(caddyhttp.VarsCtxKey) == nil
}

// fail answers a request that does not go upstream. The error has this status
// when it reaches handle_errors.
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
		Status:     "200 OK", // a success, so that the proxy counts no failure of the upstream
		StatusCode: http.StatusOK,
		Proto:      "HTTP/1.1",
		ProtoMajor: 1,
		ProtoMinor: 1,
		Header:     http.Header{failureField: {failureMark}},
		Body:       http.NoBody,
		Request:    req,
	}, nil
}

// statusOf returns the status for a client of the proxy if there is no token: 504
// if the token did not come in time, otherwise 503.
func statusOf(err error) int {
	failure, ok := errors.AsType[*tokenError](err)
	if errors.Is(err, context.DeadlineExceeded) || (ok && failure.Code == codeTimeout) {
		return http.StatusGatewayTimeout
	}
	return http.StatusServiceUnavailable
}

// maxDrain is how many bytes of a refusal's body are read at most. If that is all
// of the body, its connection can be used again.
const maxDrain = 64 << 10

// discard ends an answer that nobody wants. It runs in a goroutine of its own,
// because the answer may come slowly. Over HTTP/2, Close also waits until nobody
// reads the request's body any more. discard ends with the request's context at
// the latest.
func discard(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, maxDrain)
	_ = body.Close()
}

// closeBody closes the body of a request that is not sent, as RoundTrippers must.
func closeBody(req *http.Request) {
	if req.Body != nil {
		_ = req.Body.Close()
	}
}
