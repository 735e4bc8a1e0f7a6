// A fleet of instances that share a token: simulated, with storages of each kind.

package outboundauth

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
	"github.com/outboundauth/caddy-outbound-auth/internal/shelf"
	"github.com/outboundauth/caddy-outbound-auth/internal/shelftest"
	"github.com/outboundauth/caddy-outbound-auth/internal/vault"
	"github.com/outboundauth/caddy-outbound-auth/internal/verdict"
)

// A fleet has one authorization server, one storage, and instances that share a token.
type fleet struct {
	t       *testing.T
	storage *shelftest.Storage
	vault   *vault.Vault
	nodes   []*node
	life    lifecycle

	mu       sync.Mutex
	lifetime time.Duration // guarded by mu, as all below
	delay    time.Duration // of the server's answers
	down     bool
	requests int
	refused  map[string]bool // tokens that are revoked
	results  map[string]int  // of sharing
	warnings map[string]int
}

// A node is one instance of a fleet.
type node struct {
	unbound
	*fleet
	n      int
	host   string
	shelf  *shelf.Shelf
	source *tokenSource
	cut    bool // from the server; guarded by the fleet's mu
}

func newFleet(t *testing.T, storage *shelftest.Storage, n int) *fleet {
	t.Helper()
	v, err := vault.New([]byte("canary-secret-of-the-fleet"))
	if err != nil {
		t.Fatal(err)
	}
	f := &fleet{
		t: t, storage: storage, vault: v, life: testLife, lifetime: time.Hour, delay: 200 * time.Millisecond,
		refused: make(map[string]bool), results: make(map[string]int), warnings: make(map[string]int),
	}
	f.life.shared = true
	t.Cleanup(func() { time.Sleep(time.Minute) }) // some may still store something
	for range n {
		f.add()
	}
	return f
}

// add starts one more instance.
func (f *fleet) add() *node {
	n := &node{fleet: f, n: len(f.nodes), host: anyHost()}
	n.shelf = shelf.New(f.storage, shelf.News{
		Failed: func(err error) { f.note(f.warnings, err.Error()) }, Back: func() {}, Lockless: func(err error) { f.note(f.warnings, err.Error()) },
	})
	n.source = newTokenSource()
	n.source.attach(n, f.life)
	n.source.begin(n)
	f.t.Cleanup(func() { destruct(f.t, n.source) })
	f.nodes = append(f.nodes, n)
	return n
}

// restart replaces all instances by new ones, which know nothing.
func (f *fleet) restart() {
	n := len(f.nodes)
	for _, old := range f.nodes {
		destruct(f.t, old.source)
	}
	f.nodes = nil
	for range n {
		f.add()
	}
}

func (f *fleet) note(counts map[string]int, what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	counts[what]++
}

// with changes what is guarded.
func (f *fleet) with(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// asked returns how many token requests there were since the last call.
func (f *fleet) asked() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.requests
	f.requests = 0
	return n
}

func (n *node) share(context.Context) *shared {
	return &shared{
		Shelf: n.shelf, vault: n.vault, token: sharedAt + "token", failed: sharedAt + "failed", by: fmt.Sprint(n.n),
		count: func(result string) { n.note(n.results, result) },
		warn:  func(why string) { n.note(n.warnings, why) },
	}
}

func (n *node) locate(context.Context, redact.Secrets) (*url.URL, error) {
	return &url.URL{Scheme: "https", Host: n.host}, nil // each instance has a queue of its own
}

