// One fetch of a token: its token requests, one after another or side by side.

package outboundauth

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"go.opentelemetry.io/otel/trace"
)

// fetch is one fetch in flight. t, err, span and unchanged may be read once done
// is closed.
type fetch struct {
	done   chan struct{}
	t      *token
	err    error
	span   trace.SpanContext
	cancel context.CancelCauseFunc

	unchanged bool // the secrets have not changed, so there was no token request

	started time.Time     // does not change
	renews  bool          // does not change: there was a valid token when it started
	joined  chan struct{} // holds an element if somebody has begun to wait

	// Only the goroutine of the fetch uses these:
	tried   time.Time // when the last attempt began
	retries []retry

	// Guarded by the source's mu:
	waiters int
	awaited bool         // somebody needed the token, and may have left
	links   []trace.Link // links to the waiting requests that are traced
}

// failing reports whether the fetch counts as failed, although it has not ended: it
// should have replaced a token in time, and takes longer than limit.
func (f *fetch) failing(now time.Time, limit time.Duration) bool {
	return f.renews && now.Sub(f.started) > limit
}

// retry is another token request of a fetch: when it was decided on, and which error
// was the cause. The error is errSilent if the request before is still under way.
type retry struct {
	at    time.Time
	cause error
}

// fetchStart is what a fetch has to know about the source when it starts.
type fetchStart struct {
	requester
	life     lifecycle
	failures int           // how many fetches failed before this one
	current  *token        // the token that it is to replace
	silence  time.Duration // how long the server may be silent before it is asked again

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
	f := &fetch{
		done: make(chan struct{}), joined: make(chan struct{}, 1), cancel: cancel,
		started: now, renews: s.valid(now), awaited: s.wanted && !s.valid(now),
	}
	s.inflight = f
	before := fetchStart{
		requester: s.last, life: s.life, failures: s.failures, current: s.current,
		silence: max(s.life.fetchTimeout/silenceDivisor, 2*s.usual.median()),
	}
	if onlyIfChanged {
		before.failedWith, before.err = s.failedWith, s.lastErr
	}
	go s.run(ctx, f, before)
	return f
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
// timeout at the latest.
func (s *tokenSource) run(ctx context.Context, f *fetch, a fetchStart) {
	defer f.cancel(nil)
	ctx, cancel := context.WithTimeout(ctx, a.life.fetchTimeout)
	defer cancel()

	var fingerprint string
	err := safely(func() error {
		fingerprint = a.fingerprint(ctx)
		return nil
	})
	f.unchanged = err == nil && a.failedWith != "" && a.failedWith == fingerprint
	if err == nil && !f.unchanged {
		f.t, err = s.obtain(ctx, f, a)
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
		failed = s.fail(f, err, fingerprint, now)
		f.err = failed
	default:
		s.succeed(f.t)
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

// finish publishes the result of f and sets the timer for the next fetch. mu is
// held.
func (s *tokenSource) finish(f *fetch) {
	if s.inflight == f {
		s.inflight = nil
	}
	// Those who wait here use the token. This counts as wanting the next one.
	s.wanted = f.waiters > 0
	close(f.done)
	s.schedule()
}

// attempt is the result of one token request of a fetch.
type attempt struct {
	t     *token
	spent bool // there was a grant, but nothing is left of its life
	err   error
}

// obtain makes the token requests of a fetch.
//
// After a transient error it tries again, up to three times in all. It does so only if
// the fetch before did not fail. A fetch after a failed one is a repetition already,
// and the waits between repetitions grow. If nothing is left of a grant's life, it does
// not try again at once: the next grant would be no better.
//
// A server may accept a request and never answer it: it has restarted, or something in
// between has lost the connection. While callers wait without a token, obtain asks
// again beside the request that is under way. The first token wins.
func (s *tokenSource) obtain(ctx context.Context, f *fetch, a fetchStart) (*token, error) {
	requests, cancel := context.WithCancel(ctx)
	defer cancel() // the attempts that have lost
	ended := make(chan attempt, maxAttempts)
	underWay := 0
	next := time.NewTimer(a.silence)
	defer next.Stop()
	try := func() {
		f.tried = time.Now()
		underWay++
		next.Reset(a.silence)
		go func() { ended <- a.attempt(requests) }()
	}
	try()
	var told error // what the server said in an attempt that failed while others went on
	for quick := 0; ; {
		select {
		case end := <-ended:
			underWay--
			switch {
			case end.err == nil:
				return end.t, nil
			case errors.Is(context.Cause(ctx), errReleased):
				return nil, errReleased
			case underWay > 0 && ctx.Err() == nil && !leftAlone(end.err):
				told = end.err
				a.silence = min(a.silence, maxAskedBackoff) // it does answer
				next.Reset(time.Until(f.tried.Add(a.silence)))
				continue
			case underWay > 0 && ctx.Err() != nil: // they end, too
				continue
			case told != nil && ctx.Err() != nil:
				return nil, told
			case ctx.Err() != nil || a.failures > 0 || quick == quickRetries || end.spent || leftAlone(end.err):
				return nil, end.err
			}
			f.retries = append(f.retries, retry{time.Now(), end.err})
			delay := time.NewTimer(rand.N(quickRetryDelay << quick))
			select {
			case <-delay.C:
			case <-ctx.Done():
				delay.Stop()
				return nil, end.err
			}
			quick++
			try()
			continue
		case <-next.C:
		case <-f.joined:
		}
		if a.concurrent() && underWay < maxAttempts && time.Since(f.tried) >= a.silence && s.needs(f) {
			f.retries = append(f.retries, retry{time.Now(), errSilent})
			try()
		}
	}
}

// needs reports whether callers wait for f, and have no token.
func (s *tokenSource) needs(f *fetch) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return f.waiters > 0 && !s.valid(time.Now())
}

// attempt makes one token request.
func (a fetchStart) attempt(ctx context.Context) (end attempt) {
	end.err = safely(func() error {
		t, g, err := a.life.requestToken(ctx, a.requester, a.current)
		end.t, end.spent = t, err != nil && g.accessToken != ""
		return err
	})
	return end
}

// requestToken makes one token request, and a token of the grant. A source and
// `caddy oauth2-token` get all their tokens from it. If nothing is left of the
// grant's life, requestToken returns an error together with the grant. current is the
// token that the new one replaces, or nil.
func (l lifecycle) requestToken(ctx context.Context, r requester, current *token) (*token, grant, error) {
	g, err := r.request(ctx)
	if err != nil {
		return nil, grant{}, err
	}
	t, err := l.newToken(g, current)
	return t, g, err
}
