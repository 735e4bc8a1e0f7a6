package outboundauth

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"

	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// What must not be seen outside. The secret has characters of which each
// encoding makes something else.
const (
	hiddenSecret = "hidden secret/+%&=ü"
	hiddenParam  = "hidden-param+/x"
	hiddenHeader = "hidden-header"
)

// hidden are all forms in which a secret can show up.
func hidden() []string {
	basic := base64.StdEncoding.EncodeToString([]byte("gateway:" + url.QueryEscape(hiddenSecret)))
	forms := []string{basic, "canary-token", hiddenHeader}
	for _, s := range []string{hiddenSecret, hiddenParam} {
		quoted := strings.Trim(fmt.Sprintf("%+q", s), `"`)
		forms = append(forms, s, url.QueryEscape(s), url.PathEscape(s), quoted, base64.StdEncoding.EncodeToString([]byte(s)))
	}
	return forms
}

// wantNothingHidden fails the test if a text holds a secret.
func wantNothingHidden(t *testing.T, where, text string) {
	t.Helper()
	for _, secret := range hidden() {
		if i := strings.Index(text, secret); i >= 0 {
			t.Errorf("%s: got %q in %q, want no secret", where, secret, text[max(0, i-200):min(len(text), i+len(secret)+100)])
		}
	}
}

// echo returns what a token request contained, as careless servers do.
func echo(r tokenRequest) string {
	authorization := r.header.Get("Authorization")
	basic, _ := strings.CutPrefix(authorization, "Basic ")
	decoded, _ := base64.StdEncoding.DecodeString(basic)
	return fmt.Sprintf("bad request %s %s %s secret %s param %s header %s",
		r.form.Encode(), authorization, decoded, r.secret, r.form.Get("hidden"), r.header.Get("X-Hidden"))
}

// echoing are authorization servers that repeat the request in their failures.
var echoing = map[string]func(http.ResponseWriter, tokenRequest) bool{
	"description": func(w http.ResponseWriter, r tokenRequest) bool {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `{"error":"invalid_client","error_description":%q}`, echo(r))
		return true
	},
	"code": func(w http.ResponseWriter, r tokenRequest) bool {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `{"error":%q,"message":%q}`, echo(r), r.secret)
		return true
	},
	"secret only": func(w http.ResponseWriter, r tokenRequest) bool {
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprintf(w, `{"error":%q,"error_description":%q}`, r.form.Get("hidden"), r.header.Get("X-Hidden"))
		return true
	},
	"body": func(w http.ResponseWriter, r tokenRequest) bool {
		w.WriteHeader(http.StatusInternalServerError)
		fmt.Fprintf(w, "<h1>%s</h1>", echo(r))
		return true
	},
	"body of a success": func(w http.ResponseWriter, r tokenRequest) bool {
		fmt.Fprint(w, echo(r))
		return true
	},
	"token that is not legal": func(w http.ResponseWriter, r tokenRequest) bool {
		fmt.Fprintf(w, `{"access_token":"canary-token\r\n%s","expires_in":"%s"}`, r.form.Get("hidden"), r.form.Get("hidden"))
		return true
	},
	"token of another type": func(w http.ResponseWriter, r tokenRequest) bool {
		fmt.Fprintf(w, `{"access_token":"canary-token","token_type":%q}`, r.form.Get("hidden"))
		return true
	},
	"lifetime": func(w http.ResponseWriter, r tokenRequest) bool {
		fmt.Fprintf(w, `{"access_token":"canary-token","expires_in":%q}`, r.form.Get("hidden"))
		return true
	},
	"header": func(w http.ResponseWriter, r tokenRequest) bool {
		w.Header().Set("Location", "https://elsewhere.example/?"+r.form.Encode()+"&"+url.QueryEscape(r.secret))
		w.Header().Set("Retry-After", r.form.Get("hidden"))
		w.Header().Set("WWW-Authenticate", "Basic realm="+url.QueryEscape(echo(r)))
		w.WriteHeader(http.StatusTemporaryRedirect)
		return true
	},
	"answer that is not HTTP": func(w http.ResponseWriter, r tokenRequest) bool {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			fmt.Fprintf(conn, "HTTP/1.1 %s\r\n%s: x\r\n\r\n", echo(r), r.secret)
			conn.Close()
		}
		return true
	},
	"header field that is not legal": func(w http.ResponseWriter, r tokenRequest) bool {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n", r.secret)
			conn.Close()
		}
		return true
	},
	"hangs":  func(_ http.ResponseWriter, r tokenRequest) bool { <-r.ctx.Done(); return true },
	"tokens": nil,
}