func (n *node) request(ctx context.Context, _ *url.URL, _ *dpop.Key, _ redact.Secrets) (grant, error) {
	sent := time.Now()
	n.mu.Lock()
	n.requests++
	number, delay := n.requests, n.delay
	n.mu.Unlock()
	select {
	case <-time.After(delay):
	case <-ctx.Done():
		return grant{}, &tokenError{Code: codeTimeout}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.down || n.cut {
		return grant{}, (&tokenError{Status: http.StatusServiceUnavailable, Code: codeHTTPStatus}).classify()
	}
	token := fmt.Sprintf("canary-token-%d-%d-%d", n.n, number, sent.UnixNano())
	return grant{accessToken: token, lifetime: n.lifetime, issued: sent, took: time.Since(sent)}, nil
}

func (n *node) fingerprint(context.Context) string { return "secret" }
func (n *node) concurrent() bool                   { return true }
func (n *node) repeatable() bool                   { return true }
func (n *node) describe() description              { return description{name: n.host, endpoint: n.host} }
func (n *node) fetched(*token, *fetchError, int)   {}
func (n *node) token(ctx context.Context) (*token, error) {
	t, _, err := n.source.Token(ctx)
	return t, err
}

// all asks all instances at once. It returns how long the last one waited, and how many got no
// token.
func (f *fleet) all() (longest time.Duration, failed int) {
	return f.each(func(n *node) error {
		_, err := n.token(f.t.Context())
		return err
	})
}

func (f *fleet) each(do func(*node) error) (longest time.Duration, failed int) {
	var mu sync.Mutex
	var callers sync.WaitGroup
	start := time.Now()
	for _, n := range f.nodes {
		callers.Go(func() {
			err := do(n)
			mu.Lock()
			defer mu.Unlock()
			longest = max(longest, time.Since(start))
			if err != nil {
				failed++
			}
		})
	}
	callers.Wait()
	return longest, failed
}

// refuse has all upstreams of all instances refuse the tokens that they have now.
func (f *fleet) refuse() (longest time.Duration, failed int) {
	return f.each(func(n *node) error {
		t := n.source.Peek()
		if t == nil {
			return fmt.Errorf("no token")
		}
		address := dialAddress{"tcp", "10.0.0.1:443"}
		r := &refusal{of: t, Refusal: verdict.Refusal{Token: t.value, InvalidToken: true}}
		fresh, _ := n.source.another(f.t.Context(), address, r)
		if fresh == nil || fresh.is(t) {
			return fmt.Errorf("no other token")
		}
		n.source.settled(r, true, fresh)
		return nil
	})
}

// live asks each instance now and then, for as long as that.
func (f *fleet) live(d, every time.Duration) (failed int) {
	end := time.Now().Add(d)
	_, failed = f.each(func(n *node) error {
		time.Sleep(jitter(every))
		for time.Now().Before(end) {
			if _, err := n.token(f.t.Context()); err != nil {
				return err
			}
			time.Sleep(every)
		}
		return nil
	})
	return failed
}

// storageKinds are storages as they are.
var storageKinds = map[string]struct {
	storage func() *shelftest.Storage
	honest  bool // its locks are
	slow    bool
}{
	"Redis": {func() *shelftest.Storage {
		return &shelftest.Storage{Delay: 2 * time.Millisecond, TTL: 5 * time.Second}
	}, true, false},
	"file system":              {func() *shelftest.Storage { return &shelftest.Storage{Delay: time.Millisecond, TTL: 10 * time.Second} }, true, false},
	"locks that everybody has": {func() *shelftest.Storage { return &shelftest.Storage{Delay: 20 * time.Millisecond, Lies: true} }, false, false},
	"locks that err": {func() *shelftest.Storage {
		return &shelftest.Storage{Delay: 2 * time.Millisecond, Errs: true, TTL: time.Minute}
	}, true, false},
	"DynamoDB": {func() *shelftest.Storage {
		return &shelftest.Storage{Delay: 20 * time.Millisecond, Poll: 5 * time.Second, TTL: 5 * time.Minute}
	}, true, false},
}

func TestFleet(t *testing.T) { //nolint:tparallel // it would wait for all other tests
	for name, kind := range storageKinds {
		for _, size := range []int{50, 500} {
			t.Run(fmt.Sprintf("%s, %d", name, size), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) { simulateFleet(t, kind.storage(), size, kind.honest) })
			})
		}
	}
}

