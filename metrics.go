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

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
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
	refusalProof         = "proof"          // it was about the proof: the request was sent again with another
	refusalProofAgain    = "proof_refused"  // the upstream refused that proof as well
)

var refusalOutcomes = []string{
	refusalRecovered, refusalRefusedAgain, refusalNoToken, refusalNotRepeatable, refusalNoAnswer, refusalPath, refusalProof, refusalProofAgain,
}

// Why a request was refused because of its client key.
const (
	keyMissing = "no_key"
	keyUnknown = "unknown_key"
)

var keyReasons = []string{keyMissing, keyUnknown}

// resultOK is the result of a token request that brought a token. All other
// results are error codes.
const resultOK = "ok"

// knownCodes are the error codes that metrics tell apart. Servers make up other
// codes, and their number is not limited.
var knownCodes = []string{
	codeTimeout, codeNetwork, codeInvalidResponse, codeHTTPStatus, codeConfiguration,
	"invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "unsupported_grant_type",
	"invalid_scope", "invalid_target", "temporarily_unavailable", "server_error", "slow_down",
	dpop.CodeUseNonce, dpop.CodeInvalidProof,
}

const codeOther = "other"

// The metrics belong to the process. So they go on counting when a config is
// reloaded, although each config has its own registry. Clients that have the
// same name share their counters. Histograms have a dozen series and more, so
// all clients of a token endpoint's host share one.
var (
	tokenRequestsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "token_requests_total",
		Help: "Attempts to obtain a token by their result: ok, or an error code.",
	}, []string{"client", "result"})
	tokenRequestDuration = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "token_request_duration_seconds",
		Help: "How long token requests took, by the host of the token endpoint as it is configured.",
	}, []string{"endpoint"})
	requestsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "requests_total",
		Help: "Requests to upstreams by how they got their token: fresh and stale ones from the cache, fetched, or none.",
	}, []string{"client", "token"})
	waitDuration = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "wait_duration_seconds",
		Help: "How long requests waited, of those that had to wait for a token, by the host of the token endpoint as it is configured.",
	}, []string{"endpoint"})
	refusedRequestsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "rejections_total",
		Help: "Requests that the upstream refused, by how they ended: path if the token was not the reason.",
	}, []string{"client", "outcome"})
	refusedTokensTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "invalidated_tokens_total",
		Help: "Tokens replaced because an upstream refused them.",
	}, []string{"client"})
	sharedTokensTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "shared_tokens_total",
		Help: "What has come of sharing tokens with other instances: taken and stored ones, and why there was none.",
	}, []string{"client", "result"})
	refusedKeysTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "caddy", Subsystem: "oauth2", Name: "client_refusals_total",
		Help: "Requests that were refused because of their client key, by the reason: no_key, or unknown_key.",
	}, []string{"reason"})
)

// registerMetrics adds the metrics to the registry of a config, unless another
// transport of this config has done so.
func registerMetrics(ctx caddy.Context) error {
	registry := ctx.GetMetricsRegistry()
	for _, collector := range []prometheus.Collector{
		sourceCollector{},
		tokenRequestsTotal, tokenRequestDuration, requestsTotal, waitDuration, refusedRequestsTotal, refusedTokensTotal, sharedTokensTotal, refusedKeysTotal,
	} {
		if err := registry.Register(collector); err != nil {
			if _, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); ok {
				return nil // and the others, too: with 10,000 transports, each error takes its time
			}
			return err
		}
	}
	return nil
}

// clientMetrics are the metrics of one client.
type clientMetrics struct {
	*clientCounters
	waits, duration prometheus.Observer // shared by the clients of one host
}

// clientCounters are the counters of the clients that have one name. They are
// looked up only once; see countersOf. All series except those of errors exist
// from the beginning, with the value 0: a rate needs a value to start from.
type clientCounters struct {
	name          string
	client        any                 // the value of phClient
	values        [len(tokenUses)]any // the values of phToken
	uses          [len(tokenUses)]prometheus.Counter
	outcomes      map[string]prometheus.Counter // counters of requests that were refused
	refusedTokens prometheus.Counter

	mu      sync.Mutex
	results map[string]prometheus.Counter // guarded by mu
}

