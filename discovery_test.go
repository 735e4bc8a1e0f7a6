package outboundauth

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/go-jose/go-jose/v4"

	"github.com/caddyserver/caddy/v2/caddyconfig"

	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

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
				if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); (err == nil) != (phase.places != nil) {
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
	p.publish(openidPlace, redirects(http.StatusFound, openidPlace+"/"))
	cl, _ := discovering(t, issuerSecret+"token_request_header X-Api-Key "+canarySecret+"\nparam p "+canarySecret+"\nscopes a", p)
	if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err == nil {
		t.Error("request() = nil, want an error")
	}
	p.wantAsked(t, "GET "+oauthPlace, "GET "+openidPlace, "GET "+openidPlace+"/")
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
	issuer, lookups := newCountingIssuer(t, auth)
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

// Some servers put a slash behind a place. A redirect may be written in many ways.
func TestRedirectOfMetadata(t *testing.T) {
	const (
		plain     = "http://as.example.com"
		slashed   = openidPlace + "/"
		elsewhere = "leads elsewhere and is not followed: "
		nowhere   = "names no address and is not followed"
	)
	for _, test := range []struct {
		name, issuer, location string
		asked                  string // after the place of OpenID Connect; "": nothing
		want                   string // the end of the description; "": it can be used
	}{
		{"a slash", testIssuer, slashed, slashed, ""},
		{"path", testIssuer, "/.well-known/openid-configuration/", slashed, ""},
		{"relative", testIssuer, "openid-configuration/", slashed, ""},
		{"dots", testIssuer, "../../.well-known/./openid-configuration/", slashed, ""},
		{"no scheme", testIssuer, "//as.example.com/.well-known/openid-configuration/", slashed, ""},
		{"the port that is the default", testIssuer, "https://as.example.com:443/.well-known/openid-configuration/", slashed, ""},
		{"capitals", testIssuer, "HTTPS://AS.Example.COM/.well-known/openid-configuration/", slashed, ""},
		{"fragment", testIssuer, slashed + "#" + canarySecret, slashed, ""},
		{"query", testIssuer, slashed + "?a=b%26c&d", slashed + "?a=b%26c&d", ""},
		{"query only", testIssuer, "?a=b", openidPlace + "?a=b", ""},
		{"escaped path", testIssuer, "/a%2Fb/%C3%BC", testIssuer + "/a%2Fb/%C3%BC", ""},
		{"no TLS", plain, plain + ":80/x", plain + "/x", ""},
		{"with a port", testIssuer + ":8443", testIssuer + ":8443/x", testIssuer + ":8443/x", ""},

		{"another host", testIssuer, "https://login.example.com/a%2Fb?" + canarySecret + "#" + canarySecret, "", elsewhere + "https://login.example.com/a%2Fb"},
		{"another host, no scheme", testIssuer, "//login.example.com", "", elsewhere + "https://login.example.com"},
		{"a host below", testIssuer, "https://www.as.example.com/", "", elsewhere + "https://www.as.example.com/"},
		{"another port", testIssuer, testIssuer + ":8443/x", "", elsewhere + testIssuer + ":8443/x"},
		{"the port of another scheme", testIssuer, testIssuer + ":80/x", "", elsewhere + testIssuer + ":80/x"},
		{"the default port", testIssuer + ":8443", testIssuer + "/x", "", elsewhere + testIssuer + "/x"},
		{"to plain text", testIssuer, plain + "/x", "", elsewhere + plain + "/x"},
		{"to plain text on the port", testIssuer, plain + ":443/x", "", elsewhere + plain + ":443/x"},
		{"to TLS", plain, testIssuer + "/x", "", elsewhere + testIssuer + "/x"},
		{"another scheme", testIssuer, "ftp://as.example.com/x", "", elsewhere + "ftp://as.example.com/x"},
		{"another host with a user", testIssuer, "https://id:" + canarySecret + "@evil.example/x", "", elsewhere + "https://evil.example/x"},
		{"a host that looks alike", testIssuer, "https://as.example.com:" + canarySecret + "@evil.example/x", "", elsewhere + "https://evil.example/x"},
		{"what a terminal obeys", testIssuer, "https://evil.example/\u202e%1b[2J", "", elsewhere + "https://evil.example/%E2%80%AE%1B%5B2J"},
		{"long", testIssuer, "https://evil.example/" + strings.Repeat("x", 5000), "", elsewhere + "https://evil.example/" + strings.Repeat("x", maxShownValue-21) + "…"},

		{"a user", testIssuer, "https://id:" + canarySecret + "@as.example.com/x", "", "names a user and is not followed"},
		{"nothing", testIssuer, "", "", nowhere},
		{"no host", testIssuer, "https:///" + canarySecret, "", nowhere},
		{"no path", testIssuer, "https:" + canarySecret, "", nowhere},
		{"mail", testIssuer, "mailto:" + canarySecret + "@as.example.com", "", nowhere},
		{"an address that is none", testIssuer, "https://[" + canarySecret, "", nowhere},
		{"a port that is none", testIssuer, testIssuer + ":" + canarySecret + "/", "", nowhere},
		{"an escape that is none", testIssuer, "/%zz" + canarySecret, "", nowhere},
		{"a backslash", testIssuer, "https://as.example.com\\@evil.example/", "", nowhere},
		{"a line break", testIssuer, "/\r\nX-Canary: 1", "", nowhere},
	} {
		t.Run(test.name, func(t *testing.T) {
			oauth, openid := test.issuer+"/.well-known/oauth-authorization-server", test.issuer+"/.well-known/openid-configuration"
			p := newPublisher("")
			p.publish(oauth, http.NotFound)
			p.publish(openid, redirects(http.StatusMovedPermanently, test.location))
			p.publish(test.asked, page(http.StatusOK, document(test.issuer, test.issuer+"/token")))
			p.publish(test.issuer+"/token", page(http.StatusOK, goodAnswer))
			cl, _ := discovering(t, strings.Replace(issuerSecret, testIssuer, test.issuer, 1)+"insecure_plaintext token_url", p)
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			if test.want == "" {
				if err != nil {
					t.Errorf("request() = %v, want no error", err)
				}
				p.wantAsked(t, "GET "+oauth, "GET "+openid, "GET "+test.asked, "POST "+test.issuer+"/token")
				return
			}
			got := wantTokenError(t, err, codeHTTPStatus, true)
			if !strings.HasSuffix(got.Description, test.want) || got.Status != http.StatusMovedPermanently || got.Hint == "" {
				t.Errorf("request() = %v, want %q in it, and what to change", err, test.want)
			}
			wantNoCanary(t, err)
			p.wantAsked(t, "GET "+oauth, "GET "+openid)
		})
	}
}

func TestWhichAnswersAreRedirects(t *testing.T) {
	for status, followed := range map[int]bool{300: false, 301: true, 302: true, 303: true, 304: false, 305: false, 307: true, 308: true, 201: false, 404: false} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			p := newPublisher("")
			p.publish(oauthPlace, redirects(status, "/x"))
			p.publish(testIssuer+"/x", page(http.StatusOK, document(testIssuer, tokenPlace)))
			cl, _ := discovering(t, issuerSecret, p)
			if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); (err == nil) != followed {
				t.Errorf("request() = %v, want that it is followed: %v", err, followed)
			}
		})
	}
}

