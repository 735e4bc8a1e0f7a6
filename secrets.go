package outboundauth

import (
	"fmt"
	"strings"
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
