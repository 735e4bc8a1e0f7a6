// A gateway of the end-to-end tests, with a storage in Redis.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/outboundauth/caddy-outbound-auth"
)

func main() { caddycmd.Main() }
