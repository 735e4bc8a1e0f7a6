package outboundauth

import (
	"cmp"
	"errors"
	"math"
	"slices"
	"sort"
	"time"
)

// What must hold for many clients of one server, which take turns. Each rule begins with
// the reason for its bounds.

// What is promised, in numbers of their own.
const (
	promisedFirst   = 8  // token requests under way at first,
	promisedMost    = 64 // and ever
	promisedFewest  = 2
	promisedYouth   = 2500 * time.Millisecond // for so long, a request without an answer counts
	promisedPace    = 100 * time.Millisecond  // between token requests to a server that gives nobody one
	promisedLull    = time.Second             // the same after it has told two clients to wait
	promisedNoRetry = time.Second             // what 429 without Retry-After means to the other clients
)

// alone are the rules whose bounds leave no time for the turns of others: turnInvariants
// has others instead.
var alone = []string{
	"no request waits longer than its bound", // noWaitIsLong, nobodyWaitsInVainForATurn, reserveWaitsAreShort
	"no error after the server is back",      // nobodyStarves
	"who was refused does not wait long",
	"a refusal that the client gets has a reason",
	"tried again soon for those who are refused",
	"strong evidence has a reason",
	"healed at once",
	"healed at last",
	"who needs to be sure waits",
	"new tokens of no use are few",
	"new tokens of no use make waits longer",
	"nobody waits for what is decided",
}

func sharedInvariants() []invariant {
	return slices.DeleteFunc(slices.Clone(invariants), func(i invariant) bool { return slices.Contains(alone, i.name) })
}

var turnInvariants = []struct {
	name  string
	check func(*crowdModel, report)
}{
	{"few requests under way", fewUnderWay},
	{"429 makes them fewer", fewerAfterRefusals},
	{"a server that gives nobody a token is asked in turn", slowWhileFailing},
	{"a server that told two clients to wait is asked each second", slowWhileHeldBack},
	{"no slot is idle while somebody waits", noSlotIsIdle},
	{"turns come in order", turnsInOrder},
	{"another attempt is in nobody's way", extrasAreInNobodysWay},
	{"no request waits longer than token_timeout", noWaitIsLong},
	{"nobody waits in vain for a turn", nobodyWaitsInVainForATurn},
	{"who has a token does not wait for a turn", reserveWaitsAreShort},
	{"to wait for a turn is no failure", queueingIsNoFailure},
	{"nobody starves", nobodyStarves},
	{"a warm-up gets its token", warmUpsEndWell},
	{"no place is left", noPlaceIsLeft},
}

// crowdModel is what follows from the records of all clients.
type crowdModel struct {
	*crowd
	clients []*model
	sent    []*sentBy // all token requests, by start
	turns   []*turnOf // all fetches that had their turn, by the start of their first request
	tokens  []*sentBy // those that brought a token, by end
	ended   []*sentBy // all that ended with an answer, or at their timeout, by end
}

// sentBy is a token request of a client.
type sentBy struct {
	*attemptRecord
	by     int
	repeat bool // it is a quick retry, which needs no turn of its own
}

// turnOf is a fetch: when it began to wait for its turn, and when a request did so for it.
type turnOf struct {
	by                      int
	located, awaited, start time.Duration // awaited: never, if no request did before start
}

func newCrowdModel(c *crowd) *crowdModel {
	m := &crowdModel{crowd: c}
	for i, h := range c.clients {
		client := newModel(h)
		m.clients = append(m.clients, client)
		for _, a := range h.attempts {
			s := &sentBy{attemptRecord: a, by: i, repeat: !a.first && len(client.beside(a)) == 0}
			m.sent = append(m.sent, s)
			if a.first {
				m.turns = append(m.turns, &turnOf{i, a.located, client.awaitedFrom(a.located, a.start), a.start})
			}
			if a.outcome == gotToken {
				m.tokens = append(m.tokens, s)
			}
			if a.outcome != noAnswer || a.end == a.deadline {
				m.ended = append(m.ended, s)
			}
		}
	}
	byEnd := func(a, b *sentBy) int { return cmp.Compare(a.end, b.end) }
	slices.SortStableFunc(m.sent, func(a, b *sentBy) int { return cmp.Compare(a.start, b.start) })
	slices.SortStableFunc(m.turns, func(a, b *turnOf) int { return cmp.Compare(a.start, b.start) })
	slices.SortStableFunc(m.tokens, byEnd)
	slices.SortStableFunc(m.ended, byEnd)
	return m
}

