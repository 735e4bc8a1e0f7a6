package grafana

import (
	"encoding/json"
	"os"
	"strings"
	"time"
)

// Dashboard has the parts of a Grafana dashboard that matter here.
type Dashboard struct {
	UID        string
	Panels     []Panel
	Templating struct{ List []Variable }
}

// Panel is one panel of a dashboard.
type Panel struct {
	ID                       int
	Title, Description, Type string
	GridPos                  struct{ X, Y, W, H int }
	Targets                  []Target
	FieldConfig              struct {
		Defaults struct {
			Unit     string
			Mappings []struct{ Options map[string]Mapping }
			Custom   struct {
				Stacking struct{ Mode string }
			}
		}
		Overrides []struct {
			Matcher    struct{ Options string }
			Properties []struct {
				ID    string
				Value struct{ FixedColor string }
			}
		}
	}
}

// Target is a query of a panel, and the name of its results.
type Target struct{ Expr, LegendFormat, RefID string }

// Mapping says what a panel shows for a value.
type Mapping struct {
	Text, Color string
	Index       int
}

// Variable is one of the dashboard's variables.
type Variable struct {
	Name, Type, AllValue, Definition string
}

// ReadDashboard reads a dashboard's file.
func ReadDashboard(path string) (*Dashboard, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	d := new(Dashboard)
	return d, json.Unmarshal(text, d)
}

// Substitute returns a query as Grafana sends it when each variable is All.
func (d *Dashboard) Substitute(expr string, rateInterval time.Duration) string {
	pairs := []string{"$__rate_interval", rateInterval.String()}
	for _, v := range d.Templating.List {
		if v.Type == "query" {
			pairs = append(pairs, "$"+v.Name, v.AllValue)
		}
	}
	return strings.NewReplacer(pairs...).Replace(expr)
}
