package outboundauth

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// crowdServer is an authorization server that takes a few requests at a time. It answers
// 429 to the others, at once.
type crowdServer struct {
	host       string
	takes      int
	answers    time.Duration
	retryAfter time.Duration // that the 429 names; 0: none

	mu      sync.Mutex
	down    bool // answers 503 to all
	silent  map[int]bool
	busy    int
	asked   []time.Time    // all requests
	refused map[int]bool   // who was told 429
	told    int            // how often
	most    int            // how many were busy at once
	granted map[int]string // the tokens
	order   []int          // who was granted one, in this order
}

func newCrowdServer(takes int) *crowdServer {
	return &crowdServer{
		host: anyHost(), takes: takes, answers: 100 * time.Millisecond, retryAfter: time.Second,
		refused: make(map[int]bool), granted: make(map[int]string), silent: make(map[int]bool),
	}
}

// anyHost returns a host of which no queue knows anything.
func anyHost() string { return strings.ToLower(rand.Text()) + ".example" }

// crowdClient is one of the clients of a crowdServer: the requester of its source.
type crowdClient struct {
	unbound
	*crowdServer
	n int
}

func (c crowdClient) locate(context.Context, redact.Secrets) (*url.URL, error) {
	return &url.URL{Scheme: "https", Host: c.host}, nil
}

func (c crowdClient) fingerprint(context.Context) string { return "secret" }
func (c crowdClient) concurrent() bool                   { return true }
func (c crowdClient) repeatable() bool                   { return true }
func (c crowdClient) describe() description {
	return description{name: fmt.Sprint("client ", c.n), ClientID: fmt.Sprint(c.n)}
}
func (c crowdClient) fetched(*token, *fetchError, int) {}

func (c crowdClient) request(ctx context.Context, _ *url.URL, _ *dpop.Key, _ redact.Secrets) (grant, error) {
	sent := time.Now()
	c.mu.Lock()
	c.asked = append(c.asked, sent)
	down, silent, crowded := c.down, c.silent[c.n], c.busy >= c.takes
	if !down && !silent && crowded {
		c.refused[c.n] = true
		c.told++
	}
	serves := !down && !silent && !crowded
	if serves {
		c.busy++
		c.most = max(c.most, c.busy)
	}
	c.mu.Unlock()
	switch {
	case silent:
		<-ctx.Done()
		return grant{}, ctx.Err()
	case down:
		return grant{}, (&tokenError{Code: codeHTTPStatus, Status: http.StatusServiceUnavailable}).classify()
	case crowded:
		return grant{}, (&tokenError{Code: codeHTTPStatus, Status: http.StatusTooManyRequests, retryAfter: c.retryAfter}).classify()
	}
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.busy--
	}()
	if err := pause(ctx, c.answers, nil); err != nil {
		return grant{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	value := fmt.Sprintf("token %d of %d", len(c.order), c.n)
	c.granted[c.n] = value
	c.order = append(c.order, c.n)
	return grant{accessToken: value, lifetime: time.Hour, issued: sent, took: time.Since(sent)}, nil
}

// take makes the server take so many requests at a time from now on.
func (c *crowdServer) take(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.takes = n
}

func (c *crowdServer) requests() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.asked)
}

// crowd returns the sources of n clients.
func (c *crowdServer) crowd(t *testing.T, n int) []*tokenSource {
	sources := make([]*tokenSource, n)
	for i := range sources {
		sources[i] = newTestSource(t, crowdClient{crowdServer: c, n: i})
	}
	return sources
}

// askAll asks each source for its token at once. It returns the errors, and how long it
// took until each had been answered.
func askAll(ctx context.Context, sources []*tokenSource) (errs []error, took []time.Duration) {
	errs, took = make([]error, len(sources)), make([]time.Duration, len(sources))
	since := time.Now()
	var all sync.WaitGroup
	for i, s := range sources {
		all.Go(func() {
			_, _, errs[i] = s.Token(ctx)
			took[i] = time.Since(since)
		})
	}
	all.Wait()
	return errs, took
}

