package outboundauth

import (
	"slices"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/verdict"
)

// What must hold when upstreams refuse tokens, or requests that have a good token.

// What is promised, in numbers of their own.
const (
	promisedHold  = 1 * time.Second // until a request that was refused has its answer, or a fetch
	promisedSure  = 1 * time.Second // that a request waits because it can't be sent again
	promisedSends = 2
	promisedHeld  = 64 // at one upstream

	promisedBurst  = 10               // new tokens may be of no use at once,
	promisedRefill = 30 * time.Second // and after that one each time
	spared         = 2                // of the burst, that noise does not get,
	sparedByStrong = 1                // and that strong evidence does not get

	promisedHealing       = 1 * time.Second
	promisedHealingAtLast = 30 * time.Second

	promisedDistances    = 10 // seconds at most, one for each new token that was of no use lately
	promisedMemory       = 5 * time.Minute
	promisedStrongest    = 1 * time.Second // doubled for each
	promisedStrongMemory = 60 * time.Second

	promisedChallenges = 3 // that were wrong
	promisedChecks     = 3 // tokens that a health check is refused
	promisedPlaces     = 1024
)

// Nobody waits for long whose request was refused: a second until it is decided what
// follows, and then as long as others wait for a fetch after one that failed. Only a
// request whose token ends meanwhile waits as those do that find none.
func refusedWaitsAreShort(m *model, report report) {
	for _, x := range m.refusals {
		bound := promisedHold
		if m.fetching(x.refused) || m.fetching(x.decided) {
			bound += max(m.patience(x.refused), m.patience(x.decided))
		}
		if t := m.holdingAt(x.refused); !t.valid(x.refused + bound) {
			bound += m.boundWithout(x.refused)
		}
		if waited := x.decided - x.refused; waited > bound+slack {
			report(x.decided, "refused at %v, and waited for %v, want %v at most", x.refused, waited, bound)
		}
	}
}

// A request that can't be sent again waits for a second at most, and only if its upstream
// has refused its token, so that this is being replaced.
func sureForGoodReason(m *model, report report) {
	for _, x := range m.trips {
		waited := x.sure.to - x.sure.from
		if waited > promisedSure+slack {
			report(x.sure.to, "waited for %v to be sure, want %v at most", waited, promisedSure)
		}
		if waited > 0 && !m.places[x].hasRefused(x.asked, x.sure.from) {
			report(x.sure.to, "waited for %v to be sure of %s, and %v has not refused it", waited, x.asked, x.to.address)
		}
	}
}

// A request that can't be sent again does wait while its token is replaced because its
// upstream has refused it.
func sureIfRefused(m *model, report report) {
	for _, x := range m.trips {
		if !x.unrepeatable || x.patience > 0 || x.sure.to > x.sure.from {
			continue
		}
		for _, r := range m.places[x].renewals {
			if r.sends[0].value == x.asked && r.at < x.sure.from && !m.fetchEnded(r.at, x.sure.from+1) && !m.goesAway(r.at, x.sure.from) {
				report(x.sure.from, "%v has refused %s at %v, and a request goes there that can't be sent again", x.to.address, x.asked, r.refused)
			}
		}
	}
}

// hasRefused reports whether the upstream refused this token before.
func (p *placeModel) hasRefused(value string, at time.Duration) bool {
	return slices.ContainsFunc(p.refusals, func(x *trip) bool { return x.refused <= at && x.sends[0].value == value })
}

// A request is sent twice at most, and never twice with one token. It is sent again with
// the newest.
func sentAgainWithAnother(m *model, report report) {
	for _, x := range m.trips {
		if n := len(x.sends); n > promisedSends || x.unrepeatable && n > 1 {
			report(x.decided, "sent %d times", n)
		}
		if x.fresh == "" {
			continue
		}
		now, before := m.holdingAt(x.decided), m.holdingAt(x.decided-1)
		if x.fresh == x.sends[0].value || !now.is(x.fresh) && !before.is(x.fresh) {
			report(x.decided, "refused with %s, and sent again with %s", x.sends[0].value, x.fresh)
		}
	}
}

