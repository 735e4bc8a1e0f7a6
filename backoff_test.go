package outboundauth

import (
	"net/http"
	"testing"
	"time"
)

// afterFailures returns when the next fetch comes after n failures of this kind, in
// seconds from the end of the last one: 200 tries, the earliest and the latest.
func afterFailures(n int, f failure) (soonest, retryAt [2]time.Duration) {
	soonest, retryAt = [2]time.Duration{time.Hour, -time.Hour}, [2]time.Duration{time.Hour, -time.Hour}
	widen := func(span *[2]time.Duration, d time.Duration) { span[0], span[1] = min(span[0], d), max(span[1], d) }
	for range 200 {
		var s streak
		for range n - 1 {
			s.next(f)
		}
		asked, unasked := s.next(f)
		widen(&soonest, asked.Sub(f.ended))
		widen(&retryAt, unasked.Sub(f.ended))
	}
	return soonest, retryAt
}

func TestWaitAfterAFailure(t *testing.T) {
	const second = time.Second
	now := time.Now()
	quick := func(lasted time.Duration) failure {
		return failure{err: errTransient, began: now, ended: now, lasted: lasted}
	}
	status := func(status int, after time.Duration) error {
		return (&tokenError{Status: status, Code: "http_status", retryAfter: after}).classify()
	}
	for _, test := range []struct {
		name             string
		failures         int
		failure          failure
		soonest, retryAt [2]time.Duration // within these
	}{
		{"the first", 1, quick(0), [2]time.Duration{second / 4, second / 4}, [2]time.Duration{second / 4, second / 4}},
		{"never longer than the outage", 9, quick(second), [2]time.Duration{3 * second / 4, second}, [2]time.Duration{3 * second / 4, second}},
		{"a long outage", 9, quick(time.Hour), [2]time.Duration{3 * second / 2, 2 * second}, [2]time.Duration{3 * second / 2, 30 * second}},
		{
			"the time that the try took counts", 9,
			failure{err: errTransient, began: now.Add(-10 * second), ended: now, lasted: time.Hour},
			[2]time.Duration{},
			[2]time.Duration{second / 4, 30 * second},
		},
		{
			"half of what is left of a token", 9,
			failure{err: errTransient, began: now, ended: now, lasted: time.Hour, left: 6 * second},
			[2]time.Duration{3 * second / 2, 2 * second},
			[2]time.Duration{3 * second / 2, 3 * second},
		},
		{"a login", 1, failure{err: errTransient, began: now.Add(-10 * second), ended: now, lasted: time.Hour, login: true}, [2]time.Duration{permanentBackoff, permanentBackoff}, [2]time.Duration{permanentBackoff, maxTransientBackoff}},
		{"429", 1, failure{err: status(http.StatusTooManyRequests, 0), ended: now}, [2]time.Duration{second, second}, [2]time.Duration{second, second}},
		{"429 again", 3, failure{err: status(http.StatusTooManyRequests, 0), ended: now}, [2]time.Duration{4 * second, 4 * second}, [2]time.Duration{4 * second, 4 * second}},
		{"429 for long", 20, failure{err: status(http.StatusTooManyRequests, 0), ended: now}, [2]time.Duration{30 * second, 30 * second}, [2]time.Duration{30 * second, 30 * second}},
		{"429 with Retry-After", 5, failure{err: status(http.StatusTooManyRequests, 7*second), ended: now}, [2]time.Duration{7 * second, 7 * second}, [2]time.Duration{7 * second, 30 * second}},
		{"503 with Retry-After", 5, failure{err: status(http.StatusServiceUnavailable, 40*second), ended: now}, [2]time.Duration{40 * second, 40 * second}, [2]time.Duration{40 * second, 40 * second}},
		{"Retry-After of a day", 1, failure{err: status(http.StatusBadGateway, 24*time.Hour), ended: now}, [2]time.Duration{maxRetryAfter, maxRetryAfter}, [2]time.Duration{maxRetryAfter, maxRetryAfter}},
		{"permanent", 1, failure{err: status(http.StatusBadRequest, 0), ended: now}, [2]time.Duration{5 * second, 15 * second / 2}, [2]time.Duration{5 * second, 15 * second / 2}},
	} {
		t.Run(test.name, func(t *testing.T) {
			soonest, retryAt := afterFailures(test.failures, test.failure)
			if soonest[0] < test.soonest[0] || soonest[1] > test.soonest[1] {
				t.Errorf("who is asked for tries again after %v, want %v", soonest, test.soonest)
			}
			if retryAt[0] < test.retryAt[0] || retryAt[1] > test.retryAt[1] {
				t.Errorf("whom nobody asks tries again after %v, want %v", retryAt, test.retryAt)
			}
		})
	}
}

// Failures of one kind say nothing about those of another.
func TestStreakEndsWithAnotherKind(t *testing.T) {
	now := time.Now()
	limited := failure{err: (&tokenError{Status: http.StatusTooManyRequests}).classify(), ended: now}
	var s streak
	for range 9 {
		s.next(limited)
	}
	s.next(failure{err: errTransient, began: now, ended: now})
	if soonest, _ := s.next(limited); !soonest.Equal(now.Add(throttledBackoff)) {
		t.Errorf("got the next try after %v, want %v", soonest.Sub(now), throttledBackoff)
	}
}

func TestUsualAnswer(t *testing.T) {
	var u usual
	for _, step := range []struct{ took, want time.Duration }{
		{3, 3}, {9, 9}, {5, 5}, {4, 5}, {100, 5}, {100, 9}, {1, 5}, {1, 4}, {1, 1},
	} {
		if u.add(step.took); u.median() != step.want {
			t.Errorf("after %d: got %d, want %d", step.took, u.median(), step.want)
		}
	}
	if got := new(usual).median(); got != 0 {
		t.Errorf("got %v of nothing, want 0", got)
	}
}
