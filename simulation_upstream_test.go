package outboundauth

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/verdict"
)

// nature is what an upstream makes of the requests of one kind.
type nature int

const (
	natureGood   nature = iota // it accepts them with a good token
	natureNew                  // likewise, and each has a path of its own
	naturePublic               // it accepts them with any token
	natureLogin                // likewise with a good token, but some have a wrong password
	natureTwice                // it refuses each of them at first, and accepts it the second time
	natureNoise                // it refuses them whatever the token
	natureScan                 // likewise, and each has a path of its own
)

// simulatedKind is what some requests to an upstream have in common.
type simulatedKind struct {
	nature
	path  string
	kind  verdict.Kind // unless each request has a path of its own
	check bool         // they are active health checks
	wrong int          // how many percent of them have a wrong password
	says  bool         // it calls the token invalid, whatever is wrong
}

// simulatedUpstream is one address that tokens are sent to.
type simulatedUpstream struct {
	*history
	address dialAddress
	kinds   []*simulatedKind
	check   *simulatedKind
	takes   time.Duration // until its answer
	says    bool          // that a token is invalid
	closed  []span        // when it refuses everything

	mu      sync.Mutex // guards all fields below
	revoked int        // the newest token that was revoked here
	since   time.Duration
}

// judge says what the upstream makes of a request now. If it refuses the token, judge
// also says since when it does so.
func (u *simulatedUpstream) judge(x *trip, value string, again bool) (what rigJudgement, since time.Duration) {
	if slices.ContainsFunc(u.closed, func(s span) bool { return s.from <= u.now() && u.now() < s.to }) {
		return refusesRequest, 0
	}
	if x.kind.nature == naturePublic {
		return acceptsRequest, 0
	}
	n, good, since := u.server.look(value)
	u.mu.Lock()
	defer u.mu.Unlock()
	if good && n <= u.revoked {
		good, since = false, u.since
	}
	switch {
	case !good:
		return refusesToken, since
	case x.kind.refuses(x.random, again):
		return refusesRequest, 0
	}
	return acceptsRequest, 0
}

// refuses reports whether a request is refused whatever the token.
func (k *simulatedKind) refuses(random uint64, again bool) bool {
	switch k.nature {
	case natureLogin:
		return int(random%100) < k.wrong
	case natureTwice:
		return !again
	case natureNoise, natureScan:
		return true
	default:
		return false
	}
}

// revoke lets the upstream refuse all tokens so far.
func (u *simulatedUpstream) revoke() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if n := u.server.newest(); n > u.revoked {
		u.revoked, u.since = n, u.now()
	}
}

// trip is a request that has its token: what it was sent, and what was answered.
type trip struct {
	to     *simulatedUpstream
	kind   *simulatedKind
	random uint64 // decides about this request
	source *tokenSource

	unrepeatable bool
	patience     time.Duration // of the caller; 0: endless
	until        time.Duration // when the caller leaves

	asked string     // the token that it got first
	sure  span       // when it waited because it can't be sent again
	sends []sentOnce // in this order

	refusal          *refusal      // nil if it was not refused
	refused, decided time.Duration // when it was refused, and when it had another token or no hope
	fresh            string        // the other token
	repeated         bool          // the server has repeated the first one
	settled          bool
	verdict          verdict.Verdict
}

// sentOnce is a request on its way, with its answer.
type sentOnce struct {
	value          string
	sent, answered time.Duration // answered: never, if the caller was gone
	judgement      rigJudgement
	since          time.Duration // when the token became bad
	first          bool          // the request was not refused before
	seen           bool          // a place was known when it was sent
	noted          bool          // the answer was evidence
}

// path returns the kind of the request as the gateway sees it.
func (x *trip) path() verdict.Kind {
	if x.kind.nature == natureNew || x.kind.nature == natureScan {
		return verdict.KindOf(http.MethodGet, fmt.Sprint(x.kind.path, x.random), x.kind.check)
	}
	return x.kind.kind
}

// call does what a request of the gateway does: it asks for a token, is sent, and is sent
// once more if the upstream refuses the token. It leaves after a while, unless its
// patience is endless.
func (h *history) call(x *trip) {
	ctx := context.Background()
	x.until = h.now() + x.patience
	if x.patience > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, x.patience)
		defer cancel()
	}
	x.source = h.pool.current()
	if x.source == nil {
		return
	}
	t := h.ask(ctx, x.source, x.patience)
	if t == nil {
		return
	}
	x.asked = t.value
	h.began(x)
	if x.unrepeatable {
		x.sure.from = h.now()
		t, _ = x.source.sure(ctx, x.to.address, t)
		x.sure.to = h.now()
	}
	if x.send(ctx, t) {
		return
	}
	if first := &x.sends[0]; first.answered != never {
		x.again(ctx, t)
	}
}

