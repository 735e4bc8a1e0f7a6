// What an upstream says of the proof that the gateway has the key of its token (RFC 9449 §7).

package outboundauth

import (
	"net/http"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
)

// refusesProof reports whether an upstream refuses the proof of a request, and says nothing
// about the token: it wants its nonce in the proof (§9), or something else in the proof is
// wrong (§7.1). It may have seen the same proof before, as net/http sends a request again if
// its connection was closed meanwhile. The status is 401, and 400 at Okta; that of a gRPC call
// is UNAUTHENTICATED.
func refusesProof(res *http.Response) bool {
	if res.StatusCode != http.StatusUnauthorized && res.StatusCode != http.StatusBadRequest && !refusedCall(res) {
		return false
	}
	return isAboutProof(res.Header)
}

// isAboutProof reports whether the challenge in a header or in trailers is about the proof.
func isAboutProof(h http.Header) bool {
	says := challengeParameter(h, "error", dpop.Scheme)
	return says == dpop.CodeUseNonce || says == dpop.CodeInvalidProof
}
