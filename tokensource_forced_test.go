package outboundauth

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// wantEarly fails the test unless an error says that it is too early, until an instant.
func wantEarly(t *testing.T, err error, until time.Time) {
	t.Helper()
	early, ok := errors.AsType[*earlyError](err)
	if !ok {
		t.Fatalf("got %v, want that it is too early", err)
	}
	if !early.until.Equal(until) {
		t.Errorf("got that it is too early until %v, want %v", early.until, until)
	}
}

// However often an operator asks, and in whatever way, there is a second between two
// token requests.
func TestForcedRequestsAreSpacedOut(t *testing.T) {
	for name, force := range map[string]func(context.Context, *tokenSource){
		"renew":             func(ctx context.Context, s *tokenSource) { _, _ = s.FetchNow(ctx) },
		"forget and use":    func(ctx context.Context, s *tokenSource) { _ = s.Forget(t.Context()); _, _, _ = s.Token(ctx) },
		"forget and renew":  func(ctx context.Context, s *tokenSource) { _ = s.Forget(t.Context()); _, _ = s.FetchNow(ctx) },
		"many at once":      func(ctx context.Context, s *tokenSource) { go func() { _, _ = s.FetchNow(ctx) }() },
		"with what is fast": func(ctx context.Context, s *tokenSource) { s.Warm(); _, _ = s.FetchNow(ctx) },
	} {
		synctest.Test(t, func(t *testing.T) {
			r := &scriptedRequester{lifetime: time.Hour, delay: 10 * time.Millisecond}
			s := newTestSource(t, r)
			_, _, _ = s.Token(t.Context())
			start := time.Now()
			for range 50 {
				force(t.Context(), s)
				time.Sleep(50 * time.Millisecond)
			}
			requests := r.requests()
			for i := 1; i < len(requests); i++ {
				if distance := requests[i].Sub(requests[i-1]); distance < time.Second {
					t.Errorf("%s: got token requests at a distance of %v, want a second at least", name, distance)
				}
			}
			if most := int(time.Since(start)/time.Second) + 1; len(requests) < 2 || len(requests) > most {
				t.Errorf("%s: got %d token requests in %v, want some, and %d at most", name, len(requests), time.Since(start), most)
			}
		})
	}
}

// Those who ask while a request is on its way get its result.
func TestForcedRequestsAtOnceAreOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: 100 * time.Millisecond}
		s := newTestSource(t, r)
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if tok, err := s.FetchNow(t.Context()); err != nil || tok.value != "t1" {
					t.Errorf("FetchNow() = %v, %v, want the token of one request", tok, err)
				}
			})
		}
		wg.Wait()
		expectRequests(t, r, 1)
		_, err := s.FetchNow(t.Context())
		wantEarly(t, err, time.Now().Add(time.Second))
	})
}

