package e2e

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	// chaosRate is how many requests a second each gateway gets.
	chaosRate = 50

	// tokenTimeout is token_timeout: the longest that a request may wait.
	tokenTimeout = 1500 * time.Millisecond

	// chaosSlack is what a busy machine may add to a wait.
	chaosSlack = time.Second
)

// moment is a point in a token's life at which a fault begins. With
// refresh_before set to half of it, the renewal is due exactly at half time,
// and the token is used until nine tenths are over.
type moment struct {
	name string
	life time.Duration

	// The fault lasts from begin to end, counted from when the token was
	// issued; without one, from when the gateway runs.
	cold       bool
	begin, end time.Duration

	// lossless: there is a good token all the time.
	lossless bool
}

// The fault at `stale` makes renewals fail for 3 s. What is left of the token's
// life then is less than the back-off could have grown to, if that did not
// regard the end of the token.
var moments = []*moment{
	{name: "cold", life: 6 * time.Second, cold: true, end: 2500 * time.Millisecond},
	{name: "fresh", life: 6 * time.Second, begin: 200 * time.Millisecond, end: 2500 * time.Millisecond, lossless: true},
	{name: "stale", life: 14 * time.Second, begin: 6500 * time.Millisecond, end: 10 * time.Second, lossless: true},
	{name: "expired", life: 6 * time.Second, begin: 2500 * time.Millisecond, end: 7 * time.Second},
}

// cell is one fault at one moment.
type cell struct {
	fault  *fault
	moment *moment
}

func (c cell) String() string { return c.moment.name + "/" + c.fault.name }

// cellResult is what was measured.
type cellResult struct {
	cell
	all      outcomes
	recovery time.Duration
	attempts int // token requests, or connections that broke before
	during   int // of them, while the fault lasted
	failed   []failedFetch
}

// starting is held while a cell starts its gateway: when all do so at once, the
// first tokens have aged too much by the time that the gateways are ready.
var starting sync.Mutex

// run has the fault begin and end under load, and checks what must hold.
func (c cell) run(t *testing.T, as *authServer) *cellResult {
	oauth := basicClient(t)
	inj := newInjector(t, as, c.fault.https)
	u := newUpstream(t, as, oauth)
	addr := u.serve(t)
	began := time.Time{}
	if c.moment.cold {
		began = inj.begin(t, c.fault)
	}
	gw := func() *gateway {
		starting.Lock()
		defer starting.Unlock()
		return startChaosGateway(t, inj, addr, oauth, "refresh_before "+(c.moment.life/2).String())
	}()
	l := &steadyLoad{url: gw.url, rate: chaosRate}
	l.start()
	zero := time.Now()
	if !c.moment.cold {
		eventually(t, 10*time.Second, "the first token was issued", func() bool { return len(inj.counts().delivered) > 0 })
		zero = inj.counts().delivered[0]
		time.Sleep(time.Until(zero.Add(c.moment.begin)))
		began = inj.begin(t, c.fault)
	}
	time.Sleep(time.Until(zero.Add(c.moment.end)))
	healed := inj.heal(t)

	// All is well again once requests succeed and a new token has come.
	eventually(t, 40*time.Second, "requests succeed again", func() bool { return l.succeededSince(healed) })
	if !c.fault.harmless {
		eventually(t, 40*time.Second, "a token was obtained again", func() bool {
			return between(inj.counts().delivered, healed, time.Now()) > 0
		})
	}
	time.Sleep(time.Second)
	all := l.stop()
	wantHealthy(t, gw)
	gw.stop() // the log is complete

	counts := inj.counts()
	r := &cellResult{
		cell:     c,
		all:      all,
		recovery: all.recovery(healed),
		attempts: len(counts.attempts),
		during:   between(counts.attempts, began, healed),
		failed:   failedFetches(t, gw.output.String()),
	}
	t.Log(r)
	u.wantAccepted(t, len(all)-len(all.lost()), "HTTP/1.1")
	wantNothingSecret(t, gw.output.String(), oauth, counts.tokens)
	r.wantLosses(t)
	r.wantRecovery(t, healed)
	r.wantRequests(t, counts)
	return r
}

// wantLosses checks that requests are lost only where there can be no token,
// and how.
func (r *cellResult) wantLosses(t *testing.T) {
	t.Helper()
	lost := r.all.lost()
	for _, o := range lost {
		seconds, err := strconv.Atoi(o.retryAfter)
		gateway := o.status == http.StatusServiceUnavailable || o.status == http.StatusGatewayTimeout
		if !gateway || err != nil || seconds < 1 || seconds > 30 {
			t.Errorf("request after %v: got %v, want 200, or 503 or 504 with Retry-After from 1 to 30",
				o.due.Sub(r.all[0].due), o)
			break
		}
	}
	switch lossless := r.moment.lossless || r.fault.harmless; {
	case lossless && len(lost) > 0:
		t.Errorf("got %d of %d requests lost (%s), want none", len(lost), len(r.all), r.all.statuses())
	case !lossless && len(lost) == 0:
		t.Error("got no request lost, want the fault to be felt")
	}
	if got, most := r.all.longest(), tokenTimeout+chaosSlack; got > most {
		t.Errorf("longest wait: got %v, want %v at most", got, most)
	}
}

