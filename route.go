// Where a request leads: with which credentials, or without any; and who chooses them.

package outboundauth

import (
	"context"
	"iter"

	"github.com/caddyserver/caddy/v2"
)

// A route says how requests to an upstream address are sent: with a block of
// credentials, or without any. The zero route belongs to addresses about which
// the config says nothing.
type route struct {
	*block         // nil if off is true, with a choice, and in the zero route
	off    bool    // without a token: proxy as the http transport does, or see choice
	choice *choice // with client_by: each request has its own route
}

// unknown reports whether the config says nothing about the address. No request
// is sent to such an address.
func (r route) unknown() bool { return r == route{} }

// ofChecks returns the block of the health checks, which have no client key; nil if they carry
// no token.
func (r route) ofChecks() *block {
	if r.choice != nil {
		return r.choice.none.block
	}
	return r.block
}

// blocks returns all blocks that the config names.
func (r route) blocks() iter.Seq[*block] {
	return func(yield func(*block) bool) {
		if r.choice == nil {
			if r.block != nil {
				yield(r.block)
			}
			return
		}
		for _, b := range r.choice.blocks {
			if !yield(b) {
				return
			}
		}
	}
}

// A choice gives a request the block of its client key (client_by). It does not change once it is
// in use.
type choice struct {
	placeholder string           // of the key, without braces
	named       map[string]route // by client key; if off, see Transport.sendBare
	none        route            // of requests without a key, likewise; unknown: they are refused

	blocks []*block // all of them, in the order of the config
}

// of returns where a request leads, and its key. ctx is the context of the request. There is no
// way from one key to the block of another: a key is looked up as it is.
func (c *choice) of(ctx context.Context) (r route, key any, err error) {
	if repl, ok := replacerOf(ctx); ok {
		key, _ = repl.Get(c.placeholder)
	}
	text, ok := key.(string)
	if !ok {
		text = caddy.ToString(key)
		key = text
	}
	if text == "" {
		if c.none.unknown() {
			return route{}, nil, errNoKey
		}
		return c.none, key, nil
	}
	if r, ok = c.named[text]; !ok {
		return route{}, nil, errUnknownKey
	}
	return r, key, nil
}
