package outboundauth

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// during returns a fail function: err for the time between from and to, which
// count from now.
func during(from, to time.Duration, err error) func(context.Context, int) error {
	start := time.Now()
	return func(context.Context, int) error {
		if at := time.Since(start); from <= at && at < to {
			return err
		}
		return nil
	}
}

// expectError asks, and fails the test unless the answer is an error that
// wraps cause.
func expectError(t *testing.T, s *tokenSource, cause error) *fetchError {
	t.Helper()
	_, _, err := s.Token(t.Context())
	var failed *fetchError
	if !errors.As(err, &failed) || !errors.Is(err, cause) || err.Error() != cause.Error() {
		t.Fatalf("Token() = %v, want a *fetchError of %v", err, cause)
	}
	return failed
}

// untilMended asks each second, and returns how long there was no token.
func untilMended(t *testing.T, s *tokenSource) time.Duration {
	t.Helper()
	start := time.Now()
	for range 3600 {
		if _, _, err := s.Token(t.Context()); err == nil {
			return time.Since(start)
		}
		time.Sleep(time.Second)
	}
	t.Fatal("there was no token for an hour")
	return 0
}

func TestFirstFetchRetriesTwiceQuickly(t *testing.T) {
	for _, tt := range []struct{ failures, requests int }{
		{0, 1}, {1, 2}, {2, 3}, {3, 3}, {9, 3},
	} {
		t.Run(fmt.Sprintf("%d failures", tt.failures), func(t *testing.T) {
			var distinct time.Duration
			for range 50 {
				synctest.Test(t, func(t *testing.T) {
					r := &scriptedRequester{lifetime: time.Hour, fail: func(_ context.Context, n int) error {
						if n <= tt.failures {
							return errTransient
						}
						return nil
					}}
					s := newTestSource(t, r)
					got := ask(t.Context(), s)
					if want := tt.failures >= 3; (got.err != nil) != want || got.waited >= time.Second {
						t.Errorf("Token() = %v, want an error: %v, in less than a second", got, want)
					}
					distinct = max(distinct, got.waited)
					if got.err == nil {
						expectToken(t, s, fmt.Sprintf("t%d", tt.requests), 0) // no back-off is left
					}
					expectRequests(t, r, tt.requests)
				})
			}
			if tt.failures > 0 && distinct == 0 {
				t.Error("the retries follow each other without any distance")
			}
		})
	}
}

func TestCallersShareTheError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{delay: 300 * time.Millisecond, fail: during(0, time.Hour, errTransient)}
		s := newTestSource(t, r)
		answers := load(t.Context(), s, time.Millisecond, 900*time.Millisecond)
		for i, got := range answers {
			if got.err == nil || got.err != answers[0].err { //nolint:errorlint // the same one is meant
				t.Fatalf("caller %d: Token() = %v, want the error of the first, %v", i, got, answers[0].err)
			}
		}
		expectRequests(t, r, 3)
	})
}

func TestLaterFetchesDoNotRetryQuickly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, fail: during(0, time.Hour, errTransient)}
		s := newTestSource(t, r)
		for fetches := range 10 {
			failed := expectError(t, s, errTransient)
			if got, want := len(r.requests()), 3+fetches; got != want {
				t.Errorf("%d token requests in %d fetches, want %d", got, fetches+1, want)
			}
			time.Sleep(time.Until(failed.retryAt) - 1)
			time.Sleep(time.Nanosecond)
			synctest.Wait() // for the timer's fetch
		}
	})
}

func TestFirstFetchAfterASuccessRetriesQuickly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, fail: during(0, 40*time.Minute, errTransient)}
		s := newTestSource(t, r)
		expectError(t, s, errTransient)
		time.Sleep(40 * time.Minute)
		untilMended(t, s)
		r.fail = during(0, time.Hour, errTransient)
		before := len(r.requests())
		time.Sleep(time.Until(s.Peek().refreshAt))
		time.Sleep(300 * time.Millisecond) // the quick retries, with their distance
		if got := len(r.requests()) - before; got < 3 {
			t.Errorf("%d token requests at the renewal, want 3", got)
		}
	})
}

