package outboundauth

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

// reservedParams are the form parameters that have settings of their own.
var reservedParams = map[string]string{
	"grant_type":            "use grant_type",
	"client_id":             "use client_id",
	"client_secret":         "use client_secret",
	"client_assertion":      "use private_key or assertion_file",
	"client_assertion_type": "it is set with the client_assertion",
	"assertion":             "use grant_type jwt_bearer",
	"scope":                 "use scopes",
	"audience":              "use audience",
	"resource":              "use resource",
}

// check tells what is wrong with a setting that is present. Values that still
// have placeholders pass: they are checked again once these are replaced.
func (c *Credentials) check() error {
	if _, err := parseTokenURL(c.TokenURL); err != nil && c.TokenURL != "" && !hasPlaceholder(c.TokenURL) {
		return fmt.Errorf("token_url: %w", err)
	}
	if _, err := parseIssuer(c.Issuer); err != nil && c.Issuer != "" && !hasPlaceholder(c.Issuer) {
		return fmt.Errorf("issuer: %w", err)
	}
	if err := c.checkAuth(); err != nil {
		return err
	}
	for _, scope := range c.Scopes {
		if !validScope(scope) && !hasPlaceholder(scope) {
			return scopeError(scope)
		}
	}
	if slices.Contains(c.Audience, "") {
		return errors.New("audience: an empty value cannot be sent; remove it")
	}
	for _, resource := range c.Resource {
		if !validResource(resource) && !hasPlaceholder(resource) {
			return fmt.Errorf("resource: '%s' is not an absolute URI without a fragment (RFC 8707 section 2)", resource)
		}
	}
	for _, name := range sortedKeys(c.Params) {
		if hint, ok := reservedParams[name]; ok {
			return fmt.Errorf("param %s: has a setting of its own: %s", name, hint)
		}
		if name == "" || c.Params[name] == "" {
			return fmt.Errorf("param %s: name and value must not be empty", name)
		}
	}
	for _, field := range sortedKeys(c.TokenRequestHeaders) {
		if err := checkHeaderField(field, "authorization", "content-type"); err != nil {
			return fmt.Errorf("token_request_header: %w", err)
		}
		if !validHeaderValue(c.TokenRequestHeaders[field]) {
			return fmt.Errorf("token_request_header %s: the value holds a control character", field)
		}
	}
	for _, status := range c.RetryOn {
		if (status < 400 || status > 599) && !slices.Equal(c.RetryOn, []int{retryOff}) {
			return fmt.Errorf("retry_on: %d is not an error status (400 to 599)", status)
		}
	}
	if c.ReplayBody < replayNoBody {
		return errors.New("replay_body: must not be negative")
	}
	switch {
	case c.TokenTimeout < 0:
		return errors.New("token_timeout: must not be negative")
	case c.RefreshBefore < 0:
		return errors.New("refresh_before: must not be negative")
	case c.DefaultLifetime < 0:
		return errors.New("default_lifetime: must not be negative")
	}
	return c.checkHeaders()
}

// checkTogether tells what is wrong between settings. It is asked of what a
// block and its inheritance make up: each alone may not be wrong.
func (c *Credentials) checkTogether() error {
	if c.TokenURL != "" && c.Issuer != "" {
		return errors.New("issuer: finds the token endpoint that token_url names already; remove one of the two")
	}
	if err := c.checkAuthTogether(); err != nil {
		return err
	}
	var taken fieldSet
	field, _ := c.BearerHeader.resolve()
	taken.add(field)
	if c.Tenant != nil {
		field = c.Tenant.field()
		if taken.has(field) {
			return fmt.Errorf("tenant: the header %s carries the token already", field)
		}
		taken.add(field)
	}
	for _, field := range sortedKeys(c.Headers) {
		// Also in a spelling that an upstream may confuse.
		if taken.has(field) {
			return fmt.Errorf("header: %s is set already, by bearer_header, tenant or another header", field)
		}
		taken.add(field)
	}
	return nil
}

// checkHeaders checks what the upstream is sent.
func (c *Credentials) checkHeaders() error {
	field, scheme := c.BearerHeader.resolve()
	if err := checkHeaderField(field); err != nil {
		return fmt.Errorf("bearer_header: %w", err)
	}
	if scheme != "" && !validHeaderField(scheme) {
		return fmt.Errorf("bearer_header: '%s' is not an authentication scheme", scheme)
	}
	if c.Tenant != nil {
		if err := checkHeaderField(c.Tenant.field()); err != nil {
			return fmt.Errorf("tenant: %w", err)
		}
		if !validHeaderValue(c.Tenant.Value) {
			return errors.New("tenant: the value holds a control character")
		}
	}
	for _, field := range sortedKeys(c.Headers) {
		if err := checkHeaderField(field); err != nil {
			return fmt.Errorf("header: %w", err)
		}
		if !validHeaderValue(c.Headers[field]) {
			return fmt.Errorf("header %s: the value holds a control character", field)
		}
	}
	return nil
}

// missing names the first setting without which no token can be asked for,
// and what to write; "" if nothing is missing.
func (c *Credentials) missing() string {
	if c.TokenURL == "" && c.Issuer == "" {
		return "token_url is missing: set it to the URL of the authorization server's token endpoint, or issuer to have it discovered"
	}
	return c.missingAuth()
}

