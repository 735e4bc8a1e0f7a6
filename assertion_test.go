package outboundauth

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/caddyserver/caddy/v2"

	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// requestForm makes a token request, and returns the form that was sent.
func requestForm(t *testing.T, cl *client, server *wire) url.Values {
	t.Helper()
	if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
		t.Fatalf("request() = %v, want no error", err)
	}
	sent := server.requests()
	_, body, _ := strings.Cut(sent[len(sent)-1], "\r\n\r\n")
	form, err := url.ParseQuery(body)
	if err != nil {
		t.Fatal(err)
	}
	return form
}

// formOf makes the token request of c, and returns its form.
func formOf(t *testing.T, c Credentials) url.Values {
	t.Helper()
	server := answering(http.StatusOK, goodAnswer)
	return requestForm(t, newTestClient(t, c, server), server)
}

// verified checks the signature of a JWT, and returns its header and claims. key
// is the public key or the secret.
func verified(t *testing.T, token string, key any, alg string) (header, claims map[string]any) {
	t.Helper()
	signed, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(alg)})
	if err != nil {
		t.Fatalf("got %q, want a JWT signed with %s: %v", token, alg, err)
	}
	payload, err := signed.Verify(key)
	if err != nil {
		t.Fatalf("got a signature that %s does not verify: %v", alg, err)
	}
	protected, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, decode := range []struct {
		encoded []byte
		into    *map[string]any
	}{{protected, &header}, {payload, &claims}} {
		if err := json.Unmarshal(decode.encoded, decode.into); err != nil {
			t.Fatal(err)
		}
	}
	return header, claims
}

// wantMembers compares a JSON object with what it should hold, and with nothing
// else.
func wantMembers(t *testing.T, what string, got, want map[string]any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// takeTimes removes jti and the times from claims. They have to be those of a
// JWT that was made just now: a server may refuse one that claims to live
// longer than agreed, from iat to exp.
func takeTimes(t *testing.T, claims map[string]any, lifetime time.Duration) (jti string) {
	t.Helper()
	since, ok := claims["iat"].(float64)
	if off := time.Since(time.Unix(int64(since), 0)); !ok || off < assertionLeeway || off > assertionLeeway+patience {
		t.Errorf("iat: got %v, which is %v ago, want %v or a little more", claims["iat"], off, assertionLeeway)
	}
	for name, want := range map[string]float64{"nbf": since, "exp": since + lifetime.Seconds()} {
		if claims[name] != want {
			t.Errorf("%s: got %v, want %v, as iat is %v", name, claims[name], want, since)
		}
	}
	for _, name := range []string{"iat", "nbf", "exp"} {
		delete(claims, name)
	}
	jti, _ = claims["jti"].(string)
	if len(jti) < 20 {
		t.Errorf("jti: got %q, want one that nobody guesses", claims["jti"])
	}
	delete(claims, "jti")
	return jti
}

func TestPrivateKeyJWT(t *testing.T) {
	dir := t.TempDir()
	for kind, algs := range keytest.Algorithms {
		file := writeFile(t, filepath.Join(dir, kind), keytest.PKCS8(t, keytest.Keys[kind]()))
		for _, alg := range append([]string{""}, algs...) {
			t.Run(kind+" "+alg, func(t *testing.T) {
				form := formOf(t, Credentials{TokenURL: testTokenURL, ClientID: "id", PrivateKey: file, SigningAlg: alg})
				assertion := form.Get("client_assertion")
				form.Del("client_assertion")
				if got, want := form.Encode(), "client_assertion_type=urn%3Aietf%3Aparams%3Aoauth%3Aclient-assertion-type%3Ajwt-bearer"+
					"&client_id=id&grant_type=client_credentials"; got != want {
					t.Errorf("got the form %s, want %s", got, want)
				}
				if alg == "" {
					alg = algs[0]
				}
				header, claims := verified(t, assertion, keytest.Keys[kind]().Public(), alg)
				wantMembers(t, "header", header, map[string]any{"alg": alg, "typ": "JWT"})
				takeTimes(t, claims, time.Minute)
				// aud is a string: a list would permit others (draft-ietf-oauth-rfc7523bis).
				wantMembers(t, "claims", claims, map[string]any{"iss": "id", "sub": "id", "aud": testTokenURL})
			})
		}
	}
}

func TestClientSecretJWT(t *testing.T) {
	secret := strings.Repeat("s3cret+/", 8)
	for _, alg := range []string{"", "HS256", "HS384", "HS512"} {
		t.Run(alg, func(t *testing.T) {
			form := formOf(t, Credentials{
				TokenURL: testTokenURL, ClientID: "id", ClientSecret: secret, AuthMethod: authSecretJWT, SigningAlg: alg,
			})
			if form.Has("client_secret") || form.Get("client_id") != "id" || form.Get("client_assertion_type") != clientAssertionType {
				t.Errorf("got the form %v, want the assertion and its type, the id, and no secret", form)
			}
			if alg == "" {
				alg = "HS256"
			}
			header, claims := verified(t, form.Get("client_assertion"), []byte(secret), alg)
			wantMembers(t, "header", header, map[string]any{"alg": alg, "typ": "JWT"})
			takeTimes(t, claims, time.Minute)
			wantMembers(t, "claims", claims, map[string]any{"iss": "id", "sub": "id", "aud": testTokenURL})
		})
	}
}

// RFC 7518 §3.2 asks for as many bytes as the hash has.
func TestClientSecretTooShortToSign(t *testing.T) {
	for alg, need := range map[string]int{"HS256": 32, "HS384": 48, "HS512": 64} {
		c := canaryCredentials(testTokenURL)
		c.AuthMethod, c.SigningAlg = authSecretJWT, alg
		c.ClientSecret = (canarySecret + strings.Repeat("x", need))[:need-1]
		server := answering(http.StatusOK, goodAnswer)
		cl := newTestClient(t, c, server)
		_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
		got := wantTokenError(t, err, codeConfiguration, true)
		wantError(t, err, fmt.Sprintf("client_secret: has %d bytes, too few for %s", need-1, alg))
		// What is long enough for HS256 need not be longer, if the server agrees.
		weaker := map[string]string{"HS384": "signing_alg HS256, or ", "HS512": "signing_alg HS256, or "}[alg]
		want := fmt.Sprintf("have the authorization server issue one of %d bytes at least or, if it allows that, set %sauth_method client_secret_basic or client_secret_post", need, weaker)
		if got.Hint != want {
			t.Errorf("%s: got the hint %q, want %q", alg, got.Hint, want)
		}
		wantNoCanary(t, err)
		if got := len(server.requests()); got != 0 {
			t.Errorf("%s: got %d requests, want none", alg, got)
		}

		c.ClientSecret += "x"
		if _, err := newTestClient(t, c, server).endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Errorf("%s: got %v for %d bytes, want no error", alg, err, need)
		}
	}
}

