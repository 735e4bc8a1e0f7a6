package outboundauth

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sort"
	"time"
)

// What must hold in each history. Each rule is a function that says where it is
// broken, and begins with the reason for its bounds.

// What is promised. These are numbers of their own: a rule that took them from the code
// would agree with whatever stands there.
const (
	promisedInFlight   = 4
	promisedAskedWait  = 2 * time.Second        // while requests are refused
	promisedLeastWait  = 250 * time.Millisecond // always
	promisedIdleWait   = 30 * time.Second
	promisedQuickWait  = 200 * time.Millisecond
	promisedRetries    = 2 // quick ones
	promisedRetryAfter = 5 * time.Minute
	promisedPermanent  = 5 * time.Minute
	promisedSecretWait = 100 * time.Millisecond
	promisedReserve    = 10 * time.Second

	slack = time.Millisecond // for what is rounded
)

// doubled returns base, doubled so many times, and limit at most.
func doubled(times int, base, limit time.Duration) time.Duration {
	for ; times > 0 && base < limit; times-- {
		base *= 2
	}
	return min(base, limit)
}

// afterThrottling is the wait after 429 without Retry-After, when so many came before.
func afterThrottling(before int) time.Duration { return doubled(before, time.Second, 30*time.Second) }

// afterRefusal is the least wait after a permanent error, when so many came before. The
// longest is half as much again, and five minutes at most.
func afterRefusal(before int) time.Duration {
	return min(doubled(before, 5*time.Second, promisedPermanent), promisedPermanent*3/4)
}

// finding is a place where a rule is broken.
type finding struct {
	rule string
	at   time.Duration
	text string
}

func (f finding) String() string { return fmt.Sprintf("%s: at %v: %s", f.rule, f.at, f.text) }

// report takes a finding.
type report func(at time.Duration, format string, args ...any)

var invariants = []invariant{
	{"few requests in flight", fewInFlight},
	{"another attempt only for those who wait", besideForGoodReason},
	{"a fetch ends in time", fetchesEnd},
	{"a token that was granted is used", grantsAreUsed},
	{"the end of a token", tokensEnd},
	{"no request waits longer than its bound", waitsAreShort},
	{"no request gives up too soon", waitsAreLongEnough},
	{"no expired token", noExpiredToken},
	{"no older token", noOlderToken},
	{"no valid token withheld", noTokenWithheld},
	{"no error after the server is back", noLateError},
	{"tried again soon", triedAgainSoon},
	{"waits that nobody asked about", idleWaits},
	{"every request has a reason", requestsAreDue},
	{"the number of requests", requestsAreFew},
	{"renewed in time", renewedInTime},
	{"nothing that nobody wants", nothingUnwanted},
	{"nothing without users", restsWithoutUsers},
	{"nothing left", nothingLeft},
	{"who was refused does not wait long", refusedWaitsAreShort},
	{"who waits to be sure has a reason", sureForGoodReason},
	{"who needs to be sure waits", sureIfRefused},
	{"nobody waits for what is decided", nobodyWaitsInVain},
	{"sent again with another token", sentAgainWithAnother},
	{"a token that was replaced is no reason to wait", oldTokensAreNoReason},
	{"what is refused itself is not sent again", pathsAreNotSentAgain},
	{"a refusal that the client gets has a reason", answersForGoodReason},
	{"new tokens of no use are few", wasteIsLimited},
	{"new tokens of no use make waits longer", wasteSlowsDown},
	{"a token is replaced once", replacedOnce},
	{"strong evidence has a reason", strongForGoodReason},
	{"the reserve is no evidence", reserveIsNoEvidence},
	{"tried again soon for those who are refused", triedAgainForTheRefused},
	{"healed at once", healedAtOnce},
	{"healed at last", healedAtLast},
	{"verdicts have a reason", verdictsForGoodReason},
	{"a health check brings few tokens", checksBringFew},
	{"tidy places", placesAreTidy},
}

type invariant struct {
	name  string
	check func(*model, report)
}

// violations returns where rules are broken, one place for each rule.
func (h *history) violations() []finding {
	return newModel(h).violations(invariants)
}

