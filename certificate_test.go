package outboundauth

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// An authority issues certificates to clients.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	above       [][]byte // the certificates that go with those that it issues
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	return new(authority).below(t, name)
}

// below makes an authority that is certified by this one; by itself if this
// one is empty.
func (a *authority) below(t *testing.T, name string) *authority {
	t.Helper()
	certificate, key := a.certify(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	ca := &authority{certificate: certificate, key: key}
	if a.certificate != nil {
		ca.above = [][]byte{certificate.Raw}
	}
	return ca
}

func (a *authority) certify(t *testing.T, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		t.Fatal(err)
	}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.certificate, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return certificate, key
}

// A certPair is the certificate of a client with its key.
type certPair struct {
	leaf       *x509.Certificate
	chain, key []byte // PEM
}

// issue makes a certificate; an empty authority makes a self-signed one.
func (a *authority) issue(t *testing.T, name string) certPair {
	t.Helper()
	leaf, key := a.certify(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	pair := certPair{leaf: leaf}
	for _, der := range append([][]byte{leaf.Raw}, a.above...) {
		pair.chain = append(pair.chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pair.key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	return pair
}

// write writes client.crt and client.key.
func (p certPair) write(t *testing.T, dir string) {
	t.Helper()
	p.writeChain(t, dir)
	p.writeKey(t, dir)
}

func (p certPair) writeChain(t *testing.T, dir string) {
	t.Helper()
	replaceFile(t, filepath.Join(dir, "client.crt"), p.chain)
}

func (p certPair) writeKey(t *testing.T, dir string) {
	t.Helper()
	replaceFile(t, filepath.Join(dir, "client.key"), p.key)
}

// replaceFile replaces a file at once, as tools that renew certificates do.
func replaceFile(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(name+".new", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
}

// print is a fingerprint, as it stands in tokens that are bound.
func (p certPair) print() string { return fingerprint(p.leaf) }

func fingerprint(certificate *x509.Certificate) string {
	return fmt.Sprintf("%x", sha256.Sum256(certificate.Raw))
}

// loaded is the pair as the product has it after reading it.
func (p certPair) loaded(t *testing.T) *tls.Certificate {
	t.Helper()
	pair, err := tls.X509KeyPair(p.chain, p.key)
	if err != nil {
		t.Fatal(err)
	}
	return &pair
}

// A doorman sees who comes to a server with TLS.
type doorman struct {
	mu     sync.Mutex
	visits []visit
	open   map[net.Conn]bool
}

type visit struct {
	print         string // of the certificate; "": none
	presented     int    // certificates
	path, proto   string
	connection    string
	authorization string
}

// guard has the server ask for certificates, and name roots as its CAs.
func (d *doorman) guard(s *httptest.Server, http2 bool, auth tls.ClientAuthType, roots ...*authority) {
	d.open = make(map[net.Conn]bool)
	next := s.Config.Handler
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v := visit{path: r.URL.Path, proto: r.Proto, connection: r.RemoteAddr, authorization: r.Header.Get("Authorization")}
		v.presented = len(r.TLS.PeerCertificates)
		if v.presented > 0 {
			v.print = fingerprint(r.TLS.PeerCertificates[0])
		}
		d.mu.Lock()
		d.visits = append(d.visits, v)
		d.mu.Unlock()
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), visit{}, v)))
	})
	s.Config.ErrorLog = discardLog
	s.Config.ConnState = func(conn net.Conn, state http.ConnState) {
		d.mu.Lock()
		defer d.mu.Unlock()
		if state == http.StateClosed || state == http.StateHijacked {
			delete(d.open, conn)
		} else {
			d.open[conn] = true
		}
	}
	s.TLS = &tls.Config{ClientAuth: auth}
	if len(roots) > 0 {
		s.TLS.ClientCAs = x509.NewCertPool()
		for _, root := range roots {
			s.TLS.ClientCAs.AddCert(root.certificate)
		}
	}
	s.EnableHTTP2 = http2
	s.StartTLS()
}

// seen returns the visits so far.
func (d *doorman) seen() []visit {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.visits)
}

// last returns the latest visit.
func (d *doorman) last(t *testing.T) visit {
	t.Helper()
	all := d.seen()
	if len(all) == 0 {
		t.Fatal("got no request, want one")
	}
	return all[len(all)-1]
}

// connections is how many are open.
func (d *doorman) connections() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.open)
}

// mutual is an authorization server and an upstream that ask for certificates,
// and the directory with what the gateway needs to reach them.
type mutual struct {
	auth             *authServer
	up               *upstream
	toAuth, toUp     doorman
	dir              string
	ca               *authority
	authURL, upHost  string
	refusedAtUp      sync.Map // fingerprints
	boundTokensTaken sync.Map // fingerprints of tokens that came with their certificate
}

