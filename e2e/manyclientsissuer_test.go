package e2e

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// manyIssuer is an authorization server with many clients. It may take only so many
// token requests at a time, be out, and never answer some of its clients. Its clients
// are c0, c1 and so on.
type manyIssuer struct {
	url        string
	takes      time.Duration // for a token
	life       time.Duration // of a token
	limit      int           // how many requests it takes at a time; 0: any number
	retryAfter string        // what it tells those that are too many; "": nothing

	mu       sync.Mutex // guards all below
	busy     int
	out      bool
	silent   map[string]bool // the clients that get no answer
	requests []manyRequest
	owners   map[string]string // of the tokens
	ends     map[string]time.Time
	refused  int // requests to the upstream with another client's token, an old one, or none
}

// manyRequest is a token request as the server sees it.
type manyRequest struct {
	client       string
	at, answered time.Time
	status       int // 0: it got no answer
}

func newManyIssuer(t *testing.T, i *manyIssuer) *manyIssuer {
	t.Helper()
	i.silent, i.owners, i.ends = make(map[string]bool), make(map[string]string), make(map[string]time.Time)
	srv := httptest.NewServer(i)
	closeAtEnd(t, srv)
	i.url = srv.URL
	return i
}

func (i *manyIssuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// Only a server that has read the body notices that the client has left.
	io.Copy(io.Discard, r.Body)
	id, _, _ := r.BasicAuth()
	id, _ = url.QueryUnescape(id)
	n, status := i.take(id)
	if status == 0 {
		<-r.Context().Done()
		return
	}
	token := ""
	if status == http.StatusOK {
		time.Sleep(i.takes)
		token = id + "." + rand.Text()
	}
	i.mu.Lock()
	i.requests[n].answered, i.requests[n].status = time.Now(), status
	if token != "" {
		i.busy--
		// The upstream has to know the token before the gateway does.
		i.owners[token], i.ends[token] = id, time.Now().Add(i.life)
	}
	i.mu.Unlock()
	switch {
	case token != "":
		answerJSON(w, status, map[string]any{"access_token": token, "token_type": "Bearer", "expires_in": int(i.life.Seconds())})
	case status == http.StatusTooManyRequests:
		if i.retryAfter != "" {
			w.Header().Set("Retry-After", i.retryAfter)
		}
		answerToken(w, status, "slow_down", "too many at a time")
	default:
		http.Error(w, "out of order", status)
	}
}

// take notes a token request. It returns its number and what it is to be answered with,
// 0 if it gets no answer.
func (i *manyIssuer) take(id string) (n, status int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	n = len(i.requests)
	i.requests = append(i.requests, manyRequest{client: id, at: time.Now()})
	switch {
	case i.silent[id]:
		return n, 0
	case i.out:
		return n, http.StatusServiceUnavailable
	case i.limit > 0 && i.busy >= i.limit:
		return n, http.StatusTooManyRequests
	}
	i.busy++
	return n, http.StatusOK
}

// setOut has the server go out or come back, and returns when.
func (i *manyIssuer) setOut(out bool) time.Time {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.out = out
	return time.Now()
}

// silence has a client get no answer from now on.
func (i *manyIssuer) silence(client string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.silent[client] = true
}

// asked returns how many token requests there were.
func (i *manyIssuer) asked() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.requests)
}

// all returns the token requests so far.
func (i *manyIssuer) all() manyRequests {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Clone(i.requests)
}

// owner returns whose token that is; "" if it is nobody's any more.
func (i *manyIssuer) owner(token string) string {
	i.mu.Lock()
	defer i.mu.Unlock()
	if time.Now().After(i.ends[token]) {
		return ""
	}
	return i.owners[token]
}

func (i *manyIssuer) upstreamRefused() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.refused
}

// serveUpstream starts an upstream. What is below the path of a client wants its token.
func (i *manyIssuer) serveUpstream(t *testing.T) string {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, client, _ := strings.Cut(r.URL.Path, "/t")
		client, _, _ = strings.Cut(client, "/")
		token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
		if i.owner(token) == manyClient(client) || strings.HasPrefix(r.URL.Path, "/plain/") {
			return
		}
		i.mu.Lock()
		defer i.mu.Unlock()
		i.refused++
		w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
		http.Error(w, "no live token of this client", http.StatusUnauthorized)
	}))
	closeAtEnd(t, srv)
	return srv.Listener.Addr().String()
}