func TestRedirectsHaveAnEnd(t *testing.T) {
	chain := []string{"GET " + oauthPlace, "GET " + testIssuer + "/1", "GET " + testIssuer + "/2", "GET " + testIssuer + "/3"}
	for redirected := range 6 {
		t.Run(fmt.Sprint(redirected), func(t *testing.T) {
			p := newPublisher("")
			at := oauthPlace
			for n := 1; n <= redirected; n++ {
				p.publish(at, redirects(http.StatusFound, fmt.Sprint("/", n)))
				at = fmt.Sprint(testIssuer, "/", n)
			}
			p.publish(at, page(http.StatusOK, document(testIssuer, tokenPlace)))
			cl, _ := discovering(t, issuerSecret, p)
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			if redirected <= 3 {
				if err != nil {
					t.Errorf("request() = %v, want no error", err)
				}
				p.wantAsked(t, append(slices.Clone(chain[:redirected+1]), "POST "+tokenPlace)...)
				return
			}
			got := wantTokenError(t, err, codeHTTPStatus, true)
			if !strings.Contains(got.Description, "comes after 3 others and is not followed") {
				t.Errorf("request() = %v, want that these are too many", err)
			}
			p.wantAsked(t, append(slices.Clone(chain), "GET "+openidPlace)...)
		})
	}
	t.Run("loop", func(t *testing.T) {
		p := newPublisher("")
		p.publish(oauthPlace, redirects(http.StatusFound, oauthPlace))
		cl, _ := discovering(t, issuerSecret, p)
		_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
		wantTokenError(t, err, codeHTTPStatus, true)
		p.wantAsked(t, "GET "+oauthPlace, "GET "+oauthPlace, "GET "+oauthPlace, "GET "+oauthPlace, "GET "+openidPlace)
	})
}

