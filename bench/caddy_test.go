package main

import (
	"os"
	"testing"
)

func TestCaddyfiles(t *testing.T) {
	for kind, s := range testSites(t) {
		for _, name := range []string{"this.caddyfile", "static.caddyfile"} {
			t.Run(kind+"/"+name, func(t *testing.T) {
				text := s.read(t, name)
				for _, client := range s.Clients {
					if !s.Pool { // a pool has it in the block of the upstream, too
						has(t, text, 1, s.Scheme+"://"+client.Upstream+" ")
					}
					if !s.Pool || name == "this.caddyfile" { // the static header is that of the first
						has(t, text, 1, " "+client.Tenant+"\n")
					}
					has(t, text, 0, client.Secret)
				}
				last := s.Clients[len(s.Clients)-1]
				has(t, text, onlyIf(!s.Pool && !s.Single(), 1), "@"+last.Host+" host "+last.Host+"\n")
				has(t, text, onlyIf(s.Pool, 1), "lb_policy random")
				has(t, text, onlyIf(s.CA != "", 1), "tls_trust_pool file "+s.CA)
				has(t, text, onlyIf(s.CA != "" && !s.HTTP2, 1), "versions 1.1")
				has(t, text, onlyIf(s.HTTP2, 1), "versions 2")
			})
		}
	}
}

func TestHostGroups(t *testing.T) {
	groups := testSite(t, 250).HostGroups()
	if len(groups) != 3 || len(groups[2].Clients) != 50 || groups[2].Clients[49].Host != "c249.test" {
		t.Errorf("250 clients make %d groups: %v", len(groups), groups)
	}
}

func TestSecretFiles(t *testing.T) {
	s := testSite(t, 3)
	if err := s.writeSecrets(); err != nil {
		t.Fatal(err)
	}
	text := s.read(t, "this.caddyfile")
	for _, client := range s.Clients {
		secret, err := os.ReadFile(s.Secret(client))
		if err != nil || string(secret) != client.Secret {
			t.Errorf("the file of %s has %q, %v", client.ID, secret, err)
		}
		has(t, text, 1, "{file."+s.Secret(client)+"}")
	}
}
