package verdict

import (
	"fmt"
	"testing"
	"time"
)

// A rig is one place with its budget, at a time that the test sets.
type rig struct {
	*testing.T
	Place
	Budget
	now   time.Time
	token int // the newest
}

func newRig(t *testing.T) *rig {
	t.Helper()
	return &rig{T: t, now: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}
}

func (r *rig) after(d time.Duration) *rig {
	r.now = r.now.Add(d)
	return r
}

func (r *rig) current() string { return fmt.Sprint("token ", r.token) }

// accepts lets the upstream accept a request that is sent now.
func (r *rig) accepts(path string) {
	r.Place.Accept(Acceptance{Kind: KindOf("GET", path, false), Token: r.current(), Current: true, Sent: r.now})
}

// refuses lets it refuse one, and says what is decided.
func (r *rig) refuses(path string) (*Refusal, Decision, time.Duration) {
	refusal := &Refusal{Kind: KindOf("GET", path, false), Token: r.current()}
	d, wait := r.Place.Decide(&r.Budget, refusal, r.now)
	return refusal, d, wait
}

func (r *rig) wantRefused(path string, want Decision) *Refusal {
	r.Helper()
	refusal, got, _ := r.refuses(path)
	if got != want {
		r.Fatalf("%s was refused: got decision %d, want %d", path, got, want)
	}
	return refusal
}

// renewal is a refusal that brings about a new token, which helps or not.
func (r *rig) renewal(path string, helps bool) {
	r.Helper()
	refusal := r.wantRefused(path, Renew)
	r.token++
	want := Path
	if helps {
		want = Token
		r.Place.Accept(Acceptance{Kind: refusal.Kind, Token: r.current(), Current: true, Again: true, Sent: r.now})
	}
	if got := r.Place.Judge(&r.Budget, refusal, helps, r.current(), r.now); got != want {
		r.Fatalf("the verdict on %s is %d, want %d", path, got, want)
	}
}

func TestFirstRefusalBringsANewToken(t *testing.T) {
	r := newRig(t)
	r.renewal("/", true)
	if v, refusing, at := r.Status(); v != Token || refusing || !at.Equal(r.now) {
		t.Errorf("got verdict %d, refusing %v at %v, want that it has refused a token", v, refusing, at)
	}
}

// A kind that was accepted is strong evidence until a new token was of no use to it.
func TestKindThatWasAccepted(t *testing.T) {
	r := newRig(t)
	r.renewal("/login", false)
	r.accepts("/")
	r.accepts("/login")
	r.after(time.Minute).renewal("/", true)
	r.accepts("/")
	r.after(time.Second).renewal("/", true)
	r.accepts("/")
	r.accepts("/login")
	r.after(2*time.Second).renewal("/login", false)
	r.accepts("/login")
	r.accepts("/")
	r.after(20*time.Second).wantRefused("/login", Hold)
}

func TestAcceptanceRefutes(t *testing.T) {
	for _, test := range []struct {
		name string
		Acceptance
		sent time.Duration // after the refusal
		want bool
	}{
		{"with the same token", Acceptance{Token: "token 0", Current: true}, 1, true},
		{"with a token that has been replaced", Acceptance{Token: "token 0"}, 1, true},
		{"sent before", Acceptance{Token: "token 0", Current: true}, 0, false},
		{"with another token", Acceptance{Token: "token 1", Current: true}, 1, false},
		{"of a health check", Acceptance{Token: "token 0", Current: true, Check: true}, 1, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t)
			r.Place.served = true
			r.Budget.last = r.now
			refusal := r.wantRefused("/x", Hold)
			test.Sent = r.now.Add(test.sent)
			r.Place.Accept(test.Acceptance)
			select {
			case <-refusal.Refuted():
				if !test.want || !refusal.WasRefuted() {
					t.Errorf("refuted, verdict path: %v", refusal.WasRefuted())
				}
			default:
				if test.want || refusal.WasRefuted() {
					t.Error("not refuted, want that it is")
				}
			}
			if got := len(r.Place.open); (got == 0) != test.want {
				t.Errorf("%d refusals are open, refuted: %v", got, test.want)
			}
		})
	}
}

// Without a witness, a token is replaced when the upstream has been silent for long.
func TestSilenceOfABusyUpstream(t *testing.T) {
	r := newRig(t)
	r.renewal("/x", false)
	for range 50 {
		r.after(100 * time.Millisecond).accepts("/" + fmt.Sprint(r.now))
	}
	refusal, d, wait := r.refuses("/y")
	if d != Hold || wait < 700*time.Millisecond || wait > 800*time.Millisecond {
		t.Fatalf("Decide() = %d, %v, want to wait for eight distances", d, wait)
	}
	r.after(wait)
	if d, _ := r.Place.Decide(&r.Budget, refusal, r.now.Add(50*time.Millisecond)); d != Renew || !refusal.Strong() {
		t.Errorf("Decide() = %d, strong %v, want a new token on strong evidence", d, refusal.Strong())
	}
}

