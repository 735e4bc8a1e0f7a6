// Package grafana runs a real Caddy with this module, and a real Prometheus
// that watches it. So it finds out what the dashboard and the alerts in this
// directory show.
package grafana

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/api"
	promapi "github.com/prometheus/client_golang/api/prometheus/v1"
	"github.com/prometheus/common/model"
)

// ScrapeInterval is how often Prometheus scrapes, and evaluates its rules.
const ScrapeInterval = time.Second

// Client is one of the gateway's OAuth clients. It has an upstream of its own.
type Client struct {
	Name     string
	Server   string        // which authorization server it asks; all with the same name ask the same one
	Lifetime time.Duration // the lifetime of its tokens
	Every    time.Duration // the interval of its requests; 0: no requests
	Noise    time.Duration // the interval of its requests for the noisy path, see Rig.Noise; 0: none
	Settings string        // more lines for its transport in the Caddyfile
	Fault    http.HandlerFunc
}

// Rig is a gateway with its authorization servers, upstreams and traffic, and a
// Prometheus.
type Rig struct {
	Prometheus promapi.API
	MetricsURL string

	auth      map[string]*authServer // by the name of the client
	endpoints map[string]string      // by the name of the authorization server
	upstreams map[string]*upstream
	servers   []*httptest.Server
	processes []*process
	held      []int // the sockets of holdAddress
	url       string
	traffic   sync.WaitGroup
	end       context.CancelFunc

	mu      sync.Mutex
	answers map[string]map[int]int // guarded by mu
}

// Start starts the rig. It writes its files to dir. rules is the text of
// Prometheus' rule file. The end of ctx ends everything.
func Start(ctx context.Context, dir, rules string, clients ...Client) (_ *Rig, err error) {
	ctx, end := context.WithCancel(ctx)
	r := &Rig{
		auth:      make(map[string]*authServer),
		endpoints: make(map[string]string),
		upstreams: make(map[string]*upstream),
		answers:   make(map[string]map[int]int),
		end:       end,
	}
	defer func() {
		if err != nil {
			r.Stop()
		}
	}()
	var addresses [3]string
	for i := range addresses {
		if addresses[i], err = r.holdAddress(); err != nil {
			return nil, err
		}
	}
	site, admin, prometheus := addresses[0], addresses[1], addresses[2]
	r.url, r.MetricsURL = "http://"+site, "http://"+admin+"/metrics"

	if err := r.startGateway(ctx, dir, r.caddyfile(site, admin, clients)); err != nil {
		return nil, err
	}
	if err := r.startPrometheus(ctx, dir, prometheus, admin, rules); err != nil {
		return nil, err
	}
	for _, c := range clients {
		if c.Every > 0 {
			r.answers[c.Name] = make(map[int]int)
			r.traffic.Go(func() {
				r.send(ctx, c.Every, "/"+c.Name, func(status int) {
					r.mu.Lock()
					defer r.mu.Unlock()
					r.answers[c.Name][status]++
				})
			})
		}
		if c.Noise > 0 {
			r.traffic.Go(func() { r.send(ctx, c.Noise, "/"+c.Name+noisyPath, func(int) {}) })
		}
	}
	return r, nil
}

// Stop ends what Start has started.
func (r *Rig) Stop() {
	r.end()
	r.traffic.Wait()
	for _, p := range r.processes {
		<-p.exited
	}
	for _, s := range r.servers {
		s.CloseClientConnections()
		s.Close()
	}
	for _, fd := range r.held {
		_ = syscall.Close(fd)
	}
}

// caddyfile starts the servers that the gateway needs, and returns its config.
func (r *Rig) caddyfile(site, admin string, clients []Client) string {
	servers := make(map[string]*authServer)
	var b strings.Builder
	fmt.Fprintf(&b, "{\n\tadmin %s\n\tauto_https off\n\tdefault_bind 127.0.0.1\n\tpersist_config off\n}\nhttp://%s {\n", admin, site)
	for _, c := range clients {
		auth := servers[c.Server]
		if auth == nil {
			auth = newAuthServer()
			servers[c.Server] = auth
			r.endpoints[c.Server] = strings.TrimPrefix(r.serve(auth), "http://")
		}
		auth.lifetimes[c.Name] = c.Lifetime
		auth.fail(c.Name, c.Fault)
		r.auth[c.Name] = auth
		r.upstreams[c.Name] = new(upstream)
		fmt.Fprintf(&b, "\t@%s path /%[1]s /%[1]s/*\n\treverse_proxy @%[1]s %[2]s {\n\t\ttransport oauth2 {\n\t\t\tname %[1]s\n\t\t\ttoken_url http://%[3]s\n"+
			"\t\t\tclient_id %[1]s\n\t\t\tclient_secret secret\n\t\t\t%[4]s\n\t\t}\n\t}\n",
			c.Name, r.serve(r.upstreams[c.Name]), r.endpoints[c.Server], c.Settings)
	}
	b.WriteString("}\n")
	return b.String()
}

func (r *Rig) serve(h http.Handler) (url string) {
	s := httptest.NewServer(h)
	r.servers = append(r.servers, s)
	return s.URL
}

