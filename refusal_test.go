package outboundauth

import (
	"context"
	"crypto/rand"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
	"github.com/outboundauth/caddy-outbound-auth/internal/replay"
	"github.com/outboundauth/caddy-outbound-auth/internal/verdict"
)

// anyToken returns a token like no other.
func anyToken() *token { return &token{value: rand.Text()} }

// refusalOf is the refusal of a request of a kind that nobody has seen before.
func refusalOf(t *token) *refusal {
	kind := verdict.KindOf(http.MethodGet, "/"+rand.Text(), false)
	return &refusal{of: t, Refusal: verdict.Refusal{Kind: kind, Token: t.value}}
}

var anAddress = dialAddress{"tcp", "127.0.0.1:9000"}

// refuse does what a request does whose token an upstream refuses. Another token helps.
func (s *tokenSource) refuse(ctx context.Context, t *token) answer {
	r := refusalOf(t)
	start := time.Now()
	fresh, _ := s.another(ctx, anAddress, r)
	a := answer{waited: time.Since(start)}
	if fresh != nil {
		a.value = fresh.value
		s.settled(r, true, fresh)
	}
	return a
}

// accepts lets an upstream accept a request that was sent now, with the current token.
func (s *tokenSource) accepts(address dialAddress, t *token) {
	if at := s.places.find(address); at != nil {
		s.accepted(at, verdict.Acceptance{Kind: verdict.KindOf(http.MethodGet, "/", false), Token: t.value, Sent: time.Now()})
	}
}

// drop takes the current token out of use, as DELETE /oauth2/clients/<id>/token does.
func (s *tokenSource) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = nil
}

// doubts makes a source doubt its token at an address.
func (s *tokenSource) doubts(address dialAddress) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.places.at(address).doubt(anyToken(), time.Now())
}

func (s *tokenSource) numberOfPlaces() int {
	if s.places.none() {
		return 0
	}
	return len(*s.places.byAddress.Load())
}

// A token that one upstream refuses is good for all others, and at this upstream for all
// requests that can be sent again.
func TestOnlyWhoIsRefusedWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		refused := s.Peek()
		r.setDelay(800 * time.Millisecond)
		var wg sync.WaitGroup
		wg.Go(func() {
			if got, want := s.refuse(t.Context(), refused), (answer{value: "t2", waited: 800 * time.Millisecond}); got != want {
				t.Errorf("who is refused gets %v, want %v", got, want)
			}
		})
		time.Sleep(100 * time.Millisecond)
		expectToken(t, s, "t1", 0)
		sure := func(address dialAddress, value string, most time.Duration) {
			start := time.Now()
			got, waited := s.sure(t.Context(), address, refused)
			if got.value != value || waited != most || time.Since(start) != most {
				t.Errorf("who can't be repeated at %v gets %s after %v, want %s after %v", address, got.value, waited, value, most)
			}
		}
		sure(dialAddress{"tcp", "127.0.0.1:9001"}, "t1", 0)
		sure(anAddress, "t2", 700*time.Millisecond)
		wg.Wait()
		sure(anAddress, "t2", 0) // who got the first one a moment ago
		expectToken(t, s, "t2", 0)
		expectRequests(t, r, 2)
	})
}

func TestWhoCanNotBeRepeatedWaitsForASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		refused := s.Peek()
		r.setFail(outageIn(0, time.Hour).silent(true))
		var wg sync.WaitGroup
		wg.Go(func() { s.refuse(t.Context(), refused) })
		time.Sleep(100 * time.Millisecond)
		if got, waited := s.sure(t.Context(), anAddress, refused); got != refused || waited != time.Second {
			t.Errorf("sure() = %v after %v, want the old token after a second", got.value, waited)
		}
		wg.Wait()
	})
}

// A token was in doubt wrongly. Meanwhile, the next one is in doubt, which is another matter.
func TestWhoCanNotBeRepeatedWaitsForTheNextToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		slow := refusalOf(s.Peek())
		second, _ := s.another(t.Context(), anAddress, slow)
		time.Sleep(time.Second)
		r.setDelay(500 * time.Millisecond)
		var wg sync.WaitGroup
		wg.Go(func() { s.refuse(t.Context(), second) })
		time.Sleep(100 * time.Millisecond)
		s.settled(slow, false, second)
		if got, waited := s.sure(t.Context(), anAddress, second); got.value != "t3" || waited != 400*time.Millisecond {
			t.Errorf("sure() = %s after %v, want t3 when it is there", got.value, waited)
		}
		wg.Wait()
	})
}

