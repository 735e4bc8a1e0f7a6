package outboundauth

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

// clientSettings are what no client can do without.
const clientSettings = "token_url https://auth.example.com/token\nclient_id gateway\nclient_secret secret\n"

// proxyConfig is a Caddyfile with one reverse_proxy.
func proxyConfig(upstreams, settings string) string {
	return fmt.Sprintf("http://localhost:8080 {\n reverse_proxy %s {\n transport oauth2 {\n %s\n }\n }\n}\n", upstreams, settings)
}

// adaptCaddyfile turns a Caddyfile into a config that leaves nothing behind.
func adaptCaddyfile(t *testing.T, source string) *caddy.Config {
	t.Helper()
	adapted, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(source), nil)
	if err != nil {
		t.Fatalf("got %v, want that this adapts:\n%s", err, source)
	}
	config := new(caddy.Config)
	if err := caddy.StrictUnmarshalJSON(adapted, config); err != nil {
		t.Fatal(err)
	}
	config.Admin = &caddy.AdminConfig{Disabled: true, Config: &caddy.ConfigSettings{Persist: new(bool)}}
	config.StorageRaw = encode(t, map[string]string{"module": "file_system", "root": t.TempDir()})
	return config
}

// validateCaddyfile does what `caddy validate` does.
func validateCaddyfile(t *testing.T, source string) error {
	t.Helper()
	return caddy.Validate(adaptCaddyfile(t, source))
}

// loadTransport loads a transport from JSON as part of a reverse proxy.
// Cleaning up unloads it, earlier than at the end of the test if need be.
func loadTransport(t *testing.T, dial string, settings any) (transport *Transport, cleanUp func(), err error) {
	t.Helper()
	var config map[string]any
	if err := json.Unmarshal(encode(t, settings), &config); err != nil {
		t.Fatal(err)
	}
	config["protocol"] = "oauth2"
	return loadProxy(t, encode(t, map[string]any{"upstreams": []any{map[string]any{"dial": dial}}, "transport": config}))
}

// loadProxy provisions a reverse_proxy handler, and returns its transport.
func loadProxy(t *testing.T, proxy []byte) (transport *Transport, cleanUp func(), err error) {
	t.Helper()
	base, err := caddy.ProvisionContext(new(caddy.Config))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := caddy.NewContext(base)
	t.Cleanup(func() { cancel(); endAfterlives() })
	loaded, err := ctx.LoadModuleByID("http.handlers.reverse_proxy", proxy)
	if err != nil {
		return nil, cancel, err
	}
	return loaded.(*reverseproxy.Handler).Transport.(*Transport), cancel, nil
}

// loadSettings is loadTransport for settings as the Caddyfile has them.
func loadSettings(t *testing.T, dial, settings string) (transport *Transport, cleanUp func(), err error) {
	t.Helper()
	config := encode(t, adaptCaddyfile(t, proxyConfig(dial, settings)))
	return loadTransport(t, dial, findModules(t, config, "handler", "reverse_proxy")[0]["transport"])
}

// findModules returns the objects of a config whose key has the value, such
// as the handlers called reverse_proxy.
func findModules(t *testing.T, config []byte, key, value string) []map[string]any {
	t.Helper()
	var v any
	if err := json.Unmarshal(config, &v); err != nil {
		t.Fatal(err)
	}
	var found []map[string]any
	walkObjects(v, func(object map[string]any) {
		if object[key] == value {
			found = append(found, object)
		}
	})
	return found
}

// walkObjects visits all objects in decoded JSON, the outer ones first.
func walkObjects(v any, visit func(map[string]any)) {
	switch v := v.(type) {
	case []any:
		for _, element := range v {
			walkObjects(element, visit)
		}
	case map[string]any:
		visit(v)
		for _, key := range slices.Sorted(maps.Keys(v)) {
			walkObjects(v[key], visit)
		}
	}
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	encoded, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return encoded
}
