package outboundauth

import (
	"crypto/x509"
	"encoding/pem"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// twoClients are credentials of their own for $A, and others for all else.
const twoClients = `transport oauth2 {
	token_url $AUTH/token
	client_id gateway
	client_secret s
	tenant default
	upstream $A {
		token_url $AUTH/token
		client_id a
		client_secret sa
		tenant of-a
	}
	$MORE
}`

func TestEachUpstreamGetsItsOwnCredentials(t *testing.T) {
	auth := newAuthServer(t)
	a, b := newUpstream(t, auth), newUpstream(t, auth)
	g := startGateway(t, expand(`reverse_proxy $A $B {
		lb_policy round_robin
		`+twoClients+`
	}`, "$A", a.addr, "$B", b.addr, "$AUTH", auth.URL, "$MORE", ""))
	for range 6 {
		g.get().want(t, http.StatusOK)
	}
	for _, test := range []struct {
		up             *upstream
		client, tenant string
	}{{a, "a", "of-a"}, {b, "gateway", "default"}} {
		all := test.up.got()
		if len(all) != 3 {
			t.Errorf("got %d requests for %s, want 3", len(all), test.client)
		}
		for _, got := range all {
			if client := got.bearerOf(auth); client != test.client {
				t.Errorf("got the token of %q, want that of %s", client, test.client)
			}
			got.wantHeader(t, "X-Tenant-Id", test.tenant)
		}
	}
	for _, asked := range auth.asked() {
		if want := map[string]string{"a": "sa", "gateway": "s"}[asked.client]; asked.secret != want {
			t.Errorf("got the secret %q for %s, want %q", asked.secret, asked.client, want)
		}
	}
	auth.wantAsked(t, 2)
}

func TestUnixSocketUpstream(t *testing.T) {
	auth := newAuthServer(t)
	up := newSocketUpstream(t, auth, (*httptest.Server).Start)
	g := startGateway(t, expand(`reverse_proxy $A {
		`+twoClients+`
	}`, "$A", up.addr, "$AUTH", auth.URL, "$MORE", ""))
	g.get().want(t, http.StatusOK)
	if client := up.last(t).bearerOf(auth); client != "a" {
		t.Errorf("got the token of %q, want that of a", client)
	}
}

func TestUpstreamThatTheClientChooses(t *testing.T) {
	auth := newAuthServer(t)
	a, b, off := newUpstream(t, auth), newUpstream(t, auth), newUpstream(t, nil)
	words := []string{"$A", a.addr, "$B", b.addr, "$OFF", off.addr, "$AUTH", auth.URL, "$MORE", "upstream " + off.addr + " off"}
	g := startGateway(t, expand(`handle /default {
		reverse_proxy {http.request.header.X-Up} {
			`+twoClients+`
		}
	}
	handle {
		reverse_proxy {http.request.header.X-Up} {
			transport oauth2 {
				upstream $A {
					token_url $AUTH/token
					client_id a
					client_secret sa
				}
			}
		}
	}
	handle_errors {
		respond "{err.status_code} {err.message}"
	}`, words...))

	choose := func(path string, up *upstream) reply {
		return g.send(http.MethodGet, path, nil, "X-Up", up.addr, "Authorization", "Bearer client-own")
	}
	choose("/default", a).want(t, http.StatusOK)
	choose("/default", off).want(t, http.StatusOK)
	if got := a.last(t).bearerOf(auth); got != "a" {
		t.Errorf("got the token of %s, want that of a", got)
	}
	// Otherwise another spelling of an address would choose other credentials.
	choose("/default", b).want(t, http.StatusBadGateway)
	_, port, _ := strings.Cut(a.addr, ":")
	g.send(http.MethodGet, "/default", nil, "X-Up", "localhost:"+port).want(t, http.StatusBadGateway)
	off.last(t).wantHeader(t, "Authorization", "Bearer client-own")

	choose("/", a).want(t, http.StatusOK)
	r := choose("/", b).want(t, http.StatusBadGateway)
	if !strings.HasPrefix(r.body, "502 ") || !strings.Contains(r.body, "has no credentials") || !strings.Contains(r.body, b.addr) {
		t.Errorf("got %q, want that the upstream has no credentials", r.body)
	}
	if got := len(b.got()); got != 0 {
		t.Errorf("got %d requests at the upstream without credentials, want none", got)
	}
}

func TestHTTPSUpstream(t *testing.T) {
	for _, test := range []struct{ name, trust string }{
		{"unverified", "tls_insecure_skip_verify"},
		{"trust pool", "tls_trust_pool file $CA"},
	} {
		t.Run(test.name, func(t *testing.T) {
			auth := newAuthServer(t)
			up := newUnstartedUpstream(t, auth)
			up.StartTLS()
			up.addr = up.Listener.Addr().String()
			g := startGateway(t, expand(`reverse_proxy https://$A {
				`+twoClients+`
			}`, "$MORE", test.trust, "$A", up.addr, "$AUTH", auth.URL, "$CA", writeCert(t, up.Certificate())))
			g.get("Host", "gateway.test").want(t, http.StatusOK)
			got := up.last(t)
			if got.host != up.addr {
				t.Errorf("Host: got %q, want %q as with transport http", got.host, up.addr)
			}
			if client := got.bearerOf(auth); client != "a" {
				t.Errorf("got the token of %q, want that of a", client)
			}
		})
	}
}

func TestUntrustedUpstreamGetsNoToken(t *testing.T) {
	auth := newAuthServer(t)
	up := newUnstartedUpstream(t, auth)
	up.Config.ErrorLog = discardLog
	up.StartTLS()
	up.addr = up.Listener.Addr().String()
	g := startGateway(t, expand(`reverse_proxy https://$A {
		`+twoClients+`
	}`, "$MORE", "", "$A", up.addr, "$AUTH", auth.URL))
	g.get().want(t, http.StatusBadGateway)
	if got := up.got(); len(got) != 0 {
		t.Errorf("got %v at an upstream that is not trusted, want nothing", got)
	}
}

// writeCert writes a certificate in PEM, and returns the file's name.
func writeCert(t *testing.T, cert *x509.Certificate) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ca.pem")
	encoded := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
	if err := os.WriteFile(file, encoded, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestH2CUpstream(t *testing.T) {
	auth := newAuthServer(t)
	up := newUnstartedUpstream(t, auth)
	up.Config.Protocols = new(http.Protocols)
	up.Config.Protocols.SetUnencryptedHTTP2(true)
	up.start()
	g := startGateway(t, expand(`reverse_proxy h2c://$A {
		`+twoClients+`
	}`, "$A", up.addr, "$AUTH", auth.URL, "$MORE", ""))
	g.send(http.MethodPost, "/", strings.NewReader("body")).want(t, http.StatusOK)
	auth.revoke()
	g.send(http.MethodPost, "/", strings.NewReader("body")).want(t, http.StatusOK)
	got := up.last(t)
	if got.proto != "HTTP/2.0" || got.body != "body" {
		t.Errorf("got %s %q, want HTTP/2.0 and the body", got.proto, got.body)
	}
	if client := got.bearerOf(auth); client != "a" {
		t.Errorf("got the token of %q, want that of a", client)
	}
}

// The PROXY protocol makes the reverse proxy rewrite the URL's host.
func TestProxyProtocolDoesNotHideTheUpstream(t *testing.T) {
	auth := newAuthServer(t)
	up := newUnstartedUpstream(t, auth)
	up.Listener = proxyProtocolListener{up.Listener}
	up.start()
	g := startGateway(t, expand(`reverse_proxy $A {
		`+twoClients+`
	}`, "$A", up.addr, "$AUTH", auth.URL, "$MORE", "proxy_protocol v1"))
	g.get().want(t, http.StatusOK)
	if client := up.last(t).bearerOf(auth); client != "a" {
		t.Errorf("got the token of %q, want that of a", client)
	}
}

// proxyProtocolListener skips the line with which a connection starts.
type proxyProtocolListener struct{ net.Listener }

func (l proxyProtocolListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return &proxyProtocolConn{Conn: conn}, err
}

type proxyProtocolConn struct {
	net.Conn
	skipped bool
}

func (c *proxyProtocolConn) Read(p []byte) (int, error) {
	var b [1]byte
	for !c.skipped {
		if _, err := c.Conn.Read(b[:]); err != nil {
			return 0, err
		}
		c.skipped = b[0] == '\n'
	}
	return c.Conn.Read(p)
}

// Equal clients share one token, whatever else their upstreams are sent.
func TestEqualClientsShareOneToken(t *testing.T) {
	auth := newAuthServer(t)
	a, b := newUpstream(t, auth), newUpstream(t, auth)
	site := proxySite(a, auth, "tenant one\nretry_on off") + "\nhandle /b {\n" + proxySite(b, auth, "tenant two\nbearer_header Authorization Bearer") + "\n}"
	g := startGateway(t, site)
	g.get().want(t, http.StatusOK)
	g.send(http.MethodGet, "/b", nil).want(t, http.StatusOK)
	auth.wantAsked(t, 1)
}

func TestOtherClientsHaveTokensOfTheirOwn(t *testing.T) {
	for _, other := range []string{
		"client_id other", "token_url $AUTH/token\nclient_secret other", "token_url $AUTH/token\nclient_secret s\nauth_method client_secret_post", "scopes a", "audience a",
		"param a b", "token_request_header X-A b",
	} {
		t.Run(other, func(t *testing.T) {
			auth := newAuthServer(t)
			a, b := newUpstream(t, auth), newUpstream(t, auth)
			g := startGateway(t, expand(`reverse_proxy $A $B {
				lb_policy round_robin
				transport oauth2 {
					token_url $AUTH/token
					client_id gateway
					client_secret s
					upstream $B {
						$OTHER
					}
				}
			}`, "$A", a.addr, "$B", b.addr, "$AUTH", auth.URL, "$OTHER", expand(other, "$AUTH", auth.URL)))
			g.get().want(t, http.StatusOK)
			g.get().want(t, http.StatusOK)
			auth.wantAsked(t, 2)
			tokenOfA, tokenOfB := a.last(t).header.Get("Authorization"), b.last(t).header.Get("Authorization")
			if tokenOfA == tokenOfB {
				t.Errorf("got %q for both, want a token for each", tokenOfA)
			}
		})
	}
}
