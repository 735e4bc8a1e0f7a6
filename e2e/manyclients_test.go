package e2e

import (
	"fmt"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Many clients share one authorization server, which takes 20 token requests at a time
// and 100 ms for each.
const (
	manyClients = 300
	manyLimit   = 20
	manyTakes   = 100 * time.Millisecond

	// manyAllows is how long the server needs for all clients, with as many at a time as
	// it takes.
	manyAllows = manyClients / manyLimit * manyTakes

	// manyMost is how long the gateway may take: it has to find the limit.
	manyMost = manyAllows * 3 / 2

	// manyRefused is the wait after a 429, which some have to bear.
	manyRefused = time.Second

	// manyPatience is when the test gives up.
	manyPatience = 10 * time.Second
)

// manyStart is one way to start a gateway whose clients have no token.
type manyStart struct {
	name       string
	retryAfter string // what the server says with 429
	requests   bool   // one to each client at once
}

var manyStarts = []*manyStart{
	{"requests, Retry-After", "1", true},
	{"requests, no Retry-After", "", true},
	{"warm-up, Retry-After", "1", false},
	{"warm-up, no Retry-After", "", false},
}

// manyStartResult is what became of it.
type manyStartResult struct {
	withToken     int           // clients that got a token in time
	complete      time.Duration // from the first token request until all had one; 0: never
	tokenRequests int
	throttled     int // of these
	lost          int // requests that were not answered with 200
	unjust        int // of these, those of clients that the server had not told 429
	slowest       time.Duration
}

// TestManyClientsStart has all clients want their first token at once.
func TestManyClientsStart(t *testing.T) { //nolint:tparallel // its parts come one after the other
	t.Parallel() // it mostly waits
	results := make(map[*manyStart]manyStartResult)
	for _, s := range manyStarts {
		t.Run(s.name, func(t *testing.T) {
			r := s.play(t)
			results[s] = r
			if most := manyMost + manyRefused; r.withToken < manyClients || r.complete > most {
				t.Errorf("got %d tokens, the last after %v; want %d within %v", r.withToken, r.complete, manyClients, most)
			}
			if 10*r.throttled > r.tokenRequests {
				t.Errorf("got 429 for %d of %d token requests, want a tenth at most", r.throttled, r.tokenRequests)
			}
			if r.unjust > 0 {
				t.Errorf("got %d failed requests of clients that the server had not told 429, want none", r.unjust)
			}
		})
	}
	var b strings.Builder
	b.WriteString("| start | clients with a token | all after | token requests | 429 | requests not 200 | of these without 429 | slowest |\n")
	b.WriteString("|---|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, s := range manyStarts {
		if r, played := results[s]; played {
			fmt.Fprintf(&b, "| %s | %d | %s | %d | %d | %d | %d | %s |\n", s.name, r.withToken, orNever(r.complete),
				r.tokenRequests, r.throttled, r.lost, r.unjust, milliseconds(r.slowest))
		}
	}
	t.Logf("\n%s", b.String())
}

func orNever(d time.Duration) string {
	if d == 0 {
		return "never"
	}
	return milliseconds(d)
}

func (s *manyStart) play(t *testing.T) (r manyStartResult) {
	i := newManyIssuer(t, &manyIssuer{takes: manyTakes, life: time.Hour, limit: manyLimit, retryAfter: s.retryAfter})
	gw := startMany(t, manyClients, i)
	var all outcomes
	if s.requests {
		all = gw.ask(manyClients)
	}
	complete := i.awaitAll(manyClients, manyPatience)
	requests := i.all()
	r.tokenRequests, r.throttled = len(requests), requests.with(http.StatusTooManyRequests)
	r.withToken = len(requests.told(http.StatusOK))
	if !complete.IsZero() {
		r.complete = complete.Sub(requests[0].at)
	}
	told := requests.told(http.StatusTooManyRequests)
	for _, o := range all.lost() {
		r.lost++
		if !told[manyClient(o.n)] {
			r.unjust++
		}
	}
	r.slowest = all.longest()
	if len(all.lost()) > 0 {
		t.Logf("requests that were not answered with 200: %s", all.statuses())
	}
	if n := i.upstreamRefused(); n > 0 {
		t.Errorf("the upstream refused %d requests, want none", n)
	}
	return r
}

// awaitAll waits until n clients have a token, or the time is over. It returns when the
// last one got it; zero if one has none.
func (i *manyIssuer) awaitAll(n int, limit time.Duration) time.Time {
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		if at := i.all().complete(n); !at.IsZero() || time.Now().After(deadline) {
			return at
		}
	}
}

