// The load: what is sent to a gateway, and what became of each request.

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os/exec"
	"sort"
	"strings"
	"sync"
	"time"

	vegeta "github.com/tsenart/vegeta/v12/lib"
)

// patience is how long a caller waits for an answer.
const patience = 10 * time.Second

// callerHeader is what a browser sends, and what a gateway has to replace.
var callerHeader = http.Header{
	"Accept":          {"application/json"},
	"Authorization":   {"Bearer of-the-caller"},
	"X-Tenant":        {"of-the-caller"},
	"Accept-Language": {"en"},
	"Cache-Control":   {"no-cache"},
	"Cookie":          {"session=0123456789abcdef"},
	"Referer":         {"https://app.example/orders"},
	"User-Agent":      {"bench"},
	"X-Request-Id":    {"0123456789abcdef"},
}

// An outcome is what became of a request.
type outcome struct {
	path     string
	at       time.Time // when it was sent, or should have been sent
	took     time.Duration
	answered int // the status; 0: there was no answer
}

// slack is how late a timer may send a request. That is not the gateway's fault.
const slack = 5 * time.Millisecond

// since returns the outcome of a request that was due at a time. A machine that is too
// busy sends it much later. A caller would have waited since then.
func (o outcome) since(due time.Time) outcome {
	if o.at.Sub(due) > slack {
		o.at, o.took = due, o.end().Sub(due)
	}
	return o
}

func (o *outcome) end() time.Time { return o.at.Add(o.took) }

// bad reports whether a request has not got the upstream's good answer. The upstream
// refuses denied paths whatever a gateway does.
func (o *outcome) bad() bool {
	if strings.HasPrefix(o.path, denied) {
		return o.answered != http.StatusUnauthorized
	}
	return o.answered != http.StatusOK
}

// A pace says how many requests are sent.
type pace struct {
	rate vegeta.Pacer  // requests, without waiting for answers; nil: as many as workers can send
	last time.Duration // how long; 0: as long as the rate says
	// workers is how many requests are under way at most; 0: no limit
	workers uint64
	timeout time.Duration // how long a caller waits; 0: patience
}

func every(n int) vegeta.Pacer { return vegeta.Rate{Freq: n, Per: time.Second} }

// atOnce is the rate of so many requests without a pause, and none after them.
type atOnce uint64

// Pace implements vegeta.Pacer.
func (n atOnce) Pace(_ time.Duration, hits uint64) (wait time.Duration, stop bool) {
	return 0, hits >= uint64(n)
}

// Rate implements vegeta.Pacer.
func (n atOnce) Rate(time.Duration) float64 { return float64(n) }

// A target is a request to a gateway.
type target struct {
	path, host string
	body       []byte
}

// attack sends requests, each to what next returns, and returns what became of them in
// the order of the answers.
func (r *rig) attack(ctx context.Context, p pace, next func() target) []outcome {
	if p.timeout == 0 {
		p.timeout = patience
	}
	var mu sync.Mutex // guards next: all workers ask for their targets
	options := []func(*vegeta.Attacker){
		vegeta.Timeout(p.timeout), vegeta.Redirects(vegeta.NoFollow), vegeta.KeepAlive(true), vegeta.MaxBody(0),
	}
	if p.rate == nil {
		p.rate = vegeta.Rate{}
	}
	if p.workers > 0 {
		options = append(options, vegeta.Workers(p.workers), vegeta.MaxWorkers(p.workers))
	}
	attacker := vegeta.NewAttacker(options...)
	defer context.AfterFunc(ctx, func() { attacker.Stop() })()
	targeter := func(t *vegeta.Target) error {
		mu.Lock()
		to := next()
		mu.Unlock()
		*t = vegeta.Target{Method: http.MethodGet, URL: "http://" + r.Listen + to.path, Header: callerHeader.Clone(), Body: to.body}
		if to.body != nil {
			t.Method = http.MethodPost
		}
		if to.host != "" {
			t.Header.Set("Host", to.host)
		}
		return nil
	}
	var outcomes []outcome
	began := time.Now()
	for res := range attacker.Attack(targeter, p.rate, p.last, "") {
		o := outcome{at: res.Timestamp, took: res.Latency, answered: int(res.Code)}
		if u, err := url.Parse(res.URL); err == nil {
			o.path = u.Path
		}
		if rate, ok := p.rate.(vegeta.Rate); ok && rate.Freq > 0 {
			// vegeta sends the first request after a pause, too.
			o = o.since(began.Add(time.Duration(res.Seq+1) * rate.Per / time.Duration(rate.Freq)))
		}
		outcomes = append(outcomes, o)
	}
	return outcomes
}

// latencies are the times within which so many of the requests were answered.
func latencies(outcomes []outcome) values {
	took := make([]float64, 0, len(outcomes))
	for _, o := range outcomes {
		took = append(took, o.took.Seconds())
	}
	sort.Float64s(took)
	at := func(part float64) float64 {
		if len(took) == 0 {
			return 0
		}
		return took[min(len(took)-1, int(part*float64(len(took))))]
	}
	return values{valueP50: at(0.5), valueP99: at(0.99), valueP999: at(0.999), valueMax: at(1)}
}

// A wrkReport is what configs/wrk.lua prints.
type wrkReport struct {
	Requests float64 `json:"requests"` // with a good answer
	Seconds  float64 `json:"seconds"`
	Failed   float64 `json:"failed"`
	P50      float64 `json:"p50"` // in seconds, as those that follow
	P99      float64 `json:"p99"`
	P999     float64 `json:"p999"`
}

// saturate sends requests over 64 connections, each as soon as its connection has got
// the answer to the one before. It uses wrk, which takes far less of the machine than a
// load generator in Go.
func (r *rig) saturate(ctx context.Context, last time.Duration) (*wrkReport, error) {
	script, err := r.write("wrk.lua")
	if err != nil {
		return nil, err
	}
	args := []string{
		"--threads", "1", "--connections", "64", "--duration", fmt.Sprintf("%ds", int(last.Seconds())),
		"--timeout", "10s", "--script", script, "--header", "Host: " + r.Client().Host,
	}
	for name, value := range callerHeader {
		args = append(args, "--header", name+": "+value[0])
	}
	out, err := exec.CommandContext(ctx, "wrk", append(args, "http://"+r.Listen+"/orders")...).CombinedOutput() //nolint:gosec // our own arguments
	if err != nil {
		return nil, fmt.Errorf("wrk (Debian's package wrk): %w: %s", err, out)
	}
	_, line, _ := strings.Cut(string(out), "\nreport ")
	report := new(wrkReport)
	if err := json.Unmarshal([]byte(line), report); err != nil {
		return nil, fmt.Errorf("wrk: %w: %s", err, out)
	}
	return report, nil
}
