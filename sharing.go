// What the instances of a fleet share of a token: the records, and how they are read and written.

package outboundauth

import (
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
	"github.com/outboundauth/caddy-outbound-auth/internal/shelf"
	"github.com/outboundauth/caddy-outbound-auth/internal/vault"
)

// shared is where the instances of a fleet share the token of one client. The names and the
// keys follow from the secrets as they are now: an instance with other secrets shares elsewhere.
type shared struct {
	*shelf.Shelf
	vault         *vault.Vault
	token, failed string // the keys of the records
	by            string // the instance

	count func(result string) // counts what has come of it
	warn  func(why string)    // tells operators, if they don't know yet
}

// sharedAt is where the records are, in the storage of Caddy.
const sharedAt = "oauth2/tokens/"

// What has come of the sharing of a token.
const (
	sharedTaken       = "taken"        // there was one of another instance
	sharedStored      = "stored"       // this instance has asked, and the others have it
	sharedMissing     = "missing"      // there was none, or none that was better
	sharedUnreadable  = "unreadable"   // the record was damaged, or of another key
	sharedUnavailable = "unavailable"  // the storage failed
	sharedLockTimeout = "lock_timeout" // another instance had the lock for too long
)

var sharedResults = []string{sharedTaken, sharedStored, sharedMissing, sharedUnreadable, sharedUnavailable, sharedLockTimeout}

const (
	// How often an instance looks, while another one asks the server.
	lookAgain = 150 * time.Millisecond

	// How long an instance waits for another one's token, at least and about at most. It is
	// at random: if the instance that has the lock has died, those who wait for it must not
	// all go on at once.
	leastSharedPatience, mostSharedPatience = 2 * time.Second, 6 * time.Second

	// How long an instance without a token waits at most because another one has failed:
	// the fault may be that of its network alone.
	heldWithoutToken = 2 * time.Second

	// How long after the end of a failure the next one still belongs to the same row.
	rowEnds = 1 * time.Minute

	// How far the clock of another instance may be ahead.
	maxClockSkew = 5 * time.Second
)

// instance tells this process from others, in what it stores.
var instance = rand.Text()

// sharedToken is the record of a token. Each instance computes by itself how long it uses the
// token, with its own settings.
type sharedToken struct {
	Token    string `json:"t"`
	Scope    string `json:"s,omitempty"`
	Sent     int64  `json:"o"`           // when it was asked for, in ms since 1970
	Lifetime int64  `json:"l,omitempty"` // in ms; 0 if the server named none
}

// sharedFailure is the record of a fault of the server that passes.
type sharedFailure struct {
	By    string `json:"i"` // the instance
	At    int64  `json:"a"` // in ms since 1970, as Until
	Until int64  `json:"u"` // when the next instance asks
	Row   int    `json:"r"` // how many failures in a row it is
}

func (r sharedToken) sent() time.Time { return time.UnixMilli(r.Sent) }

// grant returns the grant of a record.
func (r sharedToken) grant(now time.Time) grant {
	issued := r.sent()
	if issued.After(now) { // by the clock of another instance
		issued = now
	}
	return grant{
		accessToken: r.Token,
		lifetime:    time.Duration(min(max(0, r.Lifetime), maxLifetime.Milliseconds())) * time.Millisecond,
		scope:       r.Scope,
		issued:      issued,
		taken:       true,
	}
}

// A fleetView is what decides for one fetch about the tokens and failures of other instances.
type fleetView struct {
	alone   bool // the server is asked, whatever they have
	refused bool // an upstream has refused the current token
	held    heldBy
}

// heldBy counts how often in a row this instance has not asked because one other has failed.
type heldBy struct {
	instance string
	times    int
}

// mostHeld is how often in a row failures of one instance count. Its network may be broken, and
// it may fail for ever.
const mostHeld = 3

// next notes the failure of a fetch.
func (h heldBy) next(err error) heldBy {
	failure, ok := errors.AsType[*tokenError](err)
	switch {
	case !ok || failure.heldUntil.IsZero():
		return heldBy{}
	case failure.heldBy != h.instance:
		return heldBy{failure.heldBy, 1}
	}
	h.times++
	return h
}

