package e2e

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestKeycloak has one Keycloak for all its parts. It starts while other tests run.
//
//nolint:tparallel // the last part kills the server, which the others need
func TestKeycloak(t *testing.T) {
	kc := newKeycloak(t)
	secretsAndKeys, certificates, proving, refusals := kc.secretsAndKeys(t), kc.certificates(t), kc.proving(t), kc.refusals(t)
	kc.add(keycloakPost, keycloakRevoked)
	kc.clients = append(kc.clients,
		keycloakClient{client: keycloakGranted, granted: true},
		keycloakClient{client: keycloakOutage, lifespan: keycloakLife})
	kc.start(t)
	t.Parallel()
	kc.await(t)

	t.Run("running", func(t *testing.T) {
		for _, part := range []struct {
			name string
			test func(t *testing.T)
		}{
			{"secrets and keys", func(t *testing.T) { kc.testSecretsAndKeys(t, secretsAndKeys) }},
			{"certificates", func(t *testing.T) { kc.testCertificates(t, certificates) }},
			{"dpop", func(t *testing.T) { kc.testProving(t, proving) }},
			{"parameters", kc.testParameters},
			{"refusals", func(t *testing.T) { kc.testRefusals(t, refusals) }},
			{"revocation", kc.testRevocation},
		} {
			t.Run(part.name, func(t *testing.T) {
				t.Parallel()
				part.test(t)
			})
		}
	})
	// None of the others could bear it.
	t.Run("outage", kc.testOutage)
}

// Clients of one part each.
var (
	keycloakPost    = client{ID: "parameters", Secret: "plain-secret-of-the-client", Method: "client_secret_post"}
	keycloakGranted = client{ID: "granted", Secret: "plain-secret-of-the-client", Method: "client_secret_post"}
	keycloakRevoked = client{ID: "revoked", Secret: "plain-secret-of-the-client", Method: "client_secret_post"}
	keycloakOutage  = client{ID: "outage", Secret: "plain-secret-of-the-client", Method: "client_secret_basic"}
)

// keycloakCase is a way to authenticate to Keycloak.
type keycloakCase struct {
	name     string
	client   client
	settings []string // all but where the token comes from
}

// endpoints returns the settings that lead to the server, over http or https.
func (kc *keycloak) endpoints(issuer string) []string {
	return []string{"token_url " + tokenEndpoint(issuer), "issuer " + issuer}
}

// found returns the cases with each setting that leads to the server.
func (kc *keycloak) found(cases []keycloakCase, issuer string) (all []keycloakCase) {
	for _, tt := range cases {
		for _, endpoint := range kc.endpoints(issuer) {
			name := strings.Fields(endpoint)[0] + ", " + tt.name
			all = append(all, keycloakCase{name, tt.client, append(slices.Clip(tt.settings), endpoint)})
		}
	}
	return all
}

// secretSetting has the secret in a file, where it may have all characters.
func secretSetting(t *testing.T, secret string) string {
	t.Helper()
	return "client_secret {file." + writeFile(t, "secret", []byte(secret)) + "}"
}

// longSecret is long enough for each algorithm of client_secret_jwt.
var longSecret = strings.Repeat("7gQ2-", 16)

