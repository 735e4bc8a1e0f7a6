// The scenarios: what happens to a gateway, and what is counted.

package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// values are what was measured, by the names in result.go.
type values = map[string]float64

// A scenario is measured in rounds, each with a fresh process.
type scenario struct {
	name, variant string
	rounds        int
	scene         scene
	measure       func(ctx context.Context, r *rig, length float64) (values, error)
	tokens        bool // the scenario is about tokens, which the static header doesn't need
	quick         bool // so short that -quick measures it, too

	// candidates returns those of a scenario that is about something else than gateways.
	candidates func(ctx context.Context) ([]candidate, error)

	// together measures all candidates of a round at once, instead of measure.
	together func(ctx context.Context, rigs []*rig, length float64) ([]values, error)
}

// title is the name with the variant.
func (s scenario) title() string { return strings.TrimSpace(s.name + " " + s.variant) }

// scenarios returns all of them, in the order of the report.
func scenarios() []scenario {
	all := append(rates(), timed()...)
	all = append(all, scenario{name: "crowd", rounds: 1, tokens: true, measure: crowd, scene: scene{
		clients: 300, lifetime: time.Minute, limit: 20,
	}})
	for _, n := range []int{1, 100, 10_000} {
		all = append(all, scenario{
			name: "upstreams", variant: count(float64(n)), rounds: 3, measure: saturation, quick: n == 100,
			scene: scene{clients: n, pool: true},
		})
	}
	for _, u := range []upload{{"10 KB", 10_000, 32}, {"1 MB", 1_000_000, 8}, {"100 MB", 100_000_000, 2}} {
		all = append(all, scenario{name: "uploads", variant: u.name, rounds: 5, measure: u.measure, quick: u.size == 1_000_000})
	}
	for _, version := range []string{"HTTP/1.1", "HTTP/2"} {
		all = append(all, scenario{
			name: "TLS", variant: version, rounds: 5, measure: saturation, quick: version == "HTTP/2",
			scene: scene{scheme: "https", http2: version == "HTTP/2"},
		})
	}
	return append(all, scenario{name: "tuning", rounds: 10, measure: saturation, candidates: tuned})
}

// rates are the scenarios in which nothing happens but requests.
func rates() []scenario {
	return []scenario{
		{name: "saturation", rounds: 5, measure: saturation, quick: true},
		{name: "overhead", rounds: 10, together: inSlices, quick: true, candidates: func(context.Context) ([]candidate, error) {
			return []candidate{this(), caddyStatic()}, nil
		}},
		{name: "open loop", rounds: 5, measure: openLoop, quick: true},
	}
}

// saturation sends what the gateway can take, over 64 connections.
func saturation(ctx context.Context, r *rig, length float64) (values, error) {
	if err := r.warm(ctx, length); err != nil {
		return nil, err
	}
	before := r.gateway.cpu()
	report, err := r.saturate(ctx, seconds(6, length))
	if err != nil {
		return nil, err
	}
	used := r.gateway.cpu() - before
	if r.HTTP2 != (r.origin.proto.Load() == 2) {
		return nil, fmt.Errorf("the upstream got HTTP/%d", r.origin.proto.Load())
	}
	measured := values{
		valueRate: report.Requests / report.Seconds, valueStart: r.started.Seconds(),
		valueP50: report.P50, valueP99: report.P99, valueP999: report.P999,
		valueSent: report.Requests + report.Failed, valueFailed: report.Failed,
	}
	return measured, r.cost(measured, used, report.Requests)
}

// inSlices gives the load of saturation to one gateway after another, in slices of two
// seconds. While one has it, the others only wait. The speed of a machine changes from
// minute to minute by more than what this module costs. Two slices side by side share it.
func inSlices(ctx context.Context, rigs []*rig, length float64) ([]values, error) {
	for _, r := range rigs {
		if err := r.warm(ctx, length); err != nil {
			return nil, err
		}
	}
	used, requests, failed := make([]time.Duration, len(rigs)), make([]float64, len(rigs)), make([]float64, len(rigs))
	for slice := range int(max(2, 8*length)) {
		for i := range rigs {
			if slice%2 == 1 {
				i = len(rigs) - 1 - i
			}
			before := rigs[i].gateway.cpu()
			report, err := rigs[i].saturate(ctx, 2*time.Second)
			if err != nil {
				return nil, err
			}
			used[i] += rigs[i].gateway.cpu() - before
			requests[i] += report.Requests
			failed[i] += report.Failed
		}
	}
	measured := make([]values, len(rigs))
	for i := range rigs {
		measured[i] = values{valueSent: requests[i] + failed[i], valueFailed: failed[i]}
		if err := rigs[i].cost(measured[i], used[i], requests[i]); err != nil {
			return nil, err
		}
	}
	return measured, nil
}

