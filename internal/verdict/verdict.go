// Package verdict decides what an upstream's refusals are about. The refusal of a request
// may be about its token, which was revoked. Then a new token heals it, and there is no
// time to lose. Or it is about what the request asks for: a wrong password, a page for
// administrators. Then a new token is of no use, however often that happens.
//
// Nothing in an answer tells the two apart for certain. So a Place collects evidence
// about one upstream: what it has accepted before, and what it accepts meanwhile. And a
// Budget limits what errors can cost. Nothing here waits, asks, or is safe for
// concurrent use: the owner of places guards them.
package verdict

import "time"

// A Verdict is what a refusal is about.
type Verdict int

// The verdicts.
const (
	Unknown Verdict = iota
	Token           // the upstream does not accept the token any more
	Path            // the upstream refuses this request, whatever the token
)

// A Decision is what happens to a request that was refused.
type Decision int

// The decisions.
const (
	Answer Decision = iota // its client gets the upstream's answer
	Renew                  // get a new token, and send the request once more
	Hold                   // wait for evidence
)

const (
	// A new token that does not help makes the next wait longer. After the first ten
	// in a row the wait is maxDistance: noise costs two token requests a minute then.
	maxDistance = 30 * time.Second
	manyWasted  = 10

	// Strong evidence may be wrong, too: each time that it was, the next wait doubles.
	// It is forgotten after strongMemory.
	strongDistance = 1 * time.Second
	strongMemory   = 60 * time.Second

	// How long without a new token until one that did not help is forgotten. If
	// silence forgot them all, noise that pauses would begin anew each time.
	forgetOne = 5 * time.Minute

	// A refused request waits for so many of the usual distances between accepted
	// requests. If none is accepted in this time, the upstream probably accepts none.
	patience  = 8
	leastHold = 20 * time.Millisecond
	mostHold  = 1 * time.Second
	holdAgain = 100 * time.Millisecond
	maxHeld   = 64

	// Of those that wait for a new token, so many can be refuted: each acceptance looks
	// at all of them.
	maxJoined = 1024

	// How often the upstream may call a good token invalid until it is not believed.
	maxFalseChallenges = 3

	// How many tokens a health check may be refused until it says nothing any more.
	maxCheckedTokens = 3
	maxChecks        = 16

	gapWeight = 0.1 // of the newest distance between accepted requests
)

// A Refusal is the answer by which an upstream has refused a request, while nobody knows
// what it is about.
type Refusal struct {
	Kind         Kind
	Token        string // the one that was refused
	Check        bool   // it is an active health check
	InvalidToken bool   // the upstream says that the token is invalid (RFC 6750 §3.1)

	at      time.Time
	renewed bool      // it has brought about a new token
	strong  bool      // and the evidence was strong
	chance  bool      // and if that is accepted, it may be by chance
	before  time.Time // when a refusal had brought about a new token before
	wrongAt time.Time // when strong evidence was wrong before
	refuted chan struct{}
	isPath  bool // refuted is closed

	unjudged bool // nobody will see whether the new token helps
	trusted  bool // and its kind was trusted until then
}

// Refuted is closed when an acceptance has refuted a refusal that waits. It is nil if the
// refusal has brought about a new token: then the request is sent again in any case.
func (r *Refusal) Refuted() <-chan struct{} {
	if r.renewed {
		return nil
	}
	return r.refuted
}

// WasRefuted reports whether an acceptance has refuted the refusal.
func (r *Refusal) WasRefuted() bool { return r.isPath }

// Renewed reports whether the refusal has brought about a new token.
func (r *Refusal) Renewed() bool { return r.renewed }

// Strong reports whether it did so on strong evidence.
func (r *Refusal) Strong() bool { return r.strong }

// An Acceptance is an answer by which an upstream has accepted a request's token, as far
// as its status says.
type Acceptance struct {
	Kind    Kind
	Token   string
	Check   bool
	Again   bool      // the request was refused before
	Current bool      // the token is the newest one
	Sent    time.Time // what the upstream knew when it was sent
}

