// The announcement of a body that is too large to be recorded.

package replay

import (
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"time"
)

// MaxPause is how long a large body waits for an upstream that does not say
// whether it wants it.
const MaxPause = 100 * time.Millisecond

// MayOutgrow reports whether the body of out is longer than what can be recorded of
// it, or may be.
func (b *Body) MayOutgrow(out *http.Request) bool {
	return out.ContentLength > int64(b.limit) || (out.ContentLength < 0 && mayBeLarge(out))
}

// Expected reports whether the upstream was asked by Announce alone, and not by
// the client as well.
func (b *Body) Expected() bool { return b.expected }

// Ignored reports whether the upstream was asked and did not say in time whether
// it wants the body.
func (b *Body) Ignored() bool { return b.ignored.Load() }

// Announce has the upstream asked whether it wants the body of out (RFC 9110
// §10.1.1). It returns a copy of out with another context. What can't be recorded
// waits for the answer: once it is on its way, it would be too late to send it
// again, and an upstream that refuses it may reset the connection with its own
// answer.
func (b *Body) Announce(out *http.Request) *http.Request {
	if out.ContentLength < 0 {
		b.pauseAt = b.limit // what can be recorded need not wait
	}
	b.expected = out.Header.Get("Expect") == ""
	b.pause = MaxPause
	out.Header["Expect"] = []string{"100-continue"}
	trace := &httptrace.ClientTrace{Got100Continue: b.proceed}
	ctx := httptrace.WithClientTrace(out.Context(), trace) // has added the proxy's hooks
	if forward := trace.Got1xxResponse; forward != nil && b.expected {
		trace.Got1xxResponse = func(code int, header textproto.MIMEHeader) error {
			if code == http.StatusContinue {
				return nil // the client has not asked
			}
			return forward(code, header)
		}
	}
	return out.WithContext(ctx)
}

// mayBeLarge reports whether a body of unknown length is an upload, which may
// grow beyond what can be kept. HTTP/3 requests without any body have an
// unknown length, too, and both sides of a gRPC call or an upgraded connection
// talk at once: there, nothing waits for an interim answer.
func mayBeLarge(out *http.Request) bool {
	switch out.Method {
	case http.MethodPost, http.MethodPut, http.MethodPatch:
		return !strings.HasPrefix(out.Header.Get("Content-Type"), "application/grpc") && out.Header.Get("Upgrade") == ""
	}
	return false
}
