package outboundauth

import (
	"errors"
	"net/url"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

// A token's state changes by the mere passing of time.
func TestStatusOfASource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := newTokenSource()
		t.Cleanup(func() { destruct(t, source) })
		if got := source.statuses(time.Now()); len(got) > 0 {
			t.Errorf("got %v, want no status of a source without a client", got)
		}
		source.attach(newNamedEndpoint("orders", "one"), lifecycle{defaultLifetime: time.Hour, fetchTimeout: time.Minute})
		wantState := func(want string) sourceStatus {
			t.Helper()
			statuses := source.statuses(time.Now())
			if len(statuses) != 1 {
				t.Fatalf("got %d statuses, want 1", len(statuses))
			}
			s := statuses[0]
			if s.state != want || s.name != "orders" || s.ClientID != "one" {
				t.Errorf("got %q of %q, client %q, want %s of orders, client one", s.state, s.name, s.ClientID, want)
			}
			return s
		}
		if s := wantState(stateAbsent); !s.expires.IsZero() || !s.retryAt.IsZero() || s.err != nil || s.fetching {
			t.Errorf("got %+v, want nothing yet", s)
		}

		fresh, err := source.life.newToken(grant{accessToken: "canary-token", issued: time.Now()}, nil)
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
			{fresh.usableTo, stateStale}, // the reserve,
			{fresh.expires, stateExpired},
		} {
			time.Sleep(time.Until(step.at)) // of the bubble
			wantState(step.state)
		}

		failed := errors.New("no answer")
		source.mu.Lock()
		source.fail(&fetch{started: time.Now(), attempts: attempts{requester: new(scriptedRequester)}}, failed, time.Now())
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

// newNamedEndpoint makes an endpoint that tells who its client is, and no more.
func newNamedEndpoint(name, clientID string) *endpoint {
	return &endpoint{url: new(url.URL), credentials: Credentials{ClientID: clientID}, metrics: &clientMetrics{clientCounters: &clientCounters{name: name}}}
}

// Whatever makes the requests: none is left out.
func TestStatusNeedsNoEndpoint(t *testing.T) {
	source := newTokenSource()
	source.attach(new(scriptedRequester), testLife)
	if got := source.statuses(time.Now()); len(got) != 1 || got[0].name != "scripted" {
		t.Errorf("got %v, want the status of the client", got)
	}
}

// Clients that share a token may have different names.
func TestStatusForEachName(t *testing.T) {
	source := newTokenSource()
	var clients []*endpoint
	for i, name := range []string{"orders", "billing", "orders"} {
		clients = append(clients, newNamedEndpoint(name, strconv.Itoa(i)))
		source.attach(clients[i], testLife)
	}
	check := func(when string, want ...string) {
		t.Helper()
		var got []string
		for _, s := range source.statuses(time.Now()) {
			got = append(got, s.ClientID)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", when, got, want)
		}
	}
	check("all are attached", "2", "1")
	source.detach(clients[2], func() {})
	check("the newest is gone", "1", "0")
	source.detach(clients[0], func() {})
	source.detach(clients[1], func() {})
	check("nobody is left")
}

func TestWorseStatus(t *testing.T) {
	rejected := &tokenError{Code: "invalid_client", permanent: true}
	sorted := []sourceStatus{
		{state: stateFresh},
		{state: stateStale},
		{state: stateExpired}, // idle
		{state: stateAbsent},
		{state: stateFresh, failures: 2, err: errors.New("no answer")},
		{state: stateStale, failures: 1, err: errors.New("no answer")},
		{state: stateStale, failures: 2, err: errors.New("no answer")},
		{state: stateAbsent, failures: 1, err: errors.New("no answer")},
		{state: stateFresh, failures: 1, err: rejected},
		{state: stateAbsent, failures: 1, err: rejected},
	}
	for i, a := range sorted {
		for j, b := range sorted {
			if got := a.worseThan(&b); got != (i > j) {
				t.Errorf("%s with %d failures worse than %s with %d: got %v, want %v", a.state, a.failures, b.state, b.failures, got, i > j)
			}
		}
	}
}
