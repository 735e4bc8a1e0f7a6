// The token request, its endpoint, and what operators are told: log, events, description.

package outboundauth

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"

	"github.com/outboundauth/caddy-outbound-auth/internal/clientcert"
	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// endpoint makes the token requests of one client at one token endpoint
// (RFC 6749 §3.2). It is the requester of a tokenSource. Its fields do not
// change once it is in use.
type endpoint struct {
	// The credentials are complete. Settings that are read again for each
	// request still have their placeholders.
	credentials Credentials

	keys []string // the client keys of its requests, if they have any

	url         *url.URL   // nil if the URL is discovered
	urlTemplate string     // token_url with its placeholders
	discovery   *discovery // nil if the URL is configured

	transport    http.RoundTripper // token_transport
	certificates clientcert.Cache
	proofs       tokenProofs
	sharing      *sharing // nil if the token is not shared
	metrics      *clientMetrics
	events       *emitter
	logger       *zap.Logger

	narrowed atomic.Pointer[string] // the scopes of the last warning
	odd      atomic.Pointer[string] // what was odd in the last warning about a lifetime
	sent     sentSecrets
	unused   sentSecrets // the tokens of answers that were of no use
}

// newEndpoint makes the endpoint of c, which is expanded and complete.
// urlTemplate is c's token_url before the expansion. newEndpoint finds each
// mistake that shows without a request. The caller has to release the endpoint.
func newEndpoint(c Credentials, urlTemplate string, transport tokenTransport, plaintext bool, logger *zap.Logger, events *emitter) (*endpoint, error) {
	e := &endpoint{credentials: c, urlTemplate: urlTemplate, transport: transport.RoundTripper, logger: logger, events: events}
	permit := func(u *url.URL) error {
		if u.Scheme != "https" && (c.authMethod() == authTLS || c.BindCertificate) {
			return errors.New("the client_certificate can be presented in TLS only; use https://")
		}
		if plaintext {
			return nil
		}
		return checkPlaintext(u, transport.proxied)
	}
	setting, parse, raw := "token_url", parseTokenURL, c.TokenURL
	if c.Issuer != "" {
		setting, parse, raw = "issuer", parseIssuer, c.Issuer
	}
	server, err := parse(raw)
	if err == nil {
		err = permit(server)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", setting, err)
	}
	if _, _, _, err := e.credentials.resolveKeys(caddy.NewReplacer(), &e.certificates); err != nil {
		return nil, err
	}
	if c.Issuer == "" {
		e.url = server
	} else if e.discovery, err = newDiscovery(server, &e.credentials, transport, permit, logger); err != nil {
		return nil, err
	}
	e.metrics = metricsOf(c.name(), c.host())
	e.warnOfValues()
	return e, nil
}

// warnOfValues warns of secrets that can't be had now, and of values that look odd.
func (e *endpoint) warnOfValues() {
	values, faults := e.credentials.valuesNow()
	delete(values, "share_tokens") // it is not sent
	for _, fault := range faults {
		if strings.HasPrefix(fault.Error(), "share_tokens") {
			continue // no token request needs it, see sharing.of
		}
		e.logger.Warn(fault.Error()+"; until then, no token can be requested", e.logFields()...)
	}
	for _, odd := range e.credentials.oddities(values) {
		e.logger.Warn(odd+"; it is sent as it is: correct it, unless that is meant", e.logFields()...)
	}
}

// logTo makes the endpoint log to another logger. Nobody may use the endpoint yet.
func (e *endpoint) logTo(logger *zap.Logger) {
	e.logger = logger
	if e.discovery != nil {
		e.discovery.logger = logger
	}
}

// release gives back what the endpoint shares with others. Requests that are
// still on their way can go on using the endpoint.
func (e *endpoint) release() error {
	if e.discovery == nil {
		return nil
	}
	return e.discovery.release()
}

// knownURL returns the token endpoint's URL as it may be shown. It returns "" while
// the URL has not been discovered.
func (e *endpoint) knownURL() string {
	if e.discovery == nil {
		return withoutQuery(e.url)
	}
	if shown := e.discovery.shown.Load(); shown != nil {
		return *shown
	}
	return ""
}

// fingerprint implements requester.
func (e *endpoint) fingerprint(ctx context.Context) string {
	r, err := e.credentials.resolve(ctx, &e.certificates)
	if err != nil {
		return err.Error()
	}
	return r.fingerprint()
}

// locate implements requester.
func (e *endpoint) locate(ctx context.Context, granted redact.Secrets) (*url.URL, error) {
	if e.discovery == nil {
		return e.url, nil
	}
	start := time.Now()
	var u *url.URL
	r, err := e.credentials.resolve(ctx, &e.certificates)
	if err == nil {
		u, err = e.lookUp(ctx, r, granted)
	}
	if err != nil { // otherwise request counts
		e.count(ctx, start, err)
	}
	return u, err
}

