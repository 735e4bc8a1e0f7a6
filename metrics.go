// The metrics, and the placeholders that tell how a request got its token.

package outboundauth

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/caddyserver/caddy/v2"
)

var tokenUses = [...]string{tokenFresh: "fresh", tokenStale: "stale", tokenWaited: "fetched", tokenNone: "none"}

// How a request ended after the upstream had refused it.
const (
	refusalRecovered     = "recovered"      // the upstream accepted a new token
	refusalRefusedAgain  = "refused_again"  // the upstream refused a new token as well
	refusalNoToken       = "no_token"       // there was no other token
	refusalNotRepeatable = "not_repeatable" // too much of the body was gone to send it again
	refusalNoAnswer      = "no_answer"      // nobody answered the request with the new token
	refusalPath          = "path"           // the refusal was not about the token
)

var refusalOutcomes = []string{
	refusalRecovered, refusalRefusedAgain, refusalNoToken, refusalNotRepeatable, refusalNoAnswer, refusalPath,
}

// resultOK is the result of a token request that brought a token. All other
// results are error codes.
const resultOK = "ok"

// knownCodes are the error codes that metrics tell apart. Servers make up other
// codes, and their number is not limited.
var knownCodes = []string{
	codeTimeout, codeNetwork, codeInvalidResponse, codeHTTPStatus, codeConfiguration,
	"invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "unsupported_grant_type",
	"invalid_scope", "invalid_target", "temporarily_unavailable", "server_error", "slow_down",
}

const codeOther = "other"

// The metrics belong to the process. So they go on counting when a config is
// reloaded, although each config has its own registry. Clients that have the
// same name share their metrics.
var (
	tokenRequestsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "token_requests_total",
		Help: "Attempts to obtain a token by their result: ok, or an error code.",
	}, []string{"client", "result"})
	tokenRequestDuration = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "token_request_duration_seconds",
		Help: "How long token requests took.",
	}, []string{"client"})
	requestsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "requests_total",
		Help: "Requests to upstreams by how they got their token: fresh and stale ones from the cache, fetched, or none.",
	}, []string{"client", "token"})
	waitDuration = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "wait_duration_seconds",
		Help: "How long requests waited, of those that had to wait for a token.",
	}, []string{"client"})
	refusedRequestsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "rejections_total",
		Help: "Requests that the upstream refused, by how they ended: path if the token was not the reason.",
	}, []string{"client", "outcome"})
	refusedTokensTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "invalidated_tokens_total",
		Help: "Tokens replaced because an upstream refused them.",
	}, []string{"client"})
)

// registerMetrics adds the metrics to the registry of a config, unless another
// transport of this config has done so.
func registerMetrics(ctx caddy.Context) error {
	registry := ctx.GetMetricsRegistry()
	for _, collector := range []prometheus.Collector{
		tokenRequestsTotal, tokenRequestDuration, requestsTotal, waitDuration, refusedRequestsTotal, refusedTokensTotal,
		sourceCollector{},
	} {
		if err := registry.Register(collector); err != nil {
			if _, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); !ok {
				return err
			}
		}
	}
	return nil
}

// clientMetrics are the metrics of the clients that have one name. They are
// looked up only once; see metricsOf. All series except those of errors exist
// from the beginning, with the value 0: a rate needs a value to start from.
type clientMetrics struct {
	name          string
	client        any                 // the value of phClient
	values        [len(tokenUses)]any // the values of phToken
	uses          [len(tokenUses)]prometheus.Counter
	waits         prometheus.Observer
	duration      prometheus.Observer
	outcomes      map[string]prometheus.Counter // counters of requests that were refused
	refusedTokens prometheus.Counter

	mu      sync.Mutex
	results map[string]prometheus.Counter // guarded by mu
}

// result returns the counter of the token requests that had this result.
func (m *clientMetrics) result(result string) prometheus.Counter {
	m.mu.Lock()
	defer m.mu.Unlock()
	counter, ok := m.results[result]
	if !ok {
		counter = tokenRequestsTotal.WithLabelValues(m.name, result)
		m.results[result] = counter
	}
	return counter
}

