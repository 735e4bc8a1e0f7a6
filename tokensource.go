// One cached access token: when it is fetched, who waits, and when a fetch is repeated.

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

// A requester makes the token requests of a source. All configs that need the
// same token share one source. Each of these configs brings its own requester.
type requester interface {
	// request makes one token request. The grant says when the request began,
	// and how long it took.
	request(ctx context.Context) (grant, error)

	// fingerprint returns a text that changes when the client's secrets change,
	// and that does not hold them. It may do I/O, because placeholders can name
	// files.
	fingerprint(ctx context.Context) string

	// describe says who the client is. It does no I/O.
	describe() description

	// fetched is called when a fetch has ended, with a token or with err.
	// failures is how many fetches failed before this one. A call may begin
	// while another one is under way.
	fetched(t *token, err *fetchError, failures int)
}

// errReleased ends a fetch that was abandoned, because the last config that used
// the source was unloaded. It is not context.Canceled: Caddy takes every
// context.Canceled for a caller who went away.
var errReleased = errors.New("the configuration that asked for the token was unloaded")

// tokenSource caches one access token and keeps it fresh. It is safe for
// concurrent use. A fetch belongs to the source and not to a caller: it goes
// on when the caller leaves, and its result serves everybody.
//
// A token is stale when it is due to be replaced. What happens depends on the
// state of the token:
//
//	event        fresh      stale              absent, expired or refused
//	Token        the token  the token; fetch   waits for the fetch in flight, or starts one and waits;
//	                                           within a back-off, returns the last error at once;
//	                                           if a refused token is still valid, returns that token
//	                                           instead of an error
//	Peek         the token  the token          nothing
//	Warm         -          -                  fetch
//	FetchNow     waits for a fetch, whatever the state, unless it is too early
//	Refuse       the token becomes refused     -
//	Forget       the token becomes absent, unless it is too early
//	timer        -          fetch, if the token is wanted or kept, or if the last fetch failed
//
// A fetch that nobody waits for does not start within a back-off. After the last
// config that uses the source has ended, only Token and FetchNow start a fetch.
type tokenSource struct {
	lifecycle
	places places // what is known about the upstreams that the token is sent to

	mu sync.Mutex // guards all fields below; never held during I/O

	// Those who share the source, newest last. The newest makes the token
	// requests, so no request uses the modules of a config that has ended. If
	// nobody is left, the last one still makes them: Caddy may serve requests
	// after it has unloaded their config.
	requesters []requester
	last       requester

	tracers trace.TracerProvider // the provider of the last traced request; nil if there was none

	current  *token
	refused  bool // an upstream has refused current; it is used only if there is no other token
	inflight *fetch
	timer    *time.Timer // starts the next fetch of a source in use

	requested time.Time // when the last token request ended

	// Whether a caller has asked for a token since the last fetch ended. The
	// token of a source that nobody asks is not renewed.
	wanted bool

	kept int // how many clients' health checks need the token

	// About the failures since the last success. All are zero if there was no
	// failure.
	failures    int
	lastErr     *fetchError
	failedWith  string    // the fingerprint of the secrets that failed; "" after a transient error
	nextCheckAt time.Time // when the fingerprint may be compared again

	released bool
}

func newTokenSource(l lifecycle) *tokenSource { return &tokenSource{lifecycle: l} }

// Format keeps the token out of everything that prints values, such as the
// panics of caddy.UsagePool.
func (s *tokenSource) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("tokenSource")) }

// sources holds the token sources of all configs that are in use, by sourceKey.
// Equal clients share one token. A reload takes over the tokens of the config
// that it replaces.
var sources = caddy.NewUsagePool()

// sourceKey is a digest of everything that shapes a token request and the life
// of its token. It is a digest because a config may hold a secret as text, and
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
// waits for one fetch at most. If ctx ends before the fetch, the error is the
// error of ctx. Otherwise it is a *fetchError.
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

