package outboundauth

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// runTokenCommand does what `caddy oauth2-token` does with a site.
func runTokenCommand(t *testing.T, site, upstream string, showToken, asJSON bool) (output string, status int, err error) {
	t.Helper()
	config := adaptCaddyfile(t, "{\nauto_https off\n}\nhttp://127.0.0.1:1 {\n"+site+"\n}")
	reports, err := requestTokens(config, wantedClients{upstream: upstream}, false)
	if err != nil {
		return "", caddy.ExitCodeFailedStartup, err
	}
	var b bytes.Buffer
	status, err = writeReports(&b, reports, showToken, asJSON)
	return b.String(), status, err
}

// issuing answers with a token.
func issuing(token string) func(http.ResponseWriter, tokenRequest) bool {
	return func(w http.ResponseWriter, _ tokenRequest) bool {
		fmt.Fprintf(w, `{"access_token":%q,"token_type":"Bearer","expires_in":3600,"scope":"read"}`, token)
		return true
	}
}

const threeOfTwoClients = `reverse_proxy 127.0.0.1:9000 127.0.0.1:9001 127.0.0.1:9002 127.0.0.1:9003 {
	transport oauth2 {
		token_url $AUTH/token?key=canary-query
		client_id first
		client_secret canary-secret
		scopes read write
		upstream 127.0.0.1:9001 {
			client_id second
		}
		upstream 127.0.0.1:9003 off
	}
}`

func TestTokenCommandShowsWhatTheGatewayGets(t *testing.T) {
	auth := newAuthServer(t)
	output, status, err := runTokenCommand(t, expand(threeOfTwoClients, "$AUTH", auth.URL), "", false, false)
	host := strings.TrimPrefix(auth.URL, "http://")
	if err != nil || status != caddy.ExitCodeSuccess {
		t.Fatalf("got status %d, err %v, want 0", status, err)
	}
	for _, want := range []string{
		"name             " + host + "/first\nupstreams        127.0.0.1:9000, 127.0.0.1:9002\ntoken endpoint   " + auth.URL + "/token\nclient           first\n",
		"upstreams        127.0.0.1:9001\n", "client           second\n",
		"auth method      client_secret_basic\ngrant            client_credentials\nscopes           read write\ngranted          read write\nlifetime         1h0m0s\n",
		"token            opaque, 2", // and something characters
	} {
		if !strings.Contains(output, want) {
			t.Errorf("got\n%s\nwant %q in it", output, want)
		}
	}
	if strings.Contains(output, "canary") {
		t.Errorf("got\n%s\nwant neither token, secret nor query", output)
	}
	auth.wantAsked(t, 2)
	if left := loadedTransports(); len(left) != 0 {
		t.Errorf("got %d transports left, want none", len(left))
	}
}

// The command had a way of its own from a grant to a token, in which the life of a
// token began before its issuer had been looked up.
func TestTokenCommandTakesWhatTheGatewayTakes(t *testing.T) {
	p := newPublisher("")
	p.publish(oauthPlace, func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(2500 * time.Millisecond) // of the bubble
		page(http.StatusOK, document(testIssuer, tokenPlace))(w, nil)
	})
	p.publish(tokenPlace, page(http.StatusOK, `{"access_token":"t0ken","token_type":"Bearer","expires_in":2}`))
	cl, _ := discovering(t, issuerSecret, p)
	synctest.Test(t, func(t *testing.T) {
		report := cl.report(nil, false)
		if report.Error != nil || report.Token != "t0ken" || report.Lifetime != 2 || report.TokenEndpoint != tokenPlace {
			t.Errorf("got %q of %s for %v s, err %+v, want t0ken of %s for 2 s", report.Token, report.TokenEndpoint, report.Lifetime, report.Error, tokenPlace)
		}
	})
}

// A panic would end the command, and show what the token request held.
func TestTokenCommandReportsAPanic(t *testing.T) {
	cl := newTestClient(t, canaryCredentials(testTokenURL), roundTripFunc(func(*http.Request) (*http.Response, error) {
		panic(canarySecret)
	}))
	report := cl.report(nil, false)
	if report.Error == nil || !strings.Contains(report.Error.Description, "panicked") || report.ClientID != "id" {
		t.Errorf("got %+v, want the client, and that there was a panic", report)
	}
	wantNoCanaryIn(t, fmt.Sprintf("%+v", report))
}

