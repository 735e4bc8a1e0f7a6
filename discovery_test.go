package outboundauth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// The issuer of these tests, and the pages that its server may have.
const (
	testIssuer  = "https://as.example.com"
	oauthPlace  = testIssuer + "/.well-known/oauth-authorization-server"
	openidPlace = testIssuer + "/.well-known/openid-configuration"
	tokenPlace  = testIssuer + "/token"
	movedPlace  = testIssuer + "/moved/token"

	issuerClient = "issuer " + testIssuer + "\nclient_id gateway\n"
	issuerSecret = issuerClient + "client_secret " + canarySecret + "\n"
)

// A publisher is an authorization server without a network: pages by URL, and
// nothing (404) elsewhere. It notes what it is asked.
type publisher struct {
	mu     sync.Mutex
	pages  map[string]http.HandlerFunc
	asked  []string // method and URL
	header http.Header
	form   url.Values
}

// newPublisher makes a server with this metadata at the place of RFC 8414,
// which issues tokens.
func newPublisher(metadata string) *publisher {
	return &publisher{pages: map[string]http.HandlerFunc{
		oauthPlace: page(http.StatusOK, metadata),
		tokenPlace: page(http.StatusOK, goodAnswer),
		movedPlace: page(http.StatusOK, goodAnswer),
	}}
}

func page(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// refusesConnections is the page of a server that is not there.
func refusesConnections(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// hangs is the page of a server that never answers.
func hangs(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

func redirects(status int, to string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", to)
		w.WriteHeader(status)
	}
}

// RoundTrip implements http.RoundTripper.
func (p *publisher) RoundTrip(req *http.Request) (res *http.Response, err error) {
	at := req.URL.Scheme + "://" + req.Host + req.URL.RequestURI()
	var body []byte
	if req.Body != nil {
		if body, err = io.ReadAll(req.Body); err != nil {
			return nil, err
		}
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.asked = append(p.asked, req.Method+" "+at)
	p.header, p.form = req.Header.Clone(), form
	serve, ok := p.pages[at]
	p.mu.Unlock()
	if !ok {
		serve = http.NotFound
	}

	defer func() {
		if recover() != nil {
			res, err = nil, reverseproxy.NewDialError(syscall.ECONNREFUSED)
		}
	}()
	rec := httptest.NewRecorder()
	serve(rec, req)
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	return rec.Result(), nil
}

// publish replaces a page.
func (p *publisher) publish(at string, serve http.HandlerFunc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pages[at] = serve
}

// sent is what the last request consisted of.
func (p *publisher) sent() (http.Header, url.Values) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.header, p.form
}

// wantAsked fails the test unless these were the requests since the last call.
func (p *publisher) wantAsked(t *testing.T, want ...string) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !slices.Equal(p.asked, want) {
		t.Errorf("got the requests\n%q, want\n%q", p.asked, want)
	}
	p.asked = nil
}

// sortAsked is for requests that are made at the same time.
func (p *publisher) sortAsked() {
	p.mu.Lock()
	defer p.mu.Unlock()
	slices.Sort(p.asked)
}

// document is the metadata of an issuer; more are other members of it.
func document(issuer, tokenEndpoint string, more ...string) string {
	return fmt.Sprintf(`{"issuer":%q,"token_endpoint":%q%s}`, issuer, tokenEndpoint, strings.Join(append([]string{""}, more...), ","))
}

// discovering provisions a client of these settings as Caddy does, but for the
// network.
func discovering(t *testing.T, settings string, p http.RoundTripper) (*client, *observer.ObservedLogs) {
	t.Helper()
	cl := newTransport(t, settings).fallback
	core, logs := observer.New(zapcore.WarnLevel)
	cl.endpoint.transport, cl.endpoint.logger = p, zap.New(core)
	if d := cl.endpoint.discovery; d != nil {
		d.transport, d.logger = p, zap.New(core)
	}
	return cl, logs
}

func TestMetadataIsLookedForAtBothPlaces(t *testing.T) {
	for _, test := range []struct{ issuer, oauth, openid string }{
		{testIssuer, oauthPlace, openidPlace},
		{testIssuer + "/", oauthPlace, openidPlace},
		{testIssuer + ":8443", testIssuer + ":8443/.well-known/oauth-authorization-server", testIssuer + ":8443/.well-known/openid-configuration"},
		{testIssuer + "/tenant", oauthPlace + "/tenant", testIssuer + "/tenant/.well-known/openid-configuration"},
		{testIssuer + "/tenant/", oauthPlace + "/tenant", testIssuer + "/tenant/.well-known/openid-configuration"},
		{testIssuer + "/realms/a/v2.0", oauthPlace + "/realms/a/v2.0", testIssuer + "/realms/a/v2.0/.well-known/openid-configuration"},
		// Paths stay as they are written.
		{testIssuer + "/a%2Fb/c%20d/", oauthPlace + "/a%2Fb/c%20d", testIssuer + "/a%2Fb/c%20d/.well-known/openid-configuration"},
		{testIssuer + "/a%2F", oauthPlace + "/a%2F", testIssuer + "/a%2F/.well-known/openid-configuration"},
		{testIssuer + "/%7Ea/%3F", oauthPlace + "/%7Ea/%3F", testIssuer + "/%7Ea/%3F/.well-known/openid-configuration"},
		{testIssuer + "/ü", oauthPlace + "/%C3%BC", testIssuer + "/%C3%BC/.well-known/openid-configuration"},
		{testIssuer + "/a//b", oauthPlace + "/a//b", testIssuer + "/a//b/.well-known/openid-configuration"},
		{testIssuer + "/a/../b", oauthPlace + "/a/../b", testIssuer + "/a/../b/.well-known/openid-configuration"},
	} {
		for _, phase := range []struct {
			name   string
			places []string // with metadata
			want   []string
		}{
			{"nowhere", nil, []string{"GET " + test.oauth, "GET " + test.openid}},
			{"OpenID Connect", []string{test.openid}, []string{"GET " + test.oauth, "GET " + test.openid, "POST " + tokenPlace}},
			{"both", []string{test.oauth, test.openid}, []string{"GET " + test.oauth, "POST " + tokenPlace}},
		} {
			t.Run(test.issuer+" "+phase.name, func(t *testing.T) {
				p := newPublisher("")
				p.publish(oauthPlace, http.NotFound)
				for _, place := range phase.places {
					p.publish(place, page(http.StatusOK, document(test.issuer, tokenPlace)))
				}
				cl, _ := discovering(t, strings.Replace(issuerSecret, testIssuer, test.issuer, 1), p)
				if _, err := cl.endpoint.request(t.Context()); (err == nil) != (phase.places != nil) {
					t.Errorf("request() = %v with metadata at %q", err, phase.places)
				}
				p.wantAsked(t, phase.want...)
			})
		}
	}
}

// Who publishes metadata need not be who is told the secret.
func TestLookingUpTellsNothing(t *testing.T) {
	p := newPublisher("")
	cl, _ := discovering(t, issuerSecret+"token_request_header X-Api-Key "+canarySecret+"\nparam p "+canarySecret+"\nscopes a", p)
	if _, err := cl.endpoint.request(t.Context()); err == nil {
		t.Error("request() = nil, want an error")
	}
	header, form := p.sent()
	want := http.Header{"Accept": {"application/json"}, "User-Agent": {"caddy-outbound-auth"}}
	if fmt.Sprint(header) != fmt.Sprint(want) || len(form) != 0 {
		t.Errorf("sent the header %v and the form %v, want %v only", header, form, want)
	}
}

// Provisioning happens when a config is merely validated. One that runs asks
// for the metadata with the first token.
func TestIssuerIsAskedWithTheFirstToken(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	var lookups atomic.Int32
	var issuer *httptest.Server
	issuer = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		lookups.Add(1)
		_, _ = io.WriteString(w, document(issuer.URL, auth.URL+"/token"))
	}))
	defer issuer.Close()
	wantLookups := func(when string, want int32) {
		t.Helper()
		if got := lookups.Load(); got != want {
			t.Errorf("got %d requests for metadata %s, want %d", got, when, want)
		}
	}
	site := strings.Replace(proxySite(up, auth, ""), "token_url "+auth.URL+"/token", "issuer "+issuer.URL, 1)

	if err := validateCaddyfile(t, "http://localhost:8080 {\n"+site+"\n}"); err != nil {
		t.Fatal(err)
	}
	_, cleanUp, err := loadSettings(t, up.addr, "issuer "+issuer.URL+"\nclient_id gateway\nclient_secret s")
	if err != nil {
		t.Fatal(err)
	}
	cleanUp()
	wantLookups("while provisioning", 0)
	auth.wantAsked(t, 0)

	g := startGateway(t, site)
	for range 3 {
		g.get().want(t, http.StatusOK)
	}
	wantLookups("with the first token", 1)
	auth.wantAsked(t, 1)
	auth.revoke()
	g.get().want(t, http.StatusOK)
	wantLookups("with the second token", 1)
	auth.wantAsked(t, 2)
}

