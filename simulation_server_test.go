package outboundauth

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"sort"
	"strconv"
	"sync"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// serverMode is what an authorization server does with a token request that
// begins now.
type serverMode int

const (
	serverServes           serverMode = iota // answers with a token, in its usual time
	serverSlow                               // answers with a token, later
	serverRefuses                            // accepts no connection
	serverResets                             // closes the connection after a while
	serverHangsUntil                         // answers when the phase is over: those who wait get theirs
	serverHangs                              // never answers
	serverUnavailable                        // 503
	serverUnavailableAfter                   // 503 with Retry-After
	serverThrottles                          // 429
	serverThrottlesAfter                     // 429 with Retry-After

	lastMode = serverThrottlesAfter
)

var modeNames = [...]string{
	"serves", "is slow", "refuses connections", "resets connections", "hangs until the phase ends", "hangs",
	"503", "503 with Retry-After", "429", "429 with Retry-After",
}

func (m serverMode) String() string { return modeNames[m] }

// phase is a time in which the server does the same with all requests.
type phase struct {
	from, to time.Duration
	mode     serverMode
	after    time.Duration // slow: the answer; resets: until then; …After: what the server asks for
}

// serverToken is a token as the server knows it.
type serverToken struct {
	value   string
	expires time.Duration // when upstreams begin to refuse it
	shifted time.Duration // when that last changed
}

// simulatedServer is an authorization server, and what upstreams know of its
// tokens. It does the same in each run of a history.
type simulatedServer struct {
	*history
	config simulationConfig
	phases []phase // without gaps, from 0 on
	crowd  *crowd  // whose clients ask the same server; nil for a client that is alone

	rejections []rejection // one after another

	mu     sync.Mutex // guards all fields below
	issued []*serverToken
	secret int // the one that the gateway has
	valid  int // the oldest one that the server accepts
}

func (s *simulatedServer) phaseAt(at time.Duration) phase {
	i := sort.Search(len(s.phases), func(i int) bool { return s.phases[i].from > at })
	return s.phases[i-1]
}

// answerTime is how long the n-th request waits for its answer: 20 % more or less
// than what is usual.
func (s *simulatedServer) answerTime(p phase, n int) time.Duration {
	usual := s.config.answer
	if p.mode == serverSlow {
		usual = p.after
	}
	x := scramble(s.seed<<20 + uint64(n))
	return usual*4/5 + time.Duration(x%uint64(usual*2/5+1))
}

// simulatedUser is a config that uses the source: its requester.
type simulatedUser struct {
	unbound
	*simulatedServer
	n    int
	life lifecycle
}

func (u *simulatedUser) locate(context.Context, redact.Secrets) (*url.URL, error) {
	u.looksWhereToAsk()
	host := fmt.Sprintf("simulated-%d.example", u.seed)
	if u.crowd != nil {
		host = u.crowd.host
	}
	return &url.URL{Scheme: "https", Host: host}, nil
}

func (u *simulatedUser) request(ctx context.Context, _ *url.URL, _ *dpop.Key, _ redact.Secrets) (grant, error) {
	a := u.begin(ctx, u.n, u.phaseAt(u.now()).mode)
	g, err := u.answer(ctx, a)
	if err != nil && ctx.Err() != nil {
		a.outcome = noAnswer
		if u.crowd != nil { // as the product says it
			err = &tokenError{Code: codeTimeout, Description: "no answer"}
		}
	}
	u.end(a, g, err)
	return g, err
}

func (u *simulatedUser) concurrent() bool { return u.config.concurrent }

func (u *simulatedUser) repeatable() bool { return true }

func (u *simulatedUser) fingerprint(context.Context) string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return fmt.Sprint("secret ", u.secret)
}

func (u *simulatedUser) describe() description {
	return description{name: "simulated", ClientID: fmt.Sprint(u.seed)}
}

func (u *simulatedUser) fetched(t *token, err *fetchError, failures int) {
	u.ended(t, err, failures)
}

