package outboundauth

import (
	"context"
	"encoding/base64"
	"fmt"
	"html"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

func TestClientAuthenticationIsEncoded(t *testing.T) {
	// RFC 6749 §2.3.1 and appendix B: both parts of Basic are form-encoded.
	for _, test := range []struct {
		name, id, secret string
		wantBasic        string // before base64
		wantForm         string
	}{
		{"plain", "id", "secret", "id:secret", "client_id=id&client_secret=secret"},
		{"colon", "a:b", "c:d", "a%3Ab:c%3Ad", "client_id=a%3Ab&client_secret=c%3Ad"},
		{"percent", "a%3Ab", "100%", "a%253Ab:100%25", "client_id=a%253Ab&client_secret=100%25"},
		{"plus and space", "a+b", "c d", "a%2Bb:c+d", "client_id=a%2Bb&client_secret=c+d"},
		{"ampersand and equals", "a&b=c", "d&e=f", "a%26b%3Dc:d%26e%3Df", "client_id=a%26b%3Dc&client_secret=d%26e%3Df"},
		{"umlaut", "jürgen", "süß", "j%C3%BCrgen:s%C3%BC%C3%9F", "client_id=j%C3%BCrgen&client_secret=s%C3%BC%C3%9F"},
		{"base64", "id", "aB+/cd==", "id:aB%2B%2Fcd%3D%3D", "client_id=id&client_secret=aB%2B%2Fcd%3D%3D"},
		{"URL as id", "https://app.example/", "s", "https%3A%2F%2Fapp.example%2F:s", "client_id=https%3A%2F%2Fapp.example%2F&client_secret=s"},
		{"unreserved", "a-b_c.d~e", "*", "a-b_c.d~e:%2A", "client_id=a-b_c.d~e&client_secret=%2A"},
	} {
		t.Run(test.name, func(t *testing.T) {
			form, header := url.Values{}, http.Header{}
			authenticated(t, authBasic, test.id, test.secret, form, header)
			got, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(header.Get("Authorization"), "Basic "))
			if err != nil || string(got) != test.wantBasic {
				t.Errorf("Basic credentials = %q, %v, want %q", got, err, test.wantBasic)
			}
			if len(form) != 0 {
				t.Errorf("the form holds %v beside the Authorization header, want one method only", form)
			}
			// A server that follows the RFC gets back what was configured.
			id, secret, _ := strings.Cut(string(got), ":")
			if id, err := url.QueryUnescape(id); err != nil || id != test.id {
				t.Errorf("the server reads the id %q, %v, want %q", id, err, test.id)
			}
			if secret, err := url.QueryUnescape(secret); err != nil || secret != test.secret {
				t.Errorf("the server reads the secret %q, %v, want %q", secret, err, test.secret)
			}

			form, header = url.Values{}, http.Header{}
			authenticated(t, authPost, test.id, test.secret, form, header)
			if got := form.Encode(); got != test.wantForm {
				t.Errorf("form = %q, want %q", got, test.wantForm)
			}
			if len(header) != 0 {
				t.Errorf("the header holds %v beside the form, want one method only", header)
			}
		})
	}
}

// authenticated adds a client's identity to a token request, and returns what
// must not be shown.
func authenticated(tb testing.TB, method, id, secret string, form url.Values, header http.Header) redact.Secrets {
	tb.Helper()
	c := Credentials{AuthMethod: method, ClientID: id, ClientSecret: secret}
	secrets, err := c.authenticate(resolved{secret: secret}, "", form, header)
	if err != nil {
		tb.Fatal(err)
	}
	return secrets
}

func TestNoAuthenticationSendsTheIDOnly(t *testing.T) {
	form, header := url.Values{}, http.Header{}
	sensitive := authenticated(t, authNone, "id", "", form, header)
	if got := form.Encode(); got != "client_id=id" || len(header) != 0 {
		t.Errorf("form = %q, header = %v, want client_id=id and none", got, header)
	}
	if len(sensitive) != 0 {
		t.Errorf("sensitive = %q, want nothing: the id is not secret", sensitive)
	}
}

