// What active health checks said last, for a check that can't be sent.

package outboundauth

import (
	"io"
	"maps"
	"net/http"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// healthAnswers remembers what the upstreams of one proxy answer to active health
// checks. A check for which there is no token says nothing about its upstream, but the
// proxy needs an answer. With the answer that has led to its verdict, it comes to the
// same verdict.
type healthAnswers struct {
	checks     reverseproxy.ActiveHealthChecks // as they are configured
	expectBody *regexp.Regexp                  // nil: the proxy does not compare bodies
	tellApart  []string                        // header fields that name the upstream that a check is about
	most       int                             // how many targets are remembered

	mu   sync.Mutex // guards held
	held map[checkTarget]*heldAnswer
}

// A checkTarget is what a check asks about. With health_port or health_upstream, checks
// of several upstreams may go to one address, and a header field tells it which one is
// meant.
type checkTarget struct {
	dialAddress
	upstream string
}

// healthAnswer is as much of an answer as the proxy compares.
type healthAnswer struct {
	status int
	body   string
	failed bool // there was no answer, or its body broke off
}

// heldAnswer is the answer that the proxy's verdict comes from.
type heldAnswer struct {
	healthAnswer
	up      bool      // the verdict
	against int       // the answers since the verdict that call for the other one
	at      time.Time // when the upstream answered last
}

// maxHealthBody is how much of a body is remembered. If health_body matches only what
// comes later, the upstream is down while there is no token.
const maxHealthBody = 64 << 10

// read reads how the proxy checks its upstreams.
func (h *healthAnswers) read(checks *reverseproxy.ActiveHealthChecks, upstreams int) {
	h.checks = *checks
	if checks.ExpectBody != "" {
		h.expectBody, _ = regexp.Compile(checks.ExpectBody) // if it can't be, Caddy does not load the config
	}
	for _, field := range slices.Sorted(maps.Keys(checks.Headers)) {
		if strings.Contains(strings.Join(checks.Headers[field], ""), "{http.reverse_proxy.active.target_upstream}") {
			h.tellApart = append(h.tellApart, field)
		}
	}
	// An address from a file may change. Then the old one has its place until all
	// others have answered once more.
	h.most = 2 * upstreams
}

// target returns what a check asks about. The check may be redirected: then what the
// upstream was told is in the request before.
func (h *healthAnswers) target(req *http.Request, dial reverseproxy.DialInfo) checkTarget {
	first := firstOf(req)
	told := make([]string, 1, 1+len(h.tellApart))
	told[0] = first.Host
	for _, field := range h.tellApart {
		told = append(told, first.Header.Values(field)...)
	}
	return checkTarget{dialAddress{dial.Network, dial.Address}, strings.Join(told, "\n")}
}

// watch notes how a check with a token ends: now, or when the proxy has read the body.
func (h *healthAnswers) watch(req *http.Request, target checkTarget, res *http.Response, err error) {
	switch {
	case err != nil:
		h.note(target, healthAnswer{failed: true})
	case h.checks.FollowRedirects && leadsOn(req, res):
		// The answer to the next request is that of the check.
	case h.expectBody == nil:
		h.note(target, healthAnswer{status: res.StatusCode})
	default:
		limit := maxHealthBody
		if size := h.checks.MaxSize; size > 0 && size < maxHealthBody {
			limit = int(size)
		}
		res.Body = &watchedBody{ReadCloser: res.Body, limit: limit, ended: func(read []byte, failed bool) {
			h.note(target, healthAnswer{res.StatusCode, string(read), failed})
		}}
	}
}

// firstOf returns the request that a check began with. The check may have been redirected.
func firstOf(req *http.Request) *http.Request {
	for req.Response != nil && req.Response.Request != nil {
		req = req.Response.Request
	}
	return req
}

// leadsOn reports whether net/http follows where res leads.
func leadsOn(req *http.Request, res *http.Response) bool {
	switch res.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
		http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
	default:
		return false
	}
	location := res.Header.Get("Location")
	_, err := req.URL.Parse(location) // keepFromLog removes what can't be read
	return location != "" && err == nil
}

// note notes the answer of a check. It counts as the proxy does, which may want
// several answers (health_fails, health_passes) before it changes its verdict.
func (h *healthAnswers) note(target checkTarget, a healthAnswer) {
	up := h.accepts(a)
	h.mu.Lock()
	defer h.mu.Unlock()
	held, ok := h.held[target]
	if !ok {
		held = &heldAnswer{healthAnswer: h.wanted(), up: true}
		h.add(target, held)
	}
	held.at = time.Now()
	if up != held.up {
		held.against++
		threshold := h.checks.Passes
		if held.up {
			threshold = h.checks.Fails
		}
		if held.against < threshold { // 0 is as good as 1
			return
		}
		held.up, held.against = up, 0
	}
	held.healthAnswer = a
}

