package outboundauth

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// foe is a requester whose every move is scripted.
type foe struct {
	unbound
	host, path, id string
	life           time.Duration
	found          time.Duration // how long locate takes
	looks          time.Duration // how long fingerprint takes
	secret         func() string
	answer         func(ctx context.Context, n int) error // nil: a token after 100 ms
	told           func(*fetchError)

	n atomic.Int64
}

func (f *foe) locate(ctx context.Context, _ redact.Secrets) (*url.URL, error) {
	if f.found > 0 {
		if err := pause(ctx, f.found, nil); err != nil {
			return nil, err
		}
	}
	return &url.URL{Scheme: "https", Host: f.host, Path: f.path}, nil
}

func (f *foe) fingerprint(ctx context.Context) string {
	if f.looks > 0 {
		_ = pause(ctx, f.looks, nil)
	}
	if f.secret != nil {
		return f.secret()
	}
	return "secret"
}
func (f *foe) concurrent() bool      { return true }
func (f *foe) repeatable() bool      { return true }
func (f *foe) describe() description { return description{name: "client " + f.id, ClientID: f.id} }
func (f *foe) fetched(_ *token, err *fetchError, _ int) {
	if err != nil && f.told != nil {
		f.told(err)
	}
}

func (f *foe) request(ctx context.Context, _ *url.URL, _ *dpop.Key, _ redact.Secrets) (grant, error) {
	sent := time.Now()
	n := int(f.n.Add(1))
	if f.answer != nil {
		if err := f.answer(ctx, n); err != nil {
			return grant{}, err
		}
	} else if err := pause(ctx, 100*time.Millisecond, nil); err != nil {
		return grant{}, timedOutError()
	}
	return grant{accessToken: fmt.Sprintf("%s-%d", f.id, n), lifetime: f.life, issued: sent, took: time.Since(sent)}, nil
}

func timedOutError() error { return &tokenError{Code: codeTimeout, Description: "no answer in time"} }

func statusError(status int) error {
	return (&tokenError{Code: codeHTTPStatus, Status: status}).classify()
}

func failWith(err error) func(context.Context, int) error {
	return func(context.Context, int) error { return err }
}

// hang answers nothing until ctx ends.
func hang(ctx context.Context, _ int) error { <-ctx.Done(); return timedOutError() }

// queueOf returns the queue of a host.
func queueOf(host string) *queue { return queues.of(&url.URL{Scheme: "https", Host: host}, host) }

// occupy fills all slots of a host for d, without an end of their own.
func occupy(host string, d time.Duration) {
	q := queueOf(host)
	var slots []*slot
	for {
		s, ok := q.extra("occupant")
		if !ok {
			break
		}
		slots = append(slots, s)
	}
	time.AfterFunc(d, func() {
		for _, s := range slots {
			s.release()
		}
	})
}

func wantIdle(t *testing.T, host string) {
	t.Helper()
	q := queueOf(host)
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.server.Idle() || q.crowded() || q.timer != nil || len(q.failed) > 0 {
		t.Errorf("idle %t, awaited %d, others %d, timer %t, reminders %d; want nothing left",
			q.server.Idle(), q.awaited.Len(), q.others.Len(), q.timer != nil, len(q.failed))
	}
}

// A token in its reserve serves callers while the renewal waits for its turn.
func TestAttackReserveWhileQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &foe{host: anyHost(), id: "a", life: 100 * time.Second}
		s := newTestSource(t, f)
		tok, _, err := s.Token(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Until(tok.refreshAt.Add(-time.Second)))
		occupy(f.host, 60*time.Second)
		time.Sleep(time.Until(tok.usableTo.Add(time.Second))) // in the reserve
		t.Logf("%v left, median %v", time.Until(tok.expires), s.usual.median())
		for range 3 {
			since := time.Now()
			_, got, err := s.Token(t.Context())
			if took := time.Since(since); err != nil || took > time.Second {
				t.Errorf("%v, %v after %v; want the token that is valid, soon", got.use, err, took)
			}
			time.Sleep(500 * time.Millisecond)
		}
		time.Sleep(2 * time.Minute)
		wantIdle(t, f.host)
	})
}