// resolve returns a copy with the placeholders replaced in what is read once,
// when the config is loaded. Secrets keep theirs: they are read again for
// each token request, and nothing resolved may reach the config that the
// admin API shows.
func (c Credentials) resolve(repl *caddy.Replacer) (Credentials, error) {
	err := c.check()
	if err != nil {
		return c, err
	}
	replace := func(setting string, value *string) {
		if err != nil || *value == "" {
			return
		}
		var replaced string
		if replaced, err = repl.ReplaceOrErr(*value, true, true); err != nil {
			err = fmt.Errorf("%s: %w (only global placeholders such as {env.*} and {file.*} are known here)", setting, err)
		}
		*value = replaced
	}
	replace("name", &c.Name)
	replace("token_url", &c.TokenURL)
	replace("issuer", &c.Issuer)
	replace("client_id", &c.ClientID)
	replace("key_id", &c.KeyID)
	replace("assertion_audience", &c.AssertionAudience)
	for _, list := range []struct {
		setting string
		values  *[]string
	}{{"scopes", &c.Scopes}, {"audience", &c.Audience}, {"resource", &c.Resource}} {
		*list.values = slices.Clone(*list.values)
		for i := range *list.values {
			replace(list.setting, &(*list.values)[i])
		}
	}
	if err != nil {
		return c, err
	}
	// One placeholder may hold several scopes, as servers write them.
	if c.Scopes != nil {
		c.Scopes = strings.Fields(strings.Join(c.Scopes, " "))
	}
	for _, scope := range c.Scopes {
		if !validScope(scope) { // whatever placeholder it comes from
			return c, scopeError(scope)
		}
	}

	if err := c.checkTemplates(); err != nil {
		return c, err
	}
	if err := c.check(); err != nil {
		return c, err
	}
	return c, c.checkTogether()
}

// checkTemplates checks the settings whose placeholders are replaced for each
// token request.
func (c *Credentials) checkTemplates() error {
	templates := map[string]string{
		"client_secret":  c.ClientSecret,
		"private_key":    c.PrivateKey,
		"assertion_file": c.AssertionFile,
		"subject":        c.Subject,
	}
	if c.ClientCertificate != nil {
		templates["client_certificate"] = c.ClientCertificate.Certificate + c.ClientCertificate.Key
	}
	for setting, values := range map[string]map[string]string{
		"param": c.Params, "claim": c.Claims, "token_request_header": c.TokenRequestHeaders,
	} {
		for name, value := range values {
			templates[setting+" "+name] = value
		}
	}
	for _, setting := range sortedKeys(templates) {
		if err := checkSecretTemplate(setting, templates[setting]); err != nil {
			return err
		}
	}
	return nil
}

// parseTokenURL parses the URL of a token endpoint (RFC 6749 §3.2). No error
// quotes it, as it may hold a password or a key.
func parseTokenURL(raw string) (*url.URL, error) {
	u, err := url.Parse(raw)
	switch {
	case err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Hostname() == "":
		return nil, errors.New("must be an absolute URL, such as https://auth.example.com/oauth2/token")
	case u.User != nil:
		return nil, errors.New("must hold no user and password; use client_id and client_secret")
	case u.Fragment != "" || strings.HasSuffix(raw, "#"):
		return nil, errors.New("must have no fragment (RFC 6749 section 3.2)")
	}
	return u, nil
}

// checkPlaintext refuses a token endpoint to which the client's secret would
// travel unencrypted.
func checkPlaintext(u *url.URL, proxied bool) error {
	if u.Scheme == "https" || (!proxied && staysOnMachine("tcp", u.Hostname())) {
		return nil
	}
	return fmt.Errorf("the client's credentials would go to %s unencrypted; use https://, or allow it with `insecure_plaintext %s`",
		u.Host, plaintextTokenURL)
}

// canonical returns c with the names of its headers in canonical form, so that
// an inherited header is overridden in whatever case it is written.
func (c Credentials) canonical() (Credentials, error) {
	var err error
	if c.Headers, err = canonicalNames(c.Headers); err != nil {
		return c, fmt.Errorf("header %w", err)
	}
	if c.TokenRequestHeaders, err = canonicalNames(c.TokenRequestHeaders); err != nil {
		return c, fmt.Errorf("token_request_header %w", err)
	}
	return c, nil
}

func canonicalNames(headers map[string]string) (map[string]string, error) {
	canonical := make(map[string]string, len(headers))
	for _, field := range sortedKeys(headers) {
		name := http.CanonicalHeaderKey(field)
		if _, ok := canonical[name]; ok {
			return nil, fmt.Errorf("%s is set twice: keep one", name)
		}
		canonical[name] = headers[field]
	}
	return canonical, nil
}

// validScope tells whether s is a scope-token (RFC 6749 §3.3).
func validScope(s string) bool {
	return s != "" && strings.IndexFunc(s, func(r rune) bool {
		return r <= ' ' || r > '~' || r == '"' || r == '\\'
	}) < 0
}

func scopeError(scope string) error {
	return fmt.Errorf("scopes: '%s' is not a scope (RFC 6749 section 3.3: printable ASCII without spaces, quotes and backslashes)", scope)
}

// validResource tells whether s may be the value of a resource parameter
// (RFC 8707 §2).
func validResource(s string) bool {
	u, err := url.Parse(s)
	return err == nil && u.IsAbs() && u.Fragment == "" && !strings.HasSuffix(s, "#")
}

func hasPlaceholder(s string) bool { return strings.Contains(s, "{") }

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }

// field returns the field name with its default.
func (t *Tenant) field() string {
	if t == nil || t.Field == "" {
		return defaultTenantField
	}
	return t.Field
}

// resolve returns field name and scheme with their defaults.
func (b *BearerHeader) resolve() (field, scheme string) {
	field, scheme = defaultBearerField, defaultBearerScheme
	if b != nil && b.Field != "" {
		field = b.Field
	}
	if b != nil && b.Scheme != nil {
		scheme = *b.Scheme
	}
	return field, scheme
}
