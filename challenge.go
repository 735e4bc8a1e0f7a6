// What an upstream says is wrong with a token: the challenge in its answer.

package outboundauth

import (
	"net/http"
	"slices"
	"strings"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
)

// maxChallenge is how long a field may be to be read. The longest in use hold a few URLs,
// or a JSON text in base64.
const maxChallenge = 8 << 10

// challengeError returns the error that an answer names in a challenge for bearer or
// DPoP tokens (RFC 6750 §3, RFC 9449 §7.1): `invalid_token`, `insufficient_scope` or
// another code. It returns "" if there is none. The code is the upstream's word: it may
// be compared, but not shown.
func challengeError(h http.Header) string {
	return challengeParameter(h, "error", defaultBearerScheme, dpop.Scheme)
}

// challengeParameter returns the first value of a parameter in the challenges of some
// schemes.
func challengeParameter(h http.Header, name string, schemes ...string) (found string) {
	eachChallenge(h, func(scheme, parameter, value string) bool {
		if value != "" && strings.EqualFold(parameter, name) &&
			slices.ContainsFunc(schemes, func(s string) bool { return strings.EqualFold(s, scheme) }) {
			found = value
		}
		return found == ""
	})
	return found
}

// wantsBoundTokens reports whether an upstream accepts nothing but tokens that are bound to
// a key (RFC 9449 §7.1).
func wantsBoundTokens(h http.Header) bool {
	var bearer, bound bool
	eachChallenge(h, func(scheme, _, _ string) bool {
		bearer = bearer || strings.EqualFold(scheme, defaultBearerScheme)
		bound = bound || strings.EqualFold(scheme, dpop.Scheme)
		return true
	})
	return bound && !bearer
}

// eachChallenge calls yield for each scheme in the challenges of an answer, without a
// parameter, and for each of its parameters, until yield returns false.
func eachChallenge(h http.Header, yield func(scheme, parameter, value string) bool) {
	for _, field := range h["Www-Authenticate"] {
		if len(field) <= maxChallenge && !eachInField(field, yield) {
			return
		}
	}
}

// eachInField reads one field, which may hold several challenges (RFC 9110 §11.6.1).
// AWS and Kong leave out the commas between parameters, and other servers put one behind
// the scheme. So a comma tells no more than a space does, except behind a scheme: a word
// after a space is the scheme's token68 there. Each turn of the loop reads a word, so the
// loop ends with the field. It returns false if yield does.
func eachInField(field string, yield func(scheme, parameter, value string) bool) bool {
	var scheme string
	var afterScheme bool
	for {
		gap := len(field) - len(strings.TrimLeft(field, " \t,"))
		if strings.Contains(field[:gap], ",") {
			afterScheme = false
		}
		word, rest := cutAny(field[gap:], " \t,=\"")
		if word == "" {
			return true // the end, or something that can't be read
		}
		value, isParameter := strings.CutPrefix(strings.TrimLeft(rest, " \t"), "=")
		if !isParameter {
			if !afterScheme {
				scheme = word
				if !yield(scheme, "", "") {
					return false
				}
			}
			afterScheme, field = !afterScheme, rest
			continue
		}
		afterScheme = false
		value = strings.TrimLeft(value, "= \t") // a token68 may end with several
		if strings.HasPrefix(value, `"`) {
			var ok bool
			if value, field, ok = cutQuoted(value); !ok {
				return true
			}
		} else {
			value, field = cutAny(value, " \t,")
		}
		if !yield(scheme, word, value) {
			return false
		}
	}
}

// cutAny cuts s before the first of these characters.
func cutAny(s, chars string) (before, rest string) {
	if i := strings.IndexAny(s, chars); i >= 0 {
		return s[:i], s[i:]
	}
	return s, ""
}

// cutQuoted reads the quoted string that s begins with. ok is false if it has no end.
func cutQuoted(s string) (value, rest string, ok bool) {
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		if s[i] == '"' {
			return b.String(), s[i+1:], true
		}
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return "", "", false
}
