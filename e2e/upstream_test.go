package e2e

import (
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// tenant is what every upstream expects in X-Tenant-Id.
const tenant = "acme"

// upstream is a resource server: it turns away every request that doesn't
// carry a good token and the right tenant, and remembers why.
type upstream struct {
	verifier *verifier
	handler  http.Handler // what accepted requests get

	mu       sync.Mutex
	accepted int
	refusals []string
	protos   map[string]int
	tokens   map[string]bool
	revoked  map[string]int // how often each came again
	slack    time.Duration  // the least time that an accepted token had left
}

// newUpstream returns an upstream for the tokens of one client. Its handler
// answers with what arrived, unless the test gives it another.
func newUpstream(t *testing.T, as *authServer, c client) *upstream {
	t.Helper()
	return &upstream{
		verifier: newVerifier(t, as, c.ID),
		handler:  http.HandlerFunc(mirror),
		protos:   make(map[string]int),
		tokens:   make(map[string]bool),
		revoked:  make(map[string]int),
		slack:    time.Hour,
	}
}

func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := u.admit(r); err != nil {
		w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
		http.Error(w, err.Error(), http.StatusUnauthorized)
		return
	}
	u.handler.ServeHTTP(w, r)
}

// admit records the request and returns why it is turned away, if it is.
func (u *upstream) admit(r *http.Request) error {
	now := time.Now()
	token, err := identity(r.Header)
	var exp time.Time
	if err == nil {
		exp, err = u.verifier.verify(token, now)
	}

	u.mu.Lock()
	defer u.mu.Unlock()
	if err != nil {
		u.refusals = append(u.refusals, fmt.Sprintf("%s %s: %v", r.Method, r.URL.Path, err))
		return err
	}
	if _, found := u.revoked[token]; found {
		u.revoked[token]++
		return errors.New("revoked")
	}
	u.accepted++
	u.protos[r.Proto]++
	u.tokens[token] = true
	u.slack = min(u.slack, exp.Sub(now))
	return nil
}

// identity returns the one Bearer token of a request whose headers name the
// tenant and leave no doubt about either.
func identity(h http.Header) (string, error) {
	for name := range h {
		// Many servers take X_Tenant_Id for X-Tenant-Id, some X.Tenant.Id.
		alias := http.CanonicalHeaderKey(strings.NewReplacer("_", "-", ".", "-").Replace(name))
		if alias != name && (alias == "Authorization" || alias == "X-Tenant-Id") {
			return "", fmt.Errorf("%s may be taken for %s", name, alias)
		}
	}
	if got := h.Values("X-Tenant-Id"); !slices.Equal(got, []string{tenant}) {
		return "", fmt.Errorf("X-Tenant-Id = %q, want %q only", got, tenant)
	}
	authorization := h.Values("Authorization")
	if len(authorization) != 1 {
		return "", fmt.Errorf("%d Authorization headers, want 1", len(authorization))
	}
	token, found := strings.CutPrefix(authorization[0], "Bearer ")
	if !found {
		return "", errors.New("Authorization isn't Bearer")
	}
	return token, nil
}

// revoke makes the upstream refuse the tokens that it has accepted so far.
func (u *upstream) revoke() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for token := range u.tokens {
		u.revoked[token] = 0
	}
}

// revokedSeen returns how many requests came with a revoked token.
func (u *upstream) revokedSeen() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	seen := 0
	for _, n := range u.revoked {
		seen += n
	}
	return seen
}

// tokensSeen returns the distinct tokens that were accepted.
func (u *upstream) tokensSeen() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Collect(maps.Keys(u.tokens))
}

// String tells how the upstream fared.
func (u *upstream) String() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return fmt.Sprintf("upstream accepted %d, refused %d, saw %d tokens, the tightest %v before its exp",
		u.accepted, len(u.refusals), len(u.tokens), u.slack.Round(time.Millisecond))
}

// wantAccepted fails the test unless n requests came in over the protocol, and
// all were accepted.
func (u *upstream) wantAccepted(t *testing.T, n int, proto string) {
	t.Helper()
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, reason := range u.refusals[:min(len(u.refusals), 5)] {
		t.Errorf("upstream refused %s", reason)
	}
	if len(u.refusals) != 0 {
		t.Errorf("upstream refused %d requests, want none", len(u.refusals))
	}
	if want := map[string]int{proto: n}; !maps.Equal(u.protos, want) {
		t.Errorf("upstream accepted %v, want %v", u.protos, want)
	}
}

// serve returns the address at which the upstream speaks HTTP/1.1.
func (u *upstream) serve(t *testing.T) string {
	srv := httptest.NewServer(u)
	closeAtEnd(t, srv)
	return srv.Listener.Addr().String()
}

// serveH2C is serve for HTTP/2 without TLS, and nothing else.
func (u *upstream) serveH2C(t *testing.T) string {
	srv := httptest.NewUnstartedServer(u)
	srv.Config.Protocols = new(http.Protocols)
	srv.Config.Protocols.SetUnencryptedHTTP2(true)
	srv.Start()
	closeAtEnd(t, srv)
	return srv.Listener.Addr().String()
}

// serveTLS is serve with TLS, and HTTP/2 if h2 is set. It returns the file of
// the certificate to trust, too.
func (u *upstream) serveTLS(t *testing.T, h2 bool) (addr, trust string) {
	t.Helper()
	srv := httptest.NewUnstartedServer(u)
	srv.EnableHTTP2 = h2
	// It would complain of a gateway that doesn't trust it.
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	closeAtEnd(t, srv)
	trust = filepath.Join(t.TempDir(), "upstream.pem")
	block := &pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}
	if err := os.WriteFile(trust, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return srv.Listener.Addr().String(), trust
}

func closeAtEnd(t *testing.T, srv *httptest.Server) {
	t.Cleanup(func() {
		// A failed test may leave a stream open, which Close would wait for.
		srv.CloseClientConnections()
		srv.Close()
	})
}

// mirrored is what mirror answers with.
type mirrored struct {
	Method string
	URI    string
	Header http.Header
	Body   []byte
}

// mirror answers with the request. Its token is left out, so that a token
// found on the client's side isn't one that we sent there.
func mirror(w http.ResponseWriter, r *http.Request) {
	got := mirrored{Method: r.Method, URI: r.RequestURI, Header: r.Header.Clone()}
	got.Header.Del("Authorization")
	var err error
	if got.Body, err = io.ReadAll(r.Body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(got)
}
