package outboundauth

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
)

// requester makes the token requests of a source. A source is shared by all
// configs that need the same token, and each of them brings its own.
type requester interface {
	// request makes one token request.
	request(ctx context.Context) (grant, error)

	// fingerprint tells the client's current secrets apart without holding
	// them. It may do I/O: placeholders can name files.
	fingerprint(ctx context.Context) string

	// attributes are what a span tells of the client and the server.
	attributes() []attribute.KeyValue

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
//	state            a caller gets              side effect
//	fresh            the token, at once         none
//	stale            the token, at once         one fetch in the background
//	absent, expired  the result of the one      starts it; within a back-off
//	                 fetch in flight            the last error, at once
//	refused by an    the same, or the refused   the same
//	upstream         one if it is still valid
type tokenSource struct {
	lifecycle

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

// Token returns a token that may be used now. It waits for at most one fetch
// and no longer than ctx lasts; the error is then ctx's own, otherwise a
// *fetchError.
func (s *tokenSource) Token(ctx context.Context) (*token, error) {
	t, _, err := s.obtain(ctx)
	return t, err
}

// acquisition is how a caller got a token, and how long that took; 0 from the
// cache.
type acquisition struct {
	use  tokenUse
	wait time.Duration
}

// obtain is Token, and tells how the caller got it.
func (s *tokenSource) obtain(ctx context.Context) (*token, acquisition, error) {
	now := time.Now()
	s.mu.Lock()
	s.wanted = true
	if t := s.usable(now); t != nil {
		got := acquisition{use: tokenFresh}
		if !now.Before(t.refreshAt) {
			got.use = tokenStale
			if !s.backingOff(now) {
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

// lastResort returns the current token if it is valid, though refused: not
// every upstream may refuse it, and it must not be lost to those who take it
// when there is no other. mu is held.
func (s *tokenSource) lastResort(since, now time.Time, err error) (*token, acquisition, error) {
	got := acquisition{tokenNone, now.Sub(since)}
	if s.current != nil && now.Before(s.current.usableTo) {
		got.use = tokenStale
		return s.current, got, nil
	}
	return nil, got, err
}

// Cached returns the token if there is one that may be used now and was not
// refused, otherwise nil. It neither waits nor fetches.
func (s *tokenSource) Cached() *token {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.usable(time.Now())
}

// Ready is Token for those who can't wait: it returns nil if there is no token
// at hand, and has it fetched in the background.
func (s *tokenSource) Ready() *token {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.wanted = true
	t := s.usable(now)
	if (t == nil || !now.Before(t.refreshAt)) && !s.released && !s.backingOff(now) {
		s.start(false)
	}
	return t
}

// Renew requests a token now, even if the current one is good or the last
// failure was just now, and waits for it as Token does.
func (s *tokenSource) Renew(ctx context.Context) (*token, error) {
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

// Invalidate takes t, which an upstream refused, out of use. A token that has
// replaced t meanwhile stays: a late refusal says nothing about it. It returns
// whether this was the first to take t out of use.
func (s *tokenSource) Invalidate(t *token) bool {
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
	if s.usable(now) == nil && !s.released && !s.backingOff(now) {
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

// refresh is called by the timer. It renews the token of a source in use, so
// that it is fresh when the next request comes, however long after the last.
func (s *tokenSource) refresh() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	// A failed renewal is repeated while its token lives, asked for or not.
	renewing := s.failures > 0 && s.current != nil && now.Before(s.current.usableTo)
	// The timer may have fired while somebody else saw to it.
	due := s.usable(now) == nil || !now.Before(s.current.refreshAt)
	if due && (s.wanted || renewing) && !s.released && !s.backingOff(now) {
		s.start(false)
	}
}

func (s *tokenSource) stopTimer() {
	if s.timer != nil {
		s.timer.Stop()
	}
}
