// The settings of an OAuth client, and of what the gateway sends to its upstreams.

package outboundauth

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/replay"
)

// Credentials say which OAuth client obtains the access token for an upstream,
// and which headers identify the tenant to the upstream.
type Credentials struct {
	// The name of the client in metrics, logs, the admin API and events.
	// Global placeholders are supported and evaluated when the config is
	// loaded. Clients that have the same name share their metrics. Give each
	// its own name if they differ only in the path of the endpoint, the
	// `scopes` or the `audience`. Default: the host of `token_url` or
	// `issuer`, and the `client_id`, for example `auth.example.com/gateway`.
	Name string `json:"name,omitempty"`

	// The URL of the authorization server's token endpoint. It is absolute,
	// and may have a query. Its scheme must be https, unless the host is a
	// loopback address or `insecure_plaintext` allows http. The gateway does
	// not follow redirects, because they would take the client's credentials
	// elsewhere. Global placeholders are supported and evaluated when the
	// config is loaded. Required, unless there is an `issuer`.
	TokenURL string `json:"token_url,omitempty"`

	// The authorization server's issuer identifier, exactly as the server's
	// metadata has it. It takes the place of `token_url`: the gateway looks up
	// the token endpoint in the metadata (RFC 8414, OpenID Connect Discovery).
	// It does so at the first token request, once a day, and when the endpoint
	// seems to have moved. Global placeholders are supported and evaluated
	// when the config is loaded. Default: none.
	Issuer string `json:"issuer,omitempty"`

	// The client's identifier, in UTF-8. Global placeholders are supported and
	// evaluated when the config is loaded. Required, except with an
	// `assertion_file`, which names the client already.
	ClientID string `json:"client_id,omitempty"`

	// The client's secret. Write a placeholder such as `{env.CLIENT_SECRET}`
	// or `{file./run/secrets/client}`, not the secret itself: everyone who may
	// read the config would see it. Global placeholders are supported and
	// evaluated for each token request, so the gateway uses a new secret
	// without a reload. If a placeholder evaluates to nothing, the token
	// request fails; the log says why, also when the config is loaded. One
	// line break at the end of a file is not sent. Other line breaks, blanks
	// and byte order marks are sent; the log warns about them. A text without
	// a placeholder is sent as it is; in a text with a placeholder, Caddy
	// takes the backslash out of `\{` and `\}`. A secret that is not UTF-8 can
	// only stand in a file. Required if the `auth_method` is one of
	// `client_secret_*`.
	ClientSecret string `json:"client_secret,omitempty"`

	// How the client authenticates at the token endpoint. The gateway uses
	// exactly this method, and tries no other.
	//
	// - `client_secret_basic`: with the secret, in the Authorization header
	// - `client_secret_post`: with the secret, in the form
	// - `client_secret_jwt`: with a JWT that is signed with the secret (RFC 7523)
	// - `private_key_jwt`: with a JWT that is signed with the `private_key`, or
	//   with the JWT in the `assertion_file` (RFC 7523)
	// - `tls_client_auth`: with the `client_certificate` (RFC 8705), issued by
	//   a CA or self-signed
	// - `none`: not at all; the gateway sends only the `client_id`
	//
	// Default: `client_secret_basic`. Without a `client_secret`, it is
	// `private_key_jwt` if there is a `private_key` or an `assertion_file`, and
	// `tls_client_auth` if there is a `client_certificate`. With the
	// `grant_type` `jwt_bearer` and without a `client_secret`, the gateway
	// sends only the JWT that the token is granted for.
	AuthMethod string `json:"auth_method,omitempty"`

	// How `client_secret_basic` writes the client's identifier and secret.
	// `form` encodes both, as RFC 6749 section 2.3.1 asks. `raw` leaves both
	// as they are, for servers that do not decode them. Default: `form`.
	BasicEncoding string `json:"basic_encoding,omitempty"`

	// The key that signs the client's JWTs: the name of a file, or the content
	// of such a file. The file holds PEM (PKCS#8, PKCS#1 or SEC 1, not
	// encrypted), a JWK, or the JSON key of a Google service account. Write
	// the name of a file or a placeholder, not the key itself: everyone who
	// may read the config would see it. Global placeholders are supported and
	// evaluated, and the file is read, for each token request, so the gateway
	// uses a new key without a reload. If there is a certificate for the key,
	// in the same file or as `client_certificate`, the gateway sends its
	// thumbprint along (`x5t#S256`). Default: the key of the
	// `client_certificate`, if there is one.
	PrivateKey string `json:"private_key,omitempty"`

	// The `kid` by which the authorization server knows the `private_key`.
	// Global placeholders are supported and evaluated when the config is
	// loaded. Default: the `kid` of the key if it is a JWK, otherwise none.
	KeyID string `json:"key_id,omitempty"`

	// The algorithm that signs the client's JWTs. With a key, it is `RS256`,
	// `PS256` or `ES256`, one of these with 384 or 512 instead of 256, or
	// `EdDSA`. It must fit the key. With `client_secret_jwt`, it is `HS256`,
	// `HS384` or `HS512`. Default: the `alg` of a JWK. Otherwise, it is
	// `RS256` for an RSA key, the one that fits for another key, and `HS256`
	// for a secret.
	SigningAlg string `json:"signing_alg,omitempty"`

	// For whom the client's JWTs are meant (`aud`). Global placeholders are
	// supported and evaluated when the config is loaded. Default: the `issuer`
	// if there is one, otherwise the `token_url`.
	AssertionAudience string `json:"assertion_audience,omitempty"`

	// The type of the client's JWTs (`typ`). Default:
	// `client-authentication+jwt` if there is an `issuer`, otherwise `JWT`.
	// Older servers expect `JWT`.
	AssertionTyp string `json:"assertion_typ,omitempty"`

	// How long each of the client's JWTs is valid, 30 seconds at least. Each
	// token request has a new JWT. The gateway dates it back by 10 seconds,
	// because clocks differ. 0 means the default. Default: `1m`.
	AssertionLifetime caddy.Duration `json:"assertion_lifetime,omitempty"`

	// The name of a file with a JWT that another program keeps fresh: the
	// token of a Kubernetes service account, a SPIFFE JWT-SVID, or a cloud's
	// workload identity. The client authenticates with this JWT. With the
	// `grant_type` `jwt_bearer`, the token is granted for this JWT instead.
	// Global placeholders are supported and evaluated, and the file is read,
	// for each token request. Default: none.
	AssertionFile string `json:"assertion_file,omitempty"`

	// The certificate that the client presents to the token endpoint. The
	// client also presents a certificate that is in the `tls` settings of
	// `token_transport` instead, but Caddy reads that one only when it loads
	// the config. Default: none.
	ClientCertificate *ClientCertificate `json:"client_certificate,omitempty"`

	// Whether the gateway presents the `client_certificate` to the upstream as
	// well, for tokens that are bound to it (RFC 8705 section 3). It presents
	// the certificate with which it obtained the token, and uses the token no
	// longer than this certificate is valid. Needs an upstream with https,
	// over HTTP/1.1 or HTTP/2. Default: `false`.
	BindCertificate bool `json:"bind_certificate,omitempty"`

	// Whether the gateway binds the token to a key, so that the token is of no
	// use to whoever steals it (DPoP, RFC 9449), and the algorithm of that key:
	// `ES256` or `EdDSA`. The gateway makes a new key for each token, and keeps
	// it in memory alone. It proves with each request that it has the key, for
	// the URL that it sends the request to. It uses no token that the server
	// does not bind to the key. Most servers know only `ES256`. Not with
	// `bind_certificate`. Default: none, so that the token is a bearer token.
	DPoP string `json:"dpop,omitempty"`

	// Whether all instances of a fleet use one token, and keep it over restarts.
	// The instance that gets a token stores it, encrypted, and the others take it
	// from there. Not with `bind_certificate` or `dpop`, whose tokens are of use
	// to one instance only. Default: none, so that each instance has its own.
	ShareTokens *ShareTokens `json:"share_tokens,omitempty"`

	// What the token is granted for.
	//
	// - `client_credentials`: for the client itself
	// - `jwt_bearer`: for a JWT of the client (RFC 7523 section 2.1). Service
	//   accounts of some clouds need this.
	// - the name or the URI of another grant (RFC 6749 section 4.5), such as
	//   `account_credentials`: the gateway sends it with your `params`
	// - `none`: for what your `params` say. The gateway leaves the parameter
	//   out, and needs no `client_id`. Login endpoints that do not speak
	//   OAuth need this.
	//
	// With the last two, the gateway repeats no token request at once, and
	// makes only one at a time: a login could lock its user out. Grants that
	// need a user or a user's token are refused. Default:
	// `client_credentials`.
	GrantType string `json:"grant_type,omitempty"`

	// For whom `jwt_bearer` asks for a token (`sub`). Global placeholders are
	// supported and evaluated for each token request. Default: the
	// `client_id`.
	Subject string `json:"subject,omitempty"`

	// More claims in the JWT of `jwt_bearer`, by name. Their values are
	// strings. Global placeholders in the values are supported and evaluated
	// for each token request. Default: none.
	Claims map[string]string `json:"claims,omitempty"`

	// The scopes to ask for. Global placeholders are supported and evaluated
	// when the config is loaded. A placeholder may hold several scopes, with
	// spaces between them. Default: none, so that the authorization server
	// chooses the scopes.
	Scopes []string `json:"scopes,omitempty"`

	// For whom the token is meant. Each value is sent as one `audience`
	// parameter. Global placeholders are supported and evaluated when the
	// config is loaded. Default: none.
	Audience []string `json:"audience,omitempty"`

	// The resources that the token is for (RFC 8707). They are absolute URIs
	// without a fragment. Each value is sent as one `resource` parameter.
	// Global placeholders are supported and evaluated when the config is
	// loaded. Default: none.
	Resource []string `json:"resource,omitempty"`

	// More form parameters of the token request, by name. Global placeholders
	// in the values are supported and evaluated for each token request. If a
	// placeholder evaluates to nothing, the token request fails. Default:
	// none.
	Params map[string]string `json:"params,omitempty"`

	// More headers of the token request, by field name. `Authorization` and
	// `Content-Type` are not allowed. Global placeholders in the values are
	// supported and evaluated for each token request. If a placeholder
	// evaluates to nothing, the token request fails. Default: none.
	TokenRequestHeaders map[string]string `json:"token_request_headers,omitempty"`

	// How the token request is written: `form`, as RFC 6749 asks, or `json`,
	// as one JSON object. In the object, each parameter is a string; an
	// `audience` or `resource` of several values is an array of strings. `json`
	// needs the `auth_method` `client_secret_post` or `none`, and all values
	// in UTF-8. Default: `form`.
	TokenRequest string `json:"token_request,omitempty"`

	// Where the token is in the answer, for servers that use names of their
	// own. Default: in the members that RFC 6749 section 5.1 names.
	TokenResponse *TokenResponse `json:"token_response,omitempty"`

	// How long the gateway tries to get one token, all its tries included.
	// After this time, it answers the requests that wait for the token with
	// 504. If an earlier try to get a token has failed, they wait for a second
	// at most, or three times as long as usual. If the server is silent for a
	// quarter of this time while requests wait, the gateway asks it again
	// beside the first token request, four times at most. It does not do so
	// with an `assertion_file`, or with a `grant_type` of another name. Of
	// those who share a token, the longest time counts. 0 means the default.
	// Default: `10s`.
	TokenTimeout caddy.Duration `json:"token_timeout,omitempty"`

	// How to reach the token endpoint, with the settings of the `http`
	// transport: for example `tls` with a private CA, or `network_proxy`. The
	// settings for the upstream do not apply to the token endpoint. A token
	// outlives a change of timeouts, and of how connections are used. Default:
	// the `http` transport's own defaults, over HTTP/1.1.
	TokenTransport *reverseproxy.HTTPTransport `json:"token_transport,omitempty"`

	// The header that names the tenant to the upstream. What callers send as
	// `X-Tenant-Id` never reaches an upstream, even without this setting.
	// Default: no such header is sent.
	Tenant *Tenant `json:"tenant,omitempty"`

	// More headers that identify the tenant to the upstream: values by field
	// name. They replace what callers send under these names. Placeholders are
	// supported and evaluated for each request. If a value is empty after
	// that, its header is not sent. Default: none.
	Headers map[string]string `json:"headers,omitempty"`

	// The header that carries the token to the upstream.
	// Default: `Authorization: Bearer <token>`.
	BearerHeader *BearerHeader `json:"bearer_header,omitempty"`

	// How long before a token expires the gateway starts to replace it. It
	// does so in the background, and still uses the old token meanwhile. It
	// starts up to 4 % of the lifetime earlier, at random, so that instances
	// do not all renew at once. It never starts in the first half of the
	// lifetime. Of those who share a token, the longest time counts. 0 means
	// the default. Default: 26 % of the lifetime. With this, a token with a
	// lifetime of an hour is enough for a quarter of an hour without the
	// authorization server.
	RefreshBefore caddy.Duration `json:"refresh_before,omitempty"`

	// The lifetime of a token if the server names none: `expires_in` is absent
	// or 0, or nobody can tell what it means. If the server repeats a token
	// whose lifetime it has named before, the token keeps its end. Of those
	// who share a token, the shortest time counts. 0 means the default.
	// Default: `5m`.
	DefaultLifetime caddy.Duration `json:"default_lifetime,omitempty"`

	// How long the gateway uses a token at most, whatever lifetime the server
	// names: some servers name it in milliseconds instead of seconds. The time
	// counts from the token request. If the server grants the same token again
	// after that, it counts as a new one. A reload with another time changes
	// the end of the token that is there. Of those who share a token, the
	// shortest time counts. At least 1 second; 0 means no limit. Default: no
	// limit.
	MaxLifetime caddy.Duration `json:"max_lifetime,omitempty"`

	// The statuses with which the upstream may refuse the token, from 400 to
	// 599. 16 is UNAUTHENTICATED of gRPC, and `grpc` in a Caddyfile: an answer
	// without a body that has `grpc-status: 16` in its header. The gateway
	// judges by what the upstream accepts whether it refuses the token, or this
	// request whatever the token: a wrong password, for example. If it is the
	// token, the gateway gets a new one, and sends the request once more if it
	// can repeat the body. Otherwise the caller gets the upstream's answer, a
	// few seconds later at most. With `[-1]`, the gateway never replaces a token that
	// the upstream refuses. Default: `[401, 16]`.
	RetryOn []int `json:"retry_on,omitempty"`

	// How the gateway sends a request with a body once more. Default: it keeps
	// 64 KiB of the body.
	ReplayBody *ReplayBody `json:"replay_body,omitempty"`

	// They are those of a client block: another client of the same server, which need not be
	// named again. In an upstream block, a secret that stands alone may be meant for another.
	ofServer bool
}