// awaitedFrom returns since when a request waits for the fetch that waits for its turn from
// located to start.
func (m *model) awaitedFrom(located, start time.Duration) time.Duration {
	for _, w := range m.waits {
		if w.from >= start {
			break
		}
		if w.to > w.from && w.to > located {
			return max(w.from, located)
		}
	}
	return never
}

// gotToken reports whether one of the clients got a token in that time: then those who had
// failed try again.
func (c *crowd) gotToken(from, to time.Duration) bool {
	return c != nil && slices.ContainsFunc(c.clients, func(h *history) bool {
		return slices.ContainsFunc(h.attempts, func(a *attemptRecord) bool {
			return a.outcome == gotToken && from <= a.end && a.end <= to
		})
	})
}

// hadNoTurn reports whether the caller got an error because of the turns of others.
func (c *call) hadNoTurn() bool { return errors.Is(c.err, errCrowded) || isInVain(c.err) }

// isInVain reports whether an error is inVainError. No server says so here.
func isInVain(err error) bool {
	failure, ok := errors.AsType[*tokenError](err)
	return ok && failure.Code == "temporarily_unavailable"
}

// lastToken returns when a token came last before at, and nextToken the next from then on.
func (m *crowdModel) lastToken(at time.Duration) time.Duration {
	if i := sort.Search(len(m.tokens), func(i int) bool { return m.tokens[i].end >= at }); i > 0 {
		return m.tokens[i-1].end
	}
	return -1
}

func (m *crowdModel) nextToken(at time.Duration) time.Duration {
	if i := sort.Search(len(m.tokens), func(i int) bool { return m.tokens[i].end >= at }); i < len(m.tokens) {
		return m.tokens[i].end
	}
	return never
}

// young returns how many token requests were under way just after at, and not for long.
func (m *crowdModel) young(at time.Duration) (n int) {
	i := sort.Search(len(m.sent), func(i int) bool { return m.sent[i].start > at })
	for i--; i >= 0 && m.sent[i].start > at-promisedYouth; i-- {
		if m.sent[i].inFlight(at) {
			n++
		}
	}
	return n
}

// Eight token requests are under way at first, so that a server that limits them is not
// overrun. Each token shows that it may take one more, up to 64. One that has no answer
// after two and a half seconds does not count.
func fewUnderWay(m *crowdModel, report report) {
	for _, s := range m.sent {
		tokens := sort.Search(len(m.tokens), func(i int) bool { return m.tokens[i].end > s.start })
		if n, most := m.young(s.start), min(promisedFirst+tokens, promisedMost); n > most {
			report(s.start, "%d token requests under way, want %d at most", n, most)
		}
	}
}

// A 429 says that there were too many, if more than half of what is allowed was under way:
// then half as many are. That counts once for all that were sent before, and each token
// since then may bring one back.
func fewerAfterRefusals(m *crowdModel, report report) {
	most, cut := promisedFirst, time.Duration(-1)
	ended := m.ended
	for _, s := range m.sent {
		for ; len(ended) > 0 && ended[0].end < s.start; ended = ended[1:] {
			switch e := ended[0]; {
			case e.outcome == gotToken:
				most = min(most+1, promisedMost)
			case e.outcome == failedThrottled && e.mode != serverUnavailableAfter && e.start > cut && 2*m.youngBefore(e) > most:
				since := sort.Search(len(m.tokens), func(i int) bool { return m.tokens[i].end >= e.start })
				to := sort.Search(len(m.tokens), func(i int) bool { return m.tokens[i].end > e.end })
				most, cut = min(most, max(most/2, promisedFewest)+to-since), e.end
			}
		}
		tokens := sort.Search(len(m.tokens), func(i int) bool { return m.tokens[i].end > s.start })
		now := tokens - sort.Search(len(m.tokens), func(i int) bool { return m.tokens[i].end >= s.start })
		if n := m.youngBefore(s); !s.repeat && n > most+now {
			report(s.start, "%d token requests under way, want %d at most after 429", n, most+now)
		}
	}
}

// youngBefore returns how many token requests were certainly under way when one was sent,
// this one included. Of those sent in the same instant, none counts.
func (m *crowdModel) youngBefore(s *sentBy) int {
	n := 1
	i := sort.Search(len(m.sent), func(i int) bool { return m.sent[i].start >= s.start })
	for i--; i >= 0 && m.sent[i].start > s.start-promisedYouth; i-- {
		if m.sent[i].end > s.start {
			n++
		}
	}
	return n
}

