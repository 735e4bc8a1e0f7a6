package outboundauth

import (
	"crypto/rand"
	"testing"
	"testing/synctest"
	"time"
)

func TestRenewalsBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r replacements
		want := permanentBackoff
		for i := range 10 {
			if !r.allow(anyToken()) {
				t.Fatalf("got no renewal %d, want one", i+1)
			}
			for end := time.Now().Add(want); time.Now().Before(end); time.Sleep(want / 1000) {
				if r.allow(anyToken()) {
					t.Fatalf("got a renewal %v early, want none", time.Until(end))
				}
			}
			want = min(2*want, maxPermanentBackoff)
		}
	})
}

// All requests that were sent with one token get the one that replaces it.
func TestRenewalIsSharedByTheRequestsOfAToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r replacements
		refused := anyToken()
		for range 100 {
			if !r.allow(refused) {
				t.Fatal("got no renewal, want that of the first request")
			}
		}
		time.Sleep(permanentBackoff)
		if !r.allow(anyToken()) {
			t.Errorf("got no renewal after %v, want one: one token was refused", permanentBackoff)
		}
	})
}

func TestQuietPeriodEndsTheBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r replacements
		for renewed := 0; renewed < 6; time.Sleep(time.Second) { // the next interval is above a minute
			if r.allow(anyToken()) {
				renewed++
			}
		}
		time.Sleep(quietPeriod - 2*time.Second)
		if r.allow(anyToken()) {
			t.Fatalf("got a renewal, want none: the last refusal is less than %v ago", quietPeriod)
		}
		time.Sleep(quietPeriod)
		if !r.allow(anyToken()) {
			t.Errorf("got no renewal, want one: nothing was refused for %v", quietPeriod)
		}
	})
}

// A server that says its tokens live longer than they do.
func TestRenewalsThatHelpAreNotHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r replacements
		for range 100 {
			if !r.allow(anyToken()) {
				t.Fatal("got no renewal, want one: the last one helped")
			}
			r.help()
			if r.allow(anyToken()) {
				t.Fatalf("got a renewal at once, want %v between them", replacementInterval)
			}
			time.Sleep(replacementInterval)
		}
	})
}

// A day of requests for a path that accepts no token.
func TestPathThatAcceptsNoTokenCausesFewRenewals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r replacements
		renewed := 0
		for start := time.Now(); time.Since(start) < 24*time.Hour; time.Sleep(time.Second) {
			if r.allow(anyToken()) {
				renewed++
			}
		}
		if limit := 24*12 + 10; renewed > limit {
			t.Errorf("got %d replacements in a day, want at most %d", renewed, limit)
		}
	})
}

// anyToken returns a token like no other.
func anyToken() *token { return &token{value: rand.Text()} }
