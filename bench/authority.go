// The scripted authorization server: its token endpoint, and what it knows of its tokens.

package main

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"
)

// tokenLength is that of a JWT with a few claims, in bytes.
const tokenLength = 800

// An authority is the authorization server of one scenario. It knows all tokens that it
// has issued, and so it also knows which requests could have had one.
type authority struct {
	clients  map[string]oauthClient // by their IDs
	lifetime time.Duration          // of tokens
	answer   func(since time.Duration) answer
	limit    int // token requests a second that are not answered with 429; 0: all of them
	static   string

	mu       sync.Mutex // guards what follows
	began    time.Time  // what since counts from
	requests int
	second   int64 // the Unix time of the requests in inSecond
	inSecond int
	byValue  map[string]*issued
	byClient map[string][]*issued
}

// An answer is what the token endpoint does with a request.
type answer struct {
	delay  time.Duration
	status int // if it is not 0, the answer is an error
	silent bool
}

// An issued token is valid from and to these times.
type issued struct {
	client   oauthClient
	from, to time.Time
}

func newAuthority(clients []oauthClient, lifetime time.Duration) *authority {
	a := &authority{
		clients: make(map[string]oauthClient), lifetime: lifetime, static: newToken(), began: time.Now(),
		answer:  func(time.Duration) answer { return answer{} },
		byValue: make(map[string]*issued), byClient: make(map[string][]*issued),
	}
	for _, c := range clients {
		a.clients[c.ID] = c
	}
	// It is looked up as the others are: a gateway that sends it has no faster upstream.
	a.byValue[a.static] = &issued{from: a.began, to: a.began.Add(24 * time.Hour)}
	return a
}

// newToken returns a value that nobody has seen before.
func newToken() string {
	random := make([]byte, 16)
	_, _ = rand.Read(random) // it never fails
	return hex.EncodeToString(random) + strings.Repeat("x", tokenLength-2*len(random))
}

// begin starts the time that the script of answers counts. It does not forget tokens.
func (a *authority) begin() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.began, a.requests = time.Now(), 0
}

// ServeHTTP implements http.Handler: it is the token endpoint.
func (a *authority) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id, secret, basic := r.BasicAuth()
	if !basic {
		id, secret = r.PostFormValue("client_id"), r.PostFormValue("client_secret")
	}
	client, known := a.clients[id]
	if !known || client.Secret != secret || r.PostFormValue("grant_type") != "client_credentials" {
		fail(w, http.StatusUnauthorized, "invalid_client")
		return
	}
	todo := a.request()
	select {
	case <-time.After(todo.delay):
	case <-r.Context().Done():
		return
	}
	switch {
	case todo.silent:
		<-r.Context().Done()
	case todo.status == http.StatusTooManyRequests:
		w.Header().Set("Retry-After", "1")
		fail(w, todo.status, "slow_down")
	case todo.status != 0:
		fail(w, todo.status, "temporarily_unavailable")
	default:
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"access_token":%q,"token_type":"Bearer","expires_in":%d}`, a.issue(client), int(a.lifetime.Seconds()))
	}
}

func fail(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"error":%q}`, code)
}

// request counts a token request, and says how it is answered.
func (a *authority) request() answer {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.requests++
	now := time.Now()
	if a.limit > 0 {
		if now.Unix() != a.second {
			a.second, a.inSecond = now.Unix(), 0
		}
		if a.inSecond++; a.inSecond > a.limit {
			return answer{status: http.StatusTooManyRequests}
		}
	}
	return a.answer(now.Sub(a.began))
}

// issue makes a token for a client.
func (a *authority) issue(client oauthClient) string {
	value, now := newToken(), time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	token := &issued{client: client, from: now, to: now.Add(a.lifetime)}
	a.byValue[value] = token
	a.byClient[client.ID] = append(a.byClient[client.ID], token)
	return value
}

// revoke ends all tokens that clients have got and that are valid now.
func (a *authority) revoke() {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	for _, tokens := range a.byClient { // and not the static one
		for _, token := range tokens {
			if token.to.After(now) {
				token.to = now
			}
		}
	}
}

// accepts reports whether a token is valid for a client now.
func (a *authority) accepts(value string, client oauthClient) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	token, ok := a.byValue[value]
	return ok && (token.client.ID == client.ID || value == a.static) && time.Now().Before(token.to)
}

// couldServe reports whether one token of a client was valid for all of this time.
func (a *authority) couldServe(client string, from, to time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, token := range a.byClient[client] {
		if !token.from.After(from) && !token.to.Before(to) {
			return true
		}
	}
	return false
}

// served returns how many clients have got a token.
func (a *authority) served() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.byClient)
}

// tokenRequests returns how many there were since begin.
func (a *authority) tokenRequests() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.requests
}