// The server may name in a redirect what it knows from token requests.
func TestRedirectThatRepeatsASecretIsNotShown(t *testing.T) {
	for _, location := range []string{
		"https://evil.example/" + canarySecret,
		"https://evil.example/" + strings.ToUpper(canarySecret),
		"https://evil.example/%63anary%2ds3cret",
		"https://evil.example/Y2FuYXJ5LXMzY3JldA==",
		"https://" + canarySecret + ".example/",
		canarySecret + "://evil.example/",
		"https://evil.example/" + strings.Repeat("x", maxShownValue) + canarySecret,
		"https://evil.example/" + canaryToken,
		"https://evil.example/the-former-s3cret",
	} {
		t.Run(location, func(t *testing.T) {
			p := newPublisher("")
			p.publish(oauthPlace, redirects(http.StatusFound, location))
			cl, _ := discovering(t, issuerSecret, p)
			cl.endpoint.sent.add(redact.Secrets{"the-former-s3cret"})
			_, err := cl.endpoint.locateAndRequest(t.Context(), redact.Secrets{canaryToken})
			if got := wantTokenError(t, err, codeHTTPStatus, true); !strings.HasSuffix(got.Description, "and is not followed: "+withheld) {
				t.Errorf("request() = %v, want that where it leads is withheld", err)
			}
			wantNoCanary(t, err)
		})
	}
}

func TestTokenInARedirectIsNotShown(t *testing.T) {
	p := newPublisher(document(testIssuer, tokenPlace))
	cl, _ := discovering(t, issuerSecret, p)
	if _, err := cl.source.FetchNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.publish(oauthPlace, redirects(http.StatusFound, "https://evil.example/"+cl.source.Peek().value))
	i := cl.endpoint.discovery.issuerMetadata
	i.mu.Lock()
	i.current = nil
	i.mu.Unlock()
	_, err := cl.source.rested().FetchNow(t.Context())
	if err == nil || !strings.Contains(err.Error(), "leads elsewhere and is not followed: "+withheld) {
		t.Errorf("FetchNow() = %v, want that where it leads is withheld", err)
	}
}

// The clients of an issuer share the error of a look-up, and not their secrets.
func TestRedirectIsShownToEachClientByItsOwnSecrets(t *testing.T) {
	p := newPublisher("")
	p.publish(oauthPlace, redirects(http.StatusFound, "https://evil.example/"+canarySecret))
	owner, _ := discovering(t, issuerSecret, p)
	other, _ := discovering(t, strings.Replace(issuerSecret, canarySecret, "another-secret", 1), p)
	t.Setenv("TEST_ISSUER_SECRET", assertingSecret)
	broken, _ := discovering(t, issuerClient+"auth_method client_secret_jwt\nclient_secret {env.TEST_ISSUER_SECRET}", p)
	t.Setenv("TEST_ISSUER_SECRET", "short") // which can't sign
	synctest.Test(t, func(t *testing.T) {
		for _, order := range [][]*client{{owner, other, broken}, {broken, other, owner}} {
			for _, cl := range order {
				_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
				got := wantTokenError(t, err, codeHTTPStatus, true)
				if shown := strings.Contains(got.Description, canarySecret); shown != (cl == other) {
					t.Errorf("request() = %v, want where it leads: %v", err, cl == other)
				}
			}
			p.wantAsked(t, "GET "+oauthPlace, "GET "+openidPlace)
			time.Sleep(metadataErrorLifetime)
		}
	})
}