// Some servers take id and secret as they come.
func TestBasicWithoutEncoding(t *testing.T) {
	for _, test := range []struct{ id, secret string }{
		{"id", "secret"},
		{"id", "100%:+/ &=?#~ süß"},
		{"https%3A%2F%2Fapp.example", "a%3Ab"},
	} {
		c := Credentials{ClientID: test.id, BasicEncoding: basicRaw, ClientSecret: "{env.TEST_RAW_SECRET}"}
		form, header := url.Values{}, http.Header{}
		secrets, err := c.authenticate(resolved{secret: test.secret}, "", form, header)
		if err != nil {
			t.Fatal(err)
		}
		if len(form) != 0 || len(header) != 1 {
			t.Errorf("got the form %v and the header %v, want Authorization alone", form, header)
		}
		id, secret, ok := (&http.Request{Header: header}).BasicAuth()
		if !ok || id != test.id || secret != test.secret {
			t.Errorf("the server reads %q and %q, want %q and %q", id, secret, test.id, test.secret)
		}
		for _, echo := range []string{test.secret, header.Get("Authorization")} {
			if test.secret != "secret" && !secrets.In("bad: "+echo) {
				t.Errorf("%q may be shown, want not: it repeats the secret", echo)
			}
		}
	}

	c := Credentials{TokenURL: testTokenURL, ClientID: "a%3Ab", ClientSecret: "c:%d", BasicEncoding: basicRaw}
	server := answering(http.StatusOK, goodAnswer)
	requestForm(t, newTestClient(t, c, server), server)
	want := "\r\nAuthorization: Basic " + base64.StdEncoding.EncodeToString([]byte("a%3Ab:c:%d")) + "\r\n"
	if got := server.requests()[0]; !strings.Contains(got, want) {
		t.Errorf("sent %q, want %q in it", got, want)
	}
}

// The server would take what is before the colon for the id, also if it only
// shows when the config is loaded (RFC 7617 §2).
func TestRawBasicSendsNoIDWithAColon(t *testing.T) {
	t.Setenv("TEST_ID", "a:b")
	const want = "basic_encoding: raw can't send a client_id with a colon, where servers cut it (RFC 7617 section 2); set auth_method client_secret_post in its place"
	for _, test := range []struct{ id, encoding, method, want string }{
		{"a:b", basicRaw, "", want},
		{"a:b", basicRaw, authBasic, want},
		{"{env.TEST_ID}", basicRaw, "", want},
		{"a", basicRaw, "", ""},
		{"a%3Ab", basicRaw, "", ""},
		{"a:b", basicForm, "", ""},
		{"a:b", "", "", ""},
		{"a:b", "", authPost, ""},
	} {
		_, _, err := loadTransport(t, "127.0.0.1:9000", map[string]any{"credentials": Credentials{
			TokenURL: testTokenURL, ClientID: test.id, ClientSecret: "c:d", AuthMethod: test.method, BasicEncoding: test.encoding,
		}})
		if wantError(t, err, test.want); t.Failed() {
			t.Fatalf("that was for %+v", test)
		}
	}
}

// People know the methods by other names, and misspell them. What they wrote is not
// quoted: it may be a secret on the wrong line.
func TestAuthMethodOfAnotherName(t *testing.T) {
	const unknown = "auth_method: unknown method; "
	for method, want := range map[string]string{
		"self_signed_tls_client_auth": "write tls_client_auth, which presents self-signed certificates, too",
		"mtls":                        "write tls_client_auth",
		"basic":                       "write client_secret_basic",
		"header":                      "write client_secret_basic",
		"POST":                        "write client_secret_post",
		"body":                        "write client_secret_post",
		"client_secret":               "write client_secret_basic or client_secret_post",
		"private_key":                 "write private_key_jwt",
		"client_secret_pots":          "write client_secret_post",
		"client_secret_jot":           "write client_secret_jwt", // two letters from client_secret_post
		"client-secret-basic":         "write client_secret_basic",
		"Client_Secret_Post":          "write client_secret_post",
		"tls_client_aut":              "write tls_client_auth",
		"private_key_jwts":            "write private_key_jwt",
		"non":                         "write none",
		"client_secret_canary":        "use one of client_secret_basic, client_secret_post, ",
		"nine_":                       "use one of ",
		"node":                        "write none",
		"home":                        "use one of ", // two of four letters
		"jwt":                         "use one of ",
	} {
		_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(proxyConfig("127.0.0.1:9000", "auth_method "+method+"\n"+clientSettings)), nil)
		wantError(t, err, unknown+want)
		if err != nil && (!strings.Contains(err.Error(), ", at Caddyfile:4") || strings.Contains(err.Error(), "canary")) {
			t.Errorf("%s: got %v, want the line, and not what stands there", method, err)
		}
	}
}

