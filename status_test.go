package outboundauth

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// A token's state changes by the mere passing of time.
func TestStatusOfASource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := newTokenSource(lifecycle{defaultLifetime: time.Hour, fetchTimeout: time.Minute})
		t.Cleanup(func() { _ = source.Destruct() })
		if _, ok := source.status(time.Now()); ok {
			t.Error("got a status, want none of a source without a client")
		}
		e := &endpoint{metrics: &clientMetrics{name: "orders"}}
		source.attach(e)
		wantState := func(want string) sourceStatus {
			t.Helper()
			s, ok := source.status(time.Now())
			if !ok || s.state != want || s.name != "orders" || s.endpoint != e {
				t.Errorf("got %q of %q (there: %v), want %s of orders", s.state, s.name, ok, want)
			}
			return s
		}
		if s := wantState(stateAbsent); !s.expires.IsZero() || !s.retryAt.IsZero() || s.err != nil || s.fetching {
			t.Errorf("got %+v, want nothing yet", s)
		}

		fresh, err := source.newToken(grant{accessToken: "canary-token"}, time.Now(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		source.current = fresh
		s := wantState(stateFresh)
		if !s.obtained.Equal(fresh.obtained) || !s.renewal.Equal(fresh.refreshAt) || !s.expires.Equal(fresh.expires) {
			t.Errorf("got %v, %v and %v, want the token's instants", s.obtained, s.renewal, s.expires)
		}
		for _, step := range []struct {
			at    time.Time
			state string
		}{
			{fresh.refreshAt.Add(-time.Second), stateFresh},
			{fresh.refreshAt, stateStale},
			{fresh.usableTo.Add(-time.Second), stateStale},
			{fresh.usableTo, stateExpired},
			{fresh.expires, stateExpired},
		} {
			time.Sleep(time.Until(step.at)) // of the bubble
			wantState(step.state)
		}

		failed := errors.New("no answer")
		source.mu.Lock()
		source.fail(failed, "", time.Now())
		source.mu.Unlock()
		if s := wantState(stateExpired); s.failures != 1 || !errors.Is(s.err, failed) || s.retryAt.IsZero() {
			t.Errorf("got %d failures, err %v, retry at %v, want one failure", s.failures, s.err, s.retryAt)
		}
		source.inflight = &fetch{cancel: func(error) {}}
		if s := wantState(stateExpired); !s.fetching {
			t.Error("got no fetch, want the one in flight")
		}
	})
}

// A requester that is no endpoint has nothing to show.
type strangeRequester struct{}

func (strangeRequester) request(context.Context) (grant, error) { return grant{}, nil }
func (strangeRequester) fingerprint(context.Context) string     { return "" }
func (strangeRequester) fetched(*token, *fetchError, int)       {}

func TestStatusNeedsAnEndpoint(t *testing.T) {
	source := newTokenSource(lifecycle{})
	source.attach(strangeRequester{})
	if _, ok := source.status(time.Now()); ok {
		t.Error("got a status, want none")
	}
}

func TestWorseStatus(t *testing.T) {
	sorted := []sourceStatus{
		{state: stateFresh},
		{state: stateFresh, failures: 2},
		{state: stateStale},
		{state: stateStale, failures: 1},
		{state: stateExpired},
		{state: stateAbsent},
		{state: stateAbsent, failures: 3},
	}
	for i, a := range sorted {
		for j, b := range sorted {
			if got := a.worseThan(b); got != (i > j) {
				t.Errorf("%s with %d failures worse than %s with %d: got %v, want %v", a.state, a.failures, b.state, b.failures, got, i > j)
			}
		}
	}
}
