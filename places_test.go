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

// Requests and health checks of all sites that share the source use it at once. The
// race detector looks on.
func TestPlacesAreSharedByRequests(t *testing.T) {
	var p places
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 100 {
				address := dialAddress{"tcp", fmt.Sprint("10.0.0.1:", j)}
				p.refused(address)
				p.wantsAnnouncement(address, i%2 == 0)
				p.unheard(address)
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

func TestRefusedHealthCheckIsARefusal(t *testing.T) {
	cl := newTransport(t, "token_url https://auth.example.com/token\nclient_id "+newName()+"\nclient_secret s").fallback.client
	cl.replaceAfterCheck(upstreamContext(t, "127.0.0.1:9000"), testLife.token(grant{accessToken: "t", issued: time.Now()}, time.Now()))
	if !cl.source.places.wantsAnnouncement(dialAddress{"tcp", "127.0.0.1:9000"}, false) {
		t.Error("got no announcement after a refused check, want one")
	}
}
