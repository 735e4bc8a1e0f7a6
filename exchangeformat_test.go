package outboundauth

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// sentBody returns the type and the body of the token request that a client with these
// settings makes, and its error.
func sentBody(t *testing.T, settings string) (contentType, body string, err error) {
	t.Helper()
	server := &wire{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		contentType, body = r.Header.Get("Content-Type"), string(b)
		_, _ = io.WriteString(w, goodAnswer)
	})}
	cl, _ := discovering(t, "token_url "+tokenPlace+"\n"+settings, server)
	_, err = cl.endpoint.locateAndRequest(t.Context(), nil)
	return contentType, body, err
}

func TestTokenRequestInJSON(t *testing.T) {
	for _, test := range []struct {
		settings string
		want     map[string]any
	}{
		{"client_id gateway\nclient_secret \"a&b<\\\"ü\"\nauth_method client_secret_post\nscopes a b\naudience x\nresource https://a.example.com https://b.example.com\nparam region eu\ntoken_request json", map[string]any{
			"client_id": "gateway", "client_secret": `a&b<"ü`, "grant_type": "client_credentials", "scope": "a b", "audience": "x",
			"resource": []any{"https://a.example.com", "https://b.example.com"}, "region": "eu",
		}},
		{"grant_type none\nparam n 1\nparam t true\ntoken_request json", map[string]any{"n": "1", "t": "true"}},
	} {
		contentType, body, err := sentBody(t, test.settings)
		var got map[string]any
		if jsonErr := json.Unmarshal([]byte(body), &got); err != nil || jsonErr != nil || contentType != "application/json" || !reflect.DeepEqual(got, test.want) {
			t.Errorf("got %s, %s, err %v and %v, want %v", contentType, body, err, jsonErr, test.want)
		}
	}
	if contentType, _, err := sentBody(t, secretClient+"\ntoken_request form"); err != nil || contentType != "application/x-www-form-urlencoded" {
		t.Errorf("got %s, err %v, want a form", contentType, err)
	}
}

// A value that is not UTF-8 would arrive as another one.
func TestTokenRequestInJSONThatIsNotUTF8(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(canarySecret+"\xff"), 0o600); err != nil {
		t.Fatal(err)
	}
	client := "client_id gateway\nauth_method client_secret_post\nclient_secret {file." + file + "}\n"
	_, body, err := sentBody(t, client+"token_request json")
	wantTokenError(t, err, codeConfiguration, true)
	wantError(t, err, "token_request: json can hold nothing but UTF-8, and the value of client_secret is not")
	wantNoCanary(t, err)
	if body != "" {
		t.Errorf("got the request %q, want none", body)
	}
	if _, body, err := sentBody(t, client); err != nil || !strings.Contains(body, "%FF") {
		t.Errorf("got %q, err %v, want the secret as it is in a form", body, err)
	}
}

