// Package replay sends a request's body twice.
package replay

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// errSuperseded ends the reading of an attempt whose request is being sent
// again.
var errSuperseded = errors.New("the request is being sent again")

// DefaultLimit is how much of a body is kept for sending it once more, in
// bytes.
const DefaultLimit = 64 << 10

// A Body is a request's body that can be sent twice. While it is sent for the
// first time, what is read of it is recorded, up to limit; the second time, the
// recording is sent first, and then what nobody has read yet. The upstream may be
// asked first whether it wants the body, see Announce: until it says so, the first
// attempt pauses.
//
// Each attempt reads through a body of its own, so that one which was given
// up, and may still be reading in a goroutine of net/http, takes nothing away
// from the next.
type Body struct {
	body    io.ReadCloser
	limit   int
	pause   time.Duration // at most; see Announce
	pauseAt int           // after so many bytes

	expected bool        // see Expected
	ignored  atomic.Bool // see Ignored

	mu       sync.Mutex  // guards all below; not held while body is read
	changed  sync.Cond   // of reading, held, paused and attempt
	attempt  int         // the one that may read
	reading  bool        // body is being read
	touched  bool        // body has been read, or is being read
	held     bool        // the attempt has to wait, for Hold
	paused   *time.Timer // the attempt has to wait, until proceed; then nil
	recorded *[]byte     // nil: not recording any more
	overflow bool        // more was read than is recorded
	err      error       // with which body ended, io.EOF included
	closed   bool        // by the current attempt
	closing  bool        // body has to be closed when it is not being read
	final    bool        // no attempt will follow the current one
}

// recordings are reused: most bodies are small, and few are sent again.
var recordings = sync.Pool{New: func() any { return new([]byte) }}

// New returns a body of which limit bytes can be sent twice.
func New(body io.ReadCloser, limit int) *Body {
	b := &Body{body: body, limit: limit, recorded: recordings.Get().(*[]byte)}
	b.changed.L = &b.mu
	return b
}

// First returns the body of the first attempt.
func (b *Body) First() io.ReadCloser { return &attemptBody{of: b} }

// Hold makes the first attempt wait before it reads on. It returns false if
// more was read than is recorded, so that the body cannot be sent again.
func (b *Body) Hold() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	overflowing := b.reading && b.recorded != nil && len(*b.recorded) == b.limit
	b.held = !b.overflow && !overflowing
	return b.held
}

// resume ends Hold.
func (b *Body) resume() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held = false
	b.changed.Broadcast()
}

// supersede ends the current attempt.
func (b *Body) supersede() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.attempt++
	b.changed.Broadcast()
}

// proceed ends the pause: the upstream wants the body.
func (b *Body) proceed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.endPause()
	b.changed.Broadcast()
}

// endPause makes sure that there is no pause, and will be none. mu is held.
func (b *Body) endPause() {
	b.pause = 0
	if b.paused != nil {
		b.paused.Stop()
		b.paused = nil
	}
}

// Again returns the body of the second attempt, after Hold has returned true.
// The first reads nothing from then on.
func (b *Body) Again() io.ReadCloser {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.attempt++
	b.held, b.closed, b.final = false, false, true
	b.endPause()
	b.changed.Broadcast()
	return &attemptBody{of: b, number: b.attempt}
}

// Commit tells that the current attempt is the last. Only now may the body
// itself be closed. If the attempt is still waiting to be told whether the
// upstream wants the body, it does not: nothing is read, and the wait ends
// with ctx, the request's. Ended before, it would break the connection on
// which the answer is still coming.
//
// An attempt that is held already has its answer, and most likely nobody reads its
// body any more. It goes on only after MaxPause, for an upstream that ends its
// answer when it has read all. At once, it would read the body while the request
// ends, and Caddy counts what was read of it.
func (b *Body) Commit(ctx context.Context) {
	b.mu.Lock()
	if b.final {
		b.mu.Unlock()
		return
	}
	b.final = true
	switch {
	case b.paused != nil:
		b.paused.Stop()
		context.AfterFunc(ctx, b.supersede)
	case b.held:
		b.endPause()
		resume := time.AfterFunc(MaxPause, b.resume)
		context.AfterFunc(ctx, func() {
			resume.Stop()
			b.supersede()
		})
	default:
		b.endPause()
	}
	b.forget()
	now, touched := b.closed && b.closeNow(), b.touched
	b.mu.Unlock()
	switch {
	case now && touched:
		// A server's body that is closed waits for its client, and nobody
		// must wait for that.
		go b.body.Close() //nolint:errcheck // nobody to tell
	case now:
		// The reverse proxy may go on to the next upstream with this body,
		// and must find it closed.
		_ = b.body.Close()
	}
}

