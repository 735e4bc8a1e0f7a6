package outboundauth

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

func TestLargeBodiesAreAnnouncedAfterARefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p places
		a, b := dialAddress{"tcp", "a:80"}, dialAddress{"tcp", "b:80"}
		want := func(when string, address dialAddress, always, want bool) {
			t.Helper()
			if got := p.wantsAnnouncement(address, always); got != want {
				t.Errorf("%s, always %v: got an announcement: %v, want %v", when, always, got, want)
			}
		}
		want("at first", a, false, false)
		want("at first", a, true, true)
		p.refused(a)
		want("after a refusal", a, false, true)
		want("after the refusal of another", b, false, false)
		want("after the refusal over another network", dialAddress{"unix", "a:80"}, false, false)
		time.Sleep(announceAfterRefusal - time.Nanosecond)
		want("30 s after a refusal", a, false, true)
		time.Sleep(time.Nanosecond)
		want("later", a, false, false)
		want("later", a, true, true)

		p.unheard(a)
		p.refused(a)
		want("unheard", a, true, false)
		want("unheard", a, false, false)
		want("another is unheard", b, true, true)
		time.Sleep(quietAfterSilence - time.Nanosecond)
		p.refused(a)
		want("unheard for a while", a, true, false)
		time.Sleep(time.Nanosecond)
		want("unheard long ago", a, true, true)
		want("unheard long ago, refused just now", a, false, true)
	})
}

func TestPlacesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p places
		address := func(i int) dialAddress { return dialAddress{"tcp", fmt.Sprintf("10.0.0.1:%d", i)} }
		for i := range 2 * maxPlaces {
			p.unheard(address(i))
			p.wantsAnnouncement(address(0), true) // so that it is not the oldest
			time.Sleep(time.Millisecond)
		}
		if got := len(p.byAddress); got != maxPlaces {
			t.Errorf("got %d places, want %d", got, maxPlaces)
		}
		for i, want := range map[int]bool{0: false, 1: true, maxPlaces: true, maxPlaces + 1: false, 2*maxPlaces - 1: false} {
			if got := p.wantsAnnouncement(address(i), true); got != want {
				t.Errorf("address %d: got forgotten: %v, want %v: the least recently used go", i, got, want)
			}
		}
	})
}

// Whether to ask is looked up for each large body. That must not fill the map: of
// the addresses of dynamic upstreams there is no end.
func TestAcceptingUpstreamsHaveNoPlace(t *testing.T) {
	var p places
	for i := range 100 {
		p.wantsAnnouncement(dialAddress{"tcp", fmt.Sprint("10.0.0.1:", i)}, true)
	}
	if got := len(p.byAddress); got != 0 {
		t.Errorf("got %d places, want none", got)
	}
}
