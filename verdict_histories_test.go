package outboundauth

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestVerdictHistories lets the product live through histories in which upstreams refuse
// tokens, and requests that have a good token. With -v, it shows them in a table, beside
// what a simulation of the algorithm gave.
//
//nolint:tparallel // other tests need another jitter meanwhile
func TestVerdictHistories(t *testing.T) {
	simulating.Store(true)
	histories := verdictHistories()
	rows := make([]string, len(histories))
	t.Cleanup(func() {
		simulating.Store(false)
		rows = slices.DeleteFunc(rows, func(row string) bool { return row == "" }) // of those that -run leaves out
		t.Logf("\n%s\n%s", verdictTableHead, strings.Join(rows, "\n"))
	})
	for i, h := range histories {
		t.Run(h.id, func(t *testing.T) {
			t.Parallel()
			var r *verdictRecord
			synctest.Test(t, func(t *testing.T) { r = h.play(t) })
			rows[i] = r.row()
			r.check(t)
		})
	}
}

// A verdictHistory is what happens, and what it may cost.
type verdictHistory struct {
	id       string // as in the simulation
	name     string
	seed     uint64 // default: 1
	streams  []rigStream
	attack   func(lasts time.Duration) []*rigCall
	revoked  []time.Duration // when all tokens are
	healable []time.Duration // from when on losses must end; default: revoked
	lasts    time.Duration   // default: verdictTime
	settings rigSettings

	bounds    verdictBounds
	simulated string
}

// Most histories last so long, and tokens are revoked in the middle of it.
const (
	verdictTime = 8 * time.Minute
	revokedAt   = 5 * time.Minute
)

// Those with 500 requests a second are shorter, because each request takes real time.
const (
	halfTime       = 3 * time.Minute
	halfRevokedAt  = 150 * time.Second
	shortTime      = 110 * time.Second
	shortRevokedAt = 80 * time.Second
)

func (h verdictHistory) mends() []time.Duration {
	if h.healable != nil {
		return h.healable
	}
	return h.revoked
}

// revokesIn reports whether tokens are revoked in a minute.
func (h verdictHistory) revokesIn(minute int) bool {
	return slices.ContainsFunc(h.revoked, func(at time.Duration) bool { return int(at/time.Minute) == minute })
}

// play runs the history. It is called in a bubble.
func (h verdictHistory) play(t *testing.T) *verdictRecord {
	t.Helper()
	random := rand.New(rand.NewPCG(h.seed, 14))
	var calls []*rigCall
	for _, s := range h.streams {
		calls = append(calls, s.calls(random, h.lasts)...)
	}
	if h.attack != nil {
		calls = append(calls, h.attack(h.lasts)...)
	}
	slices.SortStableFunc(calls, func(a, b *rigCall) int { return int(a.at - b.at) })
	rig := newVerdictRig(t, h.settings)
	for _, at := range h.revoked {
		time.AfterFunc(at, rig.server.revoke)
	}
	rig.play(calls)
	time.Sleep(h.lasts - rig.now())
	return &verdictRecord{h, calls, rig.server.requests(), rig.server.tokens()}
}

// A rigStream is a number of requests that are much alike.
type rigStream struct {
	rate    float64       // how many come a second, at random times
	every   time.Duration // or one comes each time
	span    rigSpan       // default: the whole history
	site    int
	address rigText
	kind    rigText
	good    bool
	check   bool
	refusal rigRefusal
}

// rigText is an address or a kind of request. It may be another one each time.
type rigText func(*rand.Rand) string

func always(text string) rigText { return func(*rand.Rand) string { return text } }

// anyOf returns one of n at random.
func anyOf(n int, format string) rigText {
	return func(random *rand.Rand) string { return fmt.Sprintf(format, random.IntN(n)) }
}

// allNew never returns the same twice.
func allNew(format string) rigText {
	n := 0
	return func(*rand.Rand) string {
		n++
		return fmt.Sprintf(format, n)
	}
}

const (
	addressA = "192.0.2.10:443"
	addressB = "192.0.2.11:443"
)

// manyAddresses returns one of 500 addresses at random.
func manyAddresses(random *rand.Rand) string {
	return fmt.Sprintf("198.51.100.1:%d", 20000+random.IntN(500))
}

