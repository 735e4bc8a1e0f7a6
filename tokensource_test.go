package outboundauth

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// scriptedRequester is an authorization server as a token source sees it. It
// grants the tokens t1, t2, … to the first, second … request, unless fail says
// otherwise.
type scriptedRequester struct {
	unbound
	lifetime time.Duration
	fail     func(ctx context.Context, n int) error     // nil: never
	secret   func() string                              // nil: it never changes
	told     func(t *token, err *fetchError, after int) // nil: not of interest
	alone    bool                                       // one request at a time
	once     bool                                       // no request is repeated at once

	mu     sync.Mutex
	host   string
	delay  time.Duration // of each answer
	sent   []time.Time   // the requests
	ended  []time.Time   // the same, when each was answered or given up
	looked int           // at the secret
}

// locate gives each requester a server of its own.
func (r *scriptedRequester) locate(context.Context, redact.Secrets) (*url.URL, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.host == "" {
		r.host = anyHost()
	}
	return &url.URL{Scheme: "https", Host: r.host}, nil
}

func (r *scriptedRequester) request(ctx context.Context, _ *url.URL, _ *dpop.Key, _ redact.Secrets) (grant, error) {
	r.mu.Lock()
	r.sent = append(r.sent, time.Now())
	n, delay, fail, sent := len(r.sent), r.delay, r.fail, time.Now()
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		r.ended = append(r.ended, time.Now())
		r.mu.Unlock()
	}()

	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return grant{}, ctx.Err() // as net/http does
		}
	}
	if fail != nil {
		if err := fail(ctx, n); err != nil {
			return grant{}, err
		}
	}
	return grant{accessToken: fmt.Sprintf("t%d", n), lifetime: r.lifetime, issued: sent, took: time.Since(sent)}, nil
}

func (r *scriptedRequester) fingerprint(context.Context) string {
	r.mu.Lock()
	r.looked++
	r.mu.Unlock()
	if r.secret == nil {
		return "secret"
	}
	return r.secret()
}

func (r *scriptedRequester) concurrent() bool { return !r.alone }

func (r *scriptedRequester) repeatable() bool { return !r.once }

func (r *scriptedRequester) describe() description { return description{name: "scripted"} }

func (r *scriptedRequester) fetched(t *token, err *fetchError, failures int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.told != nil {
		r.told(t, err, failures)
	}
}

func (r *scriptedRequester) setFail(fail func(ctx context.Context, n int) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fail = fail
}

func (r *scriptedRequester) setDelay(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.delay = d
}

// requests returns the instants of all requests so far.
func (r *scriptedRequester) requests() []time.Time {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clip(r.sent)
}

// testLife has the defaults.
var testLife = lifecycle{defaultLifetime: defaultTokenLifetime, fetchTimeout: defaultTokenTimeout}

func attachedSource(r requester) *tokenSource {
	s := newTokenSource()
	s.attach(r, testLife)
	s.begin(r)
	return s
}

// newTestSource returns a source that is released before its bubble ends.
func newTestSource(tb testing.TB, r requester) *tokenSource {
	s := attachedSource(r)
	tb.Cleanup(func() { destruct(tb, s) })
	return s
}

// rested returns s as if its last token request was long ago, and the back-off that
// it began had passed: then nothing keeps an operator from the next.
func (s *tokenSource) rested() *tokenSource {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requested = time.Time{}
	if s.lastErr != nil {
		s.lastErr = &fetchError{err: s.lastErr.err}
	}
	return s
}

// answer is what a caller of Token got, and when.
type answer struct {
	value  string
	err    error
	waited time.Duration
}

func (a answer) String() string {
	return fmt.Sprintf("%q, %v after %v", a.value, a.err, a.waited)
}

func ask(ctx context.Context, s *tokenSource) answer {
	start := time.Now()
	t, _, err := s.Token(ctx)
	a := answer{err: err, waited: time.Since(start)}
	if t != nil {
		a.value = t.value
	}
	return a
}

