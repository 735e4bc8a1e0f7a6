// One cached access token: when it is fetched, who waits, and when it is tried again.

package outboundauth

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/caddyserver/caddy/v2"
)

// requester makes the token requests of a source. A source is shared by all
// configs that need the same token, and each of them brings its own.
type requester interface {
	// request makes one token request. The grant says when, and how long it took.
	request(ctx context.Context) (grant, error)

	// fingerprint tells the client's current secrets apart without holding
	// them. It may do I/O: placeholders can name files.
	fingerprint(ctx context.Context) string

	// describe tells who the client is. It does no I/O.
	describe() description

	// fetched is told how each fetch ended: with a token, at the first try or
	// after failures, or with err. It may be called while the next is told.
	fetched(t *token, err *fetchError, failures int)
}

// errReleased ends the wait for a fetch that was given up because the last
// config that used the source was unloaded. An error of its own, because
// Caddy takes every context.Canceled for a client that went away.
var errReleased = errors.New("the configuration that asked for the token was unloaded")

// tokenSource caches one access token and keeps it fresh. It is safe for
// concurrent use. A fetch belongs to the source and not to a caller: it goes
// on when the caller leaves, and its result serves everybody.
//
// What happens depends on the state of its token, which is stale when it is due
// to be replaced:
//
//	event        fresh      stale              absent, expired or refused
//	Token        the token  the token; fetch   waits for the one fetch in flight, which it starts;
//	                                           within a back-off the last error, at once; instead
//	                                           of an error a token that is refused but valid
//	Peek         the token  the token          nothing
//	PeekOrFetch  the token  the token; fetch   nothing; fetch
//	Warm         -          -                  fetch
//	FetchNow     waits for a fetch, whatever the state
//	Refuse       makes it refused              -
//	Forget       makes it absent
//	timer        -          fetch, if wanted or if the last one failed
//
// A fetch that nobody waits for does not start within a back-off. After the last
// config that uses the source has ended, only Token and FetchNow start one.
type tokenSource struct {
	lifecycle
	places places // that the token is sent to

	mu sync.Mutex // guards all fields below; never held over I/O

	// Those who share the source, newest last. The newest makes the requests,
	// so none is made with the modules of a config that ended; without any,
	// the last one does, for requests that are still on their way: Caddy
	// serves these after their config has been unloaded.
	requesters []requester
	last       requester

	tracers trace.TracerProvider // of the last traced request; nil: none

	current  *token
	refused  bool // current, by an upstream; it is used only if there is no other
	inflight *fetch
	timer    *time.Timer // starts the next fetch of a source in use

	// wanted: a caller asked since the last fetch ended. A source that
	// nobody wants lets its token lapse.
	wanted bool

	// Of the failures since the last success; all zero without one.
	failures    int
	lastErr     *fetchError
	failedWith  string    // the secrets' fingerprint; "" after a transient error
	nextCheckAt time.Time // of the fingerprint

	released bool
}

func newTokenSource(l lifecycle) *tokenSource { return &tokenSource{lifecycle: l} }

// Format keeps the token out of everything that prints values, such as the
// panics of caddy.UsagePool.
func (s *tokenSource) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("tokenSource")) }

// sources shares the token sources among all configs that are in use, by
// sourceKey: equal clients share one token, and a reload takes over the
// tokens of the config that it replaces.
var sources = caddy.NewUsagePool()

// sourceKey is a digest of everything that shapes a token request and the
// life of its token. A digest, because a secret that stands in the config
// itself is part of it, and caddy.UsagePool may print its keys.
type sourceKey [sha256.Size]byte

// How a request got its token.
type tokenUse int

const (
	tokenFresh  tokenUse = iota // from the cache
	tokenStale                  // from the cache, while it is being replaced
	tokenWaited                 // fetched for this request
	tokenNone                   // there was none
)

// acquisition is how a caller got a token, and how long that took; 0 from the
// cache.
type acquisition struct {
	use  tokenUse
	wait time.Duration
}