func (m *model) violations(rules []invariant) (found []finding) {
	for _, rule := range rules {
		n := len(found)
		rule.check(m, func(at time.Duration, format string, args ...any) {
			if len(found) == n {
				found = append(found, finding{rule.name, at, fmt.Sprintf(format, args...)})
			}
		})
	}
	return found
}

// Four requests may be under way at most, and one if they may not be made side by
// side.
func fewInFlight(m *model, report report) {
	limit := promisedInFlight
	if !m.config.concurrent {
		limit = 1
	}
	for _, a := range m.attempts {
		if n := len(m.beside(a)) + 1; n > limit {
			report(a.start, "%d requests in flight, want %d at most", n, limit)
		}
	}
}

// Another attempt begins beside the first only while requests wait and there is no
// token for them: a quarter of token_timeout after the attempt before, or twice the
// usual answer. If one has failed and others go on, the server does answer, and two
// seconds are enough.
func besideForGoodReason(m *model, report report) {
	for i, a := range m.attempts {
		if len(m.beside(a)) == 0 {
			continue
		}
		if t := m.holdingAt(a.start); t.valid(a.start) {
			report(a.start, "request %d beside another, and %s is valid", a.n, t.value)
		}
		if !m.anybodyWaits(a.start) {
			report(a.start, "request %d beside another, and nobody waits", a.n)
		}
		before := m.attempts[i-1]
		least, _ := m.silence(a.start)
		if m.anyEnded(m.fetchStart(a.start), a.start) {
			least = min(least, promisedAskedWait)
		}
		if distance := a.start - before.start; distance < least-slack {
			report(a.start, "request %d only %v after the one before, want %v", a.n, distance, least)
		}
	}
}

func (m *model) anybodyWaits(at time.Duration) bool {
	for _, w := range m.waits {
		if w.from > at {
			break
		}
		if w.to >= at {
			return true
		}
	}
	return false
}

// fetchStart is a time in which no fetch was under way, before the one of at began.
func (m *model) fetchStart(at time.Duration) time.Duration {
	if f := m.lastFetch(at); f != nil {
		return f.at
	}
	return m.epochOf(at)
}

// anyEnded reports whether a request failed in that time, while others went on.
func (m *model) anyEnded(from, to time.Duration) bool {
	for _, a := range m.attempts {
		failed := a.outcome == failedTransiently || a.outcome == gotToken && !m.wasFetched(a.end)
		if failed && from <= a.end && a.end <= to {
			return true
		}
	}
	return false
}

// token_timeout bounds a fetch, and so all its attempts.
func fetchesEnd(m *model, report report) {
	for _, a := range m.attempts {
		_, longest := m.timeouts(a.start)
		if a.deadline > a.start+longest || a.end > a.deadline {
			report(a.start, "request %d has until %v and ended at %v, want %v after its start at most", a.n, a.deadline, a.end, longest)
		}
	}
}

// Whatever a server grants in time serves those who wait. Of several tokens that come
// at the same time, one is used. If it takes most of its life to get a token, nothing
// may be left of it.
func grantsAreUsed(m *model, report report) {
	values := map[time.Duration]map[string]bool{}
	for _, a := range m.attempts {
		if a.outcome != gotToken {
			continue
		}
		if values[a.end] == nil {
			values[a.end] = map[string]bool{}
		}
		values[a.end][a.value] = true
		before := m.holdingAt(a.end - 1)
		least, _ := m.endOf(a, before)
		if took := a.end - a.start; least-a.start < 2*took || least <= a.end || m.isAway(a.end) {
			continue
		}
		used := false
		for _, f := range m.fetches {
			used = used || f.at == a.end && f.err == nil
		}
		if !used {
			report(a.end, "%s was granted, and not used", a.value)
		}
	}
	for _, f := range m.fetches {
		if f.err == nil && !values[f.at][f.value] {
			report(f.at, "%s was fetched, and not granted", f.value)
		}
	}
}

// A server that repeats a token names what is left of its life, nothing, or its whole
// life once more. The end that it has named first counts, until that has passed.
func tokensEnd(m *model, report report) {
	for _, t := range m.holdings {
		if t.thought < t.least-slack || t.thought > t.most+slack {
			report(t.from, "%s is thought to end at %v, want %v to %v", t.value, t.thought, t.least, t.most)
		}
	}
}

