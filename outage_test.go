package outboundauth

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/replaytest"
)

// theSource is the only token source of the running config.
func theSource(t *testing.T) *tokenSource {
	t.Helper()
	found := sourceList()
	if len(found) != 1 {
		t.Fatalf("got %d token sources, want 1", len(found))
	}
	return found[0]
}

// when asks a source something at this instant.
func (s *tokenSource) when(is func(*tokenSource, time.Time) bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return is(s, time.Now())
}

// backOff has a failed source try again that much later.
func (s *tokenSource) backOff(by time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastErr = &fetchError{s.lastErr.err, s.lastErr.retryAt.Add(by), s.lastErr.soonest.Add(by)}
}

// No client notices that a token has been revoked, however busy the gateway.
func TestTokenRevokedUnderLoad(t *testing.T) {
	const requests, every = 1500, 2 * time.Millisecond
	g, auth, up := gateAndFakes(t, "")
	eventually(t, func() bool { return cached() == 1 }, "the token of the warm-up")
	body := string(replaytest.Pattern(10_000))
	replies := make([]reply, requests)
	tick := time.NewTicker(every) // the load, not a way to wait
	defer tick.Stop()
	var wg sync.WaitGroup
	for i := range replies {
		<-tick.C
		if i == requests/2 {
			auth.revoke()
		}
		wg.Go(func() {
			if i%2 == 0 {
				replies[i] = g.get()
			} else {
				replies[i] = g.send(http.MethodPost, "/", strings.NewReader(body))
			}
		})
	}
	wg.Wait()
	wantAll(t, replies, http.StatusOK)
	auth.wantAsked(t, 2)
	all := up.got()
	if len(all) <= requests {
		t.Errorf("got %d requests at the upstream, want more than %d: some were refused", len(all), requests)
	}
	for _, got := range all {
		if got.method == http.MethodPost && (got.body != body || got.bodyErr != nil) {
			t.Fatalf("got a body of %d bytes, err %v, want all %d", len(got.body), got.bodyErr, len(body))
		}
	}
}

// rotation is an authorization server that knows one secret, and a file with
// that of the gateway.
type rotation struct {
	t     *testing.T
	file  string
	known atomic.Pointer[string]
	old   atomic.Int32 // refused requests
}

func newRotation(t *testing.T, auth *authServer, file, known string, refused func()) *rotation {
	t.Helper()
	r := &rotation{t: t, file: filepath.Join(t.TempDir(), "secret")}
	r.write(file)
	r.known.Store(&known)
	auth.script(func(w http.ResponseWriter, req tokenRequest) bool {
		if req.secret != *r.known.Load() {
			r.old.Add(1)
			if refused != nil {
				refused()
			}
			return refusing(http.StatusUnauthorized, `{"error":"invalid_client"}`)(w, req)
		}
		fmt.Fprintf(w, `{"access_token":%q,"token_type":"Bearer","expires_in":2}`, auth.issue(req.client))
		return true
	})
	return r
}

// write replaces the file as one that is read at any time has to be.
func (r *rotation) write(secret string) {
	if err := os.WriteFile(r.file+".new", []byte(secret), 0o600); err != nil {
		r.t.Error(err)
	}
	if err := os.Rename(r.file+".new", r.file); err != nil {
		r.t.Error(err)
	}
}

func (r *rotation) site(up *upstream, auth *authServer) string {
	return strings.Replace(proxySite(up, auth, ""), "canary-secret", "{file."+r.file+"}", 1)
}

func TestRotatedSecretFailsNoRequest(t *testing.T) {
	for _, late := range []bool{false, true} { // a renewal with the old secret has failed before
		t.Run(fmt.Sprint("late: ", late), func(t *testing.T) {
			auth := newAuthServer(t)
			up := newUpstream(t, auth)
			var r *rotation
			r = newRotation(t, auth, "old", "old", func() { r.write("new") })
			g := startGateway(t, r.site(up, auth))
			g.get().want(t, http.StatusOK)
			rotated := "new"
			r.known.Store(&rotated) // while there is a token
			if !late {
				r.write("new")
			}
			eventually(t, func() bool {
				g.get().want(t, http.StatusOK)
				return len(auth.asked())-int(r.old.Load()) >= 3
			}, "two tokens for the new secret")
			want := int32(0)
			if late {
				want = 1
			}
			if got := r.old.Load(); got != want {
				t.Errorf("got %d requests with the old secret after its end, want %d", got, want)
			}
		})
	}
}

