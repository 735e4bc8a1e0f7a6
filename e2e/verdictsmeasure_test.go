package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// verdictStream is the requests of one kind.
type verdictStream struct {
	name string
	to   *verdictUpstream
	load *steadyLoad
	all  outcomes // once it has been stopped
}

// send sends requests of one kind to an upstream, so many a second, until stop.
func (s *verdictStage) send(name string, to *verdictUpstream, rate int, compose composer) *verdictStream {
	v := &verdictStream{name: name, to: to}
	v.load = &steadyLoad{rate: rate, compose: func(n int) (*http.Request, error) {
		req, err := compose(to.url, n)
		if err == nil {
			req.Header.Set(requestID, v.id(n))
		}
		return req, err
	}}
	v.load.start()
	s.streams = append(s.streams, v)
	return v
}

// composer returns the n-th request of a kind to an upstream with this URL.
type composer func(to string, n int) (*http.Request, error)

// orders are requests for known paths and for new ones, and small bodies.
func orders(to string, n int) (*http.Request, error) {
	switch n % 3 {
	case 0:
		return http.NewRequest(http.MethodGet, fmt.Sprintf("%s/orders/%d", to, n%10), nil)
	case 1:
		return http.NewRequest(http.MethodGet, fmt.Sprintf("%s/orders/%d", to, 1000+n), nil)
	}
	return http.NewRequest(http.MethodPost, to+"/orders", strings.NewReader(fmt.Sprintf(`{"n":%d}`, n)))
}

// uploads are more than the gateway keeps of a body. Every other one doesn't say its
// length.
func uploads(to string, n int) (*http.Request, error) {
	var body io.Reader = bytes.NewReader(make([]byte, 200<<10))
	if n%2 == 1 {
		body = io.MultiReader(body)
	}
	return http.NewRequest(http.MethodPost, to+"/upload", body)
}

func login(password string) composer {
	return func(to string, n int) (*http.Request, error) {
		form := url.Values{"user": {fmt.Sprintf("user%d", n)}, "password": {password}}
		return http.NewRequest(http.MethodPost, to+"/login", strings.NewReader(form.Encode()))
	}
}

func admin(to string, _ int) (*http.Request, error) {
	return http.NewRequest(http.MethodGet, to+"/admin", nil)
}

// id is the n-th request's.
func (v *verdictStream) id(n int) string { return fmt.Sprintf("%s %d", v.name, n) }

// since returns how long after the first request that one was due.
func (v *verdictStream) since(o outcome) time.Duration {
	return o.due.Sub(v.all[0].due).Round(time.Millisecond)
}

// unrefused returns the requests that the upstream has not refused.
func (v *verdictStream) unrefused() outcomes {
	return slices.DeleteFunc(slices.Clone(v.all), func(o outcome) bool { return v.to.hasRefused(v.id(o.n)) })
}

// slow returns the requests that took longer than limit though the upstream has not
// refused them, and longer than the machine explains.
func (s *verdictStage) slow(v *verdictStream, limit time.Duration) outcomes {
	return slices.DeleteFunc(v.unrefused(), func(o outcome) bool { return o.took <= limit || o.took <= limit+s.stall(o) })
}

// stall returns how long the control's requests took while that one was under way: so
// long may a busy machine have held it up.
func (s *verdictStage) stall(o outcome) time.Duration {
	longest := time.Duration(0)
	for _, c := range s.control.all {
		if c.due.Before(o.end()) && c.end().After(o.due) {
			longest = max(longest, c.took)
		}
	}
	return longest
}

// end is when the answer had come.
func (o outcome) end() time.Time { return o.due.Add(o.took) }

// percentile returns what the share p of the requests took at most.
func (all outcomes) percentile(p float64) time.Duration {
	if len(all) == 0 {
		return 0
	}
	byTime := slices.SortedFunc(slices.Values(all), func(a, b outcome) int { return int(a.took - b.took) })
	return byTime[int(p*float64(len(byTime)-1))].took
}

