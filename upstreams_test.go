package outboundauth

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// yielding is a source of dynamic upstreams, of a kind that we know nothing of.
type yielding struct {
	Dials []string `json:"dials,omitempty"`
}

func init() { caddy.RegisterModule(yielding{}) }

func (yielding) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.reverse_proxy.upstreams.yielding", New: func() caddy.Module { return new(yielding) }}
}

func (y yielding) GetUpstreams(r *http.Request) ([]*reverseproxy.Upstream, error) {
	repl, _ := replacerOf(r.Context())
	var upstreams []*reverseproxy.Upstream
	for _, dial := range y.Dials {
		upstreams = append(upstreams, &reverseproxy.Upstream{Dial: repl.ReplaceAll(dial, "")})
	}
	return upstreams, nil
}

// withSource is the JSON of a proxy with dynamic upstreams.
func withSource(t *testing.T, source, upstreams, settings string) []byte {
	t.Helper()
	adapted := encode(t, adaptCaddyfile(t, proxyConfig(upstreams, settings)))
	proxy := findModules(t, adapted, "handler", "reverse_proxy")[0]
	delete(proxy, "handler")
	if source != "" {
		proxy["dynamic_upstreams"] = rawJSON(source)
	}
	return encode(t, proxy)
}

type rawJSON string

func (r rawJSON) MarshalJSON() ([]byte, error) { return []byte(r), nil }

// Sources of dynamic upstreams.
const (
	sourceA       = `{"source":"a","name":"api.example.com","port":"443"}`
	sourceA2      = `{"source":"a","name":"api2.example.com"}`
	sourceSRV     = `{"source":"srv","service":"https","proto":"tcp","name":"example.com"}`
	sourceSRVName = `{"source":"srv","name":"_https._tcp.example.com"}`
	sourceOther   = `{"source":"yielding","dials":["10.0.0.1:443"]}`
	sourceHost    = `{"source":"a","name":"{http.request.header.X-Host}","port":"443"}`
)

func sourcesOf(members ...string) string {
	return `{"source":"multi","sources":[` + strings.Join(members, ",") + `]}`
}

// routeName tells where a route leads: the client, off, or "" if nowhere.
func routeName(r route) string {
	switch {
	case r.off:
		return "off"
	case r.block != nil:
		return r.endpoint.credentials.ClientID
	}
	return ""
}

