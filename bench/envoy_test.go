package main

import (
	"fmt"
	"testing"
)

func TestEnvoyConfig(t *testing.T) {
	const injector = "name: envoy.filters.http.credential_injector\n"
	for kind, s := range testSites(t) {
		t.Run(kind, func(t *testing.T) {
			gateway, clusters := s.read(t, "envoy.yaml"), s.read(t, "envoy-clusters.yaml")
			n := len(s.Clients)
			has(t, gateway, onlyIf(s.Single(), 1), injector)
			has(t, clusters, onlyIf(!s.Single(), n), injector)
			has(t, gateway, onlyIf(s.Pool, 1), "weighted_clusters:")
			has(t, clusters, onlyIf(s.CA != "", n), `trusted_ca: {filename: "/tmp/ca.pem"}`)
			has(t, clusters, onlyIf(s.HTTP2, n), "http2_protocol_options: {}")
			has(t, clusters, onlyIf(!s.HTTP2, n), " http_protocol_options: {}")
			for i, client := range s.Clients {
				has(t, gateway, 1, client.Secret+`"`)
				has(t, gateway, 1, `{key: X-Tenant, value: "`+client.Tenant+`"}`)
				has(t, gateway, onlyIf(!s.Pool && !s.Single(), 1), `"`+client.Host+`"`)
				has(t, clusters, 1, fmt.Sprintf("port_value: %d}", 10000+i))
			}
		})
	}
}

func TestEnvoyVersion(t *testing.T) {
	const out = "\n/opt/envoy  version: 6eb0d2d97489ec1b/1.39.3/Clean/RELEASE/BoringSSL\n\n"
	if got, err := envoyVersion(out); err != nil || got != "Envoy 1.39.3" {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := envoyVersion("envoy: not found"); err == nil {
		t.Errorf("got the version %q out of an error", got)
	}
}
