package e2e

import (
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// chaosEvents are what may happen besides the faults. Each has the machine
// for itself.
var chaosEvents = []struct {
	name string
	run  func(t *testing.T) *eventResult
}{
	{"gateway killed and restarted", killGateway},
	{"authorization server killed and restarted", killAuthServer},
	{"50 reloads", reloadStorm},
	{"tokens end long before expires_in", clockJump},
}

// eventResult is what was measured.
type eventResult struct {
	name     string
	all      outcomes
	attempts int
	note     string
}

// newEventResult logs what was measured.
func newEventResult(t *testing.T, all outcomes, counts injectorCounts, note string) *eventResult {
	t.Helper()
	r := &eventResult{all: all, attempts: len(counts.attempts), note: note}
	t.Logf("%d requests, %d lost (%s), %d resent, longest wait %v, %d token requests; %s", len(all), len(all.lost()),
		all.statuses(), all.resent(), all.longest().Round(time.Millisecond), r.attempts, note)
	return r
}

// killGateway leaves the gateway no time to end anything.
func killGateway(t *testing.T) *eventResult {
	as := startAuthServer(t, time.Minute)
	inj := newInjector(t, as, false)
	oauth := basicClient(t)
	u := newUpstream(t, as, oauth)
	gw := startChaosGateway(t, inj, u.serve(t), oauth)
	l := &steadyLoad{url: gw.url, rate: chaosRate}
	l.start()
	time.Sleep(2 * time.Second)

	killed := gw.process
	syscall.Kill(-killed.cmd.Process.Pid, syscall.SIGKILL)
	<-killed.exited
	died := time.Now()
	time.Sleep(500 * time.Millisecond)
	gw.startAgain(t, oauth)
	restarted := time.Now()
	eventually(t, 30*time.Second, "requests succeed again", func() bool { return l.succeededSince(restarted) })
	time.Sleep(2 * time.Second)
	all := l.stop()
	wantHealthy(t, gw)
	gw.stop()

	counts := inj.counts()
	recovery := all.recovery(restarted)
	r := newEventResult(t, all, counts, "lost while no gateway ran; the first success "+
		milliseconds(recovery)+" after the start of the new one")
	for _, o := range all.lost() {
		// The requests that the killed process had accepted are lost as well.
		if o.status != 0 || o.due.Before(died.Add(-chaosSlack)) || o.due.After(restarted.Add(recovery)) {
			t.Errorf("request %v after the kill: got %v, want requests lost only while no gateway ran", o.due.Sub(died), o)
		}
	}
	if got := len(counts.attempts); got != 2 {
		t.Errorf("token requests: got %d, want 2, one of each process", got)
	}
	u.wantNoneRefused(t)
	wantNothingSecret(t, killed.output.String()+gw.output.String(), oauth, counts.tokens)
	return r
}

// killAuthServer replaces the server by one that has other keys: tokens of
// the first are refused from then on.
func killAuthServer(t *testing.T) *eventResult {
	known := processes()
	first := startAuthServer(t, time.Minute)
	started := slices.DeleteFunc(processes(), func(pid int) bool { return slices.Contains(known, pid) })
	if len(started) != 1 {
		t.Fatalf("processes started: got %v, want the authorization server's", started)
	}
	inj := newInjector(t, first, false)
	oauth := basicClient(t)
	var trusts atomic.Pointer[upstream]
	before := newUpstream(t, first, oauth)
	trusts.Store(before)
	resource := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		trusts.Load().ServeHTTP(w, r)
	}))
	closeAtEnd(t, resource)
	gw := startChaosGateway(t, inj, resource.Listener.Addr().String(), oauth)
	l := &steadyLoad{url: gw.url, rate: chaosRate}
	l.start()
	time.Sleep(2 * time.Second)

	syscall.Kill(-started[0], syscall.SIGKILL)
	died := time.Now()
	second := startAuthServer(t, time.Minute)
	inj.redirect(second)
	back := time.Since(died)
	after := newUpstream(t, second, oauth)
	trusts.Store(after)
	time.Sleep(3 * time.Second)
	all := l.stop()
	wantHealthy(t, gw)
	gw.stop()

	counts := inj.counts()
	r := newEventResult(t, all, counts, "away for "+milliseconds(back)+
		", back with other keys: the upstream refused the old token")
	all.wantAll(t)
	if got := len(counts.attempts); got != 2 {
		t.Errorf("token requests: got %d, want 2, one to each server", got)
	}
	before.wantNoneRefused(t)
	if refused := after.refused(); refused == 0 || after.accepted == 0 {
		t.Errorf("the upstream with the new keys: got %v, want tokens of both servers", after)
	}
	wantNothingSecret(t, gw.output.String(), oauth, counts.tokens)
	return r
}

// processes returns the ids of those that the tests have started.
func processes() []int {
	var pids []int
	running.Range(func(pid, _ any) bool {
		pids = append(pids, pid.(int))
		return true
	})
	return pids
}

// startAgain runs the gateway once more, as it was, after its process ended.
func (gw *gateway) startAgain(t *testing.T, c client) {
	t.Helper()
	cmd := gw.command("run", filepath.Join(gw.dir, "Caddyfile"))
	cmd.Env = append(cmd.Env, "E2E_SECRET="+c.Secret)
	gw.process = startProcess(t, cmd)
}

// wantAll fails the test if a request was lost.
func (all outcomes) wantAll(t *testing.T) {
	t.Helper()
	lost := all.lost()
	for _, o := range lost[:min(len(lost), 5)] {
		t.Errorf("request after %v: got %v, want 200", o.due.Sub(all[0].due), o)
	}
	if len(lost) > 0 {
		t.Errorf("got %d of %d requests lost, want none", len(lost), len(all))
	}
}

// refused returns how many requests the upstream turned away.
func (u *upstream) refused() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.refusals)
}

// wantNoneRefused is wantAccepted where it isn't known how many came: some
// answers were lost on the way.
func (u *upstream) wantNoneRefused(t *testing.T) {
	t.Helper()
	if u.refused() > 0 {
		t.Errorf("upstream refused %q and %d in all, want none", u.refusals[0], len(u.refusals))
	}
}
