// What is measured: gateways, and what they serve.

package main

import (
	"bytes"
	"context"
	"embed"
	"fmt"
	"os"
	"path/filepath"
	"text/template"
)

// A candidate is a gateway that is measured.
type candidate struct {
	name string // as the tables show it

	// static: it has a token that is valid for ever, and asks for none.
	static bool

	// version says what was measured: the program and its version. An error means
	// that the candidate is not on this machine, and says how to install it.
	version func(ctx context.Context) (string, error)

	// command writes what the gateway needs into the site's directory, and returns the
	// command that runs it. The command stays in the foreground, and ends with SIGTERM.
	command func(s *site) ([]string, error)

	// lacks says why a site can't be served. It is nil for a candidate that serves all.
	lacks func(s *site) string
}

// lack says why a site can't be served. It is empty for one that can.
func (c candidate) lack(s *site) string {
	if c.lacks == nil {
		return ""
	}
	return c.lacks(s)
}

// A site is what a gateway serves in a scenario. Its fields are for the templates in
// configs/.
type site struct {
	Dir      string // where the candidate's files are
	Listen   string // host and port
	TokenURL string

	// Scheme is that of the upstreams: http or https. HTTP2 is about https alone:
	// the gateway speaks HTTP/2 with the upstreams, and otherwise HTTP/1.1.
	Scheme string
	HTTP2  bool
	CA     string // the file of the upstreams' CA certificate; empty for http

	// Clients are the OAuth clients. If there are several, the Host of a request says
	// whose token it gets.
	Clients []oauthClient

	// StaticToken is valid for all clients and for ever. It is for candidates that get
	// no token themselves.
	StaticToken string

	// Pool: the clients are not chosen by the Host of a request. Their upstreams are a
	// pool, of which each request gets one at random.
	Pool bool

	// Idle is how many idle connections Caddy keeps to each upstream. 0: as many as it
	// keeps if nobody says a number, which is 32.
	Idle int
	// Admin is the address of Caddy's admin API; empty: there is none.
	Admin string
}

// An oauthClient is one OAuth client with its upstream.
type oauthClient struct {
	Host       string // of the requests that get its token, such as c17.test
	ID, Secret string
	Tenant     string // for X-Tenant, which each upstream gets
	Upstream   string // host and port
}

// Client returns the first client, for sites that have only one.
func (s *site) Client() oauthClient { return s.Clients[0] }

// Single reports whether every request gets the token of one and the same client.
func (s *site) Single() bool { return !s.Pool && len(s.Clients) == 1 }

//go:embed configs
var configs embed.FS

// file returns the path of a file in the site's directory.
func (s *site) file(name string) string { return filepath.Join(s.Dir, name) }

// write makes a file of the template of that name in configs/.
func (s *site) write(name string) (path string, err error) {
	tmpl, err := template.ParseFS(configs, "configs/"+name)
	if err != nil {
		return "", err
	}
	var text bytes.Buffer
	if err := tmpl.Execute(&text, s); err != nil {
		return "", fmt.Errorf("configs/%s: %w", name, err)
	}
	path = s.file(name)
	return path, os.WriteFile(path, text.Bytes(), 0o600) //nolint:gosec // in our own directory
}
