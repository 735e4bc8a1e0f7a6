package outboundauth

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

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

// With this setting, crypto/tls does not parse the certificates that it loads.
func TestBoundTokenOfACertificateThatNobodyHasParsed(t *testing.T) {
	t.Setenv("GODEBUG", "x509keypairleaf=0")
	for _, settings := range []string{"bind_certificate", "bind_certificate\nauth_method private_key_jwt"} {
		m := newMutual(t, false)
		pair := m.ca.issue(t, "gateway")
		pair.write(t, m.dir)
		g := startGateway(t, m.site(settings))
		g.get().want(t, http.StatusOK)
		if !m.took(pair) {
			t.Errorf("%s: got no token of the certificate at the upstream, want one", settings)
		}
	}
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
