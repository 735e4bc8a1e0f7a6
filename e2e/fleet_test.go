package e2e

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// fleetBinary builds Caddy with a storage in Redis.
var fleetBinary = sync.OnceValues(func() (string, error) {
	to := filepath.Join(os.TempDir(), "fleet-caddy")
	return to, build(to, "fleet", ".")
})

// A fleet is several gateways with one storage, one client and one upstream.
type fleet struct {
	as       *authServer
	client   client
	upstream *upstream
	front    *front
	gateways []*gateway
	site     string
}

// A front stands before the authorization server, and can fail.
type front struct {
	*httptest.Server
	down atomic.Bool
}

func newFront(t *testing.T, as *authServer) *front {
	t.Helper()
	to, err := url.Parse(as.issuer)
	if err != nil {
		t.Fatal(err)
	}
	f := new(front)
	proxy := httputil.NewSingleHostReverseProxy(to)
	proxy.ErrorLog = log.New(io.Discard, "", 0) // gateways die
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f.down.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	closeAtEnd(t, f.Server)
	return f
}

// A storageSetting is a global option of Caddy.
type storageSetting func(t *testing.T) string

func inFiles(t *testing.T) string { return "storage file_system " + t.TempDir() }

func inRedis(t *testing.T) string { return "storage e2e_redis " + startRedis(t, freeAddress(t)).addr }

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// startRedis starts a Redis that keeps nothing on disk.
func startRedis(t *testing.T, addr string) *debianServer {
	t.Helper()
	_, port, _ := net.SplitHostPort(addr)
	s := &debianServer{addr: addr, args: []string{
		debianPath(t, "usr/bin/redis-server"), "--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no", "--dir", t.TempDir(),
	}}
	s.start(t)
	return s
}

// newFleet returns a fleet without a gateway. The server answers after delay.
func newFleet(t *testing.T, delay time.Duration) *fleet {
	t.Helper()
	as := startAuthServer(t, time.Minute)
	as.delay(t, delay)
	f := &fleet{as: as, client: client{ID: "canary-fleet", Method: "client_secret_basic", Secret: "canary-secret-of-the-fleet"}, front: newFront(t, as)}
	as.register(t, f.client)
	f.upstream = newUpstream(t, as, f.client)
	f.site = strings.Replace(proxy{to: f.upstream.serve(t), as: as, client: f.client, extra: []string{"share_tokens"}}.String(),
		"token_url "+as.issuer, "token_url "+f.front.URL, 1)
	return f
}

// start starts one more gateway.
func (f *fleet) start(t *testing.T, storage string) *gateway {
	t.Helper()
	binary, err := fleetBinary()
	if err != nil {
		t.Fatal(err)
	}
	gw := startGateway(t, gatewayConfig{site: f.site, options: storage, binary: binary, env: []string{"E2E_SECRET=" + f.client.Secret}})
	f.gateways = append(f.gateways, gw)
	return gw
}

func startFleet(t *testing.T, storage string, n int) *fleet {
	t.Helper()
	f := newFleet(t, 300*time.Millisecond)
	for range n {
		f.start(t, storage)
	}
	return f
}

// ask asks gateways at once, each twice.
func (f *fleet) ask(t *testing.T, gateways ...*gateway) (longest time.Duration) {
	t.Helper()
	var mu sync.Mutex
	var requests sync.WaitGroup
	for _, gw := range gateways {
		for range 2 {
			requests.Go(func() {
				start := time.Now()
				resp, err := http.Get(gw.url)
				if err != nil {
					t.Errorf("%v", err)
					return
				}
				resp.Body.Close()
				if resp.StatusCode != http.StatusOK {
					t.Errorf("got %s, want 200", resp.Status)
				}
				mu.Lock()
				defer mu.Unlock()
				longest = max(longest, time.Since(start))
			})
		}
	}
	requests.Wait()
	return longest
}

// wantShown fails the test unless one gateway shows that it has asked for the token, and all
// others that they have taken it.
func (f *fleet) wantShown(t *testing.T) {
	t.Helper()
	shown := make(map[string]int)
	for _, gw := range f.gateways {
		var clients []struct{ Shared string }
		getJSON(t, "http://"+gw.admin+"/oauth2/clients", &clients)
		for _, c := range clients {
			shown[c.Shared]++
		}
	}
	if shown["own"] != 1 || shown["taken"] != len(f.gateways)-1 {
		t.Errorf("the gateways show %v, want one own and %d taken", shown, len(f.gateways)-1)
	}
}

// restart ends a gateway, and starts it again.
func (f *fleet) restart(t *testing.T, gateways ...*gateway) {
	t.Helper()
	for _, gw := range gateways {
		gw.stop()
		gw.startAgain(t, f.client)
	}
	for _, gw := range gateways {
		await(t, "gateway", func() bool {
			conn, err := net.Dial("tcp", strings.TrimPrefix(gw.url, "http://"))
			if err == nil {
				conn.Close()
			}
			return err == nil
		})
	}
}

