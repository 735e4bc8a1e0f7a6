// Package redact says which parts of a foreign text may be shown.
package redact

import (
	"encoding/base64"
	"encoding/hex"
	"html"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
)

// Clean makes a text from outside fit for a log line: printable, no line
// breaks, at most limit bytes.
func Clean(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) { // it may control a terminal
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, ""))
	s = strings.TrimSpace(s)
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "…"
	}
	return s
}

// Secrets are the texts in a token request that must not be shown.
type Secrets []string

// Add adds a secret, unless it is too short to be one.
func (s *Secrets) Add(secret string) {
	// The beginning of a URL gives nothing away, and short texts may occur
	// anywhere.
	secret = strings.TrimPrefix(strings.TrimPrefix(secret, "https://"), "http://")
	if len(secret) >= minSecret {
		*s = append(*s, secret)
	}
}

// AddReplaced adds the part of value that has replaced the placeholders of
// template. What stands in the config itself is no secret.
func (s *Secrets) AddReplaced(template, value string) {
	prefix, _, ok := strings.Cut(template, "{")
	if ok && template != value {
		suffix := template[strings.LastIndexByte(template, '}')+1:]
		s.Add(strings.TrimSuffix(strings.TrimPrefix(value, prefix), suffix))
	}
}

// AddQuery adds what has replaced placeholders in the query of a URL, such as
// the key of a function. If the template has no query, a placeholder holds the
// whole query.
func (s *Secrets) AddQuery(template string, u *url.URL) {
	_, query, ok := strings.Cut(template, "?")
	if !ok {
		query = "{}"
	}
	s.AddReplaced(query, u.RawQuery)
}

// Telltale is how many characters of a secret, one after the other, give it
// away. Fewer may be there by chance: secrets and messages are made of words.
const Telltale = 8

// minSecret is how many characters a secret has at least. Shorter values, such
// as 1, are no secrets.
const minSecret = 4

// In reports whether a text holds a secret, or enough of a secret to give it
// away. It knows all spellings in which a server may repeat a secret.
func (s Secrets) In(text string) bool {
	texts := readings(text)
	windows := make(map[string]struct{}) // all parts of texts that have Telltale characters
	for _, t := range texts {
		for i := range len(t) - Telltale + 1 {
			windows[t[i:i+Telltale]] = struct{}{}
		}
	}
	for _, secret := range s {
		for _, spelling := range spellings(secret) {
			if len(spelling) < Telltale { // look for the whole spelling
				if slices.ContainsFunc(texts, func(t string) bool { return strings.Contains(t, spelling) }) {
					return true
				}
				continue
			}
			for i := range len(spelling) - Telltale + 1 {
				if _, ok := windows[spelling[i:i+Telltale]]; ok {
					return true
				}
			}
		}
	}
	return false
}

// decoders undo the escapes of URLs, of forms, of HTML, and of quoted texts.
var decoders = []func(string) string{unescapeURL, unescapeForm, html.UnescapeString, unquote}

// maxEscaped is how many layers of escapes are undone, one after the other. A server
// may quote a text that already quotes what the server got.
const maxEscaped = 2

// readings returns all that a text may be meant to say, in lower case.
func readings(text string) []string {
	readings := []string{text}
	add := func(reading string) {
		if !slices.Contains(readings, reading) {
			readings = append(readings, reading)
		}
	}
	for from, level := 0, 0; level < maxEscaped; level++ {
		last := readings[from:]
		from = len(readings)
		for _, reading := range last {
			for _, decode := range decoders {
				add(decode(reading))
			}
		}
	}
	for _, reading := range readings {
		add(joined(reading))
	}
	for i := range readings {
		readings[i] = strings.ToLower(readings[i])
	}
	return readings
}

// urlEscape is a character in a URL. Other percent signs in the text do not matter.
var urlEscape = regexp.MustCompile(`%[[:xdigit:]]{2}`)

func unescapeURL(text string) string {
	return urlEscape.ReplaceAllStringFunc(text, func(escape string) string {
		character, _ := url.PathUnescape(escape)
		return character
	})
}

func unescapeForm(text string) string { return unescapeURL(strings.ReplaceAll(text, "+", " ")) }

// quotedEscape is a character in a string of JSON or of a program. JSON writes
// characters beyond the first plane as two halves.
var quotedEscape = regexp.MustCompile(`\\(?:u[dD][89abAB][[:xdigit:]]{2}\\u[dD][c-fC-F][[:xdigit:]]{2}|` +
	`u[[:xdigit:]]{4}|U[[:xdigit:]]{8}|x[[:xdigit:]]{2}|[0-7]{3}|["'\\/abfnrtv])`)

func unquote(text string) string {
	return quotedEscape.ReplaceAllStringFunc(text, func(escape string) string {
		switch len(escape) {
		case len(`\ud800\udc00`):
			high, _ := strconv.ParseUint(escape[2:6], 16, 16)
			low, _ := strconv.ParseUint(escape[8:], 16, 16)
			return string(utf16.DecodeRune(rune(high), rune(low)))
		case len(`\/`):
			if strings.ContainsAny(escape[1:], `"'/`) {
				return escape[1:]
			}
		}
		character, multibyte, _, err := strconv.UnquoteChar(escape, 0)
		switch {
		case err != nil: // there is no such character
			return escape
		case multibyte:
			return string(character)
		}
		return string([]byte{byte(character)})
	})
}

// joined returns the text without what may stand between its characters, as in
// 61:62:63.
func joined(text string) string {
	return strings.Map(func(r rune) rune {
		if (r >= 'a' && r <= 'z') || (r >= 'A' && r <= 'Z') || (r >= '0' && r <= '9') {
			return r
		}
		return -1
	}, text)
}

// spellings returns the ways to write a secret, in lower case. In base64, a
// secret has three forms: the form depends on where the secret begins.
func spellings(secret string) []string {
	spellings := []string{secret, url.QueryEscape(secret), url.PathEscape(secret), hex.EncodeToString([]byte(secret))}
	for skipped := range min(3, len(secret)) {
		if left := []byte(secret[skipped:]); skipped == 0 || len(left) >= Telltale {
			spellings = append(spellings, base64.StdEncoding.EncodeToString(left), base64.URLEncoding.EncodeToString(left))
		}
	}
	for _, spelling := range spellings {
		if short := joined(spelling); len(short) >= Telltale && short != spelling { // shorter ones would be found by chance
			spellings = append(spellings, short)
		}
	}
	for i := range spellings {
		spellings[i] = strings.ToLower(spellings[i])
	}
	return spellings
}
