// What is known of the upstreams that a token is sent to, by their address.

package outboundauth

import (
	"context"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

const (
	// maxPlaces bounds what requests can bring about: dynamic upstreams may have
	// any number of addresses.
	maxPlaces = 1024

	// announceAfterRefusal is how long large bodies are announced to an upstream
	// that has refused a token: where one token was revoked, so may others be.
	announceAfterRefusal = 30 * time.Second

	// quietAfterSilence is how long an upstream that does not want
	// announcements gets none: each would cost the client replay.MaxPause.
	quietAfterSilence = 5 * time.Minute
)

// dialAddress is what a connection is made to, as in reverseproxy.DialInfo.
// The URL of a request does not tell: the PROXY protocol rewrites it.
type dialAddress struct{ network, address string }

// dialAddressOf returns the address that the request which ctx belongs to is sent to.
func dialAddressOf(ctx context.Context) dialAddress {
	dial, _ := reverseproxy.GetDialInfo(ctx)
	return dialAddress{dial.Network, dial.Address}
}

// places is what a source knows of the upstreams, by address. An upstream has a
// place once it has refused a token, or an announcement; most never have one. The
// zero places is empty.
type places struct {
	mu        sync.Mutex // guards all below
	byAddress map[dialAddress]*place
}

// A place is what is known of one address.
type place struct {
	used       time.Time // when somebody last wrote to it or asked for it
	refusal    time.Time // the last of a token
	quietUntil time.Time // no announcement before
}

// refused notes that an upstream has refused a token.
func (p *places) refused(address dialAddress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := p.at(address)
	at.refusal = at.used
}

// unheard notes that an upstream does not want announcements.
func (p *places) unheard(address dialAddress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := p.at(address)
	at.quietUntil = at.used.Add(quietAfterSilence)
}

// wantsAnnouncement reports whether a large body is to be announced to an upstream:
// always, or because it has just refused a token.
func (p *places) wantsAnnouncement(address dialAddress, always bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.byAddress[address] == nil {
		return always
	}
	at := p.at(address)
	return !at.used.Before(at.quietUntil) && (always || at.used.Sub(at.refusal) < announceAfterRefusal)
}

// at returns the place of an address, and makes one if it has none: then the one
// goes that was not used for the longest time. mu is held.
func (p *places) at(address dialAddress) *place {
	now := time.Now()
	at := p.byAddress[address]
	if at == nil {
		if p.byAddress == nil {
			p.byAddress = make(map[dialAddress]*place)
		}
		if len(p.byAddress) >= maxPlaces {
			p.dropOldest()
		}
		at = new(place)
		p.byAddress[address] = at
	}
	at.used = now
	return at
}

// dropOldest makes room for one more. It looks at all: a place is made by a refusal,
// which has cost a request, and only then.
func (p *places) dropOldest() {
	var oldest dialAddress
	var used time.Time
	for address, at := range p.byAddress {
		if used.IsZero() || at.used.Before(used) {
			oldest, used = address, at.used
		}
	}
	delete(p.byAddress, oldest)
}
