// The status of a gRPC call, as far as it is about the token.

package outboundauth

import (
	"cmp"
	"io"
	"net/http"
	"strings"
)

// unauthenticated is retryGRPC as gRPC writes it.
const unauthenticated = "16"

// isGRPC reports whether an answer is that of a call: of gRPC, or of gRPC-Web, which
// sends an answer without a body in the same way.
func isGRPC(h http.Header) bool {
	return strings.HasPrefix(h.Get("Content-Type"), "application/grpc")
}

// refusedCall reports whether an answer without a body refuses the token of a call. gRPC
// calls such an answer Trailers-Only. With a body, a status in the header means nothing:
// the call may have had an effect. Over HTTP/3, and in chunks over HTTP/1.1, nobody knows
// before the body is read that there is none.
func refusedCall(res *http.Response) bool {
	return res.ContentLength == 0 && isGRPC(res.Header) && res.Header.Get("Grpc-Status") == unauthenticated
}

// watchCall calls ended when a call has ended with a status. It wraps the body of res on
// the outside, where only answers are that the client gets. Errors pass through as they
// are. ended is called once at most, while the end of the body is read. Nobody knows the
// status of a call whose body breaks off or is closed, or of gRPC-Web, which has the
// status in the body.
func watchCall(res *http.Response, ended func(refused bool)) {
	if isGRPC(res.Header) && res.ContentLength != 0 {
		res.Body = &callBody{res.Body, res, ended}
	}
}

// callBody is the body of a call's answer. The status comes in the trailers.
type callBody struct {
	io.ReadCloser
	res   *http.Response
	ended func(refused bool) // nil after the end
}

// Read implements io.Reader.
func (b *callBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF && b.ended != nil { //nolint:errorlint // a reader returns it unwrapped
		// The header has it if the body was empty, and nobody knew.
		status := cmp.Or(b.res.Trailer.Get("Grpc-Status"), b.res.Header.Get("Grpc-Status"))
		if status != "" {
			b.ended(status == unauthenticated)
		}
		b.ended = nil
	}
	return n, err
}
