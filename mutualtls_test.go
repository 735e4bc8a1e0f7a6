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
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
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

// took reports whether the upstream has taken a token of this certificate.
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