// is reports whether it is this token.
func (t *holding) is(value string) bool { return t != nil && t.value == value }

// A token that has been replaced is no reason to wait: the request is sent again at once,
// unless the token was replaced because of this upstream, and that was of no use.
func oldTokensAreNoReason(m *model, report report) {
	for _, x := range m.refusals {
		t := m.holdingAt(x.refused)
		if x.unrepeatable || x.left() || !t.valid(x.refused) || t.is(x.sends[0].value) || t.from == x.refused || x.refused >= t.reserveFrom() {
			continue
		}
		if p := m.places[x]; m.clears(p, x.sends[0].value, x.refused) && !p.suspects(x, x.refused) {
			continue
		}
		if x.fresh != t.value || x.decided > x.refused {
			report(x.decided, "%s was refused at %v, got %q, want %s at once", x.sends[0].value, x.refused, x.fresh, t.value)
		}
	}
}

// clears reports whether this token was replaced here in vain.
func (m *model) clears(p *placeModel, value string, at time.Duration) bool {
	return slices.ContainsFunc(p.renewals, func(r *renewal) bool {
		return r.sends[0].value == value && r.ended <= at && r.settled && (!r.helped() || m.refutedAt(r.trip) <= r.ended)
	})
}

// A refusal that is about the request is not sent again. That is known when the upstream
// has accepted the same token meanwhile. It does not count where the refusal has brought
// about the new token; nor where one was on its way anyway, and the evidence against the
// token was strong.
func pathsAreNotSentAgain(m *model, report report) {
	for _, x := range m.refusals {
		if x.fresh == "" || x.refusal.Renewed() || m.refutedAt(x) >= x.decided {
			continue
		}
		if p := m.places[x]; m.fetching(x.refused) && p.suspects(x, x.refused) {
			continue
		}
		report(x.decided, "sent again, and refuted at %v", m.refutedAt(x))
	}
}

// suspects reports whether a refusal is strong evidence against its token.
func (p *placeModel) suspects(x *trip, at time.Duration) bool {
	wrong := 0
	for _, r := range p.renewals {
		switch {
		case !r.says() || r.at >= at || r.ended > at:
		case r.verdict == verdict.Token:
			wrong = 0
		default:
			wrong++
		}
	}
	return x.says() && wrong < promisedChallenges || p.trusts(x, at)
}

// Nobody waits for what is decided. A new token ends all waits. A refusal that is held is
// decided when an acceptance has refuted it; while a fetch is under way, some are not.
func nobodyWaitsInVain(m *model, report report) {
	for _, x := range m.refusals {
		t := m.holdingAt(x.refused)
		if next := m.holdingAt(x.decided); t != nil && next != nil && !next.is(t.value) && next.from < x.decided-slack {
			report(x.decided, "refused at %v, and waits although %s is there since %v", x.refused, next.value, next.from)
		}
		if refuted := m.refutedAt(x); refuted < x.decided-slack && !m.fetching(x.refused) && !m.fetching(x.decided) {
			report(x.decided, "refused at %v, and waits although that is refuted since %v", x.refused, refuted)
		}
	}
}

// In its reserve, a token has expired by the clock of the upstream. That is no reason to
// replace it before others do.
func reserveIsNoEvidence(m *model, report report) {
	for _, r := range m.renewals {
		if t := m.holdingAt(r.at - 1); t.is(r.sends[0].value) && t.least == t.most && t.life == t.wholeLife && r.at > t.reserveFrom()+slack {
			report(r.at, "a new token for %v, because %s was refused in its reserve", r.to.address, t.value)
		}
	}
}

