// What a token endpoint's answer means: a token, or why there is none.

package outboundauth

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// A shorter lifetime counts as minLifetime, so that no server is asked without a
// pause. A longer one counts as maxLifetime, so that no sum of instants overflows.
const (
	minLifetime = 1 * time.Second
	maxLifetime = 10 * 365 * 24 * time.Hour
)

// How many bytes of a refusal are searched for secrets. These are multiples of
// what is shown, because cleaning shortens a text.
const (
	maxSearchedCode        = 256
	maxSearchedDescription = 4 << 10
)

// readAnswer turns the answer of the token endpoint on a host into a grant, or into a
// *tokenError with a hint at the settings. The error shows no text of the answer
// that holds one of the secrets.
func (c *Credentials) readAnswer(host string, a serverAnswer, secrets redact.Secrets) (grant, error) {
	failure := &tokenError{Endpoint: host, Status: a.status}
	if a.status >= 300 && a.status < 400 {
		failure.Code = codeHTTPStatus
		failure.Description = "a redirect, which is not followed because it would take the client's credentials elsewhere"
		failure.Hint = "set token_url to the final address"
		if c.Issuer != "" {
			failure.Hint = "the token endpoint in the issuer's metadata is not the final one; set token_url instead of issuer"
		}
		return grant{}, failure.classify()
	}
	if len(a.body) > maxAnswer {
		return grant{}, unreadable(failure, fmt.Errorf("the answer is larger than %d bytes", maxAnswer))
	}
	parsed, err := parseMembers(a.body)
	code, description := parsed.refusal()
	code, description = code[:min(len(code), maxSearchedCode)], description[:min(len(description), maxSearchedDescription)]

	if a.status == http.StatusOK && code == "" {
		if err != nil {
			return grant{}, unreadable(failure, err)
		}
		g, err := parsed.grant()
		if err != nil {
			return grant{}, unreadable(failure, err)
		}
		return g, nil
	}

	if a.status != http.StatusOK && a.status < 300 && code == "" {
		return grant{}, unreadable(failure, errors.New("the status of a token answer is 200"))
	}
	failure.retryAfter = parseRetryAfter(a.header, time.Now())
	// The raw texts are searched, too, because cleaning may join or cut a secret.
	failure.Code = errorCode(code)
	if secrets.In(code + "\n" + failure.Code) {
		if c.hint(code) == "" {
			failure.Code = codeHTTPStatus
		}
	}
	failure.Description = redact.Clean(description, maxShownDescription)
	if parsed.hasToken() {
		failure.Description = "the server's description stands beside a token, and is not shown"
	}
	if secrets.In(description + "\n" + redact.Clean(description, len(description))) {
		failure.Description = "the server's description repeats the client's credentials or a token, and is not shown"
	}
	if failure.classify().permanent {
		failure.Hint = c.hint(failure.Code)
	}
	return grant{}, failure
}

// shownText returns a text of the server as it may be shown: cleaned, and cut after
// limit bytes. It returns withheld if the text holds one of the secrets.
func shownText(text string, limit int, secrets redact.Secrets) string {
	clean := redact.Clean(text, limit)
	// As for an error, the raw text is searched, too. What is cut off is not.
	if secrets.In(text[:min(len(text), maxSearchedDescription)] + "\n" + clean) {
		return withheld
	}
	return clean
}

// unreadable returns the error for an answer that is neither a token nor a
// refusal. It counts as a temporary fault of the server, or of something in front
// of the server.
func unreadable(failure *tokenError, err error) *tokenError {
	failure.Code, failure.Description = codeInvalidResponse, err.Error()
	return failure
}

// errorCode returns a code with only the characters that RFC 6749 §5.2 permits,
// because the code becomes part of log lines.
func errorCode(code string) string {
	if code == "" {
		return codeHTTPStatus
	}
	code = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' || r == '"' || r == '\\' {
			return -1
		}
		return r
	}, code)
	return redact.Clean(code, maxShownCode)
}

// members holds the members of a token endpoint's answer by name. It is not a
// struct, because encoding/json would ignore the case of names. "ACCESS_TOKEN" is
// not the member that RFC 6749 names. Unknown members are ignored (§5.1).
// refresh_token is ignored, too: the client simply requests a new token (§4.4.3).
type members map[string]json.RawMessage