func TestBackoffGrowsToItsLimit(t *testing.T) {
	const rounds = 12
	permanent := func(i int) (from, to time.Duration) {
		interval := 5 * time.Second << i
		if interval >= 5*time.Minute {
			return 225 * time.Second, 5 * time.Minute // spread at the limit too
		}
		return interval, interval * 3 / 2
	}
	for _, tt := range []struct {
		name   string
		err    error
		bounds func(i int) (from, to time.Duration) // after i failures before
	}{
		{"permanent", &scriptedError{permanent: true}, permanent},
		{"permanent, wrapped", fmt.Errorf("token: %w", &scriptedError{permanent: true}), permanent},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var least, most [rounds]time.Duration
			for i := range least {
				least[i] = time.Hour
			}
			for range 200 {
				synctest.Test(t, func(t *testing.T) {
					r := &scriptedRequester{fail: during(0, 100*time.Hour, tt.err)}
					r.told = func(_ *token, err *fetchError, after int) {
						if after < rounds {
							wait := time.Until(err.retryAt)
							least[after], most[after] = min(least[after], wait), max(most[after], wait)
						}
					}
					s := newTestSource(t, r)
					for range rounds {
						failed := expectError(t, s, tt.err)
						time.Sleep(time.Until(failed.retryAt))
						synctest.Wait()
					}
				})
			}
			for i := range rounds {
				from, to := tt.bounds(i)
				if least[i] < from || most[i] > to {
					t.Errorf("after failure %d: back-off in [%v, %v], want [%v, %v]", i+1, least[i], most[i], from, to)
				}
				// At random all over the interval, so that a fleet spreads.
				if slack := (to - from) / 5; least[i] > from+slack || most[i] < to-slack {
					t.Errorf("after failure %d: back-off in [%v, %v] only, want it all over [%v, %v]", i+1, least[i], most[i], from, to)
				}
			}
		})
	}
}

func TestBackoffAnswersAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause := &scriptedError{after: time.Minute}
		r := &scriptedRequester{lifetime: time.Hour, delay: 900 * time.Millisecond, fail: during(0, 30*time.Second, cause)}
		s := newTestSource(t, r)
		failed := expectError(t, s, cause)
		for range 59 {
			if got, want := ask(t.Context(), s), (answer{err: failed}); got != want {
				t.Fatalf("Token() = %v, want %v", got, want)
			}
			time.Sleep(time.Second)
		}
		expectRequests(t, r, 1)
		time.Sleep(time.Second)
		expectToken(t, s, "t2", 900*time.Millisecond)
	})
}

func TestRetryAfter(t *testing.T) {
	for _, tt := range []struct {
		name     string
		err      error
		requests int
		min, max time.Duration
	}{
		{"honoured", &scriptedError{after: 42 * time.Second}, 1, 42 * time.Second, 42 * time.Second},
		{"wrapped", fmt.Errorf("token: %w", &scriptedError{after: 42 * time.Second}), 1, 42 * time.Second, 42 * time.Second},
		{"capped", &scriptedError{after: time.Hour}, 1, 5 * time.Minute, 5 * time.Minute},
		{"permanent", &scriptedError{permanent: true, after: 42 * time.Second}, 1, 42 * time.Second, 42 * time.Second},
		{"does not shorten the back-off", &scriptedError{permanent: true, after: 1}, 1, 5 * time.Second, 7500 * time.Millisecond},
		{"none", &scriptedError{}, 3, 0, time.Second},
		{"negative", &scriptedError{after: -time.Hour}, 3, 0, time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &scriptedRequester{lifetime: time.Hour, fail: during(0, 2*time.Second, tt.err)}
				s := newTestSource(t, r)
				failed := expectError(t, s, tt.err)
				wait := time.Until(failed.retryAt)
				if wait < tt.min || wait > tt.max {
					t.Errorf("retried after %v, want %v to %v", wait, tt.min, tt.max)
				}
				expectRequests(t, r, tt.requests)
				if tt.min < time.Second {
					return
				}
				time.Sleep(wait - 1)
				expectRequests(t, r, tt.requests)
				time.Sleep(time.Nanosecond)
				// A source in use retries by itself, before the next caller.
				expectRequests(t, r, tt.requests+1)
				expectToken(t, s, fmt.Sprintf("t%d", tt.requests+1), 0)
			})
		})
	}
}

