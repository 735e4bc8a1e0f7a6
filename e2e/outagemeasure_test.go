package e2e

import (
	"fmt"
	"math"
	"slices"
	"testing"
	"time"
)

// outageSlack is how near the beginning or the end of a token's life a request may
// be sent and fail: it was on its way. When it failed, a busy machine may have noticed
// much later: there, chaosSlack counts.
const outageSlack = 250 * time.Millisecond

// outageResult is what a load felt of an outage.
type outageResult struct {
	all    outcomes
	failed int // anything but 200

	// unavoidable are the requests that were sent while nobody could have a live
	// token: from the end of the last one until the server was back. Some succeed
	// nevertheless, if the gateway has them wait until then.
	unavoidable int

	// withToken are the failed requests that met a live token: when they were
	// sent, or when they failed.
	withToken int

	// recovery is how long after the server was back the first request succeeded
	// after which none failed; unrecovered if there is none. Zero if none failed.
	recovery time.Duration

	tokenRequests int
}

const unrecovered = time.Duration(math.MaxInt64)

// measure returns what became of a load whose authorization server, or gateway, was
// back at that instant.
func measure(all outcomes, tokens []outageToken, back time.Time) outageResult {
	lost := all.lost()
	r := outageResult{all: all, failed: len(lost)}
	var end time.Time
	for _, token := range tokens {
		if token.answered.Before(back) && token.expires.After(end) {
			end = token.expires
		}
	}
	for _, o := range all {
		if !o.sent.Before(end) && o.sent.Before(back) {
			r.unavoidable++
		}
	}
	live := func(at time.Time, slack time.Duration) bool {
		return slices.ContainsFunc(tokens, func(token outageToken) bool {
			return at.After(token.answered.Add(slack)) && at.Before(token.expires.Add(-slack))
		})
	}
	last := back
	for _, o := range lost {
		at := o.due.Add(o.took)
		if live(o.sent, outageSlack) || live(at, chaosSlack) {
			r.withToken++
		}
		if at.After(last) {
			last = at
		}
	}
	if r.failed > 0 {
		r.recovery = unrecovered
		for _, o := range all {
			if at := o.due.Add(o.took); o.ok() && at.After(last) {
				r.recovery = min(r.recovery, at.Sub(back))
			}
		}
	}
	return r
}

// avoidable is how many more requests failed than had to.
func (r outageResult) avoidable() int { return r.failed - r.unavoidable }

func (r outageResult) String() string {
	return fmt.Sprintf("%d requests, %d failed (%s), %d unavoidable, %d with a live token, recovery %s, longest wait %s, %d token requests",
		len(r.all), r.failed, r.all.statuses(), r.unavoidable, r.withToken, recoveryText(r.recovery), milliseconds(r.all.longest()), r.tokenRequests)
}

func recoveryText(d time.Duration) string {
	if d == 0 {
		return "–"
	}
	if d == unrecovered {
		return "none"
	}
	return milliseconds(d)
}

// wantRecovery fails the test if requests failed for which there was a token, or for
// longer than that after the server was back.
func (r outageResult) wantRecovery(t *testing.T) {
	t.Helper()
	if r.withToken > 0 {
		t.Errorf("failed requests with a live token: got %d, want none", r.withToken)
	}
	if most := recoveryLimit + issuerTakes; r.recovery > most {
		t.Errorf("recovery: got %s, want %v at most", recoveryText(r.recovery), most)
	}
}

// TestMeasure has a token that ends after 10 s, a server that is back after 20 s, and
// another token after 22 s.
func TestMeasure(t *testing.T) {
	zero := time.Now()
	at := func(seconds float64) time.Time { return zero.Add(time.Duration(seconds * float64(time.Second))) }
	tokens := []outageToken{{answered: at(0), expires: at(10)}, {answered: at(22), expires: at(32)}}
	request := func(due, took float64, status int) outcome {
		return outcome{due: at(due), sent: at(due), took: at(took).Sub(zero), status: status}
	}
	before := outcomes{request(5, 0.1, 200), request(9.9, 0.01, 503), request(12, 0, 503), request(19, 0, 503)}
	for _, test := range []struct {
		name  string
		after outcomes
		want  outageResult
	}{
		{"good", outcomes{request(21, 1.1, 200), request(23, 0, 200)}, outageResult{failed: 3, unavoidable: 2, recovery: 2100 * time.Millisecond}},
		{"waits in vain", outcomes{request(19.5, 4, 504), request(24, 0, 200)}, outageResult{failed: 4, unavoidable: 3, withToken: 1, recovery: 4 * time.Second}},
		{"fails again", outcomes{request(22, 0, 200), request(24, 0, 503)}, outageResult{failed: 4, unavoidable: 2, withToken: 1, recovery: unrecovered}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := measure(slices.Concat(before, test.after), tokens, at(20))
			test.want.all = got.all
			if got.String() != test.want.String() {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}
