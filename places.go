// What is known about the upstreams that a token is sent to, by their address.

package outboundauth

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/verdict"
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

// places is what a source knows about the upstreams that its tokens are sent to, by
// address. An upstream gets a place when it refuses a token, or does not want an
// announcement. Most upstreams never do so.
type places struct {
	// byAddress is never changed, but replaced by another map: most requests only find
	// out that their upstream has no place, and take no lock for that.
	byAddress atomic.Pointer[map[dialAddress]*place]

	budget verdict.Budget // guarded by the source's mu, as all places are
}

// A place is what is known about one address. All fields are guarded by the source's mu.
type place struct {
	verdict.Place

	used       time.Time // when somebody last wrote to this place
	doubted    string    // the last token that is replaced because of this upstream
	doubtedAt  time.Time
	quietUntil time.Time // the upstream gets no announcement before this
	told       time.Time // when operators were last told of refusals that are not about the token
	toldProof  time.Time // when operators were last told of proofs that were refused
	disproved  int       // how many callers have got such a refusal, since a proof was accepted
}

// find returns the place of an address, or nil. mu need not be held.
func (p *places) find(address dialAddress) *place {
	all := p.byAddress.Load()
	if all == nil {
		return nil
	}
	return (*all)[address]
}

// none reports whether there are no places at all. mu need not be held.
func (p *places) none() bool { return p.byAddress.Load() == nil }

// at returns the place of an address. If the address has no place, at makes one. If there
// are too many places then, at drops the one that was not used for the longest time. It
// may look at all places, because a place is made only when a whole request was in vain.
// mu is held.
func (p *places) at(address dialAddress) *place {
	now := time.Now()
	if at := p.find(address); at != nil {
		at.used = now
		return at
	}
	all := make(map[dialAddress]*place)
	if before := p.byAddress.Load(); before != nil {
		maps.Copy(all, *before)
	}
	if len(all) >= maxPlaces {
		delete(all, oldest(all))
	}
	at := &place{used: now}
	all[address] = at
	p.byAddress.Store(&all)
	return at
}

func oldest(all map[dialAddress]*place) (found dialAddress) {
	var used time.Time
	for address, at := range all {
		if used.IsZero() || at.used.Before(used) {
			found, used = address, at.used
		}
	}
	return found
}

// doubt notes that a token is replaced because it was probably refused here. Meanwhile,
// nothing is sent here that can't be sent again. mu is held.
func (at *place) doubt(t *token, now time.Time) { at.doubted, at.doubtedAt = t.value, now }

// A refusal is an answer by which an upstream has refused a token. All that changes is
// guarded by the source's mu.
type refusal struct {
	verdict.Refusal
	of *token
	at *place // nil until the source knows of the refusal

	// What became of it.
	isPath bool // the refusal was about the path, as far as anybody could see
	news   bool // operators are to be told of that
}

// What the last refusal of an upstream was about.
const (
	verdictToken = "token" // the upstream does not accept the token
	verdictPath  = "path"  // the upstream refuses the request, whatever the token
)

// upstreamStatus is what one upstream has made of a source's tokens.
type upstreamStatus struct {
	address  string    // as in the config, see dialAddress.String
	verdict  string    // verdictToken or verdictPath: what its last refusal was about
	refusing bool      // it has accepted no request since it refused the token
	refused  time.Time // when it last refused one
}

// statuses returns the statuses of the upstreams that have refused a token. mu is held.
func (p *places) statuses() (all []upstreamStatus) {
	if p.none() {
		return nil
	}
	for address, at := range *p.byAddress.Load() {
		v, refusing, refused := at.Status()
		if v == verdict.Unknown {
			continue // it only wants no announcements, for example
		}
		name := verdictToken
		if v == verdict.Path {
			name = verdictPath
		}
		all = append(all, upstreamStatus{address.String(), name, refusing, refused})
	}
	return all
}
