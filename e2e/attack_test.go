package e2e

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

const (
	attackTime = 2 * time.Minute
	attackRate = 100 // attacks a second

	// attackPause is how long a config lives.
	attackPause = 700 * time.Millisecond

	// attackSlack is how many goroutines more than before the attack are none that
	// were left behind: a health check or a renewal may be under way.
	attackSlack = 30
)

// TestAttack has hostile clients ask hostile upstreams through a gateway, while its
// config changes all the time. Whatever they do, no upstream gets what belongs to
// another, nothing secret stands in anything that the gateway writes or answers, it
// neither races nor panics, and nothing is left of it all in the end.
//
// The seed stands in the log. With ATTACK_SEED set to it, clients do the same again, in
// the same order. With -short, the attack takes 15 seconds.
func TestAttack(t *testing.T) {
	seed, duration := attackSeed(t), attackTime
	if testing.Short() {
		duration = 15 * time.Second
	}
	f := newAttackField(t)
	file := filepath.Join(t.TempDir(), "log")
	gw := startAttackedGateway(t, f, file)
	operator := newAttackAdmin(gw, f.found)
	// The first tokens and checks need a moment.
	time.Sleep(2 * time.Second)
	before, _ := operator.rest(t, 0, 2*time.Second)

	client := newAttackClient(gw, f)
	began := time.Now()
	client.start(allAttacks(seed, attackPlays))
	loads := reloadUntil(t, f, operator, began.Add(duration))
	client.stop()

	operator.load(t, f.site(0), 200)
	after, profile := operator.rest(t, before+attackSlack, time.Minute)
	if after > before+attackSlack {
		t.Errorf("goroutines of the gateway: got %d, want about the %d of the start; now:\n%.6000s", after, before, profile)
	}
	operator.look(t, 0)
	gw.stop() // the log is complete
	lines := judgeLog(t, f.found, file, gw.output.String())

	t.Logf("%v of clients, %v of upstreams, %d configs, %d lines of the log; goroutines: %d before, %d after",
		client.sent.total(), f.played.total(), loads, lines, before, after)
	f.wantPlayed(t, client)
	f.found.report(t)
}

// attackSeed returns the seed of the attack's order.
func attackSeed(t *testing.T) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv("ATTACK_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("ATTACK_SEED: %v", err)
		}
	}
	t.Logf("ATTACK_SEED=%d", seed)
	return seed
}

// startAttackedGateway starts a gateway that is built for the race detector. It logs all
// that it can to a file.
func startAttackedGateway(t *testing.T, f *attackField, file string) *gateway {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "caddy")
	if err := build(binary, "..", "./cmd/caddy", "-race"); err != nil {
		t.Fatal(err)
	}
	return startGateway(t, gatewayConfig{
		binary: binary,
		site:   f.site(0),
		env:    f.env,
		options: "grace_period 300ms\n\tmetrics\n" +
			"\tlog {\n\t\tlevel DEBUG\n\t\tformat json\n\t\toutput file " + file + " {\n\t\t\troll_disabled\n\t\t}\n\t}\n" +
			"\tservers {\n\t\tprotocols h1 h2c\n\t\tlog_credentials\n\t}",
	})
}

// reloadUntil loads one config after the other. It returns how many.
func reloadUntil(t *testing.T, f *attackField, operator *attackAdmin, end time.Time) (n int) {
	t.Helper()
	for n = 1; time.Now().Before(end); n++ {
		operator.load(t, f.site(n), 200)
		if n%5 == 0 {
			operator.load(t, f.site(n)+"\n"+f.brokenSite(n), 400)
			operator.look(t, n)
		}
		time.Sleep(attackPause)
	}
	return n
}

// wantPlayed checks that the attack was one: each trick was played, and each upstream
// got requests with a token of its own.
func (f *attackField) wantPlayed(t *testing.T, client *attackClient) {
	t.Helper()
	for _, owner := range []byte("abcde") {
		if got := f.upstreams[owner].admitted.Load(); got < 20 {
			t.Errorf("requests of upstream %c with its token: got %d, want 20 at least", owner, got)
		}
	}
	for _, name := range attackPlays {
		if f.played.of(name) == 0 {
			t.Errorf("got no %q of an upstream, want some", name)
		}
	}
	for _, trick := range clientTricks() {
		if client.sent.of(trick.name()) == 0 {
			t.Errorf("got no %q of a client, want some", trick.name())
		}
	}
	t.Logf("answers to clients: %v", client.got)
	t.Logf("upstreams played: %v", f.played)
}
