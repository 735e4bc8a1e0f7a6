// What an upstream says is wrong with a token: the challenge in its answer.

package outboundauth

import (
	"net/http"
	"strings"
)

// maxChallenge is how long a field may be to be read. The longest in use hold a few URLs,
// or a JSON text in base64.
const maxChallenge = 8 << 10

// challengeError returns the error that an answer names in a challenge for bearer or
// DPoP tokens (RFC 6750 §3, RFC 9449 §7.1): `invalid_token`, `insufficient_scope` or
// another code. It returns "" if there is none. The code is the upstream's word: it may
// be compared, but not shown.
func challengeError(h http.Header) string {
	for _, field := range h["Www-Authenticate"] {
		if len(field) > maxChallenge {
			continue
		}
		if code := errorInField(field); code != "" {
			return code
		}
	}
	return ""
}

// errorInField reads one field, which may hold several challenges (RFC 9110 §11.6.1).
// AWS and Kong leave out the commas between parameters, and other servers put one behind
// the scheme. So a comma tells no more than a space does, except behind a scheme: a word
// after a space is the scheme's token68 there. Each turn of the loop reads a word, so the
// loop ends with the field.
func errorInField(field string) string {
	var ours, afterScheme bool
	for {
		gap := len(field) - len(strings.TrimLeft(field, " \t,"))
		if strings.Contains(field[:gap], ",") {
			afterScheme = false
		}
		word, rest := cutAny(field[gap:], " \t,=\"")
		if word == "" {
			return "" // the end, or something that can't be read
		}
		value, isParameter := strings.CutPrefix(strings.TrimLeft(rest, " \t"), "=")
		if !isParameter {
			if !afterScheme {
				ours = strings.EqualFold(word, "Bearer") || strings.EqualFold(word, "DPoP")
			}
			afterScheme, field = !afterScheme, rest
			continue
		}
		afterScheme = false
		value = strings.TrimLeft(value, "= \t") // a token68 may end with several
		if strings.HasPrefix(value, `"`) {
			var ok bool
			if value, field, ok = cutQuoted(value); !ok {
				return ""
			}
		} else {
			value, field = cutAny(value, " \t,")
		}
		if ours && value != "" && strings.EqualFold(word, "error") {
			return value
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
