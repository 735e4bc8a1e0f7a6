// The way upstream for tokens that are bound to a certificate.

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

// boundTransport reaches upstreams with the certificate that a token is bound
// to (RFC 8705 §3). A connection belongs to the certificate that it was opened
// with, so each certificate has connections of its own.
type boundTransport struct {
	like *reverseproxy.HTTPTransport

	mu    sync.Mutex   // guards all below
	pools []*boundPool // newest first
}

type boundPool struct {
	*http.Transport
	certificate *tls.Certificate
}

// maxBoundPools is how many certificates keep their idle connections: while
// one replaces another, requests with the token of the old one are still on
// their way.
const maxBoundPools = 2

// newBoundTransport makes a transport like one that is provisioned.
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

// send sends a request upstream on a connection with this certificate. Its URL has
// a scheme already: see Transport.RoundTrip.
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
		// Cloned, it would share the connections. net/http brings its own.
		pool.TLSNextProto, pool.ForceAttemptHTTP2 = nil, true
	}
	b.pools = slices.Insert(b.pools, 0, pool)
	if len(b.pools) > maxBoundPools {
		// Those in use are closed when they have been idle for a while.
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