// lookUp returns the token endpoint that the issuer names. Other clients share the
// look-up and its error, so each decides for itself what it shows of the error.
func (e *endpoint) lookUp(ctx context.Context, r resolved, granted redact.Secrets) (*url.URL, error) {
	ctx, _ = clientcert.With(ctx, r.certificate)
	return e.discovery.tokenEndpoint(ctx, func(err error) error { return e.shownRedirect(err, r, granted) })
}

// shownRedirect returns the error of a look-up with where a redirect leads. A look-up
// sends no secret, but the server may know secrets and tokens from token requests.
func (e *endpoint) shownRedirect(err error, r resolved, granted redact.Secrets) error {
	failure, ok := errors.AsType[*tokenError](err)
	if !ok || failure.leadsTo == "" {
		return err
	}
	to := withheld
	if _, _, secrets, err := e.compose(r, ""); err == nil { // else nobody knows what to look for
		to = shownText(failure.leadsTo, maxShownValue, slices.Concat(secrets, e.sent.all(), granted))
	}
	return failure.leading(to)
}

// newKey implements requester.
func (e *endpoint) newKey() (*dpop.Key, error) {
	if e.credentials.DPoP == "" {
		return nil, nil //nolint:nilnil // see requester
	}
	return dpop.NewKey(e.credentials.DPoP)
}

// request implements requester.
func (e *endpoint) request(ctx context.Context, u *url.URL, key *dpop.Key, granted redact.Secrets) (grant, error) {
	start := time.Now()
	g, err := e.requestUncounted(ctx, u, key, granted)
	e.count(ctx, start, err)
	return g, err
}

// count counts an attempt to obtain a token.
func (e *endpoint) count(ctx context.Context, start time.Time, err error) {
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errReleased): // this says nothing about the server
	case errors.Is(cause, errSilent) && err != nil:
		e.metrics.tokenRequested(time.Since(start), errSilent)
	default:
		e.metrics.tokenRequested(time.Since(start), err)
	}
}

// requestUncounted is request without the metrics. If the token endpoint seems
// to have moved, requestUncounted looks it up, and requests the token once more.
func (e *endpoint) requestUncounted(ctx context.Context, u *url.URL, key *dpop.Key, granted redact.Secrets) (grant, error) {
	r, err := e.credentials.resolve(ctx, &e.certificates)
	if err != nil {
		return grant{}, err
	}
	if e.discovery == nil {
		return e.requestAt(ctx, u, e.credentials.TokenURL, r, key, granted)
	}
	g, err := e.requestAt(ctx, u, e.credentials.Issuer, r, key, granted)
	if err != nil && !isGivenUp(ctx) && mayHaveMoved(err) {
		e.discovery.expire()
		if !e.repeatable() { // the next fetch asks at the endpoint that is found then
			return g, err
		}
		if moved, lookUpErr := e.lookUp(ctx, r, granted); lookUpErr == nil && *moved != *u {
			return e.requestAt(ctx, moved, e.credentials.Issuer, r, key, granted)
		}
		// The endpoint may have moved before the issuer says so. Then no server
		// has refused the client, so the error is not permanent.
		if failure, ok := errors.AsType[*tokenError](err); ok {
			failure.permanent = false
		}
	}
	return g, err
}

// mayHaveMoved reports whether a token request may have failed because the token
// endpoint has moved.
func mayHaveMoved(err error) bool {
	failure, ok := errors.AsType[*tokenError](err)
	if !ok {
		return false
	}
	switch failure.Status {
	case 0, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusGone, http.StatusMisdirectedRequest:
		return failure.Code != codeConfiguration
	}
	return (failure.Code == codeInvalidResponse && failure.answer != answerGrant) || (failure.Status >= 300 && failure.Status < 400)
}

// requestAt makes one token request at u (RFC 6749 §4.4.2), for a token that is bound to
// key; nil if it is bound to none. The client's JWTs are meant for audience, unless
// assertion_audience names another. The server may repeat the tokens that it has granted,
// and what it was sent before.
func (e *endpoint) requestAt(ctx context.Context, u *url.URL, audience string, r resolved, key *dpop.Key, granted redact.Secrets) (grant, error) {
	ctx, presented := clientcert.With(ctx, r.certificate)
	if e.discovery != nil {
		ctx = e.discovery.destination(u).to(ctx)
	}
	sent := time.Now()
	a, host, secrets, err := e.ask(ctx, u, audience, r, key, granted)
	if err == nil && key != nil && demandsNonce(a) { // which is no failure
		a, host, secrets, err = e.ask(ctx, u, audience, r, key, granted)
	}
	if err != nil {
		return grant{}, err
	}
	tokens := e.credentials.tokensIn(a.body)
	g, err := e.credentials.readAnswer(u, host, a, slices.Concat(secrets, tokens))
	if err != nil { // otherwise the source remembers the token
		e.unused.add(tokens)
	}
	if failure, ok := errors.AsType[*tokenError](err); ok {
		failure.Hint = e.denial(failure, u, a, r, presented).advice()
		if key != nil && failure.Code == dpop.CodeUseNonce { // the servers of a cluster may have a nonce each
			failure.permanent = false
		}
	}
	if err != nil {
		return grant{}, err
	}
	g.issued, g.took, g.key = sent, time.Since(sent), key
	if e.credentials.BindCertificate {
		g.binding = r.certificate
	}
	e.warnNarrowed(g.scope)
	e.warnOdd(g.odd)
	return g, nil
}

