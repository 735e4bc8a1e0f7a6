// The errors of upstreams, as they leave the transport.

package outboundauth

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// upstreamError is an error of an upstream. The proxy asks it whether it is a
// timeout.
type upstreamError struct {
	reason  error
	timeout bool
}

func (e *upstreamError) Error() string   { return e.reason.Error() }
func (e *upstreamError) Timeout() bool   { return e.timeout }
func (e *upstreamError) Temporary() bool { return e.timeout }

// upstreamFailure returns an error of an upstream as it may be shown: Caddy logs it,
// and tells clients. Nothing that the upstream said is in it. To the proxy, it means
// what it meant before: whether to try the next upstream, and which status to answer.
func upstreamFailure(ctx context.Context, err error) error {
	if own, ok := errors.AsType[*ownError](err); ok {
		return own.error
	}
	if ended := ctx.Err(); ended != nil && errors.Is(err, ended) {
		return ended
	}
	reason := networkReason(err)
	if _, ok := errors.AsType[reverseproxy.DialError](err); ok {
		return reverseproxy.NewDialError(reason)
	}
	asked, ok := err.(net.Error) //nolint:errorlint // as the proxy asks
	return &upstreamError{reason, ok && asked.Timeout()}
}

// ownError is an error of the request's own body: of its client, or of a handler in
// front of the proxy. It says nothing of the upstream.
type ownError struct{ error }

// ownBody is the body of a request. It marks its errors.
type ownBody struct{ io.ReadCloser }

// Read implements io.Reader.
func (b ownBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // a reader returns it unwrapped
		err = &ownError{err}
	}
	return n, err
}

// hasBody reports whether a request has a body to be sent.
func hasBody(req *http.Request) bool { return req.Body != nil && req.Body != http.NoBody }

// foreignBody is the body of an upstream's answer. Its errors are those of an
// upstream: net/http quotes trailers that can't be read.
type foreignBody struct {
	io.ReadCloser
	ctx context.Context // of the request
}

// Read implements io.Reader.
func (b foreignBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // a reader returns it unwrapped
		err = upstreamFailure(b.ctx, err)
	}
	return n, err
}

// Close implements io.Closer.
func (b foreignBody) Close() error {
	if err := b.ReadCloser.Close(); err != nil {
		return upstreamFailure(b.ctx, err)
	}
	return nil
}
