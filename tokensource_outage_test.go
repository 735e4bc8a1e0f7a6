package outboundauth

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// outage is the span in which a server gives no tokens.
type outage struct{ from, to time.Time }

func outageIn(from, lasts time.Duration) outage {
	return outage{time.Now().Add(from), time.Now().Add(from + lasts)}
}

func (o outage) has(at time.Time) bool { return !at.Before(o.from) && at.Before(o.to) }

// refusing answers with err while the outage lasts.
func (o outage) refusing(err error) func(context.Context, int) error {
	return func(context.Context, int) error {
		if o.has(time.Now()) {
			return err
		}
		return nil
	}
}

// silent answers nothing while the outage lasts. Then it answers all who wait, or
// with `lost` none of them.
func (o outage) silent(lost bool) func(context.Context, int) error {
	return func(ctx context.Context, _ int) error {
		if !o.has(time.Now()) {
			return nil
		}
		var answer <-chan time.Time
		if !lost {
			answer = time.After(time.Until(o.to))
		}
		select {
		case <-answer:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// An outage ends for the clients of the gateway when it ends. Nobody fails who has a
// valid token.
func TestOutageEndsWhenTheServerIsBack(t *testing.T) {
	const every, lifetime = 5 * time.Millisecond, 20 * time.Second
	unavailable := &tokenError{Status: 503, Code: codeHTTPStatus}
	for name, test := range map[string]struct {
		kind  func(outage) func(context.Context, int) error
		slack int // requests that fail beside those for which no token lives
		back  time.Duration
	}{
		"refusing":         {func(o outage) func(context.Context, int) error { return o.refusing(unavailable) }, 450, 2 * time.Second},
		"silent":           {func(o outage) func(context.Context, int) error { return o.silent(false) }, 0, 10 * time.Millisecond},
		"silent, and lost": {func(o outage) func(context.Context, int) error { return o.silent(true) }, 500, 2500 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			for range 10 {
				synctest.Test(t, func(t *testing.T) {
					r := &scriptedRequester{lifetime: lifetime, delay: 10 * time.Millisecond}
					o := outageIn(3*time.Second, 29*time.Second)
					r.fail = test.kind(o)
					s := newTestSource(t, r)
					start := time.Now()
					expectToken(t, s, "t1", r.delay)
					end := s.Peek().expires
					failed := 0
					for i, got := range load(t.Context(), s, every, 45*time.Second) {
						asked := start.Add(time.Duration(i)*every + r.delay)
						if got.err == nil {
							continue
						}
						failed++
						if asked.Before(end) || asked.After(o.to.Add(test.back+r.delay)) {
							t.Fatalf("after %v: Token() = %v, want a token", asked.Sub(start), got)
						}
						if limit := time.Second; got.waited > limit {
							t.Fatalf("after %v: waited for %v, want %v at most", asked.Sub(start), got.waited, limit)
						}
					}
					if most := int(o.to.Sub(end)/every) + test.slack; failed > most {
						t.Errorf("%d requests failed, want %d at most", failed, most)
					}
					if got := len(r.requests()); got > 25 {
						t.Errorf("%d token requests, want 25 at most", got)
					}
				})
			}
		})
	}
}

// A server that is back after an hour in which nobody asked is asked at once.
func TestCallerShortensABackoffThatNobodyWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Minute}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		r.setFail(outageIn(0, time.Minute+10*time.Second).refusing(errTransient))
		time.Sleep(time.Minute + 10*time.Second)
		s.backOff(time.Hour)
		s.mu.Lock()
		s.lastErr.soonest = s.lastErr.retryAt.Add(-time.Hour)
		s.mu.Unlock()
		n := len(r.requests())
		start := time.Now()
		for ask(t.Context(), s).err != nil {
			time.Sleep(50 * time.Millisecond)
		}
		if got := time.Since(start); got > maxAskedBackoff {
			t.Errorf("got a token after %v, want it within %v", got, maxAskedBackoff)
		}
		expectRequests(t, r, n+1)
	})
}

// requestsAfter returns when the requests came, counted from start.
func requestsAfter(r *scriptedRequester, start time.Time) (after []time.Duration) {
	for _, sent := range r.requests() {
		after = append(after, sent.Sub(start))
	}
	return after
}

