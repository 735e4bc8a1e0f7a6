package outboundauth

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestClientCertificateAuthenticatesTheClient(t *testing.T) {
	clients, self := newAuthority(t, "clients"), new(authority)
	intermediate := clients.below(t, "intermediate")
	for _, test := range []struct {
		name      string
		pair      certPair
		auth      tls.ClientAuthType
		presented int
		settings  string
		secret    string
	}{
		{"issued by a CA", clients.issue(t, "gateway"), tls.RequireAndVerifyClientCert, 1, "", ""},
		{"issued by an intermediate CA", intermediate.issue(t, "gateway"), tls.RequireAndVerifyClientCert, 2, "", ""},
		// Whatever CAs the server names.
		{"self-signed", self.issue(t, "gateway"), tls.RequireAnyClientCert, 1, "auth_method tls_client_auth", ""},
		{"beside a secret", clients.issue(t, "gateway"), tls.RequireAndVerifyClientCert, 1, "client_secret s", "s"},
	} {
		bothVersions(t, func(t *testing.T, http2 bool) {
			t.Run(test.name, func(t *testing.T) {
				auth := &authServer{live: make(map[string]string)}
				auth.Server = httptest.NewUnstartedServer(auth)
				t.Cleanup(func() { auth.CloseClientConnections(); auth.Close() })
				var door doorman
				door.guard(auth.Server, http2, test.auth, clients)
				up := newUpstream(t, auth)
				dir := t.TempDir()
				test.pair.write(t, dir)
				g := startGateway(t, expand(`reverse_proxy $UP {
					transport oauth2 {
						token_url $AUTH/token
						client_id gateway
						client_certificate $DIR/client.crt $DIR/client.key
						token_transport {
							tls_insecure_skip_verify
							versions 1.1 2
						}
						$SETTINGS
					}
				}`, "$UP", up.addr, "$AUTH", auth.URL, "$DIR", dir, "$SETTINGS", test.settings))
				g.get().want(t, http.StatusOK)

				got := door.last(t)
				if got.print != test.pair.print() || got.presented != test.presented {
					t.Errorf("got %d certificates, the first %s, want %d and %s", got.presented, got.print, test.presented, test.pair.print())
				}
				if want := map[bool]string{false: "HTTP/1.1", true: "HTTP/2.0"}[http2]; got.proto != want {
					t.Errorf("got %s, want %s, or this test proves less than it says", got.proto, want)
				}
				asked := auth.asked()[0]
				if asked.client != "gateway" || asked.secret != test.secret || asked.form.Has("client_assertion") {
					t.Errorf("got the client %q, the secret %q and the form %v, want the client_id and no more", asked.client, asked.secret, asked.form)
				}
				if test.secret == "" && (asked.form.Get("client_id") != "gateway" || asked.header.Get("Authorization") != "") {
					t.Errorf("got the form %v and the header %v, want the client_id in the form only", asked.form, asked.header)
				}
			})
		})
	}
}

func TestClientCertificateFromTheEnvironment(t *testing.T) {
	m := newMutual(t, false)
	pair := m.ca.issue(t, "gateway")
	t.Setenv("TEST_CLIENT_CERT", string(pair.chain))
	t.Setenv("TEST_CLIENT_KEY", string(pair.key))
	site := m.site("bind_certificate")
	site = strings.Replace(site, m.dir+"/client.crt", "{env.TEST_CLIENT_CERT}", 1)
	site = strings.Replace(site, m.dir+"/client.key", "{env.TEST_CLIENT_KEY}", 1)
	g := startGateway(t, site)
	g.get().want(t, http.StatusOK)
	if !m.took(pair) {
		t.Error("got no token of the certificate in the environment, want one")
	}
}

