package outboundauth

import (
	"encoding/base64"
	"net/http"
	"net/url"
)

// The ways to authenticate the client at the token endpoint (RFC 6749 §2.3.1,
// named as in the IANA registry of RFC 8414).
const (
	authBasic = "client_secret_basic"
	authPost  = "client_secret_post"
	authNone  = "none"
)

var authMethods = []string{authBasic, authPost, authNone}

// needsSecret tells whether the method sends a client_secret.
func needsSecret(method string) bool { return method != authNone }

// authenticate adds the client's identity to a token request, in exactly one
// way: RFC 6749 §2.3 forbids two, and trying one after the other burns the
// client's attempts. It returns what of it must not be shown.
func authenticate(method, id, secret string, form url.Values, header http.Header) (secrets confidential) {
	switch method {
	case authBasic:
		// Both parts are form-encoded first (§2.3.1): otherwise an id with a
		// colon would be cut there, and a secret with a '%' decoded.
		basic := base64.StdEncoding.EncodeToString(
			[]byte(url.QueryEscape(id) + ":" + url.QueryEscape(secret)))
		header.Set("Authorization", "Basic "+basic)
		secrets.add(basic)
		secrets.add(secret)
	case authPost:
		form.Set("client_id", id)
		form.Set("client_secret", secret)
		secrets.add(secret)
	case authNone:
		form.Set("client_id", id) // §3.2.1
	}
	return secrets
}