// While the server has no token, it is asked again two seconds after the last time because
// of strong evidence, or sooner. What the server has asked for comes first.
func triedAgainForTheRefused(m *model, report report) {
	for _, x := range m.refusals {
		last := m.lastAttempt(x.refused - 1)
		if !m.failed(x.refused) || x.kind.check || x.sends[0].judgement != refusesToken ||
			last == nil || last.start+promisedAskedWait >= x.refused || m.fetching(x.refused-1) || m.isAway(x.refused) {
			continue
		}
		if t := m.holdingAt(x.refused); !t.is(x.sends[0].value) || x.refused >= t.reserveFrom()-slack || m.leftAlone(x.refused) > x.refused {
			continue
		}
		p := m.places[x]
		strong := p.trusts(x, x.refused) && p.wrong(x.refused) == 0 && m.spent(x.refused) < promisedBurst-1-sparedByStrong
		if strong && m.lastAttempt(x.refused) == last {
			report(x.refused, "%s is refused, and there was no request since %v", x.sends[0].value, last.start)
		}
	}
}

// says reports whether the upstream says that the token is invalid.
func (x *trip) says() bool { return x.refusal.InvalidToken }

// The client gets a refusal for one of these reasons only: it was held for a second; the
// token was in its reserve; a fetch has failed; the upstream has accepted the same token
// meanwhile; it was a health check, or one of too many; the server has repeated the token;
// or the last new token was of no use, and nobody was accepted since, or the token was
// replaced by that.
func answersForGoodReason(m *model, report report) {
	for _, x := range m.refusals {
		p, t := m.places[x], m.holdingAt(x.refused)
		switch waited := x.decided - x.refused; {
		case x.unrepeatable, x.fresh != "", x.left(), waited >= promisedHold-slack, x.kind.check:
		case t == nil || x.decided >= t.reserveFrom()-slack:
		case m.failed(x.refused + 1), m.failed(x.decided + 1), m.goesAway(x.refused, x.decided):
		case m.refutedAt(x) <= x.decided:
		case p.openAt(x.refused) >= promisedHeld:
		case x.repeated:
		case p.vainSince(x), m.clears(p, x.sends[0].value, x.refused):
		default:
			report(x.decided, "refused at %v with %s, and the client gets that", x.refused, x.sends[0].value)
		}
	}
}

// openAt returns how many refused requests waited then.
func (p *placeModel) openAt(at time.Duration) (n int) {
	for _, x := range p.refusals {
		if x.refused <= at && (x.decided >= at || len(x.sends) == 2 && x.sends[1].answered >= at) {
			n++
		}
	}
	return n
}

// vainSince reports whether a new token was of no use here before, and nobody was accepted
// with the refused one since.
func (p *placeModel) vainSince(x *trip) bool {
	accepted := time.Duration(-1)
	for _, s := range p.accepted {
		if s.value == x.sends[0].value && s.answered < x.refused {
			accepted = s.answered
		}
	}
	return slices.ContainsFunc(p.refusals, func(before *trip) bool {
		vain := before.vainAt()
		return accepted <= vain && vain <= x.decided
	})
}

// New tokens that are of no use cost ten requests at once, and one each half a minute.
// So there are twelve in a minute at most, and two in the next. It does not matter how
// many upstreams there are, and how many kinds of requests. A token that helps does not
// count. Those that are in the second half of their life are replaced anyway.
func wasteIsLimited(m *model, report report) {
	for _, e := range m.epochs {
		all := m.wastes(e)
		for i := range all {
			for j := range i + 1 {
				if n, most := float64(i-j+1), promisedBurst+float64(all[i]-all[j])/float64(promisedRefill); n > most+0.001 {
					report(all[i], "%v new tokens since %v, want %v at most", n, all[j], most)
				}
			}
		}
	}
}

// A revocation costs one token request: refusals of a token that has been replaced bring
// about none. A server that repeats its token replaces nothing.
func replacedOnce(m *model, report report) {
	type key struct {
		value  string
		source *tokenSource
	}
	replaced := map[key]bool{}
	for _, r := range m.renewals {
		k := key{r.sends[0].value, r.source}
		if replaced[k] && !m.config.repeats {
			report(r.at, "a new token for %v, and %s was replaced before", r.to.address, k.value)
		}
		replaced[k] = true
	}
}

