package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// oddSecret has characters that are encoded in a form.
const oddSecret = "s%3A+c/r=t &?#e~"

// TestGlewlwyd obtains tokens from a server in C. It does not decode id and secret of
// Basic, wants the URL of its token endpoint in aud, answers 403 without a word, and has
// error codes of its own.
func TestGlewlwyd(t *testing.T) {
	t.Parallel()
	as := startGlewlwyd(t, time.Minute, newAuthority(t))
	// All clients first: the server mixes them up if it does anything else meanwhile.
	methods := newGlewlwydMethods(t, as)
	refusals := glewlwydRefusals(t, as)
	c := as.register(t, client{ID: "revoked", Secret: "plain-secret-of-the-client", Method: "client_secret_basic"})

	proves := as.register(t, client{ID: "proves", Secret: "plain-secret-of-the-client", Method: "client_secret_basic"})

	t.Run("dpop", func(t *testing.T) {
		t.Parallel()
		as.testProving(t, proves)
	})
	t.Run("methods", func(t *testing.T) {
		t.Parallel()
		methods.try(t)
	})
	t.Run("refusals", func(t *testing.T) {
		t.Parallel()
		wantAdvice(t, refusals)
	})
	t.Run("revocation", func(t *testing.T) {
		t.Parallel()
		wantRevocationSurvived(t,
			route{client: c, settings: []string{as.tokenURL(), "client_secret " + c.Secret, as.ca.tokenTransport()}},
			&introspector{introspect: as.introspect(c), clientID: c.ID},
			func(token string) { as.revoke(t, c, token) })
	})
}

// TestGlewlwydOutage kills the server and starts it again.
func TestGlewlwydOutage(t *testing.T) {
	t.Parallel()
	as := startGlewlwyd(t, debianLife, nil)
	c := as.register(t, client{ID: "outage", Secret: "plain-secret-of-the-client", Method: "client_secret_basic"})
	as.wantOutageSurvived(t,
		route{client: c, settings: []string{as.tokenURL(), "client_secret " + c.Secret}},
		&judge{verify: newVerifier(t, as.authServer(), c.ID).verify})
}

// glewlwydMethods are ways to authenticate, each with an upstream.
type glewlwydMethods struct {
	routes    []route
	upstreams []*upstream
	bound     *tlsUpstream // the last one
	env       []string
}

// newGlewlwydMethods returns each way that the server offers and that works there. It
// documents self_signed_tls_client_auth as untested, and refuses it.
func newGlewlwydMethods(t *testing.T, as *glewlwyd) *glewlwydMethods {
	t.Helper()
	m := new(glewlwydMethods)
	add := func(c client, settings ...string) {
		u := newUpstream(t, as.authServer(), c)
		m.upstreams = append(m.upstreams, u)
		m.routes = append(m.routes, route{client: c, to: u.serve(t), settings: append(settings, as.ca.tokenTransport())})
	}
	issuer := "issuer " + as.issuer
	for i, tt := range []struct {
		client   client
		settings []string
	}{
		{client{ID: "basic", Secret: "plain-secret-of-the-client", Method: "client_secret_basic"}, []string{issuer}},
		{client{ID: "basic with an odd secret", Secret: oddSecret, Method: "client_secret_basic"}, []string{as.tokenURL(), "basic_encoding raw"}},
		{client{ID: "post", Secret: "plain-secret-of-the-client", Method: "client_secret_post"}, []string{issuer}},
		{secretClients[3], []string{as.tokenURL()}}, // with the oddest id and secret
		{client{ID: "HS256", Secret: strings.Repeat("a-long-secret-", 3), Method: "client_secret_jwt"}, []string{as.tokenURL()}},
	} {
		as.register(t, tt.client)
		m.env = append(m.env, fmt.Sprintf("E2E_SECRET_%d=%s", i, tt.client.Secret))
		add(tt.client, append(tt.settings, fmt.Sprintf("client_secret {env.E2E_SECRET_%d}", i))...)
	}
	for _, algorithm := range []string{"RS256", "PS256", "ES256", "EdDSA"} {
		key := newKey(t, algorithm)
		c := as.register(t, client{ID: algorithm, Method: "private_key_jwt", Keys: keySet(key, algorithm)})
		settings := []string{"private_key " + writeFile(t, "key.pem", pkcs8(t, key)), "key_id " + algorithm}
		if algorithm == "PS256" { // which nobody can tell from the key
			settings = append(settings, "signing_alg PS256")
		}
		add(c, append([]string{as.tokenURL()}, settings...)...)
		add(c, append([]string{issuer, "assertion_audience " + as.issuer + "/token"}, settings...)...)
	}
	// The metadata has another endpoint for this, on the same port.
	c := as.register(t, client{ID: "certificate", Method: "tls_client_auth", DNSName: "client.example"})
	m.bound = newTLSUpstream(t, as.authServer(), c, true)
	m.upstreams = append(m.upstreams, m.bound.upstream)
	m.routes = append(m.routes, m.bound.route(as.authServer(),
		[]string{issuer, as.ca.issue(t, c.DNSName).write(t).setting(), "bind_certificate"}))
	return m
}

