package main

import (
	"maps"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
)

func TestOutcomesAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &rig{site: &site{Clients: []oauthClient{alice, bob}}, authority: newAuthority([]oauthClient{alice, bob}, 10*time.Second)}
		began := time.Now()
		r.authority.issue(alice)
		time.Sleep(20 * time.Second)
		outcomes := []outcome{
			{path: "/0/orders", at: began, took: time.Millisecond, answered: http.StatusOK},
			{path: "/0/orders", at: began.Add(time.Second), took: 200 * time.Millisecond, answered: http.StatusBadGateway}, // there was a token
			{path: "/1/orders", at: began.Add(time.Second), took: 2 * time.Second},                                         // this client had none
			{path: "/0/orders", at: began.Add(9 * time.Second), took: 3 * time.Second, answered: 401},                      // its token ended meanwhile
			{path: denied + "x", at: began, took: time.Millisecond, answered: http.StatusUnauthorized},
			{path: denied + "x", at: began, took: time.Millisecond, answered: http.StatusBadGateway},
			{path: "/0/orders", at: began.Add(20 * time.Second), took: time.Millisecond, answered: http.StatusOK},
		}
		got := r.count(outcomes, began.Add(2*time.Second))
		for _, name := range []string{valueP50, valueP99, valueP999, valueMax} {
			delete(got, name)
		}
		want := values{
			valueSent: 7, valueFailed: 4, valueWithheld: 2, valueOver100: 3, valueOver1s: 2, valueTokens: 0, valueRecovery: 7,
		}
		if !maps.Equal(got, want) {
			t.Errorf("got  %v\nwant %v", got, want)
		}
		if got := r.count(outcomes[:6], began.Add(2*time.Second)); got[valueRecovery] != never {
			t.Errorf("the last request failed: got a recovery after %v s", got[valueRecovery])
		}
	})
}

func TestLatencies(t *testing.T) {
	var outcomes []outcome
	for ms := range 1000 {
		outcomes = append(outcomes, outcome{took: time.Duration(1000-ms) * time.Millisecond})
	}
	want := values{valueP50: 0.501, valueP99: 0.991, valueP999: 1, valueMax: 1}
	if got := latencies(outcomes); !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := latencies(nil); got[valueMax] != 0 {
		t.Errorf("without a request: got %v", got)
	}
}