// newMutual starts both. The tokens are bound to the certificate that asks for
// them, and the upstream takes them with that one only (RFC 8705 §3).
func newMutual(t *testing.T, http2 bool) *mutual {
	t.Helper()
	m := &mutual{dir: t.TempDir(), ca: newAuthority(t, "clients")}
	m.auth = &authServer{live: make(map[string]string)}
	m.auth.Server = httptest.NewUnstartedServer(m.auth)
	t.Cleanup(func() { m.auth.CloseClientConnections(); m.auth.Close() })
	m.toAuth.guard(m.auth.Server, http2, tls.RequireAndVerifyClientCert, m.ca)
	m.auth.script(func(w http.ResponseWriter, r tokenRequest) bool {
		v := r.ctx.Value(visit{}).(visit)
		fmt.Fprintf(w, `{"access_token":"%s.%s","token_type":"Bearer","expires_in":3600}`, v.print, m.auth.issue(r.client))
		return true
	})
	m.up = newUnstartedUpstream(t, nil)
	m.toUp.guard(m.up.Server, http2, tls.RequireAnyClientCert)
	m.up.addr = m.up.Listener.Addr().String()
	m.up.script(m.takeBoundTokens)
	_, port, _ := net.SplitHostPort(m.up.addr)
	m.authURL, m.upHost = m.auth.URL, "localhost:"+port

	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.auth.Certificate().Raw}) // httptest's, of both
	if err := os.WriteFile(filepath.Join(m.dir, "servers.pem"), root, 0o600); err != nil {
		t.Fatal(err)
	}
	return m
}

// takeBoundTokens refuses tokens that don't come with their certificate.
func (m *mutual) takeBoundTokens(w http.ResponseWriter, r *http.Request) bool {
	v := r.Context().Value(visit{}).(visit)
	bearer, _ := strings.CutPrefix(v.authorization, "Bearer ")
	bound, _, _ := strings.Cut(bearer, ".")
	if _, refused := m.refusedAtUp.Load(bound); refused || bound != v.print {
		refuse(w, http.StatusUnauthorized)
		return true
	}
	m.boundTokensTaken.Store(bound, true)
	return false
}

// took tells whether the upstream has taken a token of this certificate.
func (m *mutual) took(p certPair) bool {
	_, ok := m.boundTokensTaken.Load(p.print())
	return ok
}

const mutualSite = `reverse_proxy https://$UP {
	transport oauth2 {
		token_url $AUTH/token
		client_id gateway
		client_certificate $DIR/client.crt $DIR/client.key
		token_transport {
			tls_trust_pool file $DIR/servers.pem
			versions 1.1 2
		}
		tls_insecure_skip_verify
		$SETTINGS
	}
}`

func (m *mutual) site(settings string) string {
	return expand(mutualSite, "$UP", m.up.addr, "$AUTH", m.auth.URL, "$DIR", m.dir, "$SETTINGS", settings)
}

// bothVersions runs a test over HTTP/1.1 and HTTP/2.
func bothVersions(t *testing.T, test func(t *testing.T, http2 bool)) {
	t.Run("HTTP/1.1", func(t *testing.T) { test(t, false) })
	t.Run("HTTP/2", func(t *testing.T) { test(t, true) })
}

