package outboundauth

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

const (
	rigTokenTakes = 50 * time.Millisecond // a token request, unless the settings say otherwise
	rigAnswer     = 5 * time.Millisecond  // an upstream
	rigLifetime   = 2 * time.Hour         // longer than a history, so that no token is renewed because of its age
	rigCheckTime  = 5 * time.Second       // the default of health_timeout

	rigTokenPrefix = "token-" // before the number of a token
)

// A verdictRig is the product between an authorization server and upstreams that answer
// as a test wants, without a network. Requests come in by Transport.RoundTrip, as they
// come from a reverse proxy. A rig lives in a bubble of synctest.
type verdictRig struct {
	sites    []*Transport // they share one source
	server   *rigServer
	upstream *rigUpstream
}

// rigSettings are what the tests of a rig want different. The zero settings are those of
// one site with a server that is never in trouble.
type rigSettings struct {
	sites   int           // default: 1
	retryOn []int         // default: that of the product
	takes   time.Duration // by a token request; default: rigTokenTakes
	repeats rigSpan       // when the server answers with the token that it granted last
	down    rigSpan       // when the server answers 503
	hangs   rigSpan       // when the server answers only at the end of the span

	// What the upstreams answer. Default: judgeByToken.
	rule func(rigSight) rigJudgement
	// How they refuse a token that is dead. Default: 401 without a challenge.
	refusal rigRefusal
}

// rigSpan is a time that begins at from, and ends before to.
type rigSpan struct{ from, to time.Duration }

func (s rigSpan) has(at time.Duration) bool { return s.from <= at && at < s.to }

// newVerdictRig makes a rig whose source has its first token. The time of the rig begins
// now, and so does the count of token requests.
func newVerdictRig(t *testing.T, settings rigSettings) *verdictRig {
	t.Helper()
	if settings.rule == nil {
		settings.rule = judgeByToken
	}
	settings.takes = cmp.Or(settings.takes, rigTokenTakes)
	server := &rigServer{settings: settings, started: time.Now()}
	r := &verdictRig{server: server, upstream: &rigUpstream{server}}
	for range max(1, settings.sites) {
		r.sites = append(r.sites, r.newSite(t))
	}
	first := &rigCall{address: "192.0.2.1:443", kind: "GET /first", good: true}
	if r.do(first); !first.accepted() {
		t.Fatalf("the first request ended with %d, %v, want a success", first.status, first.err)
	}
	synctest.Wait()
	server.begin()
	return r
}

// newSite makes a transport with one block, which all upstreams have.
func (r *verdictRig) newSite(t *testing.T) *Transport {
	t.Helper()
	// The name of the test keeps source and queue apart from those of other rigs: each has
	// its own time.
	host := strings.ReplaceAll(strings.ToLower(t.Name()), "/", "-") + ".example"
	cl := newTestClient(t, Credentials{
		Name: "rig", TokenURL: "https://" + host + "/token", ClientID: t.Name(), ClientSecret: "secret", RetryOn: r.server.settings.retryOn,
	}, r.server)
	cl.start()
	site := &Transport{
		HTTPTransport: &reverseproxy.HTTPTransport{Transport: new(http.Transport)},
		others:        route{block: newBlock(cl)},
		plaintext:     true,
		logger:        zap.NewNop(),
	}
	site.others.fields(&site.reserved)
	site.reserved.add(defaultBearerField)
	site.health.read(new(reverseproxy.ActiveHealthChecks), 1)
	site.HTTPTransport.Transport.RegisterProtocol("stub", r.upstream)
	return site
}

// A rigCall is one request of the reverse proxy, and how it ended.
type rigCall struct {
	at      time.Duration
	site    int
	address string
	kind    string     // method and path
	good    bool       // it is accepted with a good token
	check   bool       // it is an active health check
	refusal rigRefusal // of the request; default: 401 without a challenge

	upload bool          // it has a body that is too long to be sent again
	leaves time.Duration // so long after it came, its client goes away; 0: never
	slow   time.Duration // how much longer the upstream takes for it

	receipts []rigReceipt // what the upstream got, in this order
	status   int          // 0: there was no answer
	err      error
	took     time.Duration
}

// rigRefusal is how an upstream says no.
type rigRefusal struct {
	status    int
	challenge string // WWW-Authenticate
}

