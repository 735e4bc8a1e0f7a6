package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// provingAPI is a resource server in Node. It accepts tokens that are bound to a key, and
// verifies token and proof with jose.
type provingAPI struct{ addr string }

// startProvingAPI starts one for the tokens of an issuer, whose type in their header is typ.
// nonces is how often it wants another nonce; 0: it wants none.
func startProvingAPI(t *testing.T, issuer, jwks, typ string, nonces time.Duration, env ...string) provingAPI {
	t.Helper()
	cmd := exec.Command("node", "api.mjs")
	cmd.Dir = authServerDir
	cmd.Env = append(append(os.Environ(), env...), "ISSUER="+issuer, "AUDIENCE="+resource, "JWKS="+jwks, "TYP="+typ,
		"NONCE_SECONDS="+strconv.Itoa(int(nonces.Seconds())))
	if _, err := cmd.StdinPipe(); err != nil { // the server ends with it
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, cmd)
	ready := make(chan string, 1)
	go func() {
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			var at struct{ API string }
			if json.Unmarshal(lines.Bytes(), &at) == nil {
				ready <- at.API
			}
		}
	}()
	select {
	case addr := <-ready:
		return provingAPI{addr}
	case <-p.exited:
		t.Fatal("the resource server ended before it was ready")
	case <-time.After(startTimeout):
		t.Fatalf("the resource server isn't ready after %v", startTimeout)
	}
	return provingAPI{}
}

// apiStats is what a provingAPI has seen so far.
type apiStats struct {
	Accepted, Challenged, Tokens int
	Refused, Algorithms          map[string]int
}

func (a provingAPI) stats(t *testing.T) (stats apiStats) {
	t.Helper()
	getJSON(t, "http://"+a.addr+"/__stats", &stats)
	return stats
}

// wantNoneRefused fails the test if the API has refused anything but the lack of its nonce.
func (a provingAPI) wantNoneRefused(t *testing.T) apiStats {
	t.Helper()
	stats := a.stats(t)
	if len(stats.Refused) > 0 {
		t.Errorf("the upstream refused %v, want nothing refused", stats.Refused)
	}
	return stats
}

// provingMethods are clients whose tokens have to be bound, with each way to authenticate.
func provingMethods(t *testing.T, as *authServer) (routes []route) {
	t.Helper()
	key := newKey(t, "ES256")
	certificate := as.ca.issue(t, "dpop.example")
	secret := strings.Repeat("a secret of a client, ", 4)
	secretSetting := secretSetting(t, secret)
	for _, tt := range []struct {
		client   client
		settings []string
	}{
		{client{Method: "client_secret_basic", Secret: secret}, []string{as.tokenURL(), secretSetting}},
		{client{Method: "client_secret_post", Secret: secret}, []string{"issuer " + as.issuer, secretSetting}},
		{client{Method: "client_secret_jwt", Secret: secret}, []string{as.tokenURL(), secretSetting}},
		{client{Method: "private_key_jwt", Keys: keySet(key, "")}, []string{"issuer " + as.issuer, "private_key " + writeFile(t, "key.pem", pkcs8(t, key))}},
		{client{Method: "tls_client_auth", DNSName: "dpop.example"}, []string{"token_url " + as.mtls + "/token", as.ca.tokenTransport(), certificate.write(t).setting()}},
	} {
		for _, algorithm := range []string{"ES256", "EdDSA"} {
			c := tt.client
			c.ID, c.Proves = c.Method+"-with-"+algorithm, true
			as.register(t, c)
			routes = append(routes, route{client: c, settings: append([]string{"dpop " + algorithm}, tt.settings...)})
		}
	}
	return routes
}

// TestDPoPMethods obtains a bound token with each way to authenticate. Both the authorization
// server and the upstream demand their nonces.
func TestDPoPMethods(t *testing.T) { //nolint:tparallel // what the upstream has seen is counted after its parts
	t.Parallel()
	as := startAuthServer(t, time.Minute, "DPOP=1")
	plain := startProvingAPI(t, as.issuer, as.issuer+"/jwks", "at+jwt", time.Minute)
	secure := startProvingAPI(t, as.https, as.issuer+"/jwks", "at+jwt", time.Minute)
	routes := provingMethods(t, as)
	for i := range routes {
		routes[i].to = plain.addr
		if routes[i].client.Method == "tls_client_auth" {
			routes[i].to = secure.addr
		}
	}
	gw := startRoutes(t, routes)
	for i, r := range routes {
		t.Run(r.client.ID, func(t *testing.T) {
			for range 3 {
				gw.get(t, routePath(i), http.StatusOK)
			}
			stats := as.stats(t)
			// The server counts the demand for its nonce as a refusal.
			if granted, refused := stats.Granted[r.client.ID], stats.Refused[r.client.ID]; granted != 1 || refused != 1 {
				t.Errorf("%d tokens, %d demands for a nonce, want one of each", granted, refused)
			}
		})
	}
	sum := 0
	for _, api := range []provingAPI{plain, secure} {
		stats := api.wantNoneRefused(t)
		sum += stats.Accepted
		if stats.Algorithms["ES256"] == 0 || stats.Algorithms["ES256"] != stats.Algorithms["EdDSA"] {
			t.Errorf("proofs that were accepted: %v, want as many with each algorithm", stats.Algorithms)
		}
	}
	if want := 3 * len(routes); sum != want {
		t.Errorf("the upstreams accepted %d requests, want %d", sum, want)
	}
}