func TestClientCertificateAuthenticatesTheClient(t *testing.T) {
	clients, self := newAuthority(t, "clients"), new(authority)
	intermediate := clients.below(t, "intermediate")
	for _, test := range []struct {
		name      string
		pair      certPair
		auth      tls.ClientAuthType
		presented int
		settings  string
		secret    string
	}{
		{"issued by a CA", clients.issue(t, "gateway"), tls.RequireAndVerifyClientCert, 1, "", ""},
		{"issued by an intermediate CA", intermediate.issue(t, "gateway"), tls.RequireAndVerifyClientCert, 2, "", ""},
		// Whatever CAs the server names.
		{"self-signed", self.issue(t, "gateway"), tls.RequireAnyClientCert, 1, "auth_method tls_client_auth", ""},
		{"beside a secret", clients.issue(t, "gateway"), tls.RequireAndVerifyClientCert, 1, "client_secret s", "s"},
	} {
		bothVersions(t, func(t *testing.T, http2 bool) {
			t.Run(test.name, func(t *testing.T) {
				auth := &authServer{live: make(map[string]string)}
				auth.Server = httptest.NewUnstartedServer(auth)
				t.Cleanup(func() { auth.CloseClientConnections(); auth.Close() })
				var door doorman
				door.guard(auth.Server, http2, test.auth, clients)
				up := newUpstream(t, auth)
				dir := t.TempDir()
				test.pair.write(t, dir)
				g := startGateway(t, expand(`reverse_proxy $UP {
					transport oauth2 {
						token_url $AUTH/token
						client_id gateway
						client_certificate $DIR/client.crt $DIR/client.key
						token_transport {
							tls_insecure_skip_verify
							versions 1.1 2
						}
						$SETTINGS
					}
				}`, "$UP", up.addr, "$AUTH", auth.URL, "$DIR", dir, "$SETTINGS", test.settings))
				g.get().want(t, http.StatusOK)

				got := door.last(t)
				if got.print != test.pair.print() || got.presented != test.presented {
					t.Errorf("got %d certificates, the first %s, want %d and %s", got.presented, got.print, test.presented, test.pair.print())
				}
				if want := map[bool]string{false: "HTTP/1.1", true: "HTTP/2.0"}[http2]; got.proto != want {
					t.Errorf("got %s, want %s, or this test proves less than it says", got.proto, want)
				}
				asked := auth.asked()[0]
				if asked.client != "gateway" || asked.secret != test.secret || asked.form.Has("client_assertion") {
					t.Errorf("got the client %q, the secret %q and the form %v, want the client_id and no more", asked.client, asked.secret, asked.form)
				}
				if test.secret == "" && (asked.form.Get("client_id") != "gateway" || asked.header.Get("Authorization") != "") {
					t.Errorf("got the form %v and the header %v, want the client_id in the form only", asked.form, asked.header)
				}
			})
		})
	}
}

func TestClientCertificateFromTheEnvironment(t *testing.T) {
	m := newMutual(t, false)
	pair := m.ca.issue(t, "gateway")
	t.Setenv("TEST_CLIENT_CERT", string(pair.chain))
	t.Setenv("TEST_CLIENT_KEY", string(pair.key))
	site := m.site("bind_certificate")
	site = strings.Replace(site, m.dir+"/client.crt", "{env.TEST_CLIENT_CERT}", 1)
	site = strings.Replace(site, m.dir+"/client.key", "{env.TEST_CLIENT_KEY}", 1)
	g := startGateway(t, site)
	g.get().want(t, http.StatusOK)
	if !m.took(pair) {
		t.Error("got no token of the certificate in the environment, want one")
	}
}

// Certificate and key are two files. While only one has been replaced, the
// token lives on, and nothing has to be reloaded after.
func TestReplacedCertificateIsUsedWithoutReload(t *testing.T) {
	for _, test := range []struct {
		name  string
		steps []func(certPair, *testing.T, string)
	}{
		{"at once", []func(certPair, *testing.T, string){certPair.write}},
		{"certificate first", []func(certPair, *testing.T, string){certPair.writeChain, certPair.writeKey}},
		{"key first", []func(certPair, *testing.T, string){certPair.writeKey, certPair.writeChain}},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := newMutual(t, false)
			first, second := m.ca.issue(t, "first"), m.ca.issue(t, "second")
			first.write(t, m.dir)
			g := startGateway(t, m.site("bind_certificate"))
			g.get().want(t, http.StatusOK)

			for i, step := range test.steps {
				step(second, t, m.dir)
				g.get().want(t, http.StatusOK) // with the token at hand
				if i < len(test.steps)-1 {
					m.refusedAtUp.Store(first.print(), true)
					g.get().want(t, http.StatusUnauthorized) // there is no other
					eventually(t, func() bool {
						return len(g.logged("obtaining token failed", "client_certificate: tls: private key does not match public key")) > 0
					}, "a warning of a certificate that is not the key's")
					m.refusedAtUp.Clear()
				}
			}
			m.refusedAtUp.Store(first.print(), true)
			eventually(t, func() bool { return g.get().status == http.StatusOK }, "a token of the new certificate")
			if got := m.toAuth.last(t).print; got != second.print() || !m.took(second) {
				t.Errorf("got a token request with %s, want %s", got, second.print())
			}
			for _, v := range m.toAuth.seen() {
				if v.print != first.print() && v.print != second.print() {
					t.Errorf("got a token request with the certificate %q, want one of the two", v.print)
				}
			}
			m.auth.wantAsked(t, 2)
		})
	}
}