const hidingSite = `reverse_proxy $UP {
	transport oauth2 {
		token_url $AUTH/token
		client_id gateway
		client_secret {env.OUTBOUNDAUTH_TEST_SECRET}
		auth_method $METHOD
		param hidden {env.OUTBOUNDAUTH_TEST_PARAM}
		token_request_header X-Hidden {env.OUTBOUNDAUTH_TEST_HEADER}
		token_timeout 200ms
		tenant acme
	}
}
handle_errors {
	respond "{err.status_code} {err.message} {err.trace} {http.oauth2.error} {http.oauth2.error_description} {http.oauth2.failure}"
}`

func TestSecretsAreNotSeen(t *testing.T) {
	t.Setenv("OUTBOUNDAUTH_TEST_SECRET", hiddenSecret)
	t.Setenv("OUTBOUNDAUTH_TEST_PARAM", hiddenParam)
	t.Setenv("OUTBOUNDAUTH_TEST_HEADER", hiddenHeader)
	for _, logCredentials := range []bool{false, true} {
		for _, method := range authMethods[:2] {
			for name, answer := range echoing {
				t.Run(fmt.Sprintf("%s/%s/log_credentials %v", name, method, logCredentials), func(t *testing.T) {
					auth := newAuthServer(t)
					auth.script(answer)
					up := newUpstream(t, auth)
					autosave := caddy.ConfigAutosavePath
					defer func() { caddy.ConfigAutosavePath = autosave }()
					g := newGateway(t)
					caddy.ConfigAutosavePath = filepath.Join(g.dir, "autosave.json")
					g.admin = heldAddress(t)
					g.global = "metrics\n"
					if logCredentials {
						g.global += "servers {\nlog_credentials\n}\n"
					}
					site := expand(hidingSite, "$UP", up.addr, "$AUTH", auth.URL, "$METHOD", method)
					config := strings.Replace(string(g.config(site)), `"persist":false`, `"persist":true`, 1)
					if err := caddy.Load([]byte(config), false); err != nil {
						t.Fatal(err)
					}

					for _, send := range []func() reply{
						func() reply { return g.get("Authorization", "Bearer client-own") },
						func() reply { return g.send(http.MethodPost, "/", strings.NewReader("body")) },
						func() reply { auth.revoke(); return g.get() }, // recovery
						func() reply { auth.revoke(); auth.script(echoing["description"]); return g.get() },
						func() reply { up.script(up.breakConnection); return g.get() },
					} {
						r := send()
						wantNothingHidden(t, "client", fmt.Sprint(r.err, r.header, r.body))
					}
					if answer == nil && len(up.got()) == 0 {
						t.Error("got no request at the upstream, want some with tokens")
					}
					if len(auth.asked()) == 0 {
						t.Error("got no token request, want one that has the secrets")
					}
					for _, path := range []string{"/config/", "/metrics", "/reverse_proxy/upstreams"} {
						wantNothingHidden(t, path, adminGet(t, g.admin, path))
					}
					if got := adminGet(t, g.admin, "/config/"); !strings.Contains(got, "{env.OUTBOUNDAUTH_TEST_SECRET}") {
						t.Errorf("got %s, want the placeholder", got)
					}
					g.load("respond gone") // with what is logged then
					g.stop()
					log := g.logs()
					if !strings.Contains(log, `"level":"debug"`) || !strings.Contains(log, "upstream roundtrip") && answer == nil {
						t.Error("got no debug log of the proxy, want one, or this test sees nothing")
					}
					wantNothingHidden(t, "log", log)
					wantNothingHidden(t, "autosave", readFile(t, caddy.ConfigAutosavePath))
				})
			}
		}
	}
}