func TestShortOutageWithShortTokens(t *testing.T) {
	for range 5 {
		synctest.Test(t, func(t *testing.T) {
			// From before the renewal until long after the end of the token.
			const from, to = 14 * time.Second, 43 * time.Second
			r := &scriptedRequester{lifetime: 20 * time.Second, fail: during(from, to, errTransient)}
			s := newTestSource(t, r)
			start := time.Now()
			answers := load(t.Context(), s, 5*time.Millisecond, 80*time.Second)
			for i, got := range answers {
				at := time.Duration(i) * 5 * time.Millisecond
				if got.waited > 0 && at < 18*time.Second {
					t.Fatalf("at %v: Token() = %v, want a token at once", at, got)
				}
				if got.err != nil && (at < 20*time.Second || at > to+2*time.Second) {
					t.Fatalf("at %v: Token() = %v, want a token", at, got)
				}
			}
			inOutage := 0
			for _, sent := range r.requests() {
				if at := sent.Sub(start); from <= at && at < to {
					inOutage++
				}
			}
			if inOutage < 4 || inOutage > 28 { // 23 to 26 were seen in a thousand runs
				t.Errorf("%d token requests in 29s of outage, want 4 to 28", inOutage)
			}
		})
	}
}

// Tokens of an hour outlast a quarter of an hour without the server, even if
// it begins when a renewal is due.
func TestLongOutageWithinTheReserve(t *testing.T) {
	for range 50 { // the renewal is due at random
		synctest.Test(t, func(t *testing.T) {
			r := &scriptedRequester{lifetime: time.Hour, delay: 10 * time.Millisecond}
			s := newTestSource(t, r)
			expectToken(t, s, "t1", r.delay)
			start := time.Now()
			from := time.Until(s.Peek().refreshAt)
			to := from + 15*time.Minute
			r.fail = during(from, to, errTransient)
			for i, got := range load(t.Context(), s, time.Second, 2*time.Hour) {
				if got.err != nil || got.waited != 0 {
					t.Fatalf("after %v: Token() = %v, want a token at once", time.Duration(i)*time.Second, got)
				}
			}
			inOutage, mended := 0, time.Duration(0)
			for _, sent := range r.requests() {
				switch at := sent.Sub(start) + r.delay; { // when the server answered
				case from <= at && at < to:
					inOutage++
				case at >= to && mended == 0:
					mended = at
				}
			}
			// 15 s apart in the mean.
			if inOutage < 20 || inOutage > 120 {
				t.Errorf("%d token requests in 15m of outage, want 20 to 120", inOutage)
			}
			if mended > to+30*time.Second {
				t.Errorf("first token request after the outage at %v, want it before %v", mended, to+30*time.Second)
			}
		})
	}
}

func TestFailedRenewalIsRepeatedThoughNobodyAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, fail: during(40*time.Minute, 57*time.Minute, errTransient)}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		time.Sleep(58 * time.Minute)
		inOutage := len(r.requests())
		time.Sleep(30 * time.Minute) // beyond the end of t1
		if got := ask(t.Context(), s); got.err != nil || got.waited != 0 {
			t.Errorf("Token() = %v, want a token at once", got)
		}
		if got := len(r.requests()); got != inOutage {
			t.Errorf("%d more token requests once the token was renewed, want 0", got-inOutage)
		}
	})
}

func TestFailingSourceThatNobodyAsksComesToRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{fail: during(0, 100*time.Hour, errTransient)}
		s := newTestSource(t, r)
		expectError(t, s, errTransient)
		time.Sleep(24 * time.Hour)
		expectRequests(t, r, 4) // once more, for the one who asked
	})
}

func TestValidTokenIsServedThroughoutAFailure(t *testing.T) {
	for _, cause := range []error{errTransient, &scriptedError{permanent: true}, &scriptedError{after: time.Hour}} {
		t.Run(fmt.Sprintf("%+v", cause), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &scriptedRequester{lifetime: time.Hour, fail: during(time.Minute, 24*time.Hour, cause)}
				s := newTestSource(t, r)
				for _, got := range load(t.Context(), s, 10*time.Second, time.Hour) {
					if want := (answer{value: "t1"}); got != want {
						t.Fatalf("Token() = %v, want %v", got, want)
					}
				}
				expectError(t, s, cause)
				if got := len(r.requests()); got < 3 || got > 130 {
					t.Errorf("%d token requests in 18m of failures, want 3 to 130", got)
				}
			})
		})
	}
}