func TestSilentServerIsAskedAgain(t *testing.T) {
	const second = time.Second
	for name, test := range map[string]struct {
		alone bool
		want  []time.Duration
	}{
		"side by side":      {false, []time.Duration{0, 5 * second / 2, 5 * second, 15 * second / 2}},
		"one after another": {true, []time.Duration{0}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &scriptedRequester{lifetime: time.Hour, alone: test.alone}
				r.fail = outageIn(0, time.Hour).silent(true)
				s := newTestSource(t, r)
				start := time.Now()
				got := make(chan answer, 1)
				go func() { got <- ask(t.Context(), s) }()
				time.Sleep(10*second - 1)
				if got := requestsAfter(r, start); !slices.Equal(got, test.want) {
					t.Errorf("requests after %v, want %v", got, test.want)
				}
				if a := <-got; a.err == nil || a.waited != 10*second {
					t.Errorf("Token() = %v, want an error when token_timeout ends", a)
				}
			})
		})
	}
}

// The first answer wins, and ends the others.
func TestSecondAttemptWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		r.fail = outageIn(0, time.Second).silent(true)
		s := newTestSource(t, r)
		expectToken(t, s, "t2", 2500*time.Millisecond)
		expectRequests(t, r, 2)
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.ended) != 2 {
			t.Errorf("%d requests have ended, want both", len(r.ended))
		}
	})
}

// An attempt that fails says nothing about the one that is still under way.
func TestAttemptThatFailsLeavesTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		slow := outageIn(0, 4*time.Second).silent(false)
		r.fail = func(ctx context.Context, n int) error {
			if n == 1 {
				return slow(ctx, n)
			}
			return errTransient
		}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 4*time.Second)
		expectRequests(t, r, 2)
	})
}

// A server that asks to be left alone is left alone at once.
func TestAnswerThatSettlesAFetchEndsTheOthers(t *testing.T) {
	for name, err := range map[string]error{
		"permanent":   &scriptedError{permanent: true},
		"Retry-After": &scriptedError{after: time.Minute},
		"429":         &tokenError{Status: 429},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &scriptedRequester{lifetime: time.Hour}
				silent := outageIn(0, time.Hour).silent(true)
				r.fail = func(ctx context.Context, n int) error {
					if n == 1 {
						return silent(ctx, n)
					}
					return err
				}
				s := newTestSource(t, r)
				if got := ask(t.Context(), s); !errors.Is(got.err, err) || got.waited != 2500*time.Millisecond {
					t.Errorf("Token() = %v, want %v after 2.5s", got, err)
				}
				expectRequests(t, r, 2)
			})
		})
	}
}

// A server that is known to be slow is not silent.
func TestSlowServerIsNotAskedTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Minute, delay: 3 * time.Second, alone: true}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", r.delay)
		r.mu.Lock()
		r.alone = false
		r.mu.Unlock()
		time.Sleep(time.Hour)
		expectToken(t, s, "t3", r.delay) // t2 was the renewal
		expectRequests(t, r, 3)
	})
}

// While there is a valid token, nobody needs a second request.
func TestRenewalIsNotMadeTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: 20 * time.Second, delay: time.Millisecond}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", r.delay)
		start := time.Now()
		r.setFail(outageIn(0, time.Hour).silent(true))
		for _, got := range load(t.Context(), s, 10*time.Millisecond, 19*time.Second) {
			if want := (answer{value: "t1"}); got != want {
				t.Fatalf("Token() = %v, want %v", got, want)
			}
		}
		renewal := requestsAfter(r, start)[1]
		expectRequests(t, r, 2)
		time.Sleep(time.Second)
		// From the end of the token on, the renewal is the first attempt of a fetch that
		// requests wait for: it has been silent for long enough.
		if got := ask(t.Context(), s); !errors.Is(got.err, context.DeadlineExceeded) || got.waited != time.Second {
			t.Errorf("Token() = %v, want a timeout after 1s", got)
		}
		if got := requestsAfter(r, start); len(got) != 3 || got[2]-renewal < 2500*time.Millisecond {
			t.Errorf("requests after %v, want the third when somebody waits", got)
		}
	})
}

