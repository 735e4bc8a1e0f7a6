// Command bench measures the gateway beside others, each alone on this machine, and
// writes RESULTS.md. Its README.md says how to run it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	out        string
	quick      bool
	render     bool
	candidates *regexp.Regexp
	scenarios  *regexp.Regexp
	external   externals
	rounds     int
	length     float64
}

func parse(args []string) (*options, error) {
	o := new(options)
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.StringVar(&o.out, "out", ".", "the `directory` of the results")
	flags.BoolVar(&o.quick, "quick", false, "run the short scenarios once, with this and the static header only; write no results; fail if a request fails")
	flags.BoolVar(&o.render, "render", false, "measure nothing, and write RESULTS.md and the plots anew from results.json")
	candidates := flags.String("candidates", "", "measure those whose name matches this `regexp`")
	scenarios := flags.String("scenarios", "", "measure those whose name matches this `regexp`")
	flags.Var(&o.external, "external", "measure another gateway, too: `name=command`; see README.md")
	flags.IntVar(&o.rounds, "rounds", 0, "this `number` of rounds instead of the scenario's own")
	flags.Float64Var(&o.length, "length", 1, "this `part` of each scenario's time, to try a change of this program")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if flags.NArg() > 0 {
		return nil, fmt.Errorf("unknown argument %q; all settings are flags", flags.Arg(0))
	}
	var err error
	if o.candidates, err = regexp.Compile(*candidates); err != nil {
		return nil, fmt.Errorf("-candidates: %w", err)
	}
	if o.scenarios, err = regexp.Compile(*scenarios); err != nil {
		return nil, fmt.Errorf("-scenarios: %w", err)
	}
	part := *candidates+*scenarios != "" || o.rounds != 0 || o.length != 1
	if part && o.out == "." && !o.quick && !o.render {
		return nil, errors.New("a part of a run would replace the published results; name another directory with -out")
	}
	return o, nil
}

func run(ctx context.Context, args []string) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	results := filepath.Join(o.out, "results.json")
	if o.render {
		record, err := loadRecord(results)
		if err != nil {
			return err
		}
		return record.publish(o.out)
	}
	if _, err := exec.LookPath("wrk"); err != nil {
		return fmt.Errorf("%w: install wrk; on Debian, it is the package wrk", err)
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil { //nolint:gosec // for everybody to read
		return err
	}
	record := &record{
		Date: time.Now().UTC().Truncate(time.Second), Command: strings.TrimSpace("go run . " + strings.Join(args, " ")),
		Machine: thisMachine(), Commit: thisCommit(ctx),
		Versions: make(map[string]string), Missing: make(map[string]string),
	}
	// What is measured so far is not lost if something goes wrong.
	part := results + ".part"
	save := func() error {
		record.Took = time.Since(record.Date).Truncate(time.Second)
		return record.save(part)
	}
	if o.quick {
		save = func() error { return nil }
	}
	err = o.measure(ctx, record, save)
	if o.quick || len(record.Results) == 0 || ctx.Err() != nil {
		return err
	}
	return errors.Join(err, os.Rename(part, results), record.publish(o.out))
}
