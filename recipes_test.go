package outboundauth

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
)

// cook runs the config of a recipe as the page has it. pairs are what the recipe names,
// and what the test has in its place.
func cook(t *testing.T, name string, auth *authServer, pairs ...string) *gateway {
	t.Helper()
	return cookChanged(t, recipeNamed(t, name).config, auth, pairs...)
}

// cookChanged is cook for a config that is changed as the page says.
func cookChanged(t *testing.T, config string, auth *authServer, pairs ...string) *gateway {
	t.Helper()
	g := newGateway(t)
	for prefix, id := range map[string]string{"API": "gateway", "READER": "reader", "WRITER": "writer"} {
		t.Setenv(prefix+"_CLIENT_ID", id)
		t.Setenv(prefix+"_CLIENT_SECRET", "canary-secret")
	}
	t.Setenv("API_KEY", "canary-key")
	pairs = append(pairs, "https://auth.example.com/oauth2/token", auth.URL+"/token")
	g.serve(replaced(t, config, pairs...))
	return g
}

// takesTokensInTheQuery is an API that wants one live token there. Below /moved, it
// repeats its URL in redirects and links, and below /broken, it breaks off its answer.
func takesTokensInTheQuery(up *upstream, auth *authServer) {
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		tokens := r.URL.Query()["access_token"]
		switch {
		case len(tokens) != 1 || auth.holder(tokens[0]) == "":
			up.record(r)
			refuse(w, http.StatusUnauthorized)
			return true
		case r.URL.Path == "/moved":
			w.Header().Set("Location", "/here?"+r.URL.RawQuery)
			w.Header().Set("Link", `</moved?page=2&access_token=`+tokens[0]+`>; rel="next"`)
			w.WriteHeader(http.StatusTemporaryRedirect)
			return true
		case r.URL.Path == "/broken":
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, "a part")
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
		return false
	})
}

func TestRecipeTokenInTheQuery(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, nil)
	up.Config.ErrorLog = discardLog
	takesTokensInTheQuery(up, auth)
	dir := socketDir(t)
	g := cook(t, "A token in the query", auth, "https://api.example.com", up.URL, "unix//run/caddy", "unix/"+dir)

	for i, query := range []string{"", "page=2", "access_token=mine&page=2", "access%5Ftoken=mine", "page=2;access_token=mine", "access_token=mine&access_token=mine"} {
		g.send(http.MethodGet, "/orders?"+query, nil, "Authorization", "Bearer mine").want(t, http.StatusOK)
		got := up.got()
		if len(got) != i+1 {
			t.Fatalf("%s: got %d requests at the API, want %d", query, len(got), i+1)
		}
		parameters, err := url.ParseQuery(got[i].query)
		if tokens := parameters["access_token"]; err != nil || !slices.Equal(tokens, []string{"canary-token-1-of-gateway"}) {
			t.Errorf("%s: got the query %q, err %v, want the token once", query, got[i].query, err)
		}
		if strings.Contains(query, "page=2&") && parameters.Get("page") != "2" {
			t.Errorf("%s: got the query %q, want the other parameters in it", query, got[i].query)
		}
		got[i].wantHeader(t, "Authorization", "")
		got[i].wantHeader(t, "X-Forwarded-For", "") // as the page says
	}

	auth.revoke()
	g.send(http.MethodPost, "/orders", strings.NewReader("one order")).want(t, http.StatusOK)
	auth.wantAsked(t, 2)
	if got := up.last(t); got.query != "access_token=canary-token-2-of-gateway" || got.body != "one order" {
		t.Errorf("got the query %q and the body %q, want the new token and the order", got.query, got.body)
	}
}

