package outboundauth

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
)

// generalCredentials sets what has an effect with every way to authenticate.
var generalCredentials = Credentials{
	TokenURL:            "https://auth.example.com/token",
	ClientID:            "gateway",
	Scopes:              []string{"orders.read", "orders.write"},
	Audience:            []string{"https://orders.example.com"},
	Resource:            []string{"https://orders.example.com"},
	Params:              map[string]string{"organization": "acme"},
	TokenRequestHeaders: map[string]string{"X-Api-Version": "2"},
	TokenTimeout:        caddy.Duration(5 * time.Second),
	TokenTransport:      &reverseproxy.HTTPTransport{LocalAddress: "127.0.0.1"},
	Tenant:              &Tenant{Value: "acme"},
	Headers:             map[string]string{"X-Region": "eu"},
	BearerHeader:        &BearerHeader{Field: "X-Access-Token"},
	RefreshBefore:       caddy.Duration(time.Minute),
	DefaultLifetime:     caddy.Duration(time.Hour),
	RetryOn:             []int{401, 403},
	ReplayBody:          &ReplayBody{Size: 4096},
}

// baseCredentials authenticates with a secret.
var baseCredentials = func() Credentials {
	c := generalCredentials
	c.AuthMethod, c.ClientSecret = authBasic, "{env.CLIENT_SECRET}"
	return c
}()

// A settingChange sets one setting of base, which is valid, to another value,
// and stays valid.
type settingChange struct {
	base   Credentials
	change Credentials // this setting only
}

// settingChanges has a change for each setting: none has an effect with
// everything else.
func settingChanges(t *testing.T) map[string]settingChange {
	t.Helper()
	dir := t.TempDir()
	certificates := make([]*ClientCertificate, 2)
	for i := range certificates {
		certificates[i] = &ClientCertificate{
			Certificate: filepath.Join(dir, fmt.Sprint(i, ".crt")), Key: filepath.Join(dir, fmt.Sprint(i, ".key")),
		}
		key := keytest.New(t)
		writeFile(t, certificates[i].Certificate, keytest.CertificatePEM(t, key))
		writeFile(t, certificates[i].Key, keytest.PKCS8(t, key))
	}
	keyFile, otherKeyFile := certificates[0].Key, certificates[1].Key

	change := func(base Credentials, modify, change func(*Credentials)) settingChange {
		if modify != nil {
			modify(&base)
		}
		s := settingChange{base: base}
		change(&s.change)
		return s
	}
	secret := func(modify, set func(*Credentials)) settingChange { return change(baseCredentials, modify, set) }
	// Nothing may depend on the key: another one has another algorithm and id.
	key := func(modify, set func(*Credentials)) settingChange {
		base := generalCredentials
		base.AuthMethod, base.PrivateKey = authKeyJWT, keyFile
		base.AssertionAudience, base.AssertionTyp, base.AssertionLifetime = "https://auth.example.com", typJWT, caddy.Duration(30*time.Second)
		return change(base, modify, set)
	}
	certificate := func(modify, set func(*Credentials)) settingChange {
		base := generalCredentials
		base.AuthMethod, base.ClientCertificate = authTLS, certificates[0]
		return change(base, modify, set)
	}
	grant := func(modify, set func(*Credentials)) settingChange {
		base := generalCredentials
		base.GrantType, base.PrivateKey, base.Subject = grantJWTBearer, keyFile, "orders"
		base.Claims = map[string]string{"region": "eu"}
		return change(base, modify, set)
	}

	return map[string]settingChange{
		"name": secret(func(c *Credentials) { c.Name = "orders" }, func(c *Credentials) { c.Name = "billing" }),

		"token_url":     secret(nil, func(c *Credentials) { c.TokenURL = "https://login.example.com/token" }),
		"client_id":     secret(nil, func(c *Credentials) { c.ClientID = "billing" }),
		"client_secret": secret(nil, func(c *Credentials) { c.ClientSecret = "{env.BILLING_SECRET}" }),
		"auth_method":   secret(nil, func(c *Credentials) { c.AuthMethod = authPost }),
		"issuer": secret(func(c *Credentials) { c.TokenURL, c.Issuer = "", "https://auth.example.com" },
			func(c *Credentials) { c.Issuer = "https://login.example.com" }),
		"basic_encoding": secret(func(c *Credentials) { c.BasicEncoding = basicForm },
			func(c *Credentials) { c.BasicEncoding = basicRaw }),

		"private_key": key(nil, func(c *Credentials) { c.PrivateKey = otherKeyFile }),
		"key_id":      key(func(c *Credentials) { c.KeyID = "2024" }, func(c *Credentials) { c.KeyID = "2025" }),
		"signing_alg": secret(func(c *Credentials) { c.AuthMethod, c.SigningAlg = authSecretJWT, "HS256" },
			func(c *Credentials) { c.SigningAlg = "HS512" }),
		"assertion_audience": key(nil, func(c *Credentials) { c.AssertionAudience = "https://login.example.com" }),
		"assertion_typ":      key(nil, func(c *Credentials) { c.AssertionTyp = typClientAuth }),
		"assertion_lifetime": key(nil, func(c *Credentials) { c.AssertionLifetime = caddy.Duration(2 * time.Minute) }),
		"assertion_file": change(generalCredentials,
			func(c *Credentials) { c.AuthMethod, c.AssertionFile = authKeyJWT, "/run/jwt" },
			func(c *Credentials) { c.AssertionFile = "/run/other-jwt" }),

		"client_certificate": certificate(nil, func(c *Credentials) { c.ClientCertificate = certificates[1] }),
		"bind_certificate":   certificate(nil, func(c *Credentials) { c.BindCertificate = true }),

		"dpop": secret(func(c *Credentials) { c.DPoP = "ES256" }, func(c *Credentials) { c.DPoP = "EdDSA" }),

		"share_tokens": secret(nil, func(c *Credentials) { c.ShareTokens = &ShareTokens{Key: "{env.SHARED_KEY}"} }),

		"grant_type": key(func(c *Credentials) { c.GrantType = grantClientCredentials },
			func(c *Credentials) { c.GrantType = grantJWTBearer }),
		"subject": grant(nil, func(c *Credentials) { c.Subject = "billing" }),
		"claim":   grant(nil, func(c *Credentials) { c.Claims = map[string]string{"region": "us"} }),

		"scopes":               secret(nil, func(c *Credentials) { c.Scopes = []string{"billing.read"} }),
		"audience":             secret(nil, func(c *Credentials) { c.Audience = []string{"https://billing.example.com"} }),
		"resource":             secret(nil, func(c *Credentials) { c.Resource = []string{"https://billing.example.com"} }),
		"param":                secret(nil, func(c *Credentials) { c.Params = map[string]string{"organization": "globex"} }),
		"token_request_header": secret(nil, func(c *Credentials) { c.TokenRequestHeaders = map[string]string{"X-Api-Version": "3"} }),
		"token_request":        secret(func(c *Credentials) { c.AuthMethod = authPost }, func(c *Credentials) { c.TokenRequest = asJSON }),
		"token_response":       secret(nil, func(c *Credentials) { c.TokenResponse = &TokenResponse{AccessToken: "/data/token"} }),
		"token_timeout":        secret(nil, func(c *Credentials) { c.TokenTimeout = caddy.Duration(7 * time.Second) }),
		"token_transport": secret(nil, func(c *Credentials) {
			c.TokenTransport = &reverseproxy.HTTPTransport{LocalAddress: "127.0.0.2"}
		}),
		"tenant":           secret(nil, func(c *Credentials) { c.Tenant = &Tenant{Field: "X-Organization", Value: "globex"} }),
		"header":           secret(nil, func(c *Credentials) { c.Headers = map[string]string{"X-Region": "us"} }),
		"bearer_header":    secret(nil, func(c *Credentials) { c.BearerHeader = &BearerHeader{Field: "X-Token"} }),
		"refresh_before":   secret(nil, func(c *Credentials) { c.RefreshBefore = caddy.Duration(2 * time.Minute) }),
		"default_lifetime": secret(nil, func(c *Credentials) { c.DefaultLifetime = caddy.Duration(2 * time.Hour) }),
		"max_lifetime":     secret(nil, func(c *Credentials) { c.MaxLifetime = caddy.Duration(3 * time.Hour) }),
		"retry_on":         secret(nil, func(c *Credentials) { c.RetryOn = []int{403} }),
		"replay_body":      secret(nil, func(c *Credentials) { c.ReplayBody = &ReplayBody{Size: 4096, Announce: true} }),
	}
}