// TestFleet counts the token requests of several gateways that share a token.
func TestFleet(t *testing.T) { //nolint:tparallel // nine gateways that start would disturb those who measure times
	for name, storage := range map[string]storageSetting{"file system": inFiles, "Redis": inRedis} {
		for _, n := range []int{2, 3} {
			t.Run(fmt.Sprintf("%s, %d gateways", name, n), func(t *testing.T) {
				t.Parallel()
				f := startFleet(t, storage(t), n)
				all, first := f.gateways, f.gateways[0]
				for _, step := range []struct {
					name   string
					do     func()
					tokens int
				}{
					{"cold start", func() { f.ask(t, all...) }, 1},
					{"all tokens revoked", func() { f.upstream.revoke(); f.ask(t, all...) }, 2},
					{"one restarted", func() { f.restart(t, first); f.ask(t, first) }, 2},
					{"all restarted, server down", func() { f.front.down.Store(true); f.restart(t, all...); f.ask(t, all...) }, 2},
					{"one reloaded", func() { f.front.down.Store(false); first.reload(t, "header X-Generation 2\n"+f.site); f.ask(t, all...) }, 2},
					{"revoked again", func() { f.upstream.revoke(); f.ask(t, first); f.ask(t, all...) }, 3},
				} {
					start := time.Now()
					step.do()
					got := f.as.stats(t).Granted[f.client.ID]
					if step.name == "cold start" {
						f.wantShown(t)
					}
					t.Logf("%s: %v, %d token requests", step.name, time.Since(start).Round(time.Millisecond), got)
					if got != step.tokens {
						t.Errorf("%s: %d token requests so far, want %d", step.name, got, step.tokens)
					}
				}
				for _, gw := range all {
					for _, secret := range append(f.upstream.tokensSeen(), f.client.Secret) {
						if strings.Contains(gw.output.String(), secret) {
							t.Error("the log has a secret or a token")
						}
					}
				}
			})
		}
	}
}

// TestFleetLosesAnInstance kills the gateway that asks for the first token.
func TestFleetLosesAnInstance(t *testing.T) { //nolint:tparallel // nine gateways that start would disturb those who measure times
	for name, storage := range map[string]storageSetting{"file system": inFiles, "Redis": inRedis} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const slow = 3 * time.Second
			f := newFleet(t, slow)
			setting := storage(t)
			first := f.start(t, setting)
			time.Sleep(time.Second)
			second := f.start(t, setting)
			if got := f.as.stats(t).Granted[f.client.ID]; got != 0 {
				t.Fatalf("%d token requests, want that the first one still asks", got)
			}
			first.kill()
			waited := f.ask(t, second)
			t.Logf("the holder of the lock was killed: the other one was served after %v", waited)
			if waited > 6*time.Second+slow+time.Second {
				t.Errorf("got %v, want 6 s and the time of the server at most", waited)
			}
			if got := f.as.stats(t).Granted[f.client.ID]; got > 2 {
				t.Errorf("%d token requests, want those of both at most", got)
			}
		})
	}
}

// TestFleetReloads reloads a gateway that asks for a token.
func TestFleetReloads(t *testing.T) { //nolint:tparallel // nine gateways that start would disturb those who measure times
	for name, storage := range map[string]storageSetting{"file system": inFiles, "Redis": inRedis} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			setting := storage(t)
			f := startFleet(t, setting, 2)
			f.as.delay(t, 800*time.Millisecond) // requests whose token was refused wait for a second
			f.ask(t, f.gateways...)
			f.upstream.revoke()
			done := make(chan struct{})
			go func() { defer close(done); f.ask(t, f.gateways[0]) }()
			time.Sleep(300 * time.Millisecond)
			f.gateways[0].reload(t, "header X-Generation 2\n"+f.site)
			<-done
			f.ask(t, f.gateways...)
			if got := f.as.stats(t).Granted[f.client.ID]; got != 2 {
				t.Errorf("%d token requests, want one before and one beside the reload", got)
			}
			if dir, ok := strings.CutPrefix(setting, "storage file_system "); ok {
				await(t, "no lock", func() bool {
					locks, _ := filepath.Glob(filepath.Join(dir, "locks", "*oauth2*"))
					return len(locks) == 0
				})
			}
		})
	}
}

// TestFleetWithoutItsStorage stops and starts Redis under load.
func TestFleetWithoutItsStorage(t *testing.T) {
	addr := freeAddress(t)
	storage := startRedis(t, addr)
	f := startFleet(t, "storage e2e_redis "+addr, 2)
	f.ask(t, f.gateways...)
	var loads sync.WaitGroup
	for _, gw := range f.gateways {
		loads.Go(func() { load{url: gw.url, rate: 100, duration: 20 * time.Second}.run().wantAll(t) })
	}
	time.Sleep(3 * time.Second)
	storage.kill()
	time.Sleep(2 * time.Second)
	f.upstream.revoke()
	time.Sleep(5 * time.Second)
	startRedis(t, addr)
	loads.Wait()
	for _, gw := range f.gateways {
		if n := strings.Count(gw.output.String(), "the storage of share_tokens fails"); n != 1 {
			t.Errorf("got %d warnings, want one", n)
		}
	}
}