// TestRecipeTokenInTheQueryShowsNone looks for the token where URLs are seen.
func TestRecipeTokenInTheQueryShowsNone(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, nil)
	up.Config.ErrorLog = discardLog
	takesTokensInTheQuery(up, auth)
	dir := socketDir(t)
	g := cook(t, "A token in the query", auth, "https://api.example.com", up.URL, "unix//run/caddy", "unix/"+dir)

	g.send(http.MethodGet, "/orders?page=2", nil).want(t, http.StatusOK)
	moved := g.send(http.MethodGet, "/moved?page=2", nil).want(t, http.StatusTemporaryRedirect)
	for _, field := range []string{"Location", "Link"} {
		if got := moved.header.Get(field); strings.Contains(got, "canary") || !strings.Contains(got, "page=2") {
			t.Errorf("%s: got %q, want the page and no token", field, got)
		}
	}
	if broken := g.send(http.MethodGet, "/broken", nil); broken.err == nil {
		t.Errorf("got %d %q, want an answer that breaks off", broken.status, broken.body)
	}
	up.CloseClientConnections()
	up.Close()
	g.send(http.MethodGet, "/orders", nil).want(t, http.StatusBadGateway)

	eventually(t, func() bool {
		return len(g.logged("aborting with incomplete response", "access_token=hidden")) > 0
	}, "the warning about the answer that breaks off")
	eventually(t, func() bool { return len(g.logged("http.log.access")) == 8 }, "the access logs of both sites")
	if lines := g.logged("canary-token"); len(lines) > 0 {
		t.Errorf("got a token in the log, want none:\n%s", lines[0])
	}
	info, err := os.Stat(filepath.Join(dir, "query.sock"))
	if err != nil || info.Mode().Perm()&0o077 != 0 {
		t.Errorf("got mode %v, err %v, want a socket that only this user can use", info.Mode(), err)
	}
}

// The page has one of the two configs, and says how to change it into the other one.
func TestRecipeAPIKeyBesideTheToken(t *testing.T) {
	const name = "An API key beside the token"
	keyInAuthorization := recipeNamed(t, name)
	other := "header X-Api-Key {env.API_KEY}"
	if !strings.Contains(keyInAuthorization.text, "`"+other+"`") {
		t.Fatalf("got nothing about %s in the recipe, want the other way", other)
	}
	keyElsewhere := replaced(t, keyInAuthorization.config,
		"\t\t\tbearer_header X-Access-Token \"\"\n", "", `header Authorization "ApiKey {env.API_KEY}"`, other)

	for _, test := range []struct{ config, keyField, key, tokenField, token string }{
		{keyInAuthorization.config, "Authorization", "ApiKey canary-key", "X-Access-Token", "canary-token-1-of-gateway"},
		{keyElsewhere, "X-Api-Key", "canary-key", "Authorization", "Bearer canary-token-1-of-gateway"},
	} {
		t.Run(test.keyField, func(t *testing.T) {
			auth := newAuthServer(t)
			up := newUpstream(t, nil)
			g := cookChanged(t, test.config, auth, "https://api.example.com", up.URL)
			g.get("Authorization", "Bearer mine", "X-Access-Token", "mine", "X-Api-Key", "mine").want(t, http.StatusOK)
			got := up.last(t)
			got.wantHeader(t, test.keyField, test.key)
			got.wantHeader(t, test.tokenField, test.token)
			if n := len(up.got()); n != 1 {
				t.Errorf("got %d requests, want one", n)
			}
			if lines := g.logged("canary-key"); len(lines) > 0 {
				t.Errorf("got the key in the log, want it nowhere:\n%s", lines[0])
			}
		})
	}
}

