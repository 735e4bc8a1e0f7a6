package deploy

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience is for what takes a moment on an idle machine, and longer on one that
// is compiling.
const patience = time.Minute

// caddyBinary is Caddy with the module, built from this checkout.
var caddyBinary string

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "deploy-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	caddyBinary = filepath.Join(dir, "caddy")
	build := exec.Command("go", "build", "-C", "../..", "-o", caddyBinary, "./cmd/caddy")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building caddy: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// output runs a command, which must succeed, and returns what it wrote to
// standard output.
func output(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	var stderr bytes.Buffer
	if cmd.Stderr == nil {
		cmd.Stderr = &stderr
	}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(cmd.Args, " "), err, out, stderr.Bytes())
	}
	return string(out)
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func writeFile(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// replace replaces texts, which must be there: pairs of old and new.
func replace(t *testing.T, text string, pairs ...string) string {
	t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(text, pairs[i]) {
			t.Fatalf("got\n%s\nwant %q in it", text, pairs[i])
		}
	}
	return strings.NewReplacer(pairs...).Replace(text)
}

// checkCaddyfile checks that Caddy loads a Caddyfile and that `caddy fmt` leaves
// it as it is.
func checkCaddyfile(t *testing.T, content string, env ...string) {
	t.Helper()
	file := writeFile(t, filepath.Join(t.TempDir(), "Caddyfile"), content)
	if got := output(t, exec.Command(caddyBinary, "fmt", file)); got != content {
		t.Errorf("got a Caddyfile that is not formatted, want\n%s", got)
	}
	validate := exec.Command(caddyBinary, "validate", "--config", file)
	validate.Env = append(os.Environ(), env...)
	output(t, validate)
}

// tokenRequest returns what the client of a Caddyfile sends to its token
// endpoint.
func tokenRequest(t *testing.T, content string, env ...string) *http.Request {
	t.Helper()
	var got *http.Request
	var mu sync.Mutex
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		r.ParseForm()
		got = r
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"access_token":"token","token_type":"Bearer","expires_in":60}`)
	}))
	defer server.Close()
	content = replace(t, content, "https://auth.example.com/oauth2/token", server.URL)
	file := writeFile(t, filepath.Join(t.TempDir(), "Caddyfile"), content)
	cmd := exec.Command(caddyBinary, "oauth2-token", "--config", file)
	cmd.Env = append(os.Environ(), env...)
	output(t, cmd)
	mu.Lock()
	defer mu.Unlock()
	if got == nil {
		t.Fatal("got no token request, want one")
	}
	return got
}

// program runs beside the test.
type program struct {
	group  int           // of its processes
	exited chan struct{} // closed once it is gone
}

// start runs a program, in a process group of its own, until the test ends.
func start(t *testing.T, cmd *exec.Cmd) *program {
	t.Helper()
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &program{cmd.Process.Pid, make(chan struct{})}
	go func() {
		cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		syscall.Kill(-p.group, syscall.SIGTERM)
		select {
		case <-p.exited:
		case <-time.After(10 * time.Second):
		}
		syscall.Kill(-p.group, syscall.SIGKILL)
		<-p.exited
		if t.Failed() {
			t.Logf("what %s wrote:\n%s", strings.Join(cmd.Args, " "), log.Bytes())
		}
	})
	return p
}

// get asks a program until it answers.
func (p *program) get(t *testing.T, client *http.Client, url string) (status int, body string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err == nil {
			defer resp.Body.Close()
			var text bytes.Buffer
			text.ReadFrom(resp.Body)
			return resp.StatusCode, text.String()
		}
		select {
		case <-p.exited:
			t.Fatalf("program ended before it answered: %v", err)
		case <-ctx.Done():
			t.Fatalf("got no answer within %v: %v", patience, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// heldPort is a port of 127.0.0.1 where nobody listens unless the test has
// somebody do so: a socket is bound to it until the test ends, so that it is given
// to no other listener and to no outgoing connection, and connections to it are
// refused. Caddy can listen there, also as another user, since Go sets this option
// as well.
func heldPort(t *testing.T) string {
	t.Helper()
	syscall.ForkLock.RLock()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	bound, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return strconv.Itoa(bound.(*syscall.SockaddrInet4).Port)
}
