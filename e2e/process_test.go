package e2e

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// running holds every process group that the tests started and that may live
// still: process id → nothing.
var running sync.Map

// process is a program that runs beside the test.
type process struct {
	cmd    *exec.Cmd
	output *output       // what it wrote to standard error
	exited chan struct{} // closed once it is gone
}

// startProcess runs cmd in a process group of its own until the test ends.
func startProcess(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p, err := launch(cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("the end of what %s logged:\n%s", cmd.Args[0], p.output.tail(8<<10))
		}
	})
	return p
}

// launch is startProcess for one that stops the process itself.
func launch(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, output: new(output), exited: make(chan struct{})}
	cmd.Stderr = p.output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", cmd.Path, err)
	}
	running.Store(cmd.Process.Pid, nil)
	go func() {
		cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// untilEOF returns the command of a program that does not look at its standard input. When
// that ends, even because this test is killed, the program's process group is killed. What
// the program prints goes to standard error.
func untilEOF(args ...string) (*exec.Cmd, error) {
	const script = `exec 3<&0
{ cat <&3 >/dev/null; kill -KILL 0; } 2>/dev/null &
exec "$@" 3<&- </dev/null >&2`
	cmd := exec.Command("sh", append([]string{"-c", script, "sh"}, args...)...)
	cmd.Args[0] = filepath.Base(args[0]) // for the log
	_, err := cmd.StdinPipe()            // it ends with this process
	return cmd, err
}

// stop asks the process to end, and makes it after a while. What is left of
// its group goes too.
func (p *process) stop() {
	pid := p.cmd.Process.Pid
	syscall.Kill(-pid, syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(5 * time.Second):
	}
	p.kill()
}

// kill ends the process and its group without asking.
func (p *process) kill() {
	pid := p.cmd.Process.Pid
	syscall.Kill(-pid, syscall.SIGKILL)
	<-p.exited
	running.Delete(pid)
}

func killProcesses() {
	running.Range(func(pid, _ any) bool {
		syscall.Kill(-pid.(int), syscall.SIGKILL)
		return true
	})
}

// output collects what a process writes while the test reads it.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

func (o *output) size() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Len()
}

// since returns what was written after the first n bytes.
func (o *output) since(n int) string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.buf.Bytes()[n:])
}

func (o *output) tail(n int) string {
	s := o.String()
	return s[max(0, len(s)-n):]
}
