// Discovery: it finds the token endpoint of an issuer in the issuer's metadata.

package outboundauth

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
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
	permit      func(*url.URL) error // an error if secrets must not go to the URL
	logger      *zap.Logger

	*issuerMetadata

	found  atomic.Pointer[url.URL] // the URL that was found last
	shown  atomic.Pointer[string]  // what may be shown of found
	warned atomic.Pointer[string]  // what warnUnsupported last found
}

// newDiscovery returns the discovery for the client c. permit refuses URLs to which
// c's secrets must not go. The caller has to release the discovery.
func newDiscovery(issuer *url.URL, c *Credentials, transport tokenTransport, permit func(*url.URL) error, logger *zap.Logger) (*discovery, error) {
	shared, err := acquireIssuer(c, transport.config)
	if err != nil {
		return nil, err
	}
	return &discovery{
		issuer: issuer, credentials: c, transport: transport.RoundTripper, permit: permit, logger: logger, issuerMetadata: shared,
	}, nil
}

// tokenEndpoint returns the URL of the token endpoint. If it has to look the URL
// up, it presents the certificate that ctx has. show turns the error of a look-up into
// one that this client may show.
func (d *discovery) tokenEndpoint(ctx context.Context, show func(error) error) (*url.URL, error) {
	m, err := d.get(ctx, d.lookUp, func(err error) { d.warnOlder(show(err)) })
	if err != nil && err == ctx.Err() { //nolint:errorlint // get does not wrap it
		err = &tokenError{Endpoint: d.issuer.Host, Code: codeTimeout, Description: "looking up the token endpoint took too long"}
	}
	if err != nil {
		return nil, show(err)
	}
	u, err := d.endpointIn(m)
	if err != nil {
		d.expire()
		if known := d.found.Load(); known != nil {
			d.warnOlder(err)
			return known, nil
		}
		return nil, err
	}
	d.found.Store(u)
	d.warnUnsupported(m)
	return u, nil
}

// warnOlder warns of a look-up that failed while a token endpoint is known.
func (d *discovery) warnOlder(err error) {
	d.logger.Warn("looking up the token endpoint failed; the one known before is used",
		append(d.credentials.logFields(), zap.Error(err))...)
}

// show notes what may be shown of the token endpoint. It returns the host that errors
// name: the issuer's host, if the endpoint repeats one of the secrets.
func (d *discovery) show(u *url.URL, secrets redact.Secrets) (host string) {
	shown, host := shownText(withoutQuery(u), maxShownDescription, secrets), u.Host
	if shown == withheld || secrets.In(host) { // of a long URL, only the beginning is searched
		host = d.issuer.Host
	}
	d.shown.Store(&shown)
	return host
}

// wellKnown returns where the metadata may be. RFC 8414 §3.1 puts the well-known
// part between host and path. OpenID Connect Discovery §4 puts it behind the path.
func wellKnown(issuer *url.URL) []*url.URL {
	oauth, openid := *issuer, *issuer
	path := strings.TrimSuffix(issuer.EscapedPath(), "/")
	set := func(u *url.URL, escaped string) {
		u.RawPath = escaped
		u.Path, _ = url.PathUnescape(escaped) // can't fail: net/url has escaped it
	}
	set(&oauth, "/.well-known/oauth-authorization-server"+path)
	set(&openid, path+"/.well-known/openid-configuration")
	return []*url.URL{&oauth, &openid}
}

