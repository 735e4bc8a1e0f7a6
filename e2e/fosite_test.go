package e2e

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// resourceServer is the client as which an upstream asks fosite about tokens.
var resourceServer = client{
	ID:     "resource-server",
	Secret: "plain-secret-of-the-resource-server",
	Method: "client_secret_basic",
}

// TestFosite obtains tokens from a server that holds each client to the one
// method it is registered for, says "bearer" in lower case, and wants the URL
// of its token endpoint in aud. Its tokens can't be read.
func TestFosite(t *testing.T) {
	rsaKey, ecKey := newKey(t, "RS256"), newKey(t, "ES256")
	rsaClient, ecClient := newKeyClient("rsa", "RS256", rsaKey), newKeyClient("ec", "ES256", ecKey)
	as := startFosite(t, rsaClient, ecClient)

	type test struct {
		client   client
		settings []string
		env      string
	}
	// A file names no key id, a JWK does.
	tests := []test{
		{rsaClient, []string{"private_key " + writeFile(t, "rsa.pem", pkcs8(t, rsaKey)), "key_id rsa"}, ""},
		{ecClient, []string{"private_key {env.E2E_SECRET}"}, string(jwk(t, ecKey, "ec", "ES256"))},
	}
	for _, c := range secretClients {
		tests = append(tests, test{c, []string{"client_secret {env.E2E_SECRET}"}, c.Secret})
	}
	for _, tt := range tests {
		t.Run(tt.client.ID, func(t *testing.T) {
			u := &introspector{introspect: as.introspect, clientID: tt.client.ID}
			r := route{client: tt.client, to: u.serve(t), settings: append(tt.settings, as.settings()...)}
			gw := startGateway(t, gatewayConfig{site: r.String(), env: []string{"E2E_SECRET=" + tt.env}})
			for range 3 {
				gw.get(t, "/", http.StatusOK)
			}
			u.wantAccepted(t, 3)
		})
	}
}

// TestFositeRefuses gives the gateway what the server doesn't know. The
// warning is to say which setting that was.
func TestFositeRefuses(t *testing.T) {
	key, ecKey := newKey(t, "RS256"), newKey(t, "ES256")
	rsaClient, ecClient := newKeyClient("rsa", "RS256", key), newKeyClient("ec", "ES256", ecKey)
	as := startFosite(t, rsaClient, ecClient)
	// newKey has but one for RSA.
	otherRSA, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	right := "private_key " + writeFile(t, "rsa.pem", pkcs8(t, key))
	wrongRSA := "private_key " + writeFile(t, "other-rsa.pem", pkcs8(t, otherRSA))
	wrongEC := "private_key " + writeFile(t, "other-ec.pem", pkcs8(t, newKey(t, "ES256")))
	basic, post := secretClients[0], secretClients[1]
	postAsBasic := post
	postAsBasic.Method = basic.Method

	tests := []struct {
		name   string
		route  route
		change string // the setting to name
	}{
		{"wrong secret, basic", route{client: basic, settings: []string{"client_secret wrong"}}, "client_secret"},
		{"wrong secret, post", route{client: post, settings: []string{"client_secret wrong"}}, "client_secret"},
		{"wrong method", route{client: postAsBasic, settings: []string{"client_secret " + post.Secret}}, "auth_method"},
		{"wrong scope", route{client: basic, settings: []string{"client_secret " + basic.Secret}, scopes: "api:nope"}, "scopes"},
		{"wrong RSA key", route{client: rsaClient, settings: []string{wrongRSA, "key_id rsa"}}, "private_key"},
		{"wrong EC key", route{client: ecClient, settings: []string{wrongEC, "key_id ec"}}, "private_key"},
		{"wrong key id", route{client: rsaClient, settings: []string{right, "key_id other"}}, "key_id"},
		{"wrong aud", route{client: rsaClient, settings: []string{right, "key_id rsa", "assertion_audience https://other.example/"}}, "assertion_audience"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.route.settings = append(tt.route.settings, as.settings()...)
			wantRefused(t, tt.route, tt.change)
		})
	}
}