// again is the way of a request that was refused: that of Transport.roundTrip.
func (x *trip) again(ctx context.Context, t *token) {
	says := x.kind.says || x.to.says && x.sends[0].judgement == refusesToken
	x.refusal = &refusal{of: t, Refusal: verdict.Refusal{
		Kind: x.path(), Token: t.value, Check: x.kind.check, InvalidToken: says,
	}}
	x.refused, x.decided = x.to.now(), never
	if x.unrepeatable {
		x.source.anotherLater(x.to.address, x.refusal)
		x.decided = x.to.now()
		return
	}
	fresh, _ := x.source.another(ctx, x.to.address, x.refusal)
	x.decided = x.to.now()
	if fresh == nil {
		return
	}
	x.fresh = fresh.value
	accepted := x.send(ctx, fresh)
	if x.sends[1].answered == never {
		x.source.unsettled(x.refusal)
		return
	}
	x.verdict = x.source.settled(x.refusal, accepted, fresh)
	x.settled = true
}

// send sends the request. It reports whether the upstream has accepted it.
func (x *trip) send(ctx context.Context, t *token) bool {
	h, again := x.to.history, len(x.sends) > 0
	x.sends = append(x.sends, sentOnce{value: t.value, sent: h.now(), answered: never, first: !again, seen: !x.source.places.none()})
	s := &x.sends[len(x.sends)-1]
	random := scramble(x.random + uint64(len(x.sends)))
	early := random%2 == 0 // the way back takes the time
	if early {
		s.judgement, s.since = x.to.judge(x, t.value, again)
	}
	takes := x.to.takes*4/5 + time.Duration(random%uint64(x.to.takes*2/5))
	if x.patience == 0 {
		time.Sleep(takes)
	} else if pause(ctx, takes, nil) != nil {
		return false
	}
	if !early {
		s.judgement, s.since = x.to.judge(x, t.value, again)
	}
	s.answered = h.now()
	if s.judgement != acceptsRequest {
		return false
	}
	x.accepted(s, again)
	return true
}

// accepted notes an acceptance as block.accepted does.
func (x *trip) accepted(s *sentOnce, again bool) {
	if !s.seen {
		return
	}
	if at := x.source.places.find(x.to.address); at != nil {
		s.noted = true
		x.source.accepted(at, verdict.Acceptance{
			Kind: x.path(), Token: s.value, Check: x.kind.check, Again: again, Sent: x.to.started.Add(s.sent),
		})
	}
}

func (h *history) ask(ctx context.Context, source *tokenSource, patience time.Duration) *token {
	c := h.asks(patience)
	t, _, err := source.Token(ctx)
	h.answered(c, t, err)
	return t
}

// target is a kind of request to an upstream.
type target struct {
	to   *simulatedUpstream
	kind *simulatedKind
}

// stream is a number of requests, each of which has one of the targets.
type stream struct {
	n                  int
	distance, patience time.Duration
	to                 []target
	unrepeatable       bool
	random             uint64
}

// start makes the calls of a stream.
func (h *history) start(s stream) {
	h.callers.Go(func() {
		for i := range s.n {
			if i > 0 && s.distance > 0 {
				time.Sleep(s.distance)
			}
			random := scramble(s.random + uint64(i))
			to := s.to[scramble(random)%uint64(len(s.to))]
			x := &trip{to: to.to, kind: to.kind, random: random, patience: s.patience, unrepeatable: s.unrepeatable}
			h.callers.Go(func() { h.call(x) })
		}
	})
}

// makeUpstreams makes one to four upstreams. Each has kinds that it accepts.
func (g *historyMaker) makeUpstreams() {
	for range 1 + g.IntN(4) {
		u := g.newUpstream()
		g.upstreams = append(g.upstreams, u)
		for range 1 + g.IntN(3) {
			g.addKind(u, natureGood)
		}
		for _, likely := range []struct {
			nature
			percent int
		}{{natureNew, 20}, {naturePublic, 15}, {natureLogin, 30}, {natureLogin, 20}, {natureTwice, 10}, {natureNoise, 60}, {natureScan, 40}} {
			if g.chance(likely.percent) {
				g.addKind(u, likely.nature)
			}
		}
		u.check = g.newKind(u, []nature{natureGood, natureGood, naturePublic, natureNoise}[g.IntN(4)])
		u.check.check = true
		u.check.kind = verdict.KindOf(http.MethodGet, u.check.path, true)
	}
}

func (g *historyMaker) newUpstream() *simulatedUpstream {
	g.made++
	u := &simulatedUpstream{
		history: g.history,
		address: dialAddress{"tcp", fmt.Sprint("192.0.2.1:", g.made)},
		takes:   g.between(time.Millisecond, 100*time.Millisecond),
		says:    g.chance(30),
	}
	return u
}