// A shorter one would hardly be left when the JWT arrives.
func TestAssertionLifetimeHasAMinimum(t *testing.T) {
	for lifetime, want := range map[time.Duration]string{
		-time.Second: "assertion_lifetime: must be 30s at least, as the JWT is dated back by 10s", 1: "assertion_lifetime: must be 30s at least",
		minAssertionLifetime - 1: "assertion_lifetime: must be 30s at least", minAssertionLifetime: "", 0: "", time.Hour: "",
	} {
		c := Credentials{PrivateKey: "k", AssertionLifetime: caddy.Duration(lifetime)}
		wantError(t, c.check(), want)
	}
}

// RFC 6749 §2.3 forbids to authenticate in more than one way.
func TestClientAuthenticatesInOneWay(t *testing.T) {
	dir := t.TempDir()
	key := keytest.New(t)
	keyFile := writeFile(t, filepath.Join(dir, "key"), keytest.PKCS8(t, key))
	certificate := &ClientCertificate{Certificate: writeFile(t, filepath.Join(dir, "crt"), keytest.CertificatePEM(t, key)), Key: keyFile}
	assertionFile := writeFile(t, filepath.Join(dir, "jwt"), []byte("a.b.c"))
	secret := strings.Repeat("s", 32)

	for _, test := range []struct {
		name string
		c    Credentials
		want string // names of the form's parameters, and of the header
	}{
		{"client_secret_basic", Credentials{AuthMethod: authBasic, ClientSecret: secret}, "Authorization"},
		{"client_secret_post", Credentials{AuthMethod: authPost, ClientSecret: secret}, "client_id client_secret"},
		{"client_secret_jwt", Credentials{AuthMethod: authSecretJWT, ClientSecret: secret}, "client_assertion client_assertion_type client_id"},
		{"private_key_jwt", Credentials{AuthMethod: authKeyJWT, PrivateKey: keyFile}, "client_assertion client_assertion_type client_id"},
		{"private_key_jwt with a certificate", Credentials{AuthMethod: authKeyJWT, ClientCertificate: certificate}, "client_assertion client_assertion_type client_id"},
		{"private_key_jwt of a file", Credentials{AuthMethod: authKeyJWT, AssertionFile: assertionFile}, "client_assertion client_assertion_type client_id"},
		{"tls_client_auth", Credentials{AuthMethod: authTLS, ClientCertificate: certificate}, "client_id"},
		{"none", Credentials{AuthMethod: authNone}, "client_id"},

		{"implied by client_secret", Credentials{ClientSecret: secret}, "Authorization"},
		{"implied by client_secret, beside a certificate", Credentials{ClientSecret: secret, ClientCertificate: certificate}, "Authorization"},
		{"implied by private_key", Credentials{PrivateKey: keyFile}, "client_assertion client_assertion_type client_id"},
		{"implied by private_key, beside a certificate", Credentials{PrivateKey: keyFile, ClientCertificate: certificate}, "client_assertion client_assertion_type client_id"},
		{"implied by assertion_file", Credentials{AssertionFile: assertionFile}, "client_assertion client_assertion_type client_id"},
		{"implied by client_certificate", Credentials{ClientCertificate: certificate}, "client_id"},
		{"implied by jwt_bearer", Credentials{GrantType: grantJWTBearer, PrivateKey: keyFile}, "assertion"},
		{"implied by jwt_bearer, beside a certificate", Credentials{GrantType: grantJWTBearer, PrivateKey: keyFile, ClientCertificate: certificate}, "assertion"},
		{"implied by jwt_bearer and client_secret", Credentials{GrantType: grantJWTBearer, PrivateKey: keyFile, ClientSecret: secret}, "Authorization assertion"},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.c.TokenURL, test.c.ClientID = testTokenURL, "id"
			server := answering(http.StatusOK, goodAnswer)
			form := requestForm(t, newTestClient(t, test.c, server), server)
			var got []string
			for name := range form {
				if name != "grant_type" {
					got = append(got, name)
				}
			}
			if strings.Contains(server.requests()[0], "\r\nAuthorization: ") {
				got = append(got, "Authorization")
			}
			slices.Sort(got)
			if got := strings.Join(got, " "); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

// What is missing is told in the order in which one would write it.
func TestMissingAuthentication(t *testing.T) {
	certificate := &ClientCertificate{Certificate: "crt", Key: "key"}
	presentsOther := &reverseproxy.HTTPTransport{TLS: &reverseproxy.TLSConfig{ClientCertificateFile: "crt", ClientCertificateKeyFile: "key"}}
	for _, test := range []struct {
		name string
		c    Credentials
		want string // setting that is missing
	}{
		{"nothing", Credentials{}, "client_id"},
		{"client_id", Credentials{ClientID: "id"}, "client_secret"},
		{"client_id and client_secret", Credentials{ClientID: "id", ClientSecret: "s"}, ""},
		{"client_secret", Credentials{ClientSecret: "s"}, "client_id"},
		{"client_secret_post", Credentials{AuthMethod: authPost, ClientID: "id"}, "client_secret"},
		{"client_secret_jwt", Credentials{AuthMethod: authSecretJWT, ClientID: "id"}, "client_secret"},
		{"client_secret_jwt with a key", Credentials{AuthMethod: authSecretJWT, ClientID: "id", PrivateKey: "k"}, "client_secret"},
		{"private_key_jwt", Credentials{AuthMethod: authKeyJWT, ClientID: "id"}, "private_key"},
		{"private_key_jwt with a key", Credentials{AuthMethod: authKeyJWT, ClientID: "id", PrivateKey: "k"}, ""},
		{"private_key_jwt with a certificate", Credentials{AuthMethod: authKeyJWT, ClientID: "id", ClientCertificate: certificate}, ""},
		{"private_key", Credentials{PrivateKey: "k"}, "client_id"},
		{"assertion_file", Credentials{AssertionFile: "f"}, ""},
		{"assertion_file to grant", Credentials{AssertionFile: "f", GrantType: grantJWTBearer}, ""},
		{"assertion_file to grant, to a client", Credentials{AssertionFile: "f", GrantType: grantJWTBearer, AuthMethod: authNone}, "client_id"},
		{"assertion_file to grant, to a client that signs", Credentials{AssertionFile: "f", GrantType: grantJWTBearer, AuthMethod: authKeyJWT, ClientID: "id"}, "private_key"},
		{"assertion_file to grant, to a client that signs and has no name", Credentials{AssertionFile: "f", GrantType: grantJWTBearer, AuthMethod: authKeyJWT, PrivateKey: "k"}, "client_id"},
		{"assertion_file to grant, to a client that signs with a secret", Credentials{AssertionFile: "f", GrantType: grantJWTBearer, AuthMethod: authSecretJWT, ClientSecret: "s"}, "client_id"},
		{"assertion_file to grant, to a client with a secret", Credentials{AssertionFile: "f", GrantType: grantJWTBearer, ClientSecret: "s"}, "client_id"},
		{"assertion_file to grant, to a client with a certificate", Credentials{AssertionFile: "f", GrantType: grantJWTBearer, AuthMethod: authTLS, ClientCertificate: certificate}, "client_id"},
		{"assertion_file to grant, beside a certificate", Credentials{AssertionFile: "f", GrantType: grantJWTBearer, ClientCertificate: certificate}, ""},
		{"assertion_file beside a certificate", Credentials{AssertionFile: "f", ClientCertificate: certificate}, ""},
		{"jwt_bearer", Credentials{GrantType: grantJWTBearer, ClientID: "id"}, "private_key"},
		{"jwt_bearer with a secret", Credentials{GrantType: grantJWTBearer, ClientID: "id", ClientSecret: "s"}, "private_key"},
		{"jwt_bearer with a key", Credentials{GrantType: grantJWTBearer, ClientID: "id", PrivateKey: "k"}, ""},
		{"jwt_bearer with a certificate", Credentials{GrantType: grantJWTBearer, ClientID: "id", ClientCertificate: certificate}, ""},
		{"jwt_bearer without an issuer of its own", Credentials{GrantType: grantJWTBearer, PrivateKey: "k"}, "client_id"},
		{"jwt_bearer with client_secret_post", Credentials{GrantType: grantJWTBearer, ClientID: "id", PrivateKey: "k", AuthMethod: authPost}, "client_secret"},
		{"tls_client_auth", Credentials{AuthMethod: authTLS, ClientID: "id"}, "client_certificate"},
		{"tls_client_auth with a key", Credentials{AuthMethod: authTLS, ClientID: "id", PrivateKey: "k"}, "client_certificate"},
		{"tls_client_auth with a certificate", Credentials{AuthMethod: authTLS, ClientID: "id", ClientCertificate: certificate}, ""},
		{"tls_client_auth with that of token_transport", Credentials{AuthMethod: authTLS, ClientID: "id", TokenTransport: presentsOther}, ""},
		{"client_certificate", Credentials{ClientCertificate: certificate}, "client_id"},
		{"none", Credentials{AuthMethod: authNone}, "client_id"},
		{"none with an id", Credentials{AuthMethod: authNone, ClientID: "id"}, ""},
	} {
		got, _, _ := strings.Cut(test.c.missingAuth(), " is missing")
		if got != test.want {
			t.Errorf("%s: got that %q is missing, want %q", test.name, got, test.want)
		}
	}
}

func TestSettingsWithoutEffectAreErrors(t *testing.T) {
	certificate := &ClientCertificate{Certificate: "crt", Key: "key"}
	for _, test := range []struct {
		name string
		c    Credentials
		want string // setting that has no effect
	}{
		{"client_secret", Credentials{AuthMethod: authKeyJWT, PrivateKey: "k", ClientSecret: "s"}, "client_secret"},
		{"client_secret with a certificate", Credentials{AuthMethod: authTLS, ClientCertificate: certificate, ClientSecret: "s"}, "client_secret"},
		{"client_secret with none", Credentials{AuthMethod: authNone, ClientSecret: "s"}, "client_secret"},
		{"client_secret beside the grant's key", Credentials{GrantType: grantJWTBearer, PrivateKey: "k", ClientSecret: "s"}, ""},
		{"basic_encoding", Credentials{AuthMethod: authPost, ClientSecret: "s", BasicEncoding: basicRaw}, "basic_encoding"},
		{"basic_encoding with the default method", Credentials{ClientSecret: "s", BasicEncoding: basicRaw}, ""},
		{"basic_encoding beside the grant's key", Credentials{GrantType: grantJWTBearer, PrivateKey: "k", BasicEncoding: basicRaw}, "basic_encoding"},
		{"private_key with a secret", Credentials{ClientSecret: "s", PrivateKey: "k"}, "private_key"},
		{"private_key with a signing secret", Credentials{AuthMethod: authSecretJWT, ClientSecret: "s", PrivateKey: "k"}, "private_key"},
		{"private_key with a certificate", Credentials{AuthMethod: authTLS, ClientCertificate: certificate, PrivateKey: "k"}, "private_key"},
		{"private_key with none", Credentials{AuthMethod: authNone, PrivateKey: "k"}, "private_key"},
		{"private_key of a public client's grant", Credentials{AuthMethod: authNone, PrivateKey: "k", GrantType: grantJWTBearer}, ""},
		{"private_key beside assertion_file", Credentials{PrivateKey: "k", AssertionFile: "f"}, "private_key"},
		{"private_key beside the grant's assertion_file", Credentials{PrivateKey: "k", AssertionFile: "f", GrantType: grantJWTBearer}, "private_key"},
		{"private_key of a client beside the grant's assertion_file", Credentials{AuthMethod: authKeyJWT, PrivateKey: "k", AssertionFile: "f", GrantType: grantJWTBearer}, ""},
		{"assertion_file", Credentials{ClientSecret: "s", AssertionFile: "f"}, "assertion_file"},
		{"assertion_file with none", Credentials{AuthMethod: authNone, AssertionFile: "f"}, "assertion_file"},
		{"assertion_file of the grant", Credentials{ClientSecret: "s", AssertionFile: "f", GrantType: grantJWTBearer}, ""},
		{"key_id", Credentials{AuthMethod: authSecretJWT, ClientSecret: "s", KeyID: "1"}, "key_id"},
		{"key_id beside assertion_file", Credentials{AssertionFile: "f", KeyID: "1"}, "key_id"},
		{"key_id of the certificate's key", Credentials{AuthMethod: authKeyJWT, ClientCertificate: certificate, KeyID: "1"}, ""},
		{"signing_alg", Credentials{ClientSecret: "s", SigningAlg: "HS256"}, "signing_alg"},
		{"signing_alg beside assertion_file", Credentials{AssertionFile: "f", SigningAlg: "ES256"}, "signing_alg"},
		{"assertion_audience", Credentials{ClientSecret: "s", AssertionAudience: "a"}, "assertion_audience"},
		{"assertion_typ", Credentials{AuthMethod: authNone, AssertionTyp: "JWT"}, "assertion_typ"},
		{"assertion_lifetime", Credentials{AssertionFile: "f", AssertionLifetime: 1}, "assertion_lifetime"},
		{"what describes a JWT signed with a secret", Credentials{AuthMethod: authSecretJWT, ClientSecret: "s", AssertionAudience: "a", AssertionTyp: "t", AssertionLifetime: 1}, ""},
		{"what describes a grant's JWT", Credentials{GrantType: grantJWTBearer, ClientSecret: "s", PrivateKey: "k", AssertionAudience: "a", AssertionTyp: "t", AssertionLifetime: 1}, ""},
		{"subject", Credentials{PrivateKey: "k", Subject: "a"}, "subject"},
		{"subject beside the grant's assertion_file", Credentials{AssertionFile: "f", GrantType: grantJWTBearer, Subject: "a"}, "subject"},
		{"claim", Credentials{PrivateKey: "k", Claims: map[string]string{"a": "b"}}, "claim"},
		{"claim beside the grant's assertion_file", Credentials{AssertionFile: "f", GrantType: grantJWTBearer, Claims: map[string]string{"a": "b"}}, "claim"},
		{"subject and claim", Credentials{GrantType: grantJWTBearer, PrivateKey: "k", Subject: "a", Claims: map[string]string{"a": "b"}}, ""},
	} {
		err := test.c.checkTogether()
		switch {
		case test.want == "":
			if err != nil {
				t.Errorf("%s: got %v, want no error", test.name, err)
			}
		case err == nil || !strings.HasPrefix(err.Error(), test.want+" has no effect with "):
			t.Errorf("%s: got %v, want that %s has no effect", test.name, err, test.want)
		}
	}
}

// An error that tells to remove one of two settings must name two that are
// there.
func TestContradictionNamesWhatIsThere(t *testing.T) {
	for setting, c := range map[string]Credentials{
		"private_key":        {PrivateKey: "k", AssertionFile: "f"},
		"key_id":             {AssertionFile: "f", KeyID: "1"},
		"signing_alg":        {AssertionFile: "f", SigningAlg: "ES256"},
		"assertion_audience": {AssertionFile: "f", AssertionAudience: "a"},
		"assertion_typ":      {AssertionFile: "f", AssertionTyp: "JWT"},
		"assertion_lifetime": {AssertionFile: "f", AssertionLifetime: 1},
		"subject":            {AssertionFile: "f", GrantType: grantJWTBearer, Subject: "a"},
		"claim":              {AssertionFile: "f", GrantType: grantJWTBearer, Claims: map[string]string{"a": "b"}},
	} {
		wantError(t, c.checkTogether(), setting+" has no effect with assertion_file: remove one of the two")
	}
	// Nobody finds an auth_method that was not written.
	for setting, c := range map[string]Credentials{
		"private_key":        {PrivateKey: "k"},
		"key_id":             {KeyID: "1"},
		"signing_alg":        {SigningAlg: "ES256"},
		"assertion_audience": {AssertionAudience: "a"},
		"assertion_typ":      {AssertionTyp: "JWT"},
		"assertion_lifetime": {AssertionLifetime: 1},
		"assertion_file":     {AssertionFile: "f"},
	} {
		c.ClientSecret = "s"
		wantError(t, c.checkTogether(), setting+" has no effect with client_secret (auth_method is client_secret_basic by default)")
		c.AuthMethod = authPost
		wantError(t, c.checkTogether(), setting+" has no effect with auth_method client_secret_post")
	}
}

func TestSigningAlgFitsTheMethod(t *testing.T) {
	for _, alg := range jwt.Algorithms {
		symmetric := strings.HasPrefix(alg, "HS")
		for _, test := range []struct {
			c    Credentials
			fits bool
		}{
			{Credentials{AuthMethod: authSecretJWT, ClientSecret: "s"}, symmetric},
			{Credentials{AuthMethod: authKeyJWT, PrivateKey: "k"}, !symmetric},
			{Credentials{PrivateKey: "k"}, !symmetric},
			{Credentials{GrantType: grantJWTBearer, PrivateKey: "k"}, !symmetric},
			{Credentials{GrantType: grantJWTBearer, PrivateKey: "k", ClientSecret: "s"}, !symmetric},
			{Credentials{GrantType: grantJWTBearer, PrivateKey: "k", ClientSecret: "s", AuthMethod: authSecretJWT}, !symmetric},
			{Credentials{GrantType: grantJWTBearer, AssertionFile: "f", ClientSecret: "s", AuthMethod: authSecretJWT}, symmetric},
			{Credentials{GrantType: grantJWTBearer, AssertionFile: "f", PrivateKey: "k", AuthMethod: authKeyJWT}, !symmetric},
		} {
			test.c.SigningAlg = alg
			want := ""
			if !test.fits {
				want = "signing_alg: " + alg + " does not fit"
			}
			wantError(t, test.c.checkTogether(), want)
		}
	}
}

func TestEveryFormOfTheSecretIsSensitive(t *testing.T) {
	const secret = "Abc+d/e f&ghijk"
	escaped := url.QueryEscape(secret)
	basic := base64.StdEncoding.EncodeToString([]byte("id:" + escaped))
	for _, method := range []string{authBasic, authPost} {
		secrets := authenticated(t, method, "id", secret, url.Values{}, http.Header{})
		echoes := []string{
			secret, escaped, url.PathEscape(secret), strings.ToLower(escaped), strings.ToUpper(secret),
			html.EscapeString(secret), fmt.Sprintf("%x", secret), base64.StdEncoding.EncodeToString([]byte(secret)),
			secret[:redact.Telltale], secret[len(secret)-redact.Telltale:],
		}
		if method == authBasic {
			echoes = append(echoes, basic)
		}
		for _, echo := range echoes {
			if !secrets.In("the secret '" + echo + "' is wrong") {
				t.Errorf("%s: %q may be shown, want not: it repeats the secret", method, echo)
			}
		}
		for _, harmless := range []string{"", "Bad credentials", "client id is unknown", secret[:redact.Telltale-1]} {
			if secrets.In(harmless) {
				t.Errorf("%s: %q may not be shown, want that it may", method, harmless)
			}
		}
	}
}

// locateAndRequest makes one token request, as a fetch does.
func (e *endpoint) locateAndRequest(ctx context.Context, granted redact.Secrets) (grant, error) {
	u, err := e.locate(ctx, granted)
	if err != nil {
		return grant{}, err
	}
	key, err := e.newKey()
	if err != nil {
		return grant{}, err
	}
	return e.request(ctx, u, key, granted)
}
