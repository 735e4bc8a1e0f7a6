// The certificate that a client presents: how it is read, and which transport presents it.

package outboundauth

import (
	"crypto/tls"
	"errors"
	"fmt"
	"slices"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/clientcert"
)

// read reads the certificate and its key. It returns the same value as long as
// these do not change.
func (c *ClientCertificate) read(repl *caddy.Replacer, cache *clientcert.Cache) (*tls.Certificate, error) {
	current, err := c.readOnce(repl, cache)
	if err != nil {
		// Both files may have been replaced after read had read one of them.
		current, err = c.readOnce(repl, cache)
	}
	return current, err
}

func (c *ClientCertificate) readOnce(repl *caddy.Replacer, cache *clientcert.Cache) (*tls.Certificate, error) {
	certificate, err := readSource(repl, "client_certificate, the certificate", c.Certificate)
	if err != nil {
		return nil, err
	}
	key, err := readSource(repl, "client_certificate, its key", c.Key)
	if err != nil {
		return nil, err
	}
	pair, err := cache.Pair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("client_certificate: %w", err)
	}
	return pair, nil
}

// presentCertificates makes a transport present each request's certificate.
func presentCertificates(h *reverseproxy.HTTPTransport) error {
	if slices.Contains(h.Versions, "3") { // Caddy has another transport for HTTP/3
		return errors.New("a certificate can't be presented over HTTP/3; remove 3 from versions")
	}
	if h.Transport.TLSClientConfig == nil {
		h.Transport.TLSClientConfig = new(tls.Config)
	}
	clientcert.Present(h.Transport.TLSClientConfig)
	return nil
}