func simulateFleet(t *testing.T, storage *shelftest.Storage, size int, honest bool) {
	f := newFleet(t, storage, size)
	most := 1 // at once
	if !honest {
		most = size
	}
	longest := 2*f.delay + 300*time.Millisecond

	waited, failed := f.all()
	cold := f.asked()
	if cold > most || failed > 0 || waited > longest {
		t.Errorf("cold start: %d token requests, %d without a token, longest wait %v; want %d, none, %v", cold, failed, waited, most, longest)
	}
	time.Sleep(time.Minute)
	waited, failed = f.refuse()
	revoked := f.asked()
	if revoked > most || failed > 0 || waited > longest {
		t.Errorf("all revoked: %d token requests, %d without another, longest wait %v; want %d, none, %v", revoked, failed, waited, most, longest)
	}
	hours := 24
	if !honest && size == 50 {
		hours *= 7 // there is more luck in it
	}
	failed = f.live(time.Duration(hours)*time.Hour, 20*time.Second*time.Duration(size)/50)
	lives := float64(hours) * 60 / 41 // the first of many instances renews it after 68 % of an hour
	day := f.asked()
	limit := 1.1
	if size > 50 && !honest {
		limit = 2
	}
	t.Logf("cold start %d, all revoked %d, %d h %d token requests: %.2f for each life", cold, revoked, hours, day, float64(day)/lives)
	if float64(day) > limit*lives || failed > 0 {
		t.Errorf("%d h: %d token requests, %d instances without a token; want %.1f for each of %.0f lives", hours, day, failed, limit, lives)
	}
	// A restart during an outage.
	f.with(func() { f.down = true })
	f.restart()
	if waited, failed := f.all(); failed > 0 || waited > 300*time.Millisecond {
		t.Errorf("restart with the server down: %d without a token, longest wait %v, want the shared one", failed, waited)
	}
}

// A holder that dies leaves its lock. Those who wait for it go on at different times.
func TestFleetWithADeadHolder(t *testing.T) {
	for _, ttl := range []time.Duration{5 * time.Second, 10 * time.Second, 5 * time.Minute} {
		for _, test := range []struct{ size, most int }{{50, 10}, {500, 60}} {
			synctest.Test(t, func(t *testing.T) {
				storage := &shelftest.Storage{Delay: 2 * time.Millisecond, TTL: ttl}
				storage.Abandon(sharedAt + "token")
				f := newFleet(t, storage, test.size)
				waited, failed := f.all()
				if n := f.asked(); n > test.most || failed > 0 || waited > mostSharedPatience+f.delay+300*time.Millisecond {
					t.Errorf("a lock that lasts %v, %d instances: %d token requests, %d without a token, longest wait %v", ttl, test.size, n, failed, waited)
				}
			})
		}
	}
}

// storageFaults are ways in which a storage fails.
var storageFaults = map[string]func(ctx context.Context, op string) error{
	"refuses": func(context.Context, string) error { return errBroken },
	"hangs":   func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() },
	"is slow": func(context.Context, string) error { time.Sleep(10 * time.Second); return nil },
	"is read-only": func(_ context.Context, op string) error {
		if strings.HasPrefix(op, "load ") {
			return nil
		}
		return errBroken
	},
	"panics": func(context.Context, string) error { panic("canary-panic") },
}

// Whatever the storage does, each instance has a token, as without it.
func TestFleetWithABrokenStorage(t *testing.T) {
	for name, fault := range storageFaults {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const size = 20
				f := newFleet(t, &shelftest.Storage{Fault: fault}, size)
				waited, failed := f.all()
				if n := f.asked(); n != size || failed > 0 || waited > f.delay+time.Second {
					t.Errorf("cold start: %d token requests, %d without a token, longest wait %v", n, failed, waited)
				}
				if len(f.warnings) != 1 {
					t.Errorf("got the warnings %v, want one kind", f.warnings)
				}
				for what, n := range f.warnings {
					if n > size {
						t.Errorf("got %q %d times of %d instances, want once of each", what, n, size)
					}
				}
				// It breaks while all have a token, and works again.
				f.storage.With(nil)
				if failed := f.live(2*time.Hour, 20*time.Second); failed > 0 {
					t.Errorf("the storage works again: %d without a token", failed)
				}
				f.asked()
				if failed := f.live(10*time.Hour, 20*time.Second); failed > 0 || f.asked() > 16 {
					t.Errorf("the storage works again: %d without a token, want that they share", failed)
				}
				f.storage.With(fault)
				if failed := f.live(2*time.Hour, 20*time.Second); failed > 0 {
					t.Errorf("the storage breaks: %d without a token", failed)
				}
				f.storage.With(nil)
				time.Sleep(time.Minute) // whatever hangs
			})
		})
	}
}

