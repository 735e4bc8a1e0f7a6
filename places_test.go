package outboundauth

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestLargeBodiesAreAnnouncedAfterARefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTokenSource()
		a, b := dialAddress{"tcp", "a:80"}, dialAddress{"tcp", "b:80"}
		want := func(when string, address dialAddress, always, want bool) {
			t.Helper()
			if got := s.wantsAnnouncement(address, always); got != want {
				t.Errorf("%s, always %v: got an announcement: %v, want %v", when, always, got, want)
			}
		}
		want("at first", a, false, false)
		want("at first", a, true, true)
		s.doubts(a)
		want("after a refusal", a, false, true)
		want("after the refusal of another", b, false, false)
		want("after the refusal over another network", dialAddress{"unix", "a:80"}, false, false)
		time.Sleep(announceAfterRefusal - time.Nanosecond)
		want("30 s after a refusal", a, false, true)
		time.Sleep(time.Nanosecond)
		want("later", a, false, false)
		want("later", a, true, true)

		s.unheard(a)
		s.doubts(a)
		want("unheard", a, true, false)
		want("unheard", a, false, false)
		want("another is unheard", b, true, true)
		time.Sleep(quietAfterSilence - time.Nanosecond)
		s.doubts(a)
		want("unheard for a while", a, true, false)
		time.Sleep(time.Nanosecond)
		want("unheard long ago", a, true, true)
		want("unheard long ago, refused just now", a, false, true)
	})
}

func TestPlacesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTokenSource()
		address := func(i int) dialAddress { return dialAddress{"tcp", fmt.Sprintf("10.0.0.1:%d", i)} }
		for i := range 2 * maxPlaces {
			s.unheard(address(i))
			s.wantsAnnouncement(address(0), true) // so that it is not the oldest
			time.Sleep(time.Millisecond)
		}
		if got := s.numberOfPlaces(); got != maxPlaces {
			t.Errorf("got %d places, want %d", got, maxPlaces)
		}
		for i, want := range map[int]bool{0: false, 1: true, maxPlaces: true, maxPlaces + 1: false, 2*maxPlaces - 1: false} {
			if got := s.wantsAnnouncement(address(i), true); got != want {
				t.Errorf("address %d: got forgotten: %v, want %v: the least recently used go", i, got, want)
			}
		}
	})
}

// Whether to ask is looked up for each large body. That must not fill the map: of
// the addresses of dynamic upstreams there is no end.
func TestAcceptingUpstreamsHaveNoPlace(t *testing.T) {
	s := newTokenSource()
	for i := range 100 {
		s.wantsAnnouncement(dialAddress{"tcp", fmt.Sprint("10.0.0.1:", i)}, true)
	}
	if got := s.numberOfPlaces(); got != 0 {
		t.Errorf("got %d places, want none", got)
	}
}

// Requests and health checks of all sites that share the source use it at once. The
// race detector looks on.
func TestPlacesAreSharedByRequests(t *testing.T) {
	s := newTokenSource()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 100 {
				address := dialAddress{"tcp", fmt.Sprint("10.0.0.1:", j)}
				s.doubts(address)
				s.wantsAnnouncement(address, i%2 == 0)
				s.unheard(address)
			}
		})
	}
	wg.Wait()
}

// What an upstream answers decides whether it is asked next time.
func TestAnswersDecideWhatIsAnnounced(t *testing.T) {
	long := strings.Repeat("x", 2*defaultReplayBody)
	refuseOnce := func(up *upstream, status int, when func(*http.Request) bool) {
		var done atomic.Bool
		up.script(func(w http.ResponseWriter, r *http.Request) bool {
			if !when(r) || done.Swap(true) {
				return false
			}
			refuse(w, status)
			return true
		})
	}
	announced := func(r *http.Request) bool { return r.Header.Get("Expect") != "" }
	for _, test := range []struct {
		name, settings string
		before         func(g *gateway, up *upstream)
		want           string // Expect, of the large body that follows
	}{
		{"nothing was refused", "", func(g *gateway, _ *upstream) { g.get() }, ""},
		{"a request was refused", "", func(g *gateway, up *upstream) {
			refuseOnce(up, http.StatusUnauthorized, func(*http.Request) bool { return true })
			g.get()
		}, "100-continue"},
		{"a request was refused whose body is gone", "replay_body 1KiB", func(g *gateway, up *upstream) {
			up.script(func(w http.ResponseWriter, r *http.Request) bool {
				_, _ = io.Copy(io.Discard, r.Body)
				refuse(w, http.StatusUnauthorized)
				return true
			})
			g.send(http.MethodPost, "/", strings.NewReader(long))
			up.script(nil)
		}, "100-continue"},
		{"a body was refused, of which nothing is kept", "replay_body 0", func(g *gateway, up *upstream) {
			refuseOnce(up, http.StatusUnauthorized, func(*http.Request) bool { return true })
			g.get()
		}, ""},
		{"the announcement was refused", announce, func(g *gateway, up *upstream) {
			refuseOnce(up, http.StatusExpectationFailed, announced)
			g.send(http.MethodPost, "/", strings.NewReader(long))
		}, ""},
		{"the announcement was taken", announce, func(g *gateway, _ *upstream) {
			g.send(http.MethodPost, "/", strings.NewReader(long))
		}, "100-continue"},
	} {
		t.Run(test.name, func(t *testing.T) {
			g, _, up := gateAndFakes(t, test.settings)
			g.get().want(t, http.StatusOK)
			test.before(g, up)
			g.send(http.MethodPost, "/", strings.NewReader(long)).want(t, http.StatusOK)
			up.last(t).wantHeader(t, "Expect", test.want)
		})
	}
}
