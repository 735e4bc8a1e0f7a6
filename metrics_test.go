package outboundauth

import (
	"bufio"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/caddyserver/caddy/v2"
)

// newOperableGateway is newGateway with an admin API, which Caddy would leave
// running when it stops.
func newOperableGateway(t *testing.T) *gateway {
	t.Helper()
	g := newGateway(t)
	g.admin = heldAddress(t)
	t.Cleanup(func() {
		if err := caddy.Load([]byte(`{"admin":{"disabled":true,"config":{"persist":false}}}`), true); err != nil {
			t.Errorf("ending the admin API: got %v, want no error", err)
		}
	})
	return g
}

// newName is a client that no test has used: the counters are those of the
// process.
func newName() string { return "client-" + strings.ToLower(rand.Text()[:8]) }

// ask sends a request to the admin API.
func (g *gateway) ask(method, path string) reply {
	req, err := http.NewRequest(method, "http://"+g.admin+path, nil)
	if err != nil {
		return reply{err: err}
	}
	req.Close = true // each config has an admin API of its own
	res, err := g.client.Do(req)
	if err != nil {
		return reply{err: err}
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return reply{res.StatusCode, res.Header, string(body), err}
}

// series are the values of the product's metrics, by name and labels.
type series map[string]float64

// scrape does what Prometheus does.
func (g *gateway) scrape() series {
	g.t.Helper()
	body := g.ask(http.MethodGet, "/metrics").want(g.t, http.StatusOK).body
	found := make(series)
	for lines := bufio.NewScanner(strings.NewReader(body)); lines.Scan(); {
		line := lines.Text()
		if !strings.HasPrefix(line, "caddy_oauth2_") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			g.t.Fatalf("got the line %q, want a value at its end", line)
		}
		found[strings.TrimPrefix(line[:i], "caddy_oauth2_")] = value
	}
	return found
}

// of returns the series of one client without its label.
func (s series) of(client string) series { return s.labelled("client", client) }

// at returns the series of one token endpoint without its label, but for the buckets.
func (s series) at(endpoint string) series { return s.labelled("endpoint", endpoint) }

func (s series) labelled(label, value string) series {
	found := make(series)
	label = fmt.Sprintf("%s=%q", label, value)
	for name, value := range s {
		if strings.Contains(name, label) && !strings.Contains(name, "_bucket{") {
			name = strings.NewReplacer("{"+label+"}", "", label+",", "").Replace(name)
			found[name] = value
		}
	}
	return found
}

// since returns by how much the series have grown. An endpoint needs that: its port may
// be one that an earlier test has used.
func (s series) since(before series) series {
	grown := make(series)
	for name, value := range s {
		grown[name] = value - before[name]
	}
	return grown
}

// want fails the test unless the series have these values.
func (s series) want(t *testing.T, want series) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if got, ok := s[name]; !ok || got != want[name] {
			t.Errorf("%s: got %v (there: %v), want %v", name, got, ok, want[name])
		}
	}
}

// sourceOf returns the source of a client.
func sourceOf(t *testing.T, name string) *tokenSource {
	t.Helper()
	for _, status := range sourceStatuses() {
		if _, source, ok := sourceByID(status.key.id()); ok && status.name == name {
			return source
		}
	}
	t.Fatalf("got no source of %s, want one", name)
	return nil
}

// age gives the current token other instants.
func (s *tokenSource) age(change func(*token)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	aged := *s.current
	change(&aged)
	s.current = &aged
}

func due(t *token)   { t.refreshAt = time.Now().Add(-time.Minute) }
func spent(t *token) { due(t); t.usableTo = time.Now().Add(-time.Second); t.expires = t.usableTo }