func TestRoutes(t *testing.T) {
	t.Setenv("TEST_HOST", "api.example.com")
	t.Setenv("TEST_PORT", "443")
	const (
		ofA    = "upstream api.example.com:443 {\nclient_id a\n}\n"
		ofA2   = "upstream api2.example.com:80 {\nclient_id a2\n}\n"
		ofBoth = "upstream api.example.com:443 api2.example.com:80 {\nclient_id both\n}\n"
		ofSRV  = "upstream _https._tcp.example.com {\nclient_id srv\n}\n"
		listed = "upstream 10.0.0.1:443 {\nclient_id listed\n}\n"
	)
	for _, test := range []struct {
		name, source, static, blocks string
		want                         map[string]string // by address, with the network if it is not tcp
	}{
		// Static upstreams.
		{"no block", "", "10.0.0.1:443", "", map[string]string{"10.0.0.1:443": "gateway"}},
		{"a block", "", "10.0.0.1:443 10.0.0.2:443", listed, map[string]string{"10.0.0.1:443": "listed", "10.0.0.2:443": "gateway", "10.0.0.3:443": ""}},
		{"beside a placeholder", "", "10.0.0.1:443 10.0.0.2:443 {header.X-Up}", listed, map[string]string{"10.0.0.1:443": "listed", "10.0.0.2:443": "gateway", "10.0.0.3:443": "", "tcp4/10.0.0.2:443": ""}},
		{"from the environment", "", "{env.TEST_HOST}:{env.TEST_PORT} 10.0.0.2:443", ofA, map[string]string{"api.example.com:443": "a", "10.0.0.2:443": "gateway"}},

		// Dynamic ones without blocks: all are the same.
		{"a", sourceA, "", "", map[string]string{"10.0.0.1:443": "gateway"}},
		{"srv", sourceSRV, "", "", map[string]string{"10.0.0.1:443": "gateway"}},
		{"other", sourceOther, "", "", map[string]string{"10.0.0.1:443": "gateway"}},
		{"multi", sourcesOf(sourceA, sourceOther), "", "", map[string]string{"10.0.0.1:443": "gateway"}},

		// A block names the source.
		{"a, named", sourceA, "", ofA, map[string]string{"10.0.0.9:443": "a", "[2001:db8::1]:443": "a"}},
		{"a, named from the environment", `{"source":"a","name":"{env.TEST_HOST}","port":"{env.TEST_PORT}"}`, "", ofA, map[string]string{"10.0.0.9:443": "a"}},
		{"a by default on port 80, named", sourceA2, "", ofA2, map[string]string{"10.0.0.9:80": "a2"}},
		{"a, off", sourceA, "", "upstream api.example.com:443 off\n", map[string]string{"10.0.0.9:443": "off"}},
		{"a, named beside what is listed", sourceA, "10.0.0.2:443", ofA + listed, map[string]string{"10.0.0.9:443": "a", "10.0.0.1:443": "listed", "10.0.0.2:443": "gateway"}},
		{"srv, named", sourceSRV, "", ofSRV, map[string]string{"10.0.0.9:8443": "srv"}},
		{"srv by its whole name, named", sourceSRVName, "", ofSRV, map[string]string{"10.0.0.9:8443": "srv"}},
		{"srv, named with a port", sourceSRV, "", "upstream _https._tcp.example.com:443 {\nclient_id srv\n}\n", map[string]string{"10.0.0.9:8443": "srv"}},
		{"multi, all named in one block", sourcesOf(sourceA, sourceA2), "", ofBoth, map[string]string{"10.0.0.9:443": "both"}},
		{"multi of one, named", sourcesOf(sourceA), "", ofA, map[string]string{"10.0.0.9:443": "a"}},

		// No block names the source.
		{"a, listed", sourceA, "", listed, map[string]string{"10.0.0.1:443": "listed", "10.0.0.9:443": ""}},
		{"a, named with another port", sourceA, "", "upstream api.example.com:8443 {\nclient_id a\n}\n", map[string]string{"10.0.0.9:443": ""}},
		{"srv, listed", sourceSRV, "", listed, map[string]string{"10.0.0.1:443": "listed", "10.0.0.9:443": ""}},
		{"other, listed", sourceOther, "", listed, map[string]string{"10.0.0.1:443": "listed", "10.0.0.9:443": ""}},
		{"multi, listed", sourcesOf(sourceA, sourceOther), "", listed, map[string]string{"10.0.0.1:443": "listed", "10.0.0.9:443": ""}},
		{"a of the request, listed", sourceHost, "", listed, map[string]string{"10.0.0.1:443": "listed", "10.0.0.9:443": ""}},
	} {
		t.Run(test.name, func(t *testing.T) {
			transport, _, err := loadProxy(t, withSource(t, test.source, test.static, clientSettings+test.blocks+"insecure_plaintext upstream"))
			if err != nil {
				t.Fatal(err)
			}
			for address, want := range test.want {
				dial, err := parseDialAddress(caddy.NewReplacer(), address)
				if err != nil {
					t.Fatal(err)
				}
				if got := routeName(transport.routeTo(dial)); got != want {
					t.Errorf("%s: got the client %q, want %q", address, got, want)
				}
			}
		})
	}
}

