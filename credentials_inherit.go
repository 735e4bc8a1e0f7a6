// What the credentials of an upstream inherit from the credentials around them.

package outboundauth

import (
	"cmp"
	"maps"
)

// inherit returns c, with the settings of base that c does not set. It takes
// lists and objects as a whole. It takes the named values of `param`, `claim`,
// `token_request_header` and `header` one by one. But if c sets anything of
// client authentication, it takes nothing of client authentication. Otherwise
// nobody could foretell which settings of base go together with which settings
// of c. A client block takes the server all the same.
func (c Credentials) inherit(base *Credentials) Credentials {
	if base == nil {
		return c
	}
	ownAuth := len(c.authSettings()) > 0
	if !ownAuth && c.ClientID == "" { // another client has another name
		c.Name = cmp.Or(c.Name, base.Name)
	}
	c.ClientID = cmp.Or(c.ClientID, base.ClientID)
	if c.inherits("token_url") {
		c.TokenURL, c.Issuer = base.TokenURL, base.Issuer
	}
	if !ownAuth {
		c.ClientSecret, c.AuthMethod, c.BasicEncoding = base.ClientSecret, base.AuthMethod, base.BasicEncoding
		c.PrivateKey, c.KeyID, c.SigningAlg = base.PrivateKey, base.KeyID, base.SigningAlg
		c.AssertionAudience, c.AssertionTyp, c.AssertionLifetime = base.AssertionAudience, base.AssertionTyp, base.AssertionLifetime
		c.AssertionFile = base.AssertionFile
		c.ClientCertificate = base.ClientCertificate
		c.BindCertificate = base.BindCertificate && c.DPoP == "" // which binds its tokens to something else
	}
	if !c.BindCertificate { // which binds them already; else bound tokens would become others without a word
		c.DPoP = cmp.Or(c.DPoP, base.DPoP)
	}
	c.ShareTokens = c.ShareTokens.inherit(base.ShareTokens)
	c.GrantType = cmp.Or(c.GrantType, base.GrantType)
	if c.grantsByJWT() && c.AssertionFile == "" { // otherwise nothing uses them
		c.Subject = cmp.Or(c.Subject, base.Subject)
		c.Claims = union(base.Claims, c.Claims)
	}
	c.Scopes = orList(c.Scopes, base.Scopes)
	c.Audience = orList(c.Audience, base.Audience)
	c.Resource = orList(c.Resource, base.Resource)
	c.Params = union(base.Params, c.Params)
	c.TokenRequestHeaders = union(base.TokenRequestHeaders, c.TokenRequestHeaders)
	c.TokenRequest = cmp.Or(c.TokenRequest, base.TokenRequest)
	c.TokenResponse = cmp.Or(c.TokenResponse, base.TokenResponse)
	c.TokenTimeout = cmp.Or(c.TokenTimeout, base.TokenTimeout)
	c.TokenTransport = cmp.Or(c.TokenTransport, base.TokenTransport)
	c.Tenant = cmp.Or(c.Tenant, base.Tenant)
	c.Headers = union(base.Headers, c.Headers)
	c.BearerHeader = cmp.Or(c.BearerHeader, base.BearerHeader)
	c.RefreshBefore = cmp.Or(c.RefreshBefore, base.RefreshBefore)
	c.DefaultLifetime = cmp.Or(c.DefaultLifetime, base.DefaultLifetime)
	c.MaxLifetime = cmp.Or(c.MaxLifetime, base.MaxLifetime)
	c.RetryOn = orList(c.RetryOn, base.RetryOn)
	if c.repeats() { // otherwise nothing uses it
		c.ReplayBody = cmp.Or(c.ReplayBody, base.ReplayBody)
	}
	return c
}

// inherit returns s with what it takes from base. Either may be nil.
func (s *ShareTokens) inherit(base *ShareTokens) *ShareTokens {
	if s == nil || base == nil || s.Off || base.Off {
		return cmp.Or(s, base)
	}
	own := *s
	own.Key = cmp.Or(own.Key, base.Key)
	if own.StorageRaw == nil {
		own.StorageRaw = base.StorageRaw
	}
	return &own
}

// inherits reports whether c takes a setting of client authentication from around it.
func (c *Credentials) inherits(setting string) bool {
	if c.ofServer && (setting == "token_url" || setting == "issuer") {
		return c.TokenURL == "" && c.Issuer == ""
	}
	return len(c.authSettings()) == 0
}

// authSettings returns the names of the settings of client authentication that c
// has. token_url and issuer belong to them. If a block with its own server could
// inherit the others, the secret of another client would be sent to that server.
func (c *Credentials) authSettings() []string {
	var names []string
	for _, setting := range []struct {
		name string
		set  bool
	}{
		{"token_url", c.TokenURL != ""},
		{"issuer", c.Issuer != ""},
		{"client_secret", c.ClientSecret != ""},
		{"auth_method", c.AuthMethod != ""},
		{"basic_encoding", c.BasicEncoding != ""},
		{"private_key", c.PrivateKey != ""},
		{"key_id", c.KeyID != ""},
		{"signing_alg", c.SigningAlg != ""},
		{"assertion_audience", c.AssertionAudience != ""},
		{"assertion_typ", c.AssertionTyp != ""},
		{"assertion_lifetime", c.AssertionLifetime != 0},
		{"assertion_file", c.AssertionFile != ""},
		{"client_certificate", c.ClientCertificate != nil},
		{"bind_certificate", c.BindCertificate},
	} {
		if setting.set {
			names = append(names, setting.name)
		}
	}
	return names
}

func orList[T any](own, base []T) []T {
	if len(own) > 0 {
		return own
	}
	return base
}

// union returns the values of both maps. If both have a name, the value is that
// of own.
func union(base, own map[string]string) map[string]string {
	if len(base) == 0 {
		return own
	}
	both := maps.Clone(base)
	maps.Copy(both, own)
	return both
}