// A server that is down is asked by one of them at a time.
func TestFleetInAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 50
		f := newFleet(t, &shelftest.Storage{Delay: 2 * time.Millisecond}, size)
		f.all()
		time.Sleep(40 * time.Minute) // soon it is stale
		f.asked()
		f.with(func() { f.down = true })
		f.restart()
		if failed := f.live(10*time.Minute, time.Second); failed > 0 {
			t.Errorf("stale token, server down: %d without a token", failed)
		}
		stale := f.asked()
		if stale < 5 || stale > 50 {
			t.Errorf("stale token, server down: %d token requests in ten minutes, want few", stale)
		}
		f.with(func() { f.down = false })
		if failed := f.live(time.Minute, time.Second); failed > 0 {
			t.Errorf("server up again: %d without a token", failed)
		}
		up := f.asked()
		if up > 3 {
			t.Errorf("server up again: %d token requests, want about one", up)
		}
		t.Logf("stale token, server down: %d token requests in ten minutes; up again: %d", stale, up)
	})
}

// All wake at different times after a failure, also if the locks lie.
func TestFleetInAnOutageWithoutLocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, &shelftest.Storage{Delay: 2 * time.Millisecond, Lies: true}, 50)
		f.all()
		time.Sleep(40 * time.Minute)
		f.asked()
		f.with(func() { f.down = true })
		if failed := f.live(10*time.Minute, time.Second); failed > 0 {
			t.Errorf("%d without a token", failed)
		}
		n := f.asked()
		t.Logf("%d token requests in ten minutes", n)
		if n > 300 {
			t.Errorf("%d token requests in ten minutes, want some for each failure, and not those of all", n)
		}
		f.with(func() { f.down = false })
		f.live(time.Minute, time.Second)
	})
}

// Without any token, one instance asks after another.
func TestColdFleetInAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, outage = 50, 5 * time.Minute
		alone := newFleet(t, new(shelftest.Storage), 1)
		alone.with(func() { alone.down = true })
		alone.suffer(outage)
		single := alone.asked()
		f := newFleet(t, &shelftest.Storage{Delay: 2 * time.Millisecond}, size)
		f.with(func() { f.down = true })
		f.suffer(outage)
		n := f.asked()
		f.with(func() { f.down = false })
		start := time.Now()
		for {
			if _, failed := f.all(); failed == 0 {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Logf("%d token requests of %d instances in %v, %d of one; up again: all served after %v, %d token requests", n, size, outage, single, time.Since(start), f.asked())
		if n > single*size/2 {
			t.Errorf("%d token requests of %d instances in %v, want less than half of those of as many that share nothing", n, size, outage)
		}
	})
}

// suffer asks each instance each second, whether it has a token or not.
func (f *fleet) suffer(d time.Duration) {
	end := time.Now().Add(d)
	f.each(func(n *node) error {
		time.Sleep(jitter(time.Second))
		for time.Now().Before(end) {
			_, _ = n.token(f.t.Context())
			time.Sleep(time.Second)
		}
		return nil
	})
}

// An instance that has failed itself says why, also while its own failure holds it back.
func TestOwnFailureKeepsItsReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, &shelftest.Storage{Delay: 2 * time.Millisecond}, 1)
		f.all()
		time.Sleep(40 * time.Minute)
		f.with(func() { f.down = true })
		end := time.Now().Add(10 * time.Minute)
		for time.Now().Before(end) {
			if _, err := f.nodes[0].token(t.Context()); err != nil {
				t.Fatal(err)
			}
			f.nodes[0].source.when(func(s *tokenSource, _ time.Time) bool {
				if s.lastErr != nil && !strings.Contains(s.lastErr.Error(), "503") {
					t.Errorf("got the error %v, want that of the server", s.lastErr)
					end = time.Time{}
				}
				return true
			})
			time.Sleep(time.Second)
		}
	})
}