// Who is refused waits for a moment while the server is silent, and gets no token then.
// Others don't wait.
func TestRefusedTokenWhileTheServerIsSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		refused := s.Peek()
		r.setFail(outageIn(0, time.Hour).silent(true))
		start := time.Now()
		var wg sync.WaitGroup
		for range 90 {
			wg.Go(func() {
				if got := s.refuse(t.Context(), refused); got.value != "" || got.waited > time.Second {
					t.Errorf("who is refused gets %v, want nothing, after a second", got)
				}
			})
			expectToken(t, s, "t1", 0)
			time.Sleep(100 * time.Millisecond)
		}
		wg.Wait()
		// While there is a valid token, nobody asks again beside the request.
		if got := requestsAfter(r, start); len(got) != 2 {
			t.Errorf("requests after %v, want one beside the first token", got)
		}
	})
}

// A server that has no token is asked again soon while requests are refused.
func TestRefusedTokenWhileTheServerIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		refused := s.Peek()
		o := outageIn(0, time.Minute)
		r.setFail(o.refusing(errTransient))
		for s.refuse(t.Context(), refused).value == "" {
			expectToken(t, s, "t1", 0)
			time.Sleep(10 * time.Millisecond)
			if late := time.Since(o.to); late > maxAskedBackoff {
				t.Fatalf("no other token %v after the outage, want one within %v", late, maxAskedBackoff)
			}
		}
		if got := len(r.requests()); got < 20 || got > 60 {
			t.Errorf("%d token requests in a minute, want one in two seconds", got)
		}
	})
}

// The same, beside an upstream that goes on to serve, with and without noise.
func TestRevocationInAnOutageHealsWithIt(t *testing.T) {
	for _, noise := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := &scriptedRequester{lifetime: 100 * time.Hour}
			s := newTestSource(t, r)
			expectToken(t, s, "t1", 0)
			revoking, serving := dialAddress{"tcp", "a:1"}, dialAddress{"tcp", "b:1"}
			current := s.Peek()
			s.doubts(revoking)
			s.doubts(serving)
			ctx, cancel := context.WithCancel(t.Context())
			serve := func() { s.accepts(serving, current); time.Sleep(100 * time.Millisecond) }
			for range 20 {
				s.accepts(revoking, current)
				serve()
			}
			o := outageIn(0, time.Minute)
			r.setFail(o.refusing(errTransient))
			var all sync.WaitGroup
			all.Go(func() {
				for ctx.Err() == nil {
					serve()
					if noise {
						all.Go(func() { s.another(ctx, serving, refusalOf(current)) })
					}
				}
			})
			for {
				refusal := &refusal{of: current, Refusal: verdict.Refusal{Kind: verdict.KindOf(http.MethodGet, "/", false), Token: current.value}}
				if fresh, _ := s.another(ctx, revoking, refusal); fresh != nil {
					break
				}
				time.Sleep(50 * time.Millisecond)
			}
			if late := time.Since(o.to); late > maxAskedBackoff {
				t.Errorf("noise %v: another token %v after the outage, want it within %v", noise, late, maxAskedBackoff)
			}
			cancel()
			all.Wait()
		})
	}
}

// Nobody sees whether a new token helps a request that is not sent again. So such refusals
// are believed less and less.
func TestNoiseThatCanNotBeRepeated(t *testing.T) {
	for _, invalid := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := &scriptedRequester{lifetime: 100 * time.Hour}
			s := newTestSource(t, r)
			expectToken(t, s, "t1", 0)
			s.doubts(anAddress)
			certain := 0
			for range 3600 {
				s.accepts(anAddress, s.Peek())
				time.Sleep(500 * time.Millisecond)
				refusal := refusalOf(s.Peek())
				refusal.InvalidToken = invalid
				if !invalid {
					refusal.Kind = verdict.KindOf(http.MethodGet, "/", false) // as in accepts
				}
				if s.anotherLater(anAddress, refusal) {
					certain++
				}
				time.Sleep(500 * time.Millisecond)
			}
			if n := len(r.requests()); n > 130 || certain > 3 {
				t.Errorf("invalid_token %v: %d token requests in an hour, %d of them on strong evidence, want 130 and 3 at most", invalid, n, certain)
			}
		})
	}
}

