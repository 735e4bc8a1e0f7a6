package e2e

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// TestUpstreamProtocols sends a token over each protocol that an upstream may
// speak. The options in `transport oauth2` are those of `transport http`.
func TestUpstreamProtocols(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	tests := []struct {
		name  string
		serve func(t *testing.T, u *upstream) (to string, options []string)
		proto string
	}{
		{"h1", func(t *testing.T, u *upstream) (string, []string) {
			return u.serve(t), nil
		}, "HTTP/1.1"},
		{"h2c", func(t *testing.T, u *upstream) (string, []string) {
			return "h2c://" + u.serveH2C(t), nil
		}, "HTTP/2.0"},
		{"https h1", func(t *testing.T, u *upstream) (string, []string) {
			addr, _ := u.serveTLS(t, false)
			return "https://" + addr, []string{"tls_insecure_skip_verify"}
		}, "HTTP/1.1"},
		{"https h2", func(t *testing.T, u *upstream) (string, []string) {
			addr, trust := u.serveTLS(t, true)
			return "https://" + addr, []string{"tls_trust_pool file " + trust}
		}, "HTTP/2.0"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u := newUpstream(t, as, c)
			to, options := tt.serve(t, u)
			gw := startProxy(t, proxy{to: to, as: as, client: c, extra: options})

			gw.get(t, "/a?b=c", 200)
			resp := do(t, newRequest(t, "POST", gw.url+"/post?x=%2F", strings.NewReader("body")))
			var got mirrored
			if err := json.Unmarshal(resp.body, &got); err != nil {
				t.Fatalf("POST = %s %s: %v", resp.Status, resp.body, err)
			}
			if got.Method != "POST" || got.URI != "/post?x=%2F" || !bytes.Equal(got.Body, []byte("body")) {
				t.Errorf("upstream got %s %s %q, want POST /post?x=%%2F \"body\"", got.Method, got.URI, got.Body)
			}
			u.wantAccepted(t, 2, tt.proto)
		})
	}
}

// TestUntrustedUpstreamGetsNothing has the upstream's certificate signed by
// nobody whom the gateway trusts.
func TestUntrustedUpstreamGetsNothing(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	addr, _ := u.serveTLS(t, true)
	gw := startProxy(t, proxy{to: "https://" + addr, as: as, client: c})
	gw.get(t, "/", 502)
	if got := u.tokensSeen(); len(got) != 0 {
		t.Errorf("upstream was sent %d tokens, want none", len(got))
	}
}
