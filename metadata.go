// The metadata of an authorization server: its clients share it, and use it for a day.

package outboundauth

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
)

const (
	// How long metadata is used before it is looked up again: after a look-up
	// that succeeded, and after one that failed.
	metadataLifetime = 24 * time.Hour
	metadataRetry    = 5 * time.Minute

	// How long one look-up may take. If there is metadata already, a look-up
	// may delay a token request only for metadataPatience.
	metadataTimeout  = 10 * time.Second
	metadataPatience = 2 * time.Second

	// How long the error of a look-up is the answer for all clients that ask.
	// Many clients may ask at once.
	metadataErrorLifetime = 100 * time.Millisecond

	// If a token endpoint fails, the next look-up waits this long after the last.
	metadataPause = 10 * time.Second
)

// metadata is what an authorization server publishes about itself (RFC 8414
// §2, RFC 8705 §3.3 and §5, RFC 9449 §5.1), as far as token requests and advice
// need it. It is immutable.
type metadata struct {
	issuer            string
	tokenEndpoint     string
	mtlsTokenEndpoint string // for clients that present a certificate; may be empty
	fromHere          bool   // this machine has published it

	// token_endpoint_auth_methods_supported,
	// token_endpoint_auth_signing_alg_values_supported, grant_types_supported and
	// dpop_signing_alg_values_supported. Each may be empty: a server may list nothing.
	authMethods, signingAlgs, grantTypes, dpopAlgs []string

	bindsCertificates bool // tls_client_certificate_bound_access_tokens
}

// parseMetadata reads a document of metadata. Others judge whether its
// endpoints can be used. Members that only warnings and advice need may hold anything.
func parseMetadata(body []byte) (*metadata, error) {
	if len(body) > maxAnswer {
		return nil, errors.New("the metadata is too large")
	}
	document, err := parseMembers(body) // the case of a name matters
	if err != nil {
		return nil, err
	}
	m := new(metadata)
	if m.issuer, err = document.str("issuer"); err != nil {
		return nil, err
	}
	if m.tokenEndpoint, err = document.str("token_endpoint"); err != nil {
		return nil, err
	}
	if aliases, err := parseMembers(document["mtls_endpoint_aliases"]); err == nil {
		m.mtlsTokenEndpoint, _ = aliases.str("token_endpoint")
	}
	_ = json.Unmarshal(document["token_endpoint_auth_methods_supported"], &m.authMethods)
	_ = json.Unmarshal(document["token_endpoint_auth_signing_alg_values_supported"], &m.signingAlgs)
	_ = json.Unmarshal(document["grant_types_supported"], &m.grantTypes)
	_ = json.Unmarshal(document["dpop_signing_alg_values_supported"], &m.dpopAlgs)
	_ = json.Unmarshal(document["tls_client_certificate_bound_access_tokens"], &m.bindsCertificates)
	return m, nil
}

// unlisted returns the first setting of client authentication or dpop that the server does not
// list, and what it lists instead. It may list anything, so only what is known here is
// shown.
func (m *metadata) unlisted(c *Credentials) (setting, names string) {
	method := c.authMethod()
	var supported, known []string
	switch {
	case method != authByGrant && method != authNone && len(m.authMethods) > 0 && !supports(m.authMethods, method):
		setting, supported, known = "auth_method", m.authMethods, append(slices.Clone(authMethods), authTLSSelfSigned)
	case (method == authKeyJWT || method == authSecretJWT) && c.SigningAlg != "" &&
		len(m.signingAlgs) > 0 && !slices.Contains(m.signingAlgs, c.SigningAlg):
		setting, supported, known = "signing_alg", m.signingAlgs, slices.Clone(jwt.Algorithms)
	case c.DPoP != "" && m.unlistedProof(c.DPoP):
		setting, supported, known = "dpop", m.dpopAlgs, slices.Clone(dpop.Algorithms)
	}
	known = slices.DeleteFunc(known, func(name string) bool { return !slices.Contains(supported, name) })
	return setting, strings.Join(known, " ")
}

// unlistedProof reports whether the server does not list an algorithm of proofs.
func (m *metadata) unlistedProof(alg string) bool {
	return len(m.dpopAlgs) > 0 && !slices.Contains(m.dpopAlgs, alg)
}

// authTLSSelfSigned is the name of authTLS in metadata if the certificate is
// self-signed (RFC 8705 §2.2).
const authTLSSelfSigned = "self_signed_tls_client_auth"

// supports reports whether a list of methods has this method. Self-signed
// certificates have a name of their own there (RFC 8705 §2.2).
func supports(methods []string, method string) bool {
	return slices.Contains(methods, method) || (method == authTLS && slices.Contains(methods, authTLSSelfSigned))
}