// accepted reports whether the client got what it wanted.
func (c *rigCall) accepted() bool { return c.status/100 == 2 }

// lost reports whether a good request ended without success although the upstream would
// have accepted it with a good token.
func (c *rigCall) lost() bool { return c.good && !c.accepted() && !c.refusedByUpstream() }

// refusedByUpstream reports whether the upstream refused the request and not its token.
func (c *rigCall) refusedByUpstream() bool {
	n := len(c.receipts)
	return n > 0 && c.receipts[n-1].judgement == refusesRequest
}

// now is the time since the rig began.
func (r *verdictRig) now() time.Duration { return r.server.now() }

// play makes all calls, each at its time, and waits until they have ended. The calls are
// in the order of their times.
func (r *verdictRig) play(calls []*rigCall) {
	var all sync.WaitGroup
	for _, c := range calls {
		time.Sleep(c.at - r.now())
		all.Go(func() { r.do(c) })
	}
	all.Wait()
}

// do makes a call, and waits until it has ended.
func (r *verdictRig) do(c *rigCall) {
	ctx, cancel := c.context()
	defer cancel()
	began := time.Now()
	res, err := r.sites[c.site].RoundTrip(c.request(ctx))
	c.took = time.Since(began)
	if err != nil {
		c.err = err
		return
	}
	c.status = res.StatusCode
	io.Copy(io.Discard, res.Body)
	res.Body.Close()
}

type rigCallKey struct{}

// context is the context that the reverse proxy gives the request. It also leads the
// upstream to the call.
func (c *rigCall) context() (context.Context, context.CancelFunc) {
	ctx := context.WithValue(context.Background(), rigCallKey{}, c)
	host, port, _ := net.SplitHostPort(c.address)
	ctx = context.WithValue(ctx, dialInfoKey, reverseproxy.DialInfo{Network: "tcp", Address: c.address, Host: host, Port: port})
	ctx = context.WithValue(ctx, caddy.ReplacerCtxKey, caddy.NewReplacer())
	if c.check {
		return context.WithTimeout(ctx, rigCheckTime)
	}
	ctx, cancel := context.WithCancel(context.WithValue(ctx, caddyhttp.VarsCtxKey, make(map[string]any)))
	if c.leaves > 0 {
		time.AfterFunc(c.leaves, cancel)
	}
	return ctx, cancel
}

func (c *rigCall) request(ctx context.Context) *http.Request {
	method, path, _ := strings.Cut(c.kind, " ")
	req := &http.Request{
		Method: method,
		URL:    &url.URL{Scheme: "stub", Host: c.address, Path: path},
		Host:   c.address,
		Header: make(http.Header),
		Proto:  "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	if c.upload {
		body := strings.Repeat("x", 2*defaultReplayBody)
		req.Body, req.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
	} else if method == http.MethodPost {
		const body = `{"amount":1}`
		req.Body, req.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
	}
	return req.WithContext(ctx)
}

// rigServer is an authorization server. It knows which of its tokens are still good.
type rigServer struct {
	settings rigSettings

	mu       sync.Mutex // guards all fields below
	started  time.Time
	asked    []time.Duration // when the token requests came
	underWay []time.Duration // when those came that have no answer yet
	granted  []*rigToken
	revoked  int // so many of the first tokens are revoked
}

// rigToken is a token as the server knows it.
type rigToken struct {
	number int
	asked  time.Duration // when the first token request came that was under way then
	born   time.Duration
}

func (s *rigServer) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.started, s.asked = time.Now(), nil
}

func (s *rigServer) now() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.started)
}

// revoke revokes all tokens that were granted until now.
func (s *rigServer) revoke() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revoked = len(s.granted)
}

// requests returns when the token requests came.
func (s *rigServer) requests() []time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

// tokens returns all tokens that were granted, by their numbers.
func (s *rigServer) tokens() []*rigToken {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.granted)
}