// Certificate and key are two files. While only one has been replaced, the
// token lives on, and nothing has to be reloaded after.
func TestReplacedCertificateIsUsedWithoutReload(t *testing.T) {
	for _, test := range []struct {
		name  string
		steps []func(certPair, *testing.T, string)
	}{
		{"at once", []func(certPair, *testing.T, string){certPair.write}},
		{"certificate first", []func(certPair, *testing.T, string){certPair.writeChain, certPair.writeKey}},
		{"key first", []func(certPair, *testing.T, string){certPair.writeKey, certPair.writeChain}},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := newMutual(t, false)
			first, second := m.ca.issue(t, "first"), m.ca.issue(t, "second")
			first.write(t, m.dir)
			g := startGateway(t, m.site("bind_certificate"))
			g.get().want(t, http.StatusOK)

			for i, step := range test.steps {
				step(second, t, m.dir)
				g.get().want(t, http.StatusOK) // with the token at hand
				if i < len(test.steps)-1 {
					m.refusedAtUp.Store(first.print(), true)
					g.get().want(t, http.StatusUnauthorized) // there is no other
					eventually(t, func() bool {
						return len(g.logged("obtaining token failed", "client_certificate: tls: private key does not match public key")) > 0
					}, "a warning of a certificate that is not the key's")
					m.refusedAtUp.Clear()
				}
			}
			m.refusedAtUp.Store(first.print(), true)
			eventually(t, func() bool { return g.get().status == http.StatusOK }, "a token of the new certificate")
			if got := m.toAuth.last(t).print; got != second.print() || !m.took(second) {
				t.Errorf("got a token request with %s, want %s", got, second.print())
			}
			for _, v := range m.toAuth.seen() {
				if v.print != first.print() && v.print != second.print() {
					t.Errorf("got a token request with the certificate %q, want one of the two", v.print)
				}
			}
			m.auth.wantAsked(t, 2)
		})
	}
}

// A token request over a connection would be the client whose certificate it
// was opened with, and so would be a request to the upstream.
func TestClientsDoNotShareConnections(t *testing.T) {
	bothVersions(t, func(t *testing.T, http2 bool) {
		m := newMutual(t, http2)
		a, b := m.ca.issue(t, "a"), m.ca.issue(t, "b")
		dirB := t.TempDir()
		a.write(t, m.dir)
		b.write(t, dirB)

		// Each is answered when both have asked, so both have a connection.
		var asking atomic.Int32
		both := make(chan struct{})
		issue, prints := m.auth.answer, map[string]string{"gateway": a.print(), "b": b.print()}
		m.auth.script(func(w http.ResponseWriter, r tokenRequest) bool {
			if asking.Add(1) == 2 {
				close(both)
			}
			select {
			case <-both:
			case <-r.ctx.Done():
			}
			if got := r.ctx.Value(visit{}).(visit).print; got != prints[r.client] {
				t.Errorf("got a token request of %q with the certificate %s, want %s", r.client, got, prints[r.client])
			}
			return issue(w, r)
		})
		site := m.site("bind_certificate\n" + expand(`upstream $OTHER {
			token_url $AUTH/token
			client_id b
			client_certificate $DIR/client.crt $DIR/client.key
			bind_certificate
		}`, "$OTHER", m.upHost, "$AUTH", m.auth.URL, "$DIR", dirB))
		site = strings.Replace(site, "https://"+m.up.addr+" {", "https://"+m.up.addr+" https://"+m.upHost+" {\nlb_policy round_robin", 1)
		g := startGateway(t, site)
		wantAll(t, g.burst(20), http.StatusOK)
		if !m.took(a) || !m.took(b) {
			t.Error("got tokens of one client only, want both")
		}
		m.auth.wantAsked(t, 2)
		for name, door := range map[string]*doorman{"token endpoint": &m.toAuth, "upstream": &m.toUp} {
			on := make(map[string]string) // certificates by connection
			for _, v := range door.seen() {
				if before, ok := on[v.connection]; ok && before != v.print {
					t.Errorf("%s: got two certificates on one connection", name)
				}
				on[v.connection] = v.print
			}
			if len(on) < 2 {
				t.Errorf("%s: got %d connections, want one for each client at least", name, len(on))
			}
		}
	})
}

