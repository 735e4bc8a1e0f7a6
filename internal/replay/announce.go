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
// the part that can be recorded. The upstream can then be asked whether it wants
// the body.
func (b *Body) MayOutgrow(out *http.Request) bool {
	return MayOutgrow(out, b.limit) && (out.ContentLength >= 0 || !isConversation(out))
}

// MayOutgrow reports whether the body of out is longer, or may be longer, than
// limit, in bytes. A body of unknown length may be an upload. But an HTTP/3
// request without a body has an unknown length, too.
func MayOutgrow(out *http.Request, limit int) bool {
	if out.ContentLength >= 0 {
		return out.ContentLength > int64(limit)
	}
	return out.Method == http.MethodPost || out.Method == http.MethodPut || out.Method == http.MethodPatch
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

// isConversation reports whether both sides talk at the same time, as in a gRPC call or
// on an upgraded connection. Such a body must not wait for an interim answer.
func isConversation(out *http.Request) bool {
	return strings.HasPrefix(out.Header.Get("Content-Type"), "application/grpc") || out.Header.Get("Upgrade") != ""
}
