package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"
)

// keycloakRealm is the realm of keycloak/realm.json. The tests add their clients to it.
const keycloakRealm = "e2e"

// keycloak is a Keycloak that the tests share, because it takes long to start.
type keycloak struct {
	realm   *authServer // as the other tests know a server: its issuer, and its CA
	http    string      // where it listens
	https   string      // the same with TLS; it asks for client certificates there
	clients []keycloakClient

	home    string // of the distribution
	cert    certificateFiles
	process *process

	ready chan struct{} // closed when it answers, or when err says why it doesn't
	err   error
}

// keycloakClient is a client of the realm.
type keycloakClient struct {
	client
	lifespan time.Duration // of its tokens; default: the realm's
	users    bool          // it is for users, and has no service account
	granted  bool          // it gets all scopes without asking
}

// probe is the client that shows whether Keycloak issues tokens.
var probe = client{ID: "probe", Secret: "plain-secret-of-the-probe", Method: "client_secret_post"}

func newKeycloak(t *testing.T) *keycloak {
	t.Helper()
	kc := &keycloak{
		http: heldAddress(t), https: heldAddress(t),
		home:  filepath.Join(t.TempDir(), "keycloak"),
		ready: make(chan struct{}),
	}
	kc.realm = &authServer{
		issuer: "http://" + kc.http + "/realms/" + keycloakRealm,
		https:  "https://" + kc.https + "/realms/" + keycloakRealm,
		ca:     newAuthority(t),
	}
	kc.cert = kc.realm.ca.issue(t, "127.0.0.1").write(t)
	kc.add(probe, resourceServer)
	return kc
}

// add makes clients known to the server, before it starts.
func (kc *keycloak) add(clients ...client) {
	for _, c := range clients {
		kc.clients = append(kc.clients, keycloakClient{client: c})
	}
}

// tokenEndpoint is the token endpoint of an issuer, which has a name for each of the
// server's addresses.
func tokenEndpoint(issuer string) string { return issuer + "/protocol/openid-connect/token" }

// start starts the server in the background. It ends with the test.
func (kc *keycloak) start(t *testing.T) {
	t.Helper()
	realm := kc.representation(t)
	go func() {
		defer close(kc.ready)
		if kc.err = unpackKeycloak(kc.home); kc.err == nil {
			kc.err = kc.importAndRun(realm)
		}
	}()
	t.Cleanup(func() {
		<-kc.ready
		if kc.process == nil {
			return
		}
		kc.process.kill()
		if t.Failed() {
			t.Logf("the end of what Keycloak logged:\n%s", kc.process.output.tail(8<<10))
		}
	})
}

// await waits until the server is ready.
func (kc *keycloak) await(t *testing.T) {
	t.Helper()
	if <-kc.ready; kc.err != nil {
		t.Fatalf("Keycloak: %v", kc.err)
	}
}

// importAndRun starts the server for the first time.
func (kc *keycloak) importAndRun(realm []byte) error {
	dir := filepath.Join(kc.home, "data", "import")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, keycloakRealm+"-realm.json"), realm, 0o600); err != nil {
		return err
	}
	return kc.run()
}

const (
	// keycloakTimeout is how long a start may take. The first takes 20 s of a processor.
	keycloakTimeout = 5 * time.Minute

	// keycloakBuilt has Keycloak take itself as it is distributed. Otherwise it would be
	// built anew at its first start, for half a minute. (kc.sh says so after that.)
	keycloakBuilt = "-Dkc.config.built=true"

	// keycloakJava has Java start fast and need little memory.
	keycloakJava = "-Xms64m -Xmx384m -XX:MaxMetaspaceSize=256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData"
)

// run starts the server's process, and waits until the server issues tokens.
func (kc *keycloak) run() error {
	_, httpPort, _ := strings.Cut(kc.http, ":")
	_, httpsPort, _ := strings.Cut(kc.https, ":")
	cmd, err := untilEOF(filepath.Join(kc.home, "bin", "kc.sh"),
		keycloakBuilt, "start-dev", "--import-realm",
		"--http-host=127.0.0.1", "--http-port="+httpPort, "--https-port="+httpsPort,
		"--https-certificate-file="+kc.cert.cert, "--https-certificate-key-file="+kc.cert.key,
		"--https-client-auth=request", "--truststore-paths="+kc.realm.ca.file)
	if err != nil {
		return err
	}
	cmd.Env = append(os.Environ(), "JAVA_OPTS="+keycloakJava+" -Djava.io.tmpdir="+filepath.Dir(kc.home))
	if kc.process, err = launch(cmd); err != nil {
		return err
	}
	for deadline := time.Now().Add(keycloakTimeout); ; {
		_, err := kc.fetchToken(probe)
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the server isn't ready after %v: %w", keycloakTimeout, err)
		}
		select {
		case <-kc.process.exited:
			return errors.New("the server ended before it was ready: " + kc.process.output.tail(2<<10))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// representation returns the realm with its clients as Keycloak imports it.
func (kc *keycloak) representation(t *testing.T) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("keycloak", "realm.json"))
	if err != nil {
		t.Fatal(err)
	}
	var realm map[string]any
	if err := json.Unmarshal(data, &realm); err != nil {
		t.Fatalf("realm.json: %v", err)
	}
	var clients []map[string]any
	for _, c := range kc.clients {
		clients = append(clients, kc.representationOf(t, c))
	}
	realm["clients"] = clients
	if data, err = json.Marshal(realm); err != nil {
		t.Fatal(err)
	}
	return data
}