// A resolver, or a client that chooses the upstream, may spell an address in any way.
func TestSpellingsOfAnAddressHaveOneRoute(t *testing.T) {
	const blocks = `
		upstream _https._tcp.example.com {
			client_id srv
		}
		upstream B.example.com.:443 {
			client_id b
		}
		upstream c.example.com:443 [0:0:0:0:0:0:0:1]:443 127.0.0.2:443 off
		insecure_plaintext upstream
	`
	source := `{"source":"srv","service":"https","proto":"tcp","name":"Example.com."}`
	transport, _, err := loadProxy(t, withSource(t, source, "", clientSettings+blocks))
	if err != nil {
		t.Fatal(err)
	}
	for address, want := range map[string]string{
		"b.example.com:443": "b", "b.example.com.:443": "b", "B.EXAMPLE.com:443": "b",
		"c.example.com:443": "off", "c.example.com.:443": "off", "C.Example.com.:443": "off",
		"[::1]:443": "off", "[0:0::1]:443": "off", "127.0.0.2:443": "off", "[::ffff:127.0.0.2]:443": "off", "[::ffff:7f00:2]:443": "off",
		"d.example.com.:443": "srv", "c.example.com.:8443": "srv", "[::1%lo]:443": "srv",
	} {
		dial := dialAddress{"tcp", address} // as the source yields it
		if got := routeName(transport.routeTo(dial)); got != want {
			t.Errorf("%s: got the client %q, want %q", address, got, want)
		}
		transport.checksOthers = true // health_port
		if got := routeName(transport.routeOfCheck(reverseproxy.DialInfo{Network: "tcp", Address: address})); got != want && want != "srv" {
			t.Errorf("%s: got the client %q for a health check, want %q", address, got, want)
		}
		transport.checksOthers = false
	}
}

func TestUpstreamsThatCannotBeServed(t *testing.T) {
	t.Setenv("TEST_UNSET", "")
	const (
		earth  = "every server on earth would get the token; add `upstream <address> { … }`"
		listed = "upstream 10.0.0.1:443 {\nclient_id listed\n}\n"
	)
	for _, test := range []struct{ name, source, static, blocks, want string }{
		// A request names the upstream.
		{"header", "", "{header.X-Up}", "", "upstream {http.request.header.X-Up}: a request can name it, and " + earth},
		{"a part of the address", "", "{labels.2}.example.com:443", "", earth},
		{"port", "", "api.example.com:{query.port}", "", earth},
		{"variable", "", "{vars.upstream}", "", earth},
		{"beside another", "", "10.0.0.1:443 {header.X-Up}", "", earth},
		{"header, with a block", "", "{header.X-Up}", listed, ""},
		{"environment that is empty", "", "{env.TEST_UNSET}", "", "upstream {env.TEST_UNSET}: evaluated placeholder {env.TEST_UNSET} is empty"},
		{"a", sourceHost, "", "", "upstream {http.request.header.X-Host}: a request can name it, and " + earth},
		{"a by its port", `{"source":"a","name":"api.example.com","port":"{http.request.uri.query.port}"}`, "", "", earth},
		{"srv", `{"source":"srv","service":"{http.vars.service}","proto":"tcp","name":"example.com"}`, "", "", earth},
		{"other", `{"source":"yielding","dials":["{http.request.header.X-Up}"]}`, "", "", earth},
		{"multi", sourcesOf(sourceA, sourcesOf(sourceHost)), "", "", earth},
		{"a, with a block", sourceHost, "", listed, ""},

		// Nobody can tell which source has yielded an address.
		{"multi, one of two named", sourcesOf(sourceA, sourceA2), "", "upstream api.example.com:443 {\nclient_id a\n}", "dynamic multi: one upstream block names a part of its sources"},
		{"multi, two blocks", sourcesOf(sourceA, sourceA2), "", "upstream api.example.com:443 {\nclient_id a\n}\nupstream api2.example.com:80 {\nclient_id b\n}", "list the addresses that they yield"},
		{"multi, one off", sourcesOf(sourceA, sourceA2), "", "upstream api.example.com:443 {\nclient_id a\n}\nupstream api2.example.com:80 off", "list the addresses that they yield"},
		{"multi, another kind", sourcesOf(sourceOther, sourceA), "", "upstream api.example.com:443 {\nclient_id a\n}", "list the addresses that they yield"},
		{"multi, one of the request", sourcesOf(sourceA, sourceHost), "", "upstream api.example.com:443 {\nclient_id a\n}", "list the addresses that they yield"},
		{"srv named by two blocks", sourceSRV, "", "upstream _https._tcp.example.com:1 {\nclient_id a\n}\nupstream _https._tcp.example.com:2 off", "upstream _https._tcp.example.com: named twice"},

		// net/http can't tell their connections.
		{"two networks", "", "tcp4/10.0.0.1:443 tcp6/10.0.0.1:443", "upstream tcp4/10.0.0.1:443 {\nclient_id a\n}\nupstream tcp6/10.0.0.1:443 {\nclient_id b\n}", "upstream 10.0.0.1:443: with other credentials on tcp4 and tcp6, but both share their connections"},
		{"two networks, one unlisted", "", "tcp4/10.0.0.1:443 10.0.0.1:443", "upstream tcp4/10.0.0.1:443 off", "with other credentials on tcp and tcp4"},
		{"two networks, one block", "", "tcp4/10.0.0.1:443 tcp6/10.0.0.1:443", "upstream tcp4/10.0.0.1:443 tcp6/10.0.0.1:443 {\nclient_id a\n}", ""},
		{"two networks, no block", "", "tcp4/10.0.0.1:443 tcp6/10.0.0.1:443", "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, _, err := loadProxy(t, withSource(t, test.source, test.static, clientSettings+test.blocks+"\ninsecure_plaintext upstream"))
			wantError(t, err, test.want)
		})
	}
}