// lastResort returns the current token if it is valid, even if an upstream has
// refused it. Otherwise it returns err. Some upstreams may still accept the
// refused token, so they go on getting it while there is no other token. mu is
// held.
func (s *tokenSource) lastResort(since, now time.Time, err error) (*token, acquisition, error) {
	got := acquisition{tokenNone, now.Sub(since)}
	if s.current != nil && now.Before(s.current.usableTo) {
		got.use = tokenStale
		return s.current, got, nil
	}
	return nil, got, err
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

// checkDue reports whether it is time to compare the secrets again after a
// permanent error. If they have changed, a fetch need not wait for the end of
// the back-off. mu is held.
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

// FetchNow fetches a new token and waits for it, as Token does. It does so even
// if the current token is good, or if the last fetch failed a moment ago. If
// nobody may ask the server now, it returns an *earlyError.
func (s *tokenSource) FetchNow(ctx context.Context) (*token, error) {
	for looked := false; ; looked = true {
		s.mu.Lock()
		now := time.Now()
		early := s.early(now)
		if early != nil && s.inflight == nil && (looked || early.cause == nil || !s.checkDue(now)) {
			s.mu.Unlock()
			return nil, early
		}
		f := s.start(early != nil)
		s.join(ctx, f)
		s.mu.Unlock()
		select {
		case <-f.done:
			s.leave(f)
			if !f.unchanged { // otherwise the fetch has only compared the secrets
				return f.t, f.err
			}
		case <-ctx.Done():
			s.leave(f)
			return nil, ctx.Err()
		}
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
	if s.lastErr == nil {
		return nil
	}
	until := s.lastErr.retryAt
	if !isPermanent(s.lastErr) {
		until = s.requested.Add(min(retryAfter(s.lastErr), maxRetryAfter))
	}
	if now.Before(until) {
		return &earlyError{until, s.lastErr}
	}
	return nil
}

// Forget takes the current token out of use, even as the last resort. If a token
// was requested only a moment ago, it returns an *earlyError: the next request
// would make the gateway fetch another one.
func (s *tokenSource) Forget() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if early := s.early(time.Now()); s.current != nil && early != nil && early.cause == nil {
		return early
	}
	s.current = nil
	return nil
}

// Refuse takes t out of use, because an upstream has refused it. If another
// token has replaced t meanwhile, that token stays in use: a late refusal of t
// says nothing about it. Refuse reports whether this was the first refusal of t.
func (s *tokenSource) Refuse(t *token) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current != t || s.refused {
		return false
	}
	s.refused = true
	return true
}

// Warm starts the first fetch in the background. It does nothing if there is a
// token that may be used, or if the source is in a back-off.
func (s *tokenSource) Warm() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if !s.released && s.usable(now) == nil && s.due(now) {
		s.start(false)
	}
}

// attach adds a user of the source. From now on, this user makes the token
// requests.
func (s *tokenSource) attach(r requester) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requesters = append(s.requesters, r)
	s.last = r
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

// Destruct ends what the source has started. caddy.UsagePool calls it. A fetch
// that somebody waits for goes on until it has ended, or until nobody waits any
// more.
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

