package e2e

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// proxy is a reverse_proxy whose requests go out with a client's token.
type proxy struct {
	to     string // the upstream
	as     *authServer
	client client
	secret string   // default: a placeholder for E2E_SECRET
	extra  []string // more lines of the transport
}

// String returns the proxy in the Caddyfile's terms.
func (p proxy) String() string {
	secret := p.secret
	if secret == "" {
		secret = "{env.E2E_SECRET}"
	}
	// Backticks quote all that may be in an id; the secrets have a backtick, too.
	return fmt.Sprintf("reverse_proxy %s {\n"+
		"	transport oauth2 {\n"+
		"		token_url %s/token\n"+
		"		client_id `%s`\n"+
		"		client_secret %s\n"+
		"		auth_method %s\n"+
		"		scopes %s\n"+
		"		resource %s\n"+
		"		tenant %s\n"+
		"		%s\n"+
		"	}\n"+
		"}\n",
		p.to, p.as.issuer, p.client.ID, secret, p.client.Method, scopes, resource, tenant,
		strings.Join(p.extra, "\n\t\t"))
}

// gateway is a running Caddy.
type gateway struct {
	*process
	url   string // of its one site
	admin string // address of the admin API

	binary  string
	dir     string
	options string
}

// gatewayConfig is what a test decides about its gateway.
type gatewayConfig struct {
	site    string   // directives of the one site
	options string   // more global options
	env     []string // more variables of its environment
	https   bool     // serve the site over TLS, and thereby HTTP/3
	binary  string   // default: caddyBinary
}

// startProxy starts a gateway that only proxies.
func startProxy(t *testing.T, p proxy) *gateway {
	t.Helper()
	return startGateway(t, gatewayConfig{
		site: p.String(),
		env:  []string{"E2E_SECRET=" + p.client.Secret},
	})
}

