package outboundauth

import (
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// healthy counts health checks and answers them all with status.
func (u *upstream) checked(status int) *atomic.Int32 {
	var n atomic.Int32
	u.script(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/health" {
			return false
		}
		u.record(r)
		n.Add(1)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, "checked")
		return true
	})
	return &n
}

// checks returns the health checks so far.
func (u *upstream) checks() []received {
	var checks []received
	for _, r := range u.got() {
		if r.path == "/health" {
			checks = append(checks, r)
		}
	}
	return checks
}

const checkedSite = `reverse_proxy $UP {
	health_uri /health
	health_interval 20ms
	$PROXY
	transport oauth2 {
		token_url $AUTH/token
		client_id gateway
		client_secret s
		header X-Static always
		tenant {http.request.header.X-Org}
	}
}`

func TestHealthChecksCarryTheCachedToken(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	n := up.checked(http.StatusOK)
	g := startGateway(t, expand(checkedSite, "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", "health_headers {\nX-Tenant-Id of-the-check\n}"))
	g.get("X-Org", "acme").want(t, http.StatusOK)
	seen := n.Load()
	eventually(t, func() bool { return n.Load() >= seen+3 }, "health checks")
	check := up.last(t)
	if client := check.bearerOf(auth); client != "gateway" {
		t.Errorf("got the token of %q, want that of gateway", client)
	}
	check.wantHeader(t, "X-Static", "always")
	check.wantHeader(t, "X-Tenant-Id", "") // nobody's, as no client asked
	auth.wantAsked(t, 1)
}

// Caddy begins the first check before the config runs. It waits for its token.
func TestFirstHealthCheckCarriesTheToken(t *testing.T) {
	auth := newAuthServer(t)
	auth.delay = 200 * time.Millisecond
	up := newUpstream(t, auth) // and so do its health checks
	g := startGateway(t, expand(strings.Replace(checkedSite, "20ms", "1h", 1), "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", ""))
	g.get().want(t, http.StatusOK)
	eventually(t, func() bool { return len(up.checks()) == 1 }, "the first check")
	if check := up.checks()[0]; check.bearerOf(auth) != "gateway" {
		t.Errorf("got the token %q, want that of gateway", check.header.Get("Authorization"))
	}
	g.get().want(t, http.StatusOK)
	g.wantNeverDown(t)
	auth.wantAsked(t, 1)
}

func TestHealthChecksDoNotReplaceTokens(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	n := up.checked(http.StatusUnauthorized)
	g := startGateway(t, expand(checkedSite, "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", "health_status 401"))
	g.get().want(t, http.StatusOK)
	seen := n.Load()
	eventually(t, func() bool { return n.Load() >= seen+5 }, "health checks")
	g.get().want(t, http.StatusOK)
	auth.wantAsked(t, 1)
}

// Another upstream on the same host has a block of its own.
func TestHealthCheckOfAnUpstreamWithoutABlock(t *testing.T) {
	for _, block := range []string{"upstream $B off", "upstream $B {\nclient_id other\n}"} {
		t.Run(block, func(t *testing.T) {
			auth := newAuthServer(t)
			up := newUpstream(t, auth) // lets nobody in without a token
			g := startGateway(t, expand(`reverse_proxy $A {
				lb_policy first
				health_uri /health
				health_interval 20ms
				transport oauth2 {
					token_url $AUTH/token
					client_id gateway
					client_secret s
					$BLOCK
				}
			}`, "$A", "$UP $B", "$UP", up.addr, "$BLOCK", block, "$B", newUpstream(t, nil).addr, "$AUTH", auth.URL))
			eventually(t, func() bool {
				return g.get().status == http.StatusOK && slices.ContainsFunc(up.got(), func(r received) bool { return r.path == "/" })
			}, "the first upstream to be up")
		})
	}
}

