// The site as a file, for gateways that read it themselves.

package main

import (
	"encoding/json"
	"os"
)

// writeJSON writes site.json into the site's directory. Its fields have the names that
// they have in Go. It has the secrets of the clients, so nobody else may read it.
func (s *site) writeJSON() (path string, err error) {
	data, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return "", err
	}
	path = s.file("site.json")
	return path, os.WriteFile(path, append(data, '\n'), 0o600)
}
