// What Debian's packages install.

package main

import (
	"fmt"
	"path/filepath"
)

// installed returns an error that says what to install, if a file that matches one of the
// patterns is missing.
func installed(packages string, patterns ...string) error {
	for _, pattern := range patterns {
		if paths, err := filepath.Glob(pattern); err != nil || len(paths) == 0 {
			return fmt.Errorf("no %s: on Debian 12, apt-get install --no-install-recommends %s", pattern, packages)
		}
	}
	return nil
}
