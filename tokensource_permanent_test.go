package outboundauth

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestPermanentErrorIsNotRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause := &scriptedError{permanent: true}
		r := &scriptedRequester{fail: during(0, time.Hour, cause)}
		s := newTestSource(t, r)
		failed := expectError(t, s, cause)
		expectRequests(t, r, 1)

		window := time.Until(failed.retryAt) - 1
		for i, got := range load(t.Context(), s, 5*time.Millisecond, window) {
			if want := (answer{err: failed}); got != want {
				t.Fatalf("caller %d: Token() = %v, want %v", i, got, want)
			}
		}
		expectRequests(t, r, 1)
		// The secret is looked at for the request, then now and again: that
		// may be a read of a file.
		if got, limit := r.looked, 1+int(window/secretCheckInterval); got > limit || got < 2 {
			t.Errorf("secret looked at %d times in %v, want 2 to %d", got, window, limit)
		}
	})
}

func TestChangedSecretIsTriedDuringTheBackoff(t *testing.T) {
	const interval = secretCheckInterval
	for _, tt := range []struct {
		name    string
		changed time.Duration // when the secret changes
		tried   time.Duration // when it is tried
	}{
		{"at once", 0, interval},
		{"just before the first look", interval - 1, interval},
		{"just after the first look", interval + 1, 2 * interval},
		{"late", 1000 * interval, 1000 * interval},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				secret := func() string {
					if time.Since(start) > 0 && time.Since(start) >= tt.changed {
						return "new"
					}
					return "old"
				}
				cause := &scriptedError{permanent: true, after: 5 * time.Minute}
				r := &scriptedRequester{lifetime: time.Hour, secret: secret, fail: func(context.Context, int) error {
					if secret() == "new" {
						return nil
					}
					return cause
				}}
				s := newTestSource(t, r)
				failed := expectError(t, s, cause)
				for time.Since(start) < tt.tried {
					if got, want := ask(t.Context(), s), (answer{err: failed}); got != want {
						t.Fatalf("after %v: Token() = %v, want %v", time.Since(start), got, want)
					}
					time.Sleep(interval / 10)
				}
				expectToken(t, s, "t2", 0)
				expectRequests(t, r, 2)
			})
		})
	}
}

// To compare secrets can take a while, too: a file may be on a slow disk.
func TestCallersShareTheLookAtTheSecret(t *testing.T) {
	for _, changes := range []bool{true, false} {
		t.Run(fmt.Sprintf("changes=%v", changes), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				cause := &scriptedError{permanent: true, after: 5 * time.Minute}
				r := &scriptedRequester{lifetime: time.Hour, secret: func() string {
					if time.Since(start) == 0 {
						return "old"
					}
					time.Sleep(500 * time.Millisecond)
					return map[bool]string{true: "new", false: "old"}[changes]
				}}
				r.fail = during(0, time.Second, cause)
				s := newTestSource(t, r)
				want, requests := answer{err: expectError(t, s, cause)}, 1
				if changes {
					want, requests = answer{value: "t2"}, 2
				}
				time.Sleep(time.Second)
				for i, got := range load(t.Context(), s, 10*time.Millisecond, 500*time.Millisecond) {
					want.waited = 500*time.Millisecond - time.Duration(i)*10*time.Millisecond
					if got != want {
						t.Fatalf("caller %d: Token() = %v, want %v", i, got, want)
					}
				}
				expectRequests(t, r, requests)
			})
		})
	}
}

