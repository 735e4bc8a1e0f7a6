// Which settings can't work, alone or together.

package outboundauth

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/jsonpointer"
	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
)

// reservedParams are the form parameters that have settings of their own.
var reservedParams = map[string]string{
	"grant_type":            "use grant_type",
	"client_id":             "use client_id",
	"client_secret":         "use client_secret",
	"client_assertion":      "use private_key or assertion_file",
	"client_assertion_type": "it is set with the client_assertion",
	"scope":                 "use scopes",
	"audience":              "use audience",
	"resource":              "use resource",
}

// reservedClaims are the claims to which RFC 7523 §3 gives a meaning in the JWT
// of a grant.
var reservedClaims = []string{"iss", "sub", "aud", "exp", "iat", "nbf", "jti"}

// assertionLeeway is how far the JWTs are dated back. Otherwise a server whose
// clock is behind would think that they are not valid yet.
const assertionLeeway = 10 * time.Second

// minAssertionLifetime leaves a part of the lifetime for the way to the server.
const minAssertionLifetime = 30 * time.Second

// requestNamespaces are the beginnings of placeholders that have a value only
// while a request is served. They never have a value in a token request.
var requestNamespaces = []string{"{http.", "{vars.", "{tls.", "{err.", "{rp."}

// check returns what is wrong with one of the settings that are present. It
// accepts values that still have placeholders: they are checked again after the
// placeholders are replaced. It quotes no value: a mistyped line may
// hold a secret.
func (c *Credentials) check() error {
	if _, err := parseTokenURL(c.TokenURL); err != nil && c.TokenURL != "" && !hasPlaceholder(c.TokenURL) {
		return fmt.Errorf("token_url: %w", err)
	}
	if _, err := parseIssuer(c.Issuer); err != nil && c.Issuer != "" && !hasPlaceholder(c.Issuer) {
		return fmt.Errorf("issuer: %w", err)
	}
	if err := c.checkTexts(); err != nil {
		return err
	}
	if err := c.checkAuth(); err != nil {
		return err
	}
	for _, scope := range c.Scopes {
		if !validScope(scope) && !hasPlaceholder(scope) {
			return errScope
		}
	}
	if slices.ContainsFunc(c.Audience, blank) {
		return errors.New("audience: an empty value cannot be sent; remove it")
	}
	for _, resource := range c.Resource {
		if !validResource(resource) && !hasPlaceholder(resource) {
			return errors.New("resource: is not an absolute URI without a fragment (RFC 8707 section 2)")
		}
	}
	for _, name := range sortedKeys(c.Params) {
		if hint, ok := reservedParams[name]; ok {
			return fmt.Errorf("param %s: has a setting of its own: %s", name, hint)
		}
		if blank(name) || c.Params[name] == "" {
			return errors.New("param: name and value must not be empty")
		}
	}
	for _, field := range sortedKeys(c.TokenRequestHeaders) {
		if err := checkHeaderField(field, "authorization", "content-type"); err != nil {
			return fmt.Errorf("token_request_header: %w", err)
		}
		if err := checkHeaderValue(c.TokenRequestHeaders[field]); err != nil {
			return fmt.Errorf("token_request_header: %w", err)
		}
	}
	for _, status := range c.RetryOn {
		if (status < 400 || status > 599) && status != retryGRPC && !c.neverRetries() {
			return errors.New("retry_on: write error statuses (400 to 599), grpc (in JSON: 16), or off (in JSON: [-1])")
		}
	}
	if s := c.ShareTokens; s != nil && s.Off && (s.Key != "" || s.StorageRaw != nil) {
		return errors.New("share_tokens: off contradicts its other settings: remove one of the two")
	}
	if err := c.checkReplay(); err != nil {
		return err
	}
	if err := c.checkDurations(); err != nil {
		return err
	}
	if err := c.checkExchange(); err != nil {
		return err
	}
	return c.checkHeaders()
}