// waitForAll waits until all have a token, and returns how long that took.
func waitForAll(sources []*tokenSource, limit time.Duration) time.Duration {
	since := time.Now()
	for time.Since(since) < limit && slices.ContainsFunc(sources, func(s *tokenSource) bool { return s.Peek() == nil }) {
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(since)
}

// A gateway that starts with 300 clients of a server that takes 20 requests at a time, for
// 100 ms each: at best, this takes 1.5 s. Half as much is allowed beside that, and a
// second for those who are told 429.
func TestManyClientsStart(t *testing.T) {
	const best = 1500 * time.Millisecond
	for name, test := range map[string]struct {
		retryAfter time.Duration
		asks       bool // a request comes for each
	}{
		"requests, Retry-After":    {time.Second, true},
		"requests, no Retry-After": {0, true},
		"Retry-After":              {time.Second, false},
		"no Retry-After":           {0, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server := newCrowdServer(20)
				server.retryAfter = test.retryAfter
				sources := server.crowd(t, 300)
				since := time.Now()
				for _, s := range sources {
					s.Warm()
				}
				if test.asks {
					errs, _ := askAll(t.Context(), sources)
					for i, err := range errs {
						if err != nil && !server.refused[i] {
							t.Errorf("client %d: %v, and it was not told 429", i, err)
						}
					}
				}
				waitForAll(sources, time.Minute)
				took := time.Since(since)
				if most := best*3/2 + time.Second; took > most {
					t.Errorf("all have a token after %v, want %v at most", took, most)
				}
				if n := len(server.asked); server.told*10 > n {
					t.Errorf("%d of %d token requests were told 429, want a tenth at most", server.told, n)
				}
				t.Logf("%v, %d token requests, %d times 429, %d at once", took, len(server.asked), server.told, server.most)
			})
		})
	}
}

// While the server gives nobody a token, its clients try in turn. When it is back, all get
// theirs soon.
func TestManyClientsInAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newCrowdServer(20)
		server.down = true
		sources := server.crowd(t, 300)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var callers sync.WaitGroup
		served := make([]time.Time, len(sources))
		for i, s := range sources {
			s.Warm()
			callers.Go(func() {
				time.Sleep(time.Duration(i) * time.Second / 300)
				for {
					asked := time.Now()
					_, _, err := s.Token(ctx)
					if err == nil {
						served[i] = time.Now()
						return
					}
					if waited := time.Since(asked); waited > 2*time.Second {
						t.Errorf("client %d waited for %v, and the server is down", i, waited)
					}
					time.Sleep(time.Until(asked.Add(time.Second)))
					if ctx.Err() != nil {
						return
					}
				}
			})
		}
		time.Sleep(30 * time.Second)
		server.mu.Lock()
		if n := len(server.asked); n > 350 {
			t.Errorf("%d token requests in an outage of 30 s, want 350 at most", n)
		}
		t.Logf("%d token requests in the outage", len(server.asked))
		server.down = false
		server.mu.Unlock()
		back := time.Now()
		const best = 1500 * time.Millisecond
		took := waitForAll(sources, time.Minute)
		if took > best*3/2 {
			t.Errorf("all have a token %v after the server is back, want %v at most", took, best*3/2)
		}
		time.Sleep(time.Second)
		cancel()
		callers.Wait()
		latest := slices.MaxFunc(served, time.Time.Compare)
		t.Logf("all have a token after %v, and are served after %v; %d times 429", took, latest.Sub(back), server.told)
	})
}

// A client that the server never answers is in nobody's way.
func TestSilentClientsAreInNobodysWay(t *testing.T) {
	for silent := range 3 {
		synctest.Test(t, func(t *testing.T) {
			server := newCrowdServer(100)
			for i := range silent {
				server.silent[i] = true
			}
			sources := server.crowd(t, 52)
			errs, took := askAll(t.Context(), sources)
			for i, err := range errs {
				if server.silent[i] {
					continue
				}
				if err != nil || took[i] > 600*time.Millisecond {
					t.Errorf("%d silent: client %d: %v after %v", silent, i, err, took[i])
				}
			}
		})
	}
}

