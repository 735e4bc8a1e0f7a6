package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

const (
	oracleClients = 1000
	oracleSeed    = 6749

	// oracleTimeout is for all token requests of the gateway together.
	oracleTimeout = time.Minute
)

// TestOracle lets a gateway ask for the tokens of a thousand generated clients.
// What it sends must be, byte by byte, what golang.org/x/oauth2 sends, which
// servers of all kinds are used with.
func TestOracle(t *testing.T) {
	requests := make(chan wireRequest)
	server := httptest.NewServer(recordTokenRequests(requests))
	t.Cleanup(server.Close) // after the gateway's end, which frees waiting handlers

	rng := rand.New(rand.NewPCG(oracleSeed, 0))
	generated := make([]oracleClient, oracleClients)
	want := make([]wireRequest, oracleClients)
	numbers := make(map[string]int) // of the clients, by the target of their requests
	for i := range generated {
		generated[i] = generateClient(rng, i, server.URL)
		want[i] = askOracle(t, generated[i], requests)
		numbers[want[i].target] = i
	}
	if len(numbers) != oracleClients {
		t.Fatalf("the clients have %d different targets, want %d", len(numbers), oracleClients)
	}

	gw := startOracleGateway(t, generated)
	got := make([]wireRequest, oracleClients)
	timeout := time.After(oracleTimeout)
	for pending := oracleClients; pending > 0; {
		select {
		case req := <-requests:
			i, ok := numbers[req.target]
			if !ok {
				t.Fatalf("seed %d: a token request that no client should make: %+v", oracleSeed, req)
			}
			if got[i].target == "" { // otherwise it is tried again
				pending--
			}
			got[i] = req
		case <-gw.exited:
			t.Fatalf("seed %d: the gateway ended with %d token requests to come", oracleSeed, pending)
		case <-timeout:
			t.Fatalf("seed %d: %d token requests haven't come after %v", oracleSeed, pending, oracleTimeout)
		}
	}

	// Of a thousand alike, one failure tells enough.
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("seed %d, client %d: the token request differs\n    client: %+q\n gateway: %+v\nx/oauth2: %+v",
				oracleSeed, i, generated[i], got[i], want[i])
		}
	}
}

// wireRequest is what of a token request decides who asks for what.
type wireRequest struct {
	method, host, target string
	// All fields of the name, each quoted, so that requests are comparable.
	authorization, contentType string

	length int64 // as announced; -1 if the body comes in chunks
	body   string
}

// recordTokenRequests answers each request with a token that outlives the
// test, once somebody has received the request.
func recordTokenRequests(requests chan<- wireRequest) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // whoever sent it has gone
		}
		select {
		case requests <- wireRequest{
			method:        r.Method,
			host:          r.Host,
			target:        r.RequestURI,
			authorization: fmt.Sprintf("%q", r.Header.Values("Authorization")),
			contentType:   fmt.Sprintf("%q", r.Header.Values("Content-Type")),
			length:        r.ContentLength,
			body:          string(body),
		}:
		case <-r.Context().Done():
			return
		}
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, `{"access_token":"token","token_type":"Bearer","expires_in":86400}`)
	}
}

// oracleClient is a client with all that goes into its token request.
type oracleClient struct {
	id, secret, method, tokenURL string
	scopes, audience             []string
	params                       map[string]string
}

// generateClient returns the client of that number. Both methods have as many
// clients, and the number makes the token URL its own.
func generateClient(rng *rand.Rand, number int, server string) oracleClient {
	c := oracleClient{
		id:       generateText(rng),
		secret:   generateText(rng),
		method:   []string{"client_secret_basic", "client_secret_post"}[number%2],
		tokenURL: fmt.Sprintf("%s/token/%d", server, number),
		params:   make(map[string]string),
	}
	if rng.IntN(3) == 0 {
		c.tokenURL += "?tenant=a%20b&x=%2b+" // a query is to be kept as it is
	}
	for range rng.IntN(4) {
		c.scopes = append(c.scopes, generateScope(rng))
	}
	for range rng.IntN(3) {
		c.audience = append(c.audience, generateText(rng))
	}
	for range rng.IntN(4) {
		c.params[generateText(rng)] = generateText(rng)
	}
	return c
}

// awkward is what encoders stumble over: the delimiters of headers, forms and
// placeholders, what is encoded already or seems to be, and characters that
// are more than one byte or more than one rune.
var awkward = []string{
	":", "%", "+", "&", "=", " ", "`", "{", "}", `\`, `"`, "'", ";", "#", "?", "/", "~", "*", "$", "<", ">",
	"%3A", "%zz", "%2", "&amp;", "{}", "{x", `\{`, `\}`, `\\`, "{$HOME}", "{x.y}", "}{", "a", "Z", "0", "-._~",
	"ß", "é", "e\u0301", "Ω", "\u00a0", "\u200d", "\u2028", "\ufeff", "日本", "🔑", "👩\u200d🚀", "\U0010ffff",
}