func (g *historyMaker) newKind(u *simulatedUpstream, n nature) *simulatedKind {
	k := &simulatedKind{nature: n, path: fmt.Sprint("/", len(u.kinds), "/"), wrong: 1 + g.IntN(60)}
	k.says = n >= natureLogin && g.chance(15)
	k.kind = verdict.KindOf(http.MethodGet, k.path, false)
	return k
}

func (g *historyMaker) addKind(u *simulatedUpstream, n nature) {
	u.kinds = append(u.kinds, g.newKind(u, n))
}

// targets returns the kinds that are so.
func (u *simulatedUpstream) targets(so func(*simulatedKind) bool) (all []target) {
	for _, k := range u.kinds {
		if so(k) {
			all = append(all, target{u, k})
		}
	}
	return all
}

func (g *historyMaker) anyUpstream() *simulatedUpstream { return g.upstreams[g.IntN(len(g.upstreams))] }

// anyTarget returns a kind that most requests have: one that is accepted.
func (g *historyMaker) anyTarget() []target {
	u := g.anyUpstream()
	if g.chance(70) {
		return []target{{u, u.kinds[0]}}
	}
	return []target{{u, u.kinds[g.IntN(len(u.kinds))]}}
}

func (g *historyMaker) addStream(at time.Duration, s stream) {
	s.random = g.Uint64()
	h := g.history
	g.add(at, "", func() { h.start(s) })
}

// addRevocation lets one upstream or all of them refuse the tokens that there are. Most
// revocations are noticed soon.
func (g *historyMaker) addRevocation(at time.Duration) {
	u := g.anyUpstream()
	if g.chance(60) {
		g.add(at, fmt.Sprintf("all tokens are revoked at %v", u.address), u.revoke)
	} else {
		g.add(at, "all tokens are revoked", g.server.revoke)
	}
	if g.chance(60) {
		g.addStream(min(at+g.between(time.Millisecond, 5*time.Second), simulatedTime-1), stream{
			n: 1 + g.IntN(10), distance: g.between(time.Millisecond, time.Second), to: g.goodTargets(u),
		})
	}
}

// goodTargets returns the kinds that an upstream accepts.
func (g *historyMaker) goodTargets(u *simulatedUpstream) []target {
	return u.targets(func(k *simulatedKind) bool { return k.nature <= natureNew })
}

// addClosure lets one upstream refuse everything for a time.
func (g *historyMaker) addClosure(at time.Duration) {
	u, to := g.anyUpstream(), at+g.between(100*time.Millisecond, 3*time.Minute)
	u.closed = append(u.closed, span{at, to})
	g.add(at, fmt.Sprintf("%v refuses everything until %v", u.address, to), func() {})
}

// addChecks adds the health checks of one upstream.
func (g *historyMaker) addChecks(at time.Duration) {
	u := g.anyUpstream()
	g.addStream(at, stream{
		n: 2 + g.IntN(15), distance: g.between(time.Second, 40*time.Second), patience: 5 * time.Second,
		to: []target{{u, u.check}},
	})
}

// addNoise adds requests that are refused whatever their token.
func (g *historyMaker) addNoise(at time.Duration) {
	to := g.anyUpstream().targets(func(k *simulatedKind) bool { return k.nature >= natureLogin })
	switch {
	case g.chance(5):
		to = g.manyUpstreams(g.IntN(60))
	case g.chance(20):
		to = nil
		for _, u := range g.upstreams {
			to = append(to, u.targets(func(k *simulatedKind) bool { return k.nature >= natureLogin })...)
		}
	}
	if len(to) == 0 {
		return
	}
	s := stream{n: 10 + g.IntN(80), distance: g.between(20*time.Millisecond, 3*time.Second), to: to}
	if g.chance(5) {
		s.distance = 0
	}
	g.addStream(at, s)
}

// manyUpstreams makes upstreams that refuse everything: those of a resolver, for example.
func (g *historyMaker) manyUpstreams(n int) (all []target) {
	for range 1 + n {
		u := g.newUpstream()
		all = append(all, target{u, g.newKind(u, natureScan)})
	}
	return all
}

// addTraffic adds requests of all kinds to one upstream.
func (g *historyMaker) addTraffic(at time.Duration) {
	u := g.anyUpstream()
	to := u.targets(func(*simulatedKind) bool { return true })
	if g.chance(60) {
		to = g.goodTargets(u)
	}
	g.addStream(at, stream{n: 10 + g.IntN(80), distance: g.between(10*time.Millisecond, time.Second), to: to})
}
