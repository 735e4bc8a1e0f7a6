package outboundauth

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// An hour of virtual time is long enough for all waits: the longest is 7½ minutes.
const (
	simulatedTime     = time.Hour
	maxSimulatedSteps = 180

	longestTimeout = 30 * time.Second

	// How long a source that no config uses keeps its token.
	keptFor = time.Minute
)

// TestSimulation lets a token source live through random histories, and holds it to
// what docs/token-life.md promises: see invariants. Each history is made from its
// seed. SIMULATION_SEED=n replays one of them and shows everything that happens;
// SIMULATIONS=n runs so many.
//
//nolint:tparallel // other tests need another jitter meanwhile
func TestSimulation(t *testing.T) {
	number := 2000
	if testing.Short() {
		number = 200
	}
	simulateAll(t, number, simulate)
}

// simulated is what became of a seed.
type simulated interface {
	fmt.Stringer
	lines(from, to time.Duration) string
	violations() []finding
}

// simulateAll runs so many histories, or what the settings say.
func simulateAll(t *testing.T, number int, simulate func(*testing.T, uint64) simulated) {
	simulating.Store(true)
	t.Cleanup(func() { simulating.Store(false) })
	if seed := simulationSetting(t, "SIMULATION_SEED", 0); seed > 0 {
		h := simulate(t, uint64(seed))
		t.Logf("%v\n%s", h, h.lines(0, math.MaxInt64))
		for _, found := range h.violations() {
			t.Error(found)
		}
		return
	}
	number = simulationSetting(t, "SIMULATIONS", number)

	// Enough findings to see what they have in common, and not more.
	const enough = 5
	var next, failed atomic.Int64
	for i := range runtime.GOMAXPROCS(0) {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			for {
				seed := next.Add(1)
				if seed > int64(number) || failed.Load() >= enough {
					return
				}
				h := simulate(t, uint64(seed))
				if found := h.violations(); len(found) > 0 {
					failed.Add(1)
					t.Errorf("SIMULATION_SEED=%d: %v\n%v\n%s", seed, h, found[0], h.lines(found[0].at-2*time.Minute, found[0].at+time.Second))
				}
			}
		})
	}
}

// simulating says that the jitter is to be repeatable.
var simulating atomic.Bool

// This is before all tests: what one of them has left behind may need the jitter still.
func init() {
	random := jitter
	jitter = func(limit time.Duration) time.Duration {
		if simulating.Load() {
			return repeatableJitter(limit)
		}
		return random(limit)
	}
}

// repeatableJitter depends on nothing but the time, which passes in a history as it did
// before. Each history begins at a time of its own.
func repeatableJitter(limit time.Duration) time.Duration {
	return time.Duration(scramble(uint64(time.Now().UnixNano()+int64(limit))) % uint64(limit))
}

