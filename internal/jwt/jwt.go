// Package jwt signs JSON Web Tokens (RFC 7519), and reads what they say.
package jwt

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Sign makes a JWT with these claims. No error quotes the key.
func (k *Key) Sign(typ string, claims map[string]any) (string, error) {
	if secret, ok := k.key.([]byte); ok && len(secret) < MinSecretBytes[string(k.alg)] {
		return "", &ShortSecretError{string(k.alg), len(secret)}
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	options := (&jose.SignerOptions{}).WithType(jose.ContentType(typ))
	if k.id != "" {
		options.WithHeader("kid", k.id)
	}
	if k.thumbprint != "" {
		options.WithHeader("x5t#S256", k.thumbprint)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: k.alg, Key: k.key}, options)
	if err != nil {
		return "", k.signingError(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		return "", k.signingError(err)
	}
	return signed.CompactSerialize()
}

func (k *Key) signingError(err error) error {
	return fmt.Errorf("signing the JWT with %s failed: %w", k.alg, err)
}

// written matches texts that are written like a JWT (RFC 7515 §7.1, RFC 7516
// §7.1).
var written = regexp.MustCompile(`^[\w-]+(\.[\w-]*){2}((\.[\w-]*){2})?$`)

// Is reports whether a text is written like a JWT, signed or encrypted.
func Is(text string) bool { return written.MatchString(text) }

// Decode returns the header and the claims of a JWT. It verifies nothing,
// because they are only shown. If token is not a JWT that can be read, ok is
// false.
func Decode(token string) (header, claims map[string]any, ok bool) {
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

// Expired reports whether a JWT says that it has expired.
func Expired(token string) bool {
	_, claims, ok := Decode(token)
	if !ok {
		return false
	}
	exp, ok := claims["exp"].(float64)
	return ok && exp < float64(time.Now().Unix())
}