// ClientCertificate is a certificate with its key. Both are names of PEM
// files, or the content of such files. Global placeholders are supported and
// evaluated, and the files are read, for each token request, so the gateway
// uses a renewed certificate without a reload.
type ClientCertificate struct {
	// The certificate. Behind it, you can add the certificates of its CAs that
	// the server may not know. Required.
	Certificate string `json:"certificate,omitempty"`

	// The private key of the certificate. Required.
	Key string `json:"key,omitempty"`
}

// TokenResponse says where the token is in the answer of the token endpoint.
type TokenResponse struct {
	// The place of the token: a JSON Pointer (RFC 6901), such as
	// `/data/token`. What is there must be a string. Default:
	// `/access_token`.
	AccessToken string `json:"access_token,omitempty"`

	// The place of the token's lifetime: a JSON Pointer. What is there must be
	// a number, or a number in a string. Default: `/expires_in`.
	ExpiresIn string `json:"expires_in,omitempty"`

	// The unit of the lifetime: `ms`, `s`, `m`, `h` or `d`. Default: `s`.
	ExpiresInUnit string `json:"expires_in_unit,omitempty"`
}

// Tenant is the header that names the tenant to the upstream.
type Tenant struct {
	// The header's field name. Default: `X-Tenant-Id`.
	Field string `json:"field,omitempty"`

	// The tenant. Placeholders are supported and evaluated for each request:
	// `{http.request.header.X-Tenant-Id}` passes on what the caller sent. If
	// the value is empty after that, no header is sent.
	Value string `json:"value,omitempty"`
}