// Token returns a token that may be used now, and how the caller got it. It waits
// for at most one fetch and no longer than ctx lasts; the error is then ctx's own,
// otherwise a *fetchError.
func (s *tokenSource) Token(ctx context.Context) (*token, acquisition, error) {
	now := time.Now()
	s.mu.Lock()
	s.wanted = true
	if t := s.usable(now); t != nil {
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
	if s.inflight == nil && s.backingOff(now) && !s.checkDue(now) {
		defer s.mu.Unlock()
		return s.lastResort(now, now, s.lastErr)
	}
	f := s.start(s.backingOff(now))
	s.join(ctx, f)
	s.mu.Unlock()

	defer s.leave(f)
	select {
	case <-f.done:
		linkFrom(ctx, f.span)
		if f.err != nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.lastResort(now, time.Now(), f.err)
		}
		return f.t, acquisition{tokenWaited, time.Since(now)}, nil
	case <-ctx.Done():
		return nil, acquisition{tokenNone, time.Since(now)}, ctx.Err()
	}
}

// usable returns the current token, if it is valid and no upstream has refused
// it. mu is held.
func (s *tokenSource) usable(now time.Time) *token {
	if s.current != nil && !s.refused && now.Before(s.current.usableTo) {
		return s.current
	}
	return nil
}

// lastResort returns the current token if it is valid, though an upstream has
// refused it, and otherwise err. While there is no other token, upstreams that
// accept this one go on getting it. mu is held.
func (s *tokenSource) lastResort(since, now time.Time, err error) (*token, acquisition, error) {
	got := acquisition{tokenNone, now.Sub(since)}
	if s.current != nil && now.Before(s.current.usableTo) {
		got.use = tokenStale
		return s.current, got, nil
	}
	return nil, got, err
}

// due reports whether it is time for a fetch that nobody waits for: the token is
// not fresh, and it is not too early after a failure. mu is held.
func (s *tokenSource) due(now time.Time) bool {
	fresh := s.usable(now) != nil && now.Before(s.current.refreshAt)
	return !fresh && !s.backingOff(now)
}

// backingOff reports whether it is too early to fetch again. mu is held.
func (s *tokenSource) backingOff(now time.Time) bool {
	return s.lastErr != nil && now.Before(s.lastErr.retryAt)
}

// checkDue reports whether the secrets of a permanent error may be compared
// again: with a new secret it is not too early to fetch. mu is held.
func (s *tokenSource) checkDue(now time.Time) bool {
	return s.failedWith != "" && !now.Before(s.nextCheckAt)
}

// Peek returns the token if there is one that may be used now and was not
// refused, otherwise nil. It neither waits nor fetches.
func (s *tokenSource) Peek() *token {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.usable(time.Now())
}

// PeekOrFetch is Token for those who can't wait: it returns nil if there is no
// token at hand, and has it fetched in the background.
func (s *tokenSource) PeekOrFetch() *token {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.wanted = true
	if !s.released && s.due(now) {
		s.start(false)
	}
	return s.usable(now)
}

// FetchNow requests a token now, even if the current one is good or the last
// failure was just now, and waits for it as Token does.
func (s *tokenSource) FetchNow(ctx context.Context) (*token, error) {
	for {
		s.mu.Lock()
		f := s.start(false)
		s.join(ctx, f)
		s.mu.Unlock()
		select {
		case <-f.done:
			s.leave(f)
			if !f.unchanged { // or the fetch has only looked for another secret
				return f.t, f.err
			}
		case <-ctx.Done():
			s.leave(f)
			return nil, ctx.Err()
		}
	}
}

// Forget takes the current token out of use, and does not keep it as the last
// resort.
func (s *tokenSource) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = nil
}

// Refuse takes t, which an upstream refused, out of use. A token that has
// replaced t meanwhile stays: a late refusal says nothing about it. It reports
// whether this was the first refusal of t.
func (s *tokenSource) Refuse(t *token) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current != t || s.refused {
		return false
	}
	s.refused = true
	return true
}

// Warm starts the first fetch in the background. A source that has a token,
// or had none to give a moment ago, is left alone.
func (s *tokenSource) Warm() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if !s.released && s.usable(now) == nil && s.due(now) {
		s.start(false)
	}
}