// Metadata that is old is looked up again beside the token request, which does
// not wait for it.
func TestMetadataIsUsedForADay(t *testing.T) {
	p := newPublisher(document(testIssuer, tokenPlace))
	cl, _ := discovering(t, issuerSecret, p)
	synctest.Test(t, func(t *testing.T) {
		for i, step := range []struct {
			after time.Duration
			want  []string // in any order
		}{
			{0, []string{"GET " + oauthPlace, "POST " + tokenPlace}},
			{0, []string{"POST " + tokenPlace}},
			{24*time.Hour - time.Second, []string{"POST " + tokenPlace}},
			{time.Second, []string{"GET " + oauthPlace, "POST " + tokenPlace}},
			{time.Second, []string{"POST " + movedPlace}},
			{24 * time.Hour, []string{"GET " + oauthPlace, "POST " + movedPlace}},
		} {
			time.Sleep(step.after)
			if _, err := cl.endpoint.request(t.Context()); err != nil {
				t.Errorf("request() = %v, want no error", err)
			}
			synctest.Wait()
			p.sortAsked()
			p.wantAsked(t, step.want...)
			if i == 0 {
				p.publish(oauthPlace, page(http.StatusOK, document(testIssuer, movedPlace)))
			}
		}
	})
}

func TestFailureThatAMovedEndpointExplains(t *testing.T) {
	for _, test := range []struct {
		name  string
		serve http.HandlerFunc
		moved bool
	}{
		{"no connection", refusesConnections, true},
		{"no answer", hangs, true},
		{"404", page(404, "Not Found"), true},
		{"404 with JSON", page(404, `{"message":"no such page"}`), true},
		{"405", page(405, ""), true},
		{"410", page(410, ""), true},
		{"421", page(421, ""), true},
		{"301", redirects(301, movedPlace), true},
		{"303 to a page to sign in", redirects(303, testIssuer+"/login"), true},
		{"308", redirects(308, movedPlace), true},
		{"a page", page(200, "<!doctype html><title>Moved</title>"), true},
		{"another object", page(200, "{}"), true},

		{"invalid_client", page(401, `{"error":"invalid_client"}`), false},
		{"invalid_client with 400", page(400, `{"error":"invalid_client"}`), false},
		{"invalid_scope", page(400, `{"error":"invalid_scope"}`), false},
		{"401 without a reason", page(401, ""), false},
		{"403", page(403, ""), false},
		{"429", page(429, ""), false},
		{"500", page(500, ""), false},
		{"503", page(503, "<!doctype html>"), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPublisher(document(testIssuer, tokenPlace))
			cl, _ := discovering(t, issuerSecret, p)
			synctest.Test(t, func(t *testing.T) {
				request := func() error {
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					defer cancel()
					_, err := cl.endpoint.request(ctx)
					synctest.Wait()
					return err
				}
				if err := request(); err != nil {
					t.Fatalf("request() = %v, want no error", err)
				}
				p.wantAsked(t, "GET "+oauthPlace, "POST "+tokenPlace)
				time.Sleep(metadataPause)
				p.publish(tokenPlace, test.serve)
				p.publish(oauthPlace, page(http.StatusOK, document(testIssuer, movedPlace)))

				err := request()
				if !test.moved {
					if err == nil {
						t.Error("request() = nil, want an error")
					}
					p.wantAsked(t, "POST "+tokenPlace)
					return
				}
				if test.name == "no answer" { // and no time left
					p.wantAsked(t, "POST "+tokenPlace, "GET "+oauthPlace)
					err = request()
					p.wantAsked(t, "POST "+movedPlace)
				} else {
					p.wantAsked(t, "POST "+tokenPlace, "GET "+oauthPlace, "POST "+movedPlace)
				}
				if err != nil {
					t.Errorf("request() = %v, want a token of the new endpoint", err)
				}
			})
		})
	}
}