// answer waits as long as the server does, and returns its answer. It notes in a
// what kind of answer that is.
func (u *simulatedUser) answer(ctx context.Context, a *attemptRecord) (grant, error) {
	p := u.phaseAt(a.start)
	took := u.answerTime(p, a.n)
	if u.crowd != nil {
		if err := pause(ctx, u.crowd.way(u.seed, a.n), nil); err != nil {
			return grant{}, err
		}
		if p.mode == serverServes || p.mode == serverSlow {
			if !u.crowd.enter() {
				a.outcome, a.wait = failedThrottled, u.crowd.after
				return grant{}, (&tokenError{Code: codeHTTPStatus, Status: http.StatusTooManyRequests, retryAfter: a.wait}).classify()
			}
			defer u.crowd.leave()
		}
	}
	switch p.mode {
	case serverRefuses:
		a.outcome = failedTransiently
		return grant{}, &tokenError{Code: codeNetwork, Description: "connection refused"}
	case serverResets:
		a.outcome = failedTransiently
		return grant{}, pause(ctx, p.after, &tokenError{Code: codeNetwork, Description: "connection reset"})
	case serverHangs:
		<-ctx.Done()
		return grant{}, ctx.Err()
	case serverHangsUntil:
		took += p.to - a.start
	case serverUnavailable:
		a.outcome = failedTransiently
		return grant{}, pause(ctx, took, (&tokenError{Code: codeHTTPStatus, Status: http.StatusServiceUnavailable}).classify())
	case serverUnavailableAfter, serverThrottlesAfter, serverThrottles:
		a.outcome, a.wait = failedThrottled, p.after
		status := http.StatusTooManyRequests
		if p.mode == serverUnavailableAfter {
			status = http.StatusServiceUnavailable
		}
		return grant{}, pause(ctx, took, (&tokenError{Code: codeHTTPStatus, Status: status, retryAfter: p.after}).classify())
	default:
	}
	if u.rejected() {
		a.outcome = failedPermanently
		return grant{}, pause(ctx, took, (&tokenError{Code: "invalid_client", Status: http.StatusBadRequest}).classify())
	}
	if err := pause(ctx, took, nil); err != nil {
		return grant{}, err
	}
	a.outcome = gotToken
	value, lifetime := u.issue()
	issued := u.started.Add(a.start)
	return grant{accessToken: value, lifetime: lifetime, issued: issued, took: time.Since(issued)}, nil
}

// pause returns err after d, unless ctx ends before.
func pause(ctx context.Context, d time.Duration, err error) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return err
	case <-ctx.Done():
		return ctx.Err() // as net/http does
	}
}

// issue returns a token and the lifetime that the server names.
func (s *simulatedServer) issue() (value string, lifetime time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	c := s.config
	if n := len(s.issued); n > 0 && c.repeats {
		// A token is repeated in the first 95 % of its life.
		if t := s.issued[n-1]; t.expires-now > c.lifetime/20 {
			switch {
			case !c.names || c.repeatedName == 0:
				return t.value, 0
			case c.repeatedName == 1:
				return t.value, (t.expires - now).Truncate(time.Second)
			default:
				return t.value, c.lifetime
			}
		}
	}
	t := &serverToken{value: fmt.Sprintf("t%d", len(s.issued)+1), expires: now + c.lifetime}
	if c.dies > 0 {
		t.expires = min(t.expires, now+c.dies)
	}
	s.issued = append(s.issued, t)
	if !c.names {
		return t.value, 0
	}
	return t.value, c.lifetime
}

// look returns which token this is, and whether it is good. If it is not, look also says
// since when.
func (s *simulatedServer) look(value string) (n int, good bool, since time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, _ = strconv.Atoi(value[1:])
	t := s.issued[n-1]
	return n, s.now() < t.expires, max(t.expires, t.shifted)
}

// newest returns which token was issued last.
func (s *simulatedServer) newest() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.issued)
}

// shift lets all tokens so far end earlier or later than the server said: its
// clock has jumped.
func (s *simulatedServer) shift(by time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.issued {
		t.expires += by
		t.shifted = s.now()
	}
}

// revoke ends all tokens so far.
func (s *simulatedServer) revoke() { s.shift(-48 * time.Hour) }

// setSecrets says which secret the gateway has from now on, and from which on the
// server accepts them.
func (s *simulatedServer) setSecrets(gateway, server int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secret, s.valid = gateway, server
}

func (s *simulatedServer) rejected() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.secret < s.valid
}