// A caller whose token has expired while the renewal was queued gets the token of the
// request that is under way.
func TestAttackExpiredWhileQueued(t *testing.T) {
	for ms := 500; ms < 9000; ms += 730 {
		synctest.Test(t, func(t *testing.T) {
			f := &foe{host: anyHost(), id: "a", life: 100 * time.Second}
			s := newTestSource(t, f)
			tok, _, err := s.Token(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			f.answer = func(ctx context.Context, _ int) error { return pause(ctx, 400*time.Millisecond, nil) }
			time.Sleep(time.Until(tok.refreshAt.Add(-time.Second)))
			occupy(f.host, time.Until(tok.expires.Add(time.Second+time.Duration(ms)*time.Millisecond)))
			time.Sleep(time.Until(tok.refreshAt))
			_, _, _ = s.Token(t.Context()) // the renewal is queued
			time.Sleep(time.Until(tok.expires.Add(time.Second)))
			since := time.Now()
			_, got, err := s.Token(t.Context())
			if err != nil {
				t.Errorf("slot after %d ms: use %v, %v after %v; want the new token", ms, got.use, err, time.Since(since))
			}
			time.Sleep(time.Minute)
		})
	}
}

// Two clients that never get a token keep to their back-off while 200 others renew.
func TestAttackRevival(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host := anyHost()
		outage := time.Now().Add(70 * time.Second)
		broken := []*foe{{host: host, id: "x", answer: failWith(statusError(503))}, {host: host, id: "y", answer: failWith(statusError(503))}}
		for _, f := range broken {
			newTestSource(t, f).Warm()
		}
		ctx, cancel := context.WithCancel(t.Context())
		for i := range 200 {
			s := newTestSource(t, &foe{host: host, id: fmt.Sprint(i), life: time.Minute, answer: func(ctx context.Context, _ int) error {
				if now := time.Now(); now.Before(outage) && now.After(outage.Add(-10*time.Second)) {
					return statusError(503)
				}
				return pause(ctx, 100*time.Millisecond, nil)
			}})
			go func() {
				time.Sleep(time.Duration(i) * time.Minute / 200)
				for ctx.Err() == nil {
					_, _, _ = s.Token(ctx)
					time.Sleep(time.Second)
				}
			}()
		}
		time.Sleep(2 * time.Minute)
		before := broken[0].n.Load()
		time.Sleep(5 * time.Minute)
		n := broken[0].n.Load() - before
		t.Logf("%d requests of one broken client in 5 minutes", n)
		if n > 60 {
			t.Errorf("%d token requests of one broken client in 5 minutes that nobody asks, want about 20", n)
		}
		cancel()
		time.Sleep(20 * time.Second)
	})
}

// A request waits token_timeout in all.
func TestAttackTimeInAll(t *testing.T) {
	for _, f := range []*foe{
		{looks: 6 * time.Second, answer: hang},
		{looks: 6 * time.Second, found: 6 * time.Second},
		{found: 6 * time.Second, answer: hang},
	} {
		for _, occupied := range []time.Duration{0, 3 * time.Second, 8 * time.Second} {
			synctest.Test(t, func(t *testing.T) {
				f.host, f.id, f.life = anyHost(), "a", time.Hour
				s := newTestSource(t, f)
				if occupied > 0 {
					occupy(f.host, f.looks+f.found+occupied)
				}
				since := time.Now()
				_, _, err := s.Token(t.Context())
				if took := time.Since(since); took > defaultTokenTimeout {
					t.Errorf("fingerprint %v, lookup %v, queue %v: %v after %v, want %v at most", f.looks, f.found, occupied, err, took, defaultTokenTimeout)
				}
				time.Sleep(time.Minute)
			})
		}
	}
}