// An endpoint that fails, and has not moved, does not make the issuer be asked
// all the time.
func TestFailingEndpointIsNotLookedUpAllTheTime(t *testing.T) {
	p := newPublisher(document(testIssuer, tokenPlace))
	p.publish(tokenPlace, http.NotFound)
	cl, _ := discovering(t, issuerSecret, p)
	synctest.Test(t, func(t *testing.T) {
		for i, want := range [][]string{
			{"GET " + oauthPlace, "POST " + tokenPlace},
			{"POST " + tokenPlace},
			{"POST " + tokenPlace, "GET " + oauthPlace},
			{"POST " + tokenPlace},
		} {
			if i%2 == 0 {
				time.Sleep(metadataPause)
			}
			_, err := cl.endpoint.request(t.Context())
			wantTokenError(t, err, codeHTTPStatus, false) // the issuer may be late to say where it is
			p.wantAsked(t, want...)
		}
	})
}

// A look-up for an endpoint that may have moved holds up the error, but not for
// long.
func TestLookupOfAMovedEndpointThatHangs(t *testing.T) {
	p := newPublisher(document(testIssuer, tokenPlace))
	cl, _ := discovering(t, issuerSecret, p)
	synctest.Test(t, func(t *testing.T) {
		if _, err := cl.endpoint.request(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(metadataPause)
		p.publish(tokenPlace, http.NotFound)
		p.publish(oauthPlace, hangs)
		started := time.Now()
		_, err := cl.endpoint.request(t.Context())
		wantTokenError(t, err, codeHTTPStatus, false)
		if took := time.Since(started); took != metadataPatience {
			t.Errorf("request() took %v, want %v", took, metadataPatience)
		}
		time.Sleep(metadataTimeout) // it ends
	})
}

// Another request may find that the endpoint fails, and look it up: this one
// goes on with what is known.
func TestFailedLookupOfAnotherRequest(t *testing.T) {
	p := newPublisher(document(testIssuer, tokenPlace))
	cl, _ := discovering(t, issuerSecret, p)
	for _, serve := range []http.HandlerFunc{page(http.StatusOK, document(testIssuer, tokenPlace)), http.NotFound, refusesConnections} {
		p.publish(oauthPlace, serve)
		doubt(cl)
		if _, err := cl.endpoint.request(t.Context()); err != nil {
			t.Errorf("request() = %v, want a token of the endpoint known before", err)
		}
	}
}

// A secret that can't be read, or signs nothing, says nothing about the
// endpoint.
func TestUnusableSecretIsNoReasonToLookUp(t *testing.T) {
	p := newPublisher(document(testIssuer, tokenPlace))
	t.Setenv("TEST_ISSUER_SECRET", assertingSecret)
	cl, _ := discovering(t, issuerClient+"auth_method client_secret_jwt\nclient_secret {env.TEST_ISSUER_SECRET}", p)
	synctest.Test(t, func(t *testing.T) {
		for _, secret := range []string{assertingSecret, "", assertingSecret, "short", assertingSecret} {
			t.Setenv("TEST_ISSUER_SECRET", secret)
			if _, err := cl.endpoint.request(t.Context()); (err == nil) != (secret == assertingSecret) {
				t.Errorf("request() = %v with the secret %q", err, secret)
			}
			time.Sleep(metadataPause)
		}
	})
	p.wantAsked(t, "GET "+oauthPlace, "POST "+tokenPlace, "POST "+tokenPlace, "POST "+tokenPlace)
}

func TestKnownEndpointIsKeptWhenLookingUpFails(t *testing.T) {
	for _, test := range []struct {
		name          string
		oauth, openid http.HandlerFunc
	}{
		{"nothing there", http.NotFound, http.NotFound},
		{"the server is down", refusesConnections, refusesConnections},
		{"it fails", page(500, ""), page(500, "")},
		{"it hangs", hangs, hangs},
		{"it hangs at the second place", http.NotFound, hangs},
		{"a page", page(200, "<!doctype html>"), http.NotFound},
		{"another issuer", page(200, document("https://evil.example", movedPlace)), http.NotFound},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPublisher(document(testIssuer, tokenPlace))
			cl, logs := discovering(t, issuerSecret, p)
			synctest.Test(t, func(t *testing.T) {
				request := func(place string) {
					t.Helper()
					started := time.Now()
					if _, err := cl.endpoint.request(t.Context()); err != nil {
						t.Errorf("request() = %v, want no error", err)
					}
					if took := time.Since(started); took != 0 {
						t.Errorf("request() took %v, want that it waits for nothing", took)
					}
					synctest.Wait()
					p.mu.Lock()
					defer p.mu.Unlock()
					if !slices.Contains(p.asked, "POST "+place) {
						t.Errorf("got the requests %q, want one to %s", p.asked, place)
					}
					p.asked = nil
				}
				request(tokenPlace)
				time.Sleep(25 * time.Hour)
				p.publish(oauthPlace, test.oauth)
				p.publish(openidPlace, test.openid)
				request(tokenPlace)
				time.Sleep(metadataTimeout)
				request(tokenPlace)
				if got := logs.All(); len(got) != 1 || !strings.Contains(got[0].Message, "the one known before is used") {
					t.Errorf("got %v in the log, want one warning", got)
				} else {
					wantNoCanaryIn(t, fmt.Sprint(got[0].ContextMap()))
				}

				// It is tried again after a while.
				p.publish(oauthPlace, page(http.StatusOK, document(testIssuer, movedPlace)))
				request(tokenPlace)
				time.Sleep(5 * time.Minute)
				request(tokenPlace)
				request(movedPlace)
			})
		})
	}
}

// A place that hangs leaves time for the other.
func TestFirstPlaceThatHangs(t *testing.T) {
	p := newPublisher("")
	p.publish(oauthPlace, hangs)
	p.publish(openidPlace, page(http.StatusOK, document(testIssuer, tokenPlace)))
	cl, _ := discovering(t, issuerSecret, p)
	synctest.Test(t, func(t *testing.T) {
		started := time.Now()
		if _, err := cl.endpoint.request(t.Context()); err != nil {
			t.Errorf("request() = %v, want a token", err)
		}
		if took := time.Since(started); took != metadataTimeout/2 {
			t.Errorf("request() took %v, want %v", took, metadataTimeout/2)
		}
		p.wantAsked(t, "GET "+oauthPlace, "GET "+openidPlace, "POST "+tokenPlace)
	})
}

