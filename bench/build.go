// Gateways that are built from source.

package main

import (
	"cmp"
	"context"
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
)

// cacheDir returns the directory of programs that are built or installed for this
// benchmark. They stay there for the next run.
func cacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "caddy-outbound-auth-bench"), nil
}

// A program is a main package of this repository.
type program struct {
	module string // the directory of its go.mod, seen from bench/
	pkg    string // the package, seen from there
	name   string // of the binary; empty: that of the package
	flags  []string
	path   string // of the binary, once it is built
}

// build returns the path of the program's binary. Only the first call builds it: a run
// measures one state of the source, even if somebody edits the source meanwhile.
func (p *program) build(ctx context.Context) (string, error) {
	if p.path != "" {
		return p.path, nil
	}
	dir, err := cacheDir()
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, cmp.Or(p.name, filepath.Base(p.pkg)))
	args := slices.Concat([]string{"build", "-o", path}, p.flags, []string{p.pkg})
	goBuild := exec.CommandContext(ctx, "go", args...) //nolint:gosec // our own arguments
	goBuild.Dir = p.module
	if out, err := goBuild.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build %s: %w\n%s", p.pkg, err, out)
	}
	p.path = path
	return path, nil
}

// version builds the program, and returns the versions of Go and of a module in it.
func (p *program) version(ctx context.Context, name, module string) (string, error) {
	path, err := p.build(ctx)
	if err != nil {
		return "", err
	}
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return "", err
	}
	for _, dep := range info.Deps {
		if dep.Path == module {
			return fmt.Sprintf("%s %s, %s", name, dep.Version, info.GoVersion), nil
		}
	}
	return "", fmt.Errorf("%s was built without %s", path, module)
}

// twoCores returns a command that runs a Go program on two cores, as the other
// gateways run two workers.
func twoCores(command ...string) []string {
	return append([]string{"env", "GOMAXPROCS=2"}, command...)
}