func TestTokenResponse(t *testing.T) {
	const data = "token_response {\naccess_token /data/token\nexpires_in /data/ttl "
	for _, test := range []struct {
		settings, body string
		want           grant
		description    string // of an error
	}{
		{data + "ms\n}", `{"data":{"token":"a","ttl":3600000}}`, granted("a", time.Hour), ""},
		{data + "\n}", `{"data":{"token":"a","ttl":"60"}}`, granted("a", time.Minute), ""},
		{data + "m\n}", `{"data":{"token":"a","ttl":1.5}}`, granted("a", 90*time.Second), ""},
		{data + "h\n}", `{"data":{"token":"a","ttl":2}}`, granted("a", 2*time.Hour), ""},
		{data + "d\n}", `{"data":{"token":"a","ttl":1e9}}`, granted("a", maxLifetime), ""},
		{data + "\n}", `{"data":{"token":"a"},"expires_in":5}`, granted("a", 0), ""},
		{data + "\n}", `{"data":{"token":"a","ttl":"2030-01-01"}}`, grant{accessToken: "a", odd: "is no number"}, ""},
		{"token_response {\naccess_token /tokens/0\n}", `{"tokens":["a"],"expires_in":60,"token_type":"bearer","scope":"s"}`, grant{accessToken: "a", lifetime: time.Minute, scope: "s"}, ""},
		{"token_response {\nexpires_in /ttl\n}", `{"access_token":"a","ttl":60}`, granted("a", time.Minute), ""},

		{data + "\n}", `{"data":{"token":5}}`, grant{}, "what is at the access_token of token_response is not a string"},
		{data + "\n}", `{"data":{"token":""}}`, grant{}, "no access_token"},
		{data + "\n}", `{"data":{"token":"error: ` + canaryToken + `"}}`, grant{}, "the text of an error"},
		{data + "\n}", `{"msg":"` + canaryToken + `"}`, grant{}, "nothing at the access_token of token_response"},
		{data + "\n}", `["` + canaryToken + `"]`, grant{}, "nothing at the access_token of token_response"},
		{"token_response {\naccess_token /0/token\n}", `[{"token":"a"}]`, granted("a", 0), ""},
		{data + "\n}", `{"data":{"token":"a"},"token_type":1}`, granted("a", 0), ""},
		{data + "\n}", `<html><title>` + canaryToken + `</title>`, grant{}, "not a JSON object"},
		{data + "\n}", `{"status":"error","msg":"no"}`, grant{}, "no"},
		{data + "\n}", `{"error":"e","msg":"no","data":{"token":"` + canaryToken + `"}}`, grant{}, "stands beside a token"},
	} {
		cl, _ := discovering(t, "token_url "+tokenPlace+"\n"+secretClient+"\n"+test.settings, answering(http.StatusOK, test.body))
		got, err := cl.endpoint.locateAndRequest(t.Context(), nil)
		got.issued, got.took = time.Time{}, 0
		if got != test.want || (err == nil) != (test.description == "") {
			t.Errorf("%s: got %+v, err %v, want %+v", test.body, got, err, test.want)
		}
		if test.description != "" {
			wantError(t, err, test.description)
		}
		wantNoCanary(t, err)
	}
}

// Operators are told once of a lifetime that nobody understands.
func TestOddLifetimeIsToldOnce(t *testing.T) {
	body := `{"access_token":"a","expires_in":"2030-01-01"}`
	server := &wire{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) })}
	cl, logs := discovering(t, "token_url "+tokenPlace+"\n"+secretClient, server)
	for i, want := range []int{1, 1, 1, 2} {
		if i == 2 {
			body = goodAnswer
		}
		if i == 3 {
			body = `{"access_token":"a","expires_in":-1}`
		}
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if logs.Len() != want {
			t.Errorf("got %d warnings after %d answers, want %d", logs.Len(), i+1, want)
		}
	}
	if got := logs.All()[1]; !strings.Contains(got.Message, "(expires_in) is negative: default_lifetime counts instead") || got.ContextMap()["client_id"] != "gateway" {
		t.Errorf("got the warning %v, want what is odd and which client", got)
	}
}

// A login that does not speak OAuth, as a gateway uses it.
func TestLoginEndpoint(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	auth.script(func(w http.ResponseWriter, _ tokenRequest) bool {
		_, _ = io.WriteString(w, `{"ok":true,"data":{"token":"login-token","ttl":3600000}}`)
		return true
	})
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		_, _ = io.WriteString(w, r.Header.Get("Authorization"))
		return true
	})
	t.Setenv("TEST_PASSWORD", "canary-password")
	g := startGateway(t, expand(`reverse_proxy $UP {
		transport oauth2 {
			token_url $AUTH/login
			grant_type none
			param user gateway
			param password {env.TEST_PASSWORD}
			token_request json
			token_response {
				access_token /data/token
				expires_in /data/ttl ms
			}
		}
	}`, "$UP", up.addr, "$AUTH", auth.URL))
	for range 3 {
		if r := g.get().want(t, http.StatusOK); r.body != "Bearer login-token" {
			t.Errorf("the upstream got %q, want the token of the login", r.body)
		}
	}
	auth.wantAsked(t, 1)
}
