package outboundauth

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// certificateCache reads a certificate again each time, and returns the same
// value as long as it has not changed: tokens are bound to certificates, which
// are compared by address.
type certificateCache struct {
	mu      sync.Mutex // guards all below
	digest  [sha256.Size]byte
	current *tls.Certificate
}

func (cache *certificateCache) load(repl *caddy.Replacer, c *ClientCertificate) (*tls.Certificate, error) {
	current, err := cache.loadOnce(repl, c)
	if err != nil {
		// Between the two files, both may have been replaced.
		current, err = cache.loadOnce(repl, c)
	}
	return current, err
}

func (cache *certificateCache) loadOnce(repl *caddy.Replacer, c *ClientCertificate) (*tls.Certificate, error) {
	certificate, err := readSource(repl, "client_certificate, the certificate", c.Certificate)
	if err != nil {
		return nil, err
	}
	key, err := readSource(repl, "client_certificate, its key", c.Key)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(fmt.Appendf(nil, "%q %q", certificate, key))
	cache.mu.Lock()
	defer cache.mu.Unlock()
	if cache.current == nil || cache.digest != digest {
		pair, err := tls.X509KeyPair(certificate, key)
		if err != nil {
			return nil, fmt.Errorf("client_certificate: %w", err)
		}
		cache.current, cache.digest = &pair, digest
	}
	return cache.current, nil
}

// latest returns what was read last, or nil.
func (cache *certificateCache) latest() *tls.Certificate {
	cache.mu.Lock()
	defer cache.mu.Unlock()
	return cache.current
}

// presented is the certificate of one token request. It goes with the
// request's context, so that a token is never taken for bound to another one.
type presented struct {
	certificate *tls.Certificate
	asked       atomic.Bool // by the server
}

type presentedKey struct{}

// withCertificate returns a context whose requests present the certificate;
// nil presents none.
func withCertificate(ctx context.Context, certificate *tls.Certificate) (context.Context, *presented) {
	p := &presented{certificate: certificate}
	return context.WithValue(ctx, presentedKey{}, p), p
}

// presentCertificates makes a transport present the certificates of its
// requests. It must not be shared with clients that have other ones: a
// connection is the client whose certificate it was opened with.
func presentCertificates(h *reverseproxy.HTTPTransport) error {
	if err := checkVersions(h); err != nil {
		return err
	}
	config := h.Transport.TLSClientConfig
	if config == nil {
		config = new(tls.Config)
		h.Transport.TLSClientConfig = config
	}
	config.GetClientCertificate = func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if p, ok := info.Context().Value(presentedKey{}).(*presented); ok && p.certificate != nil {
			p.asked.Store(true)
			return p.certificate, nil
		}
		return new(tls.Certificate), nil // none
	}
	return nil
}

// checkVersions refuses HTTP/3, which Caddy's transport configures for itself.
func checkVersions(h *reverseproxy.HTTPTransport) error {
	if slices.Contains(h.Versions, "3") {
		return errors.New("a certificate can't be presented over HTTP/3; remove 3 from versions")
	}
	return nil
}

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
	case like.TLS.ClientCertificateFile != "" || like.TLS.ClientCertificateAutomate != "":
		return nil, errors.New("the upstream is presented another certificate by tls_client_auth; remove one of the two")
	}
	if len(like.TLS.ExceptPorts) > 0 {
		return nil, errors.New("a certificate is presented in TLS only; remove tls_except_ports")
	}
	return &boundTransport{like: like}, presentCertificates(like)
}

// send sends a request upstream on a connection with this certificate.
func (b *boundTransport) send(req *http.Request, certificate *tls.Certificate) (*http.Response, error) {
	b.like.SetScheme(req)
	ctx, _ := withCertificate(req.Context(), certificate)
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