// Without metadata, a token request waits as long as it may, and the look-up
// goes on for the next.
func TestFirstLookupThatHangs(t *testing.T) {
	for _, test := range []struct{ timeout, took time.Duration }{
		{metadataTimeout / 2, metadataTimeout / 2},
		{2 * metadataTimeout, metadataTimeout},
	} {
		t.Run(test.timeout.String(), func(t *testing.T) {
			p := newPublisher("")
			p.publish(oauthPlace, hangs)
			p.publish(openidPlace, hangs)
			cl, _ := discovering(t, issuerSecret, p)
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), test.timeout)
				defer cancel()
				started := time.Now()
				_, err := cl.endpoint.request(ctx)
				got := wantTokenError(t, err, codeTimeout, false)
				if took := time.Since(started); took != test.took || got.Endpoint != "as.example.com" {
					t.Errorf("request() = %v after %v, want that as.example.com gave no answer in %v", err, took, test.took)
				}
				time.Sleep(metadataTimeout)
				p.wantAsked(t, "GET "+oauthPlace, "GET "+openidPlace)
			})
		})
	}
}

// Many clients may ask at once; one look-up that failed answers for all.
func TestFailedLookupAnswersForAMoment(t *testing.T) {
	p := newPublisher("")
	cl, _ := discovering(t, issuerSecret, p)
	synctest.Test(t, func(t *testing.T) {
		for range 10 {
			_, err := cl.endpoint.request(t.Context())
			wantTokenError(t, err, codeInvalidResponse, false)
		}
		p.wantAsked(t, "GET "+oauthPlace, "GET "+openidPlace)
		time.Sleep(metadataErrorLifetime)
		p.publish(oauthPlace, page(http.StatusOK, document(testIssuer, tokenPlace)))
		if _, err := cl.endpoint.request(t.Context()); err != nil {
			t.Errorf("request() = %v, want a token", err)
		}
	})
}

// Names of this machine are not for issuers elsewhere to give.
func TestIssuerCannotLeadToThisMachine(t *testing.T) {
	for _, host := range []string{"localhost", "LOCALHOST.", "api.localhost", "127.0.0.1", "127.9.9.9", "[::1]", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]"} {
		p := newPublisher(document(testIssuer, "https://"+host+":2019/stop"))
		cl, _ := discovering(t, issuerSecret, p)
		_, err := cl.endpoint.request(t.Context())
		if got := wantTokenError(t, err, codeInvalidResponse, false); !strings.Contains(got.Description, "on this machine") {
			t.Errorf("%s: got %v, want that it is on this machine", host, err)
		}
	}
}

func TestLookupOutlivesTheRequestThatStartedIt(t *testing.T) {
	p := newPublisher("")
	p.publish(oauthPlace, func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(3 * time.Second)
		page(http.StatusOK, document(testIssuer, tokenPlace))(w, r)
	})
	cl, _ := discovering(t, issuerSecret, p)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := cl.endpoint.request(ctx)
		wantTokenError(t, err, codeTimeout, false)
		started := time.Now()
		if _, err := cl.endpoint.request(t.Context()); err != nil {
			t.Errorf("request() = %v, want no error", err)
		}
		if took := time.Since(started); took != 2*time.Second {
			t.Errorf("request() took %v, want the 2s that were left of the look-up", took)
		}
		p.wantAsked(t, "GET "+oauthPlace, "POST "+tokenPlace)
	})
}

