package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

const (
	authServerDir = "authserver"

	// scopes and resource are what the gateway asks a token for.
	scopes   = "api:read api:write"
	resource = "https://api.example/"
)

// client is an OAuth client that the authorization server knows.
type client struct {
	ID     string `json:"client_id"`
	Secret string `json:"client_secret"`
	Method string `json:"token_endpoint_auth_method"`
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
}

// startAuthServer starts a server whose access tokens live for ttl.
func startAuthServer(t *testing.T, ttl time.Duration) *authServer {
	t.Helper()
	cmd := exec.Command("node", "server.mjs")
	cmd.Dir = authServerDir
	cmd.Env = append(os.Environ(), "TTL="+strconv.Itoa(int(ttl.Seconds())))
	// The server ends with its standard input, even if this test is killed.
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, cmd)

	issuer := make(chan string, 1)
	go func() {
		// What else the server prints is read on, lest it blocks.
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			var ready struct{ Issuer string }
			if json.Unmarshal(lines.Bytes(), &ready) == nil {
				issuer <- ready.Issuer
			}
		}
	}()
	select {
	case iss := <-issuer:
		return &authServer{issuer: iss}
	case <-p.exited:
		t.Fatal("the authorization server ended before it was ready")
	case <-time.After(30 * time.Second):
		t.Fatal("the authorization server isn't ready after 30 s")
	}
	return nil
}

// tokenRequests returns how many token requests the server has had.
func (as *authServer) tokenRequests(t *testing.T) int {
	t.Helper()
	var stats struct {
		TokenRequests int `json:"token_requests"`
	}
	getJSON(t, as.issuer+"/__stats", &stats)
	return stats.TokenRequests
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
	resp, err := http.Get(url)
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
