package e2e

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// Two upstreams share one token. Some of their paths answer 401 whatever the token:
// that must cost nobody else anything, and hide no real revocation.
const (
	verdictsLoad   = time.Minute
	verdictsRevoke = 28 * time.Second // A revokes the token after its next health check
	verdictsChecks = 5 * time.Second  // between two health checks

	// verdictsTakes is how long the authorization server takes for a token: who waits
	// for one is seen to do so.
	verdictsTakes = 800 * time.Millisecond

	// verdictsLimit is how long a request may take that no upstream has refused. A busy
	// machine may add as much as it adds to a request that needs no token.
	verdictsLimit = 300 * time.Millisecond

	// bodyWait is how long a request may wait for the new token because its body can't
	// be sent twice.
	bodyWait = time.Second

	// verdictsOutage is how long the authorization server is out.
	verdictsOutage = 16 * time.Second
)

// The limits of a minute with noise and one revocation.
const (
	// verdictsTokens is how many token requests there may be: 12 in a minute of noise,
	// one after the revocation, and the first of all.
	verdictsTokens = 14

	// heldRefusals is how many refused requests may wait for one verdict, besides those
	// that bring a token request about: they may all be sent twice.
	heldRefusals = 64
)

// verdictScene is something that the upstreams of one gateway go through.
type verdictScene struct {
	name    string
	timeout time.Duration // health_timeout; 0: there are no health checks

	// play sends requests, and checks what becomes of them.
	play func(t *testing.T, s *verdictStage) verdictResult
}

var verdictScenes = []*verdictScene{
	{"noise and a revocation", 5 * time.Second, noiseAndRevocation},
	{"outage (503), health checks", time.Second, refusalInOutage(out503)},
	{"outage (hang), health checks", time.Second, refusalInOutage(outHang)},
	{"outage (hang)", 0, refusalInOutage(outHang)},
	{"outage (refused)", 0, refusalInOutage(outRefused)},
}

// TestNobodyPaysForAnothersRefusal has upstreams answer 401 to some, all the time and
// during an outage. No other request may fail or wait, even when one of the upstreams
// revokes the token at last.
func TestNobodyPaysForAnothersRefusal(t *testing.T) {
	t.Parallel() // it mostly waits
	var (
		mu      sync.Mutex // guards results
		results = make(map[*verdictScene]verdictResult)
	)
	sideBySide(len(verdictScenes), verdictScenes, func(scene *verdictScene) {
		t.Run(scene.name, func(t *testing.T) {
			s := newVerdictStage(t, scene.timeout)
			r := scene.play(t, s)
			t.Logf("\n%s", s.table())
			mu.Lock()
			defer mu.Unlock()
			results[scene] = r
		})
	})
	t.Logf("\n%s", verdictTable(results))
}

// verdictStage is where a scene is played.
type verdictStage struct {
	issuer  *outageIssuer
	checks  bool // the upstreams' health is checked
	a, b    *verdictUpstream
	gw      *gateway
	streams []*verdictStream
	control *verdictStream // requests that need no token
	stop    func()         // ends all streams at once
}

// newVerdictStage returns a stage whose gateway has a token.
func newVerdictStage(t *testing.T, timeout time.Duration) *verdictStage {
	s := &verdictStage{issuer: newOutageIssuer(t, time.Hour), checks: timeout > 0}
	s.issuer.takes = verdictsTakes
	s.a, s.b = newVerdictUpstream(s.issuer), newVerdictUpstream(s.issuer)
	c := basicClient(t)
	site := func(u *verdictUpstream) string {
		p := proxy{to: u.serve(t), as: &authServer{issuer: s.issuer.url}, client: c}.String()
		if s.checks {
			p = strings.Replace(p, "{\n", fmt.Sprintf("{\n\thealth_uri %s\n\thealth_interval %v\n\thealth_timeout %v\n",
				healthPath, verdictsChecks, timeout), 1)
		}
		return p
	}
	plain := httptest.NewServer(http.HandlerFunc(mirror))
	closeAtEnd(t, plain)
	cfg := gatewayConfig{
		site: fmt.Sprintf("handle_path /a/* {\n%s}\nhandle_path /b/* {\n%s}\nhandle_path /plain/* {\n\treverse_proxy %s\n}",
			site(s.a), site(s.b), plain.Listener.Addr()),
		env: []string{"E2E_SECRET=" + c.Secret},
	}
	s.gw = func() *gateway {
		starting.Lock()
		defer starting.Unlock()
		return startGateway(t, cfg)
	}()
	s.a.url, s.b.url = s.gw.url+"/a", s.gw.url+"/b"
	s.gw.get(t, "/a/orders/0", http.StatusOK)
	s.gw.get(t, "/b/orders/0", http.StatusOK)
	s.stop = sync.OnceFunc(func() {
		sideBySide(len(s.streams), s.streams, func(v *verdictStream) { v.all = v.load.stop() })
	})
	t.Cleanup(s.stop)
	s.control = s.send("control", &verdictUpstream{url: s.gw.url + "/plain"}, 50, orders)
	return s
}