// Redirects get none of the time that is for the other place.
func TestRedirectsThatAreSlow(t *testing.T) {
	p := newPublisher("")
	p.publish(oauthPlace, func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(metadataTimeout / 5):
			redirects(http.StatusFound, oauthPlace)(w, r)
		case <-r.Context().Done():
		}
	})
	p.publish(openidPlace, page(http.StatusOK, document(testIssuer, tokenPlace)))
	cl, _ := discovering(t, issuerSecret, p)
	synctest.Test(t, func(t *testing.T) {
		started := time.Now()
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Errorf("request() = %v, want a token", err)
		}
		if took := time.Since(started); took != metadataTimeout/2 {
			t.Errorf("request() took %v, want %v", took, metadataTimeout/2)
		}
	})
}

// FuzzRedirect holds redirects to the origin of the issuer, wherever they lead. No
// error has a query, a user or more than one line.
func FuzzRedirect(f *testing.F) {
	for _, seed := range []string{
		"", "/", "x/", "?canary", "#canary", "//evil.example", "https://as.example.com:443/x?canary", "HTTPS://AS.EXAMPLE.COM./x",
		"https://canary@as.example.com/", "https://as.example.com\\@evil.example/", "https:canary", "https://[::1]:2019/stop?canary",
		"/\r\nX: canary", "%zz", "/%00", "//", "///evil.example", "http://as.example.com", "\u202e", "https://as.example.com/?a b",
	} {
		f.Add(seed)
	}
	issuer, err := parseIssuer(testIssuer)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, location string) {
		u, failure := redirected(issuer, serverAnswer{status: http.StatusFound, header: http.Header{"Location": {location}}})
		if failure != nil {
			shown := failure.leading(shownText(failure.leadsTo, maxShownValue, redact.Secrets{canarySecret})).Error()
			_, to, _ := strings.Cut(failure.leadsTo, "://")
			if host, _, _ := strings.Cut(to, "/"); strings.Contains(host, "@") || strings.ContainsAny(to, "?#") {
				t.Errorf("redirected(%q) leads to %q, want scheme, host and path only", location, failure.leadsTo)
			}
			if len(shown) > 600 || strings.ContainsFunc(shown, unicode.IsControl) || u != nil || !failure.permanent {
				t.Errorf("redirected(%q) = %v, %q, want one line of 600 bytes at most", location, u, shown)
			}
			return
		}
		req := newServerRequest(t.Context(), http.MethodGet, u, http.Header{}, "")
		if req.URL.Scheme != "https" || req.URL.Host != "as.example.com" || req.Host != "as.example.com" || req.URL.User != nil || req.URL.Opaque != "" {
			t.Errorf("redirected(%q) = %v, want the origin of the issuer", location, u)
		}
		// Those of ASCII could end the line. Others are bytes like any others there.
		isControl := func(r rune) bool { return r < ' ' || r == 0x7f }
		if uri := u.RequestURI(); !strings.HasPrefix(uri, "/") || strings.ContainsFunc(uri, isControl) {
			t.Errorf("redirected(%q) has the target %q, want a path", location, uri)
		}
	})
}

// A place that hangs leaves time for the other.
func TestFirstPlaceThatHangs(t *testing.T) {
	p := newPublisher("")
	p.publish(oauthPlace, hangs)
	p.publish(openidPlace, page(http.StatusOK, document(testIssuer, tokenPlace)))
	cl, _ := discovering(t, issuerSecret, p)
	synctest.Test(t, func(t *testing.T) {
		started := time.Now()
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Errorf("request() = %v, want a token", err)
		}
		if took := time.Since(started); took != metadataTimeout/2 {
			t.Errorf("request() took %v, want %v", took, metadataTimeout/2)
		}
		p.wantAsked(t, "GET "+oauthPlace, "GET "+openidPlace, "POST "+tokenPlace)
	})
}