// A fetch that got its turn after a reload uses the new config.
func TestAttackReloadWhileQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host := anyHost()
		before, after := &foe{host: host, id: "a", life: time.Hour}, &foe{host: host, id: "a", life: time.Hour}
		s := newTokenSource()
		t.Cleanup(func() { destruct(t, s) })
		life := testLife
		s.attach(before, life)
		s.begin(before)
		occupy(host, time.Minute)
		s.Warm()
		time.Sleep(time.Second)
		s.attach(after, life)
		s.begin(after)
		s.detach(before, func() {})
		s.Warm()
		time.Sleep(2 * time.Minute)
		if before.n.Load() != 0 || after.n.Load() != 1 {
			t.Errorf("%d token requests of the config that has ended, %d of the new one; want 0 and 1", before.n.Load(), after.n.Load())
		}
		wantIdle(t, host)
	})
}

// A source that nobody uses leaves no reminder.
func TestAttackReminderOfUnusedSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &foe{host: anyHost(), id: "a", answer: failWith(statusError(503))}
		s := attachedSource(f)
		s.detach(f, func() { _ = s.Destruct() })
		_, _, _ = s.Token(t.Context()) // Caddy may serve requests after it has unloaded their config
		time.Sleep(2 * afterlife)
		wantIdle(t, f.host)
	})
}

// Neither does one that has moved to another origin.
func TestAttackReminderAfterMove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := anyHost()
		f := &foe{host: first, id: "a", life: time.Hour, answer: failWith(statusError(503))}
		s := newTestSource(t, f)
		_, _, _ = s.Token(t.Context())
		moved := &foe{host: anyHost(), id: "a", life: time.Hour}
		s.attach(moved, testLife)
		s.begin(moved)
		time.Sleep(3 * time.Second)
		if _, _, err := s.Token(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantIdle(t, first)
	})
}

// Tenants of one server may have one client_id in each realm.
func TestAttackOneClientIDInManyRealms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host := anyHost()
		var all []*foe
		var asked atomic.Int64
		for i := range 100 {
			f := &foe{host: host, path: fmt.Sprintf("/realms/%d/token", i), id: "gateway", answer: func(context.Context, int) error {
				asked.Add(1)
				return statusError(503)
			}}
			all = append(all, f)
			newTestSource(t, f).Warm()
		}
		_ = all
		time.Sleep(10 * time.Second)
		if !queueOf(host).status().heldBack {
			t.Errorf("100 realms get no token, and the server does not count as failing")
		}
		if n := asked.Load(); n > 130 {
			t.Errorf("%d token requests in 10 s of an outage, want 10 a second", n)
		}
	})
}

// What is not about the network, and no 5xx, is no failure of the server.
func TestAttackWhoIsToBlame(t *testing.T) {
	for name, err := range map[string]error{
		"wrong path, HTML":        &tokenError{Code: codeInvalidResponse, Status: 200, Description: "the answer is not a JSON object"},
		"token_type DPoP":         &tokenError{Code: codeInvalidResponse, Status: 200, Description: "token_type is not Bearer"},
		"404 of a realm that was": &tokenError{Code: codeHTTPStatus, Status: 404}, // discovery: mayHaveMoved, not permanent
	} {
		synctest.Test(t, func(t *testing.T) {
			host := anyHost()
			for i := range 2 {
				_, _, _ = newTestSource(t, &foe{host: host, id: fmt.Sprint(i), answer: failWith(err)}).Token(t.Context())
			}
			if queueOf(host).status().heldBack {
				t.Errorf("%s: two such clients, and the server counts as failing", name)
			}
		})
	}
}