// RoundTrip implements http.RoundTripper.
func (s *rigServer) RoundTrip(req *http.Request) (*http.Response, error) {
	req.Body.Close()
	at := s.receive()
	defer s.finish(at)
	takes := s.settings.takes
	if s.settings.hangs.has(at) {
		takes = s.settings.hangs.to - at
	}
	if err := pause(req.Context(), takes, nil); err != nil {
		return nil, err
	}
	if s.settings.down.has(at) {
		return rigResponse(req, http.StatusServiceUnavailable, nil, ""), nil
	}
	body := fmt.Sprintf(`{"access_token":"%s%d","token_type":"Bearer","expires_in":%d}`, rigTokenPrefix, s.grant(at), int(rigLifetime.Seconds()))
	return rigResponse(req, http.StatusOK, http.Header{"Content-Type": {"application/json"}}, body), nil
}

// receive notes a token request.
func (s *rigServer) receive() (at time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at = time.Since(s.started)
	s.asked, s.underWay = append(s.asked, at), append(s.underWay, at)
	return at
}

// finish notes the end of a token request.
func (s *rigServer) finish(at time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.Index(s.underWay, at)
	s.underWay = slices.Delete(s.underWay, i, i+1)
}

// grant returns the number of the token that answers a request.
func (s *rigServer) grant(asked time.Duration) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.granted); n > 0 && s.settings.repeats.has(asked) {
		return n - 1
	}
	s.granted = append(s.granted, &rigToken{len(s.granted), s.underWay[0], time.Since(s.started)})
	return len(s.granted) - 1
}

// look returns the token of a request, and whether the token is good. Without a token of
// this server, tok is nil.
func (s *rigServer) look(header http.Header) (tok *rigToken, alive bool) {
	value, _ := strings.CutPrefix(header.Get("Authorization"), "Bearer "+rigTokenPrefix)
	n, err := strconv.Atoi(value)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil || n >= len(s.granted) {
		return nil, false
	}
	return s.granted[n], n >= s.revoked
}

// rigUpstream is all upstreams.
type rigUpstream struct{ server *rigServer }

// rigJudgement is what an upstream makes of a request.
type rigJudgement int

const (
	acceptsRequest rigJudgement = iota
	refusesRequest              // whatever its token
	refusesToken
)

// rigSight is a request as its upstream sees it.
type rigSight struct {
	*rigCall
	at    time.Duration // when the upstream answers
	token *rigToken     // nil: there is none
	alive bool          // the token is good
}

// age is how old the token is.
func (s rigSight) age() time.Duration { return s.at - s.token.born }

// rigReceipt is a request that an upstream has got.
type rigReceipt struct {
	token     int
	judgement rigJudgement
}

// judgeByToken is the rule of an upstream that refuses dead tokens first, and then the
// requests that are not good.
func judgeByToken(s rigSight) rigJudgement {
	switch {
	case !s.alive:
		return refusesToken
	case !s.good:
		return refusesRequest
	}
	return acceptsRequest
}

// RoundTrip implements http.RoundTripper.
func (u *rigUpstream) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil {
		io.Copy(io.Discard, req.Body)
		req.Body.Close()
	}
	call := req.Context().Value(rigCallKey{}).(*rigCall)
	if err := pause(req.Context(), rigAnswer+call.slow, nil); err != nil {
		return nil, err
	}
	tok, alive := u.server.look(req.Header)
	if tok == nil {
		return nil, fmt.Errorf("the upstream got Authorization %q, want a token of the server", req.Header["Authorization"])
	}
	judgement := u.server.settings.rule(rigSight{call, u.server.now(), tok, alive})
	call.receipts = append(call.receipts, rigReceipt{tok.number, judgement})
	switch judgement {
	case refusesToken:
		return u.server.settings.refusal.response(req), nil
	case refusesRequest:
		return call.refusal.response(req), nil
	default:
		return rigResponse(req, http.StatusNoContent, nil, ""), nil
	}
}

func (r rigRefusal) response(req *http.Request) *http.Response {
	header := make(http.Header)
	if r.challenge != "" {
		header.Set("WWW-Authenticate", r.challenge)
	}
	return rigResponse(req, cmp.Or(r.status, http.StatusUnauthorized), header, "")
}

func rigResponse(req *http.Request, status int, header http.Header, body string) *http.Response {
	if header == nil {
		header = make(http.Header)
	}
	res := &http.Response{
		StatusCode: status, Status: fmt.Sprint(status, " ", http.StatusText(status)),
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: header, Body: http.NoBody, Request: req,
	}
	if body != "" {
		res.Body, res.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
	}
	return res
}