func TestNothingStopsForGood(t *testing.T) {
	for _, tt := range []struct {
		name  string
		err   error
		limit time.Duration
	}{
		{"transient", errTransient, 30 * time.Second},
		{"permanent", &scriptedError{permanent: true}, 5 * time.Minute},
		{"throttled", &scriptedError{after: 24 * time.Hour}, 5 * time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &scriptedRequester{lifetime: time.Hour, fail: during(0, 24*time.Hour, tt.err)}
				s := newTestSource(t, r)
				load(t.Context(), s, time.Second, 24*time.Hour)
				if got := untilMended(t, s); got > tt.limit+time.Second {
					t.Errorf("a token after %v, want it within %v", got, tt.limit)
				}
			})
			synctest.Test(t, func(t *testing.T) {
				r := &scriptedRequester{lifetime: time.Hour, fail: during(0, 24*time.Hour, tt.err)}
				s := newTestSource(t, r)
				load(t.Context(), s, time.Minute, time.Hour)
				time.Sleep(23 * time.Hour) // nobody asks
				if got := ask(t.Context(), s); got.err != nil {
					t.Errorf("Token() = %v, want a token", got)
				}
			})
		})
	}
}

func TestServerThatDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: time.Hour}
		s := newTestSource(t, r)
		got := ask(t.Context(), s)
		if !errors.Is(got.err, context.DeadlineExceeded) || got.waited != s.life.fetchTimeout {
			t.Errorf("Token() = %v, want the deadline's error after %v", got, s.life.fetchTimeout)
		}
		expectRequests(t, r, 5) // side by side, and once more for the one who asked
		r.setDelay(0)
		time.Sleep(15 * time.Second)
		if got := ask(t.Context(), s); got.err != nil {
			t.Errorf("Token() = %v, want a token", got)
		}
	})
}

// The deadline is the fetch's: quick retries don't prolong it.
func TestTimeoutIncludesTheRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{delay: 4 * time.Second, fail: during(0, time.Hour, errTransient), alone: true}
		s := newTestSource(t, r)
		if got := ask(t.Context(), s); got.err == nil || got.waited != s.life.fetchTimeout {
			t.Errorf("Token() = %v, want an error after %v", got, s.life.fetchTimeout)
		}
		time.Sleep(time.Second)
		expectRequests(t, r, 4) // three, and once more for the one who asked
	})
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{delay: time.Second, fail: during(0, time.Hour, errTransient)}
		s := newTestSource(t, r)
		s.life.fetchTimeout = time.Second + 1 // ends between the tries
		if got := ask(t.Context(), s); !errors.Is(got.err, errTransient) || got.waited > s.life.fetchTimeout {
			t.Errorf("Token() = %v, want %v within %v", got, errTransient, s.life.fetchTimeout)
		}
	})
}

func TestPanicIsAnError(t *testing.T) {
	const canary = "canary-5f1b"
	for _, value := range []any{canary, errors.New(canary), struct{ form string }{canary}} {
		t.Run(fmt.Sprintf("%T", value), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mended atomic.Bool
				r := &scriptedRequester{lifetime: time.Hour, fail: func(context.Context, int) error {
					if !mended.Load() {
						panic(value)
					}
					return nil
				}}
				s := newTestSource(t, r)
				got := ask(t.Context(), s)
				if got.err == nil {
					t.Fatalf("Token() = %v, want an error", got)
				}
				for _, text := range []string{got.err.Error(), fmt.Sprintf("%+v %#v", got.err, errors.Unwrap(got.err))} {
					if strings.Contains(text, canary) {
						t.Errorf("the error shows the panic's value: %s", text)
					}
				}
				mended.Store(true)
				time.Sleep(time.Second)
				if got := ask(t.Context(), s); got.err != nil || got.value == "" {
					t.Errorf("Token() = %v, want a token", got)
				}
			})
		})
	}
}

func TestRequesterIsToldOfEachFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told []string
		cause := &scriptedError{after: time.Minute}
		r := &scriptedRequester{lifetime: time.Hour, delay: time.Millisecond, fail: during(0, 90*time.Second, cause)}
		r.told = func(tok *token, err *fetchError, after int) {
			switch {
			case err == nil && tok != nil:
				told = append(told, fmt.Sprintf("%s after %d", tok.value, after))
			case err != nil && tok == nil:
				told = append(told, fmt.Sprintf("again in %v after %d", time.Until(err.retryAt), after))
			default:
				t.Errorf("fetched(%v, %v), want either", tok, err)
			}
		}
		s := newTestSource(t, r)
		expectError(t, s, cause)
		load(t.Context(), s, time.Second, 59*time.Minute)
		synctest.Wait()
		want := "[again in 1m0s after 0 again in 1m0s after 1 t3 after 2 t4 after 0]"
		if got := fmt.Sprint(told); got != want {
			t.Errorf("told %s, want %s", got, want)
		}
	})
}