// goodStream is a stream of requests that the upstream accepts with a good token.
func goodStream(rate float64, kind string) rigStream {
	return rigStream{rate: rate, address: always(addressA), kind: always(kind), good: true}
}

// noiseStream is a stream of requests that the upstream refuses whatever their token is.
func noiseStream(rate float64, kind string) rigStream {
	s := goodStream(rate, kind)
	s.good = false
	return s
}

// goodStreamOf is goodStream for changing kinds.
func goodStreamOf(rate float64, kind rigText) rigStream {
	s := goodStream(rate, "")
	s.kind = kind
	return s
}

// noiseStreamOf is noiseStream for changing kinds.
func noiseStreamOf(rate float64, kind rigText) rigStream {
	s := noiseStream(rate, "")
	s.kind = kind
	return s
}

// checkStream is a stream of active health checks.
func checkStream(every time.Duration, accepted bool) rigStream {
	s := goodStream(0, "GET /health")
	s.every, s.check, s.good = every, true, accepted
	return s
}

func (s rigStream) at(address rigText) rigStream {
	s.address = address
	return s
}

func (s rigStream) during(from, to time.Duration) rigStream {
	s.span = rigSpan{from, to}
	return s
}

func (s rigStream) on(site int) rigStream {
	s.site = site
	return s
}

func (s rigStream) answered(status int, challenge string) rigStream {
	s.refusal = rigRefusal{status, challenge}
	return s
}

// calls makes the requests of a stream.
func (s rigStream) calls(random *rand.Rand, lasts time.Duration) []*rigCall {
	if s.span == (rigSpan{}) {
		s.span = rigSpan{0, lasts}
	}
	next := func() time.Duration { return s.every }
	at := s.span.from + time.Second - s.every // the first check comes after a second
	if s.rate > 0 {
		next = func() time.Duration { return time.Duration(random.ExpFloat64() / s.rate * float64(time.Second)) }
		at = s.span.from
	}
	var all []*rigCall
	for {
		if at += next(); at >= s.span.to {
			return all
		}
		all = append(all, &rigCall{
			at: at, site: s.site, address: s.address(random), kind: s.kind(random), good: s.good, check: s.check, refusal: s.refusal,
		})
	}
}

// verdictBounds is what a history may cost.
type verdictBounds struct {
	first, later, revoked int     // token requests in the first minute, in each later one, and in one with a revocation
	average               float64 // of the later minutes
	total                 int

	lost      int           // good requests
	healing   time.Duration // how long after a revocation good requests may be lost
	wait      time.Duration // of a request, at most
	slowAgain int           // requests of others that are answered slowly, and are sent twice
	untouched string        // no request to this address waits
}

// usually is what any noise may cost, with any number of revocations.
var usually = verdictBounds{
	first: 12, later: 4, revoked: 10, average: 3, total: math.MaxInt,
	healing: 1 * time.Second,
	wait:    longestHold + rigTokenTakes + 100*time.Millisecond,
}

// quietly is what a history without noise may cost.
func quietly(total int) verdictBounds {
	b := usually
	b.first, b.total = 4, total
	return b
}

func (b verdictBounds) asking(first, later, revoked int) verdictBounds {
	b.first, b.later, b.revoked = first, later, revoked
	b.average = min(b.average, float64(later))
	if later > usually.later {
		b.average = float64(later)
	}
	return b
}

func (b verdictBounds) losing(most int, healing time.Duration) verdictBounds {
	b.lost, b.healing = most, healing
	return b
}

func (b verdictBounds) waiting(most time.Duration) verdictBounds {
	b.wait = most
	return b
}

func (b verdictBounds) sparing(address string) verdictBounds {
	b.untouched = address
	return b
}

// verdictHistories are the histories, with the defaults filled in.
func verdictHistories() []verdictHistory {
	all := slices.Concat(noisyHistories(), trickyHistories(), reseededHistories(), otherHistories(), sharedHistories(), attacks())
	for i := range all {
		h := &all[i]
		h.seed = max(h.seed, 1)
		if h.lasts == 0 {
			h.lasts = verdictTime
		}
	}
	return all
}

// atRevocation is when tokens are revoked in most histories.
func atRevocation() []time.Duration { return []time.Duration{revokedAt} }