func TestTokenCommandDecodesJWTs(t *testing.T) {
	segment := func(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }
	jwt := segment(`{"alg":"RS256","kid":"k1"}`) + "." + segment(`{"aud":"orders","exp":1}`) + ".c2lnbmF0dXJl"
	for _, token := range []string{jwt, "opaque.but.dotted"} {
		auth := newAuthServer(t)
		auth.script(issuing(token))
		site := expand(threeOfTwoClients, "$AUTH", auth.URL)
		output, status, _ := runTokenCommand(t, site, "127.0.0.1:9000", false, false)
		if status != exitNarrowed || strings.Contains(output, token) || !strings.Contains(output, "granted          read\nnot granted      write\n") {
			t.Errorf("got status %d and\n%s\nwant %d, the granted scope, and no token", status, output, exitNarrowed)
		}
		if got := strings.Contains(output, `"aud": "orders"`) && strings.Contains(output, `"kid": "k1"`); got != (token == jwt) {
			t.Errorf("got header and claims: %v, for %q\n%s", got, token, output)
		}
		if output, status, _ = runTokenCommand(t, site, "127.0.0.1:9000", true, false); status != exitNarrowed || !strings.Contains(output, " "+token+"\n") {
			t.Errorf("got status %d and\n%s\nwant %d, and the token", status, output, exitNarrowed)
		}
	}
}

// The server may write anything into the scopes, and into the token: the client's
// secret too, or what a terminal takes for a command.
func TestTokenCommandShowsNoSecretThatTheServerRepeats(t *testing.T) {
	segment := func(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }
	token := segment(`{"alg":"RS256","kid":"id-canary-secret","canary-secret":1,"crit":["canary-secret","exp"]}`) + "." +
		segment(`{"sub":"first","act":{"secret":"Y2FuYXJ5LXNlY3JldA==","deep":[{"x":"%63anary-secret"}]},"long":"`+
			strings.Repeat("x", 3000)+`","esc":"a\u001b[31m\u202eb","n":1,"t":true,"nil":null}`) + ".c2lnbmF0dXJl"
	for _, asJSON := range []bool{false, true} {
		auth := newAuthServer(t)
		auth.script(refusing(http.StatusOK, `{"access_token":"`+token+`","token_type":"Bearer","scope":"write canary-secret"}`))
		output, status, err := runTokenCommand(t, expand(threeOfTwoClients, "$AUTH", auth.URL), "127.0.0.1:9000", false, asJSON)
		if status != exitNarrowed {
			t.Fatalf("got status %d, err %v, want %d", status, err, exitNarrowed)
		}
		if strings.Contains(output, "anary") || strings.Contains(output, "Y2FuYXJ5") {
			t.Errorf("got\n%s\nwant no secret", output)
		}
		if strings.ContainsAny(output, "\x1b\u202e") || strings.Contains(output, strings.Repeat("x", 1100)) {
			t.Errorf("got\n%s\nwant it cleaned and cut", output)
		}
		for _, want := range []string{`"sub": "first"`, `"alg": "RS256"`, `"n": 1`, `"t": true`, `"nil": null`, `"exp"`, "not shown", "read"} {
			if !strings.Contains(output, want) {
				t.Errorf("got\n%s\nwant %s in it", output, want)
			}
		}
		if !asJSON && !strings.Contains(output, "granted          write\nnot granted      read\n") {
			t.Errorf("got\n%s\nwant what of the configured scopes was granted, and what was not", output)
		}
	}
}