// Names of this machine are not for issuers elsewhere to give.
func TestIssuerCannotLeadToThisMachine(t *testing.T) {
	hosts := []string{
		"localhost", "LOCALHOST.", "api.localhost", "127.0.0.1", "127.9.9.9", "127.0.0.1.", "[::1]", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]",
		"127.1", "2130706433", "0x7f000001", "0X7F.1", "0177.0.0.1", "017700000001", "0", // as inet_aton reads them
		"169.254.169.254", "[fe80::1]", "[fe80::1%25eth0]", "[::ffff:169.254.1.1]",
		"[::127.0.0.1]", "[::ffff:0:127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "[2002:7f00:1::1%25eth0]",
		"[64:ff9b::169.254.169.254]", "[2002:a9fe:a9fe::]", "[64:ff9b::]",
	}
	own, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	hosts = append(hosts, own, strings.ToUpper(own)+".")
	for _, addr := range ownAddresses(t) {
		b := addr.As16()
		if addr.Is6() {
			hosts = append(hosts, "["+addr.String()+"]")
		} else {
			hosts = append(hosts, addr.String(), fmt.Sprintf("[::ffff:%v]", addr), fmt.Sprintf("[64:ff9b::%v]", addr), fmt.Sprintf("[2002:%x:%x::1]", b[12:14], b[14:16]))
		}
	}
	for _, host := range hosts {
		t.Run(host, func(t *testing.T) { // clients that are there at the same time share the metadata
			p := newPublisher(document(testIssuer, "https://"+host+":2019/stop"))
			cl, _ := discovering(t, issuerSecret, p)
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			if got := wantTokenError(t, err, codeInvalidResponse, false); !strings.Contains(got.Description, "on this machine") {
				t.Errorf("got %v, want that it is on this machine", err)
			}
			p.wantAsked(t, "GET "+oauthPlace, "GET "+openidPlace)
		})
	}
	for _, host := range []string{
		"10.0.0.1", "1.example.com", "localhost.example.com", "127.0.0.1.example.com", "as.example.com5", "[2001:db8::1]", "xn--p1ai",
		"[64:ff9b::203.0.113.1]", "[2002:cb00:7101::7f00:1]", "[::2:7f00:1]",
	} {
		t.Run(host, func(t *testing.T) {
			endpoint := "https://" + host + "/token"
			p := newPublisher(document(testIssuer, endpoint))
			p.publish(endpoint, page(http.StatusOK, goodAnswer))
			cl, _ := discovering(t, issuerSecret, p)
			if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
				t.Errorf("got %v, want a token", err)
			}
		})
	}
}

func TestUnusableMetadata(t *testing.T) {
	good := document(testIssuer, tokenPlace)
	padded := func(size int) string { return strings.Repeat(" ", size-len(good)) + good }
	const unreadable = "the issuer's metadata is not a JSON object that can be read"
	const other = "the metadata is that of another issuer"
	const endpoint = "the token_endpoint in the issuer's metadata: "
	const elsewherePlace = "https://login.example.com/x"
	const elsewhere = "a redirect in the place of the issuer's metadata, which leads elsewhere and is not followed: " + elsewherePlace
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
		{"redirected elsewhere from the first place", redirects(302, elsewherePlace), page(200, good), "", false, ""},
		{"redirected elsewhere, or nothing", redirects(302, elsewherePlace), nil, codeHTTPStatus, true, elsewhere},
		{"nothing, or redirected elsewhere", nil, redirects(302, elsewherePlace), codeHTTPStatus, true, elsewhere},
		{"redirected elsewhere twice", redirects(302, elsewherePlace), redirects(302, "https://other.example.com/"), codeHTTPStatus, true, elsewhere},
		{"redirected elsewhere, or overloaded", redirects(302, elsewherePlace), page(503, ""), codeHTTPStatus, false, "can't be had now"},
		{"a page, or redirected elsewhere", page(200, "<!doctype html>"), redirects(302, elsewherePlace), codeInvalidResponse, false, unreadable},

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

		{"another issuer", page(200, document("https://evil.example", tokenPlace)), nil, codeConfiguration, true, other},
		{"an issuer that is the secret", page(200, document("https://"+canarySecret+".example/Y2FuYXJ5", tokenPlace)), nil, codeConfiguration, true, other},
		{"another issuer at the first place only", page(200, document("https://evil.example", movedPlace)), page(200, good), "", false, ""},
		{"another issuer at the second place only", nil, page(200, document("https://evil.example", movedPlace)), codeConfiguration, true, other},
		{"the issuer with a slash", page(200, document(testIssuer+"/", tokenPlace)), nil, codeConfiguration, true, other + ": it ends with a /"},
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
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
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
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	if got := wantTokenError(t, err, codeInvalidResponse, false); !strings.Contains(got.Description, "is not encrypted, though the issuer is") {
		t.Errorf("request() = %v, want that the endpoint is not encrypted", err)
	}
	cl, _ = discovering(t, strings.Replace(issuerSecret, testIssuer, plain, 1)+"insecure_plaintext token_url", p)
	if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
		t.Errorf("request() = %v from an issuer that is not encrypted either, want no error", err)
	}
}

