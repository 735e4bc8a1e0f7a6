package outboundauth

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

func TestWarmUpFetchesTheTokenBeforeTheFirstRequest(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := startGateway(t, proxySite(up, auth, "scopes a b"))
	eventually(t, func() bool { return cached() == 1 }, "the token of the warm-up")
	auth.wantAsked(t, 1)
	auth.hang() // so that a request which needs another token would wait
	g.get().want(t, http.StatusOK)
	auth.wantAsked(t, 1)
	if got, want := auth.asked()[0].form.Encode(), "grant_type=client_credentials&scope=a+b"; got != want {
		t.Errorf("got the form %q, want %q", got, want)
	}
}

// cached is how many sources have a token.
func cached() int {
	n := 0
	for _, s := range sourceList() {
		if s.Peek() != nil {
			n++
		}
	}
	return n
}

// Nor does it shape the token of a config that runs.
func TestValidationBesideARunningConfigChangesNothing(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := startGateway(t, proxySite(up, auth, ""))
	g.get().want(t, http.StatusOK)
	source := theSource(t)
	before := *source.Peek()
	var config caddy.Config
	if err := json.Unmarshal(g.config(proxySite(up, auth, "refresh_before 50m\ndefault_lifetime 1s")), &config); err != nil {
		t.Fatal(err)
	}
	if err := caddy.Validate(&config); err != nil {
		t.Fatal(err)
	}
	if got := *source.Peek(); got != before {
		t.Errorf("got the token %+v, want %+v as before", got, before)
	}
	g.get().want(t, http.StatusOK)
	auth.wantAsked(t, 1)
}

func TestValidationMakesNoTokenRequest(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := newGateway(t)
	var cfg caddy.Config
	if err := caddy.StrictUnmarshalJSON(g.config(proxySite(up, auth, "")), &cfg); err != nil {
		t.Fatal(err)
	}
	if err := caddy.Validate(&cfg); err != nil {
		t.Fatalf("got %v, want a valid config", err)
	}
	wantNothingLeft(t)
	auth.wantAsked(t, 0)
}

func TestConfigThatFailsToLoadMakesNoTokenRequest(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := newGateway(t)
	good := proxySite(up, auth, "") + "\nrespond /other x\n"
	g.load(good)
	eventually(t, func() bool { return cached() == 1 }, "the token of the warm-up")
	broken := strings.Replace(string(g.config(good)), `"handler":"static_response"`, `"handler":"no_such_handler"`, 1)
	if err := caddy.Load([]byte(broken), false); err == nil {
		t.Fatal("got no error of a config with an unknown handler, want one")
	}
	g.get().want(t, http.StatusOK) // the old config runs on
	auth.wantAsked(t, 1)
	g.stop()
	wantNothingLeft(t)
}

func TestFailingWarmUpIsOneWarning(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	auth.script(refusing(http.StatusBadRequest, `{"error":"invalid_client"}`))
	g := startGateway(t, "respond /other running\n"+proxySite(up, auth, ""))
	eventually(t, func() bool { return len(g.logged("obtaining token failed")) > 0 }, "a warning")
	if r := g.send(http.MethodGet, "/other", nil).want(t, http.StatusOK); r.body != "running" {
		t.Errorf("got %q, want running", r.body)
	}
	for range 3 { // refused by the back-off; that is no news
		g.get().want(t, http.StatusServiceUnavailable)
	}
	lines := g.logged("obtaining token failed")
	if len(lines) != 1 || !strings.Contains(lines[0], `"level":"warn"`) || !strings.Contains(lines[0], `"client_id":"gateway"`) {
		t.Errorf("got %q, want one warning that names the client", lines)
	}
	auth.wantAsked(t, 1)
}
