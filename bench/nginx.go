// nginx with Lua, from Debian's packages.

package main

import (
	"context"
	"os/exec"
	"strings"
)

// nginx returns nginx with its Lua module. A shared dictionary keeps the tokens, and a
// timer renews each of them before its end.
func nginx() candidate {
	return candidate{
		name: "nginx + Lua",
		version: func(ctx context.Context) (string, error) {
			err := installed("nginx libnginx-mod-http-lua lua-cjson",
				"/usr/sbin/nginx", "/usr/lib/nginx/modules/ngx_http_lua_module.so", "/usr/lib/*/lua/5.1/cjson.so")
			if err != nil {
				return "", err
			}
			out, err := exec.CommandContext(ctx, "/usr/sbin/nginx", "-v").CombinedOutput()
			if err != nil {
				return "", err
			}
			// nginx version: nginx/1.22.1
			_, version, _ := strings.Cut(strings.TrimSpace(string(out)), ": ")
			return version, nil
		},
		command: func(s *site) ([]string, error) {
			if _, err := s.write("nginx.lua"); err != nil {
				return nil, err
			}
			conf, err := s.write("nginx.conf")
			if err != nil {
				return nil, err
			}
			// Without -e, nginx would open /var/log/nginx/error.log before it reads the file.
			return []string{"/usr/sbin/nginx", "-e", s.file("nginx.log"), "-c", conf}, nil
		},
		lacks: func(s *site) string {
			if s.HTTP2 {
				return "no HTTP/2 to upstreams"
			}
			return ""
		},
	}
}
