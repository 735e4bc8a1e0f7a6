package outboundauth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

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
			if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
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
					_, err := cl.endpoint.locateAndRequest(ctx, nil)
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
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
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
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(metadataPause)
		p.publish(tokenPlace, http.NotFound)
		p.publish(oauthPlace, hangs)
		started := time.Now()
		_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
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
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
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
			if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); (err == nil) != (secret == assertingSecret) {
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
		{"it redirects to the secret", redirects(302, "https://evil.example/"+canarySecret), http.NotFound},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPublisher(document(testIssuer, tokenPlace))
			cl, logs := discovering(t, issuerSecret, p)
			synctest.Test(t, func(t *testing.T) {
				request := func(place string) {
					t.Helper()
					started := time.Now()
					if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
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
					if client := got[0].ContextMap()["client"]; client != "as.example.com/gateway" {
						t.Errorf("got the client %v in the log, want that which looked it up", client)
					}
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

// The log belongs to others. What they do wrong there must neither end the server nor
// hold up those who wait for the metadata.
func TestLogThatPanicsOrHangsDuringALookup(t *testing.T) {
	p := newPublisher(document(testIssuer, tokenPlace))
	cl, _ := discovering(t, issuerSecret, p)
	synctest.Test(t, func(t *testing.T) {
		request := func() {
			t.Helper()
			if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
				t.Errorf("request() = %v, want no error", err)
			}
		}
		request()
		p.publish(oauthPlace, http.NotFound)
		for _, write := range []func(){func() { panic(canarySecret) }, func() { time.Sleep(time.Minute) }} {
			cl.endpoint.discovery.logger = zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zapcore.EncoderConfig{}), writeSyncerFunc(write), zapcore.WarnLevel))
			time.Sleep(25 * time.Hour)
			request() // has it looked up
			synctest.Wait()
			started := time.Now()
			request()
			if took := time.Since(started); took != 0 {
				t.Errorf("request() took %v, want that it waits for no log", took)
			}
		}
		time.Sleep(time.Hour)
	})
}

// writeSyncerFunc is where a log goes.
type writeSyncerFunc func()

func (f writeSyncerFunc) Write(p []byte) (int, error) { f(); return len(p), nil }
func (writeSyncerFunc) Sync() error                   { return nil }

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
				_, err := cl.endpoint.locateAndRequest(ctx, nil)
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
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			wantTokenError(t, err, codeInvalidResponse, false)
		}
		p.wantAsked(t, "GET "+oauthPlace, "GET "+openidPlace)
		time.Sleep(metadataErrorLifetime)
		p.publish(oauthPlace, page(http.StatusOK, document(testIssuer, tokenPlace)))
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Errorf("request() = %v, want a token", err)
		}
	})
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
		_, err := cl.endpoint.locateAndRequest(ctx, nil)
		wantTokenError(t, err, codeTimeout, false)
		started := time.Now()
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Errorf("request() = %v, want no error", err)
		}
		if took := time.Since(started); took != 2*time.Second {
			t.Errorf("request() took %v, want the 2s that were left of the look-up", took)
		}
		p.wantAsked(t, "GET "+oauthPlace, "POST "+tokenPlace)
	})
}

// Whoever has published a mistake mends it, and nobody has to wait for a day.
func TestUnusableEndpointIsLookedUpAgain(t *testing.T) {
	p := newPublisher(document(testIssuer, "/token"))
	cl, _ := discovering(t, issuerSecret, p)
	synctest.Test(t, func(t *testing.T) {
		_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
		wantTokenError(t, err, codeInvalidResponse, false)
		p.publish(oauthPlace, page(http.StatusOK, document(testIssuer, tokenPlace)))
		for started := time.Now(); err != nil; _, err = cl.endpoint.locateAndRequest(t.Context(), nil) {
			if time.Since(started) > 2*metadataPause {
				t.Fatalf("request() = %v after %v, want no error", err, time.Since(started))
			}
			time.Sleep(time.Second)
		}
	})
}

// unchanged shows an error as it is.
func unchanged(err error) error { return err }

// doubt makes the next token request look the metadata up again.
func doubt(cl *client) {
	i := cl.endpoint.discovery.issuerMetadata
	i.mu.Lock()
	defer i.mu.Unlock()
	i.doubtful = true
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
				if u, err := d.tokenEndpoint(t.Context(), unchanged); err != nil || u.String() != tokenPlace {
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
	issuer, lookups := newCountingIssuer(t, auth)
	site := func(settings string) string {
		return strings.Replace(proxySite(up, auth, settings), "token_url "+auth.URL+"/token", "issuer "+issuer.URL, 1)
	}
	g := startGateway(t, site(""))
	g.get().want(t, http.StatusOK)
	g.load(site("scopes other")) // another token
	g.get().want(t, http.StatusOK)
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
		u, err := d.tokenEndpoint(t.Context(), unchanged)
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

// What only advice needs may be missing, or anything.
func TestMetadataForAdvice(t *testing.T) {
	for _, test := range []struct {
		members           []string
		grantTypes, algs  []string
		bindsCertificates bool
	}{
		{nil, nil, nil, false},
		{
			[]string{`"grant_types_supported":["client_credentials","x"]`, `"dpop_signing_alg_values_supported":["ES256"]`, `"tls_client_certificate_bound_access_tokens":true`},
			[]string{"client_credentials", "x"},
			[]string{"ES256"},
			true,
		},
		{[]string{`"grant_types_supported":[]`, `"dpop_signing_alg_values_supported":null`, `"tls_client_certificate_bound_access_tokens":false`}, nil, nil, false},
		{[]string{`"grant_types_supported":"client_credentials"`, `"dpop_signing_alg_values_supported":{"a":1}`, `"tls_client_certificate_bound_access_tokens":"true"`}, nil, nil, false},
		{[]string{`"Grant_Types_Supported":["client_credentials"]`, `"dpop_signing_alg_values_supported":7`, `"tls_client_certificate_bound_access_tokens":1`}, nil, nil, false},
	} {
		m, err := parseMetadata([]byte(document(testIssuer, tokenPlace, test.members...)))
		if err != nil || m.issuer != testIssuer || m.tokenEndpoint != tokenPlace {
			t.Fatalf("parseMetadata() of %q = %+v, %v, want the token endpoint", test.members, m, err)
		}
		if !slices.Equal(m.grantTypes, test.grantTypes) || !slices.Equal(m.dpopAlgs, test.algs) || m.bindsCertificates != test.bindsCertificates {
			t.Errorf("parseMetadata() of %q = %+v, want %+v", test.members, m, test)
		}
	}
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
					if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
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