// It heals all the same.
func TestRevocationWhereNothingCanBeRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: 100 * time.Hour}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		s.doubts(anAddress)
		kind := verdict.KindOf(http.MethodGet, "/", false)
		for range 5 {
			for range 100 {
				s.accepts(anAddress, s.Peek())
				time.Sleep(time.Second)
			}
			revoked, since := s.Peek(), time.Now()
			for s.Peek() == revoked {
				s.anotherLater(anAddress, &refusal{of: revoked, Refusal: verdict.Refusal{Kind: kind, Token: revoked.value}})
				time.Sleep(time.Second)
				synctest.Wait()
			}
			if took := time.Since(since); took > 10*time.Second { // 8 distances, and a little
				t.Errorf("another token after %v, want it within 10 s", took)
			}
		}
	})
}

// A call that ends with UNAUTHENTICATED was not accepted, even if retry_on does not have
// it.
func TestRefusedCallIsNoWitness(t *testing.T) {
	const dial = "127.0.0.1:9000"
	b := newBlock(newTestClient(t, Credentials{TokenURL: testTokenURL, ClientID: newName(), ClientSecret: "s", RetryOn: []int{401}}, nil))
	tok := anyToken()
	b.source.current = tok
	b.source.doubts(dialAddress{"tcp", dial})
	for _, status := range []string{"16", "0"} {
		res := &http.Response{
			StatusCode: http.StatusOK, ContentLength: -1, Body: io.NopCloser(strings.NewReader("")),
			Header: http.Header{"Content-Type": {"application/grpc"}}, Trailer: http.Header{"Grpc-Status": {status}},
		}
		b.heard(b.sending(benchRequest(upstreamContext(t, dial), "http://"+dial+"/svc/M"), tok, false), res)
		_, _ = io.Copy(io.Discard, res.Body)
		if got := b.source.places.find(dialAddress{"tcp", dial}).Served(); got != (status == "0") {
			t.Errorf("grpc-status %s: accepted: %v", status, got)
		}
	}
}

// Noise while others are being served is no reason to ask a server often that is down.
func TestNoiseWhileTheServerIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		current := s.Peek()
		r.setFail(outageIn(0, time.Hour).refusing(errTransient))
		var wg sync.WaitGroup
		for range 600 {
			wg.Go(func() { s.refuse(t.Context(), current) })
			time.Sleep(100 * time.Millisecond)
			s.accepts(anAddress, current)
		}
		wg.Wait()
		if got := len(r.requests()); got > 20 {
			t.Errorf("%d token requests in a minute, want 20 at most", got)
		}
	})
}

// A fetch may fail because of a refusal while the token is fresh. The token is renewed in
// time all the same.
func TestFailureWhileTheTokenIsFresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		s.keep()
		r.setFail(outageIn(0, time.Minute).refusing(errTransient))
		s.refuse(t.Context(), s.Peek())
		before := len(r.requests())
		time.Sleep(50 * time.Minute)
		expectRequests(t, r, before+1)
		if got := s.Peek(); got == nil || got.value == "t1" {
			t.Error("the token is not renewed, want that it is")
		}
	})
}

// Who waits for a token that is on its way anyway need not wait for all of it.
func TestRefusalIsRefutedWhileItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		current := s.Peek()
		r.setDelay(2 * time.Second)
		s.mu.Lock()
		s.start(false)
		s.mu.Unlock()
		var wg sync.WaitGroup
		refusal := refusalOf(current)
		wg.Go(func() {
			start := time.Now()
			got, _ := s.another(t.Context(), anAddress, refusal)
			if waited := time.Since(start); got != nil || waited != 300*time.Millisecond {
				t.Errorf("another() = %v after %v, want none when another request was accepted", got, waited)
			}
			if !refusal.isPath || !refusal.news {
				t.Errorf("verdict path: %v, operators are told: %v, want both", refusal.isPath, refusal.news)
			}
		})
		time.Sleep(300 * time.Millisecond)
		s.accepts(anAddress, current)
		wg.Wait()
		time.Sleep(2 * time.Second)
	})
}

