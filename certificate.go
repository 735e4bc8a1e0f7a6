// The certificate that a client presents: from which files, by which transport.

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

// read reads certificate and key; as long as they are the same, so is the value.
func (c *ClientCertificate) read(repl *caddy.Replacer, cache *clientcert.Cache) (*tls.Certificate, error) {
	current, err := c.readOnce(repl, cache)
	if err != nil {
		// Between the two files, both may have been replaced.
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

// presentCertificates makes a transport present the certificates of its
// requests.
func presentCertificates(h *reverseproxy.HTTPTransport) error {
	if slices.Contains(h.Versions, "3") { // for which Caddy has configured another transport
		return errors.New("a certificate can't be presented over HTTP/3; remove 3 from versions")
	}
	if h.Transport.TLSClientConfig == nil {
		h.Transport.TLSClientConfig = new(tls.Config)
	}
	clientcert.Present(h.Transport.TLSClientConfig)
	return nil
}
