// Gateways that the user names on the command line.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/template"
)

// externals is the flag -external, which may be repeated:
//
//	-external 'KrakenD=./krakend.py {{.Dir}}/site.json > {{.Dir}}/krakend.json && exec krakend run -c {{.Dir}}/krakend.json'
//
// The command is a template that gets the site. A shell runs it. It finds the site in
// the file site.json, too, to make its own configuration. The shell must become the
// gateway with exec: otherwise SIGTERM ends only the shell.
type externals []candidate

// String implements [flag.Value].
func (e *externals) String() string {
	names := make([]string, len(*e))
	for i, c := range *e {
		names[i] = c.name
	}
	return strings.Join(names, ", ")
}

// Set implements [flag.Value].
func (e *externals) Set(value string) error {
	name, text, found := strings.Cut(value, "=")
	name, text = strings.TrimSpace(name), strings.TrimSpace(text)
	if !found || name == "" || text == "" {
		return errors.New("write it as name=command")
	}
	command, err := template.New("command").Parse(text)
	if err != nil {
		return fmt.Errorf("the command of %s: %w", name, err)
	}
	// An unknown field shows only when the template is executed. The user shall see it
	// now, and not in the middle of a run.
	trial := &site{Listen: "127.0.0.1:1", TokenURL: "http://127.0.0.1:1", Clients: []oauthClient{{Upstream: "127.0.0.1:1"}}}
	if err := command.Execute(io.Discard, trial); err != nil {
		return fmt.Errorf("the command of %s: %w", name, err)
	}
	*e = append(*e, external(name, text, command))
	return nil
}

// external lacks nothing: the user knows what the gateway can do.
func external(name, text string, command *template.Template) candidate {
	return candidate{
		name:    name,
		version: func(context.Context) (string, error) { return text, nil },
		command: func(s *site) ([]string, error) {
			if _, err := s.writeJSON(); err != nil {
				return nil, err
			}
			var line bytes.Buffer
			if err := command.Execute(&line, s); err != nil {
				return nil, fmt.Errorf("the command of %s: %w", name, err)
			}
			return []string{"sh", "-c", line.String()}, nil
		},
	}
}
