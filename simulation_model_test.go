package outboundauth

import (
	"slices"
	"sort"
	"time"
)

// What follows from a record: which token the source had, how long it was good,
// how long token requests usually took, and whether the server was there. Where
// the order within an instant decides, the model leaves both possible.

// holding is a time in which the source has a token.
type holding struct {
	from, to    time.Duration // to: when another token replaces it, or when it is forgotten
	value       string
	by          *attemptRecord // that brought it
	took        time.Duration
	life        time.Duration // counted from by
	wholeLife   time.Duration // counted from the first request that brought the token
	least, most time.Duration // when it expires, as far as the gateway can know: between these
	thought     time.Duration // the same, as the gateway said
	named       bool          // the server has said when it expires
}

// valid reports whether the token may certainly be used.
func (t *holding) valid(at time.Duration) bool { return t != nil && at < t.least }

// over reports whether the token has certainly expired.
func (t *holding) over(at time.Duration) bool { return t == nil || at >= t.most }

// reserveFrom is when the last part of the life begins.
func (t *holding) reserveFrom() time.Duration {
	return t.least - min(promisedReserve, t.wholeLife/10)
}

type model struct {
	*history
	holdings []*holding
	epochs   []time.Duration // when a source began that knows nothing
	away     []span          // when no config used the source
	waits    []span          // of requests, by from
	places   map[*trip]*placeModel
	refusals []*trip    // by refused
	renewals []*renewal // by at
}

type span struct{ from, to time.Duration }

func newModel(h *history) *model {
	m := &model{history: h, epochs: []time.Duration{0}}
	slices.SortStableFunc(h.calls, func(a, b *call) int { return int(a.asked - b.asked) })
	gone := never
	for _, u := range h.userLog {
		switch {
		case len(u.lives) == 0:
			gone = u.at
		case gone != never:
			m.away = append(m.away, span{gone, u.at})
			if u.at-gone > keptFor {
				m.epochs = append(m.epochs, u.at)
			}
			gone = never
		}
	}
	if gone != never {
		m.away = append(m.away, span{gone, never})
	}
	m.hold()
	m.sortTrips()
	for _, t := range m.holdings {
		for _, e := range m.epochs {
			if t.from < e {
				t.to = min(t.to, e)
			}
		}
	}
	return m
}

// hold follows the tokens that the source said it fetched.
func (m *model) hold() {
	for _, f := range m.fetches {
		if f.err != nil {
			continue
		}
		before := m.holdingAt(f.at)
		var by *attemptRecord // if several ended now, they began at different times
		var least, most time.Duration
		for _, a := range m.attempts {
			if a.end != f.at || a.outcome != gotToken || a.value != f.value {
				continue
			}
			if l, h := m.endOf(a, before); by == nil || l <= f.expires && f.expires <= h {
				by, least, most = a, l, h
			}
		}
		if by == nil {
			continue // bringsNoStrangers says so
		}
		t := &holding{
			from: f.at, to: never, value: f.value, by: by, took: by.end - by.start,
			least: least, most: most, thought: f.expires,
			named: by.lifetime > 0 || before != nil && before.value == f.value && before.named,
		}
		t.life = t.least - by.start
		t.wholeLife = t.life
		if before != nil && before.value == f.value {
			t.wholeLife = max(t.life, before.wholeLife)
		}
		if before != nil {
			before.to = f.at
		}
		m.holdings = append(m.holdings, t)
	}
}

// endOf returns when the token of a ends, at the earliest and at the latest. The end
// that a server has named stays, if the server repeats the token. Until then, it may
// only become earlier. After that, a new one counts.
func (m *model) endOf(a *attemptRecord, before *holding) (least, most time.Duration) {
	least, most = a.start+a.lifetime, a.start+a.lifetime
	if a.lifetime == 0 {
		shortest, longest := m.defaultLifetimes()
		least, most = a.start+shortest, a.start+longest
	}
	switch {
	case before == nil || before.value != a.value:
	case a.lifetime == 0 && before.named:
		return before.least, before.most
	case a.lifetime == 0, !before.named: // an end that nobody has named may move
		return min(least, before.least), max(most, before.most)
	case before.least > a.end:
		return min(least, before.least), min(most, before.most)
	case before.most > a.start: // it ended while the token was asked for again
		return min(least, before.least), most
	}
	return least, most
}

// defaultLifetimes returns the shortest and the longest of all configs: a new config
// may change what is thought of a token.
func (m *model) defaultLifetimes() (shortest, longest time.Duration) {
	shortest = never
	for _, u := range m.userLog {
		for _, l := range u.lives {
			shortest, longest = min(shortest, l.defaultLifetime), max(longest, l.defaultLifetime)
		}
	}
	return shortest, longest
}

// holdingAt returns the token that the source has just after at, or nil.
func (m *model) holdingAt(at time.Duration) *holding {
	i := sort.Search(len(m.holdings), func(i int) bool { return m.holdings[i].from > at })
	if i == 0 || m.holdings[i-1].to <= at || m.holdings[i-1].from < m.epochOf(at) {
		return nil
	}
	return m.holdings[i-1]
}

// epochOf returns when the source of that time began.
func (m *model) epochOf(at time.Duration) time.Duration {
	i := sort.Search(len(m.epochs), func(i int) bool { return m.epochs[i] > at })
	return m.epochs[i-1]
}