// The upstream is presented the certificate that the token is bound to, on
// connections that never carry another's token.
func TestBoundTokenGoesWithItsCertificate(t *testing.T) {
	bothVersions(t, func(t *testing.T, http2 bool) {
		m := newMutual(t, http2)
		first, second := m.ca.issue(t, "first"), m.ca.issue(t, "second")
		first.write(t, m.dir)
		slow, release := make(chan struct{}, 1), make(chan struct{})
		released := sync.OnceFunc(func() { close(release) })
		defer released()
		m.up.script(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/slow" {
				slow <- struct{}{}
				<-release
			}
			return m.takeBoundTokens(w, r)
		})
		g := startGateway(t, m.site("bind_certificate"))
		g.get().want(t, http.StatusOK)
		if got, asked := m.toUp.last(t).print, m.toAuth.last(t).print; got != first.print() || asked != got {
			t.Errorf("got the certificates %s at the upstream and %s at the token endpoint, want %s at both", got, asked, first.print())
		}

		// The token lives on with its certificate, though the files have changed.
		second.write(t, m.dir)
		wantAll(t, g.burst(4), http.StatusOK)
		on := make(map[string]string) // certificates by connection
		for _, v := range m.toUp.seen() {
			if v.print != first.print() {
				t.Errorf("got the certificate %s with the old token, want %s", v.print, first.print())
			}
			on[v.connection] = v.print
		}
		m.auth.wantAsked(t, 1)

		// A request with the old token is on its way while the new one comes.
		answer := make(chan reply, 1)
		go func() { answer <- g.send(http.MethodGet, "/slow", nil) }()
		select {
		case <-slow:
		case <-time.After(patience):
			t.Fatal("got no request, want one")
		}
		m.refusedAtUp.Store(first.print(), true)
		wantAll(t, g.burst(4), http.StatusOK)
		if !m.took(second) {
			t.Error("got no request with the token of the new certificate, want some")
		}
		m.refusedAtUp.Clear()
		released()
		(<-answer).want(t, http.StatusOK)
		for _, v := range m.toUp.seen() {
			if before, ok := on[v.connection]; ok && before != v.print {
				t.Errorf("got the certificates %s and %s on one connection, want one", before, v.print)
			}
			on[v.connection] = v.print
			if bound, _, _ := strings.Cut(strings.TrimPrefix(v.authorization, "Bearer "), "."); bound != v.print {
				t.Errorf("got the certificate %s with a token of %s", v.print, bound)
			}
		}
		m.auth.wantAsked(t, 2)
	})
}

// The certificate that was read last is not always that of the token.
func TestTokenThatCannotBeRenewedKeepsItsCertificate(t *testing.T) {
	m := newMutual(t, false)
	first, second := m.ca.issue(t, "first"), m.ca.issue(t, "second")
	first.write(t, m.dir)
	g := startGateway(t, m.site("bind_certificate"))
	g.get().want(t, http.StatusOK)

	second.write(t, m.dir)
	m.auth.script(refusing(http.StatusBadRequest, `{"error":"invalid_client"}`))
	m.refusedAtUp.Store(first.print(), true)
	g.get().want(t, http.StatusUnauthorized)
	if got := m.toAuth.last(t).print; got != second.print() {
		t.Errorf("got a token request with the certificate %s, want %s, or this test proves nothing", got, second.print())
	}
	m.refusedAtUp.Clear()
	g.get().want(t, http.StatusOK)
	if got := m.toUp.last(t).print; got != first.print() {
		t.Errorf("got the certificate %s with the old token, want %s", got, first.print())
	}
}

// A token request over a connection would be the client whose certificate it
// was opened with, and so would be a request to the upstream.
func TestClientsDoNotShareConnections(t *testing.T) {
	bothVersions(t, func(t *testing.T, http2 bool) {
		m := newMutual(t, http2)
		a, b := m.ca.issue(t, "a"), m.ca.issue(t, "b")
		dirB := t.TempDir()
		a.write(t, m.dir)
		b.write(t, dirB)

		// Each is answered when both have asked, so both have a connection.
		var asking atomic.Int32
		both := make(chan struct{})
		issue, prints := m.auth.answer, map[string]string{"gateway": a.print(), "b": b.print()}
		m.auth.script(func(w http.ResponseWriter, r tokenRequest) bool {
			if asking.Add(1) == 2 {
				close(both)
			}
			select {
			case <-both:
			case <-r.ctx.Done():
			}
			if got := r.ctx.Value(visit{}).(visit).print; got != prints[r.client] {
				t.Errorf("got a token request of %q with the certificate %s, want %s", r.client, got, prints[r.client])
			}
			return issue(w, r)
		})
		site := m.site("bind_certificate\n" + expand(`upstream $OTHER {
			client_id b
			client_certificate $DIR/client.crt $DIR/client.key
			bind_certificate
		}`, "$OTHER", m.upHost, "$DIR", dirB))
		site = strings.Replace(site, "https://"+m.up.addr+" {", "https://"+m.up.addr+" https://"+m.upHost+" {\nlb_policy round_robin", 1)
		g := startGateway(t, site)
		wantAll(t, g.burst(20), http.StatusOK)
		if !m.took(a) || !m.took(b) {
			t.Error("got tokens of one client only, want both")
		}
		m.auth.wantAsked(t, 2)
		for name, door := range map[string]*doorman{"token endpoint": &m.toAuth, "upstream": &m.toUp} {
			on := make(map[string]string) // certificates by connection
			for _, v := range door.seen() {
				if before, ok := on[v.connection]; ok && before != v.print {
					t.Errorf("%s: got two certificates on one connection", name)
				}
				on[v.connection] = v.print
			}
			if len(on) < 2 {
				t.Errorf("%s: got %d connections, want one for each client at least", name, len(on))
			}
		}
	})
}