// Clients that always fail, by their own settings, cost the others next to nothing.
func TestAttackBrokenTenants(t *testing.T) {
	for _, broken := range []int{0, 2, 20, 100} {
		for name, answer := range map[string]func(context.Context, int) error{
			"refused": failWith(&tokenError{Code: codeNetwork}), "hung": hang,
		} {
			synctest.Test(t, func(t *testing.T) {
				host := anyHost()
				ctx, cancel := context.WithCancel(t.Context())
				var failed, slow, all atomic.Int64
				ask := func(s *tokenSource, counts bool) {
					for ctx.Err() == nil {
						since := time.Now()
						_, _, err := s.Token(ctx)
						if counts && ctx.Err() == nil {
							all.Add(1)
							if err != nil {
								failed.Add(1)
							} else if time.Since(since) > 500*time.Millisecond {
								slow.Add(1)
							}
						}
						time.Sleep(time.Second)
					}
				}
				for i := range 20 {
					s := newTestSource(t, &foe{host: host, id: fmt.Sprint(i), life: time.Minute})
					go func() { time.Sleep(rand.N(time.Minute)); ask(s, true) }()
				}
				for i := range broken {
					s := newTestSource(t, &foe{host: host, id: fmt.Sprint("broken", i), answer: answer})
					go func() { time.Sleep(rand.N(time.Second)); ask(s, false) }()
				}
				time.Sleep(10 * time.Minute)
				// The phases are random. If those that have not failed did not go first, 5 % would fail beside 100.
				if broken == 0 && failed.Load() > 0 || broken <= 20 && failed.Load() > all.Load()/200 || failed.Load() > all.Load()/50 {
					t.Errorf("%d %s: of %d requests of healthy clients, %d failed and %d were slow", broken, name, all.Load(), failed.Load(), slow.Load())
				}
				cancel()
				time.Sleep(20 * time.Second)
			})
		}
	}
}

// Nasty histories: in the end, all have a token, and nothing is left.
func TestAttackHistories(t *testing.T) {
	for seed := range uint64(2) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			host := anyHost()
			var mu sync.Mutex
			busy, capacity, mode := 0, 1+r.IntN(30), 0
			answer := func(ctx context.Context, n int) error {
				mu.Lock()
				m, crowded := mode, busy >= capacity
				if !crowded {
					busy++
				}
				mu.Unlock()
				if !crowded {
					defer func() { mu.Lock(); busy--; mu.Unlock() }()
				}
				switch {
				case m == 1 || m == 2 && n%2 == 0:
					return statusError(503)
				case m == 3 && n%2 == 0:
					return hang(ctx, n)
				case m == 4:
					e := &tokenError{Code: codeHTTPStatus, Status: 429, retryAfter: 300 * time.Second}
					return e.classify()
				case crowded:
					return statusError(429)
				}
				if err := pause(ctx, 100*time.Millisecond, nil); err != nil {
					return timedOutError()
				}
				return nil
			}
			type one struct {
				s *tokenSource
				f *foe
			}
			life := testLife
			clients := make([]one, 200)
			for i := range clients {
				f := &foe{host: host, id: fmt.Sprint(i), life: 2 * time.Second * time.Duration(1+r.IntN(100)), answer: answer}
				s := newTokenSource()
				s.attach(f, life)
				s.begin(f)
				s.Warm()
				clients[i] = one{s, f}
			}
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			for i := range 300 {
				r := rand.New(rand.NewPCG(seed, uint64(i+2)))
				wg.Go(func() {
					for ctx.Err() == nil {
						s := clients[r.IntN(len(clients))].s // its requester changes
						ctx, cancel := context.WithTimeout(ctx, time.Duration(1+r.IntN(3000))*time.Millisecond)
						if r.IntN(20) == 0 {
							_, _ = s.FetchNow(ctx)
						} else {
							since := time.Now()
							_, _, _ = s.Token(ctx)
							if took := time.Since(since); took > defaultTokenTimeout {
								t.Errorf("a request waited for %v", took)
							}
						}
						cancel()
						time.Sleep(time.Duration(r.IntN(500)) * time.Millisecond)
					}
				})
			}
			for range 60 { // modes, reloads
				time.Sleep(time.Duration(r.IntN(3000)) * time.Millisecond)
				mu.Lock()
				mode = r.IntN(5)
				if mode == 4 && r.IntN(4) > 0 {
					mode = 0
				}
				mu.Unlock()
				for i := range clients {
					if r.IntN(3) > 0 {
						continue
					}
					c := &clients[i]
					f := &foe{host: host, id: c.f.id, life: c.f.life, answer: answer}
					if r.IntN(2) == 0 { // the old one goes first, and is abandoned
						c.s.detach(c.f, func() {})
						c.s.attach(f, life)
						c.s.begin(f)
					} else {
						c.s.attach(f, life)
						c.s.begin(f)
						c.s.detach(c.f, func() {})
					}
					c.s.Warm()
					c.f = f
				}
			}
			mu.Lock()
			mode = 0
			mu.Unlock()
			since := time.Now()
			got := make([]bool, len(clients))
			for missing := len(clients); missing > 0 && time.Since(since) < 10*time.Minute; time.Sleep(50 * time.Millisecond) {
				for i, c := range clients {
					if !got[i] && c.s.Peek() != nil {
						got[i] = true
						missing--
					}
				}
			}
			took := time.Since(since)
			missing := 0
			for _, ok := range got {
				if !ok {
					missing++
				}
			}
			t.Logf("seed %d, capacity %d: all after %v, %d missing", seed, capacity, took, missing)
			if missing > 0 {
				t.Errorf("%d have no token", missing)
			}
			cancel()
			wg.Wait()
			for _, c := range clients {
				c.s.detach(c.f, func() {})
				if c.s.end != nil {
					_ = c.s.Destruct()
				}
			}
			time.Sleep(20 * time.Second)
			wantIdle(t, host)
			time.Sleep(2 * afterlife)
		})
	}
}

