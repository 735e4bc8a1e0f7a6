package e2e

import (
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

const (
	// requestID is the header by which an upstream tells requests apart.
	requestID = "X-Request-Id"

	rightPassword = "right"
)

// verdictUpstream demands a live token, and has two paths that may refuse whoever has
// one: /admin always does, and /login does with a wrong password. Nothing tells these
// refusals from those of a token.
type verdictUpstream struct {
	issuer *outageIssuer
	url    string // at the gateway

	mu      sync.Mutex // guards all below
	revoked []string
	refused map[string]time.Time // good requests, and when they were first refused
	checks  []verdictCheck
	wrong   map[string]int // how often the wrong password of each user came
}

// verdictCheck is a health check.
type verdictCheck struct {
	at      time.Time
	refused bool
}

func newVerdictUpstream(issuer *outageIssuer) *verdictUpstream {
	return &verdictUpstream{issuer: issuer, refused: make(map[string]time.Time), wrong: make(map[string]int)}
}

func (u *verdictUpstream) serve(t *testing.T) string {
	srv := httptest.NewServer(u)
	closeAtEnd(t, srv)
	return srv.Listener.Addr().String()
}

func (u *verdictUpstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !u.admits(r) {
		w.Header().Set("WWW-Authenticate", "Bearer")
		http.Error(w, "no", http.StatusUnauthorized)
		return
	}
	// Whoever asks whether a body is wanted is told only now.
	io.Copy(io.Discard, r.Body)
}

// admits tells whether a request is served, and remembers if it isn't.
func (u *verdictUpstream) admits(r *http.Request) bool {
	now := time.Now()
	switch r.URL.Path {
	case "/admin":
		return false
	case "/login":
		body, _ := io.ReadAll(r.Body)
		if form, _ := url.ParseQuery(string(body)); form.Get("password") != rightPassword {
			u.mu.Lock()
			defer u.mu.Unlock()
			u.wrong[form.Get("user")]++
			return false
		}
	}
	value, err := identity(r.Header)
	issued := err == nil && slices.ContainsFunc(u.issuer.issued(), func(t outageToken) bool { return t.value == value })
	u.mu.Lock()
	defer u.mu.Unlock()
	live := issued && !slices.Contains(u.revoked, value)
	if r.URL.Path == healthPath {
		u.checks = append(u.checks, verdictCheck{now, !live})
		return live
	}
	if _, found := u.refused[r.Header.Get(requestID)]; !live && !found {
		u.refused[r.Header.Get(requestID)] = now
	}
	return live
}

// revoke has the upstream refuse all tokens that were issued so far, and returns since
// when it does.
func (u *verdictUpstream) revoke() time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, token := range u.issuer.issued() {
		u.revoked = append(u.revoked, token.value)
	}
	return time.Now()
}

// hasRefused tells whether the upstream has refused a good request.
func (u *verdictUpstream) hasRefused(id string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	_, found := u.refused[id]
	return found
}

// firstRefusalSince returns when the first good request was refused.
func (u *verdictUpstream) firstRefusalSince(since time.Time) (first time.Time, found bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, at := range u.refused {
		if !at.Before(since) && (!found || at.Before(first)) {
			first, found = at, true
		}
	}
	return first, found
}

// refusals returns how many good requests were refused, and how many health checks.
func (u *verdictUpstream) refusals() (good, checks int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, c := range u.checks {
		if c.refused {
			checks++
		}
	}
	return len(u.refused), checks
}

// checkedSince returns how many health checks came since then.
func (u *verdictUpstream) checkedSince(since time.Time) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	n := 0
	for _, c := range u.checks {
		if !c.at.Before(since) {
			n++
		}
	}
	return n
}

// sentTwice returns how many wrong passwords came again. Each user tries one.
func (u *verdictUpstream) sentTwice() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	twice := 0
	for _, n := range u.wrong {
		twice += n - 1
	}
	return twice
}

// TestVerdictUpstreamRefuses shows what the upstream accepts. No gateway takes part.
func TestVerdictUpstreamRefuses(t *testing.T) {
	issuer := newOutageIssuer(t, time.Minute)
	u := newVerdictUpstream(issuer)
	u.url = "http://" + u.serve(t)
	ask := func() string { return fetchToken(t, &authServer{issuer: issuer.url}, basicClient(t), resource) }
	wantStatus := func(id, path, body, token string, want int) {
		t.Helper()
		req := newRequest(t, "POST", u.url+path, strings.NewReader(body))
		req.Header = http.Header{"Authorization": {"Bearer " + token}, "X-Tenant-Id": {tenant}, requestID: {id}}
		if got := do(t, req); got.StatusCode != want {
			t.Errorf("%s %q: got %d, want %d", path, body, got.StatusCode, want)
		}
	}
	old := ask()
	wantStatus("live", "/orders/1", "", old, http.StatusOK)
	wantStatus("admin", "/admin", "", old, http.StatusUnauthorized)
	wantStatus("right", "/login", "password=right", old, http.StatusOK)
	wantStatus("wrong", "/login", "user=one&password=wrong", old, http.StatusUnauthorized)
	wantStatus("wrong", "/login", "user=two&password=wrong", old, http.StatusUnauthorized)
	wantStatus("wrong", "/login", "user=two&password=wrong", old, http.StatusUnauthorized)
	wantStatus("check", healthPath, "", old, http.StatusOK)
	if _, found := u.firstRefusalSince(time.Time{}); found {
		t.Error("a good request counts as refused, want only the others refused")
	}

	revoked := u.revoke()
	wantStatus("revoked", "/orders/1", "", old, http.StatusUnauthorized)
	wantStatus("right, revoked", "/login", "password=right", old, http.StatusUnauthorized)
	wantStatus("check, revoked", healthPath, "", old, http.StatusUnauthorized)
	wantStatus("new", "/orders/1", "", ask(), http.StatusOK)
	if good, checks := u.refusals(); good != 2 || checks != 1 || !u.hasRefused("revoked") || u.hasRefused("new") {
		t.Errorf("refused: got %d good requests and %d health checks, want 2 and 1", good, checks)
	}
	if at, found := u.firstRefusalSince(revoked); !found || !at.After(revoked) {
		t.Errorf("first refusal: got %v, %v, want one after %v", at, found, revoked)
	}
	if got := u.sentTwice(); got != 1 {
		t.Errorf("wrong passwords that came twice: got %d, want 1", got)
	}
}