// issuers has the metadata by issuerKey. All clients that look metadata up in
// the same way share it. Like the tokens, the metadata outlives a reload: the
// issuer may be down then, and a working token endpoint must not become
// unknown.
var issuers = caddy.NewUsagePool()

type issuerKey [sha256.Size]byte

// issuerMetadata caches the metadata of one issuer. One look-up at a time
// serves all who wait, and goes on when they leave.
type issuerMetadata struct {
	key issuerKey

	mu       sync.Mutex // guards all below; never held over I/O
	current  *metadata
	until    time.Time // current is not looked up again before this
	doubtful bool      // a token request failed, so current may be wrong
	tried    time.Time // when the last look-up ended
	err      error     // the error of the last look-up
	inflight *metadataLookUp
}

// metadataLookUp is one look-up in flight. m and err may be read once done is closed.
type metadataLookUp struct {
	done chan struct{}
	m    *metadata
	err  error
}

// acquireIssuer returns the metadata that clients with these credentials share.
// The caller has to release it.
func acquireIssuer(c *Credentials, transportConfig []byte) (*issuerMetadata, error) {
	shape, err := json.Marshal([]any{c.Issuer, c.ClientCertificate, json.RawMessage(transportConfig)})
	if err != nil {
		return nil, err
	}
	key := issuerKey(sha256.Sum256(shape))
	shared, _, err := issuers.LoadOrNew(key, func() (caddy.Destructor, error) {
		return &issuerMetadata{key: key}, nil
	})
	if err != nil {
		return nil, err
	}
	return shared.(*issuerMetadata), nil
}

func (i *issuerMetadata) release() error {
	_, err := issuers.Delete(i.key)
	return err
}

// Destruct implements caddy.Destructor. A look-up still ends by its timeout.
func (i *issuerMetadata) Destruct() error { return nil }

// get returns the metadata. If there is none, get waits for a look-up. If the
// metadata is doubtful, get waits only for a short time. If it is only old, get
// does not wait. It calls failed if a look-up fails and older metadata is used instead.
func (i *issuerMetadata) get(ctx context.Context, lookUp func(context.Context) (*metadata, error), failed func(error)) (*metadata, error) {
	i.mu.Lock()
	known, doubtful := i.current, i.doubtful
	if known != nil && !doubtful && time.Now().Before(i.until) {
		i.mu.Unlock()
		return known, nil
	}
	if known == nil && i.err != nil && time.Since(i.tried) < metadataErrorLifetime {
		defer i.mu.Unlock()
		return nil, i.err
	}
	l := i.inflight
	if l == nil {
		l = &metadataLookUp{done: make(chan struct{})}
		i.inflight = l
		// The look-up presents the caller's certificate, but goes on when the
		// caller gives up.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), metadataTimeout)
		go func() {
			defer cancel()
			i.run(ctx, l, lookUp, failed)
		}()
	}
	i.mu.Unlock()

	if known != nil {
		if !doubtful {
			return known, nil
		}
		patience := metadataPatience
		if deadline, ok := ctx.Deadline(); ok { // the token request needs time, too
			patience = min(patience, time.Until(deadline)/2)
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, patience)
		defer cancel()
	}
	select {
	case <-l.done:
		if l.err != nil && known != nil {
			return known, nil
		}
		return l.m, l.err
	case <-ctx.Done():
		if known != nil {
			return known, nil
		}
		return nil, ctx.Err()
	}
}

// run is the goroutine of one look-up. The look-up's timeout ends it.
func (i *issuerMetadata) run(ctx context.Context, l *metadataLookUp, lookUp func(context.Context) (*metadata, error), failed func(error)) {
	l.err = safely(func() (err error) {
		l.m, err = lookUp(ctx)
		return err
	})
	if i.finish(l) {
		_ = safely(func() error {
			failed(l.err)
			return nil
		})
	}
}

// finish publishes the result of a look-up. It reports whether that failed and older
// metadata is used instead.
func (i *issuerMetadata) finish(l *metadataLookUp) (older bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.inflight, i.doubtful, i.tried, i.err = nil, false, time.Now(), l.err
	older = l.err != nil && i.current != nil
	switch {
	case l.err == nil:
		i.current, i.until = l.m, time.Now().Add(metadataLifetime)
	case older:
		i.until = time.Now().Add(metadataRetry)
	}
	close(l.done)
	return older
}

// known returns the metadata that was found last; nil if there is none.
func (i *issuerMetadata) known() *metadata {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.current
}

// isFromHere reports whether the metadata that is known was published on this machine.
func (i *issuerMetadata) isFromHere() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.current != nil && i.current.fromHere
}

// expire makes the next token request look the metadata up again, unless the
// last look-up has just ended.
func (i *issuerMetadata) expire() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.doubtful = i.doubtful || time.Since(i.tried) >= metadataPause
}
