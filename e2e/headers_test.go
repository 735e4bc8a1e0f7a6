package e2e

import (
	"fmt"
	"net/http"
	"testing"
	"time"
)

// TestClientsOwnIdentityIsDropped has the client claim another identity, in
// each of the ways that some server might fall for. The upstream refuses all
// that leave a doubt.
func TestClientsOwnIdentityIsDropped(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	// Caddy drops names with underscores or dots by itself, unless its JSON
	// names them as expected. So that some get as far as the module, they are
	// made of X-Claim.
	gw := startGateway(t, gatewayConfig{
		site: fmt.Sprintf("@claim header X-Claim *\n"+
			"request_header @claim X_Tenant_Id {header.X-Claim}\n"+
			"request_header @claim X.Tenant-Id {header.X-Claim}\n%s",
			proxy{to: u.serve(t), as: as, client: c}),
		env: []string{"E2E_SECRET=" + c.Secret},
	})

	tests := []struct {
		name   string
		header http.Header
	}{
		{"token", http.Header{"Authorization": {"Bearer stolen"}}},
		{"two tokens", http.Header{"Authorization": {"Bearer stolen", "Basic Zm9vOmJhcg=="}}},
		{"tenant", http.Header{"X-Tenant-Id": {"other"}}},
		{"two tenants", http.Header{"X-Tenant-Id": {"other", tenant}}},
		{"lower case", http.Header{"x-tenant-id": {"other"}, "authorization": {"Bearer stolen"}}},
		{"underscores", http.Header{"X_Tenant_Id": {"other"}}},
		{"one underscore", http.Header{"X-Tenant_Id": {"other"}, "x_tenant-id": {"other"}}},
		{"dots", http.Header{"X.Tenant.Id": {"other"}}},
		{"aliases that Caddy lets pass", http.Header{"X-Claim": {"other"}}},
		// What Connection names is for the gateway alone, and mustn't take the
		// gateway's own headers along.
		{"hop by hop", http.Header{"Connection": {"Authorization, X-Tenant-Id"}, "X-Tenant-Id": {"other"}}},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req := newRequest(t, "GET", gw.url, nil)
			req.Header = tt.header
			if resp := do(t, req); resp.StatusCode != http.StatusOK {
				t.Errorf("GET with %v = %s %s, want 200", tt.header, resp.Status, resp.body)
			}
			u.wantAccepted(t, i+1, "HTTP/1.1")
		})
	}
}