func (c *Credentials) checkDurations() error {
	switch {
	case c.TokenTimeout < 0:
		return errors.New("token_timeout: must not be negative")
	case c.RefreshBefore < 0:
		return errors.New("refresh_before: must not be negative")
	case c.DefaultLifetime < 0:
		return errors.New("default_lifetime: must not be negative")
	case c.MaxLifetime != 0 && time.Duration(c.MaxLifetime) < minLifetime:
		return fmt.Errorf("max_lifetime: must be %v at least", minLifetime)
	}
	return nil
}

// checkExchange checks how the token request is written, and how its answer is read.
func (c *Credentials) checkExchange() error {
	if c.TokenRequest != "" && c.TokenRequest != asForm && c.TokenRequest != asJSON {
		return fmt.Errorf("token_request: use %s or %s", asForm, asJSON)
	}
	r := c.TokenResponse
	if r == nil {
		return nil
	}
	if r.AccessToken == "" && r.ExpiresIn == "" {
		return errors.New("token_response: names no member; name access_token, expires_in or both, or remove it")
	}
	for _, member := range []struct{ name, pointer string }{{"access_token", r.AccessToken}, {"expires_in", r.ExpiresIn}} {
		if _, err := jsonpointer.Parse(member.pointer); err != nil && member.pointer != "" {
			return fmt.Errorf("token_response: %s: %w", member.name, err)
		}
	}
	switch {
	case r.ExpiresInUnit != "" && r.ExpiresIn == "":
		return errors.New("token_response: a unit stands behind the place of expires_in; name that, too")
	case r.unit() == 0:
		return errors.New("token_response: expires_in: the unit is ms, s, m, h or d")
	}
	return nil
}

// checkReplay checks replay_body.
func (c *Credentials) checkReplay() error {
	switch r := c.ReplayBody; {
	case r == nil:
		return nil
	case *r == ReplayBody{}:
		return errors.New("replay_body: is empty; set its size, or remove it")
	case r.Size < replayNothing:
		return errors.New("replay_body: the size must not be negative")
	case r.Size > maxReplayBody:
		return errors.New("replay_body: at most 1MiB is kept of each request; with `announce`, the upstream may refuse a longer body before it is sent")
	}
	return nil
}

// checkReplayUse checks that some answer makes a request be sent again. c has what it inherits.
func (c *Credentials) checkReplayUse() error {
	if c.ReplayBody != nil && !c.repeats() {
		return errors.New("replay_body has no effect with retry_on off: set other statuses, or remove replay_body")
	}
	return nil
}

// checkSharing checks share_tokens. c has what it inherits.
func (c *Credentials) checkSharing() error {
	const remedy = "; write `share_tokens off` here, or remove one of the two"
	switch {
	case !c.shares():
		return nil
	case c.BindCertificate:
		return errors.New("share_tokens: with bind_certificate, a token is of use only to the instance that has the certificate" + remedy)
	case c.DPoP != "":
		return errors.New("share_tokens: with dpop, a token is of use only to the instance that has the key" + remedy)
	case c.ShareTokens.Key == "" && c.ClientSecret == "" && !c.usesKey() && c.ClientCertificate == nil:
		return errNoSharedKey
	}
	return nil
}

var errNoSharedKey = errors.New("share_tokens: the client has no secret from which a key could be made; give share_tokens a key of its own")

// checkTexts finds a setting that holds only white space, or that Caddy could not read
// as it was written.
func (c *Credentials) checkTexts() error {
	values := c.templates()
	maps.Copy(values, map[string]string{
		"name": c.Name, "client_id": c.ClientID, "key_id": c.KeyID,
		"assertion_audience": c.AssertionAudience, "assertion_typ": c.AssertionTyp,
	})
	for _, setting := range sortedKeys(values) {
		if value := values[setting]; value != "" && blank(value) {
			return fmt.Errorf("%s: holds nothing but white space; write a value, or remove the setting", withoutName(setting))
		}
		if checkUTF8(setting) != nil || checkUTF8(values[setting]) != nil {
			return fmt.Errorf("%s: is not UTF-8, which is all that a config can hold; a secret of other bytes can stand in a file that {file.*} names", withoutName(setting))
		}
	}
	return nil
}

