package outboundauth

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/verdict"
)

const mostClients = 40

// TestSimulationOfMany is TestSimulation with up to 40 clients of one authorization server,
// which take turns. What holds for one token source holds for each of them, and what
// docs/token-life.md promises about turns holds for all together: see turnInvariants.
//
//nolint:tparallel // see TestSimulation
func TestSimulationOfMany(t *testing.T) {
	number := 60
	if testing.Short() {
		number = 10
	}
	simulateAll(t, number, simulateMany)
}

// simulateMany runs the history of a seed.
func simulateMany(t *testing.T, seed uint64) simulated {
	c := newCrowdHistory(seed)
	c.leftover = append(c.leftover, inBubble(t, c.run)...)
	return c
}

// crowd is an authorization server, and the clients that ask it. Each of them is a history
// of its own. The server does the same with all of them, unless it has something against
// one: then that client's phases say so.
type crowd struct {
	seed     uint64
	host     string
	capacity int           // how many token requests it takes at once; it answers 429 to the others
	after    time.Duration // the Retry-After of that; 0: none
	phases   []phase
	clients  []*history
	silent   map[*history]bool // those that it never answers
	steps    []step

	leftover []string

	mu   sync.Mutex // guards all fields below
	busy int
}

func (c *crowd) String() string {
	return fmt.Sprintf("%d clients, %d of them never answered; the server takes %d at once (Retry-After: %v)",
		len(c.clients), len(c.silent), c.capacity, c.after)
}

// way is how long a token request is on its way to the server: hardly ever as long as that of
// another client, so that a history is the same each time.
func (c *crowd) way(client uint64, n int) time.Duration {
	return time.Duration(scramble(client<<20+uint64(n)) % uint64(100*time.Microsecond))
}

func (c *crowd) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.busy >= c.capacity {
		return false
	}
	c.busy++
	return true
}

func (c *crowd) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.busy--
}

func newCrowdHistory(seed uint64) *crowd {
	g := &historyMaker{history: &history{seed: seed}, Rand: rand.New(rand.NewPCG(seed, 14))}
	n := int(g.between(1, mostClients+1))
	c := &crowd{
		seed: seed, host: fmt.Sprintf("crowd-%d.example", seed), capacity: 100, silent: map[*history]bool{},
	}
	if g.chance(60) {
		c.capacity = 1 + g.IntN(n+2)
	}
	if g.chance(50) {
		c.after = time.Duration(1+g.IntN(4)) * time.Second
	}
	g.config.answer = g.between(time.Millisecond, time.Second)
	g.server = &simulatedServer{history: g.history, config: g.config, crowd: c}
	g.addPhases(g.outages())
	c.phases, c.steps = g.server.phases, g.steps
	for i := range n {
		c.addClient(g, i)
	}
	if c.capacity <= len(c.silent) {
		c.capacity += len(c.silent)
	}
	for range g.IntN(4) {
		c.addForAll(g)
	}
	slices.SortStableFunc(c.steps, func(a, b step) int { return cmp.Compare(a.at, b.at) })
	return c
}

// outages returns phases of the server. Before the end, it serves for ten minutes.
func (g *historyMaker) outages() (all []phase) {
	for range g.IntN(8) {
		p := g.newPhase(time.Duration(g.Int64N(int64(simulatedTime - 20*time.Minute))))
		if g.chance(15) {
			p.from = 0
		}
		all = append(all, p)
	}
	return append(all, phase{from: simulatedTime - 11*time.Minute, to: simulatedTime, mode: serverServes})
}

// addClient adds a client, with a life of its own.
func (c *crowd) addClient(all *historyMaker, i int) {
	h := &history{seed: c.seed<<8 + uint64(i)}
	g := &historyMaker{history: h, Rand: rand.New(rand.NewPCG(h.seed, 15))}
	h.config = g.newConfig()
	h.config.lifetime = g.between(30*time.Second, 24*time.Hour).Truncate(time.Second)
	h.config.answer = all.config.answer
	h.config.life.fetchTimeout = max(h.config.life.fetchTimeout, 5*time.Second)
	h.config.dies = 0
	h.server = &simulatedServer{history: h, config: h.config, crowd: c}
	g.setPhases(c.phasesOf(g))
	u := g.newUpstream()
	g.addKind(u, natureGood)
	u.check = g.newKind(u, natureGood)
	u.check.check, u.check.kind = true, verdict.KindOf(http.MethodGet, u.check.path, true)
	g.upstreams = []*simulatedUpstream{u}
	if g.chance(80) {
		g.add(time.Duration(i)*time.Millisecond+time.Duration(g.IntN(int(time.Millisecond))), "", h.warm)
	}
	scenes := make([]time.Duration, 1+g.IntN(6))
	for i := range scenes {
		scenes[i] = time.Duration(g.Int64N(int64(simulatedTime)))
	}
	if g.chance(50) {
		scenes[0] = 0
	}
	var rejections []rejection
	for range 3 + g.IntN(20) {
		at := scenes[g.IntN(len(scenes))] + time.Duration(g.ExpFloat64()*float64(30*time.Second))
		at %= simulatedTime
		switch x := g.IntN(100); {
		case x < 2:
			rejections = append(rejections, rejection{at, at + g.between(100*time.Millisecond, 10*time.Minute), g.chance(60)})
		case x < 14:
			g.addRevocation(at)
		case x < 24:
			g.addReload(at)
		case x < 30:
			g.addChecks(at)
		default:
			g.addCalls(at)
		}
	}
	g.addRejections(rejections)
	c.clients = append(c.clients, h)
	c.steps = append(c.steps, h.steps...)
}

