package outboundauth

import (
	"errors"
	"io"
	"net/http"
	"sync"
	"time"
)

// errSuperseded ends the reading of an attempt whose request is being sent
// again.
var errSuperseded = errors.New("the request is being sent again")

// A replayBody is a request's body that can be sent twice. While it is sent
// for the first time, what is read of it is recorded, up to limit; the second
// time, the recording is sent first, and then what nobody has read yet.
//
// Each attempt reads through a body of its own, so that one which was given
// up, and may still be reading in a goroutine of net/http, takes nothing away
// from the next.
type replayBody struct {
	body  io.ReadCloser
	limit int
	pause time.Duration // at most, before more is read than can be recorded

	mu       sync.Mutex  // guards all below; not held while body is read
	changed  sync.Cond   // of reading, held, paused and attempt
	attempt  int         // the one that may read
	reading  bool        // body is being read
	held     bool        // the attempt has to wait, for hold
	paused   *time.Timer // the attempt has to wait, until it fires; then nil
	recorded *[]byte     // nil: not recording any more
	overflow bool        // more was read than is recorded
	err      error       // with which body ended, io.EOF included
	closed   bool        // by the current attempt
	final    bool        // no attempt will follow the current one
}

// recordings are reused: most bodies are small, and few are sent again.
var recordings = sync.Pool{New: func() any { return new([]byte) }}

func newReplayBody(body io.ReadCloser, limit int) *replayBody {
	b := &replayBody{body: body, limit: limit, recorded: recordings.Get().(*[]byte)}
	b.changed.L = &b.mu
	return b
}

// first returns the body of the first attempt.
func (b *replayBody) first() io.ReadCloser { return &attemptBody{of: b} }

// hold makes the first attempt wait before it reads on. It returns false if
// more was read than is recorded, so that the body cannot be sent again.
func (b *replayBody) hold() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held = !b.overflow
	return b.held
}

// proceed ends the pause: the upstream wants the body.
func (b *replayBody) proceed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.endPause()
	b.changed.Broadcast()
}

// endPause makes sure that there is no pause, and will be none. mu is held.
func (b *replayBody) endPause() {
	b.pause = 0
	if b.paused != nil {
		b.paused.Stop()
		b.paused = nil
	}
}

// again returns the body of the second attempt, after hold has returned true.
// The first reads nothing from then on.
func (b *replayBody) again() io.ReadCloser {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.attempt++
	b.held, b.closed, b.final = false, false, true
	b.endPause()
	b.changed.Broadcast()
	return &attemptBody{of: b, number: b.attempt}
}

// commit tells that the current attempt is the last. Only now may the body
// itself be closed.
func (b *replayBody) commit() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.final {
		return
	}
	b.held, b.final = false, true
	b.endPause()
	b.changed.Broadcast()
	b.forget()
	if b.closed {
		_ = b.body.Close()
	}
}

// forget gives the recording back. mu is held.
func (b *replayBody) forget() {
	if b.recorded == nil {
		return
	}
	b.overflow = true
	if cap(*b.recorded) <= defaultReplayBody { // no hoard of rare, large ones
		*b.recorded = (*b.recorded)[:0]
		recordings.Put(b.recorded)
	}
	b.recorded = nil
}

// attemptBody is the body as one attempt sees it.
type attemptBody struct {
	of     *replayBody
	number int
	sent   int // of the recording
}

// Read implements io.Reader.
func (a *attemptBody) Read(p []byte) (int, error) {
	b := a.of
	b.mu.Lock()
	defer b.mu.Unlock()

	// A read by the attempt before may still be under way. What it gets is
	// recorded: this attempt has to send it.
	for b.attempt == a.number && (b.reading || b.held || b.pausing()) {
		b.changed.Wait()
	}
	if b.attempt != a.number {
		return 0, errSuperseded
	}
	if b.recorded != nil && a.number > 0 { // before what was not read yet
		if a.sent < len(*b.recorded) {
			n := copy(p, (*b.recorded)[a.sent:])
			a.sent += n
			return n, nil
		}
		b.forget()
	}
	if b.err != nil {
		return 0, b.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if b.recorded != nil {
		if room := b.limit - len(*b.recorded); room > 0 {
			p = p[:min(len(p), room)]
		} else {
			b.forget()
		}
	}

	b.reading = true
	b.mu.Unlock()
	n, err := b.body.Read(p)
	b.mu.Lock()
	b.reading = false
	b.changed.Broadcast()

	if b.recorded != nil {
		*b.recorded = append(*b.recorded, p[:n]...)
	}
	if err != nil {
		b.err = err
	}
	if b.attempt != a.number {
		return 0, errSuperseded
	}
	return n, err
}

// pausing tells whether the first attempt has to wait for the upstream before
// it reads more than can be recorded. It starts the pause. mu is held.
func (b *replayBody) pausing() bool {
	if b.pause > 0 && b.recorded != nil && len(*b.recorded) == b.limit && b.err == nil {
		b.paused = time.AfterFunc(b.pause, b.proceed)
		b.pause = 0
	}
	return b.paused != nil
}

// Close implements io.Closer. It closes the body itself only if no attempt
// follows: closed, it could not be read to its end.
func (a *attemptBody) Close() error {
	b := a.of
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.attempt != a.number || b.closed {
		return nil
	}
	b.closed = true
	if !b.final {
		return nil
	}
	b.forget()
	return b.body.Close()
}

// hasBody tells whether a request has a body to be sent.
func hasBody(req *http.Request) bool { return req.Body != nil && req.Body != http.NoBody }
