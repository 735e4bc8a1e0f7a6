package outboundauth

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// never is later than everything in a history.
const never = time.Duration(1<<63 - 1)

// outcome is how a token request ended.
type outcome int

const (
	noAnswer outcome = iota // the gateway gave it up
	gotToken
	failedTransiently
	failedThrottled // with 429, or with Retry-After
	failedPermanently
)

var outcomeNames = [...]string{"given up", "a token", "failed", "throttled", "refused for good"}

func (o outcome) String() string { return outcomeNames[o] }

// attemptRecord is a token request. All times in a record count from the start of the
// history.
type attemptRecord struct {
	n          int
	user       int
	mode       serverMode // of the server, when it began
	start, end time.Duration
	deadline   time.Duration // of its context
	outcome    outcome
	wait       time.Duration // what the server asked for
	value      string
	lifetime   time.Duration // as the server named it

	first   bool          // it was the first of its fetch
	located time.Duration // when that began to wait for its turn
}

func (a *attemptRecord) inFlight(at time.Duration) bool { return a.start <= at && at < a.end }

// call is one question for a token.
type call struct {
	asked, answered time.Duration
	patience        time.Duration // 0: endless
	value           string        // "" without a token
	err             error
}

// left reports whether the caller went away. Then the answer says nothing.
func (c *call) left() bool {
	return errors.Is(c.err, context.DeadlineExceeded) && !c.refused()
}

// refused reports whether the caller was told that there is no token.
func (c *call) refused() bool {
	_, ok := errors.AsType[*fetchError](c.err)
	return ok
}

// fetchEnd is the end of a fetch, as its requester is told.
type fetchEnd struct {
	at       time.Duration
	value    string
	expires  time.Duration // what the source thinks
	err      *fetchError
	retryAt  time.Duration
	failures int
}

// usersNote says who uses the source from then on.
type usersNote struct {
	at    time.Duration
	lives []lifecycle
}

type moment struct {
	at   time.Duration
	what string
}

// record is what happened in a history, each list in the order of time.
type record struct {
	recording sync.Mutex // guards all fields below while the history runs

	attempts []*attemptRecord
	locates  []time.Duration // when fetches looked where to ask, which is before their turn
	calls    []*call         // by asked
	trips    []*trip
	fetches  []fetchEnd
	notes    []moment
	secrets  []time.Duration // when the secret changed
	warmings []time.Duration // when a config began without a token
	userLog  []usersNote
	endedAt  time.Duration // from here on, nothing may happen
	leftover []string
	untidy   []string // about places
}

func (h *history) note(format string, args ...any) {
	h.recording.Lock()
	defer h.recording.Unlock()
	h.notes = append(h.notes, moment{h.now(), fmt.Sprintf(format, args...)})
}

func (h *history) begin(ctx context.Context, user int, mode serverMode) *attemptRecord {
	h.recording.Lock()
	defer h.recording.Unlock()
	a := &attemptRecord{n: len(h.attempts) + 1, user: user, mode: mode, start: h.now(), end: never, deadline: never}
	if d, ok := ctx.Deadline(); ok {
		a.deadline = d.Sub(h.started)
	}
	if n := len(h.locates); n > 0 {
		a.located = h.locates[n-1]
		a.first = len(h.attempts) == 0 || h.attempts[len(h.attempts)-1].located != a.located
	}
	h.attempts = append(h.attempts, a)
	return a
}

func (h *history) end(a *attemptRecord, g grant, err error) {
	h.recording.Lock()
	defer h.recording.Unlock()
	a.end = h.now()
	if err == nil {
		a.value, a.lifetime = g.accessToken, g.lifetime
	}
}

func (h *history) ended(t *token, err *fetchError, failures int) {
	h.recording.Lock()
	defer h.recording.Unlock()
	f := fetchEnd{at: h.now(), err: err, failures: failures}
	if t != nil {
		f.value, f.expires = t.value, t.expires.Sub(h.started)
	}
	if err != nil {
		f.retryAt = err.retryAt.Sub(h.started)
	}
	h.fetches = append(h.fetches, f)
}

func (h *history) asks(patience time.Duration) *call {
	h.recording.Lock()
	defer h.recording.Unlock()
	c := &call{asked: h.now(), answered: never, patience: patience}
	h.calls = append(h.calls, c)
	return c
}

