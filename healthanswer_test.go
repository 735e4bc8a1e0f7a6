package outboundauth

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

const noTokenLine = "no token for a health check: the upstream keeps its verdict"

// wantKeptVerdicts waits for checks for which there is no token.
func (g *gateway) wantKeptVerdicts(t *testing.T, up bool) {
	t.Helper()
	before := len(g.logged(noTokenLine))
	eventually(t, func() bool { return len(g.logged(noTokenLine)) >= before+4 }, "checks without a token")
	if got := g.logged(noTokenLine, fmt.Sprintf(`"up":%v`, !up)); len(got) != 0 {
		t.Errorf("got %q, want the other verdict", got[0])
	}
}

// wantNeverDown fails the test if the proxy has logged anything about its checks. It
// logs each that fails, and each upstream that is up again.
func (g *gateway) wantNeverDown(t *testing.T) {
	t.Helper()
	if got := g.logged(`reverse_proxy.health_checker.active"`); len(got) != 0 {
		t.Errorf("got %q, want no check that fails", got[0])
	}
}

// lose makes the source forget its token, as if its time were over.
func (s *tokenSource) lose() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = nil
}

// The time of these checks is over when they are answered, and the proxy reads the body.
func TestUpstreamIsUpWithoutATokenUntilItsFirstCheck(t *testing.T) {
	for _, expects := range []string{
		"", "health_status 2xx", "health_status 4xx", "health_status 418", `health_body "^(ok|fine) [0-9]{3}$"`,
		"health_status 3xx\nhealth_follow_redirects", "health_method POST\nhealth_request_body x",
	} {
		for name, answer := range map[string]func(http.ResponseWriter, tokenRequest) bool{
			"hangs":   func(_ http.ResponseWriter, r tokenRequest) bool { <-r.ctx.Done(); return true },
			"refuses": refusingForLong(http.StatusBadRequest, `{"error":"invalid_client"}`),
		} {
			t.Run(name+" "+expects, func(t *testing.T) {
				auth := newAuthServer(t)
				auth.script(answer)
				up := newUpstream(t, auth)
				g := startGateway(t, expand(checkedSite, "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", "health_timeout 30ms\n"+expects))
				g.wantKeptVerdicts(t, true)
				g.wantNeverDown(t)
				if got := up.got(); len(got) != 0 {
					t.Errorf("got %v at the upstream, want no check without a token", got)
				}
				auth.wantAsked(t, 1)
			})
		}
	}
}

// One source is between the checks of these upstreams and their tokens.
func TestUpstreamKeepsItsVerdictWithoutAToken(t *testing.T) {
	answers := map[string]func(w http.ResponseWriter, r *http.Request){
		"up":               func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "fine") },
		"up by a redirect": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/fine", http.StatusFound) },
		"down by status": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusTeapot)
			_, _ = io.WriteString(w, "fine")
		},
		"down by body":  func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ill") },
		"down by error": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"down by a body cut off": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "99")
			_, _ = io.WriteString(w, "fine")
		},
		"down by a redirect": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/ill", http.StatusFound) },
		"down by another's domain": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://elsewhere.example/", http.StatusFound)
		},
	}
	for name, answer := range answers {
		t.Run(name, func(t *testing.T) {
			auth := newAuthServer(t)
			up := newUpstream(t, auth)
			wantUp := strings.HasPrefix(name, "up")
			checked := func(healthy bool) {
				up.script(func(w http.ResponseWriter, r *http.Request) bool {
					up.record(r)
					switch {
					case r.URL.Path == "/":
						return false
					case r.URL.Path == "/fine":
						_, _ = io.WriteString(w, "fine")
					case r.URL.Path == "/ill":
						w.WriteHeader(http.StatusTeapot)
					case healthy == wantUp:
						answer(w, r)
					default:
						answers[map[bool]string{true: "up", false: "down by status"}[healthy]](w, r)
					}
					return true
				})
			}
			checked(wantUp)
			g := startGateway(t, expand(checkedSite, "$UP", up.addr, "$AUTH", auth.URL, "$PROXY",
				"health_follow_redirects\nhealth_body fine"))
			isUp := func() bool { return g.get().status == http.StatusOK }
			eventually(t, func() bool { return len(up.checks()) > 0 && isUp() == wantUp }, "the verdict")

			auth.script(refusingForLong(http.StatusBadRequest, `{"error":"invalid_client"}`))
			source := sourceOf(t, strings.TrimPrefix(auth.URL, "http://")+"/gateway")
			source.lose()
			eventually(t, func() bool { // a check that began before may still be on its way
				before := len(up.got())
				g.wantKeptVerdicts(t, wantUp)
				return len(up.got()) == before
			}, "checks without a token only")
			checked(!wantUp) // which nobody asks
			lines := len(g.logged("host is up"))
			g.wantKeptVerdicts(t, wantUp)
			if !wantUp {
				if r := g.get(); r.status != http.StatusServiceUnavailable || r.header.Get("Retry-After") != "" {
					t.Errorf("got %d, want 503 because all upstreams are down", r.status)
				}
			} else {
				g.wantNeverDown(t)
			}
			if got := g.logged("host is up"); len(got) != lines {
				t.Errorf("got %q, want that the upstream stays down", got[lines:])
			}
			const again = "no token for a health check; its last check ended with an error"
			if got, want := len(g.logged(again)) > 0, strings.Contains(name, "error") || strings.Contains(name, "cut off") || strings.Contains(name, "another"); got != want {
				t.Errorf("got checks that repeat an error: %v, want %v", got, want)
			}

			auth.script(nil)
			source.rested()
			eventually(t, func() bool { return isUp() != wantUp }, "a real check with the first token")
		})
	}
}