// Clients share the token_transport that they inherit, but not what makes one
// of them known.
func TestClientWithoutCertificateBesideOneThatHasIt(t *testing.T) {
	auth := &authServer{live: make(map[string]string)}
	auth.Server = httptest.NewUnstartedServer(auth)
	t.Cleanup(func() { auth.CloseClientConnections(); auth.Close() })
	var door doorman
	door.guard(auth.Server, false, tls.RequestClientCert)
	pair, dir := new(authority).issue(t, "b"), t.TempDir()
	pair.write(t, dir)
	var mu sync.Mutex
	prints := make(map[string]string)
	auth.script(func(_ http.ResponseWriter, r tokenRequest) bool {
		mu.Lock()
		defer mu.Unlock()
		prints[r.client] = r.ctx.Value(visit{}).(visit).print
		return false
	})
	a, b, c := newUpstream(t, auth), newUpstream(t, auth), newUpstream(t, auth)
	g := startGateway(t, expand(`reverse_proxy $A $B $C {
		lb_policy round_robin
		transport oauth2 {
			token_url $AUTH/token
			client_id a
			client_secret s
			token_transport {
				tls_insecure_skip_verify
			}
			upstream $B {
				client_id b
				auth_method tls_client_auth
				client_certificate $DIR/client.crt $DIR/client.key
			}
			upstream $C {
				client_id c
				client_secret t
			}
		}
	}`, "$A", a.addr, "$B", b.addr, "$C", c.addr, "$AUTH", auth.URL, "$DIR", dir))
	wantAll(t, g.burst(6), http.StatusOK)
	mu.Lock()
	defer mu.Unlock()
	if want := (map[string]string{"a": "", "b": pair.print(), "c": ""}); !maps.Equal(prints, want) {
		t.Errorf("got the certificates %v, want %v", prints, want)
	}
}

// newBound makes the transport to an upstream that asks for certificates.
func newBound(t *testing.T) *boundTransport {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	like := &reverseproxy.HTTPTransport{TLS: &reverseproxy.TLSConfig{InsecureSkipVerify: true}}
	if err := like.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	bound, err := newBoundTransport(like)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = bound.Cleanup() })
	return bound
}

// visitWith sends a request to the upstream with a certificate, and compares
// the one that arrives. It returns the connection.
func (m *mutual) visitWith(t *testing.T, bound *boundTransport, c *tls.Certificate) string {
	t.Helper()
	res, err := bound.send(proxied(t, m.up.addr, "/"), c)
	if err != nil {
		t.Fatalf("send() = %v, want no error", err)
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		t.Fatal(err)
	}
	v := m.toUp.last(t)
	if want := fingerprint(c.Leaf); v.print != want {
		t.Errorf("got the certificate %s, want %s", v.print, want)
	}
	return v.connection
}

// While requests with the old token are on their way, both certificates are in
// use, and each keeps its connection.
func TestTwoCertificatesKeepTheirConnections(t *testing.T) {
	bothVersions(t, func(t *testing.T, http2 bool) {
		m := newMutual(t, http2)
		m.up.script(nil)
		bound, a, b := newBound(t), m.ca.issue(t, "a").loaded(t), m.ca.issue(t, "b").loaded(t)
		first := map[*tls.Certificate]string{a: m.visitWith(t, bound, a), b: m.visitWith(t, bound, b)}
		for _, c := range []*tls.Certificate{a, b, b, a} {
			if got := m.visitWith(t, bound, c); got != first[c] {
				t.Error("got another connection, want the one that has this certificate")
			}
		}
	})
}

