// What a token source is like at one instant.

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
	stateAbsent  = "absent"  // there is none
)

var tokenStates = []string{stateFresh, stateStale, stateExpired, stateAbsent}

// sourceStatus is what a token source is like at one instant. It holds no
// token, and no secret.
type sourceStatus struct {
	key sourceKey
	description

	state                      string
	obtained, renewal, expires time.Time // zero: no token
	fetching                   bool

	// Of the failures since the last success.
	failures int
	err      error
	retryAt  time.Time
}

// worseThan puts first what somebody has to see to: a client that is idle has a
// token that has expired, and nothing is wrong with it.
func (s sourceStatus) worseThan(other sourceStatus) bool {
	rank := func(s sourceStatus) []int {
		permanent := 0
		if isPermanent(s.err) {
			permanent = 1
		}
		return []int{permanent, min(s.failures, 1), slices.Index(tokenStates, s.state), s.failures}
	}
	return slices.Compare(rank(s), rank(other)) > 0
}

// sourceStatuses returns the statuses of all sources in use: one for each name
// that its clients have.
func sourceStatuses() []sourceStatus {
	var statuses []sourceStatus
	sources.Range(func(key, value any) bool {
		for _, status := range value.(*tokenSource).statuses(time.Now()) {
			status.key = key.(sourceKey)
			statuses = append(statuses, status)
		}
		return true
	})
	return statuses
}

// statuses returns what s is like now, as the newest client of each name has
// it; nothing if s has no client yet.
func (s *tokenSource) statuses(now time.Time) []sourceStatus {
	status, requesters := s.statusAlone(now)
	var statuses []sourceStatus
	for _, r := range requesters {
		status.description = r.describe()
		named := func(other sourceStatus) bool { return other.name == status.name }
		if !slices.ContainsFunc(statuses, named) {
			statuses = append(statuses, status)
		}
	}
	return statuses
}

// statusAlone returns what s is like now, without its clients, and these apart,
// the newest first.
func (s *tokenSource) statusAlone(now time.Time) (sourceStatus, []requester) {
	s.mu.Lock()
	defer s.mu.Unlock()
	status := sourceStatus{state: stateAbsent, failures: s.failures, fetching: s.inflight != nil}
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

	requesters := slices.Clone(s.requesters)
	slices.Reverse(requesters)
	if s.last != nil && len(requesters) == 0 {
		requesters = append(requesters, s.last) // for requests that are still on their way
	}
	return status, requesters
}
