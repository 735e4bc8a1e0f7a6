// Whose turn it is to request a token from a server that many clients ask.

package outboundauth

import (
	"cmp"
	"container/list"
	"context"
	"errors"
	"iter"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/pace"
)

// longestSlot is how long a request without an answer counts as under way. A client that
// a server never answers must not be in the way of others for long.
const longestSlot = 2500 * time.Millisecond

// leastOutage is how long a server has given nobody a token when the next one calls off
// the back-offs of those who failed. In a shorter outage, no back-off is longer. And two
// clients that always fail, beside many others, must not be asked for with each token.
const leastOutage = 5 * time.Second

// maxQueues is how many servers are known at most. An issuer can name any number of
// token endpoints, one after another.
const maxQueues = 1024

// queue has those who request tokens from one server: an origin, which is scheme, host and
// port of a token endpoint (RFC 6454 §4). All clients of the process share it. It is safe
// for concurrent use. It calls nobody while it holds mu.
type queue struct {
	endpoint string // its host, as a config has it; does not change

	mu     sync.Mutex // guards all fields below
	server pace.Server
	timer  *time.Timer // when it is the next one's turn; nil if nobody waits for a time

	// The turns that have no slot yet, in the order in which they came. The awaited
	// ones, for which requests wait, go first.
	awaited, others list.List

	// What to do when the server gives tokens again, by who has failed since the last.
	failed  map[any]func()
	granted time.Time // when the server gave the last token
}

// slot is the turn of one fetch: a place among those who wait for a slot, then the slot.
type slot struct {
	*queue
	client string
	broken bool          // the client has failed since its last token
	waited bool          // it did not get the slot at once; does not change after take
	ready  chan struct{} // closed when there is a slot

	// Guarded by the queue's mu:
	place   *list.Element // nil: it waits no more
	request *pace.Request // nil: it has had no slot yet
	since   time.Time     // when it got the slot
	hurries bool          // it is among the awaited ones
}

// queues has the servers that were asked by this process. What is known about a server
// outlives a reload.
var queues = queueTable{byName: make(map[string]*queue)}

type queueTable struct {
	mu     sync.Mutex
	byName map[string]*queue // guarded by mu
}

// all returns the queues of all servers.
func (t *queueTable) all() iter.Seq[*queue] {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Values(maps.Clone(t.byName))
}

// of returns the queue of those who ask a token endpoint at u. To operators, the endpoint
// has the name that the first of them gave it.
func (t *queueTable) of(u *url.URL, endpoint string) *queue {
	name := originOf(u)
	t.mu.Lock()
	defer t.mu.Unlock()
	q := t.byName[name]
	if q != nil {
		return q
	}
	for other, q := range t.byName {
		if len(t.byName) < maxQueues {
			break
		}
		if q.idle() { // what is forgotten of it will be learned again
			delete(t.byName, other)
		}
	}
	q = &queue{endpoint: endpoint}
	t.byName[name] = q
	return q
}

// originOf returns scheme, host and port of a URL, so that two that name the same server
// are equal.
func originOf(u *url.URL) string {
	scheme, port := strings.ToLower(u.Scheme), u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[scheme]
	}
	return scheme + "://" + net.JoinHostPort(canonicalHost(u.Hostname()), port)
}

func (q *queue) idle() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return !q.crowded() && q.server.Idle()
}

// crowded reports whether somebody waits for a slot. mu is held.
func (q *queue) crowded() bool { return q.awaited.Len()+q.others.Len() > 0 }

// take returns the turn of a client that is the next to request a token. client is its
// name for the server: two that have the same one share its limits. broken says that the
// client has failed since its last token.
func (q *queue) take(client string, broken bool) *slot {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := &slot{queue: q, client: client, broken: broken, ready: make(chan struct{})}
	s.place = q.others.PushBack(s)
	q.admit()
	s.waited = s.place != nil
	return s
}

// extra returns a turn with a slot, if there is one that nobody waits for.
func (q *queue) extra(client string) (*slot, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	if !q.free(now) {
		return nil, false
	}
	return &slot{queue: q, client: client, request: q.server.Send(client, now), since: now}, true
}

// free reports whether there is a slot that nobody waits for. mu is held.
func (q *queue) free(now time.Time) bool {
	at, ok := q.server.Next(now)
	return ok && !at.After(now) && !q.crowded()
}

// admit gives slots to those whose turn it is. mu is held.
func (q *queue) admit() {
	if q.timer != nil {
		q.timer.Stop()
		q.timer = nil
	}
	for q.crowded() {
		now := time.Now()
		at, ok := q.server.Next(now)
		switch {
		case !ok:
			return // until a slot is released
		case at.After(now):
			q.timer = time.AfterFunc(at.Sub(now), func() {
				q.mu.Lock()
				defer q.mu.Unlock()
				q.admit()
			})
			return
		}
		s := q.next()
		s.quit()
		s.request, s.since = q.server.Send(s.client, now), now
		close(s.ready)
	}
}

