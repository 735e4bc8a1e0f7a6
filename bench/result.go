// What a run has measured.

package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"strings"
	"time"
)

// A record is all that one run has measured. It is kept in results.json, and
// RESULTS.md and the plots are made of it.
type record struct {
	Date     time.Time         `json:"date"`
	Took     time.Duration     `json:"took"`    // in nanoseconds
	Command  string            `json:"command"` // as somebody would type it
	Commit   string            `json:"commit"`
	Machine  machine           `json:"machine"`
	Versions map[string]string `json:"versions"` // by candidate
	Missing  map[string]string `json:"missing"`  // candidates that were not measured: why
	Results  []result          `json:"results"`
}

// A machine is what the figures depend on.
type machine struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Memory string `json:"memory"`
	System string `json:"system"` // distribution and kernel
	Go     string `json:"go"`
}

// A result is what one candidate did in one round of a scenario.
type result struct {
	Scenario  string             `json:"scenario"` // its name
	Variant   string             `json:"variant,omitempty"`
	Candidate string             `json:"candidate"`
	Round     int                `json:"round"` // from 1; rounds of one number were measured one after another
	Values    map[string]float64 `json:"values,omitempty"`
	Lacks     string             `json:"lacks,omitempty"` // why there are no values
}

// The names of values. Times are in seconds, CPU in seconds a request, memory in bytes.
const (
	valueRate     = "rate"   // requests a second
	valueCPU      = "cpu"    // of the gateway, for one request
	valueMemory   = "memory" // of the gateway, at most
	valueP50      = "p50"    // half of the requests took no longer
	valueP99      = "p99"
	valueP999     = "p99.9"
	valueMax      = "max"
	valueSent     = "sent"     // requests
	valueFailed   = "failed"   // requests without the upstream's good answer
	valueWithheld = "withheld" // of them, those during which a token of their client was valid
	valueOver100  = "over 100 ms"
	valueOver1s   = "over 1 s"
	valueTokens   = "token requests"
	valueRecovery = "recovery" // from the end of the trouble to the last failed request; or never
	valueStart    = "start"    // from the start of the process to its first good answer
)

// never is the recovery of a gateway that had not recovered when the scenario ended.
const never = math.MaxFloat64

func (r *record) save(path string) error {
	data, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644) //nolint:gosec // for everybody to read
}

func loadRecord(path string) (*record, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := new(record)
	return r, json.Unmarshal(data, r)
}

// allValues are the names of values, in the order in which they are shown.
var allValues = []string{
	valueRate, valueCPU, valueMemory, valueP50, valueP99, valueP999, valueMax, valueSent, valueFailed, valueWithheld,
	valueOver100, valueOver1s, valueTokens, valueRecovery, valueStart,
}

// summary shows a result on one line.
func (res *result) summary() string {
	if res.Lacks != "" {
		return res.Lacks
	}
	var b strings.Builder
	for _, name := range allValues {
		if value, ok := res.Values[name]; ok {
			fmt.Fprintf(&b, " %s=%.4g", name, value)
		}
	}
	return strings.TrimSpace(b.String())
}
