package outboundauth

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"html"
	"net/url"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

// requestNamespaces are the placeholders that have a value only while a
// request is served, so never in a token request.
var requestNamespaces = []string{"{http.", "{vars.", "{tls.", "{err.", "{rp."}

// checkSecretTemplate refuses placeholders that would be sent as they stand.
// Other braces are allowed: generated secrets contain any character.
func checkSecretTemplate(setting, template string) error {
	for _, prefix := range requestNamespaces {
		if strings.Contains(template, prefix) {
			return fmt.Errorf("%s: %s*} placeholders have no value in a token request; use {env.*} or {file.*}", setting, prefix)
		}
	}
	return nil
}

// resolveSecret replaces the placeholders of a setting that may be secret.
// The error names a placeholder that is empty, never a value.
func resolveSecret(repl *caddy.Replacer, setting, template string) (string, error) {
	value, err := repl.ReplaceOrErr(template, true, false)
	if err != nil {
		return "", fmt.Errorf("%s: %w", setting, err)
	}
	if value == "" {
		return "", fmt.Errorf("%s is empty", setting)
	}
	return value, nil
}

// confidential holds what a token request and its answer contain that must
// not be shown.
type confidential []string

func (c *confidential) add(secret string) {
	if secret != "" {
		*c = append(*c, secret)
	}
}

// addReplaced adds what the placeholders of a template stand for in value.
// What stands in the config itself is no secret.
func (c *confidential) addReplaced(template, value string) {
	prefix, _, ok := strings.Cut(template, "{")
	if ok && template != value {
		suffix := template[strings.LastIndexByte(template, '}')+1:]
		c.add(strings.TrimSuffix(strings.TrimPrefix(value, prefix), suffix))
	}
}

// telltale is how many characters of a secret in a row give it away. Less may
// be chance: secrets and messages are made of words.
const telltale = 8

// in tells whether a text holds something confidential, or enough of it, in
// whatever spelling a server may repeat it.
func (c confidential) in(text string) bool {
	unescaped, err := url.QueryUnescape(text)
	if err != nil {
		unescaped = text
	}
	texts := []string{strings.ToLower(text), strings.ToLower(unescaped), strings.ToLower(html.UnescapeString(text))}
	for _, secret := range c {
		for _, spelling := range []string{
			secret, url.QueryEscape(secret), url.PathEscape(secret), hex.EncodeToString([]byte(secret)),
			base64.StdEncoding.EncodeToString([]byte(secret)), base64.URLEncoding.EncodeToString([]byte(secret)),
		} {
			spelling = strings.ToLower(spelling)
			n := min(telltale, len(spelling))
			for i := range len(spelling) - n + 1 {
				for _, t := range texts {
					if strings.Contains(t, spelling[i:i+n]) {
						return true
					}
				}
			}
		}
	}
	return false
}
