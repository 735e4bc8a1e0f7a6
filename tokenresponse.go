// What a token endpoint's answer means: a token, or why there is none.

package outboundauth

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/jsonpointer"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// readAnswer turns the answer of the token endpoint u into a grant, or into a
// *tokenError. Errors call the endpoint host. The error shows no text of the answer that
// holds one of the secrets. Whoever knows the whole request adds the advice.
func (c *Credentials) readAnswer(u *url.URL, host string, a serverAnswer, secrets redact.Secrets) (grant, error) {
	parsed, err := parseMembers(a.body[:min(len(a.body), maxAnswer+1)])
	said := parsed.complaint()
	failure := &tokenError{Endpoint: host, Status: a.status, answer: kindOfAnswer(a, err, said)}
	if a.status >= 300 && a.status < 400 {
		failure.Code, failure.Description = codeHTTPStatus, redirection(u, a.header, secrets)
		return grant{}, failure.classify()
	}
	if len(a.body) > maxAnswer {
		failure = unreadable(failure, fmt.Errorf("the answer is larger than %d bytes", maxAnswer))
		failure.permanent = c.grantsByParams()
		return grant{}, failure
	}
	if a.status < 300 && !said.error {
		g, err := c.accept(a, parsed, err, secrets)
		if err == nil {
			return g, nil
		}
		failure = unreadable(failure, err)
		// What answers a login without a token has probably refused it.
		failure.permanent = failure.permanent || c.grantsByParams()
		return grant{}, failure
	}
	failure.retryAfter = parseRetryAfter(a.header, time.Now())
	code := said.code[:min(len(said.code), maxSearchedCode)]
	failure.Code = errorCode(code)
	if _, ok := mayShow(code+"\n"+failure.Code, maxShownCode, secrets); !ok && knownCode(failure.Code) == "" {
		failure.Code = codeHTTPStatus
	}
	shown, ok := mayShow(said.text, maxShownDescription, secrets)
	if said.text == "" && failure.answer == answerPage {
		shown, ok = pageWords(a.body, secrets)
	}
	switch {
	case c.hasToken(parsed, a.body):
		shown = "the server's description stands beside a token, and is not shown"
	case !ok:
		shown = "the server's description repeats the client's credentials or a token, and is not shown"
	}
	failure.Description = shown
	return grant{}, failure.classify()
}

// accept returns the grant of an answer that does not say that it is an error. parseErr
// says why it has no members.
func (c *Credentials) accept(a serverAnswer, parsed members, parseErr error, secrets redact.Secrets) (grant, error) {
	switch {
	case a.status != http.StatusOK && a.status != http.StatusCreated:
		return grant{}, errors.New("the status of a token answer is 200 or 201")
	case parseErr != nil && c.findsToken() && json.Valid(a.body): // a pointer may lead into a list
	case parseErr != nil && isHTML(a.header, a.body) && !c.findsToken():
		words, _ := pageWords(a.body, secrets)
		return grant{}, errors.New(cmp.Or(words, "an HTML page") + ", and no JSON object")
	case parseErr != nil:
		return grant{}, parseErr
	}
	return c.grant(parsed, a.body, secrets)
}

// pageWords returns what is said of a page. It returns false if the title holds one of
// the secrets.
func pageWords(body []byte, secrets redact.Secrets) (string, bool) {
	title, ok := mayShow(pageTitle(body), maxShownDescription, secrets)
	if !ok {
		return "", false
	}
	if title == "" {
		return "an HTML page", true
	}
	return "an HTML page with the title " + strconv.Quote(title), true
}

// redirection says that a redirect of u is not followed, and where it leads, without a
// query, which may hold a key.
func redirection(u *url.URL, header http.Header, secrets redact.Secrets) string {
	where := "a redirect"
	if target, err := u.Parse(header.Get("Location")); err == nil && header.Get("Location") != "" && target.Host != "" {
		if shown, ok := mayShow(withoutQuery(target), maxShownValue, secrets); ok {
			where += " to " + shown
		}
	}
	return where + ", which is not followed because it would take the client's credentials elsewhere"
}