// Another upstream may have refused the token, and there may be no other.
func TestHealthCheckCarriesATokenThatIsRefusedElsewhere(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := startGateway(t, expand(checkedSite, "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", ""))
	eventually(t, func() bool { return len(up.checks()) > 0 }, "a check")
	auth.script(refusingForLong(http.StatusBadRequest, `{"error":"invalid_client"}`))
	source := sourceOf(t, strings.TrimPrefix(auth.URL, "http://")+"/gateway")
	refused := source.Peek()
	source.refuse(t.Context(), refused)
	eventually(t, func() bool { return len(auth.asked()) == 2 }, "a token request that fails")
	seen := len(up.checks())
	eventually(t, func() bool { return len(up.checks()) >= seen+4 }, "checks")
	for _, check := range up.checks() {
		check.wantHeader(t, "Authorization", "Bearer "+refused.value)
	}
	g.wantNeverDown(t)
	auth.wantAsked(t, 2)
}

// The authorization server took the check's time, and not the upstream.
func TestHealthCheckThatGetsItsTokenTooLate(t *testing.T) {
	auth := newAuthServer(t)
	release := auth.hang()
	defer release()
	up := newUpstream(t, auth)
	up.script(func(_ http.ResponseWriter, r *http.Request) bool {
		up.record(r)
		<-r.Context().Done()
		return true
	})
	g := startGateway(t, expand(strings.Replace(checkedSite, "20ms", "1h", 1), "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", "health_timeout 1s"))
	source := sourceOf(t, strings.TrimPrefix(auth.URL, "http://")+"/gateway")
	eventually(t, func() bool { return len(auth.asked()) == 1 && source.waiters() == 1 }, "a check that waits")
	release()
	eventually(t, func() bool { return len(g.logged(noTokenLine)) == 1 }, "the end of the check")
	g.wantNeverDown(t)
}

// With a token at hand, it is the upstream that takes the time.
func TestUpstreamThatDoesNotAnswerItsCheckIsDown(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := startGateway(t, expand(checkedSite, "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", "health_timeout 30ms"))
	eventually(t, func() bool { return cached() == 1 }, "a token")
	up.script(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/health" {
			<-r.Context().Done()
		}
		return r.URL.Path == "/health"
	})
	eventually(t, func() bool {
		r := g.get()
		return r.status == http.StatusServiceUnavailable && r.header.Get("Retry-After") == ""
	},
		"an upstream that is down")
}

// waiters is how many wait for a token.
func (s *tokenSource) waiters() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inflight == nil {
		return 0
	}
	return s.inflight.waiters
}

var testTarget = checkTarget{dialAddress: dialAddress{"tcp", "127.0.0.1:9000"}}

// The proxy may want several answers before it changes its verdict. What is repeated
// must not be among them.
func TestHeldAnswerIsThatOfTheVerdict(t *testing.T) {
	h := &healthAnswers{checks: reverseproxy.ActiveHealthChecks{Fails: 3, Passes: 2}, most: 1}
	for i, step := range []struct{ status, want int }{
		{0, 200}, // before any check
		{500, 200},
		{201, 201},
		{501, 201},
		{502, 502},
		{202, 502},
		{503, 503},
		{203, 203},
		{504, 203},
		{505, 203},
		{506, 506},
	} {
		if step.status != 0 {
			h.note(testTarget, healthAnswer{status: step.status})
		}
		if got := h.last(testTarget); got != (healthAnswer{status: step.want}) {
			t.Errorf("step %d: got %v, want the status %d", i, got, step.want)
		}
	}
}

func TestOldestAnswerIsForgotten(t *testing.T) {
	h := new(healthAnswers)
	h.read(new(reverseproxy.ActiveHealthChecks), 1)
	target := func(i int) checkTarget { return checkTarget{dialAddress{"tcp", fmt.Sprint(i)}, ""} }
	for i := range 10 {
		h.note(target(i), healthAnswer{status: 500})
		h.note(target(0), healthAnswer{status: 500})
		time.Sleep(time.Microsecond) // or the clock may show the same
	}
	for i, want := range map[int]int{0: 500, 8: 200, 9: 500} {
		if got := h.last(target(i)).status; got != want {
			t.Errorf("target %d: got %d, want %d", i, got, want)
		}
	}
	if len(h.held) != 2 {
		t.Errorf("got %d answers, want 2", len(h.held))
	}
}