// Whatever happens in the same moment, a refusal that was refuted is not sent again.
func TestRefutedRefusalIsNotSentAgain(t *testing.T) {
	fetch := func(s *tokenSource) { s.start(false) }
	grantAnother := func(s *tokenSource) {
		s.succeed(testLife.token(grant{accessToken: "t2", issued: time.Now()}, time.Now()))
	}
	for _, happens := range []func(s *tokenSource){fetch, grantAnother} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestSource(t, &scriptedRequester{lifetime: time.Hour})
			expectToken(t, s, "t1", 0)
			current := s.Peek()
			s.doubts(anAddress)
			s.accepts(anAddress, current)
			s.refuse(t.Context(), current)
			current = s.Peek()
			s.accepts(anAddress, current)
			r := refusalOf(current)
			r.Kind = verdict.KindOf(http.MethodGet, "/", false) // as in accepts: strong evidence
			decide := func() verdict.Decision {
				d, _ := s.decide(anAddress, r, time.Now())
				return d
			}
			s.mu.Lock()
			if d := decide(); d != verdict.Hold {
				t.Errorf("decide() = %d, want that it waits: there was a new token a moment ago", d)
			}
			s.mu.Unlock()
			time.Sleep(time.Millisecond)
			s.accepts(anAddress, current)
			s.mu.Lock()
			defer s.mu.Unlock()
			happens(s)
			if d := decide(); d != verdict.Answer {
				t.Errorf("decide() = %d, want the upstream's answer", d)
			}
		})
	}
}

// In its last part, the token has expired by the upstream's clock.
func TestRefusalInTheReserveIsNoEvidence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Minute}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		refused := s.Peek()
		r.setFail(during(time.Second, time.Hour, errTransient))
		time.Sleep(59 * time.Second)
		ask(t.Context(), s) // the renewal fails
		time.Sleep(300 * time.Millisecond)
		if got := s.refuse(t.Context(), refused); got != (answer{}) {
			t.Errorf("who is refused gets %v, want the upstream's answer at once", got)
		}
		if v, _, _ := s.places.find(anAddress).Status(); v != verdict.Unknown {
			t.Errorf("the verdict is %d, want none", v)
		}
	})
}

func TestServerRepeatsTheRefusedToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, repeating{r})
		expectToken(t, s, "same", 0)
		for range 600 {
			if got := s.refuse(t.Context(), s.Peek()); got.value != "" || got.waited > time.Second {
				t.Fatalf("who is refused gets %v, want no other token", got)
			}
			time.Sleep(time.Second)
		}
		if got := len(r.requests()); got > 12+4*20 {
			t.Errorf("%d token requests in 20 minutes, want 4 a minute at most", got)
		}
	})
}

// A new token that is the old one is of no use, even if that is known before it comes.
func TestServerRepeatsTheTokenOfARefutedRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, repeating{r})
		expectToken(t, s, "same", 0)
		current := s.Peek()
		s.refuse(t.Context(), current)
		s.accepts(anAddress, current)
		r.setDelay(200 * time.Millisecond)
		time.Sleep(time.Minute)
		refusal := refusalOf(current)
		refusal.Kind = verdict.KindOf(http.MethodGet, "/", false)
		var wg sync.WaitGroup
		wg.Go(func() { s.another(t.Context(), anAddress, refusal) })
		time.Sleep(100 * time.Millisecond)
		s.accepts(anAddress, current)
		wg.Wait()
		if s.places.find(anAddress).Suspects(&refusal.Refusal) {
			t.Error("a refusal of this kind is strong evidence still, want that it is noisy")
		}
		if !refusal.isPath {
			t.Error("the verdict is not the path, want that it is")
		}
	})
}

// A fetch that was given up says nothing about the upstream.
func TestRefusalWhoseFetchIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := attachedSource(r)
		expectToken(t, s, "t1", 0)
		s.refuse(t.Context(), s.Peek())
		current := s.Peek()
		s.accepts(anAddress, current)
		time.Sleep(time.Minute)
		r.setFail(outageIn(0, time.Hour).silent(true))
		refusal := refusalOf(current)
		refusal.Kind = verdict.KindOf(http.MethodGet, "/", false)
		var wg sync.WaitGroup
		wg.Go(func() { s.another(t.Context(), anAddress, refusal) })
		time.Sleep(100 * time.Millisecond)
		s.detach(r, func() {}) // the one who waits is the last who needs the fetch
		wg.Wait()
		if !s.places.find(anAddress).Suspects(&refusal.Refusal) {
			t.Error("the kind of request counts as noisy, want that it is strong evidence still")
		}
	})
}

