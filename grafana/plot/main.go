// Command plot runs a gateway through some minutes of operation, and draws what
// the dashboard shows of them:
//
//	cd grafana && go run ./plot ../docs/operations.svg
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: go run ./plot <file.svg>")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, file string) error {
	dir, err := os.MkdirTemp("", "plot-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	r, err := record(ctx, dir)
	if err != nil {
		return err
	}
	svg, err := draw(r)
	if err != nil {
		return err
	}
	return os.WriteFile(file, svg, 0o644) //nolint:gosec // for everybody to read
}
