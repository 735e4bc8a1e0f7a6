// One cached access token: when it is fetched, who waits, and when a fetch is repeated.

package outboundauth

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/caddyserver/caddy/v2"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// tokenSource caches one access token and keeps it fresh. It is safe for
// concurrent use. A fetch belongs to the source and not to a caller: it goes
// on when the caller leaves, and its result serves everybody.
//
// A token is stale when it is due to be replaced. The end of its life is its
// reserve. What happens depends on the state of the token:
//
//	event        fresh      stale              reserve               absent or expired
//	Token        the token  the token; fetch   waits for a fetch,    waits for a fetch,
//	                                           see patience; then    see patience; then
//	                                           the token             the last error
//	another      see decide: may fetch, and waits                    a fetch
//	Peek         the token  the token          -                     no token
//	Warm         -          -                  fetch                 a fetch
//	FetchNow     waits for a fetch, whatever the state, unless it is too early
//	Forget       the token becomes absent, unless it is too early
//	timer        -          fetch, if the token is wanted or kept, if it is the first, or
//	                        if the last fetch failed
//
// An upstream that refuses the token changes none of these states: others may accept it.
// Within a back-off, no fetch starts. If there is no token that is valid, a request
// shortens the back-off. If no config runs that uses the source, a fetch starts only if
// somebody asks for it: Token, another and FetchNow do.
type tokenSource struct {
	mu sync.Mutex // guards all fields below; never held during I/O

	places places // what is known about the upstreams that the token is sent to

	// These two need no lock. They are about the same upstreams.
	nonces    dpop.Nonces // by dialAddress
	disproved atomic.Bool // one of them has refused a proof

	// Those who share the source, newest last. Of those whose config runs, the newest
	// makes the token requests. So no request uses the modules of a config that has
	// ended, or that is being loaded and may never run. If no config runs, the last
	// one still makes them: Caddy may serve requests after it has unloaded their
	// config.
	sharers []sharer
	last    requester
	life    lifecycle // the strictest settings of those whose config runs, likewise

	tracers trace.TracerProvider // the provider of the last traced request; nil if there was none

	current  *token
	inflight *fetch
	server   *queue        // of those who ask the same server, as of the last fetch; nil at first
	granting chan struct{} // closed when another token becomes current; nil if nobody waits for that
	timer    *time.Timer   // starts the next fetch of a source in use

	// Of a source that nobody uses: what is left to do at the end of its afterlife,
	// and the timer that does it.
	end   func()
	ender *time.Timer

	granted redact.Secrets // the last tokens, which may be valid still

	notBefore time.Time // when an operator last took a token out of use, also that of other instances
	held      heldBy    // why this instance has not asked

	requested time.Time // when the last token request ended
	usual     usual     // how long the server takes

	// Whether a caller has asked for a token since the last fetch ended. The
	// token of a source that nobody asks is not renewed.
	wanted bool

	kept int // how many clients' health checks need the token

	// Whether the first token is fetched although nobody asks: until it is there, or the
	// server refuses the client.
	warming bool

	// About the failures since the last success. All are zero if there was no
	// failure.
	failures    int
	failingFrom time.Time // when the first of them began
	lastErr     *fetchError
	streak      streak
	failedWith  string    // the fingerprint of the secrets that failed; "" after a transient error
	nextCheckAt time.Time // when the fingerprint may be compared again
}

// A sharer is one of those who share a source, with its settings.
type sharer struct {
	requester
	life    lifecycle
	started bool // its config runs
}

// afterlife is how long a source keeps its token after its last user has left. Somebody
// may go back to the former config, and in an outage no other token could be had.
const afterlife = 1 * time.Minute

// maxGranted is how many of its last tokens a source knows, so that they are not shown
// if the server repeats them.
const maxGranted = 4

func newTokenSource() *tokenSource { return new(tokenSource) }

// Format keeps the token out of everything that prints values, such as the
// panics of caddy.UsagePool.
func (s *tokenSource) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("tokenSource")) }

// sources holds the token sources of all configs that are in use, by sourceKey.
// Equal clients share one token. A reload takes over the tokens of the config
// that it replaces.
var sources = caddy.NewUsagePool()