// withMetadata is a server of which tokens are asked through its metadata.
// Tokens are at another address than the issuer.
func withMetadata(t *testing.T) (issuer string, forms func() []url.Values) {
	t.Helper()
	received := make(chan url.Values, 10)
	mux := http.NewServeMux()
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	mux.HandleFunc("GET /.well-known/oauth-authorization-server", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"issuer":%q,"token_endpoint":%q}`, server.URL, server.URL+"/oauth2/token")
	})
	mux.HandleFunc("POST /oauth2/token", func(w http.ResponseWriter, r *http.Request) {
		_ = r.ParseForm()
		received <- r.PostForm
		_, _ = io.WriteString(w, goodAnswer)
	})
	return server.URL, func() (all []url.Values) {
		for range len(received) {
			all = append(all, <-received)
		}
		return all
	}
}

func TestAssertionIsWhatTheConfigAsksFor(t *testing.T) {
	issuer, forms := withMetadata(t)
	key := keytest.Keys["P-256"]()
	file := writeFile(t, filepath.Join(t.TempDir(), "key"), keytest.PKCS8(t, key))
	t.Setenv("TEST_AUDIENCE", "https://audience.example")
	t.Setenv("TEST_KID", "2024")

	for _, test := range []struct {
		name     string
		c        Credentials
		header   map[string]any // beside alg
		audience string
		lifetime time.Duration
	}{
		{
			name: "token_url", c: Credentials{TokenURL: issuer + "/oauth2/token"},
			header: map[string]any{"typ": "JWT"}, audience: issuer + "/oauth2/token", lifetime: time.Minute,
		},
		{
			name: "issuer", c: Credentials{Issuer: issuer},
			header: map[string]any{"typ": "client-authentication+jwt"}, audience: issuer, lifetime: time.Minute,
		},
		{
			name: "overridden with token_url",
			c: Credentials{
				TokenURL: issuer + "/oauth2/token", AssertionAudience: issuer, AssertionTyp: "client-authentication+jwt",
				AssertionLifetime: caddy.Duration(5 * time.Minute), KeyID: "1",
			},
			header: map[string]any{"typ": "client-authentication+jwt", "kid": "1"}, audience: issuer, lifetime: 5 * time.Minute,
		},
		{
			name: "overridden with issuer",
			c: Credentials{
				Issuer: issuer, AssertionAudience: "{env.TEST_AUDIENCE}", AssertionTyp: "JWT",
				AssertionLifetime: caddy.Duration(minAssertionLifetime), KeyID: "{env.TEST_KID}",
			},
			header: map[string]any{"typ": "JWT", "kid": "2024"}, audience: "https://audience.example", lifetime: minAssertionLifetime,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.c.ClientID, test.c.PrivateKey = "id", file
			transport, _, err := loadTransport(t, "127.0.0.1:9000", map[string]any{"credentials": test.c})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := transport.fallback.endpoint.locateAndRequest(t.Context(), nil); err != nil {
				t.Fatalf("request() = %v, want no error", err)
			}
			sent := forms()
			if len(sent) != 1 {
				t.Fatalf("got %d token requests, want 1", len(sent))
			}
			header, claims := verified(t, sent[0].Get("client_assertion"), key.Public(), "ES256")
			test.header["alg"] = "ES256"
			wantMembers(t, "header", header, test.header)
			takeTimes(t, claims, test.lifetime)
			wantMembers(t, "claims", claims, map[string]any{"iss": "id", "sub": "id", "aud": test.audience})
		})
	}
}

func TestAssertionNamesItsKey(t *testing.T) {
	dir := t.TempDir()
	key := keytest.New(t)
	leaf := keytest.Certificate(t, key)
	sum := sha256.Sum256(leaf)
	thumbprint := base64.RawURLEncoding.EncodeToString(sum[:])
	keyFile := writeFile(t, filepath.Join(dir, "key"), keytest.PKCS8(t, key))
	leafFile := writeFile(t, filepath.Join(dir, "crt"), keytest.PEM("CERTIFICATE", leaf))
	bundle := writeFile(t, filepath.Join(dir, "bundle"), slices.Concat(keytest.PKCS8(t, key), keytest.PEM("CERTIFICATE", leaf)))
	jwk := writeFile(t, filepath.Join(dir, "jwk"), keytest.JWK(t, key, map[string]any{"kid": "of the JWK"}))
	other := keytest.New(t)
	account := writeFile(t, filepath.Join(dir, "account"), encode(t, map[string]string{
		"type": "service_account", "private_key_id": "of the account", "private_key": string(keytest.PKCS8(t, key)),
	}))
	otherCertificate := &ClientCertificate{
		Certificate: writeFile(t, filepath.Join(dir, "other.crt"), keytest.CertificatePEM(t, other)),
		Key:         writeFile(t, filepath.Join(dir, "other.key"), keytest.PKCS8(t, other)),
	}

	for _, test := range []struct {
		name   string
		c      Credentials
		header map[string]any
	}{
		{"key", Credentials{PrivateKey: keyFile}, map[string]any{}},
		{"key_id", Credentials{PrivateKey: keyFile, KeyID: "1"}, map[string]any{"kid": "1"}},
		{"JWK", Credentials{PrivateKey: jwk}, map[string]any{"kid": "of the JWK"}},
		{"JWK and key_id", Credentials{PrivateKey: jwk, KeyID: "1"}, map[string]any{"kid": "1"}},
		{"service account", Credentials{PrivateKey: account}, map[string]any{"kid": "of the account"}},
		{"service account and key_id", Credentials{PrivateKey: account, KeyID: "1"}, map[string]any{"kid": "1"}},
		{"certificate beside the key", Credentials{PrivateKey: bundle}, map[string]any{"x5t#S256": thumbprint}},
		{"certificate and key_id", Credentials{PrivateKey: bundle, KeyID: "1"}, map[string]any{"x5t#S256": thumbprint, "kid": "1"}},
		{
			"client_certificate for the key",
			Credentials{PrivateKey: keyFile, ClientCertificate: &ClientCertificate{Certificate: leafFile, Key: keyFile}},
			map[string]any{"x5t#S256": thumbprint},
		},
		{
			"key of the client_certificate",
			Credentials{AuthMethod: authKeyJWT, ClientCertificate: &ClientCertificate{Certificate: leafFile, Key: keyFile}},
			map[string]any{"x5t#S256": thumbprint},
		},
		{"client_certificate for another key", Credentials{PrivateKey: keyFile, ClientCertificate: otherCertificate}, map[string]any{}},
		{"certificate beside the key comes first", Credentials{PrivateKey: bundle, ClientCertificate: otherCertificate}, map[string]any{"x5t#S256": thumbprint}},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.c.TokenURL, test.c.ClientID = testTokenURL, "id"
			header, _ := verified(t, formOf(t, test.c).Get("client_assertion"), key.Public(), "ES256")
			test.header["alg"], test.header["typ"] = "ES256", "JWT"
			wantMembers(t, "header", header, test.header)
		})
	}
}

// A server may refuse an assertion that it has seen (RFC 7523 §3).
func TestAssertionIsUsedOnce(t *testing.T) {
	key := keytest.New(t)
	file := writeFile(t, filepath.Join(t.TempDir(), "key"), keytest.PKCS8(t, key))
	for name, c := range map[string]Credentials{
		"client_assertion": {},
		"assertion":        {GrantType: grantJWTBearer},
	} {
		c.TokenURL, c.ClientID, c.PrivateKey = testTokenURL, "id", file
		server := answering(http.StatusOK, goodAnswer)
		cl := newTestClient(t, c, server)
		seen := make(map[string]bool)
		for range 50 {
			_, claims := verified(t, requestForm(t, cl, server).Get(name), key.Public(), "ES256")
			seen[takeTimes(t, claims, time.Minute)] = true
		}
		if len(seen) != 50 {
			t.Errorf("%s: got %d different jti in 50 requests, want 50", name, len(seen))
		}
	}

	c := Credentials{
		TokenURL: testTokenURL, ClientID: "id", PrivateKey: file, GrantType: grantJWTBearer, AuthMethod: authKeyJWT,
	}
	form := formOf(t, c)
	_, client := verified(t, form.Get("client_assertion"), key.Public(), "ES256")
	_, grant := verified(t, form.Get("assertion"), key.Public(), "ES256")
	if client["jti"] == grant["jti"] {
		t.Errorf("got the jti %v for both assertions of a request, want two", grant["jti"])
	}
}

func TestJWTBearerGrant(t *testing.T) {
	dir := t.TempDir()
	key := keytest.New(t)
	keyFile := writeFile(t, filepath.Join(dir, "key"), keytest.PKCS8(t, key))
	assertionFile := writeFile(t, filepath.Join(dir, "jwt"), []byte("a.b.c\n"))
	t.Setenv("TEST_SUBJECT", "jane@example.com")
	t.Setenv("TEST_REGION", "eu")

	for _, test := range []struct {
		name   string
		c      Credentials
		form   string // without the assertions
		claims map[string]any
	}{
		{
			name: "assertion alone", c: Credentials{},
			form: "", claims: map[string]any{"sub": "id"},
		},
		{
			name: "with subject, claims and scope",
			c: Credentials{
				Subject: "{env.TEST_SUBJECT}", Claims: map[string]string{"region": "in {env.TEST_REGION}", "target_audience": "https://orders.example.com"},
				Scopes: []string{"orders.read", "orders.write"},
			},
			form:   "scope=orders.read+orders.write",
			claims: map[string]any{"sub": "jane@example.com", "region": "in eu", "target_audience": "https://orders.example.com"},
		},
		{
			name: "client_secret_post", c: Credentials{AuthMethod: authPost, ClientSecret: "s", Subject: "jane"},
			form: "client_id=id&client_secret=s", claims: map[string]any{"sub": "jane"},
		},
		{
			name: "client_secret_basic, which a secret implies", c: Credentials{ClientSecret: "s"},
			form: "", claims: map[string]any{"sub": "id"},
		},
		{
			name: "none", c: Credentials{AuthMethod: authNone},
			form: "client_id=id", claims: map[string]any{"sub": "id"},
		},
		{
			name: "private_key_jwt", c: Credentials{AuthMethod: authKeyJWT, Subject: "jane"},
			form:   "client_assertion_type=urn%3Aietf%3Aparams%3Aoauth%3Aclient-assertion-type%3Ajwt-bearer&client_id=id",
			claims: map[string]any{"sub": "jane"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.c.TokenURL, test.c.ClientID, test.c.GrantType, test.c.PrivateKey = testTokenURL, "id", grantJWTBearer, keyFile
			server := answering(http.StatusOK, goodAnswer)
			form := requestForm(t, newTestClient(t, test.c, server), server)

			header, claims := verified(t, form.Get("assertion"), key.Public(), "ES256")
			wantMembers(t, "header", header, map[string]any{"alg": "ES256", "typ": "JWT"})
			takeTimes(t, claims, time.Minute)
			test.claims["iss"], test.claims["aud"] = "id", testTokenURL
			wantMembers(t, "claims", claims, test.claims)

			if test.c.AuthMethod == authKeyJWT {
				// The subject is whom the token is for, not who asks for it.
				_, claims := verified(t, form.Get("client_assertion"), key.Public(), "ES256")
				takeTimes(t, claims, time.Minute)
				wantMembers(t, "claims of the client", claims, map[string]any{"iss": "id", "sub": "id", "aud": testTokenURL})
			}
			if got := form.Get("grant_type"); got != "urn:ietf:params:oauth:grant-type:jwt-bearer" {
				t.Errorf("got grant_type %q, want that of RFC 7523", got)
			}
			for _, name := range []string{"assertion", "client_assertion", "grant_type"} {
				form.Del(name)
			}
			if got := form.Encode(); got != test.form {
				t.Errorf("got the form %q beside the grant, want %q", got, test.form)
			}
			basic := strings.Contains(server.requests()[0], "\r\nAuthorization: Basic aWQ6cw==\r\n")
			if want := test.c.AuthMethod == "" && test.c.ClientSecret != ""; basic != want {
				t.Errorf("got that the client authenticates with Basic: %v, want %v", basic, want)
			}
		})
	}

	t.Run("assertion_file", func(t *testing.T) {
		c := Credentials{TokenURL: testTokenURL, GrantType: grantJWTBearer, AssertionFile: assertionFile}
		if got, want := formOf(t, c).Encode(), "assertion=a.b.c&grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer"; got != want {
			t.Errorf("got the form %q, want %q", got, want)
		}
	})
	t.Run("assertion_file of a client that signs", func(t *testing.T) {
		c := Credentials{
			TokenURL: testTokenURL, ClientID: "id", AuthMethod: authKeyJWT, PrivateKey: keyFile,
			GrantType: grantJWTBearer, AssertionFile: assertionFile,
		}
		form := formOf(t, c)
		verified(t, form.Get("client_assertion"), key.Public(), "ES256")
		if got := form.Get("assertion"); got != "a.b.c" {
			t.Errorf("got the assertion %q, want that of the file", got)
		}
	})
	t.Run("issuer", func(t *testing.T) {
		issuer, forms := withMetadata(t)
		transport, _, err := loadTransport(t, "127.0.0.1:9000", map[string]any{"credentials": Credentials{
			Issuer: issuer, ClientID: "id", GrantType: grantJWTBearer, PrivateKey: keyFile,
		}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := transport.fallback.endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Fatalf("request() = %v, want no error", err)
		}
		header, claims := verified(t, forms()[0].Get("assertion"), key.Public(), "ES256")
		// It does not authenticate a client.
		wantMembers(t, "header", header, map[string]any{"alg": "ES256", "typ": "JWT"})
		if claims["aud"] != issuer {
			t.Errorf("aud: got %v, want the issuer", claims["aud"])
		}
	})
}

func TestAssertionFileAuthenticatesTheClient(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "jwt"), []byte("\n a.b.c \r\n"))
	t.Setenv("TEST_DIR", dir)
	for id, want := range map[string]string{"": "", "id": "client_id=id&"} {
		c := Credentials{TokenURL: testTokenURL, ClientID: id, AssertionFile: "{env.TEST_DIR}/jwt"}
		want = "client_assertion=a.b.c&client_assertion_type=urn%3Aietf%3Aparams%3Aoauth%3Aclient-assertion-type%3Ajwt-bearer&" +
			want + "grant_type=client_credentials"
		if got := formOf(t, c).Encode(); got != want {
			t.Errorf("client_id %q: got the form %s, want %s", id, got, want)
		}
	}
}

// A file that was named by mistake holds something else, perhaps the key, which
// no server must get.
func TestUnusableAssertionFileMakesNoRequest(t *testing.T) {
	dir := t.TempDir()
	holding := func(name, content string) string {
		return writeFile(t, filepath.Join(dir, name), []byte(content))
	}
	const noJWT = "assertion_file: the file holds no JWT"
	const named = "assertion_file: the file that it names "
	jwt := string(jwtWith(`{}`))
	t.Setenv("TEST_SHORT_JWT", "a.b.c")
	for name, test := range map[string]struct{ file, want string }{
		"missing":     {filepath.Join(dir, "none"), named + "does not exist"},
		"unset":       {"{env.TEST_UNSET_FILE}", "assertion_file: {env.TEST_UNSET_FILE} is not set"},
		"too short":   {"{env.TEST_SHORT_JWT}", named + "does not exist"},
		"directory":   {dir, named + "is a directory"},
		"pipe":        {pipe(t, dir), named + "is no regular file"},
		"too large":   {fileOfSize(t, dir, maxSecretFile+1), named + "is larger than 1 MiB"},
		"empty":       {holding("empty", " \n"), noJWT},
		"key":         {holding("key", string(keytest.PKCS8(t, keytest.New(t)))), noJWT},
		"JWK":         {holding("jwk", string(keytest.JWK(t, keytest.New(t), nil))), noJWT},
		"secret":      {holding("secret", canarySecret), noJWT},
		"two parts":   {holding("two", "a.b"), noJWT},
		"four parts":  {holding("four", "a.b.c.d"), noJWT},
		"six parts":   {holding("six", "a.b.c.d.e.f"), noJWT},
		"no header":   {holding("headless", ".b.c"), noJWT},
		"two JWTs":    {holding("both", jwt+"\n"+jwt), noJWT},
		"padded":      {holding("padded", jwt+"=="), noJWT},
		"in JSON":     {holding("json", `{"access_token":"`+jwt+`"}`), noJWT},
		"with Bearer": {holding("bearer", "Bearer "+jwt), noJWT},
	} {
		for _, grant := range grantTypes {
			t.Run(name+" "+grant, func(t *testing.T) {
				server := answering(http.StatusOK, goodAnswer)
				cl := newTestClient(t, Credentials{TokenURL: testTokenURL, AssertionFile: test.file, GrantType: grant}, server)
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				_, err := cl.endpoint.locateAndRequest(ctx, nil) // a timeout is no error of the configuration
				wantTokenError(t, err, codeConfiguration, true)
				wantError(t, err, test.want)
				wantNoCanary(t, err)
				if got := len(server.requests()); got != 0 {
					t.Errorf("got %d requests, want none", got)
				}
			})
		}
	}
}

// Some deployments have the JWT itself in the environment.
func TestAssertionFromAPlaceholder(t *testing.T) {
	jwt := string(jwtWith(`{"sub":"system:serviceaccount:shop:gateway","aud":["https://auth.example.com"],"exp":4102444800}`))
	encrypted := strings.Join([]string{strings.Repeat("h", 60), "", strings.Repeat("i", 16), strings.Repeat("t", 80), "tag"}, ".")
	file := writeFile(t, filepath.Join(t.TempDir(), "jwt"), []byte(jwt+"\n"))
	for name, test := range map[string]struct{ template, value, want string }{
		"JWT":             {"{env.TEST_ASSERTION}", jwt, jwt},
		"JWT of a file":   {"{file." + file + "}", "", jwt},
		"encrypted":       {"{env.TEST_ASSERTION}", encrypted, encrypted},
		"name of a file":  {"{env.TEST_ASSERTION}", file, jwt},
		"part of a name":  {strings.TrimSuffix(file, "jwt") + "{env.TEST_ASSERTION}", "jwt", jwt},
		"JWT in the text": {jwt, "", jwt},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("TEST_ASSERTION", test.value)
			form := formOf(t, Credentials{TokenURL: testTokenURL, AssertionFile: test.template})
			if got := form.Get("client_assertion"); got != test.want {
				t.Errorf("got the assertion %q, want %q", got, test.want)
			}
		})
	}
}

// A request may need two JWTs. What is set for JWTs then goes to the one that
// it is meant for.
func TestClientAndGrantHaveAJWTEach(t *testing.T) {
	dir := t.TempDir()
	key := keytest.Keys["RSA"]()
	keyFile := writeFile(t, filepath.Join(dir, "key"), keytest.PKCS8(t, key))
	secret := strings.Repeat("s3cret+/", 8)
	fromFile := string(jwtWith(`{"sub":"jane"}`))
	assertionFile := writeFile(t, filepath.Join(dir, "jwt"), []byte(fromFile))
	type want struct {
		key      any
		alg, kid string
		typ, sub string
	}
	for _, test := range []struct {
		name          string
		c             Credentials
		client, grant want // without a key: of the file
	}{
		{
			name: "client_secret_jwt and a key",
			c: Credentials{
				AuthMethod: authSecretJWT, ClientSecret: secret, PrivateKey: keyFile, KeyID: "1", SigningAlg: "PS256",
				AssertionTyp: typClientAuth, Subject: "jane",
			},
			client: want{[]byte(secret), "HS256", "", typClientAuth, "id"},
			grant:  want{key.Public(), "PS256", "1", typJWT, "jane"},
		},
		{
			name: "private_key_jwt and the same key",
			c: Credentials{
				AuthMethod: authKeyJWT, PrivateKey: keyFile, KeyID: "1", SigningAlg: "PS256",
				AssertionTyp: typClientAuth, Subject: "jane",
			},
			client: want{key.Public(), "PS256", "1", typClientAuth, "id"},
			grant:  want{key.Public(), "PS256", "1", typJWT, "jane"},
		},
		{
			name: "private_key_jwt and a file",
			c: Credentials{
				AuthMethod: authKeyJWT, PrivateKey: keyFile, KeyID: "1", SigningAlg: "PS256",
				AssertionTyp: typClientAuth, AssertionFile: assertionFile,
			},
			client: want{key.Public(), "PS256", "1", typClientAuth, "id"},
		},
		{
			name: "client_secret_jwt and a file",
			c: Credentials{
				AuthMethod: authSecretJWT, ClientSecret: secret, SigningAlg: "HS512",
				AssertionTyp: typClientAuth, AssertionFile: assertionFile,
			},
			client: want{[]byte(secret), "HS512", "", typClientAuth, "id"},
		},
		{
			name: "client_secret_post and a key",
			c: Credentials{
				AuthMethod: authPost, ClientSecret: secret, PrivateKey: keyFile, AssertionTyp: "example+jwt", Subject: "jane",
			},
			grant: want{key.Public(), "RS256", "", "example+jwt", "jane"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.c.TokenURL, test.c.ClientID, test.c.GrantType = testTokenURL, "id", grantJWTBearer
			test.c.AssertionAudience, test.c.AssertionLifetime = "https://audience.example", caddy.Duration(5*time.Minute)
			form := formOf(t, test.c)
			for name, want := range map[string]want{"client_assertion": test.client, "assertion": test.grant} {
				if want.key == nil {
					if got := form.Get(name); got != "" && (name != "assertion" || got != fromFile) {
						t.Errorf("%s: got %q, want none, or that of the file", name, got)
					}
					continue
				}
				header, claims := verified(t, form.Get(name), want.key, want.alg)
				members := map[string]any{"alg": want.alg, "typ": want.typ}
				if want.kid != "" {
					members["kid"] = want.kid
				}
				wantMembers(t, name+": header", header, members)
				takeTimes(t, claims, 5*time.Minute)
				wantMembers(t, name+": claims", claims, map[string]any{"iss": "id", "sub": want.sub, "aud": "https://audience.example"})
			}
			if got := form.Get("assertion"); test.c.AssertionFile != "" && got != fromFile {
				t.Errorf("got the assertion %q, want that of the file", got)
			}
		})
	}
}

func TestUnusableKeyMakesNoRequest(t *testing.T) {
	dir := t.TempDir()
	file := writeFile(t, filepath.Join(dir, "key"), keytest.PKCS8(t, keytest.New(t)))
	server := answering(http.StatusOK, goodAnswer)
	cl := newTestClient(t, Credentials{TokenURL: testTokenURL, ClientID: "id", PrivateKey: file, SigningAlg: "ES256"}, server)
	for _, test := range []struct {
		content []byte
		want    string
	}{
		{[]byte(canarySecret), "private_key: holds no private key"},
		{keytest.PKCS8(t, keytest.Keys["RSA"]()), "private_key: is an RSA key, which the signing_alg ES256 does not fit"},
	} {
		writeFile(t, file, test.content)
		_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
		wantTokenError(t, err, codeConfiguration, true)
		wantError(t, err, test.want)
		wantNoCanary(t, err)
		keytest.WantQuotesNothing(t, err, string(test.content))
	}
	if got := len(server.requests()); got != 0 {
		t.Errorf("got %d requests, want none", got)
	}
}

// What is rotated is used for the next request, and its fingerprint tells the
// token source that a refusal may be over.
func TestRotatedKeyIsUsedForTheNextRequest(t *testing.T) {
	dir := t.TempDir()
	file, name := filepath.Join(dir, "key"), "client_assertion"
	for source, c := range map[string]Credentials{
		"file":        {PrivateKey: file},
		"placeholder": {PrivateKey: "{env.TEST_ROTATED_KEY}"},
		"jwt_bearer":  {PrivateKey: file, GrantType: grantJWTBearer},
		"certificate": {AuthMethod: authKeyJWT, ClientCertificate: &ClientCertificate{Certificate: filepath.Join(dir, "crt"), Key: file}},
	} {
		t.Run(source, func(t *testing.T) {
			name := name
			if c.GrantType == grantJWTBearer {
				name = "assertion"
			}
			c.TokenURL, c.ClientID = testTokenURL, "id"
			server := answering(http.StatusOK, goodAnswer)
			var cl *client
			var before string
			// Another kind of key needs another algorithm.
			for _, kind := range []string{"P-256", "Ed25519", "P-256"} {
				key := keytest.Keys[kind]()
				if kind == "P-256" {
					key = keytest.New(t)
				}
				writeFile(t, file, keytest.PKCS8(t, key))
				writeFile(t, filepath.Join(dir, "crt"), keytest.CertificatePEM(t, key))
				t.Setenv("TEST_ROTATED_KEY", string(keytest.PKCS8(t, key)))
				if cl == nil { // which reads the key as well
					cl = newTestClient(t, c, server)
				}

				fingerprint := cl.endpoint.fingerprint(t.Context())
				if fingerprint == before || fingerprint != cl.endpoint.fingerprint(t.Context()) {
					t.Error("got a fingerprint that does not tell keys apart, want one for each")
				}
				before = fingerprint
				verified(t, requestForm(t, cl, server).Get(name), key.Public(), keytest.Algorithms[kind][0])
			}
		})
	}
}

func TestRotatedAssertionFileIsUsedForTheNextRequest(t *testing.T) {
	file := filepath.Join(t.TempDir(), "jwt")
	for name, c := range map[string]Credentials{
		"client_assertion": {TokenURL: testTokenURL, AssertionFile: file},
		"assertion":        {TokenURL: testTokenURL, AssertionFile: file, GrantType: grantJWTBearer},
	} {
		t.Run(name, func(t *testing.T) {
			server := answering(http.StatusOK, goodAnswer)
			cl := newTestClient(t, c, server)
			var before string
			for _, assertion := range []string{"first.a.b", "second.a.b"} {
				writeFile(t, file, []byte(assertion))
				fingerprint := cl.endpoint.fingerprint(t.Context())
				if fingerprint == before || fingerprint != cl.endpoint.fingerprint(t.Context()) {
					t.Error("got a fingerprint that does not tell assertions apart, want one for each")
				}
				before = fingerprint
				if got := requestForm(t, cl, server).Get(name); got != assertion {
					t.Errorf("got %q, want %q", got, assertion)
				}
			}
		})
	}
}

// Subject and claims count as rotated as well.
func TestClaimsAreResolvedForEachRequest(t *testing.T) {
	key := keytest.New(t)
	file := writeFile(t, filepath.Join(t.TempDir(), "key"), keytest.PKCS8(t, key))
	t.Setenv("TEST_SUBJECT", "")
	t.Setenv("TEST_REGION", "")
	server := answering(http.StatusOK, goodAnswer)
	cl := newTestClient(t, Credentials{
		TokenURL: testTokenURL, ClientID: "id", GrantType: grantJWTBearer, PrivateKey: file,
		Subject: "{env.TEST_SUBJECT}", Claims: map[string]string{"region": "{env.TEST_REGION}"},
	}, server)
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	wantError(t, err, "subject: {env.TEST_SUBJECT} is empty")
	t.Setenv("TEST_SUBJECT", "jane")
	_, err = cl.endpoint.locateAndRequest(t.Context(), nil)
	wantError(t, err, "claim region: {env.TEST_REGION} is empty")

	fingerprints := make(map[string]bool)
	for _, values := range [][2]string{{"jane", "eu"}, {"jane", "us"}, {"joe", "us"}} {
		t.Setenv("TEST_SUBJECT", values[0])
		t.Setenv("TEST_REGION", values[1])
		fingerprints[cl.endpoint.fingerprint(t.Context())] = true
		_, claims := verified(t, requestForm(t, cl, server).Get("assertion"), key.Public(), "ES256")
		if claims["sub"] != values[0] || claims["region"] != values[1] {
			t.Errorf("got the claims %v, want sub %s and region %s", claims, values[0], values[1])
		}
	}
	if len(fingerprints) != 3 {
		t.Errorf("got %d fingerprints, want 3", len(fingerprints))
	}
}

// An assertion is a credential while it lives.
func TestEchoedAssertionIsNotShown(t *testing.T) {
	dir := t.TempDir()
	keyFile := writeFile(t, filepath.Join(dir, "key"), keytest.PKCS8(t, keytest.New(t)))
	jwt := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"ES256"}`)) + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"id"}`)) + ".c2lnbmF0dXJl"
	jwtFile := writeFile(t, filepath.Join(dir, "jwt"), []byte(jwt))
	for name, c := range map[string]Credentials{
		"private_key_jwt":     {ClientID: "id", PrivateKey: keyFile},
		"client_secret_jwt":   {ClientID: "id", AuthMethod: authSecretJWT, ClientSecret: strings.Repeat("s", 32)},
		"jwt_bearer":          {ClientID: "id", PrivateKey: keyFile, GrantType: grantJWTBearer},
		"assertion_file":      {AssertionFile: jwtFile},
		"assertion to grant":  {AssertionFile: jwtFile, GrantType: grantJWTBearer},
		"both, of one client": {ClientID: "id", PrivateKey: keyFile, GrantType: grantJWTBearer, AuthMethod: authKeyJWT},
	} {
		t.Run(name, func(t *testing.T) {
			c.TokenURL = testTokenURL
			var echoed []string
			server := &wire{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_ = r.ParseForm()
				w.WriteHeader(http.StatusBadRequest)
				echoed = append(r.PostForm["assertion"], r.PostForm["client_assertion"]...)
				fmt.Fprintf(w, `{"error":"invalid_client","error_description":"bad assertion %s"}`, strings.Join(echoed, " "))
			})}
			_, err := newTestClient(t, c, server).endpoint.locateAndRequest(t.Context(), nil)
			wantTokenError(t, err, "invalid_client", true)
			wantError(t, err, "the server's description repeats the client's credentials")
			if len(echoed) == 0 {
				t.Fatal("got no assertion at the server, want one")
			}
			for _, assertion := range echoed {
				for part := range strings.SplitSeq(assertion, ".") {
					if strings.Contains(err.Error(), part[:redact.Telltale]) {
						t.Errorf("got %v, which repeats the assertion", err)
					}
				}
			}
		})
	}
}

// Whom a token is for may be as confidential as the placeholder was meant to
// keep it. What stands in the config is none of that.
func TestEchoedClaimsAreNotShown(t *testing.T) {
	file := writeFile(t, filepath.Join(t.TempDir(), "key"), keytest.PKCS8(t, keytest.New(t)))
	t.Setenv("TEST_SUBJECT", "jane.doe@example.com")
	t.Setenv("TEST_ACCOUNT", "4711-0815-1234")
	for _, test := range []struct {
		name   string
		c      Credentials
		echo   string
		hidden bool
	}{
		{"subject", Credentials{Subject: "{env.TEST_SUBJECT}"}, "jane.doe@example.com", true},
		{"claim", Credentials{Claims: map[string]string{"account": "{env.TEST_ACCOUNT}"}}, "4711-0815-1234", true},
		{"part of a claim", Credentials{Claims: map[string]string{"account": "eu/{env.TEST_ACCOUNT}/1"}}, "4711-0815-1234", true},
		{"what stands beside the placeholder", Credentials{Subject: "service-accounts/{env.TEST_SUBJECT}"}, "service-accounts", false},
		{"subject in the config", Credentials{Subject: "orders@example.com"}, "orders@example.com", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.c.TokenURL, test.c.ClientID, test.c.PrivateKey, test.c.GrantType = testTokenURL, "id", file, grantJWTBearer
			server := answering(http.StatusBadRequest, `{"error":"invalid_grant","error_description":"unknown: `+test.echo+`"}`)
			_, err := newTestClient(t, test.c, server).endpoint.locateAndRequest(t.Context(), nil)
			if got := wantTokenError(t, err, "invalid_grant", true); strings.Contains(got.Description, test.echo) == test.hidden {
				t.Errorf("got %v, want that %q is hidden: %v", err, test.echo, test.hidden)
			}
		})
	}
}