// A check of another port still belongs to the upstream whose block names it.
func TestHealthCheckOfAnotherPort(t *testing.T) {
	auth := newAuthServer(t)
	up, checks := newUpstream(t, auth), newUpstream(t, auth)
	n := checks.checked(http.StatusOK)
	_, port, _ := strings.Cut(checks.addr, ":")
	g := startGateway(t, expand(`reverse_proxy $UP {
		health_uri /health
		health_port $PORT
		health_interval 20ms
		transport oauth2 {
			upstream $UP {
				token_url $AUTH/token
				client_id gateway
				client_secret s
			}
		}
	}`, "$UP", up.addr, "$AUTH", auth.URL, "$PORT", port))
	eventually(t, func() bool { return n.Load() >= 2 || len(g.logged("HTTP request failed")) > 0 }, "health checks")
	if got := g.logged("HTTP request failed"); len(got) != 0 {
		t.Fatalf("got %q, want that the check succeeds", got[0])
	}
	g.get().want(t, http.StatusOK)
}

func TestHealthChecksOverTLS(t *testing.T) {
	auth := newAuthServer(t)
	up := newUnstartedUpstream(t, auth)
	up.Config.ErrorLog = discardLog
	up.StartTLS()
	up.addr = up.Listener.Addr().String()
	n := up.checked(http.StatusOK)
	g := startGateway(t, expand(`reverse_proxy https://$UP {
		health_uri /health
		health_interval 20ms
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret s
			tls_insecure_skip_verify
		}
	}`, "$UP", up.addr, "$AUTH", auth.URL))
	g.get().want(t, http.StatusOK)
	seen := n.Load()
	// On a busy machine, a check from before the token may come last.
	eventually(t, func() bool { return n.Load() >= seen+2 && up.last(t).bearerOf(auth) == "gateway" },
		"health checks with the token of gateway")
}

// An upstream whose checks need the token stays up, however rare they are and however
// short the tokens live.
func TestHealthChecksKeepATokenAtHand(t *testing.T) {
	auth := newAuthServer(t)
	auth.script(func(w http.ResponseWriter, r tokenRequest) bool {
		fmt.Fprintf(w, `{"access_token":%q,"token_type":"Bearer","expires_in":1}`, auth.issue(r.client))
		return true
	})
	up := newUpstream(t, auth)
	g := startGateway(t, expand(strings.Replace(checkedSite, "20ms", "1h", 1), "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", ""))
	eventually(t, func() bool { return len(auth.asked()) >= 4 }, "tokens that nobody has asked for")
	g.get().want(t, http.StatusOK)
	g.wantNeverDown(t)
}

func TestTokensThatHealthChecksNeed(t *testing.T) {
	a, b := newUpstream(t, nil), newUpstream(t, nil)
	_, port, _ := strings.Cut(b.addr, ":")
	for _, test := range []struct {
		checks, block string
		kept          int // of the client gateway
	}{
		{"", "", 0},
		{"health_interval 1h", "", 0}, // what is missing is health_uri
		{"health_uri /", "", 1},
		{"health_uri /", "upstream $A $B off", 0},
		{"health_uri /", "upstream $A {\nclient_id other\n}", 1},
		{"health_uri /", "upstream $A $B {\nclient_id other\n}", 0},
		{"health_uri /\nhealth_port 1", "", 1},
		{"health_uri /\nhealth_port 1", "upstream $A {\nclient_id other\n}", 0},
		{"health_port $PORT", "upstream $A {\nclient_id other\n}", 1}, // that of $B
		{"health_uri /\nhealth_upstream 127.0.0.1:1", "upstream $A {\nclient_id other\n}", 0},
		{"health_uri /\nhealth_upstream $B", "upstream $A {\nclient_id other\n}", 1},
	} {
		auth := newAuthServer(t)
		g := newGateway(t)
		for range 2 { // the second time, the old config takes its part back
			g.load(expand(`reverse_proxy $A $B {
				$CHECKS
				transport oauth2 {
					token_url $AUTH/token
					client_id gateway
					client_secret s
					$BLOCK
				}
			}`, "$CHECKS", expand(test.checks, "$B", b.addr, "$PORT", port), "$BLOCK", expand(test.block, "$A", a.addr, "$B", b.addr),
				"$A", a.addr, "$B", b.addr, "$AUTH", auth.URL))
			source := sourceOf(t, strings.TrimPrefix(auth.URL, "http://")+"/gateway")
			eventually(t, func() bool { return source.keptBy() == test.kept }, "%+v: got %d, want %d", test, source.keptBy(), test.kept)
		}
		g.stop()
	}
}