// bad is a time in which the server certainly gives nobody a token, or holds all back.
type bad struct{ from, to time.Duration }

// failing returns when that was: from the failure of a second client until a token.
func (m *crowdModel) failing() (all []bad) {
	first, last := -1, time.Duration(-1)
	for _, e := range m.ended {
		if e.outcome != failedTransiently && (e.outcome != noAnswer || e.end != e.deadline) {
			continue
		}
		if token := m.lastToken(e.end + 1); token >= last {
			first = -1
		}
		if last = e.end; first < 0 {
			first = e.by
		}
		if to := m.nextToken(e.end); e.by != first && (len(all) == 0 || all[len(all)-1].to < to) {
			all = append(all, bad{e.end, to})
		}
	}
	return all
}

// heldBack returns when two clients were told to wait: until the last of that is over, or
// until a token.
func (m *crowdModel) heldBack() (all []bad) {
	type told struct {
		by       int
		at, till time.Duration
	}
	var before []told
	for _, e := range m.ended {
		if e.outcome != failedThrottled {
			continue
		}
		t := told{e.by, e.end, e.end + min(cmp.Or(e.wait, promisedNoRetry), promisedRetryAfter)}
		to := time.Duration(0)
		for _, other := range before {
			if other.by != t.by && other.till > t.at && m.nextToken(other.at) > t.at {
				to = max(to, other.till, t.till)
			}
		}
		if to > 0 {
			all = append(all, bad{t.at, min(to, m.nextToken(t.at))})
		}
		before = append(before, t)
	}
	return all
}

func isIn(all []bad, at time.Duration) bool {
	return slices.ContainsFunc(all, func(b bad) bool { return b.from < at && at < b.to })
}

// A server that gives nobody a token gets ten token requests a second from all its clients:
// enough to notice soon that it is back, and no burden. A quick retry is part of a turn, and
// comes only if nobody waits for one.
func slowWhileFailing(m *crowdModel, report report) { m.slowIn(m.failing(), promisedPace, report) }

// If a server has told two clients to wait, it means all of them. One tries each second, and
// the first token ends that.
func slowWhileHeldBack(m *crowdModel, report report) { m.slowIn(m.heldBack(), promisedLull, report) }

func (m *crowdModel) slowIn(all []bad, distance time.Duration, report report) {
	for i, s := range m.sent {
		if i == 0 || !isIn(all, s.start) || s.repeat && !m.anyWaits(s.start) {
			continue
		}
		if d := s.start - m.sent[i-1].start; d < distance-slack {
			report(s.start, "request %d of client %d is %v after that of client %d, want %v", s.n, s.by, d, m.sent[i-1].by, distance)
		}
	}
}

// waitingAt returns the turns that certainly waited then.
func (m *crowdModel) waitingAt(at time.Duration) (all []*turnOf) {
	for _, t := range m.turns {
		if t.located < at && at < t.start {
			all = append(all, t)
		}
	}
	return all
}

func (m *crowdModel) anyWaits(at time.Duration) bool { return len(m.waitingAt(at)) > 0 }

// While somebody waits for a turn, all slots are in use, unless the server holds all back or
// gives nobody a token: which one client alone never shows, as it may be to blame itself. So
// Retry-After delays nobody but its client, and no slot is lost. There are eight, before the
// first 429; after that, two at least.
func noSlotIsIdle(m *crowdModel, report report) {
	throttled := never
	for _, e := range m.ended {
		if e.outcome == failedThrottled {
			throttled = min(throttled, e.end)
		}
	}
	for _, e := range m.ended {
		for _, at := range []time.Duration{e.end, e.start + promisedYouth} {
			least := promisedFirst
			if at >= throttled {
				least = promisedFewest
			}
			if n := m.slotsAt(at); n < least && m.anyWaits(at+1) && m.serves(at) {
				report(at, "%d slots in use, want %d, and client %d waits", n, least, m.waitingAt(at + 1)[0].by)
			}
		}
	}
}

