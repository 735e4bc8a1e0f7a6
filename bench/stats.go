// The figures of several rounds, made into one.

package main

import "slices"

// yardstick is the candidate that all others are compared with: it does the same
// work, except for the tokens.
const yardstick = "Caddy, static header"

// A setup is what was measured in each round.
type setup struct{ scenario, variant, candidate string }

// rounds returns the results of a setup. It has none for those that lack something.
func (r *record) rounds(s setup) []result {
	var found []result
	for _, one := range r.Results {
		if one.setup() == s && one.Lacks == "" {
			found = append(found, one)
		}
	}
	return found
}

func (r result) setup() setup { return setup{r.Scenario, r.Variant, r.Candidate} }

// A figure sums up one number of several rounds.
type figure struct {
	rounds              int // 0: it was not measured
	median, least, most float64
}

func sumUp(numbers []float64) figure {
	if len(numbers) == 0 {
		return figure{}
	}
	sorted := slices.Sorted(slices.Values(numbers))
	half := len(sorted) / 2
	median := sorted[half]
	if len(sorted)%2 == 0 {
		median = (sorted[half-1] + sorted[half]) / 2
	}
	return figure{len(sorted), median, sorted[0], sorted[len(sorted)-1]}
}

// figure returns a value of a setup.
func (r *record) figure(s setup, value string) figure {
	var numbers []float64
	for _, one := range r.rounds(s) {
		if number, ok := one.Values[value]; ok {
			numbers = append(numbers, number)
		}
	}
	return sumUp(numbers)
}

// ratio returns how many times a value is that of the base. Each round is
// compared by itself: if the machine was slow at that time, it was slow for both.
func (r *record) ratio(s setup, value, base string) figure {
	of := make(map[int]float64) // by round
	for _, one := range r.rounds(setup{s.scenario, s.variant, base}) {
		of[one.Round] = one.Values[value]
	}
	var ratios []float64
	for _, one := range r.rounds(s) {
		if number, ok := one.Values[value]; ok && of[one.Round] != 0 {
			ratios = append(ratios, number/of[one.Round])
		}
	}
	return sumUp(ratios)
}

// distinct returns each string that field has among the results, in their order.
func distinct(results []result, field func(result) string) []string {
	var found []string
	for _, one := range results {
		if s := field(one); !slices.Contains(found, s) {
			found = append(found, s)
		}
	}
	return found
}