// Who is refused when the upstream has been silent for long is not held first: a request
// that can't be sent again is not held at all.
func TestRefusalAfterSilence(t *testing.T) {
	r := newRig(t)
	r.accepts("/y")
	r.renewal("/x", false)
	for range 50 {
		r.after(100 * time.Millisecond).accepts("/y")
	}
	r.Place.kinds.distrust(KindOf("GET", "/y", false))
	r.wantRefused("/y", Hold)
	r.after(2*time.Second).wantRefused("/y", Renew)
}

func TestHeldRefusalsAreFewAndShort(t *testing.T) {
	r := newRig(t)
	r.renewal("/x", false)
	for range 12 {
		r.spend(r.now) // nothing is left of the budget
	}
	r.accepts("/")
	first := r.wantRefused("/y", Hold)
	for range maxHeld - 1 {
		r.wantRefused("/y", Hold)
	}
	r.wantRefused("/y", Answer)
	for waited, wait := time.Duration(0), mostHold; ; {
		var d Decision
		waited += wait
		if d, wait = r.Place.Decide(&r.Budget, first, r.after(wait).now); d == Answer {
			break
		}
		if waited > mostHold+holdAgain {
			t.Fatalf("held for %v, want %v at most", waited, mostHold)
		}
	}
	if got := len(r.Place.open); got != maxHeld-1 {
		t.Errorf("%d are open, want one less than %d", got, maxHeld)
	}
}

// Who joins a fetch is not sent again where new tokens are of no use.
func TestJoining(t *testing.T) {
	r := newRig(t)
	cause := r.wantRefused("/", Renew)
	if d := r.Place.Join(&Refusal{Kind: 1, Token: "token 0"}, r.now); d != Renew {
		t.Errorf("Join() = %d before anything is known, want the new token", d)
	}
	r.token++
	r.Place.Judge(&r.Budget, cause, false, r.current(), r.now)
	if d := r.Place.Join(&Refusal{Kind: 1, Token: "token 1"}, r.now); d != Answer {
		t.Errorf("Join() = %d, want the answer: the last new token was of no use", d)
	}
	if d := r.Place.Join(&Refusal{Kind: 1, Token: "token 1", InvalidToken: true}, r.now); d != Renew {
		t.Errorf("Join() = %d on strong evidence, want the new token", d)
	}
	r.accepts("/")
	if d := r.Place.Join(&Refusal{Kind: 1, Token: "token 1"}, r.now); d != Renew {
		t.Errorf("Join() = %d, want the new token: others are served", d)
	}
}

// An upstream calls a good token invalid on one path.
func TestFalseChallenges(t *testing.T) {
	r := newRig(t)
	r.accepts("/")
	renewed := 0
	for range 600 {
		r.after(time.Second).accepts("/")
		refusal := &Refusal{Kind: KindOf("GET", "/x", false), Token: r.current(), InvalidToken: true}
		if d, _ := r.Place.Decide(&r.Budget, refusal, r.now); d == Renew && refusal.Strong() {
			renewed++
			r.token++
			r.Place.Judge(&r.Budget, refusal, false, r.current(), r.now)
		}
		r.Place.Close(refusal)
	}
	if renewed != maxFalseChallenges {
		t.Errorf("believed %d times, want %d", renewed, maxFalseChallenges)
	}
}

// The upstream accepts each request the second time.
func TestTokensThatSeemToHelp(t *testing.T) {
	r := newRig(t)
	r.renewal("/", true)
	refusal := r.after(30*time.Second).wantRefused("/", Renew)
	r.token++
	r.Place.Accept(Acceptance{Kind: refusal.Kind, Token: r.current(), Current: true, Again: true, Sent: r.now})
	if got := r.Place.Judge(&r.Budget, refusal, true, r.current(), r.now); got != Path {
		t.Errorf("the verdict is %d, want the path: no other request was accepted with the last token", got)
	}
	if r.Cleared(&Refusal{Kind: 1, Token: refusal.Token}) {
		t.Error("the last token is cleared, want that it is not: the new one was accepted")
	}
}

