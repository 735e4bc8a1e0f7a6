// The key of what a fleet shares, and what tells one token from another there.

package outboundauth

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
	"github.com/outboundauth/caddy-outbound-auth/internal/shelf"
	"github.com/outboundauth/caddy-outbound-auth/internal/vault"
)

// minSharedKey is how long a secret must be from which a key is made, in bytes. Whoever can read
// the storage can try secrets without asking anybody.
const minSharedKey = 20

// sharing is how a client shares its token.
type sharing struct {
	shelf  *shelf.Shelf
	server json.RawMessage // how the token endpoint is reached, with files by their content
	count  func(result string)
	logger *zap.Logger // with the fields that tell which client it is
	told   sync.Map    // the warnings so far
}

// keyLimit is how long reading the key of share_tokens may take. Nobody waits longer for it: the
// token is not shared then.
const keyLimit = 500 * time.Millisecond

// of returns where the token of a client is shared; nil if it is not. resolve returns the secrets
// of c as they are now: without them, there is no token request either, which says so.
func (s *sharing) of(ctx context.Context, c *Credentials, resolve func(context.Context) (resolved, error)) *shared {
	ctx, cancel := context.WithTimeout(ctx, keyLimit)
	defer cancel()
	r, err := resolve(ctx)
	if err != nil {
		return nil
	}
	key, err := interruptible(ctx, func() ([]byte, error) { return c.sharedKey(r) })
	if err != nil {
		if errors.Is(err, errInterrupted) {
			err = errors.New("share_tokens: reading the key took too long; name a file on a disk that answers")
		}
		s.warn(err.Error() + "; until then, the token is not shared")
		return nil
	}
	v, err := vault.New(key)
	if err != nil {
		return nil
	}
	what, err := c.granted(r, s.server)
	if err != nil {
		s.warn(err.Error())
		return nil
	}
	return &shared{
		Shelf: s.shelf, vault: v, by: instance, count: s.count, warn: s.warn,
		token: sharedAt + v.Name("token", what), failed: sharedAt + v.Name("failed", what),
	}
}

// warn tells operators once of what keeps the client from sharing.
func (s *sharing) warn(why string) {
	if _, told := s.told.LoadOrStore(why, true); !told {
		s.logger.Warn(why)
	}
}

// sharedKey returns the secret from which the keys are made: that of share_tokens, or one that
// each instance of the client has, because it can get the token with it anyway.
func (c *Credentials) sharedKey(r resolved) ([]byte, error) {
	switch {
	case c.ShareTokens.Key != "":
		key, err := resolveSecret(caddy.NewReplacer(), "share_tokens", c.ShareTokens.Key, true)
		if err == nil && len(key) < minSharedKey {
			err = errShortKey
		}
		return []byte(key), err
	case r.secret != "" && len(r.secret) < minSharedKey:
		return nil, errShortSecret
	case r.secret != "":
		return []byte(r.secret), nil
	case r.key != nil:
		return r.key.PKCS8()
	case r.certificate != nil:
		return x509.MarshalPKCS8PrivateKey(r.certificate.PrivateKey)
	}
	return nil, errNoSharedKey
}

// checkSharedSecret finds a secret that is too short when the config is loaded, if it can be had
// then.
func (c *Credentials) checkSharedSecret() error {
	values, _ := c.valuesNow()
	if key := values["share_tokens"]; c.ShareTokens.Key != "" {
		if key != "" && len(key) < minSharedKey {
			return errShortKey
		}
		return nil
	}
	if secret := values["client_secret"]; secret != "" && len(secret) < minSharedKey {
		return errShortSecret
	}
	return nil
}

var (
	errShortKey    = fmt.Errorf("share_tokens: the key is shorter than %d bytes; make it longer", minSharedKey)
	errShortSecret = fmt.Errorf("share_tokens: the client_secret is shorter than %d bytes, so others could guess it; give share_tokens a key", minSharedKey)
)

// changingClaims are those of a JWT that say when it was made, and for which machine: that of a
// service account of Kubernetes names its pod.
var changingClaims = []string{"exp", "iat", "nbf", "jti", "auth_time", "kubernetes.io"}

// granted returns all that decides which token is granted, and by whom. Two instances that differ
// in it have tokens of their own. How the client authenticates makes no difference.
func (c *Credentials) granted(r resolved, server json.RawMessage) ([]byte, error) {
	var identity map[string]any // what the JWT says of whose it is, and of what is asked for
	if r.assertion != "" {
		_, claims, ok := jwt.Decode(r.assertion)
		if !ok || claims["sub"] == nil {
			return nil, errors.New("share_tokens: nobody can tell from the JWT of assertion_file whose it is (sub), so the token is not shared")
		}
		for _, changing := range changingClaims {
			delete(claims, changing)
		}
		identity = claims
	}
	return json.Marshal([]any{
		identity,
		c.TokenURL, c.Issuer, server,
		c.ClientID, c.grantType(), slices.Compact(slices.Sorted(slices.Values(c.Scopes))), c.Audience, c.Resource,
		r.subject, r.claims, r.params, r.headers, c.TokenResponse,
	})
}

// contentIdentity returns the config of a tokenTransport with the contents of the files that say
// which server is trusted: one instance may have another CA in its file, and believe a false
// server. If nobody can tell which server that is, the error says why.
func contentIdentity(config []byte) (json.RawMessage, error) {
	var h reverseproxy.HTTPTransport
	if err := json.Unmarshal(config, &h); err != nil {
		return nil, err
	}
	if tls := h.TLS; tls != nil {
		tls.ClientCertificateKeyFile = ""
		var err error
		for i, file := range tls.RootCAPEMFiles { //nolint:staticcheck // configs have it
			if tls.RootCAPEMFiles[i], err = fileContent(file); err != nil { //nolint:staticcheck // likewise
				return nil, err
			}
		}
		if tls.ClientCertificateFile, err = fileContent(tls.ClientCertificateFile); err != nil {
			return nil, err
		}
		if tls.CARaw, err = withContents(tls.CARaw); err != nil {
			return nil, err
		}
	}
	return json.Marshal(h)
}

// withContents replaces the names of the files of a CA module by their contents.
func withContents(module json.RawMessage) (json.RawMessage, error) {
	if len(module) == 0 {
		return module, nil
	}
	var value any
	if err := json.Unmarshal(module, &value); err != nil {
		return nil, err
	}
	if err := readFiles(value); err != nil {
		return nil, err
	}
	return json.Marshal(value)
}

// comparedCAs are the CA modules that say all, with the contents of their files.
var comparedCAs = []string{"inline", "file", "combined"}

// readFiles replaces the names of files in a part of the config of a CA module.
func readFiles(part any) error {
	switch part := part.(type) {
	case []any:
		for _, element := range part {
			if err := readFiles(element); err != nil {
				return err
			}
		}
	case map[string]any:
		if provider, ok := part["provider"].(string); ok && !slices.Contains(comparedCAs, provider) {
			return errors.New("share_tokens: nobody can tell whether all instances trust the same CA; name it in the `ca` of token_transport by its file")
		}
		files, _ := part["pem_files"].([]any)
		for i, file := range files {
			name, _ := file.(string)
			content, err := fileContent(name)
			if err != nil {
				return err
			}
			files[i] = content
		}
		for _, member := range part {
			if err := readFiles(member); err != nil {
				return err
			}
		}
	}
	return nil
}

// fileContent returns a digest of a file; "" for no file.
func fileContent(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	content, err := os.ReadFile(name)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", sha256.Sum256(content)), nil
}
