package outboundauth

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
)

// An authServer is an authorization server that issues a different token for
// each request, to any client.
type authServer struct {
	*httptest.Server

	mu       sync.Mutex
	requests []tokenRequest
	issued   int                                          // tokens
	live     map[string]string                            // client by token
	answer   func(http.ResponseWriter, tokenRequest) bool // false: has not answered
	delay    time.Duration
}

type tokenRequest struct {
	ctx            context.Context
	client, secret string
	form           url.Values
	header         http.Header
}

func newAuthServer(t *testing.T) *authServer {
	t.Helper()
	a := &authServer{live: make(map[string]string)}
	a.Server = httptest.NewServer(a)
	t.Cleanup(func() { a.CloseClientConnections(); a.Close() })
	return a
}

func (a *authServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		return // the client went away
	}
	req := tokenRequest{ctx: r.Context(), form: r.PostForm, header: r.Header}
	req.client, req.secret = r.PostForm.Get("client_id"), r.PostForm.Get("client_secret")
	if id, secret, ok := r.BasicAuth(); ok {
		req.client, _ = url.QueryUnescape(id)
		req.secret, _ = url.QueryUnescape(secret)
	}
	a.mu.Lock()
	a.requests = append(a.requests, req)
	answer, delay := a.answer, a.delay
	a.mu.Unlock()

	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-r.Context().Done():
		}
	}
	if answer == nil || !answer(w, req) {
		fmt.Fprintf(w, `{"access_token":%q,"token_type":"Bearer","expires_in":3600}`, a.issue(req.client))
	}
}

// issue makes a token.
func (a *authServer) issue(client string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.issued++
	token := fmt.Sprintf("canary-token-%d-of-%s", a.issued, client)
	a.live[token] = client
	return token
}

// script sets what is answered from now on; nil: tokens.
func (a *authServer) script(answer func(http.ResponseWriter, tokenRequest) bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answer = answer
}

// hang answers no request until release is called.
func (a *authServer) hang() (release func()) {
	released := make(chan struct{})
	a.script(func(_ http.ResponseWriter, r tokenRequest) bool {
		select {
		case <-released:
		case <-r.ctx.Done():
		}
		return false
	})
	return sync.OnceFunc(func() { a.script(nil); close(released) })
}

// refusing answers with an error.
func refusing(status int, body string) func(http.ResponseWriter, tokenRequest) bool {
	return func(w http.ResponseWriter, _ tokenRequest) bool {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
		return true
	}
}

// refusingForLong has the client stay away for five minutes as well. Otherwise it
// asks again after some seconds, on a busy machine before a test has seen what the
// first refusal made of it.
func refusingForLong(status int, body string) func(http.ResponseWriter, tokenRequest) bool {
	return func(w http.ResponseWriter, r tokenRequest) bool {
		w.Header().Set("Retry-After", "300")
		return refusing(status, body)(w, r)
	}
}

// revoke makes all tokens worthless.
func (a *authServer) revoke() {
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.live)
}

// holder is the client to whom a live token was issued; "" if there is none.
func (a *authServer) holder(token string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.live[token]
}

// asked returns the token requests so far.
func (a *authServer) asked() []tokenRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.requests)
}

// wantAsked fails the test unless there were this many token requests.
func (a *authServer) wantAsked(t *testing.T, want int) {
	t.Helper()
	if got := len(a.asked()); got != want {
		t.Errorf("got %d token requests, want %d", got, want)
	}
}

// discardLog is for servers whose complaints are part of the test.
var discardLog = log.New(io.Discard, "", 0)

// An upstream records what it is sent, and accepts live tokens only.
type upstream struct {
	*httptest.Server
	addr string // to dial
	auth *authServer

	mu       sync.Mutex
	received []received
	answer   func(http.ResponseWriter, *http.Request) bool // false: has not answered
}

type received struct {
	method, path, query, host, proto, body string
	header, trailer                        http.Header
	bodyErr                                error
}

func newUpstream(t *testing.T, auth *authServer) *upstream {
	t.Helper()
	u := newUnstartedUpstream(t, auth)
	u.start()
	return u
}

func newUnstartedUpstream(t *testing.T, auth *authServer) *upstream {
	t.Helper()
	u := &upstream{auth: auth}
	u.Server = httptest.NewUnstartedServer(u)
	t.Cleanup(func() { u.CloseClientConnections(); u.Close() })
	return u
}

func (u *upstream) start() {
	u.Start()
	u.addr = u.Listener.Addr().String()
}

func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u.mu.Lock()
	answer := u.answer
	u.mu.Unlock()
	if answer != nil && answer(w, r) {
		return
	}
	u.record(r)
	bearer, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if u.auth != nil && u.auth.holder(bearer) == "" {
		refuse(w, http.StatusUnauthorized)
		return
	}
	_, _ = io.WriteString(w, "accepted")
}

// refuse answers as a resource server does (RFC 6750 §3).
func refuse(w http.ResponseWriter, status int) {
	w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
	w.WriteHeader(status)
	_, _ = io.WriteString(w, "refused")
}

// record reads a request to its end and keeps it.
func (u *upstream) record(r *http.Request) received {
	body, err := io.ReadAll(r.Body)
	got := received{r.Method, r.URL.Path, r.URL.RawQuery, r.Host, r.Proto, string(body), r.Header.Clone(), r.Trailer.Clone(), err}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.received = append(u.received, got)
	return got
}

func (u *upstream) script(answer func(http.ResponseWriter, *http.Request) bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.answer = answer
}

// got returns the requests so far.
func (u *upstream) got() []received {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.received)
}

// last returns the latest request.
func (u *upstream) last(t *testing.T) received {
	t.Helper()
	all := u.got()
	if len(all) == 0 {
		t.Fatal("got no request at the upstream, want one")
	}
	return all[len(all)-1]
}

// wantHeader fails the test unless the field has this value only; "": unless
// it is absent.
func (r received) wantHeader(t *testing.T, field, want string) {
	t.Helper()
	got := strings.Join(r.header.Values(field), " | ")
	if got != want {
		t.Errorf("%s: got %q, want %q", field, got, want)
	}
}

// bearerOf returns the client to whom the request's token was issued.
func (r received) bearerOf(a *authServer) string {
	token, _ := strings.CutPrefix(r.header.Get("Authorization"), "Bearer ")
	return a.holder(token)
}

// unbound is the part of a requester whose tokens are bound to no key.
type unbound struct{}

func (unbound) newKey() (*dpop.Key, error) { return nil, nil }

func (unbound) share(context.Context) *shared { return nil }