func (h *history) answered(c *call, t *token, err error) {
	h.recording.Lock()
	defer h.recording.Unlock()
	c.answered, c.err = h.now(), err
	if t != nil {
		c.value = t.value
	}
}

// began notes a request that has its token.
func (h *history) began(x *trip) {
	h.recording.Lock()
	defer h.recording.Unlock()
	h.trips = append(h.trips, x)
}

func (h *history) looksWhereToAsk() {
	h.recording.Lock()
	defer h.recording.Unlock()
	h.locates = append(h.locates, h.now())
}

func (h *history) secretChanged() {
	h.recording.Lock()
	defer h.recording.Unlock()
	h.secrets = append(h.secrets, h.now())
}

// warm does what the product does when a config has started.
func (h *history) warm() {
	h.recording.Lock()
	h.warmings = append(h.warmings, h.now())
	h.recording.Unlock()
	h.pool.source.Warm()
}

func (h *history) usersAre(lives []lifecycle) {
	h.recording.Lock()
	defer h.recording.Unlock()
	h.userLog = append(h.userLog, usersNote{h.now(), lives})
}

func (h *history) inFlight() (n int) {
	h.recording.Lock()
	defer h.recording.Unlock()
	for _, a := range h.attempts {
		if a.end == never {
			n++
		}
	}
	return n
}

// lines shows what happened in a time.
func (h *history) lines(from, to time.Duration) string {
	var all []moment
	add := func(at time.Duration, format string, args ...any) {
		if from <= at && at <= to {
			all = append(all, moment{at, fmt.Sprintf(format, args...)})
		}
	}
	for _, n := range h.notes {
		add(n.at, "*** %s", n.what)
	}
	for _, u := range h.userLog {
		add(u.at, "users: %+v", u.lives)
	}
	for _, x := range h.trips {
		x.lines(add)
	}
	for _, a := range h.attempts {
		add(a.start, "  request %d by user %d, the server %v", a.n, a.user, a.mode)
		switch a.outcome {
		case gotToken:
			add(a.end, "  request %d: %s for %v", a.n, a.value, a.lifetime)
		default:
			add(a.end, "  request %d: %v %v", a.n, a.outcome, a.wait)
		}
	}
	for _, f := range h.fetches {
		if f.err != nil {
			add(f.at, "  fetch failed after %d: again at %v", f.failures, f.retryAt)
		} else {
			add(f.at, "  fetched %s until %v", f.value, f.expires)
		}
	}
	for _, c := range h.calls {
		switch {
		case c.value != "":
			add(c.answered, "    asked at %v: %s", c.asked, c.value)
		case c.left():
			add(c.answered, "    asked at %v: left", c.asked)
		default:
			add(c.answered, "    asked at %v: %v", c.asked, c.err)
		}
	}
	slices.SortStableFunc(all, func(a, b moment) int { return cmp.Compare(a.at, b.at) })
	var b strings.Builder
	for _, m := range all {
		fmt.Fprintf(&b, "%16v %s\n", m.at, m.what)
	}
	return b.String()
}

var judgementNames = [...]string{"accepts", "refuses", "refuses the token of"}

// lines shows a trip.
func (x *trip) lines(add func(at time.Duration, format string, args ...any)) {
	name := fmt.Sprintf("%v %v%x", x.to.address, x.kind.path, x.random%0x1000)
	if x.kind.check {
		name += " (check)"
	}
	if x.unrepeatable {
		name += " (once)"
	}
	if x.sure.to > x.sure.from {
		add(x.sure.to, "      %s waited to be sure since %v", name, x.sure.from)
	}
	for _, s := range x.sends {
		if s.answered != never {
			add(s.answered, "      %v %s, sent at %v with %s", judgementNames[s.judgement], name, s.sent, s.value)
		}
	}
	switch {
	case x.refusal == nil:
	case x.fresh != "":
		add(x.decided, "      %s gets %s, refused at %v, renewed %t, strong %t", name, x.fresh, x.refused, x.refusal.Renewed(), x.refusal.Strong())
	default:
		add(x.decided, "      %s gets its answer, refused at %v, renewed %t, path %t", name, x.refused, x.refusal.Renewed(), x.refusal.isPath)
	}
	if x.settled {
		add(x.sends[1].answered, "      %s: verdict %v", name, x.verdict)
	}
}