func TestThrottledLookupSaysHowLong(t *testing.T) {
	p := newPublisher("")
	p.publish(oauthPlace, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "120")
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	cl, _ := discovering(t, issuerSecret, p)
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	if got := retryAfter(err); got != 2*time.Minute {
		t.Errorf("retryAfter() = %v of %v, want 2m", got, err)
	}
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
	proofs := func(names ...string) string {
		return fmt.Sprintf(`"dpop_signing_alg_values_supported":%s`, encode(t, names))
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
		{"a part of a name", "client_secret s", []string{methods("client_secret")}, "auth_method", ""},
		{"private_key_jwt not listed", key, []string{methods(authBasic), algs("ES256")}, "auth_method", authBasic},
		{"tls_client_auth listed", certificate, []string{methods(authTLS)}, "", ""},
		{"tls_client_auth listed as self-signed", certificate, []string{methods("self_signed_tls_client_auth")}, "", ""},
		{"tls_client_auth not listed", certificate, []string{methods(authBasic)}, "auth_method", authBasic},
		{"self-signed is no other method", "client_secret s", []string{methods("self_signed_tls_client_auth")}, "auth_method", "self_signed_tls_client_auth"},
		{"methods that nobody knows", "auth_method client_secret_post\nclient_secret s", []string{methods(canarySecret, authBasic, "a\nb")}, "auth_method", "client_secret_basic"},
		{"algorithms that nobody knows", key + "signing_alg ES256", []string{algs(canarySecret, "RS256", "none")}, "signing_alg", "RS256"},
		{"no authentication", "auth_method none", []string{methods(authBasic)}, "", ""},
		{"authenticated by the grant", key + "grant_type jwt_bearer", []string{methods(authBasic)}, "", ""},

		{"algorithm listed", key + "signing_alg ES256", []string{methods(authKeyJWT), algs("RS256", "ES256")}, "", ""},
		{"algorithm not listed", key + "signing_alg ES256", []string{methods(authKeyJWT), algs("RS256", "PS256")}, "signing_alg", "RS256 PS256"},
		{"no algorithm listed", key + "signing_alg ES256", []string{methods(authKeyJWT)}, "", ""},
		{"algorithm of the key listed", key, []string{methods(authKeyJWT), algs("RS256", "ES256")}, "", ""},
		{"algorithm of a secret", "auth_method client_secret_jwt\nsigning_alg HS512\nclient_secret " + strings.Repeat("s", 64), []string{algs("HS256")}, "signing_alg", "HS256"},
		{"algorithms of others", "client_secret s", []string{algs("RS256")}, "", ""},

		{"algorithm of proofs listed", "client_secret s\ndpop", []string{proofs("RS256", "ES256")}, "", ""},
		{"algorithm of proofs not listed", "client_secret s\ndpop EdDSA", []string{proofs("RS256", "ES256")}, "dpop", "ES256"},
		{"no algorithm of proofs listed", "client_secret s\ndpop", nil, "", ""},
		{"proofs of others", "client_secret s", []string{proofs("RS256")}, "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPublisher(document(testIssuer, tokenPlace, test.metadata...))
			if strings.Contains(test.settings, "dpop") {
				p.publish(tokenPlace, page(http.StatusOK, strings.Replace(goodAnswer, "Bearer", "DPoP", 1)))
			}
			cl, logs := discovering(t, issuerClient+test.settings, p)
			request := func() {
				t.Helper()
				doubt(cl)
				if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
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
				fields["issuer"] != testIssuer || fields["client_id"] != "gateway" ||
				fields["client"] != "as.example.com/gateway" || fields["token_endpoint"] != "as.example.com" {
				t.Errorf("got %q %v in the log, want that %s may be one of %s", got[0].Message, fields, test.setting, test.supported)
			}

			// Another list is news.
			p.publish(oauthPlace, page(http.StatusOK, document(testIssuer, tokenPlace,
				methods(authNone), algs("another"), proofs("another"), `"grant_types_supported":["client_credentials"]`)))
			request()
			request()
			if got := logs.Len(); got != 2 {
				t.Errorf("got %d warnings after the list has changed, want 2", got)
			}
		})
	}
}

