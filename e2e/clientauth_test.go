package e2e

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestClientAuthentication obtains a token as each client of the server, among
// them some whose id and secret are full of characters that a header or a form
// must not hold as they are. RFC 6749 permits printable ASCII, and the server
// takes no more than that.
func TestClientAuthentication(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	for _, c := range clients(t) {
		t.Run(c.ID, func(t *testing.T) {
			before := as.tokenRequests(t)
			u := newUpstream(t, as, c)
			gw := startProxy(t, proxy{to: u.serve(t), as: as, client: c})
			for range 3 {
				gw.get(t, "/", 200)
			}
			u.wantAccepted(t, 3, "HTTP/1.1")
			if got := as.tokenRequests(t) - before; got != 1 {
				t.Errorf("token requests = %d, want 1", got)
			}
		})
	}
}

// route is a reverse_proxy whose requests go out with a client's token. Unlike
// proxy, it leaves to the test where that is from and how the client
// authenticates.
type route struct {
	client   client
	to       string
	settings []string // of the transport
	scopes   string   // default: those that the upstreams want
	resource string   // the same
}

// String returns the route in the Caddyfile's terms.
func (r route) String() string {
	method := r.client.Method
	if method == "self_signed_tls_client_auth" {
		// To a client, there is no difference.
		method = "tls_client_auth"
	}
	return fmt.Sprintf("reverse_proxy %s {\n"+
		"	transport oauth2 {\n"+
		"		client_id `%s`\n"+
		"		auth_method %s\n"+
		"		scopes %s\n"+
		"		resource %s\n"+
		"		tenant %s\n"+
		"		%s\n"+
		"	}\n"+
		"}\n",
		r.to, r.client.ID, method, cmp.Or(r.scopes, scopes), cmp.Or(r.resource, resource), tenant,
		strings.Join(r.settings, "\n\t\t"))
}

// startRoutes starts one gateway for several clients, which is much quicker
// than one for each. The n-th is found at routePath(n) and below.
func startRoutes(t *testing.T, routes []route, env ...string) *gateway {
	t.Helper()
	return startGateway(t, gatewayConfig{site: siteOf(routes), env: env})
}

// siteOf returns the directives of a site with these routes.
func siteOf(routes []route) string {
	var site strings.Builder
	for n, r := range routes {
		fmt.Fprintf(&site, "handle /%d/* {\n%s}\n", n, r)
	}
	return site.String()
}

func routePath(n int) string { return fmt.Sprintf("/%d/api", n) }

// tokenURL is the setting for the server's token endpoint.
func (as *authServer) tokenURL() string { return "token_url " + as.issuer + "/token" }

// writeFile returns the path of a new file.
func writeFile(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	replaceFile(t, path, data)
	return path
}

func replaceFile(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := replace(path, data); err != nil {
		t.Fatal(err)
	}
}

// replace writes a file as those do who keep secrets fresh: nobody ever reads
// half of it.
func replace(path string, data []byte) error {
	next := path + ".next"
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return err
	}
	return os.Rename(next, path)
}

// warnings returns what the transport has logged about a client at level warn
// or above, in words: the names of the fields, which are those of settings, and
// the client itself are left out. It waits for the first, because requests are
// answered before the log is written.
func (gw *gateway) warnings(t *testing.T, c client) (found []string) {
	t.Helper()
	await(t, "a warning", func() bool {
		found = nil
		for line := range strings.Lines(gw.output.String()) {
			var entry struct {
				Level     string `json:"level"`
				Logger    string `json:"logger"`
				Message   string `json:"msg"`
				Error     string `json:"error"`
				Supported string `json:"supported"`
				ClientID  string `json:"client_id"`
			}
			// Not all that Caddy writes is JSON.
			if json.Unmarshal([]byte(line), &entry) != nil || entry.ClientID != c.ID ||
				!strings.HasSuffix(entry.Logger, "transport.oauth2") {
				continue
			}
			if entry.Level == "warn" || entry.Level == "error" {
				found = append(found, fmt.Sprintf("%s: %s %s", entry.Message, entry.Error, entry.Supported))
			}
		}
		return len(found) > 0
	})
	return found
}

// commandResult is what a run of `caddy oauth2-token` has come to.
type commandResult struct {
	stdout, stderr string
	exit           int
}