// anyPath is one of 10,000 paths.
var anyPath = anyOf(10_000, "GET /x%d")

func noisyHistories() []verdictHistory {
	return []verdictHistory{{
		id: "1a", name: "noise 1/s on one path",
		streams:   []rigStream{noiseStream(1, "GET /login")},
		bounds:    usually,
		simulated: "10, 2, 2, 2, 2, 2, 2, 2",
	}, {
		id: "1b", name: "noise 500/s on 10,000 paths",
		streams:   []rigStream{noiseStreamOf(500, anyPath)},
		lasts:     halfTime,
		bounds:    usually,
		simulated: "11, 2, 2, 2, 2, 2, 2, 2",
	}, {
		id: "2a", name: "noise 1/s, good 5/s, then revoked",
		streams:   []rigStream{noiseStream(1, "GET /login"), goodStream(5, "GET /strict")},
		revoked:   atRevocation(),
		bounds:    usually,
		simulated: "2, 3, 2, 2, 2, 2, 2, 2; 0 of 2,382",
	}, {
		id: "2b", name: "noise 500/s on 10,000 paths, good 5/s, then revoked",
		streams:   []rigStream{noiseStreamOf(500, anyPath), goodStream(5, "GET /strict")},
		revoked:   []time.Duration{halfRevokedAt},
		lasts:     halfTime,
		bounds:    usually,
		simulated: "3, 3, 2, 2, 2, 2, 2, 2; 0 of 2,370",
	}, {
		id: "2c", name: "noise 50/s, one good request each 10 s, then revoked",
		streams:   []rigStream{noiseStreamOf(50, anyPath), goodStream(0.1, "GET /strict")},
		revoked:   atRevocation(),
		bounds:    usually,
		simulated: "11, 2, 2, 2, 2, 2, 2, 2; 0 of 49",
	}, {
		id: "2d", name: "noise 50/s, good 5/s with every path new, then revoked",
		streams:   []rigStream{noiseStreamOf(50, anyPath), goodStreamOf(5, allNew("GET /o/%d"))},
		revoked:   atRevocation(),
		bounds:    usually.losing(5, time.Second),
		simulated: "3, 3, 3, 3, 2, 2, 2, 3; 0 of 2,333 (0 to 2 by seed); 0.7 s",
	}, {
		id: "2e", name: "right passwords 4/s and wrong ones 1/s on one path, then revoked",
		streams:   []rigStream{noiseStream(1, "POST /login"), goodStream(4, "POST /login")},
		revoked:   atRevocation(),
		bounds:    usually.losing(4, time.Second),
		simulated: "3, 3, 3, 0, 1, 1, 1, 1; 0 of 1,905 (2 in one seed); 0.3 s",
	}, {
		id: "3", name: "revoked while only the noise comes, good requests 100 s later",
		streams: []rigStream{
			noiseStream(5, "GET /login"), goodStream(5, "GET /s").during(0, time.Minute), goodStream(5, "GET /s").during(200*time.Second, verdictTime),
		},
		revoked:   []time.Duration{100 * time.Second},
		bounds:    usually,
		simulated: "2, 9, 2, 2, 2, 2, 2, 3; 0 of 1,673",
	}, {
		id: "5", name: "401 for a path beyond the scope 10/s, good 20/s, then revoked",
		streams:   []rigStream{noiseStream(10, "GET /admin"), goodStream(20, "GET /s")},
		revoked:   atRevocation(),
		bounds:    usually,
		simulated: "3, 3, 2, 2, 2, 2, 2, 3; 0 of 9,678",
	}, {
		id: "11", name: "invalid_token on one path always 5/s, good 20/s, then revoked",
		streams:   []rigStream{noiseStream(5, "GET /admin").answered(http.StatusUnauthorized, `Bearer error="invalid_token"`), goodStream(20, "GET /s")},
		revoked:   atRevocation(),
		bounds:    usually,
		simulated: "4, 2, 2, 3, 2, 2, 2, 2; 0 of 9,588",
	}, {
		id: "12", name: "right and wrong passwords on 40 paths, good 10/s, then revoked",
		streams: []rigStream{
			noiseStreamOf(1, anyOf(40, "POST /t%d/login")), goodStreamOf(3, anyOf(40, "POST /t%d/login")), goodStream(10, "GET /s"),
		},
		revoked: atRevocation(),
		// While the 40 are being learned, nothing tells them from a revocation.
		bounds:    usually.losing(390, 30*time.Second),
		simulated: "6, 2, 2, 2, 2, 5, 2, 2; 321 of 6,349; 22.7 s",
	}, {
		id: "13", name: "noise 500/s at A, good 5/s at B, then revoked",
		streams:   []rigStream{noiseStreamOf(500, anyPath), goodStream(5, "GET /s").at(always(addressB))},
		revoked:   []time.Duration{shortRevokedAt},
		lasts:     shortTime,
		bounds:    usually,
		simulated: "11, 2, 2; 0 of 920",
	}, {
		id: "14", name: "noise 50/s at A and 50/s at 500 addresses, good 5/s at B, then revoked",
		streams: []rigStream{
			noiseStreamOf(50, anyPath), noiseStream(50, "GET /x").at(manyAddresses), goodStream(5, "GET /s").at(always(addressB)),
		},
		revoked:   atRevocation(),
		bounds:    usually,
		simulated: "11, 2, 2, 2, 2, 2, 2, 2; 0 of 2,343",
	}, {
		id: "15", name: "noise 5/s, good 20/s, revoked twice",
		streams:   []rigStream{noiseStreamOf(5, anyPath), goodStream(20, "GET /s")},
		revoked:   []time.Duration{revokedAt, revokedAt + 3*time.Second},
		bounds:    usually,
		simulated: "3, 2, 2, 2, 2, 3, 2, 2; 0 of 9,592",
	}, {
		id: "18", name: "noise 1/s, good 1 a minute with every path new, then revoked",
		streams:   []rigStream{noiseStream(1, "GET /login"), goodStreamOf(1./60, allNew("GET /n/%d"))},
		revoked:   atRevocation(),
		lasts:     30 * time.Minute,
		bounds:    usually,
		simulated: "11, 1, 2, 2, 2, 2, 2, 2; 0 of 23",
	}}
}

