package outboundauth

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// handleErrors makes what handle_errors knows visible to a test.
const handleErrors = `
	handle_errors {
		header X-Handled yes
		respond "{err.status_code} {err.message}"
	}`

func TestMissingTokenGoesThroughHandleErrors(t *testing.T) {
	for _, test := range []struct {
		name, settings string
		answer         func(http.ResponseWriter, tokenRequest) bool
		status         int
		want           []string // in the message
		requests       int      // 0: any number
	}{
		{
			"refused", "", refusing(http.StatusUnauthorized, `{"error":"invalid_client","error_description":"no such client"}`),
			http.StatusServiceUnavailable,
			[]string{"invalid_client", "no such client", "401"},
			1,
		},
		{
			"in trouble", "", refusing(http.StatusInternalServerError, `oops`),
			http.StatusServiceUnavailable,
			[]string{"status 500"},
			0,
		},
		{
			"not JSON", "", refusing(http.StatusOK, `<html>`),
			http.StatusServiceUnavailable,
			[]string{"no JSON object"},
			0,
		},
		{
			"hangs", "token_timeout 100ms", func(_ http.ResponseWriter, r tokenRequest) bool { <-r.ctx.Done(); return true },
			http.StatusGatewayTimeout,
			[]string{"timeout", "token_timeout"},
			0,
		},
		{
			"secret that resolves to nothing", "client_secret {env.OUTBOUNDAUTH_TEST_NONE}", nil,
			http.StatusServiceUnavailable,
			[]string{"client_secret", "env.OUTBOUNDAUTH_TEST_NONE"},
			-1,
		},
		{
			"secret in a file that does not exist", "client_secret {file./no/such/secret}", nil,
			http.StatusServiceUnavailable,
			[]string{"client_secret", "file./no/such/secret"},
			-1,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			auth := newAuthServer(t)
			auth.script(test.answer)
			up := newUpstream(t, auth)
			secret := "client_secret canary-secret\n"
			if strings.Contains(test.settings, "client_secret") {
				secret = ""
			}
			g := startGateway(t, expand(`reverse_proxy $UP {
				transport oauth2 {
					token_url $AUTH/token
					client_id gateway
					$SETTINGS
				}
			}`, "$UP", up.addr, "$AUTH", auth.URL, "$SETTINGS", secret+test.settings)+handleErrors)

			for range 3 { // those that follow are in the back-off
				r := g.get().want(t, test.status)
				if r.header.Get("X-Handled") != "yes" {
					t.Error("got an answer past handle_errors, want one through it")
				}
				for _, want := range append(test.want, http.StatusText(0)) {
					if !strings.Contains(r.body, want) {
						t.Errorf("got %q, want it to tell %q", r.body, want)
					}
				}
				if r.header.Get("Proxy-Authorization") != "" {
					t.Errorf("got %v, want none of the marks between transport and handler", r.header)
				}
				if test.status == http.StatusServiceUnavailable && r.header.Get("Retry-After") == "" {
					t.Error("got no Retry-After, want one")
				}
			}
			if got := up.got(); len(got) != 0 {
				t.Errorf("got %v at the upstream, want nothing", got)
			}
			if test.requests != 0 {
				auth.wantAsked(t, max(0, test.requests))
			}
		})
	}
}

// Whoever answers TRACE sends back what it got (RFC 9110 §9.3.8), the token too.
func TestTraceIsRefused(t *testing.T) {
	auth := newAuthServer(t)
	up, off := newUpstream(t, auth), newUpstream(t, nil)
	g := startGateway(t, expand(`handle /off {
		reverse_proxy $OFF {
			transport oauth2 {
				upstream $OFF off
			}
		}
	}
	handle {
		reverse_proxy $UP {
			fail_duration 1m
			lb_retries 2
			transport oauth2 {
				token_url $AUTH/token
				client_id gateway
				client_secret s
			}
		}
	}`, "$UP", up.addr, "$OFF", off.addr, "$AUTH", auth.URL)+strings.Replace(handleErrors, "respond \"", "respond \"{http.oauth2.error} ", 1))
	for _, method := range []string{http.MethodTrace, "TRACK", "trace", "Track"} {
		r := g.send(method, "/", nil).want(t, http.StatusMethodNotAllowed)
		if r.header.Get("X-Handled") != "yes" || !strings.HasPrefix(r.body, "method 405 ") || !strings.Contains(r.body, "token") {
			t.Errorf("%s: got %q, want the reason, through handle_errors", method, r.body)
		}
		if allow := r.header.Get("Allow"); !strings.Contains(allow, "GET, ") || strings.Contains(strings.ToUpper(allow), "TRA") {
			t.Errorf("%s: got Allow: %q, want the other methods", method, allow)
		}
		if r.header.Get("Retry-After") != "" || r.header.Get("Proxy-Authorization") != "" {
			t.Errorf("%s: got %v, want neither Retry-After nor a mark", method, r.header)
		}
		g.send(method, "/off", nil).want(t, http.StatusOK)
	}
	if got := len(up.got()); got != 0 {
		t.Errorf("got %d requests at the upstream, want none", got)
	}
	if got := off.got(); len(got) != 4 || got[2].method != "trace" {
		t.Errorf("got %v at the upstream that is off, want all as they were sent", got)
	}
	for _, method := range []string{http.MethodGet, http.MethodOptions, "TRACES", "PROPFIND"} {
		g.send(method, "/", nil).want(t, http.StatusOK) // and the upstream is healthy
	}
}

