package e2e

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// outageResults are all that TestOutage measures.
type outageResults struct {
	atOnce int
	runs   map[*outageKind][]outageResult
	scenes map[*healthScene]outageResult
}

// outageHeading begins the outage suite's part of the file, which is the last. What
// stands before is the chaos suite's.
const outageHeading = "\n## Outages longer than a token\n"

const outageIntro = `
Measured, and written here, by the outage suite; run it in ` + "`e2e/`" + ` with

` + "```sh" + `
OUTAGE_RUNS=20 OUTAGE_RESULTS=RESULTS.md go test -count=1 -timeout 1h -run '^TestOutage$' .
` + "```" + `

Tokens live for %v. The authorization server is out from second %g to second %g: it answers 503, it takes
requests and answers when the outage ends, or nobody listens. Each run is a gateway of its own under %d requests
a second for %g s, sent when they are due. %d runs went side by side on %d cores.

- *failed*: not answered with 200. This and what follows is the median of the runs, unless the table says
  otherwise.
- *unavoidable*: sent after the end of the last token and before the end of the outage. Where the server hangs, the
  gateway has requests wait, and the last of these succeed nevertheless.
- *more*: failed requests less the unavoidable.
- *with a token*: failed while there was a live token, of all runs together.
- *recovery*: from the end of the outage until the first request that succeeded, and after which none failed.

`

const healthIntro = `
The upstream wants the token for each path, and so for its health checks, one every %v. Each row is a gateway of
its own under %d requests a second. What failed before the scene is not counted; *recovery* is from the end of the
outage, the end of the reload, or the first request.

`

// complete tells whether there are n runs of each kind, and all scenes.
func (r outageResults) complete(n int) bool {
	for _, k := range outageKinds {
		if len(r.runs[k]) != n {
			return false
		}
	}
	return len(r.scenes) == len(healthScenes)
}

func (r outageResults) String() string {
	return outageHeading + fmt.Sprintf(outageIntro, outageLife, outageBegin.Seconds(), outageEnd.Seconds(), outageRate,
		outageLoad.Seconds(), r.atOnce, runtime.NumCPU()) + r.kindsTable() +
		fmt.Sprintf(healthIntro, healthInterval, healthRate) + r.scenesTable()
}

// tables are the results without words.
func (r outageResults) tables() string { return r.kindsTable() + "\n" + r.scenesTable() }

func (r outageResults) kindsTable() string {
	var (
		failed      = func(r outageResult) int { return r.failed }
		unavoidable = func(r outageResult) int { return r.unavoidable }
		more        = outageResult.avoidable
		recovery    = func(r outageResult) time.Duration { return r.recovery }
		longest     = func(r outageResult) time.Duration { return r.all.longest() }
		requests    = func(r outageResult) int { return r.tokenRequests }
	)
	var b strings.Builder
	b.WriteString("| outage | runs | failed | unavoidable | more | most more | with a token | recovery | longest recovery | longest wait | most token requests |\n")
	b.WriteString("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, k := range outageKinds {
		runs := r.runs[k]
		withToken := 0
		for _, r := range runs {
			withToken += r.withToken
		}
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %d | %d | %s | %s | %s | %d |\n", k.name, len(runs),
			median(runs, failed), median(runs, unavoidable), median(runs, more), most(runs, more), withToken,
			recoveryText(median(runs, recovery)), recoveryText(most(runs, recovery)),
			milliseconds(most(runs, longest)), most(runs, requests))
	}
	return b.String()
}

func (r outageResults) scenesTable() string {
	var b strings.Builder
	b.WriteString("| scene | requests | failed | unavoidable | with a token | recovery | longest wait | token requests |\n")
	b.WriteString("|---|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, s := range healthScenes {
		r := r.scenes[s]
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %s | %s | %d |\n", s.name, len(r.all), r.failed, r.unavoidable,
			r.withToken, recoveryText(r.recovery), milliseconds(r.all.longest()), r.tokenRequests)
	}
	return b.String()
}

// median returns the median of a figure, the lower one of two.
func median[T cmp.Ordered](runs []outageResult, figure func(outageResult) T) (m T) {
	if all := sorted(runs, figure); len(all) > 0 {
		m = all[(len(all)-1)/2]
	}
	return m
}

func most[T cmp.Ordered](runs []outageResult, figure func(outageResult) T) (m T) {
	if all := sorted(runs, figure); len(all) > 0 {
		m = all[len(all)-1]
	}
	return m
}

func sorted[T cmp.Ordered](runs []outageResult, figure func(outageResult) T) []T {
	var all []T
	for _, r := range runs {
		all = append(all, figure(r))
	}
	slices.Sort(all)
	return all
}

// writeResults replaces what a suite has written into a file, and leaves what the
// other has. An empty part is the other's.
func writeResults(t *testing.T, file, chaos, outage string) {
	t.Helper()
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	oldChaos, oldOutage, found := strings.Cut(string(old), outageHeading)
	if found {
		oldOutage = outageHeading + oldOutage
	}
	if err := os.WriteFile(file, []byte(cmp.Or(chaos, oldChaos)+cmp.Or(outage, oldOutage)), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestWriteResults has each suite write its part, in any order.
func TestWriteResults(t *testing.T) {
	file := filepath.Join(t.TempDir(), "RESULTS.md")
	for _, step := range []struct{ chaos, outage, want string }{
		{"", outageHeading + "1\n", outageHeading + "1\n"},
		{"# Chaos 1\n", "", "# Chaos 1\n" + outageHeading + "1\n"},
		{"", outageHeading + "2\n", "# Chaos 1\n" + outageHeading + "2\n"},
		{"# Chaos 2\n", "", "# Chaos 2\n" + outageHeading + "2\n"},
	} {
		writeResults(t, file, step.chaos, step.outage)
		if got, err := os.ReadFile(file); err != nil || string(got) != step.want {
			t.Errorf("results: got %q, %v, want %q", got, err, step.want)
		}
	}
}
