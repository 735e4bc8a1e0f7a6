// What an answer of the authorization server holds, and what it says is wrong, in all forms in which servers say it.

package outboundauth

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"maps"
	"mime"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

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

// spelledCodes are the error codes that have a meaning (RFC 6749 §5.2, RFC 8707 §2, RFC 9449
// §5), and how some servers spell them, without what stands between the words.
var spelledCodes = map[string]string{
	"invalidclient":              "invalid_client",
	"clientinvalid":              "invalid_client",
	"invalidcredentials":         "invalid_client",
	"invalidclientid":            "invalid_client", // Salesforce
	"invalidclientcredentials":   "invalid_client",
	"incorrectclientcredentials": "invalid_client", // GitHub
	"invalidgrant":               "invalid_grant",
	"grantinvalid":               "invalid_grant",
	"unauthorizedclient":         "unauthorized_client",
	"clientunauthorized":         "unauthorized_client",
	"authorizationtypeinvalid":   "unauthorized_client", // Glewlwyd
	"unsupportedgranttype":       "unsupported_grant_type",
	"granttypeunsupported":       "unsupported_grant_type",
	"invalidgranttype":           "unsupported_grant_type",
	"invalidscope":               "invalid_scope",
	"scopeinvalid":               "invalid_scope", // Glewlwyd
	"invalidtarget":              "invalid_target",
	"targetinvalid":              "invalid_target",
	"invalidrequest":             "invalid_request",
	"requestinvalid":             "invalid_request",
	"usedpopnonce":               "use_dpop_nonce",
	"invaliddpopproof":           "invalid_dpop_proof",
}

// knownCode returns the code that a server means; "" if it is none of those that have a
// meaning.
func knownCode(code string) string {
	return spelledCodes[strings.NewReplacer("_", "", "-", "", " ", "", ".", "").Replace(strings.ToLower(code))]
}

// complaint is what an answer says is wrong. All of it is foreign text.
type complaint struct {
	code  string // as the answer has it; "" if there is none
	text  string // the words; "" if there are none
	error bool   // the answer says that it is an error, whatever its status
	oauth bool   // it says so as RFC 6749 §5.2 asks
}

// complaint reads the members of an error. The forms are those of RFC 6749 §5.2, of RFC
// 9457, of gateways, and of vendors who found their own. If a form holds something of
// another type than here, it is not read.
func (r members) complaint() complaint {
	var c complaint
	object, fault := r.object("error"), r.object("fault")
	c.oauth = r.scalar("error") != ""
	for _, code := range []string{
		r.scalar("error"), object.scalar("code"), r.scalar("ErrorCode"), r.scalar("errorCode"), r.scalar("errcode"), fault.object("detail").scalar("errorcode"),
	} {
		if c.code = code; code != "" {
			break
		}
	}
	if status, _ := object.str("status"); strings.Trim(c.code, "0123456789") == "" && status != "" {
		c.code = status // it has a word, where code has only the HTTP status
	}
	for _, text := range []string{
		r.texts("error_description"), r.texts("errorDescription"), object.texts("message"), r.texts("message"), r.texts("msg"), r.texts("errmsg"),
		r.texts("reason"), problem(r.texts("title"), r.texts("detail")), r.first("errors"), fault.texts("faultstring"), r.texts("errorSummary"), r.texts("Error"),
	} {
		if c.text = text; text != "" {
			break
		}
	}
	status, _ := r.str("status")
	c.error = slices.Contains([]string{"error", "fail", "failed", "failure"}, strings.ToLower(status)) ||
		slices.ContainsFunc([]string{"error", "fault", "errcode", "Error", "ErrorCode"}, r.says)
	return c
}

// problem joins title and detail of RFC 9457 §3.1.
func problem(title, detail string) string {
	if title == "" || detail == "" {
		return title + detail
	}
	return title + ": " + detail
}

// says reports whether a member says anything. null, false, 0, "" and [] say that there is
// no error, and so does an object of such members.
func (r members) says(name string) bool {
	switch strings.Map(dropSpace, string(r[name])) {
	case "", "null", "false", "0", `"0"`, `""`, "[]":
		return false
	}
	object := r.object(name)
	return object == nil || slices.ContainsFunc(slices.Collect(maps.Keys(object)), object.says)
}

func dropSpace(c rune) rune {
	if strings.ContainsRune(" \t\r\n", c) {
		return -1
	}
	return c
}

// object returns a member that is an object; nil, which has no members, if it is none.
func (r members) object(name string) members {
	object, err := parseMembers(r[name])
	if err != nil {
		return nil
	}
	return object
}