func adminGet(t *testing.T, admin, path string) string {
	t.Helper()
	res, err := http.Get("http://" + admin + path)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: got %d, err %v, want 200", path, res.StatusCode, err)
	}
	http.DefaultClient.CloseIdleConnections()
	return string(body)
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	content, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(content)
}

// An answer may have a megabyte. Of a code and a description no more is searched
// for secrets than may be shown, and of a token nothing: to search takes many
// times the memory of the text.
func TestHugeAnswerIsCutBeforeItIsSearched(t *testing.T) {
	const size = 500 << 10
	huge := strings.Repeat("x ", size/2)
	const setScopes, whatever = "set scopes: the server wants some", "check scopes and auth_method, and whether the client may use the client_credentials grant"
	const hidden, beside = "the server's description repeats the client's credentials or a token, and is not shown", "the server's description stands beside a token, and is not shown"
	for _, test := range []struct {
		name                    string
		answer                  map[string]string
		code, description, hint string
	}{
		{"description", map[string]string{"error": "invalid_scope", "error_description": huge}, "invalid_scope", huge[:400] + "…", setScopes},
		{"secret where the description is shown", map[string]string{"error": "invalid_scope", "error_description": huge[:300] + canarySecret + huge}, "invalid_scope", hidden, setScopes},
		{"secret where it is cut", map[string]string{"error": "invalid_scope", "error_description": huge[:396] + canarySecret + huge}, "invalid_scope", hidden, setScopes},
		// That nothing is said of a secret there tells that nobody looked.
		{"secret far behind", map[string]string{"error": "invalid_scope", "error_description": huge + canarySecret}, "invalid_scope", huge[:400] + "…", setScopes},
		{"code", map[string]string{"error": huge}, strings.Repeat("x ", 32) + "…", "", whatever},
		{"code with a secret far behind", map[string]string{"error": huge + canarySecret}, strings.Repeat("x ", 32) + "…", "", whatever},
		{"code with a secret", map[string]string{"error": huge[:60] + canarySecret + huge}, codeHTTPStatus, "", whatever},
		{"token", map[string]string{"error": "invalid_scope", "error_description": "x", "access_token": huge}, "invalid_scope", beside, setScopes},
		{"token with a secret", map[string]string{"error": "invalid_scope", "access_token": huge + canarySecret}, "invalid_scope", beside, setScopes},
		{"all", map[string]string{"error": huge[:size/2], "error_description": huge[:size/2], "access_token": huge[:size/2]}, codeHTTPStatus, beside, whatever},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := answering(http.StatusBadRequest, string(encode(t, test.answer)))
			_, err := newTestClient(t, canaryCredentials(testTokenURL), server).endpoint.locateAndRequest(t.Context(), nil)
			got := wantTokenError(t, err, test.code, true)
			if got.Description != test.description || got.Hint != test.hint {
				t.Errorf("got the description %q and the hint %q, want %q and %q", got.Description, got.Hint, test.description, test.hint)
			}
			wantNoCanary(t, err)
		})
	}
}

// The time goes where the memory goes, but memory can be counted.
func TestHugeAnswerCostsNoMoreToSearch(t *testing.T) {
	c := canaryCredentials(testTokenURL)
	allocations := func(member string, size int) float64 {
		var text strings.Builder
		for i := 0; text.Len() < size; i++ { // nothing in it repeats itself
			fmt.Fprintf(&text, "%x-", i*i)
		}
		body := encode(t, map[string]string{"error": "invalid_scope", member: text.String()})
		return testing.AllocsPerRun(1, func() {
			a := serverAnswer{status: http.StatusBadRequest, header: http.Header{}, body: body}
			if _, err := c.readAnswer(mustParse(testTokenURL), "", a, redact.Secrets{canarySecret}); err == nil {
				t.Errorf("%s: got a token, want an error", member)
			}
		})
	}
	for _, member := range []string{"error", "error_description", "access_token"} {
		small, large := math.Inf(1), math.Inf(1)
		for range 5 { // what others allocate meanwhile is counted too, but they don't all the time
			small = min(small, allocations(member, 8<<10))
		}
		for try := 0; try < 30 && large > 2*small; try++ {
			large = min(large, allocations(member, 500<<10))
		}
		if large > 2*small {
			t.Errorf("%s: got %v allocations for 500 KiB, want about the %v for 8 KiB", member, large, small)
		}
	}
}