// Who answers CONNECT with 200 opens a tunnel (RFC 9110 §9.3.6): over HTTP/2, the caller
// could send requests of its own through it, with the tenant of another.
func TestConnectIsRefused(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := newGateway(t)
	g.global = "servers {\nprotocols h1 h2c\n}\n"
	g.load(proxySite(up, auth, ""))
	wantConnectRefused(t, g)
	g.load(proxySite(up, auth, "client_by {http.request.header.X-Key}\nclient acme\nclient default off"))
	wantConnectRefused(t, g) // although it is without a token: others use the connection
	if got := len(up.got()); got != 0 {
		t.Errorf("got %d requests at the upstream, want none", got)
	}
}

// wantConnectRefused fails the test unless the gateway refuses CONNECT in both protocols.
func wantConnectRefused(t *testing.T, g *gateway) {
	t.Helper()
	var h2c http.Protocols
	h2c.SetUnencryptedHTTP2(true)
	for _, transport := range []*http.Transport{{}, {Protocols: &h2c}} {
		defer transport.CloseIdleConnections()
		body, sends := io.Pipe()
		defer sends.Close()
		res, err := transport.RoundTrip((&http.Request{
			Method: http.MethodConnect, URL: &url.URL{Scheme: "http", Host: g.addr}, Host: "api.example.com:443", Header: http.Header{}, Body: body,
		}).WithContext(t.Context()))
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != http.StatusMethodNotAllowed || res.Header.Get("Allow") == "" {
			t.Errorf("got %s and Allow: %q, want 405 and the other methods", res.Status, res.Header.Get("Allow"))
		}
	}
}

// What the transport adds to the response routes is provisioned with them, so
// they must come after the transport, and there must be a parent to add it to.
func TestResponseRoutesAreProvisionedAfterTheTransport(t *testing.T) {
	base, err := caddy.ProvisionContext(new(caddy.Config))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := caddy.NewContext(base)
	t.Cleanup(cancel)
	loaded, err := ctx.LoadModuleByID("http.handlers.reverse_proxy", encode(t, map[string]any{
		"upstreams": []any{map[string]any{"dial": "127.0.0.1:1"}},
		"transport": map[string]any{"protocol": "oauth2", "credentials": map[string]any{
			"token_url": "http://127.0.0.1:1/token", "client_id": "c", "client_secret": "s",
		}},
		"handle_response": []any{map[string]any{"status_code": 503}},
	}))
	if err != nil {
		t.Fatal(err)
	}
	routes := loaded.(*reverseproxy.Handler).HandleResponse
	if len(routes) != 2 {
		t.Fatalf("got %d response routes, want ours and the user's", len(routes))
	}
	ours := routes[0].Routes
	if len(ours) != 1 || len(ours[0].Handlers) != 1 {
		t.Fatalf("got first the routes %v, want one that is provisioned", ours)
	}
	if _, ok := ours[0].Handlers[0].(*failureHandler); !ok {
		t.Errorf("got the handler %T, want that which raises the error", ours[0].Handlers[0])
	}
}

func TestUnreachableAuthorizationServer(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := startGateway(t, expand(`reverse_proxy $UP {
		transport oauth2 {
			token_url http://$NOBODY/token
			client_id gateway
			client_secret s
		}
	}`, "$UP", up.addr, "$NOBODY", heldAddress(t))+handleErrors)
	r := g.get().want(t, http.StatusServiceUnavailable)
	if !strings.Contains(r.body, "network") || !strings.Contains(r.body, "refused") {
		t.Errorf("got %q, want that the connection was refused", r.body)
	}
}

