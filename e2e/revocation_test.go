package e2e

import (
	"testing"
	"time"
)

// TestRevokedTokenIsReplaced has the upstream refuse a token long before it
// expires, under load: no client is to notice.
func TestRevokedTokenIsReplaced(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	gw := startProxy(t, proxy{to: u.serve(t), as: as, client: c})
	gw.get(t, "/", 200)

	time.AfterFunc(time.Second, u.revoke)
	result := load{url: gw.url, rate: 100, duration: 3 * time.Second}.run()
	tokens := as.tokenRequests(t)
	t.Logf("%v; %v; %d token requests", result, u, tokens)

	result.wantAll(t)
	u.wantAccepted(t, result.sent+1, "HTTP/1.1")
	if tokens != 2 {
		t.Errorf("token requests = %d, want 2", tokens)
	}
	if u.revokedSeen() == 0 {
		t.Error("no request came with the revoked token, want some")
	}
}
