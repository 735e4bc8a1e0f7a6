// The settings of an OAuth client, and of what its upstreams are sent.

package outboundauth

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/replay"
)

// Credentials are what an upstream is sent: the OAuth client that obtains its
// access token, and the headers that identify the tenant.
type Credentials struct {
	// What the client is called in metrics, logs, the admin API and events.
	// Global placeholders are supported and evaluated when the config is
	// loaded. Default: the host of `token_url` or `issuer`, and the
	// `client_id`, for example `auth.example.com/gateway`. Clients that share a
	// name share their metrics: name them if only the path of the endpoint, the
	// `scopes` or the `audience` differ.
	Name string `json:"name,omitempty"`

	// The authorization server's token endpoint: an absolute URL, with https
	// unless it is on a loopback address or `insecure_plaintext` allows http.
	// A query is kept. Redirects are not followed, because they would take the
	// client's credentials elsewhere. Global placeholders are supported and
	// evaluated when the config is loaded. Required, unless there is an
	// `issuer`.
	TokenURL string `json:"token_url,omitempty"`

	// The authorization server's issuer identifier, exactly as its metadata
	// has it: the token endpoint is then looked up in the metadata (RFC 8414,
	// OpenID Connect Discovery), with the first token request, once a day, and
	// when the endpoint seems to have moved. Takes the place of `token_url`.
	// Global placeholders are supported and evaluated when the config is
	// loaded. Default: none.
	Issuer string `json:"issuer,omitempty"`

	// The client's identifier. Global placeholders are supported and
	// evaluated when the config is loaded. Required, except with an
	// `assertion_file`, which names the client already.
	ClientID string `json:"client_id,omitempty"`

	// The client's secret. Prefer a placeholder such as `{env.CLIENT_SECRET}`
	// or `{file./run/secrets/client}` to the secret itself, which anyone who
	// may read the config would see. Global placeholders are supported and
	// evaluated for each token request, so a rotated secret is used without a
	// reload; one that evaluates to nothing fails the token request. Required
	// if the `auth_method` is one of `client_secret_*`.
	ClientSecret string `json:"client_secret,omitempty"`

	// How the client authenticates at the token endpoint. Exactly this method
	// is used, others are not tried.
	//
	// - `client_secret_basic`: with the secret, in the Authorization header
	// - `client_secret_post`: with the secret, in the form
	// - `client_secret_jwt`: with a JWT that is signed with the secret (RFC 7523)
	// - `private_key_jwt`: with a JWT that is signed with the `private_key`, or
	//   stands in the `assertion_file` (RFC 7523)
	// - `tls_client_auth`: with the `client_certificate` (RFC 8705), issued by
	//   a CA or self-signed
	// - `none`: not at all, only the `client_id` is sent
	//
	// Default: `client_secret_basic`; without a `client_secret`,
	// `private_key_jwt` if there is a `private_key` or an `assertion_file`, and
	// `tls_client_auth` if there is a `client_certificate`. With the
	// `grant_type` `jwt_bearer` and no `client_secret`, the JWT that the token
	// is granted for is all that is sent.
	AuthMethod string `json:"auth_method,omitempty"`

	// How `client_secret_basic` writes id and secret: `form` encodes both as
	// RFC 6749 section 2.3.1 asks, `raw` leaves them as they are, for servers
	// that do not decode them. Default: `form`.
	BasicEncoding string `json:"basic_encoding,omitempty"`

	// The key that signs the client's JWTs: a file in PEM (PKCS#8, PKCS#1 or
	// SEC 1, not encrypted), with a JWK, or with the JSON key of a Google
	// service account; or the content of such a file. Prefer a file or a
	// placeholder to the key itself, which anyone who may read the config would
	// see. Global placeholders are supported and evaluated, and the file is
	// read, for each token request, so a rotated key is used without a reload.
	// If a certificate for the key stands in the file as well, or is the
	// `client_certificate`, its thumbprint is sent along (`x5t#S256`).
	// Default: the key of the `client_certificate`, if there is one.
	PrivateKey string `json:"private_key,omitempty"`

	// The `kid` by which the authorization server knows the `private_key`.
	// Global placeholders are supported and evaluated when the config is
	// loaded. Default: that of a JWK, otherwise none.
	KeyID string `json:"key_id,omitempty"`

	// The algorithm of the JWT's signature: `RS256`, `PS256`, `ES256`, each
	// also with 384 and 512, or `EdDSA`; with `client_secret_jwt` `HS256`,
	// `HS384` or `HS512`. It must fit the key. Default: that of a JWK,
	// otherwise `RS256` for an RSA key, for others the one that fits, and
	// `HS256` for a secret.
	SigningAlg string `json:"signing_alg,omitempty"`

	// Whom the client's JWT is meant for (`aud`). Global placeholders are
	// supported and evaluated when the config is loaded. Default: the `issuer`
	// if there is one, otherwise the `token_url`.
	AssertionAudience string `json:"assertion_audience,omitempty"`

	// The type of the client's JWT (`typ`). Default:
	// `client-authentication+jwt` if there is an `issuer`, otherwise `JWT`,
	// which older servers expect.
	AssertionTyp string `json:"assertion_typ,omitempty"`

	// How long the client's JWT is valid, 30 seconds at least. Each token
	// request has a new one, dated back by 10 seconds because clocks differ. 0
	// means the default. Default: `1m`.
	AssertionLifetime caddy.Duration `json:"assertion_lifetime,omitempty"`

	// A file with a JWT to authenticate with, which something else keeps
	// fresh: the token of a Kubernetes service account, a SPIFFE JWT-SVID, a
	// cloud's workload identity. With the `grant_type` `jwt_bearer`, it is
	// what the token is granted for. Global placeholders are supported and
	// evaluated, and the file is read, for each token request. Default: none.
	AssertionFile string `json:"assertion_file,omitempty"`

	// The certificate that the client presents to the token endpoint. One that
	// stands in the `tls` settings of `token_transport` instead is presented
	// as well, but is read only when the config is loaded. Default: none.
	ClientCertificate *ClientCertificate `json:"client_certificate,omitempty"`

	// Present the `client_certificate` with which a token was obtained to the
	// upstream as well, and use the token no longer than the certificate is
	// valid: for tokens that are bound to it (RFC 8705 section 3). Needs an
	// upstream with https, over HTTP/1.1 or HTTP/2. Default: `false`.
	BindCertificate bool `json:"bind_certificate,omitempty"`

	// What the token is granted for: `client_credentials`, or `jwt_bearer`, a
	// JWT of the client (RFC 7523 section 2.1), as the service accounts of
	// some clouds have it. Default: `client_credentials`.
	GrantType string `json:"grant_type,omitempty"`

	// For whom `jwt_bearer` asks a token (`sub`). Global placeholders are
	// supported and evaluated for each token request. Default: the
	// `client_id`.
	Subject string `json:"subject,omitempty"`

	// More claims of the JWT of `jwt_bearer`: strings, by name. Global
	// placeholders in the values are supported and evaluated for each token
	// request. Default: none.
	Claims map[string]string `json:"claims,omitempty"`

	// The scopes to ask for. Global placeholders are supported and evaluated
	// when the config is loaded; one may hold several scopes, with spaces
	// between. Default: none, which leaves the choice to the authorization
	// server.
	Scopes []string `json:"scopes,omitempty"`

	// The parties that the token is meant for, each sent as one `audience`
	// parameter. Global placeholders are supported and evaluated when the
	// config is loaded. Default: none.
	Audience []string `json:"audience,omitempty"`

	// The resources that the token is for (RFC 8707): absolute URIs without a
	// fragment, each sent as one `resource` parameter. Global placeholders are
	// supported and evaluated when the config is loaded. Default: none.
	Resource []string `json:"resource,omitempty"`

	// More form parameters of the token request, by name. Global placeholders
	// in the values are supported and evaluated for each token request; one
	// that evaluates to nothing fails it. Default: none.
	Params map[string]string `json:"params,omitempty"`

	// More headers of the token request, by field name; neither `Authorization`
	// nor `Content-Type`. Global placeholders in the values are supported and
	// evaluated for each token request; one that evaluates to nothing fails
	// it. Default: none.
	TokenRequestHeaders map[string]string `json:"token_request_headers,omitempty"`

	// How long getting one token may take, quick retries included. Requests
	// that wait for it are then answered with 504. 0 means the default.
	// Default: `10s`.
	TokenTimeout caddy.Duration `json:"token_timeout,omitempty"`

	// How to reach the token endpoint: the settings of the `http` transport,
	// for example `tls` with a private CA, or `network_proxy`. Nothing of how
	// the upstream is reached applies to the token endpoint.
	// Default: the `http` transport's own defaults, over HTTP/1.1.
	TokenTransport *reverseproxy.HTTPTransport `json:"token_transport,omitempty"`

	// The header that names the tenant to the upstream. What clients send as
	// `X-Tenant-Id` never reaches an upstream, also without this. Default:
	// none is sent.
	Tenant *Tenant `json:"tenant,omitempty"`

	// More headers that identify the tenant to the upstream: values by field
	// name. They replace what the client sends under these names. Placeholders
	// are supported and evaluated for each request; if that leaves nothing of a
	// value, its header is not sent. Default: none.
	Headers map[string]string `json:"headers,omitempty"`

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

	// The statuses, of 400 to 599, with which the upstream says that it does
	// not accept the token. Then the token is replaced, and the request sent
	// once more with the new one, if its body can be repeated. If the new token
	// is refused as well, the client gets the upstream's answer. `[-1]` never
	// replaces a token that the upstream refuses. Default: `[401]`.
	RetryOn []int `json:"retry_on,omitempty"`

	// How a request with a body is sent once more. Default: 64 KiB of the body
	// are kept.
	ReplayBody *ReplayBody `json:"replay_body,omitempty"`
}