// diesAfter is the rule of upstreams that refuse tokens of this age, whatever lifetime
// the server has named.
func diesAfter(age time.Duration) func(rigSight) rigJudgement {
	return func(s rigSight) rigJudgement {
		s.alive = s.age() < age
		return judgeByToken(s)
	}
}

// cachedOn is the rule of an upstream that answers some requests from a cache, whatever
// their token is.
func cachedOn(kind string) func(rigSight) rigJudgement {
	return func(s rigSight) rigJudgement {
		if s.kind == kind {
			return acceptsRequest
		}
		return judgeByToken(s)
	}
}

// publicAt is the rule of an upstream that looks at no token.
func publicAt(address string) func(rigSight) rigJudgement {
	return func(s rigSight) rigJudgement {
		if s.address == address {
			return acceptsRequest
		}
		return judgeByToken(s)
	}
}

// byChance is the rule of an upstream that refuses a part of the requests, whatever their
// token is. In a history, the same happens each time.
func byChance(part float64) func(rigSight) rigJudgement {
	return func(s rigSight) rigJudgement {
		if s.alive && float64(scramble(uint64(s.at)))/math.MaxUint64 < part {
			return refusesRequest
		}
		return judgeByToken(s)
	}
}

// refusingDuring is the rule of an upstream that refuses everything for a while.
func refusingDuring(span rigSpan) func(rigSight) rigJudgement {
	return func(s rigSight) rigJudgement {
		if span.has(s.at) {
			return refusesRequest
		}
		return judgeByToken(s)
	}
}

// refusingFirst is the rule of an upstream that refuses each request once, and accepts
// the same request then. B is public.
func refusingFirst(s rigSight) rigJudgement {
	if s.address != addressB && len(s.receipts) == 0 {
		return refusesRequest
	}
	return acceptsRequest
}

