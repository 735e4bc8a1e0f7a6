// A token, and the times that decide how it is used.

package outboundauth

import (
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
)

// token is an access token, with the times that decide how it is used. A token
// never changes, so it may be read without a lock.
type token struct {
	value string

	// After refreshAt, the token is replaced in the background. After usableTo,
	// it is used only if no other can be had: the rest of its life is a reserve.
	refreshAt, usableTo, expires time.Time

	obtained time.Time
	binding  *tls.Certificate // see grant
	key      *dpop.Key        // see grant
	grant    grant            // of which the token was made
}

// is reports whether two tokens are the same one, which a server may repeat. Either may
// be nil.
func (t *token) is(other *token) bool {
	return t != nil && other != nil && t.value == other.value
}

// inReserve reports whether the token is in the last part of its life. If an upstream
// refuses it then, it has probably expired by the upstream's clock.
func (t *token) inReserve(now time.Time) bool { return !now.Before(t.usableTo) }

// Format keeps the token out of everything that prints values.
func (t *token) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("token")) }

// grant is what an authorization server issued (RFC 6749 §5.1).
type grant struct {
	accessToken string
	lifetime    time.Duration // 0 if the server named no lifetime
	odd         string        // why nobody can tell which lifetime the server named
	scope       string        // what the server says; "" if it granted what was asked for

	taken bool // another instance has asked for it

	// When the token was asked for. Its life did not begin before that.
	issued time.Time
	took   time.Duration // the time from issued until the answer was read

	// The certificate that the token is bound to (RFC 8705 §3), or nil.
	binding *tls.Certificate

	// The key that the token is bound to (RFC 9449), or nil.
	key *dpop.Key
}

// repeats returns the grant with the lifetime that its token has, if the server repeats
// the current token. The end that the server has named holds: the life of a token
// begins once. Only if the token has outlived that end, a new lifetime counts. The token
// is still bound to what it was bound to when it was granted first.
func (g grant) repeats(current *token) (grant, error) {
	if current == nil || g.accessToken != current.value {
		return g, nil
	}
	g.binding, g.key = current.binding, current.key
	if current.grant.lifetime == 0 {
		return g, nil
	}
	left := current.expires.Sub(g.issued.Round(0))
	switch {
	case left <= 0 && g.lifetime == 0:
		return g, &settingError{wrong: "granted, but the server repeats a token that has expired, and names no new lifetime (expires_in)", todo: "ask who runs it"}
	case left > 0 && (g.lifetime == 0 || left < g.lifetime):
		g.lifetime = left
	}
	return g, nil
}

// lifecycle is what the settings say about a token's life: how early the token
// is replaced, how long it lasts if the server does not say so, and how long a
// fetch may take.
type lifecycle struct {
	refreshBefore   time.Duration // 0 means 26 % of the lifetime
	orByDefault     bool          // 26 % of the lifetime, if that is longer than refreshBefore
	defaultLifetime time.Duration
	maxLifetime     time.Duration // 0 means no limit
	fetchTimeout    time.Duration
	shared          bool // with other instances
}

// strictest returns the settings that suit both who share a token.
func (l lifecycle) strictest(other lifecycle) lifecycle {
	return lifecycle{
		refreshBefore:   max(l.refreshBefore, other.refreshBefore),
		orByDefault:     l.orByDefault || other.orByDefault || (l.refreshBefore == 0) != (other.refreshBefore == 0),
		defaultLifetime: min(l.defaultLifetime, other.defaultLifetime),
		maxLifetime:     shorter(l.maxLifetime, other.maxLifetime),
		fetchTimeout:    max(l.fetchTimeout, other.fetchTimeout),
		shared:          l.shared || other.shared,
	}
}

// A shorter lifetime counts as minLifetime, so that no server is asked without a
// pause. A longer one counts as maxLifetime, so that no sum of instants overflows.
const (
	minLifetime = 1 * time.Second
	maxLifetime = 10 * 365 * 24 * time.Hour
)

// shorter returns the shorter limit; 0 is no limit.
func shorter(a, b time.Duration) time.Duration {
	if a == 0 || b == 0 {
		return max(a, b)
	}
	return min(a, b)
}

// The parts of a token's life, as divisors of its length or in percent.
const (
	// The reserve at the end is a tenth of the life, maxReserve at most. A
	// request needs time on its way, and clocks may differ.
	reserveDivisor = 10
	maxReserve     = 10 * time.Second

	// A token is replaced in the last 26 % of its life. These are enough for an
	// outage that lasts a quarter of the life, and for one more try after the
	// outage.
	refreshPercent = 26

	// The replacement starts up to 4 % of the life earlier, at random. So
	// gateways that started together do not all renew together.
	jitterDivisor = 25

	// Of those who share a token, the first one replaces it for all. It needs time for that
	// before the next one wakes up: with 500 instances, there is one in each 0.015 % of the
	// life.
	sharedJitterDivisor = 16
)

// newToken makes a token of a grant, which may repeat the current token; nil if there
// is none.
func (l lifecycle) newToken(g grant, current *token) (*token, error) {
	now := time.Now()
	g, err := g.repeats(current)
	if err != nil {
		return nil, err
	}
	t := l.token(g, now)
	if t.inReserve(now) {
		life, age := t.expires.Sub(g.issued.Round(0)), now.Sub(g.issued)
		todo := "have the server issue tokens that live longer"
		if life == l.maxLifetime {
			todo = "raise max_lifetime"
		}
		return nil, &settingError{wrong: fmt.Sprintf("granted, but the token lives for %v and took %v to get: nothing is left of it", life, age.Round(time.Millisecond)), todo: todo}
	}
	return t, nil
}

// token returns the token of a grant. It counts the token's life from when the token
// was asked for. The real life began later, so the token is never used for too long.
func (l lifecycle) token(g grant, obtained time.Time) *token {
	life := g.lifetime
	if life == 0 {
		life = l.defaultLifetime
	}
	if l.maxLifetime > 0 {
		life = min(life, l.maxLifetime)
	}
	if g.binding != nil { // nobody accepts the token without the certificate
		if left := g.binding.Leaf.NotAfter.Sub(g.issued); left > 0 {
			life = min(life, left)
		}
	}
	usable := life - min(maxReserve, life/reserveDivisor)

	before := l.refreshBefore
	if before == 0 || l.orByDefault {
		before = max(before, life/100*refreshPercent)
	}
	// The server may take as long next time. Start early enough for twice that
	// time, so that the new token is there before the old one ends.
	refresh := min(life-before, usable-2*g.took)
	// Never replace a token in the first half of its life.
	spread := life / jitterDivisor
	if l.shared {
		spread = life / sharedJitterDivisor
	}
	refresh = max(refresh-jitter(spread+1), life/2)

	// Count by the wall clock: tokens age while a machine is suspended, but the
	// monotonic clock stands still.
	issued := g.issued.Round(0)
	return &token{
		value:     g.accessToken,
		refreshAt: issued.Add(refresh),
		usableTo:  issued.Add(usable),
		expires:   issued.Add(life),

		obtained: obtained,
		binding:  g.binding,
		key:      g.key,
		grant:    g,
	}
}

// jitter returns a time at random that is shorter than limit. A test that has to happen
// the same way again has its own.
var jitter = rand.N[time.Duration]