// checkAuth returns what is wrong with one of the settings of client
// authentication that are present.
func (c *Credentials) checkAuth() error {
	if c.AuthMethod != "" && !slices.Contains(authMethods, c.AuthMethod) {
		return unknownMethodError(c.AuthMethod)
	}
	if err := checkGrantType(c.GrantType); err != nil {
		return err
	}
	if c.DPoP != "" && !slices.Contains(dpop.Algorithms, c.DPoP) {
		return errors.New("dpop: unknown algorithm; use " + strings.Join(dpop.Algorithms, " or "))
	}
	if c.BasicEncoding != "" && c.BasicEncoding != basicForm && c.BasicEncoding != basicRaw {
		return fmt.Errorf("basic_encoding: unknown encoding; use %s or %s", basicForm, basicRaw)
	}
	if c.SigningAlg != "" && !slices.Contains(jwt.Algorithms, c.SigningAlg) {
		return errors.New("signing_alg: unknown algorithm; use one of " + strings.Join(jwt.Algorithms, ", "))
	}
	if c.AssertionLifetime != 0 && time.Duration(c.AssertionLifetime) < minAssertionLifetime {
		return fmt.Errorf("assertion_lifetime: must be %v at least, as the JWT is dated back by %v", minAssertionLifetime, assertionLeeway)
	}
	if cert := c.ClientCertificate; cert != nil && (blank(cert.Certificate) || blank(cert.Key)) {
		return errors.New("client_certificate: name both the certificate and its key")
	}
	for _, name := range sortedKeys(c.Claims) {
		if slices.Contains(reservedClaims, name) {
			return fmt.Errorf("claim %s: is set for each JWT; iss is the client_id, sub the subject, aud the assertion_audience, exp follows from assertion_lifetime", name)
		}
		if blank(name) || c.Claims[name] == "" {
			return errors.New("claim: name and value must not be empty")
		}
	}
	return nil
}

// otherMethods are other names of methods, and what to write for them.
var otherMethods = map[string]string{
	"self_signed_tls_client_auth": authTLS + ", which presents self-signed certificates, too", // RFC 8705 §2.2
	"mtls":                        authTLS,
	"basic":                       authBasic,
	"header":                      authBasic,
	"post":                        authPost,
	"body":                        authPost,
	"client_secret":               authBasic + " or " + authPost,
	"private_key":                 authKeyJWT,
}

// unknownMethodError says what to write for an auth_method that is none.
func unknownMethodError(method string) error {
	method = strings.ToLower(method)
	write, ok := otherMethods[method]
	if !ok {
		write = slices.MinFunc(authMethods, func(a, b string) int { return edits(method, a) - edits(method, b) })
		ok = isSlip(method, write)
	}
	if !ok {
		return errors.New("auth_method: unknown method; use one of " + strings.Join(authMethods, ", "))
	}
	return errors.New("auth_method: unknown method; write " + write)
}

// checkTogether returns which settings do not fit together. c is a block with
// all that it inherits, because settings that contradict each other may stand in
// two blocks.
func (c *Credentials) checkTogether() error {
	if c.TokenURL != "" && c.Issuer != "" {
		return errors.New("issuer: finds the token endpoint that token_url names already; remove one of the two")
	}
	if err := c.checkAuthTogether(); err != nil {
		return err
	}
	if err := cmp.Or(c.checkReplayUse(), c.checkSharing()); err != nil {
		return err
	}
	var taken fieldSet
	field, _ := c.BearerHeader.withDefaults()
	if c.DPoP != "" {
		taken.add(dpop.Header)
		if err := c.checkDPoP(taken.has(field)); err != nil {
			return err
		}
	}
	taken.add(field)
	if c.Tenant != nil {
		field = c.Tenant.field()
		if taken.has(field) {
			return errors.New("tenant: its header carries the token already, or the proof of dpop")
		}
		taken.add(field)
	}
	for _, field := range sortedKeys(c.Headers) {
		// has also finds other spellings that an upstream may confuse.
		if taken.has(field) {
			return errors.New("header: the field is set already, by bearer_header, dpop, tenant or another header")
		}
		taken.add(field)
	}
	return nil
}