// A token is replaced for those that come next. If no config uses the source, nobody does.
func TestRefusalAfterTheConfigHasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := attachedSource(r)
		expectToken(t, s, "t1", 0)
		s.detach(r, func() {})
		s.anotherLater(anAddress, refusalOf(s.Peek()))
		expectRequests(t, r, 1)
		time.Sleep(afterlife)
	})
}

// repeating grants the same token each time.
type repeating struct{ *scriptedRequester }

func (r repeating) request(ctx context.Context, u *url.URL, key *dpop.Key, granted redact.Secrets) (grant, error) {
	g, err := r.scriptedRequester.request(ctx, u, key, granted)
	g.accessToken = "same"
	return g, err
}

// No caller that goes away leaves anything behind.
func TestRefusedCallersThatLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{lifetime: time.Hour}
		s := newTestSource(t, r)
		expectToken(t, s, "t1", 0)
		s.refuse(t.Context(), s.Peek())
		current := s.Peek()
		s.accepts(anAddress, current)
		r.setDelay(200 * time.Millisecond)
		var wg sync.WaitGroup
		for i := range 1000 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*time.Millisecond)
			defer cancel()
			wg.Go(func() { s.refuse(ctx, current) })
		}
		wg.Wait()
		if got := s.places.find(anAddress).Waiting(); got != 0 {
			t.Errorf("%d refusals are left, want none", got)
		}
	})
}

// What an upstream has made of a token outlives a reload.
func TestPlacesSurviveReloads(t *testing.T) {
	g, auth, up := gateAndFakes(t, "")
	g.get().want(t, http.StatusOK)
	auth.revoke()
	g.get().want(t, http.StatusOK)
	g.load(proxySite(up, auth, "header X-New config"))
	if v, _, _ := theSource(t).places.find(dialAddress{"tcp", up.addr}).Status(); v != verdict.Token {
		t.Errorf("the verdict is %d after a reload, want that it is the token still", v)
	}
}

// A refused health check is sent again, too: its upstream must not be down because of a
// token.
func TestRefusedHealthCheckIsSentAgain(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := startGateway(t, expand(checkedSite, "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", ""))
	eventually(t, func() bool { return g.get().status == http.StatusOK }, "an upstream that is up")
	for range 5 {
		auth.revoke()
		before := len(up.checks())
		eventually(t, func() bool { return len(up.checks()) > before+3 }, "checks")
		time.Sleep(time.Second) // tokens that are refused more often are replaced later
	}
	g.wantNeverDown(t)
}

// An upload that would be refused waits for the token, and one to another upstream does
// not.
func TestUploadWaitsForTheNewToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rig := newVerdictRig(t, rigSettings{takes: 800 * time.Millisecond})
		calls := []*rigCall{
			{at: 100 * time.Millisecond, address: addressA, kind: "GET /", good: true}, // is refused
			{at: 200 * time.Millisecond, address: addressB, kind: "POST /", good: true, upload: true},
			{at: 200 * time.Millisecond, address: addressA, kind: "POST /", good: true, upload: true},
		}
		rig.upstream.server.settings.rule = func(s rigSight) rigJudgement {
			if s.address == addressB {
				return acceptsRequest
			}
			return judgeByToken(s)
		}
		rig.server.revoke()
		rig.play(calls)
		uploaded := 700*time.Millisecond + 2*rigAnswer + replay.MaxPause // it is announced, and nobody answers that
		for i, want := range []time.Duration{800*time.Millisecond + 2*rigAnswer, rigAnswer, uploaded} {
			if c := calls[i]; !c.accepted() || c.took != want {
				t.Errorf("request %d: status %d after %v, want a success after %v", i, c.status, c.took, want)
			}
		}
		if n := len(calls[2].receipts); n != 1 {
			t.Errorf("the upload was sent %d times, want once", n)
		}
	})
}
