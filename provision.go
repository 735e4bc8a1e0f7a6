// A config becomes a transport: its clients, and what is wrong at load.

package outboundauth

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// tokenTransport is a provisioned token_transport with its config, which is
// part of what tells token sources apart.
type tokenTransport struct {
	*reverseproxy.HTTPTransport
	config  []byte
	proxied bool
}

// provisionClients makes the clients of all credentials, and the table by
// which a request finds its own.
func (t *Transport) provisionClients(ctx caddy.Context) error {
	repl := caddy.NewReplacer()
	// Upstreams that inherit their token_transport share it.
	transports := make(map[*reverseproxy.HTTPTransport]tokenTransport)

	if len(t.Upstreams) == 0 && t.Credentials == nil {
		return errors.New("transport oauth2: token_url, client_id and client_secret are missing")
	}
	var base *Credentials
	if t.Credentials != nil {
		own, err := t.Credentials.canonical()
		if err != nil {
			return err
		}
		base = &own
		if missing := own.missing(); missing == "" {
			if t.fallback, err = t.provisionClient(ctx, repl, own, transports); err != nil {
				return err
			}
		} else if len(t.Upstreams) == 0 {
			return errors.New(missing)
		} else if err := own.check(); err != nil { // to inherit from
			return err
		}
	}

	t.clients = make(map[dialAddress]*client)
	for i, upstream := range t.Upstreams {
		if upstream == nil {
			return fmt.Errorf("upstream %d: is null", i)
		}
		cl, err := t.upstreamClient(ctx, repl, upstream, base, transports)
		if err != nil {
			return fmt.Errorf("upstream %d (%s): %w", i, strings.Join(upstream.Addresses, " "), err)
		}
		for _, address := range upstream.Addresses {
			dial, err := parseDialAddress(repl, address)
			if err != nil {
				return fmt.Errorf("upstream %s: %w", address, err)
			}
			if _, ok := t.clients[dial]; ok {
				return fmt.Errorf("upstream %s: named twice; each address belongs to one upstream block", address)
			}
			t.clients[dial] = cl
		}
	}
	return nil
}

// upstreamClient makes the client of one upstream block; nil if it is off.
func (t *Transport) upstreamClient(ctx caddy.Context, repl *caddy.Replacer, u *Upstream, base *Credentials, transports map[*reverseproxy.HTTPTransport]tokenTransport) (*client, error) {
	if len(u.Addresses) == 0 {
		return nil, errors.New("addresses is missing: name the upstream")
	}
	if u.Off {
		if u.Credentials != nil {
			return nil, errors.New("off contradicts its other settings: remove one of the two")
		}
		return nil, nil
	}
	var own Credentials
	if u.Credentials != nil {
		var err error
		if own, err = u.Credentials.canonical(); err != nil {
			return nil, err
		}
	}
	if err := own.check(); err != nil {
		return nil, err
	}
	merged := own.inherit(base)
	if missing := merged.missing(); missing != "" {
		return nil, errors.New(missing)
	}
	return t.provisionClient(ctx, repl, merged, transports)
}

// provisionClient provisions credentials and everything that they need.
func (t *Transport) provisionClient(ctx caddy.Context, repl *caddy.Replacer, c Credentials, transports map[*reverseproxy.HTTPTransport]tokenTransport) (*client, error) {
	template := c.TokenURL
	c, err := c.expand(repl)
	if err != nil {
		return nil, err
	}
	e := &endpoint{urlTemplate: template, credentials: c, logger: t.logger, events: t.events}
	transport, ok := transports[c.TokenTransport]
	if !ok || c.ClientCertificate != nil { // which others must not use
		if transport, err = t.provisionTokenTransport(ctx, c); err != nil {
			return nil, err
		}
		if c.ClientCertificate == nil {
			transports[c.TokenTransport] = transport
		}
	}
	e.transport = transport
	if err := t.locate(e, transport); err != nil {
		return nil, err
	}
	if _, _, _, err := c.resolveKeys(repl, &e.certificates); err != nil {
		return nil, err
	}
	var bound *boundTransport
	if c.BindCertificate {
		if bound, err = newBoundTransport(t.HTTPTransport); err != nil {
			return nil, fmt.Errorf("bind_certificate: %w", err)
		}
		t.transports = append(t.transports, bound)
	}
	cl, err := newClient(e, transport.config)
	if err != nil {
		return nil, err
	}
	cl.bound = bound
	t.acquired = append(t.acquired, cl)
	cl.fields(&t.reserved)
	return cl, nil
}

// locate sets where the token endpoint is, or how it is found.
func (t *Transport) locate(e *endpoint, transport tokenTransport) (err error) {
	c := &e.credentials
	permit := func(u *url.URL) error {
		if u.Scheme != "https" && (c.authMethod() == authTLS || c.BindCertificate) {
			return errors.New("the client_certificate can be presented in TLS only; use https://")
		}
		if slices.Contains(t.InsecurePlaintext, plaintextTokenURL) {
			return nil
		}
		return checkPlaintext(u, transport.proxied)
	}
	if c.Issuer != "" {
		issuer, err := parseIssuer(c.Issuer)
		if err == nil {
			err = permit(issuer)
		}
		if err != nil {
			return fmt.Errorf("issuer: %w", err)
		}
		e.discovery = &discovery{issuer: issuer, credentials: c, transport: transport, permit: permit, logger: t.logger}
		return nil
	}
	if e.url, err = parseTokenURL(c.TokenURL); err == nil {
		err = permit(e.url)
	}
	if err != nil {
		return fmt.Errorf("token_url: %w", err)
	}
	return nil
}