// scalar returns a member that is a string or a number; "" if it says nothing.
func (r members) scalar(name string) string {
	if !r.says(name) {
		return ""
	}
	if text, err := r.str(name); err == nil {
		return text
	}
	var number json.Number
	_ = json.Unmarshal(r[name], &number)
	return number.String()
}

// text returns a member that is a string; "" if it is none.
func (r members) text(name string) string {
	text, _ := r.str(name)
	return text
}

// maxTexts is how long a list may be that is read, in bytes: to decode one takes many
// times its memory.
const maxTexts = 64 << 10

// texts returns a member that is a string, or a list of strings; "" if it is neither.
func (r members) texts(name string) string {
	if len(r[name]) > maxTexts && r[name][0] == '[' {
		return ""
	}
	if text, err := r.str(name); err == nil {
		return text
	}
	var list []string
	_ = json.Unmarshal(r[name], &list)
	return strings.Join(list, "; ")
}

// first returns the text of the first element of a list, which is a text or an object.
func (r members) first(name string) string {
	var list []json.RawMessage
	if len(r[name]) > maxTexts || json.Unmarshal(r[name], &list) != nil || len(list) == 0 {
		return ""
	}
	element := members{"": list[0]}
	if text := element.texts(""); text != "" {
		return text
	}
	object := element.object("")
	for _, member := range []string{"detail", "message", "title"} {
		if text := object.texts(member); text != "" {
			return text
		}
	}
	return ""
}

// kindOfAnswer returns what an answer is, as far as its form tells. parseErr says why it
// has no members, and said is what they say.
func kindOfAnswer(a serverAnswer, parseErr error, said complaint) answerKind {
	switch {
	case len(bytes.TrimSpace(a.body)) == 0:
		return answerEmpty
	case parseErr != nil && isHTML(a.header, a.body):
		return answerPage
	case parseErr != nil:
		return answerText
	case said.oauth:
		return answerOAuthError
	case said.error:
		return answerOwnError
	}
	return answerObject
}

// isHTML reports whether an answer is a page for a browser.
func isHTML(header http.Header, body []byte) bool {
	kind, _, _ := mime.ParseMediaType(header.Get("Content-Type"))
	start := strings.ToLower(string(bytes.TrimSpace(body[:min(len(body), maxSearchedDescription)])))
	return kind == "text/html" || kind == "application/xhtml+xml" || strings.HasPrefix(start, "<!doctype html") || strings.HasPrefix(start, "<html")
}

var titleElement = regexp.MustCompile(`(?is)<title[^>]*>(.*?)</title`)

// pageTitle returns the title of a page; "" if its beginning has none.
func pageTitle(body []byte) string {
	found := titleElement.FindSubmatch(body[:min(len(body), maxSearchedPage)])
	if found == nil {
		return ""
	}
	return strings.Join(strings.Fields(html.UnescapeString(string(found[1]))), " ")
}

// How many bytes of a refusal are searched for secrets, or for a title. These are
// multiples of what is shown, because cleaning shortens a text.
const (
	maxSearchedCode        = 256
	maxSearchedDescription = 4 << 10
	maxSearchedPage        = 16 << 10
)

// mayShow returns a text of the server as it may be shown, with limit bytes at most. It
// returns false if the text holds one of the secrets. All that the authorization server
// says passes here before it is shown.
func mayShow(text string, limit int, secrets redact.Secrets) (string, bool) {
	text = text[:min(len(text), maxSearchedDescription)]
	// The raw text is searched, too, because cleaning may join or cut a secret.
	if secrets.In(text + "\n" + redact.Clean(text, len(text))) {
		return "", false
	}
	return redact.Clean(text, limit), true
}

// shownText is mayShow for a text that has a place of its own: withheld stands there
// instead.
func shownText(text string, limit int, secrets redact.Secrets) string {
	if shown, ok := mayShow(text, limit, secrets); ok {
		return shown
	}
	return withheld
}

// maxShownClaim is how many bytes of one text in a token are shown at most.
const maxShownClaim = 1000

// shownObject returns a part of a token as it may be shown: cleaned and cut, and
// without texts that hold one of the secrets.
func shownObject(object map[string]any, secrets redact.Secrets) map[string]any {
	shown := make(map[string]any, len(object))
	for name, value := range object {
		shown[shownText(name, maxShownClaim, secrets)] = shownValue(value, secrets)
	}
	return shown
}

func shownValue(value any, secrets redact.Secrets) any {
	switch value := value.(type) {
	case string:
		return shownText(value, maxShownClaim, secrets)
	case float64:
		if secrets.In(strconv.FormatFloat(value, 'f', -1, 64)) {
			return withheld
		}
	case []any:
		shown := make([]any, len(value))
		for i := range value {
			shown[i] = shownValue(value[i], secrets)
		}
		return shown
	case map[string]any:
		return shownObject(value, secrets)
	}
	return value
}
