package outboundauth

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

// patience is how long a test waits for what has to happen.
const patience = 10 * time.Second

// eventually waits until something has happened in another goroutine.
func eventually(t *testing.T, happened func() bool, what string, args ...any) {
	t.Helper()
	for deadline := time.Now().Add(patience); !happened(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("got nothing in %v, want "+what, append([]any{patience}, args...)...)
		}
	}
}

// expand replaces words such as $UP in a Caddyfile, also in what replaces
// another: pairs of word and value.
func expand(text string, pairs ...string) string {
	values := make(map[string]string)
	for i := 0; i < len(pairs); i += 2 {
		values[strings.TrimPrefix(pairs[i], "$")] = pairs[i+1]
	}
	value := func(name string) string {
		if value, ok := values[name]; ok {
			return value
		}
		return "$" + name // another expand knows it
	}
	return os.Expand(os.Expand(text, value), value)
}

// heldAddress is where nobody listens, and nobody but Caddy will: a socket is
// bound to it until the test ends, so that it is given to no other listener and
// to no outgoing connection, and connections to it are refused. Caddy can listen
// there, again and again, since it shares its ports with sockets that have these
// options.
func heldAddress(t *testing.T) string {
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
	t.Cleanup(func() { _ = syscall.Close(fd) })
	for _, option := range []int{syscall.SO_REUSEADDR, reusePort()} {
		if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, option, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	bound, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", bound.(*syscall.SockaddrInet4).Port)
}

// reusePort is SO_REUSEPORT, which package syscall lacks for Linux on amd64.
func reusePort() int {
	if runtime.GOOS == "linux" && !strings.HasPrefix(runtime.GOARCH, "mips") {
		return 0xf
	}
	return 0x200
}

// A gateway is Caddy, running in the process of the test. There is one Caddy
// in a process, so its tests are not parallel.
type gateway struct {
	t      *testing.T
	addr   string // where its site listens
	admin  string // global option
	global string // more global options
	more   string // more sites
	dir    string
	client *http.Client
}

// startGateway runs Caddy with a site that has these directives.
func startGateway(t *testing.T, site string) *gateway {
	t.Helper()
	g := newGateway(t)
	g.load(site)
	return g
}

func newGateway(t *testing.T) *gateway {
	t.Helper()
	g := &gateway{t: t, addr: heldAddress(t), admin: "off", dir: t.TempDir()}
	t.Setenv("XDG_CONFIG_HOME", filepath.Join(g.dir, "config"))
	t.Setenv("XDG_DATA_HOME", filepath.Join(g.dir, "data"))
	transport := &http.Transport{MaxIdleConnsPerHost: 1000, DisableCompression: true, DialContext: dialThroughReload}
	g.client = &http.Client{
		Transport:     transport,
		Timeout:       3 * patience,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	t.Cleanup(func() {
		transport.CloseIdleConnections() // or Caddy would wait for them
		g.stop()
		endAfterlives() // a server of the next test may get the port of this one's, and its source with it
	})
	return g
}

// dialThroughReload dials again if the connection is reset while it is made: it
// was in the queue of the old config's socket when Caddy closed that.
func dialThroughReload(ctx context.Context, network, address string) (net.Conn, error) {
	var dialer net.Dialer
	for {
		conn, err := dialer.DialContext(ctx, network, address)
		if !errors.Is(err, syscall.ECONNRESET) {
			return conn, err
		}
	}
}

// config is the gateway's Caddyfile, as JSON. The period of grace is longer than
// the 5 s that net/http waits for connections which nobody has used yet: when it
// ends before, that is an error in the log.
func (g *gateway) config(site string) []byte {
	g.t.Helper()
	_, port, _ := net.SplitHostPort(g.addr)
	source := expand(`{
	auto_https off
	admin $ADMIN
	persist_config off
	grace_period 10s
	storage file_system $DIR/storage
	log {
		level DEBUG
		output file $DIR/log
	}
	$GLOBAL
}
http://:$PORT {
	bind 127.0.0.1
	log
	$SITE
}
$MORE
`, "$ADMIN", g.admin, "$DIR", g.dir, "$GLOBAL", g.global, "$PORT", port, "$SITE", site, "$MORE", g.more)
	adapted, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(source), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		g.t.Fatalf("adapting the Caddyfile: %v\n%s", err, source)
	}
	return bytes.ReplaceAll(adapted, []byte(`"listen":[`), []byte(`"listener_wrappers":[{"wrapper":"counted"}],"listen":[`))
}

// load starts Caddy, or reloads it. A new config runs before the servers of the
// old one have closed: a request could still be answered by them, or have its
// connection reset. So load waits for their end, and leaves no connection to them.
func (g *gateway) load(site string) {
	g.t.Helper()
	reload := countedAt(g.addr).Load() > 0
	if err := g.tryLoad(site); err != nil {
		g.t.Fatalf("loading the config: %v", err)
	}
	if !reload {
		return
	}
	eventually(g.t, func() bool { return countedAt(g.addr).Load() == 1 }, "the end of the old config's server")
	if g.admin != "off" {
		eventually(g.t, func() bool {
			return len(g.logged("admin endpoint started", g.admin)) == len(g.logged("stopped previous server", g.admin))+1
		}, "the end of the old config's admin API")
	}
	g.client.CloseIdleConnections()
}

// countedListeners counts the listeners of a gateway that are open.
type countedListeners struct{}

func init() { caddy.RegisterModule(countedListeners{}) }

func (countedListeners) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.listeners.counted", New: func() caddy.Module { return countedListeners{} }}
}