// The page says why header_up is not the way.
func TestRecipeAPIKeyByHeaderUp(t *testing.T) {
	config := recipeNamed(t, "An API key beside the token").config
	const header = "\t\t\theader Authorization \"ApiKey {env.API_KEY}\"\n\t\t}\n"
	for _, test := range []struct {
		line, field, want string
		logged            bool
	}{
		{`header_up Authorization "ApiKey {env.API_KEY}"`, "Authorization", "", false},
		{`header_up X-Api-Key {env.API_KEY}`, "X-Api-Key", "canary-key", true},
	} {
		t.Run(test.field, func(t *testing.T) {
			auth := newAuthServer(t)
			up := newUpstream(t, nil)
			g := cookChanged(t, replaced(t, config, header, "\t\t}\n\t\t"+test.line+"\n"), auth, "https://api.example.com", up.URL)
			g.get().want(t, http.StatusOK)
			up.last(t).wantHeader(t, test.field, test.want)
			if lines := g.logged("upstream roundtrip", "canary-key"); (len(lines) > 0) != test.logged {
				t.Errorf("got %d lines in the log with the key, want some: %v", len(lines), test.logged)
			}
		})
	}
}

func TestRecipeNo401ForCallers(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := cook(t, "No 401 for callers", auth, "https://api.example.com", up.URL)
	g.get().want(t, http.StatusOK)

	auth.revoke()
	if got := g.get().want(t, http.StatusOK); got.body != "accepted" || len(up.got()) != 3 {
		t.Errorf("got %q after %d requests, want the answer to the one with a new token", got.body, len(up.got()))
	}

	for _, test := range []struct{ status, want int }{
		{http.StatusUnauthorized, http.StatusBadGateway},
		{http.StatusForbidden, http.StatusForbidden},
	} {
		up.script(func(w http.ResponseWriter, _ *http.Request) bool {
			refuse(w, test.status)
			return true
		})
		got := g.get().want(t, test.want)
		if got.header["Www-Authenticate"] != nil {
			t.Errorf("%d: got WWW-Authenticate %q, want none", test.status, got.header["Www-Authenticate"])
		}
	}
}

func TestRecipeProxyForApplications(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := cook(t, "A proxy for unchanged applications", auth, "https://api.example.com", up.URL)
	application := proxiedClient(t, "http://"+g.addr)

	for i, address := range []string{"http://api.example.com/orders", "http://API.example.com:80/orders"} {
		req, err := http.NewRequest(http.MethodGet, address, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer mine")
		res, err := application.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		got := up.last(t)
		if res.StatusCode != http.StatusOK || got.path != "/orders" || got.bearerOf(auth) != "gateway" || len(up.got()) != i+1 {
			t.Errorf("%s: got %d, and %s at the API with the token of %q, want one request with that of the gateway", address, res.StatusCode, got.path, got.bearerOf(auth))
		}
	}

	passed := len(up.got())
	for _, address := range []string{"http://other.example.com/orders", "http://api.example.com.evil.example/", "http://" + up.addr + "/"} {
		res, err := application.Get(address)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != http.StatusForbidden {
			t.Errorf("%s: got %d, want that only the hosts of the config are served", address, res.StatusCode)
		}
	}
	_, err := application.Get("https://api.example.com/orders") //nolint:bodyclose // there is no answer
	wantError(t, err, "Method Not Allowed")
	g.get().want(t, http.StatusForbidden) // not through the proxy
	if got := len(up.got()); got != passed {
		t.Errorf("got %d more requests at the API, want none", got-passed)
	}
}

// knowsAlice is a service that checks callers: it accepts only alice. It is asked by the
// gateway, whose token it wants.
func knowsAlice(check *upstream, auth *authServer) {
	check.script(func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case auth.holder(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")) == "":
			return false
		case r.Header.Get("X-Caller-Authorization") == "Bearer alice":
			return false
		}
		check.record(r)
		w.WriteHeader(http.StatusForbidden)
		return true
	})
}

