// Package replay sends a request's body more than once.
package replay

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// errSuperseded ends the reads of an attempt when its request is sent again.
var errSuperseded = errors.New("the request is being sent again")

// errClosed ends the reads of an attempt that has closed its reader. net/http may
// read on while it closes. But the body may be closed at the same time, and few
// bodies may be read then.
var errClosed = errors.New("the body is closed")

// DefaultLimit is how much of a body is kept to send it once more, in bytes.
const DefaultLimit = 64 << 10

// maxStall is how long a body that is closed waits for a read that is under way.
const maxStall = 10 * time.Millisecond

// A Body is a request's body that can be sent again. The first attempt records
// what it reads, up to limit. The next attempt sends the recording, and then
// what nobody has read yet, which it records as well. The upstream may be asked
// first whether it wants the body, see Announce. Then the first attempt pauses
// until the upstream says so.
//
// Each attempt has its own reader. An attempt that was given up may still be
// reading in a goroutine of net/http. It takes nothing away from the next
// attempt.
type Body struct {
	body    io.ReadCloser
	limit   int
	pause   time.Duration // how long the first attempt may pause; see Announce
	pauseAt int           // the pause begins after so many bytes

	closeEndsReads bool // see CloseEndsReads

	expected bool        // see Expected
	ignored  atomic.Bool // see Ignored

	mu       sync.Mutex  // guards all fields below; not held while body is read
	changed  sync.Cond   // signals changes of reading, held, paused and attempt
	attempt  int         // the number of the attempt that may read
	reading  bool        // body is being read
	touched  bool        // body has been read, or is being read
	held     bool        // the attempt has to wait, because of Hold
	paused   *time.Timer // not nil: the attempt has to wait until proceed
	recorded *recording  // nil: nothing is recorded any more
	overflow bool        // more was read than is recorded
	err      error       // the error with which body ended, which may be io.EOF
	closed   bool        // the current attempt has closed its reader
	closing  bool        // body has to be closed when nobody reads it any more
	stalled  *time.Timer // not nil: body is closed when this ends, if somebody still reads it
	final    bool        // no attempt will follow the current one
}

// New returns a Body. limit is how many bytes of body can be sent again.
func New(body io.ReadCloser, limit int) *Body {
	b := &Body{body: body, limit: limit, recorded: recordings.Get().(*recording)}
	b.changed.L = &b.mu
	return b
}

// CloseEndsReads says that closing the body ends a read of it. Call it before First.
// The client may send nothing more before it has the end of the answer. But over
// HTTP/2, the answer does not end before the read. So Close ends a read that takes
// longer than maxStall from then on. Other reads end by themselves before: Caddy's
// part of the body counts what is read, and looks at the count when it is closed.
func (b *Body) CloseEndsReads() { b.closeEndsReads = true }

// First returns the body of the first attempt.
func (b *Body) First() io.ReadCloser { return &attemptBody{of: b} }

// Hold makes the first attempt wait before it reads on. It returns false if more
// was read than is recorded: then the body can't be sent again.
func (b *Body) Hold() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	overflowing := b.reading && b.recorded != nil && b.recorded.size == b.limit
	b.held = !b.overflow && !overflowing
	return b.held
}

// resume ends the wait that Hold has begun.
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

// proceed ends the pause. The upstream wants the body, or did not answer in
// time.
func (b *Body) proceed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.endPause()
	b.changed.Broadcast()
}

// endPause ends the pause, if there is one, and makes sure that no other begins.
// mu is held.
func (b *Body) endPause() {
	b.pause = 0
	if b.paused != nil {
		b.paused.Stop()
		b.paused = nil
	}
}

// Again returns the body of the next attempt, which may be the last. Hold must have
// returned true before. From now on, the attempt before reads nothing.
func (b *Body) Again(last bool) io.ReadCloser {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.attempt++
	b.held, b.closed, b.final = false, false, last
	b.endPause()
	b.changed.Broadcast()
	return &attemptBody{of: b, number: b.attempt}
}

// Commit says that the current attempt is the last. Only from now on may the
// body itself be closed.
//
// If the attempt is still in its pause, the upstream has answered without the
// body, and does not want it. Nothing is read then, and the wait ends with ctx,
// the context of the request. If the wait ended earlier, the attempt would break
// the connection on which the answer is still coming.
//
// If the attempt is held, it already has its answer, and most likely nobody
// reads its body any more. But some upstreams end their answer only after they
// have read the whole body. For these, the attempt goes on after MaxPause. If it
// went on at once, it would read the body while the request ends. That would be
// a data race, because Caddy then counts what was read.
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
	if b.attempt == 0 || b.closed { // otherwise a part of the recording may still have to be sent
		b.forget()
	}
	now, touched := b.closed && b.closeNow(), b.touched
	b.mu.Unlock()
	switch {
	case now && touched:
		// When a server's body is closed, Close waits for the client. Nobody
		// must wait for that.
		go b.body.Close() //nolint:errcheck // nobody to tell
	case now:
		// The reverse proxy may go on to the next upstream with this body. It
		// must find the body closed.
		_ = b.body.Close()
	}
}

// closeNow reports whether the body itself may be closed now. Few bodies may be
// closed while somebody reads them. If somebody reads, the body is closed after
// that, see also CloseEndsReads. mu is held, and must not be held while the body is
// closed.
func (b *Body) closeNow() bool {
	b.closing = b.reading
	if b.reading && b.closeEndsReads {
		b.stalled = time.AfterFunc(maxStall, func() { _ = b.body.Close() })
	}
	return !b.reading
}

// forget ends the recording and gives its memory back. mu is held.
func (b *Body) forget() {
	if b.recorded == nil {
		return
	}
	b.overflow = true
	b.recorded.free()
	b.recorded = nil
}

// attemptBody is the body as one attempt sees it.
type attemptBody struct {
	of     *Body
	number int
	sent   int // how much of the recording this attempt has sent
}

// Read implements io.Reader.
func (a *attemptBody) Read(p []byte) (int, error) {
	b := a.of
	b.mu.Lock()
	defer b.mu.Unlock()

	for b.attempt == a.number {
		if b.recorded != nil && a.sent < b.recorded.size {
			n := b.recorded.read(p, a.sent)
			a.sent += n
			return n, nil
		}
		// A read of the attempt before may still be under way. What it reads is
		// recorded, and this attempt has to send that.
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
	if b.final {
		b.forget() // the whole recording has been sent
	}
	if b.err != nil {
		return 0, b.err
	}
	if b.closed {
		return 0, errClosed
	}
	if b.recorded != nil && b.recorded.size < b.limit {
		p = p[:min(len(p), b.limit-b.recorded.size)]
	}

	b.reading, b.touched = true, true
	b.mu.Unlock()
	n, err := b.body.Read(p)
	b.mu.Lock()
	b.reading = false
	b.changed.Broadcast()

	switch {
	case b.recorded == nil:
	case b.recorded.size+n > b.limit:
		b.forget()
	default:
		b.recorded.write(p[:n], b.limit)
		a.sent += n
	}
	if err != nil {
		b.err = err
	}
	if b.closing && (b.stalled == nil || b.stalled.Stop()) {
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
	if b.pause > 0 && b.recorded != nil && b.recorded.size >= b.pauseAt {
		b.paused = time.AfterFunc(b.pause, func() {
			b.ignored.Store(true)
			b.proceed()
		})
		b.pause = 0
	}
	return b.paused != nil
}

// Close implements io.Closer. It closes the body itself only if no other attempt
// follows: nobody could read a closed body to its end.
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
