package layers

import (
	"os"
	"path"
	"strings"
	"testing"

	"golang.org/x/tools/go/packages"
)

// TestWalls checks what lies behind walls, in internal/: each room is on the map,
// and knows neither Caddy nor the files above, not by way of others either. What
// only tests share is in no program.
func TestWalls(t *testing.T) {
	const module = "github.com/outboundauth/caddy-outbound-auth"
	contributing, err := os.ReadFile("../CONTRIBUTING.md")
	if err != nil {
		t.Fatal(err)
	}
	config := &packages.Config{Dir: "..", Mode: packages.NeedName | packages.NeedImports | packages.NeedDeps}
	rooms, err := packages.Load(config, "./internal/...")
	if err != nil || len(rooms) == 0 {
		t.Fatalf("got no rooms (%v), want some", err)
	}
	for _, room := range rooms {
		name := "internal/" + path.Base(room.PkgPath) + "/"
		if !strings.Contains(string(contributing), "`"+name+"`") {
			t.Errorf("%s: is not on the map: add it to the last line of the table in CONTRIBUTING.md", name)
		}
		packages.Visit([]*packages.Package{room}, nil, func(p *packages.Package) {
			if p.PkgPath == module || strings.HasPrefix(p.PkgPath, "github.com/caddyserver/") {
				t.Errorf("%s: needs %s, which belongs above: keep it out", name, p.PkgPath)
			}
		})
	}
	programs, err := packages.Load(config, "./cmd/...")
	if err != nil || len(programs) == 0 {
		t.Fatalf("got no programs (%v), want some", err)
	}
	packages.Visit(programs, nil, func(p *packages.Package) {
		if strings.HasPrefix(p.PkgPath, module) && strings.HasSuffix(p.PkgPath, "test") {
			t.Errorf("%s: is part of the program, want it in tests only", p.PkgPath)
		}
	})
}
