package e2e

import (
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	keycloakLife = 15 * time.Second // of the tokens in the outage
	keycloakRate = 30               // requests a second
)

// firstSeen holds the tokens that came, each with the time of its first request.
type firstSeen struct {
	mu     sync.Mutex
	tokens []outageToken
}

func (s *firstSeen) note(r *http.Request) {
	value := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.ContainsFunc(s.tokens, func(known outageToken) bool { return known.value == value }) {
		s.tokens = append(s.tokens, outageToken{value: value, answered: time.Now()})
	}
}

func (s *firstSeen) all() []outageToken {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.tokens)
}

// testOutage kills the server while requests come at a constant rate, and starts it again
// only after the end of the token. Nobody does anything else about it.
func (kc *keycloak) testOutage(t *testing.T) {
	c := keycloakOutage
	u := newUpstream(t, kc.realm, c)
	seen := new(firstSeen)
	u.handler = http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen.note(r) })
	r := route{client: c, to: u.serve(t), settings: []string{secretSetting(t, c.Secret), "issuer " + kc.realm.issuer}}
	gw := startGateway(t, gatewayConfig{site: r.String()})
	gw.get(t, "/", http.StatusOK)

	l := &steadyLoad{url: gw.url, rate: keycloakRate, limit: outageWait}
	l.start()
	stop := sync.OnceValue(l.stop)
	t.Cleanup(func() { stop() })
	time.Sleep(time.Second)
	kc.process.kill()
	killed := time.Now()
	time.Sleep(time.Until(kc.expiry(t, u, seen)))
	if err := kc.run(); err != nil {
		t.Fatal(err)
	}
	back := time.Now()
	await(t, "recovery", func() bool { return l.succeededSince(back) })
	time.Sleep(recoveryLimit + time.Second)
	all := stop()

	tokens := seen.all()
	for i := range tokens {
		tokens[i].expires = kc.expires(t, u, tokens[i])
		// The gateway may have got a token before the test noticed that it could.
		if at := tokens[i].answered; at.After(killed) && at.Before(back) {
			back = at
		}
	}
	result := measure(all, tokens, back)
	result.tokenRequests = gw.tokenRequests(t)
	t.Log(result)
	if result.unavoidable == 0 || result.failed == 0 {
		t.Errorf("%d requests failed, and %d had to, want some: the outage was to be longer than the token's life", result.failed, result.unavoidable)
	}
	result.wantRecovery(t)
	odd := slices.DeleteFunc(all.lost(), func(o outcome) bool {
		return o.retryAfter != "" && (o.status == http.StatusServiceUnavailable || o.status == http.StatusGatewayTimeout)
	})
	if len(odd) > 0 {
		t.Errorf("%d requests failed in another way, the first %v before the server was back: got %v, want 503 or 504 with Retry-After",
			len(odd), back.Sub(odd[0].due), odd[0])
	}
	// How long the server takes to start depends on the machine.
	if most := tokenRequestLimit + result.unavoidable/keycloakRate; result.tokenRequests > most {
		t.Errorf("token requests: got %d, want %d at most, one more for each second without a token", result.tokenRequests, most)
	}
	u.wantAccepted(t, len(all)-result.failed+1, "HTTP/1.1")
}

// expires returns when a token ends by the server's clock.
func (kc *keycloak) expires(t *testing.T, u *upstream, token outageToken) time.Time {
	t.Helper()
	claims, err := u.verifier.claims(token.value)
	if err != nil {
		t.Fatal(err)
	}
	return claims.Expiry.Time()
}

// expiry returns when the last token ends that has come so far.
func (kc *keycloak) expiry(t *testing.T, u *upstream, seen *firstSeen) time.Time {
	t.Helper()
	tokens := seen.all()
	if len(tokens) == 0 {
		t.Fatal("upstream has seen no token")
	}
	return kc.expires(t, u, tokens[len(tokens)-1])
}
