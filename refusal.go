// What follows from the answers of upstreams: who waits for another token, and who gets one.

package outboundauth

import (
	"context"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/verdict"
)

// tellAgain is how long operators are not told again of an upstream that refuses requests
// whatever the token, or proofs.
const tellAgain = 1 * time.Hour

// mostSure is how long a request waits at most that can't be sent again.
const mostSure = 1 * time.Second

// accepted notes that an upstream has accepted a request.
func (s *tokenSource) accepted(at *place, a verdict.Acceptance) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at.used = time.Now()
	a.Current = s.current != nil && s.current.value == a.Token
	at.Accept(a)
}

// another returns the token with which a refused request is sent once more. It returns
// nil if the client gets the upstream's answer: the refusal is not about the token, or
// there is no other token. It waits no longer than ctx, and says how long.
func (s *tokenSource) another(ctx context.Context, address dialAddress, r *refusal) (fresh *token, waited time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		now := time.Now()
		decision, wait := s.decide(address, r, now)
		if decision == verdict.Hold && ctx.Err() == nil {
			s.hold(ctx, r, wait)
			waited += time.Since(now)
			continue
		}
		if decision == verdict.Renew {
			s.mu.Unlock()
			next, got, err := s.other(ctx, r)
			s.mu.Lock()
			waited += got.wait
			switch {
			case err == nil && !next.is(r.of):
				return next, waited
			case err == nil && got.use == tokenWaited:
				s.judge(r, false, r.Token) // the server repeats the token
			}
			if r.WasRefuted() {
				s.notice(r, time.Now())
			}
		}
		r.at.Close(&r.Refusal)
		return nil, waited
	}
}

// hold waits for what may decide about a refusal. mu is held, but not meanwhile.
func (s *tokenSource) hold(ctx context.Context, r *refusal, most time.Duration) {
	if s.granting == nil {
		s.granting = make(chan struct{})
	}
	granting := s.granting
	s.mu.Unlock()
	defer s.mu.Lock()
	late := time.NewTimer(most)
	defer late.Stop()
	select {
	case <-r.Refuted():
	case <-granting:
	case <-late.C:
	case <-ctx.Done():
	}
}

// anotherLater is another for a request that can't be sent again. The token is for those
// that come next. It reports whether the refusal is certainly about the token.
func (s *tokenSource) anotherLater(address dialAddress, r *refusal) (certain bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unused() {
		return false // nobody comes next
	}
	_, _ = s.decide(address, r, time.Now())
	r.at.Unjudged(&r.Refusal)
	return r.Renewed() && r.Strong()
}

// decide decides about a refusal. Renew means that another token is there, or will be
// there when the fetch in flight has ended. mu is held.
func (s *tokenSource) decide(address dialAddress, r *refusal, now time.Time) (verdict.Decision, time.Duration) {
	if r.at == nil {
		r.at = s.places.at(address)
	}
	other := !s.current.is(r.of)
	switch {
	case r.WasRefuted(), other && r.at.Cleared(&r.Refusal):
		s.notice(r, now)
		return verdict.Answer, 0
	case other:
		return verdict.Renew, 0
	case s.inflight != nil:
		if r.at.Suspects(&r.Refusal) {
			r.at.doubt(r.of, now)
		}
		if r.at.Join(&r.Refusal, now) == verdict.Answer {
			s.notice(r, now)
			return verdict.Answer, 0
		}
		return verdict.Renew, 0
	case r.of.inReserve(now):
		return verdict.Answer, 0 // it has expired by the upstream's clock
	}
	decision, wait := r.at.Decide(&s.places.budget, &r.Refusal, now)
	switch decision {
	case verdict.Renew:
		if !s.fetchFor(r, now) {
			return verdict.Answer, 0
		}
	case verdict.Answer:
		s.notice(r, now)
	case verdict.Hold:
	}
	return decision, wait
}