// Nobody waits while there is a good token, except in its reserve: there, the answer
// takes twice the usual time at most, and no time if a fetch has failed since. Without
// a good token, a request waits for the whole of the first fetch, and for a second (or
// three times the usual) after one has failed.
func waitsAreShort(m *model, report report) {
	for _, c := range m.calls {
		if waited, bound := c.answered-c.asked, m.bound(c.asked); waited > bound+slack {
			report(c.answered, "asked at %v, and waited for %v, want %v at most", c.asked, waited, bound)
		}
	}
}

func (m *model) bound(asked time.Duration) time.Duration {
	t := m.holdingAt(asked)
	if before := m.holdingAt(asked - 1); before != t && !before.valid(asked) {
		t = before // the token came in this instant, and maybe too late
	}
	usual := time.Duration(0)
	if _, most, ok := m.usual(asked); ok {
		usual = most
	}
	if t.valid(asked) {
		if asked < t.reserveFrom() {
			return 0
		}
		if m.failed(asked) && m.failed(asked+1) {
			return 0
		}
		if asked+2*usual < t.least {
			return 2 * usual
		}
		// The token ends meanwhile.
		return t.least - asked + m.boundWithout(t.least)
	}
	return m.boundWithout(asked)
}

// boundWithout is how long a request waits that finds no token.
func (m *model) boundWithout(asked time.Duration) time.Duration {
	_, longest := m.timeouts(asked)
	wait := m.patience(asked)
	if m.failed(asked) && m.failed(asked+1) {
		return wait
	}
	if t := m.holdingAt(asked); t != nil {
		// A renewal that should have ended before the token did.
		if first := m.firstPending(asked); first != nil && first.start < t.least && asked-first.start > wait {
			return wait
		}
	}
	return longest
}

// firstPending returns the oldest attempt in flight.
func (m *model) firstPending(at time.Duration) *attemptRecord {
	if all := m.pending(at); len(all) > 0 {
		return all[len(all)-1]
	}
	return nil
}

// A request gets no error before a fetch has failed, or a renewal that should have
// replaced the token in time. While a fetch is under way, it gets an error only after
// its patience has ended.
func waitsAreLongEnough(m *model, report report) {
	for _, c := range m.calls {
		if !c.refused() || m.usersChanged(c.asked, c.answered) || c.hadNoTurn() {
			continue
		}
		waited := c.answered - c.asked
		if m.anyGoesOn(c.answered) && waited < m.leastPatience(c.answered)-slack {
			report(c.answered, "asked at %v, an error after %v, and a fetch is under way", c.asked, waited)
		}
		shortest, _ := m.timeouts(c.answered)
		if m.server.crowd != nil && waited >= shortest-slack {
			continue // the turns of others took a part of it
		}
		if !m.failed(c.answered+1) && !m.late(c.answered) {
			report(c.answered, "asked at %v, an error, and no fetch has failed", c.asked)
		}
	}
}

// late reports whether a renewal has been under way for too long, and began while the
// token was valid.
func (m *model) late(at time.Duration) bool {
	first := m.nextAttempt(m.fetchStart(at) - 1)
	t := m.holdingAt(at)
	return first != nil && t != nil && first.start < t.most && at-first.start > m.leastPatience(at)-slack
}

// anyGoesOn reports whether an attempt began before at and ended after it.
func (m *model) anyGoesOn(at time.Duration) bool {
	for _, a := range m.pending(at) {
		if a.start < at && a.end > at {
			return true
		}
	}
	return false
}

// A token is used to the end of its life, and no longer.
func noExpiredToken(m *model, report report) {
	for _, c := range m.calls {
		if c.value == "" {
			continue
		}
		ok, ended := false, time.Duration(0)
		for _, t := range m.holdings {
			if t.value == c.value {
				// Whoever was asked for an answer before the end may have it after.
				ok = ok || t.from <= c.answered && c.answered < t.most+slack
				ended = max(ended, t.most)
			}
		}
		if !ok {
			report(c.answered, "asked at %v, got %s, which ended at %v", c.asked, c.value, ended)
		}
	}
}

