package outboundauth

import (
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
)

func TestReloadUnderLoadFailsNoRequestAndFetchesNothing(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	site := func(n int) string { return fmt.Sprintf("respond /version %d\n", n) + proxySite(up, auth, "") }
	g := startGateway(t, site(0))
	g.get().want(t, http.StatusOK)

	// Whatever its handlers, Caddy drops a connection now and then when it
	// hands over a listener. So a request without an answer is sent again;
	// one that the transport failed would have an answer.
	var done atomic.Bool
	var sent, dropped atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for !done.Load() {
				switch r := g.get(); {
				case r.err != nil:
					dropped.Add(1)
				case r.status != http.StatusOK || r.body != "accepted":
					t.Errorf("got %d %q, want 200", r.status, r.body)
					return
				default:
					sent.Add(1)
				}
			}
		})
	}
	for i := range 20 {
		g.load(site(i + 1))
		before := sent.Load()
		eventually(t, func() bool { return sent.Load() > before+8 || t.Failed() }, "requests between two reloads")
	}
	done.Store(true)
	wg.Wait()
	if r := g.send(http.MethodGet, "/version", nil); r.body != "20" {
		t.Errorf("got version %q, want the last config", r.body)
	}
	auth.wantAsked(t, 1)
	if dropped.Load() > sent.Load()/5 {
		t.Errorf("got %d dropped connections and %d answers, want few dropped", dropped.Load(), sent.Load())
	}
	if got := append(g.logged(`"level":"error"`), g.logged("panic")...); len(got) != 0 {
		t.Errorf("got %q in the log, want no error", got)
	}

	g.client.CloseIdleConnections()
	g.stop()
	wantNothingLeft(t)
}

// A request of the old config gets the token that it waits for, also when the
// new config has no use for it.
func TestReloadWhileRequestsWaitForTheToken(t *testing.T) {
	for _, test := range []struct {
		name  string
		site  func(*upstream, *authServer) string
		asked int
	}{
		{"the source stays", func(up *upstream, auth *authServer) string { return "respond /new x\n" + proxySite(up, auth, "") }, 1},
		{"the source goes", func(*upstream, *authServer) string { return "respond new" }, 1},
		{"another source comes", func(up *upstream, auth *authServer) string { return proxySite(up, auth, "scopes new") }, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			auth := newAuthServer(t)
			release := auth.hang()
			defer release()
			up := newUpstream(t, auth)
			g := startGateway(t, proxySite(up, auth, ""))
			answers := make(chan reply, 3)
			for range cap(answers) {
				go func() { answers <- g.get() }()
			}
			eventually(t, func() bool { return waiting() == cap(answers) }, "the requests to wait")
			g.load(test.site(up, auth))
			release()
			for range cap(answers) {
				if r := (<-answers).want(t, http.StatusOK); r.body != "accepted" {
					t.Errorf("got %q, want the upstream's answer", r.body)
				}
			}
			eventually(t, func() bool { return len(auth.asked()) >= test.asked }, "the token request of the new config")
			auth.wantAsked(t, test.asked)
			g.client.CloseIdleConnections()
			g.stop()
			wantNothingLeft(t)
		})
	}
}

// When the last config that uses a source is gone, so is the source, even if
// its authorization server never answers.
func TestNothingIsLeftOfAConfigThatIsGone(t *testing.T) {
	auth := newAuthServer(t)
	auth.hang()
	up := newUpstream(t, auth)
	g := startGateway(t, proxySite(up, auth, "token_timeout 5m"))
	eventually(t, func() bool { return len(auth.asked()) == 1 }, "the token request of the warm-up")
	if len(goroutines()) == 0 {
		t.Fatal("got no goroutine of a fetch, want one: or this test sees nothing")
	}
	g.load("respond gone")
	wantNothingLeft(t)

	// Another config starts anew.
	auth.script(nil)
	g.load(proxySite(up, auth, ""))
	g.get().want(t, http.StatusOK)
	auth.wantAsked(t, 2)
}

// In an outage, another token can't be had. So a reload that leaves the client and the
// server as they are keeps the token, and one that is taken back finds it again.
func TestReloadInAnOutageKeepsTheToken(t *testing.T) {
	for name, settings := range map[string]string{
		"token_timeout":    "token_timeout 30s",
		"refresh_before":   "refresh_before 5m",
		"default_lifetime": "default_lifetime 10m",
		"max_lifetime":     "max_lifetime 10m",
		"token_transport":  "token_transport {\nresponse_header_timeout 20s\nmax_conns_per_host 3\nversions 1.1 2\n}",
		"order of scopes":  "scopes b a",
	} {
		t.Run(name, func(t *testing.T) {
			auth := newAuthServer(t)
			up := newUpstream(t, auth)
			site := func(settings string) string { return proxySite(up, auth, settings) }
			before := ""
			if name == "order of scopes" {
				before = "scopes a b"
			}
			g := startGateway(t, site(before))
			g.get().want(t, http.StatusOK)
			auth.script(refusing(http.StatusServiceUnavailable, ""))
			g.load(site(settings))
			g.get().want(t, http.StatusOK)
			g.load(site(before))
			g.get().want(t, http.StatusOK)
			auth.wantAsked(t, 1)
		})
	}
	t.Run("taken back", func(t *testing.T) {
		auth := newAuthServer(t)
		up := newUpstream(t, auth)
		g := startGateway(t, proxySite(up, auth, ""))
		g.get().want(t, http.StatusOK)
		auth.script(refusing(http.StatusServiceUnavailable, ""))
		g.load(proxySite(up, auth, "scopes other"))
		g.get().want(t, http.StatusServiceUnavailable)
		g.load(proxySite(up, auth, ""))
		g.get().want(t, http.StatusOK)
	})
}

// With new credentials, the next request has a token of theirs.
func TestReloadWithOtherCredentials(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := startGateway(t, proxySite(up, auth, "tenant one"))
	g.get().want(t, http.StatusOK)
	g.load(proxySite(up, auth, "tenant two\nscopes other"))
	g.get().want(t, http.StatusOK)
	up.last(t).wantHeader(t, "Authorization", "Bearer canary-token-2-of-gateway")
	up.last(t).wantHeader(t, "X-Tenant-Id", "two")
	auth.wantAsked(t, 2)
}
