// The OAuth clients of one transport: opened at load, closed at its end.

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
// need. All of it is closed together.
type clients struct {
	logger    *zap.Logger
	events    *emitter
	plaintext bool // to token endpoints, allowed

	acquired    []*client                                      // to be released
	provisioned []caddy.CleanerUpper                           // to be cleaned up
	transports  map[*reverseproxy.HTTPTransport]tokenTransport // shared by those who inherit their token_transport
}

// open opens the client of credentials that are complete.
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

// close closes what was opened. Caddy may ask for it again.
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

// closeToo has close clean up what belongs to one of the clients.
func (cs *clients) closeToo(c caddy.CleanerUpper) { cs.provisioned = append(cs.provisioned, c) }

// tokenTransport returns the way to the token endpoint of c.
func (cs *clients) tokenTransport(ctx caddy.Context, c *Credentials) (tokenTransport, error) {
	if c.ClientCertificate != nil { // which others must not use
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

// provision provisions the token_transport of c, or the default transport if
// there is none.
func (cs *clients) provision(ctx caddy.Context, c *Credentials) (tokenTransport, error) {
	h := new(reverseproxy.HTTPTransport)
	config, err := json.Marshal(cmp.Or(c.TokenTransport, h)) // before Provision: it writes its defaults there
	if err != nil {
		return tokenTransport{}, fmt.Errorf("token_transport: %w", err)
	}
	// A copy: those that inherit it may need one each.
	if err := json.Unmarshal(config, h); err != nil {
		return tokenTransport{}, fmt.Errorf("token_transport: %w", err)
	}
	if len(h.Versions) == 0 {
		// Over HTTP/2, requests that end their connection take each other's away.
		h.Versions = []string{"1.1"}
	}
	cs.closeToo(h)
	proxied := usesProxy(h) // Provision forgets it
	if err := h.Provision(ctx); err != nil {
		return tokenTransport{}, fmt.Errorf("token_transport: %w", err)
	}
	// net/http would keep the connection of a dial that outlives its request, and
	// the next request would go out with the certificate of that time.
	h.Transport.DisableKeepAlives = true
	if c.ClientCertificate != nil {
		if err := presentCertificates(h); err != nil {
			return tokenTransport{}, fmt.Errorf("client_certificate: %w", err)
		}
	}
	return tokenTransport{h, config, proxied}, nil
}