// What an error says of an upstream can be written into the config.
func TestUpstreamsAreNamedAsInTheConfig(t *testing.T) {
	g := startGateway(t, `reverse_proxy {header.X-Up} {
		transport oauth2 {
			upstream 127.0.0.1:1 tcp4/192.0.2.1:1 {
				`+clientSettings+`
			}
		}
	}`+handleErrors)
	for written, want := range map[string]string{
		"127.0.0.1:2":      "upstream 127.0.0.1:2 has no credentials: add `upstream 127.0.0.1:2 { … }` or `upstream 127.0.0.1:2 off`",
		"tcp/127.0.0.1:2":  "upstream 127.0.0.1:2 has no credentials",
		"tcp4/127.0.0.1:2": "upstream tcp4/127.0.0.1:2 has no credentials: add `upstream tcp4/127.0.0.1:2 { … }` or `upstream tcp4/127.0.0.1:2 off`",
		"unix//run/x.sock": "upstream unix//run/x.sock has no credentials: add `upstream unix//run/x.sock { … }` or `upstream unix//run/x.sock off`",
		"tcp4/192.0.2.1:1": "the token would go to upstream tcp4/192.0.2.1:1 unencrypted",
	} {
		if r := g.get("X-Up", written).want(t, http.StatusBadGateway); !strings.Contains(r.body, want) {
			t.Errorf("%s: got %q, want %q in it", written, r.body, want)
		}
	}
}

// The client names a host, and must not get the token for it.
func TestDynamicUpstreamThatTheClientChooses(t *testing.T) {
	auth := newAuthServer(t)
	a, b := newUpstream(t, auth), newUpstream(t, nil)
	_, port, _ := strings.Cut(a.addr, ":")
	g := startGateway(t, expand(`reverse_proxy {
		dynamic a {
			name {header.X-Host}
			port {header.X-Port}
		}
		`+twoClients+`
	}`+handleErrors, "$A", a.addr, "$AUTH", auth.URL, "$MORE", ""))
	g.get("X-Host", "127.0.0.1", "X-Port", port).want(t, http.StatusOK)
	_, port, _ = strings.Cut(b.addr, ":")
	for _, host := range []string{"127.0.0.1", "localhost", "::ffff:127.0.0.1"} {
		r := g.get("X-Host", host, "X-Port", port).want(t, http.StatusBadGateway)
		if !strings.Contains(r.body, "has no credentials") {
			t.Errorf("%s: got %q, want that it has no credentials", host, r.body)
		}
	}
	if got := b.got(); len(got) != 0 {
		t.Errorf("got %v at an upstream that the client chose, want nothing", got)
	}
	a.wantTokensOf(t, auth, "a")
}