// sourceKey is a digest of what decides which token is granted, and by which
// server. It is a digest because a config may hold a secret as text, and
// caddy.UsagePool may print its keys.
type sourceKey [sha256.Size]byte

// How a request got its token.
type tokenUse int

const (
	tokenFresh  tokenUse = iota // from the cache
	tokenStale                  // from the cache, while the token is being replaced
	tokenWaited                 // from a fetch that the request waited for
	tokenNone                   // there was no token
)

// acquisition says how a caller got a token, and how long the caller waited. For
// a token from the cache, wait is 0.
type acquisition struct {
	use  tokenUse
	wait time.Duration
}

// Token returns a token that may be used now, and says how the caller got it. It
// waits for one fetch at most, and no longer than patience says. If ctx ends before
// that, the error is the error of ctx. Otherwise it is a *fetchError.
func (s *tokenSource) Token(ctx context.Context) (*token, acquisition, error) {
	return s.other(ctx, nil)
}

// other is Token for a caller whom an upstream has refused its token; r may be nil. The
// caller waits for another one longer than others do, unless the refusal is refuted.
func (s *tokenSource) other(ctx context.Context, r *refusal) (*token, acquisition, error) {
	now := time.Now()
	s.mu.Lock()
	var refused *token
	var refuted <-chan struct{}
	if r != nil {
		refused, refuted = r.of, r.Refuted()
	}
	s.wanted = true
	if t := s.usable(now); t != nil && !t.is(refused) {
		got := acquisition{use: tokenFresh}
		if !now.Before(t.refreshAt) {
			got.use = tokenStale
			if s.due(now) {
				s.start(false)
			}
		}
		s.mu.Unlock()
		return t, got, nil
	}
	s.noteTracers(ctx)
	early := s.tooEarly(now)
	if early {
		s.hasten(now)
	}
	if s.inflight == nil && early && !s.checkDue(now) {
		defer s.mu.Unlock()
		return s.best(now, now, s.lastErr)
	}
	f := s.start(early)
	seen := f.progress() // when the caller last looked
	patience := s.patience(f, seen, refused, now)
	if patience <= 0 {
		defer s.mu.Unlock()
		return s.best(now, now, s.lastErr)
	}
	s.join(ctx, f)
	s.mu.Unlock()
	defer s.leave(f)

	s.await(ctx, f, refuted, patience, func() time.Duration {
		seen = f.progress()
		return s.patience(f, seen, refused, now) - time.Since(now)
	})
	if f.ended() { // which counts, whatever came first
		linkFrom(ctx, f.span)
		if f.err == nil {
			return f.t, acquisition{tokenWaited, time.Since(now)}, nil
		}
	} else if err := ctx.Err(); err != nil {
		return nil, acquisition{tokenNone, time.Since(now)}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.best(now, time.Now(), s.whyNot(f, seen))
}

// usable returns the current token, if it is not in its reserve. mu is held.
func (s *tokenSource) usable(now time.Time) *token {
	if s.current != nil && now.Before(s.current.usableTo) {
		return s.current
	}
	return nil
}

// valid reports whether there is a token that has not expired. mu is held.
func (s *tokenSource) valid(now time.Time) bool {
	return s.current != nil && now.Before(s.current.expires)
}

// best returns the best token there is, for a caller that has waited long enough: a
// token to the very end of its life. Without a token, best returns err. mu is held.
func (s *tokenSource) best(since, now time.Time, err error) (*token, acquisition, error) {
	got := acquisition{tokenNone, now.Sub(since)}
	if s.valid(now) {
		got.use = tokenStale
		return s.current, got, nil
	}
	return nil, got, err
}

// whyNot returns why a caller that has waited for f gets no token. seen is what has ended
// its patience. mu is held.
func (s *tokenSource) whyNot(f *fetch, seen progress) error {
	if f.ended() && f.err != nil {
		return f.err // not errReleased: somebody has waited
	}
	if s.lastErr != nil {
		return s.lastErr
	}
	why := error(errLate)
	switch {
	case seen.inVain:
		why = inVainError(f.slot.endpoint)
	case seen.waited && seen.since.IsZero():
		why = errCrowded
	}
	return &fetchError{err: why, retryAt: time.Now()}
}

// patience returns how long a caller that asked for a token then waits for f in all, as
// things are now. An upstream may have refused the caller this token. Nobody waits long
// for what has failed: callers that pile up are an outage of their own. It counts as
// failed if a token is not renewed before its end, and if other clients of the server
// have failed. It does not if f waits for its turn: then the caller waits for
// token_timeout, and looks again each second. seen is how far f is. mu is held.
func (s *tokenSource) patience(f *fetch, seen progress, refused *token, asked time.Time) time.Duration {
	now := time.Now()
	since, waited, inVain := seen.since, seen.waited, seen.inVain
	sent := !since.IsZero()
	if !sent {
		since = f.started
	}
	good := s.valid(now) && !s.current.is(refused)
	slow := since.Add(2 * s.usual.median()) // later, f takes longer than usual
	short := max(leastPatience, 3*s.usual.median())
	switch {
	case good && s.lastErr != nil:
		return 0
	case good && s.valid(slow):
		return slow.Sub(asked)
	case s.lastErr != nil, inVain, f.renews && !waited:
		return short
	case !sent && !waited: // looking up where to ask has a timeout of its own
		return now.Sub(asked) + leastPatience
	case !sent:
		return min(s.life.fetchTimeout, now.Sub(asked)+leastPatience)
	case f.renews: // from its turn on, as if it had not waited
		return min(s.life.fetchTimeout, max(0, since.Sub(asked))+short)
	case waited && since.After(asked):
		return s.life.fetchTimeout
	}
	return untilEnd
}

// due reports whether it is time for a fetch that nobody waits for. It is time
// if the token is not fresh and the source is not in a back-off. mu is held.
func (s *tokenSource) due(now time.Time) bool {
	fresh := s.usable(now) != nil && now.Before(s.current.refreshAt)
	return !fresh && !s.backingOff(now)
}

// backingOff reports whether it is too early to fetch again. mu is held.
func (s *tokenSource) backingOff(now time.Time) bool {
	return s.lastErr != nil && now.Before(s.lastErr.retryAt)
}

// tooEarly reports whether it is too early for a fetch that a caller waits for. mu is
// held.
func (s *tokenSource) tooEarly(now time.Time) bool {
	if s.valid(now) {
		return s.backingOff(now) // the caller gets that token
	}
	return s.lastErr != nil && now.Before(s.lastErr.soonest)
}

// hasten shortens a back-off that was set when nobody asked, for a caller that gets no
// token now. mu is held.
func (s *tokenSource) hasten(now time.Time) {
	if s.inflight != nil || s.valid(now) || !s.lastErr.soonest.Before(s.lastErr.retryAt) {
		return
	}
	sooner := *s.lastErr // a copy: others read the error without a lock
	sooner.retryAt = sooner.soonest
	s.lastErr = &sooner
	s.schedule()
}

// checkDue reports whether it is time to compare the secrets again after a
// permanent error. If they have changed, a fetch need not wait for the end of
// the back-off. mu is held.
func (s *tokenSource) checkDue(now time.Time) bool {
	return s.failedWith != "" && !now.Before(s.nextCheckAt)
}

// Peek returns the token if there is one that may be used now, otherwise nil. It neither
// waits nor fetches.
func (s *tokenSource) Peek() *token {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.usable(time.Now())
}

// FetchNow fetches a new token and waits for it, as Token does. It does so even
// if the current token is good, or if the last fetch failed a moment ago. If
// nobody may ask the server now, it returns an *earlyError.
func (s *tokenSource) FetchNow(ctx context.Context) (*token, error) {
	for looked, joined := false, false; ; looked = true {
		s.mu.Lock()
		now := time.Now()
		early := s.early(now)
		if early != nil && s.inflight == nil && (looked || early.cause == nil || !s.checkDue(now)) {
			s.mu.Unlock()
			return nil, early
		}
		f := s.startFor(early != nil, fleetView{alone: true})
		timeout := s.life.fetchTimeout
		seen := f.progress() // when the caller last looked
		s.join(ctx, f)
		s.mu.Unlock()
		s.await(ctx, f, nil, timeout, func() time.Duration {
			left := timeout - time.Since(now)
			if seen = f.progress(); !seen.waited || !seen.since.IsZero() && !seen.since.After(now) {
				left = max(left, leastPatience) // it has a timeout of its own, unless it has to wait for its turn yet
			}
			return left
		})
		s.leave(f)
		switch {
		case !f.ended():
			s.mu.Lock()
			defer s.mu.Unlock()
			return nil, cmp.Or(ctx.Err(), s.whyNot(f, seen))
		case !f.attempts.view.alone && !joined && f.instead(): // others have asked, and this caller wants this instance to
			joined = true
		case !f.unchanged: // otherwise the fetch has only compared the secrets
			return f.t, f.err
		}
	}
}

// await waits for f: until it has ended, stop is closed or ctx has ended, but no longer
// than most. When that time is over, more says for how long it goes on, with mu held.
func (s *tokenSource) await(ctx context.Context, f *fetch, stop <-chan struct{}, most time.Duration, more func() time.Duration) {
	late := time.NewTimer(most)
	defer late.Stop()
	for most > 0 {
		select {
		case <-f.done:
			return
		case <-stop:
			return
		case <-ctx.Done():
			return
		case <-late.C:
		}
		s.mu.Lock()
		most = more()
		s.mu.Unlock()
		late.Reset(most)
	}
}

// early returns why nobody may force a token request now, and nil if somebody may.
// The back-off after a fault that passes stops nobody: an operator knows when the
// fault has passed. But the server may have asked for the time, and a server that
// refuses the client may lock it out. mu is held.
func (s *tokenSource) early(now time.Time) *earlyError {
	if until := s.requested.Add(forcedInterval); now.Before(until) {
		return &earlyError{until: until}
	}
	if s.lastErr == nil || !leftAlone(s.lastErr) || !now.Before(s.lastErr.soonest) {
		return nil
	}
	return &earlyError{s.lastErr.soonest, s.lastErr}
}

// Forget takes the current token out of use, even as the last resort, and deletes what is shared
// of it. If a token was requested only a moment ago, it returns an *earlyError: the next request
// would make the gateway fetch another one. Another error means that other instances may still
// take the token.
func (s *tokenSource) Forget(ctx context.Context) error {
	s.mu.Lock()
	if early := s.early(time.Now()); s.current != nil && early != nil && early.cause == nil {
		s.mu.Unlock()
		return early
	}
	s.current, s.notBefore = nil, time.Now()
	last := s.last
	s.mu.Unlock()
	switch shared := shareOf(ctx, last); {
	case shared != nil:
		return shared.forget(ctx)
	case last != nil && last.describe().ShareTokens: // but its key can't be had now
		return errStillShared
	}
	return nil
}

// Warm has the first token fetched in the background, and again until it is there. It
// does nothing if there is a token that may be used. In a back-off, it waits.
func (s *tokenSource) Warm() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if !s.runs() || s.usable(now) != nil {
		return
	}
	due := s.due(now)
	s.warming = due || !isPermanent(s.lastErr) // the next one, which is due without an error, may have another result
	if due {
		s.start(false)
	}
}