// unreadable returns the error for an answer that is neither a usable token nor a
// refusal. It counts as a temporary fault of the server, or of something in front of the
// server, unless the error knows better.
func unreadable(failure *tokenError, err error) *tokenError {
	failure.Code, failure.Description, failure.permanent = codeInvalidResponse, err.Error(), isPermanent(err)
	if _, ok := errors.AsType[grantedError](err); ok {
		failure.answer = answerGrant
	}
	if errors.Is(err, errErrorText) {
		failure.answer, failure.permanent = answerOwnError, true
	}
	return failure
}

// errErrorText is the error of an answer that is a refusal, although it has the form of a
// grant.
var errErrorText = errors.New("access_token holds the text of an error, and no token")

// grantedError says why a token that was granted can't be used.
type grantedError struct {
	why  string
	ever bool // another request would bring no other one
}

func (e grantedError) Error() string   { return "granted, but " + e.why }
func (e grantedError) Permanent() bool { return e.ever }

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

// grant reads a successful answer (RFC 6749 §5.1). It is strict: a token must not
// be used if it is no bearer token, or if it would break the header.
func (c *Credentials) grant(parsed members, body []byte, secrets redact.Secrets) (grant, error) {
	accessToken, err := c.tokenIn(parsed, body)
	if err != nil {
		return grant{}, err
	}
	if isErrorText(accessToken) {
		return grant{}, errErrorText
	}
	// RFC 6749 appendix A.12 permits VSCHAR, which includes the space. But a space
	// would not survive in the header (RFC 6750 §2.1).
	for _, c := range []byte(accessToken) {
		if c <= ' ' || c >= 0x7f {
			return grant{}, grantedError{why: "access_token holds a character that is not allowed in a header"}
		}
	}
	tokenType, err := parsed.str("token_type")
	if err != nil && !c.findsToken() { // else it is a vendor's own member
		return grant{}, grantedError{why: err.Error()}
	}
	if want, ok := c.fits(tokenType); !ok {
		why := "token_type is not " + want
		if tokenType == "" {
			why = "there is no token_type, and it has to be " + want
		} else if shown, ok := mayShow(tokenType, maxShownCode, append(redact.Secrets{accessToken}, secrets...)); ok {
			why = fmt.Sprintf("token_type is %q and not %s", shown, want)
		}
		return grant{}, grantedError{why: why, ever: true}
	}
	g := grant{accessToken: accessToken}
	g.lifetime, g.odd = c.lifetimeIn(parsed, body)
	scope, _ := parsed.str("scope") // an error does not matter: the scope is only compared
	g.scope = strings.TrimSpace(scope)
	return g, nil
}

// fits reports whether a token of this type is what was asked for, and which type that is. A
// token of a type that we do not understand must not be used (RFC 6749 §7.1).
func (c *Credentials) fits(tokenType string) (want string, ok bool) {
	if c.DPoP != "" { // any other type means that the token is bound to no key (RFC 9449 §5)
		return dpop.Scheme, strings.EqualFold(tokenType, dpop.Scheme)
	}
	// The type is required, but some servers leave it out. Apigee calls it BearerToken by
	// default.
	return defaultBearerScheme, tokenType == "" || strings.EqualFold(tokenType, defaultBearerScheme) || strings.EqualFold(tokenType, "BearerToken")
}

// tokenIn returns the access token of an answer.
func (c *Credentials) tokenIn(parsed members, body []byte) (string, error) {
	place := "access_token"
	if r := c.TokenResponse; c.findsToken() {
		place = "what is at the access_token of token_response"
		raw, ok := find(r.AccessToken, body)
		if !ok {
			return "", errors.New("the answer has nothing at the access_token of token_response")
		}
		parsed = members{place: raw}
	}
	accessToken, err := parsed.str(place)
	if err == nil && accessToken == "" {
		err = errors.New("the answer has no access_token")
	}
	return accessToken, err
}