// wastes returns when young tokens were replaced since an epoch began, and the new ones
// were of no use.
func (m *model) wastes(epoch time.Duration) (all []time.Duration) {
	helped := map[time.Duration]bool{}
	for _, r := range m.renewals {
		helped[r.at] = helped[r.at] || r.helped()
	}
	for _, t := range m.holdings {
		start := m.fetchSince(0, t.from).start
		before := m.holdingAt(start - 1)
		if m.epochOf(start) == epoch && before != nil && before.from >= epoch && m.isYoung(before, start) && !m.failed(start) && !helped[start] {
			all = append(all, start)
		}
	}
	return all
}

// Each new token that was of no use makes the next wait a second longer, up to ten
// seconds. It is forgotten after five minutes. It does not count for the first refusal of
// an upstream, nor for strong evidence.
func wasteSlowsDown(m *model, report report) {
	for i, r := range m.renewals {
		if i == 0 || r.refusal.Strong() || r.place.renewals[0] == r {
			continue
		}
		n := 0
		for _, before := range r.place.renewals {
			if before != r && before.ended <= r.at && before.at > r.at-promisedMemory && before.verdict != verdict.Token {
				n++
			}
		}
		least := time.Duration(min(n, promisedDistances)) * time.Second
		if d := r.at - m.renewals[i-1].at; m.renewals[i-1].source == r.source && d < least-slack {
			report(r.at, "a new token for %v only %v after the last, want %v: %d were of no use", r.to.address, d, least, n)
		}
	}
}

// Evidence is strong for one of these reasons: the upstream says that the token is
// invalid, and was not wrong three times; it has accepted this kind of requests, and a new
// token was never of no use to one; or it accepts nothing any more. If strong evidence
// was wrong, the next wait doubles.
func strongForGoodReason(m *model, report report) {
	for i, r := range m.renewals {
		if !r.refusal.Strong() {
			continue
		}
		least := promisedStrongest
		switch quiet := m.quiet(r.place, r.at); {
		case !quiet && (r.at > r.refused || !r.place.suspects(r.trip, r.at)):
			report(r.at, "a new token for %v, and no strong evidence", r.to.address)
		case !quiet:
			least = doubled(r.place.wrong(r.at), least, promisedRefill)
		}
		if i == 0 || m.renewals[i-1].source != r.source {
			continue
		}
		if d := r.at - m.renewals[i-1].at; d < least-slack {
			report(r.at, "a new token for %v only %v after the last, want %v: strong evidence was wrong", r.to.address, d, least)
		}
	}
}

// Where a request of this kind was accepted before, a token that has gone bad for a second
// is replaced at once: the request is sent again after the time of a token request. But
// strong evidence must not have been wrong lately, nor all new tokens be used up.
func healedAtOnce(m *model, report report) {
	for _, x := range m.refusals {
		p := m.places[x]
		if m.healable(x, promisedHealing) && p.trusts(x, x.refused) && p.wrong(x.refused) == 0 && m.spent(x.refused) < promisedBurst-1-sparedByStrong {
			m.wantHealed(x, 0, report)
		}
	}
}

// In any other case, that takes half a minute, if nothing accepts the bad token. Then a
// request is held for a second at most. Only if the request that had the token replaced
// was refused again, late refusals are not sent again.
func healedAtLast(m *model, report report) {
	for _, x := range m.refusals {
		p := m.places[x]
		if m.healable(x, promisedHealingAtLast) && m.refutedSince(x) && !m.fetching(x.refused) && !m.clears(p, x.sends[0].value, x.refused) &&
			p.openAt(x.refused) < promisedHeld && m.spent(x.refused) < promisedBurst-1-spared {
			m.wantHealed(x, promisedHold, report)
		}
	}
}

