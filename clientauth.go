package outboundauth

import (
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// The ways to authenticate the client at the token endpoint (RFC 6749 §2.3.1,
// RFC 7523 §2.2, RFC 8705 §2), named as in the IANA registry of RFC 8414.
const (
	authBasic     = "client_secret_basic"
	authPost      = "client_secret_post"
	authSecretJWT = "client_secret_jwt"
	authKeyJWT    = "private_key_jwt"
	authTLS       = "tls_client_auth"
	authNone      = "none"

	// The assertion that the token is granted for tells who the client is.
	authByGrant = ""
)

var authMethods = []string{authBasic, authPost, authSecretJWT, authKeyJWT, authTLS, authNone}

// The grants, as they are configured and as they are sent.
const (
	grantClientCredentials = "client_credentials" // RFC 6749 §4.4
	grantJWTBearer         = "jwt_bearer"         // RFC 7523 §2.1
	grantJWTBearerURN      = "urn:ietf:params:oauth:grant-type:jwt-bearer"
)

var grantTypes = []string{grantClientCredentials, grantJWTBearer}

const (
	basicForm = "form"
	basicRaw  = "raw"
)

const clientAssertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

// method returns how the client authenticates. It is either said, or there is
// nothing to choose.
func (c *Credentials) method() string {
	switch {
	case c.AuthMethod != "":
		return c.AuthMethod
	case c.ClientSecret != "":
		return authBasic
	case c.grantsByJWT():
		return authByGrant
	case c.PrivateKey != "" || c.AssertionFile != "":
		return authKeyJWT
	case c.ClientCertificate != nil:
		return authTLS
	}
	return authBasic
}

// needsSecret tells whether the method needs a client_secret. One that is not
// said may.
func needsSecret(method string) bool {
	switch method {
	case authKeyJWT, authTLS, authNone:
		return false
	}
	return true
}

// grant returns what the token is granted for.
func (c *Credentials) grant() string { return cmp.Or(c.GrantType, grantClientCredentials) }

// grantsByJWT tells whether that is a JWT.
func (c *Credentials) grantsByJWT() bool { return c.GrantType == grantJWTBearer }

// usesKey tells whether JWTs are signed with a private key: those that don't
// come from the assertion_file, which is for the grant before the client.
func (c *Credentials) usesKey() bool {
	if c.grantsByJWT() {
		return c.AssertionFile == "" || c.method() == authKeyJWT
	}
	return c.method() == authKeyJWT && c.AssertionFile == ""
}

// signs tells whether JWTs are signed at all.
func (c *Credentials) signs() bool { return c.usesKey() || c.method() == authSecretJWT }

// presentsOther tells whether token_transport has a client certificate.
func (c *Credentials) presentsOther() bool { return presentsCertificate(c.TokenTransport) }

// missingAuth names the first setting without which the client can't
// authenticate, and what to write; "" if nothing is missing.
func (c *Credentials) missingAuth() string {
	method := c.method()
	switch {
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

// checkAuth tells what is wrong with a setting that is present.
func (c *Credentials) checkAuth() error {
	if c.AuthMethod != "" && !slices.Contains(authMethods, c.AuthMethod) {
		return fmt.Errorf("auth_method: unknown method '%s'; use one of %s", c.AuthMethod, strings.Join(authMethods, ", "))
	}
	if c.GrantType != "" && !slices.Contains(grantTypes, c.GrantType) {
		return fmt.Errorf("grant_type: unknown grant '%s'; use one of %s", c.GrantType, strings.Join(grantTypes, ", "))
	}
	if c.BasicEncoding != "" && c.BasicEncoding != basicForm && c.BasicEncoding != basicRaw {
		return fmt.Errorf("basic_encoding: unknown encoding '%s'; use %s or %s", c.BasicEncoding, basicForm, basicRaw)
	}
	if c.SigningAlg != "" && !slices.Contains(signingAlgs, c.SigningAlg) {
		return fmt.Errorf("signing_alg: unknown algorithm '%s'; use one of %s", c.SigningAlg, strings.Join(signingAlgs, ", "))
	}
	if c.AssertionLifetime != 0 && time.Duration(c.AssertionLifetime) < minAssertionLifetime {
		return fmt.Errorf("assertion_lifetime: must be %v at least, as the JWT is dated back by %v", minAssertionLifetime, assertionLeeway)
	}
	if cert := c.ClientCertificate; cert != nil && (cert.Certificate == "" || cert.Key == "") {
		return errors.New("client_certificate: name both the certificate and its key")
	}
	for _, name := range sortedKeys(c.Claims) {
		if slices.Contains(reservedClaims, name) {
			return fmt.Errorf("claim %s: is set for each JWT; sub is the subject, aud the assertion_audience, exp follows from assertion_lifetime", name)
		}
		if name == "" || c.Claims[name] == "" {
			return fmt.Errorf("claim %s: name and value must not be empty", name)
		}
	}
	return nil
}

// checkAuthTogether tells which settings of client authentication contradict
// each other, or have no effect: what somebody wrote there was meant.
func (c *Credentials) checkAuthTogether() error {
	method := c.method()
	with := "auth_method " + method
	switch {
	case method == authByGrant:
		with = "grant_type " + c.GrantType
	case c.AuthMethod == "" && c.ClientSecret != "":
		with = "client_secret (auth_method is " + method + " by default)"
	}
	signing, granting := with, "grant_type "+c.grant()
	if c.AssertionFile != "" { // it takes the place of what would be signed
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
	switch {
	case c.BasicEncoding == basicRaw && strings.Contains(c.ClientID, ":"):
		return errors.New("basic_encoding: raw can't send a client_id with a colon, where servers cut it (RFC 7617 section 2)")
	case c.BindCertificate && c.ClientCertificate == nil:
		return errors.New("bind_certificate: there is no client_certificate to bind tokens to; add one")
	case c.ClientCertificate != nil && c.presentsOther():
		return errors.New("client_certificate: token_transport has another one; remove one of the two")
	}
	if c.SigningAlg != "" {
		if symmetric := strings.HasPrefix(c.SigningAlg, "HS"); symmetric == c.usesKey() {
			return fmt.Errorf("signing_alg: %s does not fit: HS* sign with the client_secret of %s, the others with a private_key", c.SigningAlg, authSecretJWT)
		}
	}
	return nil
}

// authenticate adds the client's identity to a token request, in exactly one
// way: RFC 6749 §2.3 forbids two, and trying one after the other burns the
// client's attempts. audience is whom a JWT is meant for. It returns what of
// the request must not be shown.
func (c *Credentials) authenticate(r resolved, audience string, form url.Values, header http.Header) (secrets confidential, err error) {
	switch method := c.method(); method {
	case authBasic:
		// Both parts are form-encoded first (§2.3.1): otherwise an id with a
		// colon would be cut there, and a secret with a '%' decoded.
		id, secret := url.QueryEscape(c.ClientID), url.QueryEscape(r.secret)
		if c.BasicEncoding == basicRaw {
			id, secret = c.ClientID, r.secret
		}
		basic := base64.StdEncoding.EncodeToString([]byte(id + ":" + secret))
		header.Set("Authorization", "Basic "+basic)
		secrets.add(basic)
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
		secrets.add(assertion)
	case authTLS, authNone:
		form.Set("client_id", c.ClientID) // RFC 8705 §2, RFC 6749 §3.2.1
	}
	secrets.add(r.secret)
	return secrets, nil
}

// authorize adds what the token is granted for.
func (c *Credentials) authorize(r resolved, audience string, form url.Values) (secrets confidential, err error) {
	if !c.grantsByJWT() {
		form.Set("grant_type", grantClientCredentials)
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
	secrets.add(assertion)
	secrets.addReplaced(c.Subject, r.subject)
	for name, value := range r.claims {
		secrets.addReplaced(c.Claims[name], value)
	}
	return secrets, nil
}