// Those that have no token are held back for two seconds at most: the fault may be that of one
// instance's network.
func TestFleetWithOneBrokenNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, &shelftest.Storage{Delay: 2 * time.Millisecond}, 5)
		broken := f.nodes[0]
		broken.cut = true
		if _, err := broken.token(t.Context()); err == nil {
			t.Error("got a token without a server")
		}
		waited, failed := f.each(func(n *node) error {
			if n == broken {
				return nil
			}
			_, err := n.token(t.Context())
			return err
		})
		if failed > 0 || waited > heldWithoutToken+time.Second+f.delay+300*time.Millisecond {
			t.Errorf("%d of the others without a token, longest wait %v", failed, waited)
		}
		if _, err := broken.token(t.Context()); err != nil {
			t.Errorf("the broken one: %v, want the token of another", err)
		}
	})
}

// One instance is cut off from the server. The others renew their tokens all the same, also if an
// upstream has refused them.
func TestFleetWithOneCutOff(t *testing.T) {
	t.Run("for hours", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t, &shelftest.Storage{Delay: 2 * time.Millisecond}, 10)
			f.all()
			f.with(func() { f.nodes[0].cut = true })
			if failed := f.live(6*time.Hour, time.Second); failed > 0 {
				t.Errorf("%d without a token, want none", failed)
			}
			if n := f.asked(); n > 60 {
				t.Errorf("%d token requests, want few", n)
			}
		})
	})
	t.Run("while a token is refused", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t, &shelftest.Storage{Delay: 2 * time.Millisecond}, 10)
			f.all()
			time.Sleep(time.Minute)
			f.with(func() { f.nodes[0].cut = true })
			old := f.nodes[1].source.Peek()
			refuse := func(n *node) error {
				tok := n.source.Peek()
				if !tok.is(old) {
					return nil
				}
				r := &refusal{of: tok, Refusal: verdict.Refusal{Token: tok.value, InvalidToken: true}}
				if fresh, _ := n.source.another(t.Context(), dialAddress{"tcp", "10.0.0.1:443"}, r); fresh != nil {
					n.source.settled(r, !fresh.is(old), fresh)
				}
				return nil
			}
			_ = refuse(f.nodes[0]) // it is the first to fail
			start := time.Now()
			for !f.renewed(old) && time.Since(start) < time.Minute {
				f.each(refuse)
				time.Sleep(100 * time.Millisecond)
			}
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("the others have another token after %v, want some seconds", took)
			}
		})
	})
}

// renewed reports whether all but the first instance have another token.
func (f *fleet) renewed(old *token) bool {
	for _, n := range f.nodes[1:] {
		if n.source.Peek().is(old) {
			return false
		}
	}
	return true
}

// Who waits for another instance does not spend the time of its token request.
func TestPatienceIsNoTokenTimeout(t *testing.T) {
	for _, timeout := range []time.Duration{time.Second, 2 * time.Second, 10 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			storage := &shelftest.Storage{Delay: 2 * time.Millisecond}
			storage.Abandon(sharedAt + "token")
			f := newFleet(t, storage, 0)
			f.life.fetchTimeout = timeout
			f.add()
			start, failed := time.Now(), 0
			for {
				if _, err := f.nodes[0].token(t.Context()); err == nil {
					break
				}
				if failed++; time.Since(start) > time.Minute {
					break
				}
				time.Sleep(100 * time.Millisecond)
			}
			if took := time.Since(start); took > mostSharedPatience+time.Second {
				t.Errorf("token_timeout %v: a token after %v, %d calls failed before that", timeout, took, failed)
			}
			if n := f.asked(); n != 1 {
				t.Errorf("token_timeout %v: %d token requests, want one", timeout, n)
			}
		})
	}
}