// startGateway builds Caddy with the module of this checkout, and starts it.
func (r *Rig) startGateway(ctx context.Context, dir, config string) error {
	binary := filepath.Join(dir, "caddy")
	if out, err := exec.CommandContext(ctx, "go", "build", "-C", "..", "-o", binary, "./cmd/caddy").CombinedOutput(); err != nil {
		return fmt.Errorf("building caddy: %w\n%s", err, out)
	}
	file, err := write(dir, "Caddyfile", config)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, binary, "run", "--config", file, "--adapter", "caddyfile")
	// This gateway must neither read nor change the files of the user's Caddy. Its storage is
	// data/caddy: the name caddy is taken by the binary.
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+dir, "XDG_DATA_HOME="+filepath.Join(dir, "data"))
	return r.startProcess(ctx, cmd, dir, r.MetricsURL)
}

// startPrometheus starts a Prometheus that scrapes the gateway.
func (r *Rig) startPrometheus(ctx context.Context, dir, address, admin, rules string) error {
	binary, err := lookPath("prometheus")
	if err != nil {
		return err
	}
	config := fmt.Sprintf(`
global: {scrape_interval: %[1]s, evaluation_interval: %[1]s}
rule_files: [rules.yml]
scrape_configs:
  - job_name: caddy
    static_configs: [{targets: ["%[2]s"], labels: {instance: gateway}}]
`, ScrapeInterval, admin)
	file, err := write(dir, "prometheus.yml", config)
	if err != nil {
		return err
	}
	if _, err := write(dir, "rules.yml", rules); err != nil {
		return err
	}
	client, err := api.NewClient(api.Config{Address: "http://" + address})
	if err != nil {
		return err
	}
	r.Prometheus = promapi.NewAPI(client)
	cmd := exec.CommandContext(ctx, binary, "--config.file="+file,
		"--storage.tsdb.path="+filepath.Join(dir, "series"), "--web.listen-address="+address)
	return r.startProcess(ctx, cmd, dir, "http://"+address+"/-/ready")
}

func (r *Rig) startProcess(ctx context.Context, cmd *exec.Cmd, dir, readyURL string) error {
	p, err := start(cmd, dir)
	if err != nil {
		return err
	}
	r.processes = append(r.processes, p)
	return p.ready(ctx, readyURL)
}

// write writes a text to a file in dir.
func write(dir, name, text string) (path string, err error) {
	path = filepath.Join(dir, name)
	return path, os.WriteFile(path, []byte(text), 0o600) //nolint:gosec // dir is ours
}

// lookPath finds one of the programs that come with Prometheus.
func lookPath(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return "", fmt.Errorf("%w: install Prometheus, on Debian and Ubuntu with `apt-get install --no-install-recommends prometheus`", err)
	}
	return path, nil
}

// holdAddress returns a loopback address that belongs to the rig until it
// stops. A socket is bound to the address. So the system gives it to no other
// listener and to no outgoing connection. Caddy and Prometheus can still listen
// there, because Go sets SO_REUSEADDR as well.
func (r *Rig) holdAddress() (string, error) {
	syscall.ForkLock.RLock()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return "", err
	}
	r.held = append(r.held, fd)
	if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1); err != nil {
		return "", err
	}
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return "", err
	}
	bound, err := syscall.Getsockname(fd)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("127.0.0.1:%d", bound.(*syscall.SockaddrInet4).Port), nil
}

// send sends a request for a path again and again. It calls answered with the status of
// each answer.
func (r *Rig) send(ctx context.Context, every time.Duration, path string, answered func(status int)) {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			r.traffic.Go(func() { answered(r.get(ctx, r.url+path)) })
		case <-ctx.Done():
			return
		}
	}
}

// get makes a request. It returns the status of the answer, or 0 without one.
func (r *Rig) get(ctx context.Context, url string) int {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, res.Body)
	return res.StatusCode
}

// Answers returns how many answers a client has had with each status. Those from the
// noisy path don't count.
func (r *Rig) Answers(client string) map[int]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.answers[client])
}

// Endpoint returns how the metrics call an authorization server.
func (r *Rig) Endpoint(server string) string { return r.endpoints[server] }

// Fail gives the client's authorization server a fault for this client. nil ends the
// fault.
func (r *Rig) Fail(client string, fault http.HandlerFunc) { r.auth[client].fail(client, fault) }

// Revoke makes a client's upstream refuse the token that it saw last.
func (r *Rig) Revoke(client string) { r.upstreams[client].revoke() }

// Refuse makes a client's upstream refuse all tokens. If all is false, the
// upstream stops that.
func (r *Rig) Refuse(client string, all bool) { r.upstreams[client].refuse(all) }

// Noise makes a client's upstream refuse all requests for one path, whatever the token.
// If on is false, the upstream stops that.
func (r *Rig) Noise(client string, on bool) { r.upstreams[client].noise(on) }

// Wait waits until Prometheus finds something for a query.
func (r *Rig) Wait(ctx context.Context, limit time.Duration, query string) error {
	err := poll(ctx, limit, func() (bool, error) {
		found, _, err := r.Prometheus.Query(ctx, query, time.Now())
		if err != nil {
			return false, err
		}
		vector, ok := found.(model.Vector)
		return ok && len(vector) > 0, nil
	})
	if err != nil {
		return fmt.Errorf("waiting for %s: %w", query, err)
	}
	return nil
}

// Range returns the results of a query from an instant until now.
func (r *Rig) Range(ctx context.Context, query string, from time.Time, step time.Duration) (model.Matrix, error) {
	found, _, err := r.Prometheus.QueryRange(ctx, query, promapi.Range{Start: from, End: time.Now(), Step: step})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", query, err)
	}
	matrix, ok := found.(model.Matrix)
	if !ok {
		return nil, fmt.Errorf("%s: got a %s, want series", query, found.Type())
	}
	return matrix, nil
}