// TestIntrospectorRefuses shows that the upstream of the tests above accepts
// what it should and nothing else. No gateway takes part.
func TestIntrospectorRefuses(t *testing.T) {
	as := startFosite(t)
	post, oddPost := secretClients[1], secretClients[3]
	addr := (&introspector{introspect: as.introspect, clientID: post.ID}).serve(t)
	good := as.fetchToken(t, post, scopes)
	tests := []struct {
		name, token string
		refuse      string // empty: accept
	}{
		{"good", good, ""},
		{"forged", good[:len(good)-8] + "AAAAAAAA", "not active"},
		{"another client", as.fetchToken(t, oddPost, scopes), "client_id"},
		{"fewer scopes", as.fetchToken(t, post, "api:read"), "scope"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req := newRequest(t, "GET", "http://"+addr, nil)
			req.Header.Set("Authorization", "Bearer "+tt.token)
			req.Header.Set("X-Tenant-Id", tenant)
			resp := do(t, req)
			if accepted := resp.StatusCode == http.StatusOK; accepted != (tt.refuse == "") || !strings.Contains(string(resp.body), tt.refuse) {
				t.Errorf("upstream answered %d %s, want it to refuse: %q", resp.StatusCode, resp.body, tt.refuse)
			}
		})
	}
}

// secretClients are clients of fosite and zitadel, among them some with all
// the characters that a header or a form must not hold as they are. Unlike
// oidc-provider, these servers take letters beyond ASCII, too.
var secretClients = []client{
	{
		ID:     "basic",
		Secret: "plain-secret-of-the-basic-client",
		Method: "client_secret_basic",
	},
	{
		ID:     "post",
		Secret: "plain-secret-of-the-post-client",
		Method: "client_secret_post",
	},
	{
		ID:     "basic:ödd íd+100% &=\"<>#?/\\;,@日",
		Secret: " :%3A%zz+ &=?#/\\\"'`$!*()[]{}<>|^~@;,._-é€😀 ",
		Method: "client_secret_basic",
	},
	{
		ID:     "post:ödd íd+100% &=\"<>#?/\\;,@日",
		Secret: " %3A%zz+: &=?#/\\\"'`$!*()[]{}<>|^~@;,._-é€😀 ",
		Method: "client_secret_post",
	},
}

// wantRefused fails the test unless a gateway with this route has no token for
// its clients, says so once, and names the setting to change.
func wantRefused(t *testing.T, r route, change string) {
	t.Helper()
	upstream := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("upstream got %s %s, want nothing", r.Method, r.URL)
	}))
	closeAtEnd(t, upstream)
	r.to = upstream.Listener.Addr().String()
	started := time.Now()
	gw := startGateway(t, gatewayConfig{site: r.String()})
	for range 3 {
		if resp := gw.get(t, "/", http.StatusServiceUnavailable); resp.Header.Get("Retry-After") == "" {
			t.Error("503 without Retry-After")
		}
	}
	gw.stop() // the log is complete

	// Another try is due after 5 s, but only the slowest of machines gets there.
	warnings, most := gw.warnings(t, r.client), 1+int(time.Since(started)/(5*time.Second))
	if n := len(warnings); n == 0 || n > most {
		t.Errorf("%d warnings, want 1 for each token request, of %d at most", n, most)
	}
	for _, warning := range warnings {
		// What the server says comes first, and may have the name by chance.
		if hint := warning[strings.LastIndex(warning, " (")+1:]; !strings.Contains(hint, change) {
			t.Errorf("warning doesn't say what to do about %s: %s", change, warning)
		}
	}
}

// newKeyClient returns a client that authenticates with the key, which has the
// client's id.
func newKeyClient(id, algorithm string, key crypto.Signer) client {
	return client{
		ID:        id,
		Method:    "private_key_jwt",
		Algorithm: algorithm,
		Keys:      keySet(key, id),
	}
}

// fositeServer is a running authorization server.
type fositeServer struct {
	TokenURL         string `json:"token_url"`
	IntrospectionURL string `json:"introspection_url"`
}

