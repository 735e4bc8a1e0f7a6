package outboundauth

import (
	"cmp"
	"math"
	"slices"
	"sort"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/verdict"
)

// What follows from the trips of requests: what could be known about their upstreams, and
// what new tokens were good for.

// placeModel is what was seen of one upstream with one source.
type placeModel struct {
	refusals []*trip         // by refused
	accepted []*sentOnce     // those that are evidence, and no health checks, by answered
	renewals []*renewal      // by at
	checked  []time.Duration // when a health check was accepted
	kinds    map[verdict.Kind]*kindModel
}

// kindModel is what was seen of one kind of requests to an upstream.
type kindModel struct {
	accepted time.Duration // when one was first accepted, which was not refused before; never
	noisy    time.Duration // when a new token was first of no use after that; never
}

// renewal is a token request that a refusal has brought about.
type renewal struct {
	*trip
	place *placeModel
	at    time.Duration
	ended time.Duration // when it was known what it was good for; never
}

// helped reports whether the new token was accepted, and was not bound to be.
func (x *trip) helped() bool {
	return len(x.sends) == 2 && x.sends[1].judgement == acceptsRequest && x.kind.nature != natureTwice
}

// vainAt returns when it was seen that the new token was refused, too, or was the old one;
// never.
func (x *trip) vainAt() time.Duration {
	switch {
	case len(x.sends) == 2 && x.sends[1].answered != never && x.sends[1].judgement != acceptsRequest:
		return x.sends[1].answered
	case x.repeated:
		return x.decided
	}
	return never
}

// left reports whether the caller was gone when the gateway had decided.
func (x *trip) left() bool { return x.patience > 0 && x.decided >= x.until-slack }

