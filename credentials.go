package outboundauth

import (
	"cmp"
	"maps"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// Credentials are what an upstream is sent: the OAuth client that obtains its
// access token, and the headers that identify the tenant.
type Credentials struct {
	// The authorization server's token endpoint: an absolute URL, with https
	// unless it is on a loopback address. A query is kept. Redirects are not
	// followed, because they would take the client's credentials elsewhere.
	// Global placeholders are supported and evaluated when the config is
	// loaded. Required.
	TokenURL string `json:"token_url,omitempty"`

	// The client's identifier. Global placeholders are supported and
	// evaluated when the config is loaded. Required.
	ClientID string `json:"client_id,omitempty"`

	// The client's secret. Prefer a placeholder such as `{env.CLIENT_SECRET}`
	// or `{file./run/secrets/client}` to the secret itself, which anyone who
	// may read the config would see. Global placeholders are evaluated for
	// each token request, so a rotated secret is used without a reload; one
	// that evaluates to nothing fails the token request. Required, except
	// with the auth_method `none`.
	ClientSecret string `json:"client_secret,omitempty"`

	// How the client authenticates at the token endpoint: with
	// `client_secret_basic` in the Authorization header, with
	// `client_secret_post` in the form, with `none` not at all: then only the
	// client_id is sent. Exactly this method is used, others are not tried.
	// Default: `client_secret_basic`.
	AuthMethod string `json:"auth_method,omitempty"`

	// The scopes to ask for. Global placeholders are supported and evaluated
	// when the config is loaded. Default: none, which leaves the choice to
	// the authorization server.
	Scopes []string `json:"scopes,omitempty"`

	// The parties that the token is meant for, each sent as one `audience`
	// parameter. Global placeholders are supported and evaluated when the
	// config is loaded. Default: none.
	Audience []string `json:"audience,omitempty"`

	// More form parameters of the token request, by name. Global placeholders
	// in the values are evaluated for each token request.
	Params map[string]string `json:"param,omitempty"`

	// More headers of the token request, by field name. Global placeholders
	// in the values are evaluated for each token request.
	TokenRequestHeaders map[string]string `json:"token_request_header,omitempty"`

	// How long getting one token may take, quick retries included; after it,
	// those who wait for the token get a 504. 0 means the default.
	// Default: `10s`.
	TokenTimeout caddy.Duration `json:"token_timeout,omitempty"`

	// How to reach the token endpoint: the settings of the `http` transport,
	// for example `tls` with a private CA, or `network_proxy`. Nothing of how
	// the upstream is reached applies to the token endpoint.
	// Default: the `http` transport's own defaults.
	TokenTransport *reverseproxy.HTTPTransport `json:"token_transport,omitempty"`

	// The header that names the tenant to the upstream. Default: none is
	// sent. What clients send as X-Tenant-Id never reaches an upstream.
	Tenant *Tenant `json:"tenant,omitempty"`

	// More headers that identify the tenant to the upstream: values by field
	// name. They replace what the client sends under these names. Placeholders
	// are supported and evaluated for each request; a value that is empty
	// then sends no header.
	Headers map[string]string `json:"header,omitempty"`

	// The header that carries the token to the upstream.
	// Default: `Authorization: Bearer <token>`.
	BearerHeader *BearerHeader `json:"bearer_header,omitempty"`

	// How long before a token expires to start replacing it in the
	// background, while it is still used. It starts earlier by up to 4 % of
	// the lifetime, at random, so that instances do not all renew at once, but
	// never in the first half of the lifetime. 0 means the default.
	// Default: 26 % of the lifetime, with which a token of an hour outlasts a
	// quarter of an hour without its authorization server.
	RefreshBefore caddy.Duration `json:"refresh_before,omitempty"`

	// The lifetime of a token for which the server names none (`expires_in`
	// is absent or 0). 0 means the default. Default: `5m`.
	DefaultLifetime caddy.Duration `json:"default_lifetime,omitempty"`

	// The statuses with which the upstream says that it does not accept the
	// token. Then the token is replaced, and the request sent once more with
	// the new one, if its body can be repeated. If the new token is refused
	// as well, the client gets the upstream's answer. `[-1]` never replaces a
	// token that the upstream refuses. Default: `[401]`.
	RetryOn []int `json:"retry_on,omitempty"`

	// How much of a request's body is kept for sending it once more, in
	// bytes. A longer body can be repeated only if the upstream answered
	// before more than this was sent; what was not read yet is then sent
	// after it. To let it answer before, a body that is longer, or may be, is
	// announced to it with `Expect: 100-continue`, and what can't be kept of it
	// waits for the answer, at most a tenth of a second, and only as long as
	// the upstream heeds it. 0 means the default; -1 keeps nothing, and
	// announces nothing. Default: `65536`.
	ReplayBody int64 `json:"replay_body,omitempty"`
}

// Tenant is the header that names the tenant to the upstream.
type Tenant struct {
	// The header's field name. Default: `X-Tenant-Id`.
	Field string `json:"field,omitempty"`

	// The tenant. Placeholders are supported and evaluated for each request:
	// `{http.request.header.X-Tenant-Id}` passes on what the client sent. A
	// value that is empty then sends no header.
	Value string `json:"value,omitempty"`
}

// BearerHeader is the header that carries the token to the upstream.
type BearerHeader struct {
	// The header's field name. Default: `Authorization`.
	Field string `json:"field,omitempty"`

	// What stands before the token. If it is the empty string, the token
	// stands alone. Default: `Bearer`.
	Scheme *string `json:"scheme,omitempty"`
}

const (
	defaultTenantField   = "X-Tenant-Id"
	defaultBearerField   = "Authorization"
	defaultBearerScheme  = "Bearer"
	defaultTokenTimeout  = 10 * time.Second
	defaultTokenLifetime = 5 * time.Minute
	defaultReplayBody    = 64 << 10

	retryOff     = -1
	replayNoBody = -1
)

// inherit returns c with what it doesn't set taken from base: lists and
// objects as a whole, the named values of `param`, `token_request_header` and
// `header` one by one.
func (c Credentials) inherit(base *Credentials) Credentials {
	if base == nil {
		return c
	}
	c.TokenURL = cmp.Or(c.TokenURL, base.TokenURL)
	c.ClientID = cmp.Or(c.ClientID, base.ClientID)
	c.AuthMethod = cmp.Or(c.AuthMethod, base.AuthMethod)
	if c.AuthMethod != authNone {
		c.ClientSecret = cmp.Or(c.ClientSecret, base.ClientSecret)
	}
	c.Scopes = orList(c.Scopes, base.Scopes)
	c.Audience = orList(c.Audience, base.Audience)
	c.Params = union(base.Params, c.Params)
	c.TokenRequestHeaders = union(base.TokenRequestHeaders, c.TokenRequestHeaders)
	c.TokenTimeout = cmp.Or(c.TokenTimeout, base.TokenTimeout)
	c.TokenTransport = cmp.Or(c.TokenTransport, base.TokenTransport)
	c.Tenant = cmp.Or(c.Tenant, base.Tenant)
	c.Headers = union(base.Headers, c.Headers)
	c.BearerHeader = cmp.Or(c.BearerHeader, base.BearerHeader)
	c.RefreshBefore = cmp.Or(c.RefreshBefore, base.RefreshBefore)
	c.DefaultLifetime = cmp.Or(c.DefaultLifetime, base.DefaultLifetime)
	c.RetryOn = orList(c.RetryOn, base.RetryOn)
	c.ReplayBody = cmp.Or(c.ReplayBody, base.ReplayBody)
	return c
}

func orList[T any](own, base []T) []T {
	if len(own) > 0 {
		return own
	}
	return base
}

// union returns the values of both, own before base.
func union(base, own map[string]string) map[string]string {
	if len(base) == 0 {
		return own
	}
	both := maps.Clone(base)
	maps.Copy(both, own)
	return both
}