// A certificate that lives for an hour is replaced many times while a stream
// goes on. Nobody else may get the stream's connection.
func TestManyCertificatesWhileARequestGoesOn(t *testing.T) {
	bothVersions(t, func(t *testing.T, http2 bool) {
		m := newMutual(t, http2)
		release := make(chan struct{})
		m.up.script(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/stream" {
				_, _ = io.WriteString(w, "begin ")
				_ = http.NewResponseController(w).Flush()
				<-release
				_, _ = io.WriteString(w, "end")
			}
			return r.URL.Path == "/stream"
		})
		end := sync.OnceFunc(func() { close(release) })
		defer end()
		bound := newBound(t)
		stream, err := bound.send(proxied(t, m.up.addr, "/stream"), m.ca.issue(t, "old").loaded(t))
		if err != nil {
			t.Fatalf("send() = %v, want no error", err)
		}
		defer stream.Body.Close()
		old := m.toUp.last(t).connection

		for i := range 4 {
			c := m.ca.issue(t, fmt.Sprint(i)).loaded(t)
			if i == 3 { // its connection is free to be used again
				end()
				if body, err := io.ReadAll(stream.Body); err != nil || string(body) != "begin end" {
					t.Errorf("got %q, %v from the stream, want all of it", body, err)
				}
			}
			for range 2 {
				if got := m.visitWith(t, bound, c); got == old {
					t.Error("got the connection of the stream, want one with this certificate")
				}
			}
		}
		eventually(t, func() bool { return m.toUp.connections() <= maxBoundPools+1 }, "the end of connections that nobody needs")
	})
}

func TestHealthChecksPresentTheBoundCertificate(t *testing.T) {
	bothVersions(t, func(t *testing.T, http2 bool) {
		m := newMutual(t, http2)
		pair := m.ca.issue(t, "gateway")
		pair.write(t, m.dir)
		g := startGateway(t, strings.Replace(m.site("bind_certificate"), "transport oauth2 {",
			"health_uri /health\nhealth_interval 20ms\ntransport oauth2 {", 1))
		eventually(t, func() bool { return g.get().status == http.StatusOK }, "an upstream that is healthy")
		checked := func() (n int) {
			for _, v := range m.toUp.seen() {
				if v.path == "/health" && v.print == pair.print() && strings.HasPrefix(v.authorization, "Bearer "+pair.print()) {
					n++
				}
			}
			return n
		}
		before := checked()
		eventually(t, func() bool { return checked() >= before+3 }, "health checks with token and certificate")
	})
}

// An upstream is not unhealthy because its token is missing.
func TestHealthChecksWithoutATokenPresentTheCertificate(t *testing.T) {
	m := newMutual(t, false)
	pair := m.ca.issue(t, "gateway")
	pair.write(t, m.dir)
	m.auth.script(refusing(http.StatusBadRequest, `{"error":"invalid_client"}`))
	m.up.script(nil)
	g := startGateway(t, strings.Replace(m.site("bind_certificate"), "transport oauth2 {",
		"health_uri /health\nhealth_interval 20ms\ntransport oauth2 {", 1))
	eventually(t, func() bool { return len(m.toUp.seen()) >= 3 }, "health checks")
	for _, v := range m.toUp.seen() {
		if v.path != "/health" || v.authorization != "" || v.print != pair.print() {
			t.Errorf("got %+v, want a health check with the certificate and without a token", v)
		}
	}
	if got := g.logged("HTTP request failed"); len(got) != 0 {
		t.Errorf("got %q in the log, want no health check that failed", got[0])
	}
}

// Without TLS, no certificate would be presented.
func TestClientCertificateNeedsTLS(t *testing.T) {
	dir := t.TempDir()
	new(authority).issue(t, "gateway").write(t, dir)
	certificate := expand("client_id gateway\nclient_certificate $DIR/client.crt $DIR/client.key\n", "$DIR", dir)
	const tls, plain, want = "https://127.0.0.1:9000", "127.0.0.1:9000", "the client_certificate can be presented in TLS only; use https://"
	for _, test := range []struct{ upstream, settings, want string }{
		{plain, "token_url http://127.0.0.1/token", "token_url: " + want},
		{plain, "issuer http://127.0.0.1", "issuer: " + want},
		{plain, "token_url http://127.0.0.1/token\ninsecure_plaintext token_url", "token_url: " + want},
		{tls, "token_url http://127.0.0.1/token\nclient_secret s\nbind_certificate", "token_url: " + want},
		{plain, "token_url http://127.0.0.1/token\nclient_secret s", ""}, // for the metadata of another, perhaps
		{tls, "token_url https://127.0.0.1/token\nbind_certificate\ntls_except_ports 9001", "bind_certificate: a certificate is presented in TLS only; remove tls_except_ports"},
	} {
		wantError(t, loadError(t, proxyConfig(test.upstream, certificate+test.settings)), test.want)
	}
}

