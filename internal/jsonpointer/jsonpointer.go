// Package jsonpointer finds a value in a JSON document (RFC 6901).
//
// It works on the text of the document, so a number keeps all its digits.
package jsonpointer

import (
	"encoding/json"
	"errors"
	"strconv"
	"strings"
)

// A Pointer names a value in a document.
type Pointer struct{ tokens []string }

var unescape = strings.NewReplacer("~1", "/", "~0", "~")

// Parse parses a pointer, such as `/data/tokens/0`. It refuses the empty pointer, which
// names the whole document. An error quotes nothing.
func Parse(text string) (Pointer, error) {
	if !strings.HasPrefix(text, "/") {
		return Pointer{}, errors.New("is not a JSON Pointer (RFC 6901): write the names on the way to the member, each behind a slash, such as /data/token")
	}
	tokens := strings.Split(text[1:], "/")
	for i, token := range tokens {
		if strings.Count(token, "~") != strings.Count(token, "~0")+strings.Count(token, "~1") {
			return Pointer{}, errors.New("has a ~ that is no escape: write ~0 for ~, and ~1 for a / in a name (RFC 6901)")
		}
		tokens[i] = unescape.Replace(token) // from left to right, so ~01 is ~1
	}
	return Pointer{tokens}, nil
}

// Find returns the value that the pointer names. It returns false if there is none, or
// if the document is not JSON. Of members with one name, the last one counts, as in
// encoding/json.
func (p Pointer) Find(document json.RawMessage) (json.RawMessage, bool) {
	for _, token := range p.tokens {
		var object map[string]json.RawMessage
		var array []json.RawMessage
		switch {
		case json.Unmarshal(document, &object) == nil && object != nil:
			member, ok := object[token]
			if !ok {
				return nil, false
			}
			document = member
		case json.Unmarshal(document, &array) == nil:
			i, ok := index(token)
			if !ok || i >= len(array) {
				return nil, false
			}
			document = array[i]
		default:
			return nil, false
		}
	}
	return document, true
}

// index returns the index in an array that a token names (RFC 6901 §4). A number has no
// sign and no zero in front. `-` names an element that is never there.
func index(token string) (int, bool) {
	if token == "" || (token[0] == '0' && token != "0") || strings.Trim(token, "0123456789") != "" {
		return 0, false
	}
	i, err := strconv.Atoi(token)
	return i, err == nil
}