func TestRecipeTokenForForwardAuth(t *testing.T) {
	auth := newAuthServer(t)
	check, app := newUpstream(t, auth), newUpstream(t, nil)
	knowsAlice(check, auth)
	g := cook(t, "A token for forward_auth", auth, "https://check.example.com", check.URL, "app.example.com:9000", app.addr)

	g.get("Authorization", "Bearer alice", "X-Caller-Authorization", "Bearer forged").want(t, http.StatusOK)
	got := check.last(t)
	got.wantHeader(t, "Authorization", "Bearer canary-token-1-of-gateway")
	got.wantHeader(t, "X-Caller-Authorization", "Bearer alice")
	app.last(t).wantHeader(t, "Authorization", "Bearer alice")
	if len(check.got()) != 1 || len(app.got()) != 1 {
		t.Errorf("got %d and %d requests, want one each", len(check.got()), len(app.got()))
	}

	auth.revoke()
	g.get("Authorization", "Bearer alice").want(t, http.StatusOK)
	auth.wantAsked(t, 2)

	// Nobody gets past it: neither with the name of another header, nor without a token.
	passed := len(app.got())
	for _, forged := range []string{"X-Caller-Authorization", "x-caller-authorization", "X_Caller_Authorization"} {
		g.get(forged, "Bearer alice").want(t, http.StatusForbidden)
		check.last(t).wantHeader(t, "X-Caller-Authorization", "")
	}
	if got := len(app.got()); got != passed {
		t.Errorf("got %d requests that the service had refused, want none", got-passed)
	}
}

// Without a token, nobody is asked about the caller. The transport's own answer to that
// must not be taken for the service's.
func TestRecipeTokenForForwardAuthWithoutAToken(t *testing.T) {
	auth := newAuthServer(t)
	auth.script(refusingForLong(http.StatusUnauthorized, `{"error":"invalid_client"}`))
	check, app := newUpstream(t, auth), newUpstream(t, nil)
	g := cook(t, "A token for forward_auth", auth, "https://check.example.com", check.URL, "app.example.com:9000", app.addr)
	g.get("Authorization", "Bearer alice").want(t, http.StatusServiceUnavailable)
	if len(check.got()) != 0 || len(app.got()) != 0 {
		t.Errorf("got %d and %d requests, want none", len(check.got()), len(app.got()))
	}
}

func TestRecipeTenantFromForwardAuth(t *testing.T) {
	auth := newAuthServer(t)
	check, up := newUpstream(t, nil), newUpstream(t, auth)
	check.script(func(w http.ResponseWriter, r *http.Request) bool {
		check.record(r)
		switch r.Header.Get("Authorization") {
		case "Bearer alice":
			w.Header().Set("X-Tenant-Id", "acme")
		case "Bearer bob": // has no tenant
		default:
			w.WriteHeader(http.StatusUnauthorized)
		}
		return true
	})
	g := cook(t, "A tenant from forward_auth", auth, "https://check.example.com", check.URL, "https://api.example.com", up.URL)

	for _, test := range []struct {
		caller string
		status int
	}{{"alice", http.StatusOK}, {"bob", http.StatusForbidden}, {"eve", http.StatusUnauthorized}} {
		for _, forged := range []string{"X-Tenant-Id", "x-tenant-id", "X_Tenant_Id", "X.Tenant.Id"} {
			before := len(up.got())
			g.get("Authorization", "Bearer "+test.caller, forged, "globex").want(t, test.status)
			passed := up.got()[before:]
			if test.status != http.StatusOK {
				if len(passed) != 0 {
					t.Errorf("%s: got %d requests at the API, want none", test.caller, len(passed))
				}
				continue
			}
			if len(passed) != 1 || passed[0].bearerOf(auth) != "gateway" {
				t.Fatalf("%s: got %d requests at the API, want one with the gateway's token", test.caller, len(passed))
			}
			passed[0].wantHeader(t, "X-Tenant-Id", "acme")
		}
	}

	// Without the lines that refuse them, a caller who has no tenant is sent on without one.
	config := recipeNamed(t, "A tenant from forward_auth").config
	for line := range strings.Lines(config) {
		if strings.Contains(line, "@nobody") {
			config = strings.Replace(config, line, "", 1)
		}
	}
	g.stop()
	g = cookChanged(t, config, auth, "https://check.example.com", check.URL, "https://api.example.com", up.URL)
	g.get("Authorization", "Bearer bob", "X-Tenant-Id", "globex").want(t, http.StatusOK)
	up.last(t).wantHeader(t, "X-Tenant-Id", "")
}

