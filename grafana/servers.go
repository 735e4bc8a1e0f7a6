package grafana

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Outage is a fault of the authorization server: it closes the connection.
func Outage(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// Rejection is a fault: the authorization server does not know the client.
func Rejection(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusUnauthorized)
	fmt.Fprint(w, `{"error":"invalid_client"}`)
}

// Throttling is a fault: the authorization server tells the client to wait.
func Throttling(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Retry-After", "2")
	w.WriteHeader(http.StatusTooManyRequests)
}

// authServer issues tokens to all its clients, except those that have a fault.
type authServer struct {
	mu        sync.Mutex // guards all below
	lifetimes map[string]time.Duration
	faults    map[string]http.HandlerFunc
	issued    int
}

func newAuthServer() *authServer {
	return &authServer{lifetimes: make(map[string]time.Duration), faults: make(map[string]http.HandlerFunc)}
}

// latency is how long the server takes to issue a token.
const latency = 60 * time.Millisecond

func (s *authServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	client, _, _ := r.BasicAuth()
	s.mu.Lock()
	defer s.mu.Unlock()
	if fault := s.faults[client]; fault != nil {
		fault(w, r)
		return
	}
	s.issued++
	time.Sleep(latency)
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, `{"access_token":"token-%d","token_type":"Bearer","expires_in":%d}`, s.issued, int(s.lifetimes[client].Seconds()))
}

// fail gives the server a fault for a client. nil ends the fault.
func (s *authServer) fail(client string, fault http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[client] = fault
}

// noisyPath ends the path that an upstream may refuse whatever the token.
const noisyPath = "/noise"

// upstream accepts all tokens except the one that was revoked.
type upstream struct {
	mu        sync.Mutex // guards all below
	last      string
	revoked   string
	refuseAll bool
	noisy     bool
}

func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.last = r.Header.Get("Authorization")
	noise := u.noisy && strings.HasSuffix(r.URL.Path, noisyPath)
	if noise || u.refuseAll || u.last == "" || u.last == u.revoked {
		w.WriteHeader(http.StatusUnauthorized)
	}
}

// revoke makes the upstream refuse the token that it saw last.
func (u *upstream) revoke() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.revoked = u.last
}

// refuse makes the upstream refuse all tokens. If all is false, the upstream
// stops that.
func (u *upstream) refuse(all bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.refuseAll = all
}

// noise makes the upstream refuse all requests for the noisy path. If on is false, the
// upstream stops that.
func (u *upstream) noise(on bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.noisy = on
}