// ask sends one token request to u, and returns the answer. It also returns what errors may
// call the endpoint, and what they must not show.
func (e *endpoint) ask(ctx context.Context, u *url.URL, audience string, r resolved, key *dpop.Key, granted redact.Secrets) (a serverAnswer, host string, secrets redact.Secrets, err error) {
	body, header, secrets, err := e.compose(r, cmp.Or(e.credentials.AssertionAudience, audience))
	var req *http.Request
	if err == nil {
		req = newServerRequest(ctx, http.MethodPost, u, header, body)
		err = e.proofs.prove(req, key)
	}
	if err != nil {
		return a, "", nil, configurationError(u.Host, err)
	}
	if e.discovery == nil {
		secrets.AddQuery(e.urlTemplate, u)
	}
	secrets = slices.Concat(e.sent.add(secrets), e.proofs.sent.all(), e.unused.all(), granted)
	host = u.Host
	if e.discovery != nil {
		host = e.discovery.show(u, secrets)
	}
	a, err = exchange(ctx, e.transport, req)
	switch {
	case errors.Is(err, errThisMachine):
		return a, "", nil, e.discovery.unusable(errThisMachine)
	case err != nil:
		failure := networkError(ctx, host, err)
		if host != u.Host { // which the reason may name
			failure.Description = errBroken.Error()
		}
		return a, "", nil, failure
	case key != nil:
		secrets = append(secrets, e.proofs.keepNonce(u, a)...)
	}
	return a, host, secrets, nil
}

// compose returns the body and the header of a token request, and the parts of them
// that must not be shown.
func (e *endpoint) compose(r resolved, audience string) (body string, header http.Header, secrets redact.Secrets, err error) {
	c := &e.credentials
	form, header := url.Values{}, http.Header{}
	if len(c.Scopes) > 0 { // a parameter without a value is left out (§3.2)
		form.Set("scope", strings.Join(c.Scopes, " "))
	}
	if len(c.Audience) > 0 {
		form["audience"] = c.Audience
	}
	if len(c.Resource) > 0 {
		form["resource"] = c.Resource
	}
	if secrets, err = c.authorize(r, audience, form); err != nil {
		return "", nil, nil, err
	}
	more, err := c.authenticate(r, audience, form, header)
	if err != nil {
		return "", nil, nil, err
	}
	secrets = append(secrets, more...)
	for name, value := range r.params { // a login's password may be one, even as text
		form.Set(name, value)
		secrets.Add(value)
	}
	for name, value := range r.headers {
		header.Set(name, value)
		if name != "Accept" && name != "User-Agent" { // these are in everybody's words
			secrets.Add(value)
		}
	}
	if c.TokenRequest == asJSON { // what a server quotes may be quoted twice then
		for _, secret := range secrets {
			quoted, _ := json.Marshal(secret)
			if inside := string(quoted[1 : len(quoted)-1]); inside != secret {
				secrets.Add(inside)
			}
		}
	}
	body, contentType, err := c.write(form)
	header.Set("Content-Type", contentType)
	return body, header, secrets, err
}

// lacking returns the scopes that the server was asked for and did not grant (RFC
// 6749 §5.1). granted is what the server says; "" stands for all scopes. It is only
// compared: a server may write anything there.
func (e *endpoint) lacking(granted string) []string {
	if granted == "" {
		return nil
	}
	has := strings.Fields(granted)
	return slices.DeleteFunc(slices.Clone(e.credentials.Scopes), func(scope string) bool { return slices.Contains(has, scope) })
}

// warnNarrowed warns, once, of scopes that were not granted: the upstream will
// refuse what needs them.
func (e *endpoint) warnNarrowed(granted string) {
	lacking := e.lacking(granted)
	names := strings.Join(lacking, " ")
	if last := e.narrowed.Load(); len(lacking) == 0 || (last != nil && *last == names) {
		return
	}
	e.narrowed.Store(&names)
	e.logger.Warn("the token was granted for less than the scopes that are configured; check scopes, or what the authorization server allows the client",
		append(e.logFields(), zap.Strings("not_granted", lacking))...)
}