// refutedSince reports whether nothing has accepted the token since it went bad.
func (m *model) refutedSince(x *trip) bool {
	first := x.sends[0]
	return !slices.ContainsFunc(m.places[x].accepted, func(s *sentOnce) bool {
		return s.value == first.value && s.sent > first.since && s.sent < x.decided
	})
}

// healable reports whether a token has been bad for so long, and the server serves.
func (m *model) healable(x *trip, after time.Duration) bool {
	first := x.sends[0]
	if first.judgement != refusesToken || x.unrepeatable || x.patience > 0 || x.kind.check || m.config.repeats {
		return false
	}
	back, answer, ok := m.backSince(x.decided)
	if t := m.holdingAt(x.refused); t.is(first.value) && x.decided >= t.reserveFrom()-slack {
		return false
	}
	for _, a := range m.pending(x.refused) {
		ok = ok && a.start >= back
	}
	return ok && back <= first.since && x.refused >= first.since+after+answer && answer < m.leastPatience(x.refused) &&
		!m.failed(x.refused+1) && !m.failed(x.decided+1) && !m.goesAway(first.since, x.decided)
}

// wantHealed reports a request that is not sent again with a good token in time.
func (m *model) wantHealed(x *trip, hold time.Duration, report report) {
	_, answer, _ := m.backSince(x.decided)
	switch waited := x.decided - x.refused; {
	case x.fresh == "":
		report(x.decided, "%s is bad at %v since %v, and the client gets that", x.sends[0].value, x.to.address, x.sends[0].since)
	case waited > hold+answer+slack:
		report(x.decided, "%s is bad at %v since %v, another took %v", x.sends[0].value, x.to.address, x.sends[0].since, waited)
	case x.sends[1].judgement == refusesToken && x.sends[1].since < x.refused:
		report(x.decided, "%s is bad at %v since %v, and so is the next", x.sends[0].value, x.to.address, x.sends[0].since)
	}
}

// What a new token was good for is judged by how the request ended: the token was to
// blame if the request was accepted then, unless the upstream has accepted the old token
// meanwhile, or accepts each request the second time.
func verdictsForGoodReason(m *model, report report) {
	for _, r := range m.renewals {
		if !r.settled {
			continue
		}
		accepted := r.sends[1].judgement == acceptsRequest
		refuted := m.refutedAt(r.trip) <= r.ended
		switch {
		case r.verdict == verdict.Token && (!accepted || m.refutedAt(r.trip) < r.ended):
			report(r.ended, "%v was judged to have refused the token", r.to.address)
		case r.verdict != verdict.Token && r.helped() && !refuted && r.place.proves(r.sends[0].value, r.at):
			report(r.ended, "%v was judged to have refused the request", r.to.address)
		}
	}
}

// proves reports whether a token was accepted before, by a request that was not refused.
func (p *placeModel) proves(value string, at time.Duration) bool {
	return slices.ContainsFunc(p.accepted, func(s *sentOnce) bool { return s.value == value && s.answered < at && s.first })
}

// A health check that was refused three tokens in a row says nothing any more.
func checksBringFew(m *model, report report) {
	for _, p := range m.renewals {
		if !p.kind.check {
			continue
		}
		tokens := map[string]bool{}
		for _, r := range p.place.renewals {
			if r.kind.check && r.at <= p.at && !p.place.checkedBetween(r.at, p.at) {
				tokens[r.sends[0].value] = true
			}
		}
		if n := len(tokens); n > promisedChecks {
			report(p.at, "the health check of %v was refused %d tokens, and brings about another", p.to.address, n)
		}
	}
}

// checkedBetween reports whether a health check was accepted in that time.
func (p *placeModel) checkedBetween(from, to time.Duration) bool {
	return slices.ContainsFunc(p.checked, func(at time.Duration) bool { return from <= at && at <= to })
}

// Nothing waits at an upstream when all requests have ended. There are so many places at
// most.
func placesAreTidy(m *model, report report) {
	for _, what := range m.untidy {
		report(m.endedAt, "%s", what)
	}
}