// Even as many as there are slots let the others go on after a while.
func TestManySilentClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newCrowdServer(100)
		for i := range 20 {
			server.silent[i] = true
		}
		errs, took := askAll(t.Context(), server.crowd(t, 100))
		for i, err := range errs[20:] {
			if err != nil || took[i+20] > 8*time.Second {
				t.Errorf("client %d: %v after %v", i+20, err, took[i+20])
			}
		}
	})
}

// Those for which a request waits go before those that are only warmed up.
func TestRequestsGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newCrowdServer(300)
		sources := server.crowd(t, 300)
		for _, s := range sources {
			s.Warm()
		}
		synctest.Wait()
		for _, last := range []int{299, 150, 299} { // the third time, it has its token
			since := time.Now()
			_, _, err := sources[last].Token(t.Context())
			if took := time.Since(since); err != nil || took > 250*time.Millisecond {
				t.Errorf("client %d: %v after %v, want its token soon", last, err, took)
			}
		}
		time.Sleep(time.Minute)
	})
}

// A request waits for token_timeout, the turns of others included. That is no failure of
// its client: no error is noted, and the token is fetched when it is its turn.
func TestRequestThatWaitsForItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newCrowdServer(300)
		server.answers = 2400 * time.Millisecond
		sources := server.crowd(t, 300)
		errs, took := askAll(t.Context(), sources)
		var late []int
		for i, err := range errs {
			if err == nil {
				continue
			}
			late = append(late, i)
			if took[i] != defaultTokenTimeout || statusOf(err) != http.StatusGatewayTimeout {
				t.Errorf("client %d: %v (%d) after %v, want 504 after %v", i, err, statusOf(err), took[i], defaultTokenTimeout)
			}
			if status, _ := sources[i].statusAlone(time.Now()); status.failures > 0 || status.err != nil || !status.fetching {
				t.Errorf("client %d: %d failures, %v, fetching %t; want none, and that it keeps its place", i, status.failures, status.err, status.fetching)
			}
		}
		if len(late) < 100 {
			t.Errorf("%d requests were late, want more", len(late))
		}
		time.Sleep(time.Minute)
		for _, i := range late {
			if sources[i].Peek() == nil {
				t.Errorf("client %d has no token at last", i)
			}
		}
	})
}

// Neither does an operator wait for longer who has a token renewed.
func TestRenewalThatWaitsForItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newCrowdServer(300)
		server.answers = 2400 * time.Millisecond
		sources := server.crowd(t, 300)
		since := time.Now()
		var callers sync.WaitGroup
		for i, s := range sources {
			callers.Go(func() {
				_, err := s.FetchNow(t.Context())
				took := time.Since(since)
				if took > defaultTokenTimeout || err != nil && (took < defaultTokenTimeout || !errors.Is(err, context.DeadlineExceeded)) {
					t.Errorf("client %d: %v after %v, want a token, or a timeout after %v", i, err, took, defaultTokenTimeout)
				}
			})
		}
		callers.Wait()
		time.Sleep(time.Minute)
	})
}

// Nor does one who began to wait while the endpoint was looked up, by a config with more time.
func TestRenewalThatWaitsForItsTurnAfterALookUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &foe{host: anyHost(), id: "a", life: time.Hour, found: 20 * time.Second}
		patient := &foe{host: f.host, id: "a", life: time.Hour, found: 20 * time.Second}
		s := newTokenSource()
		t.Cleanup(func() { destruct(t, s) })
		s.attach(patient, lifecycle{defaultLifetime: time.Hour, fetchTimeout: time.Minute})
		s.begin(patient)
		s.Warm()
		synctest.Wait()
		s.attach(f, testLife)
		s.begin(f)
		s.detach(patient, func() {})
		occupy(f.host, 10*time.Minute)
		since := time.Now()
		_, err := s.FetchNow(t.Context())
		if took := time.Since(since); !errors.Is(err, context.DeadlineExceeded) || took > 22*time.Second {
			t.Errorf("FetchNow() = %v after %v, want a timeout about when the look-up has ended", err, took)
		}
	})
}

