package main

import (
	"encoding/xml"
	"testing"
	"time"

	"github.com/prometheus/common/model"

	"github.com/outboundauth/caddy-outbound-auth/grafana"
)

func TestTextsDoNotOverlap(t *testing.T) {
	svg, err := draw(example(t))
	if err != nil {
		t.Fatal(err)
	}
	var picture struct {
		Texts []struct {
			X      float64 `xml:"x,attr"`
			Y      float64 `xml:"y,attr"`
			Length float64 `xml:"textLength,attr"`
			Text   string  `xml:",chardata"`
		} `xml:"g>text"`
	}
	if err := xml.Unmarshal(svg, &picture); err != nil {
		t.Fatal(err)
	}
	if len(picture.Texts) == 0 {
		t.Fatal("no texts found")
	}
	const air = 3
	for i, a := range picture.Texts {
		if a.Length <= 0 || a.X < air || a.X+a.Length > float64(width)-air {
			t.Errorf("%q is %g wide at %g, want it inside of the picture", a.Text, a.Length, a.X)
		}
		for _, b := range picture.Texts[:i] {
			if a.X < b.X+b.Length+air && b.X < a.X+a.Length+air && a.Y < b.Y+textSize && b.Y < a.Y+textSize {
				t.Errorf("%q overlaps %q", a.Text, b.Text)
			}
		}
	}
}

// A color that is not known would draw nothing.
func TestColorsOfTheDashboardAreKnown(t *testing.T) {
	for _, c := range example(t).charts {
		for _, o := range c.FieldConfig.Overrides {
			if name := o.Properties[0].Value.FixedColor; colors[name].A == 0 {
				t.Errorf("%s: got the color %q of %s, want one that is known", c.Title, name, o.Matcher.Options)
			}
		}
		for value, m := range c.mappings() {
			if m.color.A == 0 {
				t.Errorf("%s: got no color of %s, want one that is known", c.Title, value)
			}
		}
	}
}

// The first sample can be a little before the start.
func TestMinutes(t *testing.T) {
	ticks := minutes{}.Ticks(-0.01, 100)
	if len(ticks) != 2 || ticks[0].Label != "0 min" || ticks[1].Label != "1 min" || ticks[1].Value != 60 {
		t.Errorf("got %v, want 0 min and 1 min", ticks)
	}
}

// example returns a recording with legends that need more than one line.
func example(t *testing.T) *recording {
	d, err := grafana.ReadDashboard("../dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	r := &recording{end: time.Now()}
	r.start = r.end.Add(-5 * time.Minute)
	for i := range 5 {
		from := r.start.Add(time.Duration(i+1) * time.Minute)
		r.faults = append(r.faults, fault{"upstream refuses all tokens", from, from.Add(20 * time.Second)})
	}
	var samples []model.SamplePair
	for at := r.start; at.Before(r.end); at = at.Add(step) {
		samples = append(samples, model.SamplePair{Timestamp: model.TimeFromUnixNano(at.UnixNano()), Value: 1})
	}
	for _, p := range d.Panels {
		c := chart{Panel: p}
		for _, name := range []string{"no_token", "not_repeatable", "refused_again", "invalidated tokens"} {
			c.series = append(c.series, series{name, samples})
		}
		r.charts = append(r.charts, c)
	}
	return r
}