// phasesOf returns the phases of the server for one client. It never answers some, and
// tells others to wait although it serves all the rest.
func (c *crowd) phasesOf(g *historyMaker) []phase {
	own := phase{to: math.MaxInt64}
	switch x := g.IntN(100); {
	case x < 4:
		c.silent[g.history] = true
		return []phase{{to: math.MaxInt64, mode: serverHangs}}
	case x < 12:
		own.mode, own.after = serverThrottlesAfter, time.Duration(30+g.IntN(300))*time.Second
	case x < 16:
		own.mode = serverHangs
	default:
		return c.phases
	}
	own.from = time.Duration(1 + g.Int64N(int64(simulatedTime-20*time.Minute)))
	own.to = own.from + g.between(time.Second, 5*time.Minute)
	var all []phase
	for _, p := range c.phases {
		if p.from < own.from {
			all = append(all, phase{p.from, min(p.to, own.from), p.mode, p.after})
		}
		if p.from <= own.from && own.from < p.to {
			all = append(all, own)
		}
		if p.to > own.to {
			all = append(all, phase{max(p.from, own.to), p.to, p.mode, p.after})
		}
	}
	return all
}

// addForAll adds something that happens to all clients at once: a restart, a reload, or
// requests.
func (c *crowd) addForAll(g *historyMaker) {
	at := time.Duration(g.Int64N(int64(simulatedTime - 12*time.Minute)))
	kind := g.IntN(4)
	away := 70*time.Second + g.between(time.Second, 10*time.Second)
	for i, h := range c.clients {
		at := at + time.Duration(i)*time.Microsecond + time.Duration(g.IntN(1000))
		life := h.config.life
		mine := &historyMaker{history: &history{seed: h.seed}, Rand: g.Rand}
		switch kind {
		case 0:
			mine.add(at, "a restart: all configs go", h.detachAll)
			mine.add(at+away, "a restart: a config comes", func() {
				h.attach(life)
				h.warm()
			})
		case 1:
			mine.add(at, "a reload", func() {
				h.attach(life)
				h.warm()
				if len(h.pool.users) > 1 {
					h.detach(0)
				}
			})
		default:
			s := stream{
				n: 1 + g.IntN(3), distance: g.between(time.Millisecond, 10*time.Second), random: g.Uint64(),
				to: []target{{h.upstreams[0], h.upstreams[0].kinds[0]}},
			}
			mine.add(at, "", func() { h.start(s) })
		}
		for _, s := range mine.steps {
			c.steps = append(c.steps, step{s.at, "", func() {
				if s.text != "" {
					h.note("%s", s.text)
				}
				s.do()
			}})
		}
	}
}

// run lets everything happen. It is called in a bubble.
func (c *crowd) run() {
	time.Sleep(time.Duration(scramble(c.seed) % uint64(time.Second)))
	started := time.Now()
	for _, h := range c.clients {
		h.started = started
		h.attach(h.config.life)
	}
	for _, s := range c.steps {
		time.Sleep(s.at - time.Since(started))
		s.do()
	}
	time.Sleep(simulatedTime - time.Since(started))
	for _, h := range c.clients {
		h.note("the end")
		h.detachAll()
	}
	for _, h := range c.clients {
		h.callers.Wait()
	}
	time.Sleep(keptFor + time.Duration(len(c.clients)+1)*longestTimeout)
	synctest.Wait()
	for _, h := range c.clients {
		h.look()
	}
	c.lookAtQueue()
	time.Sleep(24 * time.Hour)
	synctest.Wait()
	for _, h := range c.clients {
		h.lookAgain()
	}
}

// lookAtQueue notes what is left in the queue when all has ended.
func (c *crowd) lookAtQueue() {
	q := queues.of(&url.URL{Scheme: "https", Host: c.host}, c.host)
	q.mu.Lock()
	defer q.mu.Unlock()
	for what, left := range map[string]bool{
		"a place": q.crowded(), "a slot": !q.server.Idle(), "a reminder": len(q.failed) > 0, "a timer": q.timer != nil,
	} {
		if left {
			c.leftover = append(c.leftover, "the queue still has "+what)
		}
	}
}

// lines shows what happened to each client.
func (c *crowd) lines(from, to time.Duration) string {
	var b strings.Builder
	for i, h := range c.clients {
		for line := range strings.Lines(h.lines(from, to)) {
			fmt.Fprintf(&b, "%3d %s", i, line)
		}
	}
	lines := slices.Collect(strings.Lines(b.String()))
	slices.SortStableFunc(lines, func(a, b string) int { return cmp.Compare(momentOf(a), momentOf(b)) })
	return strings.Join(lines, "")
}

func momentOf(line string) time.Duration {
	d, _ := time.ParseDuration(strings.Fields(line)[1])
	return d
}

func (c *crowd) violations() (found []finding) {
	m := newCrowdModel(c)
	for i, client := range m.clients {
		for _, f := range client.violations(sharedInvariants()) {
			f.rule = fmt.Sprintf("client %d: %s", i, f.rule)
			found = append(found, f)
		}
	}
	for _, rule := range turnInvariants {
		n := len(found)
		rule.check(m, func(at time.Duration, format string, args ...any) {
			if len(found) == n {
				found = append(found, finding{rule.name, at, fmt.Sprintf(format, args...)})
			}
		})
	}
	return found
}
