// Tests against servers that want proofs of possession.

package outboundauth

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpoptest"
	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
)

// A prover is an authorization server and an API, both on one address, that want proofs of
// possession (RFC 9449). They check all that they are sent.
type prover struct {
	*httptest.Server
	tokens, api dpoptest.Server

	mu          sync.Mutex
	nonces      map[string]string // guarded by mu, as all below: what the token endpoint and the API want, "" for nothing
	bound       map[string]string // thumbprint by token
	repeats     bool              // one token for all requests
	tokenType   string
	next        string       // the API's next nonce, which it also accepts; "" if it names none
	asked       []url.Values // the token requests
	sent        int          // requests to the API
	challenged  int          // how often a nonce was missing
	refused     []error      // what else was wrong with proofs
	rejects     bool         // the API accepts no proof
	rejectsNext bool         // it accepts none with a good token
	anyToken    bool         // the API accepts the tokens of another server
	unbound     bool         // the token endpoint wants no proof
	secrets     []string     // proofs and nonces
}

const (
	tokenNonce = "canary-nonce-of-the-token-endpoint"
	apiNonce   = "canary-nonce-of-the-api"
)

func newProver(t *testing.T) *prover {
	t.Helper()
	p := &prover{nonces: make(map[string]string), bound: make(map[string]string), tokenType: "DPoP"}
	p.tokens.Accepts = func(nonce string) bool { return p.accepts("/token", nonce) }
	p.api.Accepts = func(nonce string) bool { return p.accepts("/", nonce) }
	p.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			p.token(w, r)
			return
		}
		p.call(w, r)
	}))
	p.Config.ErrorLog = discardLog
	p.Config.Protocols = new(http.Protocols)
	p.Config.Protocols.SetHTTP1(true)
	p.Config.Protocols.SetUnencryptedHTTP2(true)
	p.Start()
	t.Cleanup(func() { p.CloseClientConnections(); p.Close() })
	return p
}

// with changes what is guarded.
func (p *prover) with(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
}

// demand sets the nonces that are wanted from now on.
func (p *prover) demand(token, api string) {
	p.with(func() {
		p.nonces["/token"], p.nonces["/"] = token, api
		p.secrets = append(p.secrets, token, api)
	})
}

func (p *prover) accepts(at, nonce string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return nonce == p.nonces[at] || (at == "/" && p.next != "" && nonce == p.next)
}

// check checks the proof of a request. It returns the error code if it is not good.
func (p *prover) check(w http.ResponseWriter, r *http.Request, s *dpoptest.Server, at, token string) (thumbprint, code string) {
	proof, err := s.Check(r, token)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.secrets = append(p.secrets, r.Header["Dpop"]...)
	if nonce := p.nonces[at]; at == "/" && p.next != "" {
		w.Header().Set("DPoP-Nonce", p.next)
	} else if nonce != "" {
		w.Header().Set("DPoP-Nonce", nonce)
	}
	switch {
	case errors.Is(err, dpoptest.ErrNonce):
		p.challenged++
		return "", "use_dpop_nonce"
	case err != nil:
		p.refused = append(p.refused, fmt.Errorf("%s %s: %w", r.Method, r.RequestURI, err))
		return "", "invalid_dpop_proof"
	}
	return proof.Thumbprint, ""
}

func (p *prover) token(w http.ResponseWriter, r *http.Request) {
	_ = r.ParseForm()
	var thumbprint, code string
	if !p.unbound { // which does not change once it is used
		thumbprint, code = p.check(w, r, &p.tokens, "/token", "")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = append(p.asked, r.PostForm)
	if code != "" {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `{"error":%q,"error_description":"not %s"}`, code, r.Header.Get("DPoP"))
		return
	}
	token := fmt.Sprintf("canary-token-%d", len(p.bound)+1)
	if p.repeats {
		token = "canary-token-1"
	}
	if p.bound[token] == "" {
		p.bound[token] = thumbprint
	}
	fmt.Fprintf(w, `{"access_token":%q,"token_type":%q,"expires_in":3600}`, token, p.tokenType)
}

