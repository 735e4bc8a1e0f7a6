package e2e

import (
	"bufio"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// certificate is a certificate with its private key.
type certificate struct {
	*x509.Certificate
	key crypto.Signer
}

// authority is a CA.
type authority struct {
	certificate
	file string // its certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	ca := signCertificate(t, &x509.Certificate{
		Subject:               pkix.Name{CommonName: "CA of " + t.Name()},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}, nil)
	return &authority{ca, writeFile(t, "ca.pem", ca.certPEM())}
}

// tokenTransport is the setting for a token endpoint with a certificate of the
// CA.
func (ca *authority) tokenTransport() string {
	return fmt.Sprintf("token_transport {\n\t\t\ttls_trust_pool file %s\n\t\t}", ca.file)
}

// issue returns a certificate for a server or a client of that name.
func (ca *authority) issue(t *testing.T, name string) certificate {
	t.Helper()
	return signCertificate(t, leaf(name), &ca.certificate)
}

// selfSigned returns a certificate that no CA vouches for.
func selfSigned(t *testing.T, name string) certificate {
	t.Helper()
	return signCertificate(t, leaf(name), nil)
}

func leaf(name string) *x509.Certificate {
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if ip := net.ParseIP(name); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{name}
	}
	return template
}

// signCertificate makes a key and a certificate for it. Without an issuer it
// signs itself.
func signCertificate(t *testing.T, template *x509.Certificate, issuer *certificate) certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		t.Fatal(err)
	}
	template.NotBefore = time.Now().Add(-time.Minute)
	template.NotAfter = time.Now().Add(time.Hour)
	if issuer == nil {
		issuer = &certificate{template, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer.Certificate, key.Public(), issuer.key)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return certificate{signed, key}
}

func (c certificate) certPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

func (c certificate) keyPEM(t *testing.T) []byte { return pkcs8(t, c.key) }

// pair returns it as crypto/tls wants it.
func (c certificate) pair() tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: c.key}
}

// keys is how a server is told of a self-signed certificate (RFC 8705 §2.2.2).
func (c certificate) keys() *jose.JSONWebKeySet {
	return &jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{
		Key:          c.key.Public(),
		Certificates: []*x509.Certificate{c.Certificate},
	}}}
}

// certificateFiles are a certificate and its key on disk, where another may
// replace them.
type certificateFiles struct{ cert, key string }

func (c certificate) write(t *testing.T) certificateFiles {
	t.Helper()
	dir := t.TempDir()
	files := certificateFiles{filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key")}
	files.replace(t, c)
	return files
}

// replace writes one file after the other, as everybody has to: in between,
// they don't fit together.
func (f certificateFiles) replace(t *testing.T, c certificate) {
	t.Helper()
	replaceFile(t, f.cert, c.certPEM())
	replaceFile(t, f.key, c.keyPEM(t))
}

// setting returns the files in the Caddyfile's terms.
func (f certificateFiles) setting() string {
	return fmt.Sprintf("client_certificate %s %s", f.cert, f.key)
}

// tlsUpstream is an upstream over TLS that asks clients for a certificate.
type tlsUpstream struct {
	*upstream
	client client
	addr   string
	bind   bool // take a token only over a connection with its certificate

	mu         sync.Mutex
	presented  map[string]bool // certificates
	mismatches []string
}

// newTLSUpstream starts an upstream for tokens of the server's issuer over TLS,
// and with a certificate of its CA.
func newTLSUpstream(t *testing.T, as *authServer, c client, bind bool) *tlsUpstream {
	t.Helper()
	b := &tlsUpstream{upstream: newUpstream(t, as, c), client: c, bind: bind, presented: make(map[string]bool)}
	b.verifier.issuer = as.https
	srv := httptest.NewUnstartedServer(b)
	srv.EnableHTTP2 = true
	srv.TLS = &tls.Config{
		Certificates: []tls.Certificate{as.ca.issue(t, "127.0.0.1").pair()},
		ClientAuth:   tls.RequestClientCert,
	}
	if bind {
		// From whom they are is no matter: the token names the one.
		srv.TLS.ClientAuth = tls.RequireAnyClientCert
	}
	srv.StartTLS()
	closeAtEnd(t, srv)
	b.addr = srv.Listener.Addr().String()
	return b
}

func (b *tlsUpstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	for _, c := range r.TLS.PeerCertificates {
		b.presented[string(c.Raw)] = true
	}
	b.mu.Unlock()
	if b.bind {
		token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
		if err := b.verifier.verifyBound(token, r.TLS.PeerCertificates[0]); err != nil {
			b.mu.Lock()
			b.mismatches = append(b.mismatches, err.Error())
			b.mu.Unlock()
			// Not 401, which the gateway would mend with another token.
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
	}
	b.upstream.ServeHTTP(w, r)
}

// wantCertificates fails the test unless that many certificates came, and none
// with a token that isn't bound to it.
func (b *tlsUpstream) wantCertificates(t *testing.T, n int) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.presented) != n {
		t.Errorf("upstream saw %d client certificates, want %d", len(b.presented), n)
	}
	for _, mismatch := range b.mismatches[:min(len(b.mismatches), 5)] {
		t.Errorf("upstream refused a token: %s", mismatch)
	}
}