func trickyHistories() []verdictHistory {
	return []verdictHistory{{
		id: "4", name: "good 20/s at A and at B, A revokes",
		streams:   []rigStream{goodStream(20, "GET /s"), goodStream(20, "GET /s").at(always(addressB))},
		revoked:   []time.Duration{100 * time.Second},
		settings:  rigSettings{rule: publicAt(addressB)},
		bounds:    quietly(1).sparing(addressB),
		simulated: "1 in all; 0 of 19,125",
	}, {
		id: "6", name: "GET from a cache 20/s, POST 2/s, then revoked",
		streams:   []rigStream{goodStream(20, "GET /o"), goodStream(2, "POST /o")},
		revoked:   atRevocation(),
		settings:  rigSettings{rule: cachedOn("GET /o")},
		bounds:    quietly(1),
		simulated: "1 in all; 0 of 10,548",
	}, {
		id: "6b", name: "the same with noise 5/s",
		streams:   []rigStream{goodStream(20, "GET /o"), goodStream(2, "POST /o"), noiseStream(5, "GET /login")},
		revoked:   atRevocation(),
		settings:  rigSettings{rule: cachedOn("GET /o")},
		bounds:    usually,
		simulated: "2, 3, 2, 2, 2, 2, 2, 2; 0 of 10,548",
	}, falseWitness(1, "2, 3, 2, 2, 2, 2, 2, 2; 38 of 10,548; 22.8 s"), {
		id: "7a", name: "a check each 30 s that always gets 401",
		streams:   []rigStream{checkStream(30*time.Second, false)},
		lasts:     time.Hour,
		bounds:    quietly(4),
		simulated: "2, 1, 0, 0, 0, 0, 0, 0",
	}, {
		id: "7b", name: "a check each 30 s and nothing else, then revoked",
		streams:   []rigStream{checkStream(30*time.Second, true)},
		revoked:   atRevocation(),
		lasts:     10 * time.Minute,
		bounds:    quietly(1),
		simulated: "1 in all; 0 of 20",
	}, {
		id: "8", name: "401 for 1 % of the requests, 50/s, then revoked",
		streams:   []rigStream{goodStream(50, "GET /s")},
		revoked:   atRevocation(),
		settings:  rigSettings{rule: byChance(0.01)},
		bounds:    usually,
		simulated: "1, 0, 0, 0, 0, 1, 0, 0; 274 of 24,008, the upstream's own 1 %",
	}, {
		id: "9", name: "the upstream refuses all for 5 s, 50/s",
		streams:   []rigStream{goodStream(50, "GET /s")},
		settings:  rigSettings{rule: refusingDuring(rigSpan{100 * time.Second, 105 * time.Second})},
		bounds:    quietly(4),
		simulated: "3 in all; 233 of 23,713, those of the 5 s",
	}, {
		id: "10", name: "revoked, the server repeats the dead token until 400 s, good 20/s",
		streams:  []rigStream{goodStream(20, "GET /s")},
		revoked:  []time.Duration{100 * time.Second},
		healable: []time.Duration{400 * time.Second},
		settings: rigSettings{repeats: rigSpan{0, 400 * time.Second}},
		// All are lost until the server changes its mind, and until it is asked again.
		bounds:    usually.asking(0, 6, 10).losing(330*25, 30*time.Second),
		simulated: "0, 6, 5, 2, 2, 2, 2, 2; all until the server changes its mind; 30 s after",
	}, {
		id: "16", name: "tokens die after 2 s, good 20/s",
		streams:   []rigStream{goodStream(20, "GET /s")},
		settings:  rigSettings{rule: diesAfter(2 * time.Second)},
		bounds:    usually.asking(32, 32, 32),
		simulated: "28, 29, 28, 29, 28, 29, 28, 29; 0 of 9,591",
	}, {
		id: "17", name: "the same with noise 5/s",
		streams:   []rigStream{noiseStream(5, "GET /login"), goodStream(20, "GET /s")},
		settings:  rigSettings{rule: diesAfter(2 * time.Second)},
		bounds:    usually.asking(32, 32, 32),
		simulated: "29, 29, 28, 29, 29, 28, 29, 28; 0 of 9,588",
	}}
}