// The authorization server knows the token that is in use.
func TestTokenInUseIsNotInAnErrorOfTheServer(t *testing.T) {
	for _, answer := range []string{
		`{"error":"slow_down","error_description":"use canary-token-1-of-gateway for now"}`,
		`{"error":"slow_down","error_description":"use %63anary-token-1"}`,
		`{"error":"canary-token-1-of-gateway"}`,
	} {
		g, auth, up := gateAndFakes(t, "")
		g.get().want(t, http.StatusOK)
		auth.script(refusing(http.StatusBadRequest, answer))
		up.script(func(w http.ResponseWriter, _ *http.Request) bool { refuse(w, http.StatusUnauthorized); return true })
		g.get().want(t, http.StatusUnauthorized)
		eventually(t, func() bool { return len(g.logged("obtaining token failed")) > 0 }, "the failure in the log")
		statuses, _ := clientStatuses(selection{})
		for _, status := range statuses {
			if status.LastError == nil {
				t.Error("got no error of the client, want one")
			}
			wantNothingHidden(t, "the admin API", string(encode(t, status)))
		}
		if got := g.logs(); strings.Contains(got, "anary-token") {
			t.Errorf("got the token in the log: %s", got)
		}
		g.stop()
	}
}

// A secret that stands in the config is the admin's to see there, and nobody
// else's anywhere else.
func TestLiteralSecretIsNotLogged(t *testing.T) {
	for _, name := range []string{"description", "body", "tokens"} {
		t.Run(name, func(t *testing.T) {
			auth := newAuthServer(t)
			auth.script(echoing[name])
			up := newUpstream(t, auth)
			g := startGateway(t, proxySite(up, auth, "")+handleErrors)
			r := g.get()
			for where, text := range map[string]string{"client": fmt.Sprint(r.header, r.body), "log": g.logs()} {
				if strings.Contains(text, "canary-secret") {
					t.Errorf("%s: got %s, want no secret", where, text)
				}
			}
		})
	}
}

// The error of a config that does not load is logged, and shown by the admin
// API.
func TestSecretsAreNotInErrorsOfTheConfig(t *testing.T) {
	t.Setenv("OUTBOUNDAUTH_TEST_SECRET", hiddenSecret)
	t.Setenv("OUTBOUNDAUTH_TEST_URL", "http://gateway:hidden-param+/x@127.0.0.1/")
	const good = `"token_url":"http://127.0.0.1:1/",`
	for _, broken := range []string{
		`"token_url":"https://gateway:hidden-header@auth.example/"`,
		`"token_url":"{env.OUTBOUNDAUTH_TEST_SECRET}"`,
		`"token_url":"{env.OUTBOUNDAUTH_TEST_URL}"`,
		`"token_url":"http://hidden-header@[::1/"`,
		good + `"scopes":["a","\\"]`,
		good + `"auth_method":"none"`,
		good + `"tenant":{"field":"Host","value":"acme"}`,
		good + `"params":{"client_secret":"hidden-header"}`,
		good + `"params":{"a":"{http.request.header.X}hidden-header"}`,
		good + `"token_request_headers":{"X-Hidden":"hidden-header\n"}`,
		good + `"token_request_headers":{"Authorization":"hidden-header"}`,
	} {
		g := newGateway(t)
		err := caddy.Load([]byte(expand(`{"admin":{"disabled":true},"logging":{"logs":{"default":{"writer":{"output":"discard"}}}},"apps":{"http":{"servers":{"s":{"listen":["$ADDR"],
			"automatic_https":{"disable":true},"routes":[{"handle":[{"handler":"reverse_proxy","upstreams":[{"dial":"127.0.0.1:1"}],
			"transport":{"protocol":"oauth2","credentials":{"client_id":"a","client_secret":"hidden-header",$BROKEN}}}]}]}}}}}`,
			"$ADDR", g.addr, "$BROKEN", broken)), false)
		if err == nil {
			t.Errorf("%s: got no error, want one", broken)
			continue
		}
		wantNothingHidden(t, broken, err.Error())
	}
}

