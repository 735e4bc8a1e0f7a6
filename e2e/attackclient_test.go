package e2e

import (
	"bytes"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// attackInFlight is how many attacks may be under way. While there are so many, the
// next ones wait: the test holds no more than this in memory.
const attackInFlight = 200

// attack is one request, or what is sent instead of one.
type attack struct {
	route attackRoute
	trick clientTrick // of the client
	play  string      // trick of the upstream
	n     int         // no other attack has this number
}

// path is what the attack asks for. The upstream reads its trick from it.
func (a attack) path() string { return a.route.path + "/" + a.play + "/" + strconv.Itoa(a.n) }

// A clientTrick sends something to the gateway, and returns all the bytes of the answer.
type clientTrick interface {
	name() string
	asksToGoOn() bool // by Expect: 100-continue
	send(c *attackClient, a attack) [][]byte
}

// attackClient attacks the gateway at a constant rate.
type attackClient struct {
	site   string   // address of the gateway's site
	others []string // addresses of upstreams
	found  *findings
	sent   *tally // tricks of the client
	got    *tally // attacks that were answered, by trick
	web    map[string]*http.Client

	stopped  chan struct{}
	done     chan struct{} // the last attack was started
	inFlight sync.WaitGroup
}

// allAttacks returns each trick of clients with each of upstreams, on each route, in an
// order that depends on the seed alone. Who asks whether to go on gets no answers of the
// kind 1xx: the gateway's server would race with itself (https://go.dev/issue/80949).
func allAttacks(seed uint64, plays []string) []attack {
	var all []attack
	for _, route := range attackRoutes {
		for _, trick := range clientTricks() {
			for _, play := range plays {
				if trick.asksToGoOn() && (play == "flood" || play == "malformed") {
					continue
				}
				all = append(all, attack{route: route, trick: trick, play: play})
			}
		}
	}
	rand.New(rand.NewPCG(seed, 0)).Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

// start has the client send the attacks, again and again.
func (c *attackClient) start(all []attack) {
	c.stopped, c.done = make(chan struct{}), make(chan struct{})
	free := make(chan struct{}, attackInFlight)
	go func() {
		defer close(c.done)
		ticks := time.NewTicker(time.Second / attackRate)
		defer ticks.Stop()
		for n := 0; ; n++ {
			select {
			case <-c.stopped:
				return
			case <-ticks.C:
			}
			free <- struct{}{}
			a := all[n%len(all)]
			a.n = n
			c.inFlight.Go(func() {
				c.attack(a)
				<-free
			})
		}
	}()
}

// stop ends the attack.
func (c *attackClient) stop() {
	close(c.stopped)
	<-c.done
	c.inFlight.Wait()
	for _, w := range c.web {
		w.CloseIdleConnections()
	}
}

// attack sends one, and looks at what comes back: what belongs to an upstream may be
// told to those alone who ask this upstream, and the gateway's own errors tell nothing.
func (c *attackClient) attack(a attack) {
	c.sent.add(a.trick.name())
	answers := a.trick.send(c, a)
	if len(answers) > 0 {
		c.got.add(a.trick.name())
	}
	for _, answer := range answers {
		permitted := a.route.owners
		if bytes.Contains(bytes.ToLower(answer), []byte("x-gateway-error")) {
			permitted = ""
		}
		if others := foreign(answer, permitted); others != "" {
			c.found.add("answer with what belongs to another", "%s of %s: what belongs to %s in %.2000q",
				a.trick.name(), a.path(), others, answer)
		}
	}
}

// newAttackClient returns a client of the gateway.
func newAttackClient(gw *gateway, f *attackField) *attackClient {
	c := &attackClient{
		site:  strings.TrimPrefix(gw.url, "http://"),
		found: f.found,
		sent:  newTally(),
		got:   newTally(),
		web:   map[string]*http.Client{"HTTP/1.1": newWebClient(false), "h2c": newWebClient(true)},
	}
	for _, owner := range []byte(attackSockets + attackPorts) {
		c.others = append(c.others, f.upstreams[owner].address)
	}
	return c
}

// other returns the address of an upstream: now of this, now of that.
func (c *attackClient) other(n int) string { return c.others[n%len(c.others)] }

// chosen returns the headers with which a client chooses an upstream, where it can.
func (c *attackClient) chosen(n int) map[string]string {
	to := c.other(n)
	host, port, err := net.SplitHostPort(to)
	if err != nil { // it is a socket
		host, port = "localhost", "80"
	}
	return map[string]string{"X-Upstream": to, "X-Host": host, "X-Port": port}
}