// closeNow reports whether the body itself may be closed now: not while it is
// being read, which few bodies allow. Then it is closed after that. mu is
// held, and must not be while the body is closed.
func (b *Body) closeNow() bool {
	b.closing = b.reading
	return !b.reading
}

// forget gives the recording back. mu is held.
func (b *Body) forget() {
	if b.recorded == nil {
		return
	}
	b.overflow = true
	if cap(*b.recorded) <= DefaultLimit { // no hoard of rare, large ones
		*b.recorded = (*b.recorded)[:0]
		recordings.Put(b.recorded)
	}
	b.recorded = nil
}

// attemptBody is the body as one attempt sees it.
type attemptBody struct {
	of     *Body
	number int
	sent   int // of the recording
}

// Read implements io.Reader.
func (a *attemptBody) Read(p []byte) (int, error) {
	b := a.of
	b.mu.Lock()
	defer b.mu.Unlock()

	for b.attempt == a.number {
		if a.number > 0 && b.recorded != nil && a.sent < len(*b.recorded) {
			n := copy(p, (*b.recorded)[a.sent:])
			a.sent += n
			return n, nil
		}
		// A read by the attempt before may still be under way. What it gets
		// is recorded: this attempt has to send it.
		if !b.reading && !b.held && !b.pausing() {
			return a.readOn(p)
		}
		b.changed.Wait()
	}
	return 0, errSuperseded
}

// readOn reads what nobody has read yet. mu is held.
func (a *attemptBody) readOn(p []byte) (int, error) {
	b := a.of
	if a.number > 0 {
		b.forget() // all of it has been sent
	}
	if b.err != nil {
		return 0, b.err
	}
	if b.recorded != nil && len(*b.recorded) < b.limit {
		p = p[:min(len(p), b.limit-len(*b.recorded))]
	}

	b.reading, b.touched = true, true
	b.mu.Unlock()
	n, err := b.body.Read(p)
	b.mu.Lock()
	b.reading = false
	b.changed.Broadcast()

	if b.recorded != nil {
		if *b.recorded = append(*b.recorded, p[:n]...); len(*b.recorded) > b.limit {
			b.forget()
		}
	}
	if err != nil {
		b.err = err
	}
	if b.closing {
		b.closing = false
		go b.body.Close() //nolint:errcheck // nobody to tell
	}
	if b.attempt != a.number {
		return 0, errSuperseded
	}
	return n, err
}

// pausing reports whether the first attempt has to wait for the upstream before
// it reads. It starts the pause. mu is held.
func (b *Body) pausing() bool {
	if b.pause > 0 && b.recorded != nil && len(*b.recorded) >= b.pauseAt {
		b.paused = time.AfterFunc(b.pause, func() {
			b.ignored.Store(true)
			b.proceed()
		})
		b.pause = 0
	}
	return b.paused != nil
}

// Close implements io.Closer. It closes the body itself only if no attempt
// follows: closed, it could not be read to its end.
func (a *attemptBody) Close() error {
	b := a.of
	b.mu.Lock()
	now := false
	if b.attempt == a.number && !b.closed {
		b.closed = true
		if b.final {
			b.forget()
			now = b.closeNow()
		}
	}
	b.mu.Unlock()
	if now {
		return b.body.Close()
	}
	return nil
}
