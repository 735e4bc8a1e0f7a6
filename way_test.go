package outboundauth

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
)

// A forwardProxy takes requests and tunnels to where it is told.
type forwardProxy struct {
	*httptest.Server

	mu   sync.Mutex
	told []toldProxy
}

type toldProxy struct{ method, target, host, authorization string }

func newForwardProxy(t *testing.T) *forwardProxy {
	t.Helper()
	p := new(forwardProxy)
	p.Server = httptest.NewServer(p)
	t.Cleanup(func() { p.CloseClientConnections(); p.Close() })
	return p
}

func (p *forwardProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.told = append(p.told, toldProxy{r.Method, r.RequestURI, r.Host, r.Header.Get("Authorization")})
	p.mu.Unlock()
	if r.Method == http.MethodConnect {
		p.tunnel(w, r)
		return
	}
	out := r.Clone(r.Context())
	out.RequestURI = ""
	out.Header.Set("Via", "1.1 proxy")
	res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(out)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer res.Body.Close()
	w.WriteHeader(res.StatusCode)
	_, _ = io.Copy(w, res.Body)
}

func (p *forwardProxy) tunnel(w http.ResponseWriter, r *http.Request) {
	to, err := net.Dial("tcp", r.Host)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer to.Close()
	w.WriteHeader(http.StatusOK)
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	go func() { _, _ = io.Copy(to, conn) }()
	_, _ = io.Copy(conn, to)
}

// got returns what the proxy was told so far.
func (p *forwardProxy) got() []toldProxy {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.told)
}

const proxiedSite = `reverse_proxy $UP {
	$PROXY
	transport oauth2 {
		token_url $AUTH/token
		client_id gateway
		client_secret s
		network_proxy url $FORWARD
		insecure_plaintext upstream
		$MORE
	}
}` + handleErrors

// A proxy takes an unencrypted request to the host in its first line, which net/http
// takes from Host.
func TestProxyIsNotToldTheHostOfTheClient(t *testing.T) {
	auth, forward := newAuthServer(t), newForwardProxy(t)
	up, evil := newUpstream(t, auth), newUpstream(t, nil)
	g := startGateway(t, expand(proxiedSite, "$UP", up.addr, "$AUTH", auth.URL, "$FORWARD", forward.URL, "$PROXY", "", "$MORE", ""))
	for _, host := range []string{evil.addr, "", up.addr + "0", "x." + up.addr, "evil.example", up.addr + "@" + evil.addr} {
		conn, err := net.Dial("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", host)
		answer, _ := io.ReadAll(conn)
		conn.Close()
		if host != "" && !strings.HasPrefix(string(answer), "HTTP/1.1 400 ") &&
			(!strings.HasPrefix(string(answer), "HTTP/1.1 502 ") || !strings.Contains(string(answer), "header_up Host {upstream_hostport}")) {
			t.Errorf("%s: got %q, want 502 and what to write", host, answer)
		}
	}
	for _, target := range []string{"http:http://" + evil.addr + "/", "http:" + evil.addr + "/", "http://" + evil.addr + "/"} {
		conn, err := net.Dial("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", target, up.addr)
		if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || res.StatusCode < 400 {
			t.Errorf("%s: got %v, %v, want an error", target, res, err)
		}
		conn.Close()
	}
	for _, told := range forward.got() {
		if !strings.HasPrefix(told.target, "http://"+up.addr+"/") || told.host != up.addr {
			t.Errorf("got %q for %q with %q at the proxy, want the upstream %s", told.target, told.host, told.authorization, up.addr)
		}
	}
	if got := evil.got(); len(got) != 0 {
		t.Errorf("got %v where the client wants the token, want nothing", got)
	}
	g.get("Host", up.addr).want(t, http.StatusOK) // which is what header_up would set
}

func TestProxyIsToldTheUpstream(t *testing.T) {
	for _, setting := range []string{"network_proxy url", "forward_proxy_url"} {
		auth, forward := newAuthServer(t), newForwardProxy(t)
		up := newUpstream(t, auth)
		g := startGateway(t, strings.ReplaceAll(expand(proxiedSite, "$UP", up.addr, "$AUTH", auth.URL, "$FORWARD", forward.URL,
			"$PROXY", "header_up Host {upstream_hostport}", "$MORE", ""), "network_proxy url", setting))
		g.get("Host", "evil.example").want(t, http.StatusOK)
		if got := forward.got(); len(got) != 1 || got[0].target != "http://"+up.addr+"/" || got[0].authorization == "" {
			t.Errorf("got %q at the proxy, want the upstream", got)
		}
		up.wantTokensOf(t, auth, "gateway")
		g.stop()
	}
}

