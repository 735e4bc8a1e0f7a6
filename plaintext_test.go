package outboundauth

import (
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

func TestStaysOnMachine(t *testing.T) {
	for _, test := range []struct {
		network, host string
		want          bool
	}{
		{"tcp", "127.0.0.1", true},
		{"tcp", "127.1.2.3", true},
		{"tcp4", "127.0.0.1", true},
		{"tcp", "::1", true},
		{"tcp", "[::1]", true},
		{"tcp", "::ffff:127.0.0.1", true},
		{"tcp", "localhost", true},
		{"tcp", "LocalHost", true},
		{"tcp", "", true},
		{"unix", "/run/upstream.sock", true},
		{"unixpacket", "/run/upstream.sock", true},
		{"unix+h2c", "/run/upstream.sock", true},
		{"fd", "3", true},

		{"tcp", "192.0.2.1", false},
		{"tcp", "10.0.0.1", false},
		{"tcp", "169.254.1.1", false},
		{"tcp", "0.0.0.0", false},
		{"tcp", "::", false},
		{"tcp", "2001:db8::1", false},
		{"tcp", "::ffff:192.0.2.1", false},
		{"tcp", "fe80::1%lo", false},
		{"tcp", "example.com", false},
		{"tcp", "localhost.example.com", false},
		{"tcp", "127.0.0.1.example.com", false}, // a name, not an address
		{"tcp", "127.1", false},                 // as inet_aton reads it; not needed
		{"tcp", "2130706433", false},
		{"udp", "192.0.2.1", false},
	} {
		if got := staysOnMachine(test.network, test.host, false); got != test.want {
			t.Errorf("staysOnMachine(%q, %q): got %v, want %v", test.network, test.host, got, test.want)
		}
	}
}

// The address comes from the client, so only the request tells that it is not
// on this machine. The tokens must not get there, nor even a connection.
func TestPlaintextToAnotherMachineIsRefusedBeforeDialing(t *testing.T) {
	auth := newAuthServer(t)
	const proxied = `reverse_proxy {http.request.header.X-Up} {
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret s
			dial_timeout 100ms
			upstream $UP {
				tenant acme
			}
			$MORE
		}
	}`
	for _, up := range []string{"192.0.2.1:80", "192.0.2.1:443", "upstream.example:80", "0.0.0.0:80", "[2001:db8::1]:80"} {
		g := startGateway(t, expand(proxied, "$AUTH", auth.URL, "$UP", up, "$MORE", "")+handleErrors)
		r := g.get("X-Up", up).want(t, http.StatusBadGateway)
		if !strings.Contains(r.body, "unencrypted") || !strings.Contains(r.body, "insecure_plaintext upstream") {
			t.Errorf("%s: got %q, want that the token would go there unencrypted, and how to allow it", up, r.body)
		}
		g.stop()

		// Allowed, it is dialed: the error is another one.
		g = startGateway(t, expand(proxied, "$AUTH", auth.URL, "$UP", up, "$MORE", "insecure_plaintext upstream")+handleErrors)
		if r := g.get("X-Up", up); strings.Contains(r.body, "unencrypted") {
			t.Errorf("%s: got %q although it is allowed, want that it is dialed", up, r.body)
		}
		g.stop()
	}
}

// A client that asks in absolute form does not choose the scheme upstream.
func TestSchemeIsNotTheClients(t *testing.T) {
	auth := newAuthServer(t)
	g := startGateway(t, expand(`reverse_proxy {http.request.header.X-Up} {
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret s
			dial_timeout 100ms
			upstream 192.0.2.1:80 {
				tenant acme
			}
		}
	}`, "$AUTH", auth.URL)+handleErrors)
	conn, err := net.Dial("tcp", g.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = conn.Write([]byte("GET https://gateway.test/ HTTP/1.1\r\nHost: gateway.test\r\nX-Up: 192.0.2.1:80\r\nConnection: close\r\n\r\n"))
	answer := make([]byte, 4096)
	n, _ := conn.Read(answer)
	if got := string(answer[:n]); !strings.Contains(got, " 502 ") || !strings.Contains(got, "unencrypted") {
		t.Errorf("got %q, want that the token would go there unencrypted", got)
	}
}

func TestPlaintextToAnotherMachineIsRefusedAtLoad(t *testing.T) {
	auth := newAuthServer(t)
	for _, test := range []struct {
		name, upstream, token, more string
		want                        string // in the error; "": none
	}{
		{"upstream", "192.0.2.1:80", auth.URL, "", "unencrypted"},
		{"upstream with TLS", "https://192.0.2.1", auth.URL, "", ""},
		{"upstream, allowed", "192.0.2.1:80", auth.URL, "insecure_plaintext upstream", ""},
		{"upstream, another is allowed", "192.0.2.1:80", auth.URL, "insecure_plaintext token_url", "unencrypted"},
		{"TLS except for this port", "192.0.2.1:8000", auth.URL, "tls\ntls_except_ports 8000", "unencrypted"},
		{"token endpoint by a placeholder", "127.0.0.1:80", "{env.OUTBOUNDAUTH_TEST_URL}", "", "unencrypted"},
		{"token endpoint by a placeholder, allowed", "127.0.0.1:80", "{env.OUTBOUNDAUTH_TEST_URL}", "insecure_plaintext token_url", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("OUTBOUNDAUTH_TEST_URL", "http://192.0.2.1")
			g := newGateway(t)
			config := g.config(expand(`reverse_proxy $UP {
				transport oauth2 {
					token_url $TOKEN/token
					client_id gateway
					client_secret s
					$MORE
				}
			}`, "$UP", test.upstream, "$TOKEN", test.token, "$MORE", test.more))
			var cfg caddy.Config
			if err := caddy.StrictUnmarshalJSON(config, &cfg); err != nil {
				t.Fatal(err)
			}
			err := caddy.Validate(&cfg)
			if test.want == "" && err != nil {
				t.Errorf("got %v, want no error", err)
			}
			if test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("got %v, want an error that tells %q", err, test.want)
			}
		})
	}
}
