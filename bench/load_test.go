package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestAttackAsksForOneTargetAtATime counts what arrives: each target once.
func TestAttackAsksForOneTargetAtATime(t *testing.T) {
	var mu sync.Mutex
	arrived := make(map[string]int)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		arrived[r.Host+r.URL.Path+" "+r.Method+" "+r.Header.Get("Authorization")]++
	}))
	defer server.Close()
	r := &rig{site: &site{Listen: strings.TrimPrefix(server.URL, "http://")}}
	i := 0
	outcomes := r.attack(t.Context(), pace{rate: atOnce(200)}, func() target {
		i++
		return target{path: fmt.Sprint("/", i), host: fmt.Sprintf("c%d.test", i), body: []byte("x")}
	})
	if len(outcomes) != 200 || len(arrived) != 200 || arrived["c200.test/200 POST Bearer of-the-caller"] != 1 {
		t.Errorf("got %d outcomes, and %d requests: %v", len(outcomes), len(arrived), arrived)
	}
	for _, o := range outcomes {
		if o.answered != http.StatusOK || !strings.HasPrefix(o.path, "/") {
			t.Fatalf("got %+v", o)
		}
	}
}

func TestALateRequestCountsFromWhenItWasDue(t *testing.T) {
	sent := time.Now()
	o := outcome{at: sent, took: time.Second}
	if got := o.since(sent.Add(-time.Second)); got.took != 2*time.Second || !got.at.Equal(sent.Add(-time.Second)) {
		t.Errorf("sent a second too late: got %+v", got)
	}
	for _, due := range []time.Time{sent.Add(time.Second), sent.Add(-slack)} {
		if got := o.since(due); got != o {
			t.Errorf("sent %v late: got %+v", sent.Sub(due), got)
		}
	}
}