func TestClientCertificateIsCheckedAtLoad(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	pair, another := new(authority).issue(t, "gateway"), new(authority).issue(t, "another")
	pair.write(t, dir)
	another.write(t, other)
	for name, content := range map[string][]byte{
		"empty":    nil,
		"text":     []byte("no PEM"),
		"half.crt": pair.chain[:len(pair.chain)/2],
		"half.key": pair.key[:len(pair.key)/2],
		"bad.key":  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: another.leaf.Raw}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const (
		tls, plain = "https://127.0.0.1:9000", "127.0.0.1:9000"
		good       = "client_certificate $DIR/client.crt $DIR/client.key\n"
	)
	for _, test := range []struct{ name, upstreams, settings, want string }{
		{"good", plain, good, ""},
		{"good, bound", tls, good + "bind_certificate", ""},
		{"good in one file", plain, "client_certificate $DIR/both $DIR/both", ""},
		{"no such certificate", plain, "client_certificate $DIR/none $DIR/client.key", "reading the file that it names failed: no such file or directory"},
		{"no such key", plain, "client_certificate $DIR/client.crt $DIR/none", "reading the file that it names failed: no such file or directory"},
		{"a directory", plain, "client_certificate $DIR $DIR/client.key", "reading the file that it names failed: it is no regular file"},
		{"empty certificate", plain, "client_certificate $DIR/empty $DIR/client.key", "client_certificate: "},
		{"empty key", plain, "client_certificate $DIR/client.crt $DIR/empty", "client_certificate: "},
		{"no PEM", plain, "client_certificate $DIR/text $DIR/client.key", "client_certificate: "},
		{"half a certificate", plain, "client_certificate $DIR/half.crt $DIR/client.key", "client_certificate: "},
		{"half a key", plain, "client_certificate $DIR/client.crt $DIR/half.key", "client_certificate: "},
		{"not a key", plain, "client_certificate $DIR/client.crt $DIR/bad.key", "client_certificate: "},
		{"the key first", plain, "client_certificate $DIR/client.key $DIR/client.crt", "client_certificate: "},
		{"another's key", plain, "client_certificate $DIR/client.crt $OTHER/client.key", "client_certificate: tls: private key does not match public key"},
		{"placeholder that is empty", plain, "client_certificate {env.TEST_UNSET} $DIR/client.key", "evaluated placeholder {env.TEST_UNSET} is empty"},
		{"placeholder of a request", plain, "client_certificate $DIR/client.crt {http.request.header.Key}", "client_certificate: "},

		{"bound in plaintext", plain, good + "bind_certificate", "bind_certificate: a certificate is presented in TLS only; use an upstream with https://"},
		{"bound to nothing", tls, "client_secret s\nbind_certificate", "bind_certificate: there is no client_certificate to bind tokens to; add one"},
		{"bound over HTTP/3", tls, good + "bind_certificate\nversions 3", "can't be presented over HTTP/3; remove 3 from versions"},
		{"HTTP/3 to the upstream", tls, good + "versions 3", ""},
		{"HTTP/3 to the token endpoint", plain, good + "token_transport {\nversions 3\n}", "client_certificate: a certificate can't be presented over HTTP/3; remove 3 from versions"},
		{"bound beside another to the upstream", tls, good + "bind_certificate\ntls_client_auth $OTHER/client.crt $OTHER/client.key", "bind_certificate: the upstream is presented another certificate by tls_client_auth; remove one of the two"},
		{"another to the upstream", tls, good + "tls_client_auth $OTHER/client.crt $OTHER/client.key", ""},
		{"another to the token endpoint", plain, good + "token_transport {\ntls_client_auth $OTHER/client.crt $OTHER/client.key\n}", "client_certificate: token_transport has another one; remove one of the two"},
	} {
		t.Run(test.name, func(t *testing.T) {
			both := slices.Concat(pair.key, pair.chain)
			if err := os.WriteFile(filepath.Join(dir, "both"), both, 0o600); err != nil {
				t.Fatal(err)
			}
			settings := "token_url https://auth.example.com/token\nclient_id gateway\n" + expand(test.settings, "$DIR", dir, "$OTHER", other)
			err := loadError(t, proxyConfig(test.upstreams, settings))
			wantError(t, err, test.want)
			if err != nil {
				wantNoPartOfKey(t, "error", err.Error(), pair, another)
				if strings.Contains(err.Error(), dir) {
					t.Errorf("got error %q, want one that does not quote the value, which may be the key itself", err)
				}
			}
		})
	}
}

// wantNoPartOfKey fails the test if a text holds a part of a private key.
func wantNoPartOfKey(t *testing.T, where, text string, pairs ...certPair) {
	t.Helper()
	const telling = 16 // characters
	for _, pair := range pairs {
		for line := range strings.Lines(string(pair.key)) {
			line = strings.TrimSpace(line)
			for i := 0; i+telling <= len(line) && !strings.HasPrefix(line, "-----"); i += telling {
				if strings.Contains(text, line[i:i+telling]) {
					t.Errorf("%s: got a part of the private key", where)
					return
				}
			}
		}
	}
}