func TestMetricsTellHowRequestsGotTheirTokens(t *testing.T) {
	auth := newAuthServer(t)
	release := auth.hang()
	defer release()
	up := newUpstream(t, auth)
	g, name := newOperableGateway(t), newName()
	t.Setenv("TEST_NAME", name)
	g.load(proxySite(up, auth, "name {env.TEST_NAME}"))
	g.scrape().of(name).want(t, series{ // rates need a value to start from
		`requests_total{token="fresh"}`: 0, `requests_total{token="stale"}`: 0,
		`requests_total{token="fetched"}`: 0, `requests_total{token="none"}`: 0,
		`token_requests_total{result="ok"}`: 0, "invalidated_tokens_total": 0,
		`rejections_total{outcome="recovered"}`: 0, `rejections_total{outcome="refused_again"}`: 0,
		`rejections_total{outcome="no_token"}`: 0, `rejections_total{outcome="not_repeatable"}`: 0,
		`rejections_total{outcome="no_answer"}`: 0, `rejections_total{outcome="path"}`: 0,
		"refusing_upstreams": 0, "last_refusal_timestamp_seconds": 0,
	})
	host := auth.Listener.Addr().String()
	before := g.scrape().at(host)
	before.since(before).want(t, series{"token_request_duration_seconds_count": 0, "wait_duration_seconds_count": 0})

	answers := make(chan []reply)
	go func() { answers <- g.burst(3) }()
	eventually(t, func() bool { return waiting() == 3 }, "three requests to wait")
	started := time.Now()
	eventually(t, func() bool { return time.Since(started) > 20*time.Millisecond }, "some waiting")
	release()
	wantAll(t, <-answers, http.StatusOK)
	wantAll(t, g.burst(2), http.StatusOK)

	sourceOf(t, name).age(due)
	g.get().want(t, http.StatusOK)
	eventually(t, func() bool { return g.scrape().of(name)[`token_requests_total{result="ok"}`] == 2 }, "the renewal")

	_ = sourceOf(t, name).rested().Forget(t.Context())
	auth.script(refusingForLong(http.StatusUnauthorized, `{"error":"invalid_client"}`))
	wantAll(t, g.burst(4), http.StatusServiceUnavailable)

	all := g.scrape()
	all.of(name).want(t, series{
		`requests_total{token="fresh"}`: 2, `requests_total{token="stale"}`: 1,
		`requests_total{token="fetched"}`: 3, `requests_total{token="none"}`: 4,
		`token_requests_total{result="ok"}`: 2, `token_requests_total{result="invalid_client"}`: 1,
	})
	got := all.at(host).since(before)
	got.want(t, series{"token_request_duration_seconds_count": 3})
	// Those that were refused may have waited for a look at the secret.
	if waited := got["wait_duration_seconds_count"]; waited < 3 || waited > 7 {
		t.Errorf("got %v requests that waited, want the three, and perhaps the four", waited)
	}
	for name, least := range (series{"wait_duration_seconds_sum": 3 * 0.02, "token_request_duration_seconds_sum": 0.02}) {
		if got[name] < least || got[name] > 60 {
			t.Errorf("%s: got %v, want at least %v seconds", name, got[name], least)
		}
	}
}

// Whoever waits is counted, whatever comes of it, and nobody else is.
func TestMetricsTellWhoWaited(t *testing.T) {
	m := metricsOf(newName(), newName())
	for _, got := range []acquisition{{use: tokenFresh}, {use: tokenNone}, {tokenStale, time.Second}, {tokenWaited, time.Second}, {tokenNone, time.Second}} {
		m.requested(t.Context(), got)
	}
	var waits dto.Metric
	if err := m.waits.(prometheus.Metric).Write(&waits); err != nil {
		t.Fatal(err)
	}
	if h := waits.GetHistogram(); h.GetSampleCount() != 3 || h.GetSampleSum() != 3 {
		t.Errorf("got %d waits of %v seconds, want 3 of 3", h.GetSampleCount(), h.GetSampleSum())
	}
}