// attach adds a user of the source, who makes its requests from now on.
func (s *tokenSource) attach(r requester) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requesters = append(s.requesters, r)
	s.last = r
}

// detach removes a user.
func (s *tokenSource) detach(r requester) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.requesters, r); i >= 0 {
		s.requesters = slices.Delete(s.requesters, i, i+1)
	}
	if n := len(s.requesters); n > 0 {
		s.last = s.requesters[n-1]
	}
}

// Destruct ends what the source has started, for caddy.UsagePool. Only a
// fetch that somebody waits for goes on, until it has ended or they have left.
func (s *tokenSource) Destruct() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.released = true
	s.stopTimer()
	if f := s.inflight; f != nil && f.waiters == 0 {
		s.abandon(f)
	}
	return nil
}

// join begins a caller's wait. mu is held.
func (s *tokenSource) join(ctx context.Context, f *fetch) {
	f.waiters++
	f.linkTo(ctx)
}

// leave ends a caller's wait. Nobody but its callers needs the fetch of a
// source that was released.
func (s *tokenSource) leave(f *fetch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.waiters--
	if f.waiters == 0 && s.released {
		s.abandon(f)
	}
}

// abandon cancels a fetch that nobody needs. Nobody joins it from now on: a
// caller who comes later starts another. mu is held.
func (s *tokenSource) abandon(f *fetch) {
	f.cancel(errReleased)
	if s.inflight == f {
		s.inflight = nil
	}
}

// fetch is one fetch in flight. t, err, span and unchanged may be read once done
// is closed.
type fetch struct {
	done   chan struct{}
	t      *token
	err    error
	span   trace.SpanContext
	cancel context.CancelCauseFunc

	unchanged bool // the secrets: there was no token request

	// Of the goroutine of the fetch alone:
	started time.Time
	retries []retry

	// Guarded by the source's mu:
	waiters int
	links   []trace.Link // to the waiters that are traced
}

// retry is a quick retry of a token request: when it was decided on, and why.
type retry struct {
	at    time.Time
	cause error
}

// fetchStart is what a fetch has to know of the source when it starts.
type fetchStart struct {
	requester
	failures int // before it

	// If failedWith is not empty: of the last error, which stands if the
	// secrets' fingerprint is still the same.
	failedWith string
	err        *fetchError
}

// start returns the fetch in flight, or starts one. With onlyIfChanged the
// fetch ends in the last error unless the secrets have changed since. mu is
// held.
func (s *tokenSource) start(onlyIfChanged bool) *fetch {
	if s.inflight != nil {
		return s.inflight
	}
	s.stopTimer()
	now := time.Now()
	s.nextCheckAt = now.Add(secretCheckInterval)

	// The context is the source's own. A caller's would end the fetch with
	// the caller, and carries values that make Caddy's HTTP transport dial
	// the upstream: the client's secret would go there.
	ctx, cancel := context.WithCancelCause(context.Background())
	f := &fetch{done: make(chan struct{}), cancel: cancel, started: now}
	s.inflight = f
	before := fetchStart{requester: s.last, failures: s.failures}
	if onlyIfChanged {
		before.failedWith, before.err = s.failedWith, s.lastErr
	}
	go s.run(ctx, f, before)
	return f
}

// run is the goroutine of one fetch: it ends with the fetch, which ends by
// its timeout, or earlier when the source is released.
func (s *tokenSource) run(ctx context.Context, f *fetch, a fetchStart) {
	defer f.cancel(nil)
	ctx, cancel := context.WithTimeout(ctx, s.fetchTimeout)
	defer cancel()

	var fingerprint string
	err := safely(func() error {
		fingerprint = a.fingerprint(ctx)
		return nil
	})
	f.unchanged = err == nil && a.failedWith != "" && a.failedWith == fingerprint
	if err == nil && !f.unchanged {
		f.t, err = s.requestWithRetries(ctx, f, a)
	}
	now := time.Now()
	released := err != nil && errors.Is(context.Cause(ctx), errReleased)
	if !f.unchanged && !released {
		_ = safely(func() error {
			s.trace(f, a.requester, err)
			return nil
		})
	}

	s.mu.Lock()
	var failed *fetchError
	switch {
	case f.unchanged:
		f.err = a.err
	case released:
		f.err = errReleased // says nothing about the server
	case err != nil:
		failed = s.fail(err, fingerprint, now)
		f.err = failed
	default:
		s.current, s.refused = f.t, false
		s.failures, s.lastErr, s.failedWith = 0, nil, ""
	}
	s.finish(f)
	s.mu.Unlock()

	if f.t != nil || failed != nil {
		_ = safely(func() error {
			a.fetched(f.t, failed, a.failures)
			return nil
		})
	}
}