// A Place is what is known about one upstream. The zero Place is ready to use. It should
// be made at the first refusal: until then, there is nothing to decide.
type Place struct {
	kinds  kinds
	checks map[Kind]refusedTokens

	wasted   int       // new tokens that did not help, as far as is known
	renewed  time.Time // when a refusal here last brought about a new token
	forgiven time.Time // until when the time has been counted that takes from wasted

	wrong   int // new tokens that did not help although the evidence was strong
	wrongAt time.Time

	served   bool          // a request with the newest token was accepted since the last waste
	vain     bool          // the last new token was refused, and nothing was accepted since
	accepted time.Time     // when the last of them was sent
	gap      time.Duration // the mean distance between them; 0 if it is unknown

	// The longest distances in this half of a minute, and in the one before.
	longest, longestBefore time.Duration
	half                   time.Time // when this one began

	falseChallenges int

	helped string // the token that helped last
	proven string // the last token that was accepted the first time that a request was sent

	// Those that an acceptance may refute: they are held, or wait for a new token.
	open map[*Refusal]struct{}

	cleared string // the last token that was replaced here in vain

	// What is shown of the place.
	verdict  Verdict
	refusing bool
	suspect  string // the last token that was replaced because of a refusal here
	again    bool   // a new token was refused, too
	refused  time.Time
}

// Status returns what the last refusal was about, as far as is known, and when that was.
// refusing reports whether no request was accepted since a token was refused.
func (p *Place) Status() (v Verdict, refusing bool, refused time.Time) {
	return p.verdict, p.refusing, p.refused
}

// Decide decides about a refusal: first when it happens, and again when it was held for
// the time that Decide returns.
func (p *Place) Decide(b *Budget, r *Refusal, now time.Time) (Decision, time.Duration) {
	if !r.at.IsZero() {
		return p.decideAgain(b, r, now)
	}
	r.at, r.refuted = now, make(chan struct{})
	p.refused = now
	p.forget(now)
	switch {
	case r.Check && p.checkSaysNothing(r):
		p.foundPath()
		return Answer, 0
	case p.Suspects(r) && p.affordsIfStrong(b, now):
		return p.renew(b, r, true, now), 0
	case p.affordsIfQuiet(b, now):
		return p.renew(b, r, true, now), 0
	case !p.served && p.affords(b, now):
		// Nobody is being served here, so there is nothing to lose.
		return p.renew(b, r, false, now), 0
	case !r.Check && !p.kinds.trusts(r.Kind) && b.since(now) >= maxDistance && b.affords(now):
		// What was accepted may have needed no token at all.
		return p.renew(b, r, false, now), 0
	case p.vain, len(p.open) >= maxHeld:
		return Answer, 0 // there is nothing to wait for, or it is too much
	}
	p.wait(r)
	wait := mostHold
	if p.gap > 0 {
		wait = min(max(patience*p.gap, leastHold), mostHold)
	}
	return Hold, wait
}

// Join decides about a refusal while another token is on its way anyway. It returns Renew
// if the request waits for that token: it is sent once more, unless an acceptance refutes
// the refusal before. The others get their answers. Nobody is being served where new
// tokens do not help, and there is no need to send all these requests twice.
func (p *Place) Join(r *Refusal, now time.Time) Decision {
	if r.at.IsZero() {
		r.at, r.refuted = now, make(chan struct{})
		p.refused = now
	}
	switch {
	case p.Suspects(r):
	case r.isPath, p.vain:
		return Answer
	case len(p.open) < maxJoined:
		p.wait(r)
	}
	return Renew
}

// decideAgain is Decide for a refusal that was held.
func (p *Place) decideAgain(b *Budget, r *Refusal, now time.Time) (Decision, time.Duration) {
	left := mostHold - now.Sub(r.at)
	switch {
	case r.isPath:
		return Answer, 0
	case p.affordsIfQuiet(b, now):
		return p.renew(b, r, true, now), 0
	case p.affords(b, now):
		return p.renew(b, r, false, now), 0
	case left <= 0:
		p.Close(r)
		p.foundPath()
		return Answer, 0
	}
	return Hold, min(left, holdAgain)
}

// quiet reports whether an upstream accepts nothing any more that usually does. If strong
// evidence was wrong here, it must be quieter than it has been in the last minute: whoever
// has many requests accepted, and stops then, makes the usual distance short.
func (p *Place) quiet(now time.Time) bool {
	if !p.served || p.gap == 0 {
		return false
	}
	needed := patience * p.gap
	if p.wrong > 0 {
		needed = max(needed, mostHold, max(p.longest, p.longestBefore)*7/5)
	}
	return now.Sub(p.accepted) >= min(needed, maxDistance)
}