// scramble makes a random number of one that is not (splitmix64).
func scramble(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func simulationSetting(t *testing.T, name string, preset int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return preset
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// simulate runs the history of a seed.
func simulate(t *testing.T, seed uint64) simulated {
	h := newHistory(seed)
	h.leftover = append(h.leftover, inBubble(t, h.run)...)
	return h
}

// inBubble runs f in a bubble, which panics if a goroutine is left.
func inBubble(t *testing.T, f func()) (leftover []string) {
	defer func() {
		if p := recover(); p != nil {
			leftover = append(leftover, fmt.Sprint(p))
		}
	}()
	synctest.Test(t, func(*testing.T) { f() })
	return nil
}

// simulationConfig is what stays the same in a history.
type simulationConfig struct {
	life         lifecycle // of the first config that uses the source
	lifetime     time.Duration
	answer       time.Duration // how long the server usually takes
	names        bool          // the lifetime of its tokens
	repeats      bool          // its tokens
	repeatedName int           // as lifetime of a repeated token: 0 nothing, 1 what is left, 2 as of a new one
	dies         time.Duration // when upstreams refuse its tokens already; 0: at their end
	concurrent   bool
}

// step is something that happens in a history.
type step struct {
	at   time.Duration
	text string
	do   func()
}

// rejection is a time in which the server refuses the client.
type rejection struct {
	from, to time.Duration
	changed  bool // what ends it: a new secret
}

// history is one simulated hour, and the record of what happened in it.
type history struct {
	seed      uint64
	config    simulationConfig
	steps     []step
	server    *simulatedServer
	upstreams []*simulatedUpstream
	pool      simulatedPool

	started time.Time
	callers sync.WaitGroup

	record
}

func (h *history) String() string {
	c := h.config
	return fmt.Sprintf("tokens live %v (%v), named %t, repeated %t (%d); answer %v; %+v; side by side %t",
		c.lifetime, c.dies, c.names, c.repeats, c.repeatedName, c.answer, c.life, c.concurrent)
}

func (h *history) now() time.Duration { return time.Since(h.started) }

func newHistory(seed uint64) *history {
	h := &history{seed: seed}
	g := &historyMaker{history: h, Rand: rand.New(rand.NewPCG(seed, 13))}
	h.config = g.newConfig()
	h.server = &simulatedServer{history: h, config: h.config}
	g.makeUpstreams()
	g.makeSteps()
	return h
}

// run lets everything happen. It is called in a bubble.
func (h *history) run() {
	time.Sleep(time.Duration(scramble(h.seed) % uint64(time.Second)))
	h.started = time.Now()
	h.attach(h.config.life)
	for _, s := range h.steps {
		time.Sleep(s.at - h.now())
		if s.text != "" {
			h.note("%s", s.text)
		}
		s.do()
	}
	time.Sleep(simulatedTime - h.now())
	h.note("the end")
	h.detachAll()
	h.callers.Wait()
	time.Sleep(keptFor + longestTimeout + time.Second)
	synctest.Wait()
	h.look()
	time.Sleep(24 * time.Hour)
	synctest.Wait()
	h.lookAgain()
}

// look notes what is left when all has ended.
func (h *history) look() {
	h.endedAt = h.now()
	h.leftover = append(h.leftover, h.pool.leftover()...)
	h.untidy = h.pool.untidy()
}

// lookAgain notes what goes on long after that.
func (h *history) lookAgain() {
	if n := h.inFlight(); n > 0 {
		h.leftover = append(h.leftover, fmt.Sprintf("%d token requests in flight", n))
	}
}

// attach begins a config that uses the source.
func (h *history) attach(l lifecycle) {
	h.pool.count++
	u := &simulatedUser{simulatedServer: h.server, n: h.pool.count, life: l}
	h.pool.attach(u)
	h.noteUsers()
}

func (h *history) detach(i int) {
	h.pool.detach(h.pool.users[i])
	h.noteUsers()
}

func (h *history) detachAll() {
	for len(h.pool.users) > 0 {
		h.detach(0)
	}
}

func (h *history) noteUsers() {
	lives := make([]lifecycle, len(h.pool.users))
	for i, u := range h.pool.users {
		lives[i] = u.life
	}
	h.usersAre(lives)
}

// historyMaker makes the steps of a history, at random.
type historyMaker struct {
	*history
	*rand.Rand
	made int // upstreams
}

// between returns a duration at random, with each order of magnitude as likely as
// the others.
func (g *historyMaker) between(from, to time.Duration) time.Duration {
	return time.Duration(float64(from) * math.Pow(float64(to)/float64(from), g.Float64()))
}

func (g *historyMaker) chance(percent int) bool { return g.IntN(100) < percent }

func (g *historyMaker) newConfig() simulationConfig {
	c := simulationConfig{
		lifetime:     g.between(5*time.Second, 24*time.Hour).Truncate(time.Second),
		names:        g.chance(75),
		repeats:      g.chance(25),
		repeatedName: g.IntN(3),
		concurrent:   g.chance(80),
	}
	if g.chance(10) {
		c.dies = g.between(2*time.Second, 20*time.Second)
	}
	c.life = g.newLifecycle(c.lifetime)
	c.answer = g.between(time.Millisecond, min(1500*time.Millisecond, c.life.fetchTimeout/5))
	return c
}

func (g *historyMaker) newLifecycle(lifetime time.Duration) lifecycle {
	timeouts := []time.Duration{time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second, 10 * time.Second, longestTimeout}
	l := lifecycle{
		defaultLifetime: g.between(5*time.Second, time.Hour).Truncate(time.Second),
		fetchTimeout:    timeouts[g.IntN(len(timeouts))],
	}
	if g.chance(40) {
		l.refreshBefore = time.Duration(g.Float64() * float64(lifetime) * 0.6).Truncate(time.Second)
	}
	return l
}

// makeSteps makes scenes, in which much happens within a minute, and single steps
// between them.
func (g *historyMaker) makeSteps() {
	n := 20 + g.IntN(maxSimulatedSteps-20+1)
	scenes := make([]time.Duration, 1+g.IntN(12))
	for i := range scenes {
		scenes[i] = time.Duration(g.Int64N(int64(simulatedTime)))
	}
	var outages []phase
	var rejections []rejection
	for range n {
		at := time.Duration(g.Int64N(int64(simulatedTime)))
		if g.chance(70) {
			at = scenes[g.IntN(len(scenes))] + time.Duration(g.ExpFloat64()*float64(20*time.Second))
		}
		at %= simulatedTime
		switch x := g.IntN(100); {
		case x < 12:
			outages = append(outages, g.newPhase(at))
		case x < 14:
			rejections = append(rejections, rejection{at, at + g.between(100*time.Millisecond, 10*time.Minute), g.chance(60)})
		case x < 20:
			g.addRevocation(at)
		case x < 22:
			by := time.Duration((g.Float64() - 0.5) * float64(g.config.lifetime))
			g.add(at, fmt.Sprintf("the server's clock jumps: tokens end %v later", by), func() { g.server.shift(by) })
		case x < 26:
			g.addReload(at)
		case x < 28:
			g.addClosure(at)
		case x < 31:
			g.addChecks(at)
		case x < 35:
			g.addNoise(at)
		case x < 38:
			g.addTraffic(at)
		default:
			g.addCalls(at)
		}
	}
	g.addPhases(outages)
	g.addRejections(rejections)
	slices.SortStableFunc(g.steps, func(a, b step) int { return int(a.at - b.at) })
}

func (g *historyMaker) add(at time.Duration, text string, do func()) {
	g.steps = append(g.steps, step{at, text, do})
}

func (g *historyMaker) newPhase(at time.Duration) phase {
	p := phase{
		from: at, to: at + g.between(100*time.Millisecond, 8*time.Minute),
		mode: serverMode(1 + g.IntN(int(lastMode))),
	}
	switch p.mode {
	case serverSlow:
		p.after = g.config.answer * time.Duration(2+g.IntN(30))
	case serverResets:
		p.after = g.between(10*time.Millisecond, 5*time.Second)
	case serverUnavailableAfter, serverThrottlesAfter:
		p.after = time.Duration(1+g.IntN(60)) * time.Second
		if g.chance(5) {
			p.after = 10 * time.Minute
		}
	default:
	}
	return p
}

// addPhases orders the phases: a new one ends the one before.
func (g *historyMaker) addPhases(outages []phase) {
	slices.SortFunc(outages, func(a, b phase) int { return int(a.from - b.from) })
	var all []phase
	end := time.Duration(0)
	for i, p := range outages {
		if i+1 < len(outages) {
			p.to = min(p.to, outages[i+1].from)
		}
		p.to = min(p.to, simulatedTime)
		if p.from >= p.to {
			continue
		}
		if end < p.from {
			all = append(all, phase{from: end, to: p.from})
		}
		all = append(all, p)
		end = p.to
	}
	g.setPhases(append(all, phase{from: end, to: math.MaxInt64}))
}

func (g *historyMaker) setPhases(all []phase) {
	g.server.phases = all
	for _, p := range all[1:] {
		text := fmt.Sprintf("the server %v", p.mode)
		if p.after > 0 {
			text += fmt.Sprintf(" (%v)", p.after)
		}
		g.add(p.from, text, func() {})
	}
}

func (g *historyMaker) addRejections(all []rejection) {
	slices.SortFunc(all, func(a, b rejection) int { return int(a.from - b.from) })
	secret, end := 0, time.Duration(0)
	for _, r := range all {
		if r.from < end {
			continue
		}
		r.to = min(r.to, simulatedTime-1)
		end = r.to
		g.server.rejections = append(g.server.rejections, r)
		wrong := secret
		g.add(r.from, "the server refuses the secret", func() { g.server.setSecrets(wrong, wrong+1) })
		if r.changed {
			secret++
			g.add(r.to, "the secret changes", func() {
				g.server.setSecrets(wrong+1, wrong+1)
				g.secretChanged()
			})
			continue
		}
		g.add(r.to, "the server accepts the secret again", func() { g.server.setSecrets(wrong, wrong) })
	}
}

func (g *historyMaker) addReload(at time.Duration) {
	life := g.config.life
	if g.chance(40) {
		life = g.newLifecycle(g.config.lifetime)
		life.fetchTimeout = max(life.fetchTimeout, g.config.answer*5)
		if g.server.crowd != nil { // a fetch that waits for its turn has the settings of then
			life.fetchTimeout = g.config.life.fetchTimeout
		}
	}
	h := g.history
	switch x := g.IntN(100); {
	case x < 50:
		g.add(at, "a reload", func() {
			h.attach(life)
			if len(h.pool.users) > 1 {
				h.detach(0)
			}
		})
	case x < 65:
		g.add(at, "one more config", func() { h.attach(life) })
	case x < 75:
		g.add(at, "one config less", func() {
			if n := len(h.pool.users); n > 1 {
				h.detach(n - 1)
			}
		})
	default:
		away := g.between(time.Millisecond, 50*time.Second)
		if g.chance(30) {
			away = g.between(70*time.Second, 10*time.Minute)
		}
		g.add(at, "all configs go", h.detachAll)
		g.add(min(at+away, simulatedTime-1), "a config comes", func() {
			h.attach(life)
			h.warm()
		})
	}
}

func (g *historyMaker) addCalls(at time.Duration) {
	s := stream{n: 1, to: g.anyTarget()}
	if g.chance(20) {
		s.patience = g.between(time.Millisecond, 5*time.Second)
	}
	switch x := g.IntN(100); {
	case x < 35:
	case x < 55:
		s.n = 2 + g.IntN(8)
	default:
		s.distance = g.between(10*time.Millisecond, 3*time.Second)
		s.n = 2 + g.IntN(30)
	}
	s.unrepeatable = g.chance(20)
	g.addStream(at, s)
}