// A failure of another instance holds nobody back beyond the end of its own token.
func TestFailureElsewhereDoesNotOutliveTheToken(t *testing.T) {
	for _, hold := range []time.Duration{30 * time.Second, 5 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t, &shelftest.Storage{Delay: 2 * time.Millisecond}, 1)
			f.with(func() { f.lifetime = time.Minute })
			f.all()
			time.Sleep(30 * time.Second)
			other := *f.nodes[0].share(t.Context())
			other.by = "another"
			other.storeFailure(t.Context(), time.Now().Add(hold))
			if failed := f.live(10*time.Minute, 100*time.Millisecond); failed > 0 {
				t.Errorf("held for %v: no token, want that the server is asked before the end", hold)
			}
		})
	}
}

// What is wrong here concerns nobody else.
func TestOwnFaultIsNotShared(t *testing.T) {
	for name, test := range map[string]struct {
		err  error
		want bool
	}{
		"server":        {(&tokenError{Status: http.StatusServiceUnavailable, Code: codeHTTPStatus}).classify(), true},
		"network":       {&tokenError{Code: codeNetwork}, true},
		"refused":       {(&tokenError{Status: http.StatusUnauthorized, Code: "invalid_client"}).classify(), false},
		"a setting":     {&settingError{wrong: "nothing is left of it", todo: "raise max_lifetime"}, false},
		"a slow file":   {&tokenError{Code: codeTimeout, local: true}, false},
		"another's":     {failedElsewhere("as.example.com", "1", time.Now().Add(time.Minute)), false},
		"configuration": {configurationError("as.example.com", errBroken), false},
		"panic":         {errBroken, false},
	} {
		if got := isOfServer(&fetchError{err: test.err}); got != test.want {
			t.Errorf("%s: shared %t, want %t", name, got, test.want)
		}
	}
}

// An operator who renews wants this instance to ask.
func TestRenewAsksTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		storage := &shelftest.Storage{Delay: 2 * time.Millisecond}
		f := newFleet(t, storage, 2)
		f.nodes[0].token(t.Context()) //nolint:errcheck // see below
		f.asked()
		go f.nodes[1].token(t.Context()) //nolint:errcheck // its fetch looks while the operator comes
		got, err := f.nodes[1].source.FetchNow(t.Context())
		if err != nil || got.grant.taken || f.asked() != 1 {
			t.Errorf("FetchNow() = %v, taken %t, want a token request", err, got != nil && got.grant.taken)
		}
	})
}

// A token that is taken out of use does not come back by a fetch that was looking meanwhile.
func TestForgetDuringALook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, new(shelftest.Storage), 2)
		f.nodes[0].token(t.Context()) //nolint:errcheck // the count below says it
		f.asked()
		time.Sleep(time.Minute)
		f.storage.With(func(_ context.Context, op string) error {
			switch {
			case strings.HasPrefix(op, "load "):
				time.Sleep(100 * time.Millisecond)
			case strings.HasPrefix(op, "delete "):
				return errBroken // the record stays
			}
			return nil
		})
		time.AfterFunc(50*time.Millisecond, func() { wantError(t, f.nodes[1].source.Forget(t.Context()), "others may still take it") })
		got, err := f.nodes[1].token(t.Context())
		if err != nil || got.grant.taken || f.asked() != 1 {
			t.Errorf("Token() = %v, taken %t, want a token request", err, got != nil && got.grant.taken)
		}
	})
}

// An operator who takes a token out of use is told if others may still take it.
func TestForgetTellsWhatIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, new(shelftest.Storage), 1)
		f.all()
		time.Sleep(time.Minute)
		f.storage.With(func(_ context.Context, op string) error {
			if strings.HasPrefix(op, "delete ") {
				return errBroken
			}
			return nil
		})
		wantError(t, f.nodes[0].source.Forget(t.Context()), "others may still take it")
		if f.nodes[0].source.Peek() != nil {
			t.Error("the token is still in use here")
		}
		f.storage.With(nil)
		time.Sleep(time.Minute)
		if _, err := f.nodes[0].token(t.Context()); err != nil || f.asked() != 2 {
			t.Errorf("Token() = %v, want a new one, and not what was taken out of use", err)
		}
	})
}
