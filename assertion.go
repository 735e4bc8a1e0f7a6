package outboundauth

import (
	"cmp"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// assertionLeeway is how far the JWTs are dated back: a server whose clock is
// behind would take them for not yet valid.
const assertionLeeway = 10 * time.Second

// minAssertionLifetime leaves some of it for the way to the server.
const minAssertionLifetime = 30 * time.Second

// The types of JWTs. Servers that know the one for client authentication
// (draft-ietf-oauth-rfc7523bis) publish metadata; others want the old one.
const (
	typJWT        = "JWT"
	typClientAuth = "client-authentication+jwt"
)

// reservedClaims are those of a grant's JWT that have a meaning of their own
// (RFC 7523 §3).
var reservedClaims = []string{"iss", "sub", "aud", "exp", "iat", "nbf", "jti"}

// clientAssertion makes the JWT that authenticates the client (RFC 7523 §2.2).
func (c *Credentials) clientAssertion(r resolved, audience string) (string, error) {
	typ := typJWT
	if c.Issuer != "" {
		typ = typClientAuth
	}
	key := r.key
	if c.method() == authSecretJWT {
		key = &privateKey{key: []byte(r.secret), alg: jose.HS256}
		if c.SigningAlg != "" && !c.usesKey() { // else it is that of the grant's JWT
			key.alg = jose.SignatureAlgorithm(c.SigningAlg)
		}
	}
	return c.sign(key, cmp.Or(c.AssertionTyp, typ), c.ClientID, audience, nil)
}

// grantAssertion makes the JWT that the token is granted for (RFC 7523 §2.1).
func (c *Credentials) grantAssertion(r resolved, audience string) (string, error) {
	typ := typJWT
	if method := c.method(); method != authKeyJWT && method != authSecretJWT { // else it is that of the client's JWT
		typ = cmp.Or(c.AssertionTyp, typJWT)
	}
	return c.sign(r.key, typ, cmp.Or(r.subject, c.ClientID), audience, r.claims)
}

// sign makes a JWT of the client about sub, with what RFC 7523 §3 asks for.
func (c *Credentials) sign(key *privateKey, typ, sub, audience string, more map[string]string) (string, error) {
	since := time.Now().Add(-assertionLeeway)
	claims := map[string]any{
		"iss": c.ClientID,
		"sub": sub,
		"aud": audience,    // a string: a list would permit others
		"jti": rand.Text(), // servers refuse one that they have seen
		"iat": since.Unix(),
		"nbf": since.Unix(),
		"exp": since.Add(cmp.Or(time.Duration(c.AssertionLifetime), defaultAssertionLifetime)).Unix(),
	}
	for name, value := range more {
		claims[name] = value
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}

	options := (&jose.SignerOptions{}).WithType(jose.ContentType(typ))
	if key.id != "" {
		options.WithHeader("kid", key.id)
	}
	if key.thumbprint != "" {
		options.WithHeader("x5t#S256", key.thumbprint)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: key.alg, Key: key.key}, options)
	if err != nil {
		return "", signingError(key, err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		return "", signingError(key, err)
	}
	return signed.CompactSerialize()
}

func signingError(key *privateKey, err error) error {
	if secret, ok := key.key.([]byte); ok && errors.Is(err, jose.ErrInvalidKeySize) {
		return fmt.Errorf("client_secret: has %d bytes, too few for %s (RFC 7518 section 3.2)", len(secret), key.alg)
	}
	return fmt.Errorf("signing the JWT with %s failed: %w", key.alg, err)
}

// decodeJWT returns header and claims of a JWT without verifying anything: they
// are only shown. ok is false if it is none that can be read.
func decodeJWT(token string) (header, claims map[string]any, ok bool) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 { // RFC 7515 §7.1
		return nil, nil, false
	}
	for i, into := range []*map[string]any{&header, &claims} {
		decoded, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil || json.Unmarshal(decoded, into) != nil || *into == nil {
			return nil, nil, false
		}
	}
	return header, claims, true
}