// A new secret ends the back-off that the old one is to blame for.
func TestNewSecretEndsTheBackoffAtOnce(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	r := newRotation(t, auth, "old", "new", nil)
	g := startGateway(t, r.site(up, auth))
	refused := g.get().want(t, http.StatusServiceUnavailable)
	if seconds, _ := strconv.Atoi(refused.header.Get("Retry-After")); seconds < 4 {
		t.Errorf("got Retry-After %q, want the whole back-off", refused.header.Get("Retry-After"))
	}
	g.get().want(t, http.StatusServiceUnavailable)
	// Looking at the file is limited; this is about the first look.
	source := theSource(t)
	eventually(t, func() bool { return source.when((*tokenSource).checkDue) }, "that the file may be read again")
	source.backOff(time.Hour) // which nobody waits for
	r.write("new")
	g.get().want(t, http.StatusOK)
	auth.wantAsked(t, 2)
}

// So does a secret that comes after the config. What was missing is told where somebody
// looks, and by nobody but the gateway.
func TestSecretThatComesLateEndsTheBackoffAtOnce(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	r := newRotation(t, auth, "", "late", nil)
	if err := os.Remove(r.file); err != nil {
		t.Fatal(err)
	}
	g := startGateway(t, r.site(up, auth))
	missing := "client_secret: {file." + r.file + "} does not exist"
	about := []string{`"client":"`, `"token_endpoint":"` + mustParse(auth.URL).Host + `"`, `"client_id":"gateway"`}
	if got := g.logged(append(about, `"level":"warn"`, missing+": create the file, or correct its path; until then, no token can be requested")...); len(got) != 1 {
		t.Errorf("got %d warnings that the file is missing, want one: %q", len(got), got)
	}
	for _, comes := range []string{"", "late"} { // an editor may create it first
		g.get().want(t, http.StatusServiceUnavailable)
		source := theSource(t)
		eventually(t, func() bool { return source.when((*tokenSource).checkDue) }, "that the file may be read again")
		source.backOff(time.Hour) // which nobody waits for
		r.write(comes)
	}
	g.get().want(t, http.StatusOK)
	auth.wantAsked(t, 1)
	for _, want := range []string{missing + " (create the file", "{file." + r.file + "} is empty (write the value into the file"} {
		eventually(t, func() bool { return len(g.logged("obtaining token failed", want)) > 0 }, "%q in the log", want)
	}
	if got := g.logged("placeholder: failed to read file"); len(got) > 0 {
		t.Errorf("got %q, want no line of Caddy's own beside that", got)
	}
}

// An outage of the authorization server that outlasts the token is nobody
// else's: each request is tried once, and no upstream is taken for down.
func TestOutageBeyondTheTokensLife(t *testing.T) {
	auth := newAuthServer(t)
	a, b := newUpstream(t, auth), newUpstream(t, auth)
	brief := func(w http.ResponseWriter, r tokenRequest) bool {
		fmt.Fprintf(w, `{"access_token":%q,"token_type":"Bearer","expires_in":1}`, auth.issue(r.client))
		return true
	}
	auth.script(brief)
	g := startGateway(t, expand(`reverse_proxy $A $B {
		lb_policy round_robin
		lb_retries 3
		fail_duration 30s
		unhealthy_status 5xx
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret s
		}
	}`, "$A", a.addr, "$B", b.addr, "$AUTH", auth.URL))
	g.get().want(t, http.StatusOK)
	auth.script(refusing(http.StatusServiceUnavailable, "down"))
	sent := 1
	eventually(t, func() bool { sent++; return g.get().status != http.StatusOK }, "the end of the token")
	for range 30 {
		r := g.get().want(t, http.StatusServiceUnavailable)
		if seconds, err := strconv.Atoi(r.header.Get("Retry-After")); err != nil || seconds < 1 {
			t.Fatalf("got Retry-After %q, want seconds", r.header.Get("Retry-After"))
		}
		sent++
	}
	if got := len(g.logged("upstream roundtrip")); got != sent {
		t.Errorf("got %d attempts for %d requests, want one each", got, sent)
	}

	auth.script(brief)
	source := theSource(t)
	eventually(t, func() bool { return !source.when((*tokenSource).backingOff) }, "the end of the back-off")
	before := [2]int{len(a.got()), len(b.got())}
	for range 4 {
		g.get().want(t, http.StatusOK)
	}
	for i, up := range []*upstream{a, b} {
		if got := len(up.got()) - before[i]; got != 2 {
			t.Errorf("got %d of 4 requests at upstream %d, want half of them", got, i)
		}
	}
	if got := g.logged("no upstreams available"); len(got) != 0 {
		t.Errorf("got %q, want that both upstreams are up all the time", got)
	}
}

