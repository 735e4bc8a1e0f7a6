package outboundauth

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestRefreshTime(t *testing.T) {
	const year = 365 * 24 * time.Hour
	for _, tt := range []struct {
		name           string
		lifetime, took time.Duration
		refreshBefore  time.Duration
		from, to       time.Duration // the refresh time, in the token's life
	}{
		{name: "one second", lifetime: time.Second, from: 700 * time.Millisecond, to: 740 * time.Millisecond},
		{name: "five seconds", lifetime: 5 * time.Second, from: 3500 * time.Millisecond, to: 3700 * time.Millisecond},
		{name: "an hour", lifetime: time.Hour, from: 42 * time.Minute, to: 44*time.Minute + 24*time.Second},
		{name: "ten years", lifetime: 10 * year, from: 7 * year, to: 7*year + year*2/5},
		{name: "not named", from: 210 * time.Second, to: 222 * time.Second},

		{name: "refresh_before", lifetime: time.Hour, refreshBefore: 20 * time.Minute, from: 37*time.Minute + 36*time.Second, to: 40 * time.Minute},
		{name: "refresh_before near the half", lifetime: time.Hour, refreshBefore: 28 * time.Minute, from: 30 * time.Minute, to: 32 * time.Minute},
		{name: "refresh_before above the half", lifetime: time.Hour, refreshBefore: 40 * time.Minute, from: 30 * time.Minute, to: 30 * time.Minute},
		{name: "refresh_before above the lifetime", lifetime: time.Hour, refreshBefore: 2 * time.Hour, from: 30 * time.Minute, to: 30 * time.Minute},
		// Later than 59m50s the token is not used at all.
		{name: "refresh_before below the reserve", lifetime: time.Hour, refreshBefore: time.Second, from: 57*time.Minute + 26*time.Second, to: 59*time.Minute + 50*time.Second},

		// Twice the time that the server took is left before the end at 4.5 s.
		{name: "slow server", lifetime: 5 * time.Second, took: 500 * time.Millisecond, from: 3300 * time.Millisecond, to: 3500 * time.Millisecond},
		{name: "slow server, refresh_before", lifetime: time.Hour, took: 5 * time.Second, refreshBefore: time.Second, from: 57*time.Minute + 16*time.Second, to: 59*time.Minute + 40*time.Second},
		{name: "very slow server", lifetime: 5 * time.Second, took: 2 * time.Second, from: 2500 * time.Millisecond, to: 2500 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newTestSource(t, &scriptedRequester{})
			s.life.refreshBefore = tt.refreshBefore
			sent := time.Now()
			earliest, latest := 100*year, time.Duration(0)
			for range 2000 {
				tok, err := s.life.newToken(grant{accessToken: "t", lifetime: tt.lifetime, issued: sent, took: tt.took}, nil)
				if err != nil {
					t.Fatal(err)
				}
				if tok.usableTo.Before(tok.refreshAt) {
					t.Fatalf("refresh time %v, after %v, when the token is not used any more", tok.refreshAt.Sub(sent), tok.usableTo.Sub(sent))
				}
				earliest, latest = min(earliest, tok.refreshAt.Sub(sent)), max(latest, tok.refreshAt.Sub(sent))
			}
			if earliest < tt.from || latest > tt.to {
				t.Errorf("refresh times in [%v, %v], want [%v, %v]", earliest, latest, tt.from, tt.to)
			}
			// A fleet must not refresh at once: the whole interval is used.
			if slack := (tt.to - tt.from) / 10; earliest > tt.from+slack || latest < tt.to-slack {
				t.Errorf("refresh times in [%v, %v] only, want them all over [%v, %v]", earliest, latest, tt.from, tt.to)
			}
		})
	}
}