// ClientCertificate is a certificate with its key. Both are PEM files, or their
// content. Global placeholders are supported and evaluated, and the files are
// read, for each token request, so a renewed certificate is used without a
// reload.
type ClientCertificate struct {
	// The certificate, followed by those of its CAs that the server may not
	// know. Required.
	Certificate string `json:"certificate,omitempty"`

	// Its private key. Required.
	Key string `json:"key,omitempty"`
}

// Tenant is the header that names the tenant to the upstream.
type Tenant struct {
	// The header's field name. Default: `X-Tenant-Id`.
	Field string `json:"field,omitempty"`

	// The tenant. Placeholders are supported and evaluated for each request:
	// `{http.request.header.X-Tenant-Id}` passes on what the client sent. If
	// that leaves nothing of it, no header is sent.
	Value string `json:"value,omitempty"`
}

// BearerHeader is the header that carries the token to the upstream.
type BearerHeader struct {
	// The header's field name. Default: `Authorization`.
	Field string `json:"field,omitempty"`

	// What stands before the token, and a space. If it is the empty string,
	// the token stands alone. Default: `Bearer`.
	Scheme *string `json:"scheme,omitempty"`
}

// ReplayBody says how a request with a body is sent once more.
type ReplayBody struct {
	// How much of the body is kept for that, in bytes, 1 MiB at most. A longer
	// body can be sent once more only if the upstream refuses the token before
	// more than this is sent; the rest is then sent as the client sends it. 0
	// means the default; -1 keeps nothing. Default: `65536`.
	Size int64 `json:"size,omitempty"`

	// Ask the upstream first whether it wants a body that is longer than this,
	// or may be (`Expect: 100-continue`): then it can refuse the token before the
	// body is sent. What can't be kept waits for the upstream's answer, for a
	// tenth of a second at most. An upstream that does not answer in that time,
	// or answers with 417, is not asked again for five minutes. Without this,
	// an upstream is asked only for half a minute after it refused a token.
	// Default: `false`.
	Announce bool `json:"announce,omitempty"`
}