// What is encrypted goes through a tunnel, to the address that would be dialed.
func TestTunnelLeadsToTheUpstream(t *testing.T) {
	auth, forward := newAuthServer(t), newForwardProxy(t)
	up := newUnstartedUpstream(t, auth)
	up.Config.ErrorLog = discardLog
	up.StartTLS()
	up.addr = up.Listener.Addr().String()
	g := startGateway(t, expand(proxiedSite, "$UP", "https://"+up.addr, "$AUTH", auth.URL, "$FORWARD", forward.URL,
		"$PROXY", "header_up Host {http.request.host}\nhealth_uri /health\nhealth_interval 20ms", "$MORE", "tls_insecure_skip_verify"))
	eventually(t, func() bool { return g.get("Host", "evil.example").status == http.StatusOK }, "an upstream that is up")
	eventually(t, func() bool { return len(up.checks()) > 2 }, "health checks through the tunnel")
	for _, told := range forward.got() {
		if told.method != http.MethodConnect || told.target != up.addr || told.host != up.addr || told.authorization != "" {
			t.Errorf("got %q at the proxy, want a tunnel to %s", told, up.addr)
		}
	}
	up.wantTokensOf(t, auth, "gateway")
}

// Caddy dials the upstream for a check, although net/http speaks to a proxy, and keeps
// the connection as one to the proxy: for all upstreams.
func TestHealthChecksGoThroughTheProxy(t *testing.T) {
	auth, forward := newAuthServer(t), newForwardProxy(t)
	a, b := newUpstream(t, auth), newUpstream(t, auth)
	g := startGateway(t, expand(`reverse_proxy $A $B {
		header_up Host {upstream_hostport}
		health_uri /health
		health_interval 20ms
		`+twoClients+`
	}`, "$A", a.addr, "$B", b.addr, "$AUTH", auth.URL, "$MORE", "network_proxy url "+forward.URL+"\ninsecure_plaintext upstream"))
	eventually(t, func() bool {
		g.get()
		return len(a.checks()) > 15 && len(b.checks()) > 15
	}, "health checks")
	wantAll(t, g.burst(20), http.StatusOK)
	a.wantTokensOf(t, auth, "a")
	b.wantTokensOf(t, auth, "gateway")
	for _, up := range []*upstream{a, b} {
		for _, r := range up.got() {
			if via := r.header.Get("Via"); via != "1.1 proxy" || r.host != up.addr {
				t.Fatalf("got a request for %s at %s that came by %q, want its own by the proxy", r.host, up.addr, via)
			}
		}
	}
}

// A proxy can't reach Unix sockets. Caddy dials the socket, but net/http keeps the
// connection as one to the proxy: for all sockets.
func TestSocketsStayApartBesideAProxy(t *testing.T) {
	auth, forward := newAuthServer(t), newForwardProxy(t)
	a, b := newSocketUpstream(t, auth, (*httptest.Server).Start), newSocketUpstream(t, auth, (*httptest.Server).Start)
	g := startGateway(t, expand(`reverse_proxy $A $B {
		lb_policy round_robin
		health_uri /health
		health_interval 20ms
		`+twoClients+`
	}`, "$A", a.addr, "$B", b.addr, "$AUTH", auth.URL, "$MORE", "network_proxy url "+forward.URL))
	eventually(t, func() bool { return len(a.checks()) > 10 && len(b.checks()) > 10 }, "health checks")
	for range 5 {
		wantAll(t, g.burst(8), http.StatusOK)
	}
	a.wantTokensOf(t, auth, "a")
	b.wantTokensOf(t, auth, "gateway")
	if got := forward.got(); len(got) != 0 {
		t.Errorf("got %q at the proxy, want nothing", got)
	}
}

func TestNoProxyIsNone(t *testing.T) {
	wantError(t, validateCaddyfile(t, proxyConfig("127.0.0.1:9000", clientSettings+"network_proxy none")), "")
	wantError(t, validateCaddyfile(t, proxyConfig("127.0.0.1:9000", clientSettings+"network_proxy url http://192.0.2.1:3128")), "unencrypted")
}

