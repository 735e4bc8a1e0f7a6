package e2e

import (
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// TestUpstreamRefuses shows that the upstream, which all other tests rely on,
// accepts what it should and nothing else. No gateway takes part.
func TestUpstreamRefuses(t *testing.T) {
	const ttl = 60 * time.Second
	as := startAuthServer(t, ttl)
	basic, post := clients(t)[0], clients(t)[1]
	u := newUpstream(t, as, basic)
	addr := u.serve(t)

	good := "Bearer " + fetchToken(t, as, basic, resource)
	signed := good[:strings.LastIndex(good, ".")+1]
	tests := []struct {
		name   string
		header http.Header
		refuse string // empty: accept
	}{
		{"good", http.Header{"Authorization": {good}, "X-Tenant-Id": {tenant}}, ""},
		{"no token", http.Header{"X-Tenant-Id": {tenant}}, "0 Authorization"},
		{"two tokens", http.Header{"Authorization": {good, good}, "X-Tenant-Id": {tenant}}, "2 Authorization"},
		{"another scheme", http.Header{"Authorization": {"Basic Zm9vOmJhcg=="}, "X-Tenant-Id": {tenant}}, "isn't Bearer"},
		{"forged signature", http.Header{"Authorization": {signed + strings.Repeat("A", 342)}, "X-Tenant-Id": {tenant}}, "signature"},
		{"another resource", http.Header{"Authorization": {"Bearer " + fetchToken(t, as, basic, "https://other.example/")}, "X-Tenant-Id": {tenant}}, "aud"},
		{"another client", http.Header{"Authorization": {"Bearer " + fetchToken(t, as, post, resource)}, "X-Tenant-Id": {tenant}}, "client_id"},
		{"another tenant", http.Header{"Authorization": {good}, "X-Tenant-Id": {"other"}}, "X-Tenant-Id"},
		{"two tenants", http.Header{"Authorization": {good}, "X-Tenant-Id": {tenant, "other"}}, "X-Tenant-Id"},
		{"tenant alias", http.Header{"Authorization": {good}, "X-Tenant-Id": {tenant}, "X_tenant_id": {"other"}}, "may be taken"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req := newRequest(t, "GET", "http://"+addr, nil)
			req.Header = tt.header
			resp := do(t, req)
			if accepted := resp.StatusCode == http.StatusOK; accepted != (tt.refuse == "") || !strings.Contains(string(resp.body), tt.refuse) {
				t.Errorf("upstream answered %d %s, want it to refuse: %q", resp.StatusCode, resp.body, tt.refuse)
			}
		})
	}

	token := strings.TrimPrefix(good, "Bearer ")
	if _, err := u.verifier.verify(token, time.Now().Add(ttl+leeway)); err == nil {
		t.Error("verify() of an expired token = nil, want an error")
	}
	if got, want := as.tokenRequests(t), 3; got != want {
		t.Errorf("token requests = %d, want %d", got, want)
	}
}

// fetchToken obtains a token without the gateway.
func fetchToken(t *testing.T, as *authServer, c client, resource string) string {
	t.Helper()
	form := url.Values{
		"grant_type": {"client_credentials"},
		"scope":      {scopes},
		"resource":   {resource},
	}
	if c.Method == "client_secret_post" {
		form.Set("client_id", c.ID)
		form.Set("client_secret", c.Secret)
	}
	req := newRequest(t, "POST", as.issuer+"/token", strings.NewReader(form.Encode()))
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if c.Method == "client_secret_basic" {
		req.SetBasicAuth(url.QueryEscape(c.ID), url.QueryEscape(c.Secret))
	}
	resp := do(t, req)
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(resp.body, &answer); err != nil || answer.AccessToken == "" {
		t.Fatalf("POST /token = %s %s, want a token", resp.Status, resp.body)
	}
	return answer.AccessToken
}