// A server may name a token endpoint as it likes. It is used, but not shown.
func TestEndpointThatRepeatsTheSecretIsNotShown(t *testing.T) {
	for _, endpoint := range []string{testIssuer + "/" + canarySecret, "https://" + strings.ToUpper(canarySecret) + ".example.com/token"} {
		for name, answer := range map[string]http.HandlerFunc{
			"a token":       page(http.StatusOK, goodAnswer),
			"a refusal":     page(http.StatusBadRequest, `{"error":"invalid_scope"}`),
			"no answer":     page(http.StatusOK, ""),
			"no connection": refusesConnections,
		} {
			t.Run(endpoint+" "+name, func(t *testing.T) {
				p := newPublisher(document(testIssuer, endpoint))
				p.publish(endpoint, answer)
				cl, logs := discovering(t, issuerSecret, p)
				_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
				p.wantAsked(t, "GET "+oauthPlace, "POST "+endpoint)
				if (err == nil) != (name == "a token") || (err != nil && !strings.HasPrefix(err.Error(), "token endpoint as.example.com: ")) {
					t.Errorf("request() = %v, want an error that names the issuer, unless there is a token", err)
				}
				wantNoCanary(t, err)
				wantNoCanaryIn(t, fmt.Sprint(cl.endpoint.describe(), attributes(cl.endpoint.describe()), logs.All()))
			})
		}
	}
}

// Where secrets would go unencrypted is the server's word, too.
func TestPlaintextEndpointInMetadataIsNotNamed(t *testing.T) {
	const issuer = "http://127.0.0.1:8091"
	p := newPublisher("")
	p.publish(issuer+"/.well-known/oauth-authorization-server", page(http.StatusOK, document(issuer, "http://"+canaryToken+".example/")))
	cl, _ := discovering(t, strings.Replace(issuerSecret, testIssuer, issuer, 1), p)
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	if got := wantTokenError(t, err, codeInvalidResponse, false); !strings.Contains(got.Description, "unencrypted") {
		t.Errorf("request() = %v, want that the credentials would go unencrypted", err)
	}
	wantNoCanary(t, err)
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
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
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
			if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
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
	t.Setenv("TEST_METADATA_PLACE", openidPlace)
	const metadataPlace = "issuer: is the address of the issuer's metadata: write the issuer itself, without `/.well-known/`"
	for _, test := range []struct{ issuer, want string }{
		{testIssuer, ""},
		{"http://127.0.0.1:1/tenant", ""},
		{"{env.TEST_ISSUER}", ""},
		{"https://as.example.com/{env.TEST_CLIENT_ID}", "issuer: {env.TEST_CLIENT_ID} is not set"},
		{"{env.TEST_BAD_ISSUER}", "issuer: must have no query and no fragment (RFC 8414 section 2)"},
		{"{http.request.host}", "issuer: unrecognized placeholder {http.request.host}"},
		{"as.example.com", "issuer: must be an absolute URL"},
		{"/tenant", "issuer: must be an absolute URL"},
		{"ftp://as.example.com", "issuer: must be an absolute URL"},
		{testIssuer + "?tenant=" + canarySecret, "issuer: must have no query"},
		{testIssuer + "?", "issuer: must have no query"},
		{`"` + testIssuer + `#` + canarySecret + `"`, "issuer: must have no query and no fragment"},
		{"https://id:" + canarySecret + "@as.example.com", "issuer: must hold no user and password"},
		{"http://as.example.com", "issuer: the client's credentials would go to another machine unencrypted"},
		{openidPlace, metadataPlace},
		{openidPlace + "/?" + canarySecret, metadataPlace},
		{oauthPlace + "/tenant", metadataPlace},
		{testIssuer + "/tenant/.well-known/openid-configuration", metadataPlace},
		{testIssuer + "/%2Ewell-known/openid-configuration", metadataPlace},
		{"{env.TEST_METADATA_PLACE}", metadataPlace},
		{"{env.TEST_ISSUER}/.well-known/openid-configuration", metadataPlace},
		{testIssuer + "/well-known/openid-configuration", ""},
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
	if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
		t.Errorf("request() = %v, want no error", err)
	}
	p.wantAsked(t, "GET "+oauthPlace, "POST "+tokenPlace)
}

