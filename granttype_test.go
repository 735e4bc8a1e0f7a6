package outboundauth

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestGrantTypes(t *testing.T) {
	for _, test := range []struct {
		name string
		want string // in the error; "": it is sent, or has a meaning here
	}{
		{"client_credentials", ""},
		{"jwt_bearer", ""},
		{"none", ""},
		{"urn:ietf:params:oauth:grant-type:jwt-bearer", ""},
		{"account_credentials", ""}, // Zoom
		{"urn:ietf:params:oauth:grant-type:saml2-bearer", ""},
		{"http://oauth.net/grant_type/device/1.0/x", ""},
		{"Grant.Type-1_x", ""},
		{"code", ""}, // near none, but not very

		{"client_credential", "write client_credentials"},
		{"client-credentials", "write client_credentials"},
		{"clientcredentials", "write client_credentials"},
		{"Client_Credentials", "write client_credentials"},
		{"cilent_credentials", "write client_credentials"},
		{"jwt-bearer", "write jwt_bearer"},
		{"jwtbearer", "write jwt_bearer"},
		{"urn:ietf:params:oauth:grant-type:jwt_bearer", "write jwt_bearer"},
		{"urn:ietf:params:oauth:grant-type:client_credentials", "write client_credentials"},
		{"None", "write none"},

		{"password", "a user's password"},
		{"Password", "a user's password"},
		{"passwort", "a user's password"},
		{"urn:ietf:params:oauth:grant-type:password", "a user's password"},
		{"authorization_code", "a user with a browser"},
		{"authorization-code", "a user with a browser"},
		{"authorizationCode", "a user with a browser"},
		{"implicit", "a user with a browser"},
		{"refresh_token", "keeps no refresh tokens"},
		{"refresh-token", "keeps no refresh tokens"},
		{"device_code", "a second device"},
		{"urn:ietf:params:oauth:grant-type:device_code", "a second device"},
		{"URN:ietf:params:oauth:grant-type:device-code", "a second device"},
		{"token-exchange", "the token of a caller"},
		{"token_exchange", "the token of a caller"},
		{"urn:ietf:params:oauth:grant-type:token-exchange", "the token of a caller"},

		{"urn:ietf:params:oauth:grant_type:token-exchange", "the token of a caller"},
		{"oauth:grant-type:token-exchange", "the token of a caller"},

		{"a grant", "is neither a name"},
		{canarySecret + "!", "is neither a name"},
		{"{env.GRANT}", "is neither a name"},
		{"größe", "is neither a name"},
	} {
		c := Credentials{GrantType: test.name}
		switch err := c.check(); {
		case test.want == "" && err != nil:
			t.Errorf("%s: got %v, want no error", test.name, err)
		case test.want != "":
			wantError(t, err, test.want)
			if err != nil && (!strings.HasPrefix(err.Error(), "grant_type: ") || strings.Contains(err.Error(), canarySecret)) {
				t.Errorf("%s: got %v, want an error of grant_type that quotes nothing", test.name, err)
			}
		}
	}
}

// A grant of another name is sent with its params, and none without a name.
func TestOtherGrantsAreSentAsTheyAre(t *testing.T) {
	for _, test := range []struct{ settings, want string }{
		{secretClient + "\ngrant_type account_credentials\nparam account_id 4711", "account_id=4711&grant_type=account_credentials"},
		{"client_id a\nauth_method none\ngrant_type urn:ietf:params:oauth:grant-type:saml2-bearer\nparam assertion PHNhbWw+", "assertion=PHNhbWw%2B&client_id=a&grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Asaml2-bearer"},
		{"grant_type none\nparam user gateway\nparam password x", "password=x&user=gateway"},
		{"client_id a\ngrant_type none\nparam p x", "client_id=a&p=x"},
		{"client_id a\nclient_secret b\nauth_method client_secret_post\ngrant_type none\nparam p x", "client_id=a&client_secret=b&p=x"},
	} {
		server := answering(http.StatusOK, goodAnswer)
		var form string
		serve := server.Handler
		server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_ = r.ParseForm()
			form = r.PostForm.Encode()
			serve.ServeHTTP(w, r)
		})
		cl, _ := discovering(t, "token_url "+tokenPlace+"\n"+test.settings, server)
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil || form != test.want {
			t.Errorf("%s: got %s, err %v, want %s", test.settings, form, err, test.want)
		}
	}
}

// A login that is repeated could lock its user out.
func TestLoginIsNotRepeatedAtOnce(t *testing.T) {
	for _, once := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := &scriptedRequester{lifetime: time.Hour, once: once, fail: outageIn(0, time.Hour).refusing(errors.New("down"))}
			s := newTestSource(t, r)
			if _, _, err := s.Token(t.Context()); err == nil {
				t.Error("got a token, want an error")
			}
			want := 3 // two quick retries
			if once {
				want = 1
			}
			expectRequests(t, r, want)
		})
	}
	for settings, want := range map[string]bool{
		secretClient: true,
		secretClient + "\ngrant_type account_credentials\nparam account_id 4711": false,
		"grant_type none\nparam user gateway":                                    false,
	} {
		cl, _ := discovering(t, "token_url "+tokenPlace+"\n"+settings, answering(http.StatusOK, goodAnswer))
		if e := cl.endpoint; e.repeatable() != want || e.concurrent() != want {
			t.Errorf("%s: repeatable %v, concurrent %v, want %v", settings, e.repeatable(), e.concurrent(), want)
		}
	}
	// What answers without a token has refused it, whatever its words.
	for settings, permanent := range map[string]bool{secretClient: false, "grant_type none\nparam user gateway": true} {
		cl, _ := discovering(t, "token_url "+tokenPlace+"\n"+settings, answering(http.StatusOK, `{"ok":false}`))
		_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
		wantTokenError(t, err, codeInvalidResponse, permanent)
	}
}

func TestEdits(t *testing.T) {
	for _, test := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"a", "", 1}, {"abc", "", 3}, {"none", "none", 0}, {"nnoe", "none", 2}, {"kitten", "sitting", 3}, {"sittin", "sitting", 1}, {"implicit", "explicit", 2}, {"password", "passwd", 2},
	} {
		if got := edits(test.a, test.b); got != test.want || edits(test.b, test.a) != test.want {
			t.Errorf("edits(%q, %q) = %d, want %d", test.a, test.b, got, test.want)
		}
	}
}
