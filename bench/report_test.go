// RESULTS.md and the plots are what results.json gives.

package main

import (
	"bytes"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write RESULTS.md and the plots anew, of results.json")

// TestResultsAreRendered keeps RESULTS.md and the plots as results.json makes them.
// The example is invented: it has what a run rarely has. The directory itself has the
// last measurement.
func TestResultsAreRendered(t *testing.T) {
	for _, dir := range []string{"testdata/example", "."} {
		t.Run(dir, func(t *testing.T) {
			r, err := loadRecord(filepath.Join(dir, "results.json"))
			if err != nil {
				t.Fatal(err)
			}
			if *update {
				if err := r.publish(dir); err != nil {
					t.Fatal(err)
				}
			}
			files, err := r.files()
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range slices.Sorted(maps.Keys(files)) {
				if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil {
					t.Error(err)
				} else if !bytes.Equal(got, files[name]) {
					t.Errorf("got %s/%s that results.json does not make, want it made by: go run . -render", dir, name)
				}
			}
			if again, err := r.files(); err != nil || !maps.EqualFunc(files, again, bytes.Equal) {
				t.Errorf("got other files of the same record (err %v), want the same", err)
			}
		})
	}
}

// TestReportOfLittle renders what a run of one scenario has measured.
func TestReportOfLittle(t *testing.T) {
	r := &record{Results: []result{
		{Scenario: "revoked", Candidate: "one", Round: 1, Values: map[string]float64{valueSent: 1500, valueFailed: 0}},
		{Scenario: "revoked", Candidate: "other", Round: 1, Lacks: "no OAuth"},
	}}
	files, err := r.files()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := slices.Sorted(maps.Keys(files)), []string{"RESULTS.md", "failed.svg"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	const want = `
| gateway | sent | failed |
|---|---:|---:|
| one | 1,500 | 0 |
| other | — | — |

- other: no OAuth
`
	if got := string(files["RESULTS.md"]); !strings.HasSuffix(got, want) {
		t.Errorf("got\n%s\nwant this at its end:\n%s", got, want)
	}
}
