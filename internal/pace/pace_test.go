package pace

import (
	"fmt"
	"testing"
	"time"
)

var start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// send sends requests of different clients until the limit is reached.
func send(t *testing.T, s *Server, now time.Time) (sent []*Request) {
	t.Helper()
	for i := range mostLimit + 1 {
		at, ok := s.Next(now)
		if !ok {
			return sent
		}
		if at.After(now) {
			t.Fatalf("Next() = %v after now, want now", at.Sub(now))
		}
		sent = append(sent, s.Send(fmt.Sprint(i), now))
	}
	t.Fatalf("there is no limit")
	return nil
}

func (s *Server) grant(r *Request, now time.Time) {
	s.Release(r)
	s.Granted(true, now)
}

func TestLimitFollowsTheServer(t *testing.T) {
	var s Server
	for _, want := range []int{8, 16, 32, 64, 64} {
		requests := send(t, &s, start)
		if len(requests) != want {
			t.Errorf("%d requests under way, want %d", len(requests), want)
		}
		for _, r := range requests {
			s.grant(r, start)
		}
	}
	requests := send(t, &s, start)
	for _, r := range requests[20:] { // it takes 20
		s.Throttled(r, true, start, start)
		s.Release(r)
	}
	if s.Limit() != 32 {
		t.Errorf("the limit is %d after many 429s, want 32: half, once for all that were sent before", s.Limit())
	}
	for _, r := range requests[:20] {
		s.grant(r, start)
	}
	requests = send(t, &s, start)
	s.Throttled(requests[20], true, start, start)
	for _, r := range requests {
		s.Release(r)
	}
	if s.Limit() != 16 {
		t.Errorf("the limit is %d after another 429, want 16", s.Limit())
	}
	now := start
	for _, want := range []int{16, 17, 18, 19, 20, 20, 20} { // what was too much is not tried for a while
		requests := send(t, &s, now)
		if len(requests) != want {
			t.Errorf("%d requests under way, want %d", len(requests), want)
		}
		for _, r := range requests {
			s.grant(r, now)
		}
	}
	now = now.Add(remembered)
	for _, r := range send(t, &s, now) {
		s.grant(r, now)
	}
	if s.Limit() != 21 {
		t.Errorf("the limit is %d after some time, want 21", s.Limit())
	}
}

// Many 429s leave two at a time.
func TestLimitHasBounds(t *testing.T) {
	var s Server
	for range 10 {
		requests := send(t, &s, start)
		s.Throttled(requests[len(requests)-1], true, start, start)
		for _, r := range requests {
			s.Release(r)
		}
	}
	if s.Limit() != leastLimit {
		t.Errorf("the limit is %d, want %d", s.Limit(), leastLimit)
	}
}

// A server that limits one client says nothing about all together.
func TestLimitOfOneClient(t *testing.T) {
	var s Server
	for range 10 {
		r := s.Send("a", start)
		s.Throttled(r, true, start, start.Add(time.Hour))
		s.Release(r)
	}
	if s.Limit() != firstLimit {
		t.Errorf("the limit is %d, want %d", s.Limit(), firstLimit)
	}
	if at, ok := s.Next(start); !ok || at.After(start) {
		t.Errorf("others wait for %v because of one client", at.Sub(start))
	}
}

// Tokens of a quiet time show nothing about how many requests the server takes at once.
func TestLimitDoesNotGrowAlone(t *testing.T) {
	var s Server
	for range 100 {
		r := s.Send("a", start)
		s.Release(r)
		s.Granted(false, start)
	}
	if s.Limit() != firstLimit {
		t.Errorf("the limit is %d, want %d", s.Limit(), firstLimit)
	}
}

func TestHeldBackByTwoClients(t *testing.T) {
	var s Server
	a, b, c := s.Send("a", start), s.Send("b", start), s.Send("c", start)
	s.Throttled(a, true, start, start.Add(30*time.Second))
	s.Throttled(a, true, start, start.Add(40*time.Second)) // the same one
	if s.HeldBack(start) {
		t.Fatal("held back by one client")
	}
	s.Throttled(b, false, start, start.Add(20*time.Second))
	if !s.HeldBack(start.Add(40*time.Second-1)) || s.HeldBack(start.Add(40*time.Second)) {
		t.Error("want all held back for 40 s")
	}
	if at, ok := s.Next(start); !ok || at != start.Add(time.Second) {
		t.Errorf("the next one is in %v, want one each second", at.Sub(start))
	}
	s.Throttled(c, true, start, start.Add(time.Minute))
	if !s.HeldBack(start.Add(time.Minute - 1)) {
		t.Error("want all held back for a minute")
	}
	if at, _ := s.Next(start.Add(time.Minute)); at != start.Add(time.Minute) {
		t.Errorf("the next one is %v after the end, want at once", at.Sub(start.Add(time.Minute)))
	}
	s.Granted(false, start)
	if s.HeldBack(start) {
		t.Error("held back after a token")
	}
	s.Throttled(a, true, start, start.Add(time.Second))
	s.Throttled(b, true, start.Add(time.Second), start.Add(2*time.Second))
	if s.HeldBack(start.Add(time.Second)) {
		t.Error("held back by two that did not wait at the same time")
	}
	s.Granted(false, start)
	s.Throttled(b, true, start, start.Add(time.Second))
	if s.HeldBack(start) {
		t.Error("held back by what one was told before the last token")
	}
}

func TestInTurnWhileTheServerFails(t *testing.T) {
	var s Server
	a, b := s.Send("a", start), s.Send("b", start)
	s.Failed(a)
	s.Failed(a)
	if s.Failing() {
		t.Fatal("failing because of one client")
	}
	s.Failed(b)
	if at, ok := s.Next(start); !s.Failing() || !ok || at != start.Add(100*time.Millisecond) {
		t.Errorf("the next one is in %v, want ten in a second", at.Sub(start))
	}
	s.Failed(b)
	if !s.Failing() {
		t.Error("want failing until there is a token")
	}
	s.Granted(false, start)
	if at, _ := s.Next(start); s.Failing() || at != start {
		t.Errorf("the next one is in %v after a token, want at once", at.Sub(start))
	}
	s.Failed(b)
	if s.Failing() {
		t.Error("failing because of what was before the token")
	}
}

// A request that got no answer for long gives its slot back, and may end later.
func TestSlotIsGivenBackOnce(t *testing.T) {
	var s Server
	requests := send(t, &s, start)
	s.Release(requests[0])
	s.Release(requests[0])
	if again := send(t, &s, start); len(again) != 1 {
		t.Errorf("%d slots are free, want 1", len(again))
	}
	s.Repeat(requests[0], start)
	s.Release(requests[1])
	if !requests[0].HasSlot() || requests[1].HasSlot() {
		t.Error("want a slot for the first, and none for the second")
	}
	if _, ok := s.Next(start); ok {
		t.Error("a slot is free, and a request was repeated with it")
	}
}