// eachSetting calls f for each field of Credentials, by its name in JSON, with
// base, and with base after the change.
func eachSetting(t *testing.T, f func(t *testing.T, field int, base, change, changed Credentials)) {
	t.Helper()
	changes := settingChanges(t)
	for _, field := range settingFields() {
		i, name := field.Index[0], caddyfileName(field)
		t.Run(name, func(t *testing.T) {
			s := changes[name]
			value := reflect.ValueOf(s.change).Field(i)
			if value.IsZero() || reflect.DeepEqual(value.Interface(), reflect.ValueOf(s.base).Field(i).Interface()) {
				t.Fatal("got no value to test with, want another than that of the base in settingChanges")
			}
			changed := s.base
			reflect.ValueOf(&changed).Elem().Field(i).Set(value)
			wantUsable(t, "base", s.base)
			wantUsable(t, "changed", changed)
			f(t, i, s.base, s.change, changed)
		})
	}
}

func TestEverySettingIsInherited(t *testing.T) {
	eachSetting(t, func(t *testing.T, _ int, base, _, changed Credentials) {
		for _, want := range []Credentials{base, changed} {
			wantSettings(t, Credentials{}.inherit(&want), want)
		}
	})
}

// authSettings are the settings of client authentication; TestReadmeListsClientAuthentication
// compares them with README.
var authSettings = []string{
	"token_url", "issuer", "client_secret", "auth_method", "basic_encoding", "private_key", "key_id", "signing_alg",
	"assertion_audience", "assertion_typ", "assertion_lifetime", "assertion_file", "client_certificate", "bind_certificate",
}