// noiseAndRevocation has two clients be refused all the time. In the middle of it, one
// of the upstreams revokes the token.
func noiseAndRevocation(t *testing.T, s *verdictStage) verdictResult {
	began := time.Now()
	good := []*verdictStream{
		s.send("good, A", s.a, 50, orders),
		s.send("good, B", s.b, 50, orders),
		s.send("right passwords, A", s.a, 2, login(rightPassword)),
	}
	uploads := []*verdictStream{s.send("uploads, A", s.a, 1, uploads), s.send("uploads, B", s.b, 1, uploads)}
	noise := []*verdictStream{
		s.send("wrong passwords, A", s.a, 5, login("wrong")),
		s.send("admin, A", s.a, 10, admin),
		s.send("admin, B", s.b, 10, admin),
	}

	// A health check with the revoked token would rightly take A out until the next
	// one. So the new token has to come between two of them.
	eventually(t, verdictsRevoke+2*verdictsChecks, "a health check of A comes", func() bool {
		return s.a.checkedSince(began.Add(verdictsRevoke)) > 0
	})
	time.Sleep(time.Second)
	revoked := s.a.revoke()
	time.Sleep(time.Until(began.Add(verdictsLoad)))
	s.stop()

	r := s.result(good)
	r.twice = s.a.sentTwice()
	for _, stream := range good {
		s.wantAllInTime(t, stream)
	}
	refused, found := s.a.firstRefusalSince(revoked)
	if !found {
		t.Error("A has refused nobody with the revoked token, want some")
	}
	for _, stream := range uploads {
		s.wantUploads(t, stream, revoked, refused)
	}
	for _, stream := range noise {
		stream.wantOwnAnswer(t)
	}
	s.wantChecks(t, began)
	if good, _ := s.b.refusals(); good > 0 {
		t.Errorf("B has refused %d good requests, want none: there it was always a live token", good)
	}
	if r.tokenRequests > verdictsTokens {
		t.Errorf("token requests: got %d, want %d at most", r.tokenRequests, verdictsTokens)
	}
	if most := r.tokenRequests + heldRefusals; r.twice > most {
		t.Errorf("wrong passwords that were sent twice: got %d, want %d at most", r.twice, most)
	}
	return r
}

// refusalInOutage has one request be refused while the authorization server is out, and
// the gateway can't get another token than the good one that it has.
func refusalInOutage(how string) func(t *testing.T, s *verdictStage) verdictResult {
	return func(t *testing.T, s *verdictStage) verdictResult {
		s.issuer.begin(how)
		began := time.Now()
		good := []*verdictStream{s.send("good, A", s.a, 25, orders), s.send("good, B", s.b, 25, orders)}
		s.gw.get(t, "/a/admin", http.StatusUnauthorized)
		time.Sleep(time.Until(began.Add(verdictsOutage)))
		s.stop()
		s.issuer.end(t)

		r := s.result(good)
		for _, stream := range good {
			s.wantAllInTime(t, stream)
		}
		if s.checks {
			s.wantChecks(t, began)
		}
		return r
	}
}

// wantAllInTime fails the test if a good request was lost, or was slow though no
// upstream had refused it.
func (s *verdictStage) wantAllInTime(t *testing.T, stream *verdictStream) {
	t.Helper()
	if lost := stream.all.lost(); len(lost) > 0 {
		t.Errorf("%s: got %d of %d requests lost (%s), the first after %v and the last after %v, want none", stream.name, len(lost),
			len(stream.all), stream.all.statuses(), stream.since(lost[0]), stream.since(lost[len(lost)-1]))
	}
	if slow := s.slow(stream, verdictsLimit); len(slow) > 0 {
		t.Errorf("%s: got %d of %d requests slow that were not refused, the first after %v and the slowest with %s, want none over %v",
			stream.name, len(slow), len(stream.all), stream.since(slow[0]), milliseconds(slow.longest()), verdictsLimit)
	}
}

// wantUploads fails the test if an upload was lost though the gateway could have known
// that the token was revoked, or if one waited for too long. Uploads can't be sent
// twice.
func (s *verdictStage) wantUploads(t *testing.T, stream *verdictStream, revoked, known time.Time) {
	t.Helper()
	for _, o := range stream.all.lost() {
		inFlight := stream.to == s.a && o.end().After(revoked) && o.due.Before(known.Add(verdictsLimit+s.stall(o)))
		if o.status != http.StatusUnauthorized || !inFlight {
			t.Errorf("%s: request after %v: got %v, want 200", stream.name, stream.since(o), o)
		}
	}
	for _, o := range s.slow(stream, bodyWait+verdictsLimit) {
		t.Errorf("%s: request after %v: got an answer after %s, want it to wait for %v at most",
			stream.name, stream.since(o), milliseconds(o.took), bodyWait)
	}
}

// wantChecks fails the test if a health check has not come since then, or was refused.
func (s *verdictStage) wantChecks(t *testing.T, since time.Time) {
	t.Helper()
	const late = time.Second // on a busy machine
	least := int((time.Since(since) - late) / verdictsChecks)
	for _, u := range []*verdictUpstream{s.a, s.b} {
		_, refused := u.refusals()
		if got := u.checkedSince(since); got < least || refused > 0 {
			t.Errorf("%s: got %d health checks and %d of them refused, want %d at least and none refused", u.url, got, refused, least)
		}
	}
}

// wantOwnAnswer fails the test unless each request got the 401 that is its due.
func (v *verdictStream) wantOwnAnswer(t *testing.T) {
	t.Helper()
	for _, o := range v.all {
		if o.status != http.StatusUnauthorized {
			t.Errorf("%s: request after %v: got %v, want 401", v.name, v.since(o), o)
			return
		}
	}
}
