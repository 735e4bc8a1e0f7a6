// Provisioning: a config becomes a transport with its clients, and mistakes are found.

package outboundauth

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
)

// Provision sets up the transport. It makes no token request, because Caddy
// also provisions a config that it only validates.
func (t *Transport) Provision(ctx caddy.Context) error {
	t.logger = ctx.Logger()
	for _, target := range t.InsecurePlaintext {
		if !slices.Contains(plaintextTargets, target) {
			return fmt.Errorf("insecure_plaintext: is for %s only", strings.Join(plaintextTargets, " and "))
		}
	}
	t.plaintext = slices.Contains(t.InsecurePlaintext, plaintextUpstream)
	t.reserved.add(defaultBearerField)
	t.reserved.add(defaultTenantField)
	t.reserved.add(dpop.Header) // a caller has no key to which our tokens are bound

	if err := registerMetrics(ctx); err != nil {
		return fmt.Errorf("registering metrics: %w", err)
	}
	if err := checkWay(t.HTTPTransport); err != nil {
		return err
	}
	if err := t.HTTPTransport.Provision(ctx); err != nil {
		return err
	}
	t.HTTPTransport.Transport.Proxy = exceptSockets(t.HTTPTransport.Transport.Proxy)
	app, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("getting events app: %w", err)
	}
	t.opened = clients{
		logger:    t.logger,
		events:    &emitter{app.(*caddyevents.App), ctx, t.logger},
		plaintext: slices.Contains(t.InsecurePlaintext, plaintextTokenURL),
	}
	if err := t.provisionRoutes(ctx); err != nil {
		return err
	}
	if handler, ok := parentHandler(ctx); ok {
		if err := t.checkUpstreams(handler); err != nil {
			return err
		}
		if err := installFailureRoute(handler); err != nil {
			return err
		}
		t.marksFailures = true
	} // otherwise nothing is known about the handler of this transport
	if err := t.warmUp(); err != nil {
		return err
	}
	t.load()
	return nil
}

// provisionRoutes makes the table in which a request finds its credentials. It
// opens the clients of all credentials.
func (t *Transport) provisionRoutes(ctx caddy.Context) error {
	repl := caddy.NewReplacer()
	if len(t.Upstreams) == 0 && t.Credentials == nil && t.Clients == nil {
		return errors.New("transport oauth2: token_url, client_id and client_secret are missing")
	}
	if err := t.checkClientKeys(); err != nil {
		return err
	}
	base, err := t.openFallback(ctx)
	if err != nil {
		return err
	}
	t.routes = make(map[dialAddress]route)
	var inheriting []*Credentials
	if !t.fallback.unknown() {
		inheriting = t.Clients.credentials()
	}
	for i, upstream := range t.Upstreams {
		if upstream == nil {
			return fmt.Errorf("upstream %d: is null", i)
		}
		if upstream.Credentials != nil {
			inheriting = append(inheriting, upstream.Credentials)
		}
		r, err := t.openUpstream(ctx, upstream, base)
		if err != nil {
			return fmt.Errorf("upstream %d (%s): %w", i, strings.Join(upstream.Addresses, " "), err)
		}
		for _, address := range upstream.Addresses {
			dial, err := parseDialAddress(repl, address)
			if err != nil {
				return fmt.Errorf("upstream %s: %w", address, err)
			}
			dial = dial.canonical()
			if _, ok := t.routes[dial]; ok {
				return fmt.Errorf("upstream %s: named twice; each address belongs to one upstream block", address)
			}
			t.routes[dial] = r
			t.named = append(t.named, upstreamName{dialAddress: dial})
		}
	}
	if len(t.Upstreams) == 0 { // beside them, see assignRoutes
		t.others = t.fallback
	}
	if base == nil || (t.Clients == nil && base.missing() == "") { // it is a client itself
		return nil
	}
	if setting := base.unusedAuth(inheriting); setting != "" {
		return unusedAuthError(setting, t.Clients != nil)
	}
	return nil
}

// checkClientKeys checks where client keys come from, and which ones the config names.
func (t *Transport) checkClientKeys() error {
	if t.Clients == nil {
		return nil
	}
	if err := t.Clients.check(); err != nil {
		return err
	}
	for _, reason := range keyReasons { // the series exist from now on
		refusedKeysTotal.WithLabelValues(reason)
	}
	if warning := t.Clients.warning(); warning != "" {
		t.logger.Warn(warning)
	}
	return nil
}