// startGateway starts a gateway and waits until it listens.
func startGateway(t *testing.T, cfg gatewayConfig) *gateway {
	t.Helper()
	addr := heldAddress(t)
	scheme, options := "http", "auto_https off"
	if cfg.https {
		// The CA is this gateway's own, and the machine isn't to trust it.
		addr = heldHTTP3Address(t)
		scheme, options = "https", "auto_https disable_redirects\n\tlocal_certs\n\tskip_install_trust"
	}
	gw := &gateway{
		url:     scheme + "://" + addr,
		admin:   heldAddress(t),
		binary:  cmp.Or(cfg.binary, caddyBinary),
		dir:     t.TempDir(),
		options: options + "\n\t" + cfg.options,
	}
	cmd := gw.command("run", gw.writeCaddyfile(t, cfg.site))
	cmd.Env = append(cmd.Env, cfg.env...)
	gw.process = startProcess(t, cmd)
	t.Cleanup(func() {
		// To a client, a panic looks like a lost connection.
		if panicked.MatchString(gw.output.String()) {
			t.Error("gateway panicked")
		}
	})

	// Caddy starts the admin API first, and the site last.
	dial := func() (io.Closer, error) { return net.Dial("tcp", addr) }
	if cfg.https {
		dial = func() (io.Closer, error) { return gw.dialTLS(addr) }
	}
	deadline := time.Now().Add(startTimeout)
	for {
		conn, err := dial()
		if err == nil {
			conn.Close()
			return gw
		}
		if time.Now().After(deadline) {
			t.Fatalf("gateway isn't ready after %v: %v", startTimeout, err)
		}
		select {
		case <-gw.exited:
			t.Fatal("gateway ended before it was ready")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// panicked finds what Go and Caddy write of a panic. A stack has panic.go in it, without
// a panic.
var panicked = regexp.MustCompile(`panic:|panic serving|panicked`)

// dialTLS connects to the site. That succeeds only once there is a certificate,
// which comes after the listeners, HTTP/3's among them.
func (gw *gateway) dialTLS(addr string) (io.Closer, error) {
	config, err := gw.tlsConfig()
	if err != nil {
		return nil, err
	}
	return tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", addr, config)
}

// tlsConfig is for clients of a gateway with https: it trusts the gateway's CA
// and no other.
func (gw *gateway) tlsConfig() (*tls.Config, error) {
	root, err := os.ReadFile(filepath.Join(gw.dir, "data", "caddy", "pki", "authorities", "local", "root.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(root) {
		return nil, errors.New("no certificate in root.crt")
	}
	return &tls.Config{RootCAs: roots}, nil
}

// reload makes the gateway serve the site with other directives.
func (gw *gateway) reload(t *testing.T, site string) {
	t.Helper()
	cmd := gw.command("reload", gw.writeCaddyfile(t, site), "--address", gw.admin)
	logged := gw.output.size()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("caddy reload: %v\n%s", err, out)
	}
	gw.awaitAdmin(t, logged)
}

// awaitAdmin waits for the end of the old config's admin API, which outlives the
// reload a little: it would reset the connection of the next. logged is how much
// the gateway had logged before the reload.
func (gw *gateway) awaitAdmin(t *testing.T, logged int) {
	t.Helper()
	await(t, "end of the old config's admin API", func() bool {
		return strings.Contains(gw.output.since(logged), "stopped previous server")
	})
}

// generation is a site that tells which it is, at /generation without anything
// else.
func generation(n int, site string) string {
	return fmt.Sprintf("header X-Generation %d\nrespond /generation ok\n%s", n, site)
}

// wantGeneration fails the test unless this generation of the site is the one
// that answers. The one before may do so for a moment longer.
func (gw *gateway) wantGeneration(t *testing.T, n int) {
	t.Helper()
	answers := func(path string) bool {
		resp, err := http.Get(gw.url + path)
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		return err == nil && resp.StatusCode == http.StatusOK && resp.Header.Get("X-Generation") == strconv.Itoa(n)
	}
	await(t, fmt.Sprintf("answer of generation %d", n), func() bool { return answers("/generation") })
	if !answers("/") {
		t.Errorf("got no good answer of generation %d at the upstream, want one", n)
	}
}

func (gw *gateway) command(name, config string, args ...string) *exec.Cmd {
	args = append([]string{name, "--config", config, "--adapter", "caddyfile"}, args...)
	cmd := exec.Command(gw.binary, args...)
	// Nothing of the user's own Caddy is to be seen, nor touched.
	cmd.Env = append(os.Environ(),
		"XDG_CONFIG_HOME="+filepath.Join(gw.dir, "config"),
		"XDG_DATA_HOME="+filepath.Join(gw.dir, "data"))
	return cmd
}

func (gw *gateway) writeCaddyfile(t *testing.T, site string) string {
	t.Helper()
	text := fmt.Sprintf("{\n\tadmin %s\n\tdefault_bind 127.0.0.1\n\tpersist_config off\n\t%s\n}\n%s {\n%s\n}\n",
		gw.admin, gw.options, gw.url, site)
	path := filepath.Join(gw.dir, "Caddyfile")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// reply is a response, read to its end.
type reply struct {
	*http.Response
	body []byte
}

// do sends a request through the gateway.
func do(t *testing.T, req *http.Request) reply {
	t.Helper()
	return doWith(t, http.DefaultClient, req)
}

// doWith is do with a client that isn't the default one.
func doWith(t *testing.T, httpClient *http.Client, req *http.Request) reply {
	t.Helper()
	resp, err := httpClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", req.Method, req.URL.Path, err)
	}
	return reply{resp, body}
}

func newRequest(t *testing.T, method, url string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

// get sends a plain request that is to be answered with that status.
func (gw *gateway) get(t *testing.T, path string, status int) reply {
	t.Helper()
	resp := do(t, newRequest(t, "GET", gw.url+path, nil))
	if resp.StatusCode != status {
		t.Fatalf("GET %s = %s, want %d\n%s", path, resp.Status, status, bytes.TrimSpace(resp.body))
	}
	return resp
}