func TestTokenCommandWritesJSON(t *testing.T) {
	for _, show := range []bool{false, true} {
		auth := newAuthServer(t)
		auth.script(issuing("canary-token"))
		output, status, err := runTokenCommand(t, expand(threeOfTwoClients, "$AUTH", auth.URL), "", show, true)
		if status != exitNarrowed {
			t.Fatalf("got status %d, err %v, want %d", status, err, exitNarrowed)
		}
		var reports []map[string]any
		if err := json.Unmarshal([]byte(output), &reports); err != nil || len(reports) != 2 {
			t.Fatalf("got %d reports, err %v, want 2", len(reports), err)
		}
		for field, want := range map[string]any{
			"name": strings.TrimPrefix(auth.URL, "http://") + "/first", "client_id": "first", "token_endpoint": auth.URL + "/token", "lifetime": 3600.0, "granted_scope": "read", "not_granted": []any{"write"},
			"auth_method": "client_secret_basic", "token": map[bool]any{true: "canary-token"}[show],
		} {
			if got := reports[0][field]; !reflect.DeepEqual(got, want) {
				t.Errorf("%s: got %v, want %v", field, got, want)
			}
		}
	}
}

// There may be something to change although there is a token: the log has it as warnings.
func TestTokenCommandWarnsBesideAToken(t *testing.T) {
	segment := func(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }
	jwtFor := func(aud string) string {
		return `"access_token":"` + segment(`{"alg":"RS256"}`) + "." + segment(`{"aud":`+aud+`}`) + `.c2ln"`
	}
	const (
		narrowed = "the token was granted for less than the scopes that are configured; check scopes, or what the authorization server allows the client (not_granted: [read])"
		ignored  = "the aud of the token has none of what is configured, so the server may ignore it; check audience and resource"
		odd      = "the lifetime in the token endpoint's answer (expires_in) is no number: default_lifetime counts instead; set it, or the expires_in of token_response"
		blank    = "audience begins with a blank; it is sent as it is: correct it, unless that is meant"
	)
	for _, test := range []struct {
		members, audience string
		warnings          []string
		status            int
	}{
		{`"access_token":"a","scope":"write"`, "", []string{narrowed}, exitNarrowed},
		{`"access_token":"a","expires_in":"never"`, "", []string{odd}, 0},
		{`"access_token":"a","expires_in":"never","scope":"write"`, "", []string{narrowed, odd}, exitNarrowed},
		{jwtFor(`"other"`), "https://api.example.com", []string{ignored}, 0},
		{jwtFor(`["other"]`), "https://api.example.com", []string{ignored}, 0},
		{jwtFor(`["other","https://api.example.com"]`), "https://api.example.com", nil, 0},
		{jwtFor(`5`), "https://api.example.com", nil, 0},
		{`"access_token":"a"`, `" https://api.example.com"`, []string{blank}, 0},
		{`"access_token":"a"`, "https://api.example.com", nil, 0},
	} {
		auth := newAuthServer(t)
		auth.script(refusing(http.StatusOK, "{"+test.members+"}"))
		settings := "client_id first"
		if test.audience != "" {
			settings += "\naudience " + test.audience
		}
		site := expand(strings.Replace(threeOfTwoClients, "client_id first", settings, 1), "$AUTH", auth.URL)
		output, status, _ := runTokenCommand(t, site, "127.0.0.1:9000", false, false)
		var warnings []string
		for line := range strings.Lines(output) {
			if warning, ok := strings.CutPrefix(line, "warning          "); ok {
				warnings = append(warnings, strings.TrimSuffix(warning, "\n"))
			}
		}
		if !slices.Equal(warnings, test.warnings) || status != test.status {
			t.Errorf("%s: got status %d and the warnings %q, want %d and %q\n%s", test.members, status, warnings, test.status, test.warnings, output)
		}
	}
}

// What the log says once a server was found is said here as well: the log of the command
// has only errors.
func TestTokenCommandWarnsOfWhatTheServerDoesNotList(t *testing.T) {
	for _, answer := range []string{goodAnswer, `{"error":"invalid_client"}`} {
		p := newPublisher(strings.TrimSuffix(document(testIssuer, tokenPlace), "}") + `,"token_endpoint_auth_methods_supported":["private_key_jwt"]}`)
		p.publish(tokenPlace, page(http.StatusOK, answer))
		cl, _ := discovering(t, issuerSecret, p)
		report := cl.report(nil, false)
		want := "the authorization server does not list what is configured; check auth_method (supported: private_key_jwt)"
		if !slices.Equal(report.Warnings, []string{want}) {
			t.Errorf("%s: got the warnings %q, want %q", answer, report.Warnings, want)
		}
	}
}

