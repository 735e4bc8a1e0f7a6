package main

import (
	"context"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/common/model"

	"github.com/outboundauth/caddy-outbound-auth/grafana"
)

// recording is what the dashboard showed during a run.
type recording struct {
	start, end time.Time
	faults     []fault
	charts     []chart
}

// fault is a part of the run in which something went wrong.
type fault struct {
	name     string
	from, to time.Time
}

// chart is a panel and its data.
type chart struct {
	grafana.Panel
	series []series
}

type series struct {
	name    string
	samples []model.SamplePair
}

const (
	lifetime = time.Minute // of tokens
	pause    = 10 * time.Second
	patience = 2 * lifetime // with what is waited for

	step         = time.Second
	rateInterval = 10 * time.Second
)

// clients have steady traffic.
var clients = []grafana.Client{
	{Name: "orders", Lifetime: lifetime, Every: 100 * time.Millisecond, Noise: 300 * time.Millisecond},
	{Name: "billing", Lifetime: lifetime, Every: 200 * time.Millisecond},
	{Name: "search", Lifetime: lifetime, Every: 150 * time.Millisecond},
}

// session is a run under way. What went wrong first ends it.
type session struct {
	*grafana.Rig
	recording
	ctx context.Context
	err error
}

// record runs a gateway through some minutes, and asks Prometheus for what the
// dashboard shows of them.
func record(ctx context.Context, dir string) (*recording, error) {
	rig, err := grafana.Start(ctx, dir, "", clients...)
	if err != nil {
		return nil, err
	}
	defer rig.Stop()
	s := &session{Rig: rig, ctx: ctx}
	s.wait(`count(caddy_oauth2_token_state{state="fresh"} == 1) == 3 and on () rate(caddy_oauth2_requests_total{client="orders"}[3s]) > 0`)
	s.rest() // until rates are those of a full interval
	s.start = time.Now()

	s.wait(`min(caddy_oauth2_token_requests_total{result="ok"}) >= 2`)
	s.failRenewals("authorization server down", grafana.Outage)
	s.failRenewals("authorization server busy", grafana.Throttling)
	s.wait(`max_over_time(caddy_oauth2_token_requests_waiting[5m]) > 0`) // otherwise there is nothing to see

	s.wait(`caddy_oauth2_token_renewal_timestamp_seconds{client="billing"} - time() < 3`)
	s.during("billing rejected", func() {
		s.Fail("billing", grafana.Rejection)
		s.wait(`caddy_oauth2_requests_total{client="billing", token="none"} > 50`)
		s.Fail("billing", nil)
	})
	s.wait(`caddy_oauth2_token_state{client="billing", state="fresh"} == 1`)
	s.rest()

	s.during("upstream revokes tokens", func() {
		for range 3 {
			s.Revoke("search")
			s.rest()
		}
	})
	s.rest()
	s.during("upstream refuses all tokens", func() {
		s.Refuse("search", true)
		s.wait(`caddy_oauth2_rejections_total{client="search", outcome="refused_again"} >= 3`)
		s.wait(`caddy_oauth2_refusing_upstreams{client="search"} == 1`)
		s.rest()
		s.Refuse("search", false)
	})
	s.wait(`caddy_oauth2_refusing_upstreams{client="search"} == 0`)
	s.rest()
	s.during("upstream refuses one path", func() {
		s.Noise("orders", true)
		s.wait(`caddy_oauth2_rejections_total{client="orders", outcome="path"} >= 20`)
		s.rest()
		s.Noise("orders", false)
	})
	s.wantAllAnswered("another path was refused", "orders")
	s.rest()
	s.end = time.Now()
	s.ask()
	return &s.recording, s.err
}

// during notes when a fault began and ended.
func (s *session) during(name string, do func()) {
	f := fault{name: name, from: time.Now()}
	do()
	f.to = time.Now()
	s.faults = append(s.faults, f)
}

func (s *session) wait(query string) {
	if s.err == nil {
		s.err = s.Wait(s.ctx, patience, query)
	}
}

// rest lets some time pass.
func (s *session) rest() {
	if s.err != nil {
		return
	}
	select {
	case <-time.After(pause):
	case <-s.ctx.Done():
		s.err = s.ctx.Err()
	}
}

// failRenewals gives the authorization server a fault while all tokens are to be renewed.
func (s *session) failRenewals(name string, fault http.HandlerFunc) {
	s.wait(`min(caddy_oauth2_token_renewal_timestamp_seconds) - time() < 1`)
	s.during(name, func() {
		s.failAll(fault)
		// A tenth of a token's life is never used; a little more is left here.
		s.wait(`min(caddy_oauth2_token_expiry_timestamp_seconds) - time() < 9`)
		s.failAll(nil)
	})
	s.wait(`sum(caddy_oauth2_consecutive_failures) == 0 and on () count(caddy_oauth2_token_state{state="fresh"} == 1) == 3`)
	s.wantAllAnswered(name+" for less time than a token has left", "orders", "billing", "search")
}

func (s *session) failAll(fault http.HandlerFunc) {
	for _, c := range clients {
		s.Fail(c.Name, fault)
	}
}

// wantAllAnswered sees to it that the picture shows what it is said to show.
func (s *session) wantAllAnswered(why string, names ...string) {
	for _, name := range names {
		for status, n := range s.Answers(name) {
			if status != http.StatusOK && s.err == nil {
				s.err = fmt.Errorf("%d requests of %s were answered with %d, want none: %s", n, name, status, why)
			}
		}
	}
}

// ask asks Prometheus what the dashboard asks it.
func (s *session) ask() {
	d, err := grafana.ReadDashboard("dashboard.json")
	if err != nil && s.err == nil {
		s.err = err
	}
	if s.err != nil {
		return
	}
	for _, p := range d.Panels {
		c := chart{Panel: p}
		for _, target := range p.Targets {
			matrix, err := s.Range(s.ctx, d.Substitute(target.Expr, rateInterval), s.start, step)
			if err != nil {
				s.err = err
				return
			}
			for _, found := range matrix {
				// A line at 0 says nothing, but that a state is 0 does.
				if len(p.FieldConfig.Defaults.Mappings) == 0 && !slices.ContainsFunc(found.Values, isNotZero) {
					continue
				}
				c.series = append(c.series, series{seriesName(target.LegendFormat, found.Metric), found.Values})
			}
		}
		if len(c.series) > 0 { // this gateway shares no tokens with others
			s.charts = append(s.charts, c)
		}
	}
}

func isNotZero(s model.SamplePair) bool { return s.Value != 0 }

var legendLabel = regexp.MustCompile(`{{(\w+)}}`)

// seriesName names a series by its legend's format. There is but one instance, and one
// endpoint.
func seriesName(format string, metric model.Metric) string {
	delete(metric, model.InstanceLabel)
	delete(metric, "endpoint")
	name := legendLabel.ReplaceAllStringFunc(format, func(label string) string {
		return string(metric[model.LabelName(strings.Trim(label, "{}"))])
	})
	return strings.TrimSpace(name)
}
