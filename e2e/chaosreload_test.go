package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"testing"
	"time"
)

// reloadStorm changes the config five times a second. A connection that the
// server closes because it shuts down is no failure; see TestReloadUnderLoad.
func reloadStorm(t *testing.T) *eventResult {
	const (
		reloads = 50
		life    = 6 * time.Second
	)
	as := startAuthServer(t, life)
	inj := newInjector(t, as, false)
	oauth := basicClient(t)
	u := newUpstream(t, as, oauth)
	to := u.serve(t)
	gw := startChaosGateway(t, inj, to, oauth)
	l := &steadyLoad{url: gw.url, rate: 2 * chaosRate, resend: true}
	l.start()

	began := time.Now()
	for n := range reloads {
		time.Sleep(time.Until(began.Add(time.Duration(n) * 200 * time.Millisecond)))
		gw.load(t, generation(n+1, chaosSite(inj, to, oauth)))
	}
	took := time.Since(began)
	time.Sleep(time.Second)
	all := l.stop()
	gw.wantGeneration(t, reloads)
	wantHealthy(t, gw)
	gw.stop()

	counts := inj.counts()
	r := newEventResult(t, all, counts, fmt.Sprintf("in %.1f s, with tokens of %g s",
		took.Seconds(), life.Seconds()))
	all.wantAll(t)
	u.wantAccepted(t, len(all)+1, "HTTP/1.1")
	// A token is renewed after seven to eight tenths of its life.
	lasted := all[len(all)-1].due.Sub(all[0].due)
	least, most := 1+int(lasted/(life*8/10+chaosSlack)), 1+int(lasted/(life*7/10)+1)
	if r.attempts < least || r.attempts > most {
		t.Errorf("token requests: got %d, want %d to %d, one for each token's life", r.attempts, least, most)
	}
	wantNothingSecret(t, gw.output.String(), oauth, counts.tokens)
	return r
}

// load is reload without a process of its own.
func (gw *gateway) load(t *testing.T, site string) {
	t.Helper()
	config, err := os.ReadFile(gw.writeCaddyfile(t, site))
	if err != nil {
		t.Fatal(err)
	}
	req := newRequest(t, http.MethodPost, "http://"+gw.admin+"/load", bytes.NewReader(config))
	req.Header.Set("Content-Type", "text/caddyfile")
	req.Close = true // the admin API restarts too
	logged := gw.output.size()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if answer, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK {
		t.Fatalf("POST /load: got %s %s, want 200", resp.Status, answer)
	}
	gw.awaitAdmin(t, logged)
}

// clockJump has the server say that tokens live for an hour, of which they
// live two seconds: as when its clock is an hour behind the upstream's, or
// somebody revokes one after the other.
func clockJump(t *testing.T) *eventResult {
	const life = 2 * time.Second
	as := startAuthServer(t, life)
	inj := newInjector(t, as, false)
	inj.rewrite = func(answer map[string]any) { answer["expires_in"] = 3600 }
	oauth := basicClient(t)
	u := newUpstream(t, as, oauth)
	gw := startChaosGateway(t, inj, u.serve(t), oauth)
	l := &steadyLoad{url: gw.url, rate: chaosRate}
	l.start()
	time.Sleep(12 * time.Second)
	all := l.stop()
	wantHealthy(t, gw)
	gw.stop()

	counts := inj.counts()
	r := newEventResult(t, all, counts, fmt.Sprintf("`expires_in` is an hour, `exp` is %g s away: "+
		"the upstream refused %d requests, which the gateway sent again", life.Seconds(), u.refused()))
	all.wantAll(t)
	// Every token is refused in the end, but for the last.
	used := len(u.tokensSeen())
	if len(counts.attempts) != used || len(counts.tokens) != used {
		t.Errorf("token requests: got %d for %d tokens, want %d, one for each refused token and the first",
			len(counts.attempts), len(counts.tokens), used)
	}
	if most := 1 + int(12*time.Second/life); used < 3 || used > most {
		t.Errorf("tokens: got %d, want 3 to %d", used, most)
	}
	if u.refused() < used-1 {
		t.Errorf("refused requests: got %d, want %d at least", u.refused(), used-1)
	}
	wantNothingSecret(t, gw.output.String(), oauth, counts.tokens)
	return r
}