// lookUp fetches the metadata. A server may publish it at only one of the places.
func (d *discovery) lookUp(ctx context.Context) (*metadata, error) {
	var told *tokenError
	for _, u := range wellKnown(d.issuer) {
		// Each place gets half of the time, because one may hang.
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

// tellsMore reports whether the error of the second place says more than the error
// of the first. Metadata with a fault says most, and a temporary fault comes next. A
// redirect that is not followed says where to look. A place without metadata says
// nothing if the other place may have it.
func tellsMore(second, first *tokenError) bool {
	rank := func(e *tokenError) int {
		switch {
		case e.Status == http.StatusOK:
			return 3
		case !e.permanent:
			return 2
		case isRedirect(e.Status):
			return 1
		}
		return 0
	}
	return rank(second) > rank(first)
}

// maxHost is how long the host of a URL may be: a name (RFC 1035 §2.3.4) and a port.
const maxHost = 253 + len(":65535")

// maxRedirects is how many redirects are followed from one place.
const maxRedirects = 3

// isRedirect reports whether a status sends a GET elsewhere (RFC 9110 §15.4).
func isRedirect(status int) bool {
	switch status {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// published gets what is published at a place. It follows redirects within the origin
// of the place: some servers add a slash. fromHere says whether this machine has
// answered each request. A name may lead to several machines, and none may speak for
// another.
func (d *discovery) published(ctx context.Context, place *url.URL) (a serverAnswer, fromHere bool, failure *tokenError) {
	fromHere = true
	for u, followed := place, 0; ; followed++ {
		var at destination
		ctx := at.to(ctx)
		a, err := exchange(ctx, d.transport, newServerRequest(ctx, http.MethodGet, u, http.Header{}, ""))
		if err != nil {
			failure = networkError(ctx, place.Host, err)
			failure.Description = "looking up the token endpoint: " + failure.Description
			if failure.Code == codeTimeout {
				failure.Hint = "see whether the issuer answers, or set token_url instead"
			}
			return a, false, failure
		}
		fromHere = fromHere && at.here.Load()
		if !isRedirect(a.status) {
			return a, fromHere, nil
		}
		if u, failure = redirected(u, a); failure == nil && followed == maxRedirects {
			failure = unfollowed(place, a, fmt.Sprintf("comes after %d others", maxRedirects))
		}
		if failure != nil {
			return a, false, failure
		}
	}
}

// redirected returns where an answer redirects a request for u. The server says only
// path and query: the host stays the one that was configured, as it is written there.
func redirected(u *url.URL, a serverAnswer) (*url.URL, *tokenError) {
	location := a.header.Get("Location")
	to, err := u.Parse(location)
	switch {
	case location == "" || err != nil || to.Hostname() == "":
		return nil, unfollowed(u, a, "names no address")
	case originOf(to) != originOf(u):
		failure := unfollowed(u, a, "leads elsewhere")
		failure.Hint = "set issuer to what the server names itself, or set token_url instead"
		failure.leadsTo = withoutQuery(to)
		return nil, failure
	case to.User != nil: // there is no reason for it (RFC 9110 §4.2.4)
		return nil, unfollowed(u, a, "names a user")
	}
	next := *u
	next.Path, next.RawPath, next.RawQuery = to.Path, to.RawPath, to.RawQuery
	return &next, nil
}

// unfollowed returns the error of a redirect, and why it is not followed.
func unfollowed(u *url.URL, a serverAnswer, why string) *tokenError {
	failure := &tokenError{
		Endpoint: u.Host, Status: a.status, Code: codeHTTPStatus, Hint: metadataHint,
		Description: "a redirect in the place of the issuer's metadata, which " + why + " and is not followed",
	}
	return failure.classify()
}

// metadataAt looks the metadata up at one place.
func (d *discovery) metadataAt(ctx context.Context, place *url.URL) (*metadata, *tokenError) {
	a, fromHere, failure := d.published(ctx, place)
	if failure != nil {
		return nil, failure
	}
	failure = &tokenError{
		Endpoint: place.Host, Status: a.status, Code: codeInvalidResponse,
		Hint: metadataHint,
	}
	if a.status != http.StatusOK {
		failure.Code = codeHTTPStatus
		failure.Description = "there is no metadata of the issuer"
		failure.retryAfter = parseRetryAfter(a.header, time.Now())
		failure = failure.classify()
		if !failure.permanent {
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
		// RFC 8414 §3.3 demands this check. Otherwise one issuer could publish
		// metadata in the name of another.
		failure.Code, failure.permanent = codeConfiguration, true
		failure.Description = "the metadata is that of another issuer"
		switch d.credentials.Issuer {
		case m.issuer + "/":
			failure.Description += ": it does not end with a /"
		case strings.TrimSuffix(m.issuer, "/"):
			failure.Description += ": it ends with a /"
		}
		failure.Hint = "set issuer to exactly what stands there as `issuer`, if that is the one that is meant: " + redact.Clean(place.String(), maxShownValue)
	default:
		m.fromHere = fromHere || namesThisMachine(place.Hostname())
		// Broken metadata must not replace good metadata. But each client decides
		// later whether it permits the endpoint.
		if _, err := d.parseEndpoint(m, cmp.Or(m.tokenEndpoint, m.mtlsTokenEndpoint)); err != nil {
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
	u, err := d.parseEndpoint(m, raw)
	if err == nil {
		err = d.permit(u)
	}
	if err != nil {
		return nil, d.unusable(err)
	}
	return u, nil
}

// destination returns where a request to the token endpoint u may lead. The issuer's name
// may lead to several machines, with this one among them. Over TLS, the server proves
// that it has this name, wherever it is.
func (d *discovery) destination(u *url.URL) *destination {
	issuer := u.Scheme == "https" && strings.EqualFold(u.Host, d.issuer.Host)
	return &destination{elsewhere: !issuer && !d.isFromHere()}
}

// unusable returns the error of a token endpoint that is of no use.
func (d *discovery) unusable(err error) *tokenError {
	return &tokenError{
		Endpoint: d.issuer.Host, Status: http.StatusOK, Code: codeInvalidResponse,
		Description: endpointFault(err), Hint: metadataHint,
	}
}

// metadataHint says what to change if the metadata can't be used.
const metadataHint = "check issuer, or set token_url instead"

func endpointFault(err error) string {
	return "the token_endpoint in the issuer's metadata: " + err.Error()
}

// parseEndpoint parses a token endpoint of the metadata.
func (d *discovery) parseEndpoint(m *metadata, raw string) (*url.URL, error) {
	u, err := parseTokenURL(raw)
	if err != nil {
		return nil, err
	}
	// Errors name the host, and the log has them.
	if len(u.Host) > maxHost || redact.Clean(u.Host, maxHost) != u.Host {
		return nil, errors.New("has a host that is no name of a server")
	}
	return u, d.keepOut(m, u)
}

// keepOut refuses token endpoints that an issuer somewhere else has no reason to
// name. Otherwise the secrets would go unencrypted, or requests would go to a
// service of this machine, such as Caddy's admin API. A name that leads to this
// machine is found when it is dialed.
func (d *discovery) keepOut(m *metadata, u *url.URL) error {
	switch {
	case d.issuer.Scheme == "https" && u.Scheme != "https":
		return errors.New("is not encrypted, though the issuer is")
	case namesThisMachine(u.Hostname()) && !m.fromHere:
		return errThisMachine
	}
	return nil
}

// warnUnsupported warns once if the server does not list the client's
// authentication. The client uses it all the same: what servers publish is not
// always true.
func (d *discovery) warnUnsupported(m *metadata) {
	setting, names := m.unlisted(d.credentials)
	now := setting + " " + names
	before := d.warned.Swap(&now)
	if setting == "" || (before != nil && *before == now) {
		return
	}
	d.logger.Warn("the authorization server does not list what is configured; check "+setting,
		append(d.credentials.logFields(), zap.String("issuer", d.credentials.Issuer),
			zap.String("auth_method", d.credentials.authMethod()), zap.String("supported", names))...)
}
