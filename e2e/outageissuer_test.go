package e2e

import (
	"crypto/rand"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"
)

// How an authorization server can be out.
const (
	out503     = "503"     // it answers 503 at once, without Retry-After
	outHang    = "hang"    // it takes requests, and answers when the outage ends
	outRefused = "refused" // nobody listens
)

// issuerTakes is how long the server takes for a token: long enough that a gateway
// which has just started has none when its first health check is due.
const issuerTakes = 100 * time.Millisecond

// outageIssuer is an authorization server that can be out. It knows its tokens by
// heart, so that its upstream needs no keys that may be out as well.
type outageIssuer struct {
	url   string
	addr  string
	life  time.Duration // of its tokens
	takes time.Duration // for a token; set before use

	mu     sync.Mutex // guards all below
	server *http.Server
	out    string        // how it is out; "" if it is not
	over   chan struct{} // closed when the outage ends
	asked  int           // token requests
	tokens []outageToken
}

// outageToken is a token as the server sees it.
type outageToken struct {
	value             string
	client            string
	answered, expires time.Time
}

func newOutageIssuer(t *testing.T, life time.Duration) *outageIssuer {
	t.Helper()
	// The address is held while nobody listens there, as that of the injector is.
	i := &outageIssuer{addr: heldAddress(t), life: life, takes: issuerTakes}
	i.url = "http://" + i.addr
	i.serve(t)
	t.Cleanup(func() { i.server.Close() })
	return i
}

func (i *outageIssuer) serve(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", i.addr)
	if err != nil {
		t.Fatal(err)
	}
	i.server = &http.Server{Handler: i}
	go i.server.Serve(l)
}

// begin has the server go out.
func (i *outageIssuer) begin(how string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.out, i.over = how, make(chan struct{})
	if how == outRefused {
		i.server.Close() // and all connections
	}
}

// end has the server come back, and returns when.
func (i *outageIssuer) end(t *testing.T) time.Time {
	t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.out == outRefused {
		i.serve(t)
	}
	i.out = ""
	close(i.over)
	return time.Now()
}

func (i *outageIssuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	i.asked++
	out, over := i.out, i.over
	i.mu.Unlock()
	// Only a server that has read the body notices that the client has left.
	io.Copy(io.Discard, r.Body)
	switch out {
	case out503:
		http.Error(w, "out of order", http.StatusServiceUnavailable)
		return
	case outHang:
		select {
		case <-over:
		case <-r.Context().Done():
			return // nobody gets a token
		}
	}
	id, _, _ := r.BasicAuth()
	id, _ = url.QueryUnescape(id)
	token := outageToken{value: rand.Text(), client: id, expires: time.Now().Add(i.life)}
	time.Sleep(i.takes)
	// The upstream has to know the token before the gateway does.
	i.mu.Lock()
	token.answered = time.Now()
	i.tokens = append(i.tokens, token)
	i.mu.Unlock()
	answerJSON(w, http.StatusOK, map[string]any{
		"access_token": token.value, "token_type": "Bearer", "expires_in": int(i.life.Seconds()),
	})
}

// issued returns all tokens so far.
func (i *outageIssuer) issued() []outageToken {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Clone(i.tokens)
}

// live tells whether there is a live token.
func (i *outageIssuer) live() bool {
	return slices.ContainsFunc(i.issued(), func(t outageToken) bool { return time.Now().Before(t.expires) })
}

// requests returns how many token requests have come so far.
func (i *outageIssuer) requests() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.asked
}

// knows tells whether a client has got a token.
func (i *outageIssuer) knows(client string) bool {
	return slices.ContainsFunc(i.issued(), func(t outageToken) bool { return t.client == client })
}

// outageUpstream demands a token on each path: one that was issued, and has not
// ended by the server's clock.
type outageUpstream struct {
	issuer *outageIssuer

	mu     sync.Mutex
	checks []time.Time // when requests for healthPath came
}

func (u *outageUpstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	now := time.Now()
	if r.URL.Path == healthPath {
		u.mu.Lock()
		u.checks = append(u.checks, now)
		u.mu.Unlock()
	}
	value, err := identity(r.Header)
	good := err == nil && slices.ContainsFunc(u.issuer.issued(), func(t outageToken) bool {
		return t.value == value && now.Before(t.expires)
	})
	if !good {
		w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
		http.Error(w, "no live token", http.StatusUnauthorized)
	}
}

// checked returns when health checks came.
func (u *outageUpstream) checked() []time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.checks)
}

func (u *outageUpstream) serve(t *testing.T) string {
	srv := httptest.NewServer(u)
	closeAtEnd(t, srv)
	return srv.Listener.Addr().String()
}

// TestOutagesAreOutages shows that a client gets a token before and after each kind
// of outage, and none meanwhile, and that the upstream wants a live one. No gateway
// takes part.
func TestOutagesAreOutages(t *testing.T) {
	for _, k := range outageKinds {
		t.Run(k.name, func(t *testing.T) {
			i := newOutageIssuer(t, 2*time.Second)
			upstream := "http://" + (&outageUpstream{issuer: i}).serve(t)
			as := &authServer{issuer: i.url}
			ask := func() string { return fetchToken(t, as, basicClient(t), resource) }
			wantStatus := func(token string, want int) {
				t.Helper()
				req := newRequest(t, "GET", upstream, nil)
				req.Header = http.Header{"Authorization": {"Bearer " + token}, "X-Tenant-Id": {tenant}}
				if got := do(t, req); got.StatusCode != want {
					t.Errorf("upstream: got %d, want %d", got.StatusCode, want)
				}
			}
			wantStatus("unknown", http.StatusUnauthorized)
			old := ask()
			wantStatus(old, http.StatusOK)

			i.begin(k.name)
			impatient := &http.Client{Timeout: 500 * time.Millisecond}
			resp, err := impatient.Post(i.url, "", nil)
			if (err == nil) != (k.name == out503) || err == nil && resp.StatusCode != http.StatusServiceUnavailable {
				t.Errorf("token request in the outage: got %v, %v, want 503 or none", resp, err)
			}
			if got := len(i.issued()); got != 1 {
				t.Errorf("tokens in the outage: got %d, want that of before only", got)
			}
			if k.name == outHang {
				time.AfterFunc(500*time.Millisecond, func() { i.end(t) })
			} else {
				i.end(t)
			}
			wantStatus(ask(), http.StatusOK)

			time.Sleep(time.Until(i.issued()[0].expires))
			wantStatus(old, http.StatusUnauthorized)
		})
	}
}