func TestTokenCommandSaysWhatToChange(t *testing.T) {
	for _, test := range []struct {
		name   string
		answer func(http.ResponseWriter, tokenRequest) bool
		want   string
	}{
		{"rejected", refusing(401, `{"error":"invalid_client","error_description":"no canary-secret"}`), "check client_id, client_secret and auth_method"},
		{"scope", refusing(400, `{"error":"invalid_scope"}`), "check scopes"},
		{"empty 403", refusing(403, ``), "check client_id, client_secret"},
		{"fault", refusing(503, ``), "who runs the authorization server"},
		{"too many", refusing(429, ``), "limits the rate"},
		{"no token", refusing(200, `<html>`), "check token_url"},
		{"not mapped", refusing(400, `{"error":"account_locked"}`), "check scopes and auth_method"},
		{"other type", refusing(200, `{"access_token":"a","token_type":"mac"}`), "register the client"},
	} {
		t.Run(test.name, func(t *testing.T) {
			auth := newAuthServer(t)
			auth.script(test.answer)
			output, status, err := runTokenCommand(t, expand(threeOfTwoClients, "$AUTH", auth.URL), "127.0.0.1:9000", true, false)
			if status != exitNoToken || err == nil {
				t.Errorf("got status %d, err %v, want %d", status, err, exitNoToken)
			}
			if _, hint, _ := strings.Cut(output, "\nwhat to change   "); !strings.Contains(hint, test.want) {
				t.Errorf("got\n%s\nwant %q to be changed", output, test.want)
			}
			if strings.Contains(output, "canary") {
				t.Errorf("got\n%s\nwant nothing secret", output)
			}
			auth.wantAsked(t, 1)
		})
	}
}

// What is wrong with a secret shows only where its file is.
func TestTokenCommandSaysWhatIsWrongWithASecret(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	for _, test := range []struct{ content, wrong, todo string }{
		{"", "client_secret: {file." + file + "} does not exist", "create the file, or correct its path"},
		{"\n", "client_secret: {file." + file + "} is empty", "write the value into the file"},
		{" canary-secret\n", "", "client_secret begins with a blank: correct that first"},
		{"canary-secret\n", "", "check client_id, client_secret"},
	} {
		if test.content != "" {
			writeFile(t, file, []byte(test.content))
		}
		auth := newAuthServer(t)
		auth.script(refusing(http.StatusUnauthorized, `{"error":"invalid_client"}`))
		site := strings.Replace(expand(threeOfTwoClients, "$AUTH", auth.URL), "canary-secret", "{file."+file+"}", 1)
		output, status, _ := runTokenCommand(t, site, "127.0.0.1:9000", false, false)
		if status != exitNoToken || !strings.Contains(output, test.wrong+"\nwhat to change   "+test.todo) || strings.Contains(output, "canary") {
			t.Errorf("%q: got status %d and\n%s\nwant %d, %q and %q", test.content, status, output, exitNoToken, test.wrong, test.todo)
		}
	}
}

func TestTokenCommandPicksAnUpstream(t *testing.T) {
	auth := newAuthServer(t)
	site := expand(threeOfTwoClients, "$AUTH", auth.URL)
	for _, test := range []struct{ upstream, want, err string }{
		{"127.0.0.1:9001", "second", ""},
		{"http://127.0.0.1:9002", "first", ""},
		{"127.0.0.1:9003", "", "it is off"},
		{"127.0.0.1:9004", "", "has no such upstream; it has 127.0.0.1:9000, 127.0.0.1:9001, 127.0.0.1:9002, 127.0.0.1:9003"},
		{"127.0.0.1:9000-9001", "", "single"},
		{"https://127.0.0.1:9000/path", "", "path"},
	} {
		output, _, err := runTokenCommand(t, site, test.upstream, false, false)
		wantError(t, err, test.err)
		if test.want != "" && (!strings.Contains(output, "client           "+test.want+"\n") || strings.Count(output, "client  ") != 1) {
			t.Errorf("%s: got\n%s\nwant the client %s only", test.upstream, output, test.want)
		}
	}
}