// openFallback opens the route by the settings outside of Upstreams, if they are complete. It
// returns the credentials there, from which others inherit; nil if there are none.
func (t *Transport) openFallback(ctx caddy.Context) (base *Credentials, err error) {
	if t.Credentials != nil {
		own, err := t.Credentials.canonical()
		if err != nil {
			return nil, err
		}
		if err := cmp.Or(own.check(), own.checkReplayUse()); err != nil {
			return nil, err
		}
		base = &own
	}
	if base == nil && t.Clients == nil {
		return nil, nil //nolint:nilnil // see above
	}
	missing := t.missingFor(base)
	if missing == nil {
		t.fallback, err = t.open(ctx, base)
		return base, err
	}
	if len(t.Upstreams) == 0 {
		return nil, missing
	}
	return base, nil
}

// missingFor returns what is missing for the clients that these credentials lead to: for
// those of the client blocks, if there are any.
func (t *Transport) missingFor(c *Credentials) error {
	for _, k := range t.Clients.all() {
		if missing := k.missingBeside(c); missing != "" && !k.off {
			return fmt.Errorf("%s: %s", k.name(), missing)
		}
	}
	if t.Clients != nil {
		return nil
	}
	if missing := c.missing(); missing != "" {
		return errors.New(missing)
	}
	return nil
}

// openUpstream opens the route of one upstream block.
func (t *Transport) openUpstream(ctx caddy.Context, u *Upstream, base *Credentials) (route, error) {
	if len(u.Addresses) == 0 {
		return route{}, errors.New("addresses is missing: name the upstream")
	}
	if u.Off {
		if u.Credentials != nil {
			return route{}, errors.New("off contradicts its other settings: remove one of the two")
		}
		return route{off: true}, nil
	}
	if u.Credentials == nil {
		return route{}, errors.New("has no settings of its own: set one, or off")
	}
	own, err := u.Credentials.canonical()
	if err != nil {
		return route{}, err
	}
	if err := own.check(); err != nil {
		return route{}, err
	}
	merged := own.inherit(base)
	if t.Clients != nil {
		if err := t.missingFor(&merged); err != nil {
			return route{}, err
		}
		if setting := own.unusedAuth(t.Clients.credentials()); setting != "" {
			return route{}, unusedAuthError(setting, t.Clients != nil)
		}
	} else if missing := own.missingBeside(base); missing != "" {
		return route{}, errors.New(missing)
	}
	return t.open(ctx, &merged)
}

// open opens the route for credentials. They are complete, or else each client block is
// complete that inherits from them.
func (t *Transport) open(ctx caddy.Context, c *Credentials) (route, error) {
	if t.Clients == nil {
		b, err := t.openBlock(ctx, *c, nil)
		return route{block: b}, err
	}
	ch := &choice{placeholder: t.Clients.placeholder(), named: make(map[string]route)}
	for _, k := range t.Clients.all() {
		r := route{off: k.off}
		if !k.off {
			own, err := k.canonical()
			if err != nil {
				return route{}, fmt.Errorf("%s: %w", k.name(), err)
			}
			if r.block, err = t.openBlock(ctx, own.inherit(c), k.keys); err != nil {
				return route{}, fmt.Errorf("%s: %w", k.name(), err)
			}
			ch.blocks = append(ch.blocks, r.block)
		}
		for _, key := range k.keys {
			ch.named[key] = r
		}
		if len(k.keys) == 0 {
			ch.none = r
		}
	}
	return route{choice: ch}, nil
}

// openBlock opens the block for complete credentials, and the requests with these client keys.
func (t *Transport) openBlock(ctx caddy.Context, c Credentials, keys []string) (*block, error) {
	var bound *boundTransport
	if c.BindCertificate && c.ClientCertificate != nil { // without a certificate, clients.open returns an error
		var err error
		if bound, err = newBoundTransport(t.HTTPTransport); err != nil {
			return nil, fmt.Errorf("bind_certificate: %w", err)
		}
		t.opened.closeToo(bound)
	}
	// This comes last: others that share the token source use the client at once.
	cl, err := t.opened.open(ctx, c, keys)
	if err != nil {
		return nil, err
	}
	b := newBlock(cl)
	b.bound = bound
	b.fields(&t.reserved)
	return b, nil
}

// parentHandler returns the handler of the transport that is being provisioned.
// The handler is the module that loads the transport.
func parentHandler(ctx caddy.Context) (*reverseproxy.Handler, bool) {
	modules := ctx.Modules()
	if len(modules) < 2 {
		return nil, false
	}
	handler, ok := modules[len(modules)-2].(*reverseproxy.Handler)
	return handler, ok
}

