package outboundauth

import (
	"context"
	"crypto/rand"
	"net/http"
	"testing"
	"time"

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

// refuse does what a request does whose token an upstream refuses, and that is gone when
// another token comes.
func (s *tokenSource) refuse(ctx context.Context, t *token) {
	r := refusalOf(t)
	s.another(ctx, anAddress, r)
	s.settled(r, true, anyToken())
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

var _ testing.TB
