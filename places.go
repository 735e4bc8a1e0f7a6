// What is known about the upstreams that a token is sent to, by their address.

package outboundauth

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

const (
	// maxPlaces is how many places a source has at most. Dynamic upstreams may
	// have any number of addresses, and requests must not make any number of
	// places.
	maxPlaces = 1024

	// announceAfterRefusal is how long large bodies are announced to an upstream
	// after it has refused a token. If one token was revoked, others may be
	// revoked, too.
	announceAfterRefusal = 30 * time.Second

	// quietAfterSilence is how long an upstream gets no announcement after it
	// has shown that it does not want one. Each announcement would make the
	// caller wait for replay.MaxPause.
	quietAfterSilence = 5 * time.Minute
)

// dialAddress is the address that a connection is made to, as in
// reverseproxy.DialInfo. The URL of a request does not say it: Caddy rewrites
// the URL for the PROXY protocol.
type dialAddress struct{ network, address string }

// String returns the address as the config has it. TCP needs no name there.
func (a dialAddress) String() string {
	if a.network == "tcp" {
		return a.address
	}
	return a.network + "/" + a.address
}

// canonical returns the address in the form in which two that name one host and port are
// equal. The answer of a resolver chooses among the others: names have no case, an SRV
// record ends them with a dot, and ::1 can be written at length.
func (a dialAddress) canonical() dialAddress {
	host, port, err := net.SplitHostPort(a.address)
	if err != nil { // a socket
		return a
	}
	return dialAddress{a.network, net.JoinHostPort(canonicalHost(host), port)}
}

// canonicalHost is canonical for a host.
func canonicalHost(host string) string {
	if addr, err := netip.ParseAddr(host); err == nil {
		return addr.Unmap().String()
	}
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

// dialAddressOf returns the address that a request is sent to. ctx is the
// context of the request.
func dialAddressOf(ctx context.Context) dialAddress {
	dial, _ := reverseproxy.GetDialInfo(ctx)
	return dialAddress{dial.Network, dial.Address}
}

// places is what a source knows about the upstreams, by address. An upstream
// gets a place when it refuses a token, or does not want an announcement. Most
// upstreams never do so. The zero places is empty.
type places struct {
	mu        sync.Mutex // guards all fields below
	byAddress map[dialAddress]*place
}

// A place is what is known about one address.
type place struct {
	used       time.Time // when somebody last read or wrote this place
	refusal    time.Time // when the upstream last refused a token
	quietUntil time.Time // the upstream gets no announcement before this
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

// wantsAnnouncement reports whether a large body has to be announced to an
// upstream. It has to be if always is set, or if the upstream has just refused a
// token. But an upstream that does not want announcements gets none.
func (p *places) wantsAnnouncement(address dialAddress, always bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.byAddress[address] == nil {
		return always
	}
	at := p.at(address)
	return !at.used.Before(at.quietUntil) && (always || at.used.Sub(at.refusal) < announceAfterRefusal)
}

// at returns the place of an address. If the address has no place, at makes one.
// If there are too many places then, at drops the one that was not used for the
// longest time. mu is held.
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

// dropOldest makes room for one more place. It may look at all places, because
// it runs only when a place is made, and that has cost a whole request.
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
