// What an upstream's credentials take from those around them.

package outboundauth

import (
	"cmp"
	"maps"
	"strings"
)

// inherit returns c with what it doesn't set taken from base: lists and
// objects as a whole, the named values of `param`, `token_request_header` and
// `header` one by one.
func (c Credentials) inherit(base *Credentials) Credentials {
	if base == nil {
		return c
	}
	sameServer := c.TokenURL == "" && c.Issuer == "" // each takes the place of the other
	if sameServer {
		c.TokenURL, c.Issuer = base.TokenURL, base.Issuer
	}
	if c.ClientID == "" { // another client has another name
		c.Name = cmp.Or(c.Name, base.Name)
	}
	c.ClientID = cmp.Or(c.ClientID, base.ClientID)
	c = c.inheritAuth(base, sameServer)
	c.Scopes = orList(c.Scopes, base.Scopes)
	c.Audience = orList(c.Audience, base.Audience)
	c.Resource = orList(c.Resource, base.Resource)
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

// inheritAuth inherits what the client authenticates with, as far as its
// auth_method and grant_type have use for it: a block with a method of its own
// must not be told to remove what stands elsewhere.
func (c Credentials) inheritAuth(base *Credentials, sameServer bool) Credentials {
	c.GrantType = cmp.Or(c.GrantType, base.GrantType)
	brought := c.ClientSecret != ""
	if !c.grantsByJWT() || !base.grantsByJWT() { // else key and file are for the grant, here and there
		brought = brought || c.PrivateKey != "" || c.AssertionFile != ""
	}
	c.AuthMethod = cmp.Or(c.AuthMethod, base.AuthMethod)
	if c.ClientCertificate == nil && !c.presentsOther() {
		c.ClientCertificate = base.ClientCertificate
		c.BindCertificate = c.BindCertificate || base.BindCertificate
	} else if base.ClientCertificate == nil { // bind_certificate alone is meant for all blocks
		c.BindCertificate = c.BindCertificate || base.BindCertificate
	}

	if needsSecret(c.AuthMethod) && (c.AuthMethod != "" || !brought) {
		c.ClientSecret = cmp.Or(c.ClientSecret, base.ClientSecret)
	}
	if method := c.AuthMethod; method == authKeyJWT || c.grantsByJWT() || (method == "" && !brought) {
		ownKey, ownFile := c.PrivateKey != "", c.AssertionFile != ""
		both := method == authKeyJWT && c.grantsByJWT() // the key for the client, the file for the grant
		if !ownKey && (!ownFile || both) {
			c.PrivateKey, c.KeyID = base.PrivateKey, cmp.Or(c.KeyID, base.KeyID)
		}
		if !ownFile && (!ownKey || (both && base.grantsByJWT())) {
			c.AssertionFile = base.AssertionFile
		}
	}
	if c.authMethod() == authBasic {
		c.BasicEncoding = cmp.Or(c.BasicEncoding, base.BasicEncoding)
	}
	if c.signs() {
		if strings.HasPrefix(base.SigningAlg, "HS") != c.usesKey() {
			c.SigningAlg = cmp.Or(c.SigningAlg, base.SigningAlg)
		}
		if sameServer { // or this one got what is valid at the other
			c.AssertionAudience = cmp.Or(c.AssertionAudience, base.AssertionAudience)
		}
		c.AssertionTyp = cmp.Or(c.AssertionTyp, base.AssertionTyp)
		c.AssertionLifetime = cmp.Or(c.AssertionLifetime, base.AssertionLifetime)
	}
	if c.grantsByJWT() && c.AssertionFile == "" {
		c.Subject = cmp.Or(c.Subject, base.Subject)
		c.Claims = union(base.Claims, c.Claims)
	}
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