// What reverse_proxy retries by itself multiplies neither the token requests
// nor the attempts: only the first has a second one with another token.
func TestRetriesOfTheProxyDoNotMultiplyRenewals(t *testing.T) {
	const retries = 2
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		t.Run(method, func(t *testing.T) {
			auth := newAuthServer(t)
			up := newUpstream(t, nil)
			up.script(func(w http.ResponseWriter, r *http.Request) bool {
				up.record(r)
				refuse(w, http.StatusUnauthorized)
				return true
			})
			g := startGateway(t, expand("reverse_proxy $UP {\nlb_retries $N\nlb_try_interval 1ms\nrequest_buffers 1KiB\n"+
				"lb_retry_match {\nexpression `{rp.status_code} == 401`\n}\n"+
				"transport oauth2 {\ntoken_url $AUTH/token\nclient_id gateway\nclient_secret s\n}\n}",
				"$UP", up.addr, "$AUTH", auth.URL, "$N", strconv.Itoa(retries)))
			most, before := 0, 0
			for range 30 {
				g.send(method, "/", strings.NewReader("body")).want(t, http.StatusUnauthorized)
				now := len(up.got())
				most, before = max(most, now-before), now
			}
			if limit := retries + 1 + 1; most > limit || most < retries+1 {
				t.Errorf("got up to %d attempts for a request, want at most %d and at least %d", most, limit, retries+1)
			}
			if got := len(auth.asked()); got > 3 {
				t.Errorf("got %d token requests for 30 refused requests, want a handful", got)
			}
			for _, got := range up.got() {
				if got.body != "body" {
					t.Fatalf("got the body %q, want it whole each time", got.body)
				}
			}
		})
	}
}

// chaos is an authorization server that may do anything, and checks that it is
// not asked too early: only a new secret ends a back-off before its time.
type chaos struct {
	scriptedRequester
	mended  atomic.Bool
	version atomic.Int32 // of the secret

	// Guarded by the requester's mu.
	noBefore           time.Time
	looked, failedWith string // at and with which secret; "": whatever it is
	early              int
}

func (c *chaos) fingerprint(context.Context) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.looked = fmt.Sprint("secret ", c.version.Load())
	return c.looked
}

func newChaos() *chaos {
	c := &chaos{scriptedRequester: scriptedRequester{lifetime: time.Minute}}
	c.told = func(_ *token, err *fetchError, _ int) {
		c.noBefore, c.failedWith = time.Time{}, ""
		if err != nil {
			c.noBefore = err.soonest
		}
		if err != nil && isPermanent(err) {
			c.failedWith = c.looked
		}
	}
	c.fail = func(ctx context.Context, _ int) error {
		c.mu.Lock()
		if time.Now().Before(c.noBefore) && (c.failedWith == "" || c.looked == c.failedWith) {
			c.early++
		}
		c.mu.Unlock()
		if c.mended.Load() {
			return nil
		}
		select {
		case <-time.After(rand.N(12 * time.Second)): // longer than fetchTimeout, sometimes
		case <-ctx.Done():
			return ctx.Err()
		}
		switch rand.N(4) {
		case 0:
			return errTransient
		case 1:
			return &scriptedError{permanent: rand.N(4) == 0, after: rand.N(20 * time.Second)}
		}
		return nil
	}
	return c
}

// An hour in which everything happens to a source. The bubble reports a
// goroutine that does not end.
func TestSourceSurvivesAnHourOfChaos(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newChaos()
		s := attachedSource(c)
		var wg sync.WaitGroup
		var served, left, failed, invalidated, calls atomic.Int32
		for range 3600 * 2 {
			time.Sleep(rand.N(time.Second))
			switch rand.N(100) {
			case 0:
				if tok := s.Peek(); tok != nil {
					invalidated.Add(1)
					wg.Go(func() { s.refuse(t.Context(), tok) })
				}
			case 1:
				s.attach(c, testLife)
				s.begin(c)
			case 2:
				if !s.when(func(s *tokenSource, _ time.Time) bool { return s.unused() }) {
					s.detach(c, func() {})
				}
			case 3:
				s.Warm()
			case 4:
				c.version.Add(1)
			}
			calls.Add(1)
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second+rand.N(15*time.Second))
				defer cancel()
				start := time.Now()
				tok, _, err := s.Token(ctx)
				if waited := time.Since(start); waited > testLife.fetchTimeout {
					t.Errorf("got an answer after %v, want it within %v", waited, testLife.fetchTimeout)
				}
				switch _, isOurs := errors.AsType[*fetchError](err); {
				case err == nil:
					served.Add(1)
					if !time.Now().Before(tok.expires) {
						t.Errorf("got a token that ended %v ago, want a valid one", time.Since(tok.expires))
					}
				case isOurs:
					failed.Add(1)
				case errors.Is(err, ctx.Err()):
					left.Add(1)
				default:
					t.Errorf("got %v, want a *fetchError or that of the context", err)
				}
			})
		}
		wg.Wait()
		asked := len(c.requests())
		t.Logf("%d calls: %d served, %d failed, %d left; %d invalidations, %d token requests",
			calls.Load(), served.Load(), failed.Load(), left.Load(), invalidated.Load(), asked)
		if c.early > 0 {
			t.Errorf("got %d of %d token requests within a back-off, want none", c.early, asked)
		}
		if served.Load() == 0 || failed.Load() == 0 || left.Load() == 0 || asked > int(calls.Load())/5 {
			t.Errorf("got %d served, %d failed, %d left and %d token requests for %d calls, want some of each and few requests",
				served.Load(), failed.Load(), left.Load(), asked, calls.Load())
		}

		c.mended.Store(true)
		time.Sleep(maxPermanentBackoff)
		if _, _, err := s.Token(t.Context()); err != nil {
			t.Errorf("got %v after all is well again, want a token", err)
		}
		destruct(t, s)
	})
}

