package outboundauth

import (
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
)

// What stands in the config is sent as it is. Caddy's replacer, which takes the
// backslash out of `\{`, sees only texts that have a placeholder.
func TestLiteralsAreSentAsTheyAre(t *testing.T) {
	t.Setenv("TEST_VALUE", `a\{b\}c`)
	key := string(keytest.PKCS8(t, keytest.New(t)))
	for _, test := range []struct {
		value, want string
		atLoad      string // of an error where placeholders are replaced at load
	}{
		{`ab\{cd`, `ab\{cd`, ""},
		{`ab\}cd`, `ab\}cd`, ""},
		{`\{\}`, `\{\}`, ""},
		{`\{env.TEST_VALUE\}`, `\{env.TEST_VALUE\}`, ""},
		{`a{b`, `a{b`, ""},
		{`a}b\{`, `a}b\{`, ""},
		{`}{\`, `}{\`, ""},
		{`a\\{b`, `a\\{b`, ""},
		{strings.Repeat("{", 200) + `\{`, strings.Repeat("{", 200) + `\{`, ""},
		{`a{b}c\{d`, `a{b}c\{d`, "unrecognized placeholder {b}"},
		{`{env.TEST_VALUE}`, `a\{b\}c`, ""},
		{`x{env.TEST_VALUE}y`, `xa\{b\}cy`, ""},
		{`\{{env.TEST_VALUE}\}`, `{a\{b\}c}`, ""}, // as in every other text with a placeholder
		{`a{{env.TEST_VALUE}`, `a{a\{b\}c`, "unrecognized placeholder {{env.TEST_VALUE}"},
	} {
		t.Run(test.value[:min(len(test.value), 20)], func(t *testing.T) {
			server := answering(http.StatusOK, goodAnswer)
			form := requestForm(t, newTestClient(t, Credentials{
				TokenURL: testTokenURL, ClientID: "id", ClientSecret: test.value, AuthMethod: authPost,
				Params: map[string]string{"x": test.value}, TokenRequestHeaders: map[string]string{"X-Test": test.value},
				GrantType: grantJWTBearer, PrivateKey: key, Subject: test.value, Claims: map[string]string{"x": test.value},
			}, server), server)
			for _, name := range []string{"client_secret", "x"} {
				if got := form.Get(name); got != test.want {
					t.Errorf("%s: got %q, want %q", name, got, test.want)
				}
			}
			if !strings.Contains(server.requests()[0], "\r\nX-Test: "+test.want+"\r\n") {
				t.Errorf("got %q, want %q in the header", server.requests()[0], test.want)
			}
			if claims := claimsOf(t, form.Get("assertion")); claims["sub"] != test.want || claims["x"] != test.want {
				t.Errorf("got the claims %v, want %q as sub and x", claims, test.want)
			}

			c := Credentials{TokenURL: testTokenURL, ClientID: test.value, ClientSecret: "s", AuthMethod: authPost, Audience: []string{test.value}}
			if test.atLoad != "" {
				_, err := c.expand(caddy.NewReplacer())
				wantError(t, err, test.atLoad)
				return
			}
			form = formOf(t, c)
			if id, audience := form.Get("client_id"), form.Get("audience"); id != test.want || audience != test.want {
				t.Errorf("got the id %q and the audience %q, want %q", id, audience, test.want)
			}
		})
	}
}

func claimsOf(t *testing.T, token string) map[string]any {
	t.Helper()
	_, claims, ok := jwt.Decode(token)
	if !ok {
		t.Fatalf("got %q, want a JWT", token)
	}
	return claims
}

// What tells clients apart is JSON, which has one character for all bytes that are not
// UTF-8: two clients could get each other's tokens.
func TestSettingsThatAreNotUTF8(t *testing.T) {
	dir := t.TempDir()
	key := writeFile(t, filepath.Join(dir, "key.pem"), keytest.PKCS8(t, keytest.New(t)))
	for name, value := range map[string]string{
		"is not UTF-8":                "canary\xff",
		"is not UTF-8, or holds":      "canary\uFFFD",
		"is UTF-16: save it as UTF-8": "\xff\xfec\x00a\x00n\x00a\x00r\x00y\x00",
	} {
		t.Setenv("TEST_VALUE", strings.ReplaceAll(value, "\x00", "\x01"))
		file := writeFile(t, filepath.Join(dir, "value"), []byte(value))
		for _, placeholder := range []string{"{env.TEST_VALUE}", "{file." + file + "}"} {
			for setting, more := range map[string]string{
				"name": "", "client_id": "", "audience": "", "resource": "", "scopes": "", "token_url": "", "issuer": "",
				"key_id":             "auth_method private_key_jwt\nprivate_key " + key,
				"assertion_audience": "auth_method private_key_jwt\nprivate_key " + key,
			} {
				settings := setting + " " + placeholder + "\n" + more + "\n"
				for _, line := range []string{"token_url " + testTokenURL, "client_id gateway", "client_secret s"} {
					name, _, _ := strings.Cut(line, " ")
					if name != setting && (setting != "issuer" || name != "token_url") && (more == "" || name != "client_secret") {
						settings += line + "\n"
					}
				}
				_, _, err := loadSettings(t, "127.0.0.1:9000", settings)
				wantError(t, err, setting+": "+name)
				wantNoCanary(t, err)
			}
		}
	}
}

// What stands in a config is UTF-8, or Caddy has made it so: without a word, another
// secret would be sent.
func TestConfigsThatAreNotUTF8(t *testing.T) {
	for _, setting := range []string{
		"client_id gateway-\xff", "client_secret canary-\xff", "param x canary-\xff", "param \xff x", "token_request_header X-Y canary-\xff",
		"tenant canary-\xff", "header X-Y canary-\xff", "audience canary-\xff", "name canary-\xff",
	} {
		name, _, _ := strings.Cut(setting, " ")
		err := loadError(t, proxyConfig("127.0.0.1:9000", strings.Join(withoutSetting(clientSettings, name), "\n")+"\n"+setting))
		if err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "is not UTF-8") {
			t.Errorf("%q: got %v, want that it is not UTF-8", setting, err)
		}
		wantNoCanary(t, err)
	}
}

func withoutSetting(settings, name string) (lines []string) {
	for line := range strings.Lines(settings) {
		if !strings.HasPrefix(line, name+" ") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

// A secret may be any bytes, but for what has to stand in a JWT.
func TestSecretsOfAnyBytes(t *testing.T) {
	const value = "canary-\xff\x00\xfe\r"
	file := writeFile(t, filepath.Join(t.TempDir(), "value"), []byte(value+"x\n"))
	placeholder := "{file." + file + "}"
	key := string(keytest.PKCS8(t, keytest.New(t)))
	c := Credentials{TokenURL: testTokenURL, ClientID: "id", ClientSecret: placeholder, AuthMethod: authPost, Params: map[string]string{"x": placeholder}}
	form := formOf(t, c)
	if secret, param := form.Get("client_secret"), form.Get("x"); secret != value+"x" || param != value+"x" {
		t.Errorf("got %q and %q, want the bytes of the file", secret, param)
	}
	for setting, c := range map[string]Credentials{
		"subject": {GrantType: grantJWTBearer, PrivateKey: key, Subject: placeholder},
		"claim x": {GrantType: grantJWTBearer, PrivateKey: key, Claims: map[string]string{"x": placeholder}},
	} {
		c.TokenURL, c.ClientID = testTokenURL, "id"
		_, err := newTestClient(t, c, answering(http.StatusOK, goodAnswer)).endpoint.locateAndRequest(t.Context(), nil)
		if got := wantTokenError(t, err, codeConfiguration, true); !strings.HasPrefix(got.Description, setting+": is not UTF-8") {
			t.Errorf("got %v, want that %s is not UTF-8", err, setting)
		}
		wantNoCanary(t, err)
	}
}
