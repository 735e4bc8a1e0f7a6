// What state a token source is in at one moment, and the origin that it asks.

package outboundauth

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"time"
)

// The states of a client's token, best first. What upstreams make of the token is
// another matter: one may refuse what others accept.
const (
	stateFresh   = "fresh"   // not due to be replaced
	stateStale   = "stale"   // due to be replaced
	stateExpired = "expired" // past its end
	stateAbsent  = "absent"  // there is no token
)

var tokenStates = []string{stateFresh, stateStale, stateExpired, stateAbsent}

// sourceStatus is the state of a token source at one moment. It holds no token
// and no secret.
type sourceStatus struct {
	key sourceKey
	description

	state                      string
	obtained, renewal, expires time.Time // zero if there is no token
	bound                      bool      // the token is bound to a key or a certificate
	thumbprint                 string    // of the key; "" if it is bound to none
	taken                      bool      // another instance has asked for it
	fetching                   bool

	// About the failures since the last success.
	failures int
	err      error
	retryAt  time.Time

	upstreams []upstreamStatus // those that have refused a token, by address
}

// idKey is random, so that only this process can compute its ids. A sourceKey
// is a digest of settings, and some of them may be secrets. Without idKey, a
// reader of an id could find out whether a guessed secret is right.
var idKey = []byte(rand.Text())

// id returns an id that is short enough to type in a URL. It tells nothing
// about the settings.
func (k sourceKey) id() string {
	mac := hmac.New(sha256.New, idKey)
	mac.Write(k[:])
	return hex.EncodeToString(mac.Sum(nil)[:6])
}

// refusesToken reports whether the token is of no use at the upstream now.
func (u upstreamStatus) refusesToken() bool { return u.refusing && u.verdict == verdictToken }

// refusing returns how many upstreams refuse the token, and when one of them last did
// so. The instant is zero if none refuses it.
func (s *sourceStatus) refusing() (upstreams int, last time.Time) {
	for _, u := range s.upstreams {
		if !u.refusesToken() {
			continue
		}
		upstreams++
		if u.refused.After(last) {
			last = u.refused
		}
	}
	return upstreams, last
}

// failing ranks failures to get a token: 0 if the last attempt did not fail, 1 if it did,
// and 2 if it did for a reason that does not pass by itself.
func (s *sourceStatus) failing() int {
	if isPermanent(s.err) {
		return 2
	}
	return min(s.failures, 1)
}

// worseThan reports whether operators should look at s rather than at other.
// Failures count before the state of the token: the token of an idle client
// expires, and nothing is wrong with that.
func (s *sourceStatus) worseThan(other *sourceStatus) bool {
	rank := func(s *sourceStatus) []int {
		return []int{s.failing(), slices.Index(tokenStates, s.state), s.failures}
	}
	return slices.Compare(rank(s), rank(other)) > 0
}

// urgency ranks how much a client needs an operator: 3 and 2 if it fails to get a token, 1
// if an upstream refuses its token. Without a token, all its upstreams will miss it.
func (s *sourceStatus) urgency() int {
	if failing := s.failing(); failing > 0 {
		return 1 + failing
	}
	upstreams, _ := s.refusing()
	return min(upstreams, 1)
}

// sourceStatuses returns the statuses of all sources in use. A source has one
// status for each name that its clients have.
func sourceStatuses() []*sourceStatus {
	var statuses []*sourceStatus
	now := time.Now()
	sources.Range(func(key, value any) bool {
		named := value.(*tokenSource).statuses(now)
		for i := range named {
			named[i].key = key.(sourceKey)
			statuses = append(statuses, &named[i]) // there may be 10,000: copies are slow
		}
		return true
	})
	return statuses
}

// statuses returns the status of s for each name that its clients have. Each
// status describes the newest client with this name. If s has no client yet,
// there is no status.
func (s *tokenSource) statuses(now time.Time) []sourceStatus {
	status, requesters := s.statusAlone(now)
	var statuses []sourceStatus
	for _, r := range requesters {
		status.description = r.describe()
		same := slices.IndexFunc(statuses, func(other sourceStatus) bool { return other.name == status.name })
		if same < 0 {
			statuses = append(statuses, status)
			continue
		}
		for _, key := range status.Keys {
			if known := &statuses[same].Keys; !slices.Contains(*known, key) {
				*known = append(slices.Clip(*known), key) // a copy: the client has its own
			}
		}
	}
	return statuses
}

// statusAlone returns the status of s, which describes no client yet. It also
// returns the clients, the newest first.
func (s *tokenSource) statusAlone(now time.Time) (sourceStatus, []requester) {
	s.mu.Lock()
	defer s.mu.Unlock()
	upstreams := s.places.statuses()
	slices.SortFunc(upstreams, func(a, b upstreamStatus) int { return strings.Compare(a.address, b.address) })
	status := sourceStatus{state: stateAbsent, failures: s.failures, fetching: s.inflight != nil, upstreams: upstreams}
	if t := s.current; t != nil {
		status.obtained, status.renewal, status.expires = t.obtained, t.refreshAt, t.expires
		status.taken = t.grant.taken
		status.bound = t.key != nil || t.binding != nil
		if t.key != nil {
			status.thumbprint = t.key.Thumbprint()
		}
		switch {
		case !s.valid(now):
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

	requesters := make([]requester, 0, len(s.sharers))
	for _, sharer := range s.sharers {
		requesters = append(requesters, sharer.requester)
	}
	slices.Reverse(requesters)
	return status, requesters
}

// originStatus is the state of a server that is asked for tokens, at one moment.
type originStatus struct {
	endpoint       string // the host of the token endpoint, as it is configured
	waiting, limit int    // token requests: those that wait for their turn, and how many may be under way at once
	heldBack       bool   // few are sent: the server asked two clients or more to wait, or gives nobody a token
}

// originStatuses returns the statuses of all servers that were asked for tokens.
func originStatuses() []originStatus {
	var statuses []originStatus
	for q := range queues.all() {
		statuses = append(statuses, q.status())
	}
	return statuses
}

// status returns what operators see of a queue.
func (q *queue) status() originStatus {
	q.mu.Lock()
	defer q.mu.Unlock()
	return originStatus{
		endpoint: q.endpoint,
		waiting:  q.awaited.Len() + q.others.Len(), limit: q.server.Limit(),
		heldBack: q.server.Failing() || q.server.HeldBack(time.Now()),
	}
}
