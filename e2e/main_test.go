package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
)

// caddyBinary is Caddy with the module, built from this checkout.
var caddyBinary string

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	// The tests' own directories go there as well, and with it.
	os.Setenv("TMPDIR", dir)

	// An interrupt ends the test at once, without its cleanups; the processes
	// are in groups of their own, which the terminal doesn't reach.
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupted
		killProcesses()
		os.RemoveAll(dir)
		os.Exit(130)
	}()
	defer killProcesses()

	caddyBinary = filepath.Join(dir, "caddy")
	if err := buildCaddy(caddyBinary); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := installAuthServer(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func buildCaddy(to string) error {
	cmd := exec.Command("go", "build", "-o", to, "./cmd/caddy")
	cmd.Dir = ".."
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building caddy: %w\n%s", err, out)
	}
	return nil
}

// installAuthServer runs npm ci, unless what it installed last is what the
// lock file asks for.
func installAuthServer() error {
	lock, err := os.ReadFile(filepath.Join(authServerDir, "package-lock.json"))
	if err != nil {
		return err
	}
	sum := sha256.Sum256(lock)
	want := hex.EncodeToString(sum[:])
	stamp := filepath.Join(authServerDir, "node_modules", ".installed-lock")
	if got, err := os.ReadFile(stamp); err == nil && string(got) == want {
		return nil
	}
	cmd := exec.Command("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	cmd.Dir = authServerDir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("installing the authorization server: %w\n%s", err, out)
	}
	return os.WriteFile(stamp, []byte(want), 0o600)
}
