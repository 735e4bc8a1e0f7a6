// What the figures depend on: the machine, and the state of the sources.

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
)

func thisMachine() machine {
	return machine{
		CPU:    lineOf("/proc/cpuinfo", "model name", ":"),
		Cores:  runtime.NumCPU(),
		Memory: gigabytes(lineOf("/proc/meminfo", "MemTotal", ":")),
		System: strings.Trim(lineOf("/etc/os-release", "PRETTY_NAME", "="), `"`) + ", Linux " + kernelVersion(lineOf("/proc/sys/kernel/osrelease", "", "")),
		Go:     runtime.Version(),
	}
}

// gigabytes returns what /proc/meminfo says, in GB.
func gigabytes(amount string) string {
	kibibytes, err := strconv.Atoi(strings.TrimSuffix(amount, " kB"))
	if err != nil {
		return amount
	}
	return fmt.Sprintf("%.0f GB", float64(kibibytes)*1024/1e9)
}

// kernelVersion returns the version of a kernel, without what its builder has added.
func kernelVersion(release string) string {
	version, _, _ := strings.Cut(release, "-")
	return version
}

// lineOf returns the value in the first line of a file that begins with name.
func lineOf(path, name, separator string) string {
	data, _ := os.ReadFile(path) //nolint:gosec // one of those above
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, name); ok {
			return strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(value), separator))
		}
	}
	return ""
}

// thisCommit says what was measured. A "+" behind it means that something was changed
// after the commit.
func thisCommit(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty=+").Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}