func TestClientKeyIsNotSeen(t *testing.T) {
	m := newMutual(t, true)
	first, second := m.ca.issue(t, "first"), m.ca.issue(t, "second")
	first.write(t, m.dir)
	// Literally in the environment: errors might quote it.
	t.Setenv("TEST_CLIENT_KEY_PEM", string(first.key))
	g := newGateway(t)
	g.admin = freeAddress(t)
	g.load(strings.Replace(m.site("bind_certificate"), m.dir+"/client.key", "{env.TEST_CLIENT_KEY_PEM}", 1) + `
	handle_errors {
		respond "{err.message} {err.trace} {http.oauth2.error_description}"
	}`)
	var replies strings.Builder
	send := func() int {
		r := g.get()
		fmt.Fprint(&replies, r.err, r.header, r.body)
		return r.status
	}
	if got := send(); got != http.StatusOK {
		t.Fatalf("got %d, want 200", got)
	}
	m.refusedAtUp.Store(first.print(), true)
	for _, key := range []string{
		string(second.key),
		strings.TrimPrefix(string(second.key), "-----BEGIN PRIVATE KEY-----\n"), // taken for a file's name
		string(second.key)[:len(second.key)/2],
	} {
		t.Setenv("TEST_CLIENT_KEY_PEM", key)
		failures := len(g.logged("obtaining token failed"))
		eventually(t, func() bool { send(); return len(g.logged("obtaining token failed")) > failures }, "a warning of the key")
	}
	if got := adminGet(t, g.admin, "/config/"); !strings.Contains(got, "{env.TEST_CLIENT_KEY_PEM}") {
		t.Errorf("got %s, want the placeholder", got)
	} else {
		wantNoPartOfKey(t, "admin API", got, first, second)
	}
	g.load("respond gone")
	wantNoPartOfKey(t, "clients", replies.String(), first, second)
	wantNoPartOfKey(t, "log", g.logs(), first, second)
}

func TestNothingIsLeftOfConnectionsWithCertificates(t *testing.T) {
	bothVersions(t, func(t *testing.T, http2 bool) {
		m := newMutual(t, http2)
		first, second := m.ca.issue(t, "first"), m.ca.issue(t, "second")
		first.write(t, m.dir)
		g := startGateway(t, m.site("bind_certificate"))
		g.get().want(t, http.StatusOK)
		second.write(t, m.dir)
		m.refusedAtUp.Store(first.print(), true)
		g.get().want(t, http.StatusOK)
		if got := m.toUp.connections(); got != 2 {
			t.Errorf("got %d connections at the upstream, want one for each certificate, or this test sees nothing", got)
		}
		eventually(t, func() bool { return m.toAuth.connections() == 0 }, "the end of the connections to the token endpoint")

		g.load("respond gone")
		eventually(t, func() bool { return m.toUp.connections() == 0 }, "the end of the connections to the upstream")
		wantNothingLeft(t)
	})
}

// Of a request that has given up, net/http would keep the connection, and the
// next token request be the client of an older certificate.
func TestDialThatOutlivesItsRequest(t *testing.T) {
	m := newMutual(t, false)
	first, second := m.ca.issue(t, "first"), m.ca.issue(t, "second")
	first.write(t, m.dir)
	relay, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer relay.Close()
	held := make(chan struct{})
	release := sync.OnceFunc(func() { close(held) })
	defer release()
	go func() {
		for n := 0; ; n++ {
			conn, err := relay.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				server, err := net.Dial("tcp", m.auth.Listener.Addr().String())
				if err != nil {
					return
				}
				defer server.Close()
				if n == 0 {
					<-held
				}
				go func() { _, _ = io.Copy(server, conn); _ = server.Close() }()
				_, _ = io.Copy(conn, server)
			}()
		}
	}()
	cl := newTransport(t, fmt.Sprintf(`token_url https://%[1]s/token
		client_id gateway
		client_certificate %[2]s/client.crt %[2]s/client.key
		token_transport {
			tls_insecure_skip_verify
		}`, relay.Addr(), m.dir)).fallback
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = cl.endpoint.request(ctx)
	wantTokenError(t, err, codeTimeout, false)
	second.write(t, m.dir)
	release()
	for range 50 { // the connection of the first may be ready before any
		if _, err := cl.endpoint.request(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := m.toAuth.last(t).print; got != second.print() {
			t.Fatalf("got the certificate %s, want %s", got, second.print())
		}
	}
}