// tokenRequested counts a token request that ended with err, or with a token if
// err is nil.
func (m *clientMetrics) tokenRequested(took time.Duration, err error) {
	result, asked := resultOK, true
	if err != nil {
		result = codeOther
		if failure, ok := errors.AsType[*tokenError](err); ok && slices.Contains(knownCodes, failure.Code) {
			result = failure.Code
			asked = result != codeConfiguration || failure.Status != 0
		}
	}
	m.result(result).Inc()
	if asked { // otherwise there was no request: a setting could not be read
		m.duration.Observe(took.Seconds())
	}
}

// metricsByName holds the clientMetrics of all names so far. Like the series,
// they stay for ever.
var metricsByName sync.Map

// metricsOf returns the metrics of the clients that have this name.
func metricsOf(name string) *clientMetrics {
	if m, ok := metricsByName.Load(name); ok {
		return m.(*clientMetrics)
	}
	m, _ := metricsByName.LoadOrStore(name, newClientMetrics(name))
	return m.(*clientMetrics)
}

func newClientMetrics(name string) *clientMetrics {
	m := &clientMetrics{
		name:          name,
		client:        name,
		waits:         waitDuration.WithLabelValues(name),
		duration:      tokenRequestDuration.WithLabelValues(name),
		outcomes:      make(map[string]prometheus.Counter),
		results:       make(map[string]prometheus.Counter),
		refusedTokens: refusedTokensTotal.WithLabelValues(name),
	}
	for use, label := range tokenUses {
		m.values[use] = label
		m.uses[use] = requestsTotal.WithLabelValues(name, label)
	}
	for _, outcome := range refusalOutcomes {
		m.outcomes[outcome] = refusedRequestsTotal.WithLabelValues(name, outcome)
	}
	m.result(resultOK)
	return m
}

// requested counts a request by how it got its token, and sets the placeholders.
func (m *clientMetrics) requested(ctx context.Context, got acquisition) {
	m.uses[got.use].Inc()
	if got.wait > 0 {
		m.waits.Observe(got.wait.Seconds())
	}
	if repl, ok := replacerOf(ctx); ok {
		repl.Set(phClient, m.client)
		repl.Set(phToken, m.values[got.use])
		repl.Set(phWait, got.wait.Milliseconds())
		repl.Set(phRetried, false)
	}
}

// forgetUse deletes the placeholders that an earlier try of the same request has
// set.
func forgetUse(ctx context.Context) {
	if repl, ok := replacerOf(ctx); ok {
		for _, placeholder := range []string{phClient, phToken, phWait, phRetried} {
			repl.Delete(placeholder)
		}
	}
}

// waitedAgain counts the wait for the token that replaces a refused one.
func (m *clientMetrics) waitedAgain(ctx context.Context, wait time.Duration) {
	m.waits.Observe(wait.Seconds())
	if repl, ok := replacerOf(ctx); ok {
		before, _ := repl.Get(phWait)
		ms, _ := before.(int64)
		repl.Set(phWait, ms+wait.Milliseconds())
	}
}

// refused counts a request that the upstream refused.
func (m *clientMetrics) refused(ctx context.Context, outcome string) {
	m.outcomes[outcome].Inc()
	if outcome == refusalRecovered || outcome == refusalRefusedAgain || outcome == refusalNoAnswer {
		if repl, ok := replacerOf(ctx); ok {
			repl.Set(phRetried, true)
		}
	}
}

// counts returns the values of the counters, by label.
func (m *clientMetrics) counts() (requests, tokenRequests, refusals map[string]uint64) {
	requests, tokenRequests, refusals = make(map[string]uint64), make(map[string]uint64), make(map[string]uint64)
	for use, counter := range m.uses {
		requests[tokenUses[use]] = value(counter)
	}
	for outcome, counter := range m.outcomes {
		refusals[outcome] = value(counter)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for result, counter := range m.results {
		tokenRequests[result] = value(counter)
	}
	return requests, tokenRequests, refusals
}

func value(c prometheus.Counter) uint64 {
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		return 0
	}
	return uint64(m.GetCounter().GetValue())
}