// attach adds a user of the source.
func (s *tokenSource) attach(r requester, l lifecycle) {
	s.mu.Lock()
	s.sharers = append(s.sharers, sharer{requester: r, life: l})
	s.adapt()
	end := s.endOfAfterlife()
	s.mu.Unlock()
	end()
}

// begin notes that the config of a user runs. From now on, this user makes the token
// requests.
func (s *tokenSource) begin(r requester) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.sharers {
		if s.sharers[i].requester == r {
			s.sharers[i].started = true
		}
	}
	s.adapt()
}

// keep has the token renewed although no request may come: health checks need it.
func (s *tokenSource) keep() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept++
}

// unkeep takes back one keep.
func (s *tokenSource) unkeep() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept--
}

// endOfAfterlife stops the timer of the afterlife. It returns what is left to do at its
// end, for which mu must not be held. mu is held.
func (s *tokenSource) endOfAfterlife() func() {
	end := s.end
	if end == nil || !s.ender.Stop() { // or the timer does it
		end = func() {}
	}
	s.end, s.ender = nil, nil
	return end
}

// detach removes a user, who has attached before. When the source does not need this
// user's share of the pool any more, it calls release: at once or, if nobody is left,
// at the end of its afterlife.
func (s *tokenSource) detach(r requester, release func()) {
	s.mu.Lock()
	i := slices.IndexFunc(s.sharers, func(other sharer) bool { return other.requester == r })
	s.sharers = slices.Delete(s.sharers, i, i+1)
	if len(s.sharers) > 0 {
		s.adapt()
		s.mu.Unlock()
		release()
		return
	}
	s.rest()
	s.end, s.ender = release, time.AfterFunc(afterlife, release)
	s.mu.Unlock()
}