func (m *glewlwydMethods) try(t *testing.T) {
	gw := startRoutes(t, m.routes, m.env...)
	for i, u := range m.upstreams {
		t.Run(m.routes[i].client.ID+", "+strings.Fields(m.routes[i].settings[0])[0], func(t *testing.T) {
			protocol := "HTTP/1.1"
			if u == m.bound.upstream {
				protocol = "HTTP/2.0"
			}
			gw.get(t, routePath(i), http.StatusOK)
			gw.get(t, routePath(i), http.StatusOK)
			u.wantAccepted(t, 2, protocol)
		})
	}
	m.bound.wantCertificates(t, 1)
}

// glewlwydRefusals are what the server rejects.
func glewlwydRefusals(t *testing.T, as *glewlwyd) []adviceCase {
	const secret = "plain-secret-of-the-client"
	known := func(id string) client {
		return as.register(t, client{ID: id, Secret: secret, Method: "client_secret_basic"})
	}
	right := "client_secret " + secret
	key := newKey(t, "ES256")
	keyFile := "private_key " + writeFile(t, "key.pem", pkcs8(t, key))
	keyClient := as.register(t, newKeyClient("no-audience", "ES256", key))
	odd := as.register(t, client{ID: "odd-secret", Secret: oddSecret, Method: "client_secret_basic"})
	userClient := as.register(t, client{ID: "for-users", Secret: secret, Method: "client_secret_basic", Grants: []string{"code"}})
	certificate := as.ca.issue(t, "client.example").write(t).setting()
	certified := as.register(t, client{ID: "other-endpoint", Method: "tls_client_auth", DNSName: "client.example"})

	cases := []adviceCase{
		{route{client: known("wrong-path"), settings: []string{"token_url " + as.base + "/api/token", right}}, "check token_url"},
		{route{client: known("wrong-secret"), settings: []string{as.tokenURL(), "client_secret wrong"}}, "check client_id, client_secret"},
		{route{client: odd, settings: []string{as.tokenURL(), fmt.Sprintf("client_secret %q", oddSecret)}}, "set basic_encoding raw"},
		{route{client: userClient, settings: []string{as.tokenURL(), right}}, "allow this client the client_credentials grant"},
		{route{client: known("unknown-scope"), settings: []string{as.tokenURL(), right}, scopes: "api:nope"}, "check scopes"},
		{route{client: keyClient, settings: []string{"issuer " + as.issuer, keyFile, "key_id " + keyClient.ID}}, "set assertion_audience " + as.issuer + "/token,"},
		{route{client: certified, settings: []string{as.tokenURL(), certificate}}, "check client_id, client_certificate and token_url"},
	}
	for i := range cases {
		cases[i].settings = append(cases[i].settings, as.ca.tokenTransport())
	}
	return cases
}
