package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// keycloakFailure is something that people get wrong.
type keycloakFailure struct {
	name   string
	route  route
	change string // the settings of which one is to be named first, separated by |
}

// keycloakReport is what the command says of a client.
type keycloakReport struct {
	ClientID string `json:"client_id"`
	Error    struct {
		Code, Description, Hint string
		Status                  int
	}
}

func (r keycloakReport) String() string {
	return fmt.Sprintf("%d %s: %s (%s)", r.Error.Status, r.Error.Code, r.Error.Description, r.Error.Hint)
}

// refusals returns what people get wrong. Each case has a client of its own, so that what
// is said about them can be told apart.
func (kc *keycloak) refusals(t *testing.T) []keycloakFailure {
	issuer := kc.realm.issuer
	tokenURL, discovered := "token_url "+tokenEndpoint(issuer), "issuer "+issuer
	var failures []keycloakFailure
	add := func(name, change string, c client, settings ...string) *keycloakFailure {
		c.ID = strings.NewReplacer(" ", "-", ",", "", "'", "").Replace(name) // nothing that a method would encode
		failures = append(failures, keycloakFailure{name, route{client: c, settings: settings}, change})
		return &failures[len(failures)-1]
	}

	// Who the client is.
	const secret = "plain-secret-of-the-client"
	basic := client{Method: "client_secret_basic", Secret: secret}
	post := client{Method: "client_secret_post", Secret: secret}
	signed := client{Method: "client_secret_jwt", Secret: longSecret}
	odd := client{Method: "client_secret_basic", Secret: "s%3A+c/r=t &?#e~"}
	right := secretSetting(t, secret)
	wrong := secretSetting(t, "wrong"+longSecret)
	for _, endpoint := range []string{tokenURL, discovered} {
		with := ", " + strings.Fields(endpoint)[0]
		add("wrong secret, basic"+with, "client_id|client_secret", basic, endpoint, wrong)
		add("wrong secret, post"+with, "client_id|client_secret", post, endpoint, wrong)
		add("wrong secret, JWT"+with, "client_secret", signed, endpoint, wrong)
		add("odd secret, not encoded"+with, "basic_encoding", odd, endpoint, secretSetting(t, odd.Secret), "basic_encoding raw")
	}
	kc.addKeyRefusals(t, add)

	// What the client may do.
	add("wrong scope", "scopes", post, tokenURL, right).route.scopes = "api:read api:nope"

	// Where the server is.
	base := "http://" + kc.http
	for _, tt := range []struct{ name, endpoint string }{
		{"wrong path", "token_url " + issuer + "/token"},
		{"path of an old server", "token_url " + tokenEndpoint(base+"/auth/realms/"+keycloakRealm)},
		{"authorization endpoint", "token_url " + issuer + "/protocol/openid-connect/auth"},
		{"wrong realm in token_url", "token_url " + tokenEndpoint(base+"/realms/nope")},
		{"wrong realm in issuer", "issuer " + base + "/realms/nope"},
		{"slash at the end", "issuer " + issuer + "/"},
		{"admin's address", "issuer " + base + "/admin/" + keycloakRealm},
	} {
		add(tt.name, strings.Fields(tt.endpoint)[0], post, tt.endpoint, right)
	}
	for _, f := range failures {
		kc.add(f.route.client)
	}

	add("unknown client", "client_id", post, tokenURL, right)
	users := add("no service account", "client_credentials", post, tokenURL, right).route.client
	proving := add("DPoP", "dpop", post, tokenURL, right).route.client
	proving.Proves = true
	bound := add("bound tokens", "client_certificate", post, tokenURL, right).route.client
	bound.Bound = true
	kc.clients = append(kc.clients, keycloakClient{client: users, users: true},
		keycloakClient{client: proving}, keycloakClient{client: bound})
	return failures
}

// addKeyRefusals adds what is wrong with keys and their JWTs.
func (kc *keycloak) addKeyRefusals(t *testing.T, add func(name, change string, c client, settings ...string) *keycloakFailure) {
	key := newKey(t, "ES256")
	right := "private_key " + writeFile(t, "key.pem", pkcs8(t, key))
	other := "private_key " + writeFile(t, "other.pem", pkcs8(t, newKey(t, "ES256")))
	c := client{Method: "private_key_jwt", Keys: keySet(key, "known")}
	for _, endpoint := range kc.endpoints(kc.realm.issuer) {
		with := ", " + strings.Fields(endpoint)[0]
		add("wrong key"+with, "private_key", c, endpoint, other, "key_id known")
		add("unknown kid"+with, "private_key|key_id", c, endpoint, right, "key_id unknown")
		add("wrong audience"+with, "assertion_audience", c, endpoint, right, "key_id known", "assertion_audience https://other.example/")
	}
	for _, endpoint := range kc.endpoints(kc.realm.https) {
		c := client{Method: "tls_client_auth", SubjectDN: "CN=client.example"}
		add("wrong certificate, "+strings.Fields(endpoint)[0], "client_id|client_certificate", c, endpoint,
			kc.realm.ca.tokenTransport(), kc.realm.ca.issue(t, "other.example").write(t).setting())
	}
}

// keycloakSetting finds what a hint is about.
var keycloakSetting = regexp.MustCompile(`\bdpop\b|client_credentials|basic_encoding|` +
	`\b(client_id|client_secret|client_certificate|auth_method|private_key|key_id|assertion_audience|assertion_typ|` +
	`assertion_file|token_url|issuer|scopes|audience|resource)\b`)

// testRefusals has the log and the command say what to change. The right setting comes
// first.
func (kc *keycloak) testRefusals(t *testing.T, failures []keycloakFailure) {
	upstream := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("upstream got %s %s, want nothing", r.Method, r.URL)
	}))
	closeAtEnd(t, upstream)
	var routes []route
	for _, f := range failures {
		f.route.to = upstream.Listener.Addr().String()
		routes = append(routes, f.route)
	}
	started := time.Now()
	gw := startRoutes(t, routes)
	for i := range failures {
		if resp := gw.get(t, routePath(i), http.StatusServiceUnavailable); resp.Header.Get("Retry-After") == "" {
			t.Errorf("%s: 503 without Retry-After", failures[i].name)
		}
	}
	most := 1 + int(time.Since(started)/(5*time.Second)) // then another try is due
	gw.stop()                                            // the log is complete

	asked := gw.oauth2Token(t, siteOf(routes), "--json")
	var reports []keycloakReport
	if err := json.Unmarshal([]byte(asked.stdout), &reports); err != nil || asked.exit != 2 {
		t.Fatalf("caddy oauth2-token --json = %d, %v, want 2\n%s%s", asked.exit, err, asked.stdout, asked.stderr)
	}
	for _, f := range failures {
		t.Run(f.name, func(t *testing.T) {
			i := slices.IndexFunc(reports, func(r keycloakReport) bool { return r.ClientID == f.route.client.ID })
			if i < 0 {
				t.Fatal("caddy oauth2-token says nothing about it")
			}
			t.Log(reports[i])
			hint := reports[i].Error.Hint
			if first := keycloakSetting.FindString(hint); !slices.Contains(strings.Split(f.change, "|"), first) {
				t.Errorf("hint = %q, want it to name %s first", hint, f.change)
			}
			warnings := gw.warnings(t, f.route.client)
			if n := len(warnings); n > most || !strings.Contains(warnings[n-1], hint) {
				t.Errorf("warnings = %q, want 1 for each token request, of %d at most, with the hint %q", warnings, most, hint)
			}
		})
	}
}