// adapt chooses who makes the token requests, and makes the strictest settings those of
// the source. They hold for the current token, too. mu is held.
func (s *tokenSource) adapt() {
	some := s.runs()
	var life lifecycle
	for i, other := range s.sharers {
		if other.started || s.last == nil {
			s.last = s.sharers[i].requester
		}
		switch {
		case some && !other.started:
		case life == (lifecycle{}):
			life = other.life
		default:
			life = life.strictest(other.life)
		}
	}
	if s.current != nil && life != s.life {
		s.current = life.token(s.current.grant, s.current.obtained)
	}
	s.life = life
	s.schedule()
}

// rest ends what the source does on its own. A fetch that somebody waits for goes on
// until it has ended, or until nobody waits any more. mu is held.
func (s *tokenSource) rest() {
	s.warming = false
	if s.server != nil {
		s.server.remind(s, nil)
	}
	s.stopTimer()
	if f := s.inflight; f != nil && f.waiters == 0 {
		s.abandon(f)
	}
}

// Destruct ends what the source has started. caddy.UsagePool calls it.
func (s *tokenSource) Destruct() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rest()
	return nil
}

// fetch is one fetch in flight. t, err, span and unchanged may be read once done
// is closed.
type fetch struct {
	done   chan struct{}
	t      *token
	err    error
	span   trace.SpanContext
	cancel context.CancelCauseFunc

	unchanged bool // the secrets have not changed, so there was no token request

	// If the secrets still have this fingerprint, the fetch ends at once with the last
	// error. "": they don't matter.
	failedWith string
	lastErr    *fetchError

	started  time.Time     // when somebody wanted it; does not change
	renews   bool          // does not change: there was a valid token when it started
	joined   chan struct{} // see attempts
	attempts attempts

	// Guarded by the source's mu:
	slot    *slot // among all clients of the server; nil at first
	waiters int
	awaited bool         // somebody needed the token, and may have left
	cause   *refusal     // that brought it about, or nil
	links   []trace.Link // links to the waiting requests that are traced
}