// secrets returns what must not be shown of a token request that is made now, and of the
// last ones.
func (e *endpoint) secrets(ctx context.Context) (redact.Secrets, error) {
	r, err := e.credentials.resolve(ctx, &e.certificates)
	if err != nil {
		return nil, err
	}
	_, _, secrets, err := e.compose(r, "")
	if err == nil && e.discovery == nil {
		secrets.AddQuery(e.urlTemplate, e.url)
	}
	return slices.Concat(secrets, e.sent.all(), e.proofs.sent.all(), e.unused.all()), err
}

// warnOdd warns, once, of a lifetime that nobody understands.
func (e *endpoint) warnOdd(odd string) {
	if last := e.odd.Load(); odd == "" || (last != nil && *last == odd) {
		return
	}
	e.odd.Store(&odd)
	e.logger.Warn("the lifetime in the token endpoint's answer (expires_in) "+odd+": default_lifetime counts instead; set it, or the expires_in of token_response",
		e.logFields()...)
}

// denial returns what is known about a failure.
func (e *endpoint) denial(failure *tokenError, u *url.URL, a serverAnswer, sent resolved, p *clientcert.Presented) denial {
	r := denial{tokenError: failure, Credentials: &e.credentials, header: a.header, url: u, sent: sent, presented: p}
	if e.discovery != nil {
		r.metadata = e.discovery.known()
		if shown := e.knownURL(); shown != withheld {
			r.shown = shown
		}
	}
	return r
}

// fetched implements requester. It logs each fetch that fails, and the first
// fetch that succeeds after failures. It also emits the events.
func (e *endpoint) fetched(t *token, err *fetchError, failures int) {
	if err != nil {
		if errors.Is(err, errReleased) {
			return
		}
		if isElsewhere(err) {
			e.logger.Debug("another instance has failed to obtain the token, so this one asks later", append(e.logFields(), zap.Time("retry_at", err.retryAt))...)
			return // it is news at the instance that has asked
		}
		e.logger.Warn("obtaining token failed", append(e.logFields(),
			zap.Error(err.err), zap.Int("failures", failures+1), zap.Time("retry_at", err.retryAt))...)
		failed := reportError(err)
		e.events.emit(eventFailed, map[string]any{
			"client": e.metrics.name, "error": failed.Code, "error_description": failed.Description,
			"status": failed.Status, "failures": failures + 1, "retry_at": err.retryAt,
		})
		return
	}
	if failures > 0 {
		e.logger.Info("obtaining token succeeded again", append(e.logFields(),
			zap.Int("failures", failures), zap.Time("expires", t.expires))...)
	} else if t.grant.taken {
		e.logger.Debug("took the token of another instance", append(e.logFields(),
			zap.Time("expires", t.expires), zap.Time("renewal", t.refreshAt))...)
	} else {
		e.logger.Debug("obtained token", append(e.logFields(),
			zap.Time("expires", t.expires), zap.Time("renewal", t.refreshAt))...)
	}
	if t.grant.taken {
		return // it is news at the instance that has asked
	}
	e.events.emit(eventObtained, map[string]any{"client": e.metrics.name, "expires": t.expires, "renewal": t.refreshAt})
}

// logFields returns the log fields that tell which client a line is about.
func (e *endpoint) logFields() []zap.Field { return e.credentials.logFields() }

// share implements requester.
func (e *endpoint) share(ctx context.Context) *shared {
	if e.sharing == nil {
		return nil
	}
	return e.sharing.of(ctx, &e.credentials, func(ctx context.Context) (resolved, error) {
		return e.credentials.resolve(ctx, &e.certificates)
	})
}

// concurrent implements requester. Some servers accept an assertion only once, so one
// from a file can't be sent twice (RFC 7523 §3). The JWTs that are made here have a
// `jti` each.
func (e *endpoint) concurrent() bool { return e.credentials.AssertionFile == "" && e.repeatable() }

// repeatable implements requester. Params may be a login, which locks its user out after
// some failures.
func (e *endpoint) repeatable() bool { return !e.credentials.grantsByParams() }

// describe implements requester.
func (e *endpoint) describe() description {
	c := &e.credentials
	return description{
		name:          e.metrics.name,
		endpoint:      c.host(),
		TokenEndpoint: e.knownURL(),
		Issuer:        c.Issuer,
		ClientID:      c.ClientID,
		AuthMethod:    c.authMethod(),
		GrantType:     c.grantType(),
		DPoP:          c.DPoP,
		ShareTokens:   c.shares(),
		Scopes:        c.Scopes,
		Keys:          e.keys,
	}
}
