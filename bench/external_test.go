package main

import (
	"encoding/json"
	"flag"
	"io"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
)

func TestExternalCommand(t *testing.T) {
	var others externals
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	flags.Var(&others, "external", "")
	err := flags.Parse([]string{
		"-external", "A=echo {{.Listen}} {{.Client.Secret}}",
		"-external", "B = cat {{.Dir}}/site.json",
	})
	if err != nil {
		t.Fatal(err)
	}
	if names := others.String(); names != "A, B" {
		t.Errorf("the candidates are %s", names)
	}
	s := testSite(t, 2)
	run := func(c candidate) string {
		command, err := c.command(s)
		if err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).Output()
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	if out := run(others[0]); out != "127.0.0.1:8080 secret-of-0\n" {
		t.Errorf("the template became %q", out)
	}
	got := new(site)
	if err := json.Unmarshal([]byte(run(others[1])), got); err != nil || !reflect.DeepEqual(got, s) {
		t.Errorf("the command read %+v, %v from site.json", got, err)
	}
	if info, err := os.Stat(s.file("site.json")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("site.json has secrets, but is readable by others: %v, %v", info, err)
	}
}

func TestExternalMistakes(t *testing.T) {
	for value, want := range map[string]string{
		"krakend run":        "invalid value \"krakend run\" for flag -external: write it as name=command",
		"=krakend run":       "write it as name=command",
		"KrakenD=":           "write it as name=command",
		"KrakenD=run {{.Dir": "the command of KrakenD: template: command:1: unclosed action",
		"KrakenD={{.Port}}":  "the command of KrakenD: template: command:1:2: executing \"command\" at <.Port>: can't evaluate field Port",
	} {
		var others externals
		flags := flag.NewFlagSet("", flag.ContinueOnError)
		flags.SetOutput(io.Discard)
		flags.Var(&others, "external", "")
		err := flags.Parse([]string{"-external", value})
		if err == nil || !strings.Contains(err.Error(), want) || len(others) != 0 {
			t.Errorf("-external %q: %v; want an error with %q", value, err, want)
		}
	}
}