// ended reports whether the fetch has ended.
func (f *fetch) ended() bool {
	select {
	case <-f.done:
		return true
	default:
		return false
	}
}

// instead reports whether a fetch has ended with what another instance has got, or said.
func (f *fetch) instead() bool {
	return isElsewhere(f.err) || (f.t != nil && f.t.grant.taken)
}

// progress says how far a fetch is that has not ended. The source's mu is held.
func (f *fetch) progress() progress {
	if f.slot == nil {
		return progress{}
	}
	return f.slot.progress()
}

// start returns the fetch in flight, or starts one. With onlyIfChanged, the new
// fetch ends with the last error unless the secrets have changed since. mu is
// held.
func (s *tokenSource) start(onlyIfChanged bool) *fetch {
	return s.startFor(onlyIfChanged, fleetView{})
}

// startFor is start with what other instances may change about the fetch. mu is held.
func (s *tokenSource) startFor(onlyIfChanged bool, view fleetView) *fetch {
	if s.inflight != nil {
		return s.inflight
	}
	s.stopTimer()
	view.held = s.held
	now := time.Now()
	s.nextCheckAt = now.Add(secretCheckInterval)

	// The fetch has its own context. With the context of a caller, the fetch
	// would end when the caller leaves. Such a context also has values that make
	// Caddy's HTTP transport dial the upstream: the client's secret would go
	// there.
	ctx, cancel := context.WithCancelCause(context.Background())
	joined := make(chan struct{}, 1)
	f := &fetch{
		done: make(chan struct{}), joined: joined, cancel: cancel,
		started: now, renews: s.valid(now), awaited: s.wanted && !s.valid(now),
	}
	f.attempts = attempts{
		requester: s.last, life: s.life, current: s.current, granted: slices.Clone(s.granted), failures: s.failures, last: s.lastErr,
		silence: max(s.life.fetchTimeout/silenceDivisor, 2*s.usual.median()),
		joined:  joined, needed: func() bool { return s.needs(f) }, queued: func(t *slot) { s.queue(f, t) }, newest: s.newest,
		view: view, notBefore: s.takenNotBefore,
		began: now, tried: now, // in case there is no attempt
	}
	if onlyIfChanged {
		f.failedWith, f.lastErr = s.failedWith, s.lastErr
	}
	s.inflight = f
	go s.run(ctx, f)
	return f
}

