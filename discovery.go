// The token endpoint of an issuer, looked up in its metadata.

package outboundauth

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// discovery finds the token endpoint of an issuer for one client. It is safe
// for concurrent use.
type discovery struct {
	issuer      *url.URL
	credentials *Credentials
	transport   http.RoundTripper
	permit      func(*url.URL) error // what may be sent secrets
	logger      *zap.Logger

	*issuerMetadata

	found  atomic.Pointer[url.URL] // last
	warned atomic.Pointer[string]  // of what the server does not list, last
}

// newDiscovery returns the discovery for the client c. permit refuses what must not
// be sent its secrets. It has to be released.
func newDiscovery(issuer *url.URL, c *Credentials, transport tokenTransport, permit func(*url.URL) error, logger *zap.Logger) (*discovery, error) {
	shared, err := acquireIssuer(c, transport.config)
	if err != nil {
		return nil, err
	}
	return &discovery{
		issuer: issuer, credentials: c, transport: transport.RoundTripper, permit: permit, logger: logger, issuerMetadata: shared,
	}, nil
}

// tokenEndpoint returns the URL of the token endpoint, for requests that
// present what ctx says.
func (d *discovery) tokenEndpoint(ctx context.Context) (*url.URL, error) {
	m, err := d.get(ctx, d.lookUp, d.logger)
	if err != nil && err == ctx.Err() { //nolint:errorlint // get returns it as it is
		err = &tokenError{Endpoint: d.issuer.Host, Code: codeTimeout, Description: "looking up the token endpoint took too long"}
	}
	if err != nil {
		return nil, err
	}
	u, err := d.endpointIn(m)
	if err != nil {
		d.expire()
		if known := d.found.Load(); known != nil {
			d.logger.Warn("looking up the token endpoint failed; the one known before is used", zap.Error(err))
			return known, nil
		}
		return nil, err
	}
	d.found.Store(u)
	d.warnUnsupported(m)
	return u, nil
}

// wellKnown returns where the metadata may be: by RFC 8414 §3.1 between host
// and path, by OpenID Connect Discovery §4 behind the path.
func wellKnown(issuer *url.URL) []*url.URL {
	oauth, openid := *issuer, *issuer
	path := strings.TrimSuffix(issuer.EscapedPath(), "/")
	set := func(u *url.URL, escaped string) {
		u.RawPath = escaped
		u.Path, _ = url.PathUnescape(escaped) // it was escaped by net/url
	}
	set(&oauth, "/.well-known/oauth-authorization-server"+path)
	set(&openid, path+"/.well-known/openid-configuration")
	return []*url.URL{&oauth, &openid}
}

// lookUp fetches the metadata. A server may publish it at one place only.
func (d *discovery) lookUp(ctx context.Context) (*metadata, error) {
	var told *tokenError
	for _, u := range wellKnown(d.issuer) {
		// Each has its share of the time: one may hang.
		ctx, cancel := context.WithTimeout(ctx, metadataTimeout/2)
		m, err := d.metadataAt(ctx, u)
		cancel()
		if err == nil {
			return m, nil
		}
		if told == nil || tellsMore(err, told) {
			told = err
		}
	}
	return nil, told
}

// tellsMore reports whether the error of the second place says more than that of
// the first: metadata with a fault does, and then a fault that will pass. A
// place without metadata says nothing if the other may have it.
func tellsMore(second, first *tokenError) bool {
	rank := func(e *tokenError) int {
		switch {
		case e.Status == http.StatusOK:
			return 2
		case !e.permanent:
			return 1
		}
		return 0
	}
	return rank(second) > rank(first)
}

