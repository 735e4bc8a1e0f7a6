package outboundauth

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestFiguresAreMeasured looks up the figures of the documents where they come from.
// So they are those of the last measurement.
func TestFiguresAreMeasured(t *testing.T) {
	for _, problem := range wrongFigures(pages(t), readFile(t, "bench/RESULTS.md"), figuresOfElsewhere) {
		t.Error(problem)
	}
}

// figuresOfElsewhere are no results of bench/, by document.
var figuresOfElsewhere = map[string][]string{
	// When a token is due is not measured: the gateway chooses it.
	"README.md":          {"26 % of its lifetime", "70 to 74 % of its lifetime"},
	"docs/comparison.md": {"70 to 74 % of the lifetime"},
	"docs/token-life.md": {"70 to 74 % of its lifetime"},
	"docs/many-clients.md": {
		"70 to 74 % of its lifetime", "within these 4 %",
		"99 % of them took 45 ms at most", // of the measurement that this page describes
	},
}

var (
	resultLink = regexp.MustCompile(`\[([^\]]*)\]\([^)\s]*bench/RESULTS\.md(?:#([^)\s]*))?\)`)
	figure     = regexp.MustCompile(`[\d.,]*\d[\s\x{a0}\x{202f}]*(?:%|(?:[µμ]s|ns|req/s)\b)`) // a line may end before the unit
	codeInText = regexp.MustCompile("(?ms)^[ \t]*```.*?^[ \t]*```|`+(?:[^`\n]|\n[^`\n])*`+")
)

// wrongFigures returns what is wrong with the figures of documents, given by path: a
// link to the results whose figure is not in that section, or a figure without link.
func wrongFigures(documents map[string]string, results string, elsewhere map[string][]string) []string {
	var problems []string
	for _, path := range slices.Sorted(maps.Keys(documents)) {
		text := codeInText.ReplaceAllStringFunc(documents[path], linesOf)
		for _, link := range resultLink.FindAllStringSubmatch(text, -1) {
			shown := strings.Join(strings.Fields(link[1]), " ")
			if strings.ContainsAny(shown, "0123456789") && !hasFigure(section(results, link[2]), shown) {
				problems = append(problems, fmt.Sprintf("%s: got %s, want a figure of bench/RESULTS.md#%s", path, shown, link[2]))
			}
		}
		text = resultLink.ReplaceAllStringFunc(text, linesOf)
		for _, known := range elsewhere[path] {
			if !strings.Contains(text, known) {
				problems = append(problems, fmt.Sprintf("%s: got no %q, want it no longer in figuresOfElsewhere", path, known))
			}
			text = strings.ReplaceAll(text, known, linesOf(known))
		}
		for _, at := range figure.FindAllStringIndex(text, -1) {
			line := 1 + strings.Count(text[:at[0]], "\n")
			problems = append(problems, fmt.Sprintf("%s:%d: got the figure %q, want a link to its table in bench/RESULTS.md", path, line, text[at[0]:at[1]]))
		}
	}
	return problems
}

// linesOf stands for a text that has been looked at. What follows it stays on its
// line, and joins nothing that is before.
func linesOf(text string) string { return "_" + strings.Repeat("\n", strings.Count(text, "\n")) }

// section returns what stands below a heading, down to the next one.
func section(markdown, anchor string) string {
	var below strings.Builder
	inside := false
	for line := range strings.Lines(markdown) {
		if heading := anchors(line); len(heading) > 0 {
			inside = heading[0] == anchor
		} else if inside {
			below.WriteString(line)
		}
	}
	return below.String()
}

// hasFigure reports whether a text has a figure that is not a part of another one:
// 1.8 µs is a part of 11.8 µs, and 1.00 of 1.008.
func hasFigure(text, figure string) bool {
	return regexp.MustCompile(`(?m)(^|[^\d.,])` + regexp.QuoteMeta(figure) + `($|[.,]?[^\d.,])`).MatchString(text)
}

func TestFiguresThatAreWrongAreFound(t *testing.T) {
	const results = `# Results

## How to read it

9 µs

## Saturation

| gateway | rate | CPU per request | CPU, ratio |
|---|---:|---:|---:|
| one | 21,800 req/s | 11.8 µs | ≈ 1.008 (0.990–1.031) |

## 1,500 requests a second

| one | 7 µs |
`
	elsewhere := map[string][]string{"README.md": {"26 % of its lifetime"}}
	for _, test := range []struct{ text, want string }{
		{"It takes [11.8 µs](bench/RESULTS.md#saturation).", ""},
		{"It takes [11.8\nµs](../bench/RESULTS.md#saturation), [1.008](bench/RESULTS.md#saturation) times as much.", ""},
		{"[21,800 req/s](https://example.com/bench/RESULTS.md#saturation)", ""},
		{"[7 µs](bench/RESULTS.md#1500-requests-a-second)", ""},
		{"[The results](bench/RESULTS.md) and [how to read them](bench/RESULTS.md#how-to-read-it)", ""},
		{"It waits for 1 s, or 30 nodes, and `5 µs` and ``6 %`` are code.\n\n```text\n5 µs\n```\n\n\t```sh\n\tsleep 7 ns\n\t```", ""},
		{"", ""},

		{"[1.8 µs](bench/RESULTS.md#saturation)", "got 1.8 µs, want a figure of bench/RESULTS.md#saturation"},
		{"In 2 [11.8](bench/RESULTS.md#saturation) µs.", ""}, // the number is that of the table
		{"[1.00](bench/RESULTS.md#saturation)", "got 1.00, want"},
		{"[800 req/s](bench/RESULTS.md#saturation)", "got 800 req/s, want"},
		{"[12 µs](bench/RESULTS.md#saturation)", "got 12 µs, want"},
		{"[11.8 µs](bench/RESULTS.md#cold)", "got 11.8 µs, want a figure of bench/RESULTS.md#cold"},
		{"[11.8 µs](bench/RESULTS.md)", "got 11.8 µs, want a figure of bench/RESULTS.md#"},
		{"[9 µs](bench/RESULTS.md#saturation)", "got 9 µs, want"},
		{"[11.8 µs](docs/operate.md#saturation)", `:3: got the figure "11.8 µs", want a link`},
		{"It takes 11.8 µs.", `README.md:3: got the figure`},
		{"a\nb 3\nns", `README.md:4: got the figure`},
		{"200 req/s", "want a link"},
		{"5%", "want a link"},
		{"```\ncode\n```\n5 %", "README.md:6: got the figure"},
		{"26 % of all", "want a link"},
		{"a stray ` here\n\n5 %, `code`", "want a link"},
	} {
		documents := map[string]string{"README.md": "26 % of its lifetime\n\n" + test.text}
		got := strings.Join(wrongFigures(documents, results, elsewhere), "\n")
		if !strings.Contains(got, test.want) || (got == "") != (test.want == "") || strings.Contains(got, "\n") {
			t.Errorf("%q: got %q, want %q", test.text, got, test.want)
		}
	}
	if got := wrongFigures(map[string]string{"README.md": ""}, results, elsewhere); len(got) != 1 {
		t.Errorf("got %q, want that an entry of figuresOfElsewhere is not needed", got)
	}
}
