package outboundauth

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// newSocketUpstream listens on a Unix socket: its addr is one that reverse_proxy takes.
func newSocketUpstream(t *testing.T, auth *authServer, start func(*httptest.Server)) *upstream {
	t.Helper()
	dir, err := os.MkdirTemp("", "up") // t.TempDir can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	up := newUnstartedUpstream(t, auth)
	up.Listener.Close()
	socket := filepath.Join(dir, "s")
	if up.Listener, err = net.Listen("unix", socket); err != nil {
		t.Fatal(err)
	}
	up.Config.ErrorLog = discardLog
	start(up.Server)
	up.addr = "unix/" + socket
	return up
}

// wantTokensOf fails the test unless all tokens that the upstream got are the client's;
// "": unless it got none.
func (u *upstream) wantTokensOf(t *testing.T, auth *authServer, client string) {
	t.Helper()
	all := u.got()
	wrong := slices.DeleteFunc(slices.Clone(all), func(r received) bool {
		return r.header.Get("Authorization") == "" || r.bearerOf(auth) == client
	})
	if len(wrong) > 0 {
		t.Errorf("got %d of %d requests with the token of another, such as %q, want those of %q only",
			len(wrong), len(all), wrong[0].bearerOf(auth), client)
	}
}

// net/http keeps connections by the URL of a request, and Caddy's checks of all
// sockets have one URL.
func TestHealthChecksOfSocketsStayApart(t *testing.T) {
	for _, test := range []struct {
		name, of, settings string
		start              func(*httptest.Server)
	}{
		{"http", "{\nclient_id b\ntenant b\n}", "", (*httptest.Server).Start},
		{"http, one of them off", "off", "", (*httptest.Server).Start},
		{"https", "{\nclient_id b\ntenant b\n}", "tls_insecure_skip_verify", (*httptest.Server).StartTLS},
		{"HTTP/2", "{\nclient_id b\ntenant b\n}", "tls_insecure_skip_verify", func(s *httptest.Server) { s.EnableHTTP2 = true; s.StartTLS() }},
	} {
		t.Run(test.name, func(t *testing.T) {
			auth := newAuthServer(t)
			a, b := newSocketUpstream(t, nil, test.start), newSocketUpstream(t, nil, test.start)
			var names sync.Map
			for _, up := range []*upstream{a, b} {
				up.script(func(w http.ResponseWriter, r *http.Request) bool {
					up.record(r)
					if r.TLS != nil {
						names.Store(r.TLS.ServerName, true)
					}
					return true
				})
			}
			g := startGateway(t, expand(`reverse_proxy $A $B {
				health_uri /health
				health_interval 20ms
				health_headers {
					X-Checked {http.reverse_proxy.active.target_upstream}
				}
				transport oauth2 {
					token_url $AUTH/token
					client_id a
					client_secret s
					tenant a
					$TLS
					upstream $A {
						client_id a
					}
					upstream $B $OF
				}
			}`, "$A", a.addr, "$B", b.addr, "$AUTH", auth.URL, "$OF", test.of, "$TLS", test.settings))
			eventually(t, func() bool { return len(a.checks()) > 15 && len(b.checks()) > 15 }, "health checks")
			g.stop()
			tenant := map[bool]string{true: "", false: "b"}[test.of == "off"]
			for up, want := range map[*upstream]string{a: "a", b: tenant} {
				up.wantTokensOf(t, auth, want)
				up.wantOwnChecks(t)
				for _, check := range up.checks() {
					if check.header.Get("X-Tenant-Id") != want || check.host != "localhost" {
						t.Fatalf("got the tenant %q and the host %q, want %q and localhost", check.header.Get("X-Tenant-Id"), check.host, want)
					}
				}
			}
			if test.settings != "" {
				names.Range(func(name, _ any) bool {
					if name != "localhost" {
						t.Errorf("got the server name %q, want localhost", name)
					}
					return true
				})
			}
		})
	}
}