// heap is what is in use after everything that is not has been collected.
func heap() int64 {
	for range 3 { // finalizers, and the pools' victims
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// Whatever goes wrong around the gateway, nothing accumulates in it.
func TestFaultsLeaveNothingBehind(t *testing.T) {
	const clients, requests = 20, 2000
	auth := newAuthServer(t)
	auth.Config.ErrorLog = discardLog
	auth.script(func(w http.ResponseWriter, r tokenRequest) bool {
		switch rand.N(8) {
		case 0:
			w.WriteHeader(http.StatusServiceUnavailable)
		case 1:
			return refusing(http.StatusBadRequest, `{"error":"invalid_client"}`)(w, r)
		case 2:
			_, _ = io.WriteString(w, strings.Repeat("not JSON ", 10_000))
		case 3:
			panic(http.ErrAbortHandler)
		case 4:
			<-r.ctx.Done() // until the gateway gives up
		default:
			fmt.Fprintf(w, `{"access_token":%q,"token_type":"Bearer","expires_in":1}`, auth.issue(r.client))
		}
		return true
	})
	up := newUpstream(t, nil)
	up.script(func(w http.ResponseWriter, r *http.Request) bool { // and record nothing
		if rand.N(3) == 0 {
			refuse(w, http.StatusUnauthorized) // with the body unread
			return true
		}
		_, _ = io.Copy(io.Discard, r.Body)
		return true
	})
	var site strings.Builder
	for i := range clients {
		fmt.Fprintf(&site, "handle /%d {\n%s\n}\n", i, strings.Replace(proxySite(up, auth, "token_timeout 200ms"), "client_id gateway", fmt.Sprint("client_id c", i), 1))
	}
	g := startGateway(t, site.String())
	long := string(replaytest.Pattern(2 * defaultReplayBody))
	seen := make(map[int]int)
	run := func(n int) {
		var mu sync.Mutex
		var wg sync.WaitGroup
		for worker := range 20 {
			wg.Go(func() {
				for i := range n / 20 {
					body := long[:rand.N(len(long))]
					if rand.N(4) > 0 {
						body = ""
					}
					r := g.send(http.MethodPost, fmt.Sprint("/", (worker+i)%clients), strings.NewReader(body))
					mu.Lock()
					seen[r.status]++
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		g.client.CloseIdleConnections()
		eventually(t, func() bool { return len(goroutines()) == 0 }, "no goroutine but timers, which are none")
		auth.mu.Lock()
		auth.requests = nil // what the fakes keep is not the gateway's
		clear(auth.live)
		auth.mu.Unlock()
	}
	run(requests / 5) // what is made once: connections, buffers, pools
	before := heap()
	run(requests)
	after := heap()
	t.Logf("answers by status: %v; heap %d KiB before, %d KiB after", seen, before>>10, after>>10)
	if grown := after - before; grown > 4<<20 {
		t.Errorf("got %d KiB more on the heap after %d requests, want hardly any", grown>>10, requests)
	}
	for status := range seen {
		switch status {
		case http.StatusOK, http.StatusUnauthorized, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		default:
			t.Errorf("got %d answers with status %d, want none", seen[status], status)
		}
	}
	if seen[http.StatusOK] == 0 || seen[http.StatusUnauthorized]+seen[http.StatusServiceUnavailable] == 0 {
		t.Errorf("got answers %v, want successes and failures", seen)
	}
	g.stop()
	wantNothingLeft(t)
}