// slotsAt returns how many slots may be in use just after at: those of the requests under way,
// and of the moments before quick retries.
func (m *crowdModel) slotsAt(at time.Duration) (n int) {
	i := sort.Search(len(m.sent), func(i int) bool { return m.sent[i].start > at })
	pauses := map[int]bool{}
	for i--; i >= 0 && m.sent[i].start > at-promisedYouth-promisedQuickWait; i-- {
		switch s := m.sent[i]; {
		case s.end > at && s.start > at-promisedYouth:
			n++
		case s.end <= at && s.end >= at-promisedQuickWait && s.outcome != gotToken && !m.clients[s.by].fetchEnded(s.end, at+1):
			if !pauses[s.by] {
				n++
			}
			pauses[s.by] = true
		}
	}
	return n
}

// serves reports whether the server was certainly not known to fail, nor to hold all back:
// since the last token, there was trouble with one client at most.
func (m *crowdModel) serves(at time.Duration) bool {
	token := m.lastToken(at + 1)
	first := -1
	i := sort.Search(len(m.ended), func(i int) bool { return m.ended[i].end >= token })
	for ; i < len(m.ended) && m.ended[i].end <= at; i++ {
		e := m.ended[i]
		if e.outcome == gotToken || e.outcome == failedPermanently {
			continue
		}
		if first >= 0 && first != e.by {
			return false
		}
		first = e.by
	}
	return true
}

// The turns for which a request waits come first, and those that began to wait before others
// come before them. A turn keeps its place, however many requests wait for it. But clients
// that have failed go behind those that have not, as long as the server fails.
func turnsInOrder(m *crowdModel, report report) {
	for i, t := range m.turns {
		for _, later := range m.turns[i+1:] {
			if later.start == t.start || later.located >= t.start || m.goesBehind(later) && !m.goesBehind(t) {
				continue
			}
			switch {
			case later.awaited < t.start && later.awaited < t.awaited && t.start > t.located:
				report(t.start, "client %d (awaited since %v) before client %d, for which a request waits since %v", t.by, t.awaited, later.by, later.awaited)
			case t.awaited == never && later.awaited >= t.start && later.located < t.located:
				report(t.start, "client %d (since %v) before client %d, which waits since %v", t.by, t.located, later.by, later.located)
			case t.start == t.located && later.awaited < t.start:
				report(t.start, "client %d at once, and client %d waits since %v", t.by, later.by, later.located)
			}
		}
	}
}

// goesBehind reports whether the client of a turn had failed since its last token.
func (m *crowdModel) goesBehind(t *turnOf) bool { return m.clients[t.by].failed(t.located + 1) }

// Another attempt beside a silent one helps one client. It is made only if no other waits.
func extrasAreInNobodysWay(m *crowdModel, report report) {
	for _, s := range m.sent {
		if s.first || s.repeat {
			continue
		}
		if all := m.waitingAt(s.start); len(all) > 0 {
			report(s.start, "request %d of client %d beside another, and client %d waits since %v", s.n, s.by, all[0].by, all[0].located)
		}
	}
}

// A request waits for token_timeout in all, whether for its turn or for the answer.
func noWaitIsLong(m *crowdModel, report report) {
	for i, client := range m.clients {
		for _, c := range client.calls {
			_, longest := client.timeouts(c.asked)
			if waited := c.answered - c.asked; waited > longest+slack {
				report(c.answered, "client %d: asked at %v, and waited for %v, want %v at most", i, c.asked, waited, longest)
			}
			if errors.Is(c.err, errCrowded) && c.answered-c.asked < client.config.life.fetchTimeout-slack {
				report(c.answered, "client %d: asked at %v, and was told after %v that it was not its turn", i, c.asked, c.answered-c.asked)
			}
		}
	}
}

// While the server gives nobody a token, a request does not wait for its turn for longer than
// after a failure: one second, or three times the usual. It looks each second.
func nobodyWaitsInVainForATurn(m *crowdModel, report report) {
	all := m.failing()
	for _, t := range m.turns {
		client := m.clients[t.by]
		for _, c := range client.calls {
			for _, b := range all {
				from, to := max(c.asked, t.located, b.from), min(c.answered, t.start, b.to)
				if most := client.patience(c.asked) + time.Second; to-from > most+slack {
					report(to, "client %d: waits since %v for a turn, and the server gives nobody a token since %v", t.by, c.asked, b.from)
				}
			}
		}
	}
}