// oddPaths are those that are easily changed on the way.
var oddPaths = []string{
	"/", "/a", "/a/", "//a", "/a//b", "/a%2Fb", "/a%2fb", "/a%3Fb", "/a%23b", "/a%25b", "/a?b=c", "/a?", "/?x=%20&y", "/a%20", "/%20/", "/a;b=c,d",
	"/%C3%A4/ü", "/%E4", "/a/../b", "/./a/.", "/!$&'()*+,;=:@-._~", "/a%5Bb%5D", "/a[b]", "/a|b", `/a"b`, "/a\\b", "/a^`{b}", "/%41%62", "/a+b", "/%00",
}

// TestDPoPUnderLoad sends 10,000 requests with odd paths while tokens expire and nonces change.
// No proof is refused, no request fails, and the health checks are accepted.
func TestDPoPUnderLoad(t *testing.T) {
	t.Parallel() // it mostly waits
	const requests, rate = 10_000, 200
	as := startAuthServer(t, 8*time.Second, "DPOP=1")
	api := startProvingAPI(t, as.issuer, as.issuer+"/jwks", "at+jwt", 3*time.Second)
	c := client{ID: "load", Method: "client_secret_basic", Secret: "plain-secret-of-the-client", Proves: true}
	as.register(t, c)
	r := route{client: c, to: api.addr + " {\n\thealth_uri /health\n\thealth_interval 1s", settings: []string{"dpop", as.tokenURL(), "client_secret " + c.Secret}}
	gw := startGateway(t, gatewayConfig{site: strings.Replace(r.String(), "1s {\n", "1s\n", 1)})

	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = rate
	httpClient := &http.Client{Transport: transport, Timeout: 30 * time.Second}
	defer transport.CloseIdleConnections()
	var (
		mu       sync.Mutex
		failures []string // guarded by mu
		inFlight sync.WaitGroup
	)
	start := time.Now()
	for n := range requests {
		time.Sleep(time.Until(start.Add(time.Duration(n) * time.Second / rate)))
		inFlight.Go(func() {
			if err := sendProved(httpClient, gw.url, n); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failures = append(failures, err.Error())
			}
		})
	}
	inFlight.Wait()
	stats := api.wantNoneRefused(t)
	t.Logf("%d requests in %v: the upstream accepted %d, wanted a nonce %d times, and saw %d tokens", requests, time.Since(start).Round(time.Second),
		stats.Accepted, stats.Challenged, stats.Tokens)
	for _, failure := range failures[:min(len(failures), 5)] {
		t.Error(failure)
	}
	if len(failures) > 0 {
		t.Errorf("%d of %d requests failed, want none", len(failures), requests)
	}
	if checks := stats.Accepted - requests; checks < 30 || strings.Contains(gw.output.String(), "unhealthy") {
		t.Errorf("%d health checks were accepted, want one each second, and none that fails", checks)
	}
	if stats.Tokens < 6 || stats.Challenged < 10 {
		t.Errorf("%d tokens, %d challenges, want several of both", stats.Tokens, stats.Challenged)
	}
}

