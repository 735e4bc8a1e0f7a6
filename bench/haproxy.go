// HAProxy with Lua, from Debian's packages.

package main

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
)

// haproxy returns HAProxy. A Lua task gets each client's tokens, and keeps them in a map,
// where HAProxy's rules look them up without Lua.
func haproxy() candidate {
	return candidate{
		name: "HAProxy + Lua",
		version: func(ctx context.Context) (string, error) {
			if err := installed("haproxy lua-cjson", "/usr/sbin/haproxy", "/usr/lib/*/lua/5.3/cjson.so"); err != nil {
				return "", err
			}
			out, err := exec.CommandContext(ctx, "/usr/sbin/haproxy", "-v").Output()
			if err != nil {
				return "", err
			}
			// HAProxy version 2.6.12-1+deb12u4 2026/10/17 - https://haproxy.org/
			fields := strings.Fields(string(out))
			if len(fields) < 3 {
				return "", fmt.Errorf("haproxy -v says %q, without a version", out)
			}
			return "HAProxy " + fields[2], nil
		},
		command: func(s *site) ([]string, error) {
			for _, name := range []string{"haproxy.lua", "haproxy-hosts.map", "haproxy-tenants.map", "haproxy-tokens.map"} {
				if _, err := s.write(name); err != nil {
					return nil, err
				}
			}
			cfg, err := s.write("haproxy.cfg")
			if err != nil {
				return nil, err
			}
			return []string{"/usr/sbin/haproxy", "-db", "-f", cfg}, nil
		},
	}
}
