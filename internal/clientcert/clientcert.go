// Package clientcert keeps a client's certificate, and presents it in its requests.
package clientcert

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"sync"
	"sync/atomic"
)

// A Cache returns the same value for a certificate as long as it has not
// changed: tokens are bound to certificates, which are compared by address.
type Cache struct {
	mu      sync.Mutex // guards all below
	digest  [sha256.Size]byte
	current *tls.Certificate
}

// Pair returns the certificate, with its key, that two texts in PEM hold.
func (cache *Cache) Pair(certificate, key []byte) (*tls.Certificate, error) {
	digest := sha256.Sum256(fmt.Appendf(nil, "%q %q", certificate, key))
	cache.mu.Lock()
	defer cache.mu.Unlock()
	if cache.current == nil || cache.digest != digest {
		pair, err := tls.X509KeyPair(certificate, key)
		if err != nil {
			return nil, err
		}
		cache.current, cache.digest = &pair, digest
	}
	return cache.current, nil
}

// Latest returns what Pair returned last, or nil.
func (cache *Cache) Latest() *tls.Certificate {
	cache.mu.Lock()
	defer cache.mu.Unlock()
	return cache.current
}

// Presented is the certificate of one request. It goes with the request's
// context, so that a token is bound to the certificate that was presented for it.
type Presented struct {
	certificate *tls.Certificate
	asked       atomic.Bool // by the server
}

type presentedKey struct{}

// With returns a context whose requests present the certificate; nil presents
// none.
func With(ctx context.Context, certificate *tls.Certificate) (context.Context, *Presented) {
	p := &Presented{certificate: certificate}
	return context.WithValue(ctx, presentedKey{}, p), p
}

// Ignored reports whether there was a certificate to present, and no server
// asked for it.
func (p *Presented) Ignored() bool { return p.certificate != nil && !p.asked.Load() }

// Ask returns the certificate that requests with this context present, or nil.
// The server's question is noted.
func Ask(ctx context.Context) *tls.Certificate {
	p, ok := ctx.Value(presentedKey{}).(*Presented)
	if !ok || p.certificate == nil {
		return nil
	}
	p.asked.Store(true)
	return p.certificate
}

// Present makes connections with this configuration present the certificates of
// the requests that they are opened for. They must not be shared with clients
// that have other ones: a connection is the client whose certificate it was
// opened with.
func Present(config *tls.Config) {
	config.GetClientCertificate = func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if certificate := Ask(info.Context()); certificate != nil {
			return certificate, nil
		}
		return new(tls.Certificate), nil // none
	}
}
