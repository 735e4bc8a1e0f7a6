package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// startTimeout is how long a program may take to be ready, on a machine that is
// busy with compiling the next.
const startTimeout = 2 * time.Minute

var (
	// caddyBinary is Caddy with the module, built from this checkout.
	caddyBinary string

	// Authorization servers, of the nested modules of the same names.
	fositeBinary, zitadelBinary string
)

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

	for _, program := range []struct {
		path              *string
		name, module, pkg string
	}{
		{&caddyBinary, "caddy", "..", "./cmd/caddy"},
		{&fositeBinary, "fosite", "fosite", "."},
		{&zitadelBinary, "zitadel", "zitadel", "."},
	} {
		*program.path = filepath.Join(dir, program.name)
		if err := build(*program.path, program.module, program.pkg); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	if err := installAuthServer(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// build compiles a main package of a module.
func build(to, module, pkg string, flags ...string) error {
	args := append([]string{"build", "-C", module, "-o", to}, flags...)
	cmd := exec.Command("go", append(args, pkg)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", filepath.Base(to), err, out)
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

// startServer starts one of the servers built above. It knows the clients, and
// ready is set to what it prints once it can be asked.
func startServer(t *testing.T, binary string, clients, ready any) {
	t.Helper()
	text, err := json.Marshal(clients)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), "CLIENTS="+string(text))
	// The server ends with its standard input, even if this test is killed.
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	startProcess(t, cmd)

	decoded := make(chan error, 1)
	go func() { decoded <- json.NewDecoder(stdout).Decode(ready) }()
	select {
	case err := <-decoded:
		if err != nil {
			t.Fatalf("%s ended before it was ready: %v", filepath.Base(binary), err)
		}
	case <-time.After(startTimeout):
		t.Fatalf("%s isn't ready after %v", filepath.Base(binary), startTimeout)
	}
}
