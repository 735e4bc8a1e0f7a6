// The secrets, keys and files that are read again for each token request, and those that were sent.

package outboundauth

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2"

	"github.com/outboundauth/caddy-outbound-auth/internal/clientcert"
	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// resolved has the settings that are read again for each token request, with
// their placeholders replaced. So a rotated secret is used without a reload. A
// resolved lives no longer than its request.
type resolved struct {
	secret          string
	key             *jwt.Key
	keySource       []byte // the text of key
	certificate     *tls.Certificate
	assertion       string // the JWT of assertion_file
	subject         string
	claims          map[string]string
	params, headers map[string]string
}

// Format keeps the secrets out of everything that prints values.
func (resolved) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("resolved")) }

// fingerprint returns a digest of these secrets. It changes when they change, and
// does not hold them.
func (r resolved) fingerprint() string {
	var chain [][]byte
	if r.certificate != nil {
		chain = r.certificate.Certificate
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %q %q %q %q %q %q", // fmt sorts maps
		r.secret, r.keySource, chain, r.assertion, r.subject, r.claims, r.params, r.headers))
	return string(sum[:])
}

// values returns the secrets that are sent, by the names of their settings. The names
// are those of Credentials.templates.
func (r resolved) values() map[string]string {
	values := map[string]string{"client_secret": r.secret, "subject": r.subject}
	for setting, named := range map[string]map[string]string{
		"param": r.params, "claim": r.claims, "token_request_header": r.headers,
	} {
		for name, value := range named {
			values[setting+" "+name] = value
		}
	}
	return values
}

// valuesNow returns the same values while a config is loaded, and why some can't be had
// then. That is no error: a config may be validated on a machine without the secrets. A
// pipe may have its value later, and nobody waits for that here.
func (c *Credentials) valuesNow() (values map[string]string, faults []error) {
	repl, templates := caddy.NewReplacer(), c.templates()
	values = make(map[string]string)
	for _, setting := range sortedKeys(templates) {
		template := templates[setting]
		if template == "" {
			continue
		}
		var err error
		switch setting {
		case "private_key", "client_certificate": // resolveKeys reads them at load
		case "assertion_file": // its format tells what belongs to it
			_, err = readAssertion(repl, template)
		default:
			if values[setting], err = resolveSecret(repl, setting, template, false); errors.Is(err, errNotRegular) {
				err = nil
			}
		}
		if err != nil {
			faults = append(faults, err)
		}
	}
	return values, faults
}

// oddities names the settings that begin or end with an invisible character, such as
// the line break that an editor has added. values are the values of settings that are
// not read at load.
func (c *Credentials) oddities(values map[string]string) (odd []string) {
	templates := c.templates()
	maps.Copy(values, map[string]string{
		"client_id": c.ClientID, "key_id": c.KeyID, "assertion_audience": c.AssertionAudience, "assertion_typ": c.AssertionTyp,
	})
	for setting, list := range map[string][]string{"audience": c.Audience, "resource": c.Resource} {
		for _, value := range list {
			if oddEnds(value) != "" {
				values[setting] = value
			}
		}
	}
	for _, setting := range sortedKeys(values) {
		ends := oddEnds(values[setting])
		if ends == "" {
			continue
		}
		if strings.HasSuffix(ends, "ends with a line break") && strings.Contains(templates[setting], "{"+filePlaceholder) {
			ends += " beside the final one"
		}
		odd = append(odd, setting+" "+ends)
	}
	return odd
}

// resolve replaces the placeholders by their current values. Its replacer knows
// nothing about requests. Placeholders may name files, and nobody can interrupt
// the reading of a file. When ctx ends, resolve returns and the reading goes on.
func (c *Credentials) resolve(ctx context.Context, certificates *clientcert.Cache) (resolved, error) {
	r, err := interruptible(ctx, func() (resolved, error) { return c.resolveNow(certificates) })
	switch {
	case errors.Is(err, errInterrupted):
		return resolved{}, &tokenError{
			Endpoint: c.host(), Code: codeTimeout, Description: "reading the client's secrets from their files took too long",
			Hint: "name files on a disk that answers, and no pipe to which nobody writes", local: true,
		}
	case err != nil:
		return resolved{}, configurationError(c.host(), err)
	}
	return r, nil
}

// interruptible returns what f returns. If ctx ends before, it returns errInterrupted, and f goes
// on.
func interruptible[T any](ctx context.Context, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		var res result
		res.err = safely(func() (err error) {
			res.value, err = f()
			return err
		})
		done <- res
	}()
	select {
	case res := <-done:
		return res.value, res.err
	case <-ctx.Done():
		var none T
		return none, errInterrupted
	}
}

