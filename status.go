package outboundauth

import (
	"slices"
	"time"
)

// The states of a client's token, best first.
const (
	stateFresh   = "fresh"   // as good as new
	stateStale   = "stale"   // due to be replaced
	stateExpired = "expired" // not used any more, or refused by an upstream
	stateAbsent  = "absent"  // there has been none
)

var tokenStates = []string{stateFresh, stateStale, stateExpired, stateAbsent}

// sourceStatus is what a token source is like at one instant. It holds no
// token, and no secret.
type sourceStatus struct {
	key      sourceKey
	name     string // of the client
	endpoint *endpoint

	state                      string
	obtained, renewal, expires time.Time // zero: no token
	fetching                   bool

	// Of the failures since the last success.
	failures int
	err      error
	retryAt  time.Time
}

// worseThan orders by state, and then by failures.
func (s sourceStatus) worseThan(other sourceStatus) bool {
	mine, its := slices.Index(tokenStates, s.state), slices.Index(tokenStates, other.state)
	if mine != its {
		return mine > its
	}
	return s.failures > other.failures
}

// sourceStatuses returns the statuses of all sources in use.
func sourceStatuses() []sourceStatus {
	var statuses []sourceStatus
	sources.Range(func(key, value any) bool {
		if status, ok := value.(*tokenSource).status(time.Now()); ok {
			status.key = key.(sourceKey)
			statuses = append(statuses, status)
		}
		return true
	})
	return statuses
}

// status returns what s is like now; ok is false if it has no client yet.
func (s *tokenSource) status(now time.Time) (status sourceStatus, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.last.(*endpoint)
	if !ok {
		return sourceStatus{}, false
	}
	status = sourceStatus{name: e.metrics.name, endpoint: e, state: stateAbsent, failures: s.failures, fetching: s.inflight != nil}
	if t := s.current; t != nil {
		status.obtained, status.renewal, status.expires = t.obtained, t.refreshAt, t.expires
		switch {
		case s.usable(now) == nil:
			status.state = stateExpired
		case now.Before(t.refreshAt):
			status.state = stateFresh
		default:
			status.state = stateStale
		}
	}
	if s.lastErr != nil {
		status.err, status.retryAt = s.lastErr, s.lastErr.retryAt
	}
	return status, true
}