// Whoever asks gets the newest token. What upstreams make of it changes nothing: others
// may accept it.
func noOlderToken(m *model, report report) {
	for _, c := range m.calls {
		t := m.holdingAt(c.asked)
		if c.value != "" && t.valid(c.answered) && t == m.holdingAt(c.answered) && t.from < c.asked && c.value != t.value {
			report(c.answered, "got %s, want %s", c.value, t.value)
		}
	}
}

// A request gets a token that is valid, rather than an error, even one that upstreams
// refuse.
func noTokenWithheld(m *model, report report) {
	for _, c := range m.calls {
		t := m.holdingAt(c.answered)
		if c.refused() && t.valid(c.answered) && t.from < c.answered {
			report(c.answered, "asked at %v, got an error, and %s is valid until %v", c.asked, t.value, t.least)
		}
	}
}

// A request that waits or comes when the server is back gets an error only until the
// next attempt is due, and has been answered. It is due two seconds after the last
// one, or when an attempt without an answer has taken too long: see silence. An attempt
// that began late in a fetch may have too little time, and the next is due. What the
// server has asked for comes first, and so does the wait after a permanent error.
func noLateError(m *model, report report) {
	for _, c := range m.calls {
		if !c.refused() || m.isAway(c.answered) || m.uselessGrant(c.answered) {
			continue
		}
		back, answer, ok := m.backSince(c.answered)
		if !ok {
			continue
		}
		back = max(back, m.leftAlone(c.answered))
		if t := m.holdingBefore(c.answered); t != nil {
			back = max(back, t.most) // until then, there was no hurry
		}
		distance := promisedAskedWait
		for _, a := range m.attempts {
			if a.start >= back && a.outcome == noAnswer && a.end == a.deadline && a.end <= c.answered {
				back = a.start // token_timeout has cut it off
			}
			// It began before the server was back, so it may have no answer.
			if a.start <= back && a.end > back {
				_, silence := m.silence(back)
				distance = max(distance, silence)
			}
		}
		asked := m.firstAsked(back, distance, c.answered)
		if due := max(back+distance, asked) + answer; c.answered > due+slack {
			report(c.answered, "an error; the server is back since %v, want a token at %v", back, due)
		}
	}
}

// uselessGrant reports whether the server has last granted a token of whose life nothing
// is left: one that it repeats, or one that took too long. Then it is not back.
func (m *model) uselessGrant(at time.Duration) bool {
	for _, a := range m.attempts {
		if a.outcome == gotToken && a.end <= at && !m.wasFetched(a.end) {
			if t := m.holdingAt(at); t == nil || t.from < a.end {
				return true
			}
		}
	}
	return false
}

// leftAlone returns until when the server is left alone, by the last answers before at:
// it has asked for that, or refused the client.
func (m *model) leftAlone(at time.Duration) (until time.Duration) {
	throttles, refusals := 0, 0
	for _, a := range m.attempts {
		if a.end > at {
			continue
		}
		switch a.outcome {
		case failedThrottled:
			wait := min(a.wait, promisedRetryAfter)
			if a.wait == 0 {
				wait = afterThrottling(throttles)
				throttles++
			}
			until = max(until, a.end+wait)
		case failedPermanently:
			wait := min(doubled(refusals, 5*time.Second, promisedPermanent)*3/2, promisedPermanent)
			refusals++
			end := a.end + wait
			for _, changed := range m.secrets {
				if changed >= a.start {
					// Looked at before, a moment ago.
					end = min(end, max(a.end, changed)+promisedSecretWait)
				}
			}
			until = max(until, end)
		case gotToken:
			if m.wasFetched(a.end) {
				throttles, refusals = 0, 0
			}
		default:
		}
	}
	return until
}

// holdingBefore returns the last token that the source had.
func (m *model) holdingBefore(at time.Duration) (last *holding) {
	for _, t := range m.holdings {
		if t.from < at {
			last = t
		}
	}
	return last
}