// fetchFor starts a fetch because of a refusal. It reports whether it did: after a
// failure it may be too early. mu is held.
func (s *tokenSource) fetchFor(r *refusal, now time.Time) bool {
	r.at.doubt(r.of, now)
	early := s.lastErr != nil && now.Before(s.lastErr.soonest)
	if r.at.Served() && !r.Strong() {
		early = s.backingOff(now) // others are being served, so there is no hurry
	}
	if early && !s.checkDue(now) {
		r.at.NoToken(&s.places.budget, &r.Refusal)
		return false
	}
	s.startFor(early, fleetView{refused: true}).cause = r
	return true
}

// settled notes how a request ended that was sent once more with a new token. It returns
// what the refusal was about, if it has brought about that token.
func (s *tokenSource) settled(r *refusal, accepted bool, fresh *token) verdict.Verdict {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.judge(r, accepted, fresh.value)
}

// judge is settled. mu is held.
func (s *tokenSource) judge(r *refusal, accepted bool, fresh string) verdict.Verdict {
	now := time.Now()
	v := r.at.Judge(&s.places.budget, &r.Refusal, accepted, fresh, now)
	if v == verdict.Path {
		if r.at.doubted == r.Token { // otherwise another one is doubted meanwhile
			r.at.doubted = ""
		}
		s.notice(r, now)
	}
	return v
}

// unsettled notes that nobody knows how such a request ended.
func (s *tokenSource) unsettled(r *refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.at.Close(&r.Refusal)
}

// notice notes that a refusal is not about the token, and decides whether operators are
// told. mu is held.
func (s *tokenSource) notice(r *refusal, now time.Time) {
	r.isPath = true
	if now.Sub(r.at.told) >= tellAgain {
		r.at.told, r.news = now, true
	}
}

// sure returns the token for a request that can't be sent again. If the upstream has
// probably refused the token, the request waits for the one that replaces it.
func (s *tokenSource) sure(ctx context.Context, address dialAddress, t *token) (*token, time.Duration) {
	at := s.places.find(address)
	if at == nil {
		return t, 0
	}
	s.mu.Lock()
	// The replacement may have come since the request got t.
	doubted := at.doubted == t.value && (s.inflight != nil || !s.current.is(t))
	s.mu.Unlock()
	if !doubted {
		return t, 0
	}
	since := time.Now()
	ctx, cancel := context.WithTimeout(ctx, mostSure)
	defer cancel()
	fresh, _, err := s.other(ctx, &refusal{of: t})
	if err != nil {
		fresh = t
	}
	return fresh, time.Since(since)
}

// wantsAnnouncement reports whether a large body has to be announced to an upstream. It
// has to be if always is set, or if the upstream has just refused a token. But an
// upstream that does not want announcements gets none.
func (s *tokenSource) wantsAnnouncement(address dialAddress, always bool) bool {
	at := s.places.find(address)
	if at == nil {
		return always
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	at.used = now
	return !now.Before(at.quietUntil) && (always || now.Sub(at.doubtedAt) < announceAfterRefusal)
}

// noticeProof notes that the client gets a refusal which is about the proof. It reports whether
// operators are told: if this goes on.
func (s *tokenSource) noticeProof(address dialAddress) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, now := s.places.at(address), time.Now()
	s.disproved.Store(true)
	if at.disproved++; at.disproved < proofsTold || now.Sub(at.toldProof) < tellAgain {
		return false
	}
	at.toldProof = now
	return true
}

// proofsTold is after how many refusals operators are told, with no acceptance between them.
const proofsTold = 3

// provedTo notes that an upstream has accepted a proof.
func (s *tokenSource) provedTo(address dialAddress) {
	if !s.disproved.Load() {
		return // most never refuse one
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if at := s.places.find(address); at != nil {
		at.disproved = 0
	}
}

// challenged notes that an upstream wants another proof with a body that can't be sent again. For
// a while, large bodies are announced to it.
func (s *tokenSource) challenged(address dialAddress) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.places.at(address).doubtedAt = time.Now()
}

// unheard notes that an upstream does not want announcements.
func (s *tokenSource) unheard(address dialAddress) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := s.places.at(address)
	at.quietUntil = at.used.Add(quietAfterSilence)
}
