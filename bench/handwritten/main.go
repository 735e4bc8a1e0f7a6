// A reverse proxy as a team writes it in an afternoon, with care: the proxy of the
// standard library, and the tokens of golang.org/x/oauth2. It is measured beside the
// gateways, to show what somebody gets who writes one.
//
// Without -tuned, the connections are as the standard library has them. With -tuned,
// they are as somebody sets them who has measured the first version.

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

// A config is what the proxy serves. It is read from site.json.
type config struct {
	Dir      string
	Listen   string
	TokenURL string
	Scheme   string
	HTTP2    bool
	CA       string
	Clients  []client
	Pool     bool
}

type client struct {
	Host       string
	ID, Secret string
	Tenant     string
	Upstream   string
}

func main() {
	path := flag.String("site", "site.json", "the `file` with the clients and their upstreams")
	tuned := flag.Bool("tuned", false, "set what the standard library leaves at its defaults")
	flag.Parse()
	if err := run(*path, *tuned); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(path string, tuned bool) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var cfg config
	if err := json.Unmarshal(data, &cfg); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	file, err := os.OpenFile(filepath.Join(cfg.Dir, "handwritten.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	log := slog.New(slog.NewTextHandler(file, nil))
	handler, err := newGateway(&cfg, tuned, log)
	if err != nil {
		return err
	}
	// No timeout is about a whole request: an upload may take long.
	server := &http.Server{
		Addr:              cfg.Listen,
		Handler:           handler,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	return serve(server)
}

// serve serves until the process gets SIGTERM or SIGINT.
func serve(server *http.Server) error {
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer cancel()
	failed := make(chan error, 1)
	go func() { failed <- server.ListenAndServe() }()
	select {
	case err := <-failed:
		return err
	case <-stop.Done():
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return server.Shutdown(ctx)
}

// A gateway chooses the client of a request. Each client has a proxy of its own.
type gateway struct {
	proxies []*httputil.ReverseProxy
	byHost  map[string]*httputil.ReverseProxy // nil if the Host is of no account
}

func newGateway(cfg *config, tuned bool, log *slog.Logger) (*gateway, error) {
	base, err := newTransport(cfg, tuned)
	if err != nil {
		return nil, err
	}
	g := new(gateway)
	if !cfg.Pool && len(cfg.Clients) > 1 {
		g.byHost = make(map[string]*httputil.ReverseProxy)
	}
	ctx := context.Background()
	if tuned {
		// http.DefaultClient, which is used otherwise, has no timeout. All requests
		// wait while one of them asks for a token.
		ctx = context.WithValue(ctx, oauth2.HTTPClient, &http.Client{Timeout: 10 * time.Second})
	}
	buffers := new(bufferPool)
	for _, c := range cfg.Clients {
		proxy := newProxy(ctx, cfg, c, base, log)
		if tuned {
			proxy.BufferPool = buffers
		}
		g.proxies = append(g.proxies, proxy)
		if g.byHost != nil {
			g.byHost[c.Host] = proxy
		}
	}
	return g, nil
}

func (g *gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if g.byHost == nil {
		g.proxies[rand.IntN(len(g.proxies))].ServeHTTP(w, r) //nolint:gosec // spreads load, hides nothing
		return
	}
	host := r.Host
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	proxy := g.byHost[strings.ToLower(host)]
	if proxy == nil {
		http.Error(w, "this gateway does not serve that host", http.StatusNotFound)
		return
	}
	proxy.ServeHTTP(w, r)
}

// newProxy returns the proxy of one client. The context is that of token requests.
func newProxy(ctx context.Context, cfg *config, c client, base http.RoundTripper, log *slog.Logger) *httputil.ReverseProxy {
	credentials := &clientcredentials.Config{
		ClientID:     c.ID,
		ClientSecret: c.Secret,
		TokenURL:     cfg.TokenURL,
		// Otherwise, the first request tries both ways.
		AuthStyle: oauth2.AuthStyleInHeader,
	}
	upstream := &url.URL{Scheme: cfg.Scheme, Host: c.Upstream}
	return &httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.SetURL(upstream)
			pr.SetXForwarded()
			// Without this, the proxy drops parameters that Go can't parse.
			pr.Out.URL.RawQuery = pr.In.URL.RawQuery
			pr.Out.Header.Set("X-Tenant", c.Tenant)
		},
		// TokenSource returns a source that keeps a token until 10 seconds before its
		// end, and asks for one token at a time. The transport replaces what the caller
		// sent as Authorization.
		Transport: &oauth2.Transport{Source: credentials.TokenSource(ctx), Base: base},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if !errors.Is(err, context.Canceled) {
				log.Error("proxy", "path", r.URL.Path, "upstream", c.Upstream, "error", err)
			}
			w.WriteHeader(http.StatusBadGateway)
		},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
}

// newTransport returns the transport that all upstreams share.
func newTransport(cfg *config, tuned bool) (*http.Transport, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	if cfg.CA != "" {
		pem, err := os.ReadFile(cfg.CA)
		if err != nil {
			return nil, err
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate", cfg.CA)
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	}
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetHTTP1(!cfg.HTTP2)
	transport.Protocols.SetHTTP2(cfg.HTTP2)
	if tuned {
		// The default is 2 idle connections a host. With more requests at once, most
		// of them would open a connection and close it again.
		transport.MaxIdleConnsPerHost = 1024
		// The default is 100 for all hosts together.
		transport.MaxIdleConns = 0
		// The transport would ask for gzip on its own, and decompress the answers.
		transport.DisableCompression = true
		// An upstream that takes a request and never answers does not hold it forever.
		transport.ResponseHeaderTimeout = time.Minute
	}
	return transport, nil
}

// A bufferPool keeps the buffers through which bodies are copied.
type bufferPool struct{ pool sync.Pool }

// The proxy allocates buffers of this size, too, but a new one for each answer.
const bufferSize = 32 << 10

func (p *bufferPool) Get() []byte {
	if buffer, ok := p.pool.Get().(*[]byte); ok {
		return *buffer
	}
	return make([]byte, bufferSize)
}

func (p *bufferPool) Put(buffer []byte) { p.pool.Put(&buffer) }