// takenNotBefore returns when an operator last took a token out of use.
func (s *tokenSource) takenNotBefore() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.notBefore
}

// queue notes that f waits for its turn, or has it.
func (s *tokenSource) queue(f *fetch, t *slot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.server != nil && s.server != t.queue { // the token endpoint has moved
		s.server.remind(s, nil)
	}
	f.slot, s.server = t, t.queue
}

// newest returns who makes the token requests now.
func (s *tokenSource) newest() requester {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

// revived is called when the server gives tokens again, after it gave nobody one. What has
// failed need not wait for the end of its back-off.
func (s *tokenSource) revived() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inflight != nil || s.lastErr == nil || leftAlone(s.lastErr) {
		return
	}
	now := time.Now()
	s.lastErr = &fetchError{err: s.lastErr.err, retryAt: now, soonest: now}
	s.schedule()
}

// join begins a caller's wait. mu is held.
func (s *tokenSource) join(ctx context.Context, f *fetch) {
	f.waiters++
	f.awaited = true
	f.linkTo(ctx)
	select {
	case f.joined <- struct{}{}:
	default: // the fetch has not yet seen the last one
	}
}

// leave ends a caller's wait. If no config uses the source any more, only those who
// wait still need the fetch: the last one to leave ends it.
func (s *tokenSource) leave(f *fetch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.waiters--
	if f.waiters == 0 && s.unused() {
		s.abandon(f)
	}
}

// abandon cancels a fetch that nobody needs. From now on, nobody joins it: a
// later caller starts another fetch. mu is held.
func (s *tokenSource) abandon(f *fetch) {
	f.cancel(errReleased)
	if s.inflight == f {
		s.inflight = nil
	}
}

// run is the goroutine of one fetch, and ends with it. The fetch ends at its
// timeout at the latest, without the time in which others have their turn.
func (s *tokenSource) run(ctx context.Context, f *fetch) {
	defer f.cancel(nil)
	look, cancel := context.WithTimeout(ctx, f.attempts.life.fetchTimeout)
	err := f.attempts.look(look)
	cancel()
	f.unchanged = err == nil && f.failedWith != "" && f.failedWith == f.attempts.secrets
	if err == nil && !f.unchanged {
		f.t, err = f.attempts.get(ctx)
	}
	now := time.Now()
	released := err != nil && errors.Is(context.Cause(ctx), errReleased)
	asked := !f.unchanged && !isElsewhere(err) && (f.t == nil || !f.t.grant.taken)
	if asked && !released {
		_ = safely(func() error {
			s.trace(f, f.attempts.requester, err)
			return nil
		})
	}

	s.mu.Lock()
	if asked {
		s.requested = now
	}
	var failed *fetchError
	switch {
	case f.unchanged:
		f.err = f.lastErr
	case released:
		f.err = errReleased // this error says nothing about the server
	case err != nil:
		failed = s.fail(f, err, now)
		f.err = failed
	default:
		if f.attempts.life != s.life { // the settings have changed meanwhile
			f.t = s.life.token(f.t.grant, f.t.obtained)
		}
		s.succeed(f.t)
	}
	s.finish(f)
	s.mu.Unlock()

	_ = safely(func() error {
		f.attempts.publish(ctx, f.t, failed)
		return nil
	})
	if f.t != nil || failed != nil {
		_ = safely(func() error {
			f.attempts.fetched(f.t, failed, f.attempts.failures)
			return nil
		})
	}
}

// finish publishes the result of f and sets the timer for the next fetch. mu is
// held.
func (s *tokenSource) finish(f *fetch) {
	if s.inflight == f {
		s.inflight = nil
	}
	if f.err != nil && f.cause != nil {
		f.cause.at.NoToken(&s.places.budget, &f.cause.Refusal)
	}
	// Those who wait here use the token. This counts as wanting the next one.
	s.wanted = f.waiters > 0
	close(f.done)
	s.schedule()
}