// After a failed fetch, nobody waits for long. But the first token is worth waiting
// for.
func TestHowLongCallersWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, alone: true}
		r.fail = outageIn(0, 25*time.Second).silent(true)
		s := newTestSource(t, r)
		first := ask(t.Context(), s)
		if !errors.Is(first.err, context.DeadlineExceeded) || first.waited != 10*time.Second {
			t.Errorf("Token() = %v, want a timeout after 10s", first)
		}
		for range 5 {
			if got := ask(t.Context(), s); !errors.Is(got.err, context.DeadlineExceeded) || got.waited != time.Second {
				t.Errorf("Token() = %v, want a timeout after 1s", got)
			}
		}
	})
	synctest.Test(t, func(t *testing.T) { // a server that takes its time
		r := &scriptedRequester{lifetime: time.Minute, delay: 2 * time.Second, alone: true}
		s := newTestSource(t, r)
		s.Warm()
		time.Sleep(time.Hour)
		r.setDelay(time.Hour)
		_ = ask(t.Context(), s)
		if got := ask(t.Context(), s); !errors.Is(got.err, context.DeadlineExceeded) || got.waited != 6*time.Second {
			t.Errorf("Token() = %v, want a timeout after three times what it takes", got)
		}
	})
}

func TestTokenIsUsedToItsEndIfThereIsNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // a fetch has failed
		r := &scriptedRequester{lifetime: time.Minute}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		r.setFail(outageIn(0, time.Hour).refusing(errTransient))
		for _, got := range load(t.Context(), s, time.Second, time.Minute) {
			if want := (answer{value: "t1"}); got != want {
				t.Fatalf("Token() = %v, want %v", got, want)
			}
		}
		expectError(t, s, errTransient)
	})
	synctest.Test(t, func(t *testing.T) { // nobody asked for a long time, and the server is slow now
		r := &scriptedRequester{lifetime: time.Minute, delay: 100 * time.Millisecond}
		s := newTestSource(t, r)
		s.Warm()
		time.Sleep(55 * time.Second) // in the reserve
		r.setDelay(3 * time.Second)
		expectToken(t, s, "t1", 200*time.Millisecond) // twice the usual
		expectToken(t, s, "t1", 0)
		time.Sleep(3 * time.Second)
		expectToken(t, s, "t2", 0)
	})
	synctest.Test(t, func(t *testing.T) { // the end is too near to wait for it
		r := &scriptedRequester{lifetime: time.Minute, delay: time.Second}
		s := newTestSource(t, r)
		s.Warm()
		time.Sleep(59 * time.Second)
		expectToken(t, s, "t2", time.Second)
	})
}

// By the upstream's clock, the token may have expired before its last moments have
// come. That is no refusal.
func TestRefusalInTheReserveIsExpiry(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := newOperableGateway(t)
	g.load(proxySite(up, auth, "name expiry"))
	g.get().want(t, 200)
	s := theSource(t)
	s.age(func(t *token) { t.usableTo = time.Now().Add(-time.Second) })
	auth.script(refusing(503, "")) // so that the token is used to its end
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		w.WriteHeader(401)
		return true
	})
	g.get().want(t, 401)
	if s.wantsAnnouncement(dialAddress{"tcp", up.addr}, false) {
		t.Error("the address counts as one that refuses tokens, want no such thing")
	}
	if got := g.scrape().of("expiry")["invalidated_tokens_total"]; got != 0 {
		t.Errorf("%v tokens were invalidated, want none", got)
	}
}

// Somebody goes back to the former config within a minute.
func TestSourceOutlivesItsLastUser(t *testing.T) {
	for name, away := range map[string]time.Duration{"in time": afterlife - 1, "too late": afterlife} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &scriptedRequester{lifetime: time.Minute}
				s := attachedSource(r)
				expectToken(t, s, "t1", 0)
				var released []time.Duration
				start := time.Now()
				s.detach(r, func() { released = append(released, time.Since(start)) })
				time.Sleep(away)
				synctest.Wait()
				expectRequests(t, r, 1)
				want := []time.Duration{afterlife}
				if away < afterlife {
					s.attach(r, testLife)
					s.begin(r)
					want = []time.Duration{away}
					expectToken(t, s, "t1", 0)
					expectRequests(t, r, 2) // the renewal that was due
					destruct(t, s)
				}
				time.Sleep(time.Hour)
				if !slices.Equal(released, want) {
					t.Errorf("the pool got its share back after %v, want %v", released, want)
				}
			})
		})
	}
}