// oauth2Token runs `caddy oauth2-token` with the gateway's environment.
func (gw *gateway) oauth2Token(t *testing.T, site string, args ...string) commandResult {
	t.Helper()
	cmd := gw.command("oauth2-token", gw.writeCaddyfile(t, site), args...)
	cmd.Env = gw.cmd.Env
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return commandResult{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// TestFailuresAreExplained has everything wrong that people get wrong. The
// client of the gateway learns no more than that the service is unavailable; the
// operator reads, once in the log and whenever asking with `caddy oauth2-token`,
// which setting to change.
func TestFailuresAreExplained(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	const secret = "the-right-secret-of-the-client"
	key, otherKey := newKey(t, "ES256"), newKey(t, "ES256")
	keyFile := writeFile(t, "key.pem", pkcs8(t, key))
	cert, otherCert := selfSigned(t, "right"), selfSigned(t, "wrong")
	expired, err := signAssertion(key, "expired assertion", as.issuer, time.Now().Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}

	tests := []struct {
		name     string
		known    *client // to the server; nil: not at all
		method   string  // of the gateway
		settings []string
		scopes   string
		resource string
		want     string // the setting to change
		says     string // what else is to be told
	}{
		{
			name:     "unknown client",
			method:   "client_secret_basic",
			settings: []string{as.tokenURL(), "client_secret {env.E2E_SECRET}"},
			want:     "client_id",
		},
		{
			name:     "wrong secret",
			known:    &client{Method: "client_secret_basic", Secret: secret + " of yesterday"},
			settings: []string{as.tokenURL(), "client_secret {env.E2E_SECRET}"},
			want:     "client_secret",
		},
		{
			name:     "wrong method",
			known:    &client{Method: "private_key_jwt", Keys: keySet(key, "")},
			method:   "client_secret_basic",
			settings: []string{as.tokenURL(), "client_secret {env.E2E_SECRET}"},
			want:     "auth_method",
		},
		{
			name:     "wrong key",
			known:    &client{Method: "private_key_jwt", Keys: keySet(otherKey, "")},
			settings: []string{as.tokenURL(), "private_key " + keyFile},
			want:     "private_key",
		},
		{
			name:     "wrong audience",
			known:    &client{Method: "private_key_jwt", Keys: keySet(key, "")},
			settings: []string{as.tokenURL(), "private_key " + keyFile, "assertion_audience https://other.example/token"},
			want:     "assertion_audience",
		},
		{
			name:     "expired assertion",
			known:    &client{Method: "private_key_jwt", Keys: keySet(key, "")},
			settings: []string{as.tokenURL(), "assertion_file " + writeFile(t, "token", expired)},
			want:     "assertion_file",
		},
		{
			name:     "wrong certificate",
			known:    &client{Method: "self_signed_tls_client_auth", Keys: cert.keys()},
			settings: []string{"token_url " + as.mtls + "/token", as.ca.tokenTransport(), otherCert.write(t).setting()},
			want:     "client_certificate",
		},
		{
			name:     "missing scope",
			known:    &client{Method: "client_secret_basic", Secret: secret},
			settings: []string{as.tokenURL(), "client_secret {env.E2E_SECRET}"},
			scopes:   "api:read api:admin",
			want:     "scopes",
		},
		{
			// The server issues tokens for one only (RFC 8707 §2.2 permits that).
			name:     "two resources",
			known:    &client{Method: "client_secret_basic", Secret: secret},
			settings: []string{as.tokenURL(), "client_secret {env.E2E_SECRET}"},
			resource: resource + " https://other.example/",
			want:     "resource",
		},
		{
			// The same server, but not the name that it has for itself.
			name:  "wrong issuer",
			known: &client{Method: "client_secret_basic", Secret: secret},
			settings: []string{
				"issuer " + strings.Replace(as.issuer, "127.0.0.1", "localhost", 1),
				"client_secret {env.E2E_SECRET}",
			},
			want: "issuer",
			says: "/.well-known/oauth-authorization-server",
		},
	}
	var routes []route
	for _, tt := range tests {
		// In an id with a space, the encoding would be the likeliest fault.
		c := client{ID: strings.ReplaceAll(tt.name, " ", "-"), Method: tt.method}
		if tt.known != nil {
			tt.known.ID = c.ID
			as.register(t, *tt.known)
			c.Method = cmp.Or(tt.method, tt.known.Method)
		}
		u := newUpstream(t, as, c)
		routes = append(routes, route{client: c, to: u.serve(t), settings: tt.settings, scopes: tt.scopes, resource: tt.resource})
	}
	gw := startRoutes(t, routes, "E2E_SECRET="+secret)

	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			resp := gw.get(t, routePath(i), 503)
			if resp.Header.Get("Retry-After") == "" {
				t.Error("503 without Retry-After")
			}
			if len(resp.body) != 0 {
				t.Errorf("503 with %q, want nothing that tells the client why", resp.body)
			}
			gw.get(t, routePath(i), 503)

			site := routes[i].String()
			asked := gw.oauth2Token(t, site, "--json")
			if asked.exit != 2 {
				t.Errorf("exit status of caddy oauth2-token = %d, want 2", asked.exit)
			}
			var reports []struct {
				Error struct{ Hint string }
			}
			if err := json.Unmarshal([]byte(asked.stdout), &reports); err != nil || len(reports) != 1 {
				t.Fatalf("caddy oauth2-token --json = %d reports, %v, want 1\n%s", len(reports), err, asked.stdout)
			}
			// The server has its own words, and they may be the same. What to do
			// about it is not among them.
			hint := reports[0].Error.Hint
			if !names(hint, tt.want) {
				t.Errorf("hint = %q, want it to name %s", hint, tt.want)
			}
			told := gw.oauth2Token(t, site)
			for _, want := range []string{hint, tt.says} {
				if !strings.Contains(told.stdout, want) {
					t.Errorf("caddy oauth2-token printed\n%s\nwant %q in it", told.stdout, want)
				}
			}
			if told.exit != asked.exit {
				t.Errorf("exit status = %d, want %d as with --json", told.exit, asked.exit)
			}
			if all := asked.stdout + asked.stderr + told.stdout + told.stderr; strings.Contains(all, secret) {
				t.Error("caddy oauth2-token printed the client's secret")
			}

			logged := gw.warnings(t, routes[i].client)
			// On a busy machine, the next token request may have failed, too.
			if len(logged) == 0 || !strings.Contains(logged[0], hint) || !strings.Contains(logged[0], tt.says) {
				t.Errorf("warnings = %q, want one with %q and %q", logged, hint, tt.says)
			}
		})
	}
}

