package e2e

import (
	"bufio"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// An outage longer than a token: it begins while the token is fresh, and ends well
// after the token's end. The load goes on until a gateway that has backed off for
// long would be seen to do so.
const (
	outageRate  = 200 // requests a second
	outageLife  = 20 * time.Second
	outageBegin = 3 * time.Second
	outageEnd   = 32 * time.Second
	outageLoad  = 45 * time.Second

	// outageWait is how long a client waits for an answer: longer than any gateway
	// should have it wait.
	outageWait = 30 * time.Second
)

// The limits of an outage. No request can succeed between the end of the last token
// and the end of the outage; all limits are about the rest.
const (
	// recoveryLimit is how long after the end of an outage a gateway may have
	// requests fail, apart from the time that the server takes for the token. The
	// gateway does not know when the server is back, and must not ask it all the
	// time.
	recoveryLimit = 2500 * time.Millisecond

	// tokenRequestLimit is how often the server may be asked in one run: an
	// outage must not become worse by those who wait for its end.
	tokenRequestLimit = 25

	// medianFrom is the least number of runs whose median says something. The
	// moments at which the gateway tries again are random: of a few runs, most may
	// be slow.
	medianFrom = 10
)

// outageKind is how the server is out, and how many requests more than the
// unavoidable may fail: in each run, and in the median of all.
type outageKind struct {
	name         string
	most, median int
}

// At 200 requests a second, 450 are those of 2.25 s. Whoever waits for a server that
// hangs gets the token as soon as it is back, so fewer fail there.
var outageKinds = []*outageKind{
	{out503, 450, 250},
	{outHang, 350, 150},
	{outRefused, 450, 250},
}

// TestOutage has the authorization server go out for longer than a token lives, and
// health checks go without a token. OUTAGE_RUNS is how many runs there are of each
// kind of outage, OUTAGE_AT_ONCE how many go side by side. With OUTAGE_RESULTS set to
// the name of a file, the test writes what it measured there.
func TestOutage(t *testing.T) { //nolint:tparallel // its parts come one after the other
	t.Parallel() // it mostly waits
	results := outageResults{runs: make(map[*outageKind][]outageResult), atOnce: numberOf(t, "OUTAGE_AT_ONCE", 3)}
	n := numberOf(t, "OUTAGE_RUNS", 1)
	t.Run("kinds", func(t *testing.T) { runOutages(t, n, &results) })
	t.Run("health checks", func(t *testing.T) { runHealthScenes(t, &results) })
	t.Logf("\n%s", results.tables())

	file := os.Getenv("OUTAGE_RESULTS")
	if file == "" || t.Failed() {
		return
	}
	if !results.complete(n) {
		t.Fatal("got a part of the results, want all before they are written: run the whole of TestOutage")
	}
	writeResults(t, file, "", results.String())
}

// numberOf returns what a variable of the environment says.
func numberOf(t *testing.T, variable string, otherwise int) int {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s: got %q, want a number from 1 on", variable, text)
	}
	return n
}

// runOutages runs each kind of outage n times.
func runOutages(t *testing.T, n int, results *outageResults) {
	var (
		mu  sync.Mutex // guards results
		all []*outageKind
	)
	for range n {
		all = append(all, outageKinds...) // one of each kind side by side
	}
	sideBySide(results.atOnce, all, func(k *outageKind) {
		t.Run(k.name, func(t *testing.T) {
			r := k.run(t)
			mu.Lock()
			defer mu.Unlock()
			results.runs[k] = append(results.runs[k], r)
		})
	})
	for _, k := range outageKinds {
		runs := results.runs[k]
		if got := median(runs, outageResult.avoidable); len(runs) >= medianFrom && got > k.median {
			t.Errorf("%s: failed requests, apart from the unavoidable: got %d in the median of %d runs, want %d at most",
				k.name, got, len(runs), k.median)
		}
	}
}

// run has the server go out once.
func (k *outageKind) run(t *testing.T) outageResult {
	issuer := newOutageIssuer(t, outageLife)
	c := basicClient(t)
	gw := startProxy(t, proxy{to: (&outageUpstream{issuer: issuer}).serve(t), as: &authServer{issuer: issuer.url}, client: c})
	await(t, "token", func() bool { return issuer.knows(c.ID) })
	l := &steadyLoad{url: gw.url, rate: outageRate, limit: outageWait}
	l.start()
	began := time.Now()
	time.Sleep(time.Until(began.Add(outageBegin)))
	issuer.begin(k.name)
	time.Sleep(time.Until(began.Add(outageEnd)))
	back := issuer.end(t)
	time.Sleep(time.Until(began.Add(outageLoad)))
	all := l.stop()

	r := measure(all, issuer.issued(), back)
	// Only the gateway knows of requests whose connection was refused.
	r.tokenRequests = max(issuer.requests(), gw.tokenRequests(t))
	t.Log(r)
	if most := r.unavoidable + k.most; r.failed > most {
		t.Errorf("failed requests: got %d, want %d at most: the %d unavoidable and %d", r.failed, most, r.unavoidable, k.most)
	}
	r.wantRecovery(t)
	if r.tokenRequests > tokenRequestLimit {
		t.Errorf("token requests: got %d, want %d at most", r.tokenRequests, tokenRequestLimit)
	}
	return r
}

// tokenRequests returns how many token requests the gateway has counted.
func (gw *gateway) tokenRequests(t *testing.T) int {
	t.Helper()
	resp, err := http.Get("http://" + gw.admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	n := 0.0
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "caddy_oauth2_token_requests_total{") {
			fields := strings.Fields(lines.Text())
			value, err := strconv.ParseFloat(fields[len(fields)-1], 64)
			if err != nil {
				t.Fatal(err)
			}
			n += value
		}
	}
	if n == 0 {
		t.Error("token requests in the gateway's metrics: got none, want some")
	}
	return int(n)
}
