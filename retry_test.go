package outboundauth

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestRenewalsBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r renewals
		if !r.allowed() {
			t.Fatal("got no renewal at first, want one")
		}
		want := permanentBackoff
		for i := range 10 {
			r.fail(new(token))
			if r.allowed() {
				t.Fatalf("got a renewal at once after %d refusals, want none", i+1)
			}
			time.Sleep(want - time.Nanosecond)
			if r.allowed() {
				t.Fatalf("got a renewal before %v have passed, want none", want)
			}
			time.Sleep(time.Nanosecond)
			if !r.allowed() {
				t.Fatalf("got no renewal after %v, want one", want)
			}
			want = min(2*want, maxPermanentBackoff)
		}
	})
}

func TestRenewalsCountEachTokenOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r renewals
		refused := new(token)
		for range 100 { // requests with the same token
			r.fail(refused)
		}
		time.Sleep(permanentBackoff)
		if !r.allowed() {
			t.Errorf("got no renewal after %v, want one: one token was refused", permanentBackoff)
		}
	})
}

// An upstream may accept a token for some paths and refuse any for others: one
// acceptance among refusals does not permit a renewal for each refusal.
func TestAcceptanceEndsTheBackOffButForItsFirstInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r renewals
		for range 5 {
			r.fail(new(token))
		}
		r.succeed()
		if r.allowed() {
			t.Error("got a renewal at once, want none: the last refusal is recent")
		}
		time.Sleep(permanentBackoff)
		if !r.allowed() {
			t.Errorf("got no renewal after %v, want one", permanentBackoff)
		}
		r.succeed() // changes nothing
		if !r.allowed() {
			t.Error("got no renewal after a second acceptance, want one")
		}
		r.fail(new(token))
		time.Sleep(permanentBackoff)
		if !r.allowed() {
			t.Error("got a longer back-off, want that it starts anew")
		}
	})
}