// wantOwnChecks fails the test if the upstream got a check of another.
func (u *upstream) wantOwnChecks(t *testing.T) {
	t.Helper()
	for _, check := range u.checks() {
		if got := check.header.Get("X-Checked"); got != u.addr {
			t.Fatalf("got a check of %s at %s", got, u.addr)
		}
	}
}

func TestHealthChecksOfSocketsStayApartWithACertificate(t *testing.T) {
	m := newMutual(t, false)
	m.ca.issue(t, "gateway").write(t, m.dir)
	guarded := func(s *httptest.Server) { new(doorman).guard(s, false, tls.RequireAnyClientCert) }
	a, b := newSocketUpstream(t, nil, guarded), newSocketUpstream(t, nil, guarded)
	a.checked(http.StatusOK)
	b.checked(http.StatusOK)
	site := strings.NewReplacer("https://"+m.up.addr, a.addr+" "+b.addr, "transport oauth2 {", `health_uri /health
		health_interval 20ms
		health_headers {
			X-Checked {http.reverse_proxy.active.target_upstream}
		}
		transport oauth2 {`).Replace(m.site("bind_certificate"))
	startGateway(t, site)
	eventually(t, func() bool { return len(a.checks()) > 15 && len(b.checks()) > 15 }, "health checks")
	a.wantOwnChecks(t)
	b.wantOwnChecks(t)
}

// Caddy dials the upstream of the check again when the check is redirected, and
// net/http keeps the connection as one to where the redirect leads.
func TestRedirectedHealthCheckEnds(t *testing.T) {
	for _, scheme := range []string{"http", "https"} {
		t.Run(scheme, func(t *testing.T) {
			auth := newAuthServer(t)
			a, b := newUnstartedUpstream(t, nil), newUnstartedUpstream(t, auth)
			for _, up := range []*upstream{a, b} {
				up.Config.ErrorLog = discardLog
				if scheme == "https" {
					up.StartTLS()
				} else {
					up.Start()
				}
				up.addr = up.Listener.Addr().String()
			}
			a.script(func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == "/health" {
					http.Redirect(w, r, scheme+"://"+b.addr+"/elsewhere", http.StatusFound)
				}
				return r.URL.Path == "/health"
			})
			b.checked(http.StatusOK)
			g := startGateway(t, expand(`reverse_proxy $SCHEME://$A $SCHEME://$B {
				health_uri /health
				health_interval 20ms
				health_follow_redirects
				`+twoClients+`
			}`, "$A", a.addr, "$B", b.addr, "$SCHEME", scheme, "$AUTH", auth.URL, "$MORE", map[string]string{"https": "tls_insecure_skip_verify"}[scheme]))
			eventually(t, func() bool {
				return len(g.logged("a health check that the upstream has redirected failed", "health_follow_redirects: ")) > 3
			}, "checks that fail")
			for range 20 {
				g.get().want(t, http.StatusOK) // only b is healthy
			}
			a.wantTokensOf(t, auth, "a")
			b.wantTokensOf(t, auth, "gateway")
			for _, up := range []*upstream{a, b} {
				if slices.ContainsFunc(up.got(), func(r received) bool { return r.path == "/elsewhere" || up == a }) {
					t.Errorf("got %v, want nothing but what was sent to this upstream", up.got())
				}
			}
		})
	}
}

// An upstream knows itself by the name in Host, or knows no name.
func TestHealthCheckFollowsRedirectsOnItsHost(t *testing.T) {
	for _, test := range []struct{ name, headers, location string }{
		{"path", "", "/fine"},
		{"address", "", "http://$UP/fine"},
		{"name in Host", "health_headers {\nHost api.example\n}", "http://api.example/fine"},
		{"name in Host with the port", "health_headers {\nHost api.example\n}", "http://api.example:80/fine"},
		{"path beside a name", "health_headers {\nHost api.example\n}", "/fine"},
	} {
		t.Run(test.name, func(t *testing.T) {
			auth := newAuthServer(t)
			up := newUpstream(t, auth)
			up.script(func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == "/health" {
					w.Header().Set("Location", expand(test.location, "$UP", up.addr))
					w.WriteHeader(http.StatusFound)
				}
				return r.URL.Path == "/health"
			})
			g := startGateway(t, expand(checkedSite, "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", "health_follow_redirects\n"+test.headers))
			g.get()
			eventually(t, func() bool {
				return slices.ContainsFunc(up.got(), func(r received) bool { return r.path == "/fine" && r.bearerOf(auth) == "gateway" })
			}, "a check that was redirected, with the token")
		})
	}
}

