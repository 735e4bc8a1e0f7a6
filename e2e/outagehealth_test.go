package e2e

import (
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// An upstream that demands the token for its health checks, too. Whoever fails one is
// down until the next: the gateway must not let a check fail for want of a token.
const (
	healthInterval = 20 * time.Second
	healthRate     = 50 // requests a second

	// healthWatch is how long a load goes on, so that another check is among it.
	healthWatch = healthInterval + 5*time.Second

	// shortLife is that of tokens which end between two checks.
	shortLife = 4 * time.Second
)

// healthScene is something that a gateway with health checks goes through.
type healthScene struct {
	name string
	life time.Duration // of the tokens

	// play returns what became of requests that were sent since the gateway had,
	// or could have, a token, and when the server or the gateway was back.
	play func(t *testing.T, s *healthStage) (all outcomes, back time.Time)
}

var healthScenes = []*healthScene{
	{"cold start", time.Minute, coldStart},
	{"restart of the gateway", time.Minute, restart},
	{"reload to another client", time.Minute, reloadToAnother},
	{"tokens of 4 s", shortLife, steady},
	{"tokens of 4 s, no requests before", shortLife, idle},
	{"tokens of 4 s, outage of 10 s (503)", shortLife, outageAtCheck},
}

// healthStage is where a scene is played.
type healthStage struct {
	issuer   *outageIssuer
	upstream *outageUpstream
	addr     string // of the upstream
	client   client
	gw       *gateway
}

// runHealthScenes plays all scenes at once: they mostly wait.
func runHealthScenes(t *testing.T, results *outageResults) {
	var mu sync.Mutex // guards results
	results.scenes = make(map[*healthScene]outageResult)
	sideBySide(len(healthScenes), healthScenes, func(s *healthScene) {
		t.Run(s.name, func(t *testing.T) {
			r := s.run(t)
			mu.Lock()
			defer mu.Unlock()
			results.scenes[s] = r
		})
	})
}

func (s *healthScene) run(t *testing.T) outageResult {
	stage := &healthStage{issuer: newOutageIssuer(t, s.life), client: basicClient(t)}
	stage.upstream = &outageUpstream{issuer: stage.issuer}
	stage.addr = stage.upstream.serve(t)
	starting.Lock()
	stage.gw = startGateway(t, gatewayConfig{site: stage.site(stage.client), env: []string{"E2E_SECRET=" + stage.client.Secret}})
	starting.Unlock()
	all, back := s.play(t, stage)

	r := measure(all, stage.issuer.issued(), back)
	r.tokenRequests = stage.issuer.requests()
	t.Log(r)
	if r.unavoidable == 0 {
		all.wantAll(t)
	}
	r.wantRecovery(t)
	return r
}

// site returns the directives of the gateway's site.
func (s *healthStage) site(c client) string {
	p := proxy{to: s.addr, as: &authServer{issuer: s.issuer.url}, client: c}
	return strings.Replace(p.String(), "{\n", fmt.Sprintf("{\n\thealth_uri %s\n\thealth_interval %v\n", healthPath, healthInterval), 1)
}

// up waits until the gateway serves requests. What that takes is another scene's
// concern, unless it takes more than another check.
func (s *healthStage) up(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(healthWatch); ; time.Sleep(20 * time.Millisecond) {
		if resp, err := http.Get(s.gw.url); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Errorf("got no request served in the first %v, want the scene to begin", healthWatch)
			return
		}
	}
}

func (s *healthStage) load() *steadyLoad {
	l := &steadyLoad{url: s.gw.url, rate: healthRate, limit: outageWait, resend: true}
	l.start()
	return l
}

// watch sends requests for a while.
func (s *healthStage) watch() (all outcomes, began time.Time) {
	began = time.Now()
	l := s.load()
	time.Sleep(healthWatch)
	return l.stop(), began
}

func coldStart(_ *testing.T, s *healthStage) (outcomes, time.Time) { return s.watch() }

// restart sends nothing while no gateway runs.
func restart(t *testing.T, s *healthStage) (outcomes, time.Time) {
	s.up(t)
	s.gw.stop()
	s.gw.startAgain(t, s.client)
	eventually(t, startTimeout, "the gateway listens again", func() bool {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.gw.url, "http://"))
		if err != nil {
			return false
		}
		conn.Close()
		return true
	})
	return s.watch()
}

// reloadToAnother needs another token from one moment to the next.
func reloadToAnother(t *testing.T, s *healthStage) (outcomes, time.Time) {
	s.up(t)
	l := s.load()
	time.Sleep(2 * time.Second)
	other := s.client
	other.ID = "another"
	s.gw.load(t, s.site(other))
	back := time.Now()
	await(t, "token of the other client", func() bool { return s.issuer.knows(other.ID) })
	time.Sleep(time.Until(back.Add(healthWatch)))
	return l.stop(), back
}

func steady(t *testing.T, s *healthStage) (outcomes, time.Time) {
	s.up(t)
	return s.watch()
}

// idle has nobody ask until a check has come for which there was no token, unless the
// gateway cared for one.
func idle(t *testing.T, s *healthStage) (outcomes, time.Time) {
	s.up(t)
	ended := time.Now().Add(2 * shortLife) // of a token that is renewed only if somebody asks
	eventually(t, 2*healthInterval, "a health check comes", func() bool {
		return slices.ContainsFunc(s.upstream.checked(), ended.Before)
	})
	return s.watch()
}

// outageAtCheck has a check come when the last token has ended and the server is out.
func outageAtCheck(t *testing.T, s *healthStage) (outcomes, time.Time) {
	const (
		before = 6 * time.Second // more than a token lives
		after  = 4 * time.Second
	)
	s.up(t) // which it is before the first check, too
	eventually(t, healthInterval, "the first health check comes", func() bool { return len(s.upstream.checked()) > 0 })
	check := s.upstream.checked()[0]
	for time.Until(check) < before+2*time.Second {
		check = check.Add(healthInterval)
	}
	time.Sleep(time.Until(check.Add(-before - 2*time.Second)))
	l := s.load()
	time.Sleep(time.Until(check.Add(-before)))
	if !s.issuer.live() {
		t.Error("got no live token when the outage begins, want one: requests have asked for it")
	}
	s.issuer.begin(out503)
	time.Sleep(time.Until(check.Add(after)))
	back := s.issuer.end(t)
	time.Sleep(healthWatch)
	return l.stop(), back
}
