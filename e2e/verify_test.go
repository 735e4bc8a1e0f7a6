package e2e

import (
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// leeway is how long after its exp a token is still accepted. The server cuts
// the time of issue to whole seconds, and exp with it: so much earlier than
// expires_in says does a token end. Other resource servers allow a minute.
const leeway = time.Second

// verifier checks access tokens as a resource server does: offline, against
// the keys that the authorization server publishes.
type verifier struct {
	issuer   string
	clientID string
	keys     jose.JSONWebKeySet
}

func newVerifier(t *testing.T, as *authServer, clientID string) *verifier {
	t.Helper()
	var metadata struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	httpClient := cmp.Or(as.client, http.DefaultClient)
	getJSONWith(t, httpClient, as.issuer+"/.well-known/openid-configuration", &metadata)
	v := &verifier{issuer: metadata.Issuer, clientID: clientID}
	getJSONWith(t, httpClient, metadata.JWKSURI, &v.keys)
	return v
}

// accessClaims are what a resource server looks at in an access token.
type accessClaims struct {
	jwt.Claims
	ClientID     string `json:"client_id"`
	Scope        string `json:"scope"`
	Confirmation struct {
		Thumbprint string `json:"x5t#S256"`
	} `json:"cnf"`
}

// claims returns what the server has signed.
func (v *verifier) claims(token string) (accessClaims, error) {
	var claims accessClaims
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		return claims, fmt.Errorf("not a signed JWT: %w", err)
	}
	if err := parsed.Claims(&v.keys, &claims); err != nil {
		return claims, fmt.Errorf("signature: %w", err)
	}
	return claims, nil
}

// verify returns when the token expires, if it is one to accept at that time.
func (v *verifier) verify(token string, now time.Time) (time.Time, error) {
	claims, err := v.claims(token)
	if err != nil {
		return time.Time{}, err
	}
	// Without exp, a token would pass the check of it.
	if claims.Expiry == nil {
		return time.Time{}, errors.New("no exp")
	}
	exp := claims.Expiry.Time()
	err = claims.ValidateWithLeeway(jwt.Expected{
		Issuer:      v.issuer,
		AnyAudience: jwt.Audience{resource},
		Time:        now,
	}, leeway)
	if err != nil {
		return exp, fmt.Errorf("%w (exp %v from now)", err, exp.Sub(now))
	}
	if claims.ClientID != v.clientID {
		return exp, fmt.Errorf("client_id = %q, want %q", claims.ClientID, v.clientID)
	}
	if !hasScopes(claims.Scope) {
		return exp, fmt.Errorf("scope = %q, want %q", claims.Scope, scopes)
	}
	return exp, nil
}

// hasScopes tells whether these are the scopes that the tests ask for. Their order does
// not matter (RFC 6749 §3.3).
func hasScopes(granted string) bool {
	return slices.Equal(slices.Sorted(slices.Values(strings.Fields(granted))), strings.Fields(scopes))
}

// verifyBound returns an error unless the token is bound to the certificate
// (RFC 8705 §3.1). It doesn't check anything else but the signature.
func (v *verifier) verifyBound(token string, certificate *x509.Certificate) error {
	claims, err := v.claims(token)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(certificate.Raw)
	want := base64.RawURLEncoding.EncodeToString(sum[:])
	if got := claims.Confirmation.Thumbprint; got != want {
		return fmt.Errorf("cnf.x5t#S256 = %q, want %q, the certificate of the connection", got, want)
	}
	return nil
}