// falseWitness is a history in which an upstream accepts dead tokens on a path that
// everybody may read. Nothing tells that from a good token.
func falseWitness(seed uint64, simulated string) verdictHistory {
	return verdictHistory{
		id:        seeded("6c", seed),
		name:      "a public GET 20/s, POST 2/s with every path new, noise 5/s, then revoked",
		seed:      seed,
		streams:   []rigStream{goodStream(20, "GET /o"), goodStreamOf(2, allNew("POST /p/%d")), noiseStreamOf(5, anyPath)},
		revoked:   atRevocation(),
		settings:  rigSettings{rule: cachedOn("GET /o")},
		bounds:    usually.losing(100, 30*time.Second),
		simulated: simulated,
	}
}

// seeded is the id of a history with other times.
func seeded(id string, seed uint64) string {
	if seed == 1 {
		return id
	}
	return fmt.Sprint(id, "-", seed)
}

// reseededHistories are some of the others, with other times.
func reseededHistories() []verdictHistory {
	var all []verdictHistory
	for i, simulated := range [][4]string{
		{"5, 1, 0, 0, 0, 2, 1, 0; 0 of 1,916", "3, 3, 2, 3, 2, 2, 3, 2; 0 of 2,456", "4, 2, 3, 4, 2, 2, 2, 3; 0 of 2,401", "2, 2, 2, 2, 2, 2, 3, 3; 2 of 10,676; 1.1 s"},
		{"2, 2, 0, 0, 1, 1, 0, 1; 0 of 1,938", "4, 4, 2, 2, 2, 2, 2, 2; 0 of 2,342", "4, 4, 3, 2, 2, 2, 2, 2; 0 of 2,337", "2, 3, 2, 2, 3, 2, 2, 2; 19 of 10,519; 10.7 s"},
		{"2, 2, 0, 2, 3, 1, 0, 1; 0 of 1,933", "2, 4, 3, 2, 2, 3, 2, 4; 0 of 2,416", "2, 4, 3, 2, 2, 4, 2, 2; 0 of 2,391", "3, 2, 2, 2, 2, 2, 2, 2; 1 of 10,533; 1.1 s"},
		{"2, 2, 0, 2, 2, 2, 1, 0; 2 of 1,957; 0.3 s", "5, 2, 2, 2, 2, 3, 3, 3; 2 of 2,426; 0.7 s", "3, 2, 3, 2, 3, 3, 2, 2; 0 of 2,363", "2, 2, 3, 2, 2, 2, 2, 2; 39 of 10,468; 17.9 s"},
		{"3, 1, 3, 0, 1, 2, 0, 1; 0 of 1,921", "4, 2, 2, 2, 2, 3, 2, 2; 1 of 2,371; 0.1 s", "4, 2, 2, 2, 2, 3, 2, 2; 0 of 2,408", "2, 2, 2, 2, 3, 2, 2, 3; 17 of 10,538; 8.7 s"},
	} {
		seed := uint64(i + 2)
		all = append(all, verdictHistory{
			id:        seeded("2e", seed),
			name:      "right passwords 4/s and wrong ones 1/s on one path, then revoked",
			seed:      seed,
			streams:   []rigStream{noiseStream(1, "POST /login"), goodStream(4, "POST /login")},
			revoked:   atRevocation(),
			bounds:    usually.losing(4, time.Second),
			simulated: simulated[0],
		}, verdictHistory{
			id:        seeded("2d", seed),
			name:      "noise 50/s, good 5/s with every path new, then revoked",
			seed:      seed,
			streams:   []rigStream{noiseStreamOf(50, anyPath), goodStreamOf(5, allNew("GET /o/%d"))},
			revoked:   atRevocation(),
			bounds:    usually.losing(5, time.Second),
			simulated: simulated[1],
		}, verdictHistory{
			id:        seeded("2b", seed),
			name:      "noise 500/s, good 5/s, then revoked",
			seed:      seed,
			streams:   []rigStream{noiseStreamOf(500, anyPath), goodStream(5, "GET /strict")},
			revoked:   []time.Duration{shortRevokedAt},
			lasts:     shortTime,
			bounds:    usually,
			simulated: simulated[2],
		}, falseWitness(seed, simulated[3]))
	}
	return all
}