// How old a grant is says nothing about how fast its server answers.
func TestRefreshTimeOfAGrantFromBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const age = 25 * time.Minute
		issued := time.Now()
		time.Sleep(age)
		tok, err := lifecycle{}.newToken(grant{accessToken: "t", lifetime: time.Hour, issued: issued, took: 100 * time.Millisecond}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := time.Until(tok.refreshAt); got < 42*time.Minute-age || got > 44*time.Minute+24*time.Second-age {
			t.Errorf("got a renewal in %v, want it in 17m to 19m24s, as if the grant were new", got)
		}
		if got := time.Until(tok.expires); got != time.Hour-age {
			t.Errorf("got an end in %v, want it in %v", got, time.Hour-age)
		}
	})
}

func TestTokenInUseIsRefreshedByTheTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: time.Second}
		s := newTestSource(t, r)
		if got := ask(t.Context(), s); got.value != "t1" {
			t.Fatalf("Token() = %v, want t1", got)
		}
		first := s.Peek()
		time.Sleep(time.Until(first.expires))
		if got := r.requests(); len(got) != 2 || !got[1].Equal(first.refreshAt) {
			t.Errorf("token requests at %v, want the second at %v", got, first.refreshAt)
		}
		expectToken(t, s, "t2", 0)
	})
}

// mutex after the fetch has ended: it then replaces a fresh token.
func TestLateTimerLeavesAFreshToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		expectToken(t, s, "t1", 0)
		s.refresh()
		expectRequests(t, r, 1)
		expectToken(t, s, "t1", 0)
		time.Sleep(48 * time.Minute)
		expectRequests(t, r, 2) // its own timer is still there
	})
}

// A source that is asked at least once in a token's life never keeps anybody
// waiting, even if every request comes after the refresh time.
func TestSourceInUseStaysWarm(t *testing.T) {
	const callers, year = 20, 365 * 24 * time.Hour
	for _, tt := range []struct{ lifetime, every time.Duration }{
		{time.Second, 800 * time.Millisecond},
		{5 * time.Second, 10 * time.Millisecond},
		{5 * time.Second, 4 * time.Second},
		{time.Minute, 50 * time.Second},
		{time.Hour, 10 * time.Minute},
		{time.Hour, 44 * time.Minute},
		{time.Hour, 50 * time.Minute},
		{time.Hour, 59 * time.Minute},
		{24 * time.Hour, 23 * time.Hour},
		{10 * year, 9 * year},
		{0, 4 * time.Minute}, // the default of 5 minutes
	} {
		t.Run(fmt.Sprintf("%v every %v", tt.lifetime, tt.every), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &scriptedRequester{lifetime: tt.lifetime, delay: 10 * time.Millisecond}
				s := newTestSource(t, r)
				start := time.Now()
				if got, want := ask(t.Context(), s), (answer{value: "t1", waited: r.delay}); got != want {
					t.Fatalf("Token() = %v, want %v", got, want)
				}
				for range callers {
					time.Sleep(tt.every)
					tok, _, err := s.Token(t.Context())
					if err != nil || !time.Now().Before(tok.usableTo) {
						t.Fatalf("Token() = %v, %v, want a token that may be used", tok, err)
					}
				}
				if got, want := time.Since(start), callers*tt.every+r.delay; got != want {
					t.Errorf("%d callers every %v took %v, want %v: none waits but the first", callers, tt.every, got, want)
				}
				life := tt.lifetime
				if life == 0 {
					life = 5 * time.Minute
				}
				// Renewals are 70 % of a life apart at least, 66 % of a short one with this delay.
				if got, limit := len(r.requests()), int(time.Since(start)/(life/100*66))+2; got > limit {
					t.Errorf("%d token requests, want %d at most", got, limit)
				}
			})
		})
	}
}

func TestIdleSourceLetsItsTokenLapse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: time.Second}
		s := newTestSource(t, r)
		s.Warm()
		time.Sleep(24 * time.Hour)
		expectRequests(t, r, 1) // nobody ever asked

		expectToken(t, s, "t2", time.Second)
		time.Sleep(24 * time.Hour)
		expectRequests(t, r, 3) // renewed once, for the one who asked

		expectToken(t, s, "t4", time.Second)
		time.Sleep(59 * time.Minute) // renewed; asks for the fresh one
		expectToken(t, s, "t5", 0)
		time.Sleep(24 * time.Hour)
		expectRequests(t, r, 6)
	})
}

func TestShortTokensOfASlowServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: 5 * time.Second, delay: 500 * time.Millisecond}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", r.delay)
		for i, got := range load(t.Context(), s, 5*time.Millisecond, time.Minute) {
			if got.err != nil || got.waited != 0 {
				t.Fatalf("caller %d: Token() = %v, want a token at once", i, got)
			}
		}
		sent := r.requests()
		for i := range sent[1:] {
			if d := sent[i+1].Sub(sent[i]); d < 3*time.Second || d > 3500*time.Millisecond {
				t.Errorf("token requests %v apart, want one per renewal, between 3s and 3.5s apart", d)
			}
		}
		if got := len(sent); got < 17 || got > 21 {
			t.Errorf("%d token requests in a minute, want 17 to 21", got)
		}
	})
}

func TestTokenWithoutLifetimeExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{}
		s := newTestSource(t, r)
		s.Warm()
		time.Sleep(s.life.defaultLifetime)
		r.setDelay(time.Second)
		expectToken(t, s, "t2", time.Second)
	})
}

func TestTokenThatExpiredOnItsWayIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Second, delay: 900 * time.Millisecond}
		s := newTestSource(t, r)
		if got := ask(t.Context(), s); got.err == nil || got.waited != r.delay {
			t.Errorf("Token() = %v, want an error after %v", got, r.delay)
		} else {
			wantError(t, got.err, "the token lives for 1s and took 900ms to get: nothing is left of it")
		}
		expectCached(t, s, nil)

		r.setDelay(899 * time.Millisecond)
		time.Sleep(10 * time.Second) // past the back-off
		if got := ask(t.Context(), s); got.err != nil {
			t.Errorf("Token() = %v, want a token", got)
		}
	})
}

// token was granted to a later one.
func TestLifeCountsFromTheRequestThatWasGranted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: 5 * time.Second, delay: 5 * time.Second, alone: true}
		r.fail = func(_ context.Context, n int) error {
			if n == 1 { // a gateway in front of the server gave up; its next answer is quick
				r.setDelay(0)
				return errTransient
			}
			return nil
		}
		s := newTestSource(t, r)
		got := ask(t.Context(), s)
		if got.err != nil || got.value != "t2" {
			t.Fatalf("Token() = %v, want t2", got)
		}
		sent := r.requests()
		if life := s.Peek().expires.Sub(sent[1]); life != r.lifetime {
			t.Errorf("the token lives for %v, want %v", life, r.lifetime)
		}
	})
}

func TestWarmReplacesATokenThatLapsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Minute}
		s := newTestSource(t, r)
		s.Warm()
		time.Sleep(2 * time.Minute) // nobody asks
		s.Warm()
		expectRequests(t, r, 2)
		expectToken(t, s, "t2", 0)
	})
}

// Health checks may be rarer than the tokens that they need.
func TestKeptTokenIsRefreshedByTheTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var outage atomic.Bool
		r := &scriptedRequester{lifetime: 5 * time.Second, fail: func(context.Context, int) error {
			if outage.Load() {
				return &tokenError{Code: codeNetwork}
			}
			return nil
		}}
		s := newTestSource(t, r)
		s.keep()
		s.keep()
		s.unkeep() // another still needs it
		s.Warm()
		for range 10 {
			time.Sleep(30 * time.Second)
			if s.Peek() == nil {
				t.Fatal("Peek() = nil, want a token")
			}
		}
		outage.Store(true)
		time.Sleep(time.Minute)
		if s.Peek() != nil {
			t.Fatal("Peek() = a token, want nothing in the outage")
		}
		outage.Store(false)
		time.Sleep(maxTransientBackoff + time.Second)
		if s.Peek() == nil {
			t.Error("Peek() = nil, want a token after the outage, without anybody who asks")
		}
		s.unkeep()
		time.Sleep(time.Minute)
		if s.Peek() != nil {
			t.Error("Peek() = a token, want nothing when nobody needs it")
		}
	})
}