// BearerHeader is the header that carries the token to the upstream.
type BearerHeader struct {
	// The header's field name. Default: `Authorization`.
	Field string `json:"field,omitempty"`

	// The word before the token. A space separates them. If this is the empty
	// string, the header holds only the token. With `dpop`, the word is always
	// `DPoP`. Default: `Bearer`.
	Scheme *string `json:"scheme,omitempty"`
}

// ShareTokens says how the instances of a fleet share a token. A fault of the storage never
// fails a request: the instance then gets a token of its own.
type ShareTokens struct {
	// The secret from which the key of the records is made, of at least 20 bytes.
	// All instances need the same one. Global placeholders are supported. The
	// gateway reads it for each token request. Default: the `client_secret` or
	// the `private_key`, which all instances with the same one have.
	Key string `json:"key,omitempty"`

	// Where the records are: a storage module of Caddy. Default: the storage of
	// Caddy's config.
	StorageRaw json.RawMessage `json:"storage,omitempty" caddy:"namespace=caddy.storage inline_key=module"`

	// Whether the token is not shared, although the settings around say so.
	// Default: `false`.
	Off bool `json:"off,omitempty"`
}

// ReplayBody says how the gateway sends a request with a body once more.
type ReplayBody struct {
	// How much of the body the gateway keeps, in bytes, 1 MiB at most. It can
	// send a longer body once more only if the upstream refuses the token
	// before more than this is sent. It then sends what it has kept, and
	// passes on the rest as the caller sends it. 0 means the default. -1 keeps
	// nothing, and asks only with `announce`. Default: `65536`.
	Size int64 `json:"size,omitempty"`

	// Whether the gateway first asks the upstream if it wants the body
	// (`Expect: 100-continue`). It asks if the body is longer than `size`, or
	// may be. The upstream can then refuse the token before the body is sent.
	// What the gateway can't keep waits for the upstream's answer, for a tenth
	// of a second at most. If the upstream does not answer in that time, or
	// answers with 417, the gateway does not ask it again for five minutes.
	// Without this setting, the gateway asks an upstream only for half a
	// minute after it refused a token. Default: `false`.
	Announce bool `json:"announce,omitempty"`
}