// checkDPoP returns what does not fit together with dpop. taken reports whether the token has
// the header of the proof.
func (c *Credentials) checkDPoP(taken bool) error {
	b := c.BearerHeader
	switch {
	case c.BindCertificate:
		return errors.New("bind_certificate: dpop binds the token already; remove one of the two")
	case taken:
		return errors.New("bearer_header: this header carries the proof of dpop; name another")
	case b != nil && b.Scheme != nil && !strings.EqualFold(*b.Scheme, dpop.Scheme):
		return errors.New("bearer_header: with dpop, the scheme is DPoP; leave it out")
	case c.TokenRequestHeaders[dpop.Header] != "":
		return errors.New("token_request_header: dpop sends the header DPoP; remove one of the two")
	}
	return nil
}

// checkAuthTogether returns which settings of client authentication do not fit
// together. A setting that has no effect is an error, too: its author believes
// that it has one.
func (c *Credentials) checkAuthTogether() error {
	method := c.authMethod()
	with := "auth_method " + method
	switch {
	case method == authByGrant:
		with = "grant_type " + c.GrantType
	case c.AuthMethod == "" && c.ClientSecret != "":
		with = "client_secret (auth_method is " + method + " by default)"
	}
	signing, granting := with, "grant_type "+c.grantType()
	if c.grantsByParams() {
		granting = "this grant_type" // which nobody here knows
	}
	if c.AssertionFile != "" { // the JWT in it takes the place of a JWT that would be signed
		if c.grantsByJWT() {
			granting = "assertion_file"
		}
		if method == authKeyJWT || method == authByGrant {
			signing = "assertion_file"
		}
	}
	makesGrant := c.grantsByJWT() && c.AssertionFile == ""
	for _, setting := range []struct {
		name      string
		set, used bool
		with      string
	}{
		{"client_secret", c.ClientSecret != "", needsSecret(method), with},
		{"basic_encoding", c.BasicEncoding != "", method == authBasic, with},
		{"assertion_file", c.AssertionFile != "", method == authKeyJWT || c.grantsByJWT(), with},
		{"private_key", c.PrivateKey != "", c.usesKey(), signing},
		{"key_id", c.KeyID != "", c.usesKey(), signing},
		{"signing_alg", c.SigningAlg != "", c.signs(), signing},
		{"assertion_audience", c.AssertionAudience != "", c.signs(), signing},
		{"assertion_typ", c.AssertionTyp != "", c.signs(), signing},
		{"assertion_lifetime", c.AssertionLifetime != 0, c.signs(), signing},
		{"subject", c.Subject != "", makesGrant, granting},
		{"claim", len(c.Claims) > 0, makesGrant, granting},
	} {
		if setting.set && !setting.used {
			return fmt.Errorf("%s has no effect with %s: remove one of the two", setting.name, setting.with)
		}
	}
	_, assertion := c.Params["assertion"]
	switch {
	case assertion && !c.grantsByParams():
		return errors.New("param assertion: has a setting of its own: use grant_type jwt_bearer, or name another grant")
	case c.TokenRequest == asJSON && method != authPost && method != authNone:
		return fmt.Errorf("token_request: json can hold no other way to authenticate than %s and none: set auth_method to one of them", authPost)
	case c.BasicEncoding == basicRaw && strings.Contains(c.ClientID, ":"):
		return errors.New("basic_encoding: raw can't send a client_id with a colon, where servers cut it (RFC 7617 section 2); set auth_method client_secret_post in its place, which sends it whole")
	case c.BindCertificate && c.ClientCertificate == nil:
		return errors.New("bind_certificate: there is no client_certificate to bind tokens to; add one")
	case c.ClientCertificate != nil && c.presentsOther():
		return errors.New("client_certificate: token_transport has another one; remove one of the two")
	}
	if symmetric := strings.HasPrefix(c.SigningAlg, "HS"); c.SigningAlg != "" && symmetric == c.usesKey() {
		return fmt.Errorf("signing_alg: %s does not fit: HS* sign with the client_secret of %s, the others with a private_key", c.SigningAlg, authSecretJWT)
	}
	return nil
}

