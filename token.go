// A token, and the times that decide how it is used.

package outboundauth

import (
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// token is an access token, with the times that decide how it is used. A token
// never changes, so it may be read without a lock. Tokens are compared by
// address.
type token struct {
	value string

	// After refreshAt, the token is replaced in the background. After usableTo,
	// it is not used any more. Both come before expires: the rest of the token's
	// life is a reserve.
	refreshAt, usableTo, expires time.Time

	obtained time.Time
	binding  *tls.Certificate // see grant
}

// Format keeps the token out of everything that prints values.
func (t *token) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("token")) }

// keptOut returns the error of a token request without the token, if the server
// repeats it there. t may be nil.
func (t *token) keptOut(err error) error {
	failure, ok := errors.AsType[*tokenError](err)
	if t == nil || !ok || !(redact.Secrets{t.value}).In(failure.Code+"\n"+failure.Description) {
		return err
	}
	shown := *failure
	shown.Description = "the server's description repeats the token, and is not shown"
	if (redact.Secrets{t.value}).In(failure.Code) {
		shown.Code = codeHTTPStatus
	}
	return &shown
}

// grant is what an authorization server issued (RFC 6749 §5.1).
type grant struct {
	accessToken string
	lifetime    time.Duration // 0 if the server named no lifetime
	scope       string        // what the server says; "" if it granted what was asked for

	// When the token was asked for. Its life did not begin before that.
	issued time.Time
	took   time.Duration // the time from issued until the answer was read

	// The certificate that the token is bound to (RFC 8705 §3), or nil.
	binding *tls.Certificate
}

// lifecycle is what the settings say about a token's life: how early the token
// is replaced, how long it lasts if the server does not say so, and how long a
// fetch may take.
type lifecycle struct {
	refreshBefore   time.Duration // 0 means 26 % of the lifetime
	defaultLifetime time.Duration
	fetchTimeout    time.Duration
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
)

// newToken makes a token of a grant. It counts the token's life from when the
// token was asked for. The real life began later, so the token is never used for
// too long.
func (l lifecycle) newToken(g grant) (*token, error) {
	now := time.Now()
	life := g.lifetime
	if life == 0 {
		life = l.defaultLifetime
	}
	if g.binding != nil { // nobody accepts the token without the certificate
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
	// The server may take as long next time. Start early enough for twice that
	// time, so that the new token is there before the old one ends.
	refresh = min(refresh, usable-2*g.took)
	// Never replace a token in the first half of its life.
	refresh = max(refresh-rand.N(life/jitterDivisor+1), life/2)

	// Count by the wall clock: tokens age while a machine is suspended, but the
	// monotonic clock stands still.
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