func TestDynamicUpstreamsOfABlock(t *testing.T) {
	auth := newAuthServer(t)
	up, listed := newUpstream(t, auth), newUpstream(t, auth)
	_, port, _ := strings.Cut(up.addr, ":")
	source := "a localhost " + port + " {\nversions ipv4\n}\n"
	for _, source := range []string{source, "multi {\n" + source + source + "}"} {
		g := startGateway(t, expand(`reverse_proxy {
			dynamic $SOURCE
			transport oauth2 {
				token_url $AUTH/token
				client_id gateway
				client_secret s
				upstream localhost:$PORT {
					client_id a
				}
				upstream $LISTED off
			}
		}`, "$SOURCE", source, "$PORT", port, "$LISTED", listed.addr, "$AUTH", auth.URL))
		g.get().want(t, http.StatusOK)
		up.wantTokensOf(t, auth, "a")
		g.stop()
	}
}

// An upstream that the config names has the credentials that stand outside of the
// blocks, whoever asks: not 502 for each request, and a token for the others.
func TestUnlistedUpstreamBesideAPlaceholder(t *testing.T) {
	auth := newAuthServer(t)
	a, b := newUpstream(t, auth), newUpstream(t, auth)
	site := expand(`reverse_proxy $B {header.X-Up} {
		lb_policy first
		health_uri /health
		health_interval 20ms
		`+twoClients+`
	}`, "$A", a.addr, "$B", b.addr, "$AUTH", auth.URL, "$MORE", "")
	g := startGateway(t, site)
	eventually(t, func() bool {
		return slices.ContainsFunc(b.got(), func(r received) bool { return r.path == "/health" && r.bearerOf(auth) == "gateway" })
	}, "a check with the token")
	eventually(t, func() bool { return g.get("X-Up", a.addr).status == http.StatusOK }, "an upstream that is up")
	b.wantTokensOf(t, auth, "gateway")
	g.stop()
	site = strings.Replace(site, "health_uri /health", "", 1) // or checks would run on: nothing ends the command's config
	output, _, err := runTokenCommand(t, site, b.addr, false, false)
	if err != nil || !strings.Contains(output, "client           gateway\n") {
		t.Errorf("got %v and\n%s\nwant the client gateway", err, output)
	}
}

func TestTokenCommandKnowsWhatBlocksName(t *testing.T) {
	auth := newAuthServer(t)
	for _, test := range []struct{ proxy, blocks, upstream, want, err string }{
		{"reverse_proxy {header.X-Up}", "upstream 127.0.0.1:9000 {\nclient_id a\n}", "127.0.0.1:9000", "a", ""},
		{"reverse_proxy {header.X-Up}", "upstream 127.0.0.1:9000 {\nclient_id a\n}", "", "a", ""},
		{"reverse_proxy {header.X-Up}", "upstream 127.0.0.1:9000 {\nclient_id a\n}", "127.0.0.1:9001", "", "it has 127.0.0.1:9000"},
		{"reverse_proxy {\ndynamic a localhost 9000\n}", "upstream localhost:9000 {\nclient_id a\n}", "localhost:9000", "a", ""},
		{"reverse_proxy {\ndynamic a localhost 9000\n}", "", "localhost:9000", "gateway", ""},
		{"reverse_proxy {\ndynamic a localhost 9000\n}", "upstream 127.0.0.1:9000 {\nclient_id a\n}", "localhost:9000", "", "it has 127.0.0.1:9000"},
		{"reverse_proxy {\ndynamic srv _http._tcp.localhost\n}", "upstream _http._tcp.localhost {\nclient_id a\n}", "_http._tcp.localhost", "a", ""},
		{"reverse_proxy {\ndynamic srv _http._tcp.localhost\n}", "upstream _http._tcp.localhost off", "", "", "all upstreams are off"},
	} {
		site := strings.TrimSuffix(test.proxy, "\n}")
		if site == test.proxy {
			site += " {"
		}
		site += fmt.Sprintf("\ntransport oauth2 {\ntoken_url %s/token\nclient_id gateway\nclient_secret s\n%s\n}\n}", auth.URL, test.blocks)
		output, _, err := runTokenCommand(t, site, test.upstream, false, false)
		wantError(t, err, test.err)
		if test.want != "" && (!strings.Contains(output, "client           "+test.want+"\n") || strings.Count(output, "client  ") != 1) {
			t.Errorf("%s: got\n%s\nwant the client %s only", site, output, test.want)
		}
	}
}
