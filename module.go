// Package outboundauth is a transport for Caddy's reverse proxy: Transport.
//
// It obtains an access token for each upstream with the OAuth 2.0 client
// credentials grant (RFC 6749 §4.4) or the JWT bearer grant (RFC 7523). It keeps
// the token fresh. It sends the token upstream, together with the headers that
// name the tenant.
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

// Transport is the `http` transport with an access token. It sends every request
// upstream with a valid token of the right OAuth client, and with the headers
// that name the tenant. The client of the proxy does not know about the token.
//
// The transport obtains a token as soon as the config runs. It uses the client
// credentials grant, or another `grant_type`. All upstreams that need the same
// token share it. The transport replaces a token in the background before it
// expires. A token survives reloads.
//
// Clients can't send the headers that this transport sets. It removes
// `Authorization`, `DPoP`, `X-Tenant-Id` and all other headers that it sets from their
// requests, also if a name is spelled with `_` or `.` instead of `-`. It also
// removes such headers if `header_up` sets them: `header_up` acts before the
// transport.
//
// All settings of the `http` transport can be used beside the settings here.
type Transport struct {
	// The OAuth client of the upstreams, and the headers that name the tenant
	// to them. The entries of `upstreams` inherit these settings. Required,
	// unless `upstreams` has complete entries for all upstreams.
	Credentials *Credentials `json:"credentials,omitempty"`

	// Other credentials for some of the upstreams. Default: none.
	Upstreams []*Upstream `json:"upstreams,omitempty"`

	// Credentials that each request chooses by its client key. Those around
	// them are then only there to be inherited. Default: all requests to an
	// upstream have the same credentials.
	Clients *ClientsByKey `json:"clients,omitempty"`

	// Where secrets may travel unencrypted to another machine. `token_url`
	// allows http to the token endpoint and to the issuer. `upstream` allows
	// http to the upstreams. Loopback addresses and Unix sockets are always
	// allowed. Default: nowhere.
	InsecurePlaintext []string `json:"insecure_plaintext,omitempty"`

	*reverseproxy.HTTPTransport

	opened        clients               // all OAuth clients of this transport
	fallback      route                 // the route by the settings outside of Upstreams
	routes        map[dialAddress]route // the routes to the addresses that the config names
	others        route                 // the route to all other addresses
	named         []upstreamName        // what can be named, in the order of the config
	byHost        map[string][]route    // the routes to the proxy's static upstreams, by host; only with health_port
	reserved      fieldSet              // headers that only the transport sets
	plaintext     bool                  // unencrypted connections to upstreams are allowed
	checksOthers  bool                  // health_upstream or health_port: active health checks go to other addresses
	health        healthAnswers         // what active health checks said last
	marksFailures bool                  // the handler has the response route for failures, see installFailureRoute
	logger        *zap.Logger
}

// Upstream has the credentials of one or more upstreams.
type Upstream struct {
	// The dial addresses of the upstreams, written as in the reverse proxy, for
	// example `api.example.com:443`. Each must be the address of an upstream of
	// the reverse proxy. Other addresses are an error, unless the reverse proxy
	// also has dynamic upstreams, or addresses with placeholders of requests.
	//
	// An address can also name the source of dynamic upstreams: name and port
	// of the source `a`, or the name of the source `srv`, such as
	// `_https._tcp.example.com`. Then all addresses that the source yields have
	// these credentials, unless another block lists them.
	//
	// Global placeholders are supported and evaluated when the config is
	// loaded. Required.
	Addresses []string `json:"addresses,omitempty"`

	// Proxy to these upstreams as the `http` transport does: send no token,
	// and remove no header. Default: `false`.
	Off bool `json:"off,omitempty"`

	// The credentials of these upstreams. They inherit what is not set here
	// from the `credentials` of the transport. But if one of `token_url`,
	// `issuer`, `client_secret`, `auth_method`, `basic_encoding`,
	// `private_key`, `key_id`, `signing_alg`, `assertion_*`,
	// `client_certificate` and `bind_certificate` is set here, none of these
	// is inherited.
	*Credentials
}

// ClientsByKey has the credentials of requests by their client key, which says on behalf of whom
// a request is made.
type ClientsByKey struct {
	// Where the client key of a request comes from: one placeholder, such as
	// `{http.auth.user.id}`. Whoever can choose its value chooses the
	// credentials. So it has to come from something that was authenticated
	// before: from an authentication handler, from a header that
	// `forward_auth` sets, or from a `map` of such a value. There is a warning
	// if it comes from what every client can send. Required.
	By string `json:"by,omitempty"`

	// The credentials of the keys that the config names. Requests with any
	// other key are refused with status 403. Required.
	Named []*NamedClient `json:"named,omitempty"`

	// What happens to requests without a key: if its value is empty, or if the
	// placeholder has none. Default: they are refused with status 403.
	Default *DefaultClient `json:"default,omitempty"`
}

// NamedClient has the credentials of one or more client keys.
type NamedClient struct {
	// The client keys, as requests have them: upper and lower case differ. A
	// key has no brace, and no character that can't be seen. No placeholders.
	// Required.
	Keys []string `json:"keys,omitempty"`

	// Send these requests without a token. What the transport sets for other
	// requests is removed from them all the same. Default: `false`.
	Off bool `json:"off,omitempty"`

	// The credentials of these requests. They inherit what is not set here
	// from the entry of `upstreams` that the request's upstream has, and that
	// inherits from `credentials`. As there, settings of client authentication
	// are inherited all or none. But `token_url` and `issuer` are inherited
	// unless one of the two is set here. Default: those around.
	*Credentials
}

// DefaultClient has the credentials of requests without a client key.
type DefaultClient struct {
	// Send these requests without a token. What the transport sets for other
	// requests is removed from them all the same. Default: `false`.
	Off bool `json:"off,omitempty"`

	// The credentials of these requests. They inherit what is not set here
	// from the entry of `upstreams` that the request's upstream has, and that
	// inherits from `credentials`. Default: those around.
	*Credentials
}

// CaddyModule returns the Caddy module information.
func (*Transport) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID: "http.reverse_proxy.transport.oauth2",
		New: func() caddy.Module {
			return &Transport{HTTPTransport: new(reverseproxy.HTTPTransport)}
		},
	}
}

// Cleanup releases the tokens. Other configs may go on using them. Caddy also
// calls Cleanup after Provision has failed, so it releases only what was
// acquired.
func (t *Transport) Cleanup() error {
	t.unload()
	return errors.Join(t.HTTPTransport.Cleanup(), t.opened.close())
}

// loaded has the transports that are provisioned. The command caddy oauth2-token finds
// the transports of its config there.
var loaded = struct {
	mu         sync.Mutex // guards all below
	count      int
	transports map[*Transport]int // each with how many were provisioned before
}{transports: make(map[*Transport]int)}

// loadedTransports returns the transports that are provisioned, the oldest first.
func loadedTransports() []*Transport {
	loaded.mu.Lock()
	defer loaded.mu.Unlock()
	return slices.SortedFunc(maps.Keys(loaded.transports), func(a, b *Transport) int {
		return loaded.transports[a] - loaded.transports[b]
	})
}

func (t *Transport) load() {
	loaded.mu.Lock()
	defer loaded.mu.Unlock()
	loaded.transports[t] = loaded.count
	loaded.count++
}

func (t *Transport) unload() {
	loaded.mu.Lock()
	defer loaded.mu.Unlock()
	delete(loaded.transports, t)
}

// Interface guards. The reverse proxy finds the optional interfaces of a
// transport by type assertion. The embedded HTTPTransport implements them.
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