// manyClient is the client of a route.
func manyClient[N string | int](n N) string { return fmt.Sprint("c", n) }

// manyRequests are in the order in which they came.
type manyRequests []manyRequest

// with returns how many were answered with that status.
func (all manyRequests) with(status int) (n int) {
	for _, r := range all {
		if r.status == status {
			n++
		}
	}
	return n
}

// told returns the clients that got that status.
func (all manyRequests) told(status int) map[string]bool {
	clients := make(map[string]bool)
	for _, r := range all {
		if r.status == status {
			clients[r.client] = true
		}
	}
	return clients
}

// complete returns when the last of n clients got its first token; zero if one has none.
func (all manyRequests) complete(n int) (last time.Time) {
	first := make(map[string]time.Time)
	for _, r := range all {
		if at, ok := first[r.client]; r.status == http.StatusOK && (!ok || r.answered.Before(at)) {
			first[r.client] = r.answered
		}
	}
	if len(first) < n {
		return time.Time{}
	}
	for _, at := range first {
		if at.After(last) {
			last = at
		}
	}
	return last
}

// peak returns the most requests that came within a second.
func (all manyRequests) peak() (most int) {
	first := 0
	for i, r := range all {
		for r.at.Sub(all[first].at) >= time.Second {
			first++
		}
		most = max(most, i+1-first)
	}
	return most
}

// since returns those that came from then on.
func (all manyRequests) since(at time.Time) manyRequests {
	return slices.DeleteFunc(slices.Clone(all), func(r manyRequest) bool { return r.at.Before(at) })
}

// TestManyIssuer shows that the server keeps its limit, is out, is silent, and that the
// upstream accepts the token of the right client alone. No gateway takes part.
func TestManyIssuer(t *testing.T) {
	i := newManyIssuer(t, &manyIssuer{takes: 300 * time.Millisecond, life: time.Minute, limit: 2, retryAfter: "1"})
	ask := func(client string) int {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		req, _ := http.NewRequestWithContext(ctx, http.MethodPost, i.url, strings.NewReader("grant_type=client_credentials"))
		req.SetBasicAuth(client, "secret")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0
		}
		defer resp.Body.Close()
		if want := map[bool]string{true: "1"}[resp.StatusCode == http.StatusTooManyRequests]; resp.Header.Get("Retry-After") != want {
			t.Errorf("Retry-After of %d: got %q, want %q", resp.StatusCode, resp.Header.Get("Retry-After"), want)
		}
		return resp.StatusCode
	}
	var three sync.WaitGroup
	for n := range 3 {
		three.Go(func() { ask(manyClient(n)) })
	}
	three.Wait()
	if got := i.all(); got.with(http.StatusOK) != 2 || got.with(http.StatusTooManyRequests) != 1 || got.peak() != 3 {
		t.Errorf("three at once: got %+v, want two tokens and one 429", got)
	}
	i.setOut(true)
	if got := ask("c3"); got != http.StatusServiceUnavailable {
		t.Errorf("token request in the outage: got %d, want 503", got)
	}
	back := i.setOut(false)
	i.silence("c4")
	if got := ask("c4"); got != 0 {
		t.Errorf("token request that is to get no answer: got %d", got)
	}
	for n := range 4 { // one of them has no token yet
		if got := ask(manyClient(n)); got != http.StatusOK {
			t.Errorf("token request: got %d, want 200", got)
		}
	}
	all := i.all()
	if got := all.complete(4); !got.After(back) {
		t.Errorf("complete: got %v, want an instant after the outage", got)
	}
	if got := all.complete(5); !got.IsZero() {
		t.Errorf("complete: got %v, want none: one client has no token", got)
	}
	if got := len(all.since(back)); got != 5 {
		t.Errorf("since: got %d, want 5", got)
	}

	upstream := "http://" + i.serveUpstream(t)
	for token, owner := range i.owners {
		for n := range 4 {
			req := newRequest(t, http.MethodGet, upstream+manyPath(n)+"/", nil)
			req.Header.Set("Authorization", "Bearer "+token)
			want := http.StatusUnauthorized
			if owner == manyClient(n) {
				want = http.StatusOK
			}
			if got := do(t, req); got.StatusCode != want {
				t.Errorf("%s with a token of %s: got %d, want %d", manyPath(n), owner, got.StatusCode, want)
			}
		}
	}
}