const (
	defaultTenantField   = "X-Tenant-Id"
	defaultBearerField   = "Authorization"
	defaultBearerScheme  = "Bearer"
	defaultTokenTimeout  = 10 * time.Second
	defaultTokenLifetime = 5 * time.Minute
	defaultReplayBody    = replay.DefaultLimit
	maxReplayBody        = 1 << 20 // each request that is under way may keep this much

	defaultAssertionLifetime = 1 * time.Minute

	retryOff      = -1
	retryGRPC     = 16 // UNAUTHENTICATED, which is no status of HTTP
	replayNothing = -1
)

// The ways to authenticate the client at the token endpoint (RFC 6749 §2.3.1,
// RFC 7523 §2.2, RFC 8705 §2). Their names are those in the IANA registry of
// RFC 8414.
const (
	authBasic     = "client_secret_basic"
	authPost      = "client_secret_post"
	authSecretJWT = "client_secret_jwt"
	authKeyJWT    = "private_key_jwt"
	authTLS       = "tls_client_auth"
	authNone      = "none"

	// No method: the token is granted for an assertion, which also says who
	// the client is.
	authByGrant = ""
)

var authMethods = []string{authBasic, authPost, authSecretJWT, authKeyJWT, authTLS, authNone}

const (
	basicForm = "form"
	basicRaw  = "raw"
)

