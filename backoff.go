// How long to wait after a fetch has failed, and after an upstream has refused a token.

package outboundauth

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	transientBackoff, maxTransientBackoff = 1 * time.Second, 30 * time.Second
	minRefreshBackoff                     = 250 * time.Millisecond
	permanentBackoff, maxPermanentBackoff = 5 * time.Second, 5 * time.Minute
	maxRetryAfter                         = 5 * time.Minute

	// After a permanent error, callers look whether the secret has changed, but
	// not more often than this.
	secretCheckInterval = 100 * time.Millisecond

	// How long after a token request an operator can't bring about the next.
	forcedInterval = 1 * time.Second
)

const (
	// Two quick retries help if a connection was dropped, or if one of the
	// server's instances restarts.
	quickRetries    = 2
	quickRetryDelay = 100 * time.Millisecond
)

// permanent is implemented by errors that know whether a repetition can help. It
// can't help if the authorization server, or our own check, rejected the
// configuration.
type permanent interface {
	error
	Permanent() bool
}

// throttled is implemented by errors that know how long the server wants us to
// wait.
type throttled interface {
	error
	RetryAfter() time.Duration
}

// fetchError says why there is no token. Its text may be logged and shown: it
// holds no secret, token, form or body.
type fetchError struct {
	err     error
	retryAt time.Time // no new fetch starts before this
}

func (e *fetchError) Error() string { return e.err.Error() }
func (e *fetchError) Unwrap() error { return e.err }

// earlyError says why an operator can't have the token replaced now.
type earlyError struct {
	until time.Time
	cause *fetchError // why the server is left alone; nil: it was asked a moment ago
}

func (e *earlyError) Error() string {
	if e.cause == nil {
		return "a token was requested a moment ago: try again in a second"
	}
	wait := max(time.Second, time.Until(e.until).Round(time.Second))
	if isPermanent(e.cause) {
		return fmt.Sprintf("the authorization server refused the client: change the secret or key, or try again in %v: %v", wait, e.cause)
	}
	return fmt.Sprintf("the authorization server asks to be left alone: try again in %v: %v", wait, e.cause)
}

// retryDelay returns how long to wait after a failure, and whether this failure
// makes the later waits longer. failures is how many failures of the same kind
// came before. left is how long a token that is still in use may be used; 0 if
// there is none.
func retryDelay(err error, failures int, left time.Duration) (wait time.Duration, prolongs bool) {
	prolongs = true
	if isPermanent(err) {
		// Never wait less than the interval: the server could lock out a client
		// that repeats wrong credentials quickly.
		wait = backoff(failures, permanentBackoff, maxPermanentBackoff)
		if wait += rand.N(wait / 2); wait > maxPermanentBackoff {
			wait = maxPermanentBackoff - rand.N(maxPermanentBackoff/4)
		}
	} else {
		// Full jitter: wait for any time within the interval.
		wait = rand.N(backoff(failures, transientBackoff, maxTransientBackoff))
		// If a token is still in use, wait for half of the time that is left:
		// the server may be back before the token ends. Such a try does not
		// prolong the back-off that follows.
		if soon := max(left/2, minRefreshBackoff); left > 0 && soon < wait {
			wait, prolongs = soon, false
		}
	}
	return max(wait, min(retryAfter(err), maxRetryAfter)), prolongs
}

// backoff returns base, doubled for each failure before this one, and limit at
// most.
func backoff(failures int, base, limit time.Duration) time.Duration {
	for ; failures > 0 && base < limit; failures-- {
		base *= 2
	}
	return min(base, limit)
}

func isPermanent(err error) bool {
	p, ok := errors.AsType[permanent](err)
	return ok && p.Permanent()
}

func retryAfter(err error) time.Duration {
	if t, ok := errors.AsType[throttled](err); ok {
		return t.RetryAfter()
	}
	return 0
}

const (
	// quietPeriod is the time without a refusal after which the back-off of
	// replacements ends.
	quietPeriod = 30 * time.Second

	// replacementInterval is the least time from one replacement that helps to
	// the next. Some servers name a lifetime that is longer than the token's
	// real life.
	replacementInterval = 1 * time.Second
)

// replacements decides when a token that an upstream refuses may be replaced.
// Some upstreams refuse everything, or refuse any token for some of their paths.
// There, the gateway must not ask the authorization server for a new token at
// each request. After a quiet time, the first token that is refused may always
// be replaced.
type replacements struct {
	mu       sync.Mutex // guards all fields below
	count    int        // how many replacements did not help, as far as is known
	started  time.Time  // when the last replacement started
	until    time.Time  // no replacement starts before this
	refusal  time.Time  // when a token was last refused
	replaced *token     // the last token that was allowed to be replaced
}

// allow reports whether a refused token may be replaced now. It counts the
// replacement when that starts. The caller of the gateway may go away, and then
// nobody sees whether the replacement helps.
func (r *replacements) allow(refused *token) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	quiet := now.Sub(r.refusal) >= quietPeriod
	r.refusal = now
	if r.replaced == refused {
		return true // another request was allowed to replace it
	}
	if quiet {
		r.count, r.until = 0, time.Time{}
	}
	if now.Before(r.until) {
		return false
	}
	r.started = now
	r.until = now.Add(backoff(r.count, permanentBackoff, maxPermanentBackoff))
	r.count++
	r.replaced = refused
	return true
}

// help notes that the upstream accepted the token that replaced a refused one.
func (r *replacements) help() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count, r.until = 0, r.started.Add(replacementInterval)
}