func (p *prover) call(w http.ResponseWriter, r *http.Request) {
	var body []byte
	if r.Header.Get("Expect") == "" {
		body, _ = io.ReadAll(r.Body)
	}
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "DPoP ")
	thumbprint, code := p.check(w, r, &p.api, "/", token)
	if code == "" {
		rest, _ := io.ReadAll(r.Body)
		body = append(body, rest...)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sent++
	switch {
	case code == "" && p.rejects:
		code = "invalid_dpop_proof"
	case code == "" && p.rejectsNext && p.bound[token] == thumbprint:
		code = "invalid_dpop_proof"
	case code == "" && p.bound[token] != thumbprint && !p.anyToken:
		code = "invalid_token"
	}
	if code != "" {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`DPoP algs="ES256 EdDSA", error=%q`, code))
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	if r.Header.Get("Upgrade") == "echo" {
		upgradeAndEcho(w)
		return
	}
	fmt.Fprintf(w, "%s of %d bytes", r.Method, len(body))
}

// upgradeAndEcho upgrades a connection, and sends a line back.
func upgradeAndEcho(w http.ResponseWriter) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	_ = rw.Flush()
	line, _ := rw.ReadString('\n')
	_, _ = io.WriteString(conn, line)
}

// revoke makes all tokens worthless.
func (p *prover) revoke() { p.with(func() { clear(p.bound); p.bound["revoked"] = "x" }) }

// want fails the test unless there were so many requests, and no proof was refused.
func (p *prover) want(t *testing.T, asked, sent, challenged int) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.asked) != asked || p.sent != sent || p.challenged != challenged || len(p.refused) > 0 {
		t.Errorf("got %d token requests, %d to the API, %d challenges, refused %v; want %d, %d, %d and none",
			len(p.asked), p.sent, p.challenged, p.refused, asked, sent, challenged)
	}
}

// site is a site with this gateway to the API. settings are those of the transport, and
// checks those of reverse_proxy.
func (p *prover) site(settings, checks string) string {
	return expand(`reverse_proxy $UP {
		$CHECKS
		transport oauth2 {
			token_url $URL/token
			client_id gateway
			$SETTINGS
		}
	}`, "$UP", p.Listener.Addr().String(), "$URL", p.URL, "$CHECKS", checks, "$SETTINGS", settings)
}

const provingSettings = "client_secret canary-secret\ndpop"

func TestTokensAreBoundToAKey(t *testing.T) {
	for _, settings := range []string{"dpop", "dpop ES256", "dpop EdDSA", "dpop\nauth_method client_secret_post", "dpop\nbearer_header Authorization dpop"} {
		t.Run(settings, func(t *testing.T) {
			p := newProver(t)
			g := startGateway(t, p.site("client_secret canary-secret\n"+settings, ""))
			for range 3 {
				g.get().want(t, http.StatusOK)
			}
			p.want(t, 1, 3, 0)
		})
	}
}

// RFC 9449 §8 and §9: a challenge is answered at once, and its nonce is kept.
func TestNonceIsLearned(t *testing.T) {
	p := newProver(t)
	p.demand(tokenNonce, apiNonce)
	g := startGateway(t, p.site(provingSettings, ""))
	for range 3 {
		if r := g.get().want(t, http.StatusOK); r.header["Dpop-Nonce"] != nil {
			t.Errorf("the caller gets DPoP-Nonce %v, want none", r.header["Dpop-Nonce"])
		}
	}
	p.want(t, 2, 4, 2)
	// The nonce of a good answer is kept, too.
	p.with(func() { p.next = apiNonce + "-1" })
	g.get().want(t, http.StatusOK)
	p.with(func() { p.nonces["/"], p.next = p.next, "" })
	g.get().want(t, http.StatusOK)
	p.want(t, 2, 6, 2)
	p.demand(tokenNonce+"-2", apiNonce+"-2")
	for _, r := range g.burst(20) {
		r.want(t, http.StatusOK)
	}
	p.demand("", apiNonce+"-3")
	g.send(http.MethodPost, "/a", strings.NewReader(strings.Repeat("x", defaultReplayBody))).want(t, http.StatusOK)
	if failures := g.logged(`"level":"error"`); len(failures) > 0 {
		t.Errorf("got errors in the log: %s", failures)
	}
}

// A challenge is neither a failure nor a reason to replace the token.
func TestChallengeCountsAsNoFailure(t *testing.T) {
	p := newProver(t)
	p.demand(tokenNonce, apiNonce)
	g := startGateway(t, p.site(provingSettings+"\nname "+t.Name(), ""))
	g.get().want(t, http.StatusOK)
	requests, tokens, refusals := countersOf(t.Name()).counts()
	if requests["fetched"]+requests["fresh"] != 1 || tokens["ok"] != 1 || len(tokens) != 1 {
		t.Errorf("got requests %v, token requests %v, want one of each", requests, tokens)
	}
	if refusals["proof"] != 1 {
		t.Errorf("got refusals %v, want one of a proof", refusals)
	}
	delete(refusals, "proof")
	for outcome, n := range refusals {
		if n != 0 {
			t.Errorf("got %d refusals that ended with %s, want none", n, outcome)
		}
	}
}

