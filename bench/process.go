// A gateway's process: its life, and what it takes from the machine.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// A process is a running gateway, with all processes that it has started.
type process struct {
	group  int // of processes
	log    string
	exited chan struct{} // closed once the gateway has ended
	memory atomic.Int64  // at most, in bytes
}

// start runs a command in a process group of its own.
func start(command []string, dir string) (*process, error) {
	p := &process{log: filepath.Join(dir, "output.log"), exited: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(command[0], command[1:]...) //nolint:gosec // that is what this program is for
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p.group = cmd.Process.Pid
	go func() {
		_ = cmd.Wait() // it ends when it is told to; if it ends too early, the requests fail
		close(p.exited)
	}()
	go p.watchMemory()
	return p, nil
}

// stop ends the gateway, and waits until it has ended.
func (p *process) stop() {
	_ = syscall.Kill(-p.group, syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(5 * time.Second):
	}
	_ = syscall.Kill(-p.group, syscall.SIGKILL) // whatever is left of the group
	<-p.exited
	for range 1000 { // a killed process still has to go away
		if len(p.pids()) == 0 {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// until calls try until it returns nil. It gives up when the gateway has ended, or after
// a minute.
func (p *process) until(ctx context.Context, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-p.exited:
			return fmt.Errorf("the gateway has ended: %s", p.output())
		case <-ctx.Done():
			return fmt.Errorf("the gateway is not ready: %w; %s", err, p.output())
		}
	}
}

// output returns the end of what the gateway has written to its terminal.
func (p *process) output() string {
	data, _ := os.ReadFile(p.log) //nolint:gosec // in our own directory
	return strings.TrimSpace(string(data[max(0, len(data)-1000):]))
}

// pids returns the processes of the group that have not ended.
func (p *process) pids() []int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	var pids []int
	for _, path := range stats {
		fields, err := statOf(path)
		if err != nil {
			continue // it has ended
		}
		if fields[statState] != "Z" && fields[statGroup] == strconv.Itoa(p.group) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// The fields of /proc/*/stat, counted from the one behind the program's name; see
// proc_pid_stat(5).
const (
	statState  = 0
	statGroup  = 2
	statUser   = 11
	statSystem = 12
)

// clockTick is the unit of times in /proc: sysconf(_SC_CLK_TCK) is 100 on Linux.
const clockTick = 10 * time.Millisecond

func statOf(path string) ([]string, error) {
	data, err := os.ReadFile(path) //nolint:gosec // in /proc
	if err != nil {
		return nil, err
	}
	_, rest, ok := bytes.Cut(data, []byte(") ")) // behind the name
	fields := strings.Fields(string(rest))
	if !ok || len(fields) <= statSystem {
		return nil, errors.New("not a line of /proc/*/stat")
	}
	return fields, nil
}

// cpu returns how long the processors have worked for the gateway so far.
func (p *process) cpu() time.Duration {
	var ticks int64
	for _, pid := range p.pids() {
		fields, err := statOf(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		user, _ := strconv.ParseInt(fields[statUser], 10, 64)
		system, _ := strconv.ParseInt(fields[statSystem], 10, 64)
		ticks += user + system
	}
	return time.Duration(ticks) * clockTick
}

// watchMemory notes how much memory the gateway uses at most: its share of all pages
// that are in memory (Pss), once a second.
func (p *process) watchMemory() {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-p.exited:
			return
		case <-ticker.C:
			var sum int64
			for _, pid := range p.pids() {
				sum += pss(pid)
			}
			p.memory.Store(max(sum, p.memory.Load()))
		}
	}
}

// pss returns the proportional set size of a process, in bytes.
func pss(pid int) int64 {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
			kb, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			return kb << 10
		}
	}
	return 0
}
