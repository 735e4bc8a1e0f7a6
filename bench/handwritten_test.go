package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestHandWrittenIsBuilt is also the test of program: it is the quickest to build.
func TestHandWrittenIsBuilt(t *testing.T) {
	// The binary goes into a cache of this test. Go's own cache stays where it is.
	goCache, err := exec.CommandContext(t.Context(), "go", "env", "GOCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("GOCACHE", strings.TrimSpace(string(goCache)))
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	built := handWrittenProgram
	defer func() { handWrittenProgram = built }()
	handWrittenProgram = &program{module: built.module, pkg: built.pkg}

	version, err := handWritten(false).version(t.Context())
	if err != nil || !strings.HasPrefix(version, "golang.org/x/oauth2 v") || !strings.Contains(version, ", go1.") {
		t.Fatalf("the version is %q, %v", version, err)
	}
	command, err := handWritten(true).command(testSite(t, 1))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(command, handWrittenProgram.path) || !slices.Contains(command, "-tuned") {
		t.Errorf("the command is %q", command)
	}
}

func TestBuildError(t *testing.T) {
	p := &program{module: ".", pkg: "./missing"}
	if _, err := p.build(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "go build ./missing: ") {
		t.Errorf("got %v", err)
	}
}
