// Package clientcert keeps a client's certificate, and presents it in the client's requests.
package clientcert

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"
	"sync/atomic"
)

// A Cache returns the same pointer for a certificate as long as the certificate
// has not changed. Tokens are bound to certificates, which are compared by
// address.
type Cache struct {
	mu      sync.Mutex // guards all fields below
	digest  [sha256.Size]byte
	current *tls.Certificate
}

// Pair returns a certificate with its key. Both parameters are texts in PEM. The
// certificate has its Leaf.
func (cache *Cache) Pair(certificate, key []byte) (*tls.Certificate, error) {
	digest := sha256.Sum256(fmt.Appendf(nil, "%q %q", certificate, key))
	cache.mu.Lock()
	defer cache.mu.Unlock()
	if cache.current == nil || cache.digest != digest {
		pair, err := tls.X509KeyPair(certificate, key)
		if err != nil {
			return nil, err
		}
		if pair.Leaf == nil { // as GODEBUG=x509keypairleaf=0 has it
			if pair.Leaf, err = x509.ParseCertificate(pair.Certificate[0]); err != nil {
				return nil, err
			}
		}
		cache.current, cache.digest = &pair, digest
	}
	return cache.current, nil
}

// Presented is the certificate of one request. It is in the request's context.
// So a token is bound to the certificate that was presented to get this token.
type Presented struct {
	certificate *tls.Certificate
	asked       atomic.Bool // a server has asked for the certificate
}

type presentedKey struct{}

// With returns a context. Requests with this context present the certificate. If
// certificate is nil, they present none.
func With(ctx context.Context, certificate *tls.Certificate) (context.Context, *Presented) {
	p := &Presented{certificate: certificate}
	return context.WithValue(ctx, presentedKey{}, p), p
}

// Ignored reports whether there was a certificate to present, and no server
// asked for it.
func (p *Presented) Ignored() bool { return p.certificate != nil && !p.asked.Load() }

// Ask returns the certificate that requests with this context present, or nil.
// It notes that a server has asked for the certificate.
func Ask(ctx context.Context) *tls.Certificate {
	p, ok := ctx.Value(presentedKey{}).(*Presented)
	if !ok || p.certificate == nil {
		return nil
	}
	p.asked.Store(true)
	return p.certificate
}

// Present changes config: a connection presents the certificate of the request
// that it is opened for. Clients with different certificates must not share
// their connections. On each connection, the server knows only the client whose
// certificate was presented.
func Present(config *tls.Config) {
	config.GetClientCertificate = func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if certificate := Ask(info.Context()); certificate != nil {
			return certificate, nil
		}
		return new(tls.Certificate), nil // no certificate
	}
}