// health_upstream may be anything: the operator has given it no credentials.
func TestHealthUpstreamThatIsNoUpstream(t *testing.T) {
	for _, block := range []string{"", "upstream $UP {\nclient_id gateway\n}"} {
		auth := newAuthServer(t)
		up, checker := newUpstream(t, auth), newUpstream(t, nil)
		n := checker.checked(http.StatusOK)
		site := strings.Replace(checkedSite, "header X-Static always", "header X-Static always\n"+block, 1)
		g := startGateway(t, expand(site, "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", "health_upstream "+checker.addr))
		g.get().want(t, http.StatusOK)
		seen := n.Load()
		eventually(t, func() bool { return n.Load() >= seen+3 }, "health checks")
		for _, check := range checker.checks() {
			check.wantHeader(t, "Authorization", "")
			check.wantHeader(t, "X-Static", "")
		}
		g.stop()
	}
}

func TestHealthUpstreamThatIsAnUpstream(t *testing.T) {
	auth := newAuthServer(t)
	up, other := newUpstream(t, auth), newUpstream(t, auth)
	other.checked(http.StatusOK)
	startGateway(t, expand(`reverse_proxy $A $B {
		health_uri /health
		health_upstream $B
		health_interval 20ms
		`+twoClients+`
	}`, "$A", up.addr, "$B", other.addr, "$AUTH", auth.URL, "$MORE", ""))
	eventually(t, func() bool { return len(other.checks()) > 0 && other.last(t).bearerOf(auth) == "gateway" }, "checks with the token of the address")
	if got := up.got(); len(got) != 0 {
		t.Errorf("got %v, want no check", got)
	}
}

// Outside of reverse_proxy, nothing says which upstream a URL belongs to.
func TestRequestOfNobodyGetsNoToken(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	transport := newTransport(t, "token_url "+auth.URL+"/token\nclient_id gateway\nclient_secret s")
	req := httptest.NewRequest(http.MethodGet, up.URL, nil)
	res, err := transport.RoundTrip(req)
	if err == nil {
		res.Body.Close()
	}
	wantError(t, err, "serves requests of reverse_proxy only")
	if got := up.got(); len(got) != 0 {
		t.Errorf("got %v, want nothing", got)
	}
}

// seeing keeps the hosts of the URLs with which requests reach the transport.
type seeing struct {
	*Transport
	hosts []string
}

func (s *seeing) RoundTrip(req *http.Request) (*http.Response, error) {
	s.hosts = append(s.hosts, req.URL.Host)
	s.SetScheme(req)
	return nil, reverseproxy.NewDialError(errors.New("nobody listens"))
}

