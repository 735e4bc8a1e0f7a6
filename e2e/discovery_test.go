package e2e

import (
	"maps"
	"slices"
	"testing"
	"time"
)

// TestDiscovery finds the token endpoint by the issuer alone, where RFC 8414
// puts the metadata and where OpenID Connect does. That is one request for
// metadata, however many tokens follow.
func TestDiscovery(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	key := newKey(t, "ES256")
	file := writeFile(t, "key.pem", pkcs8(t, key))

	const (
		rfc8414 = "/.well-known/oauth-authorization-server"
		openid  = "/.well-known/openid-configuration"
	)
	tests := []struct {
		name  string
		path  string         // of the issuer
		asked map[string]int // how often for what
	}{
		{"without a path", "", map[string]int{rfc8414: 1, "/token": 2}},
		{"inserted", "/rfc8414", map[string]int{rfc8414 + "/rfc8414": 1, "/rfc8414/token": 2}},
		{"appended", "/oidc", map[string]int{rfc8414 + "/oidc": 1, "/oidc" + openid: 1, "/oidc/token": 2}},
	}
	var (
		routes    []route
		upstreams []*upstream
	)
	for _, tt := range tests {
		c := client{ID: tt.name, Method: "private_key_jwt", Keys: keySet(key, "")}
		as.register(t, c)
		u := newUpstream(t, as, c)
		u.verifier.issuer = as.issuer + tt.path
		upstreams = append(upstreams, u)
		routes = append(routes, route{
			client: c, to: u.serve(t),
			settings: []string{"issuer " + as.issuer + tt.path, "private_key " + file},
		})
	}
	before := as.stats(t).Paths
	gw := startRoutes(t, routes)
	want := maps.Clone(before)
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			gw.get(t, routePath(i), 200)
			upstreams[i].revoke()
			gw.get(t, routePath(i), 200)
			upstreams[i].wantAccepted(t, 2, "HTTP/1.1")

			// rfc7523bis: the issuer and nobody else, and a type of its own.
			used := as.stats(t).Assertions[tt.name]
			if used.Claims.Audience != as.issuer+tt.path || used.Header.Type != "client-authentication+jwt" {
				t.Errorf("assertion = %+v, want one for %s, of the type client-authentication+jwt", used, as.issuer+tt.path)
			}
		})
		for path, n := range tt.asked {
			want[path] += n
		}
	}
	if got := as.stats(t).Paths; !maps.Equal(got, want) {
		t.Errorf("server was asked for %v, want %v", got, want)
	}
}

// TestDiscoveryIsLazy starts a gateway while the issuer is unreachable, and
// checks a config, for which nobody is to be asked.
func TestDiscoveryIsLazy(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	r := route{client: c, to: u.serve(t), settings: []string{
		"issuer http://" + heldAddress(t), "client_secret {env.E2E_SECRET}",
	}}
	gw := startRoutes(t, []route{r}, "E2E_SECRET="+c.Secret)
	gw.get(t, routePath(0), 503)

	before := as.stats(t).Paths
	r.settings[0] = "issuer " + as.issuer
	validate := gw.command("validate", gw.writeCaddyfile(t, r.String()))
	validate.Env = gw.cmd.Env
	if out, err := validate.CombinedOutput(); err != nil {
		t.Errorf("caddy validate: %v\n%s", err, out)
	}
	if after := as.stats(t).Paths; !maps.Equal(after, before) {
		t.Errorf("caddy validate made requests: %v before, %v after", before, after)
	}
}

// TestUnsupportedMethodIsNamed has the client authenticate in a way that the
// server's metadata doesn't list.
func TestUnsupportedMethodIsNamed(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	gw := startRoutes(t, []route{{
		client: c, to: u.serve(t),
		settings: []string{"issuer " + as.issuer + "/oidc", "client_secret {env.E2E_SECRET}"},
	}}, "E2E_SECRET="+c.Secret)
	gw.get(t, routePath(0), 503)
	got := gw.warnings(t, c)
	if !slices.ContainsFunc(got, func(text string) bool {
		return names(text, "auth_method") && names(text, "private_key_jwt")
	}) {
		t.Errorf("warnings = %q, want one that names auth_method and private_key_jwt", got)
	}
}