func TestUnusableMetadata(t *testing.T) {
	good := document(testIssuer, tokenPlace)
	padded := func(size int) string { return strings.Repeat(" ", size-len(good)) + good }
	const unreadable = "the issuer's metadata is not a JSON object that can be read"
	const other = "the metadata is that of another issuer"
	const endpoint = "the token_endpoint in the issuer's metadata: "
	for _, test := range []struct {
		name          string
		oauth, openid http.HandlerFunc // nil: 404
		code          string           // "": it can be used
		permanent     bool
		want          string // in the description
	}{
		{"nowhere", nil, nil, codeHTTPStatus, true, "there is no metadata"},
		{"no connection", refusesConnections, refusesConnections, codeNetwork, false, "looking up the token endpoint"},
		{"no connection to the second place", nil, refusesConnections, codeNetwork, false, "looking up the token endpoint"},
		{"the first connection broke", refusesConnections, page(200, good), "", false, ""},
		{"the server is overloaded", page(503, ""), page(503, ""), codeHTTPStatus, false, ""},
		{"overloaded at the second place", nil, page(503, ""), codeHTTPStatus, false, ""},
		{"overloaded at the first place", page(503, ""), nil, codeHTTPStatus, false, ""},
		{"overloaded, or a fault", page(503, ""), page(200, "{"), codeInvalidResponse, false, unreadable},
		{"throttled", page(429, ""), page(429, ""), codeHTTPStatus, false, ""},
		{"not allowed", page(403, ""), page(403, ""), codeHTTPStatus, true, ""},
		{"an error at the first place only", page(500, ""), page(200, good), "", false, ""},
		{"redirected", redirects(302, openidPlace), nil, codeHTTPStatus, true, ""},
		{"redirected from the first place", redirects(302, movedPlace), page(200, good), "", false, ""},

		{"a page", page(200, "<!doctype html><title>"+canarySecret), nil, codeInvalidResponse, false, unreadable},
		{"a page at the first place only", page(200, "<!doctype html>"), page(200, good), "", false, ""},
		{"a page at the second place only", nil, page(200, "<!doctype html>"), codeInvalidResponse, false, unreadable},
		{"empty", page(200, ""), nil, codeInvalidResponse, false, unreadable},
		{"another status with a document", page(201, good), nil, codeHTTPStatus, true, ""},
		{"an array", page(200, "["+good+"]"), nil, codeInvalidResponse, false, unreadable},
		{"two documents", page(200, good+good), nil, codeInvalidResponse, false, unreadable},
		{"1 MiB", page(200, padded(1<<20)), nil, "", false, ""},
		{"more than 1 MiB", page(200, padded(1<<20+1)), nil, codeInvalidResponse, false, unreadable},
		{"endless", func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, good+strings.Repeat(" ", 8<<20))
		}, nil, codeInvalidResponse, false, unreadable},

		{"another issuer", page(200, document("https://evil.example", tokenPlace)), nil, codeConfiguration, true, other + `, "https://evil.example"`},
		{"another issuer at the first place only", page(200, document("https://evil.example", movedPlace)), page(200, good), "", false, ""},
		{"another issuer at the second place only", nil, page(200, document("https://evil.example", movedPlace)), codeConfiguration, true, other},
		{"the issuer with a slash", page(200, document(testIssuer+"/", tokenPlace)), nil, codeConfiguration, true, other},
		{"the issuer in capitals", page(200, document("https://AS.example.com", tokenPlace)), nil, codeConfiguration, true, other},
		{"the issuer with its port", page(200, document(testIssuer+":443", tokenPlace)), nil, codeConfiguration, true, other},
		{"an issuer below", page(200, document(testIssuer+"/tenant", tokenPlace)), nil, codeConfiguration, true, other},
		{"no issuer", page(200, `{"token_endpoint":"`+tokenPlace+`"}`), nil, codeInvalidResponse, false, "names no issuer"},
		{"null", page(200, "null"), nil, codeInvalidResponse, false, "is not a JSON object"},
		{"an issuer that is no string", page(200, `{"issuer":["`+testIssuer+`"],"token_endpoint":"`+tokenPlace+`"}`), nil, codeInvalidResponse, false, unreadable},

		{"no endpoint", page(200, `{"issuer":"`+testIssuer+`"}`), nil, codeInvalidResponse, false, endpoint},
		{"endpoint null", page(200, `{"issuer":"`+testIssuer+`","token_endpoint":null}`), nil, codeInvalidResponse, false, endpoint},
		{"endpoint number", page(200, `{"issuer":"`+testIssuer+`","token_endpoint":1}`), nil, codeInvalidResponse, false, unreadable},
		{"endpoint empty", page(200, document(testIssuer, "")), nil, codeInvalidResponse, false, endpoint},
		{"endpoint relative", page(200, document(testIssuer, "/token")), nil, codeInvalidResponse, false, endpoint + "must be an absolute URL"},
		{"endpoint without a scheme", page(200, document(testIssuer, "//as.example.com/token")), nil, codeInvalidResponse, false, endpoint + "must be an absolute URL"},
		{"endpoint without TLS", page(200, document(testIssuer, "http://as.example.com/token")), nil, codeInvalidResponse, false, endpoint + "is not encrypted, though the issuer is"},
		{"endpoint with a password", page(200, document(testIssuer, "https://id:"+canarySecret+"@as.example.com/token")), nil, codeInvalidResponse, false, endpoint + "must hold no user and password"},
		{"endpoint with a fragment", page(200, document(testIssuer, tokenPlace+"#x")), nil, codeInvalidResponse, false, endpoint + "must have no fragment"},
		{"endpoint of another kind", page(200, document(testIssuer, "ftp://as.example.com/token")), nil, codeInvalidResponse, false, endpoint},
		{"endpoint that is no URL", page(200, document(testIssuer, "https://["+canarySecret)), nil, codeInvalidResponse, false, endpoint},
		{"endpoint on this machine", page(200, document(testIssuer, "https://127.0.0.1:2019/load")), nil, codeInvalidResponse, false, endpoint + "is on this machine, though the issuer is not"},
		{"endpoint on this machine by name", page(200, document(testIssuer, "https://LocalHost/token")), nil, codeInvalidResponse, false, endpoint + "is on this machine"},
		{"endpoint on this machine without TLS", page(200, document(testIssuer, "http://[::1]/token")), nil, codeInvalidResponse, false, endpoint},
		{"endpoint on another host", page(200, document(testIssuer, "https://token.example.net/")), nil, "", false, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPublisher("")
			p.publish("https://token.example.net/", page(http.StatusOK, goodAnswer))
			delete(p.pages, oauthPlace)
			if test.oauth != nil {
				p.publish(oauthPlace, test.oauth)
			}
			if test.openid != nil {
				p.publish(openidPlace, test.openid)
			}
			cl, _ := discovering(t, issuerSecret, p)
			_, err := cl.endpoint.request(t.Context())
			if test.code == "" {
				if err != nil {
					t.Errorf("request() = %v, want no error", err)
				}
				return
			}
			got := wantTokenError(t, err, test.code, test.permanent)
			if !strings.Contains(got.Description, test.want) {
				t.Errorf("request() = %v, want %q in it", err, test.want)
			}
			if got.Hint == "" && got.permanent {
				t.Errorf("request() = %v, want what to change", err)
			}
			wantNoCanary(t, err)
			for _, asked := range p.asked {
				if !strings.HasPrefix(asked, "GET "+testIssuer+"/.well-known/") {
					t.Errorf("got the request %q, want none but for the metadata", asked)
				}
			}
		})
	}
}

// That secrets may go unencrypted is for what the config names, not for what a
// server does.
func TestEncryptedIssuerNamesNoEndpointWithoutTLS(t *testing.T) {
	const plain = "http://as.example.com"
	p := newPublisher(document(testIssuer, plain+"/token"))
	p.publish(plain+"/token", page(http.StatusOK, goodAnswer))
	p.publish(plain+"/.well-known/oauth-authorization-server", page(http.StatusOK, document(plain, plain+"/token")))
	cl, _ := discovering(t, issuerSecret+"insecure_plaintext token_url", p)
	_, err := cl.endpoint.request(t.Context())
	if got := wantTokenError(t, err, codeInvalidResponse, false); !strings.Contains(got.Description, "is not encrypted, though the issuer is") {
		t.Errorf("request() = %v, want that the endpoint is not encrypted", err)
	}
	cl, _ = discovering(t, strings.Replace(issuerSecret, testIssuer, plain, 1)+"insecure_plaintext token_url", p)
	if _, err := cl.endpoint.request(t.Context()); err != nil {
		t.Errorf("request() = %v from an issuer that is not encrypted either, want no error", err)
	}
}

