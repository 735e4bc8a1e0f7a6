// Package outboundauth is a transport for Caddy's reverse proxy: Transport.
//
// It obtains an access token for each upstream with the OAuth 2.0 client
// credentials grant (RFC 6749 §4.4) or the JWT bearer grant (RFC 7523), keeps it
// fresh, and sends it along with the headers that name the tenant.
package outboundauth

import (
	"errors"
	"maps"
	"net/http"
	"slices"
	"sync"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

func init() {
	caddy.RegisterModule(new(Transport))
}

// Transport is the `http` transport with an access token: every request goes
// upstream with a valid token of the right OAuth client, and with the headers
// that name the tenant. The client of the proxy knows nothing of it.
//
// A token is obtained with the client credentials grant, or another
// `grant_type`, as soon as the config runs. All that need the same one share
// it. It is replaced in the background before it expires, and survives
// reloads.
//
// What clients send as `Authorization`, as `X-Tenant-Id` and under the other
// names that this transport sets is removed, including spellings with `_` or
// `.` for `-`. That holds for what `header_up` sets as well: it acts before
// the transport does.
//
// All settings of the `http` transport are available beside the ones here.
type Transport struct {
	// The OAuth client of the upstreams, and the headers that name the tenant
	// to them. What is in `upstreams` inherits from here. Required, unless
	// `upstreams` says it for all of them.
	Credentials *Credentials `json:"credentials,omitempty"`

	// Other credentials for some of the upstreams. Default: none.
	Upstreams []*Upstream `json:"upstreams,omitempty"`

	// Where secrets may travel unencrypted to another machine: `token_url`
	// allows http to the token endpoint and its issuer, `upstream` allows it
	// to the upstreams. Loopback addresses and Unix sockets are always allowed.
	// Default: nowhere.
	InsecurePlaintext []string `json:"insecure_plaintext,omitempty"`

	*reverseproxy.HTTPTransport

	clients       clients               // all of them
	routes        map[dialAddress]route // of the addresses in Upstreams
	fallback      route                 // of all other addresses
	byHost        map[string][]route    // of the proxy's upstreams
	dials         []dialAddress         // of the proxy's upstreams, as far as they are static
	reserved      fieldSet              // headers that only the transport sets
	plaintext     bool                  // to upstreams, allowed
	proxied       bool                  // see usesProxy
	listedOnly    bool                  // no fallback: see checkUpstreams
	healthStatus  int                   // that active health checks expect; 0: any of success
	marksFailures bool                  // the handler has the response route for failures, see installFailureRoute
	logger        *zap.Logger
}

// Upstream has the credentials of one or more upstreams.
type Upstream struct {
	// The dial addresses of the upstreams, as the reverse proxy has them, for
	// example `api.example.com:443`. An address that is none of its upstreams
	// is an error, unless it also has dynamic ones. Global placeholders are
	// supported and evaluated when the config is loaded. Required.
	Addresses []string `json:"addresses,omitempty"`

	// Proxy to these upstreams as the `http` transport does: no token is
	// sent, and no header removed. Default: `false`.
	Off bool `json:"off,omitempty"`

	// What these upstreams are sent. What is not set here is inherited.
	*Credentials
}

// A route is where the requests to an upstream address lead: to a block of
// credentials, or past all of them. The zero route is for addresses that the
// config says nothing of.
type route struct {
	*block      // nil: see off
	off    bool // proxied as the http transport does
}

// unknown reports whether the config says nothing of the address: then requests
// do not go there.
func (r route) unknown() bool { return r.block == nil && !r.off }

// CaddyModule returns the Caddy module information.
func (*Transport) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID: "http.reverse_proxy.transport.oauth2",
		New: func() caddy.Module {
			return &Transport{HTTPTransport: new(reverseproxy.HTTPTransport)}
		},
	}
}

// addresses returns the upstreams that are known before any request.
func (t *Transport) addresses() []dialAddress {
	if t.marksFailures {
		return t.dials
	}
	return slices.Collect(maps.Keys(t.routes))
}

// Cleanup releases the tokens, which other configs may go on using. It
// releases only what was acquired: Caddy calls it after a failed Provision too.
func (t *Transport) Cleanup() error {
	t.unload()
	return errors.Join(t.HTTPTransport.Cleanup(), t.clients.close())
}

// loaded is the transports that are provisioned, oldest first: caddy oauth2-token
// picks those of its config.
var loaded struct {
	mu         sync.Mutex // guards all below
	transports []*Transport
}

func loadedTransports() []*Transport {
	loaded.mu.Lock()
	defer loaded.mu.Unlock()
	return slices.Clone(loaded.transports)
}

func (t *Transport) load() {
	loaded.mu.Lock()
	defer loaded.mu.Unlock()
	loaded.transports = append(loaded.transports, t)
}

func (t *Transport) unload() {
	loaded.mu.Lock()
	defer loaded.mu.Unlock()
	loaded.transports = slices.DeleteFunc(loaded.transports, func(other *Transport) bool { return other == t })
}

// Interface guards. The reverse proxy looks for the optional interfaces of a
// transport by type assertion; the embedded HTTPTransport brings them.
var (
	_ caddy.Provisioner     = (*Transport)(nil)
	_ caddy.CleanerUpper    = (*Transport)(nil)
	_ caddyfile.Unmarshaler = (*Transport)(nil)
	_ http.RoundTripper     = (*Transport)(nil)

	_ reverseproxy.TLSTransport                        = (*Transport)(nil)
	_ reverseproxy.H2CTransport                        = (*Transport)(nil)
	_ reverseproxy.ProxyProtocolTransport              = (*Transport)(nil)
	_ reverseproxy.HealthCheckSchemeOverriderTransport = (*Transport)(nil)
	_ reverseproxy.RequestHeaderOpsTransport           = (*Transport)(nil)
)