// The page says why the tenant is not taken from the answer of the service directly:
// Caddy forgets that answer when it has the next one.
func TestRecipeTenantOfTheServicesAnswer(t *testing.T) {
	auth := newAuthServer(t)
	check, up := newUpstream(t, nil), newUpstream(t, auth)
	check.script(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("X-Tenant-Id", "acme")
		return true
	})
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		if len(up.got())%2 != 0 {
			return false
		}
		up.record(r)
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	})
	for _, test := range []struct{ placeholder, second string }{
		{"{http.request.header.X-Tenant-Id}", "acme"},
		{"{http.reverse_proxy.header.X-Tenant-Id}", ""},
	} {
		t.Run(test.placeholder, func(t *testing.T) {
			before := len(up.got())
			config := replaced(t, recipeNamed(t, "A tenant from forward_auth").config,
				"tenant {http.request.header.X-Tenant-Id}", "tenant "+test.placeholder,
				"\treverse_proxy https://api.example.com {\n", "\treverse_proxy https://api.example.com {\n\t\tlb_retries 1\n\t\tlb_retry_match expression `{rp.status_code} == 503`\n")
			g := cookChanged(t, config, auth, "https://check.example.com", check.URL, "https://api.example.com", up.URL)
			g.get().want(t, http.StatusOK)
			tries := up.got()[before:]
			if len(tries) != 2 {
				t.Fatalf("got %d tries, want two", len(tries))
			}
			tries[0].wantHeader(t, "X-Tenant-Id", "acme")
			tries[1].wantHeader(t, "X-Tenant-Id", test.second)
		})
	}
}

func TestRecipeOtherScopesForSomePaths(t *testing.T) {
	auth := newAuthServer(t)
	auth.script(func(w http.ResponseWriter, r tokenRequest) bool {
		fmt.Fprintf(w, `{"access_token":"canary-of-%s-for-%s","token_type":"Bearer","expires_in":3600}`, r.client, r.form.Get("scope"))
		return true
	})
	up := newUpstream(t, nil)
	g := cook(t, "Other scopes for some paths", auth, "https://api.example.com", up.URL)
	for range 3 {
		for path, want := range map[string]string{
			"/reports/2026":  "Bearer canary-of-gateway-for-reports",
			"/orders":        "Bearer canary-of-gateway-for-orders",
			"/reports":       "Bearer canary-of-gateway-for-orders", // `/reports/*` is not this path
			"/orders/../../": "Bearer canary-of-gateway-for-orders",
		} {
			g.send(http.MethodGet, path, nil).want(t, http.StatusOK)
			up.last(t).wantHeader(t, "Authorization", want)
		}
	}
	auth.wantAsked(t, 2)

	// The page warns of this: a caller can choose the token, if the API takes the path literally.
	g.send(http.MethodGet, "/orders/..%2Freports/2026", nil).want(t, http.StatusOK)
	up.last(t).wantHeader(t, "Authorization", "Bearer canary-of-gateway-for-reports")
	if got := up.last(t).path; got != "/orders/../reports/2026" {
		t.Errorf("got the path %s at the API, want the caller's", got)
	}
}