// How a token request is written.
const (
	asForm = "form"
	asJSON = "json"
)

// name returns the client's name. It is valid UTF-8, because labels have to be.
func (c *Credentials) name() string {
	name := c.ClientID
	switch host := c.host(); {
	case name == "":
		name = host
	case host != "":
		name = host + "/" + name
	}
	return strings.ToValidUTF8(cmp.Or(c.Name, name), "\uFFFD")
}

// host returns the host of the authorization server, for names, metrics, logs and
// errors. It is valid UTF-8, because labels have to be, and the host of a URL can hold
// any bytes.
func (c *Credentials) host() string {
	u, err := url.Parse(cmp.Or(c.TokenURL, c.Issuer))
	if err != nil {
		return ""
	}
	return strings.ToValidUTF8(u.Host, "\uFFFD")
}

// logFields returns the log fields that tell which client a line is about.
func (c *Credentials) logFields() []zap.Field {
	return []zap.Field{
		zap.String("client", c.name()), zap.String("token_endpoint", c.host()), zap.String("client_id", c.ClientID),
	}
}

// authMethod returns how the client authenticates.
func (c *Credentials) authMethod() string {
	method, _ := c.chosenAuth()
	return method
}

// chosenAuth returns how the client authenticates, and why so. If auth_method is not
// set, the other settings leave only one choice.
func (c *Credentials) chosenAuth() (method, why string) {
	switch {
	case c.AuthMethod != "":
		return c.AuthMethod, "auth_method says so"
	case c.ClientSecret != "":
		return authBasic, "there is a client_secret, and no auth_method"
	case c.grantsByJWT():
		return authByGrant, "the JWT of the grant says who the client is"
	case c.sendsNoGrant() && c.PrivateKey == "" && c.AssertionFile == "" && c.ClientCertificate == nil:
		return authNone, "there is nothing to authenticate with"
	case c.PrivateKey != "":
		return authKeyJWT, "there is a private_key"
	case c.AssertionFile != "":
		return authKeyJWT, "there is an assertion_file"
	case c.ClientCertificate != nil:
		return authTLS, "there is a client_certificate"
	}
	return authBasic, "it is the default"
}

