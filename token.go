// A token, and the instants that govern its use.

package outboundauth

import (
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"time"
)

// token is an access token and the instants that govern its use. Immutable,
// so it may be read without a lock; compared by address.
type token struct {
	value string

	// Past refreshAt the token is replaced in the background, past usableTo
	// it is not used any more: both leave the rest of its life as a reserve.
	refreshAt, usableTo, expires time.Time

	obtained time.Time
	binding  *tls.Certificate // see grant
}

// Format keeps the token out of everything that prints values.
func (t *token) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("token")) }

// grant is what an authorization server issued (RFC 6749 §5.1).
type grant struct {
	accessToken string
	lifetime    time.Duration // 0: the server named none
	scope       string        // "": as asked for

	// When the life of the token began, at the earliest: when it was asked for.
	issued time.Time
	took   time.Duration // from issued until the answer was read

	// What the token is bound to (RFC 8705 §3), or nil.
	binding *tls.Certificate
}

// lifecycle is what the settings say of a token's life: how early it is replaced,
// how long it lasts if the server doesn't say, and how long a fetch may take.
type lifecycle struct {
	refreshBefore   time.Duration // 0: the last 26 % of the lifetime
	defaultLifetime time.Duration
	fetchTimeout    time.Duration
}

// The parts of a token's life, as divisors of it or in percent.
const (
	// The reserve at its end is a tenth, maxReserve at most: the time that a
	// request may need on its way, or clocks may differ.
	reserveDivisor = 10
	maxReserve     = 10 * time.Second

	// A token is replaced in the last 26 % of its life: they outlast an outage of
	// a quarter of it, and a try after.
	refreshPercent = 26

	// Up to 4 % earlier, at random, so that a fleet that started together does
	// not renew together.
	jitterDivisor = 25
)

// newToken computes the instants of a token. Its life began some time after it
// was asked for; counting from there, it never lasts too long.
func (l lifecycle) newToken(g grant) (*token, error) {
	now := time.Now()
	life := g.lifetime
	if life == 0 {
		life = l.defaultLifetime
	}
	if g.binding != nil { // nobody accepts the token without it
		if left := g.binding.Leaf.NotAfter.Sub(g.issued); left > 0 {
			life = min(life, left)
		}
	}
	usable := life - min(maxReserve, life/reserveDivisor)
	if age := now.Sub(g.issued); age >= usable {
		return nil, fmt.Errorf("the token lives for %v, but took %v to get: nothing is left of it", life, age.Round(time.Millisecond))
	}

	refresh := life - life/100*refreshPercent
	if l.refreshBefore > 0 {
		refresh = life - l.refreshBefore
	}
	// A server that was slow this time is given twice that to answer the
	// next, so that the new token is there before the old one ends.
	refresh = min(refresh, usable-2*g.took)
	// The first half of the life is never given away.
	refresh = max(refresh-rand.N(life/jitterDivisor+1), life/2)

	// By the wall clock: the monotonic one stands still while a machine is
	// suspended, and tokens age.
	issued := g.issued.Round(0)
	return &token{
		value:     g.accessToken,
		refreshAt: issued.Add(refresh),
		usableTo:  issued.Add(usable),
		expires:   issued.Add(life),

		obtained: now,
		binding:  g.binding,
	}, nil
}