// The same, while others are being served: a token that helps says nothing about a kind
// that was only accepted the second time. So it is paid for.
func TestRequestsThatAreAcceptedTheSecondTime(t *testing.T) {
	r := newRig(t)
	renewed := 0
	for range 600 {
		refusal, d, _ := r.after(800 * time.Millisecond).refuses("/twice")
		if d == Hold {
			d, _ = r.Place.Decide(&r.Budget, refusal, r.now)
		}
		if d == Renew {
			renewed++
			r.token++
			r.Place.Accept(Acceptance{Kind: refusal.Kind, Token: r.current(), Current: true, Again: true, Sent: r.now})
			r.Place.Judge(&r.Budget, refusal, true, r.current(), r.now)
		}
		r.Place.Close(refusal)
		r.after(200 * time.Millisecond).accepts("/")
	}
	if renewed > 30 {
		t.Errorf("got %d new tokens in ten minutes, want 30 at most", renewed)
	}
}

// The token that helped last is revoked, too. Another request is accepted with the next
// one, before the upstream has answered the request that brought it about.
func TestTokenThatHelpsAgain(t *testing.T) {
	r := newRig(t)
	r.renewal("/", true)
	r.accepts("/")
	refusal := r.after(2*time.Second).wantRefused("/", Renew)
	r.token++
	r.accepts("/")
	if got := r.Place.Judge(&r.Budget, refusal, true, r.current(), r.now); got != Token {
		t.Errorf("the verdict is %d, want the token", got)
	}
}

func TestHealthChecksThatAreAlwaysRefused(t *testing.T) {
	r := newRig(t)
	kind := KindOf("GET", "/health", true)
	renewed := 0
	check := func() Decision {
		r.after(30 * time.Second)
		refusal := &Refusal{Kind: kind, Token: r.current(), Check: true}
		d, _ := r.Place.Decide(&r.Budget, refusal, r.now)
		if d == Renew {
			renewed++
			r.token++
			r.Place.Judge(&r.Budget, refusal, false, r.current(), r.now)
		}
		r.Place.Close(refusal)
		return d
	}
	for range 1000 {
		check()
	}
	if renewed != maxCheckedTokens {
		t.Errorf("got %d new tokens, want %d", renewed, maxCheckedTokens)
	}
	r.Place.Accept(Acceptance{Kind: kind, Token: r.current(), Check: true, Current: true, Sent: r.now})
	if d := check(); d != Renew {
		t.Errorf("got decision %d after it was accepted, want a new token", d)
	}
}

// A token is cleared when another one was of no use. It is not if the server repeats it:
// then another one may help later.
func TestTokenThatIsRepeatedIsNotCleared(t *testing.T) {
	r := newRig(t)
	late := &Refusal{Kind: 1, Token: r.current()}
	r.Place.Judge(&r.Budget, r.wantRefused("/", Renew), false, r.current(), r.now)
	if r.Cleared(late) {
		t.Error("the token is cleared, want that it is not: there was no other")
	}
	r.after(time.Minute).renewal("/", false)
	if !r.Cleared(late) {
		t.Error("the token is not cleared, want that it is: another one was of no use")
	}
}

// Tokens that help cost nothing, however soon they are refused.
func TestTokensThatHelp(t *testing.T) {
	r := newRig(t)
	r.renewal("/", true)
	for range 100 {
		r.accepts("/")
		r.after(2*time.Second).renewal("/", true)
	}
	if r.Place.wasted > 1 {
		t.Errorf("%d tokens count as of no use, want the first one at most", r.Place.wasted)
	}
}

// The authorization server has no token. That costs the upstream nothing.
func TestNoToken(t *testing.T) {
	r := newRig(t)
	for range 100 {
		refusal := r.after(time.Second).wantRefused("/", Renew)
		r.Place.NoToken(&r.Budget, refusal)
	}
	r.renewal("/", true)
}

// The next one need not come later for that.
func TestNoTokenDelaysNothing(t *testing.T) {
	r := newRig(t)
	r.renewal("/", false)
	r.after(time.Minute)
	for range 10 {
		r.Place.NoToken(&r.Budget, r.wantRefused("/", Renew))
	}
}

// Where the last new token was of no use, and nobody is served, there is nothing to wait for.
func TestNothingToWaitFor(t *testing.T) {
	r := newRig(t)
	r.renewal("/", false)
	r.wantRefused("/", Answer)
	r.accepts("/x")
	r.wantRefused("/", Hold)
}

// While there is no token, it is forgotten that strong evidence was wrong.
func TestNoTokenOnStrongEvidence(t *testing.T) {
	r := newRig(t)
	r.renewal("/", false)
	r.accepts("/a")
	r.accepts("/b")
	r.after(time.Minute).renewal("/a", false)
	for range 7 {
		r.after(10 * time.Second).accepts("/b")
		refusal := r.wantRefused("/b", Renew)
		r.Place.NoToken(&r.Budget, refusal)
	}
	if r.Place.wrong != 0 {
		t.Errorf("strong evidence counts as wrong %d times after 70 s, want none", r.Place.wrong)
	}
}