// add adds what is known of a target. If there are too many, add forgets the one that
// has not answered for the longest time. mu is held.
func (h *healthAnswers) add(target checkTarget, held *heldAnswer) {
	if h.held == nil {
		h.held = make(map[checkTarget]*heldAnswer)
	}
	if len(h.held) > 0 && len(h.held) >= h.most {
		oldest := slices.MinFunc(slices.Collect(maps.Keys(h.held)), func(a, b checkTarget) int {
			return h.held[a].at.Compare(h.held[b].at)
		})
		delete(h.held, oldest)
	}
	h.held[target] = held
}

// last returns the answer by which the proxy keeps its verdict.
func (h *healthAnswers) last(target checkTarget) healthAnswer {
	h.mu.Lock()
	defer h.mu.Unlock()
	if held, ok := h.held[target]; ok {
		return held.healthAnswer
	}
	return h.wanted() // to the proxy, an upstream is up before its first check
}

// accepts reports whether the proxy takes an answer for that of a healthy upstream.
func (h *healthAnswers) accepts(a healthAnswer) bool {
	expected := h.checks.ExpectStatus
	if expected == 0 {
		expected = 2 // a class, as the proxy writes it
	}
	return !a.failed && caddyhttp.StatusCodeMatches(a.status, expected) &&
		(h.expectBody == nil || h.expectBody.MatchString(a.body))
}

// expects reports whether checks name this status as that of a healthy upstream.
func (h *healthAnswers) expects(status int) bool {
	want := h.checks.ExpectStatus
	return want != 0 && caddyhttp.StatusCodeMatches(status, want)
}

// wanted returns an answer that the proxy accepts. If textOf finds no text that
// health_body matches, the proxy does not accept it, and the upstream is down until
// there is a token.
func (h *healthAnswers) wanted() healthAnswer {
	a := healthAnswer{status: h.checks.ExpectStatus}
	if a.status == 0 {
		a.status = http.StatusOK
	} else if a.status < 100 {
		a.status *= 100 // a class
	}
	if h.expectBody != nil {
		if parsed, err := syntax.Parse(h.checks.ExpectBody, syntax.Perl); err == nil {
			a.body = textOf(parsed)
		}
	}
	return a
}

// textOf returns a text that an expression matches. It leaves out all that may be
// empty. So it fails if an anchor or a word boundary wants something there.
func textOf(re *syntax.Regexp) string {
	switch re.Op { //nolint:exhaustive // all others match the empty text
	case syntax.OpLiteral:
		return string(re.Rune)
	case syntax.OpCharClass:
		return string(re.Rune[:min(1, len(re.Rune))]) // the first range begins with it
	case syntax.OpAnyChar, syntax.OpAnyCharNotNL:
		return "."
	case syntax.OpCapture, syntax.OpPlus, syntax.OpAlternate:
		return textOf(re.Sub[0])
	case syntax.OpRepeat:
		return strings.Repeat(textOf(re.Sub[0]), re.Min)
	case syntax.OpConcat:
		var text strings.Builder
		for _, part := range re.Sub {
			text.WriteString(textOf(part))
		}
		return text.String()
	}
	return ""
}

// response returns an answer as if the upstream had given it to req.
func (a healthAnswer) response(req *http.Request) *http.Response {
	return &http.Response{
		Status:        strconv.Itoa(a.status) + " " + http.StatusText(a.status),
		StatusCode:    a.status,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        make(http.Header), // without Location: nothing is to be followed
		Body:          io.NopCloser(strings.NewReader(a.body)),
		ContentLength: int64(len(a.body)),
		Request:       req,
	}
}

// watchedBody is the body of a check's answer. It remembers what the proxy reads.
type watchedBody struct {
	io.ReadCloser
	limit  int
	read   []byte
	failed bool
	ended  func(read []byte, failed bool) // called once
}

// Read implements io.Reader.
func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.read = append(b.read, p[:min(n, b.limit-len(b.read))]...)
	b.failed = b.failed || (err != nil && err != io.EOF) //nolint:errorlint // a reader returns it unwrapped
	return n, err
}

// Close implements io.Closer.
func (b *watchedBody) Close() error {
	if b.ended != nil {
		b.ended(b.read, b.failed)
		b.ended = nil
	}
	return b.ReadCloser.Close()
}