// The proof is for the URL that the upstream sees.
func TestProofIsForTheURLThatTheUpstreamSees(t *testing.T) {
	p := newProver(t)
	p.demand("", apiNonce)
	for name, test := range map[string]struct{ before, checks string }{
		"as it comes":        {"", ""},
		"another host":       {"", "header_up Host api.example.com"},
		"the upstream":       {"", "header_up Host {upstream_hostport}"},
		"rewritten":          {"rewrite * /api{uri}", ""},
		"without its prefix": {"uri strip_prefix /a", ""},
		"another method":     {"", "method PUT"},
		"rewritten by proxy": {"", "rewrite /v2{uri}"},
	} {
		t.Run(name, func(t *testing.T) {
			g := startGateway(t, test.before+"\n"+p.site(provingSettings, test.checks))
			for _, path := range []string{"/", "/a", "/a?b=c", "/a/?", "//a//b", "/a%2Fb", "/a%3Fb%23", "/a/../b", "/%C3%A4%20", "/a%20", "/a;b=c,d", "/!$&'()*+", "/a%5Bb%5D"} {
				g.send(http.MethodGet, path, nil, "Host", "Gateway.example.com").want(t, http.StatusOK)
			}
			g.send(http.MethodPost, "/a", strings.NewReader("body")).want(t, http.StatusOK)
		})
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.refused) > 0 {
		t.Errorf("proofs were refused: %v", p.refused)
	}
}

// Each address has its own nonces, and each try its own proof.
func TestNewProofForEachUpstream(t *testing.T) {
	p, other := newProver(t), newProver(t)
	p.demand(tokenNonce, apiNonce)
	other.demand("", apiNonce+"-of-another")
	other.with(func() { other.anyToken = true })
	to := strings.Join([]string{heldAddress(t), p.Listener.Addr().String(), other.Listener.Addr().String()}, " ")
	g := startGateway(t, strings.Replace(p.site(provingSettings, "lb_policy round_robin\nlb_retries 3"),
		p.Listener.Addr().String()+" {", to+" {", 1))
	for range 12 {
		g.send(http.MethodPost, "/", strings.NewReader("body")).want(t, http.StatusOK)
	}
	for _, api := range []*prover{p, other} {
		api.mu.Lock()
		if api.sent < 5 || len(api.refused) > 0 {
			t.Errorf("got %d requests, refused %v, want several and none", api.sent, api.refused)
		}
		api.mu.Unlock()
	}
	if other.challenged != 1 || p.challenged != 2 {
		t.Errorf("got %d and %d challenges, want one of each nonce", other.challenged, p.challenged)
	}
}

// An upgrade is a GET until the upstream has accepted it.
func TestUpgradeIsProved(t *testing.T) {
	p := newProver(t)
	p.demand("", apiNonce)
	g := startGateway(t, p.site(provingSettings, ""))
	conn, r := g.upgrade()
	_, _ = io.WriteString(conn, "line\n")
	if got, err := r.ReadString('\n'); got != "line\n" {
		t.Errorf("got %q, err %v, want the line back", got, err)
	}
	p.want(t, 1, 2, 1)
}

func TestProofOverHTTP2(t *testing.T) {
	p := newProver(t)
	p.demand("", apiNonce)
	g := startGateway(t, strings.Replace(p.site(provingSettings, "header_up Host {upstream_hostport}"), "reverse_proxy ", "reverse_proxy h2c://", 1))
	for _, path := range []string{"/a?b", "//a%2Fb", "/%C3%A4%20"} {
		g.send(http.MethodPost, path, strings.NewReader("body")).want(t, http.StatusOK)
	}
	p.want(t, 1, 4, 1)
}

// A body that can't be sent again brings the nonce for the next request.
func TestLargeBodyBeforeTheNonceIsKnown(t *testing.T) {
	p := newProver(t)
	p.demand("", apiNonce)
	g := startGateway(t, p.site(provingSettings, ""))
	large := bytes.Repeat([]byte("x"), 4*defaultReplayBody)
	r := g.send(http.MethodPost, "/", bytes.NewReader(large)).want(t, http.StatusUnauthorized)
	if r.header["Dpop-Nonce"] != nil {
		t.Error("the caller gets DPoP-Nonce")
	}
	if r := g.send(http.MethodPost, "/", bytes.NewReader(large)).want(t, http.StatusOK); r.body != fmt.Sprintf("POST of %d bytes", len(large)) {
		t.Errorf("got %q", r.body)
	}
	p.want(t, 1, 2, 1)
}

