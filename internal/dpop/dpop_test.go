package dpop

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpoptest"
)

// parse reads a proof with what has not made it.
func parse(tb testing.TB, proof string) dpoptest.Proof {
	tb.Helper()
	p, err := dpoptest.Parse(proof)
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

func newKey(tb testing.TB, alg string) *Key {
	tb.Helper()
	key, err := NewKey(alg)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// RFC 9449 §4.2: what a proof has, and §4.3: what its server checks.
func TestProof(t *testing.T) {
	for _, alg := range []string{ES256, EdDSA} {
		t.Run(alg, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				key := newKey(t, alg)
				const uri = "https://api.example.com/a%20b/c"
				seen := make(map[any]bool)
				for _, test := range []struct{ hash, nonce string }{{}, {"", "n-1"}, {"hash", ""}, {"hash", "n-2"}} {
					time.Sleep(time.Second)
					proof, err := key.Proof(http.MethodPut, uri, test.hash, test.nonce)
					if err != nil {
						t.Fatal(err)
					}
					p := parse(t, proof)
					claims := p.Claims
					if p.Header["alg"] != alg || p.Thumbprint != key.Thumbprint() {
						t.Errorf("got header %v, thumbprint %s, want alg %s and %s", p.Header, p.Thumbprint, alg, key.Thumbprint())
					}
					want := map[string]any{"htm": "PUT", "htu": uri, "iat": float64(time.Now().Unix()), "jti": claims["jti"]}
					if test.hash != "" {
						want["ath"] = test.hash
					}
					if test.nonce != "" {
						want["nonce"] = test.nonce
					}
					if fmt.Sprint(claims) != fmt.Sprint(want) {
						t.Errorf("got claims %v, want %v", claims, want)
					}
					if id, _ := claims["jti"].(string); len(id) < 16 || seen[id] {
						t.Errorf("got jti %q, want a new one of 96 bits at least", id)
					}
					seen[claims["jti"]] = true
				}
			})
		})
	}
}

func TestKeysDiffer(t *testing.T) {
	for _, alg := range []string{ES256, EdDSA} {
		if one, other := newKey(t, alg), newKey(t, alg); one.Thumbprint() == other.Thumbprint() {
			t.Errorf("%s: two keys have one thumbprint", alg)
		}
	}
}

func TestUnknownAlgorithm(t *testing.T) {
	for _, alg := range []string{"", "none", "HS256", "RS256", "es256"} {
		if key, err := NewKey(alg); key != nil || err == nil {
			t.Errorf("NewKey(%q) = %v, %v, want an error", alg, key, err)
		}
	}
}

// A key must not show in what prints values.
func TestKeyIsNotPrinted(t *testing.T) {
	for _, alg := range []string{ES256, EdDSA} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
			if got := fmt.Sprintf(verb, newKey(t, alg)); got != "key" {
				t.Errorf("%s prints %q", verb, got)
			}
		}
	}
}

// The token and its hash are those of RFC 9449 §7.1.
func TestHash(t *testing.T) {
	if got := Hash("Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU"); got != "fUHyO2r2Z3DZ53EsNrWBb0xWXoaNy59IiKCAqksmQEo" {
		t.Errorf("got %s", got)
	}
}

