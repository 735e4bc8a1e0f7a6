package e2e

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// steadyLoad sends requests at a constant rate, whatever becomes of those
// before, until it is stopped.
type steadyLoad struct {
	url    string
	rate   int // requests a second
	resend bool
	limit  time.Duration // how long an answer may take; default: 15 s

	// compose returns the n-th request; default: every other one has a body.
	compose func(n int) (*http.Request, error)

	client   *http.Client
	again    *http.Client // for what is sent again
	stopped  chan struct{}
	done     chan struct{} // the last request has been sent
	inFlight sync.WaitGroup

	mu       sync.Mutex
	outcomes []outcome
}

// outcome is what became of one request.
type outcome struct {
	n          int // the first is 0
	due        time.Time
	sent       time.Time     // later than due if the machine is busy
	took       time.Duration // since it was due
	status     int           // 0: no answer
	retryAfter string
	err        error
	resent     int
}

func (o outcome) ok() bool { return o.status == http.StatusOK }

func (o outcome) String() string {
	if o.err != nil {
		return o.err.Error()
	}
	return fmt.Sprintf("%d, Retry-After %q", o.status, o.retryAfter)
}

func (l *steadyLoad) start() {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = 4 * l.rate
	l.client = &http.Client{Transport: transport, Timeout: cmp.Or(l.limit, 15*time.Second)}
	l.again = resender(l.client)
	if l.compose == nil {
		l.compose = l.everyOtherWithBody
	}
	l.stopped, l.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(l.done)
		interval := time.Second / time.Duration(l.rate)
		for n, due := 0, time.Now(); ; n, due = n+1, due.Add(interval) {
			select {
			case <-l.stopped:
				return
			case <-time.After(time.Until(due)):
			}
			l.inFlight.Go(func() { l.request(n, due) })
		}
	}()
}

// stop ends the load and returns what became of the requests, in the order
// in which they were due.
func (l *steadyLoad) stop() outcomes {
	close(l.stopped)
	<-l.done
	l.inFlight.Wait()
	l.client.CloseIdleConnections()
	slices.SortFunc(l.outcomes, func(a, b outcome) int { return a.due.Compare(b.due) })
	return l.outcomes
}

// request makes the n-th request.
func (l *steadyLoad) request(n int, due time.Time) {
	sent := time.Now()
	o := l.send(l.client, n)
	for l.resend && o.status == 0 && o.resent < 3 {
		resent := o.resent + 1
		o = l.send(l.again, n)
		o.resent = resent
	}
	o.n, o.due, o.sent, o.took = n, due, sent, time.Since(due)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.outcomes = append(l.outcomes, o)
}

// everyOtherWithBody is compose by default.
func (l *steadyLoad) everyOtherWithBody(n int) (*http.Request, error) {
	method, body := http.MethodGet, ""
	if n%2 == 1 {
		method, body = http.MethodPost, fmt.Sprintf(`{"n":%d}`, n)
	}
	return http.NewRequest(method, fmt.Sprintf("%s/%d", l.url, n), strings.NewReader(body))
}

func (l *steadyLoad) send(client *http.Client, n int) outcome {
	req, err := l.compose(n)
	if err != nil {
		return outcome{err: err}
	}
	resp, err := client.Do(req)
	if err != nil {
		return outcome{err: err}
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return outcome{err: err}
	}
	return outcome{status: resp.StatusCode, retryAfter: resp.Header.Get("Retry-After")}
}

// succeededSince tells whether a request that was due later was answered
// with 200.
func (l *steadyLoad) succeededSince(since time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.outcomes, func(o outcome) bool { return o.ok() && o.due.After(since) })
}

// outcomes are in the order in which the requests were due.
type outcomes []outcome

// lost returns those that weren't answered with 200.
func (all outcomes) lost() outcomes {
	return slices.DeleteFunc(slices.Clone(all), outcome.ok)
}

func (all outcomes) resent() int {
	n := 0
	for _, o := range all {
		n += o.resent
	}
	return n
}

func (all outcomes) longest() time.Duration {
	longest := time.Duration(0)
	for _, o := range all {
		longest = max(longest, o.took)
	}
	return longest
}

// recovery returns how long after that instant the first request succeeded of
// those that were due from then on. Zero if none was lost.
func (all outcomes) recovery(since time.Time) time.Duration {
	if len(all.lost()) == 0 {
		return 0
	}
	first := time.Duration(-1)
	for _, o := range all {
		if at := o.due.Add(o.took).Sub(since); o.ok() && !o.due.Before(since) && (first < 0 || at < first) {
			first = at
		}
	}
	return first
}

// statuses names the answers to the lost requests.
func (all outcomes) statuses() string {
	counts := make(map[int]int)
	for _, o := range all.lost() {
		counts[o.status]++
	}
	var parts []string
	for _, status := range slices.Sorted(maps.Keys(counts)) {
		name := fmt.Sprint(status)
		if status == 0 {
			name = "none"
		}
		parts = append(parts, fmt.Sprintf("%s ×%d", name, counts[status]))
	}
	return strings.Join(parts, ", ")
}
