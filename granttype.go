// What a token is granted for: which grants there are, and which can't work here.

package outboundauth

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// The grants that have a meaning here, as they are configured. All others are extension
// grants (RFC 6749 §4.5), which are sent as they are written.
const (
	grantClientCredentials = "client_credentials" // RFC 6749 §4.4
	grantJWTBearer         = "jwt_bearer"         // RFC 7523 §2.1
	grantNone              = "none"               // the parameter is left out

	grantURN          = "urn:ietf:params:oauth:grant-type:"
	grantJWTBearerURN = grantURN + "jwt-bearer" // as it is sent
)

var grantTypes = []string{grantClientCredentials, grantJWTBearer, grantNone}

// refusedGrants are the grants that can't work without a user, or without the token of a
// caller, and why.
var refusedGrants = []struct{ name, why string }{
	{"password", "it sends a user's password, which no client may have (RFC 9700 section 2.4); use client_credentials, or none for a login that does not speak OAuth"},
	{"authorization_code", "it needs a user with a browser; use client_credentials"},
	{"implicit", "it needs a user with a browser; use client_credentials"},
	{"refresh_token", "the gateway keeps no refresh tokens, it requests a new token (RFC 6749 section 4.4.3); use client_credentials"},
	{"device_code", "it needs a user with a second device; use client_credentials"},
	{"token-exchange", "it needs the token of a caller, and the gateway's tokens are its own; use client_credentials"},
}

// bareGrant returns a grant's name without what people write in different ways.
func bareGrant(name string) string {
	name = strings.ReplaceAll(strings.ToLower(strings.TrimSpace(name)), "_", "-")
	name = name[strings.LastIndex(name, ":")+1:]
	return strings.NewReplacer("_", "", "-", "", " ", "").Replace(name)
}

// checkGrantType returns what is wrong with a grant_type. Its error quotes only names
// that are known here.
func checkGrantType(name string) error {
	if name == "" {
		return nil
	}
	bare := bareGrant(name)
	for _, refused := range refusedGrants {
		if isSlip(bare, bareGrant(refused.name)) {
			return fmt.Errorf("grant_type: %s can't work here: %s", refused.name, refused.why)
		}
	}
	for _, known := range grantTypes {
		if name != known && canonicalGrant(name) != known && isSlip(bare, bareGrant(known)) {
			return fmt.Errorf("grant_type: unknown grant; write %s, if that is meant", known)
		}
	}
	if u, err := url.Parse(name); err == nil && u.IsAbs() && strings.IndexFunc(name, func(r rune) bool { return r <= ' ' || r > '~' }) < 0 {
		return nil
	}
	if strings.Trim(name, "-._0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz") != "" {
		return errors.New("grant_type: is neither a name (RFC 6749 section A.10: letters, digits and -._) nor an absolute URI")
	}
	return nil
}

// canonicalGrant returns the name that a grant has in a config. Only one has another
// name where it is sent.
func canonicalGrant(name string) string {
	if strings.EqualFold(name, grantJWTBearerURN) {
		return grantJWTBearer
	}
	return name
}

// isSlip reports whether a name is probably meant for one that is known: they differ by
// two letters at most, and by less if the name is short.
func isSlip(name, known string) bool { return edits(name, known) <= min(2, len(known)/4) }

// edits returns how many letters one has to add, remove or replace to make b of a.
func edits(a, b string) int {
	row := make([]int, len(b)+1) // for the part of a that was read, and each part of b
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before := row[0]
		row[0] = i + 1
		for j := range len(b) {
			n := before
			if a[i] != b[j] {
				n = 1 + min(before, row[j], row[j+1])
			}
			before, row[j+1] = row[j+1], n
		}
	}
	return row[len(b)]
}