// load asks at regular distances, like a proxy does: each time in a goroutine
// of its own, without regard to those that still wait.
func load(ctx context.Context, s *tokenSource, every, total time.Duration) []answer {
	answers := make([]answer, total/every)
	var wg sync.WaitGroup
	for i := range answers {
		wg.Go(func() { answers[i] = ask(ctx, s) })
		time.Sleep(every)
	}
	wg.Wait()
	return answers
}

// expectToken fails the test unless a caller gets this token after this time.
func expectToken(t *testing.T, s *tokenSource, value string, waited time.Duration) {
	t.Helper()
	if got, want := ask(t.Context(), s), (answer{value: value, waited: waited}); got != want {
		t.Errorf("Token() = %v, want %v", got, want)
	}
}

// expectCached compares by address, as the users of tokens do.
func expectCached(t *testing.T, s *tokenSource, want *token) {
	t.Helper()
	if got := s.Peek(); got != want {
		t.Errorf("Peek() = %p, want %p", got, want)
	}
}

func expectRequests(t *testing.T, r *scriptedRequester, want int) {
	t.Helper()
	if got := len(r.requests()); got != want {
		t.Errorf("%d token requests, want %d", got, want)
	}
}

func TestColdSourceMakesOneRequestForAllCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: 300 * time.Millisecond}
		s := newTestSource(t, r)
		answers := make([]answer, 1000)
		var wg sync.WaitGroup
		for i := range answers {
			wg.Go(func() { answers[i] = ask(t.Context(), s) })
		}
		wg.Wait()
		for _, got := range answers {
			if want := (answer{value: "t1", waited: 300 * time.Millisecond}); got != want {
				t.Fatalf("Token() = %v, want %v", got, want)
			}
		}
		expectRequests(t, r, 1)
	})
}

func TestLateCallerJoinsTheFetchInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: 300 * time.Millisecond}
		s := newTestSource(t, r)
		for i, got := range load(t.Context(), s, 100*time.Millisecond, 500*time.Millisecond) {
			want := answer{value: "t1", waited: max(0, time.Duration(3-i)*100*time.Millisecond)}
			if got != want {
				t.Errorf("caller %d: Token() = %v, want %v", i, got, want)
			}
		}
		expectRequests(t, r, 1)
	})
}

func TestFreshTokenIsServedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: time.Second}
		s := newTestSource(t, r)
		expectCached(t, s, nil)
		expectToken(t, s, "t1", time.Second)
		first := s.Peek()
		refreshAt := first.refreshAt
		for time.Until(refreshAt) > 0 {
			expectToken(t, s, "t1", 0)
			expectCached(t, s, first)
			time.Sleep(min(time.Minute, max(1, time.Until(refreshAt)-1)))
		}
		if got := r.requests(); len(got) != 2 || !got[1].Equal(refreshAt) {
			t.Errorf("token requests at %v, want none between the first and %v", got, refreshAt)
		}
	})
}

func TestStaleTokenIsServedWhileRefreshing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, r)
		s.Warm() // and not Token: the source is not in use, nothing refreshes the token
		time.Sleep(50 * time.Minute)
		expectRequests(t, r, 1)

		r.setDelay(2 * time.Second)
		for _, got := range load(t.Context(), s, 10*time.Millisecond, 2*time.Second) {
			if want := (answer{value: "t1"}); got != want {
				t.Fatalf("Token() = %v, want %v", got, want)
			}
		}
		expectRequests(t, r, 2)
		expectToken(t, s, "t2", 0)
	})
}