// The authorization server is out when the gateway starts, and no client has a token.
const (
	manyOutage = 30 * time.Second

	// manyAttempts is how many token requests there may be meanwhile: ten a second of all
	// clients together, and a few more.
	manyAttempts = 350
)

// TestManyClientsOutage has each client be asked once a second, while there are no
// tokens, and until all are served.
func TestManyClientsOutage(t *testing.T) {
	t.Parallel() // it mostly waits
	i := newManyIssuer(t, &manyIssuer{takes: manyTakes, life: time.Hour, limit: manyLimit, retryAfter: "1"})
	i.setOut(true)
	gw := startMany(t, manyClients, i)
	load := &steadyLoad{rate: manyClients, compose: gw.compose(manyClients)}
	load.start()
	time.Sleep(manyOutage)
	back := i.setOut(false)
	time.Sleep(manyMost + manyPatience)
	all := load.stop()
	requests := i.all()

	served := make(map[int]time.Duration) // when each client was first served, since the server is back
	late := 0                             // lost requests that were due later than manyMost
	for _, o := range all {
		since := o.end().Sub(back)
		if first, ok := served[o.n%manyClients]; o.ok() && (!ok || since < first) {
			served[o.n%manyClients] = since
		}
		if !o.ok() && o.due.Sub(back) > manyMost {
			late++
		}
	}
	longest := time.Duration(0)
	for _, since := range served {
		longest = max(longest, since)
	}
	complete := time.Duration(0) // when the last client got its token
	if at := requests.complete(manyClients); !at.IsZero() {
		complete = at.Sub(back)
	}
	after := requests.since(back)
	during := len(requests) - len(after)
	t.Logf("\n| clients | requests | token requests in the outage | most in a second | token requests after | 429 | all have tokens after | clients served | all after | longest wait | lost later |\n"+
		"|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n| %d | %d | %d | %d | %d | %d | %s | %d | %s | %s | %d |\n",
		manyClients, len(all), during, requests[:during].peak(), len(after), after.with(http.StatusTooManyRequests),
		orNever(complete), len(served), milliseconds(longest), milliseconds(all.longest()), late)
	if during > manyAttempts {
		t.Errorf("token requests in the outage: got %d, want %d at most", during, manyAttempts)
	}
	if complete == 0 || complete > manyMost {
		t.Errorf("got %d clients with a token, the last after %v; want all %d within %v",
			len(requests.told(http.StatusOK)), complete, manyClients, manyMost)
	}
	// A client that got its token with nobody waiting is asked within a second.
	if most := manyMost + time.Second; len(served) < manyClients || longest > most {
		t.Errorf("clients served: got %d, the last after %v; want all %d within %v", len(served), longest, manyClients, most)
	}
	if late > 0 {
		t.Errorf("lost requests later than %v after the outage: got %d, want none", manyMost, late)
	}
	if n := i.upstreamRefused(); n > 0 {
		t.Errorf("the upstream refused %d requests, want none", n)
	}
}

// The authorization server never answers one client, and then two. The others have
// short tokens.
const (
	silenceClients = 52
	silenceLife    = 6 * time.Second
	silenceTakes   = 50 * time.Millisecond
	silenceRate    = 4 // requests a second to each client

	// silenceLimit is how much longer 99 % of the others' requests may take than 99 % of
	// requests that need no token take at the same time.
	silenceLimit = 20 * time.Millisecond
)

// silencePhase is how many clients get no answer, and for how long.
type silencePhase struct {
	silent int
	lasts  time.Duration
}

// The token of a client that gets no answer any more ends after a few seconds. Its fetch
// times out after ten more. Then, there are several requests of this client under way.
var silencePhases = []silencePhase{{0, 9 * time.Second}, {1, 18 * time.Second}, {2, 22 * time.Second}}