// verdictResult is what good requests felt of a scene.
type verdictResult struct {
	sent, lost    int
	p99, longest  time.Duration // of those that no upstream has refused
	refused       time.Duration // the longest of the others
	control       time.Duration // the longest of requests that need no token
	tokenRequests int
	twice         int // wrong passwords that were sent twice
}

// result returns what became of these streams.
func (s *verdictStage) result(good []*verdictStream) verdictResult {
	r := verdictResult{control: s.control.all.longest(), tokenRequests: s.issuer.requests()}
	var unrefused outcomes
	for _, v := range good {
		r.sent += len(v.all)
		r.lost += len(v.all.lost())
		r.refused = max(r.refused, v.refused().longest())
		unrefused = append(unrefused, v.unrefused()...)
	}
	r.p99, r.longest = unrefused.percentile(0.99), unrefused.longest()
	return r
}

// refused returns the requests that the upstream has refused.
func (v *verdictStream) refused() outcomes {
	return slices.DeleteFunc(slices.Clone(v.all), func(o outcome) bool { return !v.to.hasRefused(v.id(o.n)) })
}

// verdictTable shows the scenes.
func verdictTable(results map[*verdictScene]verdictResult) string {
	var b strings.Builder
	b.WriteString("| scene | good requests | lost | 99 % | slowest | slowest refused | slowest without a token | token requests | wrong passwords sent twice |\n")
	b.WriteString("|---|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, scene := range verdictScenes {
		r, played := results[scene]
		if !played {
			continue
		}
		fmt.Fprintf(&b, "| %s | %d | %d | %s | %s | %s | %s | %d | %d |\n", scene.name, r.sent, r.lost, milliseconds(r.p99),
			milliseconds(r.longest), milliseconds(r.refused), milliseconds(r.control), r.tokenRequests, r.twice)
	}
	return b.String()
}

// table shows the streams of a scene.
func (s *verdictStage) table() string {
	var b strings.Builder
	b.WriteString("| requests | sent | not 200 | 99 % | slowest | refused, of the good | slowest of these |\n|---|--:|--:|--:|--:|--:|--:|\n")
	for _, v := range s.streams {
		good, refused := v.unrefused(), v.refused()
		fmt.Fprintf(&b, "| %s | %d | %d | %s | %s | %d | %s |\n", v.name, len(v.all), len(v.all.lost()),
			milliseconds(good.percentile(0.99)), milliseconds(good.longest()), len(refused), milliseconds(refused.longest()))
	}
	return b.String()
}

// TestVerdictMeasure has a request be slow alone, another one together with the
// control, and a third one be refused.
func TestVerdictMeasure(t *testing.T) {
	zero := time.Now()
	request := func(n int, due, took time.Duration) outcome {
		return outcome{n: n, due: zero.Add(due), took: took, status: http.StatusOK}
	}
	u := newVerdictUpstream(nil)
	v := &verdictStream{name: "good", to: u, all: outcomes{
		request(0, 0, 400*time.Millisecond),
		request(1, time.Second, 400*time.Millisecond),
		request(2, 2*time.Second, 400*time.Millisecond),
		request(3, 3*time.Second, 100*time.Millisecond),
	}}
	u.refused[v.id(2)] = zero
	s := &verdictStage{control: &verdictStream{all: outcomes{
		request(0, 500*time.Millisecond, 10*time.Millisecond),
		request(1, 1100*time.Millisecond, 150*time.Millisecond),
	}}}
	slow := s.slow(v, 300*time.Millisecond)
	if len(slow) != 1 || slow[0].n != 0 {
		t.Errorf("slow requests: got %v, want the first", slow)
	}
	if got := v.refused(); len(got) != 1 || got[0].n != 2 {
		t.Errorf("refused requests: got %v, want the third", got)
	}
	if got, want := v.all.percentile(0.5), 400*time.Millisecond; got != want {
		t.Errorf("median: got %v, want %v", got, want)
	}
}