func TestExpiredTokenIsNotServed(t *testing.T) {
	for _, tt := range []struct{ lifetime, usable time.Duration }{
		{time.Hour, 59*time.Minute + 50*time.Second},
		{100 * time.Second, 90 * time.Second},
		{50 * time.Second, 45 * time.Second},
		{5 * time.Second, 4500 * time.Millisecond},
		{time.Second, 900 * time.Millisecond},
	} {
		t.Run(tt.lifetime.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const took = 50 * time.Millisecond
				r := &scriptedRequester{lifetime: tt.lifetime, delay: took}
				s := newTestSource(t, r)
				s.Warm()
				// The life counts from the request, not from its answer.
				time.Sleep(tt.usable - 1)
				r.setDelay(90 * time.Millisecond)
				expectToken(t, s, "t1", 0)
				if s.Peek() == nil {
					t.Error("Peek() = nil, want the token")
				}
				time.Sleep(time.Nanosecond)
				expectCached(t, s, nil)
				// The fetch that the last caller started is waited for.
				expectToken(t, s, "t2", 90*time.Millisecond-1)
				expectRequests(t, r, 2)
			})
		})
	}
}

func TestLeavingCallerDoesNotEndTheFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: 300 * time.Millisecond}
		s := newTestSource(t, r)
		var wg sync.WaitGroup
		wg.Go(func() { // the one who starts the fetch
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(100*time.Millisecond, cancel)
			want := answer{err: context.Canceled, waited: 100 * time.Millisecond}
			if got := ask(ctx, s); got != want {
				t.Errorf("Token() = %v, want %v", got, want)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			want := answer{err: context.DeadlineExceeded, waited: 200 * time.Millisecond}
			if got := ask(ctx, s); got != want {
				t.Errorf("Token() = %v, want %v", got, want)
			}
		})
		wg.Go(func() { expectToken(t, s, "t1", 300*time.Millisecond) })
		wg.Wait()
		expectToken(t, s, "t1", 0)
		expectRequests(t, r, 1)
	})
}

func TestFetchOfACallerThatLeftServesTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: 300 * time.Millisecond}
		s := newTestSource(t, r)
		cancelled, cancel := context.WithCancel(t.Context())
		cancel()
		if got, want := ask(cancelled, s), (answer{err: context.Canceled}); got != want {
			t.Errorf("Token() = %v, want %v", got, want)
		}
		time.Sleep(200 * time.Millisecond) // nobody waits meanwhile
		expectToken(t, s, "t1", 100*time.Millisecond)
		expectRequests(t, r, 1)
		if got, want := ask(cancelled, s), (answer{value: "t1"}); got != want {
			t.Errorf("with a fresh token: Token() = %v, want %v", got, want)
		}
	})
}

// A caller's context carries what makes Caddy's transport dial the upstream.
func TestRequestHasAContextOfItsOwn(t *testing.T) {
	type key struct{}
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, fail: func(ctx context.Context, _ int) error {
			if v := ctx.Value(key{}); v != nil {
				t.Errorf("the request's context holds the caller's value %v", v)
			}
			deadline, ok := ctx.Deadline()
			if got, want := time.Until(deadline), 10*time.Second; !ok || got != want {
				t.Errorf("the request's context ends in %v, want %v", got, want)
			}
			return nil
		}}
		ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), key{}, "x"), time.Second)
		defer cancel()
		if got, want := ask(ctx, newTestSource(t, r)), (answer{value: "t1"}); got != want {
			t.Errorf("Token() = %v, want %v", got, want)
		}
	})
}

func TestWarmStartsOneFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, delay: time.Second}
		s := newTestSource(t, r)
		start := time.Now()
		for range 3 {
			s.Warm()
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("Warm() took %v, want nothing", d)
		}
		time.Sleep(400 * time.Millisecond)
		expectToken(t, s, "t1", 600*time.Millisecond)
		s.Warm()
		expectRequests(t, r, 1)
	})
}

func TestWarmRespectsTheBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{fail: func(context.Context, int) error {
			return &scriptedError{after: time.Minute}
		}}
		s := newTestSource(t, r)
		s.Warm()
		time.Sleep(time.Minute - 1)
		s.Warm()
		expectRequests(t, r, 1)
		time.Sleep(time.Nanosecond)
		expectRequests(t, r, 2)
	})
}

