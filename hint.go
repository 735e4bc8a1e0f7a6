// What to change when the authorization server refuses a request.

package outboundauth

import (
	"fmt"
	"strings"
)

// hint says what to change when the authorization server answers with a code
// (RFC 6749 §5.2, RFC 8707 §2, RFC 7523 §3.1). An unknown code has no hint.
func (c *Credentials) hint(code string) string {
	switch code {
	case "invalid_client":
		return "check " + c.clientSettings()
	case "invalid_grant":
		if c.grantsByJWT() {
			return "check " + c.grantSettings()
		}
	case "unauthorized_client":
		if c.grantsByJWT() {
			return "allow this client the jwt-bearer grant for this subject at the authorization server"
		}
		return "allow this client the client_credentials grant at the authorization server"
	case "unsupported_grant_type":
		server := "token_url"
		if c.Issuer != "" {
			server = "issuer"
		}
		return fmt.Sprintf("check %s and grant_type: the server does not offer the %s grant there", server, c.grantType())
	case "invalid_scope":
		return "check scopes"
	case "invalid_target":
		return "check audience and resource"
	case "invalid_request":
		return "check " + c.requestSettings()
	case "use_dpop_nonce", "invalid_dpop_proof":
		return "register the client without DPoP: the tokens here are bearer tokens"
	}
	return ""
}

// requestSettings names the settings that a request is made of.
func (c *Credentials) requestSettings() string {
	names := []string{"auth_method", "scopes"}
	for _, setting := range []struct {
		name string
		set  bool
	}{
		{"audience", len(c.Audience) > 0},
		{"resource", len(c.Resource) > 0},
		{"param", len(c.Params) > 0},
		{"private_key", c.usesKey()},
		{"key_id", c.usesKey()},
		{"assertion_file", c.AssertionFile != ""},
	} {
		if setting.set {
			names = append(names, setting.name)
		}
	}
	return strings.Join(names[:len(names)-1], ", ") + " and " + names[len(names)-1]
}

// clientSettings names the settings that tell who the client is.
func (c *Credentials) clientSettings() string {
	switch c.authMethod() {
	case authBasic:
		return "client_id, client_secret, auth_method and basic_encoding"
	case authSecretJWT:
		return "client_id, client_secret, auth_method, signing_alg and " + c.assertionSettings()
	case authKeyJWT:
		if c.usesKey() {
			return "client_id, private_key, key_id, auth_method, signing_alg and " + c.assertionSettings()
		}
		return "assertion_file (issuer, subject, audience and expiry of its JWT), client_id and auth_method"
	case authTLS:
		return "client_id, client_certificate and auth_method"
	case authByGrant:
		return c.grantSettings()
	}
	return "client_id, client_secret and auth_method"
}

// assertionSettings names the settings of a JWT about which servers disagree.
func (c *Credentials) assertionSettings() string {
	if c.Issuer != "" {
		return "assertion_audience, or assertion_typ"
	}
	return "assertion_audience"
}

// grantSettings names the settings of the JWT that the token is granted for.
func (c *Credentials) grantSettings() string {
	if c.AssertionFile != "" {
		return "assertion_file: issuer, subject, audience and expiry of its JWT"
	}
	return "client_id, subject, claim, private_key, key_id, signing_alg and assertion_audience"
}
