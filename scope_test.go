package outboundauth

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// grantOf is an answer with a scope, as JSON; "": without.
func grantOf(scope string) string {
	if scope == "" {
		return goodAnswer
	}
	return strings.TrimSuffix(goodAnswer, "}") + `,"scope":` + scope + "}"
}

func TestLessThanTheConfiguredScopesIsWarnedOfOnce(t *testing.T) {
	for _, test := range []struct {
		name    string
		scopes  []string
		granted []string // in turn
		lacking []string // in each warning
	}{
		{"absent", []string{"a", "b"}, []string{""}, nil},
		{"null", []string{"a", "b"}, []string{"null"}, nil},
		{"empty", []string{"a", "b"}, []string{`""`}, nil},
		{"nothing but a space", []string{"a"}, []string{`" "`}, nil},
		{"no string", []string{"a", "b"}, []string{`["a"]`, `1`}, nil},
		{"equal", []string{"a", "b"}, []string{`"a b"`}, nil},
		{"in another order", []string{"a", "b"}, []string{`"b a"`}, nil},
		{"with more spaces", []string{"a", "b"}, []string{`" b  a "`}, nil},
		{"wider", []string{"a", "b"}, []string{`"a b c"`}, nil},
		{"none asked for", nil, []string{`"a"`}, nil},

		{"narrower", []string{"a", "b", "c"}, []string{`"b"`}, []string{"[a c]"}},
		{"of another case", []string{"a", "b"}, []string{`"A b"`}, []string{"[a]"}},
		{"a part of it", []string{"orders.read"}, []string{`"orders orders.read.all"`}, []string{"[orders.read]"}},
		{"others", []string{"a"}, []string{`"x y"`}, []string{"[a]"}},
		{"the same again", []string{"a", "b"}, []string{`"a"`, `"a"`, `"a"`}, []string{"[b]"}},
		{"the same after all", []string{"a", "b"}, []string{`"a"`, `"a b"`, "", `"a"`}, []string{"[b]"}},
		{"others in turn", []string{"a", "b"}, []string{`"a"`, `"b"`, `"b"`, `"b x"`}, []string{"[b]", "[a]"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var answer string
			server := &wire{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, answer) })}
			core, logs := observer.New(zapcore.WarnLevel)
			c := canaryCredentials("https://auth.example.com/token")
			c.Scopes = test.scopes
			cl := newLoggingClient(t, c, server, zap.New(core))
			for _, scope := range test.granted {
				answer = grantOf(scope)
				if g, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil || g.accessToken != "t0ken" {
					t.Errorf("request() = %v, %v for the scope %s, want the token", g, err, scope)
				}
			}
			var lacking []string
			for _, entry := range logs.All() {
				fields := entry.ContextMap()
				lacking = append(lacking, fmt.Sprint(fields["not_granted"]))
				if !strings.Contains(entry.Message, "check scopes") || fields["token_endpoint"] != "auth.example.com" || fields["client_id"] != c.ClientID {
					t.Errorf("got %q %v in the log, want what to check, and the client", entry.Message, fields)
				}
				wantNoCanaryIn(t, fmt.Sprint(fields))
			}
			if !slices.Equal(lacking, test.lacking) {
				t.Errorf("got warnings of %q, want %q", lacking, test.lacking)
			}
		})
	}
}

// The server may write anything there, the client's secret too.
func TestGrantedScopeIsNotLogged(t *testing.T) {
	for _, scope := range []string{canarySecret, "a x-" + canarySecret, `x\r\ny` + canaryToken, "Y2FuYXJ5LXMzY3JldA=="} {
		core, logs := observer.New(zapcore.DebugLevel)
		c := canaryCredentials("https://auth.example.com/token")
		c.Scopes = []string{"a", "b"}
		cl := newLoggingClient(t, c, answering(http.StatusOK, grantOf(`"`+scope+`"`)), zap.New(core))
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Fatalf("request() = %v, want no error", err)
		}
		if logs.Len() != 1 {
			t.Fatalf("got %v in the log, want one warning", logs.All())
		}
		for _, entry := range logs.All() {
			wantNoCanaryIn(t, fmt.Sprint(entry.Message, entry.ContextMap()))
			if got := fmt.Sprint(entry.ContextMap()["not_granted"]); !strings.Contains(got, "b") {
				t.Errorf("got %s, want which of the configured scopes are lacking", got)
			}
		}
	}
}

