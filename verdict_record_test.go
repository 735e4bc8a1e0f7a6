package outboundauth

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// How long the product keeps a request that was refused, at most, until the client gets
// an answer. To this comes the time of a token request.
const longestHold = 1 * time.Second

// maxHeld is how many refused requests of an address may be held at a time.
const maxHeld = 64

// verdictRecord is what happened in a history.
type verdictRecord struct {
	history verdictHistory
	calls   []*rigCall
	asked   []time.Duration // when the token requests came
	tokens  []*rigToken
}

// minutes returns the token requests of each minute.
func (r *verdictRecord) minutes() []int {
	all := make([]int, (r.history.lasts+time.Minute-1)/time.Minute)
	for _, at := range r.asked {
		if i := int(at / time.Minute); i < len(all) {
			all[i]++
		}
	}
	return all
}

// lost returns when the good requests came that were lost.
func (r *verdictRecord) lost() []time.Duration {
	var all []time.Duration
	for _, c := range r.calls {
		if c.lost() {
			all = append(all, c.at)
		}
	}
	return all
}

// good returns the number of good requests.
func (r *verdictRecord) good() (n int) {
	for _, c := range r.calls {
		if c.good {
			n++
		}
	}
	return n
}

// refusedThemselves returns the number of good requests that the upstream refused at last
// although their token was good.
func (r *verdictRecord) refusedThemselves() (n int) {
	for _, c := range r.calls {
		if c.good && !c.accepted() && c.refusedByUpstream() {
			n++
		}
	}
	return n
}

// longest returns the longest wait of those calls that are so.
func (r *verdictRecord) longest(so func(*rigCall) bool) (longest time.Duration) {
	for _, c := range r.calls {
		if so(c) {
			longest = max(longest, c.took)
		}
	}
	return longest
}

// sentAgain returns the number of refused requests of others that were sent twice.
func (r *verdictRecord) sentAgain() (n int) {
	for _, c := range r.calls {
		if !c.good && len(c.receipts) > 1 {
			n++
		}
	}
	return n
}

// mended returns the last time at or before at from which the history expects healing.
func (r *verdictRecord) mended(at time.Duration) (since time.Duration, ok bool) {
	for _, from := range r.history.mends() {
		if from <= at {
			since, ok = from, true
		}
	}
	return since, ok
}

// healed returns how long after the revocation before it the last good request was lost.
func (r *verdictRecord) healed() (longest time.Duration) {
	for _, at := range r.lost() {
		if since, ok := r.mended(at); ok {
			longest = max(longest, at-since)
		}
	}
	return longest
}

// check compares the record with what the history allows.
func (r *verdictRecord) check(t *testing.T) {
	t.Helper()
	r.checkTokenRequests(t)
	r.checkLosses(t)
	r.checkWaits(t)
	r.checkRefused(t)
}

func (r *verdictRecord) checkTokenRequests(t *testing.T) {
	t.Helper()
	b := r.history.bounds
	minutes := r.minutes()
	var later, quiet int
	for i, n := range minutes {
		most := b.later
		switch {
		case r.history.revokesIn(i):
			most = b.revoked
		case i == 0:
			most = b.first
		default:
			later += n
			quiet++
		}
		if n > most {
			t.Errorf("%d token requests in minute %d, want at most %d", n, i, most)
		}
	}
	if quiet > 0 && float64(later)/float64(quiet) > b.average {
		t.Errorf("%.1f token requests in a later minute on average, want at most %v", float64(later)/float64(quiet), b.average)
	}
	if n := len(r.asked); n > b.total {
		t.Errorf("%d token requests in all, want at most %d", n, b.total)
	}
}

func (r *verdictRecord) checkLosses(t *testing.T) {
	t.Helper()
	b := r.history.bounds
	if lost := r.lost(); len(lost) > b.lost {
		t.Errorf("%d of %d good requests were lost, the first of them at %v, want at most %d", len(lost), r.good(), lost[0], b.lost)
	}
	if healed := r.healed(); healed > b.healing {
		t.Errorf("a good request was lost %v after the revocation, want none after %v", healed, b.healing)
	}
}