// withoutAuth returns c without its settings of client authentication.
func withoutAuth(c Credentials) Credentials {
	for _, field := range settingFields() {
		if slices.Contains(authSettings, caddyfileName(field)) {
			reflect.ValueOf(&c).Elem().FieldByIndex(field.Index).SetZero()
		}
	}
	return c
}

// A block that sets anything of client authentication inherits nothing of it, and
// everything else.
func TestEverySettingOverridesWhatIsInherited(t *testing.T) {
	eachSetting(t, func(t *testing.T, field int, base, change, changed Credentials) {
		before := base
		want := changed
		if _, setting, _ := strings.Cut(t.Name(), "/"); slices.Contains(authSettings, setting) {
			want = withoutAuth(changed)
			reflect.ValueOf(&want).Elem().Field(field).Set(reflect.ValueOf(change).Field(field))
			want.Name = "" // it is another client
			if got := change.authSettings(); !slices.Equal(got, []string{setting}) {
				t.Errorf("got %q as settings of client authentication, want %s", got, setting)
			}
		}
		wantSettings(t, change.inherit(&base), want)
		if !reflect.DeepEqual(base, before) {
			t.Errorf("got %+v, want that what is inherited from stays as it was", base)
		}
	})
}

// A client block has another client of the same server: it inherits that unless it names one.
func TestClientBlockInheritsTheServer(t *testing.T) {
	eachSetting(t, func(t *testing.T, _ int, base, change, _ Credentials) {
		want := change.inherit(&base)
		if change.TokenURL == "" && change.Issuer == "" {
			want.TokenURL, want.Issuer = base.TokenURL, base.Issuer
		}
		change.ofServer = true
		wantSettings(t, change.inherit(&base), want)
	})
}

// wantSettings compares credentials setting by setting.
func wantSettings(t *testing.T, got, want Credentials) {
	t.Helper()
	for _, field := range settingFields() {
		got, want := reflect.ValueOf(got).FieldByIndex(field.Index).Interface(), reflect.ValueOf(want).FieldByIndex(field.Index).Interface()
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %v, want %v", field.Name, got, want)
		}
	}
}