// Clients share the token_transport that they inherit, but not what makes one
// of them known.
func TestClientWithoutCertificateBesideOneThatHasIt(t *testing.T) {
	auth := &authServer{live: make(map[string]string)}
	auth.Server = httptest.NewUnstartedServer(auth)
	t.Cleanup(func() { auth.CloseClientConnections(); auth.Close() })
	var door doorman
	door.guard(auth.Server, false, tls.RequestClientCert)
	pair, dir := new(authority).issue(t, "b"), t.TempDir()
	pair.write(t, dir)
	var mu sync.Mutex
	prints := make(map[string]string)
	auth.script(func(_ http.ResponseWriter, r tokenRequest) bool {
		mu.Lock()
		defer mu.Unlock()
		prints[r.client] = r.ctx.Value(visit{}).(visit).print
		return false
	})
	a, b, c := newUpstream(t, auth), newUpstream(t, auth), newUpstream(t, auth)
	g := startGateway(t, expand(`reverse_proxy $A $B $C {
		lb_policy round_robin
		transport oauth2 {
			token_url $AUTH/token
			client_id a
			client_secret s
			token_transport {
				tls_insecure_skip_verify
			}
			upstream $B {
				token_url $AUTH/token
				client_id b
				auth_method tls_client_auth
				client_certificate $DIR/client.crt $DIR/client.key
			}
			upstream $C {
				token_url $AUTH/token
				client_id c
				client_secret t
			}
		}
	}`, "$A", a.addr, "$B", b.addr, "$C", c.addr, "$AUTH", auth.URL, "$DIR", dir))
	wantAll(t, g.burst(6), http.StatusOK)
	mu.Lock()
	defer mu.Unlock()
	if want := (map[string]string{"a": "", "b": pair.print(), "c": ""}); !maps.Equal(prints, want) {
		t.Errorf("got the certificates %v, want %v", prints, want)
	}
}

// Without TLS, no certificate would be presented.
func TestClientCertificateNeedsTLS(t *testing.T) {
	dir := t.TempDir()
	new(authority).issue(t, "gateway").write(t, dir)
	certificate := expand("client_id gateway\nclient_certificate $DIR/client.crt $DIR/client.key\n", "$DIR", dir)
	const tls, plain, want = "https://127.0.0.1:9000", "127.0.0.1:9000", "the client_certificate can be presented in TLS only; use https://"
	for _, test := range []struct{ upstream, settings, want string }{
		{plain, "token_url http://127.0.0.1/token", "token_url: " + want},
		{plain, "issuer http://127.0.0.1", "issuer: " + want},
		{plain, "token_url http://127.0.0.1/token\ninsecure_plaintext token_url", "token_url: " + want},
		{tls, "token_url http://127.0.0.1/token\nclient_secret s\nbind_certificate", "token_url: " + want},
		{plain, "token_url http://127.0.0.1/token\nclient_secret s", ""}, // for the metadata of another, perhaps
		{tls, "token_url https://127.0.0.1/token\nbind_certificate\ntls_except_ports 9001", "bind_certificate: a certificate is presented in TLS only; remove tls_except_ports"},
	} {
		wantError(t, loadError(t, proxyConfig(test.upstream, certificate+test.settings)), test.want)
	}
}