// The answer comes so late that the waste is forgotten.
func TestLateNews(t *testing.T) {
	r := newRig(t)
	r.renewal("/", true)
	r.accepts("/")
	for _, end := range []func(*Refusal){
		func(refusal *Refusal) { r.Place.NoToken(&r.Budget, refusal) },
		func(refusal *Refusal) { r.Place.Judge(&r.Budget, refusal, true, r.current(), r.now) },
	} {
		refusal := r.after(time.Minute).wantRefused("/", Renew)
		r.after(time.Hour).wantRefused("/x", Renew)
		end(refusal)
		if r.Place.wasted < 0 || r.Place.wrong < 0 {
			t.Errorf("%d and %d new tokens were of no use, want no less than none", r.Place.wasted, r.Place.wrong)
		}
		r.after(time.Minute).wantRefused("/", Renew)
	}
}

// The same if the request that was refused is not sent again. It is believed as before.
func TestNoTokenForARequestThatIsNotSentAgain(t *testing.T) {
	r := newRig(t)
	r.renewal("/", true)
	r.accepts("/")
	for range 100 {
		refusal := &Refusal{Kind: KindOf("GET", "/", false), Token: r.current(), InvalidToken: true}
		if d, _ := r.Place.Decide(&r.Budget, refusal, r.after(time.Second).now); d != Renew || !refusal.Strong() {
			t.Fatalf("Decide() = %d, strong %v, want a new token on strong evidence", d, refusal.Strong())
		}
		r.Place.Unjudged(refusal)
		if r.Place.kinds.trusts(refusal.Kind) {
			t.Fatal("the kind is trusted, want that it is not while a new token is on its way")
		}
		r.Place.NoToken(&r.Budget, refusal)
	}
	if r.Place.falseChallenges != 0 {
		t.Errorf("%d challenges count as false, want none", r.Place.falseChallenges)
	}
}

func TestWasteIsForgotten(t *testing.T) {
	r := newRig(t)
	for range 8 {
		r.after(30*time.Second).renewal("/", false)
	}
	if r.Place.wasted != 8 {
		t.Fatalf("%d tokens were of no use, want 8", r.Place.wasted)
	}
	r.accepts("/")
	r.after(3*forgetOne+time.Second).renewal("/", true)
	if r.Place.wasted != 5 {
		t.Errorf("%d of 8 are remembered after 15 minutes, want 5", r.Place.wasted)
	}
}

// Noise at many upstreams leaves something for one that has never refused anything.
func TestReserve(t *testing.T) {
	r := newRig(t)
	noisy := make([]Place, 3)
	used := 0
	for range 3600 {
		r.after(time.Second)
		for i := range noisy {
			refusal := &Refusal{Kind: 1, Token: r.current()}
			if d, _ := noisy[i].Decide(&r.Budget, refusal, r.now); d == Renew {
				used++
				r.token++
				noisy[i].Judge(&r.Budget, refusal, false, r.current(), r.now)
			}
			noisy[i].Close(refusal)
		}
	}
	if used < 110 || used > 132 {
		t.Errorf("got %d new tokens in an hour of noise, want about two a minute", used)
	}
	r.renewal("/", true)
}

func TestKindsAreBounded(t *testing.T) {
	var k kinds
	for i := range 10 * maxKinds {
		k.accept(Kind(i))
		k.accept(7) // it is in use
		if k.knows(Kind(i)) != true || i >= 7 && !k.knows(7) {
			t.Fatalf("kind %d: it or the one in use is forgotten", i)
		}
		if n := len(k.young) + len(k.old); n > 2*maxKinds {
			t.Fatalf("%d kinds, want %d at most", n, 2*maxKinds)
		}
	}
	last := Kind(10*maxKinds - 1)
	if !k.knows(last-maxKinds+2) || k.knows(8) {
		t.Errorf("the last %d are to be remembered, and none that came long before", maxKinds)
	}
	k.distrust(7)
	k.distrust(8)
	if k.trusts(7) || !k.knows(7) || k.knows(8) {
		t.Error("want that a known kind is noisy, and that an unknown one stays unknown")
	}
	for i := range 3 * maxKinds {
		k.accept(Kind(1e6 + i))
		k.accept(7)
	}
	if k.trusts(7) {
		t.Error("a noisy kind is trusted again, want that it stays noisy while it is in use")
	}
}

func TestKindOf(t *testing.T) {
	kinds := map[Kind]bool{}
	for _, method := range []string{"GET", "POST"} {
		for _, path := range []string{"/", "/a", "/b"} {
			for _, check := range []bool{false, true} {
				kinds[KindOf(method, path, check)] = true
			}
		}
	}
	if len(kinds) != 12 || !kinds[KindOf("GET", "/a", false)] {
		t.Errorf("got %d kinds, want 12", len(kinds))
	}
}