// firstAsked returns when a request first asked or waited, once the next attempt was
// due. Before the attempt that has no answer is given up, nobody may have waited.
func (m *model) firstAsked(back, distance, limit time.Duration) time.Duration {
	from := back
	if distance > promisedAskedWait {
		from += distance
	}
	for _, c := range m.calls {
		if c.answered >= from && c.asked <= limit {
			return max(c.asked, from)
		}
	}
	return limit
}

// While requests are refused, an attempt that failed is repeated two seconds after its
// start at most, and no later than the outage has lasted. A request makes up for a
// longer wait that was set before.
func triedAgainSoon(m *model, report report) {
	for _, c := range m.calls {
		at := c.answered
		if !c.refused() || len(m.pending(at)) > 0 || m.leftAlone(at) > at {
			continue
		}
		if at-c.asked >= m.patience(c.asked)-slack {
			continue // it had left when the fetch failed
		}
		last, f := m.lastAttempt(at), m.lastFetch(at+1)
		if last == nil || f == nil || f.err == nil {
			continue
		}
		due := max(at, last.start+min(promisedAskedWait, max(promisedLeastWait, f.at-m.failingFrom(at))))
		next := m.nextAttempt(at)
		if last.start == at {
			next = last
		}
		if m.goesAway(at, due) || due > simulatedTime || !m.holdingAt(due).over(due) || m.fetchBegins(at, due) {
			continue // or a new config lets the token live longer
		}
		if next == nil || next.start > due+slack {
			report(at, "the next request is due at %v, after request %d", due, last.n)
		}
	}
}

// fetchBegins reports whether a fetch begins in that time, or waits for its turn.
func (m *model) fetchBegins(from, to time.Duration) bool {
	for _, at := range m.locates {
		if from <= at && at <= to+slack || at < from && m.waitsForTurn(at, from) {
			return true
		}
	}
	return false
}

// waitsForTurn reports whether the fetch that has looked where to ask at located has made
// no request until at.
func (m *model) waitsForTurn(located, at time.Duration) bool {
	for _, a := range m.attempts {
		if a.first && a.located == located {
			return a.start > at
		}
	}
	return false
}

// goesAway reports whether no config uses the source at some time between.
func (m *model) goesAway(from, to time.Duration) bool {
	for _, s := range m.away {
		if s.from <= to && from <= s.to {
			return true
		}
	}
	return false
}

// failingFrom returns when the first request began that failed, of the failures in a
// row until at.
func (m *model) failingFrom(at time.Duration) time.Duration {
	from := m.epochOf(at)
	for _, f := range m.fetches {
		if f.err == nil && f.at <= at {
			from = max(from, f.at)
		}
	}
	for _, a := range m.attempts {
		if a.start >= from {
			return a.start
		}
	}
	return at
}

// If nobody asks, the wait after a fault that passes is half a minute at most, and no
// longer than the outage has lasted, nor than half of the time that a token is still
// valid; after Retry-After, five minutes at most.
func idleWaits(m *model, report report) {
	for _, f := range m.fetches {
		if f.err == nil {
			continue
		}
		wait, most := f.retryAt-f.at, min(promisedIdleWait, max(promisedLeastWait, f.at-m.failingFrom(f.at)))
		if t := m.holdingAt(f.at); t.valid(f.at) {
			most = min(most, max(promisedLeastWait, (t.most-f.at)/2))
		}
		switch asked := min(retryAfter(f.err), promisedRetryAfter); {
		case isPermanent(f.err):
			most = promisedPermanent
		case asked == 0 && isThrottled(f.err):
			most = 30 * time.Second
		default:
			most = max(most, asked)
		}
		if wait > most+slack {
			report(f.at, "the next fetch is in %v, want %v at most", wait, most)
		}
	}
}

