package outboundauth

import (
	"bytes"
	"encoding/json"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

var update = flag.Bool("update", false, "write what testdata/adapt is compared with")

// errorPosition is what a message needs for its reader to find the line.
var errorPosition = regexp.MustCompile(`, at Caddyfile:[1-9][0-9]*\b`)

// TestAdapt compares with testdata/adapt. Its files have the format of Caddy's
// own: a Caddyfile, a line of dashes, and the JSON that it adapts to. Of those
// named error_*, the second part is contained in the error.
func TestAdapt(t *testing.T) {
	files, err := filepath.Glob("testdata/adapt/*.caddyfiletest")
	if err != nil || len(files) == 0 {
		t.Fatalf("got %d files, err %v, want some", len(files), err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".caddyfiletest")
		t.Run(name, func(t *testing.T) {
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			source, want, ok := strings.Cut(string(content), "----------\n")
			if !ok {
				t.Fatal("got no line of dashes")
			}
			want = strings.TrimSpace(want)

			adapted, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(source), nil)
			for _, warning := range warnings { // of the format, for example
				t.Errorf("got warning %v", warning)
			}
			var got string
			if strings.HasPrefix(name, "error_") {
				if err == nil {
					t.Fatalf("got %s, want an error", adapted)
				}
				got = err.Error()
				if !errorPosition.MatchString(got) {
					t.Errorf("got %q, want it to tell file and line", got)
				}
			} else {
				if err != nil {
					t.Fatal(err)
				}
				got = indent(t, adapted)
			}
			switch {
			case *update:
				if err := os.WriteFile(file, []byte(source+"----------\n"+got+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			case err != nil:
				if want == "" || !strings.Contains(got, want) {
					t.Errorf("got error %q, want it to contain %q", got, want)
				}
			case got != want:
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			if err == nil {
				checkTransportJSON(t, adapted)
			}
		})
	}
}

// checkTransportJSON decodes the transports of a config as Caddy does, and
// encodes them again: nothing may be lost, and nothing added.
func checkTransportJSON(t *testing.T, config []byte) {
	t.Helper()
	transports := 0
	for _, handler := range findModules(t, config, "handler", "reverse_proxy") {
		raw, ok := handler["transport"].(map[string]any)
		if !ok {
			continue
		}
		transports++
		if got := raw["protocol"]; got != "oauth2" {
			t.Errorf("got transport %v, want oauth2", got)
		}
		delete(raw, "protocol")
		want := encode(t, raw)

		transport := new(Transport).CaddyModule().New().(*Transport)
		if err := caddy.StrictUnmarshalJSON(want, transport); err != nil {
			t.Errorf("got %v, want that the transport decodes", err)
			continue
		}
		// Sorted as raw is, by its keys.
		var again map[string]any
		if err := json.Unmarshal(encode(t, transport), &again); err != nil {
			t.Fatal(err)
		}
		if got := encode(t, again); !bytes.Equal(got, want) {
			t.Errorf("got %s, want %s as before decoding", got, want)
		}
	}
	if transports == 0 {
		t.Error("got no transport, want one")
	}
}

func indent(t *testing.T, encoded []byte) string {
	t.Helper()
	var out bytes.Buffer
	if err := json.Indent(&out, encoded, "", "\t"); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// jsonNames returns the names of the fields of a struct type. Fields of
// embedded structs belong to those.
func jsonNames(typ reflect.Type) []string {
	var names []string
	for field := range typ.Fields() {
		if name, _, _ := strings.Cut(field.Tag.Get("json"), ","); name != "" && name != "-" {
			names = append(names, name)
		}
	}
	return slices.Sorted(slices.Values(names))
}

// caddyfileName returns what the Caddyfile calls a field of Credentials: what JSON
// calls it, but that the names of maps are plural there.
func caddyfileName(field reflect.StructField) string {
	name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
	if field.Type.Kind() == reflect.Map {
		return strings.TrimSuffix(name, "s")
	}
	return name
}

// settingNames returns the names of all settings of Credentials.
func settingNames() []string {
	var names []string
	for _, field := range settingFields() {
		names = append(names, caddyfileName(field))
	}
	return slices.Sorted(slices.Values(names))
}

// settingFields returns the fields of Credentials that are settings.
func settingFields() []reflect.StructField {
	return slices.DeleteFunc(slices.Collect(reflect.TypeFor[Credentials]().Fields()), func(field reflect.StructField) bool { return !field.IsExported() })
}

func TestJSONNamesAreTheNamesInTheCaddyfile(t *testing.T) {
	got := slices.Sorted(maps.Keys(credentialsSettings))
	if want := settingNames(); !slices.Equal(got, want) {
		t.Errorf("got the settings %q, want those of the JSON names, %q", got, want)
	}
	for _, field := range settingFields() {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		if field.Type.Kind() == reflect.Map && !strings.HasSuffix(name, "s") {
			t.Errorf("got the JSON name %s of a map, want a plural, as Caddy has them", name)
		}
	}
}

// A field of the same name would hide one of the http transport without a
// word, and so would a setting in the Caddyfile.
func TestSettingsHideNoneOfTheHTTPTransport(t *testing.T) {
	options := jsonNames(reflect.TypeFor[reverseproxy.HTTPTransport]())
	if !slices.Contains(options, "dial_timeout") {
		t.Fatalf("got %q, want the fields of the http transport", options)
	}
	for _, name := range jsonNames(reflect.TypeFor[Transport]()) {
		if slices.Contains(options, name) {
			t.Errorf("got %s in Transport, want that it is left to the http transport", name)
		}
	}
	settings := append(slices.Sorted(maps.Keys(credentialsSettings)), "upstream", "client_by", "client", "insecure_plaintext")
	for _, name := range settings {
		d := caddyfile.NewTestDispenser("http {\n\t" + name + "\n}")
		http := new(Transport).CaddyModule().New().(*Transport).HTTPTransport
		if err := http.UnmarshalCaddyfile(d); err == nil || !strings.Contains(err.Error(), "unrecognized subdirective "+name) {
			t.Errorf("got %v, want that the http transport does not know %s", err, name)
		}
	}
	for _, typ := range []reflect.Type{reflect.TypeFor[Upstream](), reflect.TypeFor[NamedClient](), reflect.TypeFor[DefaultClient]()} {
		own := jsonNames(typ)
		for _, name := range jsonNames(reflect.TypeFor[Credentials]()) {
			if slices.Contains(own, name) {
				t.Errorf("got %s in %v, want that it is left to Credentials", name, typ)
			}
		}
	}
}

// settingSamples are valid arguments, as many as a setting takes.
var settingSamples = map[string]string{
	"name":                 "orders",
	"token_url":            "https://auth.example.com/token",
	"issuer":               "https://auth.example.com",
	"client_id":            "gateway",
	"client_secret":        "secret",
	"auth_method":          "client_secret_post",
	"basic_encoding":       "raw",
	"private_key":          "/etc/caddy/client.key",
	"key_id":               "2024",
	"signing_alg":          "ES256",
	"assertion_audience":   "https://auth.example.com",
	"assertion_typ":        "JWT",
	"assertion_lifetime":   "30s",
	"assertion_file":       "/run/jwt",
	"client_certificate":   "/etc/caddy/client.crt /etc/caddy/client.key",
	"bind_certificate":     "",
	"grant_type":           "jwt_bearer",
	"subject":              "orders",
	"claim":                "region eu",
	"scopes":               "orders.read",
	"audience":             "https://api.example.com",
	"resource":             "https://api.example.com",
	"param":                "organization acme",
	"token_request_header": "X-Api-Version 2",
	"token_request":        "json",
	"token_response":       "{\n access_token /data/token\n expires_in /data/ttl ms\n}",
	"token_timeout":        "5s",
	"token_transport":      "{\n tls\n}",
	"tenant":               "X-Organization acme",
	"header":               "X-Region eu",
	"dpop":                 "",
	"share_tokens":         "{env.SHARED_KEY}",
	"bearer_header":        "X-Access-Token Token",
	"refresh_before":       "30s",
	"default_lifetime":     "1h",
	"max_lifetime":         "2h",
	"retry_on":             "401 grpc",
	"replay_body":          "1KiB",
}

// settingNeeds are the other settings without which one has no effect.
var settingNeeds = map[string][]string{
	"key_id":             {"private_key"},
	"signing_alg":        {"private_key"},
	"assertion_audience": {"private_key"},
	"assertion_typ":      {"private_key"},
	"assertion_lifetime": {"private_key"},
	"bind_certificate":   {"client_certificate"},
	"token_request":      {"auth_method", "client_secret"},
	"grant_type":         {"private_key"},
	"subject":            {"private_key", "grant_type"},
	"claim":              {"private_key", "grant_type"},
}

func TestEverySettingIsReadStrictly(t *testing.T) {
	lists := []string{"scopes", "audience", "resource", "retry_on"}
	for _, setting := range slices.Sorted(maps.Keys(credentialsSettings)) {
		sample, ok := settingSamples[setting]
		if !ok {
			t.Errorf("got no sample of %s, want one", setting)
			continue
		}
		line := strings.TrimSpace(setting + " " + sample)
		cases := map[string]string{"once": line, "twice": line + "\n" + line}
		if setting != "token_transport" && setting != "share_tokens" && sample != "" {
			cases["without a value"] = setting
		}
		if setting == "token_transport" || !slices.Contains(lists, setting) {
			cases["with one more argument"] = strings.TrimSuffix(line, "{\n tls\n}") + " more"
		}
		var needs string
		for _, other := range settingNeeds[setting] {
			needs += other + " " + settingSamples[other] + "\n"
		}
		for name, lines := range cases {
			for place, block := range map[string]string{
				"transport": "oauth2 {\n" + needs + lines + "\n upstream 127.0.0.1:9000 off\n}",
				"upstream":  "oauth2 {\n upstream 127.0.0.1:9000 {\n" + needs + notInherited(setting) + lines + "\n}\n" + baseWithout(setting) + "}",
			} {
				t.Run(setting+" "+name+" in "+place, func(t *testing.T) {
					transport := new(Transport).CaddyModule().New().(*Transport)
					err := transport.UnmarshalCaddyfile(caddyfile.NewTestDispenser(block))
					if name == "once" {
						wantError(t, err, "")
						return
					}
					wantError(t, err, setting)
					wantError(t, err, ", at Testfile:")
				})
			}
		}
	}
}

// With {$X}, a secret may be any number of arguments, and lines. In a line that is
// mistyped, it may be the argument of any setting. Errors of a config are logged, and
// told by POST /load.
func TestNoErrorQuotesAnArgument(t *testing.T) {
	t.Setenv("TEST_CANARY", "whisper s3cret{")
	t.Setenv("TEST_CANARY_PART", `whisper"s3cret\n`)
	t.Setenv("TEST_CANARY_WORDS", "whisper whisper2 whisper3")
	t.Setenv("TEST_CANARY_LINES", "whisper\nwhisper2 whisper3")
	arguments := []string{
		"whisper", "whisper whisper2", "whisper whisper2 whisper3", "x whisper y whisper2 whisper3", `x "" whisper`, `"" whisper`, `whisper ""`, `"whisper whisper2"`,
		"\"whisper\nb\"", "whisper: whisper", "x \"whisper\x01\"", "1s whisper", "64KiB whisper", "401 whisper", "off whisper", "http://whisper", "https://x/#whisper",
		"https://whisper:whisper@x", "whisper {\nwhisper\n}", "{env.TEST_CANARY}", "{env.TEST_CANARY_PART}", "x {env.TEST_CANARY_PART}", "{env.TEST_CANARY} {env.TEST_CANARY}",
		"x-whisper{http.request.uri}", "x x-whisper{http.request.uri}", "x whisper\nx whisper", "name\nwhisper whisper2", "x\n{\nwhisper\n}", "x {\n}",
		"{$TEST_CANARY_WORDS}", "x {$TEST_CANARY_WORDS}", "{$TEST_CANARY_LINES}", "x {$TEST_CANARY_LINES}",
	}
	settings := slices.Sorted(maps.Keys(credentialsSettings))
	for _, setting := range append(settings, "insecure_plaintext", "whisper") {
		for _, argument := range arguments {
			line := setting + " " + argument + "\n"
			for _, config := range []string{
				proxyConfig("127.0.0.1:9000", line+baseWithout(setting)),
				proxyConfig("127.0.0.1:9000", baseWithout(setting)+line),
				proxyConfig("127.0.0.1:9000", clientSettings+"upstream 127.0.0.1:9000 {\nscopes a\n"+line+"}"),
				proxyConfig("127.0.0.1:9000", clientSettings+"token_transport {\n"+line+"}"),
			} {
				if err := loadError(t, config); err != nil && strings.Contains(strings.ToLower(err.Error()), "whisper") {
					t.Errorf("%q: got %q, want that it quotes nothing", line, err)
				}
			}
		}
	}
	for _, block := range []string{"transport oauth2 whisper", "transport oauth2 whisper {\n}", "transport oauth2 {\n} whisper", "transport oauth2 {\n{\nwhisper\n}\n}"} {
		err := loadError(t, "http://localhost:8080 {\nreverse_proxy 127.0.0.1:9000 {\n"+block+"\n}\n}\n")
		if err == nil || strings.Contains(err.Error(), "whisper") {
			t.Errorf("%q: got %v, want an error that quotes nothing", block, err)
		}
	}
}

// notInherited returns what an upstream block with this setting needs as well, because
// it inherits no client authentication.
func notInherited(setting string) string {
	brings := append(settingNeeds[setting], setting)
	if !slices.ContainsFunc(brings, func(s string) bool { return slices.Contains(authSettings, s) }) {
		return ""
	}
	var lines string
	if setting != "token_url" && setting != "issuer" {
		lines += "token_url https://auth.example.com/token\n"
	}
	if slices.Contains([]string{"token_url", "issuer", "auth_method", "basic_encoding"}, setting) {
		lines += "client_secret secret\n"
	}
	return lines
}

// baseWithout returns what a client needs, without one of it, and without what an
// upstream block with this setting does not inherit.
func baseWithout(setting string) string {
	if notInherited(setting) != "" {
		return "client_id gateway\n"
	}
	var base strings.Builder
	for line := range strings.Lines(clientSettings) {
		if !strings.HasPrefix(line, setting+" ") {
			base.WriteString(line)
		}
	}
	return base.String()
}

// A Caddyfile is all that some users ever write, so nothing in it may bring
// down the adapter, or adapt to what Caddy then refuses to decode.
func FuzzCaddyfile(f *testing.F) {
	files, err := filepath.Glob("testdata/adapt/*.caddyfiletest")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		source, _, _ := strings.Cut(string(content), "----------\n")
		if _, block, ok := strings.Cut(source, "transport oauth2 {\n"); ok {
			block, _, _ = strings.Cut(block, "\n\t\t}\n")
			f.Add([]byte(block))
		}
	}
	f.Fuzz(func(t *testing.T, block []byte) {
		tokens, err := caddyfile.Tokenize(slices.Concat([]byte("oauth2 {\n"), block, []byte("\n}\n")), "Caddyfile")
		if err != nil {
			return // the lexer is not ours
		}
		transport := new(Transport).CaddyModule().New().(*Transport)
		if err := transport.UnmarshalCaddyfile(caddyfile.NewDispenser(tokens)); err != nil {
			return
		}
		// Caddy takes the default transport if it cannot encode this one, and
		// proxies without a token.
		encoded, err := json.Marshal(transport)
		if err != nil {
			t.Fatalf("got %v, want that what was parsed can be encoded", err)
		}
		again := new(Transport).CaddyModule().New().(*Transport)
		if err := caddy.StrictUnmarshalJSON(encoded, again); err != nil {
			t.Errorf("got %v, want that %s decodes", err, encoded)
		}
	})
}