// findsToken reports whether token_response says where the token is.
func (c *Credentials) findsToken() bool {
	return c.TokenResponse != nil && c.TokenResponse.AccessToken != ""
}

// find returns what a JSON Pointer finds.
func find(pointer string, body []byte) (json.RawMessage, bool) {
	p, err := jsonpointer.Parse(pointer)
	if err != nil { // it was checked at load
		return nil, false
	}
	return p.Find(body)
}

// isErrorText reports whether some server has put an error where the token belongs.
func isErrorText(accessToken string) bool {
	text := strings.ToLower(strings.TrimSpace(accessToken))
	return text == "error" || strings.HasPrefix(text, "error:") || strings.HasPrefix(text, "error ")
}

// lifetimeIn returns the lifetime that an answer names; 0 if it names none. If nobody can
// tell which, it says why. The token is good all the same.
func (c *Credentials) lifetimeIn(parsed members, body []byte) (lifetime time.Duration, odd string) {
	raw, unit := parsed["expires_in"], time.Second
	if r := c.TokenResponse; r != nil && r.ExpiresIn != "" {
		raw, _ = find(r.ExpiresIn, body)
		unit = r.unit()
	}
	return parseLifetime(raw, unit)
}

// parseLifetime reads a lifetime in a unit. The RFC means an integer, but servers also
// send floats and strings. It returns 0 if the lifetime is absent or 0.
func parseLifetime(raw json.RawMessage, unit time.Duration) (lifetime time.Duration, odd string) {
	raw = bytes.TrimSpace(raw)
	if len(raw) > 0 && raw[0] == '"' {
		var text string
		_ = json.Unmarshal(raw, &text) // the answer has been decoded already
		raw = []byte(strings.TrimSpace(text))
	}
	if len(raw) == 0 || bytes.Equal(raw, []byte("null")) {
		return 0, ""
	}
	number, err := strconv.ParseFloat(string(raw), 64)
	outOfRange := errors.Is(err, strconv.ErrRange) // the number is infinite then
	switch {
	case (err != nil && !outOfRange), math.IsNaN(number), math.IsInf(number, 0) && !outOfRange, strings.ContainsAny(string(raw), "xXpP_"):
		return 0, "is no number"
	case number < 0:
		return 0, "is negative"
	case number*unit.Seconds() >= maxLifetime.Seconds():
		return maxLifetime, ""
	case number == 0:
		return 0, ""
	}
	return max(minLifetime, time.Duration(number*float64(unit))), ""
}

// tokensIn returns what may be a token in an answer: the texts in members that are called
// so, and what token_response finds. An answer may repeat it in another member.
func (c *Credentials) tokensIn(body []byte) (tokens redact.Secrets) {
	if c.findsToken() {
		if found, ok := find(c.TokenResponse.AccessToken, body); ok {
			members{"token": found}.addTokens(&tokens, 1)
		}
	}
	parsed, _ := parseMembers(body)
	const depth = 3 // as deep as errors are read
	parsed.addTokens(&tokens, depth)
	return tokens
}

func (r members) addTokens(tokens *redact.Secrets, depth int) {
	for name := range r {
		if lower := strings.ToLower(name); strings.Contains(lower, "token") && !strings.Contains(lower, "type") {
			token := r.text(name)
			tokens.Add(token[:min(len(token), maxSearchedDescription)]) // of a long one, any part gives it away
		}
		if depth > 1 {
			r.object(name).addTokens(tokens, depth-1)
		}
	}
}

// hasToken reports whether an answer has a token. An error must have none.
func (c *Credentials) hasToken(parsed members, body []byte) bool {
	if slices.ContainsFunc([]string{"access_token", "refresh_token", "id_token"}, parsed.says) {
		return true
	}
	if r := c.TokenResponse; c.findsToken() {
		found, _ := find(r.AccessToken, body)
		return members{"": found}.says("")
	}
	return false
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