// needsSecret reports whether a method may need a client_secret. The empty
// method may: auth_method is not set then.
func needsSecret(method string) bool {
	switch method {
	case authKeyJWT, authTLS, authNone:
		return false
	}
	return true
}

// grantType returns what the token is granted for.
func (c *Credentials) grantType() string {
	return canonicalGrant(cmp.Or(c.GrantType, grantClientCredentials))
}

// grantsByJWT reports whether the token is granted for a JWT.
func (c *Credentials) grantsByJWT() bool { return c.grantType() == grantJWTBearer }

// sendsNoGrant reports whether the token request names no grant.
func (c *Credentials) sendsNoGrant() bool { return c.grantType() == grantNone }

// grantsByParams reports whether nobody here knows what the token is granted for: the
// params say it. It may be a login, which locks its user out after some failures.
func (c *Credentials) grantsByParams() bool {
	return c.grantType() != grantClientCredentials && !c.grantsByJWT()
}

// usesKey reports whether a private key signs JWTs. It signs those that do not
// come from the assertion_file. If there is a JWT for the grant, the
// assertion_file holds that one, and not the JWT that authenticates the
// client.
func (c *Credentials) usesKey() bool {
	if c.grantsByJWT() {
		return c.AssertionFile == "" || c.authMethod() == authKeyJWT
	}
	return c.authMethod() == authKeyJWT && c.AssertionFile == ""
}

