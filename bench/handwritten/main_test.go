package main

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// authorizationServer gives each client the token "token-of-<id>".
func authorizationServer(t *testing.T, requests *atomic.Int32) string {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		id, secret, _ := r.BasicAuth()
		if secret != "secret-of-"+id {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{"access_token": "token-of-" + id, "token_type": "Bearer", "expires_in": 3600})
	}))
	t.Cleanup(server.Close)
	return server.URL
}

// upstream answers with what it was sent.
var upstream = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	fmt.Fprintf(w, "%s %s %s %q %q %s", r.Proto, r.Method, r.RequestURI, r.Header["Authorization"], r.Header["X-Tenant"], body)
})

func newClient(id, address string) client {
	return client{Host: id + ".test", ID: id, Secret: "secret-of-" + id, Tenant: "tenant-of-" + id, Upstream: address}
}

// ask sends a request to the gateway, with headers that a caller must not choose.
func ask(t *testing.T, cfg *config, tuned bool, host string) (status int, body string) {
	t.Helper()
	gateway, err := newGateway(cfg, tuned, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodPost, "http://"+host+"/a%2Fb?x=1;y=%zz", strings.NewReader("hello"))
	r.Header.Set("Authorization", "Bearer mine")
	r.Header.Set("X-Tenant", "mine")
	w := httptest.NewRecorder()
	gateway.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

func TestGateway(t *testing.T) {
	var requests atomic.Int32
	tokenURL := authorizationServer(t, &requests)
	server := httptest.NewServer(upstream)
	defer server.Close()
	address := server.Listener.Addr().String()
	a, b := newClient("a", address), newClient("b", address)
	wrong := newClient("c", address)
	wrong.Secret = "wrong"
	const answer = `HTTP/1.1 POST /a%%2Fb?x=1;y=%%zz ["Bearer token-of-%s"] ["tenant-of-%[1]s"] hello`
	for name, test := range map[string]struct {
		clients []client
		pool    bool
		host    string
		status  int
		body    string
	}{
		"one client":           {[]client{a}, false, "any.test", 200, fmt.Sprintf(answer, "a")},
		"by host":              {[]client{a, b}, false, "b.test", 200, fmt.Sprintf(answer, "b")},
		"by host, with a port": {[]client{a, b}, false, "B.test:8080", 200, fmt.Sprintf(answer, "b")},
		"a host of nobody":     {[]client{a, b}, false, "c.test", 404, "this gateway does not serve that host\n"},
		"pool":                 {[]client{b}, true, "a.test", 200, fmt.Sprintf(answer, "b")},
		"no token":             {[]client{wrong}, false, "c.test", 502, ""},
	} {
		for _, tuned := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/tuned=%v", name, tuned), func(t *testing.T) {
				cfg := &config{TokenURL: tokenURL, Scheme: "http", Clients: test.clients, Pool: test.pool}
				if status, body := ask(t, cfg, tuned, test.host); status != test.status || body != test.body {
					t.Errorf("got %d %q; want %d %q", status, body, test.status, test.body)
				}
			})
		}
	}
}

func TestTLS(t *testing.T) {
	var requests atomic.Int32
	tokenURL := authorizationServer(t, &requests)
	server := httptest.NewUnstartedServer(upstream)
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(ca, certificate, 0o600); err != nil {
		t.Fatal(err)
	}
	for proto, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2.0": true} {
		cfg := &config{
			TokenURL: tokenURL, Scheme: "https", HTTP2: http2, CA: ca,
			Clients: []client{newClient("a", server.Listener.Addr().String())},
		}
		if status, body := ask(t, cfg, false, "a.test"); status != http.StatusOK || !strings.HasPrefix(body, proto+" POST ") {
			t.Errorf("%s: got %d %q", proto, status, body)
		}
	}
}

func TestTokenIsKept(t *testing.T) {
	var requests atomic.Int32
	cfg := &config{TokenURL: authorizationServer(t, &requests), Scheme: "http"}
	server := httptest.NewServer(upstream)
	defer server.Close()
	cfg.Clients = []client{newClient("a", server.Listener.Addr().String())}
	gateway, err := newGateway(cfg, true, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		gateway.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "http://a.test/", nil))
	}
	if n := requests.Load(); n != 1 {
		t.Errorf("3 requests made %d token requests", n)
	}
}