// max_lifetime ends a token, whatever the server says: also the one that is there, and one
// that the server repeats.
func TestMaxLifetime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, strict := &scriptedRequester{lifetime: 1000 * time.Hour}, &scriptedRequester{lifetime: 1000 * time.Hour}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		start := time.Now()
		time.Sleep(time.Minute)
		limited := testLife
		limited.maxLifetime = 10 * time.Minute
		s.attach(strict, limited)
		s.begin(strict)
		if got := s.Peek().expires.Sub(start); got != 10*time.Minute {
			t.Errorf("got a token that lives for %v, want 10m", got)
		}
		time.Sleep(10 * time.Minute)
		if got, _, err := s.Token(t.Context()); err != nil || time.Until(got.expires) > 10*time.Minute {
			t.Errorf("got a token for %v, err %v, want 10m at most", time.Until(got.expires), err)
		}

		limited.maxLifetime = time.Second
		stricter := &scriptedRequester{}
		s.attach(stricter, limited)
		s.begin(stricter)
		if got := s.Peek(); got != nil && time.Until(got.expires) > time.Second {
			t.Errorf("got a token for %v, want a second at most", time.Until(got.expires))
		}
	})
	now := time.Now()
	life := lifecycle{maxLifetime: 10 * time.Minute}
	first, err := life.newToken(grant{accessToken: "t", lifetime: time.Hour, issued: now}, nil)
	if err != nil {
		t.Fatal(err)
	}
	// The server repeats it before its end, which stays.
	again, err := grant{accessToken: "t", lifetime: time.Hour, issued: now.Add(4 * time.Minute)}.repeats(first)
	if err != nil || again.lifetime != 6*time.Minute {
		t.Errorf("got a grant for %v, err %v, want 6m", again.lifetime, err)
	}
	// After the end, it counts as a new one.
	again, err = grant{accessToken: "t", lifetime: time.Hour, issued: now.Add(15 * time.Minute)}.repeats(first)
	if got := life.token(again, now).expires; err != nil || !got.Equal(now.Add(25*time.Minute).Round(0)) {
		t.Errorf("got a token until %v, err %v, want 10m after it was granted again", got, err)
	}
}

// The strictest settings of those who share a source count, for its token too.
func TestStrictestSettingsCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, strict := &scriptedRequester{}, &scriptedRequester{}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		usual := s.Peek()
		s.attach(strict, lifecycle{refreshBefore: 30 * time.Second, defaultLifetime: time.Minute, fetchTimeout: time.Minute})
		s.begin(strict)
		start := time.Now()
		got := s.Peek()
		if got.value != "t1" || got.expires.Sub(start) != time.Minute || got.refreshAt.Sub(start) > 30*time.Second {
			t.Errorf("got %q, until %v, renewed after %v, want t1, a minute and half of that", got.value, got.expires.Sub(start), got.refreshAt.Sub(start))
		}
		if want := (lifecycle{30 * time.Second, true, time.Minute, 0, time.Minute, false}); s.life != want {
			t.Errorf("got %+v, want %+v", s.life, want)
		}
		s.detach(strict, func() {})
		if got := s.Peek(); !got.expires.Equal(usual.expires) {
			t.Errorf("got a token until %v, want %v again", got.expires, usual.expires)
		}
	})
}

