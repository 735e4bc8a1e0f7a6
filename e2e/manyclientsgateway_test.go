package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// manyGateway is a gateway whose one site has a route for each of many clients: what is
// below the path of a client gets its token. What is below /plain gets none.
type manyGateway struct {
	*process
	url, admin string
	config     []byte
	load       time.Duration // from the start of the process until the site is ready
}

// manyGroup is how many routes there are in a group. Caddy tries the routes of a list one
// after another, and each one is a call in the one before: with thousands in one list, a
// request needs megabytes of stack, and milliseconds.
const manyGroup = 100

func groupPath(group int) string { return fmt.Sprintf("/g%d", group) }

// manyPath is the path of a client.
func manyPath(client int) string {
	return fmt.Sprintf("%s/t%d", groupPath(client/manyGroup), client)
}

// manyConfig returns the JSON config of a gateway with n clients.
func manyConfig(t *testing.T, n int, site, admin, issuer, upstream string) []byte {
	t.Helper()
	type object = map[string]any
	route := func(path string, handler object) object {
		return object{"match": []object{{"path": []string{path + "/*"}}}, "terminal": true, "handle": []object{handler}}
	}
	to := []object{{"dial": upstream}}
	routes := []object{route("/plain", object{"handler": "reverse_proxy", "upstreams": to})}
	for first := 0; first < n; first += manyGroup {
		var group []object
		for c := first; c < min(first+manyGroup, n); c++ {
			group = append(group, route(manyPath(c), object{
				"handler": "reverse_proxy", "upstreams": to, "transport": object{
					"protocol": "oauth2", "credentials": object{
						"token_url": issuer + "/token", "client_id": manyClient(c), "client_secret": fmt.Sprint("secret of ", c),
					},
				},
			}))
		}
		routes = append(routes, route(groupPath(first/manyGroup), object{"handler": "subroute", "routes": group}))
	}
	config, err := json.Marshal(object{
		"admin": object{"listen": admin, "config": object{"persist": false}},
		"apps": object{"http": object{"servers": object{"many": object{
			"listen": []string{site}, "automatic_https": object{"disable": true}, "routes": routes,
		}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// manyCaddyfile is manyConfig as users write it.
func manyCaddyfile(n int, site, issuer, upstream string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "http://%s {\n\thandle /plain/* {\n\t\treverse_proxy %s\n\t}\n", site, upstream)
	for c := range n {
		if c%manyGroup == 0 {
			fmt.Fprintf(&b, "\thandle %s/* {\n", groupPath(c/manyGroup))
		}
		fmt.Fprintf(&b, "\t\thandle %s/* {\n\t\t\treverse_proxy %s {\n\t\t\t\ttransport oauth2 {\n"+
			"\t\t\t\t\ttoken_url %s/token\n\t\t\t\t\tclient_id %s\n\t\t\t\t\tclient_secret \"secret of %d\"\n\t\t\t\t}\n\t\t\t}\n\t\t}\n",
			manyPath(c), upstream, issuer, manyClient(c), c)
		if (c+1)%manyGroup == 0 || c+1 == n {
			b.WriteString("\t}\n")
		}
	}
	b.WriteString("}\n")
	return b.String()
}

// startMany starts a gateway with n clients of that server, and waits until it is ready.
func startMany(t *testing.T, n int, i *manyIssuer) *manyGateway {
	t.Helper()
	site := heldAddress(t)
	gw := &manyGateway{url: "http://" + site, admin: heldAddress(t)}
	gw.config = manyConfig(t, n, site, gw.admin, i.url, i.serveUpstream(t))
	dir := t.TempDir()
	file := filepath.Join(dir, "config.json")
	if err := os.WriteFile(file, gw.config, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(caddyBinary, "run", "--config", file)
	cmd.Env = manyEnv(dir)
	began := time.Now()
	gw.process = startProcess(t, cmd)
	t.Cleanup(func() {
		if panicked.MatchString(gw.output.String()) {
			t.Error("gateway panicked")
		}
	})
	for {
		conn, err := net.Dial("tcp", site)
		if err == nil {
			gw.load = time.Since(began)
			conn.Close()
			return gw
		}
		if time.Since(began) > startTimeout {
			t.Fatalf("gateway isn't ready after %v: %v", startTimeout, err)
		}
		select {
		case <-gw.exited:
			t.Fatal("gateway ended before it was ready")
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// manyEnv hides the user's own Caddy.
func manyEnv(dir string) []string {
	return append(os.Environ(), "XDG_CONFIG_HOME="+filepath.Join(dir, "config"), "XDG_DATA_HOME="+filepath.Join(dir, "data"))
}

// compose returns requests for n routes in turn.
func (gw *manyGateway) compose(n int) func(int) (*http.Request, error) {
	return func(i int) (*http.Request, error) {
		return http.NewRequest(http.MethodGet, fmt.Sprintf("%s%s/", gw.url, manyPath(i%n)), nil)
	}
}

// ask sends one request to each of n routes at once. The n-th outcome is the n-th
// client's.
func (gw *manyGateway) ask(n int) outcomes {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DisableKeepAlives = true
	defer transport.CloseIdleConnections()
	load := &steadyLoad{compose: gw.compose(n)}
	client := &http.Client{Transport: transport, Timeout: 30 * time.Second}
	all := make(outcomes, n)
	var under sync.WaitGroup
	began := time.Now()
	for c := range n {
		under.Go(func() {
			all[c] = load.send(client, c)
			all[c].n, all[c].due, all[c].sent, all[c].took = c, began, began, time.Since(began)
		})
	}
	under.Wait()
	return all
}

// fromAdmin asks the admin API, and returns the answer and how long it took.
func (gw *manyGateway) fromAdmin(t *testing.T, path string) ([]byte, time.Duration) {
	t.Helper()
	began := time.Now()
	got := do(t, newRequest(t, http.MethodGet, "http://"+gw.admin+path, nil))
	if got.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: got %s, want 200", path, got.Status)
	}
	return got.body, time.Since(began)
}

// reload loads the same config again, and returns how long that takes.
func (gw *manyGateway) reload(t *testing.T) time.Duration {
	t.Helper()
	req := newRequest(t, http.MethodPost, "http://"+gw.admin+"/load", bytes.NewReader(gw.config))
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Cache-Control", "must-revalidate")
	logged, began := gw.output.size(), time.Now()
	if got := do(t, req); got.StatusCode != http.StatusOK {
		t.Fatalf("POST /load: got %s, want 200\n%s", got.Status, got.body)
	}
	took := time.Since(began)
	await(t, "end of the old config's admin API", func() bool {
		return strings.Contains(gw.output.since(logged), "stopped previous server")
	})
	return took
}

// manySize is what a gateway takes.
type manySize struct {
	resident, heap int // bytes
	goroutines     int
}

// size returns what the gateway takes after a garbage collection.
func (gw *manyGateway) size(t *testing.T) (s manySize) {
	t.Helper()
	heap, _ := gw.fromAdmin(t, "/debug/pprof/heap?gc=1&debug=1")
	s.heap = numberAfter(t, heap, "# HeapAlloc = ")
	goroutines, _ := gw.fromAdmin(t, "/debug/pprof/goroutine?debug=1")
	s.goroutines = numberAfter(t, goroutines, "goroutine profile: total ")
	s.resident = gw.resident(t)
	return s
}

// resident returns the memory that the process occupies.
func (gw *manyGateway) resident(t *testing.T) int {
	t.Helper()
	out, err := exec.Command("ps", "-o", "rss=", "-p", strconv.Itoa(gw.cmd.Process.Pid)).Output()
	if status, readErr := os.ReadFile(fmt.Sprintf("/proc/%d/status", gw.cmd.Process.Pid)); readErr == nil { // no ps needed
		return numberAfter(t, status, "VmRSS:") << 10
	}
	if err != nil {
		t.Fatalf("ps: %v", err)
	}
	return numberAfter(t, out, "") << 10
}

// numberAfter returns the number that stands after prefix at the beginning of a line.
func numberAfter(t *testing.T, text []byte, prefix string) int {
	t.Helper()
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if after, ok := strings.CutPrefix(lines.Text(), prefix); ok && strings.TrimSpace(after) != "" {
			n, err := strconv.Atoi(strings.Fields(after)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no line with %q", prefix)
	return 0
}

// adapt has Caddy adapt the Caddyfile of n clients, and returns how long that takes.
func adaptMany(t *testing.T, n int) time.Duration {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "Caddyfile")
	text := manyCaddyfile(n, "127.0.0.1:8080", "http://127.0.0.1:9400", "127.0.0.1:9401")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(caddyBinary, "adapt", "--config", file, "--adapter", "caddyfile")
	cmd.Env = manyEnv(dir)
	cmd.Stdout = io.Discard
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	began := time.Now()
	if err := cmd.Run(); err != nil {
		t.Fatalf("caddy adapt: %v\n%s", err, stderr.Bytes())
	}
	return time.Since(began)
}
