// How long to wait after a fetch has failed.

package outboundauth

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"
)

const (
	// After a fault that passes. Requests that are refused meanwhile need the token
	// as soon as it can be had: the wait grows with the outage, to two seconds. If
	// nobody needs the token, it grows to half a minute.
	minBackoff                            = 250 * time.Millisecond
	maxAskedBackoff                       = 2 * time.Second
	transientBackoff, maxTransientBackoff = 1 * time.Second, 30 * time.Second

	// After 429 without Retry-After (RFC 6585 §4).
	throttledBackoff, maxThrottledBackoff = 1 * time.Second, 30 * time.Second

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

	// A server that is silent for a quarter of token_timeout is asked again. So many
	// requests fit into the time.
	silenceDivisor = 4
	maxAttempts    = 4

	// How long a caller waits for a token after a fetch has failed, at least.
	leastPatience = 1 * time.Second

	// The patience of a caller who waits until the fetch ends, which has a timeout.
	untilEnd = 24 * time.Hour
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
	err error

	// No fetch that nobody waits for starts before retryAt, and none at all before
	// soonest.
	retryAt, soonest time.Time
}

func (e *fetchError) Error() string { return e.err.Error() }
func (e *fetchError) Unwrap() error { return e.err }

// errLate is the error of a caller that has waited long enough, while no fetch has
// failed.
var errLate = lateError("the authorization server takes longer than usual to issue a token")

// errCrowded is the error of a caller that has waited as long as token_timeout allows,
// while the token request waited for its turn.
var errCrowded = lateError("the authorization server is asked for so many tokens that this one is not requested yet")

type lateError string

func (e lateError) Error() string { return string(e) }

// Is makes a lateError a timeout.
func (lateError) Is(target error) bool { return target == context.DeadlineExceeded }

// inVainError is the error of a caller whose token request waits for its turn at a server
// that gives nobody a token.
func inVainError(endpoint string) error {
	return &tokenError{
		Endpoint:    endpoint,
		Code:        "temporarily_unavailable",
		Description: "the authorization server gives no client a token now; this client has not asked yet, and will in its turn",
	}
}

// errSilent is why a token is requested again although the request before has not
// ended.
var errSilent = &tokenError{Code: codeTimeout, Description: "the authorization server has not answered yet"}

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

// failure is what decides when a fetch that has failed is repeated.
type failure struct {
	err    error
	began  time.Time     // when its last token request began
	ended  time.Time     // when the fetch ended
	lasted time.Duration // how long there have been failures
	left   time.Duration // how long the current token is valid; 0 if there is none
	login  bool          // the request may be a login, which must not be repeated quickly
}

// kind tells failures apart whose waits grow on their own.
type kind int

const (
	transientFailure kind = iota
	throttledFailure      // the server limits the rate
	permanentFailure
)

// streak counts failures of one kind in a row. The zero value is ready to use.
type streak struct {
	of    kind
	count int // how many of them make the next wait longer
}

// next notes a failure. It returns when a fetch that a caller waits for may be the next
// one, and when a fetch that nobody waits for.
func (s *streak) next(f failure) (soonest, retryAt time.Time) {
	if of := kindOf(f.err); of != s.of {
		*s = streak{of: of}
	}
	switch s.of {
	case permanentFailure:
		// Never wait less than the interval: the server could lock out a client
		// that repeats wrong credentials quickly.
		wait := backoff(s.count, permanentBackoff, maxPermanentBackoff)
		if wait += jitter(wait / 2); wait > maxPermanentBackoff {
			wait = maxPermanentBackoff - jitter(maxPermanentBackoff/4)
		}
		s.count++
		soonest = f.ended.Add(wait)
		retryAt = soonest
	case throttledFailure:
		soonest = f.ended // and what the server asks for
		if retryAfter(f.err) == 0 {
			soonest = f.ended.Add(backoff(s.count, throttledBackoff, maxThrottledBackoff))
			s.count++
		}
		retryAt = soonest
	default:
		// Up to a quarter less, so that gateways do not all come back at once.
		asked := min(max(f.lasted, minBackoff), maxAskedBackoff)
		soonest = f.began.Add(max(asked-jitter(asked/4), minBackoff))
		// Full jitter: wait for any time within the interval, but no longer than the
		// outage has lasted.
		wait := jitter(backoff(s.count, transientBackoff, maxTransientBackoff))
		wait = max(min(wait, f.lasted), minBackoff)
		// If a token is still valid, wait for half of the time that is left: the
		// server may be back before the token ends. Such a try does not prolong the
		// back-off that follows.
		if soon := max(f.left/2, minBackoff); f.left > 0 && soon < wait {
			wait = soon
		} else {
			s.count++
		}
		retryAt = f.ended.Add(wait)
		if half := f.ended.Add(max(f.left/2, minBackoff)); f.left > 0 && half.Before(soonest) {
			soonest = half // nobody is refused yet, and this try may prevent it
		}
	}
	least := min(retryAfter(f.err), maxRetryAfter)
	if f.login {
		least = max(least, permanentBackoff)
	}
	if asks := f.ended.Add(least); soonest.Before(asks) {
		soonest = asks
	}
	if retryAt.Before(soonest) {
		retryAt = soonest
	}
	return soonest, retryAt
}

func kindOf(err error) kind {
	switch failure, ok := errors.AsType[*tokenError](err); {
	case isPermanent(err):
		return permanentFailure
	case ok && failure.Status == http.StatusTooManyRequests:
		return throttledFailure
	}
	return transientFailure
}

// leftAlone reports whether the server is to be left alone for a time: it has asked for
// that, or it has refused the client and may lock it out.
func leftAlone(err error) bool {
	return kindOf(err) != transientFailure || retryAfter(err) > 0
}

// usual knows how long the last token requests that succeeded took.
type usual struct {
	took [5]time.Duration // the last ones, in any order
	n    int              // how many there were
}

func (u *usual) add(took time.Duration) {
	u.took[u.n%len(u.took)] = took
	u.n++
}

// median is not moved by a request or two that hung until an outage ended. It is 0 if
// nothing is known.
func (u *usual) median() time.Duration {
	if u.n == 0 {
		return 0
	}
	took := u.took // a copy
	known := took[:min(u.n, len(took))]
	slices.Sort(known)
	return known[len(known)/2]
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