func TestStrictest(t *testing.T) {
	a := lifecycle{refreshBefore: 0, defaultLifetime: 5, maxLifetime: 0, fetchTimeout: 5}
	b := lifecycle{refreshBefore: 9, defaultLifetime: 6, maxLifetime: 7, fetchTimeout: 4}
	want := lifecycle{refreshBefore: 9, orByDefault: true, defaultLifetime: 5, maxLifetime: 7, fetchTimeout: 5}
	if a.strictest(a) != a || b.strictest(b) != b {
		t.Error("got other settings than those that both have")
	}
	for _, got := range []lifecycle{a.strictest(b), b.strictest(a), want.strictest(a), want.strictest(b)} {
		if got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
}

// A server that repeats its token does not give it a longer life.
func TestRepeatedToken(t *testing.T) {
	const minute = time.Minute
	for _, test := range []struct {
		name                string
		first, after, again time.Duration // lifetimes, and when the token is repeated
		want                time.Duration // its life, from the first request
	}{
		{"no lifetime keeps the known end", 10 * minute, 8 * minute, 0, 10 * minute},
		{"a longer life does too", 10 * minute, 8 * minute, 10 * minute, 10 * minute},
		{"a shorter one counts", 10 * minute, 4 * minute, 3 * minute, 7 * minute},
		{"a new one counts once the end has passed", 10 * minute, 11 * minute, 5 * minute, 16 * minute},
		{"none is expired then", 10 * minute, 11 * minute, 0, 0},
		{"an end that nobody named does not hold", 0, 4 * minute, 0, 4*minute + defaultTokenLifetime},
		{"nor against one that is named", 0, 4 * minute, 10 * minute, 14 * minute},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				first, err := testLife.newToken(grant{accessToken: "t", lifetime: test.first, issued: start}, nil)
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(test.after)
				got, err := testLife.newToken(grant{accessToken: "t", lifetime: test.again, issued: time.Now()}, first)
				switch {
				case test.want == 0:
					wantError(t, err, "the server repeats a token that has expired")
				case err != nil:
					t.Errorf("got %v, want a token", err)
				case got.expires.Sub(start) != test.want:
					t.Errorf("got a life of %v, want %v", got.expires.Sub(start), test.want)
				}
			})
		})
	}
}

// A certificate may have been replaced between the two answers.
func TestRepeatedTokenKeepsItsCertificate(t *testing.T) {
	old := &tls.Certificate{Leaf: &x509.Certificate{NotAfter: time.Now().Add(24 * time.Hour)}}
	replaced := &tls.Certificate{Leaf: old.Leaf}
	for again, want := range map[string]*tls.Certificate{"t": old, "another": replaced} {
		for _, lifetime := range []time.Duration{0, time.Hour} {
			first, err := testLife.newToken(grant{accessToken: "t", lifetime: lifetime, issued: time.Now(), binding: old}, nil)
			if err != nil {
				t.Fatal(err)
			}
			got, err := testLife.newToken(grant{accessToken: again, lifetime: lifetime, issued: time.Now(), binding: replaced}, first)
			if err != nil || got.binding != want {
				t.Errorf("%s after t, which lives for %v: got the other certificate, err %v", again, lifetime, err)
			}
		}
	}
}

// Callers that have left don't keep a silent server from being asked again by those
// who come later.
func TestCallerThatComesLateAsksAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		r.fail = outageIn(0, time.Second).silent(true)
		s := newTestSource(t, r)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_ = ask(ctx, s)
		time.Sleep(4 * time.Second)
		expectRequests(t, r, 1) // nobody waits
		expectToken(t, s, "t2", 0)
	})
}

// All callers wait for one fetch, and each attempt is one request.
func TestCallersShareTheAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		r.fail = outageIn(0, 6*time.Second).silent(true)
		s := newTestSource(t, r)
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				if got := ask(t.Context(), s); got.value != "t4" {
					t.Errorf("Token() = %v, want t4", got)
				}
			})
			time.Sleep(time.Duration(i%3) * time.Millisecond)
		}
		wg.Wait()
		expectRequests(t, r, 4)
	})
}

// Some servers take an assertion only once, and each request with a file has the same.
func TestAssertionFileIsNotSentSideBySide(t *testing.T) {
	for file, want := range map[string]bool{"": true, "/run/jwt": false} {
		if got := (&endpoint{credentials: Credentials{AssertionFile: file}}).concurrent(); got != want {
			t.Errorf("assertion_file %q: side by side is %v, want %v", file, got, want)
		}
	}
}

// The settings may change while a fetch is under way.
func TestStrictestSettingsCountForATokenUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{delay: 2 * time.Second}
		s := newTestSource(t, r)
		s.Warm()
		time.Sleep(time.Second)
		strict := new(scriptedRequester)
		s.attach(strict, lifecycle{defaultLifetime: 10 * time.Second, fetchTimeout: time.Minute})
		s.begin(strict)
		expectToken(t, s, "t1", time.Second)
		if got := time.Until(s.Peek().expires); got > 10*time.Second {
			t.Errorf("the token lives for %v more, want 10s at most", got)
		}
	})
}