// However long the list is.
func TestManyScopesAreAllGranted(t *testing.T) {
	c := canaryCredentials("https://auth.example.com/token")
	for i := range 100 {
		c.Scopes = append(c.Scopes, fmt.Sprintf("https://api.example.com/orders.%d", i))
	}
	core, logs := observer.New(zapcore.WarnLevel)
	cl := newLoggingClient(t, c, answering(http.StatusOK, grantOf(`"`+strings.Join(c.Scopes, " ")+`"`)), zap.New(core))
	if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
		t.Fatalf("request() = %v, want no error", err)
	}
	if got := logs.All(); len(got) != 0 {
		t.Errorf("got %v in the log, want no warning", got)
	}
}

// In the gateway, the warning comes with the token, and no request fails.
func TestLessThanTheConfiguredScopesIsGoodEnoughToTry(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	auth.script(func(w http.ResponseWriter, r tokenRequest) bool {
		fmt.Fprintf(w, `{"access_token":%q,"token_type":"Bearer","scope":"orders.read"}`, auth.issue(r.client))
		return true
	})
	g := startGateway(t, proxySite(up, auth, "scopes orders.read orders.write"))
	g.get().want(t, http.StatusOK)
	auth.revoke()
	g.get().want(t, http.StatusOK)
	if got := auth.asked()[0].form["scope"]; !slices.Equal(got, []string{"orders.read orders.write"}) {
		t.Errorf("got the scope %q, want both in one parameter", got)
	}
	auth.wantAsked(t, 2)
	// The lines of a fetch are written while those who wait for it go on.
	eventually(t, func() bool { return len(g.logged("obtained token")) == 2 }, "two lines about tokens")
	if got := g.logged("less than the scopes", `"level":"warn"`, `"not_granted":["orders.write"]`); len(got) != 1 {
		t.Errorf("got %d warnings of %q, want one", len(got), g.logged("scopes"))
	}
}

func TestScopeCharacters(t *testing.T) {
	for r := range rune(0x180) {
		// RFC 6749 §3.3: %x21 / %x23-5B / %x5D-7E
		legal := r == 0x21 || (r >= 0x23 && r <= 0x5b) || (r >= 0x5d && r <= 0x7e)
		c := canaryCredentials("https://auth.example.com/token")
		c.Scopes = []string{"good", "a" + string(r) + "b"}
		if err := c.check(); (err == nil) != legal {
			t.Errorf("check() = %v for a scope with %q, want that it is legal: %v", err, r, legal)
		}
	}
}

func TestBadScopesAreErrorsAtLoad(t *testing.T) {
	const bad = "scopes: one is not a scope (RFC 6749 section 3.3: printable ASCII without spaces, quotes and backslashes)"
	t.Setenv("TEST_SCOPE_LIST", "  orders.read\torders.write ")
	t.Setenv("TEST_SCOPE_BAD", `orders\read`)
	for _, test := range []struct{ scopes, want string }{
		{"https://graph.example.com/.default user:read a+b", ""},
		{"a{b", ""},
		{"{env.TEST_SCOPE_LIST}", ""},
		{`"a b"`, bad},
		{"`a\"b`", bad},
		{`a\b`, bad},
		{"größe", bad},
		{`""`, bad},
		{"a {env.TEST_SCOPE_BAD}", bad},
	} {
		wantError(t, loadError(t, proxyConfig("127.0.0.1:9000", clientSettings+"scopes "+test.scopes)), test.want)
	}
	for _, scope := range []string{"a\nb", "a\x00b", "a\u00a0b"} {
		_, _, err := loadTransport(t, "127.0.0.1:9000", map[string]any{"credentials": map[string]any{
			"token_url": "https://auth.example.com/token", "client_id": "id", "client_secret": "s", "scopes": []string{scope},
		}})
		wantError(t, err, "is not a scope")
	}
}

// A list of scopes in one placeholder is sent as it would be if written out.
func TestScopesFromAPlaceholder(t *testing.T) {
	t.Setenv("TEST_SCOPE_LIST", "  orders.read\torders.write ")
	c := canaryCredentials("https://auth.example.com/token")
	c.Scopes = []string{"first", "{env.TEST_SCOPE_LIST}"}
	server := answering(http.StatusOK, grantOf(`"first orders.read orders.write"`))
	core, logs := observer.New(zapcore.WarnLevel)
	cl := newLoggingClient(t, c, server, zap.New(core))
	g, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	if err != nil || g.lifetime != time.Hour {
		t.Fatalf("request() = %v, %v, want no error", g, err)
	}
	if sent := server.requests()[0]; !strings.HasSuffix(sent, "&scope=first+orders.read+orders.write") {
		t.Errorf("sent %q, want all scopes in one parameter", sent)
	}
	if got := logs.All(); len(got) != 0 {
		t.Errorf("got %v in the log, want no warning", got)
	}
}