// sendProved sends the n-th request with an odd path.
func sendProved(httpClient *http.Client, gateway string, n int) error {
	method, body := http.MethodGet, []byte(nil)
	if n%5 == 0 {
		method, body = http.MethodPost, bytes.Repeat([]byte("x"), n)
	}
	path := oddPaths[n%len(oddPaths)]
	req, err := http.NewRequest(method, gateway, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.URL.Opaque = strings.TrimPrefix(gateway, "http:") + path // nothing here changes it
	resp, err := httpClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || !strings.HasPrefix(string(answer), method) || !strings.HasSuffix(string(answer), fmt.Sprintf(" %d", len(body))) {
		return fmt.Errorf("%s %s = %s %q", method, path, resp.Status, answer)
	}
	return nil
}

// TestDPoPIsExplained has a server that wants bound tokens of a client without dpop.
func TestDPoPIsExplained(t *testing.T) {
	t.Parallel()
	as := startAuthServer(t, time.Minute, "DPOP=1")
	secret := "plain-secret-of-the-client"
	proves := client{ID: "proves", Method: "client_secret_basic", Secret: secret, Proves: true}
	as.register(t, proves)
	routes := []route{
		{client: proves, to: "127.0.0.1:9", settings: []string{"issuer " + as.issuer, "client_secret " + secret}},
		{client: proves, to: "127.0.0.1:9", settings: []string{"issuer " + as.issuer, "client_secret " + secret, "dpop"}},
	}
	gw := startRoutes(t, routes[1:])
	without := gw.oauth2Token(t, routes[0].String())
	if without.exit != 2 || !strings.Contains(without.stdout, "add dpop") {
		t.Errorf("without dpop: exit status %d, want 2, and that it says to add dpop:\n%s", without.exit, without.stdout)
	}
	with := gw.oauth2Token(t, routes[1].String(), "--explain", "--json")
	var reports []struct {
		DPoP, JKT string
		Warnings  []string
		Claims    struct {
			Confirmation struct{ JKT string } `json:"cnf"`
		}
	}
	if err := json.Unmarshal([]byte(with.stdout), &reports); err != nil || len(reports) != 1 || with.exit != 0 {
		t.Fatalf("exit status %d, %v:\n%s%s", with.exit, err, with.stdout, with.stderr)
	}
	if r := reports[0]; r.DPoP != "ES256" || r.JKT == "" || r.Claims.Confirmation.JKT != r.JKT || len(r.Warnings) > 0 {
		t.Errorf("got %+v, want dpop, the thumbprint that the token names, and no warning", r)
	}
}

// proving returns each way to authenticate to Keycloak for a bound token.
func (kc *keycloak) proving(t *testing.T) []keycloakCase {
	key := newKey(t, "ES256")
	cases := []keycloakCase{
		{"secret", client{Method: "client_secret_basic", Secret: longSecret}, []string{secretSetting(t, longSecret), "dpop"}},
		{"secret JWT", client{Method: "client_secret_jwt", Secret: longSecret}, []string{secretSetting(t, longSecret), "dpop EdDSA"}},
		{"key", client{Method: "private_key_jwt", Keys: keySet(key, "")}, []string{"private_key " + writeFile(t, "key.pem", pkcs8(t, key)), "dpop"}},
	}
	for i := range cases {
		c := &cases[i]
		c.client.ID, c.client.Proves = "proves, with "+c.name, true
		kc.add(c.client)
	}
	return cases
}

// testProving has an upstream verify the proofs.
func (kc *keycloak) testProving(t *testing.T, cases []keycloakCase) {
	cases = kc.found(cases, kc.realm.issuer)
	api := startProvingAPI(t, kc.realm.issuer, kc.realm.issuer+"/protocol/openid-connect/certs", "JWT", time.Minute)
	var routes []route
	for _, tt := range cases {
		routes = append(routes, route{client: tt.client, to: api.addr, settings: tt.settings})
	}
	gw := startRoutes(t, routes)
	for i, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			gw.get(t, routePath(i), http.StatusOK)
			gw.get(t, routePath(i), http.StatusOK)
		})
	}
	if stats := api.wantNoneRefused(t); stats.Accepted != 2*len(cases) {
		t.Errorf("the upstream accepted %d requests, want %d", stats.Accepted, 2*len(cases))
	}
}

// testProving has an upstream verify the proofs for a token of Glewlwyd.
func (as *glewlwyd) testProving(t *testing.T, c client) {
	api := startProvingAPI(t, as.issuer, as.issuer+"/jwks", "at+jwt", time.Minute, "NODE_EXTRA_CA_CERTS="+as.ca.file)
	gw := startRoutes(t, []route{{client: c, to: api.addr, settings: []string{
		as.tokenURL(), "client_secret " + c.Secret, "dpop", as.ca.tokenTransport(),
	}}})
	for range 3 {
		gw.get(t, routePath(0), http.StatusOK)
	}
	if stats := api.wantNoneRefused(t); stats.Accepted != 3 || stats.Tokens != 1 {
		t.Errorf("the upstream accepted %d requests with %d tokens, want 3 with one", stats.Accepted, stats.Tokens)
	}
}