// names tells whether a text has a setting as a word of its own.
func names(text, setting string) bool {
	return regexp.MustCompile(`\b` + setting + `\b`).MatchString(text)
}

// TestNarrowedScope asks for a scope that the server drops without a word.
func TestNarrowedScope(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	gw := startRoutes(t, []route{{
		client: c, to: u.serve(t), scopes: scopes + " api:dreams",
		settings: []string{as.tokenURL(), "client_secret {env.E2E_SECRET}"},
	}}, "E2E_SECRET="+c.Secret)
	gw.get(t, routePath(0), 200)
	u.wantAccepted(t, 1, "HTTP/1.1")
	if got := gw.warnings(t, c); len(got) != 1 || !names(got[0], "scopes") {
		t.Errorf("warnings = %q, want one that names scopes", got)
	}
}

// accessToken is what a signed one looks like.
var accessToken = regexp.MustCompile(`eyJ[\w-]+\.[\w-]+\.[\w-]+`)

// TestTokenCommand asks for tokens without a request, and finds what an
// operator wants to know. The token itself is shown to who asks for it.
func TestTokenCommand(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	addr := u.serve(t)
	good := route{client: c, to: addr, settings: []string{"issuer " + as.issuer, "client_secret {env.E2E_SECRET}"}}.String()
	gw := startGateway(t, gatewayConfig{site: "respond ok", env: []string{"E2E_SECRET=" + c.Secret}})

	for _, args := range [][]string{nil, {"--json"}, {"--show-token"}, {"--show-token", "--json"}, {"--upstream", addr}} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			got := gw.oauth2Token(t, good, args...)
			if got.exit != 0 {
				t.Fatalf("exit status = %d, want 0\n%s%s", got.exit, got.stdout, got.stderr)
			}
			for _, want := range []string{as.issuer + "/token", c.ID, c.Method, "api:read", "api:write", resource} {
				if !strings.Contains(got.stdout, want) {
					t.Errorf("output lacks %q:\n%s", want, got.stdout)
				}
			}
			if slices.Contains(args, "--json") && !json.Valid([]byte(got.stdout)) {
				t.Errorf("output isn't JSON:\n%s", got.stdout)
			}
			tokens := accessToken.FindAllString(got.stdout+got.stderr, -1)
			if !slices.Contains(args, "--show-token") {
				if len(tokens) != 0 {
					t.Errorf("output has the token:\n%s%s", got.stdout, got.stderr)
				}
				return
			}
			if len(tokens) != 1 {
				t.Fatalf("tokens shown = %d, want 1\n%s", len(tokens), got.stdout)
			}
			if _, err := u.verifier.verify(tokens[0], time.Now()); err != nil {
				t.Errorf("the token that is shown: %v", err)
			}
		})
	}

	t.Run("one of two upstreams", func(t *testing.T) {
		nobody := client{ID: "nobody", Method: "client_secret_basic"}
		other := heldAddress(t)
		bad := route{client: nobody, to: other, settings: []string{as.tokenURL(), "client_secret {env.E2E_SECRET}"}}
		both := fmt.Sprintf("handle /good {\n%s}\nhandle {\n%s}\n", good, bad)
		if got := gw.oauth2Token(t, both, "--upstream", addr); got.exit != 0 {
			t.Errorf("exit status for %s = %d, want 0\n%s%s", addr, got.exit, got.stdout, got.stderr)
		}
		if got := gw.oauth2Token(t, both, "--upstream", other); got.exit != 2 || !strings.Contains(got.stdout, nobody.ID) {
			t.Errorf("exit status for %s = %d, want 2 and a report on %s\n%s%s", other, got.exit, nobody.ID, got.stdout, got.stderr)
		}
	})

	t.Run("config that can't be loaded", func(t *testing.T) {
		keyed := client{ID: "keyed", Method: "private_key_jwt"}
		bad := route{client: keyed, to: addr, settings: []string{as.tokenURL(), "private_key nowhere.pem"}}.String()
		if got := gw.oauth2Token(t, bad); got.exit != 1 || !names(got.stderr, "private_key") {
			t.Errorf("exit status = %d, want 1 and an error that names private_key\n%s%s", got.exit, got.stdout, got.stderr)
		}
	})
}