// A request that comes while the server gives nobody a token does not wait for its turn.
func TestNobodyWaitsForATurnInAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newCrowdServer(20)
		server.down = true
		errs, took := askAll(t.Context(), server.crowd(t, 100))
		for i, err := range errs {
			if took[i] > 2*time.Second || statusOf(err) != http.StatusServiceUnavailable {
				t.Errorf("client %d: %v (%d) after %v, want 503 within 2 s", i, err, statusOf(err), took[i])
			}
		}
		time.Sleep(20 * time.Second)
	})
}

// One client that has to wait for long is alone with that. If two have to, one of the
// others tries each second, and the first token ends that.
func TestRetryAfterOfOneClientAndOfTwo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newCrowdServer(0)
		server.retryAfter = 5 * time.Minute
		sources := server.crowd(t, 20)
		first, others := sources[:1], sources[1:]
		_, _ = askAll(t.Context(), first)
		server.take(20)
		errs, took := askAll(t.Context(), others[:5])
		for i, err := range errs {
			if err != nil || took[i] != server.answers {
				t.Errorf("client %d: %v after %v, and only another one has to wait", i+1, err, took[i])
			}
		}
		server.take(0)
		_, _ = askAll(t.Context(), others[5:7])
		before := server.requests()
		for _, s := range others[7:] {
			s.Warm()
		}
		time.Sleep(5*time.Second + 50*time.Millisecond)
		if n := server.requests() - before; n != 5 {
			t.Errorf("%d token requests in 5 s, want one each second", n)
		}
		server.take(20)
		time.Sleep(time.Second + 2*server.answers)
		for i, s := range others[7:] {
			if n := i + 8; s.Peek() == nil && !server.refused[n] {
				t.Errorf("client %d has no token, and the server gives some again", n)
			}
		}
		if n := server.requests() - before; n != len(others[7:]) {
			t.Errorf("%d token requests, want one of each client", n)
		}
	})
}

// A client whose first token request has failed keeps no slot for the time in which another
// one goes on beside it.
func TestFailedAttemptGivesItsSlotBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newCrowdServer(100)
		others := server.crowd(t, 20)
		const slow = 4
		var callers sync.WaitGroup
		for i := range slow { // the slow ones and their second attempts have all eight slots
			s := newTokenSource()
			s.attach(fallingClient{crowdClient{crowdServer: server, n: 100 + i}, new(atomic.Int64)}, lifecycle{fetchTimeout: 5 * time.Second})
			t.Cleanup(func() { destruct(t, s) })
			callers.Go(func() { _, _, _ = s.Token(t.Context()) })
		}
		time.Sleep(2100 * time.Millisecond) // the first attempts failed 100 ms ago
		errs, took := askAll(t.Context(), others)
		for i, err := range errs {
			if err != nil || took[i] > time.Second {
				t.Errorf("client %d: %v after %v, want its token within a second", i, err, took[i])
			}
		}
		callers.Wait()
	})
}

// fallingClient is a client whose first token request fails after two seconds. The server
// does not answer the others.
type fallingClient struct {
	crowdClient
	asked *atomic.Int64
}

func (c fallingClient) request(ctx context.Context, _ *url.URL, _ *dpop.Key, _ redact.Secrets) (grant, error) {
	if c.asked.Add(1) > 1 {
		<-ctx.Done()
		return grant{}, ctx.Err()
	}
	return grant{}, pause(ctx, 2*time.Second, &tokenError{Code: codeNetwork})
}