// checkHeaders checks the headers that the upstream is sent.
func (c *Credentials) checkHeaders() error {
	if b := c.BearerHeader; b != nil && b.Field == "" && b.Scheme == nil {
		return errors.New("bearer_header: names neither a field nor a scheme; name one, or remove it")
	}
	field, scheme := c.BearerHeader.withDefaults()
	if err := checkHeaderField(field); err != nil {
		return fmt.Errorf("bearer_header: %w", err)
	}
	if scheme != "" && !validHeaderField(scheme) {
		return errors.New("bearer_header: the scheme is not that of an authentication, such as Bearer")
	}
	if c.Tenant != nil {
		if err := checkHeaderField(c.Tenant.field()); err != nil {
			return fmt.Errorf("tenant: %w", err)
		}
		if err := checkHeaderValue(c.Tenant.Value); err != nil {
			return fmt.Errorf("tenant: %w", err)
		}
	}
	for _, field := range sortedKeys(c.Headers) {
		if err := checkHeaderField(field); err != nil {
			return fmt.Errorf("header: %w", err)
		}
		if err := checkHeaderValue(c.Headers[field]); err != nil {
			return fmt.Errorf("header: %w", err)
		}
	}
	return nil
}

// missing returns the first setting that is missing to ask for a token, and what
// to write. It returns "" if nothing is missing.
func (c *Credentials) missing() string {
	if c.TokenURL == "" && c.Issuer == "" {
		return "token_url is missing: set it to the URL of the authorization server's token endpoint, or issuer to have it discovered"
	}
	return c.missingAuth()
}

// missingAuth returns the first setting that is missing to authenticate the
// client, and what to write. It returns "" if nothing is missing.
func (c *Credentials) missingAuth() string {
	method := c.authMethod()
	switch {
	case c.ClientID == "" && c.sendsNoGrant() && method == authNone:
		return ""
	case c.ClientID == "" && c.sendsNoGrant() && method == authTLS && (c.ClientCertificate != nil || c.presentsOther()):
		return ""
	case c.ClientID == "" && (c.AssertionFile == "" || c.signs() || (method != authKeyJWT && method != authByGrant)):
		return "client_id is missing"
	case c.usesKey() && c.PrivateKey == "" && c.ClientCertificate == nil && c.AssertionFile != "":
		return "private_key is missing: assertion_file is what the token is granted for, and the client needs a key to authenticate with"
	case c.usesKey() && c.PrivateKey == "" && c.ClientCertificate == nil:
		return "private_key is missing: name the file of the key that signs the client's JWTs, or of a JWT in assertion_file"
	case method == authTLS && c.ClientCertificate == nil && !c.presentsOther():
		return "client_certificate is missing: name the files of the certificate and its key"
	case method != authByGrant && needsSecret(method) && c.ClientSecret == "":
		missing := "client_secret is missing: set it, for example to {env.CLIENT_SECRET}"
		if c.AuthMethod == "" {
			missing += ", or set auth_method none"
		}
		return missing
	}
	return ""
}

// missingBeside returns the first setting that c lacks after it has inherited
// from base, and what to write. It returns "" if nothing is missing. If base
// sets auth_method or basic_encoding, a block that does not inherit this setting
// has to set it, too. Otherwise the method or the encoding would change without
// a word.
func (c *Credentials) missingBeside(base *Credentials) string {
	merged := c.inherit(base)
	missing, own := merged.missing(), c.authSettings()
	if base == nil || len(own) == 0 {
		return missing
	}
	notInherited := slices.DeleteFunc(base.authSettings(), func(name string) bool { return slices.Contains(own, name) || c.inherits(name) })
	switch method := merged.authMethod(); {
	case base.AuthMethod != "" && c.AuthMethod == "" && method != authByGrant: // that one has no name
		missing = fmt.Sprintf("auth_method is missing: around this block it is %s; repeat that, or set another", base.AuthMethod)
	case missing == "" && base.BasicEncoding != "" && c.BasicEncoding == "" && method == authBasic:
		missing = fmt.Sprintf("basic_encoding is missing: around this block it is %s; repeat that, or set the other", base.BasicEncoding)
	case missing == "" || len(notInherited) == 0 || merged.ClientID == "": // client_id is inherited
		return missing
	}
	return fmt.Sprintf("%s (this block sets %s, so it inherits no client authentication from the settings around it: no %s)",
		missing, own[0], strings.Join(notInherited, ", "))
}

