package outboundauth

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// simulatedPool is what sources, newClient and client.release are to a source.
type simulatedPool struct {
	pool  *caddy.UsagePool
	count int // of all users so far

	mu      sync.Mutex // guards the fields below, for callers
	source  *tokenSource
	users   []*simulatedUser
	sources []sourceSince // all so far
}

type sourceSince struct {
	from   time.Duration
	source *tokenSource
}

// current returns the source, or nil if no config uses it: nothing asks for the
// token of an unloaded config.
func (p *simulatedPool) current() *tokenSource {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.users) == 0 {
		return nil
	}
	return p.source
}

func (p *simulatedPool) attach(u *simulatedUser) {
	if p.pool == nil {
		p.pool = caddy.NewUsagePool()
	}
	source, _, err := p.pool.LoadOrNew("key", func() (caddy.Destructor, error) { return newTokenSource(), nil })
	if err != nil {
		panic(err)
	}
	s := source.(*tokenSource)
	s.attach(u, u.life)
	s.begin(u)
	p.mu.Lock()
	defer p.mu.Unlock()
	if s != p.source {
		p.sources = append(p.sources, sourceSince{u.now(), s})
	}
	p.source, p.users = s, append(p.users, u)
}

func (p *simulatedPool) detach(u *simulatedUser) {
	p.mu.Lock()
	p.users = slices.DeleteFunc(p.users, func(other *simulatedUser) bool { return other == u })
	p.mu.Unlock()
	p.source.detach(u, func() { _, _ = p.pool.Delete("key") })
}

// leftover says what a source without users still has.
func (p *simulatedPool) leftover() (found []string) {
	p.source.mu.Lock()
	defer p.source.mu.Unlock()
	for _, timer := range []*time.Timer{p.source.timer, p.source.ender} {
		if timer != nil && timer.Stop() {
			found = append(found, "a timer")
		}
	}
	if p.source.inflight != nil {
		found = append(found, "a fetch")
	}
	if _, ok := p.pool.References("key"); ok {
		found = append(found, "the source")
	}
	return found
}

// untidy says what is left of refusals, and whether there are too many places.
func (p *simulatedPool) untidy() (found []string) {
	for _, s := range p.sources {
		if s.source.places.none() {
			continue
		}
		all := *s.source.places.byAddress.Load()
		if n := len(all); n > promisedPlaces {
			found = append(found, fmt.Sprintf("%d places, want %d at most", n, promisedPlaces))
		}
		for address, at := range all {
			if n := at.Waiting(); n > 0 {
				found = append(found, fmt.Sprintf("%d refusals are open at %v", n, address))
			}
		}
	}
	return found
}