// checkUpstreams compares the upstreams of the handler with the credentials. So
// mistakes are found at load, and not by a request.
func (t *Transport) checkUpstreams(handler *reverseproxy.Handler) error {
	t.warnHeaderUp(handler)
	all, err := readUpstreams(handler)
	if err != nil {
		return err
	}
	if err := t.assignRoutes(all); err != nil {
		return err
	}
	fallbackUsed := t.others == t.fallback
	for _, u := range all.static {
		r := t.routeTo(u.dialAddress)
		if r.unknown() {
			missing := errors.New("token_url, client_id and client_secret are missing")
			if t.Credentials != nil {
				missing = t.missingFor(t.Credentials)
			}
			return fmt.Errorf("upstream %s has no credentials: %w; or add `upstream %s { … }` or `upstream %s off`", u.written, missing, u.written, u.written)
		}
		if !r.off && !t.plaintext && !t.private(u.dialAddress) {
			return plaintextError(u.written)
		}
		fallbackUsed = fallbackUsed || r == t.fallback
	}
	if !fallbackUsed {
		for b := range t.fallback.blocks() {
			b.spare = true
		}
	}
	t.readHealthChecks(handler, all)
	return nil
}

// readHealthChecks notes where active health checks go, and what they expect.
func (t *Transport) readHealthChecks(handler *reverseproxy.Handler, all configuredUpstreams) {
	if handler.HealthChecks == nil || handler.HealthChecks.Active == nil {
		return
	}
	checks := handler.HealthChecks.Active
	t.health.read(checks, len(handler.Upstreams))
	t.checksOthers = checks.Upstream != "" || checks.Port != 0
	if checks.Upstream == "" && checks.Port != 0 {
		t.byHost = make(map[string][]route)
		for _, u := range all.static {
			if host, _, err := net.SplitHostPort(u.address); err == nil {
				host = canonicalHost(host)
				t.byHost[host] = append(t.byHost[host], t.routeTo(u.dialAddress))
			}
		}
	}
	if !checks.IsEnabled() {
		return
	}
	for _, u := range all.static {
		if b := t.routeOfCheck(checkedAt(checks, u)).ofChecks(); b != nil {
			b.keep()
		}
	}
}

// checkedAt returns where the active health check of an upstream goes.
func checkedAt(checks *reverseproxy.ActiveHealthChecks, u staticUpstream) reverseproxy.DialInfo {
	at := u.dialAddress
	if checks.Upstream != "" {
		at, _ = parseDialAddress(caddy.NewReplacer(), checks.Upstream) // without an address, checks fail
	}
	host, _, _ := net.SplitHostPort(at.address) // a socket has none
	if checks.Upstream == "" && checks.Port != 0 {
		at.address = net.JoinHostPort(host, strconv.Itoa(checks.Port))
	}
	return reverseproxy.DialInfo{Network: at.network, Address: at.address, Host: host}
}

// warnHeaderUp logs a warning for each header_up line that has no effect.
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

// private reports whether nobody outside this machine can read what is sent to
// a static upstream.
func (t *Transport) private(dial dialAddress) bool {
	host, port, err := net.SplitHostPort(dial.address)
	if err != nil {
		host = dial.address
	}
	if t.TLS != nil && !slices.Contains(t.TLS.ExceptPorts, port) {
		return true
	}
	ctx := context.WithValue(context.Background(), caddy.ReplacerCtxKey, caddy.NewReplacer()) // which a proxy's URL may need
	req := (&http.Request{URL: &url.URL{Scheme: "http", Host: dial.address}}).WithContext(ctx)
	return staysOnMachine(dial.network, host, t.proxyOf(req) != nil)
}

// warmUp has the tokens fetched once the config runs, so that the first
// requests need not wait. Caddy emits the event when it starts and after each
// reload, but not when it only validates a config.
func (t *Transport) warmUp() error {
	return t.opened.events.app.On("started", onStarted(t.opened.acquired))
}

// onStarted has the clients to warm up when the config has started.
type onStarted []*client

// Handle implements caddyevents.Handler. Caddy waits until it returns, so it
// only starts the fetches. If a fetch fails, this is logged, and the fetch is
// repeated later. The server starts all the same.
func (clients onStarted) Handle(context.Context, caddy.Event) error {
	for _, cl := range clients {
		cl.start()
		if !cl.spare {
			cl.source.Warm()
		}
	}
	return nil
}