// sortTrips sorts the trips by place, and notes who waited.
func (m *model) sortTrips() {
	type key struct {
		to     *simulatedUpstream
		source *tokenSource
	}
	m.places = map[*trip]*placeModel{}
	byKey := map[key]*placeModel{}
	for _, c := range m.calls {
		m.waits = append(m.waits, span{c.asked, c.answered})
	}
	for _, x := range m.trips {
		p := byKey[key{x.to, x.source}]
		if p == nil {
			p = &placeModel{kinds: map[verdict.Kind]*kindModel{}}
			byKey[key{x.to, x.source}] = p
		}
		m.places[x] = p
		m.addTrip(p, x)
	}
	slices.SortStableFunc(m.waits, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	byTime := func(a, b *renewal) int { return cmp.Compare(a.at, b.at) }
	slices.SortStableFunc(m.renewals, byTime)
	slices.SortStableFunc(m.refusals, func(a, b *trip) int { return cmp.Compare(a.refused, b.refused) })
	for _, x := range m.refusals {
		m.places[x].refusals = append(m.places[x].refusals, x)
	}
	for _, r := range m.renewals {
		r.place.renewals = append(r.place.renewals, r)
		if k := r.place.kind(r.trip); k.accepted < r.ended && r.ended != never && r.verdict != verdict.Token {
			k.noisy = min(k.noisy, r.ended)
		}
	}
	for _, p := range byKey {
		slices.SortStableFunc(p.accepted, func(a, b *sentOnce) int { return cmp.Compare(a.answered, b.answered) })
	}
}

// addTrip notes what a trip says about its upstream.
func (m *model) addTrip(p *placeModel, x *trip) {
	for i := range x.sends {
		s := &x.sends[i]
		if !s.noted {
			continue
		}
		if k := p.kind(x); s.first {
			k.accepted = min(k.accepted, s.answered)
		}
		if x.kind.check {
			p.checked = append(p.checked, s.answered)
		} else {
			p.accepted = append(p.accepted, s)
		}
	}
	if x.sure.to > x.sure.from {
		m.waits = append(m.waits, x.sure)
	}
	if x.refusal == nil {
		return
	}
	x.repeated = x.fresh == "" && m.wasFetched(x.decided) && m.holdingAt(x.decided).is(x.sends[0].value)
	m.refusals = append(m.refusals, x)
	m.waits = append(m.waits, span{x.refused, x.decided})
	if !x.refusal.Renewed() {
		return
	}
	r := &renewal{trip: x, place: p, at: m.renewedAt(x)}
	switch r.ended = x.vainAt(); {
	case x.unrepeatable:
		r.ended = x.decided // nobody will know
	case x.settled:
		r.ended = x.sends[1].answered
	}
	m.renewals = append(m.renewals, r)
}

func (p *placeModel) kind(x *trip) *kindModel {
	kind := x.path()
	k := p.kinds[kind]
	if k == nil {
		k = &kindModel{never, never}
		p.kinds[kind] = k
	}
	return k
}

// trusts reports whether a request of this kind was accepted before, and a new token was
// never of no use to one.
func (p *placeModel) trusts(x *trip, at time.Duration) bool {
	k := p.kind(x)
	return k.accepted < at && at <= k.noisy
}

// renewedAt returns when the fetch began that a refusal has brought about: the last one
// before the request had its token, or gave up.
func (m *model) renewedAt(x *trip) time.Duration {
	if first := m.fetchSince(x.refused, x.decided); first != nil && !x.unrepeatable {
		return first.start
	}
	return x.refused
}

// fetching reports whether a fetch is under way. It may be between two of its requests.
func (m *model) fetching(at time.Duration) bool {
	first := m.fetchSince(0, at)
	return first != nil && first.start <= at
}

// fetchSince returns the first attempt since from of the fetch that ends at to, or is under
// way, or comes next; nil if there is none.
func (m *model) fetchSince(from, to time.Duration) *attemptRecord {
	before := m.fetchStart(to)
	first := m.nextAttempt(max(from, before) - 1)
	for first != nil && first.end <= before { // it failed at once, and is the last one of a fetch
		first = m.nextAttempt(first.start)
	}
	return first
}

// anyRefused reports whether a request waited then, or was told then what to do, because
// an upstream had refused this token.
func (m *model) anyRefused(value string, at time.Duration) bool {
	for _, x := range m.refusals {
		if x.refused > at {
			break
		}
		if x.sends[0].value == value && at <= x.decided {
			return true
		}
	}
	return false
}

// refutedAt returns when an upstream first accepted a token that it had refused a request:
// that one was sent after the refusal. Then the refusal is about the request. It is never
// if that was not seen.
func (m *model) refutedAt(x *trip) time.Duration {
	accepted := m.places[x].accepted
	i := sort.Search(len(accepted), func(i int) bool { return accepted[i].answered > x.refused })
	for _, s := range accepted[i:] {
		if s.value == x.sends[0].value && s.sent > x.refused {
			return s.answered
		}
	}
	return never
}

// quiet reports whether an upstream has accepted nothing for eight of the usual distances
// between the requests that it accepts, each a tenth of which the newest makes up; or for
// half a minute. If strong evidence was wrong, a second is the least.
func (m *model) quiet(p *placeModel, at time.Duration) bool {
	var last, gap time.Duration
	for _, s := range p.accepted {
		if s.answered > at || s.sent <= last || !m.holdingAt(s.answered).is(s.value) {
			continue
		}
		if newest := min(s.sent-last, promisedHealingAtLast); gap > 0 {
			gap = gap*9/10 + newest/10
		} else if last > 0 {
			gap = newest
		}
		last = s.sent
	}
	least := min(8*gap, promisedHealingAtLast)
	if p.wrong(at) > 0 {
		least = max(least, promisedHold)
	}
	return gap > 0 && at-last >= least-slack
}

// spent returns how many new tokens of the last time were of no use then, or may have
// been: each is forgotten after half a minute, one after another.
func (m *model) spent(at time.Duration) float64 {
	type change struct {
		at time.Duration
		by float64
	}
	var changes []change
	for _, r := range m.renewals {
		if r.at <= at && r.source == m.sourceAt(at) {
			changes = append(changes, change{r.at, 1})
			if r.ended <= at && r.verdict == verdict.Token && r.place.kind(r.trip).accepted < r.ended {
				changes = append(changes, change{r.ended, -1})
			}
		}
	}
	slices.SortStableFunc(changes, func(a, b change) int { return cmp.Compare(a.at, b.at) })
	spent, last := 0.0, time.Duration(0)
	for _, c := range changes {
		spent = max(0, spent-float64(c.at-last)/float64(promisedRefill)) + c.by
		last = c.at
	}
	return math.Max(0, spent-float64(at-last)/float64(promisedRefill))
}

// wrong returns how many new tokens in a row were of no use then, although the evidence
// was strong: since a token helped there, or since a minute without.
func (p *placeModel) wrong(at time.Duration) (n int) {
	last := time.Duration(math.MinInt64 / 2)
	for _, r := range p.renewals {
		if r.at >= at {
			break
		}
		if r.at-last >= promisedStrongMemory {
			n = 0
		}
		switch {
		case r.ended <= at && r.verdict == verdict.Token:
			n = 0
		case r.refusal.Strong():
			n++
			last = r.at
		}
	}
	if at-last >= promisedStrongMemory {
		return 0
	}
	return n
}
