package main

import (
	"slices"
	"testing"
)

func TestTheOrderChangesFromRoundToRound(t *testing.T) {
	var seen [][]string
	for round := range 4 {
		var names []string
		for _, c := range inTurn([]candidate{{name: "a"}, {name: "b"}, {name: "c"}}, round) {
			names = append(names, c.name)
		}
		seen = append(seen, names)
	}
	want := [][]string{{"a", "b", "c"}, {"c", "b", "a"}, {"b", "c", "a"}, {"a", "c", "b"}}
	if !slices.EqualFunc(seen, want, slices.Equal) {
		t.Errorf("got %v, want %v", seen, want)
	}
}

func TestAPartOfARunReplacesNothing(t *testing.T) {
	for _, args := range [][]string{{"-scenarios", "revoked"}, {"-candidates", "this"}, {"-rounds", "1"}, {"-length", "0.5"}} {
		if _, err := parse(args); err == nil {
			t.Errorf("%v: no error", args)
		}
		if _, err := parse(append(args, "-out", t.TempDir())); err != nil {
			t.Errorf("%v: %v", args, err)
		}
	}
	if _, err := parse(nil); err != nil {
		t.Error(err)
	}
}