// The code of an error becomes a label, if it is one of a fixed set.
func TestMetricsTellResultsOfTokenRequestsApart(t *testing.T) {
	for _, test := range []struct {
		result, settings string
		answer           func(http.ResponseWriter, tokenRequest) bool
	}{
		{"invalid_client", "", refusing(401, `{"error":"invalid_client"}`)},
		{"invalid_grant", "", refusing(400, `{"error":"invalid_grant"}`)},
		{"unauthorized_client", "", refusing(400, `{"error":"unauthorized_client"}`)},
		{"invalid_scope", "", refusing(400, `{"error":"invalid_scope"}`)},
		{"invalid_target", "", refusing(400, `{"error":"invalid_target"}`)},
		{"server_error", "", refusing(500, `{"error":"server_error"}`)},
		{"http_status", "", refusing(503, "")},
		{"invalid_response", "", refusing(200, "<html>")},
		{"other", "", refusing(400, `{"error":"account_locked"}`)},
		{"other", "", refusing(400, `{"error":"ok"}`)}, // no success, whatever it says
		{"other", "", refusing(400, `{"error":"other"}`)},
		{"network", "", func(w http.ResponseWriter, _ tokenRequest) bool { panic(http.ErrAbortHandler) }},
		{"timeout", "token_timeout 50ms", func(_ http.ResponseWriter, r tokenRequest) bool { <-r.ctx.Done(); return true }},
		{"configuration", "client_secret {env.OUTBOUNDAUTH_TEST_UNSET}", nil},
	} {
		t.Run(test.result, func(t *testing.T) {
			auth := newAuthServer(t)
			auth.script(test.answer)
			g, name := newOperableGateway(t), newName()
			host := auth.Listener.Addr().String()
			var before dto.Metric
			if err := tokenRequestDuration.WithLabelValues(host).(prometheus.Metric).Write(&before); err != nil {
				t.Fatal(err)
			}
			site := proxySite(newUpstream(t, nil), auth, "name "+name+"\n"+test.settings)
			if strings.HasPrefix(test.settings, "client_secret") {
				site = strings.Replace(site, "client_secret canary-secret\n", "", 1)
			}
			g.load(site)
			source := sourceOf(t, name)
			if _, _, err := source.Token(t.Context()); err == nil {
				t.Fatal("got a token, want the error")
			}
			var got series
			only := func() bool {
				all := g.scrape()
				got = all.of(name)
				results := 0.0
				for series, value := range got {
					if result, ok := strings.CutPrefix(series, "token_requests_total{result="); ok && result != `"ok"}` {
						results += value
					}
				}
				count := got[fmt.Sprintf("token_requests_total{result=%q}", test.result)]
				durations := count
				if test.result == codeConfiguration { // no server was asked
					durations = 0
				}
				durations += float64(before.GetHistogram().GetSampleCount())
				return count > 0 && results == count && all.at(host)["token_request_duration_seconds_count"] == durations
			}
			// Another try may end while the metrics are read, one after the other.
			eventually(t, only, "%s only", test.result)
			got.want(t, series{`token_requests_total{result="ok"}`: 0})
		})
	}
}

func TestMetricsTellHowRefusedRequestsEnded(t *testing.T) {
	refuseAll := func(w http.ResponseWriter, _ *http.Request) bool {
		refuse(w, http.StatusUnauthorized)
		return true
	}
	attempts := 0
	refuseThenBreak := func(w http.ResponseWriter, r *http.Request) bool {
		if attempts++; attempts == 2 {
			panic(http.ErrAbortHandler)
		}
		return refuseAll(w, r)
	}
	for _, test := range []struct {
		outcome, settings string
		answer            func(http.ResponseWriter, *http.Request) bool // of the upstream
		reanswer          func(http.ResponseWriter, tokenRequest) bool  // of the authorization server
		status            int
		invalidated       float64 // tokens: of those, the verdict is the token
		again             series  // after another request
	}{
		{"recovered", "", nil, nil, http.StatusOK, 1, series{
			`rejections_total{outcome="recovered"}`: 1, "invalidated_tokens_total": 1, "refusing_upstreams": 0,
		}},
		{"refused_again", "", refuseAll, nil, http.StatusUnauthorized, 0, series{
			// The second comes too soon for another token.
			`rejections_total{outcome="refused_again"}`: 1, `rejections_total{outcome="path"}`: 1,
			"invalidated_tokens_total": 0, "refusing_upstreams": 1,
		}},
		{"no_token", "", nil, refusing(http.StatusBadRequest, ""), http.StatusUnauthorized, 0, series{"refusing_upstreams": 1}},
		{"not_repeatable", "replay_body 0", nil, nil, http.StatusUnauthorized, 1, series{
			`rejections_total{outcome="not_repeatable"}`: 1, "invalidated_tokens_total": 1, "refusing_upstreams": 0,
		}},
		{"no_answer", "", refuseThenBreak, nil, http.StatusBadGateway, 0, nil},
	} {
		t.Run(test.outcome, func(t *testing.T) {
			g := newOperableGateway(t)
			// A second after the last one, there may be another token. On a busy machine,
			// the second request may come that late. That tells nothing, and all starts again.
			for deadline := time.Now().Add(3 * patience); ; {
				auth := newAuthServer(t)
				up := newUpstream(t, auth)
				name := newName()
				g.load(proxySite(up, auth, "name "+name+"\n"+test.settings))
				post := func() reply { return g.send(http.MethodPost, "/", strings.NewReader("body")) }
				post().want(t, http.StatusOK)
				auth.revoke()
				auth.script(test.reanswer)
				up.script(test.answer)
				refused := time.Now()
				post().want(t, test.status)
				want := series{
					"invalidated_tokens_total":   test.invalidated,
					`token_state{state="fresh"}`: 1, // it is the upstream that refuses
				}
				for _, outcome := range refusalOutcomes {
					want[fmt.Sprintf("rejections_total{outcome=%q}", outcome)] = 0
				}
				want[fmt.Sprintf("rejections_total{outcome=%q}", test.outcome)] = 1
				g.scrape().of(name).want(t, want)
				if test.again == nil {
					return
				}
				if r := post(); r.err != nil {
					t.Fatal(r.err)
				}
				if time.Since(refused) < time.Second || time.Now().After(deadline) {
					g.scrape().of(name).want(t, test.again)
					return
				}
			}
		})
	}
}

