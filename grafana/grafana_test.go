package grafana

import (
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	promapi "github.com/prometheus/client_golang/api/prometheus/v1"
	"github.com/prometheus/common/model"
)

// eventually is how long anything may take that the test waits for.
const eventually = 45 * time.Second

// throttling is an authorization server that tells its clients to wait.
const throttling = "throttling"

// forDuration is how long a condition must hold before it is an alert: too long
// for a test.
var forDuration = regexp.MustCompile(`(?m)^( +for:) .+$`)

// promtool runs promtool, and returns what it says.
func promtool(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	path, err := lookPath("promtool")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("promtool %s: got %v, want no error\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestAlertsFireWhenTheyShould(t *testing.T) {
	promtool(t, "", "check", "rules", "alerts.yml")
	promtool(t, "", "test", "rules", "alerts_test.yml")
}

func TestDashboardIsWellFormed(t *testing.T) {
	d, err := ReadDashboard("dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	if d.UID == "" {
		t.Error("got no uid, want one: links to the dashboard hold it")
	}
	var ids []int
	for _, p := range d.Panels {
		if slices.Contains(ids, p.ID) {
			t.Errorf("%s: got the id %d of another panel", p.Title, p.ID)
		}
		ids = append(ids, p.ID)
		if p.Title == "" || !strings.HasSuffix(p.Description, ".") || len(p.Targets) == 0 {
			t.Errorf("panel %d: got title %q, description %q and %d queries, want all of them", p.ID, p.Title, p.Description, len(p.Targets))
		}
	}
}

// TestOperators runs a gateway through everything that operators should see, and
// looks whether they do.
func TestOperators(t *testing.T) {
	rules, err := os.ReadFile("alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	started := time.Now()
	const every = 200 * time.Millisecond
	clients := []Client{
		{Name: "steady", Lifetime: 10 * time.Second, Every: every, Settings: "share_tokens a-key-that-all-instances-have"},
		{Name: "idle", Lifetime: 4 * time.Second},
		{Name: "revoked", Lifetime: time.Hour, Every: every},
		{Name: "down", Lifetime: 16 * time.Second, Every: every, Settings: "refresh_before 10s"},
		{Name: "rejected", Every: every, Fault: Rejection},
		{Name: "refused", Lifetime: time.Hour, Every: every},
		{Name: "noisy", Lifetime: time.Hour, Every: every, Noise: every},
	}
	// More clients than a server is asked for at once. No request needs their tokens.
	for i := range 12 {
		clients = append(clients, Client{Name: fmt.Sprintf("tenant-%d", i), Server: throttling, Lifetime: time.Hour, Fault: Throttling})
	}
	rig, err := Start(ctx, t.TempDir(), forDuration.ReplaceAllString(string(rules), "$1 3s"), clients...)
	if err != nil {
		t.Fatal(err)
	}
	defer rig.Stop()
	wait := func(query string) {
		t.Helper()
		if err := rig.Wait(ctx, eventually, query); err != nil {
			t.Error(err)
		}
	}

	wait(`count(caddy_oauth2_token_state{state="fresh"} == 1) >= 4 and on () count(rate(caddy_oauth2_requests_total[5s]))`)
	rig.Revoke("revoked")
	rig.Refuse("refused", true)
	rig.Noise("noisy", true)
	rig.Fail("down", Outage)

	wait(`caddy_oauth2_rejections_total{client="revoked", outcome="recovered"} > 0`)
	wait(`caddy_oauth2_rejections_total{client="noisy", outcome="path"} > 0`)
	wait(`caddy_oauth2_refusing_upstreams{client="noisy"} == 0`)
	wait(`caddy_oauth2_refusing_upstreams{client="refused"} == 1`)
	wait(`caddy_oauth2_token_state{client="refused", state="fresh"} == 1`) // it is the upstream that refuses
	wait(`caddy_oauth2_token_state{client="idle", state="expired"} == 1`)
	wait(`increase(caddy_oauth2_token_requests_total{client="steady", result="ok"}[1m]) > 0`)
	wait(`increase(caddy_oauth2_shared_tokens_total{client="steady", result="stored"}[1m]) > 0`)
	// In the order in which they come. Some pass soon.
	for _, alert := range []struct{ name, label, value string }{
		{"CaddyOAuth2PermanentError", "client", "rejected"},
		{"CaddyOAuth2RequestsWithoutToken", "client", "rejected"},
		{"CaddyOAuth2TokenRequestsHeldBack", "endpoint", rig.Endpoint(throttling)},
		{"CaddyOAuth2UpstreamRefusesTokens", "client", "refused"},
		{"CaddyOAuth2TokenNotRenewed", "client", "down"},
		{"CaddyOAuth2RequestsWithoutToken", "client", "down"},
	} {
		wait(fmt.Sprintf(`last_over_time(ALERTS{alertname=%q, %s=%q, alertstate="firing"}[5m])`, alert.name, alert.label, alert.value))
	}

	t.Run("alerts", func(t *testing.T) { seeAlerts(t, rig, started) })
	t.Run("dashboard", func(t *testing.T) { seeDashboard(t, rig, started) })
	t.Run("metrics", func(t *testing.T) { seeMetrics(t, rig) })
}

// seeAlerts wants no alert but those that should be, and every query of the
// rules to have found something.
func seeAlerts(t *testing.T, rig *Rig, since time.Time) {
	// An upstream may refuse a token for a moment, until it gets the new one.
	const query = `ALERTS{alertstate="firing"} or ALERTS{alertname!="CaddyOAuth2UpstreamRefusesTokens"}`
	alerts, err := rig.Range(t.Context(), query, since, ScrapeInterval)
	if err != nil {
		t.Fatal(err)
	}
	for _, alert := range alerts {
		// An alert is about a client or about an endpoint: the other label is empty.
		about := alert.Metric["client"] + alert.Metric["endpoint"]
		if !slices.Contains([]model.LabelValue{"down", "rejected", "refused", model.LabelValue(rig.Endpoint(throttling))}, about) {
			t.Errorf("got %s, want no alert of %s", alert.Metric, about)
		}
	}
	rules, err := rig.Prometheus.Rules(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(rules.Groups) == 0 {
		t.Error("got no rules, want those of alerts.yml")
	}
	for _, group := range rules.Groups {
		for _, rule := range group.Rules {
			alert, ok := rule.(promapi.AlertingRule)
			if !ok {
				t.Fatalf("got the rule %v, want an alert", rule)
			}
			if err := found(rig, alert.Query, since); err != nil {
				t.Errorf("%s: %v", alert.Name, err)
			}
		}
	}
}

// seeDashboard wants every query of the dashboard to have found something.
func seeDashboard(t *testing.T, rig *Rig, since time.Time) {
	d, err := ReadDashboard("dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range d.Templating.List {
		if v.Type != "query" {
			continue
		}
		selector, label := v.labelValues(d)
		values, _, err := rig.Prometheus.LabelValues(t.Context(), label, []string{selector}, since, time.Now())
		if err != nil || len(values) == 0 {
			t.Errorf("variable %s: got %v, %v, want values", v.Name, values, err)
		}
	}
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			query := d.Substitute(target.Expr, 4*ScrapeInterval)
			if strings.Contains(query, "$") {
				t.Errorf("%s: got %s, want all variables to be known", p.Title, query)
			}
			if err := found(rig, query, since, legendLabels(target.LegendFormat)...); err != nil {
				t.Errorf("%s: %v", p.Title, err)
			}
		}
	}
	if found(rig, "rate(caddy_oauth2_no_such_metric_total[5s])", since) == nil {
		t.Error("got no error for a metric that isn't there, want one")
	}
}

var (
	labelValues = regexp.MustCompile(`^label_values\((.+), (\w+)\)$`)
	legendLabel = regexp.MustCompile(`{{(\w+)}}`)
)

// labelValues returns the series and the label that a variable takes its values
// from.
func (v Variable) labelValues(d *Dashboard) (selector, label string) {
	parts := labelValues.FindStringSubmatch(d.Substitute(v.Definition, 0))
	if parts == nil {
		return "", ""
	}
	return parts[1], parts[2]
}

func legendLabels(format string) (labels []string) {
	for _, match := range legendLabel.FindAllStringSubmatch(format, -1) {
		labels = append(labels, match[1])
	}
	return labels
}

// found returns an error unless a query has given something else than 0, with
// these labels.
func found(rig *Rig, query string, since time.Time, labels ...string) error {
	series, err := rig.Range(context.Background(), query, since, ScrapeInterval)
	if err != nil {
		return err
	}
	something := false
	for _, s := range series {
		for _, label := range labels {
			if _, ok := s.Metric[model.LabelName(label)]; !ok {
				return fmt.Errorf("%s: got %s, want the label %s", query, s.Metric, label)
			}
		}
		something = something || slices.ContainsFunc(s.Values, func(v model.SamplePair) bool {
			return v.Value != 0 && !math.IsNaN(float64(v.Value))
		})
	}
	if !something {
		return fmt.Errorf("%s: got %d series and nothing but 0, want something", query, len(series))
	}
	return nil
}

// seeMetrics wants promtool to have no complaint about what Prometheus scrapes.
func seeMetrics(t *testing.T, rig *Rig) {
	res, err := http.Get(rig.MetricsURL)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if said := promtool(t, string(text), "check", "metrics"); said != "" {
		t.Errorf("promtool check metrics: got %s, want nothing", said)
	}
	if !strings.Contains(string(text), "caddy_oauth2_") {
		t.Error("got none of the product's metrics")
	}
}