// requestToken makes one token request, and a token of what is granted. A source
// and `caddy oauth2-token` have no other way to one. The grant is returned beside
// an error, too, if it is one of which nothing is left.
func (l lifecycle) requestToken(ctx context.Context, r requester) (*token, grant, error) {
	g, err := r.request(ctx)
	if err != nil {
		return nil, grant{}, err
	}
	t, err := l.newToken(g)
	return t, g, err
}

// requestWithRetries makes the token request, in case of a transient error up to three
// times. Only the first fetch that fails repeats itself: those that follow it are
// repetitions already, at growing distances. A grant of which nothing is left is
// not asked for again at once: the next would be no better.
func (s *tokenSource) requestWithRetries(ctx context.Context, f *fetch, a fetchStart) (*token, error) {
	for try := 0; ; try++ {
		var (
			t *token
			g grant
		)
		err := safely(func() (err error) {
			t, g, err = s.requestToken(ctx, a.requester)
			return err
		})
		if err == nil {
			return t, nil
		}
		if cause := context.Cause(ctx); errors.Is(cause, errReleased) {
			return nil, cause
		}
		granted := g.accessToken != ""
		if ctx.Err() != nil || a.failures > 0 || try == quickRetries || granted || isPermanent(err) || retryAfter(err) > 0 {
			return nil, err
		}
		f.retries = append(f.retries, retry{time.Now(), err})
		delay := time.NewTimer(rand.N(quickRetryDelay << try))
		select {
		case <-delay.C:
		case <-ctx.Done():
			delay.Stop()
			return nil, err
		}
	}
}

// finish publishes the result of f and sees to the next fetch. mu is held.
func (s *tokenSource) finish(f *fetch) {
	if s.inflight == f {
		s.inflight = nil
	}
	// Whoever waits here uses the token, which counts as wanting the next.
	s.wanted = f.waiters > 0
	close(f.done)
	if s.released {
		return
	}

	var at time.Time
	switch {
	case s.lastErr != nil:
		at = s.lastErr.retryAt
	case s.current != nil:
		at = s.current.refreshAt
	default: // given up
		return
	}
	s.stopTimer()
	s.timer = time.AfterFunc(time.Until(at), s.refresh)
}

func (s *tokenSource) stopTimer() {
	if s.timer != nil {
		s.timer.Stop()
	}
}

// refresh is called by the timer. It renews the token of a source in use, so
// that it is fresh when the next request comes, however long after the last.
func (s *tokenSource) refresh() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	// A failed renewal is repeated while its token lives, asked for or not.
	refreshing := s.failures > 0 && s.current != nil && now.Before(s.current.usableTo)
	// The timer may have fired while somebody else saw to it: then it is not due.
	if (s.wanted || refreshing) && !s.released && s.due(now) {
		s.start(false)
	}
}

// fail notes a failure and computes when to try again. mu is held.
func (s *tokenSource) fail(err error, fingerprint string, now time.Time) *fetchError {
	if isPermanent(err) != (s.failedWith != "") {
		s.failures = 0 // of the other kind: their number says nothing about this one
	}
	s.failedWith = ""
	if isPermanent(err) {
		s.failedWith = fingerprint
	}
	var left time.Duration // of the token that is still in use
	if t := s.current; t != nil {
		left = max(0, t.usableTo.Sub(now))
	}
	wait, prolongs := retryDelay(err, s.failures, left)
	if !prolongs {
		s.failures = max(0, s.failures-1)
	}
	s.failures++
	s.lastErr = &fetchError{err: err, retryAt: now.Add(wait)}
	return s.lastErr
}
