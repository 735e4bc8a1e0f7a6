// How a token request proves the possession of a key (RFC 9449 §5), and what the server says of that.

package outboundauth

import (
	"net/http"
	"net/url"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// tokenProofs makes the proofs of one client's token requests. The zero value is ready to use.
type tokenProofs struct {
	nonces dpop.Nonces // of the authorization server, by host
	sent   sentSecrets // the last proofs, and their nonces: the server may repeat them in any answer
}

// prove adds a proof to a token request; none if key is nil.
func (p *tokenProofs) prove(req *http.Request, key *dpop.Key) error {
	if key == nil {
		return nil
	}
	nonce := p.nonces.Of(req.URL.Host)
	if err := key.Prove(req, "", nonce); err != nil {
		return err
	}
	var secrets redact.Secrets
	secrets.Add(req.Header.Get("DPoP"))
	secrets.Add(nonce)
	p.sent.add(secrets)
	return nil
}

// keepNonce keeps the nonce of an answer for the next proof, and returns it as a secret.
func (p *tokenProofs) keepNonce(u *url.URL, a serverAnswer) (secrets redact.Secrets) {
	p.nonces.Keep(u.Host, a.header)
	secrets.Add(dpop.Nonce(a.header))
	return secrets
}

// demandsNonce reports whether an answer asks for the same request with its nonce (§8). RFC
// 9449 has the status 400, and some servers 401.
func demandsNonce(a serverAnswer) bool {
	if a.status != http.StatusBadRequest && a.status != http.StatusUnauthorized {
		return false
	}
	parsed, _ := parseMembers(a.body)
	return knownCode(parsed.complaint().code) == dpop.CodeUseNonce && dpop.Nonce(a.header) != ""
}
