package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	// debianRoot is where the packages of the authorization servers are unpacked.
	debianRoot = "../bin/debian"

	// debianPython is the Python that they are for. Another one may come first in
	// PATH.
	debianPython = "/usr/bin/python3"
)

// debianPath returns where a file of the packages is. Without it, the test fails.
func debianPath(t *testing.T, path string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join(debianRoot, path))
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("%v: run 'bash .ci/debian', which unpacks the Debian packages glewlwyd and python3-django-oauth-toolkit there", err)
	}
	return path
}

// debianServer is a program of such a package. It can end and start again.
type debianServer struct {
	*process
	addr string // where it listens
	args []string
	env  []string
}

// start starts the program and waits until it listens.
func (s *debianServer) start(t *testing.T) {
	t.Helper()
	cmd, err := untilEOF(s.args...)
	if err != nil {
		t.Fatal(err)
	}
	var libraries []string
	for _, dir := range []string{"usr/lib", "lib"} {
		found, err := filepath.Glob(filepath.Join(debianPath(t, "."), dir, "*-linux-gnu"))
		if err != nil {
			t.Fatal(err)
		}
		libraries = append(libraries, found...)
	}
	cmd.Env = slices.Concat(os.Environ(), s.env, []string{
		"LD_LIBRARY_PATH=" + strings.Join(libraries, ":"),
		"PYTHONPATH=" + debianPath(t, "usr/lib/python3/dist-packages"),
	})
	s.process = startProcess(t, cmd)
	for deadline := time.Now().Add(startTimeout); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", s.addr)
		if err == nil {
			conn.Close()
			return
		}
		select {
		case <-s.exited:
			t.Fatalf("%s ended before it was ready", cmd.Args[0])
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s isn't ready after %v: %v", cmd.Args[0], startTimeout, err)
		}
	}
}

const (
	// debianLife is how long a token lives in an outage. The gateway counts from when it
	// asks for the token, the server from when it answers, in whole seconds. In the two
	// seconds at the end, nobody can tell whether it has to have a live token. Its renewal
	// is due before them.
	debianLife    = 9 * time.Second
	debianAnswers = time.Second // at most, on a busy machine

	// debianAway is how long the server is gone: until the token has ended.
	debianAway = debianLife
)

// wantOutageSurvived kills the server under load while the token is fresh, and starts it
// again. The first setting of the route is token_url. Its client uses Basic.
func (s *debianServer) wantOutageSurvived(t *testing.T, r route, u *judge) {
	t.Helper()
	// A program that has just started takes longer for its first token than for the next.
	firstToken := func() time.Duration {
		started := time.Now()
		form := url.Values{"grant_type": {"client_credentials"}, "scope": {scopes}}
		if err := postForm(http.DefaultClient, strings.Fields(r.settings[0])[1], &r.client, form, nil); err != nil {
			t.Fatal(err)
		}
		return time.Since(started)
	}
	firstToken()
	r.to = u.serve(t)
	gw := startGateway(t, gatewayConfig{site: r.String()})
	gw.get(t, "/", http.StatusOK)
	l := &steadyLoad{url: gw.url, rate: 20}
	l.start()
	time.Sleep(time.Second)
	s.kill()
	time.Sleep(debianAway)
	s.start(t)
	back := time.Now()
	most := recoveryLimit + firstToken() + chaosSlack
	eventually(t, 30*time.Second, "requests succeed again", func() bool { return l.succeededSince(back) })
	time.Sleep(2 * time.Second) // all is well from then on
	all := l.stop()

	tokens := u.accepted(t)
	for i := range tokens {
		tokens[i].expires = tokens[i].expires.Add(-debianAnswers)
	}
	result := measure(all, tokens, back)
	result.tokenRequests = gw.tokenRequests(t)
	t.Log(result)
	if result.failed == 0 {
		t.Error("failed requests: got none, want some, after the end of the token")
	}
	for _, o := range all.lost() {
		if (o.status != http.StatusServiceUnavailable && o.status != http.StatusGatewayTimeout) || o.retryAfter == "" {
			t.Errorf("request %d: got %v, want 503 or 504 with Retry-After", o.n, o)
		}
	}
	if result.withToken > 0 {
		t.Errorf("failed requests with a live token: got %d, want none", result.withToken)
	}
	if result.recovery > most {
		t.Errorf("recovery: got %s, want %v at most", recoveryText(result.recovery), most)
	}
}

// judge is an upstream that finds out about each token once, and accepts it until its end.
// So it works while the authorization server doesn't.
type judge struct {
	// verify returns when the token expires, if it is one to accept at that time.
	verify func(token string, now time.Time) (time.Time, error)

	mu       sync.Mutex
	tokens   []outageToken
	refusals []string
}

func (u *judge) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.admit(r.Header); err != nil {
		u.refusals = append(u.refusals, err.Error())
		http.Error(w, err.Error(), http.StatusUnauthorized)
	}
}

func (u *judge) admit(h http.Header) error {
	now := time.Now()
	token, err := identity(h)
	if err != nil {
		return err
	}
	for _, known := range u.tokens {
		// To have less leeway than other resource servers, it would have to know when
		// the request was sent.
		if known.value == token && now.After(known.expires.Add(2*leeway)) {
			return fmt.Errorf("expired %v ago", now.Sub(known.expires))
		}
		if known.value == token {
			return nil
		}
	}
	expires, err := u.verify(token, now)
	if err == nil {
		u.tokens = append(u.tokens, outageToken{value: token, answered: now, expires: expires})
	}
	return err
}

