package outboundauth

import (
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
)

func TestTokenAndTenantReachTheUpstream(t *testing.T) {
	g, auth, up := gateAndFakes(t, "tenant acme\nheader X-Region eu")
	r := g.send(http.MethodPost, "/path?q=1", strings.NewReader("body"), "X-Other", "kept").want(t, http.StatusOK)
	if r.body != "accepted" {
		t.Errorf("got %q, want the upstream's answer", r.body)
	}
	got := up.last(t)
	if client := got.bearerOf(auth); client != "gateway" {
		t.Errorf("got the token of %q, want that of gateway", client)
	}
	got.wantHeader(t, "X-Tenant-Id", "acme")
	got.wantHeader(t, "X-Region", "eu")
	got.wantHeader(t, "X-Other", "kept")
	if got.method != http.MethodPost || got.path != "/path" || got.body != "body" {
		t.Errorf("got %s %s %q, want POST /path with the body", got.method, got.path, got.body)
	}
	if r.header.Get("Authorization")+r.header.Get("X-Tenant-Id") != "" {
		t.Errorf("got %v at the client, want none of what the upstream is sent", r.header)
	}
}

// clientsOwn is what a client sends to pass for somebody else.
var clientsOwn = []string{
	"Authorization", "Bearer client-own", "authorization", "Bearer client-own-2",
	"X-Tenant-Id", "client-own", "x-tenant-id", "client-own-2", "X-TENANT-ID", "client-own-3",
	"X_Tenant_Id", "client-own-4", "x_tenant_id", "client-own-5", "X.Tenant.Id", "client-own-6", "x_tenant.id", "client-own-7",
	"X-User", "client-own-8", "x_user", "client-own-9", "X.USER", "client-own-10",
	"X-Api-Token", "client-own-11", "x_api.token", "client-own-12",
}

func TestClientsOwnIdentityNeverReachesTheUpstream(t *testing.T) {
	for _, test := range []struct {
		name, settings string
		global         string
		want           map[string]string // of what was in clientsOwn
	}{
		{"replaced", "tenant acme\nheader X-User someone", "", map[string]string{"X-Tenant-Id": "acme", "X-User": "someone", "Authorization": "*"}},
		// Otherwise Caddy drops such names by itself.
		{
			"aliases pass the server", "tenant acme\nheader X-User someone",
			"servers {\nexpected_underscore_headers X_tenant_id X_user x_tenant_id x_user\nexpected_dot_headers X.tenant.id X.user\n}",
			map[string]string{"X-Tenant-Id": "acme", "X-User": "someone", "Authorization": "*"},
		},
		{"tenant is empty", "tenant {http.request.header.X-None}\nheader X-User {http.request.header.X-None}", "", map[string]string{"Authorization": "*"}},
		{"no tenant", "header X-User someone", "", map[string]string{"X-User": "someone", "Authorization": "*"}},
		{"another field for the tenant", "tenant X-User someone", "", map[string]string{"X-User": "someone", "Authorization": "*"}},
		{"another field for the token", "bearer_header X-Api-Token\nheader X-User someone", "", map[string]string{"X-User": "someone", "X-Api-Token": "*"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			auth := newAuthServer(t)
			up := newUpstream(t, nil)
			g := newGateway(t)
			g.global = test.global
			g.load(proxySite(up, auth, test.settings))
			own := clientsOwn
			if !strings.Contains(test.settings, "X-Api-Token") {
				own = own[:len(own)-4] // then the name is nothing special
			}
			if !strings.Contains(test.settings, "X-User") {
				t.Fatal("got no X-User in the settings, want it: it is in what the client sends")
			}
			g.get(own...).want(t, http.StatusOK)
			wantIdentity(t, up.last(t), test.want)
		})
	}
}

// wantIdentity compares the headers that clientsOwn has. "*": any value.
func wantIdentity(t *testing.T, got received, want map[string]string) {
	t.Helper()
	var known fieldSet
	for i := 0; i < len(clientsOwn); i += 2 {
		known.add(clientsOwn[i])
	}
	have := make(map[string]string)
	for field, values := range got.header {
		value := strings.Join(values, " | ")
		if strings.Contains(value, "client-own") {
			t.Errorf("%s: got %q, want nothing that the client sent", field, value)
		}
		if known.has(field) {
			if want[field] == "*" && strings.Contains(value, "canary-token") {
				value = "*"
			}
			have[field] = value
		}
	}
	if !reflect.DeepEqual(have, want) {
		t.Errorf("got %v, want %v", have, want)
	}
}

// Past Caddy's server, all aliases arrive at the transport.
func TestTransportRemovesAllAliases(t *testing.T) {
	auth := newAuthServer(t)
	up, other := newUpstream(t, nil), newUpstream(t, nil)
	transport := newTransport(t, expand(`token_url $AUTH/token
		client_id gateway
		client_secret s
		header X-User someone
		upstream $UP {
			bearer_header Authorization
		}
		upstream $OTHER {
			bearer_header X-Api-Token
		}`, "$AUTH", auth.URL, "$UP", up.addr, "$OTHER", other.addr))
	for _, u := range []*upstream{up, other} {
		req := httptest.NewRequest(http.MethodGet, "http://gateway.test/", nil)
		for i := 0; i < len(clientsOwn); i += 2 {
			req.Header[clientsOwn[i]] = []string{clientsOwn[i+1]}
		}
		if _, err := proxyThrough(t, transport, u.addr, req); err != nil {
			t.Fatal(err)
		}
	}
	// X-Api-Token counts at both: it is a name that this transport vouches for.
	wantIdentity(t, up.last(t), map[string]string{"X-User": "someone", "Authorization": "*"})
	wantIdentity(t, other.last(t), map[string]string{"X-User": "someone", "X-Api-Token": "*"})
}

