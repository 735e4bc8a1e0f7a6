// RESULTS.md: the tables of what a run has measured.

package main

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A table shows what a scenario has measured. The documents link to its title.
type table struct {
	scenario string // as the results name it
	title    string
	about    string // what is done, in a sentence or two
	variants string // what the variants of the scenario are, if it has some
	picture  string // the file of the plot above the table, if there is one
	columns  []column
	base     string // the candidate that ratios compare with; empty: the yardstick
}

// A column shows one value of the results.
type column struct {
	head  string
	value string
	show  func(float64) string // nil: the ratio to the base

	most    bool // the figure is the largest of the rounds, and not the median
	trouble bool // the column is shown only if a figure in it is not 0
}

var (
	rateColumn     = column{head: "rate", value: valueRate, show: perSecond}
	rateRatio      = column{head: "rate, ratio", value: valueRate}
	cpuColumn      = column{head: "CPU per request", value: valueCPU, show: microseconds}
	cpuRatio       = column{head: "CPU, ratio", value: valueCPU}
	memoryColumn   = column{head: "memory", value: valueMemory, show: megabytes}
	p50Column      = column{head: "p50", value: valueP50, show: duration}
	p99Column      = column{head: "p99", value: valueP99, show: duration}
	p999Column     = column{head: "p99.9", value: valueP999, show: duration}
	maxColumn      = column{head: "slowest", value: valueMax, show: duration, most: true}
	sentColumn     = column{head: "sent", value: valueSent, show: count}
	failedColumn   = column{head: "failed", value: valueFailed, show: count, most: true}
	withheldColumn = column{head: "withheld", value: valueWithheld, show: count, most: true}
	over100Column  = column{head: "over 100 ms", value: valueOver100, show: count, most: true}
	over1sColumn   = column{head: "over 1 s", value: valueOver1s, show: count, most: true}
	tokensColumn   = column{head: "token requests", value: valueTokens, show: count, most: true}
	recoveryColumn = column{head: "recovery", value: valueRecovery, show: duration, most: true}
	startColumn    = column{head: "start", value: valueStart, show: duration}

	// Where nothing should fail, a column says so only if it is not true.
	failuresColumn = column{head: "failed", value: valueFailed, show: count, most: true, trouble: true}

	troubleColumns = []column{
		sentColumn, failedColumn, withheldColumn, over100Column, over1sColumn, tokensColumn, recoveryColumn,
	}
)

// tables are in the order of RESULTS.md.
var tables = []table{
	{
		scenario: "saturation", title: "Saturation", picture: cpuPicture,
		about:   "64 connections send one request after another, as fast as the gateway answers. Each gateway keeps 64 idle connections to the upstream.",
		columns: []column{rateColumn, rateRatio, cpuColumn, cpuRatio, memoryColumn, p50Column, p99Column, p999Column, failuresColumn},
	},
	{
		scenario: "overhead", title: "The cost of OAuth",
		about: "Both gateways run, and get the load of [saturation](#saturation) in turns of 2 seconds, 8 turns each. " +
			"So both have the machine at the same speed.",
		columns: []column{cpuColumn, cpuRatio, failuresColumn},
	},
	{
		scenario: "open loop", title: "1,500 requests a second", picture: latencyPicture,
		about:   "Requests are sent at this rate, whether or not the gateway has answered those before.",
		columns: []column{cpuColumn, cpuRatio, memoryColumn, p50Column, p99Column, p999Column, failuresColumn},
	},
	{
		scenario: "cold", title: "A cold cache",
		about:   "The gateway has just begun to listen, and has no token yet. The token endpoint takes 500 ms. 1,000 requests come at once.",
		columns: []column{sentColumn, failedColumn, tokensColumn, maxColumn, over1sColumn},
	},
	{
		scenario: "slow renewal", title: "Slow renewals", picture: failedPicture,
		about:   "A token lives for 15 seconds, and the token endpoint takes 500 ms to issue the next one. Here and in the next scenarios, 200 requests a second are sent.",
		columns: troubleColumns,
	},
	{
		scenario: "short tokens", title: "Short tokens",
		about:   "A token lives for 5 seconds.",
		columns: troubleColumns,
	},
	{
		scenario: "revoked", title: "A revoked token",
		about:   "A token lives for 30 seconds. It is revoked after 12 seconds. From then on, the upstream answers 401 to it.",
		columns: troubleColumns,
	},
	{
		scenario: "503", title: "The token endpoint answers 503",
		about:   "A token lives for 20 seconds. After 8 seconds, the token endpoint begins to answer 503 to each request, for 29 seconds.",
		columns: troubleColumns,
	},
	{
		scenario: "no answer", title: "A silent token endpoint",
		about:   "A token lives for 20 seconds. After 8 seconds, the token endpoint begins to take requests and to answer none, for 29 seconds.",
		columns: troubleColumns,
	},
	{
		scenario: "noise", title: "Paths that are always refused",
		about: "One request in 20 is to a path to which the upstream answers 401, whatever the token. These don't count as failed. " +
			"A token lives for 5 minutes. It is revoked after 35 seconds.",
		columns: troubleColumns,
	},
	{
		scenario: "crowd", title: "300 clients",
		about: "Each of 300 OAuth clients has an upstream of its own. All get their tokens at one token endpoint, " +
			"which answers 20 token requests a second, and 429 to the others. A token lives for 1 minute. " +
			"The gateway starts without a token, and each client gets one request a second.",
		columns: []column{sentColumn, failedColumn, withheldColumn, over100Column, over1sColumn, tokensColumn},
	},
	{
		scenario: "upstreams", title: "A pool of upstreams", variants: "upstreams",
		about: "Each upstream of the pool needs a token of its own. The gateway chooses one at random for each request. " +
			"The static header has one token for all. Envoy and nginx have no pool of this kind: they choose a cluster by weight, and an address in Lua.",
		columns: []column{rateColumn, cpuColumn, cpuRatio, memoryColumn, startColumn, failuresColumn},
	},
	{
		scenario: "uploads", title: "Uploads", variants: "body",
		about:   "Each request has a body, which the gateway passes on.",
		columns: []column{rateColumn, cpuColumn, cpuRatio, memoryColumn, failuresColumn},
	},
	{
		scenario: "TLS", title: "Upstreams with TLS", variants: "protocol",
		about:   "The gateway speaks HTTPS with the upstreams. Callers still use plain HTTP.",
		columns: []column{rateColumn, cpuColumn, cpuRatio, p99Column, failuresColumn},
	},
	{
		scenario: "tuning", title: "Settings and builds", base: asItIs,
		about: "This gateway with all defaults, and with one setting each; the load is that of [saturation](#saturation). " +
			"By default, Caddy keeps 32 idle connections to an upstream. The ratios compare with the defaults.",
		columns: []column{rateColumn, rateRatio, cpuColumn, cpuRatio, memoryColumn, p99Column, failuresColumn},
	},
}