// Who is refused waits for another token, also in the reserve.
func TestRefusalInTheReserveWaitsForTheNewToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Minute, delay: 100 * time.Millisecond}
		s := newTestSource(t, r)
		s.Warm()
		time.Sleep(55 * time.Second)
		r.setDelay(300 * time.Millisecond)
		expectToken(t, s, "t1", 200*time.Millisecond)
		s.mu.Lock()
		refused := s.current
		s.mu.Unlock()
		if got, _, err := s.other(t.Context(), &refusal{of: refused}); err != nil || got.value != "t2" {
			t.Errorf("other() = %v, %v, want t2", got, err)
		}
	})
}

// A renewal that has not come by the end of the token counts as failed, though the
// token has hardly ended.
func TestNobodyWaitsLongForALateRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: 10 * time.Second, delay: time.Second}
		s := newTestSource(t, r)
		s.Warm()
		time.Sleep(9500 * time.Millisecond)
		r.setFail(outageIn(0, time.Hour).silent(true))
		if got := ask(t.Context(), s); !errors.Is(got.err, context.DeadlineExceeded) || got.waited != 3*time.Second {
			t.Errorf("Token() = %v, want a timeout after three times the usual", got)
		}
	})
}

// A server that answers one of two requests is not silent: it is asked again soon.
func TestServerThatFailsBesideASilentOneIsAskedSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		silent := outageIn(0, time.Hour).silent(true)
		r.fail = func(ctx context.Context, n int) error {
			switch n {
			case 1:
				return silent(ctx, n)
			case 2:
				return errTransient
			}
			return nil
		}
		s := newTestSource(t, r)
		expectToken(t, s, "t3", 2500*time.Millisecond+maxAskedBackoff)
	})
}

// panickingRequester panics before it has made a request.
type panickingRequester struct {
	scriptedRequester
	asked int
}

func (p *panickingRequester) fingerprint(context.Context) string { p.asked++; panic("canary") }

func TestFetchWithoutARequestIsNotRepeatedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := new(panickingRequester)
		s := newTestSource(t, r)
		load(t.Context(), s, 5*time.Millisecond, 10*time.Second)
		synctest.Wait()
		if r.asked > 12 {
			t.Errorf("%d fetches in 10s, want 12 at most", r.asked)
		}
	})
}

// A config that does not run yet, or never will, changes nothing.
func TestSharerThatDoesNotRunChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		running, other := &scriptedRequester{lifetime: time.Hour}, &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, running)
		s.begin(running)
		expectToken(t, s, "t1", 0)
		before := *s.Peek()
		time.Sleep(20 * time.Minute)
		s.attach(other, lifecycle{refreshBefore: 50 * time.Minute, defaultLifetime: time.Minute, fetchTimeout: time.Minute})
		time.Sleep(time.Minute)
		if got := s.Peek(); *got != before {
			t.Errorf("the token has changed: %+v, want %+v", got, before)
		}
		s.drop()
		expectToken(t, s, "t2", 0)
		expectRequests(t, running, 2)
		s.begin(other)
		s.drop()
		expectToken(t, s, "t1", 0)
		expectRequests(t, other, 1)
	})
}

// Nor does it bring about a token request, when it finds the token of a config that was
// unloaded: it is still being loaded, and may be validated only.
func TestSharerThatDoesNotRunFetchesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		former, next := &scriptedRequester{lifetime: time.Minute}, &scriptedRequester{lifetime: time.Minute}
		s := attachedSource(former)
		expectToken(t, s, "t1", 0)
		expectToken(t, s, "t1", 0) // it is wanted again
		s.detach(former, func() {})
		time.Sleep(50 * time.Second) // it is due to be replaced
		s.attach(next, testLife)
		time.Sleep(time.Second)
		expectRequests(t, former, 1)
		expectRequests(t, next, 0)
		s.begin(next)
		expectRequests(t, next, 1)
		destruct(t, s)
	})
}

// The first attempt has had all the time. One that has just begun knows nothing.
func TestErrorOfAFetchThatTimesOut(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			r := &scriptedRequester{lifetime: time.Hour}
			r.fail = func(ctx context.Context, n int) error {
				<-ctx.Done()
				if n == 1 {
					return ctx.Err()
				}
				return errTransient
			}
			s := newTestSource(t, r)
			if got := ask(t.Context(), s); !errors.Is(got.err, context.DeadlineExceeded) {
				t.Fatalf("Token() = %v, want the error of the first attempt", got)
			}
		})
	}
}