func (countedListeners) WrapListener(l net.Listener) net.Listener {
	countedAt(l.Addr().String()).Add(1)
	return &countedListener{Listener: l}
}

type countedListener struct {
	net.Listener
	once sync.Once
}

func (l *countedListener) Close() error {
	err := l.Listener.Close()
	l.once.Do(func() { countedAt(l.Addr().String()).Add(-1) })
	return err
}

var counted sync.Map // address → *atomic.Int32

func countedAt(addr string) *atomic.Int32 {
	n, _ := counted.LoadOrStore(addr, new(atomic.Int32))
	return n.(*atomic.Int32)
}

func (g *gateway) tryLoad(site string) error {
	g.t.Helper()
	return caddy.Load(g.config(site), false)
}

func (g *gateway) stop() {
	if err := caddy.Stop(); err != nil {
		g.t.Errorf("stopping: got %v, want no error", err)
	}
}

// logs is all that was logged so far.
func (g *gateway) logs() string {
	g.t.Helper()
	content, err := os.ReadFile(filepath.Join(g.dir, "log"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		g.t.Fatal(err)
	}
	return string(content)
}

// logged returns the lines of the log that contain all parts.
func (g *gateway) logged(parts ...string) []string {
	g.t.Helper()
	var lines []string
	for line := range strings.Lines(g.logs()) {
		if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
			lines = append(lines, line)
		}
	}
	return lines
}

// upgrade returns a connection that is upgraded to echo, and what reads from it.
func (g *gateway) upgrade() (conn net.Conn, r *bufio.Reader) {
	g.t.Helper()
	conn = g.raw()
	fmt.Fprint(conn, "GET /socket HTTP/1.1\r\nHost: gateway.test\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	r = bufio.NewReader(conn)
	res, err := http.ReadResponse(r, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		g.t.Fatalf("got %v, err %v, want 101", res, err)
	}
	return conn, r
}

// An answer of the gateway that has been read.
type reply struct {
	status int
	header http.Header
	body   string
	err    error
}

// send sends a request; pairs are header fields and values.
func (g *gateway) send(method, path string, body io.Reader, pairs ...string) reply {
	return g.sendCtx(context.Background(), method, path, body, pairs...)
}

func (g *gateway) sendCtx(ctx context.Context, method, path string, body io.Reader, pairs ...string) reply {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+g.addr+path, body)
	if err != nil {
		return reply{err: err}
	}
	for i := 0; i < len(pairs); i += 2 {
		req.Header[pairs[i]] = append(req.Header[pairs[i]], pairs[i+1]) // in any case
		if pairs[i] == "Host" {
			req.Host = pairs[i+1]
		}
	}
	res, err := g.client.Do(req)
	if err != nil {
		return reply{err: err}
	}
	defer res.Body.Close()
	content, err := io.ReadAll(res.Body)
	return reply{res.StatusCode, res.Header, string(content), err}
}

func (g *gateway) get(pairs ...string) reply { return g.send(http.MethodGet, "/", nil, pairs...) }

// want fails the test unless the request has this answer.
func (r reply) want(t *testing.T, status int) reply {
	t.Helper()
	if r.err != nil || r.status != status {
		t.Fatalf("got %d %q, err %v, want %d", r.status, r.body, r.err, status)
	}
	return r
}

// burst sends n GET requests at once, and returns the answers.
func (g *gateway) burst(n int) []reply {
	replies := make([]reply, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { replies[i] = g.get() })
	}
	wg.Wait()
	return replies
}