// Whoever has published a mistake mends it, and nobody has to wait for a day.
func TestUnusableEndpointIsLookedUpAgain(t *testing.T) {
	p := newPublisher(document(testIssuer, "/token"))
	cl, _ := discovering(t, issuerSecret, p)
	synctest.Test(t, func(t *testing.T) {
		_, err := cl.endpoint.request(t.Context())
		wantTokenError(t, err, codeInvalidResponse, false)
		p.publish(oauthPlace, page(http.StatusOK, document(testIssuer, tokenPlace)))
		for started := time.Now(); err != nil; _, err = cl.endpoint.request(t.Context()) {
			if time.Since(started) > 2*metadataPause {
				t.Fatalf("request() = %v after %v, want no error", err, time.Since(started))
			}
			time.Sleep(time.Second)
		}
	})
}

func TestThrottledLookupSaysHowLong(t *testing.T) {
	p := newPublisher("")
	p.publish(oauthPlace, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "120")
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	cl, _ := discovering(t, issuerSecret, p)
	_, err := cl.endpoint.request(t.Context())
	if got := retryAfter(err); got != 2*time.Minute {
		t.Errorf("retryAfter() = %v of %v, want 2m", got, err)
	}
}

// doubt makes the next token request look the metadata up again.
func doubt(cl *client) {
	i := cl.endpoint.discovery.issuerMetadata
	i.mu.Lock()
	defer i.mu.Unlock()
	i.doubtful = true
}

func TestWhatTheServerDoesNotListIsWarnedOfOnce(t *testing.T) {
	dir := t.TempDir()
	newAuthority(t, "clients").issue(t, "gateway").write(t, dir)
	certificate := fmt.Sprintf("client_certificate %[1]s/client.crt %[1]s/client.key\n", dir)
	key := "private_key " + dir + "/client.key\n"
	methods := func(names ...string) string {
		return fmt.Sprintf(`"token_endpoint_auth_methods_supported":%s`, encode(t, names))
	}
	algs := func(names ...string) string {
		return fmt.Sprintf(`"token_endpoint_auth_signing_alg_values_supported":%s`, encode(t, names))
	}
	for _, test := range []struct {
		name, settings string
		metadata       []string
		setting        string // that is warned of; "": none
		supported      string
	}{
		{"nothing listed", "client_secret s", nil, "", ""},
		{"an empty list", "client_secret s", []string{methods()}, "", ""},
		{"listed", "client_secret s", []string{methods(authPost, authBasic)}, "", ""},
		{"basic not listed", "client_secret s", []string{methods(authPost, authKeyJWT)}, "auth_method", authPost + " " + authKeyJWT},
		{"post not listed", "client_secret s\nauth_method client_secret_post", []string{methods(authBasic)}, "auth_method", authBasic},
		{"a part of a name", "client_secret s", []string{methods("client_secret")}, "auth_method", "client_secret"},
		{"private_key_jwt not listed", key, []string{methods(authBasic), algs("ES256")}, "auth_method", authBasic},
		{"tls_client_auth listed", certificate, []string{methods(authTLS)}, "", ""},
		{"tls_client_auth listed as self-signed", certificate, []string{methods("self_signed_tls_client_auth")}, "", ""},
		{"tls_client_auth not listed", certificate, []string{methods(authBasic)}, "auth_method", authBasic},
		{"self-signed is no other method", "client_secret s", []string{methods("self_signed_tls_client_auth")}, "auth_method", "self_signed_tls_client_auth"},
		{"no authentication", "auth_method none", []string{methods(authBasic)}, "", ""},
		{"authenticated by the grant", key + "grant_type jwt_bearer", []string{methods(authBasic)}, "", ""},

		{"algorithm listed", key + "signing_alg ES256", []string{methods(authKeyJWT), algs("RS256", "ES256")}, "", ""},
		{"algorithm not listed", key + "signing_alg ES256", []string{methods(authKeyJWT), algs("RS256", "PS256")}, "signing_alg", "RS256 PS256"},
		{"no algorithm listed", key + "signing_alg ES256", []string{methods(authKeyJWT)}, "", ""},
		{"algorithm of the key listed", key, []string{methods(authKeyJWT), algs("RS256", "ES256")}, "", ""},
		{"algorithm of a secret", "auth_method client_secret_jwt\nsigning_alg HS512\nclient_secret " + strings.Repeat("s", 64), []string{algs("HS256")}, "signing_alg", "HS256"},
		{"algorithms of others", "client_secret s", []string{algs("RS256")}, "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPublisher(document(testIssuer, tokenPlace, test.metadata...))
			cl, logs := discovering(t, issuerClient+test.settings, p)
			request := func() {
				t.Helper()
				doubt(cl)
				if _, err := cl.endpoint.request(t.Context()); err != nil {
					t.Errorf("request() = %v, want no error: it is tried all the same", err)
				}
			}
			for range 3 {
				request()
			}
			if test.setting == "" {
				if got := logs.All(); len(got) != 0 {
					t.Errorf("got %v in the log, want no warning", got)
				}
				return
			}
			got := logs.All()
			if len(got) != 1 {
				t.Fatalf("got %v in the log, want one warning", got)
			}
			fields := got[0].ContextMap()
			if !strings.HasSuffix(got[0].Message, "check "+test.setting) || fields["supported"] != test.supported ||
				fields["issuer"] != testIssuer || fields["client_id"] != "gateway" {
				t.Errorf("got %q %v in the log, want that %s may be one of %s", got[0].Message, fields, test.setting, test.supported)
			}

			// Another list is news.
			p.publish(oauthPlace, page(http.StatusOK, document(testIssuer, tokenPlace,
				methods("of"), algs("another"), `"grant_types_supported":["client_credentials"]`)))
			request()
			request()
			if got := logs.Len(); got != 2 {
				t.Errorf("got %d warnings after the list has changed, want 2", got)
			}
		})
	}
}

