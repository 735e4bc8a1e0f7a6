// How settings get one spelling, and how their placeholders are replaced, when a config is loaded.

package outboundauth

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

// expand returns a copy of c. In the copy, the placeholders are replaced in the
// settings that are read only once, when the config is loaded. Secrets keep
// their placeholders: they are read again for each token request. Their values
// must not reach the config that the admin API shows.
func (c Credentials) expand(repl *caddy.Replacer) (Credentials, error) {
	err := c.check()
	if err != nil {
		return c, err
	}
	replace := func(setting string, value *string) {
		if err != nil {
			return
		}
		if len(placeholdersIn(*value)) > 0 {
			if *value, err = replacePlaceholders(repl, setting, *value, false, true); err != nil {
				if _, said := errors.AsType[*settingError](err); !said {
					err = fmt.Errorf("%w (only global placeholders such as {env.*} and {file.*} are known here)", err)
				}
				return
			}
		}
		if encoding := checkUTF8(*value); encoding != nil {
			err = fmt.Errorf("%s: %w", setting, encoding)
		}
	}
	replace("name", &c.Name)
	replace("token_url", &c.TokenURL)
	replace("issuer", &c.Issuer)
	replace("client_id", &c.ClientID)
	replace("key_id", &c.KeyID)
	replace("assertion_audience", &c.AssertionAudience)
	for _, list := range []struct {
		setting string
		values  *[]string
	}{{"scopes", &c.Scopes}, {"audience", &c.Audience}, {"resource", &c.Resource}} {
		*list.values = slices.Clone(*list.values)
		for i := range *list.values {
			replace(list.setting, &(*list.values)[i])
		}
	}
	if err != nil {
		return c, err
	}
	// One placeholder may hold several scopes, with spaces between them as
	// servers write it.
	if c.Scopes != nil {
		c.Scopes = strings.Fields(strings.Join(c.Scopes, " "))
	}
	for _, scope := range c.Scopes {
		if !validScope(scope) { // even if it comes from a placeholder
			return c, errScope
		}
	}

	if err := c.checkTemplates(); err != nil {
		return c, err
	}
	if err := c.check(); err != nil {
		return c, err
	}
	return c, c.checkTogether()
}

// canonical returns c with the names of its headers in canonical form. So a
// header overrides an inherited header that is written in another case.
func (c Credentials) canonical() (Credentials, error) {
	var err error
	if c.Headers, err = canonicalNames(c.Headers); err != nil {
		return c, fmt.Errorf("header: %w", err)
	}
	if c.TokenRequestHeaders, err = canonicalNames(c.TokenRequestHeaders); err != nil {
		return c, fmt.Errorf("token_request_header: %w", err)
	}
	return c, nil
}

func canonicalNames(headers map[string]string) (map[string]string, error) {
	canonical := make(map[string]string, len(headers))
	for _, field := range sortedKeys(headers) {
		name := http.CanonicalHeaderKey(field)
		if _, ok := canonical[name]; ok {
			return nil, errors.New("the same name is set twice: keep one")
		}
		canonical[name] = headers[field]
	}
	return canonical, nil
}