// wantAll fails the test unless all have this status.
func wantAll(t *testing.T, replies []reply, status int) {
	t.Helper()
	for i, r := range replies {
		if r.err != nil || r.status != status {
			t.Fatalf("request %d of %d: got %d %q, err %v, want %d", i, len(replies), r.status, r.body, r.err, status)
		}
	}
}

// newTransport makes a transport of Caddyfile settings, as Caddy does.
func newTransport(t *testing.T, settings string) *Transport {
	t.Helper()
	transport := new(Transport).CaddyModule().New().(*Transport)
	if err := transport.UnmarshalCaddyfile(caddyfile.NewTestDispenser("oauth2 {\n" + settings + "\n}")); err != nil {
		t.Fatal(err)
	}
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = transport.Cleanup(); endAfterlives() })
	if err := transport.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	return transport
}

// roundTripFunc implements http.RoundTripper.
type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// proxyThrough sends a request to an upstream as reverse_proxy does, but past
// Caddy's server, which has views of its own on headers.
func proxyThrough(t *testing.T, rt http.RoundTripper, dial string, req *http.Request) (*httptest.ResponseRecorder, error) {
	t.Helper()
	return proxyWith(t, &reverseproxy.Handler{Transport: rt, Upstreams: reverseproxy.UpstreamPool{{Dial: dial}}}, req)
}

// proxyWith is proxyThrough with a handler that is set up further.
func proxyWith(t *testing.T, handler *reverseproxy.Handler, req *http.Request) (*httptest.ResponseRecorder, error) {
	t.Helper()
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
	if err != nil {
		t.Fatal(err)
	}
	if err := handler.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = handler.Cleanup() }()
	rec := httptest.NewRecorder()
	repl := caddy.NewReplacer()
	req = caddyhttp.PrepareRequest(req, repl, rec, &caddyhttp.Server{})
	return rec, handler.ServeHTTP(rec, req, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil }))
}

var ours = regexp.MustCompile(`caddy-outbound-auth(/internal/\w+)?\.\(\*(Transport|Credentials|block|client|discovery|issuerMetadata|tokenSource|endpoint|Body|attemptBody)\)`)

// goroutines returns the stacks in which a function of the product runs.
func goroutines() []string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	var found []string
	for stack := range bytes.SplitSeq(buf, []byte("\n\n")) {
		if ours.Match(stack) {
			found = append(found, string(stack))
		}
	}
	return found
}

// endAfterlives ends the sources that nobody uses, as if their time had come.
func endAfterlives() {
	var all []*tokenSource
	sources.Range(func(_, value any) bool { all = append(all, value.(*tokenSource)); return true })
	for _, s := range all {
		s.endNow()
	}
}

// endNow ends a source that nobody uses.
func (s *tokenSource) endNow() {
	s.mu.Lock()
	end := s.endOfAfterlife()
	s.mu.Unlock()
	end()
}

// wantNothingLeft waits until the product holds no source that is in use, and no
// goroutine.
func wantNothingLeft(t *testing.T) {
	t.Helper()
	eventually(t, func() bool {
		endAfterlives()
		left := len(goroutines())
		sources.Range(func(any, any) bool { left++; return true })
		return left == 0
	}, "no token source and no goroutine left")
}

// wantError compares err with a part of its text; "" wants none.
func wantError(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("got error %q, want none", err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("got error %v, want one that contains %q", err, want)
	}
}

// writeFile writes a file, and returns its name.
func writeFile(tb testing.TB, name string, content []byte) string {
	tb.Helper()
	if err := os.WriteFile(name, content, 0o600); err != nil {
		tb.Fatal(err)
	}
	return name
}

// gateAndFakes starts an authorization server, an upstream, and a gateway
// between them with these settings of the transport.
func gateAndFakes(t *testing.T, settings string) (*gateway, *authServer, *upstream) {
	t.Helper()
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	return startGateway(t, proxySite(up, auth, settings)), auth, up
}

// proxySite is a site that proxies to up, with these settings of the transport. A
// busy upstream accepts connections later than Caddy waits by default.
func proxySite(up *upstream, auth *authServer, settings string) string {
	return expand(`reverse_proxy $UP {
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret canary-secret
			dial_timeout 1m
			$SETTINGS
		}
	}`, "$UP", up.addr, "$SETTINGS", settings, "$AUTH", auth.URL)
}

var dialInfoKey = caddy.CtxKey("reverse_proxy.dial_info") // of package reverseproxy

// allocations returns how many allocations f makes. It takes the least of some tries:
// what goroutines of other tests allocate meanwhile is counted, too.
func allocations(f func()) float64 {
	least := testing.AllocsPerRun(100, f)
	for range 4 {
		least = min(least, testing.AllocsPerRun(100, f))
	}
	return least
}