func (s *tokenSource) keptBy() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kept
}

// A token that the upstream has forgotten makes it look down, and no request
// gets through by which the token would be replaced.
func TestRefusedHealthCheckReplacesTheToken(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := startGateway(t, expand(checkedSite, "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", ""))
	eventually(t, func() bool { return g.get().status == http.StatusOK }, "an upstream that is up")
	auth.revoke()
	eventually(t, func() bool { return len(auth.asked()) == 2 }, "another token")
	eventually(t, func() bool { return g.get().status == http.StatusOK }, "an upstream that is up again")
	auth.wantAsked(t, 2)
	eventually(t, func() bool { return len(g.logged("the upstream refused the token", up.addr)) == 1 }, "one line in the log")
}

// An upstream that refuses every check must not cause a token request for each.
func TestChecksThatAreAlwaysRefusedCauseFewTokenRequests(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	n := up.checked(http.StatusUnauthorized)
	started := time.Now()
	startGateway(t, expand(checkedSite, "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", ""))
	eventually(t, func() bool { return n.Load() >= 40 }, "health checks")
	got, took := len(auth.asked()), time.Since(started)
	// On a slow machine, there is time for more.
	if most := 2 + int(took/permanentBackoff); got > most {
		t.Errorf("got %d token requests after %d checks in %v, want %d at most", got, n.Load(), took, most)
	}
}

// Caddy starts the checks of a config that it only validates.
func TestHealthChecksOfAConfigThatDoesNotRun(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, nil)
	g := newGateway(t)
	base, err := caddy.ProvisionContext(&caddy.Config{Logging: &caddy.Logging{Logs: map[string]*caddy.CustomLog{"default": {
		BaseLog: caddy.BaseLog{
			Level:     "DEBUG",
			WriterRaw: encode(t, map[string]string{"output": "file", "filename": filepath.Join(g.dir, "log")}),
		},
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := caddy.NewContext(base)
	defer cancel()
	if _, err := ctx.LoadModuleByID("http.handlers.reverse_proxy", encode(t, map[string]any{
		"upstreams":     []any{map[string]any{"dial": up.addr}},
		"health_checks": map[string]any{"active": map[string]any{"uri": "/health", "interval": "20ms", "timeout": "30ms"}},
		"transport": map[string]any{"protocol": "oauth2", "credentials": map[string]any{
			"token_url": auth.URL + "/token", "client_id": "c", "client_secret": "s",
		}},
	})); err != nil {
		t.Fatal(err)
	}
	g.wantKeptVerdicts(t, true)
	g.wantNeverDown(t)
	auth.wantAsked(t, 0)
	if got := up.got(); len(got) != 0 {
		t.Errorf("got %v at the upstream, want nothing", got)
	}
}

// In the reserve, an upstream may take the token for expired. Its answer to a check
// then says nothing about the upstream, and must not be its verdict while there is no
// other token.
func TestHealthCheckWithATokenThatHasExpiredUpstream(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := startGateway(t, expand(checkedSite, "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", ""))
	eventually(t, func() bool { return len(up.checks()) > 2 }, "health checks")
	g.get().want(t, http.StatusOK)
	auth.script(refusing(http.StatusServiceUnavailable, ""))
	theSource(t).age(func(t *token) {
		due(t)
		t.usableTo = time.Now().Add(-time.Second)
		t.expires = time.Now().Add(2 * time.Second) // time for some checks, however busy the machine is
	})
	auth.revoke() // it has expired by the upstream's clock
	refused := len(up.checks())
	eventually(t, func() bool { return len(up.checks()) > refused+2 }, "checks with the token")
	eventually(t, func() bool { return g.get().status == http.StatusServiceUnavailable }, "the end of the token")
	auth.script(nil)
	eventually(t, func() bool { return g.get().status == http.StatusOK }, "a token, and an upstream that is up")
	if got := g.logged(`health_checker.active"`); len(got) > 0 {
		t.Errorf("got %q in the log, want no check that failed", got)
	}
}
