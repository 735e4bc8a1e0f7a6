package main

import "testing"

func TestSumUp(t *testing.T) {
	for _, test := range []struct {
		numbers []float64
		want    figure
	}{
		{nil, figure{}},
		{[]float64{3}, figure{1, 3, 3, 3}},
		{[]float64{9, 1, 2}, figure{3, 2, 1, 9}},
		{[]float64{4, 1, 9, 2}, figure{4, 3, 1, 9}},
	} {
		if got := sumUp(test.numbers); got != test.want {
			t.Errorf("%v: got %+v, want %+v", test.numbers, got, test.want)
		}
	}
}

// TestRatioIsOfOneRound has a machine that is half as fast in the second round. The
// ratio of the medians would be something else.
func TestRatioIsOfOneRound(t *testing.T) {
	r := &record{Results: []result{
		{Scenario: "s", Variant: "v", Candidate: yardstick, Round: 1, Values: map[string]float64{valueCPU: 10}},
		{Scenario: "s", Variant: "v", Candidate: "one", Round: 1, Values: map[string]float64{valueCPU: 11}},
		{Scenario: "s", Variant: "v", Candidate: "one", Round: 2, Values: map[string]float64{valueCPU: 24}},
		{Scenario: "s", Variant: "v", Candidate: yardstick, Round: 2, Values: map[string]float64{valueCPU: 20}},

		// Nothing to compare with: another variant, another scenario, and no value.
		{Scenario: "s", Variant: "other", Candidate: yardstick, Round: 3, Values: map[string]float64{valueCPU: 1}},
		{Scenario: "other", Variant: "v", Candidate: yardstick, Round: 3, Values: map[string]float64{valueCPU: 1}},
		{Scenario: "s", Variant: "v", Candidate: "one", Round: 3, Values: map[string]float64{valueCPU: 50}},
		{Scenario: "s", Variant: "v", Candidate: yardstick, Round: 4, Lacks: "something"},
		{Scenario: "s", Variant: "v", Candidate: "one", Round: 4, Values: map[string]float64{valueCPU: 50}},
	}}
	want := sumUp([]float64{1.1, 1.2})
	if got := r.ratio(setup{"s", "v", "one"}, valueCPU, yardstick); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
