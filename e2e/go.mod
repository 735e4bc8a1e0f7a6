module github.com/outboundauth/caddy-outbound-auth/e2e

go 1.26.0

require (
	github.com/coder/websocket v1.8.15
	github.com/go-jose/go-jose/v4 v4.1.8
)
