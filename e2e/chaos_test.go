package e2e

import (
	"cmp"
	"os"
	"slices"
	"sync"
	"testing"
	"time"
)

// chaosWorkers is how many cells run at once. They mostly wait, but each sends
// chaosRate requests a second, also while the machine has other things to do.
const chaosWorkers = 5

// TestChaos has everything around the gateway fail, under load. With
// CHAOS_RESULTS set to the name of a file, it writes what it measured there.
func TestChaos(t *testing.T) { //nolint:tparallel // its parts come one after the other
	t.Parallel() // it mostly waits
	var results chaosResults
	t.Run("faults", func(t *testing.T) { results.cells = runCells(t) })
	for _, e := range chaosEvents {
		t.Run(e.name, func(t *testing.T) {
			if r := e.run(t); r != nil {
				r.name = e.name
				results.events = append(results.events, r)
			}
		})
	}

	file := os.Getenv("CHAOS_RESULTS")
	if file == "" || t.Failed() {
		return
	}
	if got, want := len(results.cells)+len(results.events), len(faults)*len(moments)+len(chaosEvents); got != want {
		t.Fatalf("got %d results, want all %d before they are written: run the whole of TestChaos", got, want)
	}
	writeResults(t, file, results.String(), "")
}

// runCells runs each fault at each moment.
func runCells(t *testing.T) []*cellResult {
	servers := make(map[time.Duration]*authServer)
	var cells []cell
	for _, m := range moments {
		if servers[m.life] == nil {
			servers[m.life] = startAuthServer(t, m.life)
		}
		for _, f := range faults {
			cells = append(cells, cell{f, m})
		}
	}
	// The longest first, so that none of them is waited for at the end.
	slices.SortStableFunc(cells, func(a, b cell) int { return cmp.Compare(b.moment.end, a.moment.end) })

	var (
		mu      sync.Mutex // guards results
		results []*cellResult
	)
	sideBySide(chaosWorkers, cells, func(c cell) {
		t.Run(c.String(), func(t *testing.T) {
			r := c.run(t, servers[c.moment.life])
			mu.Lock()
			defer mu.Unlock()
			results = append(results, r)
		})
	})
	return results
}

// sideBySide does something with each of all, in their order and n at once. The
// test's own way to do so, t.Parallel, has as many at once as the machine has
// processors.
func sideBySide[T any](n int, all []T, do func(T)) {
	var workers sync.WaitGroup
	queue := make(chan T)
	for range n {
		workers.Go(func() {
			for one := range queue {
				do(one)
			}
		})
	}
	for _, one := range all {
		queue <- one
	}
	close(queue)
	workers.Wait()
}
