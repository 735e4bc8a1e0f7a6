// What a user could set: the same gateway, built or configured in other ways.

package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// asItIs is the candidate that the others of this scenario are compared with: the gateway
// with the defaults of Caddy and of Go.
const asItIs = "as it is"

// defaultIdle is how many idle connections Caddy keeps to an upstream by default.
const defaultIdle = 32

// tuned returns the gateway as it is, and with each of the settings that might make it
// faster.
func tuned(ctx context.Context) ([]candidate, error) {
	profile, err := recordProfile(ctx)
	if err != nil {
		return nil, fmt.Errorf("recording a profile: %w", err)
	}
	profiled := &program{module: "..", pkg: "./cmd/caddy", name: "caddy-profile", flags: []string{"-pgo=" + profile}}
	if _, err := profiled.build(ctx); err != nil {
		return nil, err
	}
	return []candidate{
		variant(asItIs, caddyProgram, defaultIdle),
		variant("GOGC=200", caddyProgram, defaultIdle, "GOGC=200"),
		variant("1,024 idle connections", caddyProgram, 1024),
		variant("built with a profile", profiled, defaultIdle),
	}, nil
}

// variant is this gateway, built as p, with so many idle connections and these variables
// in its environment.
func variant(name string, p *program, idle int, env ...string) candidate {
	c := withOAuth(name, p)
	command := c.command
	c.command = func(s *site) ([]string, error) {
		s.Idle = idle
		args, err := command(s)
		return slices.Concat([]string{"env"}, env, args), err
	}
	return c
}

// recordProfile returns the file of a CPU profile of the gateway, recorded while it has
// as many requests as it can take.
func recordProfile(ctx context.Context) (path string, err error) {
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	port, err := freePort()
	if err != nil {
		return "", err
	}
	admin := fmt.Sprintf("127.0.0.1:%d", port)
	c := this()
	command := c.command
	c.command = func(s *site) ([]string, error) {
		s.Admin = admin
		return command(s)
	}
	r, err := newRig(ctx, c, scene{}, dir)
	defer r.close()
	if err != nil {
		return "", err
	}

	const length = 20 * time.Second
	loaded := make(chan error, 1)
	go func() {
		_, err := r.saturate(ctx, length+2*time.Second)
		loaded <- err
	}()
	profile, err := fetch(ctx, fmt.Sprintf("http://%s/debug/pprof/profile?seconds=%d", admin, int(length.Seconds())))
	if loadErr := <-loaded; err == nil {
		err = loadErr
	}
	if err != nil {
		return "", err
	}
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	path = filepath.Join(cache, "caddy.pgo")
	return path, os.WriteFile(path, profile, 0o600)
}

// fetch returns what a server on this machine has at a URL.
func fetch(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", url, res.Status)
	}
	return io.ReadAll(res.Body)
}