// authenticators are Keycloak's names for what methods need. Its authenticator for
// secrets takes them in the header and in the form.
var authenticators = map[string]string{
	"client_secret_basic": "client-secret",
	"client_secret_post":  "client-secret",
	"client_secret_jwt":   "client-secret-jwt",
	"private_key_jwt":     "client-jwt",
	"tls_client_auth":     "client-x509",
}

// representationOf returns a client as Keycloak imports it.
func (kc *keycloak) representationOf(t *testing.T, c keycloakClient) map[string]any {
	t.Helper()
	attributes := make(map[string]string)
	if c.Algorithm != "" {
		attributes["token.endpoint.auth.signing.alg"] = c.Algorithm
	}
	if c.Keys != nil {
		keys, err := json.Marshal(c.Keys)
		if err != nil {
			t.Fatal(err)
		}
		attributes["use.jwks.string"], attributes["jwks.string"] = "true", string(keys)
	}
	if c.SubjectDN != "" {
		attributes["x509.subjectdn"], attributes["x509.casubjectdn"] = c.SubjectDN, kc.realm.ca.Subject.String()
		attributes["x509.allow.regex.pattern.comparison"] = "false"
	}
	if c.Bound {
		attributes["tls.client.certificate.bound.access.tokens"] = "true"
	}
	if c.Proves {
		attributes["dpop.bound.access.tokens"] = "true"
	}
	if c.lifespan > 0 {
		attributes["access.token.lifespan"] = strconv.Itoa(int(c.lifespan.Seconds()))
	}
	always, asked := []string{"service_account"}, strings.Fields(scopes)
	if c.granted {
		always, asked = append(always, asked...), nil
	}
	representation := map[string]any{
		"clientId":                c.ID,
		"protocol":                "openid-connect",
		"clientAuthenticatorType": authenticators[c.Method],
		"secret":                  c.Secret,
		"serviceAccountsEnabled":  !c.users,
		"standardFlowEnabled":     c.users,
		"attributes":              attributes,
		"defaultClientScopes":     always,
		"optionalClientScopes":    asked,
	}
	if c.users {
		representation["redirectUris"] = []string{"https://app.example/"}
	}
	return representation
}

// fetchToken obtains a token without the gateway, for a client with client_secret_post.
func (kc *keycloak) fetchToken(c client) (string, error) {
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	err := postForm(http.DefaultClient, tokenEndpoint(kc.realm.issuer), nil, url.Values{
		"grant_type":    {"client_credentials"},
		"client_id":     {c.ID},
		"client_secret": {c.Secret},
		"scope":         {scopes},
	}, &answer)
	return answer.AccessToken, err
}

// introspect returns an error unless the server says that the token is good, and was
// issued to the client for what the tests ask for.
func (kc *keycloak) introspect(token, clientID string) error {
	var info struct {
		Active   bool         `json:"active"`
		ClientID string       `json:"client_id"`
		Scope    string       `json:"scope"`
		Audience jwt.Audience `json:"aud"`
	}
	if err := postForm(http.DefaultClient, tokenEndpoint(kc.realm.issuer)+"/introspect", &resourceServer, url.Values{"token": {token}}, &info); err != nil {
		return err
	}
	switch {
	case !info.Active:
		return errors.New("not active")
	case info.ClientID != clientID:
		return fmt.Errorf("client_id = %q, want %q", info.ClientID, clientID)
	case !hasScopes(info.Scope):
		return fmt.Errorf("scope = %q, want %q", info.Scope, scopes)
	case !info.Audience.Contains(resource):
		return fmt.Errorf("aud = %q, want %q", info.Audience, resource)
	}
	return nil
}

// revoke revokes a token as its client may do (RFC 7009).
func (kc *keycloak) revoke(t *testing.T, c client, token string) {
	t.Helper()
	form := url.Values{"token": {token}, "client_id": {c.ID}, "client_secret": {c.Secret}}
	req := newRequest(t, "POST", kc.realm.issuer+"/protocol/openid-connect/revoke", strings.NewReader(form.Encode()))
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if resp := do(t, req); resp.StatusCode != http.StatusOK {
		t.Fatalf("POST /revoke = %s %s, want 200", resp.Status, resp.body)
	}
}