// next returns whose turn it is. While the server gives nobody a token, those go first that
// have not failed: clients that always fail, because of their own settings, must not take
// all turns. mu is held.
func (q *queue) next() *slot {
	for _, broken := range []bool{false, true} {
		for _, waiting := range []*list.List{&q.awaited, &q.others} {
			for e := waiting.Front(); e != nil; e = e.Next() {
				if s := e.Value.(*slot); !s.broken || broken || !q.server.Failing() {
					return s
				}
			}
		}
	}
	return nil // nobody waits
}

// quit gives up a place. mu is held.
func (s *slot) quit() {
	if s.place != nil {
		s.awaited.Remove(s.place)
		s.others.Remove(s.place)
		s.place = nil
	}
}

// wait waits for the slot, or until ctx ends. A caller has begun to wait for the token if
// joined has an element.
func (s *slot) wait(ctx context.Context, joined <-chan struct{}) error {
	for {
		select {
		case <-s.ready:
			return nil
		case <-joined:
			s.hurry()
		case <-ctx.Done():
			s.release()
			return context.Cause(ctx)
		}
	}
}

// hurry lets the turn go before those for which no request waits. It keeps its place
// there, however many requests wait: those of an outage come and go.
func (s *slot) hurry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.place != nil && !s.hurries {
		s.quit()
		s.hurries, s.place = true, s.awaited.PushBack(s)
	}
}

// mayRepeat reports whether another request may be sent in the same turn, after one that
// has failed: not if the server is down and others wait, and not if the slot was given
// back and no other is free.
func (s *slot) mayRepeat() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.repeatable(time.Now())
}

// repeat notes that such a request is sent, if it may be.
func (s *slot) repeat() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if !s.repeatable(now) {
		return false
	}
	s.server.Repeat(s.request, now)
	return true
}

// repeatable is mayRepeat. mu is held.
func (s *slot) repeatable(now time.Time) bool {
	if s.request.HasSlot() {
		return !s.crowded() || (!s.server.Failing() && !s.server.HeldBack(now))
	}
	return s.free(now)
}

// release gives back the place or the slot. It may be called again.
func (s *slot) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.quit()
	if s.request != nil {
		s.server.Release(s.request)
	}
	s.admit()
}

// answered notes how a request ended, for those who come next: with a token, or with err.
func (s *slot) answered(granted bool, err error) {
	for _, again := range s.note(granted, err) {
		again()
	}
}

// note is answered. It returns what is to be done because the server gives tokens again.
func (s *slot) note(granted bool, err error) (revived map[any]func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	failure, ok := errors.AsType[*tokenError](err)
	switch {
	case granted:
		// Otherwise those who failed may be to blame themselves.
		if s.server.Failing() && now.Sub(s.granted) >= leastOutage {
			revived = s.failed
		}
		s.failed, s.granted = nil, now
		s.server.Granted(s.crowded(), now)
	case !ok, failure.permanent, failure.Code == codeConfiguration: // the server is not to blame
	case failure.Status == http.StatusTooManyRequests, failure.retryAfter > 0:
		wait := min(cmp.Or(failure.retryAfter, throttledBackoff), maxRetryAfter)
		s.server.Throttled(s.request, failure.Status == http.StatusTooManyRequests, now, now.Add(wait))
	case failure.Status == 0, failure.Status >= 500, slices.Contains(transientCodes, failure.Code):
		s.server.Failed(s.request)
	}
	s.admit()
	return revived
}

// remind has again called, once, if the server gives nobody a token, and does so later. who
// has failed, and need not wait any longer then. nil instead of again takes it back.
func (q *queue) remind(who any, again func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if again == nil {
		delete(q.failed, who)
		return
	}
	if q.failed == nil {
		q.failed = make(map[any]func())
	}
	q.failed[who] = again
}

// A progress says how far a turn was at one moment. It belongs to the queue, so it changes
// even while the mutex of a source is held. How long a caller waits, and why it gets no token
// then, have to follow from the same progress.
type progress struct {
	since  time.Time // when it got its slot; zero if it had none yet
	waited bool      // it waited for that

	// It waited although the server gave nobody a token, or had given nobody one for a
	// while and told two clients to wait.
	inVain bool
}

// progress returns how far the turn is now.
func (s *slot) progress() progress {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	dry := s.server.HeldBack(now) && now.Sub(s.granted) >= leastPatience
	return progress{s.since, s.waited, s.place != nil && (s.server.Failing() || dry)}
}
