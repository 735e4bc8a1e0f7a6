// Command caddy is Caddy with its standard modules and this one, for trying it
// from a checkout, and for the image of the Dockerfile. For other modules beside
// it, build with xcaddy.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/outboundauth/caddy-outbound-auth"
)

func main() {
	caddycmd.Main()
}
