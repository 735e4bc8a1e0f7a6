// What an authorization server publishes about itself: shared by its clients, used for a day.

package outboundauth

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
)

const (
	// How long an authorization server's metadata is used before it is looked
	// up again, and how long if that fails.
	metadataLifetime = 24 * time.Hour
	metadataRetry    = 5 * time.Minute

	// How long one look-up may take, and how long it may hold up a token
	// request if there is metadata already.
	metadataTimeout  = 10 * time.Second
	metadataPatience = 2 * time.Second

	// How long a look-up that failed answers for the next, which many clients
	// may want.
	metadataErrorLifetime = 100 * time.Millisecond

	// A token endpoint that fails is looked up again no sooner than this.
	metadataPause = 10 * time.Second
)

// metadata is what an authorization server publishes about itself (RFC 8414
// §2, RFC 8705 §5), as far as it concerns a token request. Immutable.
type metadata struct {
	issuer            string
	tokenEndpoint     string
	mtlsTokenEndpoint string // for those who present a certificate; may be empty

	// token_endpoint_auth_methods_supported and
	// token_endpoint_auth_signing_alg_values_supported; may be empty.
	authMethods, signingAlgs []string
}

// parseMetadata reads a document. Whether what it says will do is for others
// to judge; members that only a warning needs may be anything.
func parseMetadata(body []byte) (*metadata, error) {
	if len(body) > maxAnswer {
		return nil, errors.New("the metadata is too large")
	}
	document, err := parseMembers(body) // by name, not in any case
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
	return m, nil
}

// issuers shares the metadata among all clients that look it up in the same
// way, by issuerKey. Like the tokens, it outlives a reload: an issuer that is
// down then must not make a working token endpoint unknown.
var issuers = caddy.NewUsagePool()

type issuerKey [sha256.Size]byte

// issuerMetadata caches the metadata of one issuer. One look-up at a time
// serves all who wait; none of them governs it.
type issuerMetadata struct {
	key issuerKey

	mu       sync.Mutex // guards all below; never held over I/O
	current  *metadata
	until    time.Time // current is not looked up again before
	doubtful bool      // current, by a token request that failed
	tried    time.Time // the last look-up
	err      error     // of it
	inflight *metadataLookUp
}

// metadataLookUp is one look-up in flight. m and err may be read once done is closed.
type metadataLookUp struct {
	done chan struct{}
	m    *metadata
	err  error
}

// acquireIssuer returns the metadata that clients with these credentials
// share. It has to be released.
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

// Destruct implements caddy.Destructor. A look-up that is under way ends by
// its timeout.
func (i *issuerMetadata) Destruct() error { return nil }

// get returns the metadata. It waits for a look-up if there is none, for a
// short time if it is doubtful, and not at all if it is only old.
func (i *issuerMetadata) get(ctx context.Context, lookUp func(context.Context) (*metadata, error), logger *zap.Logger) (*metadata, error) {
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
			i.run(ctx, l, lookUp, logger)
		}()
	}
	i.mu.Unlock()

	if known != nil {
		if !doubtful {
			return known, nil
		}
		patience := metadataPatience
		if deadline, ok := ctx.Deadline(); ok { // leave time for the token
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

// run is the goroutine of one look-up, which ends by its timeout.
func (i *issuerMetadata) run(ctx context.Context, l *metadataLookUp, lookUp func(context.Context) (*metadata, error), logger *zap.Logger) {
	l.err = safely(func() (err error) {
		l.m, err = lookUp(ctx)
		return err
	})
	i.mu.Lock()
	defer i.mu.Unlock()
	i.inflight, i.doubtful, i.tried, i.err = nil, false, time.Now(), l.err
	switch {
	case l.err == nil:
		i.current, i.until = l.m, time.Now().Add(metadataLifetime)
	case i.current != nil:
		i.until = time.Now().Add(metadataRetry)
		logger.Warn("looking up the token endpoint failed; the one known before is used", zap.Error(l.err))
	}
	close(l.done)
}

// expire makes the next token request look the metadata up again, unless that
// has just been tried.
func (i *issuerMetadata) expire() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.doubtful = i.doubtful || time.Since(i.tried) >= metadataPause
}
