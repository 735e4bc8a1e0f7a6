// Command caddy is Caddy with its standard modules and this module. You can try
// the module with it from a checkout, and the Dockerfile puts it into an image.
// If you need other modules, too, build Caddy with xcaddy.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/outboundauth/caddy-outbound-auth"
)

func main() {
	caddycmd.Main()
}