// warm sends requests until caches and pools are full. In a pool, each upstream has to
// get a request, and its client a token, before the cost of one more request can be seen.
func (r *rig) warm(ctx context.Context, length float64) error {
	for range 20 {
		if _, err := r.saturate(ctx, seconds(2, length)); err != nil {
			return err
		}
		if !r.Pool || r.authority.served() == len(r.Clients) || len(r.Clients) < 1000 {
			return nil
		}
	}
	return nil
}

// cost adds what the gateway took from the machine for so many requests. used is the time
// of its processors.
func (r *rig) cost(measured values, used time.Duration, requests float64) error {
	if requests == 0 || used <= 0 {
		return fmt.Errorf("%v good answers cost %v of the processors", requests, used)
	}
	measured[valueCPU] = used.Seconds() / requests
	measured[valueMemory] = float64(r.gateway.memory.Load())
	return nil
}

// seconds returns so many seconds, times length, but at least one.
func seconds(n, length float64) time.Duration {
	return max(time.Second, time.Duration(n*length)*time.Second)
}

// get returns a request that needs a token.
func get() target { return target{path: "/orders"} }

// openLoop sends 1,500 requests a second, however long the answers take.
func openLoop(ctx context.Context, r *rig, length float64) (values, error) {
	r.attack(ctx, pace{rate: every(1500), last: seconds(2, length)}, get)
	before := r.gateway.cpu()
	outcomes := r.attack(ctx, pace{rate: every(1500), last: seconds(10, length)}, get)
	used := r.gateway.cpu() - before
	measured := r.count(outcomes, time.Time{})
	return measured, r.cost(measured, used, measured[valueSent]-measured[valueFailed])
}

// An upload is a request with a body, of which so many are under way at once.
type upload struct {
	name       string
	size       int
	concurrent uint64
}

func (u upload) measure(ctx context.Context, r *rig, length float64) (values, error) {
	body := bytes.Repeat([]byte{'x'}, u.size)
	post := func() target { return target{path: "/orders", body: body} }
	p := pace{workers: u.concurrent, last: seconds(1, length), timeout: time.Minute}
	r.attack(ctx, p, post)
	before, began := r.gateway.cpu(), time.Now()
	p.last = seconds(4, length)
	outcomes := r.attack(ctx, p, post)
	used, took := r.gateway.cpu()-before, time.Since(began)
	measured := r.count(outcomes, time.Time{})
	good := measured[valueSent] - measured[valueFailed]
	measured[valueRate] = good / took.Seconds()
	return measured, r.cost(measured, used, good)
}

// timed are the scenarios in which something happens to tokens, at a known time.
func timed() []scenario {
	during := func(from, to time.Duration, a answer) func(time.Duration) answer {
		return func(since time.Duration) answer {
			if since >= from && since < to {
				return a
			}
			return answer{}
		}
	}
	slow := func(time.Duration) answer { return answer{delay: 500 * time.Millisecond} }
	// It begins when each gateway has got a token, and none asks for the next one.
	const outageFrom, outageTo = 8 * time.Second, 37 * time.Second
	return []scenario{
		{name: "cold", rounds: 5, tokens: true, quick: true, measure: cold, scene: scene{cold: true, answer: slow}},
		{name: "slow renewal", rounds: 1, tokens: true, measure: events{last: 40}.measure, scene: scene{lifetime: 15 * time.Second, answer: slow}},
		{name: "short tokens", rounds: 1, tokens: true, quick: true, measure: events{last: 30}.measure, scene: scene{lifetime: 5 * time.Second}},
		{name: "revoked", rounds: 1, tokens: true, quick: true, measure: events{last: 45, revoked: 12}.measure, scene: scene{lifetime: 30 * time.Second}},
		{name: "503", rounds: 1, tokens: true, measure: events{last: 55, over: outageTo}.measure, scene: scene{
			lifetime: 20 * time.Second, answer: during(outageFrom, outageTo, answer{status: http.StatusServiceUnavailable}),
		}},
		{name: "no answer", rounds: 1, tokens: true, measure: events{last: 55, over: outageTo}.measure, scene: scene{
			lifetime: 20 * time.Second, answer: during(outageFrom, outageTo, answer{silent: true}),
		}},
		{name: "noise", rounds: 1, tokens: true, measure: events{last: 60, revoked: 35, noise: true}.measure, scene: scene{lifetime: 5 * time.Minute}},
	}
}