// sourceCollector reads the states of the token sources each time that the
// metrics are read: the states change when nothing but time passes.
type sourceCollector struct{}

var (
	sourcesDesc = prometheus.NewDesc("caddy_oauth2_sources",
		"Token sources that are in use.", nil, nil)
	stateDesc = prometheus.NewDesc("caddy_oauth2_token_state",
		"1 for the state in which the client's token is: fresh, stale, expired or absent.", []string{"client", "state"}, nil)
	expiryDesc = prometheus.NewDesc("caddy_oauth2_token_expiry_timestamp_seconds",
		"When the client's token expires.", []string{"client"}, nil)
	renewalDesc = prometheus.NewDesc("caddy_oauth2_token_renewal_timestamp_seconds",
		"When the client's token is due to be replaced.", []string{"client"}, nil)
	failuresDesc = prometheus.NewDesc("caddy_oauth2_consecutive_failures",
		"0 if the last attempt to obtain a token did not fail, otherwise how many have failed, as the back-off counts them.", []string{"client"}, nil)
	permanentDesc = prometheus.NewDesc("caddy_oauth2_permanent_error",
		"1 if the last attempt to obtain a token failed for a reason that does not pass by itself.", []string{"client"}, nil)
	retryDesc = prometheus.NewDesc("caddy_oauth2_retry_timestamp_seconds",
		"When a client that failed tries again; 0 if it did not fail.", []string{"client"}, nil)
	refusingDesc = prometheus.NewDesc("caddy_oauth2_refusing_upstreams",
		"Upstreams that have accepted no request since they refused the client's token.", []string{"client"}, nil)
	refusalDesc = prometheus.NewDesc("caddy_oauth2_last_refusal_timestamp_seconds",
		"When one of these upstreams last refused the client's token; 0 if there are none.", []string{"client"}, nil)
)

// Describe implements prometheus.Collector.
func (sourceCollector) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{sourcesDesc, stateDesc, expiryDesc, renewalDesc, failuresDesc, permanentDesc, retryDesc, refusingDesc, refusalDesc} {
		descs <- desc
	}
}

// Collect implements prometheus.Collector.
func (sourceCollector) Collect(collected chan<- prometheus.Metric) {
	collectStatuses(sourceStatuses(), collected)
}

// collectStatuses makes the metrics of these sources.
func collectStatuses(statuses []sourceStatus, collected chan<- prometheus.Metric) {
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		collected <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	byName := make(map[string]sourceStatus)
	inUse := make(map[sourceKey]struct{})
	refusing := make(map[string]int)           // by name
	lastRefusals := make(map[string]time.Time) // by name
	for _, status := range statuses {
		inUse[status.key] = struct{}{}
		upstreams, last := status.refusing()
		refusing[status.name] += upstreams
		if last.After(lastRefusals[status.name]) {
			lastRefusals[status.name] = last
		}
		// Of the clients that have the same name, keep the one in the worst
		// state.
		if other, ok := byName[status.name]; !ok || status.worseThan(other) {
			byName[status.name] = status
		}
	}
	gauge(sourcesDesc, float64(len(inUse)))
	for name, status := range byName {
		for _, state := range tokenStates {
			value := 0.0
			if state == status.state {
				value = 1
			}
			gauge(stateDesc, value, name, state)
		}
		gauge(expiryDesc, timestamp(status.expires), name)
		gauge(renewalDesc, timestamp(status.renewal), name)
		gauge(failuresDesc, float64(status.failures), name)
		permanent := 0.0
		if isPermanent(status.err) {
			permanent = 1
		}
		gauge(permanentDesc, permanent, name)
		gauge(retryDesc, timestamp(status.retryAt), name)
		gauge(refusingDesc, float64(refusing[name]), name)
		gauge(refusalDesc, timestamp(lastRefusals[name]), name)
	}
}

func timestamp(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMilli()) / 1000
}