// wantRecovery checks that the gateway came back when it had announced to.
func (r *cellResult) wantRecovery(t *testing.T, healed time.Time) {
	t.Helper()
	asked := time.Duration(0)
	if r.fault.throttles {
		asked = retryAfter
	}
	wantBackoff(t, r.failed, asked)
	if len(r.failed) == 0 || len(r.all.lost()) == 0 {
		return
	}
	last := r.failed[len(r.failed)-1]
	if most := max(0, last.retryAt.Sub(healed)) + chaosSlack; r.recovery < 0 || r.recovery > most {
		t.Errorf("recovery: got %v, want %v at most: the gateway was to try again by then", r.recovery, most)
	}
}

// wantRequests checks that the authorization server isn't asked more than the
// back-off permits: up to three times in the first fetch that fails, and once
// in each that follows. A server that is silent gets up to three more requests beside
// the first of a fetch.
func (r *cellResult) wantRequests(t *testing.T, counts injectorCounts) {
	t.Helper()
	beside := 0
	if r.fault.slow {
		beside = 3 * (len(r.failed) + 1) // in the fetch that brings a token, too
	}
	if most := len(r.failed) + 2 + beside + len(counts.delivered); r.attempts > most {
		t.Errorf("token requests: got %d, want %d at most: %d failed fetches, 2 quick retries, %d side by side, %d tokens",
			r.attempts, most, len(r.failed), beside, len(counts.delivered))
	}
	// Some more than the intervals make, as they may be short by chance, and
	// are when the end of a token is near.
	if len(r.failed) > 14 {
		t.Errorf("failed fetches: got %d, want 14 at most", len(r.failed))
	}
	if counts.early > 0 {
		t.Errorf("token requests before Retry-After had passed: got %d, want none", counts.early)
	}
	switch felt := len(r.failed) > 0; {
	case r.fault.harmless || r.moment.name == "fresh":
		if felt {
			t.Errorf("failed fetches: got %d (%s), want none", len(r.failed), r.failed[0].err)
		}
	case !felt:
		t.Error("failed fetches: got none, want some: the fault was not felt")
	}
	if r.moment.name == "fresh" && r.during > 0 {
		t.Errorf("token requests during the fault: got %d, want none: the token was fresh", r.during)
	}
}

func (r *cellResult) String() string {
	return fmt.Sprintf("%d requests, %d lost (%s), longest wait %v, %d token requests, %d failed fetches, recovery %v",
		len(r.all), len(r.all.lost()), r.all.statuses(), r.all.longest().Round(time.Millisecond),
		r.attempts, len(r.failed), r.recovery.Round(time.Millisecond))
}

// startChaosGateway starts a gateway that obtains its tokens through the
// injector, logs all it can, and gives up on an upstream for 30 s at its
// first failure.
func startChaosGateway(t *testing.T, inj *injector, to string, c client, options ...string) *gateway {
	t.Helper()
	return startGateway(t, gatewayConfig{
		options: "debug",
		site:    chaosSite(inj, to, c, options...),
		env:     []string{"E2E_SECRET=" + c.Secret},
	})
}

// chaosSite returns the directives of such a gateway's site.
func chaosSite(inj *injector, to string, c client, options ...string) string {
	options = append(options, "token_timeout "+tokenTimeout.String())
	if inj.trust != "" {
		options = append(options, "token_transport {\n\ttls_trust_pool file "+inj.trust+"\n}")
	}
	p := proxy{to: to, as: &authServer{issuer: inj.url}, client: c, extra: options}
	return strings.Replace(p.String(), "{\n", "{\n\tfail_duration 30s\n\tunhealthy_status 5xx\n", 1)
}

// wantHealthy checks that the gateway holds nothing against its upstream.
func wantHealthy(t *testing.T, gw *gateway) {
	t.Helper()
	var upstreams []struct {
		Address string `json:"address"`
		Fails   int    `json:"fails"`
	}
	getJSON(t, "http://"+gw.admin+"/reverse_proxy/upstreams", &upstreams)
	if len(upstreams) != 1 {
		t.Fatalf("upstreams: got %v, want one", upstreams)
	}
	if got := upstreams[0].Fails; got != 0 {
		t.Errorf("the upstream's failures: got %d, want 0", got)
	}
}
