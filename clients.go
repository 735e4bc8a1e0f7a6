// The OAuth clients of one transport: they are opened at load, and closed at its end.

package outboundauth

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"sync"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/shelf"
)

// clients opens the OAuth clients of one transport, and everything that they
// need. close closes all of this together.
type clients struct {
	logger    *zap.Logger
	events    *emitter
	plaintext bool // unencrypted connections to token endpoints are allowed

	acquired    []*client                                      // close releases them
	provisioned []caddy.CleanerUpper                           // close cleans them up
	shelves     []any                                          // keys of shelves; close gives them back
	storages    map[string]certmagic.Storage                   // of share_tokens, by their config
	transports  map[*reverseproxy.HTTPTransport]tokenTransport // clients that inherit the same token_transport share one
}

// open opens the client for complete credentials. keys are the client keys of its requests, if
// they have any.
func (cs *clients) open(ctx caddy.Context, c Credentials, keys []string) (*client, error) {
	expanded, err := c.expand(caddy.NewReplacer())
	if err != nil {
		return nil, err
	}
	transport, err := cs.tokenTransport(ctx, &expanded)
	if err != nil {
		return nil, err
	}
	e, err := newEndpoint(expanded, c.TokenURL, transport, cs.plaintext, cs.logger, cs.events)
	if err != nil {
		return nil, err
	}
	e.keys = keys
	if expanded.shares() {
		if e.sharing, err = cs.share(ctx, &expanded, transport, e); err != nil {
			return nil, errors.Join(err, e.release())
		}
	}
	cl, err := newClient(e, transport.config)
	if err != nil {
		return nil, errors.Join(err, e.release())
	}
	cs.acquired = append(cs.acquired, cl)
	return cl, nil
}

// close closes everything that was opened. It may be called again.
func (cs *clients) close() error {
	var err error
	for _, cl := range cs.acquired {
		err = errors.Join(err, cl.release())
	}
	for _, transport := range cs.provisioned {
		err = errors.Join(err, transport.Cleanup())
	}
	for _, storage := range cs.shelves {
		_, gone := shelves.Delete(storage)
		err = errors.Join(err, gone)
	}
	cs.acquired, cs.provisioned, cs.shelves, cs.storages, cs.transports = nil, nil, nil, nil, nil
	return err
}

// closeToo makes close clean up c, which belongs to one of the clients.
func (cs *clients) closeToo(c caddy.CleanerUpper) { cs.provisioned = append(cs.provisioned, c) }

// tokenTransport returns the transport to the token endpoint of c.
func (cs *clients) tokenTransport(ctx caddy.Context, c *Credentials) (tokenTransport, error) {
	if c.ClientCertificate != nil { // other clients must not use this transport
		return cs.provision(ctx, c)
	}
	if transport, ok := cs.transports[c.TokenTransport]; ok {
		return transport, nil
	}
	transport, err := cs.provision(ctx, c)
	if err != nil {
		return tokenTransport{}, err
	}
	if cs.transports == nil {
		cs.transports = make(map[*reverseproxy.HTTPTransport]tokenTransport)
	}
	cs.transports[c.TokenTransport] = transport
	return transport, nil
}

// provision provisions the token_transport of c, or else the default transport.
func (cs *clients) provision(ctx caddy.Context, c *Credentials) (tokenTransport, error) {
	h := new(reverseproxy.HTTPTransport)
	config, err := json.Marshal(cmp.Or(c.TokenTransport, h))
	if err != nil {
		return tokenTransport{}, fmt.Errorf("token_transport: %w", err)
	}
	// h is a copy: clients that inherit the setting may need a transport each.
	if err := json.Unmarshal(config, h); err != nil {
		return tokenTransport{}, fmt.Errorf("token_transport: %w", err)
	}
	// Before Provision, which adds its defaults to h.
	if config, err = json.Marshal(identity(*h)); err != nil {
		return tokenTransport{}, fmt.Errorf("token_transport: %w", err)
	}
	server := sync.OnceValues(func() (json.RawMessage, error) { return contentIdentity(config) })
	if len(h.Versions) == 0 {
		// Each token request ends its connection. Over HTTP/2, requests share a
		// connection, so one request would end the connection of others.
		h.Versions = []string{"1.1"}
	}
	cs.closeToo(h)
	proxied := usesProxy(h) // asked now: Provision clears the setting
	if err := h.Provision(ctx); err != nil {
		return tokenTransport{}, fmt.Errorf("token_transport: %w", err)
	}
	// A dial may outlive its request. Then net/http would keep the connection,
	// and the next request would go out with an old certificate.
	h.Transport.DisableKeepAlives = true
	watchDestinations(h.Transport)
	if c.ClientCertificate != nil {
		if err := presentCertificates(h); err != nil {
			return tokenTransport{}, fmt.Errorf("client_certificate: %w", err)
		}
	}
	return tokenTransport{h, config, server, proxied}, nil
}

