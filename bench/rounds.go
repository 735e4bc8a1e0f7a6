// The order of a run: scenarios, their rounds, and the candidates of a round.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// measure runs all scenarios, and saves the record after each. It goes on after a
// candidate that failed, and returns the errors in the end.
func (o *options) measure(ctx context.Context, record *record, save func() error) error {
	present, err := o.present(ctx, record)
	if err != nil {
		return err
	}
	var failures []error
	for _, s := range scenarios() {
		if !o.scenarios.MatchString(s.title()) || (o.quick && !s.quick) || (s.candidates != nil && o.candidates.String() != "") {
			continue
		}
		measured := present
		if s.candidates != nil {
			if measured, err = s.candidates(ctx); err != nil {
				failures = append(failures, fmt.Errorf("%s: %w", s.title(), err))
				continue
			}
		}
		for round := range o.roundsOf(s) {
			results, err := o.round(ctx, s, measured, round)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			record.Results = append(record.Results, results...)
			if err != nil {
				failures = append(failures, fmt.Errorf("%s, round %d: %w", s.title(), round+1, err))
			}
		}
		if err := save(); err != nil {
			return err
		}
	}
	return errors.Join(failures...)
}

func (o *options) roundsOf(s scenario) int {
	if o.quick {
		return 1
	}
	return cmp.Or(o.rounds, s.rounds)
}

// inTurn returns the candidates in the order of a round. It changes from round to round,
// so that none has always the same one before it.
func inTurn(candidates []candidate, round int) []candidate {
	first := round / 2 % len(candidates)
	turned := slices.Concat(candidates[first:], candidates[:first])
	if round%2 == 1 {
		slices.Reverse(turned)
	}
	return turned
}

// round measures the candidates once, one after another. With -quick, a request that
// fails is an error, unless none fails when it is tried again: the machine may have other
// things to do.
func (o *options) round(ctx context.Context, s scenario, candidates []candidate, round int) (results []result, err error) {
	turns := [][]candidate{candidates}
	if s.together == nil {
		turns = slices.Collect(slices.Chunk(inTurn(candidates, round), 1))
	}
	for _, turn := range turns {
		if s.tokens && turn[0].static {
			continue
		}
		tries := 1
		if o.quick {
			tries = 2
		}
		for try := range tries {
			measured, tryErr := o.measureTogether(ctx, s, turn, round)
			for _, res := range measured {
				fmt.Fprintf(os.Stderr, "%s %s, round %d, %s: %s\n", time.Now().Format(time.TimeOnly), s.title(), round+1, res.Candidate, res.summary())
			}
			if tryErr == nil || try == tries-1 || ctx.Err() != nil {
				results, err = append(results, measured...), errors.Join(err, tryErr)
				break
			}
		}
	}
	return results, err
}

// present returns the candidates that are wanted and on this machine.
func (o *options) present(ctx context.Context, record *record) ([]candidate, error) {
	all := candidates()
	if o.quick {
		all = all[:2]
	}
	var found []candidate
	for _, c := range slices.Concat(all, []candidate(o.external)) {
		if !o.candidates.MatchString(c.name) {
			continue
		}
		version, err := c.version(ctx)
		switch {
		case err == nil:
			record.Versions[c.name] = version
			found = append(found, c)
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case o.quick:
			return nil, err
		default:
			fmt.Fprintf(os.Stderr, "not measured: %s: %v\n", c.name, err)
			record.Missing[c.name] = err.Error()
		}
	}
	if len(found) == 0 {
		return nil, errors.New("no candidate is left")
	}
	return found, nil
}

// candidates returns all gateways that this program knows. The first is the one that it
// is about, and the second the one that all are compared with.
func candidates() []candidate {
	return []candidate{this(), caddyStatic(), handWritten(false), handWritten(true), nginx(), haproxy(), envoy()}
}

// measureTogether measures candidates that run at the same time. It returns a result for
// each, also with an error.
func (o *options) measureTogether(ctx context.Context, s scenario, candidates []candidate, round int) (results []result, err error) {
	length := o.length
	if o.quick {
		length = 0.4
	}
	measured, err := runScenario(ctx, s, candidates, length)
	for i, c := range candidates {
		res := result{Scenario: s.name, Variant: s.variant, Candidate: c.name, Round: round + 1}
		reason, lacks := errors.AsType[lackError](err)
		switch {
		case lacks:
			res.Lacks = string(reason)
		case err != nil:
			line, _, _ := strings.Cut(err.Error(), "\n")
			res.Lacks = "failed: " + line
		default:
			res.Values = measured[i]
			if sent, failed := res.Values[valueSent], res.Values[valueFailed]; o.quick && (sent == 0 || failed > 0) {
				err = fmt.Errorf("%s: %v of %v requests failed", c.name, failed, sent)
			}
		}
		results = append(results, res)
	}
	if _, lacks := errors.AsType[lackError](err); lacks {
		err = nil
	}
	return results, err
}

// runScenario starts the candidates, and returns what the scenario has measured of each.
func runScenario(ctx context.Context, s scenario, candidates []candidate, length float64) ([]values, error) {
	var rigs []*rig
	for _, c := range candidates {
		dir, err := os.MkdirTemp("", "bench-")
		if err != nil {
			return nil, err
		}
		defer os.RemoveAll(dir)
		r, err := newRig(ctx, c, s.scene, dir)
		defer r.close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.name, err)
		}
		rigs = append(rigs, r)
	}
	var measured []values
	var err error
	if s.together != nil {
		measured, err = s.together(ctx, rigs, length)
	} else {
		measured = make([]values, 1)
		measured[0], err = s.measure(ctx, rigs[0], length)
	}
	for _, r := range rigs {
		err = errors.Join(err, r.ended())
	}
	return measured, err
}