var errInterrupted = errors.New("it took too long")

func (c *Credentials) resolveNow(certificates *clientcert.Cache) (r resolved, err error) {
	repl := caddy.NewReplacer()
	if c.ClientSecret != "" {
		if r.secret, err = resolveSecret(repl, "client_secret", c.ClientSecret, true); err != nil {
			return resolved{}, err
		}
	}
	if c.Subject != "" {
		if r.subject, err = resolveSecret(repl, "subject", c.Subject, true); err != nil {
			return resolved{}, err
		}
	}
	if c.AssertionFile != "" {
		if r.assertion, err = readAssertion(repl, c.AssertionFile); err != nil {
			return resolved{}, err
		}
	}
	if r.certificate, r.key, r.keySource, err = c.resolveKeys(repl, certificates); err != nil {
		return resolved{}, err
	}
	for _, values := range []struct {
		setting   string
		templates map[string]string
		into      *map[string]string
	}{
		{"param", c.Params, &r.params},
		{"claim", c.Claims, &r.claims},
		{"token_request_header", c.TokenRequestHeaders, &r.headers},
	} {
		*values.into = make(map[string]string, len(values.templates))
		for name, template := range values.templates {
			if (*values.into)[name], err = resolveSecret(repl, values.setting+" "+name, template, true); err != nil {
				return resolved{}, err
			}
		}
	}
	if err := checkUTF8(r.subject); err != nil { // it becomes a part of a JWT
		return resolved{}, fmt.Errorf("subject: %w", err)
	}
	for name, value := range r.claims {
		if err := checkUTF8(value); err != nil {
			return resolved{}, fmt.Errorf("claim %s: %w", name, err)
		}
	}
	for name, value := range r.headers {
		if !validHeaderValue(value) {
			return resolved{}, fmt.Errorf("token_request_header %s: the value holds a control character", name)
		}
	}
	return r, nil
}

// resolveKeys reads the certificate and the key. newEndpoint calls it as well, so
// that a file that can't be read, or a key that does not fit, is found at load.
func (c *Credentials) resolveKeys(repl *caddy.Replacer, certificates *clientcert.Cache) (certificate *tls.Certificate, key *jwt.Key, source []byte, err error) {
	if c.ClientCertificate != nil {
		if certificate, err = c.ClientCertificate.read(repl, certificates); err != nil {
			return nil, nil, nil, err
		}
	}
	if !c.usesKey() {
		return certificate, nil, nil, nil
	}
	template := c.PrivateKey
	if template == "" {
		template = c.ClientCertificate.Key
	}
	if source, err = readSource(repl, "private_key", template); err != nil {
		return nil, nil, nil, err
	}
	if key, err = jwt.ParseKey(source, c.SigningAlg, c.KeyID); err != nil {
		return nil, nil, nil, fmt.Errorf("private_key: %w", err)
	}
	if certificate != nil {
		key.Certify(certificate.Leaf)
	}
	return certificate, key, source, nil
}

// minInlineJWT is how many bytes a text needs at least to be taken for a JWT. A
// shorter text that looks like a JWT may be the name of a file with dots in it.
const minInlineJWT = 101

// readAssertion reads the file with a JWT. A placeholder may also hold the JWT.
func readAssertion(repl *caddy.Replacer, template string) (string, error) {
	value, err := resolveSecret(repl, "assertion_file", template, false)
	if err != nil {
		return "", err
	}
	if content := trimText(value); len(content) >= minInlineJWT && jwt.Is(content) {
		return content, nil
	}
	content, err := readSecretFile("assertion_file", value)
	if err != nil {
		return "", err
	}
	assertion := strings.TrimSpace(string(content))
	if !jwt.Is(assertion) {
		return "", &settingError{wrong: "assertion_file: the file holds no JWT", todo: "see that one is written into it, and nothing else"}
	}
	return assertion, nil
}

// sentSecrets knows what the server was sent in the last requests that differ: it may
// still know a secret that was replaced.
type sentSecrets struct {
	mu   sync.Mutex
	last []redact.Secrets // guarded by mu
}

// maxSent is how many requests a server may look back.
const maxSent = 4

// add notes the secrets of a request. It returns them with those of the last ones.
func (s *sentSecrets) add(secrets redact.Secrets) redact.Secrets {
	secrets = slices.Sorted(slices.Values(secrets)) // they come from maps
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.last); n == 0 || !slices.Equal(s.last[n-1], secrets) {
		s.last = append(s.last, secrets)
		s.last = s.last[max(0, len(s.last)-maxSent):]
	}
	return slices.Concat(s.last...)
}

// all returns the secrets of the last requests.
func (s *sentSecrets) all() redact.Secrets {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Concat(s.last...)
}
