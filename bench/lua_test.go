package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// luaSite returns a site with n clients.
func luaSite(t *testing.T, n int, change func(*site)) *site {
	s := &site{Dir: t.TempDir(), Listen: "127.0.0.1:8000", TokenURL: "http://127.0.0.1:8001/token", Scheme: "http"}
	for i := range n {
		s.Clients = append(s.Clients, oauthClient{
			Host: fmt.Sprintf("c%d.test", i), ID: fmt.Sprintf("id-%d", i), Secret: fmt.Sprintf(`secret "%d"`, i),
			Tenant: fmt.Sprintf("tenant-%d", i), Upstream: fmt.Sprintf("127.0.0.1:%d", 9000+i),
		})
	}
	if change != nil {
		change(s)
	}
	return s
}

func withTLS(s *site) { s.Scheme, s.CA = "https", "/ca.pem" }

// TestLuaConfigs reads what nginx and HAProxy get. Whether they take it is seen when they
// are measured: they are not needed here.
func TestLuaConfigs(t *testing.T) {
	tests := map[string]struct {
		candidate candidate
		clients   int
		change    func(*site)
		has       []string // in the files that the candidate gets
		not       []string
	}{
		"nginx": {
			nginx(), 1, nil,
			[]string{
				"listen 127.0.0.1:8000 ", "server 127.0.0.1:9000;", "proxy_pass http://api;", "= clients[1]",
				`"http://127.0.0.1:8001/token"`, `secret = "secret \"0\""`, `tenant = "tenant-0"`,
			},
			[]string{"balancer_by_lua", "ssl_certificate", "ngx.var.host"},
		},
		"nginx by host": {
			nginx(), 2, nil,
			[]string{"balancer_by_lua", "= clients[ngx.var.host]", `["c1.test"] = { name = "c1", id = "id-1"`, `upstream = "127.0.0.1:9001"`},
			[]string{"server 127.0.0.1:900", "math.random(#clients)"},
		},
		"nginx with a pool": {
			nginx(), 2, func(s *site) { s.Pool = true },
			[]string{"balancer_by_lua", "= clients[math.random(#clients)]", `{ name = "c1", id = "id-1"`},
			[]string{"ngx.var.host", "c1.test"},
		},
		"nginx with TLS": {
			nginx(), 1, withTLS,
			[]string{"proxy_pass https://api;", "proxy_ssl_verify on;", "proxy_ssl_trusted_certificate /ca.pem;"},
			nil,
		},
		"HAProxy": {
			haproxy(), 1, nil,
			[]string{
				"bind 127.0.0.1:8000 ", "server c0 127.0.0.1:9000\n", "set-var(txn.client) str(c0)\n", "c0 tenant-0\n",
				`"http://127.0.0.1:8001/token"`, `secret = "secret \"0\""`,
			},
			[]string{" ssl ", "hosts.map"},
		},
		"HAProxy by host": {
			haproxy(), 2, nil,
			[]string{"/haproxy-hosts.map)\n", "\nc1.test c1\n", "\nc1 tenant-1\n", "server c1 127.0.0.1:9001\n", `c1 = { name = "c1", id = "id-1"`},
			[]string{"rand("},
		},
		"HAProxy with a pool": {
			haproxy(), 2, func(s *site) { s.Pool = true },
			[]string{"set-var-fmt(txn.client) c%[rand(2)]\n"},
			[]string{"req.hdr(host)"},
		},
		"HAProxy with TLS": {
			haproxy(), 1, withTLS,
			[]string{" ssl verify required ca-file /ca.pem ", " alpn http/1.1\n"},
			nil,
		},
		"HAProxy with HTTP/2": {
			haproxy(), 1, func(s *site) { withTLS(s); s.HTTP2 = true },
			[]string{" alpn h2,http/1.1\n"},
			nil,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s := luaSite(t, test.clients, test.change)
			if lacks := test.candidate.lack(s); lacks != "" {
				t.Fatalf("lacks %q", lacks)
			}
			text := written(t, test.candidate, s)
			for _, part := range test.has {
				if !strings.Contains(text, part) {
					t.Errorf("no %q in\n%s", part, text)
				}
			}
			for _, part := range append(test.not, "{{", "<no value>") {
				if strings.Contains(text, part) {
					t.Errorf("%q in\n%s", part, text)
				}
			}
		})
	}
}

// written returns the text of all files that a candidate gets. Each is in the directory
// of the site, the command names the last one, and only its owner may read them.
func written(t *testing.T, c candidate, s *site) string {
	t.Helper()
	command, err := c.command(s)
	if err != nil {
		t.Fatal(err)
	}
	paths, err := filepath.Glob(s.file("*"))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(paths, command[len(command)-1]) {
		t.Errorf("%q doesn't end with one of %q", command, paths)
	}
	var text strings.Builder
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, and holds secrets", path, info.Mode())
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text.Write(data)
	}
	return text.String()
}

func TestNginxLacksHTTP2(t *testing.T) {
	s := luaSite(t, 1, withTLS)
	s.HTTP2 = true
	if got := nginx().lack(s); got != "no HTTP/2 to upstreams" {
		t.Errorf("got %q", got)
	}
}