// needs reports whether callers wait for f, and have no token.
func (s *tokenSource) needs(f *fetch) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return f.waiters > 0 && !s.valid(time.Now())
}

// unused reports whether no config uses the source. mu is held.
func (s *tokenSource) unused() bool { return len(s.sharers) == 0 }

// runs reports whether a config runs that uses the source. Otherwise, it fetches nothing
// on its own. mu is held.
func (s *tokenSource) runs() bool {
	return slices.ContainsFunc(s.sharers, func(other sharer) bool { return other.started })
}

// schedule sets the timer for the next fetch of a source in use. mu is held.
func (s *tokenSource) schedule() {
	if !s.runs() || s.inflight != nil {
		return
	}
	var at time.Time // in the past for a new source, or after a fetch that was abandoned
	if s.current != nil {
		at = s.current.refreshAt
	}
	if s.lastErr != nil && at.Before(s.lastErr.retryAt) {
		at = s.lastErr.retryAt // a fetch may fail while the token is fresh
	}
	if at.IsZero() {
		return
	}
	s.stopTimer()
	s.timer = time.AfterFunc(time.Until(at), s.refresh)
}

func (s *tokenSource) stopTimer() {
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
}

// refresh is called by the timer. It renews the token of a source in use. So the
// next request finds a fresh token, even if it comes a long time after the last
// one.
func (s *tokenSource) refresh() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	// Repeat a failed renewal while the old token is valid, even if nobody asked for
	// it.
	refreshing := s.failures > 0 && s.valid(now)
	// When the timer fires, somebody else may have renewed the token already.
	// Then no fetch is due.
	if (s.wanted || s.kept > 0 || s.warming || refreshing) && s.runs() && s.due(now) {
		s.start(false)
	}
}

// fail notes that f has failed, and computes when to try again. mu is held.
func (s *tokenSource) fail(f *fetch, err error, now time.Time) *fetchError {
	if s.failures == 0 {
		s.failingFrom = f.attempts.began
	}
	if s.failures == 0 || !isElsewhere(err) { // otherwise it has not failed again, but waits longer
		s.failures++
	}
	s.failedWith = ""
	if isPermanent(err) {
		s.failedWith, s.warming = f.attempts.secrets, false
	}
	last := failure{err: err, began: f.attempts.tried, ended: now, lasted: now.Sub(s.failingFrom), login: !f.attempts.repeatable()}
	if s.valid(now) {
		last.left = s.current.expires.Sub(now)
	}
	s.held = s.held.next(err)
	var soonest, retryAt time.Time
	if until := heldUntil(err); until.IsZero() {
		soonest, retryAt = s.streak.next(last)
	} else {
		soonest = now.Add(min(heldWithoutToken, until.Sub(now)))
		// Not all at once: the server may just have come back. But before the end of the token.
		retryAt = until.Add(jitter(max(minBackoff, until.Sub(now)/4)))
		if s.current != nil && retryAt.After(s.current.usableTo) {
			retryAt = until
		}
	}
	if f.awaited && last.left == 0 {
		retryAt = soonest // requests are refused meanwhile
	}
	s.lastErr = &fetchError{err: err, retryAt: retryAt, soonest: soonest}
	if s.server != nil && !s.unused() && !leftAlone(err) && !last.login { // see rest
		s.server.remind(s, s.revived)
	}
	return s.lastErr
}

// succeed notes a new token. mu is held.
func (s *tokenSource) succeed(t *token) {
	if s.granting != nil && !t.is(s.current) {
		close(s.granting)
		s.granting = nil
	}
	s.current = t
	if !slices.Contains(s.granted, t.value) {
		s.granted = append(s.granted, t.value)
		s.granted = s.granted[max(0, len(s.granted)-maxGranted):]
	}
	if !t.grant.taken {
		s.usual.add(t.grant.took)
	}
	s.warming, s.held = false, heldBy{}
	s.failures, s.failingFrom, s.lastErr, s.streak, s.failedWith = 0, time.Time{}, nil, streak{}, ""
}
