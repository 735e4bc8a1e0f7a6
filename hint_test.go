package outboundauth

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/clientcert"
	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
)

// hintedCodes are the errors for which there is a hint with every way to
// authenticate.
var hintedCodes = []string{
	"invalid_client", "unauthorized_client", "unsupported_grant_type", "invalid_scope", "invalid_target",
	"invalid_request", "use_dpop_nonce", "invalid_dpop_proof",
}

// adviceOn returns what a client is told that was refused with a code.
func (c *Credentials) adviceOn(code string) string {
	return denial{
		tokenError:  &tokenError{Status: http.StatusBadRequest, Code: code, answer: answerOAuthError, permanent: true},
		Credentials: c, presented: new(clientcert.Presented), sent: resolved{secret: "plain"},
	}.advice()
}

func TestHintNamesTheSettings(t *testing.T) {
	const whatever = "check scopes and auth_method, and whether the client may use the client_credentials grant"
	for _, test := range []struct {
		way, code string
		want      string
	}{
		{"basic", "invalid_client", "check client_id, client_secret and auth_method"},
		{"post", "invalid_client", "check client_id, client_secret and auth_method"},
		{"none", "invalid_client", "set client_secret, if the client has one; or check client_id"},
		{"client_secret_jwt", "invalid_client", "check client_secret, assertion_audience and auth_method"},
		{"private_key_jwt", "invalid_client", "check private_key, key_id and assertion_audience"},
		{"assertion_file", "invalid_client", "check assertion_file (issuer, subject, audience and expiry of its JWT), client_id and auth_method"},
		{"jwt_bearer, implied", "invalid_client", "check subject, private_key and client_id"},
		{"jwt_bearer of a file, implied", "invalid_client", "check assertion_file (issuer, subject, audience and expiry of its JWT)"},
		{"jwt_bearer", "invalid_grant", "check subject, private_key and client_id"},
		{"jwt_bearer of a file", "invalid_grant", "check assertion_file (issuer, subject, audience and expiry of its JWT)"},
		{"basic", "invalid_grant", "check client_id, client_secret and scopes"},
		{"basic", "unauthorized_client", "allow this client the client_credentials grant at the authorization server"},
		{"jwt_bearer", "unauthorized_client", "allow this client the jwt-bearer grant for this subject at the authorization server"},
		{"basic", "unsupported_grant_type", "check grant_type and token_url, or allow this client the client_credentials grant at the authorization server"},
		{"jwt_bearer", "unsupported_grant_type", "check grant_type and token_url, or allow this client the jwt-bearer grant for this subject at the authorization server"},
		{"basic", "invalid_target", "check audience and resource"},
		{"basic", "invalid_request", "check scopes and auth_method"},
		{"private_key_jwt", "invalid_request", "check key_id, private_key and scopes"},
		{"assertion_file", "invalid_request", "check assertion_file, scopes and auth_method"},
		{"basic", "use_dpop_nonce", "add dpop: the server binds the tokens of this client to a key"},
		{"basic", "AADSTS7000215", whatever},

		// As others spell it.
		{"basic", "Invalid-Client", "check client_id, client_secret and auth_method"},
		{"basic", "scope_invalid", "set scopes: the server wants some"},
		{"basic", "authorization_type_invalid", "allow this client the client_credentials grant at the authorization server"},
	} {
		c, ok := waysToAuthenticate()[test.way]
		if !ok {
			t.Fatalf("got no way to authenticate called %q", test.way)
		}
		c.TokenURL = testTokenURL
		if got := c.adviceOn(test.code); got != test.want {
			t.Errorf("%s, %s: got %q, want %q", test.way, test.code, got, test.want)
		}
	}
	const audience = "set assertion_audience to the URL of the token endpoint, which many servers want; or check "
	for way, want := range map[string]string{ // most servers expect another audience
		"client_secret_jwt":   audience + "client_secret and auth_method",
		"private_key_jwt":     audience + "private_key and key_id",
		"jwt_bearer, implied": audience + "subject and private_key",
		"basic":               "check client_id, client_secret and auth_method",
	} {
		c := waysToAuthenticate()[way]
		c.Issuer, c.AssertionAudience = "https://auth.example.com", ""
		if got := c.adviceOn("invalid_client"); got != want {
			t.Errorf("%s with issuer: got %q, want %q", way, got, want)
		}
	}
	all := Credentials{PrivateKey: "k", Audience: []string{"a"}, Resource: []string{"b"}, Params: map[string]string{"c": "d"}}
	if got, want := all.adviceOn("invalid_request"), "check audience, resource and param"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What the JWT in a file says is no setting.
var inTheFile = regexp.MustCompile(`\(issuer, .*\)|: issuer, .*`)

var settingName = regexp.MustCompile(`[a-z]+(_[a-z]+)+|\bissuer\b|\bscopes\b|\bparam\b|\bclaim\b|\bsubject\b|\bresource\b|\baudience\b`)

// A hint that names a setting without an effect, or none that can be found,
// leads nowhere.
func TestHintsNameSettingsThatHaveAnEffect(t *testing.T) {
	notSettings := []string{authKeyJWT, authPost, grantClientCredentials, grantJWTBearer}
	for way, c := range waysToAuthenticate() {
		c.ClientID = "id"
		for server, set := range map[string]func(*Credentials){
			"token_url": func(c *Credentials) { c.TokenURL = testTokenURL },
			"issuer":    func(c *Credentials) { c.Issuer = "https://auth.example.com" },
		} {
			c := c
			set(&c)
			wantUsable(t, way, c)
			for _, code := range append(slices.Clone(hintedCodes), "invalid_grant") {
				hint := c.adviceOn(code)
				if slices.Contains(hintedCodes, code) && hint == "" {
					t.Errorf("%s, %s: got no hint", way, code)
				}
				for _, name := range settingName.FindAllString(inTheFile.ReplaceAllString(hint, ""), -1) {
					if slices.Contains(notSettings, name) {
						continue
					}
					if _, ok := credentialsSettings[name]; !ok {
						t.Errorf("%s, %s: got %q, which names %s, want settings only", way, code, hint, name)
					}
					if strings.Contains(hint, "or set "+name) || strings.Contains(hint, "which "+name+" finds") || strings.Contains(hint, "set "+name+" to") {
						continue
					}
					if other := map[string]string{"token_url": "issuer", "issuer": "token_url"}[name]; other == server {
						t.Errorf("%s with %s, %s: got %q, want what is set", way, server, code, hint)
					}
					if name == "client_secret" && !needsSecret(c.authMethod()) && c.authMethod() != authNone {
						t.Errorf("%s, %s: got %q, want nothing about a secret that is not sent", way, code, hint)
					}
				}
			}
		}
	}
}

// jwtWith returns a JWT with these claims that nobody has signed.
func jwtWith(claims string) []byte {
	return fmt.Appendf(nil, "%s.%s.c2ln", base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"RS256"}`)),
		base64.RawURLEncoding.EncodeToString([]byte(claims)))
}

func TestAdviceOnARejection(t *testing.T) {
	dir := t.TempDir()
	key := keytest.New(t)
	keyFile := writeFile(t, filepath.Join(dir, "key"), keytest.PKCS8(t, key))
	certificate := &ClientCertificate{Certificate: writeFile(t, filepath.Join(dir, "crt"), keytest.CertificatePEM(t, key)), Key: keyFile}
	now := time.Now().Unix()
	file := func(name, claims string) string {
		return writeFile(t, filepath.Join(dir, name), jwtWith(claims))
	}
	expired := file("expired", fmt.Sprintf(`{"exp":%d}`, now-1))
	living := file("living", fmt.Sprintf(`{"exp":%d}`, now+3600))
	eternal := file("eternal", `{}`)
	odd := file("odd", `{"exp":"yesterday"}`)
	encrypted := writeFile(t, filepath.Join(dir, "encrypted"), []byte("aGVhZGVy.a2V5.aXY.dGV4dA.dGFn"))
	const hasExpired = "(the JWT in assertion_file has expired; see that it is renewed)"
	const notAsked = "(the server did not ask for the client_certificate: it may do so at another address; set token_url to that)"
	const checkFile = "(check assertion_file (issuer, subject, audience and expiry of its JWT), client_id and auth_method"

	secret := Credentials{ClientSecret: "s"}
	signing := Credentials{PrivateKey: keyFile}
	tls := Credentials{ClientCertificate: certificate}
	for _, test := range []struct {
		name   string
		c      Credentials
		status int
		body   string
		want   string // in the error
	}{
		{"secret, invalid_client", secret, 401, `{"error":"invalid_client"}`, "(check client_id, client_secret and auth_method)"},
		// Glewlwyd answers so when the client or its scope is not allowed.
		{"secret, empty 403", secret, 403, "", "(check client_id, client_secret and scopes)"},
		{"secret, empty 401", secret, 401, "", "(check client_id, client_secret and scopes)"},
		{"secret, code of its own", secret, 401, `{"error":"E1"}`, "(check client_id, client_secret and scopes)"},
		{"secret, invalid_grant", secret, 400, `{"error":"invalid_grant"}`, "(check client_id, client_secret and scopes)"},
		{"secret, invalid_scope with 403", secret, 403, `{"error":"invalid_scope"}`, "(set scopes: the server wants some)"},
		{"secret, empty 400", secret, 400, "", nothingThere[1:]},
		{"secret, empty 404", secret, 404, "", nothingThere[1:]},
		{"secret, code of its own with 400", secret, 400, `{"error":"E1"}`, "(check scopes and auth_method, and whether the client may use"},
		{"secret, a passing failure", secret, 503, `{"error":"temporarily_unavailable"}`, "(wait, or ask who runs"},
		{"secret, too many requests", secret, 429, "", "(wait: the server limits the rate"},

		{"key, empty 403", signing, 403, "", "(check private_key, key_id and scopes)"},

		{"expired assertion_file, invalid_client", Credentials{AssertionFile: expired}, 400, `{"error":"invalid_client"}`, hasExpired},
		{"expired assertion_file, empty 401", Credentials{AssertionFile: expired}, 401, "", hasExpired},
		{"expired assertion_file of the grant", Credentials{AssertionFile: expired, GrantType: grantJWTBearer}, 400, `{"error":"invalid_grant"}`, hasExpired},
		{"expired assertion_file, and another reason", Credentials{AssertionFile: expired}, 400, `{"error":"invalid_scope"}`, hasExpired},
		{"expired assertion_file that the server fails at", Credentials{AssertionFile: expired}, 500, "", hasExpired},
		{"living assertion_file, a fault of the server", Credentials{AssertionFile: living}, 500, "", "(wait, or ask who runs"},
		{"living assertion_file", Credentials{AssertionFile: living}, 400, `{"error":"invalid_client"}`, checkFile + ")"},
		{"assertion_file that does not expire", Credentials{AssertionFile: eternal}, 401, "", "(check assertion_file (issuer, subject, audience and expiry of its JWT), client_id and scopes)"},
		{"assertion_file with an odd expiry", Credentials{AssertionFile: odd}, 400, `{"error":"invalid_client"}`, checkFile + ")"},
		{"assertion_file that can't be read", Credentials{AssertionFile: encrypted}, 400, `{"error":"invalid_client"}`, checkFile + ")"},

		// The server of this test has no TLS, so it asks for no certificate.
		{"certificate, invalid_client", tls, 401, `{"error":"invalid_client"}`, notAsked},
		{"certificate, empty 403", tls, 403, "", notAsked},
		{"certificate, and another reason", tls, 400, `{"error":"invalid_target"}`, "(check audience and resource)"},
		{"certificate beside a secret", Credentials{ClientSecret: "s", ClientCertificate: certificate}, 401, `{"error":"invalid_client"}`, "(check client_id, client_secret and auth_method)"},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.c.TokenURL = testTokenURL
			if test.c.AssertionFile == "" {
				test.c.ClientID = "id"
			}
			cl := newTestClient(t, test.c, answering(test.status, test.body))
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			wantError(t, err, test.want)
		})
	}
}

func TestAdviceWhenTheServerAskedForTheCertificate(t *testing.T) {
	dir := t.TempDir()
	key := keytest.New(t)
	c := Credentials{TokenURL: testTokenURL, ClientID: "id", ClientCertificate: &ClientCertificate{
		Certificate: writeFile(t, filepath.Join(dir, "crt"), keytest.CertificatePEM(t, key)),
		Key:         writeFile(t, filepath.Join(dir, "key"), keytest.PKCS8(t, key)),
	}}
	refusing := answering(http.StatusUnauthorized, `{"error":"invalid_client"}`)
	asking := roundTripFunc(func(req *http.Request) (*http.Response, error) {
		if clientcert.Ask(req.Context()) == nil {
			t.Fatal("got a token request without the certificate, want it in the context")
		}
		return refusing.RoundTrip(req)
	})
	_, err := newTestClient(t, c, asking).endpoint.locateAndRequest(t.Context(), nil)
	wantError(t, err, "invalid_client (check client_id, client_certificate and token_url)")

	// Each request is asked anew.
	_, err = newTestClient(t, c, refusing).endpoint.locateAndRequest(t.Context(), nil)
	wantError(t, err, "(the server did not ask for the client_certificate")
}
