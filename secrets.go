// The secrets, keys and files that are read again for each token request.

package outboundauth

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"

	"github.com/caddyserver/caddy/v2"

	"github.com/outboundauth/caddy-outbound-auth/internal/clientcert"
	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
)

// resolved is what a token request needs of the settings that are read again
// for each, with the placeholders replaced: what was rotated is used without a
// reload. It lives no longer than a request.
type resolved struct {
	secret          string
	key             *jwt.Key
	keySource       []byte // of key
	certificate     *tls.Certificate
	assertion       string // of assertion_file
	subject         string
	claims          map[string]string
	params, headers map[string]string
}

// Format keeps the secrets out of everything that prints values.
func (resolved) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("resolved")) }

// fingerprint tells these secrets from others without holding them.
func (r resolved) fingerprint() string {
	var chain [][]byte
	if r.certificate != nil {
		chain = r.certificate.Certificate
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %q %q %q %q %q %q", // maps print sorted
		r.secret, r.keySource, chain, r.assertion, r.subject, r.claims, r.params, r.headers))
	return string(sum[:])
}

// resolve replaces the placeholders by the values that they have now, with a
// replacer that knows nothing of any request. They may name files, and reading
// a file can't be interrupted: then it goes on by itself when ctx ends.
func (c *Credentials) resolve(ctx context.Context, certificates *clientcert.Cache) (resolved, error) {
	type result struct {
		resolved
		err error
	}
	done := make(chan result, 1)
	go func() {
		var res result
		res.err = safely(func() (err error) {
			res.resolved, err = c.resolveNow(certificates)
			return err
		})
		done <- res
	}()
	select {
	case res := <-done:
		if res.err != nil {
			return resolved{}, &tokenError{Endpoint: c.host(), Code: codeConfiguration, Description: res.err.Error(), permanent: true}
		}
		return res.resolved, nil
	case <-ctx.Done():
		return resolved{}, &tokenError{Endpoint: c.host(), Code: codeTimeout, Description: "reading the client's secrets from their files took too long"}
	}
}

func (c *Credentials) resolveNow(certificates *clientcert.Cache) (r resolved, err error) {
	repl := caddy.NewReplacer()
	if c.ClientSecret != "" {
		if r.secret, err = resolveSecret(repl, "client_secret", c.ClientSecret); err != nil {
			return resolved{}, err
		}
	}
	if c.Subject != "" {
		if r.subject, err = resolveSecret(repl, "subject", c.Subject); err != nil {
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
			if (*values.into)[name], err = resolveSecret(repl, values.setting+" "+name, template); err != nil {
				return resolved{}, err
			}
		}
	}
	for name, value := range r.headers {
		if !validHeaderValue(value) {
			return resolved{}, fmt.Errorf("token_request_header %s: the value holds a control character", name)
		}
	}
	return r, nil
}

// resolveKeys reads certificate and key. newEndpoint calls it as well: what can't
// be read, or does not fit, is found at load.
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

// minInlineJWT is the length, in bytes, from which a text that is written as a JWT
// is taken for one: a shorter one may be the name of a file, with dots in it.
const minInlineJWT = 101

// readAssertion reads the file with a JWT; a placeholder may also hold the JWT.
func readAssertion(repl *caddy.Replacer, template string) (string, error) {
	value, err := resolveSecret(repl, "assertion_file", template)
	if err != nil || (len(value) >= minInlineJWT && jwt.Is(value)) {
		return value, err
	}
	content, err := readSecretFile("assertion_file", value)
	if err != nil {
		return "", err
	}
	assertion := strings.TrimSpace(string(content))
	if !jwt.Is(assertion) {
		return "", errors.New("assertion_file: the file holds no JWT")
	}
	return assertion, nil
}
