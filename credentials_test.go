package outboundauth

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// baseCredentials and otherCredentials set everything, to different values.
var baseCredentials = Credentials{
	TokenURL:            "https://auth.example.com/token",
	ClientID:            "gateway",
	ClientSecret:        "{env.CLIENT_SECRET}",
	AuthMethod:          authBasic,
	Scopes:              []string{"orders.read", "orders.write"},
	Audience:            []string{"https://orders.example.com"},
	Params:              map[string]string{"organization": "acme"},
	TokenRequestHeaders: map[string]string{"X-Api-Version": "2"},
	TokenTimeout:        caddy.Duration(5 * time.Second),
	TokenTransport:      &reverseproxy.HTTPTransport{DialTimeout: caddy.Duration(time.Second)},
	Tenant:              &Tenant{Value: "acme"},
	Headers:             map[string]string{"X-Region": "eu"},
	BearerHeader:        &BearerHeader{Field: "X-Access-Token"},
	RefreshBefore:       caddy.Duration(time.Minute),
	DefaultLifetime:     caddy.Duration(time.Hour),
	RetryOn:             []int{401, 403},
	ReplayBody:          4096,
}

var otherCredentials = Credentials{
	TokenURL:            "https://login.example.com/token",
	ClientID:            "billing",
	ClientSecret:        "{env.BILLING_SECRET}",
	AuthMethod:          authPost,
	Scopes:              []string{"billing.read"},
	Audience:            []string{"https://billing.example.com"},
	Params:              map[string]string{"organization": "globex"},
	TokenRequestHeaders: map[string]string{"X-Api-Version": "3"},
	TokenTimeout:        caddy.Duration(7 * time.Second),
	TokenTransport:      &reverseproxy.HTTPTransport{DialTimeout: caddy.Duration(2 * time.Second)},
	Tenant:              &Tenant{Field: "X-Organization", Value: "globex"},
	Headers:             map[string]string{"X-Region": "us"},
	BearerHeader:        &BearerHeader{Field: "X-Token"},
	RefreshBefore:       caddy.Duration(2 * time.Minute),
	DefaultLifetime:     caddy.Duration(2 * time.Hour),
	RetryOn:             []int{retryOff},
	ReplayBody:          replayNoBody,
}

// eachSetting calls f for each field of Credentials, by its name in JSON.
func eachSetting(t *testing.T, f func(t *testing.T, field int)) {
	t.Helper()
	typ := reflect.TypeFor[Credentials]()
	for i := range typ.NumField() {
		name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
		t.Run(name, func(t *testing.T) {
			for _, c := range []Credentials{baseCredentials, otherCredentials} {
				if reflect.ValueOf(c).Field(i).IsZero() {
					t.Fatal("got no value to test with, want one in baseCredentials and otherCredentials")
				}
			}
			f(t, i)
		})
	}
}

