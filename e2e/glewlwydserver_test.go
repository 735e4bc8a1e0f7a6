package e2e

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// glewlwyd is a running Glewlwyd. Its issuer is an instance of a plugin.
type glewlwyd struct {
	debianServer
	issuer string
	base   string       // of all its URLs
	client *http.Client // trusts its certificate, and has the session of its administrator
	ca     *authority   // nil without TLS
}

// startGlewlwyd starts a server whose access tokens live for life. With a CA, it speaks
// TLS, and asks for client certificates of the CA.
func startGlewlwyd(t *testing.T, life time.Duration, ca *authority) *glewlwyd {
	t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	addr := heldAddress(t)
	as := &glewlwyd{base: "http://" + addr, client: &http.Client{Timeout: 30 * time.Second, Jar: jar}, ca: ca}
	as.addr = addr
	as.args = []string{debianPath(t, "usr/bin/glewlwyd"), "--env-variables"}
	if ca != nil {
		as.base = "https://" + addr
		roots := x509.NewCertPool()
		roots.AddCert(ca.Certificate)
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
		t.Cleanup(transport.CloseIdleConnections)
		as.client.Transport = transport
	}
	as.issuer = as.base + "/api/oidc"
	as.env = as.environment(t, createGlewlwydDatabase(t))
	as.start(t)
	as.configure(t, life)
	return as
}

// createGlewlwydDatabase does what the package's installation would do, and returns the
// file.
func createGlewlwydDatabase(t *testing.T) string {
	t.Helper()
	const script = "import sqlite3, sys\n" +
		"sqlite3.connect(sys.argv[1]).executescript('BEGIN;' + open(sys.argv[2]).read() + 'COMMIT;')"
	file := filepath.Join(t.TempDir(), "glewlwyd.db")
	tables := debianPath(t, "usr/share/dbconfig-common/data/glewlwyd/install/sqlite3")
	if out, err := exec.Command(debianPython, "-c", script, file, tables).CombinedOutput(); err != nil {
		t.Fatalf("creating the database with %s: %v\n%s", debianPython, err, out)
	}
	return file
}

// environment is the server's configuration.
func (as *glewlwyd) environment(t *testing.T, database string) []string {
	t.Helper()
	host, port, _ := strings.Cut(as.addr, ":")
	modules := debianPath(t, "usr/lib/glewlwyd")
	env := []string{
		"GLWD_BIND_ADDRESS=" + host,
		"GLWD_PORT=" + port,
		"GLWD_EXTERNAL_URL=" + as.base,
		"GLWD_DATABASE_TYPE=sqlite3",
		"GLWD_DATABASE_SQLITE3_PATH=" + database,
		"GLWD_LOG_MODE=console",
		"GLWD_LOG_LEVEL=DEBUG",
		"GLWD_USER_MODULE_PATH=" + modules + "/user",
		"GLWD_USER_MIDDLEWARE_MODULE_PATH=" + modules + "/user_middleware",
		"GLWD_CLIENT_MODULE_PATH=" + modules + "/client",
		"GLWD_AUTH_SCHEME_MODULE_PATH=" + modules + "/scheme",
		"GLWD_PLUGIN_MODULE_PATH=" + modules + "/plugin",
	}
	if as.ca != nil {
		files := as.ca.issue(t, host).write(t)
		env = append(env,
			"GLWD_USE_SECURE_CONNECTION=1",
			"GLWD_SECURE_CONNECTION_KEY_FILE="+files.key,
			"GLWD_SECURE_CONNECTION_PEM_FILE="+files.cert,
			"GLWD_SECURE_CONNECTION_CA_FILE="+as.ca.file)
	}
	return env
}