func TestInheritance(t *testing.T) {
	for _, test := range []struct{ name, base, own, want string }{
		{"nothing to inherit from", `null`, `{"client_id":"a"}`, `{"client_id":"a"}`},
		{"lists are replaced", `{"scopes":["a","b"],"audience":["a","b"],"retry_on":[401,403]}`, `{"scopes":["c"],"audience":["c"],"retry_on":[-1]}`, `{"scopes":["c"],"audience":["c"],"retry_on":[-1]}`},
		{"objects are replaced", `{"tenant":{"field":"X-Organization","value":"a"},"bearer_header":{"field":"X-Token","scheme":""}}`, `{"tenant":{"value":"b"},"bearer_header":{"field":"X-Auth"}}`, `{"tenant":{"value":"b"},"bearer_header":{"field":"X-Auth"}}`},
		{"token_transport is replaced", `{"token_transport":{"dial_timeout":1,"tls":{}}}`, `{"token_transport":{"read_timeout":2}}`, `{"token_transport":{"read_timeout":2}}`},
		{"named values are merged", `{"params":{"a":"1","b":"1"},"token_request_headers":{"A":"1","B":"1"},"headers":{"A":"1","B":"1"}}`, `{"params":{"b":"2","c":"2"},"token_request_headers":{"B":"2","C":"2"},"headers":{"B":"2","C":"2"}}`, `{"params":{"a":"1","b":"2","c":"2"},"token_request_headers":{"A":"1","B":"2","C":"2"},"headers":{"A":"1","B":"2","C":"2"}}`},
		{"client_id says nothing of authentication", `{"token_url":"https://a.example/token","client_secret":"s","auth_method":"client_secret_post"}`, `{"client_id":"a"}`, `{"token_url":"https://a.example/token","client_id":"a","client_secret":"s","auth_method":"client_secret_post"}`},
		{"grant_type, subject and claims neither", `{"issuer":"https://a.example","private_key":"k","key_id":"1"}`, `{"grant_type":"jwt_bearer","subject":"a","claims":{"b":"1"}}`, `{"issuer":"https://a.example","private_key":"k","key_id":"1","grant_type":"jwt_bearer","subject":"a","claims":{"b":"1"}}`},
		{"another server gets no secret", `{"token_url":"https://a.example/token","client_id":"a","client_secret":"s"}`, `{"token_url":"https://b.example/token"}`, `{"token_url":"https://b.example/token","client_id":"a"}`},
		{"another issuer gets no key", `{"token_url":"https://a.example/token","private_key":"k"}`, `{"issuer":"https://b.example"}`, `{"issuer":"https://b.example"}`},
		{"another secret goes to no server unsaid", `{"token_url":"https://a.example/token","client_secret":"s"}`, `{"client_secret":"t"}`, `{"client_secret":"t"}`},
		{"a bound certificate is inherited as such", `{"client_certificate":{"certificate":"c","key":"k"},"bind_certificate":true}`, `{"client_id":"a"}`, `{"client_id":"a","client_certificate":{"certificate":"c","key":"k"},"bind_certificate":true}`},
		{"another certificate is bound only if the block says so", `{"client_certificate":{"certificate":"c","key":"k"},"bind_certificate":true}`, `{"client_certificate":{"certificate":"d","key":"l"}}`, `{"client_certificate":{"certificate":"d","key":"l"}}`},
		{"a bound certificate needs no dpop", `{"dpop":"ES256"}`, `{"client_certificate":{"certificate":"c","key":"k"},"bind_certificate":true}`, `{"client_certificate":{"certificate":"c","key":"k"},"bind_certificate":true}`},
		{"nor does dpop need a bound certificate", `{"client_certificate":{"certificate":"c","key":"k"},"bind_certificate":true}`, `{"dpop":"EdDSA"}`, `{"client_certificate":{"certificate":"c","key":"k"},"dpop":"EdDSA"}`},
		{"sharing is inherited in parts", `{"share_tokens":{"key":"k","storage":{"module":"a"}}}`, `{"share_tokens":{"key":"l"}}`, `{"share_tokens":{"key":"l","storage":{"module":"a"}}}`},
		{"sharing is inherited with another storage", `{"share_tokens":{"key":"k","storage":{"module":"a"}}}`, `{"share_tokens":{"storage":{"module":"b"}}}`, `{"share_tokens":{"key":"k","storage":{"module":"b"}}}`},
		{"sharing is turned off", `{"share_tokens":{"key":"k"}}`, `{"share_tokens":{"off":true}}`, `{"share_tokens":{"off":true}}`},
		{"sharing is turned on", `{"share_tokens":{"off":true}}`, `{"share_tokens":{}}`, `{"share_tokens":{}}`},
		{"another client has another name", `{"name":"a","client_id":"a","client_secret":"s"}`, `{"client_id":"b"}`, `{"client_id":"b","client_secret":"s"}`},
		{"a client of another server, too", `{"name":"a","client_id":"a"}`, `{"token_url":"https://b.example/token"}`, `{"token_url":"https://b.example/token","client_id":"a"}`},
		{"the same client has the same name", `{"name":"a","client_id":"a"}`, `{"scopes":["b"]}`, `{"name":"a","client_id":"a","scopes":["b"]}`},

		// What has no effect is not inherited: nobody could remove it.
		{"claims are merged", `{"grant_type":"jwt_bearer","private_key":"k","claims":{"a":"1","b":"1"}}`, `{"claims":{"b":"2","c":"2"}}`, `{"private_key":"k","grant_type":"jwt_bearer","claims":{"a":"1","b":"2","c":"2"}}`},
		{"another grant has no use for subject and claims", `{"grant_type":"jwt_bearer","private_key":"k","subject":"a","claims":{"b":"c"}}`, `{"grant_type":"client_credentials"}`, `{"private_key":"k","grant_type":"client_credentials"}`},
		{"nor has an assertion_file for the grant", `{"grant_type":"jwt_bearer","private_key":"k","subject":"a","claims":{"b":"c"}}`, `{"assertion_file":"f"}`, `{"assertion_file":"f","grant_type":"jwt_bearer"}`},
		{"replay_body is inherited", `{"replay_body":{"size":1,"announce":true}}`, `{"retry_on":[403]}`, `{"retry_on":[403],"replay_body":{"size":1,"announce":true}}`},
		{"replay_body is replaced", `{"replay_body":{"size":1,"announce":true}}`, `{"replay_body":{"size":2}}`, `{"replay_body":{"size":2}}`},
		{"who never retries has no use for replay_body", `{"replay_body":{"size":1}}`, `{"retry_on":[-1]}`, `{"retry_on":[-1]}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			var base *Credentials
			var own, want Credentials
			for _, decode := range []struct {
				source string
				target any
			}{{test.base, &base}, {test.own, &own}, {test.want, &want}} {
				if err := json.Unmarshal([]byte(decode.source), decode.target); err != nil {
					t.Fatal(err)
				}
			}
			got := own.inherit(base)
			if got, want := string(encode(t, got)), string(encode(t, want)); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
			if got, want := sortKeys(t, encode(t, base)), sortKeys(t, []byte(test.base)); !slices.Equal(got, want) {
				t.Errorf("got base %s, want %s as before", got, want)
			}
		})
	}
}

// Nothing is wrong with settings that are only there to be inherited, until they
// are. A Caddyfile must not be refused where the same in JSON is not.
func TestIncompleteBaseIsOnlyInheritedFrom(t *testing.T) {
	dir := t.TempDir()
	key := keytest.New(t)
	keyFile := writeFile(t, filepath.Join(dir, "key"), keytest.PKCS8(t, key))
	certificate := writeFile(t, filepath.Join(dir, "crt"), keytest.CertificatePEM(t, key))
	for _, test := range []struct {
		name       string
		base       Credentials
		own        Credentials
		caddyfile  string // of both
		want       string // error
		wantMerged func(c Credentials) bool
	}{
		{"a server for all", Credentials{TokenURL: testTokenURL}, Credentials{ClientID: "a"}, "token_url $URL\n$UP {\nclient_id a\n}", "client_secret is missing: set it, for example to {env.CLIENT_SECRET}, or set auth_method none", nil},
		{"a secret for all", Credentials{TokenURL: testTokenURL, ClientSecret: "s"}, Credentials{ClientID: "a"}, "token_url $URL\nclient_secret s\n$UP {\nclient_id a\n}", "", func(c Credentials) bool { return c.ClientSecret == "s" && c.TokenURL == testTokenURL }},
		{"scopes for all", Credentials{Scopes: []string{"x"}}, Credentials{TokenURL: testTokenURL, ClientID: "a", ClientSecret: "s"}, "scopes x\n$UP {\ntoken_url $URL\nclient_id a\nclient_secret s\n}", "", func(c Credentials) bool { return slices.Equal(c.Scopes, []string{"x"}) }},
		{"a signing_alg for nobody", Credentials{SigningAlg: "ES256"}, Credentials{TokenURL: testTokenURL, ClientID: "a", ClientSecret: "s"}, "signing_alg ES256\n$UP {\ntoken_url $URL\nclient_id a\nclient_secret s\n}", "signing_alg has no effect: each upstream block sets client authentication, so no block inherits any; move it into the blocks", nil},
		{"a binding that nobody inherits", Credentials{ClientID: "a", BindCertificate: true}, Credentials{TokenURL: testTokenURL, ClientCertificate: &ClientCertificate{Certificate: certificate, Key: keyFile}}, "client_id a\nbind_certificate\n$UP {\ntoken_url $URL\nclient_certificate $CRT $KEY\n}", "bind_certificate has no effect: each upstream block", nil},
		{"a method that nobody inherits", Credentials{AuthMethod: authNone}, Credentials{TokenURL: testTokenURL, ClientID: "a", AuthMethod: authPost, ClientSecret: "s"}, "auth_method none\n$UP {\ntoken_url $URL\nclient_id a\nauth_method client_secret_post\nclient_secret s\n}", "auth_method has no effect: each upstream block", nil},
		{"a grant without client authentication beside a method", Credentials{TokenURL: testTokenURL, ClientID: "b", ClientSecret: "s", AuthMethod: authPost}, Credentials{TokenURL: testTokenURL, ClientID: "a", GrantType: grantJWTBearer, PrivateKey: keyFile}, "token_url $URL\nclient_id b\nclient_secret s\nauth_method client_secret_post\n$UP {\ntoken_url $URL\nclient_id a\ngrant_type jwt_bearer\nprivate_key $KEY\n}", "", func(c Credentials) bool { return c.authMethod() == authByGrant }},
		{"a signing_alg that does not fit the key", Credentials{TokenURL: testTokenURL, PrivateKey: keyFile, SigningAlg: "RS256"}, Credentials{ClientID: "a"}, "token_url $URL\nprivate_key $KEY\nsigning_alg RS256\n$UP {\nclient_id a\n}", "which the signing_alg RS256 does not fit", nil},
		{"a signing_alg that is none", Credentials{SigningAlg: "ES257"}, Credentials{TokenURL: testTokenURL, ClientID: "a", PrivateKey: keyFile}, "signing_alg ES257\n$UP {\ntoken_url $URL\nclient_id a\nprivate_key $KEY\n}", "signing_alg: unknown algorithm; use one of", nil},
		{"a bound certificate for all", Credentials{TokenURL: testTokenURL, ClientCertificate: &ClientCertificate{Certificate: certificate, Key: keyFile}, BindCertificate: true}, Credentials{ClientID: "a"}, "token_url $URL\nclient_certificate $CRT $KEY\nbind_certificate\n$UP {\nclient_id a\n}", "", func(c Credentials) bool { return c.BindCertificate }},
		{"bind_certificate without a certificate", Credentials{TokenURL: testTokenURL, ClientSecret: "s", BindCertificate: true}, Credentials{ClientID: "a"}, "token_url $URL\nclient_secret s\nbind_certificate\n$UP {\nclient_id a\n}", "bind_certificate: there is no client_certificate to bind tokens to", nil},
		{"a key_id beside a secret", Credentials{TokenURL: testTokenURL, KeyID: "1", ClientSecret: "s"}, Credentials{ClientID: "a"}, "token_url $URL\nkey_id 1\nclient_secret s\n$UP {\nclient_id a\n}", "key_id has no effect with client_secret", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			fromJSON, _, errJSON := loadTransport(t, "127.0.0.1:9000", map[string]any{
				"credentials": test.base,
				"upstreams":   []any{Upstream{Addresses: []string{"127.0.0.1:9000"}, Credentials: &test.own}},
				"tls":         map[string]any{}, // as bind_certificate wants it
			})
			wantError(t, errJSON, test.want)

			source := proxyConfig("127.0.0.1:9000", "tls\n"+
				strings.NewReplacer("$UP", "upstream 127.0.0.1:9000", "$URL", testTokenURL, "$KEY", keyFile, "$CRT", certificate).Replace(test.caddyfile))
			adapted, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(source), nil)
			if err != nil {
				wantError(t, err, cmp.Or(test.want, "none"))
				return
			}
			fromCaddyfile, _, err := loadTransport(t, "127.0.0.1:9000", findModules(t, adapted, "handler", "reverse_proxy")[0]["transport"])
			wantError(t, err, test.want)
			if t.Failed() || test.want != "" {
				return
			}
			for _, transport := range []*Transport{fromJSON, fromCaddyfile} {
				if got := transport.routes[dialAddress{"tcp", "127.0.0.1:9000"}].endpoint.credentials; !test.wantMerged(got) {
					t.Errorf("got %+v, want what is inherited", got)
				}
			}
		})
	}
}

const impliedMethod = ", implied"

// waysToAuthenticate are credentials with all that each way may have: as the
// method is said, and as the rest implies it.
func waysToAuthenticate() map[string]Credentials {
	signed := func(c Credentials) Credentials {
		c.AssertionAudience, c.AssertionTyp, c.AssertionLifetime = "https://auth.example.com", typJWT, caddy.Duration(minAssertionLifetime)
		return c
	}
	certificate := &ClientCertificate{Certificate: "client.crt", Key: "client.key"}
	ways := map[string]Credentials{
		"basic":             {AuthMethod: authBasic, ClientSecret: "s", BasicEncoding: basicRaw},
		"post":              {AuthMethod: authPost, ClientSecret: "s"},
		"client_secret_jwt": signed(Credentials{AuthMethod: authSecretJWT, ClientSecret: "s", SigningAlg: "HS512"}),
		"private_key_jwt":   signed(Credentials{AuthMethod: authKeyJWT, PrivateKey: "k", KeyID: "1", SigningAlg: "ES256"}),
		"assertion_file":    {AuthMethod: authKeyJWT, AssertionFile: "f"},
		"tls_client_auth":   {AuthMethod: authTLS, ClientCertificate: certificate, BindCertificate: true},
		"none":              {AuthMethod: authNone},
		"jwt_bearer": signed(Credentials{
			AuthMethod: authNone, GrantType: grantJWTBearer, PrivateKey: "k", KeyID: "1", SigningAlg: "ES256",
			Subject: "a", Claims: map[string]string{"b": "c"},
		}),
		"jwt_bearer of a file": {AuthMethod: authNone, GrantType: grantJWTBearer, AssertionFile: "f"},
	}
	all := make(map[string]Credentials)
	for name, c := range ways {
		c.GrantType = cmp.Or(c.GrantType, grantClientCredentials)
		all[name] = c
		if method := c.AuthMethod; (method != authPost && method != authSecretJWT && method != authNone) || c.grantsByJWT() {
			c.AuthMethod = ""
			all[name+impliedMethod] = c
		}
	}
	return all
}

// Whoever says in a block how its client authenticates need not know how the
// others do, but for the method and the encoding, which must not change unsaid.
func TestAnyWayToAuthenticateMayReplaceAnyOther(t *testing.T) {
	ways := waysToAuthenticate()
	for from, base := range ways {
		base.TokenURL, base.ClientID = "https://auth.example.com/token", "gateway"
		wantUsable(t, from, base)
		for to, own := range ways {
			own.TokenURL = "https://login.example.com/token"
			got := own.inherit(&base)
			wantUsable(t, "from "+from+" to "+to, got)
			want := ""
			if base.AuthMethod != "" && own.AuthMethod == "" && own.authMethod() != authByGrant {
				want = "auth_method is missing: around this block it is " + base.AuthMethod + "; repeat that, or set another (this block sets token_url, so it inherits no client authentication"
			}
			if missing := own.missingBeside(&base); !strings.HasPrefix(missing, want) || (missing != "") != (want != "") {
				t.Errorf("from %s to %s: got %q, want %q", from, to, missing, want)
			}
			if own.authMethod() != got.authMethod() {
				t.Errorf("from %s to %s: got auth_method %q, want %q", from, to, got.authMethod(), own.authMethod())
			}
		}
	}
}

// wantUsable fails the test if a client could not have these credentials.
func wantUsable(t *testing.T, name string, c Credentials) {
	t.Helper()
	if missing := c.missing(); missing != "" {
		t.Errorf("%s: got that %s", name, missing)
	}
	if err := errors.Join(c.check(), c.checkTogether()); err != nil {
		t.Errorf("%s: got %v", name, err)
	}
}

// Two spellings of one header would be sent in an order that nobody chose.
func TestInheritedHeadersAreOverriddenInAnyCase(t *testing.T) {
	load := func(t *testing.T, setting, base, own string) *block {
		t.Helper()
		setting += "s" // in JSON
		credentials := map[string]any{"token_url": "https://auth.example.com/token", "client_id": "gateway", "client_secret": "secret"}
		credentials[setting] = map[string]string{base: "base"}
		transport, _, err := loadTransport(t, "127.0.0.1:9000", map[string]any{
			"credentials": credentials,
			"upstreams":   []any{map[string]any{"addresses": []string{"127.0.0.1:9000"}, setting: map[string]string{own: "own"}}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return transport.routes[dialAddress{"tcp", "127.0.0.1:9000"}].block
	}
	for _, names := range [][2]string{{"X-Region", "X-Region"}, {"X-Region", "x-region"}, {"x-region", "X-Region"}} {
		t.Run("header "+names[0]+" "+names[1], func(t *testing.T) {
			got := load(t, "header", names[0], names[1]).identity
			if len(got) != 1 || got[0].template != "own" {
				t.Errorf("got %v, want that of the upstream alone", got)
			}
		})
		t.Run("token_request_header "+names[0]+" "+names[1], func(t *testing.T) {
			got := load(t, "token_request_header", names[0], names[1]).endpoint.credentials.TokenRequestHeaders
			if values := slices.Collect(maps.Values(got)); !slices.Equal(values, []string{"own"}) {
				t.Errorf("got %v, want that of the upstream alone", got)
			}
		})
	}
}

// loadCredentials loads transports with credentials a and b, and returns their
// clients.
func loadCredentials(t *testing.T, a, b Credentials) (first, second *client) {
	t.Helper()
	var clients []*client
	for _, c := range []Credentials{a, b} {
		// With TLS, as bind_certificate wants it.
		transport, _, err := loadTransport(t, "127.0.0.1:9000", map[string]any{"credentials": c, "tls": map[string]any{}})
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, transport.fallback.client)
	}
	return clients[0], clients[1]
}

func TestWhatShapesTheTokenRequestTellsSourcesApart(t *testing.T) {
	onlyForTheUpstream := []string{
		"name", "tenant", "header", "bearer_header", "retry_on", "replay_body",
		"token_timeout", "refresh_before", "default_lifetime", "max_lifetime", // only when and how long
	}
	eachSetting(t, func(t *testing.T, _ int, base, _, changed Credentials) {
		a, b := loadCredentials(t, base, changed)
		_, setting, _ := strings.Cut(t.Name(), "/")
		if got, want := a.source == b.source, slices.Contains(onlyForTheUpstream, setting); got != want {
			t.Errorf("got a shared source: %v, want %v", got, want)
		}
	})
}

func TestDifferentSpellingsOfOneClientShareASource(t *testing.T) {
	t.Setenv("TEST_CLIENT_ID", baseCredentials.ClientID)
	t.Setenv("TEST_SCOPES", strings.Join(baseCredentials.Scopes, " "))
	keyFile := writeFile(t, filepath.Join(t.TempDir(), "key"), keytest.PKCS8(t, keytest.New(t)))
	withKey := func(c *Credentials) { c.AuthMethod, c.ClientSecret, c.PrivateKey = "", "", keyFile }
	for _, test := range []struct {
		name          string
		base, changed func(*Credentials)
	}{
		{"equal", nil, nil},
		{"the default auth_method", nil, func(c *Credentials) { c.AuthMethod = "" }},
		{"an empty token_transport", func(c *Credentials) { c.TokenTransport = nil }, func(c *Credentials) { c.TokenTransport = new(reverseproxy.HTTPTransport) }},
		{"the default token_timeout", func(c *Credentials) { c.TokenTimeout = 0 }, func(c *Credentials) { c.TokenTimeout = caddy.Duration(10 * time.Second) }},
		{"the default default_lifetime", func(c *Credentials) { c.DefaultLifetime = 0 }, func(c *Credentials) { c.DefaultLifetime = caddy.Duration(5 * time.Minute) }},
		{"the default grant_type", nil, func(c *Credentials) { c.GrantType = grantClientCredentials }},
		{"the default basic_encoding", nil, func(c *Credentials) { c.BasicEncoding = basicForm }},
		{"private_key_jwt, which a private_key implies", withKey, func(c *Credentials) { withKey(c); c.AuthMethod = authKeyJWT }},
		{"the default assertion_lifetime", withKey, func(c *Credentials) { withKey(c); c.AssertionLifetime = caddy.Duration(time.Minute) }},
		{"client_id from the environment", nil, func(c *Credentials) { c.ClientID = "{env.TEST_CLIENT_ID}" }},
		{"another order of scopes", nil, func(c *Credentials) { c.Scopes = append(slices.Clone(c.Scopes[1:]), c.Scopes[0]) }},
		{"another dial_timeout", nil, func(c *Credentials) {
			changed := *c.TokenTransport
			changed.DialTimeout = caddy.Duration(time.Second)
			c.TokenTransport = &changed
		}},
		{"scopes from the environment", nil, func(c *Credentials) { c.Scopes = []string{"{env.TEST_SCOPES}"} }},
	} {
		t.Run(test.name, func(t *testing.T) {
			base, changed := baseCredentials, baseCredentials
			if test.base != nil {
				test.base(&base)
			}
			if test.changed != nil {
				test.changed(&changed)
			}
			a, b := loadCredentials(t, base, changed)
			if a.source != b.source {
				t.Error("got two sources, want one")
			}
		})
	}
}

// Values that stand next to each other must not run into one another.
func TestNeighbouringValuesTellSourcesApart(t *testing.T) {
	a, b := baseCredentials, baseCredentials
	a.Audience, b.Audience = []string{"a", "b"}, []string{"a b"}
	if a, b := loadCredentials(t, a, b); a.source == b.source {
		t.Error("got one source, want one for each")
	}
}

func references(cl *client) int {
	n, _ := sources.References(cl.key)
	return n
}

func TestCleanupReleasesWhatWasAcquired(t *testing.T) {
	settings := "token_url https://auth.example.com/token\nclient_id " + t.Name() + "\nclient_secret secret\n"
	first, cleanUpFirst, err := loadSettings(t, "127.0.0.1:9000", settings)
	if err != nil {
		t.Fatal(err)
	}
	cl := first.fallback.client
	if got := references(cl); got != 1 {
		t.Fatalf("got %d references, want 1", got)
	}
	// The upstream's tenant is another, its token the same.
	_, cleanUpSecond, err := loadSettings(t, "127.0.0.1:9000", settings+"upstream 127.0.0.1:9000 {\n tenant acme\n}")
	if err != nil {
		t.Fatal(err)
	}
	if got := references(cl); got != 3 {
		t.Errorf("got %d references, want 3", got)
	}
	cleanUpSecond()
	if got := references(cl); got != 1 {
		t.Errorf("got %d references after one of two has ended, want 1", got)
	}
	cleanUpFirst()
	endAfterlives()
	if _, ok := sources.References(cl.key); ok {
		t.Error("got a source after all have ended, want none")
	}
	if err := first.Cleanup(); err != nil {
		t.Errorf("got %v from a second Cleanup, want nil", err)
	}
}

func TestFailedProvisionReleasesWhatWasAcquired(t *testing.T) {
	settings := "token_url https://auth.example.com/token\nclient_id " + t.Name() + "\nclient_secret secret\n"
	held, _, err := loadSettings(t, "127.0.0.1:9000", settings)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, settings, want string }{
		{"before anything was acquired", settings + "versions 4", "unsupported HTTP version"},
		{"in the http transport of the tokens", settings + "token_transport {\n versions 4\n}", "token_transport"},
		{"in an upstream block", settings + "upstream 127.0.0.1:9000 {\n client_id {env.TEST_UNSET}\n}", "is not set"},
		{"in a certificate that can't be bound", settings + "upstream 127.0.0.1:9000 {\n name never-ran\n token_url https://auth.example.com/token\n client_certificate a b\n bind_certificate\n}", "bind_certificate: a certificate is presented in TLS only"},
		{"in an address", settings + "upstream 127.0.0.1:9000 127.0.0.1:9000 {\n tenant acme\n}", "named twice"},
		{"when all was acquired", settings + "upstream 127.0.0.1:9009 {\n tenant acme\n}", "no such upstream"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, cleanUp, err := loadSettings(t, "127.0.0.1:9000", test.settings)
			wantError(t, err, test.want)
			cleanUp()
			if got := references(held.fallback.client); got != 1 {
				t.Errorf("got %d references, want 1 of the transport that is in use", got)
			}
			if _, ok := countersByName.Load("never-ran"); ok {
				t.Error("got metrics of a client that has never run")
			}
		})
	}
}

func TestCaddyfileAndJSONHaveTheSameDefaults(t *testing.T) {
	fromCaddyfile, _, err := loadSettings(t, "127.0.0.1:9000", clientSettings)
	if err != nil {
		t.Fatal(err)
	}
	explicit := map[string]any{
		"token_url": "https://auth.example.com/token", "client_id": "gateway", "client_secret": "secret",
		"auth_method": "client_secret_basic", "basic_encoding": "form", "grant_type": "client_credentials", "token_timeout": "10s", "default_lifetime": "5m",
		"bearer_header": map[string]string{"field": "Authorization", "scheme": "Bearer"},
		"retry_on":      []int{401, 16}, "replay_body": map[string]any{"size": 65536}, "token_transport": map[string]any{},
	}
	implicit := maps.Clone(explicit)
	maps.DeleteFunc(implicit, func(name string, _ any) bool { return !strings.Contains(clientSettings, name) })
	for name, credentials := range map[string]map[string]any{"explicit": explicit, "implicit": implicit} {
		transport, _, err := loadTransport(t, "127.0.0.1:9000", map[string]any{"credentials": credentials})
		if err != nil {
			t.Fatal(err)
		}
		got, want := transport.fallback, fromCaddyfile.fallback
		if got.source != want.source {
			t.Errorf("%s: got another source, want that of the Caddyfile", name)
		}
		if got.bearerField != want.bearerField || got.bearerPrefix != want.bearerPrefix {
			t.Errorf("%s: got header %q %q, want %q %q", name, got.bearerField, got.bearerPrefix, want.bearerField, want.bearerPrefix)
		}
		if !slices.Equal(got.retryOn, want.retryOn) || got.replayLimit != want.replayLimit {
			t.Errorf("%s: got %v, %d, want %v, %d", name, got.retryOn, got.replayLimit, want.retryOn, want.replayLimit)
		}
	}
	got := fromCaddyfile.fallback.source.life
	if want := (lifecycle{defaultLifetime: 5 * time.Minute, fetchTimeout: 10 * time.Second}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
