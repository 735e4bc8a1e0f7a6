// The announcement of a body that is too large to be recorded.

package replay

import (
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"time"
)

// MaxPause is how long a large body waits at most. It waits while the upstream
// does not say whether it wants the body.
const MaxPause = 100 * time.Millisecond

// MayOutgrow reports whether the body of out is longer, or may be longer, than
// the part that can be recorded.
func (b *Body) MayOutgrow(out *http.Request) bool { return MayOutgrow(out, b.limit) }

// MayOutgrow is Body.MayOutgrow for a body that is not recorded yet. The limit is in
// bytes.
func MayOutgrow(out *http.Request, limit int) bool {
	return out.ContentLength > int64(limit) || (out.ContentLength < 0 && mayBeLarge(out))
}

// Expected reports whether only Announce asked the upstream. It is false if the
// client asked as well.
func (b *Body) Expected() bool { return b.expected }

// Ignored reports whether the upstream was asked and did not say in time whether
// it wants the body.
func (b *Body) Ignored() bool { return b.ignored.Load() }

// Announce lets the request ask the upstream whether it wants the body of out
// (RFC 9110 §10.1.1). It returns a copy of out with another context. The part
// that can't be recorded waits for the answer. When that part is on its way, it
// is too late to send the body again. An upstream that refuses the body may also
// reset the connection, and lose its own answer.
func (b *Body) Announce(out *http.Request) *http.Request {
	if out.ContentLength < 0 {
		b.pauseAt = b.limit // the part that can be recorded need not wait
	}
	b.expected = out.Header.Get("Expect") == ""
	b.pause = MaxPause
	out.Header["Expect"] = []string{"100-continue"}
	trace := &httptrace.ClientTrace{Got100Continue: b.proceed}
	ctx := httptrace.WithClientTrace(out.Context(), trace) // this has added the proxy's hooks to trace
	if forward := trace.Got1xxResponse; forward != nil && b.expected {
		trace.Got1xxResponse = func(code int, header textproto.MIMEHeader) error {
			if code == http.StatusContinue {
				return nil // the client has not asked the upstream
			}
			return forward(code, header)
		}
	}
	return out.WithContext(ctx)
}

// mayBeLarge reports whether a body of unknown length is an upload, which may be
// longer than what can be recorded. Other bodies must not wait for an interim
// answer. An HTTP/3 request without a body has an unknown length, too. In a gRPC
// call or on an upgraded connection, both sides talk at the same time.
func mayBeLarge(out *http.Request) bool {
	switch out.Method {
	case http.MethodPost, http.MethodPut, http.MethodPatch:
		return !strings.HasPrefix(out.Header.Get("Content-Type"), "application/grpc") && out.Header.Get("Upgrade") == ""
	}
	return false
}