// The proxies of the environment are read once in a process, so the test has one of
// its own. They are not asked for localhost and 127.0.0.1, but for other names of the
// same machine.
func TestProxyOfTheEnvironment(t *testing.T) {
	const inChild = "OUTBOUNDAUTH_TEST_PROXY"
	if os.Getenv(inChild) == "" {
		forward := newForwardProxy(t)
		child := exec.Command(os.Args[0], "-test.run=^TestProxyOfTheEnvironment$", "-test.v")
		child.Env = append(os.Environ(), inChild+"=1", "HTTP_PROXY="+strings.Replace(forward.URL, "//", "//user:"+canarySecret+"@", 1), "NO_PROXY=", "no_proxy=")
		if output, err := child.CombinedOutput(); err != nil || !strings.Contains(string(output), "--- PASS") {
			t.Errorf("got %v and\n%s", err, output)
		}
		for _, told := range forward.got() {
			if told.authorization != "" && told.target != "http://upstream.invalid/" {
				t.Errorf("got %q at the proxy, want the upstream", told)
			}
		}
		if got := forward.got(); len(got) != 1 {
			t.Errorf("got %q at the proxy, want one request", got)
		}
		return
	}
	auth := newAuthServer(t)
	_, port, _ := strings.Cut(newUpstream(t, auth).addr, ":")
	site := expand(`reverse_proxy $UP {
		$PROXY
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret s
			$MORE
		}
	}`+handleErrors, "$AUTH", auth.URL)
	for _, dial := range []string{":" + port, "LocalHost:" + port} {
		g := newGateway(t)
		wantError(t, g.tryLoad(expand(site, "$UP", dial, "$PROXY", "", "$MORE", "")), "unencrypted")
		g = startGateway(t, expand(site, "$UP", "{header.X-Up}", "$PROXY", "", "$MORE", "upstream "+dial+" {\ntenant a\n}"))
		if r := g.get("X-Up", dial).want(t, http.StatusBadGateway); !strings.Contains(r.body, "unencrypted") {
			t.Errorf("%s: got %q, want that it is unencrypted", dial, r.body)
		}
		g.stop()
	}
	wantError(t, checkPlaintext(&url.URL{Scheme: "http", Host: "LocalHost:" + port}, false), "unencrypted")
	wantError(t, checkPlaintext(&url.URL{Scheme: "http", Host: "localhost:" + port}, false), "")
	g := startGateway(t, expand(site, "$UP", "localhost:"+port, "$PROXY", "", "$MORE", ""))
	g.get().want(t, http.StatusOK)
	g.stop()
	g = startGateway(t, expand(site, "$UP", "upstream.invalid:80", "$PROXY", "", "$MORE", "insecure_plaintext upstream"))
	if r := g.get("Host", "evil.example").want(t, http.StatusBadGateway); !strings.Contains(r.body, "header_up Host") {
		t.Errorf("got %q, want what to write", r.body)
	}
	g.get("Host", "upstream.invalid") // the proxy does not know it
	wantNoCanaryIn(t, g.logs())       // not even at debug level
}

// Who chooses the way chooses the destination.
func TestRequestChoosesNoWay(t *testing.T) {
	t.Setenv("TEST_NAME", "api.example.com")
	t.Setenv("TEST_PROXY", "http://proxy.example.com:3128")
	for _, test := range []struct{ upstream, settings, want string }{
		{"https://10.0.0.1", "tls_server_name {http.request.host}", "tls_server_name: a request can choose"},
		{"https://10.0.0.1", "tls_server_name {vars.name}.example.com", "tls_server_name: a request can choose"},
		{"https://10.0.0.1", "tls_server_name {env.TEST_NAME}", ""},
		{"https://10.0.0.1", "tls_server_name {http.reverse_proxy.upstream.host}", ""},
		{"https://10.0.0.1", "tls_server_name {rp.upstream.host}", ""},
		{"https://10.0.0.1", "tls_server_name api.example.com", ""},
		{"10.0.0.1:80", "insecure_plaintext upstream\nnetwork_proxy url {header.X-Proxy}", "network_proxy: a request can choose"},
		{"10.0.0.1:80", "insecure_plaintext upstream\nforward_proxy_url {header.X-Proxy}", "network_proxy: a request can choose"},
		{"https://10.0.0.1", "tls_insecure_skip_verify\nnetwork_proxy url {header.X-Proxy}", "network_proxy: a request can choose"},
		{"https://10.0.0.1", "tls_except_ports 8000\nnetwork_proxy url {header.X-Proxy}", "network_proxy: a request can choose"},
		{"https://10.0.0.1", "network_proxy url {header.X-Proxy}", ""}, // the upstream proves who it is
		{"10.0.0.1:80", "insecure_plaintext upstream\nnetwork_proxy url {env.TEST_PROXY}", ""},
	} {
		wantError(t, validateCaddyfile(t, proxyConfig(test.upstream, clientSettings+test.settings)), test.want)
	}
}