func TestClientCertificateIsCheckedAtLoad(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	pair, another := new(authority).issue(t, "gateway"), new(authority).issue(t, "another")
	pair.write(t, dir)
	another.write(t, other)
	for name, content := range map[string][]byte{
		"empty":    nil,
		"text":     []byte("no PEM"),
		"half.crt": pair.chain[:len(pair.chain)/2],
		"half.key": pair.key[:len(pair.key)/2],
		"bad.key":  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: another.leaf.Raw}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const (
		tls, plain = "https://127.0.0.1:9000", "127.0.0.1:9000"
		good       = "client_certificate $DIR/client.crt $DIR/client.key\n"
	)
	for _, test := range []struct{ name, upstreams, settings, want string }{
		{"good", plain, good, ""},
		{"good, bound", tls, good + "bind_certificate", ""},
		{"good in one file", plain, "client_certificate $DIR/both $DIR/both", ""},
		{"no such certificate", plain, "client_certificate $DIR/none $DIR/client.key", "the file that it names does not exist"},
		{"no such key", plain, "client_certificate $DIR/client.crt $DIR/none", "the file that it names does not exist"},
		{"a directory", plain, "client_certificate $DIR $DIR/client.key", "the file that it names is a directory"},
		{"empty certificate", plain, "client_certificate $DIR/empty $DIR/client.key", "client_certificate, the certificate: the file that it names is empty"},
		{"empty key", plain, "client_certificate $DIR/client.crt $DIR/empty", "client_certificate, its key: the file that it names is empty"},
		{"no PEM", plain, "client_certificate $DIR/text $DIR/client.key", "client_certificate: "},
		{"half a certificate", plain, "client_certificate $DIR/half.crt $DIR/client.key", "client_certificate: "},
		{"half a key", plain, "client_certificate $DIR/client.crt $DIR/half.key", "client_certificate: "},
		{"not a key", plain, "client_certificate $DIR/client.crt $DIR/bad.key", "client_certificate: "},
		{"the key first", plain, "client_certificate $DIR/client.key $DIR/client.crt", "client_certificate: "},
		{"another's key", plain, "client_certificate $DIR/client.crt $OTHER/client.key", "client_certificate: tls: private key does not match public key"},
		{"placeholder that is empty", plain, "client_certificate {env.TEST_UNSET} $DIR/client.key", "client_certificate, the certificate: {env.TEST_UNSET} is not set"},
		{"placeholder of a request", plain, "client_certificate $DIR/client.crt {http.request.header.Key}", "client_certificate: "},

		{"bound in plaintext", plain, good + "bind_certificate", "bind_certificate: a certificate is presented in TLS only; use an upstream with https://"},
		{"bound to nothing", tls, "client_secret s\nbind_certificate", "bind_certificate: there is no client_certificate to bind tokens to; add one"},
		{"bound over HTTP/3", tls, good + "bind_certificate\nversions 3", "can't be presented over HTTP/3; remove 3 from versions"},
		{"HTTP/3 to the upstream", tls, good + "versions 3", ""},
		{"HTTP/3 to the token endpoint", plain, good + "token_transport {\nversions 3\n}", "client_certificate: a certificate can't be presented over HTTP/3; remove 3 from versions"},
		{"bound beside another to the upstream", tls, good + "bind_certificate\ntls_client_auth $OTHER/client.crt $OTHER/client.key", "bind_certificate: the upstream is presented another certificate by tls_client_auth; remove one of the two"},
		{"another to the upstream", tls, good + "tls_client_auth $OTHER/client.crt $OTHER/client.key", ""},
		{"another to the token endpoint", plain, good + "token_transport {\ntls_client_auth $OTHER/client.crt $OTHER/client.key\n}", "client_certificate: token_transport has another one; remove one of the two"},
	} {
		t.Run(test.name, func(t *testing.T) {
			both := slices.Concat(pair.key, pair.chain)
			if err := os.WriteFile(filepath.Join(dir, "both"), both, 0o600); err != nil {
				t.Fatal(err)
			}
			settings := "token_url https://auth.example.com/token\nclient_id gateway\n" + expand(test.settings, "$DIR", dir, "$OTHER", other)
			err := loadError(t, proxyConfig(test.upstreams, settings))
			wantError(t, err, test.want)
			if err != nil {
				wantNoPartOfKey(t, "error", err.Error(), pair, another)
				if strings.Contains(err.Error(), dir) {
					t.Errorf("got error %q, want one that does not quote the value, which may be the key itself", err)
				}
			}
		})
	}
}