// otherHistories are those that the rules are not made from.
func otherHistories() []verdictHistory {
	const forbidden, unauthorized = http.StatusForbidden, http.StatusUnauthorized
	both := []int{unauthorized, forbidden}
	return []verdictHistory{{
		id: "19", name: "noise 500/s at 500 addresses",
		streams:   []rigStream{noiseStream(500, "GET /x").at(manyAddresses)},
		lasts:     shortTime,
		bounds:    usually,
		simulated: "11, 2, 2",
	}, {
		id: "20", name: "noise 1/s for an hour",
		streams:   []rigStream{noiseStream(1, "GET /login")},
		lasts:     time.Hour,
		bounds:    usually,
		simulated: "11, 1, 2, 2, 2, 2, 2, 2; 126 in all",
	}, {
		id: "21", name: "retry_on 401 403, noise 1/s is 403, good 5/s, then revoked",
		streams:   []rigStream{noiseStream(1, "GET /login").answered(forbidden, ""), goodStream(5, "GET /strict")},
		revoked:   atRevocation(),
		settings:  rigSettings{retryOn: both},
		bounds:    usually,
		simulated: "as 2a",
	}, {
		id: "22", name: "the same, a dead token is 403 as well",
		streams:   []rigStream{noiseStreamOf(50, anyPath).answered(forbidden, ""), goodStream(5, "GET /strict")},
		revoked:   atRevocation(),
		settings:  rigSettings{retryOn: both, refusal: rigRefusal{status: forbidden}},
		bounds:    usually,
		simulated: "as 2b",
	}, {
		id: "23", name: "retry_on 401 403, insufficient_scope 10/s, good 20/s, then revoked",
		streams:   []rigStream{noiseStream(10, "GET /admin").answered(forbidden, `Bearer realm="api", error="insufficient_scope", scope="admin"`), goodStream(20, "GET /s")},
		revoked:   atRevocation(),
		settings:  rigSettings{retryOn: both},
		bounds:    usually.asking(0, 0, 2),
		simulated: "never about the token",
	}, {
		id: "24", name: "insufficient_scope as 401 10/s, nothing else",
		streams:   []rigStream{noiseStream(10, "GET /admin").answered(unauthorized, `Bearer error="insufficient_scope"`)},
		bounds:    quietly(0),
		simulated: "never about the token",
	}, {
		id: "25", name: "a dead token gets invalid_token, noise 1/s, good 5/s with every path new, then revoked",
		streams:   []rigStream{noiseStream(1, "GET /login"), goodStreamOf(5, allNew("GET /o/%d"))},
		revoked:   atRevocation(),
		settings:  rigSettings{refusal: rigRefusal{unauthorized, `Bearer error="invalid_token"`}},
		bounds:    usually,
		simulated: "as 2a",
	}, {
		id: "26", name: "forward_auth: one path, 401 9/s, 200 1/s, then revoked",
		streams:   []rigStream{noiseStream(9, "GET /auth"), goodStream(1, "GET /auth")},
		revoked:   atRevocation(),
		bounds:    usually.losing(15, 15*time.Second), // eight usual distances of accepted requests
		simulated: "10, 2, 2, 2, 2, 2, 2, 2; 4 of 488; 4.4 s",
	}, {
		id: "27", name: "forward_auth at A as before, good 5/s at B, then revoked",
		streams: []rigStream{
			noiseStream(9, "GET /auth"), goodStream(1, "GET /auth"), goodStream(5, "GET /s").at(always(addressB)),
		},
		revoked:   atRevocation(),
		bounds:    usually.losing(2, time.Second),
		simulated: "10, 2, 2, 2, 2, 2, 2, 2; 0 of 2,873",
	}, {
		id: "28", name: "the server needs 2 s, noise 1/s, good 5/s, then revoked",
		streams:   []rigStream{noiseStream(1, "GET /login"), goodStream(5, "GET /strict")},
		revoked:   atRevocation(),
		settings:  rigSettings{takes: 2 * time.Second},
		bounds:    usually.waiting(longestHold + 2100*time.Millisecond),
		simulated: "2, 3, 2, 2, 2, 2, 2, 2; 0 of 2,382",
	}, {
		id: "29", name: "the server needs 2 s, noise 500/s, good 5/s, then revoked",
		streams:   []rigStream{noiseStreamOf(500, anyPath), goodStream(5, "GET /strict")},
		revoked:   []time.Duration{shortRevokedAt},
		lasts:     shortTime,
		settings:  rigSettings{takes: 2 * time.Second},
		bounds:    usually.waiting(longestHold + 2100*time.Millisecond),
		simulated: "5, 3, 3; 0 of 887",
	}, {
		id: "30", name: "the server needs 2 s, good 20/s at A and at B, A revokes",
		streams:   []rigStream{goodStream(20, "GET /s"), goodStream(20, "GET /s").at(always(addressB))},
		revoked:   []time.Duration{100 * time.Second},
		settings:  rigSettings{takes: 2 * time.Second, rule: publicAt(addressB)},
		bounds:    quietly(1).sparing(addressB).waiting(2100 * time.Millisecond),
		simulated: "1 in all; 0 of 19,125",
	}, {
		id: "31", name: "noise 1/s, good 5/s, a check each 10 s, then revoked",
		streams:   []rigStream{noiseStream(1, "GET /login"), goodStream(5, "GET /s"), checkStream(10*time.Second, true)},
		revoked:   atRevocation(),
		bounds:    usually,
		simulated: "2, 3, 2, 2, 2, 2, 2, 2; 0 of 2,430",
	}, {
		id: "32", name: "the server is down for a minute, noise 1/s then, good 20/s, a check each 10 s",
		streams:  []rigStream{noiseStream(1, "GET /login").during(100*time.Second, 160*time.Second), goodStream(20, "GET /s"), checkStream(10*time.Second, true)},
		settings: rigSettings{down: rigSpan{100 * time.Second, 160 * time.Second}},
		// A fetch that fails makes up to three requests.
		bounds:    usually.asking(12, 12, 12).waiting(2 * longestHold),
		simulated: "not simulated",
	}, {
		id: "33", name: "the server hangs for a minute, noise 1/s then, good 20/s, a check each 10 s",
		streams:  []rigStream{noiseStream(1, "GET /login").during(100*time.Second, 160*time.Second), goodStream(20, "GET /s"), checkStream(10*time.Second, true)},
		settings: rigSettings{hangs: rigSpan{100 * time.Second, 160 * time.Second}},
		// Who was refused may wait for token_timeout.
		bounds:    usually.asking(12, 12, 12).waiting(11 * time.Second),
		simulated: "not simulated",
	}, {
		id: "34", name: "A says 401 first and 200 then, 1/s, good 20/s at B",
		streams:  []rigStream{goodStream(1, "GET /s"), goodStream(20, "GET /s").at(always(addressB))},
		settings: rigSettings{rule: refusingFirst},
		// No other request is accepted with a new token: so it differs from 16.
		bounds:    usually.sparing(addressB),
		simulated: "40, 37, 36, 39, 35, 38, 41, 37; 0 of 10,093",
	}}
}