// A nonce may live shorter than it takes until the next large body comes. So that is announced.
func TestLargeBodyIsAnnouncedAfterAChallenge(t *testing.T) {
	for _, settings := range []string{provingSettings, provingSettings + "\nretry_on off"} {
		p := newProver(t)
		p.demand("", apiNonce)
		g, name := newOperableGateway(t), newName()
		g.load(p.site(settings+"\nname "+name, ""))
		large := make([]byte, 4*defaultReplayBody)
		g.send(http.MethodPost, "/", bytes.NewReader(large)).want(t, http.StatusUnauthorized)
		p.demand("", apiNonce+"-2")
		g.send(http.MethodPost, "/", bytes.NewReader(large)).want(t, http.StatusOK)
		p.want(t, 1, 3, 2)
		g.scrape().of(name).want(t, series{
			`rejections_total{outcome="not_repeatable"}`: 1, `rejections_total{outcome="proof"}`: 1, `rejections_total{outcome="proof_refused"}`: 0,
		})
	}
}

// retry_on says what follows a refused token. A challenge refuses none.
func TestChallengeWithRetryOnOff(t *testing.T) {
	p := newProver(t)
	p.demand("", apiNonce)
	g := startGateway(t, p.site(provingSettings+"\nretry_on off\nreplay_body 100KiB", ""))
	g.send(http.MethodPost, "/", bytes.NewReader(make([]byte, 100<<10))).want(t, http.StatusOK)
	p.want(t, 1, 2, 1)
	p.revoke()
	g.get().want(t, http.StatusUnauthorized)
	p.want(t, 1, 3, 1)
}

// A request is sent three times at most: with a proof, with another one, and with another
// token, in any order.
func TestRevokedTokenAndNewNonce(t *testing.T) {
	for name, body := range map[string][]byte{"no body": nil, "body": []byte("body"), "as much as is kept": make([]byte, defaultReplayBody)} {
		t.Run(name, func(t *testing.T) {
			p := newProver(t)
			p.demand("", apiNonce)
			g := startGateway(t, p.site(provingSettings, ""))
			g.get().want(t, http.StatusOK)
			p.want(t, 1, 2, 1)
			p.demand("", apiNonce+"-2")
			p.revoke()
			if r := g.send(http.MethodPut, "/", bytes.NewReader(body)).want(t, http.StatusOK); r.body != fmt.Sprintf("PUT of %d bytes", len(body)) {
				t.Errorf("got %q, want all of the body", r.body)
			}
			p.want(t, 2, 5, 2)
		})
	}
}

// An upstream that accepts no proof gets two for each request. The token is not replaced.
func TestUpstreamThatRefusesEveryProof(t *testing.T) {
	p := newProver(t)
	p.with(func() { p.rejects = true })
	g, name := newOperableGateway(t), newName()
	g.load(p.site(provingSettings+"\nname "+name, ""))
	const warning = "refuses the proofs of dpop"
	refused := func(n int) {
		t.Helper()
		for range n {
			g.send(http.MethodGet, "/a//b?query", nil).want(t, http.StatusUnauthorized)
		}
	}
	refused(2)
	p.with(func() { p.rejects = false })
	g.get().want(t, http.StatusOK)
	p.with(func() { p.rejects = true })
	refused(2)
	if lines := g.logged(warning); len(lines) > 0 {
		t.Errorf("got %s, want no warning of what passes", lines)
	}
	refused(5)
	p.want(t, 1, 2*9+1, 0)
	lines := g.logged(warning)
	if len(lines) != 1 || !strings.Contains(lines[0], `"htu":"http://`+g.addr+`/a//b"`) || !strings.Contains(lines[0], `"htm":"GET"`) {
		t.Errorf("got %d warnings, want one that says what was proved: %s", len(lines), lines)
	}
	g.scrape().of(name).want(t, series{
		`rejections_total{outcome="proof"}`: 9, `rejections_total{outcome="proof_refused"}`: 9, `invalidated_tokens_total`: 0,
	})
}