// parseMembers reads a body as a JSON object.
func parseMembers(body []byte) (members, error) {
	var r members
	if err := json.Unmarshal(body, &r); err != nil || r == nil {
		// The decoder's error would quote the body.
		return nil, errors.New("the answer is not a JSON object")
	}
	return r, nil
}

// grant reads a successful answer (RFC 6749 §5.1). It is strict: a token must not
// be used if it is no bearer token, or if it would break the header.
func (r members) grant() (grant, error) {
	accessToken, err := r.str("access_token")
	if err != nil {
		return grant{}, err
	}
	if accessToken == "" {
		return grant{}, errors.New("the answer has no access_token")
	}
	// RFC 6749 appendix A.12 permits VSCHAR, which includes the space. But a space
	// would not survive in the header (RFC 6750 §2.1).
	for _, c := range []byte(accessToken) {
		if c <= ' ' || c >= 0x7f {
			return grant{}, errors.New("access_token holds a character that is not allowed in a header")
		}
	}
	tokenType, err := r.str("token_type")
	if err != nil {
		return grant{}, err
	}
	// The type is required, but some servers leave it out. A token of a type that
	// we do not understand must not be used (§7.1).
	if tokenType != "" && !strings.EqualFold(tokenType, "Bearer") {
		return grant{}, errors.New("token_type is not Bearer")
	}
	lifetime, err := r.lifetime()
	if err != nil {
		return grant{}, err
	}
	scope, _ := r.str("scope") // an error does not matter: the scope is only compared
	return grant{accessToken: accessToken, lifetime: lifetime, scope: strings.TrimSpace(scope)}, nil
}

// lifetime reads expires_in, in seconds. The RFC means an integer, but servers
// also send floats and strings. lifetime returns 0 if expires_in is absent or 0:
// the server has then named no lifetime.
func (r members) lifetime() (time.Duration, error) {
	raw := bytes.TrimSpace(r["expires_in"])
	if len(raw) > 0 && raw[0] == '"' {
		s, err := r.str("expires_in")
		if err != nil {
			return 0, err
		}
		raw = []byte(strings.TrimSpace(s))
	}
	if len(raw) == 0 || bytes.Equal(raw, []byte("null")) {
		return 0, nil
	}
	seconds, err := strconv.ParseFloat(string(raw), 64)
	if math.IsInf(seconds, 1) && errors.Is(err, strconv.ErrRange) {
		return maxLifetime, nil // the number is too large for a float
	}
	if err != nil || math.IsNaN(seconds) || math.IsInf(seconds, 0) || strings.ContainsAny(string(raw), "xXpP_") {
		return 0, errors.New("expires_in is not a number")
	}
	if seconds < 0 {
		return 0, errors.New("expires_in is negative: the token has expired already")
	}
	if seconds >= maxLifetime.Seconds() {
		return maxLifetime, nil
	}
	if seconds == 0 {
		return 0, nil
	}
	return max(minLifetime, time.Duration(seconds*float64(time.Second))), nil
}

// str returns a member that must be a string. An absent or null member gives "".
func (r members) str(name string) (string, error) {
	raw, ok := r[name]
	if !ok {
		return "", nil
	}
	var s *string
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", fmt.Errorf("%s is not a string", name)
	}
	if s == nil {
		return "", nil
	}
	return *s, nil
}

// hasToken reports whether an answer has a token. An error must have none.
func (r members) hasToken() bool {
	for _, name := range []string{"access_token", "refresh_token", "id_token"} {
		if _, ok := r[name]; ok {
			return true
		}
	}
	return false
}

// refusal reads the members of an error (RFC 6749 §5.2). Some servers send the
// description under other names, and refusal knows these. It returns "", "" for an
// answer without such members.
func (r members) refusal() (code, description string) {
	code, _ = r.str("error")
	for _, name := range []string{"error_description", "errorDescription", "message"} {
		if description, _ = r.str(name); description != "" {
			break
		}
	}
	return code, description
}

// parseRetryAfter reads the Retry-After header in both its forms (RFC 9110
// §10.2.3). It returns 0 if there is no such header, or if it can't be read.
func parseRetryAfter(h http.Header, now time.Time) time.Duration {
	v := strings.TrimSpace(h.Get("Retry-After"))
	if seconds, err := strconv.ParseUint(v, 10, 63); err == nil || errors.Is(err, strconv.ErrRange) {
		return time.Duration(min(seconds, uint64(maxLifetime/time.Second))) * time.Second
	}
	if at, err := http.ParseTime(v); err == nil {
		return max(0, at.Sub(now))
	}
	return 0
}