// A client whose first token is late is not forgotten: its first request would wait.
func TestWarmGoesOnUntilThereIsAToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := true
		r := &scriptedRequester{lifetime: time.Hour, fail: func(context.Context, int) error {
			if down {
				return &scriptedError{}
			}
			return nil
		}}
		s := newTestSource(t, r)
		s.Warm()
		time.Sleep(5 * time.Minute)
		r.mu.Lock()
		down = false
		r.mu.Unlock()
		time.Sleep(maxTransientBackoff)
		if s.Peek() == nil {
			t.Errorf("no token %v after the server is back", maxTransientBackoff)
		}
		n := len(r.requests())
		if n > 40 {
			t.Errorf("%d token requests in 5 minutes, want at most 40", n)
		}
		time.Sleep(2 * time.Hour)
		expectRequests(t, r, n) // nobody asks for the next token
	})
}

// A client that was refused once is warmed up like others, when it may try again.
func TestWarmGoesOnAfterARefusalInThePast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour, fail: func(_ context.Context, n int) error {
			switch n {
			case 1:
				return &scriptedError{permanent: true}
			case 2:
				return &scriptedError{after: time.Second}
			}
			return nil
		}}
		s := newTestSource(t, r)
		s.Warm()
		time.Sleep(time.Minute)
		s.Warm()
		time.Sleep(maxTransientBackoff)
		expectRequests(t, r, 3)
		if s.Peek() == nil {
			t.Error("no token")
		}
	})
}

// Who was refused may be locked out by the next try.
func TestWarmEndsWithARefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{fail: func(context.Context, int) error { return &scriptedError{permanent: true} }}
		s := newTestSource(t, r)
		s.Warm()
		time.Sleep(time.Hour)
		expectRequests(t, r, 1)
	})
}

// token prints its fields.
func TestTokenIsNeverPrinted(t *testing.T) {
	const canary = "canary-5f1b"
	tok := &token{value: canary}
	s := attachedSource(&scriptedRequester{})
	s.current = tok
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		for _, v := range []any{tok, s, []any{tok, s}, map[string]any{"token": tok}, struct{ T *token }{tok}} {
			got := fmt.Sprintf(verb, v)
			if strings.Contains(got, canary) || strings.Contains(got, fmt.Sprintf("%x", canary)) {
				t.Errorf("Sprintf(%q, %T) = %q, which shows the token", verb, v, got)
			}
		}
	}
}

// freshSource is a source outside any bubble, with a token for an hour.
func freshSource(tb testing.TB) *tokenSource {
	s := newTestSource(tb, &scriptedRequester{lifetime: time.Hour})
	if _, _, err := s.Token(tb.Context()); err != nil {
		tb.Fatal(err)
	}
	return s
}

func TestFreshTokenAllocatesNothing(t *testing.T) {
	s, ctx := freshSource(t), t.Context()
	got := allocations(func() {
		if _, _, err := s.Token(ctx); err != nil {
			t.Error(err)
		}
	})
	if got != 0 {
		t.Errorf("Token() allocates %v times, want 0", got)
	}
}

func BenchmarkTokenFresh(b *testing.B) {
	s, ctx := freshSource(b), b.Context()
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := s.Token(ctx); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkTokenFreshParallel(b *testing.B) {
	s, ctx := freshSource(b), b.Context()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, _, err := s.Token(ctx); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// scriptedError is an error as a requester returns it: transient, unless it
// is said to be permanent.
type scriptedError struct {
	permanent bool
	after     time.Duration
}

func (e *scriptedError) Error() string             { return "scripted" }
func (e *scriptedError) Permanent() bool           { return e.permanent }
func (e *scriptedError) RetryAfter() time.Duration { return e.after }

// errTransient is without any of the methods: what is unknown is transient.
var errTransient = errors.New("status 503")
