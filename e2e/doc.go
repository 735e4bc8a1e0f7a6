// Package e2e tests the gateway from outside: the built Caddy as a process of
// its own, between clients and upstreams that run in the test, with a real
// authorization server behind it. It imports neither Caddy nor the module.
package e2e