// generateText returns a text for which RFC 6749 appendix A sets no bounds
// but printable, with and without what lies beyond ASCII. It is never white space
// alone, and holds no U+FFFD: the gateway refuses both when it loads its config.
func generateText(rng *rand.Rand) string {
	var text strings.Builder
	switch rng.IntN(4) {
	case 0: // all printable ASCII
		for _, i := range rng.Perm('~' - ' ' + 1) {
			text.WriteByte(' ' + byte(i))
		}
	case 1: // some of it
		for range 1 + rng.IntN(40) {
			text.WriteByte(' ' + byte(rng.IntN('~'-' '+1)))
		}
	case 2: // any unicode, in which surrogates become U+FFFD
		for range 1 + rng.IntN(20) {
			text.WriteRune('\u00a0' + rng.Int32N('\U0010ffff'-'\u00a0'+1))
		}
	default:
		for range 1 + rng.IntN(20) {
			text.WriteString(awkward[rng.IntN(len(awkward))])
		}
	}
	if strings.TrimSpace(text.String()) == "" {
		text.WriteByte('x')
	}
	return strings.ReplaceAll(text.String(), "\ufffd", "x")
}

// generateScope returns a scope-token of RFC 6749 §3.3, which has neither
// spaces nor quotes nor backslashes.
func generateScope(rng *rand.Rand) string {
	scope := []byte{'s'}
	for range rng.IntN(20) {
		if c := '!' + byte(rng.IntN('~'-'!'+1)); c != '"' && c != '\\' {
			scope = append(scope, c)
		}
	}
	return string(scope)
}

// askOracle returns the request that x/oauth2 makes for the client's token.
func askOracle(t *testing.T, c oracleClient, requests <-chan wireRequest) wireRequest {
	t.Helper()
	config := clientcredentials.Config{
		ClientID:       c.id,
		ClientSecret:   c.secret,
		TokenURL:       c.tokenURL,
		Scopes:         c.scopes,
		EndpointParams: url.Values{},
		AuthStyle:      oauth2.AuthStyleInHeader,
	}
	if c.method == "client_secret_post" {
		config.AuthStyle = oauth2.AuthStyleInParams
	}
	if len(c.audience) > 0 {
		config.EndpointParams["audience"] = c.audience
	}
	for name, value := range c.params {
		config.EndpointParams.Set(name, value)
	}

	answered := make(chan error, 1)
	go func() {
		_, err := config.Token(t.Context())
		answered <- err
	}()
	select {
	case req := <-requests:
		if err := <-answered; err != nil {
			t.Fatalf("x/oauth2: %v", err)
		}
		return req
	case err := <-answered:
		t.Fatalf("x/oauth2 has made no token request: %v", err)
		return wireRequest{}
	}
}

// startOracleGateway starts a gateway with an upstream for each client. It
// fetches their tokens when it has started; nobody dials the upstreams.
//
// The config is JSON, for a Caddyfile has no way to quote all of the values.
// Each method has clients whose values stand there as they are, and such whose values
// stand in the environment.
func startOracleGateway(t *testing.T, clients []oracleClient) *process {
	t.Helper()
	type object = map[string]any
	var dials, credentials []object
	env := os.Environ()
	for i, c := range clients {
		inEnvironment := func(setting, text string) string {
			env = append(env, fmt.Sprintf("ORACLE_%s_%d=%s", setting, i, text))
			return fmt.Sprintf("{env.ORACLE_%s_%d}", setting, i)
		}
		// At load, what looks like a placeholder has to be one.
		literally := func(setting, text string) string {
			if strings.Contains(text, "{") && strings.Contains(text, "}") {
				return inEnvironment(setting, text)
			}
			return text
		}
		literals := func(setting string, texts []string) []string {
			var config []string
			for j, text := range texts {
				config = append(config, literally(fmt.Sprint(setting, j), text))
			}
			return config
		}
		id, secret := literally("ID", c.id), c.secret
		if i/2%2 == 1 {
			id, secret = inEnvironment("ID", c.id), inEnvironment("SECRET", c.secret)
		}
		dial := fmt.Sprintf("127.0.0.1:%d", i+1)
		dials = append(dials, object{"dial": dial})
		credentials = append(credentials, object{
			"addresses":     []string{dial},
			"token_url":     c.tokenURL,
			"client_id":     id,
			"client_secret": secret,
			"auth_method":   c.method,
			"scopes":        literals("SCOPE", c.scopes),
			"audience":      literals("AUDIENCE", c.audience),
			"params":        c.params,
			"token_timeout": oracleTimeout,
		})
	}
	config, err := json.Marshal(object{
		"admin": object{"disabled": true, "config": object{"persist": false}},
		"apps": object{"http": object{"servers": object{"gateway": object{
			"listen":          []string{"127.0.0.1:0"},
			"automatic_https": object{"disable": true},
			"routes": []object{{"handle": []object{{
				"handler":   "reverse_proxy",
				"upstreams": dials,
				"transport": object{"protocol": "oauth2", "upstreams": credentials},
			}}}},
		}}}},
	})
	if err != nil {
		t.Fatal(err)
	}

	dir := t.TempDir()
	path := filepath.Join(dir, "caddy.json")
	if err := os.WriteFile(path, config, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(caddyBinary, "run", "--config", path)
	cmd.Env = append(env, "XDG_CONFIG_HOME="+dir, "XDG_DATA_HOME="+dir)
	return startProcess(t, cmd)
}
