package outboundauth

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"go.opentelemetry.io/otel/trace"
)

const (
	// The two quick retries bridge a dropped connection or a restart of one
	// of the server's instances.
	quickRetries    = 2
	quickRetryDelay = 100 * time.Millisecond
)

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
	before := attempt{requester: s.last, failures: s.failures}
	if onlyIfChanged {
		before.failedWith, before.err = s.failedWith, s.lastErr
	}
	go s.run(ctx, f, before)
	return f
}

// attempt is what a fetch has to know of the source when it starts.
type attempt struct {
	requester
	failures int // before it

	// If failedWith is not empty: of the last error, which stands if the
	// secrets' fingerprint is still the same.
	failedWith string
	err        *fetchError
}

// run is the goroutine of one fetch: it ends with the fetch, which ends by
// its timeout, or earlier when the source is released.
func (s *tokenSource) run(ctx context.Context, f *fetch, a attempt) {
	defer f.cancel(nil)
	ctx, cancel := context.WithTimeout(ctx, s.fetchTimeout)
	defer cancel()

	var (
		g           grant
		sent        time.Time
		fingerprint string
	)
	err := safely(func() error {
		fingerprint = a.fingerprint(ctx)
		return nil
	})
	f.unchanged = err == nil && a.failedWith != "" && a.failedWith == fingerprint
	if err == nil && !f.unchanged {
		g, sent, err = s.request(ctx, f, a)
	}
	now := time.Now()
	if err == nil && !f.unchanged {
		f.t, err = s.newToken(g, sent, now)
	}
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

// request makes the token request, in case of a transient error up to three
// times, and tells when the one that was granted was sent. Only the first
// fetch that fails repeats itself: those that follow it are repetitions
// already, at growing distances.
func (s *tokenSource) request(ctx context.Context, f *fetch, a attempt) (grant, time.Time, error) {
	for try := 0; ; try++ {
		var g grant
		sent := time.Now()
		err := safely(func() (err error) {
			g, err = a.requester.request(ctx)
			return err
		})
		if err == nil {
			if !g.sent.IsZero() {
				sent = g.sent
			}
			return g, sent, nil
		}
		if cause := context.Cause(ctx); errors.Is(cause, errReleased) {
			return grant{}, sent, cause
		}
		if ctx.Err() != nil || a.failures > 0 || try == quickRetries || isPermanent(err) || retryAfter(err) > 0 {
			return grant{}, sent, err
		}
		f.retries = append(f.retries, retry{time.Now(), err})
		delay := time.NewTimer(rand.N(quickRetryDelay << try))
		select {
		case <-delay.C:
		case <-ctx.Done():
			delay.Stop()
			return grant{}, sent, err
		}
	}
}

// safely turns a panic into an error: in a goroutine of ours nobody else could
// recover it, and it would end the whole server. The panic's value is not
// shown because it could hold what the request held.
func safely(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the token request panicked with a value of type %T; please report it as a bug", p)
		}
	}()
	return f()
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
