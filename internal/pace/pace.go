// How many requests are under way at one server, and when the next one may be sent.

// Package pace decides how many requests a server is sent that many clients ask: as many
// as it takes, and few while it gives nobody what they ask for. It is pure: it waits for
// nobody, and its caller tells it the time.
package pace

import (
	"cmp"
	"time"
)

const (
	// How many requests are under way at once, to begin with. Servers that limit this
	// answer 429 to the others, so the limit follows the server between these bounds.
	firstLimit = 8
	leastLimit = 2
	mostLimit  = 64

	// The distance of requests to a server that gives nobody a token, and to one that
	// has told several clients to wait.
	failingDistance = 100 * time.Millisecond
	heldDistance    = 1 * time.Second

	// How long a server is not tried with as many requests as were too many for it.
	remembered = 10 * time.Second
)

// Server is what is known about how much a server takes. The zero value is a server
// about which nothing is known. A Server is not safe for concurrent use.
type Server struct {
	limit   int  // 0: firstLimit
	careful bool // there was a 429: the limit grows slowly
	tokens  int  // since the limit last grew
	taken   int  // slots

	// How many requests the server took at most, when it last refused one more, and until
	// when the limit does not exceed that.
	most      int
	mostUntil time.Time

	sent uint64    // requests so far
	cut  uint64    // those up to this one were sent before the limit was last halved
	last time.Time // when the last one was sent

	// Since the last token: the first client that failed, and whether another one did, too.
	failed  string
	failing bool

	// Since the last token: a client that the server has told to wait, and until when. If
	// it has told another one meanwhile, all are held back until heldUntil.
	told                 string
	toldUntil, heldUntil time.Time
}

// Request is a request of one client. It has a slot while it counts as under way.
type Request struct {
	client string
	number uint64
	beside int // how many requests were under way then, this one included
	slot   bool
}

// HasSlot reports whether the request counts as under way.
func (r *Request) HasSlot() bool { return r.slot }

// Idle reports whether no request has a slot.
func (s *Server) Idle() bool { return s.taken == 0 }

// Limit returns how many requests may be under way at once.
func (s *Server) Limit() int { return cmp.Or(s.limit, firstLimit) }

// Failing reports whether the server gives nobody a token: it has failed two clients since
// the last one. One client alone may be to blame itself.
func (s *Server) Failing() bool { return s.failing }

// HeldBack reports whether all clients wait because the server told two of them to. One
// client alone may have used up what it may ask for.
func (s *Server) HeldBack(now time.Time) bool { return now.Before(s.heldUntil) }

// Next returns when the next request may be sent. ok is false if that is not before one of
// those under way has ended.
func (s *Server) Next(now time.Time) (at time.Time, ok bool) {
	switch {
	case s.taken >= s.Limit():
		return time.Time{}, false
	case s.HeldBack(now):
		return earlier(s.last.Add(heldDistance), s.heldUntil), true
	case s.failing:
		return s.last.Add(failingDistance), true
	}
	return now, true
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// Send notes a request, which gets a slot.
func (s *Server) Send(client string, now time.Time) *Request {
	r := &Request{client: client}
	s.Repeat(r, now)
	return r
}

// Repeat notes that a request is sent once more.
func (s *Server) Repeat(r *Request, now time.Time) {
	if !r.slot {
		r.slot = true
		s.taken++
	}
	s.sent++
	s.last = now
	r.number, r.beside = s.sent, s.taken
}

// Release takes the slot back. It may be called again.
func (s *Server) Release(r *Request) {
	if r.slot {
		r.slot = false
		s.taken--
	}
}

// Granted notes that a request got a token. The limit grows only if others wait for a
// slot: otherwise nothing shows that the server takes more. At first it doubles with each
// round of tokens, like a connection's window in TCP (RFC 5681 §3.1). After a 429, it
// grows by one with each round; but for a time not to what was too much, and soon to what
// was not.
func (s *Server) Granted(othersWait bool, now time.Time) {
	s.failed, s.failing = "", false
	s.told, s.toldUntil, s.heldUntil = "", time.Time{}, time.Time{}
	if !othersWait {
		return
	}
	s.tokens++
	switch known := now.Before(s.mostUntil); {
	case known && s.Limit() >= s.most:
		return
	case known && s.Limit() < s.most*3/4: // it has just taken more
	case s.careful && s.tokens < s.Limit():
		return
	}
	s.tokens = 0
	s.limit = min(s.Limit()+1, mostLimit)
}

// Failed notes that a request failed, and that the server may be to blame.
func (s *Server) Failed(r *Request) {
	s.failing = s.failing || s.failed != "" && s.failed != r.client
	s.failed = r.client
}

// Throttled notes that the server told a client to wait. tooMany says that its answer was
// 429 (RFC 6585 §4).
func (s *Server) Throttled(r *Request, tooMany bool, now, until time.Time) {
	if tooMany {
		s.halve(r, now)
	}
	switch {
	case s.HeldBack(now):
		s.heldUntil = later(s.heldUntil, until)
	case s.told == "" || !now.Before(s.toldUntil):
		s.told, s.toldUntil = r.client, until
	case s.told == r.client:
		s.toldUntil = later(s.toldUntil, until)
	default:
		s.heldUntil = later(s.toldUntil, until)
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// halve halves the limit, once for all requests that were sent before. If less than half
// of the limit was under way, this was not too much: the server limits that client.
func (s *Server) halve(r *Request, now time.Time) {
	if r.number <= s.cut || 2*r.beside <= s.Limit() {
		return
	}
	s.limit = max(s.Limit()/2, leastLimit)
	s.cut, s.careful, s.tokens = s.sent, true, 0
	s.most, s.mostUntil = r.beside-1, now.Add(remembered)
}