// leave ends a caller's wait. If the source has been released, only those who
// wait still need the fetch: the last one to leave ends it.
func (s *tokenSource) leave(f *fetch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.waiters--
	if f.waiters == 0 && s.released {
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

// fetch is one fetch in flight. t, err, span and unchanged may be read once done
// is closed.
type fetch struct {
	done   chan struct{}
	t      *token
	err    error
	span   trace.SpanContext
	cancel context.CancelCauseFunc

	unchanged bool // the secrets have not changed, so there was no token request

	// Only the goroutine of the fetch uses these:
	started time.Time
	retries []retry

	// Guarded by the source's mu:
	waiters int
	links   []trace.Link // links to the waiting requests that are traced
}

// retry is a quick retry of a token request: when it was decided on, and which
// error was the cause.
type retry struct {
	at    time.Time
	cause error
}

// fetchStart is what a fetch has to know about the source when it starts.
type fetchStart struct {
	requester
	failures int    // how many fetches failed before this one
	current  *token // the token that it is to replace

	// failedWith may be a fingerprint of secrets. If the secrets still have it,
	// the fetch ends at once with err, the last error.
	failedWith string
	err        *fetchError
}

// start returns the fetch in flight, or starts one. With onlyIfChanged, the new
// fetch ends with the last error unless the secrets have changed since. mu is
// held.
func (s *tokenSource) start(onlyIfChanged bool) *fetch {
	if s.inflight != nil {
		return s.inflight
	}
	s.stopTimer()
	now := time.Now()
	s.nextCheckAt = now.Add(secretCheckInterval)

	// The fetch has its own context. With the context of a caller, the fetch
	// would end when the caller leaves. Such a context also has values that make
	// Caddy's HTTP transport dial the upstream: the client's secret would go
	// there.
	ctx, cancel := context.WithCancelCause(context.Background())
	f := &fetch{done: make(chan struct{}), cancel: cancel, started: now}
	s.inflight = f
	before := fetchStart{requester: s.last, failures: s.failures, current: s.current}
	if onlyIfChanged {
		before.failedWith, before.err = s.failedWith, s.lastErr
	}
	go s.run(ctx, f, before)
	return f
}

// run is the goroutine of one fetch, and ends with it. The fetch ends at its
// timeout at the latest, and earlier if it is abandoned.
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
		err = a.current.keptOut(err)
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
	if !f.unchanged {
		s.requested = now
	}
	var failed *fetchError
	switch {
	case f.unchanged:
		f.err = a.err
	case released:
		f.err = errReleased // this error says nothing about the server
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

// requestToken makes one token request, and a token of the grant. A source and
// `caddy oauth2-token` get all their tokens from it. If nothing is left of the
// grant's life, requestToken returns an error together with the grant.
func (l lifecycle) requestToken(ctx context.Context, r requester) (*token, grant, error) {
	g, err := r.request(ctx)
	if err != nil {
		return nil, grant{}, err
	}
	t, err := l.newToken(g)
	return t, g, err
}

// requestWithRetries makes the token request. After a transient error it tries
// again, up to three times in all. It does so only if the fetch before did not
// fail. A fetch after a failed one is a repetition already, and the waits
// between repetitions grow. If nothing is left of a grant's life, it does not
// try again at once: the next grant would be no better.
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

// finish publishes the result of f and sets the timer for the next fetch. mu is
// held.
func (s *tokenSource) finish(f *fetch) {
	if s.inflight == f {
		s.inflight = nil
	}
	// Those who wait here use the token. This counts as wanting the next one.
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
	default: // the fetch was abandoned
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

// refresh is called by the timer. It renews the token of a source in use. So the
// next request finds a fresh token, even if it comes a long time after the last
// one.
func (s *tokenSource) refresh() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	// Repeat a failed renewal while the old token may be used, even if nobody
	// asked for it.
	refreshing := s.failures > 0 && s.current != nil && now.Before(s.current.usableTo)
	// When the timer fires, somebody else may have renewed the token already.
	// Then no fetch is due.
	if (s.wanted || s.kept > 0 || refreshing) && !s.released && s.due(now) {
		s.start(false)
	}
}

// fail notes a failure and computes when to try again. mu is held.
func (s *tokenSource) fail(err error, fingerprint string, now time.Time) *fetchError {
	if isPermanent(err) != (s.failedWith != "") {
		s.failures = 0 // these were of the other kind, and say nothing about this one
	}
	s.failedWith = ""
	if isPermanent(err) {
		s.failedWith = fingerprint
	}
	var left time.Duration // how long the token that is in use may still be used
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
