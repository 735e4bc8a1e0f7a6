package grafana

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// startTimeout is how long a program may take to be ready, on a machine that is
// busy with other things.
const startTimeout = time.Minute

// process is a program that runs beside this one.
type process struct {
	name   string
	log    string        // the file with the program's output
	exited chan struct{} // closed once the program has ended
}

// start runs cmd until cmd's context ends. cmd must be bound to a context.
func start(cmd *exec.Cmd, dir string) (*process, error) {
	p := &process{name: filepath.Base(cmd.Path), exited: make(chan struct{})}
	p.log = filepath.Join(dir, p.name+".log")
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second // after that time, cmd is killed
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", p.name, err)
	}
	go func() {
		_ = cmd.Wait() // cmd ends when it is told to; if it ends too early, ready notices that
		close(p.exited)
	}()
	return p, nil
}

// ready waits until the program answers a request for url with 200.
func (p *process) ready(ctx context.Context, url string) error {
	err := poll(ctx, startTimeout, func() (bool, error) {
		select {
		case <-p.exited:
			return false, errors.New("it has ended")
		default:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return false, err
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return false, nil //nolint:nilerr // the program does not listen yet
		}
		defer res.Body.Close()
		return res.StatusCode == http.StatusOK, nil
	})
	if err != nil {
		log, _ := os.ReadFile(p.log)
		return fmt.Errorf("%s isn't ready: %w\n%s", p.name, err, log[max(0, len(log)-4<<10):])
	}
	return nil
}

// poll calls done again and again until it returns true or an error, but not
// for longer than limit.
func poll(ctx context.Context, limit time.Duration, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