func TestUpstreamThatIsOffGetsTheRequestAsItIs(t *testing.T) {
	auth := newAuthServer(t)
	up, off := newUpstream(t, auth), newUpstream(t, nil)
	g := startGateway(t, expand(`reverse_proxy /off $OFF {
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret s
			tenant acme
			upstream $OFF off
		}
	}
	reverse_proxy $UP {
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret s
		}
	}`, "$OFF", off.addr, "$UP", up.addr, "$AUTH", auth.URL))
	g.send(http.MethodGet, "/off", nil, "Authorization", "Bearer client-own", "X-Tenant-Id", "client-own").want(t, http.StatusOK)
	off.last(t).wantHeader(t, "Authorization", "Bearer client-own")
	off.last(t).wantHeader(t, "X-Tenant-Id", "client-own")
}

func TestTenantOfTheRequest(t *testing.T) {
	t.Setenv("OUTBOUNDAUTH_TEST_CANARY", "canary-env")
	for _, test := range []struct {
		name, settings, path string
		pairs                []string
		status               int
		field, want          string
	}{
		{"header of the client", "tenant {http.request.header.X-Org}", "/", []string{"X-Org", "acme"}, 200, "X-Tenant-Id", "acme"},
		{"header of the client under the tenant's own name", "tenant {http.request.header.X-Tenant-Id}", "/", []string{"X-Tenant-Id", "acme"}, 200, "X-Tenant-Id", "acme"},
		{"label of the host", "tenant {http.request.host.labels.2}", "/", []string{"Host", "acme.gateway.test"}, 200, "X-Tenant-Id", "acme"},
		{"part of a value", "tenant X-Org org-{http.request.uri.query.org}", "/?org=acme", nil, 200, "X-Org", "org-acme"},
		{"another header", "header X-User {http.request.uri.query.user}", "/?user=j%C3%BCrgen", nil, 200, "X-User", "jürgen"},
		{"empty", "tenant {http.request.header.X-Org}", "/", nil, 200, "X-Tenant-Id", ""},
		{"spaces only", "tenant {http.request.uri.query.org}", "/?org=%20%20", nil, 200, "X-Tenant-Id", ""},
		{"a placeholder of the client's", "tenant {http.request.header.X-Org}", "/", []string{"X-Org", "{env.OUTBOUNDAUTH_TEST_CANARY}"}, 200, "X-Tenant-Id", "{env.OUTBOUNDAUTH_TEST_CANARY}"},
		{"global placeholder", "tenant {env.OUTBOUNDAUTH_TEST_CANARY}", "/", nil, 200, "X-Tenant-Id", "canary-env"},
		{"line break", "tenant {http.request.uri.query.org}", "/?org=a%0d%0aX-Injected:%20b", nil, 502, "", ""},
		{"zero byte", "header X-User {http.request.uri.query.org}", "/?org=a%00", nil, 502, "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			g, _, up := gateAndFakes(t, test.settings)
			g.send(http.MethodGet, test.path, nil, test.pairs...).want(t, test.status)
			if test.status != http.StatusOK {
				if got := up.got(); len(got) != 0 {
					t.Errorf("got %v at the upstream, want no request", got)
				}
				return
			}
			up.last(t).wantHeader(t, test.field, test.want)
		})
	}
}

func TestBearerHeader(t *testing.T) {
	for _, test := range []struct {
		setting, field, prefix string
	}{
		{"", "Authorization", "Bearer "},
		{"bearer_header Authorization", "Authorization", "Bearer "},
		{"bearer_header authorization Token", "Authorization", "Token "},
		{"bearer_header X-Api-Token", "X-Api-Token", "Bearer "},
		{"bearer_header x-api-token DPoP-like", "X-Api-Token", "DPoP-like "},
		{`bearer_header X-Api-Token ""`, "X-Api-Token", ""},
	} {
		t.Run(test.setting, func(t *testing.T) {
			auth := newAuthServer(t)
			up := newUpstream(t, nil)
			g := startGateway(t, proxySite(up, auth, test.setting))
			g.get("Authorization", "Bearer client-own", test.field, "client-own").want(t, http.StatusOK)
			got := up.last(t)
			got.wantHeader(t, test.field, test.prefix+"canary-token-1-of-gateway")
			if test.field != "Authorization" {
				got.wantHeader(t, "Authorization", "")
			}
		})
	}
}

// What header_up sets is removed or replaced like what the client sends.
func TestHeaderUpDoesNotOverrideTheIdentity(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := startGateway(t, expand(`reverse_proxy $UP {
		header_up X-Tenant-Id other
		header_up Authorization "Basic other"
		header_up X-Kept value
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret s
			tenant acme
		}
	}`, "$UP", up.addr, "$AUTH", auth.URL))
	g.get().want(t, http.StatusOK)
	up.last(t).wantHeader(t, "X-Tenant-Id", "acme")
	up.last(t).wantHeader(t, "X-Kept", "value")
}