// Suspects reports whether there is strong evidence that a refusal is about the token:
// the upstream says so, and has not been wrong too often; or it has accepted requests of
// this kind, and a new token has always helped them.
func (p *Place) Suspects(r *Refusal) bool {
	return r.InvalidToken && p.falseChallenges < maxFalseChallenges || p.kinds.trusts(r.Kind)
}

// Cleared reports whether the token of a refusal was replaced here, and that was of no use.
func (p *Place) Cleared(r *Refusal) bool { return r.Token == p.cleared && !p.Suspects(r) }

// Served reports whether the upstream has accepted the newest token since the last one
// that did not help.
func (p *Place) Served() bool { return p.served }

// renew notes that a refusal brings about a new token. Its cost counts from now on: the
// client may go away, and then nobody sees whether the token helps.
func (p *Place) renew(b *Budget, r *Refusal, strong bool, now time.Time) Decision {
	r.before, r.wrongAt = b.last, p.wrongAt
	b.spend(now)
	r.renewed, r.strong = true, strong
	r.chance = r.Token == p.helped && r.Token != p.proven
	p.renewed, p.forgiven = now, now
	p.wasted++
	if strong {
		p.wrong++
		p.wrongAt = now
	}
	p.wait(r)
	p.verdict, p.refusing, p.suspect = Token, true, r.Token
	return Renew
}

// NoToken notes that there is no new token for a refusal, because the authorization
// server issued none. That is not the upstream's doing, so it costs nothing.
func (p *Place) NoToken(b *Budget, r *Refusal) {
	if !r.renewed {
		return
	}
	r.renewed = false
	b.refund()
	if b.last.Equal(p.renewed) { // the next one need not come later for that
		b.last = r.before
	}
	p.wasted = max(0, p.wasted-1) // 0 if the time has taken it
	if r.strong {
		p.wrong = max(0, p.wrong-1)
		p.wrongAt = r.wrongAt
	}
	if r.unjudged {
		p.believeAgain(r)
	}
	p.Close(r)
}

// Judge notes how a request ended that has brought about a new token, and was sent once
// more with that. It returns what the refusal was about.
//
// Some upstreams refuse each request the first time, and accept it the second time. Then
// each token seems to help, and none is accepted by any other request.
func (p *Place) Judge(b *Budget, r *Refusal, accepted bool, fresh string, now time.Time) Verdict {
	p.Close(r)
	if !accepted {
		p.vain = !p.served
	}
	if !r.renewed {
		return Unknown
	}
	if accepted {
		p.helped = fresh
	}
	if accepted && !r.isPath && !r.chance {
		if p.kinds.knows(r.Kind) { // or each of this kind may be accepted the second time
			b.refund()
			p.wasted = max(0, p.wasted-1)
		}
		p.wrong = 0
		if r.InvalidToken {
			p.falseChallenges = 0
		}
		p.verdict, p.refusing, p.again = Token, false, false
		return Token
	}
	p.served, p.vain, p.again = false, !accepted, true
	if (!accepted || r.isPath) && fresh != r.Token { // otherwise the server repeats it
		p.cleared = r.Token
	}
	if accepted || r.isPath {
		p.verdict, p.refusing = Path, false
	}
	p.believeLess(r)
	if r.strong {
		p.wrongAt = now
	}
	return Path
}

// Unjudged notes that nobody will see whether the new token helps that a refusal has
// brought about: its request is not sent again. If that was no reason to believe such
// refusals less, noise could have it at any time.
func (p *Place) Unjudged(r *Refusal) {
	p.Close(r)
	if r.renewed {
		r.unjudged, r.trusted = true, p.kinds.trusts(r.Kind)
		p.believeLess(r)
	}
}

// believeLess makes the evidence of a refusal weaker.
func (p *Place) believeLess(r *Refusal) {
	p.kinds.distrust(r.Kind)
	if r.InvalidToken {
		p.falseChallenges++
	}
}

// believeAgain takes back believeLess: there was no new token.
func (p *Place) believeAgain(r *Refusal) {
	if r.trusted {
		p.kinds.put(r.Kind, false)
	}
	if r.InvalidToken {
		p.falseChallenges = max(0, p.falseChallenges-1)
	}
}