const howToRead = `
## How to read it

- One gateway ran at a time, in new processes. In each round, all ran one after another; the order changed from round to
  round. The load, the upstreams and the token endpoint were on the same machine: a rate is what the whole machine did.
- A figure is the median of the rounds. Of failed and slow requests, of token requests, of the slowest request and of the
  recovery, it is the most.
- A *ratio* compares a gateway with *` + yardstick + `*: 1.05 is 5 % more. It is computed within each round. The table
  shows the median of these ratios and, in brackets, the smallest and the largest one.
- ≈ marks a ratio that was above 1 in some rounds and below 1 in others: the difference may be the noise of the machine.
- *CPU per request* is the CPU time of all processes of the gateway, divided by the requests with a good answer. *Memory* is
  the largest of samples, one a second.
- *p50*, *p99*, *p99.9*: so many percent of the requests took no longer. At a fixed rate, the time counts from when a request
  was due, so that a gateway which stops makes all requests of that time late.
- *Sent* are all requests, and *over 100 ms* and *over 1 s* those of them that took longer.
- *Failed* requests did not get the upstream's good answer within 10 seconds. *Withheld* are the failed requests during all of
  which a token of their client was valid. *Recovery* is the time from the end of the trouble to the last failed request.
- *Token requests* are those after the gateway's first good answer; with a cold cache and with 300 clients, all.
- *Start* is the time from the start of the process to its first good answer.
- nginx and HAProxy are those of Debian 12. The others are newer, and so are their TLS libraries.
- — means that the gateway can't do this, or that the figure was not measured. A line below the table says why.
`

// report returns RESULTS.md.
func (r *record) report() string {
	var b strings.Builder
	b.WriteString("# Results\n\n<!-- `go run . -render` makes this of results.json. -->\n\n")
	b.WriteString("What each gateway costs and how it behaves in trouble, measured by the program in this directory.\n\n")
	fmt.Fprintf(&b, "| | |\n|---|---|\n")
	for _, line := range [][2]string{
		{"date", r.Date.Format("2 January 2006")},
		{"time it took", fmt.Sprintf("%d h %d min", int(r.Took.Hours()), int(r.Took.Minutes())%60)},
		{"command", "`" + r.Command + "`, in `bench/`"},
		{"commit", "`" + r.Commit + "`"},
		{"machine", fmt.Sprintf("%s, %d cores, %s", r.Machine.CPU, r.Machine.Cores, r.Machine.Memory)},
		{"system", r.Machine.System},
		{"Go", r.Machine.Go},
	} {
		writeRow(&b, line[0], line[1])
	}
	b.WriteString(howToRead)
	b.WriteString("\n## What was measured\n\n| gateway | version |\n|---|---|\n")
	for _, name := range r.candidates() {
		if version, ok := r.Versions[name]; ok { // or it is one of its variants
			writeRow(&b, name, version)
		}
	}
	if len(r.Missing) > 0 {
		b.WriteString("\nNot measured:\n\n")
		for _, name := range slices.Sorted(maps.Keys(r.Missing)) {
			fmt.Fprintf(&b, "- %s: %s\n", name, r.Missing[name])
		}
	}
	for _, t := range tables {
		t.write(&b, r)
	}
	return b.String()
}