// route is the gateway's way to the upstream, with a server that it trusts.
func (b *tlsUpstream) route(as *authServer, settings []string) route {
	return route{
		client: b.client,
		to:     "https://" + b.addr,
		settings: append(settings,
			"tls_trust_pool file "+as.ca.file,
			as.ca.tokenTransport()),
	}
}

// TestClientCertificates obtains tokens with certificates that a CA has signed
// and with others that sign themselves, at a given address and at the one that
// the issuer's metadata has for it.
//
// The server's request for a certificate names its CA. Self-signed ones have to
// come nevertheless.
func TestClientCertificates(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	pki := as.ca.issue(t, "client.example")
	own := selfSigned(t, "client.example")
	key := newKey(t, "ES256")

	tests := []struct {
		name     string
		client   client
		cert     certificate
		settings []string
	}{
		{
			name:   "CA",
			client: client{Method: "tls_client_auth", DNSName: "client.example"},
			cert:   pki,
		},
		{
			name:   "self-signed",
			client: client{Method: "self_signed_tls_client_auth", Keys: own.keys()},
			cert:   own,
		},
		{
			// What authenticates the client is not what binds its tokens.
			name:     "private key, bound to a certificate",
			client:   client{Method: "private_key_jwt", Keys: keySet(key, "")},
			cert:     own,
			settings: []string{"private_key " + writeFile(t, "key.pem", pkcs8(t, key))},
		},
	}
	endpoints := []struct{ name, setting string }{
		{"token_url", "token_url " + as.mtls + "/token"},
		// Where the issuer itself listens, no certificate is asked for.
		{"issuer", "issuer " + as.https},
	}
	var (
		routes    []route
		upstreams []*tlsUpstream
	)
	for _, tt := range tests {
		for _, endpoint := range endpoints {
			c := tt.client
			c.ID = fmt.Sprintf("%s at %s", tt.name, endpoint.name)
			c.Bound = true
			as.register(t, c)
			bound := newTLSUpstream(t, as, c, true)
			upstreams = append(upstreams, bound)
			routes = append(routes, bound.route(as, slices.Concat(tt.settings, []string{
				endpoint.setting, tt.cert.write(t).setting(), "bind_certificate",
			})))
		}
	}
	gw := startRoutes(t, routes)
	for i, u := range upstreams {
		t.Run(routes[i].client.ID, func(t *testing.T) {
			gw.get(t, routePath(i), 200)
			gw.get(t, routePath(i), 200)
			u.wantAccepted(t, 2, "HTTP/2.0")
			u.wantCertificates(t, 1)
			if got := as.stats(t).Granted[routes[i].client.ID]; got != 1 {
				t.Errorf("tokens granted = %d, want 1", got)
			}
		})
	}
}

// TestCertificateIsForTheTokenEndpointOnly shows that an upstream doesn't get to
// see the certificate unless that was asked for.
func TestCertificateIsForTheTokenEndpointOnly(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := client{ID: "mtls", Method: "tls_client_auth", DNSName: "client.example"}
	as.register(t, c)
	curious := newTLSUpstream(t, as, c, false)
	gw := startRoutes(t, []route{curious.route(as, []string{
		"token_url " + as.mtls + "/token", as.ca.issue(t, "client.example").write(t).setting(),
	})})

	gw.get(t, routePath(0), 200)
	curious.wantAccepted(t, 1, "HTTP/2.0")
	curious.wantCertificates(t, 0)
}