// shelves holds the storages of all configs that are in use. All that use one storage know
// together whether it works.
var shelves = caddy.NewUsagePool()

// share returns how a client shares its token.
func (cs *clients) share(ctx caddy.Context, c *Credentials, transport tokenTransport, e *endpoint) (*sharing, error) {
	server, err := transport.server()
	if err = cmp.Or(err, c.checkSharedSecret()); err != nil {
		return nil, err
	}
	storage, err := cs.storage(ctx, *c.ShareTokens)
	if err != nil {
		return nil, fmt.Errorf("share_tokens: %w", err)
	}
	used, err := cs.shelf(storage)
	if err != nil {
		return nil, err
	}
	return &sharing{shelf: used, server: server, count: e.metrics.sharing(), logger: cs.logger.With(e.logFields()...)}, nil
}

// storage returns the storage of share_tokens. Clients with the same one share it. s is a copy:
// LoadModule takes the JSON out of it.
func (cs *clients) storage(ctx caddy.Context, s ShareTokens) (certmagic.Storage, error) {
	if s.StorageRaw == nil {
		return ctx.Storage(), nil
	}
	config := string(s.StorageRaw)
	if storage, ok := cs.storages[config]; ok {
		return storage, nil
	}
	module, err := ctx.LoadModule(&s, "StorageRaw")
	if err != nil {
		return nil, err
	}
	storage, err := module.(caddy.StorageConverter).CertMagicStorage()
	if err != nil {
		return nil, err
	}
	if cs.storages == nil {
		cs.storages = make(map[string]certmagic.Storage)
	}
	cs.storages[config] = storage
	return storage, nil
}

// passwordInURL finds what an error of a storage may repeat of its config.
var passwordInURL = regexp.MustCompile(`://[^/\s@]*@`)

// shelf returns the shelf of a storage. close gives it back.
func (cs *clients) shelf(storage certmagic.Storage) (*shelf.Shelf, error) {
	logger := cs.logger
	begin := func() *shelf.Shelf {
		text := func(err error) zap.Field {
			return zap.String("error", passwordInURL.ReplaceAllString(err.Error(), "://…@"))
		}
		return shelf.New(storage, shelf.News{
			Failed: func(err error) {
				logger.Warn("the storage of share_tokens fails: until it works again, each instance has tokens of its own", text(err))
			},
			Back: func() { logger.Info("the storage of share_tokens works again") },
			Lockless: func(err error) {
				logger.Warn("the storage of share_tokens gives no locks: for five minutes, instances that need a token at the same time all ask for one", text(err))
			},
		})
	}
	if !reflect.ValueOf(storage).Comparable() {
		return begin(), nil
	}
	used, _, err := shelves.LoadOrNew(storage, func() (caddy.Destructor, error) { return usedShelf{begin()}, nil })
	if err != nil {
		return nil, err
	}
	cs.shelves = append(cs.shelves, storage)
	return used.(usedShelf).Shelf, nil
}

// usedShelf is a shelf in the pool. There is nothing to end: each operation ends by itself.
type usedShelf struct{ *shelf.Shelf }

// Destruct implements caddy.Destructor.
func (usedShelf) Destruct() error { return nil }