// secretsAndKeys returns each method but certificates, with what can be set beside it.
func (kc *keycloak) secretsAndKeys(t *testing.T) []keycloakCase {
	var cases []keycloakCase
	for _, c := range secretClients {
		kc.add(c)
		cases = append(cases, keycloakCase{c.ID, c, []string{secretSetting(t, c.Secret)}})
	}
	plain := secretClients[0]
	cases = append(cases, keycloakCase{"basic_encoding raw", plain, []string{secretSetting(t, plain.Secret), "basic_encoding raw"}})

	for _, algorithm := range []string{"HS256", "HS384", "HS512"} {
		c := client{ID: algorithm, Method: "client_secret_jwt", Algorithm: algorithm, Secret: longSecret}
		kc.add(c)
		cases = append(cases, keycloakCase{algorithm, c, []string{secretSetting(t, c.Secret), "signing_alg " + algorithm}})
	}
	for _, algorithm := range []string{"RS256", "PS256", "ES256", "ES384", "ES512", "EdDSA"} {
		key := newKey(t, algorithm)
		c := newKeyClient(algorithm, algorithm, key)
		if algorithm == "PS256" {
			// Without a key_id, Keycloak takes an RSA key for one of RS256.
			c.Keys.Keys[0].Algorithm = algorithm
		}
		kc.add(c)
		settings := []string{"private_key " + writeFile(t, "key.pem", pkcs8(t, key)), "signing_alg " + algorithm}
		with := func(more ...string) []string { return append(slices.Clip(settings), more...) }
		cases = append(cases,
			keycloakCase{algorithm + " with key_id", c, with("key_id " + algorithm)},
			keycloakCase{algorithm + " without key_id", c, settings})
		if algorithm != "ES256" {
			continue
		}
		for _, setting := range []string{
			"assertion_typ JWT", "assertion_typ client-authentication+jwt", "assertion_lifetime 1h",
			"assertion_audience " + kc.realm.issuer, "assertion_audience " + tokenEndpoint(kc.realm.issuer),
		} {
			cases = append(cases, keycloakCase{setting, c, with(setting)})
		}
	}
	return cases
}

// testSecretsAndKeys obtains tokens in each way, with both settings for the server.
func (kc *keycloak) testSecretsAndKeys(t *testing.T, cases []keycloakCase) {
	cases = kc.found(cases, kc.realm.issuer)
	var (
		routes    []route
		upstreams []*upstream
	)
	for _, tt := range cases {
		u := newUpstream(t, kc.realm, tt.client)
		upstreams = append(upstreams, u)
		routes = append(routes, route{client: tt.client, to: u.serve(t), settings: tt.settings})
	}
	gw := startRoutes(t, routes)
	for i, u := range upstreams {
		t.Run(cases[i].name, func(t *testing.T) {
			gw.get(t, routePath(i), http.StatusOK)
			gw.get(t, routePath(i), http.StatusOK)
			u.wantAccepted(t, 2, "HTTP/1.1")
		})
	}
}

// certificates returns the ways that need a certificate: to authenticate, or to bind
// the token.
func (kc *keycloak) certificates(t *testing.T) []keycloakCase {
	cert := kc.realm.ca.issue(t, "client.example").write(t).setting()
	key := newKey(t, "ES256")
	cases := []keycloakCase{
		{"tls_client_auth", client{Method: "tls_client_auth", SubjectDN: "CN=client.example"}, nil},
		{"secret", client{Method: "client_secret_basic", Secret: longSecret}, []string{secretSetting(t, longSecret)}},
		{"key", client{Method: "private_key_jwt", Keys: keySet(key, "")}, []string{"private_key " + writeFile(t, "key.pem", pkcs8(t, key))}},
	}
	for i := range cases {
		c := &cases[i]
		c.client.ID, c.client.Bound = "bound, with "+c.name, true
		c.settings = append(c.settings, cert, "bind_certificate")
		kc.add(c.client)
	}
	return cases
}

// testCertificates has the upstreams compare the certificate of the connection with the
// one that the token is bound to.
func (kc *keycloak) testCertificates(t *testing.T, cases []keycloakCase) {
	cases = kc.found(cases, kc.realm.https)
	var (
		routes    []route
		upstreams []*tlsUpstream
	)
	for _, tt := range cases {
		u := newTLSUpstream(t, kc.realm, tt.client, true)
		upstreams = append(upstreams, u)
		routes = append(routes, u.route(kc.realm, tt.settings))
	}
	gw := startRoutes(t, routes)
	for i, u := range upstreams {
		t.Run(cases[i].name, func(t *testing.T) {
			gw.get(t, routePath(i), http.StatusOK)
			gw.get(t, routePath(i), http.StatusOK)
			u.wantAccepted(t, 2, "HTTP/2.0")
			u.wantCertificates(t, 1)
		})
	}
}

