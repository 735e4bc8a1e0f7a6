package deploy

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

const (
	unitFile      = "../../examples/systemd/caddy.service"
	unitCaddyfile = "../../examples/systemd/Caddyfile"
)

func TestSystemdUnitIsValid(t *testing.T) {
	// systemd-analyze wants the program to be there.
	unit := replace(t, readFile(t, unitFile), "/usr/bin/caddy", caddyBinary)
	file := writeFile(t, filepath.Join(t.TempDir(), "caddy.service"), unit)
	// A setting that it doesn't know is only a warning to it.
	out, err := exec.Command("systemd-analyze", "verify", file).CombinedOutput()
	if err != nil || len(out) != 0 {
		t.Errorf("got %v, output\n%s\nwant none", err, out)
	}
}

// TestSystemdUnitIsConfined has systemd rate what the service may do, from 0 for
// nothing to 10 for everything. An ordinary service gets 9.6.
func TestSystemdUnitIsConfined(t *testing.T) {
	file, err := filepath.Abs(unitFile)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", file).CombinedOutput()
	if err != nil {
		t.Errorf("got %v, want an exposure of at most 2.0\n%s", err, out)
	}
}

// TestSystemdCaddyfileWorks loads the Caddyfile with the credentials where systemd
// lays them out: below the name of the unit, by the name of the credential.
func TestSystemdCaddyfileWorks(t *testing.T) {
	credential := regexp.MustCompile(`(?m)^LoadCredential=(\w+):`).FindStringSubmatch(readFile(t, unitFile))
	if credential == nil {
		t.Fatal("got a unit without LoadCredential, want it")
	}
	secret := writeFile(t, filepath.Join(t.TempDir(), credential[1]), "a secret of the service\n")
	caddyfile := replace(t, readFile(t, unitCaddyfile), filepath.Join("/run/credentials", filepath.Base(unitFile), credential[1]), secret)
	checkCaddyfile(t, caddyfile)
	// In Basic authentication, secrets are form-encoded (RFC 6749).
	if _, got, _ := tokenRequest(t, caddyfile).BasicAuth(); got != "a+secret+of+the+service" {
		t.Errorf("got secret %q sent to the authorization server, want that of the service", got)
	}
}