// A request that was refused for its path is not sent once more.
func TestMetricsTellARefusedPath(t *testing.T) {
	m := metricsOf(newName(), newName())
	repl := caddy.NewReplacer()
	ctx := context.WithValue(t.Context(), caddy.ReplacerCtxKey, repl)
	m.requested(ctx, acquisition{use: tokenFresh})
	m.refused(ctx, refusalPath)
	if _, _, refusals := m.counts(); refusals["path"] != 1 {
		t.Errorf("got %v, want the refused path", refusals)
	}
	if got, _ := repl.Get(phRetried); got != false {
		t.Errorf("got %s %v, want false", phRetried, got)
	}
}

// statusCollector makes the metrics of sources that have these statuses.
type statusCollector []*sourceStatus

func (statusCollector) Describe(chan<- *prometheus.Desc) {}

func (c statusCollector) Collect(collected chan<- prometheus.Metric) { collectStatuses(c, collected) }

// originCollector makes the metrics of origins that have these statuses.
type originCollector []originStatus

func (originCollector) Describe(chan<- *prometheus.Desc) {}

func (c originCollector) Collect(collected chan<- prometheus.Metric) { collectOrigins(c, collected) }

// gaugesOf returns the gauges of a collector that have one label, by their names and the
// values of the label.
func gaugesOf(t *testing.T, collector prometheus.Collector) series {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(collector)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(series)
	for _, family := range families {
		for _, m := range family.GetMetric() {
			if labels := m.GetLabel(); len(labels) == 1 {
				got[family.GetName()+" "+labels[0].GetValue()] = m.GetGauge().GetValue()
			}
		}
	}
	return got
}

// Clients of one name are counted together, whichever of them is in the worst state.
func TestMetricsTellWhichUpstreamsRefuse(t *testing.T) {
	at := func(seconds int64) time.Time { return time.Unix(seconds, 0) }
	refusing := func(seconds int64) upstreamStatus {
		return upstreamStatus{"a:443", verdictToken, true, at(seconds)}
	}
	statuses := statusCollector{
		{key: sourceKey{1}, description: description{name: "orders"}, state: stateFresh, upstreams: []upstreamStatus{refusing(100), refusing(300)}},
		{key: sourceKey{2}, description: description{name: "orders"}, state: stateAbsent, upstreams: []upstreamStatus{refusing(200)}},
		{key: sourceKey{3}, description: description{name: "orders"}, state: stateFresh},
		{key: sourceKey{4}, description: description{name: "billing"}, state: stateFresh, upstreams: []upstreamStatus{
			{"b:443", verdictToken, false, at(500)}, // has accepted another since
			{"c:443", verdictPath, false, at(600)},
			{"d:443", verdictPath, true, at(700)},
		}},
		{key: sourceKey{5}, description: description{name: "search"}, state: stateFresh},
	}
	gaugesOf(t, statuses).want(t, series{
		"caddy_oauth2_refusing_upstreams orders": 3, "caddy_oauth2_last_refusal_timestamp_seconds orders": 300,
		"caddy_oauth2_refusing_upstreams billing": 0, "caddy_oauth2_last_refusal_timestamp_seconds billing": 0,
		"caddy_oauth2_refusing_upstreams search": 0, "caddy_oauth2_last_refusal_timestamp_seconds search": 0,
	})
}

