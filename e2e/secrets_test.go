package e2e

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestNothingSecretIsShown looks for secrets and tokens wherever the gateway
// writes: the log at its most talkative, the admin API, and its responses.
func TestNothingSecretIsShown(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	good := basicClient(t)
	wrong := good
	wrong.Secret = "wrong:secret + canary"
	u := newUpstream(t, as, good)
	to := u.serve(t)
	gw := startGateway(t, gatewayConfig{
		options: "debug\n\tservers {\n\t\tlog_credentials\n\t}",
		site: fmt.Sprintf("log\nhandle /wrong {\n%s}\nhandle {\n%s}\n",
			proxy{to: to, as: as, client: wrong, secret: "{env.E2E_WRONG}"},
			proxy{to: to, as: as, client: good}),
		env: []string{"E2E_SECRET=" + good.Secret, "E2E_WRONG=" + wrong.Secret},
	})

	var shown strings.Builder
	for range 3 {
		resp := gw.get(t, "/wrong", http.StatusServiceUnavailable)
		if resp.Header.Get("Retry-After") == "" {
			t.Error("503 without Retry-After")
		}
		resp.Write(&shown)
		shown.Write(resp.body)

		resp = gw.get(t, "/", http.StatusOK)
		resp.Write(&shown)
		shown.Write(resp.body)
	}
	for _, path := range []string{"/config/", "/metrics", "/reverse_proxy/upstreams"} {
		resp := do(t, newRequest(t, "GET", "http://"+gw.admin+path, nil))
		shown.Write(resp.body)
	}
	gw.stop() // the log is complete
	shown.WriteString(gw.output.String())

	// That the search finds anything at all.
	for _, want := range []string{"upstream roundtrip", good.ID, "invalid_client"} {
		if !strings.Contains(shown.String(), want) {
			t.Errorf("%q isn't in what the gateway wrote, want it there", want)
		}
	}
	canaries := u.tokensSeen()
	if len(canaries) != 1 {
		t.Errorf("tokens = %d, want 1", len(canaries))
	}
	for _, token := range canaries {
		// The signature is what makes a token of the claims.
		canaries = append(canaries, token[strings.LastIndex(token, ".")+1:])
	}
	for _, c := range []client{good, wrong} {
		encoded := url.QueryEscape(c.ID) + ":" + url.QueryEscape(c.Secret)
		canaries = append(canaries, c.Secret, url.QueryEscape(c.Secret), url.PathEscape(c.Secret),
			base64.StdEncoding.EncodeToString([]byte(encoded)),
			base64.StdEncoding.EncodeToString([]byte(c.ID+":"+c.Secret)))
	}
	for _, canary := range canaries {
		if at := strings.Index(shown.String(), canary); at >= 0 {
			t.Errorf("found %.12q… after: %s", canary, shown.String()[max(0, at-300):at])
		}
	}
	u.wantAccepted(t, 3, "HTTP/1.1")
}

// TestRotatedSecretNeedsNoReload starts with a file that holds a secret which
// the server doesn't know yet.
func TestRotatedSecretNeedsNoReload(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	file := filepath.Join(t.TempDir(), "secret")
	write := func(secret string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("yesterday's")
	gw := startProxy(t, proxy{to: u.serve(t), as: as, client: c, secret: "{file." + file + "}"})
	gw.get(t, "/", http.StatusServiceUnavailable)

	write(c.Secret)
	// The refusal of the old secret says nothing about the new one, so the
	// 5 s of back-off needn't pass.
	deadline := time.Now().Add(3 * time.Second)
	for do(t, newRequest(t, "GET", gw.url, nil)).StatusCode != http.StatusOK && time.Now().Before(deadline) {
		time.Sleep(100 * time.Millisecond)
	}
	u.wantAccepted(t, 1, "HTTP/1.1")
}