const (
	defaultTenantField   = "X-Tenant-Id"
	defaultBearerField   = "Authorization"
	defaultBearerScheme  = "Bearer"
	defaultTokenTimeout  = 10 * time.Second
	defaultTokenLifetime = 5 * time.Minute
	defaultReplayBody    = replay.DefaultLimit
	maxReplayBody        = 1 << 20 // of each request that is under way

	defaultAssertionLifetime = 1 * time.Minute

	retryOff      = -1
	replayNothing = -1
)

// The ways to authenticate the client at the token endpoint (RFC 6749 §2.3.1,
// RFC 7523 §2.2, RFC 8705 §2), named as in the IANA registry of RFC 8414.
const (
	authBasic     = "client_secret_basic"
	authPost      = "client_secret_post"
	authSecretJWT = "client_secret_jwt"
	authKeyJWT    = "private_key_jwt"
	authTLS       = "tls_client_auth"
	authNone      = "none"

	// The assertion that the token is granted for tells who the client is.
	authByGrant = ""
)

var authMethods = []string{authBasic, authPost, authSecretJWT, authKeyJWT, authTLS, authNone}

// The grants, as they are configured and as they are sent.
const (
	grantClientCredentials = "client_credentials" // RFC 6749 §4.4
	grantJWTBearer         = "jwt_bearer"         // RFC 7523 §2.1
	grantJWTBearerURN      = "urn:ietf:params:oauth:grant-type:jwt-bearer"
)

var grantTypes = []string{grantClientCredentials, grantJWTBearer}

const (
	basicForm = "form"
	basicRaw  = "raw"
)

// name returns what the client is called. In UTF-8, as labels have to be: a
// placeholder can bring anything.
func (c *Credentials) name() string {
	name := c.ClientID
	if host := c.host(); host != "" {
		name = host + "/" + name
	}
	return strings.ToValidUTF8(cmp.Or(c.Name, name), "\uFFFD")
}