func TestEndpointForClientsWithACertificate(t *testing.T) {
	dir := t.TempDir()
	newAuthority(t, "clients").issue(t, "gateway").write(t, dir)
	certificate := fmt.Sprintf("client_certificate %[1]s/client.crt %[1]s/client.key\n", dir)
	const aliasPlace = "https://mtls.example.com/token"
	alias := func(endpoint string) string {
		return fmt.Sprintf(`"mtls_endpoint_aliases":{"token_endpoint":%q}`, endpoint)
	}
	for _, test := range []struct{ name, settings, more, want string }{
		{"certificate", certificate, alias(aliasPlace), aliasPlace},
		{"certificate beside a secret", certificate + "client_secret s", alias(aliasPlace), aliasPlace},
		{"certificate, no alias", certificate, `"x":1`, tokenPlace},
		{"certificate, another alias", certificate, `"mtls_endpoint_aliases":{"revocation_endpoint":"` + aliasPlace + `"}`, tokenPlace},
		{"certificate, alias null", certificate, `"mtls_endpoint_aliases":null`, tokenPlace},
		{"certificate, alias without TLS", certificate, alias("http://mtls.example.com/token"), ""},
		{"certificate, alias relative", certificate, alias("/token"), ""},
		{"no certificate", "client_secret s", alias(aliasPlace), tokenPlace},
		{"no certificate, alias without TLS", "client_secret s", alias("http://mtls.example.com/token"), tokenPlace},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPublisher(document(testIssuer, tokenPlace, test.more))
			p.publish(aliasPlace, page(http.StatusOK, goodAnswer))
			cl, _ := discovering(t, issuerClient+test.settings, p)
			_, err := cl.endpoint.request(t.Context())
			if test.want == "" {
				wantTokenError(t, err, codeInvalidResponse, false)
				p.wantAsked(t, "GET "+oauthPlace)
				return
			}
			if err != nil {
				t.Errorf("request() = %v, want no error", err)
			}
			p.wantAsked(t, "GET "+oauthPlace, "POST "+test.want)
		})
	}
}

// With an issuer, it is the audience of the client's JWT, and not where that
// happens to be sent (draft-ietf-oauth-rfc7523bis §4).
func TestAssertionIsMeantForTheIssuer(t *testing.T) {
	dir := t.TempDir()
	pair := newAuthority(t, "clients").issue(t, "gateway")
	pair.write(t, dir)
	key := "client_id gateway\nprivate_key " + dir + "/client.key\n"
	for _, test := range []struct{ name, settings, aud, typ string }{
		{"issuer", key + "issuer " + testIssuer, testIssuer, "client-authentication+jwt"},
		{"token_url", key + "token_url " + tokenPlace, tokenPlace, "JWT"},
		{"issuer, overridden", key + "issuer " + testIssuer + "\nassertion_audience " + tokenPlace + "\nassertion_typ JWT", tokenPlace, "JWT"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPublisher(document(testIssuer, tokenPlace))
			cl, _ := discovering(t, test.settings, p)
			if _, err := cl.endpoint.request(t.Context()); err != nil {
				t.Fatalf("request() = %v, want no error", err)
			}
			_, form := p.sent()
			signed, err := jose.ParseSigned(form.Get("client_assertion"), []jose.SignatureAlgorithm{jose.ES256})
			if err != nil {
				t.Fatalf("the client_assertion of %v: %v", form, err)
			}
			payload, err := signed.Verify(pair.leaf.PublicKey)
			if err != nil {
				t.Fatalf("Verify() = %v, want no error", err)
			}
			if typ := signed.Signatures[0].Header.ExtraHeaders[jose.HeaderType]; typ != test.typ {
				t.Errorf("typ = %v, want %s", typ, test.typ)
			}
			var claims map[string]any
			if err := json.Unmarshal(payload, &claims); err != nil {
				t.Fatal(err)
			}
			if claims["aud"] != test.aud { // a string: a list may name others
				t.Errorf("aud = %v, want %s", claims["aud"], test.aud)
			}
		})
	}
}

// Clients of one issuer share what it publishes. With -race.
func TestDiscoveryIsSafeForConcurrentUse(t *testing.T) {
	p := newPublisher(document(testIssuer, tokenPlace, `"token_endpoint_auth_methods_supported":["none"]`))
	released := make(chan struct{})
	p.publish(oauthPlace, func(w http.ResponseWriter, r *http.Request) {
		<-released
		page(http.StatusOK, document(testIssuer, tokenPlace))(w, r)
	})
	one, _ := discovering(t, issuerSecret, p)
	other, _ := discovering(t, issuerSecret+"scopes other", p)
	var wg sync.WaitGroup
	ask := func(n int, doubts bool) {
		for i := range n {
			d := []*client{one, other}[i%2].endpoint.discovery
			wg.Go(func() {
				if doubts {
					doubt(one)
				}
				if u, err := d.tokenEndpoint(t.Context()); err != nil || u.String() != tokenPlace {
					t.Errorf("tokenEndpoint() = %v, %v, want %s", u, err, tokenPlace)
				}
				d.expire()
				_ = one.endpoint.knownURL()
			})
		}
	}
	ask(8, false)
	close(released)
	wg.Wait()
	ask(1, false)
	wg.Wait()
	p.wantAsked(t, "GET "+oauthPlace)
	ask(100, true)
	wg.Wait()
}

// What an issuer has published outlives a reload, and goes with the last
// config that needs it.
func TestMetadataOutlivesAReload(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	var lookups atomic.Int32
	var issuer *httptest.Server
	issuer = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		lookups.Add(1)
		_, _ = io.WriteString(w, document(issuer.URL, auth.URL+"/token"))
	}))
	defer issuer.Close()
	site := func(settings string) string {
		return strings.Replace(proxySite(up, auth, settings), "token_url "+auth.URL+"/token", "issuer "+issuer.URL, 1)
	}
	g := startGateway(t, site(""))
	g.get().want(t, http.StatusOK)
	g.load(site("scopes other")) // another token
	// Caddy may drop a connection when it hands over a listener.
	eventually(t, func() bool { return g.get().status == http.StatusOK }, "an answer after the reload")
	auth.wantAsked(t, 2)
	if got := lookups.Load(); got != 1 {
		t.Errorf("got %d requests for metadata, want 1", got)
	}
	g.load("respond gone")
	eventually(t, func() bool {
		left := 0
		issuers.Range(func(any, any) bool { left++; return true })
		return left == 0
	}, "the end of the metadata that nobody needs")
	wantNothingLeft(t)
}

// loadError is why a Caddyfile does not load, whether that is seen when it is
// adapted or when it is provisioned.
func loadError(t *testing.T, source string) error {
	t.Helper()
	if _, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(source), nil); err != nil {
		return err
	}
	return validateCaddyfile(t, source)
}

