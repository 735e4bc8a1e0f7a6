package e2e

import (
	"maps"
	"net/http"
	"strings"
	"testing"
)

// TestZitadel obtains tokens from a server whose token endpoint is found by
// discovery, too: it has the document of OpenID Connect, but not that of
// RFC 8414.
func TestZitadel(t *testing.T) {
	as := startZitadel(t)
	for _, endpoint := range []string{"token_url " + as.TokenURL, "issuer " + as.Issuer} {
		for _, c := range secretClients {
			t.Run(c.ID+", "+strings.Fields(endpoint)[0], func(t *testing.T) {
				before := as.tokenRequests(t)
				u := newUpstream(t, &authServer{issuer: as.Issuer}, c)
				r := route{client: c, to: u.serve(t), settings: []string{"client_secret {env.E2E_SECRET}", endpoint}}
				gw := startGateway(t, gatewayConfig{site: r.String(), env: []string{"E2E_SECRET=" + c.Secret}})
				for range 3 {
					gw.get(t, "/", http.StatusOK)
				}
				u.wantAccepted(t, 3, "HTTP/1.1")

				// The server doesn't mind the method. We do.
				after := as.tokenRequests(t)
				before[c.Method]++
				if !maps.Equal(after, before) {
					t.Errorf("token requests = %v, want %v", after, before)
				}
			})
		}
	}
}

// TestZitadelRefuses gives the gateway what the server doesn't know.
func TestZitadelRefuses(t *testing.T) {
	as := startZitadel(t)
	unknown := secretClients[0]
	unknown.ID = "unknown"
	tests := []struct {
		name   string
		client client
		secret string
		change string // the setting to name
	}{
		{"wrong secret, basic", secretClients[0], "wrong", "client_secret"},
		{"wrong secret, post", secretClients[1], "wrong", "client_secret"},
		{"unknown client", unknown, unknown.Secret, "client_id"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			wantRefused(t, route{
				client:   tt.client,
				settings: []string{"client_secret " + tt.secret, "token_url " + as.TokenURL},
			}, tt.change)
		})
	}
}

// zitadelServer is a running authorization server.
type zitadelServer struct {
	Issuer   string `json:"issuer"`
	TokenURL string `json:"token_url"`
}

func startZitadel(t *testing.T) *zitadelServer {
	t.Helper()
	as := new(zitadelServer)
	startServer(t, zitadelBinary, secretClients, as)
	return as
}

// tokenRequests returns how many token requests brought the client's secret by
// each method.
func (as *zitadelServer) tokenRequests(t *testing.T) map[string]int {
	t.Helper()
	var stats map[string]int
	getJSON(t, as.Issuer+"/__stats", &stats)
	return stats
}
