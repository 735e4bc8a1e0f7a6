package outboundauth

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
)

// These servers behave as real ones were seen to.

// formServer is a token endpoint: answer gets the form and the header.
func formServer(answer func(w http.ResponseWriter, form url.Values, r *http.Request)) *wire {
	return &wire{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseForm(); err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		answer(w, r.PostForm, r)
	})}
}

func refuseWith(w http.ResponseWriter, status int, code string) {
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"error":%q}`, code)
}

// wantRefused fails the test unless the token is refused for good, with a hint
// that names these settings.
func wantRefused(t *testing.T, cl *client, code string, settings ...string) {
	t.Helper()
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	got := wantTokenError(t, err, code, true)
	for _, setting := range settings {
		if !strings.Contains(got.Hint, setting) {
			t.Errorf("request() = %v, want a hint that names %s", err, setting)
		}
	}
}

func wantGranted(t *testing.T, cl *client) {
	t.Helper()
	if g, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil || g.accessToken != "t0ken" {
		t.Errorf("request() = %v, %v, want the token", g, err)
	}
}

// basicServer knows one client, whose credentials it takes after decoding.
func basicServer(id, secret string, decode func(string) (string, error)) *wire {
	return formServer(func(w http.ResponseWriter, _ url.Values, r *http.Request) {
		user, password, _ := r.BasicAuth()
		gotID, errID := decode(user)
		gotSecret, errSecret := decode(password)
		if errID != nil || errSecret != nil || gotID != id || gotSecret != secret {
			refuseWith(w, http.StatusUnauthorized, "invalid_client")
			return
		}
		fmt.Fprint(w, goodAnswer)
	})
}

// RFC 6749 §2.3.1: of an id or secret that is not encoded, such a server makes
// another one.
func TestServerThatDecodesBasicCredentials(t *testing.T) {
	c := Credentials{TokenURL: tokenPlace, ClientID: "id:1%20 +ü", ClientSecret: "s%3A+c/r=t &?#e~"}
	server := basicServer(c.ClientID, c.ClientSecret, url.QueryUnescape)
	wantGranted(t, newTestClient(t, c, server))
	c.ClientID = "id" // raw, one with a colon is an error at load
	server = basicServer(c.ClientID, c.ClientSecret, url.QueryUnescape)
	wantGranted(t, newTestClient(t, c, server))
	c.BasicEncoding = basicRaw
	wantRefused(t, newTestClient(t, c, server), "invalid_client", "client_secret", "basic_encoding")
}

func TestServerThatDoesNotDecodeBasicCredentials(t *testing.T) {
	c := Credentials{TokenURL: tokenPlace, ClientID: "id%20+", ClientSecret: "s%3A+c/r=t &?#e~"}
	server := basicServer(c.ClientID, c.ClientSecret, func(s string) (string, error) { return s, nil })
	wantRefused(t, newTestClient(t, c, server), "invalid_client", "client_secret", "basic_encoding")
	c.BasicEncoding = basicRaw
	wantGranted(t, newTestClient(t, c, server))
}

// assertionClaims returns the claims of a client_secret_jwt; nil if it is not
// this client's.
func assertionClaims(form url.Values, secret string) map[string]any {
	signed, err := jose.ParseSigned(form.Get("client_assertion"), []jose.SignatureAlgorithm{jose.HS256})
	if err != nil {
		return nil
	}
	if _, err := signed.Verify([]byte(secret)); err != nil {
		return nil
	}
	_, claims, _ := jwt.Decode(form.Get("client_assertion"))
	return claims
}

var assertingSecret = strings.Repeat("s3cret-", 5)

// asserting is a client that authenticates with a JWT.
func asserting() Credentials {
	return Credentials{TokenURL: tokenPlace, ClientID: "id", ClientSecret: assertingSecret, AuthMethod: authSecretJWT}
}

// A repetition after a failure of the server is another JWT as well.
func TestServerThatRemembersAssertions(t *testing.T) {
	known := make(map[any]bool)
	requests := 0
	server := formServer(func(w http.ResponseWriter, form url.Values, _ *http.Request) {
		jti := assertionClaims(form, assertingSecret)["jti"]
		if jti == nil || jti == "" || known[jti] {
			refuseWith(w, http.StatusUnauthorized, "invalid_client")
			return
		}
		known[jti] = true
		if requests++; requests == 2 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		fmt.Fprint(w, goodAnswer)
	})
	cl := newTestClient(t, asserting(), server)
	wantGranted(t, cl)
	if _, _, err := cl.source.Token(t.Context()); err != nil { // in two requests
		t.Errorf("Token() = %v, want no error", err)
	}
	if requests != 3 {
		t.Errorf("got %d requests, want 3", requests)
	}
}

// Nothing tells the client: its token is used as it is.
func TestServerThatDropsUnknownScopes(t *testing.T) {
	server := formServer(func(w http.ResponseWriter, form url.Values, _ *http.Request) {
		if got := form.Get("scope"); got != "known unknown" {
			t.Errorf("got the scope %q, want both", got)
		}
		fmt.Fprint(w, goodAnswer)
	})
	core, logs := observer.New(zapcore.WarnLevel)
	c := canaryCredentials(tokenPlace)
	c.Scopes = []string{"known", "unknown"}
	wantGranted(t, newLoggingClient(t, c, server, zap.New(core)))
	if got := logs.All(); len(got) != 0 {
		t.Errorf("got %v in the log, want no warning: without a scope, all are granted", got)
	}
}

func TestServerThatTakesOneResource(t *testing.T) {
	server := formServer(func(w http.ResponseWriter, form url.Values, _ *http.Request) {
		if len(form["resource"]) > 1 {
			refuseWith(w, http.StatusBadRequest, "invalid_target")
			return
		}
		fmt.Fprint(w, goodAnswer)
	})
	c := canaryCredentials(tokenPlace)
	c.Resource = []string{"https://a.example.com/"}
	wantGranted(t, newTestClient(t, c, server))
	c.Resource = append(c.Resource, "https://b.example.com/")
	wantRefused(t, newTestClient(t, c, server), "invalid_target", "resource")
}

// A token that is bound to a key must not be sent as a bearer token, which no
// upstream would take.
func TestServerThatIssuesDPoPTokens(t *testing.T) {
	cl := newTestClient(t, canaryCredentials(tokenPlace), answering(http.StatusOK, strings.Replace(goodAnswer, "Bearer", "DPoP", 1)))
	g, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	if g.accessToken != "" {
		t.Errorf("request() = %v, want no token", g)
	}
	if got := wantTokenError(t, err, codeInvalidResponse, true); !strings.Contains(got.Description, "token_type") {
		t.Errorf("request() = %v, want that it is the token_type", err)
	}
}

func TestServerThatWantsDPoP(t *testing.T) {
	server := formServer(func(w http.ResponseWriter, _ url.Values, r *http.Request) {
		if r.Header.Get("DPoP") == "" {
			w.Header().Set("DPoP-Nonce", "n0nce")
			refuseWith(w, http.StatusBadRequest, "use_dpop_nonce")
		}
	})
	cl := newTestClient(t, canaryCredentials(tokenPlace), server)
	wantRefused(t, cl, "use_dpop_nonce", "add dpop")
	if _, _, err := cl.source.Token(t.Context()); err == nil {
		t.Error("Token() = nil, want an error")
	}
	if got := len(server.requests()); got != 2 {
		t.Errorf("got %d requests for two tokens, want 2: to repeat them is no use", got)
	}
}

// Hydra, Glewlwyd, Dex and fosite; RFC 6749 §5.1 has it in any case.
func TestServerThatWritesBearerInLowerCase(t *testing.T) {
	auth := newAuthServer(t)
	auth.script(func(w http.ResponseWriter, r tokenRequest) bool {
		fmt.Fprintf(w, `{"access_token":%q,"token_type":"bearer","expires_in":3600}`, auth.issue(r.client))
		return true
	})
	up := newUpstream(t, auth)
	g := startGateway(t, proxySite(up, auth, ""))
	g.get().want(t, http.StatusOK)
	// To the upstream it is written as RFC 6750 §2.1 has it.
	up.last(t).wantHeader(t, "Authorization", "Bearer canary-token-1-of-gateway")
}

// A token that lives for 5 s and says 4 is used all its life long, and nobody
// waits for the next.
func TestServerThatSaysOneSecondLess(t *testing.T) {
	const life, latency, use = 5 * time.Second, 50 * time.Millisecond, time.Minute
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		until := make(map[string]time.Time)
		server := formServer(func(w http.ResponseWriter, _ url.Values, r *http.Request) {
			mu.Lock()
			token := fmt.Sprint("t", len(until))
			until[token] = time.Now().Add(life)
			mu.Unlock()
			select {
			case <-time.After(latency):
			case <-r.Context().Done():
				return // a renewal may be under way when the test ends
			}
			fmt.Fprintf(w, `{"access_token":%q,"token_type":"bearer","expires_in":%d}`, token, int(life/time.Second)-1)
		})
		cl := newTestClient(t, canaryCredentials(tokenPlace), server)
		for started := time.Now(); time.Since(started) < use; time.Sleep(100 * time.Millisecond) {
			asked := time.Now()
			tok, _, err := cl.source.Token(t.Context())
			if err != nil {
				t.Fatalf("Token() = %v after %v, want no error", err, time.Since(started))
			}
			if took := time.Since(asked); took > 0 && asked != started {
				t.Errorf("Token() took %v after %v, want no wait", took, time.Since(started))
			}
			mu.Lock()
			if left := time.Until(until[tok.value]); left < time.Second {
				t.Errorf("Token() = %s, which lives for another %v, want a second at least", tok.value, left)
			}
			mu.Unlock()
		}
		if got, most := len(server.requests()), int(use/(life/2)); got > most {
			t.Errorf("got %d token requests in %v, want %d at most", got, use, most)
		}
	})
}

// To try one method after the other is no use: the client must be told.
func TestServerThatKnowsTheClientForPostOnly(t *testing.T) {
	server := formServer(func(w http.ResponseWriter, form url.Values, r *http.Request) {
		if _, _, basic := r.BasicAuth(); basic || form.Get("client_secret") != canarySecret {
			refuseWith(w, http.StatusUnauthorized, "invalid_client")
			return
		}
		fmt.Fprint(w, goodAnswer)
	})
	c := canaryCredentials(tokenPlace)
	wantRefused(t, newTestClient(t, c, server), "invalid_client", "auth_method")
	if got := len(server.requests()); got != 1 {
		t.Errorf("got %d requests, want 1", got)
	}
	c.AuthMethod = authPost
	wantGranted(t, newTestClient(t, c, server))
}

// takesAudiences is a token endpoint with metadata that takes JWTs for these.
func takesAudiences(audiences ...string) *publisher {
	p := newPublisher(document(testIssuer, tokenPlace))
	p.publish(tokenPlace, func(w http.ResponseWriter, _ *http.Request) {
		_, form := p.sent()
		aud, ok := assertionClaims(form, assertingSecret)["aud"].(string)
		if !ok || !slices.Contains(audiences, aud) {
			refuseWith(w, http.StatusUnauthorized, "invalid_client")
			return
		}
		_, _ = io.WriteString(w, goodAnswer)
	})
	return p
}

const assertingSettings = "client_id id\nauth_method client_secret_jwt\nclient_secret "

// Hydra and Glewlwyd.
func TestServerThatIsNoAudienceByItsIssuer(t *testing.T) {
	p := takesAudiences(tokenPlace)
	settings := assertingSettings + assertingSecret
	cl, _ := discovering(t, settings+"\ntoken_url "+tokenPlace, p)
	wantGranted(t, cl)
	cl, _ = discovering(t, settings+"\nissuer "+testIssuer, p)
	wantRefused(t, cl, "invalid_client", "assertion_audience")
	cl, _ = discovering(t, settings+"\nissuer "+testIssuer+"\nassertion_audience "+tokenPlace, p)
	wantGranted(t, cl)
}

func TestServerThatIsAudienceByBothNames(t *testing.T) {
	p := takesAudiences(tokenPlace, testIssuer)
	for _, place := range []string{"token_url " + tokenPlace, "issuer " + testIssuer} {
		cl, _ := discovering(t, assertingSettings+assertingSecret+"\n"+place, p)
		wantGranted(t, cl)
	}
}

// Glewlwyd, for a failed authentication as for a scope that is missing. What to
// check can only be guessed.
func TestServerThatRefusesWithoutAWord(t *testing.T) {
	c := canaryCredentials(tokenPlace)
	wantRefused(t, newTestClient(t, c, answering(http.StatusForbidden, "")), codeHTTPStatus, "client_id", "client_secret", "scopes")
	c = asserting()
	wantRefused(t, newTestClient(t, c, answering(http.StatusForbidden, "")), codeHTTPStatus, "client_secret", "assertion_audience", "scopes")
}

// Glewlwyd, if its external URL ends in a slash. The endpoint is where it says.
func TestServerWhoseEndpointHasTwoSlashes(t *testing.T) {
	const endpoint = testIssuer + "//token"
	p := newPublisher(document(testIssuer, endpoint))
	p.publish(endpoint, page(http.StatusOK, goodAnswer))
	for _, place := range []string{"issuer " + testIssuer, "token_url " + endpoint} {
		cl, _ := discovering(t, "client_id id\nclient_secret s\n"+place, p)
		wantGranted(t, cl)
	}
	p.wantAsked(t, "GET "+oauthPlace, "POST "+endpoint, "POST "+endpoint)
}
