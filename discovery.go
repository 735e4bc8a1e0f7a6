// The token endpoint of an issuer, looked up in its metadata.

package outboundauth

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"

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

// newDiscovery returns the discovery of the endpoints of c, which are permitted
// what permit allows. It has to be released.
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

const (
	// How long an authorization server's metadata is used before it is looked
	// up again, and how long if that fails.
	metadataLifetime = 24 * time.Hour
	metadataRetry    = 5 * time.Minute

	// How long one look-up may take, and how long it may hold up a token
	// request if there is metadata already.
	metadataTimeout  = 10 * time.Second
	metadataPatience = 2 * time.Second

	// How long a look-up that failed answers for the next, which many clients
	// may want.
	metadataErrorLifetime = 100 * time.Millisecond

	// A token endpoint that fails is looked up again no sooner than this.
	metadataPause = 10 * time.Second
)

// metadata is what an authorization server publishes about itself (RFC 8414
// §2, RFC 8705 §5), as far as it concerns a token request. Immutable.
type metadata struct {
	issuer            string
	tokenEndpoint     string
	mtlsTokenEndpoint string // for those who present a certificate; may be empty

	// token_endpoint_auth_methods_supported and
	// token_endpoint_auth_signing_alg_values_supported; may be empty.
	authMethods, signingAlgs []string
}

// parseMetadata reads a document. Whether what it says will do is for others
// to judge; members that only a warning needs may be anything.
func parseMetadata(body []byte) (*metadata, error) {
	if len(body) > maxTokenResponse {
		return nil, errors.New("the metadata is too large")
	}
	document, err := parseTokenResponse(body) // by name, not in any case
	if err != nil {
		return nil, err
	}
	m := new(metadata)
	if m.issuer, err = document.str("issuer"); err != nil {
		return nil, err
	}
	if m.tokenEndpoint, err = document.str("token_endpoint"); err != nil {
		return nil, err
	}
	if aliases, err := parseTokenResponse(document["mtls_endpoint_aliases"]); err == nil {
		m.mtlsTokenEndpoint, _ = aliases.str("token_endpoint")
	}
	_ = json.Unmarshal(document["token_endpoint_auth_methods_supported"], &m.authMethods)
	_ = json.Unmarshal(document["token_endpoint_auth_signing_alg_values_supported"], &m.signingAlgs)
	return m, nil
}

// issuers shares the metadata among all clients that look it up in the same
// way, by issuerKey. Like the tokens, it outlives a reload: an issuer that is
// down then must not make a working token endpoint unknown.
var issuers = caddy.NewUsagePool()

type issuerKey [sha256.Size]byte

// issuerMetadata caches the metadata of one issuer. One look-up at a time
// serves all who wait; none of them governs it.
type issuerMetadata struct {
	key issuerKey

	mu       sync.Mutex // guards all below; never held over I/O
	current  *metadata
	until    time.Time // current is not looked up again before
	doubtful bool      // current, by a token request that failed
	tried    time.Time // the last look-up
	err      error     // of it
	inflight *metadataFetch
}

// metadataFetch is one look-up in flight. m and err may be read once done is closed.
type metadataFetch struct {
	done chan struct{}
	m    *metadata
	err  error
}

// acquireIssuer returns the metadata that clients with these credentials
// share. It has to be released.
func acquireIssuer(c *Credentials, transportConfig []byte) (*issuerMetadata, error) {
	shape, err := json.Marshal([]any{c.Issuer, c.ClientCertificate, json.RawMessage(transportConfig)})
	if err != nil {
		return nil, err
	}
	key := issuerKey(sha256.Sum256(shape))
	shared, _, err := issuers.LoadOrNew(key, func() (caddy.Destructor, error) {
		return &issuerMetadata{key: key}, nil
	})
	if err != nil {
		return nil, err
	}
	return shared.(*issuerMetadata), nil
}

func (i *issuerMetadata) release() error {
	_, err := issuers.Delete(i.key)
	return err
}

// Destruct implements caddy.Destructor. A look-up that is under way ends by
// its timeout.
func (i *issuerMetadata) Destruct() error { return nil }

// get returns the metadata. It waits for a look-up if there is none, for a
// short time if it is doubtful, and not at all if it is only old.
func (i *issuerMetadata) get(ctx context.Context, fetch func(context.Context) (*metadata, error), logger *zap.Logger) (*metadata, error) {
	i.mu.Lock()
	known, doubtful := i.current, i.doubtful
	if known != nil && !doubtful && time.Now().Before(i.until) {
		i.mu.Unlock()
		return known, nil
	}
	if known == nil && i.err != nil && time.Since(i.tried) < metadataErrorLifetime {
		defer i.mu.Unlock()
		return nil, i.err
	}
	l := i.inflight
	if l == nil {
		l = &metadataFetch{done: make(chan struct{})}
		i.inflight = l
		// The look-up presents the caller's certificate, but goes on when the
		// caller gives up.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), metadataTimeout)
		go func() {
			defer cancel()
			i.run(ctx, l, fetch, logger)
		}()
	}
	i.mu.Unlock()

	if known != nil {
		if !doubtful {
			return known, nil
		}
		patience := metadataPatience
		if deadline, ok := ctx.Deadline(); ok { // leave time for the token
			patience = min(patience, time.Until(deadline)/2)
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, patience)
		defer cancel()
	}
	select {
	case <-l.done:
		if l.err != nil && known != nil {
			return known, nil
		}
		return l.m, l.err
	case <-ctx.Done():
		if known != nil {
			return known, nil
		}
		return nil, ctx.Err()
	}
}

// run is the goroutine of one look-up, which ends by its timeout.
func (i *issuerMetadata) run(ctx context.Context, l *metadataFetch, fetch func(context.Context) (*metadata, error), logger *zap.Logger) {
	l.err = safely(func() (err error) {
		l.m, err = fetch(ctx)
		return err
	})
	i.mu.Lock()
	defer i.mu.Unlock()
	i.inflight, i.doubtful, i.tried, i.err = nil, false, time.Now(), l.err
	switch {
	case l.err == nil:
		i.current, i.until = l.m, time.Now().Add(metadataLifetime)
	case i.current != nil:
		i.until = time.Now().Add(metadataRetry)
		logger.Warn("looking up the token endpoint failed; the one known before is used", zap.Error(l.err))
	}
	close(l.done)
}

// expire makes the next token request look the metadata up again, unless that
// has just been tried.
func (i *issuerMetadata) expire() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.doubtful = i.doubtful || time.Since(i.tried) >= metadataPause
}