// candidates returns their names, in the order of the results.
func (r *record) candidates() []string {
	return distinct(r.Results, func(one result) string { return one.Candidate })
}

// of returns the results of a scenario.
func (r *record) of(scenario string) []result {
	return slices.DeleteFunc(slices.Clone(r.Results), func(one result) bool { return one.Scenario != scenario })
}

func (t *table) write(b *strings.Builder, r *record) {
	results := r.of(t.scenario)
	if len(results) == 0 {
		return
	}
	fmt.Fprintf(b, "\n## %s\n\n%s", t.title, t.about)
	if rounds := slices.MaxFunc(results, func(a, b result) int { return a.Round - b.Round }).Round; rounds > 1 {
		fmt.Fprintf(b, " %d rounds.\n\n", rounds)
	} else {
		b.WriteString(" One round.\n\n")
	}
	if t.picture != "" {
		fmt.Fprintf(b, "![%s](%s)\n\n", pictures[t.picture].title, t.picture)
	}

	base := cmp.Or(t.base, yardstick)
	// A column without any figure would only take space.
	columns := slices.DeleteFunc(slices.Clone(t.columns), func(c column) bool {
		return !slices.ContainsFunc(results, func(one result) bool {
			text := c.text(r, one.setup(), base)
			return text != "—" && (text != "0" || !c.trouble)
		})
	})
	head, line := []string{"gateway"}, "|---|"
	if t.variants != "" {
		head, line = []string{t.variants, "gateway"}, "|---|---|"
	}
	for _, c := range columns {
		head, line = append(head, c.head), line+"---:|"
	}
	writeRow(b, head...)
	b.WriteString(line + "\n")
	for _, variant := range distinct(results, func(one result) string { return one.Variant }) {
		for _, name := range r.candidates() {
			s := setup{t.scenario, variant, name}
			if !slices.ContainsFunc(results, func(one result) bool { return one.setup() == s }) {
				continue
			}
			row := []string{name}
			if t.variants != "" {
				row = []string{variant, name}
			}
			for _, c := range columns {
				row = append(row, c.text(r, s, base))
			}
			writeRow(b, row...)
		}
	}
	writeLacks(b, results)
}

// writeLacks says, below a table, which gateways lack something, and in which rounds
// something has failed.
func writeLacks(b *strings.Builder, results []result) {
	rounds := make(map[string]int)
	notes := distinct(results, func(one result) string {
		if one.Lacks == "" {
			return ""
		}
		name := one.Candidate
		if one.Variant != "" {
			name += ", " + one.Variant
		}
		note := fmt.Sprintf("%s: %s", name, one.Lacks)
		rounds[note]++
		return note
	})
	for i, note := range slices.DeleteFunc(notes, func(note string) bool { return note == "" }) {
		if i == 0 {
			b.WriteString("\n")
		}
		if rounds[note] > 1 {
			note += fmt.Sprintf(" (%d rounds)", rounds[note])
		}
		b.WriteString("- " + note + "\n")
	}
}

// text returns what the column shows of a setup. Ratios compare with base.
func (c *column) text(r *record, s setup, base string) string {
	f := r.figure(s, c.value)
	if c.show == nil {
		f = r.ratio(s, c.value, base)
	}
	switch {
	case f.rounds == 0:
		return "—"
	case c.show != nil && c.most:
		return c.show(f.most)
	case c.show != nil:
		return c.show(f.median)
	case s.candidate == base:
		return "1"
	}
	return times(f)
}

func writeRow(b *strings.Builder, cells ...string) {
	for _, cell := range cells {
		b.WriteString("| " + strings.ReplaceAll(cell, "|", `\|`) + " ")
	}
	b.WriteString("|\n")
}

// publish writes RESULTS.md and the plots into a directory.
func (r *record) publish(dir string) error {
	files, err := r.files()
	if err != nil {
		return err
	}
	for name, content := range files {
		//nolint:gosec // for everybody to read
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// files returns what publish writes, by name.
func (r *record) files() (map[string][]byte, error) {
	files := map[string][]byte{"RESULTS.md": []byte(r.report())}
	for name, picture := range pictures {
		content, err := picture.svg(r)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if content != nil {
			files[name] = content
		}
	}
	return files, nil
}