// TestBoundUpstreamRefuses shows that the upstream, which the tests of
// certificates rely on, refuses a token over a connection with another
// certificate. No gateway takes part.
func TestBoundUpstreamRefuses(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	right, wrong := selfSigned(t, "right"), selfSigned(t, "wrong")
	c := client{ID: "mtls", Method: "self_signed_tls_client_auth", Keys: right.keys(), Bound: true}
	as.register(t, c)
	bound := newTLSUpstream(t, as, c, true)

	form := url.Values{
		"grant_type": {"client_credentials"},
		"client_id":  {c.ID},
		"scope":      {scopes},
		"resource":   {resource},
	}
	ask := newRequest(t, "POST", as.mtls+"/token", strings.NewReader(form.Encode()))
	ask.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp := doWith(t, right.httpClient(t, as), ask)
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(resp.body, &answer); err != nil || answer.AccessToken == "" {
		t.Fatalf("POST /token = %s %s, want a token", resp.Status, resp.body)
	}

	for _, tt := range []struct {
		name   string
		cert   certificate
		status int
	}{
		{"right", right, http.StatusOK},
		{"wrong", wrong, http.StatusForbidden},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req := newRequest(t, "GET", "https://"+bound.addr, nil)
			req.Header.Set("Authorization", "Bearer "+answer.AccessToken)
			req.Header.Set("X-Tenant-Id", tenant)
			if resp := doWith(t, tt.cert.httpClient(t, as), req); resp.StatusCode != tt.status {
				t.Errorf("GET = %s %s, want %d", resp.Status, resp.body, tt.status)
			}
		})
	}
}

// httpClient returns a client that presents the certificate, whatever CA the
// server asks for.
func (c certificate) httpClient(t *testing.T, as *authServer) *http.Client {
	roots := x509.NewCertPool()
	roots.AddCert(as.ca.Certificate)
	pair := c.pair()
	transport := &http.Transport{TLSClientConfig: &tls.Config{
		RootCAs:              roots,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil },
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// TestCertificateOutlivedByAStream replaces the certificate twice while a
// response over a connection with the first one goes on. No later token may
// travel over that connection.
func TestCertificateOutlivedByAStream(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	first := selfSigned(t, "first")
	c := client{ID: "mtls", Method: "self_signed_tls_client_auth", Keys: first.keys(), Bound: true}
	as.register(t, c)
	bound := newTLSUpstream(t, as, c, true)
	ended := make(chan struct{})
	bound.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/stream") {
			w.Header().Set("Content-Type", "text/event-stream")
			fmt.Fprint(w, "data: first\n\n")
			http.NewResponseController(w).Flush()
			select {
			case <-ended:
				fmt.Fprint(w, "data: last\n\n")
			case <-r.Context().Done():
			}
		}
	})
	files := first.write(t)
	gw := startRoutes(t, []route{bound.route(as, []string{
		"token_url " + as.mtls + "/token", files.setting(), "bind_certificate",
	})})

	stream, err := http.DefaultClient.Do(newRequest(t, "GET", gw.url+routePath(0)+"/stream", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Body.Close()
	lines := bufio.NewReader(stream.Body)
	if line, err := lines.ReadString('\n'); err != nil || line != "data: first\n" {
		t.Fatalf("stream begins with %q, %v, want data: first", line, err)
	}
	for _, name := range []string{"second", "third"} {
		next := selfSigned(t, name)
		c.Keys = next.keys()
		as.register(t, c)
		files.replace(t, next)
		bound.revoke()
		// Renewals after refusals are spaced out.
		var resp reply
		await(t, "token of the "+name+" certificate", func() bool {
			resp = do(t, newRequest(t, "GET", gw.url+routePath(0), nil))
			return resp.StatusCode != http.StatusUnauthorized
		})
		if resp.StatusCode != http.StatusOK {
			t.Errorf("GET with the %s certificate = %s, want 200", name, resp.Status)
		}
	}
	bound.wantCertificates(t, 3)

	close(ended)
	if rest, err := io.ReadAll(lines); err != nil || !strings.Contains(string(rest), "data: last") {
		t.Errorf("stream ends with %q, %v, want data: last", rest, err)
	}
}