// cold sends 1,000 requests at once to a gateway that has no token yet.
func cold(ctx context.Context, r *rig, _ float64) (values, error) {
	outcomes := r.attack(ctx, pace{rate: atOnce(1000)}, get)
	return r.count(outcomes, time.Time{}), nil
}

// events are what happens while 200 requests a second are sent.
type events struct {
	last    float64       // how many seconds
	revoked float64       // after so many seconds, all tokens are revoked; 0: they are not
	over    time.Duration // when the trouble of the authority is over; 0: it has none
	noise   bool          // one request in 20 is to a path that no token opens
}

func (e events) measure(ctx context.Context, r *rig, length float64) (values, error) {
	last := seconds(e.last, length)
	var trouble time.Time // when it ends
	if e.over > 0 {
		trouble = time.Now().Add(e.over)
	}
	if e.revoked > 0 {
		after := seconds(e.revoked, length)
		trouble = time.Now().Add(after)
		timer := time.AfterFunc(after, r.authority.revoke)
		defer timer.Stop()
	}
	sent := 0
	outcomes := r.attack(ctx, pace{rate: every(200), last: last}, func() target {
		if sent++; e.noise && sent%20 == 0 {
			return target{path: denied + "reports"}
		}
		return get()
	})
	return r.count(outcomes, trouble), nil
}

// crowd sends requests of all clients in turn, each one request a second.
func crowd(ctx context.Context, r *rig, length float64) (values, error) {
	i := -1
	outcomes := r.attack(ctx, pace{rate: every(len(r.Clients)), last: seconds(70, length)}, func() target {
		i = (i + 1) % len(r.Clients)
		return target{path: fmt.Sprintf("/%d/orders", i), host: r.Clients[i].Host}
	})
	return r.count(outcomes, time.Time{}), nil
}

// count counts what became of requests. trouble is when the trouble was over, if there
// was any.
func (r *rig) count(outcomes []outcome, trouble time.Time) values {
	counted := latencies(outcomes)
	for _, name := range []string{valueFailed, valueWithheld, valueOver100, valueOver1s} {
		counted[name] = 0
	}
	counted[valueSent] = float64(len(outcomes))
	counted[valueTokens] = float64(r.authority.tokenRequests())
	var last, lastFailed time.Time // when a request was due
	for _, o := range outcomes {
		if o.took > 100*time.Millisecond {
			counted[valueOver100]++
		}
		if o.took > time.Second {
			counted[valueOver1s]++
		}
		last = later(last, o.at)
		if o.bad() {
			lastFailed = later(lastFailed, o.at)
			counted[valueFailed]++
			if r.authority.couldServe(r.clientOf(o).ID, o.at, o.end()) {
				counted[valueWithheld]++
			}
		}
	}
	if !trouble.IsZero() {
		counted[valueRecovery] = max(0, lastFailed.Sub(trouble).Seconds())
		if last.Sub(lastFailed) < time.Second {
			counted[valueRecovery] = never
		}
	}
	return counted
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// clientOf returns the client whose token a request needs: the number begins its path if
// there are several.
func (r *rig) clientOf(o outcome) oauthClient {
	var i int
	if n, err := fmt.Sscanf(o.path, "/%d/", &i); n == 1 && err == nil && i < len(r.Clients) {
		return r.Clients[i]
	}
	return r.Client()
}
