// The transport to upstreams for tokens that are bound to a certificate.

package outboundauth

import (
	"crypto/tls"
	"errors"
	"net/http"
	"slices"
	"sync"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/clientcert"
)

// boundTransport connects to upstreams with the certificate to which a token is
// bound (RFC 8705 §3). A connection keeps the certificate with which it was
// opened, so each certificate has connections of its own.
type boundTransport struct {
	like *reverseproxy.HTTPTransport

	mu    sync.Mutex   // guards all below
	pools []*boundPool // newest first
}

type boundPool struct {
	*http.Transport
	certificate *tls.Certificate
}

// maxBoundPools is how many certificates keep their idle connections. After a
// new certificate has replaced an old one, requests with the old one's token
// are still on their way.
const maxBoundPools = 2

// newBoundTransport makes a boundTransport with the settings of a transport
// that is provisioned.
func newBoundTransport(like *reverseproxy.HTTPTransport) (*boundTransport, error) {
	switch {
	case like.TLS == nil:
		return nil, errors.New("a certificate is presented in TLS only; use an upstream with https://")
	case presentsCertificate(like):
		return nil, errors.New("the upstream is presented another certificate by tls_client_auth; remove one of the two")
	case len(like.TLS.ExceptPorts) > 0:
		return nil, errors.New("a certificate is presented in TLS only; remove tls_except_ports")
	}
	return &boundTransport{like: like}, presentCertificates(like)
}

// send sends a request upstream on a connection with this certificate. The
// request's URL must have a scheme: Transport.RoundTrip sets it.
func (b *boundTransport) send(req *http.Request, certificate *tls.Certificate) (*http.Response, error) {
	ctx, _ := clientcert.With(req.Context(), certificate)
	return b.pool(certificate).RoundTrip(req.WithContext(ctx))
}

// pool returns the connections with this certificate.
func (b *boundTransport) pool(certificate *tls.Certificate) *boundPool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, pool := range b.pools {
		if pool.certificate == certificate {
			return pool
		}
	}
	pool := &boundPool{b.like.Transport.Clone(), certificate}
	if _, http2 := pool.TLSNextProto["h2"]; http2 {
		// The clone would share HTTP/2 connections with the original. Now
		// net/http makes new ones for it.
		pool.TLSNextProto, pool.ForceAttemptHTTP2 = nil, true
	}
	b.pools = slices.Insert(b.pools, 0, pool)
	if len(b.pools) > maxBoundPools {
		// Connections in use are closed when they have been idle for a while.
		b.pools[maxBoundPools].CloseIdleConnections()
		b.pools = b.pools[:maxBoundPools]
	}
	return pool
}

// Cleanup closes the idle connections.
func (b *boundTransport) Cleanup() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, pool := range b.pools {
		pool.CloseIdleConnections()
	}
	return nil
}