func TestRecipeTwoClientsForOneAPI(t *testing.T) {
	auth := newAuthServer(t)
	up := newUnstartedUpstream(t, auth)
	var connections atomic.Int32
	up.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	up.start()
	g := cook(t, "Two clients for one API", auth, "https://api.example.com", up.URL)
	for range 3 {
		for method, want := range map[string]string{
			http.MethodGet: "reader", http.MethodHead: "reader",
			http.MethodPost: "writer", http.MethodDelete: "writer", "PROPFIND": "writer", "get": "writer",
		} {
			g.send(method, "/orders", nil, "Authorization", "Bearer mine", "X-Http-Method-Override", "DELETE").want(t, http.StatusOK)
			if got := up.last(t).bearerOf(auth); got != want {
				t.Errorf("%s: got the token of %q, want that of the %s", method, got, want)
			}
		}
	}
	auth.wantAsked(t, 2)
	if got := connections.Load(); got != 2 {
		t.Errorf("got %d connections, want one of each reverse_proxy", got)
	}
}

func TestRecipeAPIThatRefusesWith200(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		got := up.record(r)
		switch {
		case r.URL.Path == "/body":
			_, _ = io.WriteString(w, `{"error":"invalid_token"}`)
		case got.bearerOf(auth) == "" || r.URL.Path == "/never":
			w.Header().Set("X-Error-Code", "invalid_token")
			_, _ = io.WriteString(w, `{"error":"invalid_token"}`)
		default:
			_, _ = io.WriteString(w, "accepted "+got.body)
		}
		return true
	})
	g := cook(t, "An API that refuses with 200", auth, "https://api.example.com", up.URL, "unix//run/caddy", "unix/"+socketDir(t))
	g.get().want(t, http.StatusOK)

	auth.revoke()
	if got := g.send(http.MethodPost, "/", strings.NewReader("one order"), "Authorization", "Bearer mine").want(t, http.StatusOK); got.body != "accepted one order" {
		t.Errorf("got %q, want the answer to the request with a new token", got.body)
	}
	auth.wantAsked(t, 2)
	if got := len(up.got()); got != 3 {
		t.Errorf("got %d requests at the API, want 3: the second one was sent twice", got)
	}

	never := g.send(http.MethodGet, "/never", nil).want(t, http.StatusUnauthorized)
	if challenge := never.header.Get("WWW-Authenticate"); never.body != `{"error":"invalid_token"}` || challenge != `Bearer error="invalid_token"` {
		t.Errorf("got %q with the challenge %q, want the text of the API with that of the second hop", never.body, challenge)
	}

	// A body alone says nothing to Caddy, as the page admits.
	before := len(up.got())
	if got := g.send(http.MethodGet, "/body", nil).want(t, http.StatusOK); got.body != `{"error":"invalid_token"}` || len(up.got()) != before+1 {
		t.Errorf("got %q after %d requests, want the API's only answer", got.body, len(up.got())-before)
	}
}

func TestRecipeNoisyPath(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/login" {
			return false
		}
		up.record(r)
		refuse(w, http.StatusUnauthorized)
		return true
	})
	g := cook(t, "A noisy path", auth, "https://api.example.com", up.URL)
	const logins = 30
	for range logins {
		got := g.send(http.MethodPost, "/login", strings.NewReader("password=wrong")).want(t, http.StatusUnauthorized)
		if got.header.Get("WWW-Authenticate") == "" {
			t.Error("got no WWW-Authenticate, want the API's")
		}
	}
	if got := len(up.got()); got != logins {
		t.Errorf("got %d requests at the API, want %d: each once", got, logins)
	}
	auth.wantAsked(t, 1)

	auth.revoke()
	g.send(http.MethodPost, "/login", strings.NewReader("password=wrong")).want(t, http.StatusUnauthorized)
	auth.wantAsked(t, 1)
	g.send(http.MethodGet, "/orders", nil).want(t, http.StatusOK)
	auth.wantAsked(t, 2)
	g.send(http.MethodPost, "/login", strings.NewReader("password=wrong")).want(t, http.StatusUnauthorized)
	if got := up.last(t).bearerOf(auth); got != "gateway" {
		t.Errorf("got the token of %q, want the new one of the gateway, which both paths share", got)
	}
}