// The log says what the upstream says: it wants another algorithm, or bound tokens at all.
func TestUpstreamSaysWhatItWants(t *testing.T) {
	for _, test := range []struct{ settings, challenge, want string }{
		{"dpop EdDSA", `DPoP error="invalid_dpop_proof", algs="ES256 RS256"`, "it does not list the algorithm of dpop; set another"},
		{"dpop EdDSA", `DPoP error="invalid_dpop_proof", algs="ES256 EdDSA"`, "check that it sees the same URL"},
		{"dpop EdDSA", `DPoP error="use_dpop_nonce"`, "it does not accept the nonce that it sends, or sends none"},
		{"dpop EdDSA", `Bearer error="invalid_token", DPoP error="use_dpop_nonce"`, "it does not accept the nonce that it sends, or sends none"},
		{"", `DPoP error="invalid_token", algs="ES256"`, "wants tokens that are bound to a key: add dpop"},
		{"", `DPoP algs="ES256"`, "wants tokens that are bound to a key: add dpop"},
		{"", `Bearer, DPoP algs="ES256"`, ""},
		{"", `Basic realm="DPoP"`, ""},
	} {
		p := newProver(t)
		up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", test.challenge)
			w.WriteHeader(http.StatusUnauthorized)
		}))
		t.Cleanup(up.Close)
		p.with(func() {
			if test.settings == "" {
				p.tokenType, p.unbound = "Bearer", true
			}
		})
		g := startGateway(t, strings.Replace(p.site("client_secret canary-secret\n"+test.settings, ""), p.Listener.Addr().String(), up.Listener.Addr().String(), 1))
		for range 6 {
			g.get().want(t, http.StatusUnauthorized)
		}
		lines := append(g.logged("proofs of dpop"), g.logged("add dpop")...)
		if (len(lines) == 0) != (test.want == "") || (test.want != "" && (len(lines) != 1 || !strings.Contains(lines[0], test.want))) {
			t.Errorf("%q, %s: got %s, want %q", test.settings, test.challenge, lines, test.want)
		}
	}
}