// configure makes an issuer of the server.
func (as *glewlwyd) configure(t *testing.T, life time.Duration) {
	t.Helper()
	as.administer(t, "auth/", map[string]any{"username": "admin", "password": "password"})
	for scope := range strings.FieldsSeq(scopes) {
		as.administer(t, "scope/", map[string]any{"name": scope, "password_required": false})
	}
	parameters := map[string]any{
		"iss":                   as.issuer,
		"jwks-private":          fmt.Sprintf(`{"keys":[%s]}`, jwk(t, signingKey(), "signing", "RS256")),
		"default-kid":           "signing",
		"access-token-duration": int(life.Seconds()),

		"allow-non-oidc":           true, // which the client credentials grant is
		"auth-type-client-enabled": true,

		"request-parameter-allow": true, // JWTs of clients
		"client-jwks-parameter":   "jwks",

		"resource-allowed": true,
		"resource-scope":   map[string]any{strings.Fields(scopes)[0]: []string{resource}},

		"oauth-dpop-allowed":         true, // it binds what is asked for with a proof
		"oauth-dpop-iat-duration":    10,
		"oauth-dpop-nonce-mandatory": true,
		"oauth-dpop-nonce-counter":   5, // proofs with one nonce

		"introspection-revocation-allowed":             true,
		"introspection-revocation-allow-target-client": true,
	}
	if as.ca != nil {
		parameters["client-cert-source"] = "TLS"
		parameters["client-cert-use-endpoint-aliases"] = true
	}
	as.administer(t, "mod/plugin/", map[string]any{
		"module": "oidc", "name": "oidc", "display_name": "oidc", "enabled": true, "parameters": parameters,
	})
}

// register makes a client known to the server.
func (as *glewlwyd) register(t *testing.T, c client) client {
	t.Helper()
	grants := c.Grants
	if len(grants) == 0 {
		grants = []string{"client_credentials"}
	}
	properties := map[string]any{
		"client_id":                  c.ID,
		"confidential":               true,
		"enabled":                    true,
		"scope":                      strings.Fields(scopes),
		"authorization_type":         grants,
		"token_endpoint_auth_method": []string{c.Method},
	}
	if c.Secret != "" {
		properties["password"] = c.Secret
		properties["client_secret"] = c.Secret // for client_secret_jwt
	}
	if c.Keys != nil {
		properties["jwks"] = c.Keys
	}
	if c.DNSName != "" {
		properties["tls_client_auth_san_dns"] = c.DNSName
	}
	as.administer(t, "client/", properties)
	return c
}

// administer calls the server's own API.
func (as *glewlwyd) administer(t *testing.T, path string, body map[string]any) {
	t.Helper()
	data, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	req := newRequest(t, "POST", as.base+"/api/"+path, bytes.NewReader(data))
	req.Header.Set("Content-Type", "application/json")
	if resp := doWith(t, as.client, req); resp.StatusCode != http.StatusOK {
		t.Fatalf("POST /api/%s = %s, want 200\n%s", path, resp.Status, resp.body)
	}
}

// authServer is the server as the upstreams know it.
func (as *glewlwyd) authServer() *authServer {
	return &authServer{issuer: as.issuer, https: as.issuer, ca: as.ca, client: as.client}
}

// tokenURL is the setting for the token endpoint.
func (as *glewlwyd) tokenURL() string { return "token_url " + as.issuer + "/token" }

// introspect is for an upstream that asks the server as the client itself. The server
// tells a client about its own tokens.
func (as *glewlwyd) introspect(c client) func(token, clientID string) error {
	return func(token, clientID string) error {
		var said introspection
		if err := postForm(as.client, as.issuer+"/introspect", &c, url.Values{"token": {token}}, &said); err != nil {
			return err
		}
		_, err := said.judge(clientID)
		return err
	}
}

// revoke has the server revoke a token of the client.
func (as *glewlwyd) revoke(t *testing.T, c client, token string) {
	t.Helper()
	if err := postForm(as.client, as.issuer+"/revoke", &c, url.Values{"token": {token}}, nil); err != nil {
		t.Fatal(err)
	}
}