// Waiting returns how many refusals an acceptance could refute now.
func (p *Place) Waiting() int { return len(p.open) }

// wait notes that an acceptance may refute a refusal from now on.
func (p *Place) wait(r *Refusal) {
	if p.open == nil {
		p.open = make(map[*Refusal]struct{})
	}
	p.open[r] = struct{}{}
}

// Close notes that nothing more will be known about a refusal.
func (p *Place) Close(r *Refusal) { delete(p.open, r) }

// Accept notes that the upstream has accepted a request. A health check says nothing
// about other requests: its path may need no token.
func (p *Place) Accept(a Acceptance) {
	if !a.Again {
		p.kinds.accept(a.Kind)
		p.proven = a.Token
	}
	if p.refusing && a.Current && a.Sent.After(p.renewed) {
		p.refusing = false
		if p.again || a.Token == p.suspect {
			p.verdict = Path
		}
	}
	if a.Check {
		delete(p.checks, a.Kind)
		return
	}
	if a.Current {
		p.served, p.vain = true, false
		p.spaced(a.Sent)
	}
	for r := range p.open {
		if r.Token == a.Token && a.Sent.After(r.at) {
			r.isPath = true
			close(r.refuted)
			delete(p.open, r)
			p.verdict, p.refusing = Path, false
		}
	}
}

// spaced notes when an accepted request was sent.
func (p *Place) spaced(sent time.Time) {
	if !sent.After(p.accepted) {
		return
	}
	if !p.accepted.IsZero() {
		gap := min(sent.Sub(p.accepted), maxDistance)
		if p.renewed.Before(p.accepted) { // otherwise it was silent because of a refusal
			if sent.Sub(p.half) >= strongMemory/2 {
				p.half, p.longestBefore, p.longest = sent, p.longest, 0
			}
			p.longest = max(p.longest, gap)
		}
		if p.gap > 0 {
			gap = time.Duration((1-gapWeight)*float64(p.gap) + gapWeight*float64(gap))
		}
		p.gap = max(gap, 1)
	}
	p.accepted = sent
}

// foundPath notes that a refusal is probably about the path: others are being served.
func (p *Place) foundPath() {
	if p.served {
		p.verdict, p.refusing = Path, false
	}
}

// forget forgets what is long ago.
func (p *Place) forget(now time.Time) {
	if now.Sub(p.wrongAt) > strongMemory {
		p.wrong = 0
	}
	if n := min(int(now.Sub(p.forgiven)/forgetOne), p.wasted); n > 0 {
		p.wasted -= n
		p.forgiven = now
	}
}

// affords reports whether a new token may be had without strong evidence.
func (p *Place) affords(b *Budget, now time.Time) bool {
	if p.renewed.IsZero() {
		return b.affordsReserve(now)
	}
	distance := time.Duration(p.wasted) * time.Second
	if p.wasted > manyWasted {
		distance = maxDistance
	}
	return b.since(now) >= distance && b.affords(now)
}

// affordsIfQuiet reports whether a new token may be had because the upstream is quiet.
// What clients can do does not delay that.
func (p *Place) affordsIfQuiet(b *Budget, now time.Time) bool {
	return p.quiet(now) && b.since(now) >= strongDistance && b.affordsReserve(now)
}

// affordsIfStrong reports whether a new token may be had on strong evidence.
func (p *Place) affordsIfStrong(b *Budget, now time.Time) bool {
	distance := min(strongDistance<<min(p.wrong, 5), maxDistance)
	return b.since(now) >= distance && b.affordsHalf(now)
}

// refusedTokens counts the tokens that a health check was refused, since one was
// accepted.
type refusedTokens struct {
	last  string
	count int
}

// checkSaysNothing notes that a health check was refused. It reports whether that says
// nothing about the token: the check was refused others as well, and accepted with none.
func (p *Place) checkSaysNothing(r *Refusal) bool {
	seen, ok := p.checks[r.Kind]
	if !ok && len(p.checks) >= maxChecks {
		return true
	}
	if seen.last != r.Token {
		seen = refusedTokens{r.Token, min(seen.count+1, maxCheckedTokens+1)}
		if p.checks == nil {
			p.checks = make(map[Kind]refusedTokens)
		}
		p.checks[r.Kind] = seen
	}
	return seen.count > maxCheckedTokens
}