// provisionTokenTransport provisions the token_transport of c, or the default
// transport if there is none.
func (t *Transport) provisionTokenTransport(ctx caddy.Context, c Credentials) (tokenTransport, error) {
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
	t.transports = append(t.transports, h)
	proxied := usesProxy(h) // Provision forgets it
	if err := h.Provision(ctx); err != nil {
		return tokenTransport{}, fmt.Errorf("token_transport: %w", err)
	}
	// Of a dial that outlives its request, net/http would keep the connection,
	// and the next one be the client with the certificate of that time.
	h.Transport.DisableKeepAlives = true
	if c.ClientCertificate != nil {
		if err := presentCertificates(h); err != nil {
			return tokenTransport{}, fmt.Errorf("client_certificate: %w", err)
		}
	}
	return tokenTransport{h, config, proxied}, nil
}

// parentHandler returns the handler that a transport which is being
// provisioned is part of: the module whose provisioning loads it.
func parentHandler(ctx caddy.Context) (*reverseproxy.Handler, bool) {
	modules := ctx.Modules()
	if len(modules) < 2 {
		return nil, false
	}
	handler, ok := modules[len(modules)-2].(*reverseproxy.Handler)
	return handler, ok
}

// checkUpstreams compares the upstreams of the handler with the credentials:
// what is wrong there should be found at load, not by a request.
//
// If an upstream's address depends on the request, its client may choose among
// spellings of it: localhost is not 127.0.0.1 to us. Beside upstream blocks,
// such an upstream therefore gets a token only if a block names it.
func (t *Transport) checkUpstreams(handler *reverseproxy.Handler) error {
	t.warnHeaderUp(handler)
	if checks := handler.HealthChecks; checks != nil && checks.Active != nil {
		t.healthStatus = checks.Active.ExpectStatus
	}

	repl := caddy.NewReplacer()
	static := make(map[dialAddress]string)
	complete := handler.DynamicUpstreamsRaw == nil
	for _, u := range handler.Upstreams {
		if dial, err := parseDialAddress(repl, u.Dial); err == nil {
			static[dial] = u.Dial
			t.dials = append(t.dials, dial)
		} else { // it depends on the request, which will be checked
			complete = false
			t.listedOnly = len(t.clients) > 0
		}
	}
	if complete {
		for dial := range t.clients {
			if _, ok := static[dial]; !ok {
				return fmt.Errorf("upstream %s: reverse_proxy has no such upstream; write it as there", dial.address)
			}
		}
	}
	fallbackUsed := !complete
	t.static = make(map[string][]*client)
	for dial, address := range static {
		cl, listed := t.clients[dial]
		if !listed {
			cl = t.fallback
			fallbackUsed = true
		}
		host, _, _ := net.SplitHostPort(dial.address)
		t.static[host] = append(t.static[host], cl)
		if cl == nil && !listed {
			missing := "token_url, client_id and client_secret are missing"
			if t.Credentials != nil {
				missing = t.Credentials.missing()
			}
			return fmt.Errorf("upstream %s has no credentials: %s; or add `upstream %s { … }` or `upstream %s off`", address, missing, address, address)
		}
		if cl != nil && !t.plaintext && !t.encrypted(dial) {
			return plaintextError(address)
		}
	}
	if t.fallback != nil && !fallbackUsed {
		t.fallback.spare = true
	}
	return nil
}

// warnHeaderUp tells of header_up lines that have no effect.
func (t *Transport) warnHeaderUp(handler *reverseproxy.Handler) {
	if handler.Headers == nil || handler.Headers.Request == nil {
		return
	}
	for _, fields := range []map[string][]string{handler.Headers.Request.Set, handler.Headers.Request.Add} {
		for field := range fields {
			if t.reserved.has(field) {
				t.logger.Warn("header_up has no effect: transport oauth2 removes or replaces this header",
					zap.String("field", field))
			}
		}
	}
}

// encrypted tells whether what is sent to a static upstream can be seen by
// nobody outside this machine.
func (t *Transport) encrypted(dial dialAddress) bool {
	host, port, err := net.SplitHostPort(dial.address)
	if err != nil {
		host = dial.address
	}
	if t.TLS != nil && !slices.Contains(t.TLS.ExceptPorts, port) {
		return true
	}
	return staysOnMachine(dial.network, host, t.proxied)
}

// parseDialAddress normalizes an address as the reverse proxy does before it
// dials. It is an error if the address depends on the request.
func parseDialAddress(repl *caddy.Replacer, address string) (dialAddress, error) {
	address, err := repl.ReplaceOrErr(address, true, true)
	if err != nil {
		return dialAddress{}, err
	}
	parsed, err := caddy.ParseNetworkAddress(address)
	if err != nil {
		return dialAddress{}, err
	}
	if parsed.PortRangeSize() != 1 {
		return dialAddress{}, errors.New("must be a single address")
	}
	return dialAddress{parsed.Network, parsed.JoinHostPort(0)}, nil
}

// warmUp makes the tokens ready once the config runs, so that the first
// requests need not wait. Caddy emits the event at the start and after each
// reload, but not when a config is merely validated.
func (t *Transport) warmUp() error {
	return t.events.app.On("started", onStarted(t.acquired))
}

// onStarted is the clients to warm up when the config has started.
type onStarted []*client

// Handle implements caddyevents.Handler. Events are dispatched in turn, so it
// only starts the fetches. One that fails is logged, and tried again later:
// it does not keep the server from starting.
func (clients onStarted) Handle(context.Context, caddy.Event) error {
	for _, cl := range clients {
		cl.started.Store(true)
		if !cl.spare {
			cl.source.Warm()
		}
	}
	return nil
}