// Checks of several upstreams may go to one address, which is told whom they are about.
func TestAnswersAboutUpstreamsStayApart(t *testing.T) {
	for name, about := range map[string]func(*http.Request, string){
		"header": func(r *http.Request, value string) { r.Header.Set("X-About", value) },
		"Host":   func(r *http.Request, value string) { r.Host = value },
	} {
		h := new(healthAnswers)
		h.read(&reverseproxy.ActiveHealthChecks{Headers: http.Header{
			"x-about": {"{http.reverse_proxy.active.target_upstream}"}, "X-Time": {"{time.now}"},
		}}, 2)
		target := func(value, now string) checkTarget {
			first := httptest.NewRequest(http.MethodGet, "http://checker.example/", nil)
			first.Header.Set("X-Time", now)
			about(first, value)
			second := httptest.NewRequest(http.MethodGet, "http://checker.example/next", nil)
			second.Response = &http.Response{Request: first}
			return h.target(second, reverseproxy.DialInfo{Network: "tcp", Address: "checker.example:80"})
		}
		if target("a", "1") == target("b", "1") || target("a", "1") != target("a", "2") {
			t.Errorf("%s: got the wrong targets, want one for each upstream", name)
		}
	}
}

func TestTextThatHealthBodyMatches(t *testing.T) {
	for _, expression := range []string{
		"", "ok", "^ok$", "(?i)^OK$", "ok|fine", "^(?:ok|fine)$", "[a-c]x", "[^x]y", `\d{3}-\d{2,}`, "a+b*c?", "^.$", "(?s)^.{2}$", "(?:a(b){2}){2}",
		`"status":\s*"(up|pass)"`, `\bup\b`, "(?m)^up$", `\x{1F600}`, `\pL+`, "^$", `^[\x{D800}-\x{DFFF}x]$`,
	} {
		h := &healthAnswers{checks: reverseproxy.ActiveHealthChecks{ExpectBody: expression}, expectBody: regexp.MustCompile(expression)}
		if got := h.wanted(); !h.accepts(got) {
			t.Errorf("%s: got %q, want a text that it matches", expression, got.body)
		}
	}
}

func TestBodyOfACheckIsRememberedInPart(t *testing.T) {
	for _, test := range []struct {
		size, maxSize int64
		want          int
	}{{10, 0, 10}, {10, 4, 4}, {maxHealthBody + 1, 0, maxHealthBody}, {maxHealthBody + 1, maxHealthBody + 2, maxHealthBody}} {
		h := new(healthAnswers)
		h.read(&reverseproxy.ActiveHealthChecks{ExpectBody: "x", MaxSize: test.maxSize}, 1)
		res := &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(strings.Repeat("x", int(test.size))))}
		h.watch(nil, testTarget, res, nil)
		if n, err := io.Copy(io.Discard, res.Body); err != nil || n != test.size {
			t.Errorf("got %d bytes, err %v, want all %d", n, err, test.size)
		}
		for range 2 { // once is enough
			_ = res.Body.Close()
		}
		if got := h.last(testTarget); len(got.body) != test.want || got.failed {
			t.Errorf("got %d of %d bytes with max_size %d, want %d", len(got.body), test.size, test.maxSize, test.want)
		}
	}
}

// Only the last answer of a check that is redirected says what the proxy makes of it.
func TestAnswerThatLeadsOnIsNotTheLast(t *testing.T) {
	for _, test := range []struct {
		follow           bool
		status           int
		location, method string
		want             int
	}{
		{true, http.StatusFound, "/next", "", 200},
		{true, http.StatusPermanentRedirect, "/next", "", 200},
		{true, http.StatusFound, "", "", http.StatusFound},
		{true, http.StatusFound, "http://[", "", http.StatusFound},
		{true, http.StatusNotModified, "/next", "", http.StatusNotModified},
		{false, http.StatusFound, "/next", "", http.StatusFound},
	} {
		h := new(healthAnswers)
		h.read(&reverseproxy.ActiveHealthChecks{FollowRedirects: test.follow}, 1)
		req := httptest.NewRequest(http.MethodGet, "http://up.example/", nil)
		h.watch(req, testTarget, &http.Response{StatusCode: test.status, Header: http.Header{"Location": {test.location}}}, nil)
		if got := h.last(testTarget).status; got != test.want {
			t.Errorf("%+v: got %d", test, got)
		}
	}
	h := new(healthAnswers)
	h.watch(nil, testTarget, nil, errors.New("foreign"))
	if got := h.last(testTarget); got != (healthAnswer{failed: true}) {
		t.Errorf("got %+v after an error, want one that failed", got)
	}
}