// Of what stands in the config itself, an error may well say what is wrong.
func TestQueryOfTheTokenURLThatIsNoSecret(t *testing.T) {
	t.Setenv("TEST_KEY", "hidden-key-of-a-function")
	const description = "client_credentials is not allowed for this client"
	for _, query := range []string{"", "?grant_type=client_credentials", "?grant_type=client_credentials&code={env.TEST_KEY}"} {
		auth := newAuthServer(t)
		auth.script(refusing(http.StatusBadRequest, `{"error":"unauthorized_client","error_description":"`+description+`"}`))
		g := newGateway(t)
		g.load(strings.Replace(proxySite(newUpstream(t, nil), auth, ""), "/token\n", "/token"+query+"\n", 1))
		g.get().want(t, http.StatusServiceUnavailable)
		// The lines of a fetch are written while those who wait for it go on.
		eventually(t, func() bool { return len(g.logged(description)) > 0 }, "%q in the log with %q", description, query)
	}
}

// Some servers repeat the address in their errors.
func TestKeyInTheTokenURLIsNotShown(t *testing.T) {
	t.Setenv("TEST_KEY", "hidden-key-of-a-function")
	for _, url := range []string{"$AUTH/token?code={env.TEST_KEY}", "$AUTH/token?{env.TEST_KEY}", "$AUTH/token?v=1&code={env.TEST_KEY}", "{env.TEST_URL}"} {
		t.Run(url, func(t *testing.T) { testKeyInTheTokenURL(t, url) })
	}
}

func testKeyInTheTokenURL(t *testing.T, url string) {
	auth := newAuthServer(t)
	t.Setenv("TEST_URL", auth.URL+"/token?code=hidden-key-of-a-function")
	auth.script(refusing(http.StatusNotFound, `{"error":"Not Found","message":"Cannot POST /token?code=hidden%2Dkey-of-a-function"}`))
	g := newGateway(t)
	g.load(strings.Replace(proxySite(newUpstream(t, nil), auth, ""), auth.URL+"/token\n", strings.ReplaceAll(url, "$AUTH", auth.URL)+"\n", 1) +
		`
		handle_errors {
			respond "{http.oauth2.error}: {http.oauth2.error_description}"
		}`)
	r := g.get()
	if r.err != nil || !strings.Contains(r.body, "repeats the client's credentials") {
		t.Errorf("got %q, err %v, want why nothing is shown", r.body, r.err)
	}
	for where, text := range map[string]string{"the answer": r.body, "the log": g.logs()} {
		if strings.Contains(text, "key-of-a-function") {
			t.Errorf("got the key in %s: %q", where, text)
		}
	}
}

func TestPrivateKeyIsNotPrinted(t *testing.T) {
	for kind := range keytest.Keys {
		t.Run(kind, func(t *testing.T) {
			source := keytest.PKCS8(t, keytest.Keys[kind]())
			key, err := jwt.ParseKey(source, "", "2024")
			if err != nil {
				t.Fatal(err)
			}
			r := resolved{
				secret: canarySecret, key: key, keySource: source, assertion: canaryToken,
				subject: canarySecret, claims: map[string]string{"a": canarySecret},
				params: map[string]string{"a": canarySecret}, headers: map[string]string{"a": canarySecret},
			}
			for _, v := range []any{key, *key, r, &r, []*jwt.Key{key}, []resolved{r}, map[string]any{"a": key, "b": r}, struct{ Key any }{key}} {
				for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d", "%x", "%X", "%o"} {
					wantNoKey(t, fmt.Sprintf("%s of a %T", verb, v), fmt.Sprintf(verb, v), keytest.Keys[kind]())
				}
				wantNoKey(t, fmt.Sprintf("a log entry with a %T", v), logged(t, v), keytest.Keys[kind]())
			}
		})
	}
}