// A server puts the URI together from what it was sent. So the test asks one.
func TestURIIsWhatTheServerSees(t *testing.T) {
	seen := make(chan string, 1)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen <- dpoptest.URI(r) }))
	server.Config.DisableGeneralOptionsHandler = true
	server.Start()
	defer server.Close()
	for _, test := range []struct{ method, target, host string }{
		{"GET", "", ""},
		{"GET", "/", "api.example.com"},
		{"GET", "/a?b=c&d=%20", "api.example.com:443"},
		{"GET", "/?", ""},
		{"GET", "//a//b/", "API.example.com"},
		{"GET", "/a%2Fb/%3F/%23/%25", ""},
		{"GET", "/a%20b/%20", ""},
		{"GET", "/a/../b/./c", ""},
		{"GET", "/ä/ü%C3%A4", ""},
		{"GET", "/a;b=c/@:!$&'()*+,=", ""},
		{"GET", "/%e4%ff", ""},
		{"GET", `/"<>^{|}\`, ""},
		{"GET", "/~a[b]", ""},
		{"POST", "/a#b", ""},
		{"OPTIONS", "*", ""},
		{"GET", "/", "bücher.example"},
		{"GET", "/", "[::1]:8080"},
		{"GET", "/", "[fe80::1%25eth0]"},
	} {
		req, err := http.NewRequest(test.method, server.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		if test.target == "*" {
			req.URL.Path = "*"
		} else {
			u, err := req.URL.Parse(test.target)
			if err != nil { // a rewrite may leave such a path
				req.URL.Path = test.target
			} else {
				req.URL.Path, req.URL.RawPath, req.URL.RawQuery, req.URL.ForceQuery, req.URL.Fragment = u.Path, u.RawPath, u.RawQuery, u.ForceQuery, u.Fragment
			}
			if strings.HasPrefix(test.target, "//") { // which is a host to Parse
				req.URL.Path = test.target
			}
		}
		req.Host = strings.ReplaceAll(test.host, "%25", "%")
		req.Host = Host(req)
		res, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Errorf("%s %s: %v", test.method, test.target, err)
			continue
		}
		_ = res.Body.Close()
		if got, want := URI(req), <-seen; got != want {
			t.Errorf("%s %q, host %q: got %q, but the server sees %q", test.method, test.target, test.host, got, want)
		}
	}
}

// Servers differ in whether they leave out the port that a scheme has by default.
func TestHost(t *testing.T) {
	for _, test := range []struct{ url, host, want string }{
		{"https://api.example.com:443/", "", "api.example.com"},
		{"https://api.example.com:443/", "API.example.com:443", "API.example.com"},
		{"https://api.example.com:443/", "api.example.com:80", "api.example.com:80"},
		{"https://api.example.com:8443/", "", "api.example.com:8443"},
		{"https://api.example.com/", "api.example.com", "api.example.com"},
		{"http://api.example.com:80/", "", "api.example.com"},
		{"http://api.example.com/", "api.example.com:443", "api.example.com:443"},
		{"https://[::1]:443/", "", "[::1]"},
		{"https://[fe80::1%25eth0]:443/", "", "[fe80::1]"},
		{"https://bücher.example:443/", "", "xn--bcher-kva.example"},
	} {
		u, err := url.Parse(test.url)
		if err != nil {
			t.Fatal(err)
		}
		req := &http.Request{URL: u, Host: test.host}
		if got := Host(req); got != test.want {
			t.Errorf("%s, host %q: got %q, want %q", test.url, test.host, got, test.want)
		}
		if got, want := URI(req), u.Scheme+"://"+test.want+"/"; got != want {
			t.Errorf("%s, host %q: got the URI %q, want %q", test.url, test.host, got, want)
		}
	}
}

// RFC 9449 §8.1: which characters a nonce has.
func TestNonce(t *testing.T) {
	for value, want := range map[string]string{
		"":                                "",
		"eyJ7S_zG.eyJH0-Z.HX4w-7v":        "eyJ7S_zG.eyJH0-Z.HX4w-7v",
		"!#[]~":                           "!#[]~",
		"a b":                             "",
		`a"b`:                             "",
		`a\b`:                             "",
		"a\tb":                            "",
		"ä":                               "",
		"a\x7f":                           "",
		strings.Repeat("n", maxNonce):     strings.Repeat("n", maxNonce),
		strings.Repeat("n", maxNonce+1):   "",
		"a,b; c":                          "",
		"CaBcD/+==":                       "CaBcD/+==",
		"6f1ad0c1-7a3b-4d44-9d4b-1f6b1a":  "6f1ad0c1-7a3b-4d44-9d4b-1f6b1a",
		strings.Repeat("n", 3*maxNonce/2): "",
	} {
		header := make(http.Header)
		header.Set("DPoP-Nonce", value)
		if got := Nonce(header); got != want {
			t.Errorf("%.40q: got %.40q, want %.40q", value, got, want)
		}
	}
}

func BenchmarkProof(b *testing.B) {
	for _, alg := range []string{ES256, EdDSA} {
		b.Run(alg, func(b *testing.B) {
			key := newKey(b, alg)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := key.Proof(http.MethodGet, "https://api.example.com/v1/things", "fUHyO2r2Z3DZ53EsNrWBb0xWXoaNy59IiKCAqksmQEo", "nonce-of-the-upstream"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkNewKey(b *testing.B) {
	for _, alg := range []string{ES256, EdDSA} {
		b.Run(alg, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := NewKey(alg); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