// The origins of one host are added up, as their clients share its label.
func TestMetricsTellWhichEndpointsAreBusy(t *testing.T) {
	got := gaugesOf(t, originCollector{
		{endpoint: "auth.example.com", waiting: 3, limit: 8, heldBack: true},
		{endpoint: "auth.example.com", waiting: 2, limit: 1},
		{endpoint: "auth.example.com", limit: 4, heldBack: true},
		{endpoint: "auth.example.com:8443", limit: 8},
	})
	want := series{
		"caddy_oauth2_token_requests_waiting auth.example.com": 5, "caddy_oauth2_token_requests_waiting auth.example.com:8443": 0,
		"caddy_oauth2_token_requests_limit auth.example.com": 13, "caddy_oauth2_token_requests_limit auth.example.com:8443": 8,
		"caddy_oauth2_held_back_origins auth.example.com": 2, "caddy_oauth2_held_back_origins auth.example.com:8443": 0,
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := gaugesOf(t, originCollector{}); len(got) != 0 {
		t.Errorf("got %v without an origin, want nothing", got)
	}
}

func TestMetricsTellTheStateOfTheToken(t *testing.T) {
	wantNothingLeft(t)
	auth := newAuthServer(t)
	g, name := newOperableGateway(t), newName()
	g.load(proxySite(newUpstream(t, auth), auth, "name "+name))
	g.get().want(t, http.StatusOK)
	source := sourceOf(t, name)
	wantState := func(state string, more series) {
		t.Helper()
		want := series{"consecutive_failures": 0, "permanent_error": 0, "retry_timestamp_seconds": 0}
		for _, s := range tokenStates {
			want[fmt.Sprintf("token_state{state=%q}", s)] = 0
		}
		want[fmt.Sprintf("token_state{state=%q}", state)] = 1
		maps.Copy(want, more)
		got := g.scrape()
		got.of(name).want(t, want)
		got.want(t, series{"sources": 1})
	}

	wantState(stateFresh, nil)
	got := g.scrape().of(name)
	expiry, renewal := got["token_expiry_timestamp_seconds"], got["token_renewal_timestamp_seconds"]
	now := float64(time.Now().Unix())
	if expiry < now+3500 || expiry > now+3601 || renewal < now+1800 || renewal > expiry-900 {
		t.Errorf("got expiry %v and renewal %v at %v, want them in an hour and a while before", expiry, renewal, now)
	}

	renewed := time.Now().Add(-time.Minute)
	source.age(func(t *token) { t.refreshAt = renewed })
	wantState(stateStale, series{"token_renewal_timestamp_seconds": float64(renewed.UnixMilli()) / 1000})
	source.age(spent)
	wantState(stateExpired, nil)
	if _, err := source.rested().FetchNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantState(stateFresh, nil)
	_ = source.rested().Forget(t.Context())
	wantState(stateAbsent, series{"token_expiry_timestamp_seconds": 0, "token_renewal_timestamp_seconds": 0})

	// What passes by itself, and what somebody has to change.
	auth.script(func(w http.ResponseWriter, r tokenRequest) bool {
		w.Header().Set("Retry-After", "60") // no other try while this is looked at
		return refusing(http.StatusServiceUnavailable, "")(w, r)
	})
	if _, err := source.rested().FetchNow(t.Context()); err == nil {
		t.Fatal("got a token, want the error")
	}
	retry := g.scrape().of(name)["retry_timestamp_seconds"]
	wantState(stateAbsent, series{"consecutive_failures": 1, "retry_timestamp_seconds": retry})
	auth.script(refusing(http.StatusUnauthorized, `{"error":"invalid_client"}`))
	for failures := 1; failures < 3; failures++ {
		before := time.Now()
		if _, err := source.rested().FetchNow(t.Context()); err == nil {
			t.Fatal("got a token, want the error")
		}
		retry = g.scrape().of(name)["retry_timestamp_seconds"]
		if wait := retry - float64(before.UnixMilli())/1000; wait < 5 || wait > 600 {
			t.Errorf("got %v seconds to the next try, want some", wait)
		}
		wantState(stateAbsent, series{"consecutive_failures": float64(failures + 1), "permanent_error": 1, "retry_timestamp_seconds": retry})
	}
	auth.script(nil)
	if _, err := source.rested().FetchNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantState(stateFresh, nil)
}

// A new config has a new registry. What has been counted stays, also of
// clients that are gone; but these have no state any more.
func TestMetricsSurviveReloads(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g, name, other := newOperableGateway(t), newName(), newName()
	g.load(proxySite(up, auth, "name "+name))
	g.get().want(t, http.StatusOK)
	host := auth.Listener.Addr().String()
	before, beforeAtHost := g.scrape().of(name), g.scrape().at(host)
	for range 3 {
		g.load("respond /new x\n" + proxySite(up, auth, "name "+name))
		g.load(proxySite(up, auth, "name "+name))
	}
	if got := g.scrape().of(name); !maps.Equal(got, before) {
		t.Errorf("got %v, want %v as before the reloads", got, before)
	}
	if got := g.scrape().at(host); !maps.Equal(got, beforeAtHost) {
		t.Errorf("got %v, want %v as before the reloads", got, beforeAtHost)
	}

	g.load(proxySite(up, auth, "scopes other\nname "+other))
	g.get().want(t, http.StatusOK)
	got := g.scrape()
	got.want(t, series{"sources": 1})
	for series, value := range got.of(name) {
		if value != before[series] {
			t.Errorf("%s: got %v, want %v as before", series, value, before[series])
		}
		if !strings.Contains(series, "_total") {
			t.Errorf("got %s of a client that is gone, want its counters only", series)
		}
	}
	if got.of(name)[`token_requests_total{result="ok"}`] != 1 {
		t.Errorf("got %v, want one token request of the client that is gone", got.of(name))
	}
	got.of(other).want(t, series{`token_state{state="fresh"}`: 1, `token_requests_total{result="ok"}`: 1})
}

// An unload is no failure of the authorization server.
func TestMetricsDoNotCountAbandonedTokenRequests(t *testing.T) {
	auth := newAuthServer(t)
	release := auth.hang()
	defer release()
	g, name := newOperableGateway(t), newName()
	up := newUpstream(t, auth)
	g.load(proxySite(up, auth, "name "+name))
	eventually(t, func() bool { return len(auth.asked()) == 1 }, "the token request of the warm-up")
	host := auth.Listener.Addr().String()
	before := g.scrape().at(host)
	g.load(proxySite(up, newAuthServer(t), "name "+newName())) // or there would be no metrics
	eventually(t, func() bool { return len(goroutines()) == 0 }, "the end of the token request")
	if got := g.scrape().at(host); len(got) == 0 || !maps.Equal(got, before) {
		t.Errorf("got %v, want %v as before", got, before)
	}
	if len(g.scrape().of(name)) == 0 {
		t.Error("got no metrics of the client, want its counters")
	}
	for series, value := range g.scrape().of(name) {
		if value != 0 {
			t.Errorf("%s: got %v, want nothing counted", series, value)
		}
	}
}

// The copies of the request and its header are all that is allocated. A map of up to
// eight fields takes two allocations, a larger one takes four.
func TestRoundTripAllocatesLittle(t *testing.T) {
	dial := dialAddress{"tcp", "127.0.0.1:1"}
	transport := benchTransport(t, 1, dial)
	transport.HTTPTransport.Transport.RegisterProtocol("stub", &stubTransport{res: http.Response{StatusCode: 204, Body: http.NoBody}})
	transport.plaintext = true
	ctx := upstreamContext(t, dial.address)
	req := benchRequest(ctx, "stub://127.0.0.1:1")
	run := func(rt http.RoundTripper) float64 {
		return allocations(func() {
			res, err := rt.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
		})
	}
	whole := run(transport)
	for _, test := range []struct {
		fields int
		want   float64
	}{{6, 3}, {7, 5}, {12, 5}, {13, 5}, {26, 5}} {
		req.Header = make(http.Header)
		for i := range test.fields {
			req.Header.Set(fmt.Sprint("Field-", i), "value")
		}
		if got := run(transport) - run(transport.HTTPTransport); got > test.want {
			t.Errorf("got %v allocations more than the http transport with %d fields, want at most %v", got, test.fields, test.want)
		}
	}
	req = benchRequest(ctx, "stub://127.0.0.1:1")

	// Nor does it matter that upstreams have refused tokens.
	for _, refused := range []dialAddress{{"tcp", "127.0.0.1:2"}, dial} {
		transport.routes[dial].source.doubts(refused)
		if again := run(transport); again > whole {
			t.Errorf("got %v allocations when %v has refused a token, want %v as before", again, refused, whole)
		}
	}
	repl := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if got, _ := repl.GetString(phToken); got != "fresh" {
		t.Errorf("got the placeholder %q, want fresh: or this test sees nothing", got)
	}
}