// The URL of a proxied request is that of the upstream, and with the PROXY protocol
// it is the client's too: net/http keeps connections by it.
func TestURLOfProxiedRequests(t *testing.T) {
	for _, test := range []struct{ name, dial, settings, first, second string }{
		{"address", "192.0.2.1:8080", "", "192.0.2.1:8080", "192.0.2.1:8080"},
		{"name with the default port", "api.example:443", "tls", "api.example:443", "api.example"},
		{"name with another port", "api.example:80", "tls", "api.example:80", "api.example:80"},
		{"name without TLS", "api.example:80", "", "api.example:80", "api.example"},
		{"socket", "unix//run/up.sock", "", "/run/up.sock", "/run/up.sock"},
		{"PROXY protocol", "192.0.2.1:8080", "proxy_protocol v2", "198.51.100.7:0->192.0.2.1:8080", "198.51.100.7:0->192.0.2.1:8080"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := &seeing{Transport: newTransport(t, clientSettings+test.settings)}
			req := httptest.NewRequest(http.MethodGet, "http://evil.example/", nil)
			req.RemoteAddr = "198.51.100.7:1234"
			_, err := proxyWith(t, &reverseproxy.Handler{
				Transport:     s,
				Upstreams:     reverseproxy.UpstreamPool{{Dial: test.dial}},
				LoadBalancing: &reverseproxy.LoadBalancing{Retries: 1},
			}, req)
			wantError(t, err, "nobody listens")
			want := []string{test.first, test.second}
			if strings.Contains(test.first, "->") {
				want = []string{url.QueryEscape(test.first), url.QueryEscape(test.second)}
			}
			if !slices.Equal(s.hosts, want) {
				t.Errorf("got the hosts %q, want %q", s.hosts, want)
			}
		})
	}
}

// `GET http:http://evil.example/` is valid to Go's server, and goes on as it is: a server
// that takes it believes the URL, not Host, which Caddy sets to the upstream over TLS.
// Caddy's rewrites may leave a target that is no path. To a proxy, net/http writes it
// right behind the host.
func TestRewriteNamesNoOtherHost(t *testing.T) {
	g, auth, up := gateAndFakes(t, "")
	g.load(`uri path_regexp ^/re ""
	rewrite /query {query.u}
	` + proxySite(up, auth, "") + handleErrors)
	for _, target := range []string{"/re@evil.example/x", "/re.evil.example/x", "/re:80/x", "/query?u=@evil.example/", "/query?u=http://evil.example/", "/re%2Fx", "/re*"} {
		if got := g.send(http.MethodGet, target, nil); got.status == http.StatusOK && len(up.got()) > 0 && !strings.HasPrefix(up.last(t).path, "/") {
			t.Errorf("%s: got %d, and %q at the upstream, want 400", target, got.status, up.last(t).path)
		}
	}
	for _, target := range []string{"/re@evil.example/x", "/re.evil.example/x"} {
		g.send(http.MethodGet, target, nil).want(t, http.StatusBadRequest)
	}
	before := len(up.got())
	g.send(http.MethodGet, "/re/x", nil).want(t, http.StatusOK)
	g.send(http.MethodOptions, "/", nil).want(t, http.StatusOK)
	if got := len(up.got()); got != before+2 {
		t.Errorf("got %d requests more, want those that name a path", got-before)
	}
}

func TestRequestNamesNoOtherHost(t *testing.T) {
	for _, block := range []string{"", "upstream $UP off"} {
		auth := newAuthServer(t)
		up := newUnstartedUpstream(t, nil)
		up.Config.ErrorLog = discardLog
		up.StartTLS()
		up.addr = up.Listener.Addr().String()
		site := expand(`reverse_proxy https://$UP {
			transport oauth2 {
				token_url $AUTH/token
				client_id gateway
				client_secret s
				versions 1.1
				tls_insecure_skip_verify
				`+block+`
			}
		}`+handleErrors, "$UP", up.addr, "$AUTH", auth.URL)
		g := startGateway(t, strings.ReplaceAll(site, "upstream "+up.addr, "upstream https://"+up.addr))
		for _, target := range []string{"http:http://evil.example/", "http:evil.example/x", "x:y"} {
			conn, err := net.Dial("tcp", g.addr)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: gateway.test\r\nConnection: close\r\n\r\n", target)
			answer, _ := io.ReadAll(conn)
			conn.Close()
			if block == "" && !strings.HasPrefix(string(answer), "HTTP/1.1 400 ") {
				t.Errorf("%s: got %q, want 400", target, answer)
			}
		}
		g.get().want(t, http.StatusOK)
		up.wantTokensOf(t, auth, map[string]string{"": "gateway"}[block])
		if got := up.got(); block == "" && len(got) != 1 {
			t.Errorf("got %v, want the last request only", got)
		}
		g.stop()
	}
}
