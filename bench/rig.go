// What surrounds a gateway while it is measured.

package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// A scene is what a scenario needs around the gateway.
type scene struct {
	clients  int // OAuth clients, each with an upstream; 0: one
	pool     bool
	scheme   string // of the upstreams; empty: http
	http2    bool
	lifetime time.Duration // of tokens; 0: an hour
	limit    int           // token requests a second that the authority answers
	answer   func(since time.Duration) answer
	cold     bool // don't wait for the first token
}

// A rig is a gateway at work, with its authority and its upstreams.
type rig struct {
	*site
	authority *authority
	gateway   *process
	started   time.Duration // from the start of the gateway to its first good answer

	origin  *origin
	servers []*http.Server
}

// newRig starts all that a scenario needs in dir, with a fresh process of the candidate.
// The caller closes the rig, also after an error.
func newRig(ctx context.Context, c candidate, want scene, dir string) (*rig, error) {
	r := &rig{site: &site{Dir: dir, Scheme: cmp.Or(want.scheme, "http"), HTTP2: want.http2, Pool: want.pool}}
	if err := r.startServers(want); err != nil {
		return r, err
	}
	if reason := c.lack(r.site); reason != "" {
		return r, lackError(reason)
	}
	command, err := c.command(r.site)
	if err != nil {
		return r, err
	}
	began := time.Now()
	if r.gateway, err = start(command, dir); err != nil {
		return r, err
	}
	try := r.get
	if want.cold {
		try = r.listens
	}
	err = r.gateway.until(ctx, func() error { return try(ctx) })
	r.started = time.Since(began)
	if !want.cold && want.limit == 0 {
		r.authority.begin()
	}
	return r, err
}

// ended returns an error if the gateway has ended too early: what was measured means
// nothing then.
func (r *rig) ended() error {
	select {
	case <-r.gateway.exited:
		return fmt.Errorf("the gateway has ended: %s", r.gateway.output())
	default:
		return nil
	}
}

// lackError says why a candidate can't serve a site.
type lackError string

// Error implements error.
func (e lackError) Error() string { return string(e) }

// startServers starts the upstreams and the authority, and completes the site.
func (r *rig) startServers(want scene) error {
	var cert *tls.Certificate
	if r.Scheme == "https" {
		own, ca, err := newCertificate()
		if err != nil {
			return err
		}
		cert, r.CA = &own, r.file("ca.pem")
		if err := os.WriteFile(r.CA, ca, 0o600); err != nil {
			return err
		}
	}
	r.origin = &origin{clients: make(map[string]oauthClient)}
	port, upstreams, err := serve(r.origin, cert, want.http2)
	if err != nil {
		return err
	}
	r.servers = append(r.servers, upstreams)
	for i := range max(1, want.clients) {
		client := oauthClient{
			Host: fmt.Sprintf("c%d.test", i), ID: fmt.Sprint("client-", i), Secret: fmt.Sprint("secret-", i),
			Tenant: fmt.Sprint("tenant-", i), Upstream: originAddress(i, port),
		}
		if r.Pool {
			client.Tenant = "tenant" // the static header is the same for all of a pool, too
		}
		r.Clients = append(r.Clients, client)
		r.origin.clients[client.Upstream] = client
	}

	r.authority = newAuthority(r.Clients, cmp.Or(want.lifetime, time.Hour))
	r.authority.limit = want.limit
	if want.answer != nil {
		r.authority.answer = want.answer
	}
	r.origin.authority, r.StaticToken = r.authority, r.authority.static
	tokenPort, endpoint, err := serve(r.authority, nil, false)
	if err != nil {
		return err
	}
	r.servers = append(r.servers, endpoint)
	r.TokenURL = fmt.Sprintf("http://127.0.0.1:%d/token", tokenPort)
	listen, err := freePort()
	r.Listen = fmt.Sprintf("127.0.0.1:%d", listen)
	return err
}

// freePort returns a port for a gateway, on which nobody listens. It is below those that
// Linux gives to connections: one of these could take it before the gateway does.
func freePort() (int, error) {
	for {
		port := 20_000 + int(lastPort.Add(1))%10_000
		ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			return 0, err
		}
		return port, ln.Close()
	}
}

var lastPort atomic.Int32

// get asks the gateway for a page. It returns an error for every answer but a good one.
func (r *rig) get(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Listen+"/", nil)
	if err != nil {
		return err
	}
	req.Host = r.Client().Host
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, res.Body)
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	return nil
}

// listens returns an error if the gateway accepts no connection.
func (r *rig) listens(ctx context.Context) error {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", r.Listen)
	if err == nil {
		_ = conn.Close()
	}
	return err
}

// close ends the gateway, and then all that surrounds it.
func (r *rig) close() {
	if r.gateway != nil {
		r.gateway.stop()
	}
	for _, server := range r.servers {
		_ = server.Close()
	}
}
