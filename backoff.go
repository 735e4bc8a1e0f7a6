package outboundauth

import (
	"errors"
	"math/rand/v2"
	"time"
)

const (
	transientBackoff, maxTransientBackoff = 1 * time.Second, 30 * time.Second
	minRenewalBackoff                     = 250 * time.Millisecond
	permanentBackoff, maxPermanentBackoff = 5 * time.Second, 5 * time.Minute
	maxRetryAfter                         = 5 * time.Minute

	// How often callers that meet a permanent error may look whether the
	// secret has changed since.
	secretCheckInterval = 100 * time.Millisecond
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

// backingOff tells whether it is too early to fetch again. mu is held.
func (s *tokenSource) backingOff(now time.Time) bool {
	return s.lastErr != nil && now.Before(s.lastErr.retryAt)
}

// checkDue tells whether the secrets of a permanent error may be compared
// again: with a new secret it is not too early to fetch. mu is held.
func (s *tokenSource) checkDue(now time.Time) bool {
	return s.failedWith != "" && !now.Before(s.nextCheckAt)
}

// fail notes a failure and computes when to try again. mu is held.
func (s *tokenSource) fail(err error, fingerprint string, now time.Time) *fetchError {
	if isPermanent(err) != (s.failedWith != "") {
		s.failures = 0 // of the other kind: their number says nothing about this one
	}
	var wait time.Duration
	if isPermanent(err) {
		// Never less than the interval, so that wrong credentials do not
		// lock the client out by quick repetition.
		wait = backoff(s.failures, permanentBackoff, maxPermanentBackoff)
		if wait += rand.N(wait / 2); wait > maxPermanentBackoff {
			wait = maxPermanentBackoff - rand.N(maxPermanentBackoff/4)
		}
		s.failedWith = fingerprint
	} else {
		// Full jitter: anywhere in the interval.
		wait = rand.N(backoff(s.failures, transientBackoff, maxTransientBackoff))
		s.failedWith = ""
		// The nearer the end of a token that is still in use, the sooner: the
		// server may be back in time. These tries don't prolong the back-off
		// that follows when it is not.
		if t := s.current; t != nil && now.Before(t.usableTo) {
			if soon := max(t.usableTo.Sub(now)/2, minRenewalBackoff); soon < wait {
				wait = soon
				s.failures = max(0, s.failures-1)
			}
		}
	}
	wait = max(wait, min(retryAfter(err), maxRetryAfter))
	s.failures++
	s.lastErr = &fetchError{err: err, retryAt: now.Add(wait)}
	return s.lastErr
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