func TestEverySettingIsInherited(t *testing.T) {
	eachSetting(t, func(t *testing.T, field int) {
		var own, base Credentials
		value := reflect.ValueOf(baseCredentials).Field(field)
		reflect.ValueOf(&base).Elem().Field(field).Set(value)

		got := reflect.ValueOf(own.inherit(&base)).Field(field).Interface()
		if want := value.Interface(); !reflect.DeepEqual(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	})
}

func TestEverySettingOverridesWhatIsInherited(t *testing.T) {
	eachSetting(t, func(t *testing.T, field int) {
		var own Credentials
		value := reflect.ValueOf(otherCredentials).Field(field)
		reflect.ValueOf(&own).Elem().Field(field).Set(value)
		base := baseCredentials

		merged := own.inherit(&base)
		for i := range reflect.TypeFor[Credentials]().NumField() {
			want := reflect.ValueOf(baseCredentials).Field(i).Interface()
			if i == field {
				want = value.Interface()
			}
			if got := reflect.ValueOf(merged).Field(i).Interface(); !reflect.DeepEqual(got, want) {
				t.Errorf("%s: got %v, want %v", reflect.TypeFor[Credentials]().Field(i).Name, got, want)
			}
		}
		if !reflect.DeepEqual(base, baseCredentials) {
			t.Errorf("got %+v, want that what is inherited from stays as it was", base)
		}
	})
}

func TestInheritance(t *testing.T) {
	for _, test := range []struct{ name, base, own, want string }{
		{"nothing to inherit from", `null`, `{"client_id":"a"}`, `{"client_id":"a"}`},
		{"lists are replaced", `{"scopes":["a","b"],"audience":["a","b"],"retry_on":[401,403]}`, `{"scopes":["c"],"audience":["c"],"retry_on":[-1]}`, `{"scopes":["c"],"audience":["c"],"retry_on":[-1]}`},
		{"objects are replaced", `{"tenant":{"field":"X-Organization","value":"a"},"bearer_header":{"field":"X-Token","scheme":""}}`, `{"tenant":{"value":"b"},"bearer_header":{"field":"X-Auth"}}`, `{"tenant":{"value":"b"},"bearer_header":{"field":"X-Auth"}}`},
		{"token_transport is replaced", `{"token_transport":{"dial_timeout":1,"tls":{}}}`, `{"token_transport":{"read_timeout":2}}`, `{"token_transport":{"read_timeout":2}}`},
		{"named values are merged", `{"param":{"a":"1","b":"1"},"token_request_header":{"A":"1","B":"1"},"header":{"A":"1","B":"1"}}`, `{"param":{"b":"2","c":"2"},"token_request_header":{"B":"2","C":"2"},"header":{"B":"2","C":"2"}}`, `{"param":{"a":"1","b":"2","c":"2"},"token_request_header":{"A":"1","B":"2","C":"2"},"header":{"A":"1","B":"2","C":"2"}}`},
		{"auth_method none drops the secret", `{"client_id":"a","client_secret":"s"}`, `{"auth_method":"none"}`, `{"client_id":"a","auth_method":"none"}`},
		{"an inherited auth_method none drops the secret", `{"client_secret":"s","auth_method":"none"}`, `{"client_id":"a"}`, `{"client_id":"a","auth_method":"none"}`},
		{"a method takes the place of none", `{"client_secret":"s","auth_method":"none"}`, `{"auth_method":"client_secret_post"}`, `{"client_secret":"s","auth_method":"client_secret_post"}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			var base *Credentials
			var own, want Credentials
			for _, decode := range []struct {
				source string
				target any
			}{{test.base, &base}, {test.own, &own}, {test.want, &want}} {
				if err := json.Unmarshal([]byte(decode.source), decode.target); err != nil {
					t.Fatal(err)
				}
			}
			got := own.inherit(base)
			if got, want := string(encode(t, got)), string(encode(t, want)); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
			if got, want := sortKeys(t, encode(t, base)), sortKeys(t, []byte(test.base)); !slices.Equal(got, want) {
				t.Errorf("got base %s, want %s as before", got, want)
			}
		})
	}
}

// Two spellings of one header would be sent in an order that nobody chose.
func TestInheritedHeadersAreOverriddenInAnyCase(t *testing.T) {
	load := func(t *testing.T, setting, base, own string) *client {
		t.Helper()
		credentials := map[string]any{"token_url": "https://auth.example.com/token", "client_id": "gateway", "client_secret": "secret"}
		credentials[setting] = map[string]string{base: "base"}
		transport, _, err := loadTransport(t, "127.0.0.1:9000", map[string]any{
			"credentials": credentials,
			"upstreams":   []any{map[string]any{"addresses": []string{"127.0.0.1:9000"}, setting: map[string]string{own: "own"}}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return transport.clients[dialAddress{"tcp", "127.0.0.1:9000"}]
	}
	for _, names := range [][2]string{{"X-Region", "X-Region"}, {"X-Region", "x-region"}, {"x-region", "X-Region"}} {
		t.Run("header "+names[0]+" "+names[1], func(t *testing.T) {
			got := load(t, "header", names[0], names[1]).identity
			if len(got) != 1 || got[0].template != "own" {
				t.Errorf("got %v, want that of the upstream alone", got)
			}
		})
		t.Run("token_request_header "+names[0]+" "+names[1], func(t *testing.T) {
			got := load(t, "token_request_header", names[0], names[1]).endpoint.headers
			if values := slices.Collect(maps.Values(got)); !slices.Equal(values, []string{"own"}) {
				t.Errorf("got %v, want that of the upstream alone", got)
			}
		})
	}
}

// loadCredentials loads transports with credentials a and b, and returns their
// clients.
func loadCredentials(t *testing.T, a, b Credentials) (first, second *client) {
	t.Helper()
	var clients []*client
	for _, c := range []Credentials{a, b} {
		transport, _, err := loadTransport(t, "127.0.0.1:9000", map[string]any{"credentials": c})
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, transport.fallback)
	}
	return clients[0], clients[1]
}

func TestWhatShapesTheTokenRequestTellsSourcesApart(t *testing.T) {
	onlyForTheUpstream := []string{"tenant", "header", "bearer_header", "retry_on", "replay_body"}
	eachSetting(t, func(t *testing.T, field int) {
		changed := baseCredentials
		reflect.ValueOf(&changed).Elem().Field(field).Set(reflect.ValueOf(otherCredentials).Field(field))

		a, b := loadCredentials(t, baseCredentials, changed)
		_, setting, _ := strings.Cut(t.Name(), "/")
		if got, want := a.source == b.source, slices.Contains(onlyForTheUpstream, setting); got != want {
			t.Errorf("got a shared source: %v, want %v", got, want)
		}
	})
}

func TestDifferentSpellingsOfOneClientShareASource(t *testing.T) {
	t.Setenv("TEST_CLIENT_ID", baseCredentials.ClientID)
	t.Setenv("TEST_SCOPES", strings.Join(baseCredentials.Scopes, " "))
	for _, test := range []struct {
		name          string
		base, changed func(*Credentials)
	}{
		{"equal", nil, nil},
		{"the default auth_method", nil, func(c *Credentials) { c.AuthMethod = "" }},
		{"an empty token_transport", func(c *Credentials) { c.TokenTransport = nil }, func(c *Credentials) { c.TokenTransport = new(reverseproxy.HTTPTransport) }},
		{"the default token_timeout", func(c *Credentials) { c.TokenTimeout = 0 }, func(c *Credentials) { c.TokenTimeout = caddy.Duration(10 * time.Second) }},
		{"the default default_lifetime", func(c *Credentials) { c.DefaultLifetime = 0 }, func(c *Credentials) { c.DefaultLifetime = caddy.Duration(5 * time.Minute) }},
		{"client_id from the environment", nil, func(c *Credentials) { c.ClientID = "{env.TEST_CLIENT_ID}" }},
		{"scopes from the environment", nil, func(c *Credentials) { c.Scopes = []string{"{env.TEST_SCOPES}"} }},
	} {
		t.Run(test.name, func(t *testing.T) {
			base, changed := baseCredentials, baseCredentials
			if test.base != nil {
				test.base(&base)
			}
			if test.changed != nil {
				test.changed(&changed)
			}
			a, b := loadCredentials(t, base, changed)
			if a.source != b.source {
				t.Error("got two sources, want one")
			}
		})
	}
}

// Values that stand next to each other must not run into one another.
func TestNeighbouringValuesTellSourcesApart(t *testing.T) {
	a, b := baseCredentials, baseCredentials
	a.Audience, b.Audience = []string{"a", "b"}, []string{"a b"}
	if a, b := loadCredentials(t, a, b); a.source == b.source {
		t.Error("got one source, want one for each")
	}
}

func references(cl *client) int {
	n, _ := sources.References(cl.key)
	return n
}

func TestCleanupReleasesWhatWasAcquired(t *testing.T) {
	settings := "token_url https://auth.example.com/token\nclient_id " + t.Name() + "\nclient_secret secret\n"
	first, cleanUpFirst, err := loadSettings(t, "127.0.0.1:9000", settings)
	if err != nil {
		t.Fatal(err)
	}
	cl := first.fallback
	if got := references(cl); got != 1 {
		t.Fatalf("got %d references, want 1", got)
	}
	// The upstream's tenant is another, its token the same.
	_, cleanUpSecond, err := loadSettings(t, "127.0.0.1:9000", settings+"upstream 127.0.0.1:9000 {\n tenant acme\n}")
	if err != nil {
		t.Fatal(err)
	}
	if got := references(cl); got != 3 {
		t.Errorf("got %d references, want 3", got)
	}
	cleanUpSecond()
	if got := references(cl); got != 1 {
		t.Errorf("got %d references after one of two has ended, want 1", got)
	}
	cleanUpFirst()
	if _, ok := sources.References(cl.key); ok {
		t.Error("got a source after all have ended, want none")
	}
	if err := first.Cleanup(); err != nil {
		t.Errorf("got %v from a second Cleanup, want nil", err)
	}
}

func TestFailedProvisionReleasesWhatWasAcquired(t *testing.T) {
	settings := "token_url https://auth.example.com/token\nclient_id " + t.Name() + "\nclient_secret secret\n"
	held, _, err := loadSettings(t, "127.0.0.1:9000", settings)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, settings, want string }{
		{"before anything was acquired", settings + "versions 4", "unsupported HTTP version"},
		{"in the http transport of the tokens", settings + "token_transport {\n versions 4\n}", "token_transport"},
		{"in an upstream block", settings + "upstream 127.0.0.1:9000 {\n client_id {env.TEST_UNSET}\n}", "is empty"},
		{"in an address", settings + "upstream 127.0.0.1:9000 127.0.0.1:9000 {\n tenant acme\n}", "named twice"},
		{"when all was acquired", settings + "upstream 127.0.0.1:9009 {\n tenant acme\n}", "no such upstream"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, cleanUp, err := loadSettings(t, "127.0.0.1:9000", test.settings)
			wantError(t, err, test.want)
			cleanUp()
			if got := references(held.fallback); got != 1 {
				t.Errorf("got %d references, want 1 of the transport that is in use", got)
			}
		})
	}
}

func TestCaddyfileAndJSONHaveTheSameDefaults(t *testing.T) {
	fromCaddyfile, _, err := loadSettings(t, "127.0.0.1:9000", clientSettings)
	if err != nil {
		t.Fatal(err)
	}
	explicit := map[string]any{
		"token_url": "https://auth.example.com/token", "client_id": "gateway", "client_secret": "secret",
		"auth_method": "client_secret_basic", "token_timeout": "10s", "default_lifetime": "5m",
		"bearer_header": map[string]string{"field": "Authorization", "scheme": "Bearer"},
		"retry_on":      []int{401}, "replay_body": 65536, "token_transport": map[string]any{},
	}
	implicit := maps.Clone(explicit)
	maps.DeleteFunc(implicit, func(name string, _ any) bool { return !strings.Contains(clientSettings, name) })
	for name, credentials := range map[string]map[string]any{"explicit": explicit, "implicit": implicit} {
		transport, _, err := loadTransport(t, "127.0.0.1:9000", map[string]any{"credentials": credentials})
		if err != nil {
			t.Fatal(err)
		}
		got, want := transport.fallback, fromCaddyfile.fallback
		if got.source != want.source {
			t.Errorf("%s: got another source, want that of the Caddyfile", name)
		}
		if got.bearerField != want.bearerField || got.bearerPrefix != want.bearerPrefix {
			t.Errorf("%s: got header %q %q, want %q %q", name, got.bearerField, got.bearerPrefix, want.bearerField, want.bearerPrefix)
		}
		if !slices.Equal(got.retryOn, want.retryOn) || got.replayLimit != want.replayLimit {
			t.Errorf("%s: got %v, %d, want %v, %d", name, got.retryOn, got.replayLimit, want.retryOn, want.replayLimit)
		}
	}
	got := fromCaddyfile.fallback.source.lifecycle
	if want := (lifecycle{defaultLifetime: 5 * time.Minute, fetchTimeout: 10 * time.Second}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