// unusedAuth returns the first setting of client authentication in c that nobody
// uses, and "" if there is none. c stands around blocks of a kind, and is only there to be
// inherited from. But a block with client
// authentication of its own inherits none. Without this check, bind_certificate
// could stand there without a word, and no token would be bound.
func (c *Credentials) unusedAuth(blocks []*Credentials) string {
	if len(blocks) == 0 {
		return ""
	}
	for _, setting := range c.authSettings() {
		if !slices.ContainsFunc(blocks, func(block *Credentials) bool { return block.inherits(setting) }) {
			return setting
		}
	}
	return ""
}

func unusedAuthError(setting string, beside bool) error {
	if beside {
		return fmt.Errorf("%s has no effect: each client block sets client authentication, so no block inherits it; remove it, or move it into the blocks", setting)
	}
	return fmt.Errorf("%s has no effect: each upstream block sets client authentication, so no block inherits any; move it into the blocks", setting)
}

// templates returns the settings whose placeholders are replaced for each token
// request.
func (c *Credentials) templates() map[string]string {
	templates := map[string]string{
		"client_secret":  c.ClientSecret,
		"private_key":    c.PrivateKey,
		"assertion_file": c.AssertionFile,
		"subject":        c.Subject,
	}
	if c.ShareTokens != nil {
		templates["share_tokens"] = c.ShareTokens.Key
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
	return templates
}

// checkTemplates checks the settings that templates returns.
func (c *Credentials) checkTemplates() error {
	templates := c.templates()
	for _, setting := range sortedKeys(templates) {
		if err := checkSecretTemplate(setting, templates[setting]); err != nil {
			return err
		}
	}
	return nil
}

// withoutName returns the name of a setting that has several names and values,
// without these names.
func withoutName(setting string) string {
	setting, _, _ = strings.Cut(setting, " ")
	return setting
}

// checkSecretTemplate refuses placeholders that nobody would replace: they would
// be sent as text. It allows other braces, because generated secrets contain any
// character.
func checkSecretTemplate(setting, template string) error {
	if strings.Contains(template, "{http.request.uri.path.file.") { // so the Caddyfile expands the file's name without a path
		return fmt.Errorf("%s: Caddy takes a {file.*} without a path for a part of a request's path; write one, such as {file./run/secrets/name} or {file../name}", withoutName(setting))
	}
	for _, prefix := range requestNamespaces {
		if strings.Contains(template, prefix) {
			return fmt.Errorf("%s: %s*} placeholders have no value in a token request; use {env.*} or {file.*}", withoutName(setting), prefix)
		}
	}
	return nil
}

// validScope reports whether s is a scope-token (RFC 6749 §3.3).
func validScope(s string) bool {
	return s != "" && strings.IndexFunc(s, func(r rune) bool {
		return r <= ' ' || r > '~' || r == '"' || r == '\\'
	}) < 0
}

var errScope = errors.New("scopes: one is not a scope (RFC 6749 section 3.3: printable ASCII without spaces, quotes and backslashes); write each as an argument of its own")

// validResource reports whether s may be the value of a resource parameter
// (RFC 8707 §2).
func validResource(s string) bool {
	u, err := url.Parse(s)
	return err == nil && u.IsAbs() && u.Fragment == "" && !strings.HasSuffix(s, "#")
}

// blank reports whether s is empty or holds only white space.
func blank(s string) bool { return strings.TrimSpace(s) == "" }

func hasPlaceholder(s string) bool { return strings.Contains(s, "{") }

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
