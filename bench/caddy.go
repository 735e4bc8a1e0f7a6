// Caddy with this module, and Caddy alone.

package main

import (
	"context"
	"fmt"
	"os"
	"slices"
)

// Both candidates are the same binary, with the same settings of Caddy's proxy. They
// differ in the transport alone.
var caddyProgram = &program{module: "..", pkg: "./cmd/caddy"}

// this is the gateway that the project is about.
func this() candidate {
	return withOAuth("this", caddyProgram)
}

// withOAuth is this gateway, built as that program.
func withOAuth(name string, p *program) candidate {
	c := caddy(name, "this.caddyfile", p)
	command := c.command
	c.command = func(s *site) ([]string, error) {
		if err := s.writeSecrets(); err != nil {
			return nil, err
		}
		return command(s)
	}
	return c
}

// caddyStatic sends a token that is written in its config, and renews none. It shows
// what Caddy's proxy costs without OAuth.
func caddyStatic() candidate {
	c := caddy(yardstick, "static.caddyfile", caddyProgram)
	c.static = true
	return c
}

func caddy(name, caddyfile string, p *program) candidate {
	return candidate{
		name: name,
		version: func(ctx context.Context) (string, error) {
			return p.version(ctx, "Caddy", "github.com/caddyserver/caddy/v2")
		},
		command: func(s *site) ([]string, error) {
			if s.Idle == 0 {
				s.Idle = 64 // as many as there are connections in the scenarios
			}
			binary, err := p.build(context.Background())
			if err != nil {
				return nil, err
			}
			config, err := s.write(caddyfile)
			if err != nil {
				return nil, err
			}
			return twoCores(binary, "run", "--config", config, "--adapter", "caddyfile"), nil
		},
	}
}

// writeSecrets writes a file for each client's secret, because the README asks users to
// keep secrets out of the config.
func (s *site) writeSecrets() error {
	if err := os.MkdirAll(s.file("secrets"), 0o700); err != nil {
		return err
	}
	for _, client := range s.Clients {
		if err := os.WriteFile(s.Secret(client), []byte(client.Secret), 0o600); err != nil {
			return fmt.Errorf("secret of %s: %w", client.ID, err)
		}
	}
	return nil
}

// Secret returns the path of the file with a client's secret.
func (s *site) Secret(client oauthClient) string { return s.file("secrets/" + client.ID) }

// A hostGroup is some of the clients. Caddy tries routes one after another, so the
// project's documentation asks for groups of about a hundred.
type hostGroup struct {
	Name    string
	Clients []oauthClient
}

// HostGroups returns the clients in groups.
func (s *site) HostGroups() []hostGroup {
	var groups []hostGroup
	for clients := range slices.Chunk(s.Clients, 100) {
		groups = append(groups, hostGroup{fmt.Sprintf("group%d", len(groups)), clients})
	}
	return groups
}