// A request is the first one, or it is due for one of these reasons: a token is in the
// second half of its life or has ended, or an upstream has refused it; a request failed, at least 250 ms
// after its start; one of two quick retries of a first fetch; another attempt beside a
// silent one (see besideForGoodReason); what the server asked for is over; the secret
// has changed.
func requestsAreDue(m *model, report report) {
	throttles, refusals := 0, 0
	quick := 0
	for i, a := range m.attempts {
		if i == 0 || m.epochOf(a.start) != m.epochOf(m.attempts[i-1].start) {
			throttles, refusals, quick = 0, 0, 0
			continue
		}
		if len(m.beside(a)) > 0 {
			continue
		}
		last := m.attempts[i-1] // by start
		for _, b := range m.attempts[max(0, i-8):i] {
			if b.end > last.end || b.end == last.end && b.outcome > last.outcome {
				last = b
			}
		}
		sinceStart := a.start - m.attempts[i-1].start
		outcome := last.outcome
		if m.goesAway(min(last.start+1, last.end), a.start) && !m.fetchEnded(last.end, a.start) {
			quick = 0
			continue // nobody needed that fetch any more, and it has not failed
		}
		if outcome == gotToken && !m.wasFetched(last.end) {
			outcome = failedTransiently // nothing was left of it
		}
		least := time.Duration(0)
		switch outcome {
		case gotToken:
			throttles, refusals, quick = 0, 0, 0
			t := m.holdingAt(a.start - 1)
			if m.isYoung(t, a.start) && !m.anyRefused(t.value, a.start) && !m.anyRefused(t.value, a.located) {
				report(a.start, "request %d, and %s is good until %v", a.n, t.value, t.least)
			}
			continue
		case failedThrottled:
			refusals, quick = 0, 0
			least = last.end + min(last.wait, promisedRetryAfter)
			if last.wait > 0 {
				throttles = 0
			} else {
				least = last.end + afterThrottling(throttles)
				throttles++
			}
		case failedPermanently:
			throttles, quick = 0, 0
			least = last.end + afterRefusal(refusals)
			refusals++
			for _, changed := range m.secrets {
				// The secret that failed is the one that the fetch began with.
				if m.fetchStart(last.start) <= changed && changed <= a.start {
					least = m.nextAttempt(m.fetchStart(last.start)-1).located + promisedSecretWait
					refusals = 0
				}
			}
		default:
			throttles, refusals = 0, 0
			if !m.failed(a.start) && quick < promisedRetries {
				quick++
				if d := a.start - last.end; d > promisedQuickWait {
					report(a.start, "request %d is quick retry %d, after %v", a.n, quick, d)
				}
				continue
			}
			if m.failed(a.start) || m.failed(a.start+1) {
				quick = promisedRetries
			}
			if sinceStart < promisedLeastWait-slack && !m.server.crowd.gotToken(last.end, a.start) {
				report(a.start, "request %d only %v after the one before", a.n, sinceStart)
			}
		}
		if a.start < least-slack {
			report(a.start, "request %d (after %d: %v), want none before %v", a.n, last.n, outcome, least)
		}
	}
}

// isYoung reports whether a token is certainly in the first half of its life.
func (m *model) isYoung(t *holding, at time.Duration) bool {
	return t.valid(at) && at < t.by.start+(t.least-t.by.start)/2-slack && t.from < at
}

// fetchEnded reports whether a fetch ended from then on, and before another began.
func (m *model) fetchEnded(from, to time.Duration) bool {
	for _, f := range m.fetches {
		if f.at == from || from < f.at && f.at < to {
			return true
		}
	}
	return false
}

func (m *model) wasFetched(at time.Duration) bool {
	i := sort.Search(len(m.fetches), func(i int) bool { return m.fetches[i].at >= at })
	for ; i < len(m.fetches) && m.fetches[i].at == at; i++ {
		if m.fetches[i].err == nil {
			return true
		}
	}
	return false
}

// A token costs three requests at most, with the quick retries; a second in which there
// are failures costs four.
func requestsAreFew(m *model, report report) {
	most := 3 * (1 + len(m.holdings) + len(m.epochs))
	failing := time.Duration(0)
	for i, f := range m.fetches {
		if f.err != nil {
			end := simulatedTime
			if i+1 < len(m.fetches) {
				end = m.fetches[i+1].at
			}
			failing += end - f.at
		}
	}
	most += int(failing/promisedLeastWait) + 1
	if n := len(m.attempts); n > most {
		report(m.endedAt, "%d requests, want %d at most", n, most)
	}
}