// A fetch that only looks for another secret is not what was asked for. If there is
// none, it is too early for the one that was.
func TestRenewalDuringALookAtTheSecret(t *testing.T) {
	for _, changed := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			cause := &scriptedError{permanent: true}
			r := &scriptedRequester{lifetime: time.Hour, fail: during(0, 2*time.Second, cause)}
			r.secret = func() string {
				secret := fmt.Sprint(changed && time.Since(start) > 3*time.Second)
				time.Sleep(time.Second) // a slow disk
				return secret
			}
			s := newTestSource(t, r)
			expectError(t, s, cause)
			time.Sleep(2500 * time.Millisecond)
			go func() { _, _, _ = s.Token(t.Context()) }()
			time.Sleep(secretCheckInterval)
			tok, err := s.FetchNow(t.Context())
			if _, early := errors.AsType[*earlyError](err); changed == early || (changed && tok.value != "t2") {
				t.Errorf("changed %v: FetchNow() = %v, %v, want a token, or that it is too early", changed, tok, err)
			}
			if waited := time.Since(start); waited > 6*time.Second {
				t.Errorf("changed %v: FetchNow() took until %v, want that it looks once", changed, waited)
			}
		})
	}
}

func TestChangedSecretThatIsWrongBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		cause := &scriptedError{permanent: true, after: 5 * time.Minute}
		r := &scriptedRequester{fail: during(0, time.Hour, cause), secret: func() string {
			return fmt.Sprint(time.Since(start) >= 10*time.Second)
		}}
		s := newTestSource(t, r)
		load(t.Context(), s, 100*time.Millisecond, time.Minute)
		if got := r.requests(); len(got) != 2 || got[1].Sub(start) < 10*time.Second || got[1].Sub(start) > 11*time.Second {
			t.Errorf("token requests at %v, want the second within a second after the change", got)
		}
	})
}

func TestChangedSecretDoesNotEndATransientBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		cause := &scriptedError{after: time.Minute}
		r := &scriptedRequester{fail: during(0, time.Hour, cause), secret: func() string { return time.Since(start).String() }}
		load(t.Context(), newTestSource(t, r), 100*time.Millisecond, 59*time.Second)
		expectRequests(t, r, 1)
	})
}

// A server that comes back after an outage may refuse once: that must not
// count as the seventh refusal.
func TestBackoffStartsAnewForAnotherKindOfError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := &scriptedError{permanent: true}
		r := &scriptedRequester{fail: func(_ context.Context, n int) error {
			if n <= 12 {
				return errTransient
			}
			return refused
		}}
		s := newTestSource(t, r)
		for {
			_, _, err := s.Token(t.Context())
			failed, ok := errors.AsType[*fetchError](err)
			if !ok {
				t.Fatalf("Token() = %v, want a *fetchError", err)
			}
			if errors.Is(err, refused) {
				if wait := time.Until(failed.retryAt); wait > permanentBackoff*3/2 {
					t.Errorf("back-off of the first refusal = %v, want at most %v", wait, permanentBackoff*3/2)
				}
				return
			}
			time.Sleep(time.Until(failed.retryAt))
		}
	})
}

func TestPanicOutsideTheRequestEndsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		r := &scriptedRequester{
			secret: func() string {
				if time.Since(start) == 0 {
					panic("canary")
				}
				return ""
			},
			told: func(*token, *fetchError, int) { panic("canary") },
		}
		s := newTestSource(t, r)
		a := ask(t.Context(), s)
		if a.err == nil || strings.Contains(a.err.Error(), "canary") {
			t.Errorf("Token() = %v, want an error that does not show the panic", a)
		}
		time.Sleep(maxTransientBackoff)
		expectToken(t, s, "t1", 0)
	})
}

// A renewal that failed is repeated in time: an outage that ends before the
// token does loses no request.
func TestOutageThatEndsBeforeTheTokenLosesNothing(t *testing.T) {
	for range 200 {
		synctest.Test(t, func(t *testing.T) {
			const life, back = 14 * time.Second, 11 * time.Second // renewal from 9.8 s, end at 12.6 s
			r := &scriptedRequester{lifetime: life, fail: during(time.Second, back, errTransient)}
			s := newTestSource(t, r)
			for i, a := range load(t.Context(), s, 20*time.Millisecond, 2*life) {
				if a.err != nil || a.waited > 0 && i > 0 {
					t.Fatalf("caller %d: Token() = %v, want a token at once", i, a)
				}
			}
		})
	}
}