// TestManyClientsSilence has nobody pay for clients that get no answer.
func TestManyClientsSilence(t *testing.T) {
	t.Parallel() // it mostly waits
	i := newManyIssuer(t, &manyIssuer{takes: silenceTakes, life: silenceLife})
	gw := startMany(t, silenceClients, i)
	if i.awaitAll(silenceClients, manyPatience).IsZero() {
		t.Fatal("not all clients got a token")
	}
	const others = silenceClients - 2
	good := &steadyLoad{rate: silenceRate * others, compose: gw.compose(others)}
	silent := &steadyLoad{rate: silenceRate * 2, compose: func(n int) (*http.Request, error) {
		return gw.compose(silenceClients)(others + n%2)
	}}
	control := &steadyLoad{rate: 50, compose: func(n int) (*http.Request, error) {
		return http.NewRequest(http.MethodGet, fmt.Sprintf("%s/plain/%d", gw.url, n), nil)
	}}
	loads := []*steadyLoad{good, silent, control}
	for _, l := range loads {
		l.start()
	}
	var began []time.Time
	for _, phase := range silencePhases {
		for n := range phase.silent {
			i.silence(manyClient(others + n))
		}
		began = append(began, time.Now())
		time.Sleep(phase.lasts)
	}
	var stopped [3]outcomes
	sideBySide(len(loads), []int{0, 1, 2}, func(n int) { stopped[n] = loads[n].stop() })
	requests := i.all()

	var b strings.Builder
	b.WriteString("| clients without an answer | requests to the others | lost | 99 % | slowest | 99 % without a token | slowest without a token | lost requests to the silent | token requests |\n")
	b.WriteString("|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for n, phase := range silencePhases {
		within := func(at time.Time) bool {
			return !at.Before(began[n]) && (n+1 == len(began) || at.Before(began[n+1]))
		}
		during := func(all outcomes) outcomes {
			return slices.DeleteFunc(slices.Clone(all), func(o outcome) bool { return !within(o.due) })
		}
		others, silent, control := during(stopped[0]), during(stopped[1]), during(stopped[2])
		tokenRequests := 0
		for _, r := range requests {
			if within(r.at) {
				tokenRequests++
			}
		}
		p99, base := others.percentile(0.99), control.percentile(0.99)
		fmt.Fprintf(&b, "| %d | %d | %d | %s | %s | %s | %s | %d | %d |\n", phase.silent, len(others), len(others.lost()),
			tenths(p99), tenths(others.longest()), tenths(base), tenths(control.longest()), len(silent.lost()), tokenRequests)
		if lost := others.lost(); len(lost) > 0 {
			t.Errorf("%d silent: %d of the others' requests failed (%s), want none", phase.silent, len(lost), lost.statuses())
		}
		if p99 > base+silenceLimit {
			t.Errorf("%d silent: 99 %% of the others' requests took up to %v, want no more than %v longer than the %v without a token",
				phase.silent, p99, silenceLimit, base)
		}
	}
	t.Logf("\n%s", b.String())
	if n := i.upstreamRefused(); n > 0 {
		t.Errorf("the upstream refused %d requests, want none", n)
	}
}

func tenths(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }

// manyScale is a number of clients, and what they do.
type manyScale struct {
	clients int
	life    time.Duration // of tokens; 0: one hour, and nobody asks for them
	asked   time.Duration // how often each client is asked
}

const scaleTakes = 20 * time.Millisecond

// scaleResult is what many clients cost.
type scaleResult struct {
	adapt, load           time.Duration
	complete              time.Duration // from the first token request until all clients had a token
	startPeak             int           // the most token requests in a second until then
	size, reloaded        manySize      // before and after reloads
	reload                time.Duration
	reloadTokens          int
	metrics, list         time.Duration // how long /metrics and /oauth2/clients take
	metricsSize, listSize int
	all                   outcomes
	renewals              int // token requests under load
	renewalPeak           int // the most of them in a second
}

// TestManyClientsScale measures what many clients cost. MANY_CLIENTS=10000 measures so
// many as well.
func TestManyClientsScale(t *testing.T) {
	scales := []manyScale{{10, 0, 0}, {1000, 30 * time.Second, 10 * time.Second}}
	if text := os.Getenv("MANY_CLIENTS"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n <= 0 {
			t.Fatalf("MANY_CLIENTS: got %q, want a number", text)
		}
		scales = append(scales, manyScale{n, time.Minute, 30 * time.Second})
	}
	results := make([]scaleResult, len(scales))
	for n, s := range scales {
		t.Run(fmt.Sprint(s.clients), func(t *testing.T) { results[n] = s.play(t) })
	}
	t.Logf("\n%s", scaleTables(scales, results))
}