// startFosite starts a server that knows the clients with secrets, more of them,
// and the resource server.
func startFosite(t *testing.T, more ...client) *fositeServer {
	t.Helper()
	clients := slices.Concat(secretClients, more, []client{resourceServer})
	as := new(fositeServer)
	startServer(t, fositeBinary, clients, as)
	return as
}

// settings are what a gateway has to know of the server. It knows audience, but
// not resource.
func (as *fositeServer) settings() []string {
	return []string{"token_url " + as.TokenURL, "audience " + resource}
}

// fetchToken obtains a token without the gateway, by client_secret_post.
func (as *fositeServer) fetchToken(t *testing.T, c client, scopes string) string {
	t.Helper()
	var answer struct {
		AccessToken string `json:"access_token"`
		TokenType   string `json:"token_type"`
	}
	err := postForm(http.DefaultClient, as.TokenURL, nil, url.Values{
		"grant_type":    {"client_credentials"},
		"client_id":     {c.ID},
		"client_secret": {c.Secret},
		"scope":         {scopes},
		"audience":      {resource},
	}, &answer)
	if err != nil {
		t.Fatal(err)
	}
	// What the other tests claim to cope with.
	if answer.TokenType != "bearer" {
		t.Errorf("token_type = %q, want bearer", answer.TokenType)
	}
	return answer.AccessToken
}

// introspect returns an error unless the token is good and was issued to the
// client, for this resource server and for what the tests ask for.
func (as *fositeServer) introspect(token, clientID string) error {
	var info struct {
		Active   bool     `json:"active"`
		ClientID string   `json:"client_id"`
		Scope    string   `json:"scope"`
		Audience []string `json:"aud"`
	}
	if err := postForm(http.DefaultClient, as.IntrospectionURL, &resourceServer, url.Values{"token": {token}}, &info); err != nil {
		return err
	}
	switch {
	case !info.Active:
		return errors.New("not active")
	case info.ClientID != clientID:
		return fmt.Errorf("client_id = %q, want %q", info.ClientID, clientID)
	case info.Scope != scopes:
		return fmt.Errorf("scope = %q, want %q", info.Scope, scopes)
	case !slices.Equal(info.Audience, []string{resource}):
		return fmt.Errorf("aud = %q, want %q", info.Audience, resource)
	}
	return nil
}

// postForm decodes the answer to a form, unless into is nil. A client is sent as Basic.
func postForm(httpClient *http.Client, to string, c *client, form url.Values, into any) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "POST", to, strings.NewReader(form.Encode()))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if c != nil {
		req.SetBasicAuth(url.QueryEscape(c.ID), url.QueryEscape(c.Secret))
	}
	resp, err := httpClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("POST %s: %s", to, resp.Status)
	}
	if into == nil {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

// introspector is an upstream that can't tell by itself what a token is worth
// (RFC 7662): it asks the authorization server each time.
type introspector struct {
	introspect func(token, clientID string) error
	clientID   string // whose tokens it accepts

	mu       sync.Mutex
	accepted int
	last     string // the token that was accepted last
	refusals []string
}

func (u *introspector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	token, err := identity(r.Header)
	if err == nil {
		err = u.introspect(token, u.clientID)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if err != nil {
		u.refusals = append(u.refusals, err.Error())
		http.Error(w, err.Error(), http.StatusUnauthorized)
		return
	}
	u.accepted++
	u.last = token
}

// serve returns the address of the upstream.
func (u *introspector) serve(t *testing.T) string {
	srv := httptest.NewServer(u)
	closeAtEnd(t, srv)
	return srv.Listener.Addr().String()
}

// wantAccepted fails the test unless n requests came in, and all were accepted.
func (u *introspector) wantAccepted(t *testing.T, n int) {
	t.Helper()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.accepted != n || len(u.refusals) != 0 {
		t.Errorf("upstream accepted %d and refused %q, want %d and none", u.accepted, u.refusals, n)
	}
}
