// How long to wait: after a failure, and after a refusal.

package outboundauth

import (
	"errors"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	transientBackoff, maxTransientBackoff = 1 * time.Second, 30 * time.Second
	minRefreshBackoff                     = 250 * time.Millisecond
	permanentBackoff, maxPermanentBackoff = 5 * time.Second, 5 * time.Minute
	maxRetryAfter                         = 5 * time.Minute

	// How often callers that meet a permanent error may look whether the
	// secret has changed since.
	secretCheckInterval = 100 * time.Millisecond
)

const (
	// The two quick retries bridge a dropped connection or a restart of one
	// of the server's instances.
	quickRetries    = 2
	quickRetryDelay = 100 * time.Millisecond
)

// permanent is implemented by errors that a repetition will not mend, because
// the authorization server, or our own check, rejected what was configured.
type permanent interface {
	error
	Permanent() bool
}

// throttled is implemented by errors that say how long to stay away.
type throttled interface {
	error
	RetryAfter() time.Duration
}

// fetchError is why there is no token. Its text is safe to log and to show:
// it holds no secret, token, form or body.
type fetchError struct {
	err     error
	retryAt time.Time // no new fetch before this instant
}

func (e *fetchError) Error() string { return e.err.Error() }
func (e *fetchError) Unwrap() error { return e.err }

// retryDelay returns how long to stay away after a failure that follows others of
// its kind, and whether it prolongs the waits that follow. left is what is left of
// a token that is still in use; 0 without one.
func retryDelay(err error, failures int, left time.Duration) (wait time.Duration, prolongs bool) {
	prolongs = true
	if isPermanent(err) {
		// Never less than the interval, so that wrong credentials do not
		// lock the client out by quick repetition.
		wait = backoff(failures, permanentBackoff, maxPermanentBackoff)
		if wait += rand.N(wait / 2); wait > maxPermanentBackoff {
			wait = maxPermanentBackoff - rand.N(maxPermanentBackoff/4)
		}
	} else {
		// Full jitter: anywhere in the interval.
		wait = rand.N(backoff(failures, transientBackoff, maxTransientBackoff))
		// The nearer the end of a token that is still in use, the sooner: the
		// server may be back in time. These tries don't prolong the back-off
		// that follows when it is not.
		if soon := max(left/2, minRefreshBackoff); left > 0 && soon < wait {
			wait, prolongs = soon, false
		}
	}
	return max(wait, min(retryAfter(err), maxRetryAfter)), prolongs
}

// backoff doubles base for each failure before this one, up to limit.
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
	// quietPeriod without a refusal ends the back-off of replacements.
	quietPeriod = 30 * time.Second

	// replacementInterval is the distance of replacements that help: some servers say
	// that a token lives longer than it does.
	replacementInterval = 1 * time.Second
)

// replacements spaces out the replacements of tokens that an upstream refuses: an
// upstream that refuses everything, or any token for some of its paths, must
// not make the gateway ask the authorization server for a token for each
// request. The first refusal after a quiet time is always followed by one.
type replacements struct {
	mu       sync.Mutex // guards all below
	count    int        // of replacements that did not help, as far as is known
	started  time.Time  // the last
	until    time.Time  // no other before
	refusal  time.Time  // the last
	replaced *token     // the last that was allowed to be replaced
}

// allow reports whether a token that was refused may be replaced now. It is
// counted when the replacement begins, as nobody may see how that ends: the client
// of the proxy may go away.
func (r *replacements) allow(refused *token) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	quiet := now.Sub(r.refusal) >= quietPeriod
	r.refusal = now
	if r.replaced == refused {
		return true // by another request
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

// help notes that the upstream accepted the token which replaced a refused one.
func (r *replacements) help() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count, r.until = 0, r.started.Add(replacementInterval)
}
