package outboundauth

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
)

// sources shares the token sources among all configs that are in use, by
// sourceKey: equal clients share one token, and a reload takes over the
// tokens of the config that it replaces.
var sources = caddy.NewUsagePool()

// sourceKey is a digest of everything that shapes a token request and the
// life of its token. A digest, because a secret that stands in the config
// itself is part of it, and caddy.UsagePool may print its keys.
type sourceKey [sha256.Size]byte

// A client is Credentials at work: the source of the token, and the headers
// as they are sent.
type client struct {
	key      sourceKey
	source   *tokenSource
	endpoint *endpoint

	spare bool // no upstream needs it: all have credentials of their own

	bearerField  string
	bearerPrefix string // with the space, if there is a scheme
	identity     []headerTemplate

	retryOn     []int // statuses
	replayLimit int   // bytes
	renewals    renewals

	expectsNothing atomic.Bool // the upstream has failed an expectation

	// The header of the latest token, made once for all requests. Its values
	// are shared by them and never written to.
	bearer atomic.Pointer[bearer]
}

type bearer struct {
	of     *token
	values []string
}

// newClient makes a client of resolved and complete credentials, whose
// token_url is u. tokenTransport is the provisioned c.TokenTransport, described
// by transportConfig. The client has to be released.
func newClient(c Credentials, u *url.URL, tokenTransport http.RoundTripper, transportConfig []byte, logger *zap.Logger) (*client, error) {
	life := lifecycle{
		refreshBefore:   time.Duration(c.RefreshBefore),
		defaultLifetime: cmp.Or(time.Duration(c.DefaultLifetime), defaultTokenLifetime),
		fetchTimeout:    cmp.Or(time.Duration(c.TokenTimeout), defaultTokenTimeout),
	}
	e := &endpoint{
		url:       u,
		method:    cmp.Or(c.AuthMethod, authBasic),
		id:        c.ClientID,
		secret:    c.ClientSecret,
		scopes:    c.Scopes,
		audience:  c.Audience,
		params:    c.Params,
		headers:   c.TokenRequestHeaders,
		transport: tokenTransport,
		logger:    logger,
	}
	// encoding/json sorts the maps, and keeps neighbouring values apart.
	shape, err := json.Marshal([]any{
		u.String(), e.method, e.id, e.secret, e.scopes, e.audience, e.params, e.headers,
		json.RawMessage(transportConfig), life.refreshBefore, life.defaultLifetime, life.fetchTimeout,
	})
	if err != nil {
		return nil, fmt.Errorf("token_transport: %w", err)
	}
	cl := &client{key: sha256.Sum256(shape), endpoint: e}

	field, scheme := c.BearerHeader.resolve()
	cl.bearerField = http.CanonicalHeaderKey(field)
	if scheme != "" {
		cl.bearerPrefix = scheme + " "
	}
	cl.retryOn = c.RetryOn
	if len(c.RetryOn) == 0 {
		cl.retryOn = []int{http.StatusUnauthorized}
	} else if c.RetryOn[0] == retryOff {
		cl.retryOn = nil
	}
	cl.replayLimit = int(max(0, cmp.Or(c.ReplayBody, defaultReplayBody)))
	if c.Tenant != nil {
		cl.identity = append(cl.identity, newHeaderTemplate(c.Tenant.field(), c.Tenant.Value))
	}
	for _, field := range sortedKeys(c.Headers) {
		cl.identity = append(cl.identity, newHeaderTemplate(field, c.Headers[field]))
	}

	source, _, err := sources.LoadOrNew(cl.key, func() (caddy.Destructor, error) {
		return newTokenSource(life), nil
	})
	if err != nil {
		return nil, err
	}
	cl.source = source.(*tokenSource)
	cl.source.attach(e)
	return cl, nil
}

// release gives the client's share of the source back. The client stays
// usable for the requests that are still on their way.
func (cl *client) release() error {
	cl.source.detach(cl.endpoint)
	_, err := sources.Delete(cl.key)
	return err
}

// header sets the bearer and identity headers for the request that ctx
// belongs to. t may be nil: then only the identity is sent.
func (cl *client) header(ctx context.Context, out http.Header, t *token) error {
	for i := range cl.identity {
		if err := cl.identity[i].set(ctx, out); err != nil {
			return err
		}
	}
	if t == nil {
		return nil
	}
	b := cl.bearer.Load()
	if b == nil || b.of != t {
		b = &bearer{of: t, values: []string{cl.bearerPrefix + t.value}}
		cl.bearer.Store(b)
	}
	out[cl.bearerField] = b.values
	return nil
}

// fields adds the names of all headers that the client sends to s.
func (cl *client) fields(s *fieldSet) {
	s.add(cl.bearerField)
	for i := range cl.identity {
		s.add(cl.identity[i].field)
	}
}