// A request that is refused frees its connection: the next one gets through.
func TestRefusedRequestWithABody(t *testing.T) {
	auth := newAuthServer(t)
	auth.script(refusing(http.StatusBadRequest, `{"error":"invalid_scope"}`))
	up := newUpstream(t, auth)
	g := startGateway(t, proxySite(up, auth, "")+handleErrors)
	for range 5 {
		r := g.send(http.MethodPost, "/", strings.NewReader(strings.Repeat("x", 100_000))).want(t, http.StatusServiceUnavailable)
		if !strings.HasPrefix(r.body, "503 ") {
			t.Errorf("got %q, want the error", r.body)
		}
	}
}

func TestClientThatGoesAwayWhileWaiting(t *testing.T) {
	auth := newAuthServer(t)
	release := auth.hang()
	defer release()
	up := newUpstream(t, auth)
	g := startGateway(t, proxySite(up, auth, "")+handleErrors)

	ctx, leave := context.WithCancel(t.Context())
	stays, leaves := make(chan reply), make(chan reply)
	go func() { stays <- g.send(http.MethodGet, "/stays", nil) }()
	go func() { leaves <- g.sendCtx(ctx, http.MethodGet, "/leaves", nil) }()
	eventually(t, func() bool { return waiting() == 2 }, "both requests to wait for the token")

	leave()
	if r := <-leaves; r.err == nil {
		t.Fatalf("got %v for the client that left, want nothing", r)
	}
	eventually(t, func() bool { return len(g.logged(`"http.log.access`, `"uri":"/leaves"`)) == 1 }, "the line in the access log")
	for _, line := range g.logged(`"http.log.access`, `"uri":"/leaves"`) {
		if !strings.Contains(line, `"status":499`) {
			t.Errorf("got %s, want status 499", line)
		}
	}
	if got := g.logged(`"level":"error"`); len(got) != 0 {
		t.Errorf("got %v in the log, want no error", got)
	}

	release()
	r := (<-stays).want(t, http.StatusOK)
	if r.body != "accepted" {
		t.Errorf("got %q, want the upstream's answer", r.body)
	}
	auth.wantAsked(t, 1)
	if got := len(up.got()); got != 1 {
		t.Errorf("got %d requests at the upstream, want only that of the client who stayed", got)
	}
}

// waiting is how many callers wait for a token.
func waiting() int {
	n := 0
	sources.Range(func(_, value any) bool {
		source := value.(*tokenSource)
		source.mu.Lock()
		defer source.mu.Unlock()
		if source.inflight != nil {
			n += source.inflight.waiters
		}
		return true
	})
	return n
}

// The fetch belongs to the source: when everybody has left, its token is
// still kept for the next.
func TestFetchGoesOnWhenAllClientsLeave(t *testing.T) {
	auth := newAuthServer(t)
	release := auth.hang()
	defer release()
	up := newUpstream(t, auth)
	g := startGateway(t, proxySite(up, auth, ""))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if r := g.sendCtx(ctx, http.MethodGet, "/", nil); r.err == nil {
		t.Fatalf("got %v, want that the client left", r)
	}
	eventually(t, func() bool { return waiting() == 0 }, "nobody to wait")
	release()
	g.get().want(t, http.StatusOK)
	auth.wantAsked(t, 1)
}

func TestColdSourceServesAThousandRequestsWithOneTokenRequest(t *testing.T) {
	auth := newAuthServer(t)
	auth.delay = 300 * time.Millisecond
	up := newUpstream(t, auth)
	g := startGateway(t, proxySite(up, auth, ""))
	wantAll(t, g.burst(1000), http.StatusOK)
	auth.wantAsked(t, 1)
	if got := len(up.got()); got != 1000 {
		t.Errorf("got %d requests at the upstream, want 1000", got)
	}
}

// An upstream that fails by itself fails as with transport http.
func TestUpstreamFailureIsTheUpstreams(t *testing.T) {
	auth := newAuthServer(t)
	g := startGateway(t, expand(`reverse_proxy $NOBODY {
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret s
		}
	}`, "$NOBODY", heldAddress(t), "$AUTH", auth.URL)+handleErrors)
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		r := g.send(method, "/", nil).want(t, http.StatusBadGateway)
		if !strings.Contains(r.body, "connection refused") {
			t.Errorf("got %q, want that the connection was refused", r.body)
		}
	}
	auth.wantAsked(t, 1)
}