// logged returns what the encoders of zap make of a value.
func logged(t *testing.T, v any) string {
	t.Helper()
	var text strings.Builder
	for _, encoder := range []zapcore.Encoder{
		zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()),
		zapcore.NewConsoleEncoder(zap.NewDevelopmentEncoderConfig()),
	} {
		entry, err := encoder.EncodeEntry(zapcore.Entry{}, []zapcore.Field{zap.Any("v", v), zap.Reflect("w", v)})
		if err != nil {
			t.Fatal(err)
		}
		text.WriteString(entry.String())
	}
	return text.String()
}

// wantNoKey fails the test if a text holds key material, or a secret.
func wantNoKey(t *testing.T, where, text string, key crypto.Signer) {
	t.Helper()
	var secret []byte
	switch key := key.(type) {
	case *rsa.PrivateKey:
		secret = key.D.Bytes()
	case *ecdsa.PrivateKey:
		secret, _ = key.Bytes()
	case ed25519.PrivateKey:
		secret = key.Seed()
	}
	if len(secret) < 32 {
		t.Fatalf("got a secret of %d bytes, want one to look for", len(secret))
	}
	start := secret[4:12]
	bytesOf := fmt.Sprintf("%d", start)
	for _, form := range []string{
		bytesOf[1 : len(bytesOf)-1], string(start), hex.EncodeToString(start), strings.ToUpper(hex.EncodeToString(start)),
		fmt.Sprintf("%#v", start)[len("[]byte{"):40], new(big.Int).SetBytes(secret).String()[:12],
		base64.StdEncoding.EncodeToString(secret)[8:16],
	} {
		if strings.Contains(text, form) {
			t.Errorf("%s: got %.200q, which holds the key", where, text)
			return
		}
	}
	wantNoCanaryIn(t, text)
}

// A server may still know the tokens that it has granted before, and the secret that
// was replaced. Both may be valid still.
func TestWhatAServerRemembersIsNotShown(t *testing.T) {
	secretFile := writeFile(t, filepath.Join(t.TempDir(), "secret"), []byte("the-former-secret"))
	auth := newAuthServer(t)
	g := newOperableGateway(t)
	g.load(strings.Replace(proxySite(newUpstream(t, nil), auth, ""), "client_secret", "client_secret {file."+secretFile+"}\n#", 1) +
		"\nhandle_errors {\n respond \"{http.oauth2.error_description}\"\n}")
	g.get().want(t, http.StatusOK)
	s := theSource(t)
	former := s.Peek().value
	if _, err := s.rested().FetchNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	for what, remembered := range map[string]string{"a former token": former, "the token": s.Peek().value, "a former secret": "the-former-secret"} {
		writeFile(t, secretFile, []byte("the-present-secret"))
		auth.script(refusing(http.StatusBadRequest, `{"error":"invalid_grant","error_description":"you hold `+remembered+`"}`))
		_ = s.rested().Forget(t.Context())
		s.rested()
		r := g.get()
		if r.err != nil || !strings.Contains(r.body, "is not shown") {
			t.Errorf("%s: got %q, err %v, want why nothing is shown", what, r.body, r.err)
		}
		eventually(t, func() bool { return len(g.logged("obtaining token failed")) > 0 }, "the failure in the log")
		for where, text := range map[string]string{"the answer": r.body, "the log": g.logs(), "the admin API": string(encode(t, g.clients()))} {
			if strings.Contains(text, remembered) {
				t.Errorf("%s: is in %s: %q", what, where, text)
			}
		}
	}
}

// The metadata may name the token as a part of the token endpoint's address.
func TestTokenInTheMetadataIsNotShown(t *testing.T) {
	p := newPublisher("")
	p.publish(oauthPlace, page(http.StatusOK, document(testIssuer, tokenPlace)))
	cl, _ := discovering(t, issuerSecret, p)
	for granted, want := range map[string]string{"t0ken-that-is-valid": testIssuer, strings.TrimPrefix(tokenPlace, "/"): withheld} {
		_, _ = cl.endpoint.locateAndRequest(t.Context(), redact.Secrets{granted})
		if got := cl.endpoint.knownURL(); !strings.Contains(got, want) {
			t.Errorf("with the token %q, the token endpoint is shown as %q, want %q", granted, got, want)
		}
	}
}
