package main

import (
	"encoding/xml"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
)

// TestPicturesShowEveryCandidate reads the texts of each picture, and so whether it
// is XML.
func TestPicturesShowEveryCandidate(t *testing.T) {
	values := make(map[string]float64)
	for _, value := range []string{valueCPU, valueP50, valueP99, valueP999, valueFailed} {
		values[value] = 0.25
	}
	candidates := []string{yardstick, "one", "one & <other>"}
	r := new(record)
	for _, scenario := range []string{"saturation", "open loop", "revoked", "503", "noise"} {
		for _, name := range candidates {
			r.Results = append(r.Results, result{Scenario: scenario, Candidate: name, Round: 1, Values: values})
		}
	}
	for name, picture := range pictures {
		svg, err := picture.svg(r)
		if err != nil {
			t.Fatal(err)
		}
		texts := textsOf(t, string(svg))
		for _, want := range append(candidates, picture.title) {
			if !slices.Contains(texts, want) {
				t.Errorf("%s: got the texts %q, want %q among them", name, texts, want)
			}
		}
	}
}

func textsOf(t *testing.T, svg string) []string {
	t.Helper()
	var texts []string
	decoder := xml.NewDecoder(strings.NewReader(svg))
	for {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			return texts
		} else if err != nil {
			t.Fatal(err)
		}
		if text, ok := token.(xml.CharData); ok {
			texts = append(texts, string(text))
		}
	}
}