// testParameters shows what comes of scopes, audience and resource.
func (kc *keycloak) testParameters(t *testing.T) {
	t.Run("no scope", func(t *testing.T) {
		u := newUpstream(t, kc.realm, keycloakGranted)
		r := route{client: keycloakGranted, to: u.serve(t), settings: []string{
			secretSetting(t, keycloakGranted.Secret), "issuer " + kc.realm.issuer,
		}}
		site := strings.Replace(r.String(), "scopes "+scopes+"\n", "", 1)
		gw := startGateway(t, gatewayConfig{site: site})
		gw.get(t, "/", http.StatusOK)
		u.wantAccepted(t, 1, "HTTP/1.1") // with the scopes that the client has by default
	})

	// The server ignores both. Who asks is told.
	t.Run("audience and resource", func(t *testing.T) {
		u := newUpstream(t, kc.realm, keycloakPost)
		r := route{client: keycloakPost, to: u.serve(t), resource: "https://other.example/", settings: []string{
			secretSetting(t, keycloakPost.Secret), "issuer " + kc.realm.issuer, "audience another",
		}}
		gw := startGateway(t, gatewayConfig{site: r.String()})
		gw.get(t, "/", http.StatusOK)
		u.wantAccepted(t, 1, "HTTP/1.1") // for the audience that a mapper adds

		told := gw.oauth2Token(t, r.String(), "--json")
		var reports []struct {
			Warnings []string
			Claims   struct {
				Audience []string `json:"aud"`
			}
		}
		if err := json.Unmarshal([]byte(told.stdout), &reports); err != nil || len(reports) != 1 {
			t.Fatalf("caddy oauth2-token --json = %d reports, %v, want 1\n%s%s", len(reports), err, told.stdout, told.stderr)
		}
		got := reports[0]
		slices.Sort(got.Claims.Audience)
		if want := []string{resource, resourceServer.ID}; !slices.Equal(got.Claims.Audience, want) {
			t.Errorf("aud = %q, want %q", got.Claims.Audience, want)
		}
		if warned := strings.Join(got.Warnings, "\n"); !names(warned, "audience") || !names(warned, "resource") {
			t.Errorf("warnings = %q, want them to name audience and resource", warned)
		}
	})
}

// testRevocation has an upstream ask Keycloak about each token. When Keycloak has revoked
// one, callers don't notice.
func (kc *keycloak) testRevocation(t *testing.T) {
	c := keycloakRevoked
	u := &introspector{introspect: kc.introspect, clientID: c.ID}
	tokens := new(firstSeen)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tokens.note(r)
		u.ServeHTTP(w, r)
	}))
	closeAtEnd(t, srv)
	r := route{client: c, to: srv.Listener.Addr().String(), settings: []string{
		secretSetting(t, c.Secret), "token_url " + tokenEndpoint(kc.realm.issuer),
	}}
	gw := startGateway(t, gatewayConfig{site: r.String()})
	gw.get(t, "/", http.StatusOK)

	l := &steadyLoad{url: gw.url, rate: 20}
	l.start()
	time.Sleep(time.Second)
	kc.revoke(t, c, tokens.all()[0].value)
	revoked := time.Now()
	await(t, "second token", func() bool { return len(tokens.all()) == 2 && l.succeededSince(revoked) })
	time.Sleep(time.Second)
	all := l.stop()

	if lost := all.lost(); len(lost) > 0 {
		t.Errorf("%d of %d requests were lost, want none: %v", len(lost), len(all), lost[0])
	}
	if got := gw.tokenRequests(t); got != 2 {
		t.Errorf("token requests = %d, want 2", got)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.refusals) == 0 || slices.ContainsFunc(u.refusals, func(reason string) bool { return reason != "not active" }) {
		t.Errorf("upstream refused %q, want some for a token that is not active", u.refusals)
	}
}