func (r *verdictRecord) checkWaits(t *testing.T) {
	t.Helper()
	b := r.history.bounds
	if got := r.longest(func(*rigCall) bool { return true }); got > b.wait {
		t.Errorf("a request took %v, want at most %v", got, b.wait)
	}
	// Who was not refused goes on with the token that there is.
	if got := r.longest(func(c *rigCall) bool { return len(c.receipts) == 1 && c.accepted() }); got > rigAnswer {
		t.Errorf("a request that was not refused took %v, want %v", got, rigAnswer)
	}
	if got := r.longest(func(c *rigCall) bool { return c.address == b.untouched }); got > rigAnswer {
		t.Errorf("a request to %s took %v, want %v: another address was refused", b.untouched, got, rigAnswer)
	}
}

// checkRefused looks at the requests that are refused whatever their token is.
func (r *verdictRecord) checkRefused(t *testing.T) {
	t.Helper()
	for _, c := range r.calls {
		switch n := len(c.receipts); {
		case c.good:
			continue
		case c.err != nil || c.accepted():
			t.Errorf("%s at %v ended with %d, %v, want the answer of the upstream", c.kind, c.at, c.status, c.err)
		case n > 2:
			t.Errorf("%s at %v was sent %d times, want at most 2", c.kind, c.at, n)
		case n == 2 && c.receipts[0].token == c.receipts[1].token:
			t.Errorf("%s at %v was sent twice with one token", c.kind, c.at)
		default:
			continue
		}
		return // one tells enough
	}
	if n := r.slowSentAgain(); n > r.history.bounds.slowAgain {
		t.Errorf("%d requests with a slow answer were sent twice, want %d at most", n, r.history.bounds.slowAgain)
	}
	r.checkSentAgain(t)
}

// slowSentAgain returns how many requests of others were sent again whose upstream takes
// long to answer.
func (r *verdictRecord) slowSentAgain() (n int) {
	for _, c := range r.calls {
		if c.slow > 0 && len(c.receipts) > 1 {
			n++
		}
	}
	return n
}

// checkSentAgain compares how many requests of others were sent once more with a new
// token. So many may be at one address: the one that had the token replaced, those that
// were held until then, and those that were refused while the token was on its way.
func (r *verdictRecord) checkSentAgain(t *testing.T) {
	t.Helper()
	type renewal struct {
		address string
		token   int
	}
	again, begun := make(map[renewal]int), make(map[string][]time.Duration)
	for _, c := range r.calls {
		if c.good || c.slow > 0 { // what is answered late is refused late
			continue
		}
		begun[c.address] = append(begun[c.address], c.at)
		if len(c.receipts) > 1 {
			again[renewal{c.address, c.receipts[1].token}]++
		}
	}
	for at, n := range again {
		tok := r.tokens[at.token]
		between := func(from, to time.Duration) int {
			i, _ := slices.BinarySearch(begun[at.address], from)
			j, _ := slices.BinarySearch(begun[at.address], to)
			return j - i
		}
		held := min(maxHeld, between(tok.asked-longestHold-2*rigAnswer, tok.asked-rigAnswer))
		if most := 1 + held + between(tok.asked-rigAnswer, tok.born+1); n > most {
			t.Errorf("%d refused requests to %s were sent again with the token of %v, want at most %d", n, at.address, tok.born, most)
		}
	}
}

// row is the line of a record in a table.
func (r *verdictRecord) row() string {
	lost := "–"
	if good := r.good(); good > 0 {
		lost = fmt.Sprintf("%d of %d", len(r.lost()), good)
		if n := r.refusedThemselves(); n > 0 {
			lost += fmt.Sprintf(" (and %d that the upstream meant)", n)
		}
	}
	healed := "–"
	if len(r.history.mends()) > 0 {
		healed = fmt.Sprintf("%.1f s", r.healed().Seconds())
	}
	return fmt.Sprintf("| %s: %s | %s | %s | %s | %.2f s | %d | %s |", r.history.id, r.history.name, perMinute(r.minutes()), lost, healed,
		r.longest(func(*rigCall) bool { return true }).Seconds(), r.sentAgain(), r.history.simulated)
}

const verdictTableHead = `| history | token requests a minute | good requests lost | last loss after the revocation | longest wait | others' requests sent twice | simulated: token requests; lost; last loss |
|---|---|---|---|---|---|---|`

// perMinute lists the token requests of the first minutes, and the most of the others.
func perMinute(minutes []int) string {
	shown := minutes[:min(len(minutes), 8)]
	text := strings.Trim(fmt.Sprint(shown), "[]")
	text = strings.ReplaceAll(text, " ", ", ")
	if rest := minutes[len(shown):]; len(rest) > 0 {
		text += fmt.Sprintf(", … ≤ %d", slices.Max(rest))
	}
	return text
}