// A token request that another has overtaken says nothing about the endpoint.
func TestOvertakenRequestLeavesTheMetadata(t *testing.T) {
	p := newPublisher(document(testIssuer, tokenPlace))
	cl, _ := discovering(t, issuerSecret+"token_timeout 400ms\n", p)
	if _, err := cl.source.FetchNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	cl.source.lose()
	issuer := cl.endpoint.discovery.issuerMetadata
	issuer.mu.Lock()
	issuer.tried = time.Now().Add(-time.Hour) // it may be looked up again
	issuer.mu.Unlock()
	var asked atomic.Int32
	p.publish(tokenPlace, func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 1 {
			hangs(w, r)
			return
		}
		page(http.StatusOK, goodAnswer)(w, r)
	})
	if _, _, err := cl.source.Token(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return len(goroutines()) == 0 }, "the end of both requests")
	p.wantAsked(t, "GET "+oauthPlace, "POST "+tokenPlace, "POST "+tokenPlace, "POST "+tokenPlace)
}

// The host of an endpoint is in errors, so it is the name of a server or nothing.
func TestHostsThatAreNoNames(t *testing.T) {
	for _, host := range []string{strings.Repeat("a", 5000) + "." + canarySecret + ".example", "a%C2%9B31m%E2%80%AEb.example", strings.Repeat("%E2%80%8B", 500) + canarySecret} {
		p := newPublisher(document(testIssuer, "https://"+host+"/token"))
		cl, _ := discovering(t, issuerSecret, p)
		_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
		wantError(t, err, "has a host that is no name of a server")
		wantNoCanary(t, err)
	}
}

// A bad issuer could have JWTs signed for another server.
func TestNoAdviceToSignForAnotherServer(t *testing.T) {
	key := writeFile(t, filepath.Join(t.TempDir(), "key"), keytest.PKCS8(t, keytest.New(t)))
	p := newPublisher(document(testIssuer, "https://honest.example.com/token"))
	p.publish("https://honest.example.com/token", page(http.StatusUnauthorized, `{"error":"invalid_client"}`))
	cl, _ := discovering(t, issuerClient+"private_key "+key, p)
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	wantError(t, err, "(check private_key, key_id and assertion_audience)")
}

// A login whose endpoint has moved finds it again, with the next request.
func TestLoginEndpointMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPublisher(document(testIssuer, tokenPlace))
		cl, _ := discovering(t, "issuer "+testIssuer+"\ngrant_type none\nparam user a", p)
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		p.publish(tokenPlace, page(http.StatusOK, "<html>moved"))
		p.publish(oauthPlace, page(http.StatusOK, document(testIssuer, movedPlace)))
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err == nil {
			t.Error("got a token, want an error: a login is not repeated at once")
		}
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Errorf("got %v, want a token of the new place", err)
		}
	})
}
