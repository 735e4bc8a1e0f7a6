// How a token request says who the client is, and what the token is granted for.

package outboundauth

import (
	"cmp"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

const clientAssertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

// The types of JWTs. Servers that know the type for client authentication
// (draft-ietf-oauth-rfc7523bis) publish metadata. Others want the old type.
const (
	typJWT        = "JWT"
	typClientAuth = "client-authentication+jwt"
)

// authenticate adds the client's identity to a token request. It uses exactly
// one method: RFC 6749 §2.3 forbids two in one request. One method after the
// other would use up the attempts that a server allows the client. A JWT is
// meant for audience. authenticate returns the parts of the request that must
// not be shown.
func (c *Credentials) authenticate(r resolved, audience string, form url.Values, header http.Header) (secrets redact.Secrets, err error) {
	switch method := c.authMethod(); method {
	case authBasic:
		// Both parts are form-encoded first (§2.3.1). Otherwise the server
		// would cut an id at its colon, and would decode a '%' in a secret.
		id, secret := url.QueryEscape(c.ClientID), url.QueryEscape(r.secret)
		if c.BasicEncoding == basicRaw {
			id, secret = c.ClientID, r.secret
		}
		basic := base64.StdEncoding.EncodeToString([]byte(id + ":" + secret))
		header.Set("Authorization", "Basic "+basic)
		secrets.Add(basic)
	case authPost:
		form.Set("client_id", c.ClientID)
		form.Set("client_secret", r.secret)
	case authSecretJWT, authKeyJWT:
		assertion := r.assertion
		if method == authSecretJWT || c.usesKey() {
			if assertion, err = c.clientAssertion(r, audience); err != nil {
				return nil, err
			}
		}
		if c.ClientID != "" { // optional, RFC 7521 §4.2
			form.Set("client_id", c.ClientID)
		}
		form.Set("client_assertion_type", clientAssertionType)
		form.Set("client_assertion", assertion)
		secrets.Add(assertion)
	case authTLS, authNone:
		if c.ClientID != "" { // what is granted for params may need none
			form.Set("client_id", c.ClientID) // RFC 8705 §2, RFC 6749 §3.2.1
		}
	}
	secrets.Add(r.secret)
	return secrets, nil
}

// authorize adds what the token is granted for. It returns the parts of the
// request that must not be shown.
func (c *Credentials) authorize(r resolved, audience string, form url.Values) (secrets redact.Secrets, err error) {
	switch {
	case c.sendsNoGrant():
		return nil, nil
	case !c.grantsByJWT():
		form.Set("grant_type", c.grantType())
		return nil, nil
	}
	assertion := r.assertion
	if c.AssertionFile == "" {
		if assertion, err = c.grantAssertion(r, audience); err != nil {
			return nil, err
		}
	}
	form.Set("grant_type", grantJWTBearerURN)
	form.Set("assertion", assertion)
	secrets.Add(assertion)
	secrets.AddReplaced(c.Subject, r.subject)
	for name, value := range r.claims {
		secrets.AddReplaced(c.Claims[name], value)
	}
	return secrets, nil
}

// write returns the parameters of a token request as its body, and the type of the body.
func (c *Credentials) write(parameters url.Values) (body, contentType string, err error) {
	if c.TokenRequest != asJSON {
		return parameters.Encode(), "application/x-www-form-urlencoded", nil
	}
	object := make(map[string]any, len(parameters))
	for name, values := range parameters {
		for _, value := range values {
			if !utf8.ValidString(value) { // U+FFFD would take the place of what is not
				return "", "", fmt.Errorf("token_request: json can hold nothing but UTF-8, and the value of %s is not; write it in UTF-8, or use token_request form", name)
			}
		}
		if object[name] = any(values[0]); len(values) > 1 {
			object[name] = values
		}
	}
	var text strings.Builder
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false) // no server needs that, and an error may quote the text
	err = encoder.Encode(object)
	return strings.TrimSuffix(text.String(), "\n"), "application/json", err
}

// clientAssertion makes the JWT that authenticates the client (RFC 7523 §2.2).
func (c *Credentials) clientAssertion(r resolved, audience string) (string, error) {
	typ := typJWT
	if c.Issuer != "" {
		typ = typClientAuth
	}
	key := r.key
	if c.authMethod() == authSecretJWT {
		alg := c.SigningAlg
		if c.usesKey() { // signing_alg belongs to the grant's JWT then
			alg = ""
		}
		key = jwt.SecretKey(r.secret, alg)
	}
	assertion, err := c.sign(key, cmp.Or(c.AssertionTyp, typ), c.ClientID, audience, nil)
	if short, ok := errors.AsType[*jwt.ShortSecretError](err); ok {
		return "", shortSecretError(short)
	}
	return assertion, err
}

// shortSecretError says what to do about a client_secret that is too short to sign.
func shortSecretError(short *jwt.ShortSecretError) error {
	instead := "auth_method " + authBasic + " or " + authPost
	if short.Bytes >= jwt.MinSecretBytes["HS256"] {
		instead = "signing_alg HS256, or " + instead
	}
	return &settingError{
		wrong: "client_secret: " + short.Error(),
		todo: fmt.Sprintf("have the authorization server issue one of %d bytes at least or, if it allows that, set %s",
			jwt.MinSecretBytes[short.Alg], instead),
	}
}

// grantAssertion makes the JWT that the token is granted for (RFC 7523 §2.1).
func (c *Credentials) grantAssertion(r resolved, audience string) (string, error) {
	typ := typJWT
	if method := c.authMethod(); method != authKeyJWT && method != authSecretJWT { // otherwise assertion_typ belongs to the client's JWT
		typ = cmp.Or(c.AssertionTyp, typJWT)
	}
	return c.sign(r.key, typ, cmp.Or(r.subject, c.ClientID), audience, r.claims)
}

// sign makes a JWT of the client about sub. It has the claims that RFC 7523 §3
// asks for, and those in more.
func (c *Credentials) sign(key *jwt.Key, typ, sub, audience string, more map[string]string) (string, error) {
	since := time.Now().Add(-assertionLeeway)
	claims := map[string]any{
		"iss": c.ClientID,
		"sub": sub,
		"aud": audience,    // a string: a list would permit other servers, too
		"jti": rand.Text(), // servers refuse a JWT whose jti they have seen
		"iat": since.Unix(),
		"nbf": since.Unix(),
		"exp": since.Add(cmp.Or(time.Duration(c.AssertionLifetime), defaultAssertionLifetime)).Unix(),
	}
	for name, value := range more {
		claims[name] = value
	}
	return key.Sign(typ, claims)
}