// A token in its reserve is good. A request waits for twice the usual time for the turn, and
// once more for the answer, rather than for as long as the token lives.
func reserveWaitsAreShort(m *crowdModel, report report) {
	for i, client := range m.clients {
		for _, c := range client.calls {
			t := client.holdingAt(c.asked)
			_, usual, _ := client.usual(c.asked)
			if waited := c.answered - c.asked; t.valid(c.asked+4*usual+slack) && waited > 4*usual+slack {
				report(c.answered, "client %d: asked at %v, and waited for %v, want %v at most, as %s is good until %v", i, c.asked, waited, 4*usual, t.value, t.least)
			}
		}
	}
}

// Only a token request can fail. A fetch that has waited for its turn has not.
func queueingIsNoFailure(m *crowdModel, report report) {
	for i, client := range m.clients {
		before := time.Duration(-1)
		for _, f := range client.fetches {
			made := slices.ContainsFunc(client.attempts, func(a *attemptRecord) bool { return a.end > before && a.end <= f.at })
			if f.err != nil && !made {
				report(f.at, "client %d: the fetch failed (%v), and there was no token request since %v", i, f.err, before)
			}
			if f.err != nil && (errors.Is(f.err, errCrowded) || isInVain(f.err)) {
				report(f.at, "client %d: the fetch failed with %v", i, f.err)
			}
			before = f.at
		}
	}
}

// Turns come in order, so each of the others is in the way once. If the server serves, each
// takes the time of an answer, or two and a half seconds if there is none, and two go at once
// at the least. Before that, those whose requests are silent still count, and then one client
// tries each second until the first token: first those that are never answered. And a client
// whose own try has failed waits for two seconds.
func nobodyStarves(m *crowdModel, report report) {
	for i, client := range m.clients {
		answer := client.config.answer
		mute := len(m.mute())
		for _, c := range client.calls {
			if !c.refused() || client.isAway(c.answered) || client.uselessGrant(c.answered) || client.usersChanged(c.asked, c.answered) {
				continue
			}
			back, takes, ok := client.backSince(c.answered)
			if !ok {
				continue
			}
			back = max(back, client.leftAlone(c.answered))
			if t := client.holdingBefore(c.answered); t != nil {
				back = max(back, t.most)
			}
			takes = max(takes, answer)
			bound := promisedAskedWait + promisedYouth + takes + time.Duration(mute+1)*promisedLull +
				(time.Duration(len(m.clients))*takes+time.Duration(mute)*promisedYouth)/promisedFewest
			_, silence := client.silence(back)
			bound = max(bound, bound+silence)
			from := max(back, m.hangsUntil(i, back))
			asked := client.firstAsked(from, bound, c.answered)
			if due := max(from+bound, asked+bound); c.answered > due+slack {
				report(c.answered, "client %d: an error; the server is back since %v, want a token at %v", i, from, due)
			}
		}
	}
}

// mute returns the clients that the server has not answered at some time, though others.
func (m *crowdModel) mute() (all []int) {
	for i, client := range m.clients {
		if slices.ContainsFunc(client.server.phases, func(p phase) bool { return p.mode == serverHangs && !slices.Contains(m.phases, p) }) {
			all = append(all, i)
		}
	}
	return all
}

// hangsUntil returns when the last request of a client ended that began before the server was
// back.
func (m *crowdModel) hangsUntil(i int, back time.Duration) (until time.Duration) {
	for _, a := range m.clients[i].attempts {
		if a.start <= back && a.end > back && a.outcome == noAnswer {
			until = max(until, a.end)
		}
	}
	return until
}

// A warm-up goes on until there is a token, or until the server refuses the client for good.
// The longest wait is five minutes, and in the end the server serves for ten.
func warmUpsEndWell(m *crowdModel, report report) {
	const least = 6 * time.Minute
	for i, client := range m.clients {
		if m.silent[client.history] {
			continue
		}
		for _, w := range client.warmings {
			back, _, ok := client.backSince(simulatedTime)
			if !ok || !client.holdingAt(w).over(w) {
				continue
			}
			due := max(w, back) + least
			if due < simulatedTime && client.isWarming(due) && !client.usersChanged(w+1, due) && !client.uselessGrant(due) {
				report(due, "client %d was warmed up at %v, and has no token", i, w)
			}
		}
	}
}

// When all has ended, nobody has a place, a slot or a timer.
func noPlaceIsLeft(m *crowdModel, report report) {
	for _, what := range m.leftover {
		report(math.MaxInt64, "%s", what)
	}
}