// serve returns the address of the upstream.
func (u *judge) serve(t *testing.T) string {
	srv := httptest.NewServer(u)
	closeAtEnd(t, srv)
	return srv.Listener.Addr().String()
}

// accepted returns the tokens that have come. It fails the test if any was refused.
func (u *judge) accepted(t *testing.T) []outageToken {
	t.Helper()
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.refusals) > 0 {
		t.Errorf("upstream refused %d requests, the first because: %s, want none", len(u.refusals), u.refusals[0])
	}
	return slices.Clone(u.tokens)
}

// introspection is what a server says of a token (RFC 7662).
type introspection struct {
	Active   bool   `json:"active"`
	ClientID string `json:"client_id"`
	Scope    string `json:"scope"`
	Expiry   int64  `json:"exp"`
}

// judge returns when the token expires, if it is one of the client to accept.
func (i introspection) judge(clientID string) (time.Time, error) {
	switch {
	case !i.Active:
		return time.Time{}, errors.New("not active")
	case i.ClientID != clientID:
		return time.Time{}, fmt.Errorf("client_id = %q, want %q", i.ClientID, clientID)
	case i.Scope != scopes:
		return time.Time{}, fmt.Errorf("scope = %q, want %q", i.Scope, scopes)
	}
	return time.Unix(i.Expiry, 0), nil
}

// wantRevocationSurvived revokes a token at the server, of which the upstream asks the
// server for each request. The client of the gateway is not to notice.
func wantRevocationSurvived(t *testing.T, r route, u *introspector, revoke func(token string)) {
	t.Helper()
	r.to = u.serve(t)
	gw := startGateway(t, gatewayConfig{site: r.String()})
	gw.get(t, "/", http.StatusOK)
	before := gw.tokenRequests(t)
	revoke(u.last)
	gw.get(t, "/", http.StatusOK)
	if got := gw.tokenRequests(t) - before; got != 1 {
		t.Errorf("token requests after the revocation: got %d, want 1", got)
	}
	if got := gw.warnings(t, r.client); len(got) != 1 {
		t.Errorf("warnings: got %q, want one", got)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.accepted != 2 || !slices.Equal(u.refusals, []string{"not active"}) {
		t.Errorf("upstream: got %d accepted and the refusals %q, want 2 and the one of the revoked token", u.accepted, u.refusals)
	}
}

// adviceCase is a route that gets no token, and what its advice has to begin with.
type adviceCase struct {
	route
	advice string
}

// wantAdvice fails the test unless a gateway has no token for any of the routes, and says
// so once for each of them. Its log and caddy oauth2-token have the same advice.
func wantAdvice(t *testing.T, cases []adviceCase) {
	t.Helper()
	upstream := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("upstream got %s %s, want nothing", r.Method, r.URL)
	}))
	closeAtEnd(t, upstream)
	var routes []route
	for _, c := range cases {
		c.to = upstream.Listener.Addr().String()
		routes = append(routes, c.route)
	}
	started := time.Now()
	gw := startRoutes(t, routes)
	for i := range cases {
		for range 2 {
			if resp := gw.get(t, routePath(i), http.StatusServiceUnavailable); resp.Header.Get("Retry-After") == "" {
				t.Error("503 without Retry-After")
			}
		}
	}
	gw.stop() // the log is complete

	// As in wantRefused.
	most := 1 + int(time.Since(started)/(5*time.Second))
	hints := gw.hints(t, routes)
	for _, c := range cases {
		warnings := gw.warnings(t, c.client)
		if n := len(warnings); n > most {
			t.Errorf("%s: got %d warnings, want 1 for each token request, of %d at most", c.client.ID, n, most)
		}
		for _, warning := range warnings {
			t.Logf("%s: %s", c.client.ID, warning)
			if hint := hints[c.client.ID]; hint == "" || !strings.HasSuffix(strings.TrimSpace(warning), "("+hint+")") {
				t.Errorf("%s: got the warning %q, want the advice of caddy oauth2-token in it: %q", c.client.ID, warning, hint)
			}
		}
		if got := hints[c.client.ID]; !strings.HasPrefix(got, c.advice) {
			t.Errorf("%s: got the advice %q, want it to begin with %q", c.client.ID, got, c.advice)
		}
	}
}

// hints returns the advice that caddy oauth2-token has for each client. None gets a token.
func (gw *gateway) hints(t *testing.T, routes []route) map[string]string {
	t.Helper()
	result := gw.oauth2Token(t, siteOf(routes), "--json")
	if result.exit != 2 {
		t.Errorf("exit status of caddy oauth2-token: got %d, want 2", result.exit)
	}
	var reports []struct {
		ClientID string `json:"client_id"`
		Error    struct {
			Hint string `json:"hint"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(result.stdout), &reports); err != nil {
		t.Fatalf("caddy oauth2-token --json: %v\n%s%s", err, result.stdout, result.stderr)
	}
	hints := make(map[string]string)
	for _, report := range reports {
		hints[report.ClientID] = report.Error.Hint
	}
	return hints
}