// A token that is in use is renewed before its reserve begins, and as early as the
// settings say.
func renewedInTime(m *model, report report) {
	for i, t := range m.holdings {
		if t.least != t.most {
			continue // what is thought of it may have changed
		}
		due := t.least - min(promisedReserve, t.life/10)
		if before := m.refreshBefore(t.from, due); before > 0 {
			due = min(due, max(t.least-before, t.least-t.life/2))
		}
		due = max(due, t.from)
		if due >= simulatedTime || m.goesAway(t.from, due) || !m.usedBetween(t.from, due-1) {
			continue
		}
		if i+1 < len(m.holdings) && m.holdings[i+1].from <= due+slack {
			continue
		}
		next := m.nextAttempt(t.by.end - 1)
		if (next == nil || next.start > due+slack) && !m.fetchBegins(t.by.end, due) {
			report(due, "%s was used, and is not renewed", t.value)
		}
	}
}

// refreshBefore returns how early the configs want the renewal that were in use from
// the beginning until the end of that time; 0 if they say nothing.
func (m *model) refreshBefore(from, to time.Duration) time.Duration {
	var users []lifecycle
	for _, u := range m.userLog {
		if u.at <= from {
			users = u.lives
		}
	}
	for _, u := range m.userLog {
		if from < u.at && u.at <= to {
			users = slices.DeleteFunc(slices.Clone(users), func(l lifecycle) bool { return !slices.Contains(u.lives, l) })
		}
	}
	before := time.Duration(0)
	for _, l := range users {
		before = max(before, l.refreshBefore)
	}
	return before
}

func (m *model) usedBetween(from, to time.Duration) bool {
	for _, c := range m.calls {
		if from < c.answered && c.answered < to && c.value != "" {
			return true
		}
	}
	return false
}

// The token of a source that nobody asks is not renewed, unless a renewal has failed. A
// source that fails comes to rest, unless it has been warmed up, and has had no token and
// no permanent error since. A config that comes may begin with a request.
func nothingUnwanted(m *model, report report) {
	for _, a := range m.attempts {
		from := m.fetchStart(a.start)
		last := m.lastFetch(a.start)
		if last != nil && last.err != nil && !m.holdingAt(a.located).over(a.located) || m.usersChanged(from, a.start) || m.isWarming(a.start) {
			continue
		}
		wanted := false
		for _, w := range m.waits {
			wanted = wanted || w.to >= from && w.from <= a.start
		}
		if !wanted {
			report(a.start, "request %d, and nobody has asked since %v", a.n, from)
		}
	}
}

// isWarming reports whether the source still fetches its first token, although nobody asks.
func (m *model) isWarming(at time.Duration) bool {
	from := time.Duration(-1)
	for _, w := range m.warmings {
		if w <= at {
			from = w
		}
	}
	if t := m.holdingAt(from); from < 0 || t.valid(from) && from < t.reserveFrom() {
		return false
	}
	for _, f := range m.fetches {
		if from < f.at && f.at < at && (f.err == nil || isPermanent(f.err)) {
			return false
		}
	}
	return true
}

func (m *model) usersChanged(from, to time.Duration) bool {
	for _, u := range m.userLog {
		if from <= u.at && u.at <= to {
			return true
		}
	}
	return false
}

// A source without users makes no request for itself, and ends the one that nobody waits
// for.
func restsWithoutUsers(m *model, report report) {
	for _, s := range m.away {
		for _, a := range m.pending(s.from) {
			if a.start < s.from && s.from < s.to && !m.anybodyWaits(s.from) {
				report(s.from, "request %d goes on until %v, and no config uses the source", a.n, a.end)
			}
		}
	}
	for _, a := range m.attempts {
		if m.isAway(a.start) && !m.anybodyWaits(a.start) {
			report(a.start, "request %d, and no config uses the source", a.n)
		}
	}
}

// When the last config has gone for a while, nothing happens any more.
func nothingLeft(m *model, report report) {
	for _, what := range m.leftover {
		report(m.endedAt, "%s", what)
	}
	for _, a := range m.attempts {
		if a.start > m.endedAt {
			report(a.start, "request %d", a.n)
		}
	}
}

func isThrottled(err error) bool {
	failed, ok := errors.AsType[*tokenError](err)
	return ok && failed.Status == http.StatusTooManyRequests
}