// wantNoPartOfKey fails the test if a text holds a part of a private key.
func wantNoPartOfKey(t *testing.T, where, text string, pairs ...certPair) {
	t.Helper()
	const telling = 16 // characters
	for _, pair := range pairs {
		for line := range strings.Lines(string(pair.key)) {
			line = strings.TrimSpace(line)
			for i := 0; i+telling <= len(line) && !strings.HasPrefix(line, "-----"); i += telling {
				if strings.Contains(text, line[i:i+telling]) {
					t.Errorf("%s: got a part of the private key", where)
					return
				}
			}
		}
	}
}

func TestClientKeyIsNotSeen(t *testing.T) {
	m := newMutual(t, true)
	first, second := m.ca.issue(t, "first"), m.ca.issue(t, "second")
	first.write(t, m.dir)
	// Literally in the environment: errors might quote it.
	t.Setenv("TEST_CLIENT_KEY_PEM", string(first.key))
	g := newGateway(t)
	g.admin = heldAddress(t)
	g.load(strings.Replace(m.site("bind_certificate"), m.dir+"/client.key", "{env.TEST_CLIENT_KEY_PEM}", 1) + `
	handle_errors {
		respond "{err.message} {err.trace} {http.oauth2.error_description}"
	}`)
	var replies strings.Builder
	send := func() int {
		r := g.get()
		fmt.Fprint(&replies, r.err, r.header, r.body)
		return r.status
	}
	if got := send(); got != http.StatusOK {
		t.Fatalf("got %d, want 200", got)
	}
	m.refusedAtUp.Store(first.print(), true)
	for _, key := range []string{
		string(second.key),
		strings.TrimPrefix(string(second.key), "-----BEGIN PRIVATE KEY-----\n"), // taken for a file's name
		string(second.key)[:len(second.key)/2],
	} {
		t.Setenv("TEST_CLIENT_KEY_PEM", key)
		failures := len(g.logged("obtaining token failed"))
		eventually(t, func() bool { send(); return len(g.logged("obtaining token failed")) > failures }, "a warning of the key")
	}
	if got := adminGet(t, g.admin, "/config/"); !strings.Contains(got, "{env.TEST_CLIENT_KEY_PEM}") {
		t.Errorf("got %s, want the placeholder", got)
	} else {
		wantNoPartOfKey(t, "admin API", got, first, second)
	}
	g.load("respond gone")
	wantNoPartOfKey(t, "clients", replies.String(), first, second)
	wantNoPartOfKey(t, "log", g.logs(), first, second)
}

// Of a request that has given up, net/http would keep the connection, and the
// next token request be the client of an older certificate.
func TestDialThatOutlivesItsRequest(t *testing.T) {
	m := newMutual(t, false)
	first, second := m.ca.issue(t, "first"), m.ca.issue(t, "second")
	first.write(t, m.dir)
	relay, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer relay.Close()
	held := make(chan struct{})
	release := sync.OnceFunc(func() { close(held) })
	defer release()
	go func() {
		for n := 0; ; n++ {
			conn, err := relay.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				server, err := net.Dial("tcp", m.auth.Listener.Addr().String())
				if err != nil {
					return
				}
				defer server.Close()
				if n == 0 {
					<-held
				}
				go func() { _, _ = io.Copy(server, conn); _ = server.Close() }()
				_, _ = io.Copy(conn, server)
			}()
		}
	}()
	cl := newTransport(t, fmt.Sprintf(`token_url https://%[1]s/token
		client_id gateway
		client_certificate %[2]s/client.crt %[2]s/client.key
		token_transport {
			tls_insecure_skip_verify
		}`, relay.Addr(), m.dir)).fallback.client
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = cl.endpoint.locateAndRequest(ctx, nil)
	wantTokenError(t, err, codeTimeout, false)
	second.write(t, m.dir)
	release()
	for range 50 { // the connection of the first may be ready before any
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if got := m.toAuth.last(t).print; got != second.print() {
			t.Fatalf("got the certificate %s, want %s", got, second.print())
		}
	}
}