// metadataAt looks the metadata up in one place.
func (d *discovery) metadataAt(ctx context.Context, u *url.URL) (*metadata, *tokenError) {
	a, err := exchange(ctx, d.transport, newServerRequest(ctx, http.MethodGet, u, http.Header{}, ""))
	if err != nil {
		failure := networkError(ctx, u.Host, err)
		failure.Description = "looking up the token endpoint: " + failure.Description
		if failure.Code == codeTimeout {
			failure.Hint = "see whether the issuer answers, or set token_url instead"
		}
		return nil, failure
	}
	failure := &tokenError{
		Endpoint: u.Host, Status: a.status, Code: codeInvalidResponse,
		Hint: metadataHint,
	}
	if a.status != http.StatusOK {
		failure.Code = codeHTTPStatus
		failure.Description = "there is no metadata of the issuer"
		failure.retryAfter = parseRetryAfter(a.header, time.Now())
		failure = failure.classify()
		switch {
		case a.status >= 300 && a.status < 400:
			failure.Description = "a redirect in the place of the issuer's metadata, which is not followed"
		case !failure.permanent:
			failure.Description, failure.Hint = "the issuer's metadata can't be had now", ""
		}
		return nil, failure
	}
	m, err := parseMetadata(a.body)
	switch {
	case err != nil:
		failure.Description = "the issuer's metadata is not a JSON object that can be read"
	case m.issuer == "":
		failure.Description = "what is in the place of the issuer's metadata names no issuer"
	case m.issuer != d.credentials.Issuer:
		// RFC 8414 §3.3: or the metadata of one issuer could be another's.
		failure.Code, failure.permanent = codeConfiguration, true
		failure.Description = fmt.Sprintf("the metadata is that of another issuer, %q", redact.Clean(m.issuer, maxShownValue))
		failure.Hint = "set issuer to exactly that, if it is the one that is meant"
	default:
		// Metadata that is broken must not take the place of metadata that is
		// not. What it names is for each client to permit.
		if _, err := d.parseEndpoint(cmp.Or(m.tokenEndpoint, m.mtlsTokenEndpoint)); err != nil {
			failure.Description = endpointFault(err)
			break
		}
		return m, nil
	}
	return nil, failure
}

// endpointIn returns the token endpoint for this client.
func (d *discovery) endpointIn(m *metadata) (*url.URL, error) {
	raw := m.tokenEndpoint
	if (d.credentials.ClientCertificate != nil || d.credentials.presentsOther()) && m.mtlsTokenEndpoint != "" {
		raw = m.mtlsTokenEndpoint
	}
	u, err := d.parseEndpoint(raw)
	if err == nil {
		err = d.permit(u)
	}
	if err != nil {
		return nil, &tokenError{
			Endpoint: d.issuer.Host, Status: http.StatusOK, Code: codeInvalidResponse,
			Description: endpointFault(err), Hint: metadataHint,
		}
	}
	return u, nil
}

// metadataHint is what to change if the metadata is of no use.
const metadataHint = "check issuer, or set token_url instead"

func endpointFault(err error) string {
	return "the token_endpoint in the issuer's metadata: " + redact.Clean(err.Error(), maxShownValue)
}

// parseEndpoint parses a token endpoint in the metadata.
func (d *discovery) parseEndpoint(raw string) (*url.URL, error) {
	u, err := parseTokenURL(raw)
	if err != nil {
		return nil, err
	}
	return u, d.keepOut(u)
}

// keepOut refuses token endpoints that a server somewhere else has no reason
// to name: the secrets would go unencrypted, or a service of this machine, such
// as Caddy's admin API, would be sent requests.
func (d *discovery) keepOut(u *url.URL) error {
	switch {
	case d.issuer.Scheme == "https" && u.Scheme != "https":
		return errors.New("is not encrypted, though the issuer is")
	case isThisMachine(u.Hostname()) && !isThisMachine(d.issuer.Hostname()):
		return errors.New("is on this machine, though the issuer is not")
	}
	return nil
}

// warnUnsupported warns, once, of an authentication that the server says it does not
// support. It is tried all the same: what servers publish is not always true.
func (d *discovery) warnUnsupported(m *metadata) {
	method, setting := d.credentials.authMethod(), ""
	var supported []string
	switch {
	case method != authByGrant && method != authNone && len(m.authMethods) > 0 && !supports(m.authMethods, method):
		setting, supported = "auth_method", m.authMethods
	case (method == authKeyJWT || method == authSecretJWT) && d.credentials.SigningAlg != "" &&
		len(m.signingAlgs) > 0 && !slices.Contains(m.signingAlgs, d.credentials.SigningAlg):
		setting, supported = "signing_alg", m.signingAlgs
	}
	names := redact.Clean(strings.Join(supported, " "), maxShownList)
	now := setting + " " + names
	before := d.warned.Swap(&now)
	if setting == "" || (before != nil && *before == now) {
		return
	}
	d.logger.Warn("the authorization server does not list what is configured; check "+setting,
		zap.String("issuer", d.credentials.Issuer), zap.String("client_id", d.credentials.ClientID),
		zap.String("auth_method", method), zap.String("supported", names))
}

// supports reports whether a list of methods has this one. Certificates that are
// self-signed have a name of their own there (RFC 8705 §2.2).
func supports(methods []string, method string) bool {
	return slices.Contains(methods, method) || (method == authTLS && slices.Contains(methods, "self_signed_tls_client_auth"))
}