// timeouts returns the shortest and the longest timeout that a fetch in flight may
// have: there may be several configs, and they may have changed since it began.
func (m *model) timeouts(at time.Duration) (shortest, longest time.Duration) {
	shortest = never
	for i, u := range m.userLog {
		ended := i+1 < len(m.userLog) && m.userLog[i+1].at < at-longestTimeout
		if u.at > at || ended && len(m.userLog[i+1].lives) > 0 {
			continue
		}
		for _, l := range u.lives {
			shortest, longest = min(shortest, l.fetchTimeout), max(longest, l.fetchTimeout)
		}
	}
	return shortest, longest
}

// usual returns how long a token request usually takes: the median of the last
// five that brought a token. Of an even number, it may be either of the middle
// ones. ok is false if nothing is known.
func (m *model) usual(at time.Duration) (least, most time.Duration, ok bool) {
	epoch := m.epochOf(at)
	var took []time.Duration
	i := sort.Search(len(m.holdings), func(i int) bool { return m.holdings[i].from > at })
	for i--; i >= 0 && len(took) < 5 && m.holdings[i].from >= epoch; i-- {
		took = append(took, m.holdings[i].took)
	}
	n := len(took)
	if n == 0 {
		return 0, 0, false
	}
	slices.Sort(took)
	return took[(n-1)/2], took[n/2], true
}

// silence returns how long the source may wait for an answer before it asks again,
// while requests wait.
func (m *model) silence(at time.Duration) (least, most time.Duration) {
	shortest, longest := m.timeouts(at)
	if !m.config.concurrent {
		return longest, longest
	}
	few, many, _ := m.usual(at)
	return max(shortest/4, 2*few), max(longest/4, 2*many)
}

// patience returns how long a request waits for a fetch after a failed one.
func (m *model) patience(at time.Duration) time.Duration {
	_, most, _ := m.usual(at)
	return max(time.Second, 3*most)
}

// leastPatience is the same, if the least is usual that may be.
func (m *model) leastPatience(at time.Duration) time.Duration {
	least, _, _ := m.usual(at)
	return max(time.Second, 3*least)
}

// lastFetch returns the last fetch that ended before at, or nil.
func (m *model) lastFetch(at time.Duration) *fetchEnd {
	i := sort.Search(len(m.fetches), func(i int) bool { return m.fetches[i].at >= at })
	if i == 0 || m.fetches[i-1].at < m.epochOf(at) {
		return nil
	}
	return &m.fetches[i-1]
}

// failed reports whether the last fetch before at has failed.
func (m *model) failed(at time.Duration) bool {
	f := m.lastFetch(at)
	return f != nil && f.err != nil
}

// lastAttempt returns the last attempt that began at or before at, or nil.
func (m *model) lastAttempt(at time.Duration) *attemptRecord {
	i := sort.Search(len(m.attempts), func(i int) bool { return m.attempts[i].start > at })
	if i == 0 {
		return nil
	}
	return m.attempts[i-1]
}

// nextAttempt returns the first attempt that began after at, or nil.
func (m *model) nextAttempt(at time.Duration) *attemptRecord {
	i := sort.Search(len(m.attempts), func(i int) bool { return m.attempts[i].start > at })
	if i == len(m.attempts) {
		return nil
	}
	return m.attempts[i]
}

// pending returns the attempts in flight just after at.
func (m *model) pending(at time.Duration) (found []*attemptRecord) {
	for i := sort.Search(len(m.attempts), func(i int) bool { return m.attempts[i].start > at }) - 1; i >= 0 && m.attempts[i].start > at-time.Minute; i-- {
		if m.attempts[i].inFlight(at) {
			found = append(found, m.attempts[i])
		}
	}
	return found
}

// beside returns the attempts in flight when a began.
func (m *model) beside(a *attemptRecord) []*attemptRecord {
	return slices.DeleteFunc(m.pending(a.start), func(other *attemptRecord) bool { return other.n >= a.n })
}

// backSince returns since when the server has been giving tokens without a break
// until at, and the longest time that an answer takes. ok is false if the server
// is not there.
func (m *model) backSince(at time.Duration) (since, answer time.Duration, ok bool) {
	shortest, _ := m.timeouts(at)
	phases := m.server.phases
	i := sort.Search(len(phases), func(i int) bool { return phases[i].from > at }) - 1
	for ; i >= 0; i-- {
		p := phases[i]
		takes := m.config.answer * 6 / 5
		switch p.mode {
		case serverServes:
		case serverSlow:
			takes = p.after * 6 / 5
		default:
			takes = never
		}
		if takes >= min(shortest, m.config.lifetime/2) {
			break
		}
		since, answer, ok = p.from, max(answer, takes), true
	}
	for _, r := range m.server.rejections {
		if r.from <= at && at < r.to {
			return 0, 0, false
		}
		if r.to <= at {
			since = max(since, r.to)
		}
	}
	return since, answer, ok
}

// sourceAt returns the source of that time.
func (m *model) sourceAt(at time.Duration) *tokenSource {
	var last *tokenSource
	for _, s := range m.pool.sources {
		if s.from <= at {
			last = s.source
		}
	}
	return last
}

// isAway reports whether no config uses the source then.
func (m *model) isAway(at time.Duration) bool {
	for _, s := range m.away {
		if s.from <= at && at < s.to {
			return true
		}
	}
	return false
}
