package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// djangoServer is a django-oauth-toolkit.
type djangoServer struct {
	debianServer
	issuer string
}

func newDjangoServer(t *testing.T) *djangoServer {
	t.Helper()
	addr := heldAddress(t)
	return &djangoServer{debianServer: debianServer{addr: addr}, issuer: "http://" + addr + "/o"}
}

// serve starts the server. Its access tokens live for life. It knows the clients and the
// resource server.
func (as *djangoServer) serve(t *testing.T, life time.Duration, clients ...client) {
	t.Helper()
	program, err := filepath.Abs("django/server.py")
	if err != nil {
		t.Fatal(err)
	}
	known, err := json.Marshal(append(clients, resourceServer))
	if err != nil {
		t.Fatal(err)
	}
	as.args = []string{debianPython, program}
	as.env = []string{
		"ADDRESS=" + as.addr,
		"DATABASE=" + filepath.Join(t.TempDir(), "django.db"),
		"LIFETIME=" + strconv.Itoa(int(life.Seconds())),
		"CLIENTS=" + string(known),
	}
	debianPath(t, "usr/lib/python3/dist-packages/oauth2_provider")
	as.start(t)
}

// tokenURL is the setting for the token endpoint.
func (as *djangoServer) tokenURL() string { return "token_url " + as.issuer + "/token/" }

// judge asks the server about a token.
func (as *djangoServer) judge(token, clientID string) (time.Time, error) {
	var said introspection
	if err := postForm(http.DefaultClient, as.issuer+"/introspect/", &resourceServer, url.Values{"token": {token}}, &said); err != nil {
		return time.Time{}, err
	}
	return said.judge(clientID)
}

// introspect returns an error unless the token is good and was issued to the client.
func (as *djangoServer) introspect(token, clientID string) error {
	_, err := as.judge(token, clientID)
	return err
}

// TestDjango obtains tokens from a server in Python. Its URLs end with a slash, and its
// metadata is behind a redirect. Its tokens can't be read.
func TestDjango(t *testing.T) {
	t.Parallel()
	as := newDjangoServer(t)
	revoked := client{ID: "revoked", Secret: "plain-secret-of-the-client", Method: "client_secret_basic"}
	refusals := as.refusals()
	clients := append(slices.Clone(secretClients), revoked)
	for _, refused := range refusals {
		clients = append(clients, refused.client)
	}
	as.serve(t, time.Minute, clients...)

	t.Run("methods", func(t *testing.T) {
		t.Parallel()
		djangoMethods(t, as)
	})
	t.Run("refusals", func(t *testing.T) {
		t.Parallel()
		wantAdvice(t, refusals)
	})
	t.Run("revocation", func(t *testing.T) {
		t.Parallel()
		wantRevocationSurvived(t,
			route{client: revoked, settings: []string{as.tokenURL(), "client_secret " + revoked.Secret}},
			&introspector{introspect: as.introspect, clientID: revoked.ID},
			func(token string) {
				if err := postForm(http.DefaultClient, as.issuer+"/revoke_token/", &revoked, url.Values{"token": {token}}, nil); err != nil {
					t.Fatal(err)
				}
			})
	})
}

// TestDjangoOutage kills the server and starts it again.
func TestDjangoOutage(t *testing.T) {
	t.Parallel()
	as := newDjangoServer(t)
	c := secretClients[0]
	as.serve(t, debianLife, c)
	as.wantOutageSurvived(t,
		route{client: c, settings: []string{as.tokenURL(), "client_secret " + c.Secret}},
		&judge{verify: func(token string, _ time.Time) (time.Time, error) { return as.judge(token, c.ID) }})
}

// djangoMethods authenticates in both ways that the server offers, with all the characters
// that ids and secrets may have.
func djangoMethods(t *testing.T, as *djangoServer) {
	var (
		routes    []route
		upstreams []*introspector
		env       []string
	)
	for i, c := range secretClients {
		env = append(env, fmt.Sprintf("E2E_SECRET_%d=%s", i, c.Secret))
		for _, endpoint := range []string{as.tokenURL(), "issuer " + as.issuer} {
			u := &introspector{introspect: as.introspect, clientID: c.ID}
			upstreams = append(upstreams, u)
			routes = append(routes, route{client: c, to: u.serve(t), settings: []string{
				endpoint, fmt.Sprintf("client_secret {env.E2E_SECRET_%d}", i),
			}})
		}
	}
	gw := startRoutes(t, routes, env...)
	for i, u := range upstreams {
		t.Run(routes[i].client.ID+", "+strings.Fields(routes[i].settings[0])[0], func(t *testing.T) {
			gw.get(t, routePath(i), http.StatusOK)
			gw.get(t, routePath(i), http.StatusOK)
			u.wantAccepted(t, 2)
		})
	}
}

// refusals are what the server rejects.
func (as *djangoServer) refusals() []adviceCase {
	const secret = "plain-secret-of-the-client"
	known := func(id string, grants ...string) client {
		return client{ID: id, Secret: secret, Method: "client_secret_basic", Grants: grants}
	}
	right := "client_secret " + secret
	return []adviceCase{
		{route{client: known("wrong-path"), settings: []string{"token_url http://" + as.addr + "/oauth/token/", right}}, "check token_url"},
		{route{client: known("no-slash"), settings: []string{"token_url " + as.issuer + "/token", right}}, "set token_url to where it leads"},
		{route{client: known("wrong-secret"), settings: []string{as.tokenURL(), "client_secret wrong"}}, "check client_id, client_secret"},
		{route{client: known("for-users", "password"), settings: []string{as.tokenURL(), right}}, "allow this client the client_credentials grant"},
		{route{client: known("unknown-scope"), settings: []string{as.tokenURL(), right}, scopes: "api:nope"}, "check scopes"},
	}
}
