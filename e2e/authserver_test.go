package e2e

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const (
	authServerDir = "authserver"

	// scopes and resource are what the gateway asks a token for.
	scopes   = "api:read api:write"
	resource = "https://api.example/"
)

// client is an OAuth client that an authorization server knows, as the server
// is told of it (RFC 7591 §2).
type client struct {
	ID     string `json:"client_id"`
	Secret string `json:"client_secret,omitempty"`
	Method string `json:"token_endpoint_auth_method"`

	Algorithm string              `json:"token_endpoint_auth_signing_alg,omitempty"`
	Keys      *jose.JSONWebKeySet `json:"jwks,omitempty"`
	DNSName   string              `json:"tls_client_auth_san_dns,omitempty"`
	SubjectDN string              `json:"tls_client_auth_subject_dn,omitempty"`
	Bound     bool                `json:"tls_client_certificate_bound_access_tokens,omitempty"`
	Proves    bool                `json:"dpop_bound_access_tokens,omitempty"`
	Grants    []string            `json:"grant_types,omitempty"`
}

// clients returns the clients of clients.json, which the server reads too.
func clients(t *testing.T) []client {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(authServerDir, "clients.json"))
	if err != nil {
		t.Fatal(err)
	}
	var all []client
	if err := json.Unmarshal(data, &all); err != nil {
		t.Fatalf("clients.json: %v", err)
	}
	return all
}

// basicClient returns the client for tests that any client would do for.
func basicClient(t *testing.T) client {
	t.Helper()
	return clients(t)[0]
}

// authServer is a running authorization server. Each test has its own, so
// that it counts its own token requests only.
type authServer struct {
	issuer string

	// Over TLS, with a certificate of ca: an issuer, and the address where it
	// asks for client certificates. ca is also whom it trusts to sign these.
	https, mtls string
	ca          *authority

	// client asks it for its keys; default: http.DefaultClient.
	client *http.Client
}

// startAuthServer starts a server whose access tokens live for ttl.
func startAuthServer(t *testing.T, ttl time.Duration, more ...string) *authServer {
	t.Helper()
	as := &authServer{ca: newAuthority(t)}
	env := append(append(os.Environ(), more...),
		"TTL="+strconv.Itoa(int(ttl.Seconds())),
		"TLS="+as.writeTLS(t),
		"SIGNING_KEY="+writeFile(t, "signing.pem", pkcs8(t, signingKey())))
	const tries = 3
	for range tries {
		if as.start(t, env) {
			return as
		}
	}
	t.Fatalf("the authorization server isn't ready after %d times %v", tries, hangTimeout)
	return nil
}

// signingKey is the key of all servers' tokens.
var signingKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

// hangTimeout is after what time a server that is not ready has to be taken for
// one that never will be: now and then, Node hangs when it starts.
const hangTimeout = 40 * time.Second

// start starts the server's process and waits until it is ready.
func (as *authServer) start(t *testing.T, env []string) bool {
	t.Helper()
	cmd := exec.Command("node", "server.mjs")
	cmd.Dir = authServerDir
	cmd.Env = env
	// The server ends with its standard input, even if this test is killed.
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, cmd)

	type addresses struct{ Issuer, HTTPS, MTLS string }
	ready := make(chan addresses, 1)
	go func() {
		// What else the server prints is read on, lest it blocks.
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			var at addresses
			if json.Unmarshal(lines.Bytes(), &at) == nil {
				ready <- at
			}
		}
	}()
	select {
	case at := <-ready:
		as.issuer, as.https, as.mtls = at.Issuer, at.HTTPS, at.MTLS
		return true
	case <-p.exited:
		t.Fatal("the authorization server ended before it was ready")
	case <-time.After(hangTimeout):
		p.stop()
	}
	return false
}

// writeTLS writes what the server needs for TLS.
func (as *authServer) writeTLS(t *testing.T) string {
	t.Helper()
	own := as.ca.issue(t, "127.0.0.1")
	data, err := json.Marshal(map[string]string{
		"key":       string(own.keyPEM(t)),
		"cert":      string(own.certPEM()),
		"client_ca": string(as.ca.certPEM()),
	})
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, "tls.json", data)
}

// serverStats is what the server has seen so far.
type serverStats struct {
	TokenRequests int                  `json:"token_requests"`
	Paths         map[string]int       `json:"paths"`      // how often each was asked for
	Granted       map[string]int       `json:"granted"`    // tokens, by client
	Refused       map[string]int       `json:"refused"`    // token requests, by client
	Assertions    map[string]assertion `json:"assertions"` // the last that was accepted, by client
}

// assertion is a JWT with which a client authenticated.
type assertion struct {
	Header struct {
		Algorithm string `json:"alg"`
		KeyID     string `json:"kid"`
		Type      string `json:"typ"`
	} `json:"header"`
	Claims struct {
		Audience any   `json:"aud"`
		IssuedAt int64 `json:"iat"`
		Expiry   int64 `json:"exp"`
	} `json:"claims"`
}

func (as *authServer) stats(t *testing.T) serverStats {
	t.Helper()
	var stats serverStats
	getJSON(t, as.issuer+"/__stats", &stats)
	return stats
}

// tokenRequests returns how many token requests the server has had.
func (as *authServer) tokenRequests(t *testing.T) int {
	t.Helper()
	return as.stats(t).TokenRequests
}

// register makes a client known to the server, in place of what it knew under
// its id.
func (as *authServer) register(t *testing.T, c client) {
	t.Helper()
	data, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	resp := do(t, newRequest(t, "PUT", as.issuer+"/__client", bytes.NewReader(data)))
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("PUT /__client = %s, want 200", resp.Status)
	}
}

// delay makes the server answer token requests that much later.
func (as *authServer) delay(t *testing.T, d time.Duration) {
	t.Helper()
	resp, err := http.Post(fmt.Sprintf("%s/__delay?ms=%d", as.issuer, d.Milliseconds()), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}

func getJSON(t *testing.T, url string, into any) {
	t.Helper()
	getJSONWith(t, http.DefaultClient, url, into)
}

// getJSONWith is getJSON with a client that isn't the default one.
func getJSONWith(t *testing.T, httpClient *http.Client, url string, into any) {
	t.Helper()
	resp, err := httpClient.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s = %s, want 200", url, resp.Status)
	}
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		t.Fatalf("GET %s: %v", url, err)
	}
}
