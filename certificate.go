// The certificate that a client presents.

package outboundauth

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
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
	if slices.Contains(h.Versions, "3") { // for which Caddy has configured another transport
		return errors.New("a certificate can't be presented over HTTP/3; remove 3 from versions")
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
