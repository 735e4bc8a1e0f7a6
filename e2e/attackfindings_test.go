package e2e

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
)

// findings are what the attack has found. There may be thousands of one kind: the
// first of each is kept, and the others are counted.
type findings struct {
	mu     sync.Mutex
	first  map[string]string
	counts map[string]int
}

func newFindings() *findings {
	return &findings{first: make(map[string]string), counts: make(map[string]int)}
}

// add notes a finding of a kind.
func (f *findings) add(kind, format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.counts[kind]++
	if f.counts[kind] == 1 {
		f.first[kind] = fmt.Sprintf(format, args...)
	}
}

// report fails the test if anything was found.
func (f *findings) report(t *testing.T) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, kind := range slices.Sorted(maps.Keys(f.counts)) {
		t.Errorf("%s: got %d, want none; the first: %s", kind, f.counts[kind], f.first[kind])
	}
}

// tally counts what has happened, by name.
type tally struct {
	mu     sync.Mutex
	counts map[string]int
}

func newTally() *tally { return &tally{counts: make(map[string]int)} }

// add counts one more, and returns how many there were before.
func (c *tally) add(name string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[name]++
	return c.counts[name] - 1
}

func (c *tally) of(name string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.counts[name]
}

func (c *tally) total() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	total := 0
	for _, n := range c.counts {
		total += n
	}
	return total
}

func (c *tally) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return fmt.Sprint(c.counts)
}
