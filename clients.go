// The OAuth clients of one transport: they are opened at load, and closed at its end.

package outboundauth

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// clients opens the OAuth clients of one transport, and everything that they
// need. close closes all of this together.
type clients struct {
	logger    *zap.Logger
	events    *emitter
	plaintext bool // unencrypted connections to token endpoints are allowed

	acquired    []*client                                      // close releases them
	provisioned []caddy.CleanerUpper                           // close cleans them up
	transports  map[*reverseproxy.HTTPTransport]tokenTransport // clients that inherit the same token_transport share one
}

// open opens the client for complete credentials.
func (cs *clients) open(ctx caddy.Context, c Credentials) (*client, error) {
	expanded, err := c.expand(caddy.NewReplacer())
	if err != nil {
		return nil, err
	}
	transport, err := cs.tokenTransport(ctx, &expanded)
	if err != nil {
		return nil, err
	}
	e, err := newEndpoint(expanded, c.TokenURL, transport, cs.plaintext, cs.logger, cs.events)
	if err != nil {
		return nil, err
	}
	cl, err := newClient(e, transport.config)
	if err != nil {
		return nil, errors.Join(err, e.release())
	}
	cs.acquired = append(cs.acquired, cl)
	return cl, nil
}

// close closes everything that was opened. It may be called again.
func (cs *clients) close() error {
	var err error
	for _, cl := range cs.acquired {
		err = errors.Join(err, cl.release())
	}
	for _, transport := range cs.provisioned {
		err = errors.Join(err, transport.Cleanup())
	}
	cs.acquired, cs.provisioned, cs.transports = nil, nil, nil
	return err
}

// closeToo makes close clean up c, which belongs to one of the clients.
func (cs *clients) closeToo(c caddy.CleanerUpper) { cs.provisioned = append(cs.provisioned, c) }

// tokenTransport returns the transport to the token endpoint of c.
func (cs *clients) tokenTransport(ctx caddy.Context, c *Credentials) (tokenTransport, error) {
	if c.ClientCertificate != nil { // other clients must not use this transport
		return cs.provision(ctx, c)
	}
	if transport, ok := cs.transports[c.TokenTransport]; ok {
		return transport, nil
	}
	transport, err := cs.provision(ctx, c)
	if err != nil {
		return tokenTransport{}, err
	}
	if cs.transports == nil {
		cs.transports = make(map[*reverseproxy.HTTPTransport]tokenTransport)
	}
	cs.transports[c.TokenTransport] = transport
	return transport, nil
}

// provision provisions the token_transport of c, or else the default transport.
func (cs *clients) provision(ctx caddy.Context, c *Credentials) (tokenTransport, error) {
	h := new(reverseproxy.HTTPTransport)
	config, err := json.Marshal(cmp.Or(c.TokenTransport, h))
	if err != nil {
		return tokenTransport{}, fmt.Errorf("token_transport: %w", err)
	}
	// h is a copy: clients that inherit the setting may need a transport each.
	if err := json.Unmarshal(config, h); err != nil {
		return tokenTransport{}, fmt.Errorf("token_transport: %w", err)
	}
	// Before Provision, which adds its defaults to h.
	if config, err = json.Marshal(identity(*h)); err != nil {
		return tokenTransport{}, fmt.Errorf("token_transport: %w", err)
	}
	if len(h.Versions) == 0 {
		// Each token request ends its connection. Over HTTP/2, requests share a
		// connection, so one request would end the connection of others.
		h.Versions = []string{"1.1"}
	}
	cs.closeToo(h)
	proxied := usesProxy(h) // asked now: Provision clears the setting
	if err := h.Provision(ctx); err != nil {
		return tokenTransport{}, fmt.Errorf("token_transport: %w", err)
	}
	// A dial may outlive its request. Then net/http would keep the connection,
	// and the next request would go out with an old certificate.
	h.Transport.DisableKeepAlives = true
	watchDestinations(h.Transport)
	if c.ClientCertificate != nil {
		if err := presentCertificates(h); err != nil {
			return tokenTransport{}, fmt.Errorf("client_certificate: %w", err)
		}
	}
	return tokenTransport{h, config, proxied}, nil
}

// identity returns a transport without the settings that say only how long to wait, and
// how connections are used. The others decide which server is reached, and as whom.
func identity(h reverseproxy.HTTPTransport) reverseproxy.HTTPTransport {
	h.KeepAlive, h.MaxConnsPerHost, h.Versions = nil, 0, nil
	h.DialTimeout, h.FallbackDelay, h.ResponseHeaderTimeout, h.ExpectContinueTimeout, h.ReadTimeout, h.WriteTimeout = 0, 0, 0, 0, 0, 0
	h.MaxResponseHeaderSize, h.WriteBufferSize, h.ReadBufferSize = 0, 0, 0
	if h.TLS != nil {
		tls := *h.TLS
		tls.HandshakeTimeout = 0
		h.TLS = &tls
	}
	return h
}