// signs reports whether JWTs are signed at all.
func (c *Credentials) signs() bool { return c.usesKey() || c.authMethod() == authSecretJWT }

// presentsOther reports whether token_transport has its own client
// certificate.
func (c *Credentials) presentsOther() bool { return presentsCertificate(c.TokenTransport) }

// presentsCertificate reports whether a transport has its own client
// certificate, in the settings that transport http has for it.
func presentsCertificate(h *reverseproxy.HTTPTransport) bool {
	return h != nil && h.TLS != nil && (h.TLS.ClientCertificateFile != "" || h.TLS.ClientCertificateAutomate != "")
}

// neverRetries reports whether the upstream's answers never make the gateway replace a token.
func (c *Credentials) neverRetries() bool { return slices.Equal(c.RetryOn, []int{retryOff}) }

// repeats reports whether a request may be sent twice: with another token, or with another
// proof.
func (c *Credentials) repeats() bool { return !c.neverRetries() || c.DPoP != "" }

// shares reports whether the token is shared with other instances.
func (c *Credentials) shares() bool { return c.ShareTokens != nil && !c.ShareTokens.Off }

// lifecycle returns what the settings say about the life of a token.
func (c *Credentials) lifecycle() lifecycle {
	return lifecycle{
		refreshBefore:   time.Duration(c.RefreshBefore),
		defaultLifetime: cmp.Or(time.Duration(c.DefaultLifetime), defaultTokenLifetime),
		maxLifetime:     time.Duration(c.MaxLifetime),
		fetchTimeout:    cmp.Or(time.Duration(c.TokenTimeout), defaultTokenTimeout),
		shared:          c.shares(),
	}
}

// shape returns everything that decides which token is granted, and by which server.
// These are all settings except those that say what the upstream is sent, how long to
// wait, and when the token is replaced: a change of these is no reason to throw a token
// away. A sourceKey is the digest of this.
func (c Credentials) shape(transportConfig []byte) ([]byte, error) {
	c.AuthMethod, c.GrantType = c.authMethod(), c.grantType()
	c.BasicEncoding = cmp.Or(c.BasicEncoding, basicForm)
	c.TokenRequest = cmp.Or(c.TokenRequest, asForm)
	c.AssertionLifetime = cmp.Or(c.AssertionLifetime, caddy.Duration(defaultAssertionLifetime))
	c.TokenTransport, c.TokenTimeout, c.RefreshBefore, c.DefaultLifetime, c.MaxLifetime = nil, 0, 0, 0, 0
	c.Name, c.Tenant, c.Headers, c.BearerHeader, c.RetryOn, c.ReplayBody = "", nil, nil, nil, nil, nil
	if !c.shares() { // who shares has no token with those that do not
		c.ShareTokens = nil
	}
	c.Scopes = slices.Compact(slices.Sorted(slices.Values(c.Scopes))) // they have no order (RFC 6749 §3.3)
	// encoding/json sorts the maps, and keeps values that follow each other
	// apart.
	shape, err := json.Marshal([]any{c, json.RawMessage(transportConfig)})
	if err != nil {
		return nil, fmt.Errorf("token_transport: %w", err)
	}
	return shape, nil
}

// unit returns how long 1 is as a lifetime; 0 if the unit is not known.
func (r *TokenResponse) unit() time.Duration {
	switch r.ExpiresInUnit {
	case "", "s":
		return time.Second
	case "ms":
		return time.Millisecond
	case "m":
		return time.Minute
	case "h":
		return time.Hour
	case "d":
		return 24 * time.Hour
	}
	return 0
}

// field returns the field name, or its default.
func (t *Tenant) field() string {
	if t == nil || t.Field == "" {
		return defaultTenantField
	}
	return t.Field
}

// withDefaults returns the field name and the scheme, or their defaults.
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