// Without dpop, a header of this name is the operator's own, and may be a secret.
func TestOwnHeaderIsNotExplainedAsAProof(t *testing.T) {
	own := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"canary-claim"}`)) + ".c2ln"
	p := newPublisher("")
	p.publish(tokenPlace, page(http.StatusOK, goodAnswer))
	got, report := explained(t, "token_url "+tokenPlace+"\nclient_id gateway\nclient_secret "+canarySecret+"\ntoken_request_header DPoP "+own+"\n", p)
	if strings.Contains(got, "canary-claim") || !strings.Contains(got, "  Dpop: …\n") || report.Error != nil {
		t.Errorf("got the error %v and\n%s\nwant nothing of the header", report.Error, got)
	}
}

// RFC 9449 knows no calls, but their servers want nonces as well. A challenge says nothing about
// the token, before the call or at its end.
func TestCallsAreProved(t *testing.T) {
	for name, atEnd := range map[string]bool{"trailers only": false, "in trailers": true} {
		t.Run(name, func(t *testing.T) {
			const nonces = 5
			p := newProver(t)
			var nonce atomic.Pointer[string]
			rest := p.Config.Handler
			p.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/token" {
					rest.ServeHTTP(w, r)
					return
				}
				_, _ = io.Copy(io.Discard, r.Body)
				status := "0"
				if proof, err := dpoptest.Parse(r.Header.Get("DPoP")); err != nil || proof.Claims["nonce"] != *nonce.Load() {
					status = "16"
					w.Header().Set("WWW-Authenticate", `DPoP error="use_dpop_nonce"`)
					w.Header().Set("DPoP-Nonce", *nonce.Load())
				}
				if !atEnd {
					endCall(w, r, "application/grpc", status)
					return
				}
				w.Header().Set("Content-Type", "application/grpc")
				w.WriteHeader(http.StatusOK)
				_ = http.NewResponseController(w).Flush()
				w.Header().Set(http.TrailerPrefix+"Grpc-Status", status)
			})
			g, client := newOperableGateway(t), newName()
			g.global = "servers {\nprotocols h1 h2c\n}"
			g.load(strings.Replace(p.site(provingSettings+"\nname "+client, ""), "reverse_proxy ", "reverse_proxy h2c://", 1))
			protocols := new(http.Protocols)
			protocols.SetUnencryptedHTTP2(true)
			calls := &http.Transport{Protocols: protocols}
			t.Cleanup(calls.CloseIdleConnections)
			failed := 0
			for i := range nonces {
				next := fmt.Sprint("nonce-", i)
				nonce.Store(&next)
				for range 2 {
					req := newRequest(t, http.MethodPost, "http://"+g.addr+"/x.X/Get", chunked{strings.NewReader("12345")})
					req.Header.Set("Content-Type", "application/grpc")
					req.Header.Set("TE", "trailers")
					res, err := calls.RoundTrip(req)
					if err != nil {
						t.Fatal(err)
					}
					_, _ = io.ReadAll(res.Body)
					_ = res.Body.Close()
					if res.Header.Get("Grpc-Status")+res.Trailer.Get("Grpc-Status") != "0" {
						failed++
					}
				}
			}
			want, proofs := 0, nonces // at the end, it is too late, but the next call has the nonce
			if atEnd {
				want, proofs = nonces, 0
			}
			if failed != want {
				t.Errorf("%d calls failed, want %d", failed, want)
			}
			g.scrape().of(client).want(t, series{
				`token_requests_total{result="ok"}`: 1, `invalidated_tokens_total`: 0,
				`rejections_total{outcome="proof"}`: float64(proofs), `rejections_total{outcome="not_repeatable"}`: 0, `rejections_total{outcome="path"}`: 0,
			})
		})
	}
}

// If the upstream accepts the new token but no proof, nothing has recovered.
func TestNewTokenWithoutAnAcceptedProof(t *testing.T) {
	p := newProver(t)
	g, name := newOperableGateway(t), newName()
	g.load(p.site(provingSettings+"\nname "+name, ""))
	g.get().want(t, http.StatusOK)
	p.revoke()
	p.with(func() { p.rejectsNext = true })
	g.get().want(t, http.StatusUnauthorized)
	g.scrape().of(name).want(t, series{
		`rejections_total{outcome="proof"}`: 1, `rejections_total{outcome="proof_refused"}`: 1, `rejections_total{outcome="recovered"}`: 0,
	})
	p.want(t, 2, 4, 0)
}

// A check may expect the refusal: then nothing is wrong with it.
func TestCheckThatExpectsAChallenge(t *testing.T) {
	p := newProver(t)
	p.demand("", apiNonce)
	up := make(chan string, 1000)
	rest := p.Config.Handler
	p.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/health" {
			rest.ServeHTTP(w, r)
			return
		}
		up <- r.URL.Path
		w.Header().Set("WWW-Authenticate", `DPoP error="invalid_dpop_proof"`)
		w.WriteHeader(http.StatusUnauthorized)
	})
	g := startGateway(t, p.site(provingSettings, "health_uri /health\nhealth_status 401\nhealth_interval 1h"))
	g.get().want(t, http.StatusOK)
	<-up
	g.get().want(t, http.StatusOK)
	if len(up) > 0 {
		t.Errorf("the check was sent %d times more, want once", len(up))
	}
}

// The servers of a cluster may have a nonce each: what one of them demands, the next refuses.
func TestTokenServersWithANonceEach(t *testing.T) {
	asked := 0
	server := formServer(func(w http.ResponseWriter, _ url.Values, r *http.Request) {
		asked++
		if proof, err := dpoptest.Parse(r.Header.Get("DPoP")); err == nil && proof.Claims["nonce"] == "of-another" {
			page(http.StatusOK, strings.Replace(goodAnswer, "Bearer", "DPoP", 1))(w, r)
			return
		}
		w.Header().Set("DPoP-Nonce", []string{"of-one", "of-one", "of-another"}[asked-1])
		refuseWith(w, http.StatusBadRequest, "use_dpop_nonce")
	})
	c := canaryCredentials(tokenPlace)
	c.DPoP = "ES256"
	synctest.Test(t, func(t *testing.T) {
		cl := newTestClient(t, c, server)
		if _, _, err := cl.source.Token(t.Context()); err != nil || asked != 4 {
			t.Errorf("Token() = %v after %d requests, want a token after 4", err, asked)
		}
	})
}

// A server may repeat the proof of a request in the answer to the next one.
func TestLastProofIsNotShown(t *testing.T) {
	var first string
	server := formServer(func(w http.ResponseWriter, _ url.Values, r *http.Request) {
		if first == "" {
			first = r.Header.Get("DPoP")
			w.Header().Set("DPoP-Nonce", tokenNonce)
			refuseWith(w, http.StatusBadRequest, "use_dpop_nonce")
			return
		}
		page(http.StatusBadRequest, `{"error":"invalid_request","error_description":"not `+first[len(first)-60:]+`"}`)(w, r)
	})
	c := canaryCredentials(tokenPlace)
	c.DPoP = "ES256"
	_, err := newTestClient(t, c, server).endpoint.locateAndRequest(t.Context(), nil)
	if failure := wantTokenError(t, err, "invalid_request", true); strings.Contains(failure.Error(), first[len(first)-20:]) {
		t.Errorf("got %v, want nothing of the proof before", failure)
	}
}

// The explanation says what was proved, and why a request was sent again.
func TestProofIsExplained(t *testing.T) {
	p := newPublisher("")
	p.publish(tokenPlace, func(w http.ResponseWriter, r *http.Request) {
		proof, err := dpoptest.Parse(r.Header.Get("DPoP"))
		if err != nil || proof.Claims["nonce"] != tokenNonce {
			w.Header().Set("DPoP-Nonce", tokenNonce)
			refuseWith(w, http.StatusBadRequest, "use_dpop_nonce")
			return
		}
		page(http.StatusOK, strings.Replace(goodAnswer, "Bearer", "DPoP", 1))(w, r)
	})
	got, report := explained(t, "token_url "+tokenPlace+"\nclient_id gateway\nclient_secret "+canarySecret+"\ndpop\n", p)
	for _, want := range []string{
		"  DPoP: …\n    header {\"alg\":\"ES256\",\"jwk\":\"…\",\"typ\":\"dpop+jwt\"}\n    claims {\"htm\":\"POST\",\"htu\":\"https://as.example.com/token\",\"iat\":",
		`"nonce":"…"`,
		"  error: use_dpop_nonce; the server wants its nonce, so the request is sent again\n",
	} {
		if strings.Count(got, want) == 0 {
			t.Errorf("got the error %v and\n%s\nwant %q in it", report.Error, got, want)
		}
	}
	if strings.Contains(got, tokenNonce) || report.Error != nil {
		t.Errorf("got the error %v and\n%s\nwant a token, and no nonce", report.Error, got)
	}
}

// Seen without: all upstreams of an API that wants nonces were down.
func TestHealthChecksProve(t *testing.T) {
	p := newProver(t)
	p.demand(tokenNonce, apiNonce)
	g := startGateway(t, p.site(provingSettings, "health_uri /health\nhealth_interval 200ms\nhealth_timeout 5s"))
	eventually(t, func() bool { p.mu.Lock(); defer p.mu.Unlock(); return p.sent >= 4 }, "health checks")
	for i := range 3 {
		p.demand(tokenNonce, fmt.Sprintf("%s-%d", apiNonce, i))
		var before int
		p.with(func() { before = p.sent })
		eventually(t, func() bool { p.mu.Lock(); defer p.mu.Unlock(); return p.sent >= before+3 }, "health checks")
		// They have brought the nonce, so even a large body is accepted.
		g.send(http.MethodPost, "/", bytes.NewReader(make([]byte, 4*defaultReplayBody))).want(t, http.StatusOK)
	}
	if lines := g.logged("unhealthy"); len(lines) > 0 {
		t.Errorf("the upstream was down: %s", lines)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.refused) > 0 || len(p.bound) != 1 {
		t.Errorf("got %d tokens, refused proofs %v, want one and none", len(p.bound), p.refused)
	}
}

// A caller's proof is for another token.
func TestCallersProofIsRemoved(t *testing.T) {
	g, auth, up := gateAndFakes(t, "")
	g.get("DPoP", "theirs", "dpop", "theirs").want(t, http.StatusOK)
	if got := up.last(t); got.header["Dpop"] != nil || got.bearerOf(auth) != "gateway" {
		t.Errorf("the upstream gets DPoP %v", got.header["Dpop"])
	}
	p := newProver(t)
	g.load(p.site(provingSettings, ""))
	g.get("DPoP", "theirs", "Dpop", "theirs", "DPoP-Nonce", "theirs").want(t, http.StatusOK)
	p.want(t, 1, 1, 0)
}

// A token that is not bound to the key must not be used, nor one that is bound to a key that
// nobody here has.
func TestTypeOfTheTokenHasToFit(t *testing.T) {
	for _, test := range []struct{ settings, tokenType, want, hint string }{
		{"dpop", "Bearer", `granted, but token_type is "Bearer" and not DPoP`, "have the authorization server bind the tokens of this client to a key (DPoP), or remove dpop"},
		{"dpop", "", "granted, but there is no token_type, and it has to be DPoP", "remove dpop"},
		{"", "DPoP", `granted, but token_type is "DPoP" and not Bearer`, "add dpop: the server binds the tokens of this client to a key"},
	} {
		p := newProver(t)
		p.with(func() { p.tokenType = test.tokenType })
		c := Credentials{TokenURL: p.URL + "/token", ClientID: "gateway", ClientSecret: "canary-secret"}
		if test.settings != "" {
			c.DPoP = "ES256"
		} else {
			p.tokens.Accepts = nil
		}
		cl := newTestClient(t, c, bindingAll{p, test.settings == ""})
		_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
		failure := wantTokenError(t, err, codeInvalidResponse, true)
		if failure.Description != test.want || !strings.Contains(failure.Hint, test.hint) {
			t.Errorf("%s, token_type %q: got %q, %q, want %q, %q", test.settings, test.tokenType, failure.Description, failure.Hint, test.want, test.hint)
		}
	}
}

// bindingAll sends requests to a prover. With anyway, the server grants tokens without proofs.
type bindingAll struct {
	*prover
	anyway bool
}

func (b bindingAll) RoundTrip(req *http.Request) (*http.Response, error) {
	if b.anyway {
		return answering(http.StatusOK, `{"access_token":"canary-token","token_type":"DPoP"}`).RoundTrip(req)
	}
	return http.DefaultTransport.RoundTrip(req)
}

// RFC 7523 §3: the server may accept a JWT only once, so the second try has its own.
func TestNewAssertionWithTheNonce(t *testing.T) {
	p := newProver(t)
	p.demand(tokenNonce, "")
	key := string(keytest.PKCS8(t, keytest.Keys["P-256"]()))
	g := startGateway(t, p.site("dpop\nprivate_key "+writeFile(t, t.TempDir()+"/key", []byte(key)), ""))
	g.get().want(t, http.StatusOK)
	p.want(t, 2, 1, 1)
	var seen []any
	for _, form := range p.asked {
		_, payload, _ := strings.Cut(form.Get("client_assertion"), ".")
		payload, _, _ = strings.Cut(payload, ".")
		raw, _ := base64.RawURLEncoding.DecodeString(payload)
		var claims map[string]any
		if err := json.Unmarshal(raw, &claims); err != nil || slices.Contains(seen, claims["jti"]) {
			t.Errorf("got claims %s, err %v, want a jti that was not there before: %v", raw, err, seen)
		}
		seen = append(seen, claims["jti"])
	}
}

// A server that repeats a token has bound it to the first key. Other tokens have their own.
func TestRepeatedTokenKeepsItsKey(t *testing.T) {
	for _, repeats := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			p := &prover{nonces: make(map[string]string), bound: make(map[string]string), tokenType: "DPoP", repeats: repeats}
			c := Credentials{TokenURL: "http://127.0.0.1/token", ClientID: "gateway", ClientSecret: "canary-secret", DPoP: "ES256"}
			cl := newTestClient(t, c, &wire{Handler: http.HandlerFunc(p.token)})
			first, err := cl.source.FetchNow(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(forcedInterval)
			second, err := cl.source.FetchNow(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if first.is(second) != repeats || (first.key == second.key) != repeats || p.bound[second.value] != second.key.Thumbprint() {
				t.Errorf("the server repeats the token: %t; got the same token: %t, with the same key: %t", repeats, first.is(second), first.key == second.key)
			}
		})
	}
}

// Nothing that is shown has a proof, a nonce or a key.
func TestNoProofIsShown(t *testing.T) {
	p := newProver(t)
	p.demand(tokenNonce, apiNonce)
	g := newGateway(t)
	g.admin = heldAddress(t)
	g.load(p.site(provingSettings+"\nname "+t.Name(), ""))
	g.get().want(t, http.StatusOK)
	p.with(func() { p.rejects = true })
	g.get().want(t, http.StatusUnauthorized)
	shown := g.logs()
	for _, path := range []string{"/oauth2/clients", "/metrics", "/config/"} {
		res, err := http.Get("http://" + g.admin + path)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		_ = res.Body.Close()
		shown += string(body)
	}
	if !strings.Contains(shown, `"jkt":"`) || !strings.Contains(shown, `"dpop":"ES256"`) {
		t.Error("the admin API does not show jkt and dpop")
	}
	if !strings.Contains(shown, `caddy_oauth2_token_bound{client="`+t.Name()+`"} 1`) {
		t.Error("the metrics do not show that the token is bound")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, secret := range p.secrets {
		if secret != "" && strings.Contains(shown, secret) {
			t.Errorf("%.30q is shown", secret)
		}
	}
}
