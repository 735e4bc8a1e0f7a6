// Whose turn it is to read the body of a request that several upstreams may be sent.

package outboundauth

import (
	"io"
	"net/http"
	"sync"
)

// A turn is the right of one attempt to read the body of a request. The proxy may go on
// to the next upstream while the first one is still being sent the body: it has
// answered early, for example. Then two goroutines would read one body, and Caddy's part
// of it is not made for that. And the next upstream would get the rest of the body as if
// it were all of it.
type turn struct {
	body io.ReadCloser

	mu      sync.Mutex // guards what follows; not held while the body is read
	reading bool
	spent   bool // something of the body is gone
	over    bool
}

// takeTurn returns req for the next attempt: if the attempt before has read some of the
// body, a copy of req whose body can't be read.
func takeTurn(req *http.Request) *http.Request {
	if !hasBody(req) {
		return req
	}
	out, next := new(http.Request), &turn{body: req.Body}
	*out = *req
	out.Body = next
	repl, ok := replacerOf(req.Context())
	if !ok {
		return out
	}
	last, _ := repl.Get(phTurn)
	if before, ok := last.(*turn); ok && before.end() && !inMemory(req.Body) {
		// The attempt before may still fill the trailers, too.
		out.Body, out.Trailer = closedBody{}, nil
		return out
	}
	repl.Set(phTurn, next)
	return out
}

// inMemory reports whether a body is one of those that request_buffers makes for each
// attempt. Only these can write themselves.
func inMemory(body io.ReadCloser) bool {
	_, ok := body.(io.WriterTo)
	return ok
}

// end ends a turn. It reports whether something of the body is gone, or is being read.
// Over HTTP/3, many requests have a body that is empty, which shows only when it is read.
func (t *turn) end() (spent bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
	return t.spent || t.reading
}

// Read implements io.Reader.
func (t *turn) Read(p []byte) (int, error) {
	t.mu.Lock()
	if t.over {
		t.mu.Unlock()
		return 0, http.ErrBodyReadAfterClose
	}
	t.reading = true
	t.mu.Unlock()

	n, err := t.body.Read(p)

	t.mu.Lock()
	defer t.mu.Unlock()
	t.reading = false
	t.spent = t.spent || n > 0 || (err != nil && err != io.EOF) //nolint:errorlint // a reader returns it unwrapped
	return n, err
}

// Close implements io.Closer. A body whose turn is over belongs to another attempt.
func (t *turn) Close() error {
	t.mu.Lock()
	over := t.over
	t.mu.Unlock()
	if over {
		return nil
	}
	return t.body.Close()
}

// String implements fmt.Stringer: there is nothing to show.
func (t *turn) String() string { return "" }

// closedBody is a body that can't be read any more.
type closedBody struct{}

// Read implements io.Reader.
func (closedBody) Read([]byte) (int, error) { return 0, http.ErrBodyReadAfterClose }

// Close implements io.Closer.
func (closedBody) Close() error { return nil }