func (s manyScale) play(t *testing.T) (r scaleResult) {
	life := s.life
	if life == 0 {
		life = time.Hour
	}
	i := newManyIssuer(t, &manyIssuer{takes: scaleTakes, life: life})
	r.adapt = adaptMany(t, s.clients)
	gw := startMany(t, s.clients, i)
	r.load = gw.load
	complete := i.awaitAll(s.clients, time.Minute)
	started := i.all()
	if complete.IsZero() {
		t.Fatalf("got a token for %d of %d clients", len(started.told(http.StatusOK)), s.clients)
	}
	r.complete, r.startPeak = complete.Sub(started[0].at), started.peak()
	if len(started) != s.clients {
		t.Errorf("token requests at the start: got %d, want %d", len(started), s.clients)
	}
	r.size = gw.size(t)

	// The reloads come while all tokens are fresh.
	before := i.asked()
	r.reload = gw.reload(t)
	r.reloaded = gw.size(t)
	if r.reloadTokens = i.asked() - before; r.reloadTokens > 0 {
		t.Errorf("token requests of a reload: got %d, want none", r.reloadTokens)
	}
	var body []byte
	body, r.metrics = gw.fromAdmin(t, "/metrics")
	r.metricsSize = len(body)
	body, r.list = gw.fromAdmin(t, "/oauth2/clients")
	r.listSize = len(body)
	if s.asked == 0 {
		return r
	}

	// Two renewals of each token, the second of which ends after 148 % of a life.
	load := &steadyLoad{rate: int(float64(s.clients) / s.asked.Seconds()), compose: gw.compose(s.clients)}
	load.start()
	time.Sleep(time.Until(complete.Add(s.life * 3 / 2)))
	r.all = load.stop()
	renewals := i.all().since(complete.Add(time.Millisecond))
	r.renewals, r.renewalPeak = len(renewals), renewals.peak()
	if lost := r.all.lost(); len(lost) > 0 {
		t.Errorf("%d of %d requests failed (%s), want none", len(lost), len(r.all), lost.statuses())
	}
	if r.renewals < 2*s.clients || r.renewals > 2*s.clients+s.clients/50 {
		t.Errorf("renewals: got %d, want two for each of %d clients", r.renewals, s.clients)
	}
	if n := i.upstreamRefused(); n > 0 {
		t.Errorf("the upstream refused %d requests, want none", n)
	}
	return r
}

// scaleTables shows what many clients cost. A client's share is what more clients take
// more than the fewest.
func scaleTables(scales []manyScale, results []scaleResult) string {
	var b strings.Builder
	mega := func(n int) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }
	base := results[0]
	share := func(n int, figure func(scaleResult) int) string {
		if n == 0 {
			return "–"
		}
		clients := scales[n].clients - scales[0].clients
		return fmt.Sprintf("%.1f kB", float64(figure(results[n])-figure(base))/float64(clients)/1e3)
	}
	b.WriteString("| clients | Caddyfile adapted | loaded | reloaded | token requests of it | all have tokens after | most token requests in a second | /metrics | /oauth2/clients |\n")
	b.WriteString("|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for n, r := range results {
		if r.load == 0 { // not played
			continue
		}
		fmt.Fprintf(&b, "| %d | %s | %s | %s | %d | %s | %d | %s, %s | %s, %s |\n", scales[n].clients, milliseconds(r.adapt), milliseconds(r.load),
			milliseconds(r.reload), r.reloadTokens, milliseconds(r.complete), r.startPeak,
			milliseconds(r.metrics), mega(r.metricsSize), milliseconds(r.list), mega(r.listSize))
	}
	b.WriteString("\n| clients | resident | a client's share | heap | a client's share | goroutines | resident after a reload | heap | goroutines |\n")
	b.WriteString("|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for n, r := range results {
		if r.load == 0 {
			continue
		}
		fmt.Fprintf(&b, "| %d | %s | %s | %s | %s | %d | %s | %s | %d |\n", scales[n].clients,
			mega(r.size.resident), share(n, func(r scaleResult) int { return r.size.resident }),
			mega(r.size.heap), share(n, func(r scaleResult) int { return r.size.heap }), r.size.goroutines,
			mega(r.reloaded.resident), mega(r.reloaded.heap), r.reloaded.goroutines)
	}
	b.WriteString("\n| clients | life of tokens | renewals | most in a second | if they were spread | requests | lost | 50 % | 99 % | slowest |\n")
	b.WriteString("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for n, r := range results {
		if s := scales[n]; len(r.all) > 0 {
			fmt.Fprintf(&b, "| %d | %v | %d | %d | %.0f | %d | %d | %s | %s | %s |\n", s.clients, s.life, r.renewals, r.renewalPeak,
				float64(s.clients)/(0.72*s.life.Seconds()), len(r.all), len(r.all.lost()),
				tenths(r.all.percentile(0.5)), tenths(r.all.percentile(0.99)), tenths(r.all.longest()))
		}
	}
	return b.String()
}