// sharedHistories have several sites with equal settings: one source, and one budget.
func sharedHistories() []verdictHistory {
	var twenty []rigStream
	for site := range 20 {
		address := always(fmt.Sprintf("203.0.113.%d:443", 1+site))
		twenty = append(twenty, noiseStream(1, "GET /login").at(address).on(site), goodStream(1, "GET /s").at(address).on(site))
	}
	return []verdictHistory{{
		id: "35", name: "two sites, noise 5/s and good 5/s at A, good 5/s at B, then revoked",
		streams: []rigStream{
			noiseStream(5, "GET /login"), goodStream(5, "GET /s"), goodStream(5, "GET /s").at(always(addressB)).on(1),
		},
		revoked:   atRevocation(),
		settings:  rigSettings{sites: 2},
		bounds:    usually,
		simulated: "2, 2, 2, 2, 2, 2, 2, 3; 0 of 4,770",
	}, {
		id: "36", name: "two sites at one address, noise 5/s at one, good 5/s at the other, then revoked",
		streams: []rigStream{
			noiseStream(5, "GET /login"), goodStream(5, "GET /s").on(1),
		},
		revoked:   atRevocation(),
		settings:  rigSettings{sites: 2},
		bounds:    usually,
		simulated: "as 2a",
	}, {
		id: "37", name: "twenty sites, each with noise 1/s and good 1/s, then revoked",
		streams:   twenty,
		revoked:   atRevocation(),
		settings:  rigSettings{sites: 20},
		bounds:    usually,
		simulated: "13, 2, 3, 2, 2, 3, 2, 2; 0 of 9,493",
	}}
}
