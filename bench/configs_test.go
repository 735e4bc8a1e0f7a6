package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// testSite returns a site with n clients, whose configs tests read.
func testSite(t *testing.T, n int) *site {
	s := &site{
		Dir: t.TempDir(), Listen: "127.0.0.1:8080", TokenURL: "http://127.0.0.1:9000/token",
		Scheme: "http", StaticToken: "static-token",
	}
	for i := range n {
		s.Clients = append(s.Clients, oauthClient{
			Host: fmt.Sprintf("c%d.test", i), ID: fmt.Sprintf("client%d", i), Secret: fmt.Sprintf("secret-of-%d", i),
			Tenant: fmt.Sprintf("tenant%d", i), Upstream: fmt.Sprintf("127.0.0.1:%d", 10000+i),
		})
	}
	return s
}

// testSites returns a site of each kind.
func testSites(t *testing.T) map[string]*site {
	sites := map[string]*site{
		"one client": testSite(t, 1), "clients by host": testSite(t, 250),
		"pool": testSite(t, 100), "pool of one": testSite(t, 1),
		"HTTP/1.1 over TLS": testSite(t, 1), "HTTP/2": testSite(t, 2),
	}
	sites["pool"].Pool, sites["pool of one"].Pool = true, true
	for _, name := range []string{"HTTP/1.1 over TLS", "HTTP/2"} {
		sites[name].Scheme, sites[name].CA = "https", "/tmp/ca.pem"
	}
	sites["HTTP/2"].HTTP2 = true
	return sites
}

// read returns the text of a config that was made of a template.
func (s *site) read(t *testing.T, template string) string {
	t.Helper()
	path, err := s.write(template)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// has fails the test if the text does not have a part just as many times.
func has(t *testing.T, text string, times int, part string) {
	t.Helper()
	if got := strings.Count(text, part); got != times {
		t.Errorf("%d times %q instead of %d times", got, part, times)
	}
}

// onlyIf returns how often a line is there that only some sites have.
func onlyIf(condition bool, n int) int {
	if condition {
		return n
	}
	return 0
}
