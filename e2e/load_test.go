package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// load sends requests at a constant rate, whatever becomes of those before:
// were it to wait for answers, then a gateway that stalls would be asked less.
type load struct {
	url      string
	rate     int // requests a second
	duration time.Duration

	// resend has requests sent again that got no answer at all.
	resend bool
}

// loadResult is what became of the requests.
type loadResult struct {
	sent     int
	resent   int
	failures []string
	// latencies are sorted, and counted from when a request was due.
	latencies []time.Duration
}

func (l load) run() loadResult {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = l.rate
	httpClient := &http.Client{Transport: transport, Timeout: 30 * time.Second}
	defer transport.CloseIdleConnections()
	again := resender(httpClient)

	var (
		result   loadResult
		mu       sync.Mutex // guards result, but for sent
		inFlight sync.WaitGroup
	)
	interval := time.Second / time.Duration(l.rate)
	start := time.Now()
	for due := time.Duration(0); due < l.duration; due += interval {
		time.Sleep(time.Until(start.Add(due)))
		n := result.sent
		result.sent++
		inFlight.Go(func() {
			err := l.send(httpClient, n)
			resent := 0
			for l.resend && resent < 3 && errors.Is(err, errNoAnswer) {
				err = l.send(again, n)
				resent++
			}
			took := time.Since(start.Add(due))
			mu.Lock()
			defer mu.Unlock()
			result.latencies = append(result.latencies, took)
			result.resent += resent
			if err != nil {
				result.failures = append(result.failures, fmt.Sprintf("request %d, after %v: %v", n, due, err))
			}
		})
	}
	inFlight.Wait()
	slices.Sort(result.latencies)
	return result
}

// resender returns a client for what is sent again. It uses no connection twice: a
// server that shuts down has closed all that were idle, and the other client may
// take several of them in a row before it notices.
func resender(c *http.Client) *http.Client {
	transport := c.Transport.(*http.Transport).Clone()
	transport.DisableKeepAlives = true
	return &http.Client{Transport: transport, Timeout: c.Timeout}
}

// errNoAnswer is a connection that ended before the response began.
var errNoAnswer = errors.New("no answer")

// send makes the n-th request; every other one is a POST.
func (l load) send(httpClient *http.Client, n int) error {
	method, body := http.MethodGet, ""
	if n%2 == 1 {
		method, body = http.MethodPost, fmt.Sprintf(`{"n":%d}`, n)
	}
	req, err := http.NewRequest(method, fmt.Sprintf("%s/%d", l.url, n), strings.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := httpClient.Do(req)
	if err != nil {
		return fmt.Errorf("%w: %w", errNoAnswer, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s", resp.Status, bytes.TrimSpace(answer))
	}
	var got mirrored
	if err := json.Unmarshal(answer, &got); err != nil {
		return err
	}
	if got.Method != method || got.URI != req.URL.Path || string(got.Body) != body {
		return fmt.Errorf("upstream got %s %s %q", got.Method, got.URI, got.Body)
	}
	return nil
}

// wantAll fails the test unless each request was answered as it should be.
func (r loadResult) wantAll(t *testing.T) {
	t.Helper()
	for _, failure := range r.failures[:min(len(r.failures), 5)] {
		t.Error(failure)
	}
	if len(r.failures) != 0 {
		t.Errorf("%d of %d requests failed, want none", len(r.failures), r.sent)
	}
}

func (r loadResult) percentile(p float64) time.Duration {
	return r.latencies[int(p*float64(len(r.latencies)-1))].Round(100 * time.Microsecond)
}

// slower returns the share of the requests that took longer than d.
func (r loadResult) slower(d time.Duration) float64 {
	i, _ := slices.BinarySearch(r.latencies, d+1)
	return float64(len(r.latencies)-i) / float64(len(r.latencies))
}

func (r loadResult) String() string {
	return fmt.Sprintf("%d requests, %d resent, %d failed; p50 %v, p99 %v, max %v",
		r.sent, r.resent, len(r.failures), r.percentile(0.5), r.percentile(0.99), r.percentile(1))
}

// TestLoadAcrossExpiries lives through the lives of a dozen tokens.
func TestLoadAcrossExpiries(t *testing.T) {
	t.Parallel() // it mostly waits
	const duration = time.Minute
	as := startAuthServer(t, 5*time.Second)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	gw := startProxy(t, proxy{to: u.serve(t), as: as, client: c})

	result := load{url: gw.url, rate: 200, duration: duration}.run()
	tokens := as.tokenRequests(t)
	t.Logf("%v; %v; %d token requests", result, u, tokens)

	result.wantAll(t)
	u.wantAccepted(t, result.sent, "HTTP/1.1")
	// A token of 5 s is renewed after some 3.5 s to 4 s.
	if tokens < 12 || tokens > 22 {
		t.Errorf("token requests = %d, want 12 to 22", tokens)
	}
}

// TestSlowRenewalHoldsUpNobody has an authorization server that takes half a
// second to answer, which no request is to notice. On a busy machine some are
// slow anyway; as many are then without a token.
func TestSlowRenewalHoldsUpNobody(t *testing.T) {
	t.Parallel() // it mostly waits
	as := startAuthServer(t, 8*time.Second)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	plain := httptest.NewServer(http.HandlerFunc(mirror))
	closeAtEnd(t, plain)
	gw := startGateway(t, gatewayConfig{
		site: fmt.Sprintf("handle /plain/* {\n\treverse_proxy %s\n}\nhandle {\n%s}",
			plain.Listener.Addr(), proxy{to: u.serve(t), as: as, client: c}),
		env: []string{"E2E_SECRET=" + c.Secret},
	})
	gw.get(t, "/", 200)
	as.delay(t, 500*time.Millisecond)

	var withToken, without loadResult
	var both sync.WaitGroup
	both.Go(func() { withToken = load{url: gw.url, rate: 100, duration: 15 * time.Second}.run() })
	both.Go(func() { without = load{url: gw.url + "/plain", rate: 100, duration: 15 * time.Second}.run() })
	both.Wait()
	tokens := as.tokenRequests(t)
	t.Logf("%v; %v; %d token requests", withToken, u, tokens)
	t.Logf("without a token: %v", without)

	withToken.wantAll(t)
	without.wantAll(t)
	u.wantAccepted(t, withToken.sent+1, "HTTP/1.1")
	if tokens < 3 || tokens > 4 {
		t.Errorf("token requests = %d, want 3 or 4", tokens)
	}
	// If requests waited for renewals, then those of two times 0.4 s in 15 s
	// would be slow: 5 %.
	const slow = 100 * time.Millisecond
	if got, base := withToken.slower(slow), without.slower(slow); got > base+0.025 {
		t.Errorf("%.1f %% took longer than %v, want no more than the %.1f %% without a token",
			100*got, slow, 100*base)
	}
}