// host names the authorization server in names, logs and errors.
func (c *Credentials) host() string {
	u, err := url.Parse(cmp.Or(c.TokenURL, c.Issuer))
	if err != nil {
		return ""
	}
	return u.Host
}

// authMethod returns how the client authenticates. It is either said, or there is
// nothing to choose.
func (c *Credentials) authMethod() string {
	switch {
	case c.AuthMethod != "":
		return c.AuthMethod
	case c.ClientSecret != "":
		return authBasic
	case c.grantsByJWT():
		return authByGrant
	case c.PrivateKey != "" || c.AssertionFile != "":
		return authKeyJWT
	case c.ClientCertificate != nil:
		return authTLS
	}
	return authBasic
}

// needsSecret reports whether a method needs a client_secret. "" may: then
// auth_method is not set.
func needsSecret(method string) bool {
	switch method {
	case authKeyJWT, authTLS, authNone:
		return false
	}
	return true
}

// grantType returns what the token is granted for.
func (c *Credentials) grantType() string { return cmp.Or(c.GrantType, grantClientCredentials) }

// grantsByJWT reports whether that is a JWT.
func (c *Credentials) grantsByJWT() bool { return c.GrantType == grantJWTBearer }

// usesKey reports whether JWTs are signed with a private key: those that don't
// come from the assertion_file, which is for the grant before the client.
func (c *Credentials) usesKey() bool {
	if c.grantsByJWT() {
		return c.AssertionFile == "" || c.authMethod() == authKeyJWT
	}
	return c.authMethod() == authKeyJWT && c.AssertionFile == ""
}

// signs reports whether JWTs are signed at all.
func (c *Credentials) signs() bool { return c.usesKey() || c.authMethod() == authSecretJWT }

// presentsOther reports whether token_transport has a client certificate.
func (c *Credentials) presentsOther() bool { return presentsCertificate(c.TokenTransport) }

// presentsCertificate reports whether a transport has a client certificate of
// its own, the way transport http has it.
func presentsCertificate(h *reverseproxy.HTTPTransport) bool {
	return h != nil && h.TLS != nil && (h.TLS.ClientCertificateFile != "" || h.TLS.ClientCertificateAutomate != "")
}

// neverRetries reports whether no request is sent twice.
func (c *Credentials) neverRetries() bool { return slices.Equal(c.RetryOn, []int{retryOff}) }

// lifecycle returns how long a token is used.
func (c *Credentials) lifecycle() lifecycle {
	return lifecycle{
		refreshBefore:   time.Duration(c.RefreshBefore),
		defaultLifetime: cmp.Or(time.Duration(c.DefaultLifetime), defaultTokenLifetime),
		fetchTimeout:    cmp.Or(time.Duration(c.TokenTimeout), defaultTokenTimeout),
	}
}

// shape returns everything that shapes a token request and the life of its
// token: all settings but those of what the upstream is sent. A sourceKey is its
// digest.
func (c Credentials) shape(life lifecycle, transportConfig []byte) ([]byte, error) {
	c.AuthMethod, c.GrantType = c.authMethod(), c.grantType()
	c.BasicEncoding = cmp.Or(c.BasicEncoding, basicForm)
	c.AssertionLifetime = cmp.Or(c.AssertionLifetime, caddy.Duration(defaultAssertionLifetime))
	c.TokenTransport, c.TokenTimeout, c.RefreshBefore, c.DefaultLifetime = nil, 0, 0, 0
	c.Name, c.Tenant, c.Headers, c.BearerHeader, c.RetryOn, c.ReplayBody = "", nil, nil, nil, nil, nil
	// encoding/json sorts the maps, and keeps neighbouring values apart.
	shape, err := json.Marshal([]any{
		c, json.RawMessage(transportConfig), life.refreshBefore, life.defaultLifetime, life.fetchTimeout,
	})
	if err != nil {
		return nil, fmt.Errorf("token_transport: %w", err)
	}
	return shape, nil
}

// field returns the field name with its default.
func (t *Tenant) field() string {
	if t == nil || t.Field == "" {
		return defaultTenantField
	}
	return t.Field
}

// withDefaults returns field name and scheme with their defaults.
func (b *BearerHeader) withDefaults() (field, scheme string) {
	field, scheme = defaultBearerField, defaultBearerScheme
	if b != nil && b.Field != "" {
		field = b.Field
	}
	if b != nil && b.Scheme != nil {
		scheme = *b.Scheme
	}
	return field, scheme
}