func TestIssuerIsCheckedAtLoad(t *testing.T) {
	t.Setenv("TEST_ISSUER", testIssuer+"/tenant")
	t.Setenv("TEST_BAD_ISSUER", testIssuer+"/?"+canarySecret)
	for _, test := range []struct{ issuer, want string }{
		{testIssuer, ""},
		{"http://127.0.0.1:1/tenant", ""},
		{"{env.TEST_ISSUER}", ""},
		{"https://as.example.com/{env.TEST_CLIENT_ID}", "issuer: evaluated placeholder {env.TEST_CLIENT_ID} is empty"},
		{"{env.TEST_BAD_ISSUER}", "issuer: must have no query and no fragment (RFC 8414 section 2)"},
		{"{http.request.host}", "issuer: unrecognized placeholder {http.request.host}"},
		{"as.example.com", "issuer: must be an absolute URL"},
		{"/tenant", "issuer: must be an absolute URL"},
		{"ftp://as.example.com", "issuer: must be an absolute URL"},
		{testIssuer + "?tenant=" + canarySecret, "issuer: must have no query"},
		{testIssuer + "?", "issuer: must have no query"},
		{`"` + testIssuer + `#` + canarySecret + `"`, "issuer: must have no query and no fragment"},
		{"https://id:" + canarySecret + "@as.example.com", "issuer: must hold no user and password"},
		{"http://as.example.com", "issuer: the client's credentials would go to as.example.com unencrypted"},
		{testIssuer + "\ntoken_url " + tokenPlace, "issuer: finds the token endpoint that token_url names already; remove one of the two"},
	} {
		err := loadError(t, proxyConfig("127.0.0.1:9000", "client_id gateway\nclient_secret secret\nissuer "+test.issuer))
		wantError(t, err, test.want)
		if err != nil {
			wantNoCanaryIn(t, err.Error())
		}
	}
	insecure := "client_id gateway\nclient_secret secret\ninsecure_plaintext token_url\nissuer http://as.example.com"
	wantError(t, validateCaddyfile(t, proxyConfig("127.0.0.1:9000", insecure)), "")
}

func TestIssuerFromAPlaceholder(t *testing.T) {
	t.Setenv("TEST_ISSUER", testIssuer)
	p := newPublisher(document(testIssuer, tokenPlace))
	cl, _ := discovering(t, strings.Replace(issuerSecret, testIssuer, "{env.TEST_ISSUER}", 1), p)
	t.Setenv("TEST_ISSUER", "https://another.example.com") // it is read once
	if _, err := cl.endpoint.request(t.Context()); err != nil {
		t.Errorf("request() = %v, want no error", err)
	}
	p.wantAsked(t, "GET "+oauthPlace, "POST "+tokenPlace)
}

// Whatever a server publishes, the client's secret goes nowhere that the
// config would not allow as token_url.
func FuzzMetadata(f *testing.F) {
	for _, seed := range []string{
		document(testIssuer, tokenPlace),
		document(testIssuer, "http://127.0.0.1/token"),
		document(testIssuer, "https://127.0.0.1/token"),
		document(testIssuer, "http://as.example.com/token"),
		document(testIssuer, "https://id:secret@as.example.com/token#x"),
		document(testIssuer, "https:as.example.com"),
		document(testIssuer, "https://as.example.com\\@evil.example/"),
		document(testIssuer, tokenPlace, `"mtls_endpoint_aliases":{"token_endpoint":"http://evil.example"}`),
		document("https://evil.example", tokenPlace),
		`{"issuer":"` + testIssuer + `","token_endpoint":"` + tokenPlace + `","token_endpoint_auth_methods_supported":["a\nb"]}`,
		"null", "[]", "<!doctype html>", "",
	} {
		f.Add(seed, false)
		f.Add(seed, true)
	}
	issuer, err := parseIssuer(testIssuer)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, body string, withCertificate bool) {
		c := &Credentials{Issuer: testIssuer, ClientID: "gateway", ClientSecret: "s"}
		if withCertificate {
			c.ClientCertificate = new(ClientCertificate)
		}
		core, logs := observer.New(zapcore.WarnLevel)
		d := &discovery{
			issuer: issuer, credentials: c, logger: zap.New(core), issuerMetadata: new(issuerMetadata),
			permit: func(u *url.URL) error { return checkPlaintext(u, false) },
			transport: roundTripFunc(func(*http.Request) (*http.Response, error) {
				return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(body))}, nil
			}),
		}
		u, err := d.tokenEndpoint(t.Context())
		for _, entry := range logs.All() {
			if text := fmt.Sprint(entry.ContextMap()); strings.ContainsAny(text, "\r\n") {
				t.Errorf("got %q in the log, want one line", text)
			}
		}
		if err != nil {
			if _, ok := errors.AsType[*tokenError](err); !ok {
				t.Errorf("tokenEndpoint() = %v (%T), want a token error", err, err)
			}
			wantNoCanary(t, err)
			return
		}
		addr, _ := netip.ParseAddr(u.Hostname())
		local := strings.EqualFold(u.Hostname(), "localhost") || addr.Unmap().IsLoopback()
		if u.Hostname() == "" || local || u.Scheme != "https" || u.User != nil || u.Fragment != "" {
			t.Errorf("tokenEndpoint() = %v, want a URL that token_url may be, and not of this machine", u)
		}
		var published struct {
			Issuer string `json:"issuer"`
		}
		if err := json.Unmarshal([]byte(body), &published); err != nil || published.Issuer != testIssuer {
			t.Errorf("tokenEndpoint() = %v of another issuer, %q", u, published.Issuer)
		}
	})
}

// Metadata without a usable token_endpoint does not take the place of metadata
// that has one.
func TestKnownEndpointIsKept(t *testing.T) {
	for name, metadata := range map[string]string{
		"no endpoint":             `{"issuer":"` + testIssuer + `"}`,
		"an endpoint without TLS": document(testIssuer, "http://as.example.com/token"),
	} {
		t.Run(name, func(t *testing.T) {
			p := newPublisher(document(testIssuer, tokenPlace))
			cl, logs := discovering(t, issuerSecret, p)
			synctest.Test(t, func(t *testing.T) {
				for range 3 {
					if _, err := cl.endpoint.request(t.Context()); err != nil {
						t.Errorf("request() = %v, want a token of the endpoint known before", err)
					}
					synctest.Wait()
					p.publish(oauthPlace, page(http.StatusOK, metadata))
					time.Sleep(25 * time.Hour)
				}
				if logs.Len() == 0 {
					t.Error("got nothing in the log, want a warning")
				}
			})
		})
	}
}