func TestTokenCommandPicksAKey(t *testing.T) {
	auth := newAuthServer(t)
	site := expand(keyedSite, "$UP", "127.0.0.1:9000", "$AUTH", auth.URL, "$DEFAULT", "client {args}\nclient default {\nclient_id of-nobody\nclient_secret canary-secret-d\n}")
	site = strings.Replace(site, "client {args}\n", "client initrode {\nclient_id of-acme\nclient_secret canary-secret-a\n}\n", 1) // the token of acme
	for _, test := range []struct{ key, want, err string }{
		{"", "of-acme acme initrode|of-globex globex Initech|of-nobody", ""},
		{"acme", "of-acme acme", ""},
		{"Initech", "of-globex globex Initech", ""},
		{"ACME", "", "--key ACME: the config has no such client key; it has Initech, acme, globex, guests, initrode"},
		{"guests", "", "--key guests: it is off, and gets no token"},
	} {
		reports, err := requestTokens(adaptCaddyfile(t, "{\nauto_https off\n}\nhttp://127.0.0.1:1 {\n"+site+"\n}"), wantedClients{key: test.key}, false)
		wantError(t, err, test.err)
		var got []string
		for _, r := range reports {
			got = append(got, strings.Join(append([]string{r.ClientID}, r.Keys...), " "))
		}
		if strings.Join(got, "|") != test.want {
			t.Errorf("%q: got %q, want %q", test.key, got, test.want)
		}
	}
	_, err := requestTokens(adaptCaddyfile(t, expand("{\nauto_https off\n}\nhttp://127.0.0.1:1 {\n"+threeOfTwoClients+"\n}", "$AUTH", auth.URL)), wantedClients{key: "acme"}, false)
	wantError(t, err, "--key acme: the config has no client keys there")
}

func TestTokenCommandNamesUpstreamsAsInTheConfig(t *testing.T) {
	auth := newAuthServer(t)
	site := expand(`reverse_proxy unix//run/orders.sock tcp4/127.0.0.1:9000 {
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret s
		}
	}`, "$AUTH", auth.URL)
	output, _, err := runTokenCommand(t, site, "", false, false)
	wantError(t, err, "")
	for _, written := range []string{"unix//run/orders.sock", "tcp4/127.0.0.1:9000"} {
		if !strings.Contains(output, written) {
			t.Errorf("got\n%s\nwant %s", output, written)
		}
		_, _, err := runTokenCommand(t, site, written, false, false)
		wantError(t, err, "")
	}
	_, _, err = runTokenCommand(t, site, "127.0.0.1:9000", false, false)
	wantError(t, err, "it has tcp4/127.0.0.1:9000, unix//run/orders.sock")
}

func TestTokenCommandWithoutAClient(t *testing.T) {
	for _, test := range []struct{ site, want string }{
		{"respond ok", "no transport oauth2"},
		{"reverse_proxy 127.0.0.1:9000 {\ntransport oauth2 {\nupstream 127.0.0.1:9000 off\n}\n}", "all upstreams are off"},
	} {
		_, _, err := runTokenCommand(t, test.site, "", false, false)
		wantError(t, err, test.want)
	}
}

func TestTokenCommandReadsTheConfig(t *testing.T) {
	t.Chdir(t.TempDir())
	_, err := readConfig("", "")
	wantError(t, err, "--config")
	if err := os.WriteFile("Caddyfile", []byte(":80 {\nrespond ok\n}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if config, err := readConfig("", ""); err != nil || config.AppsRaw["http"] == nil {
		t.Errorf("got %v, err %v, want the Caddyfile of the directory", config, err)
	}
	file := filepath.Join(t.TempDir(), "caddy.json")
	if err := os.WriteFile(file, []byte(`{"@id": "mine", "apps": {}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = readConfig(file, "")
	wantError(t, err, "")
	if err := os.WriteFile(file, []byte(`{"aps": {}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = readConfig(file, "")
	wantError(t, err, "decoding config")
}