// A secret that changes while the request is queued is tried once.
func TestAttackSecretChangesWhileQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var secret atomic.Value
		secret.Store("old")
		f := &foe{host: anyHost(), id: "a", life: time.Hour, secret: func() string { return secret.Load().(string) }, answer: failWith(statusError(401))}
		s := newTestSource(t, f)
		occupy(f.host, 5*time.Second)
		s.Warm()
		time.Sleep(time.Second)
		secret.Store("new")
		time.Sleep(5 * time.Second)
		for range 10 {
			_, _, _ = s.Token(t.Context())
			time.Sleep(200 * time.Millisecond)
		}
		if n := f.n.Load(); n != 1 {
			t.Errorf("%d token requests with the same wrong secret, want 1", n)
		}
	})
}

// A placeholder that panics when the turn comes ends the fetch, and not the server.
func TestAttackPanicWhileQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var looked atomic.Int64
		f := &foe{host: anyHost(), id: "a", life: time.Hour, secret: func() string {
			if looked.Add(1) > 1 {
				panic("secret")
			}
			return "secret"
		}}
		s := newTestSource(t, f)
		occupy(f.host, 5*time.Second)
		if _, _, err := s.Token(t.Context()); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("Token() = %v, want an error that does not show the value of the panic", err)
		}
		time.Sleep(5 * time.Second)
	})
}

// One client with an endless Retry-After, in a crowd.
func TestAttackOneTenantThrottled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host := anyHost()
		e := (&tokenError{Code: codeHTTPStatus, Status: 429, retryAfter: 1e6 * time.Hour}).classify()
		for i := range 2 {
			newTestSource(t, &foe{host: host, id: fmt.Sprint("bad", i), answer: failWith(e)}).Warm()
		}
		time.Sleep(time.Second)
		var sources []*tokenSource
		for i := range 50 {
			sources = append(sources, newTestSource(t, &foe{host: host, id: fmt.Sprint(i), life: time.Hour}))
		}
		errs, took := askAll(t.Context(), sources)
		for i, err := range errs {
			if err != nil || took[i] > 3*time.Second {
				t.Errorf("client %d: %v after %v", i, err, took[i])
			}
		}
		time.Sleep(time.Minute)
		wantIdle(t, host)
	})
}

// Callers don't pile up at a server that tells everybody to wait.
func TestAttackHeldBackCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host := anyHost()
		e := (&tokenError{Code: codeHTTPStatus, Status: 503, retryAfter: 5 * time.Minute}).classify()
		var sources []*tokenSource
		for i := range 100 {
			sources = append(sources, newTestSource(t, &foe{host: host, id: fmt.Sprint(i), answer: failWith(e)}))
		}
		_, took := askAll(t.Context(), sources)
		n := 0
		for _, d := range took {
			if d > 2*time.Second {
				n++
			}
		}
		if n > 0 {
			t.Errorf("%d of 100 requests waited for longer than 2 s at a server that answers 503 with Retry-After", n)
		}
		time.Sleep(6 * time.Minute)
	})
}