// What the server has asked for holds for operators too, and what may lock the client
// out. The back-off of a fault that passes by itself does not.
func TestForcedRequestsDuringABackOff(t *testing.T) {
	const long = time.Minute // of the back-off, at least
	for _, test := range []struct {
		name  string
		cause error
		until func(s *tokenSource) time.Time
	}{
		{"Retry-After", &scriptedError{after: 30 * time.Second}, func(s *tokenSource) time.Time { return s.requested.Add(30 * time.Second) }},
		{"Retry-After of a day", &scriptedError{after: 24 * time.Hour}, func(s *tokenSource) time.Time { return s.requested.Add(maxRetryAfter) }},
		{"lock-out", &scriptedError{permanent: true}, func(s *tokenSource) time.Time { return s.lastErr.retryAt }},
		{"lock-out with Retry-After", &scriptedError{permanent: true, after: time.Second}, func(s *tokenSource) time.Time { return s.lastErr.retryAt }},
		{"a fault that passes", errTransient, func(s *tokenSource) time.Time { return s.requested.Add(forcedInterval) }},
		{"a fault that passes, and a short Retry-After", &scriptedError{after: 2 * time.Second}, func(s *tokenSource) time.Time { return s.requested.Add(2 * time.Second) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &scriptedRequester{lifetime: time.Hour, fail: func(context.Context, int) error { return test.cause }}
				s := newTestSource(t, r)
				s.failures = 6 // as after a long outage
				if isPermanent(test.cause) {
					s.failedWith = "secret"
				}
				if _, err := s.FetchNow(t.Context()); !errors.Is(err, test.cause) {
					t.Fatalf("FetchNow() = %v, want %v", err, test.cause)
				}
				s.lastErr.retryAt = s.lastErr.retryAt.Add(long)
				if isPermanent(test.cause) {
					s.lastErr.soonest = s.lastErr.retryAt
				}
				_, err := s.FetchNow(t.Context())
				wantEarly(t, err, s.requested.Add(forcedInterval))
				until := test.until(s)
				for time.Sleep(forcedInterval); time.Now().Before(until); time.Sleep(min(time.Second, time.Until(until))) {
					_, err := s.FetchNow(t.Context())
					wantEarly(t, err, until)
					expectRequests(t, r, 1)
				}
				if isPermanent(test.cause) { // the source itself has asked
					return
				}
				if _, err := s.FetchNow(t.Context()); !errors.Is(err, test.cause) {
					t.Errorf("FetchNow() = %v after that, want %v", err, test.cause)
				}
				expectRequests(t, r, 2)
			})
		})
	}
}

// An operator who has replaced the secret need not wait.
func TestForcedRequestWithAnotherSecret(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		secret := "wrong"
		cause := &scriptedError{permanent: true, after: time.Minute}
		r := &scriptedRequester{lifetime: time.Hour, secret: func() string { return secret }}
		r.fail = func(context.Context, int) error {
			if secret == "wrong" {
				return cause
			}
			return nil
		}
		s := newTestSource(t, r)
		expectError(t, s, cause)
		secret = "right"
		_, err := s.FetchNow(t.Context())
		wantEarly(t, err, time.Now().Add(time.Second))
		time.Sleep(time.Second)
		if tok, err := s.FetchNow(t.Context()); err != nil || tok.value != "t2" {
			t.Errorf("FetchNow() = %v, %v, want a token", tok, err)
		}
		expectRequests(t, r, 2)
	})
}

// A token that leaked must go, but not in exchange for one that is as new.
func TestTokenIsForgottenWhateverTheServerSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, r)
		if err := s.Forget(t.Context()); err != nil {
			t.Errorf("Forget() = %v without a token, want no error", err)
		}
		expectToken(t, s, "t1", 0)
		wantEarly(t, s.Forget(t.Context()), time.Now().Add(time.Second))
		expectToken(t, s, "t1", 0)
		time.Sleep(time.Second)
		r.fail = during(0, time.Hour, &scriptedError{permanent: true})
		_, _ = s.FetchNow(t.Context())
		time.Sleep(time.Second)
		if err := s.Forget(t.Context()); err != nil || s.Peek() != nil {
			t.Errorf("Forget() = %v during a lock-out, want that the token is gone", err)
		}
		expectRequests(t, r, 2)
	})
}

func TestEarlyErrorsSayWhatToDo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		until := time.Now().Add(42 * time.Second)
		got := []string{
			(&earlyError{until: until}).Error(),
			(&earlyError{until, &fetchError{err: errTransient}}).Error(),
			(&earlyError{until, &fetchError{err: &scriptedError{permanent: true}}}).Error(),
		}
		want := []string{
			"a token was requested a moment ago: try again in a second",
			"the authorization server asks to be left alone: try again in 42s: status 503",
			"the authorization server refused the client: change the secret or key, or try again in 42s: scripted",
		}
		if !slices.Equal(got, want) {
			t.Errorf("got %s, want %s", fmt.Sprintf("%q", got), fmt.Sprintf("%q", want))
		}
	})
}