// result returns the counter of the token requests that had this result.
func (c *clientCounters) result(result string) prometheus.Counter {
	c.mu.Lock()
	defer c.mu.Unlock()
	counter, ok := c.results[result]
	if !ok {
		counter = tokenRequestsTotal.WithLabelValues(c.name, result)
		c.results[result] = counter
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

// sharing returns what counts what has come of sharing a token. The series exist from now on.
func (c *clientCounters) sharing() (count func(result string)) {
	for _, result := range sharedResults {
		sharedTokensTotal.WithLabelValues(c.name, result)
	}
	return func(result string) { sharedTokensTotal.WithLabelValues(c.name, result).Inc() }
}

// countersByName holds the clientCounters of all names so far. Like the series,
// they stay for ever.
var countersByName sync.Map

// countersOf returns the counters of the clients that have this name.
func countersOf(name string) *clientCounters {
	if c, ok := countersByName.Load(name); ok {
		return c.(*clientCounters)
	}
	c, _ := countersByName.LoadOrStore(name, newClientCounters(name))
	return c.(*clientCounters)
}

func newClientCounters(name string) *clientCounters {
	c := &clientCounters{
		name:          name,
		client:        name,
		outcomes:      make(map[string]prometheus.Counter),
		results:       make(map[string]prometheus.Counter),
		refusedTokens: refusedTokensTotal.WithLabelValues(name),
	}
	for use, label := range tokenUses {
		c.values[use] = label
		c.uses[use] = requestsTotal.WithLabelValues(name, label)
	}
	for _, outcome := range refusalOutcomes {
		c.outcomes[outcome] = refusedRequestsTotal.WithLabelValues(name, outcome)
	}
	c.result(resultOK)
	return c
}

// metricsOf returns the metrics of a client with this name. host is that of its
// token endpoint, as it is configured: so the config bounds the number of
// series, whatever a server's metadata says.
func metricsOf(name, host string) *clientMetrics {
	return &clientMetrics{
		clientCounters: countersOf(name),
		waits:          waitDuration.WithLabelValues(host),
		duration:       tokenRequestDuration.WithLabelValues(host),
	}
}

// requested counts a request by how it got its token, and sets the placeholders.
//
// One function that knows all four, given to Replacer.Map, would take less time. But Map
// takes no lock. forward_auth before this proxy may have left a connection that is still
// being made, and Caddy looks up the name for its certificate in the same replacer. It
// could find a function that is not there yet, and end the server.
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
		for _, placeholder := range []string{phKey, phClient, phToken, phWait, phRetried} {
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
func (c *clientCounters) refused(ctx context.Context, outcome string) {
	c.outcomes[outcome].Inc()
	if outcome == refusalRecovered || outcome == refusalRefusedAgain || outcome == refusalNoAnswer {
		if repl, ok := replacerOf(ctx); ok {
			repl.Set(phRetried, true)
		}
	}
}

// counts returns the values of the counters, by label.
func (c *clientCounters) counts() (requests, tokenRequests, refusals map[string]uint64) {
	requests, tokenRequests, refusals = make(map[string]uint64), make(map[string]uint64), make(map[string]uint64)
	for use, counter := range c.uses {
		requests[tokenUses[use]] = value(counter)
	}
	for outcome, counter := range c.outcomes {
		refusals[outcome] = value(counter)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for result, counter := range c.results {
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

// sourceCollector reads the states of the token sources, and of the origins that
// they ask, each time that the metrics are read: the states change when nothing
// but time passes.
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
	boundDesc = prometheus.NewDesc("caddy_oauth2_token_bound",
		"1 if the client's token is bound to a key or a certificate, so that it is of no use without that.", []string{"client"}, nil)
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
	waitingDesc = prometheus.NewDesc("caddy_oauth2_token_requests_waiting",
		"Token requests that wait until the endpoint's server has room for them.", []string{"endpoint"}, nil)
	limitDesc = prometheus.NewDesc("caddy_oauth2_token_requests_limit",
		"How many token requests may be under way at once at the endpoint's server.", []string{"endpoint"}, nil)
	heldBackDesc = prometheus.NewDesc("caddy_oauth2_held_back_origins",
		"Origins of the endpoint's server that are sent few token requests, because the server asked two clients or more to wait, or gives nobody a token.",
		[]string{"endpoint"}, nil)
)

// Describe implements prometheus.Collector.
func (sourceCollector) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{
		sourcesDesc, stateDesc, expiryDesc, renewalDesc, boundDesc, failuresDesc, permanentDesc, retryDesc, refusingDesc, refusalDesc,
		waitingDesc, limitDesc, heldBackDesc,
	} {
		descs <- desc
	}
}

// Collect implements prometheus.Collector.
func (sourceCollector) Collect(collected chan<- prometheus.Metric) {
	collectStatuses(sourceStatuses(), collected)
	collectOrigins(originStatuses(), collected)
}

// gauges makes gauges of one collection.
type gauges chan<- prometheus.Metric

func (g gauges) set(desc *prometheus.Desc, value float64, labels ...string) {
	g <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
}

// collectStatuses makes the metrics of these sources.
func collectStatuses(statuses []*sourceStatus, collected gauges) {
	byName := make(map[string]*sourceStatus)
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
	collected.set(sourcesDesc, float64(len(inUse)))
	for name, status := range byName {
		for _, state := range tokenStates {
			collected.set(stateDesc, yesNo(state == status.state), name, state)
		}
		collected.set(expiryDesc, timestamp(status.expires), name)
		collected.set(renewalDesc, timestamp(status.renewal), name)
		collected.set(failuresDesc, float64(status.failures), name)
		collected.set(boundDesc, yesNo(status.bound), name)
		collected.set(permanentDesc, yesNo(isPermanent(status.err)), name)
		collected.set(retryDesc, timestamp(status.retryAt), name)
		collected.set(refusingDesc, float64(refusing[name]), name)
		collected.set(refusalDesc, timestamp(lastRefusals[name]), name)
	}
}

// collectOrigins makes the metrics of these origins. One host may have several, such
// as http and https: they are added up.
func collectOrigins(origins []originStatus, collected gauges) {
	type sums struct{ waiting, limit, heldBack int }
	byEndpoint := make(map[string]sums)
	for _, origin := range origins {
		sum := byEndpoint[origin.endpoint]
		sum.waiting += origin.waiting
		sum.limit += origin.limit
		if origin.heldBack {
			sum.heldBack++
		}
		byEndpoint[origin.endpoint] = sum
	}
	for endpoint, sum := range byEndpoint {
		collected.set(waitingDesc, float64(sum.waiting), endpoint)
		collected.set(limitDesc, float64(sum.limit), endpoint)
		collected.set(heldBackDesc, float64(sum.heldBack), endpoint)
	}
}

// yesNo returns the value of a gauge that says yes or no.
func yesNo(on bool) float64 {
	if on {
		return 1
	}
	return 0
}

func timestamp(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMilli()) / 1000
}
