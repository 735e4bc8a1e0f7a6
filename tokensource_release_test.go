package outboundauth

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// In all of these tests the bubble reports a goroutine that does not end.

// destruct takes all users from a source, and ends it.
func destruct(tb testing.TB, s *tokenSource) {
	tb.Helper()
	for !s.when(func(s *tokenSource, _ time.Time) bool { return s.unused() }) {
		s.detach(s.sharers[0].requester, func() {})
	}
	if err := s.Destruct(); err != nil {
		tb.Errorf("Destruct() = %v, want nil", err)
	}
}

// expectRequestEnds fails the test unless the latest request ended now.
func expectRequestEnds(t *testing.T, r *scriptedRequester) {
	t.Helper()
	n := len(r.requests())
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.ended) != n || !r.ended[n-1].Equal(time.Now()) {
		t.Errorf("%d requests ended, at %v, want %d, the latest at %v", len(r.ended), r.ended, n, time.Now())
	}
}

func TestDestructStopsTheTimer(t *testing.T) {
	for name, fail := range map[string]error{"renewal": nil, "retry": &scriptedError{after: time.Minute}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &scriptedRequester{lifetime: time.Hour, fail: func(context.Context, int) error { return fail }}
				s := attachedSource(r)
				ask(t.Context(), s)
				destruct(t, s)
				if s.timer != nil {
					t.Error("the timer still ran, and kept the source in memory")
				}
				s.Warm()
				time.Sleep(24 * time.Hour)
				expectRequests(t, r, 1)
			})
		})
	}
}

func TestDestructCancelsAFetchThatNobodyWaitsFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: 5 * time.Second}
		r.told = func(_ *token, err *fetchError, _ int) {
			if err == nil || errors.Is(err, context.Canceled) {
				t.Errorf("fetched with error %v, want one that is not context.Canceled", err)
			}
		}
		s := attachedSource(r)
		s.Warm()
		time.Sleep(time.Second)
		destruct(t, s)
		expectRequestEnds(t, r)
		expectRequests(t, r, 1) // and no quick retry
	})
}

func TestDestructCancelsTheWaitForARetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		r.fail = func(context.Context, int) error { return errTransient }
		s := attachedSource(r)
		s.Warm()
		expectRequests(t, r, 1)
		destruct(t, s)
		time.Sleep(time.Second)
		expectRequests(t, r, 1)
	})
}

func TestDestructLeavesAFetchThatIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: 2 * time.Second}
		s := attachedSource(r)
		s.Warm()
		var wg sync.WaitGroup
		wg.Go(func() { expectToken(t, s, "t1", 2*time.Second) })
		wg.Go(func() { // leaves early, which must not matter to the other
			ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
			defer cancel()
			want := answer{err: context.DeadlineExceeded, waited: 1500 * time.Millisecond}
			if got := ask(ctx, s); got != want {
				t.Errorf("Token() = %v, want %v", got, want)
			}
		})
		time.Sleep(time.Second)
		destruct(t, s)
		wg.Wait()

		expectToken(t, s, "t1", 0)
		time.Sleep(24 * time.Hour)
		expectRequests(t, r, 1) // no timer was started
	})
}

func TestLastCallerEndsTheFetchOfAReleasedSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: 5 * time.Second}
		s := attachedSource(r)
		for i := range 2 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			want := answer{err: context.DeadlineExceeded, waited: time.Second}
			var wg sync.WaitGroup
			wg.Go(func() {
				if got := ask(ctx, s); got != want {
					t.Errorf("Token() = %v, want %v", got, want)
				}
			})
			synctest.Wait()
			if i == 0 {
				destruct(t, s)
			}
			wg.Wait()
			cancel()
			expectRequestEnds(t, r)
			time.Sleep(time.Second) // past a back-off
		}
	})
}

func TestTokenAfterDestructWorksOnDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: time.Second}
		s := attachedSource(r)
		destruct(t, s)
		expectToken(t, s, "t1", time.Second)
		expectToken(t, s, "t1", 0)
		time.Sleep(24 * time.Hour)
		expectRequests(t, r, 1)
		expectToken(t, s, "t2", time.Second)

		// A stale one is served as ever; its renewal ends by the timeout.
		time.Sleep(50 * time.Minute)
		r.setDelay(time.Hour)
		expectToken(t, s, "t2", 0)
		time.Sleep(s.life.fetchTimeout)
		expectRequestEnds(t, r)
		time.Sleep(24 * time.Hour)
		expectRequests(t, r, 3)

		r.setDelay(0)
		expectToken(t, s, "t4", 0)
		if s.timer != nil {
			t.Error("a timer was started after Destruct")
		}
	})
}

// starts a back-off, and whoever comes meanwhile gets errReleased.
func TestCancelledFetchIsNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: time.Second}
		s := attachedSource(r)
		s.Warm()
		time.Sleep(100 * time.Millisecond)
		destruct(t, s)
		synctest.Wait()
		expectToken(t, s, "t2", time.Second)
	})
}

func TestCancelledFetchIsNotJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: time.Second}
		s := attachedSource(r)
		s.Warm()
		time.Sleep(100 * time.Millisecond)
		destruct(t, s)
		expectToken(t, s, "t2", time.Second)
	})
}

func TestNewestRequesterMakesTheRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := &scriptedRequester{lifetime: time.Hour}
		second := &scriptedRequester{lifetime: time.Hour}
		third := &scriptedRequester{lifetime: time.Hour}
		s := attachedSource(first)
		expect := func(step string, want ...int) {
			t.Helper()
			s.drop()
			if got := ask(t.Context(), s); got.err != nil {
				t.Errorf("%s: Token() = %v, want a token", step, got)
			}
			for i, r := range []*scriptedRequester{first, second, third} {
				if got := len(r.requests()); got != want[i] {
					t.Errorf("%s: requester %d made %d requests, want %d", step, i+1, got, want[i])
				}
			}
		}
		expect("one", 1, 0, 0)
		s.attach(second, testLife)
		s.begin(second)
		expectToken(t, s, "t1", 0) // it takes over the token
		expect("two", 1, 1, 0)
		s.attach(third, testLife)
		s.begin(third)
		expect("three", 1, 1, 1)
		s.detach(second, func() {})
		expect("without the second", 1, 1, 2)
		s.detach(third, func() {})
		expect("without the third", 2, 1, 2)
		s.detach(first, func() {})
		expect("the last one stays", 3, 1, 2)
	})
}

func TestDetachDuringAFetchDoesNotEndIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := &scriptedRequester{lifetime: time.Hour, delay: 2 * time.Second}
		s := attachedSource(old)
		s.Warm()
		time.Sleep(time.Second)
		s.attach(&scriptedRequester{lifetime: time.Hour}, testLife)
		s.detach(old, func() {})
		expectToken(t, s, "t1", time.Second)
		expectRequests(t, old, 1)
	})
}

// During a reload, the new config may find the source before the old one
// leaves it and join only afterwards.
func TestRequesterThatLeftIsNotAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := new(scriptedRequester), new(scriptedRequester)
		s := newTestSource(t, first)
		s.detach(first, func() {})
		s.attach(second, testLife)
		s.begin(second)
		s.detach(second, func() {})
		expectToken(t, s, "t1", 0)
		expectRequests(t, first, 0)
		expectRequests(t, second, 1)
	})
}
