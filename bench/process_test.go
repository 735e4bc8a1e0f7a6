package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestProcessIsWatchedAndEnds(t *testing.T) {
	dir := t.TempDir()
	// The shell starts another one, which works, as the workers of nginx do.
	p, err := start([]string{"sh", "-c", "sh -c 'while :; do :; done' & wait"}, dir)
	if err != nil {
		t.Fatal(err)
	}
	err = p.until(t.Context(), func() error {
		if p.cpu() < 50*time.Millisecond || p.memory.Load() == 0 {
			return errors.New("it has not worked yet")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	p.stop()
	if pids := p.pids(); len(pids) > 0 {
		t.Errorf("processes %v are left", pids)
	}
}

func TestProcessThatEndsTooEarly(t *testing.T) {
	p, err := start([]string{"sh", "-c", "echo 'no such setting'; exit 1"}, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	err = p.until(t.Context(), func() error { return errors.New("connection refused") })
	if err == nil || !strings.Contains(err.Error(), "no such setting") {
		t.Errorf("got %v, want what the process says", err)
	}
}

func TestProcessIsNotAwaitedForEver(t *testing.T) {
	p, err := start([]string{"sleep", "60"}, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.until(ctx, func() error { return errors.New("connection refused") }); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("got %v", err)
	}
}