// load reads a record, and reports whether there is one that can be used.
func (s *shared) load(ctx context.Context, key string, record any) (ok bool, err error) {
	sealed, err := s.Load(ctx, key)
	switch {
	case err != nil:
		return false, err
	case sealed == nil:
		return false, nil
	}
	if err := s.vault.Open(key, sealed, record); err != nil {
		s.count(sharedUnreadable)
		s.warn("a record of share_tokens is " + err.Error() + "; it is not used, and the next token replaces it")
		return false, nil
	}
	return true, nil
}

// look returns the token that is shared, and the failure; zero values if there is none.
func (s *shared) look(ctx context.Context, now time.Time) (t sharedToken, err error) {
	ok, err := s.load(ctx, s.token, &t)
	if !ok {
		return sharedToken{}, err
	}
	if t.sent().After(now.Add(maxClockSkew)) {
		s.count(sharedUnreadable)
		s.warn("a token of share_tokens was asked for in the future; set the clocks of all instances, for example with NTP")
		t = sharedToken{}
	}
	return t, err
}

// failure returns why the server is let alone, which this instance may have decided; the zero
// value if it is not. A token that was asked for later means that the failure is over.
func (s *shared) failure(ctx context.Context, now time.Time, newest sharedToken) (f sharedFailure) {
	ok, err := s.load(ctx, s.failed, &f)
	if !ok || err != nil || f.At <= newest.Sent || f.At > now.Add(maxClockSkew).UnixMilli() || f.Until <= now.UnixMilli() {
		return sharedFailure{}
	}
	return f
}

// store stores the token of a grant, unless there is one that was asked for later. But one of
// those that this instance has had is older, whatever the clock of another instance says.
func (s *shared) store(ctx context.Context, g grant, had redact.Secrets) {
	record := sharedToken{Token: g.accessToken, Scope: g.scope, Sent: g.issued.UnixMilli(), Lifetime: g.lifetime.Milliseconds()}
	there, err := s.look(ctx, time.Now())
	switch {
	case err != nil:
		return
	case slices.Contains(had, there.Token):
		record.Sent = max(record.Sent, there.Sent+1)
	case there.Sent > record.Sent:
		return
	}
	s.put(ctx, s.token, record)
}

// storeFailure notes that the server is not asked again before retryAt. The others wait longer
// with each failure in a row, whichever instance had it: for each of them, it is the first.
func (s *shared) storeFailure(ctx context.Context, retryAt time.Time) {
	now := time.Now()
	f := sharedFailure{By: s.by, At: now.UnixMilli(), Row: 1}
	newest, err := s.look(ctx, now)
	if err != nil {
		return
	}
	var last sharedFailure
	if ok, err := s.load(ctx, s.failed, &last); ok && err == nil && last.At > newest.Sent && now.Sub(time.UnixMilli(last.Until)) < rowEnds {
		f.Row = last.Row + 1
	}
	hold := min(transientBackoff<<min(max(0, f.Row-1), 10), maxTransientBackoff)
	f.Until = max(retryAt.UnixMilli(), now.Add(hold).UnixMilli())
	s.put(ctx, s.failed, f)
}

func (s *shared) put(ctx context.Context, key string, record any) {
	sealed, err := s.vault.Seal(key, record)
	if err != nil {
		return // nothing here has such a value
	}
	switch err := s.Store(ctx, key, sealed); {
	case err != nil:
		s.count(sharedUnavailable)
	case key == s.token:
		s.count(sharedStored)
	}
}

// forget deletes the token for all instances that do not have it yet.
func (s *shared) forget(ctx context.Context) error {
	if err := s.Delete(ctx, s.token); err != nil {
		s.count(sharedUnavailable)
		return errStillShared
	}
	return nil
}

var errStillShared = errors.New("this instance has forgotten the token, but others may still take it: the storage or the key of share_tokens can't be had now")
