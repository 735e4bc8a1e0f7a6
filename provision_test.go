package outboundauth

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
)

func TestValidate(t *testing.T) {
	for name, value := range map[string]string{
		"TEST_TOKEN_URL":  "https://auth.example.com/token",
		"TEST_HTTP_URL":   "http://auth.example.com/token",
		"TEST_BAD_URL":    "https://auth.example.com/token#top",
		"TEST_CLIENT_ID":  "gateway",
		"TEST_SCOPES":     "orders.read orders.write",
		"TEST_BAD_SCOPE":  `orders"read`,
		"TEST_UPSTREAM":   "127.0.0.1:9000",
		"TEST_REMOTE":     "10.0.0.1:9000",
		"TEST_UPSTREAM_B": "127.0.0.1:9001",
	} {
		t.Setenv(name, value)
	}
	const (
		local    = "127.0.0.1:9000"
		remote   = "10.0.0.1:9000"
		noURL    = "client_id gateway\nclient_secret secret\n"
		noID     = "token_url https://auth.example.com/token\nclient_secret secret\n"
		noSecret = "token_url https://auth.example.com/token\nclient_id gateway\n"
		empty    = "{env.TEST_UNSET} is not set in the environment of this process: set it where Caddy is started"
		unknown  = "unrecognized placeholder {http.request.host} (only global placeholders such as {env.*} and {file.*} are known here)"
	)
	for _, test := range []struct{ name, upstreams, settings, want string }{
		{"a complete client", local, clientSettings, ""},

		// An address that is none of the proxy's.
		{"an unknown address", local, clientSettings + "upstream 127.0.0.1:9009 {\n tenant acme\n}", "upstream 127.0.0.1:9009: reverse_proxy has no such upstream; write it as there"},
		{"an unknown address that is off", local, clientSettings + "upstream 127.0.0.1:9009 off", "upstream 127.0.0.1:9009: reverse_proxy has no such upstream"},
		{"another port", "localhost", clientSettings + "upstream https://localhost off", "reverse_proxy has no such upstream"},
		{"another name for the address", local, clientSettings + "upstream localhost:9000 off", "reverse_proxy has no such upstream"},
		{"the address with its network", local, clientSettings + "upstream tcp/127.0.0.1:9000 off", ""},
		{"one address of a range", "127.0.0.1:9000-9002", clientSettings + "upstream 127.0.0.1:9001 off", ""},
		{"beside an upstream from the request", local + " {header.X-Upstream}", clientSettings + "upstream 127.0.0.1:9009 off", ""},
		{"a socket", "unix//run/orders.sock", clientSettings + "upstream unix//run/orders.sock {\n tenant acme\n}", ""},
		{"another socket", "unix//run/orders.sock", clientSettings + "upstream unix//run/order.sock off", "upstream unix//run/order.sock: reverse_proxy has no such upstream"},

		// An address that belongs to two.
		{"twice in a block", local, clientSettings + "upstream 127.0.0.1:9000 127.0.0.1:9000 {\n tenant acme\n}", "upstream 127.0.0.1:9000: named twice"},
		{"in two blocks", local, clientSettings + "upstream 127.0.0.1:9000 {\n tenant acme\n}\nupstream 127.0.0.1:9000 off", "upstream 127.0.0.1:9000: named twice"},
		{"in two spellings", local, clientSettings + "upstream 127.0.0.1:9000 {\n tenant acme\n}\nupstream tcp/{env.TEST_UPSTREAM} off", "named twice"},
		{"an address from the request", local, clientSettings + "upstream {header.X-Upstream} off", "upstream {http.request.header.X-Upstream}: unrecognized placeholder"},

		// Upstreams without credentials.
		{"a complete block for each", local + " 127.0.0.1:9001", "upstream 127.0.0.1:9000 {\n" + clientSettings + "}\nupstream 127.0.0.1:9001 off", ""},
		{"an upstream left out", local + " 127.0.0.1:9001", "upstream 127.0.0.1:9000 {\n" + clientSettings + "}", "upstream 127.0.0.1:9001 has no credentials: token_url, client_id and client_secret are missing; or add `upstream 127.0.0.1:9001 { … }` or `upstream 127.0.0.1:9001 off`"},
		{"an upstream left out of what others inherit", local + " 127.0.0.1:9001", noID + "upstream 127.0.0.1:9000 {\n client_id orders\n}", "upstream 127.0.0.1:9001 has no credentials: client_id is missing"},

		// Tokens in the clear.
		{"a remote upstream", remote, clientSettings, "the token would go to upstream 10.0.0.1:9000 unencrypted; use https://, or allow it with `insecure_plaintext upstream`"},
		{"a remote upstream with http://", "http://api.example.com", clientSettings, "the token would go to upstream api.example.com:80 unencrypted"},
		{"a remote upstream with h2c://", "h2c://api.example.com", clientSettings, "the token would go to upstream api.example.com:80 unencrypted"},
		{"a remote upstream in a block", local + " " + remote, clientSettings + "upstream 10.0.0.1:9000 {\n tenant acme\n}", "the token would go to upstream 10.0.0.1:9000 unencrypted"},
		{"a remote upstream from the environment", "{env.TEST_REMOTE}", clientSettings, "unencrypted"},
		{"a remote upstream that is off", local + " " + remote, clientSettings + "upstream 10.0.0.1:9000 off", ""},
		{"a remote upstream, allowed", remote, clientSettings + "insecure_plaintext upstream", ""},
		{"a remote upstream, something else allowed", remote, clientSettings + "insecure_plaintext token_url", "unencrypted"},
		{"a remote upstream with https://", "https://api.example.com", clientSettings, ""},
		{"a remote upstream with tls", remote, clientSettings + "tls", ""},
		{"a remote upstream on a port without tls", remote, clientSettings + "tls_except_ports 9000", "unencrypted"},
		{"a remote upstream on another port than those without tls", remote, clientSettings + "tls_except_ports 80", ""},
		{"all of 127.0.0.0/8", "127.8.8.8:9000", clientSettings, ""},
		{"the loopback of IPv6", "[::1]:9000", clientSettings, ""},
		{"localhost", "LocalHost:9000", clientSettings, ""},
		{"a name that begins with localhost", "localhost.example.com:9000", clientSettings, "unencrypted"},

		// The token endpoint in the clear, which shows late with placeholders.
		{"http from the environment", local, noURL + "token_url {env.TEST_HTTP_URL}", "the client's credentials would go to another machine unencrypted"},
		{"http from the environment, allowed", local, noURL + "token_url {env.TEST_HTTP_URL}\ninsecure_plaintext token_url", ""},
		{"http from the environment, something else allowed", local, noURL + "token_url {env.TEST_HTTP_URL}\ninsecure_plaintext upstream", "unencrypted"},

		// Placeholders that are read at load.
		{"from the environment", "{env.TEST_UPSTREAM}", "token_url {env.TEST_TOKEN_URL}\nclient_id {env.TEST_CLIENT_ID}\nclient_secret {env.TEST_UNSET}\nscopes {env.TEST_SCOPES}\naudience {env.TEST_CLIENT_ID}", ""},
		{"addresses from the environment", "{env.TEST_UPSTREAM} 127.0.0.1:9001", clientSettings + "upstream 127.0.0.1:9000 off\nupstream {env.TEST_UPSTREAM_B} {\n tenant acme\n}", ""},
		{"a bad URL from the environment", local, noURL + "token_url {env.TEST_BAD_URL}", "token_url: must have no fragment"},
		{"a bad scope from the environment", local, clientSettings + "scopes {env.TEST_BAD_SCOPE}", "scopes: one is not a scope"},
		{"an empty name", local, clientSettings + "name {env.TEST_UNSET}", "name: " + empty},
		{"an empty token_url", local, noURL + "token_url {env.TEST_UNSET}", "token_url: " + empty},
		{"an empty client_id", local, noID + "client_id {env.TEST_UNSET}", "client_id: " + empty},
		{"empty scopes", local, clientSettings + "scopes {env.TEST_UNSET}", "scopes: " + empty},
		{"an empty audience", local, clientSettings + "audience {env.TEST_UNSET}", "audience: " + empty},
		{"an empty address", local, clientSettings + "upstream {env.TEST_UNSET} off", "evaluated placeholder {env.TEST_UNSET} is empty"},
		{"an empty value in an upstream block", local, clientSettings + "upstream 127.0.0.1:9000 {\n client_id {env.TEST_UNSET}\n}", "upstream 0 (127.0.0.1:9000): client_id: " + empty},
		{"the request in token_url", local, noURL + "token_url https://{host}/token", "token_url: " + unknown},
		{"the request in client_id", local, noID + "client_id {host}", "client_id: " + unknown},
		{"the request in scopes", local, clientSettings + "scopes {host}", "scopes: " + unknown},
		{"the request in audience", local, clientSettings + "audience {host}", "audience: " + unknown},
		{"the request in client_secret", local, noSecret + "client_secret {header.X-Secret}", "client_secret: {http.*} placeholders have no value in a token request; use {env.*} or {file.*}"},
		{"a file without a path", local, noSecret + "client_secret {file.secret}", "client_secret: Caddy takes a {file.*} without a path for a part of a request's path"},
		{"the request in part of client_secret", local, noSecret + "client_secret prefix-{vars.secret}", "client_secret: {http.*} placeholders"},
		{"the request in param", local, clientSettings + "param organization {host}", "param: {http.*} placeholders"},
		{"the request in token_request_header", local, clientSettings + "token_request_header X-Caller {remote_host}", "token_request_header: {http.*} placeholders"},
		{"the request in what the upstream is sent", local, clientSettings + "tenant {header.X-Organization}\nheader X-Caller {remote_host}", ""},
		{"braces in a secret", local, noSecret + "client_secret `a{b}c}{`", ""},

		// What the http transports find wrong.
		{"a bad http option", local, clientSettings + "versions 4", "unsupported HTTP version: 4"},
		{"a bad option of token_transport", local, clientSettings + "token_transport {\n versions 4\n}", "token_transport: unsupported HTTP version: 4"},
	} {
		t.Run(test.name, func(t *testing.T) {
			wantError(t, validateCaddyfile(t, proxyConfig(test.upstreams, test.settings)), test.want)
		})
	}
}

// JSON may have null where Caddy expects an object. What is around the transport
// must not make it panic either.
func TestNullAroundTheTransport(t *testing.T) {
	const transport = `"transport":{"protocol":"oauth2","credentials":{"token_url":"https://auth.example.com/token","client_id":"gateway","client_secret":"s"}}`
	for _, test := range []struct{ name, config string }{
		{"retry_match", `{"upstreams":[{"dial":"127.0.0.1:9000"}],"load_balancing":{"retry_match":[null]},` + transport + `}`},
		{"retry_match beside another", `{"upstreams":[{"dial":"127.0.0.1:9000"}],"load_balancing":{"retry_match":[{"method":["GET"]},null]},` + transport + `}`},
		{"not of retry_match", `{"upstreams":[{"dial":"127.0.0.1:9000"}],"load_balancing":{"retry_match":[{"not":null}]},` + transport + `}`},
		{"load_balancing", `{"upstreams":[{"dial":"127.0.0.1:9000"}],"load_balancing":null,` + transport + `}`},
		{"health_checks", `{"upstreams":[{"dial":"127.0.0.1:9000"}],"health_checks":{"active":null},` + transport + `}`},
		{"headers", `{"upstreams":[{"dial":"127.0.0.1:9000"}],"headers":{"request":null},` + transport + `}`},
		{"handle_response", `{"upstreams":[{"dial":"127.0.0.1:9000"}],"handle_response":null,` + transport + `}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			defer func() {
				if p := recover(); p != nil {
					t.Errorf("got panic %v, want none", p)
				}
			}()
			_, _, err := loadProxy(t, json.RawMessage(test.config))
			wantError(t, err, "")
		})
	}
}

// What dynamic upstreams there will be is not known when the config is loaded.
func TestAddressesMayBelongToDynamicUpstreams(t *testing.T) {
	source := strings.Replace(proxyConfig("", clientSettings+"upstream 127.0.0.1:9009 {\n tenant acme\n}"),
		"transport", "dynamic a localhost 9009\ntransport", 1)
	wantError(t, validateCaddyfile(t, source), "")
}

// JSON can hold what the Caddyfile's parser never lets through.
func TestJSONIsCheckedLikeTheCaddyfile(t *testing.T) {
	const client = `"token_url":"https://auth.example.com/token","client_id":"gateway","client_secret":"secret"`
	for _, test := range []struct{ name, config, want string }{
		{"complete", `{"credentials":{` + client + `}}`, ""},
		{"empty", `{}`, "transport oauth2: token_url, client_id and client_secret are missing"},
		{"null", `{"credentials":null,"upstreams":null}`, "transport oauth2: token_url, client_id and client_secret are missing"},
		{"empty credentials", `{"credentials":{}}`, "token_url is missing"},
		{"without client_secret", `{"credentials":{"token_url":"https://auth.example.com/token","client_id":"gateway"}}`, "client_secret is missing"},
		{"auth_method none", `{"credentials":{"token_url":"https://auth.example.com/token","client_id":"gateway","auth_method":"none"}}`, ""},
		{"auth_method none with client_secret", `{"credentials":{` + client + `,"auth_method":"none"}}`, "client_secret has no effect with auth_method none: remove one of the two"},
		{"auth_method unknown", `{"credentials":{` + client + `,"auth_method":"magic"}}`, "auth_method: unknown method; use one of client_secret_basic, client_secret_post,"},
		{"auth_method without what it needs", `{"credentials":{` + client + `,"auth_method":"tls_client_auth"}}`, "client_certificate is missing"},
		{"setting unknown", `{"credentials":{"issuer_url":"https://auth.example.com"}}`, `unknown field "issuer_url"`},
		{"assertion_lifetime too short", `{"credentials":{"token_url":"https://auth.example.com/token","client_id":"gateway","private_key":"k","assertion_lifetime":"29s"}}`, "assertion_lifetime: must be 30s at least, as the JWT is dated back by 10s"},
		{"assertion_lifetime negative", `{"credentials":{"token_url":"https://auth.example.com/token","client_id":"gateway","private_key":"k","assertion_lifetime":-1}}`, "assertion_lifetime: must be 30s at least"},
		{"basic_encoding raw with a colon", `{"credentials":{"token_url":"https://auth.example.com/token","client_id":"a:b","client_secret":"s","basic_encoding":"raw"}}`, "basic_encoding: raw can't send a client_id with a colon"},
		{"client_certificate without a key", `{"credentials":{"token_url":"https://auth.example.com/token","client_id":"gateway","client_certificate":{"certificate":"c"}}}`, "client_certificate: name both the certificate and its key"},
		{"setting out of place", `{` + client + `}`, "unknown field"},
		{"setting of an upstream unknown", `{"upstreams":[{"addresses":["127.0.0.1:9000"],"client_name":"a"}]}`, `unknown field "client_name"`},
		{"plaintext token_url", `{"credentials":{"token_url":"http://auth.example.com/token","client_id":"gateway","client_secret":"secret"}}`, "unencrypted"},
		{"token_url with a password", `{"credentials":{"token_url":"https://a:hidden@auth.example.com/","client_id":"gateway","client_secret":"secret"}}`, "token_url: must hold no user and password"},
		{"empty scope", `{"credentials":{` + client + `,"scopes":[""]}}`, "scopes: one is not a scope"},
		{"empty audience", `{"credentials":{` + client + `,"audience":[""]}}`, "audience: an empty value"},
		{"reserved claim", `{"credentials":{"token_url":"https://auth.example.com/token","client_id":"gateway","grant_type":"jwt_bearer","private_key":"k","claims":{"iss":"x"}}}`, "claim iss: is set for each JWT; iss is the client_id, sub the subject, aud the assertion_audience, exp follows from assertion_lifetime"},
		{"reserved param", `{"credentials":{` + client + `,"params":{"client_secret":"x"}}}`, "param client_secret: has a setting of its own: use client_secret"},
		{"header in the singular", `{"credentials":{` + client + `,"header":{"X-Region":"eu"}}}`, `unknown field "header"`},
		{"param in the singular", `{"credentials":{` + client + `,"param":{"a":"b"}}}`, `unknown field "param"`},
		{"claim in the singular", `{"credentials":{` + client + `,"claim":{"a":"b"}}}`, `unknown field "claim"`},
		{"token_request_header in the singular", `{"upstreams":[{"addresses":["127.0.0.1:9000"],` + client + `,"token_request_header":{"X-A":"b"}}]}`, `unknown field "token_request_header"`},
		{"param without name", `{"credentials":{` + client + `,"params":{"":"x"}}}`, "name and value must not be empty"},
		{"header of the framing", `{"credentials":{` + client + `,"headers":{"Content-Length":"1"}}}`, "header: the header Content-Length is not free to set"},
		{"header twice", `{"credentials":{` + client + `,"headers":{"X-Region":"eu","x_region":"us"}}}`, "is set already"},
		{"token_request_header twice", `{"credentials":{` + client + `,"token_request_headers":{"X-Region":"eu","x-region":"us"}}}`, "token_request_header"},
		{"token_request_header with a line break", `{"credentials":{` + client + `,"token_request_headers":{"X-Region":"eu\r\nX-A: b"}}}`, "token_request_header: the value holds a control character"},
		{"tenant with a line break", `{"credentials":{` + client + `,"tenant":{"value":"acme\nX-A: b"}}}`, "tenant: the value holds a control character"},
		{"tenant in the token's header", `{"credentials":{` + client + `,"tenant":{"field":"authorization","value":"acme"}}}`, "tenant: its header carries the token already"},
		{"negative token_timeout", `{"credentials":{` + client + `,"token_timeout":-1}}`, "token_timeout: must not be negative"},
		{"negative refresh_before", `{"credentials":{` + client + `,"refresh_before":"-1m"}}`, "refresh_before: must not be negative"},
		{"negative default_lifetime", `{"credentials":{` + client + `,"default_lifetime":-1}}`, "default_lifetime: must not be negative"},
		{"replay_body that keeps nothing", `{"credentials":{` + client + `,"replay_body":{"size":-1}}}`, ""},
		{"replay_body by default", `{"credentials":{` + client + `,"replay_body":{"announce":true}}}`, ""},
		{"replay_body empty", `{"credentials":{` + client + `,"replay_body":{}}}`, "replay_body: is empty; set its size, or remove it"},
		{"replay_body outside without a retry", `{"credentials":{"client_id":"a","replay_body":{"size":1},"retry_on":[-1]},"upstreams":[{"addresses":["127.0.0.1:9000"],` + client + `}]}`, "replay_body has no effect with retry_on off"},
		{"replay_body of a block without a retry", `{"credentials":{` + client + `,"retry_on":[-1]},"upstreams":[{"addresses":["127.0.0.1:9000"],"replay_body":{"size":1}}]}`, "replay_body has no effect with retry_on off: set other statuses"},
		{"bearer_header empty", `{"credentials":{` + client + `,"bearer_header":{}}}`, "bearer_header: names neither a field nor a scheme"},
		{"bearer_header without a scheme", `{"credentials":{` + client + `,"bearer_header":{"scheme":""}}}`, ""},
		{"param without a name but white space", `{"credentials":{` + client + `,"params":{" ":"x"}}}`, "name and value must not be empty"},
		{"upstream without settings", `{"credentials":{` + client + `},"upstreams":[{"addresses":["127.0.0.1:9000"]}]}`, "upstream 0 (127.0.0.1:9000): has no settings of its own: set one, or off"},
		{"replay_body of the largest size", `{"credentials":{` + client + `,"replay_body":{"size":1048576}}}`, ""},
		{"replay_body too large", `{"credentials":{` + client + `,"replay_body":{"size":1048577}}}`, "replay_body: at most 1MiB is kept of each request"},
		{"replay_body negative", `{"credentials":{` + client + `,"replay_body":{"size":-2}}}`, "replay_body: the size must not be negative"},
		{"replay_body without a retry", `{"credentials":{` + client + `,"replay_body":{"announce":true},"retry_on":[-1]}}`, "replay_body has no effect with retry_on off"},
		{"replay_body and who never retries", `{"credentials":{` + client + `,"replay_body":{"announce":true}},"upstreams":[{"addresses":["127.0.0.1:9000"],"retry_on":[-1]}]}`, ""},

		// What has no effect.
		{"empty tenant", `{"credentials":{` + client + `,"tenant":{}}}`, "tenant: the value is missing"},
		{"tenant with a field alone", `{"credentials":{` + client + `,"tenant":{"field":"X-Organization"}}}`, "tenant: the value is missing"},
		{"tenant of white space", `{"credentials":{` + client + `,"tenant":{"value":" \t"}}}`, "tenant: the value is missing"},
		{"header with an empty value", `{"credentials":{` + client + `,"headers":{"X-Region":""}}}`, "header: the value is missing"},
		{"header of white space", `{"credentials":{` + client + `,"headers":{"X-Region":" "}}}`, "header: the value is missing"},
		{"token_request_header with an empty value", `{"credentials":{` + client + `,"token_request_headers":{"X-Region":""}}}`, "token_request_header: the value is missing"},
		{"param of white space", `{"credentials":{` + client + `,"params":{"a":"\n"}}}`, "param: holds nothing but white space"},
		{"audience of white space", `{"credentials":{` + client + `,"audience":[" "]}}`, "audience: an empty value"},
		{"name of white space", `{"credentials":{` + client + `,"name":" "}}`, "name: holds nothing but white space; write a value, or remove the setting"},
		{"client_id of white space", `{"credentials":{"token_url":"https://auth.example.com/token","client_id":" ","client_secret":"s"}}`, "client_id: holds nothing but white space"},
		{"client_secret of white space", `{"credentials":{"token_url":"https://auth.example.com/token","client_id":"gateway","client_secret":"\n"}}`, "client_secret: holds nothing but white space"},
		{"private_key of white space", `{"credentials":{"token_url":"https://auth.example.com/token","client_id":"gateway","private_key":"  "}}`, "private_key: holds nothing but white space"},
		{"assertion_file of white space in an upstream", `{"credentials":{` + client + `},"upstreams":[{"addresses":["127.0.0.1:9000"],"assertion_file":" "}]}`, "assertion_file: holds nothing but white space"},
		{"client_certificate whose key is white space", `{"credentials":{"token_url":"https://auth.example.com/token","client_id":"gateway","client_certificate":{"certificate":"c","key":" "}}}`, "client_certificate: name both the certificate and its key"},

		{"retry_on that is off", `{"credentials":{` + client + `,"retry_on":[-1]}}`, ""},
		{"retry_on off beside a status", `{"credentials":{` + client + `,"retry_on":[-1,401]}}`, "retry_on: write error statuses"},
		{"retry_on off beside grpc", `{"credentials":{` + client + `,"retry_on":[16,-1]}}`, "retry_on: write error statuses (400 to 599), grpc (in JSON: 16), or off (in JSON: [-1])"},
		{"retry_on grpc", `{"credentials":{` + client + `,"retry_on":[16]}}`, ""},
		{"retry_on grpc beside a status, twice", `{"credentials":{` + client + `,"retry_on":[16,401,16]}}`, ""},
		{"retry_on another status of gRPC", `{"credentials":{` + client + `,"retry_on":[7]}}`, "retry_on: write error statuses"},
		{"retry_on grpc and replay_body", `{"credentials":{` + client + `,"replay_body":{"size":1},"retry_on":[16]}}`, ""},
		{"retry_on a success", `{"credentials":{` + client + `,"retry_on":[200]}}`, "retry_on: write error statuses"},
		{"insecure_plaintext unknown", `{"credentials":{` + client + `},"insecure_plaintext":["everywhere"]}`, "insecure_plaintext: is for token_url and upstream only"},
		{"upstream without addresses", `{"credentials":{` + client + `},"upstreams":[{"tenant":{"value":"acme"}}]}`, "addresses is missing"},
		{"upstream that is null", `{"credentials":{` + client + `},"upstreams":[null]}`, "upstream 0"},
		{"upstream that is off and not", `{"credentials":{` + client + `},"upstreams":[{"addresses":["127.0.0.1:9000"],"off":true,"tenant":{"value":"acme"}}]}`, "off contradicts its other settings"},
		{"upstream incomplete", `{"upstreams":[{"addresses":["127.0.0.1:9000"],"client_id":"orders"}]}`, "upstream 0 (127.0.0.1:9000): token_url is missing"},
		{"upstream with another secret", `{"credentials":{` + client + `},"upstreams":[{"addresses":["127.0.0.1:9000"],"client_secret":"other"}]}`, "upstream 0 (127.0.0.1:9000): token_url is missing: set it to the URL of the authorization server's token endpoint, or issuer to have it discovered (this block sets client_secret, so it inherits no client authentication from the settings around it: no token_url)"},
		{"upstream with another server", `{"credentials":{` + client + `},"upstreams":[{"addresses":["127.0.0.1:9000"],"issuer":"https://other.example.com"}]}`, "(this block sets issuer, so it inherits no client authentication from the settings around it: no token_url, client_secret)"},
		{"upstream that leaves the method out", `{"credentials":{` + client + `,"auth_method":"client_secret_post"},"upstreams":[{"addresses":["127.0.0.1:9000"],` + client + `}]}`, "auth_method is missing: around this block it is client_secret_post; repeat that, or set another (this block sets token_url, so it inherits no client authentication from the settings around it: no auth_method)"},
		{"upstream that leaves the encoding out", `{"credentials":{` + client + `,"basic_encoding":"raw"},"upstreams":[{"addresses":["127.0.0.1:9000"],` + client + `}]}`, "basic_encoding is missing: around this block it is raw; repeat that, or set the other (this block sets token_url, so it inherits no client authentication from the settings around it: no basic_encoding)"},
		{"upstream that has no use for the encoding", `{"credentials":{` + client + `,"basic_encoding":"raw"},"upstreams":[{"addresses":["127.0.0.1:9000"],` + client + `,"auth_method":"client_secret_post"}]}`, ""},
		{"upstream with a mistake", `{"credentials":{` + client + `},"upstreams":[{"addresses":["127.0.0.1:9000"],"retry_on":[200]}]}`, "upstream 0 (127.0.0.1:9000): retry_on: write error statuses"},
		{"upstream whose tenant is in the token's inherited header", `{"credentials":{` + client + `,"bearer_header":{"field":"X-Token"}},"upstreams":[{"addresses":["127.0.0.1:9000"],"tenant":{"field":"X-Token","value":"acme"}}]}`, "tenant: its header carries the token already"},
		{"upstream whose header is free by inheritance", `{"credentials":{` + client + `,"bearer_header":{"field":"X-Token"}},"upstreams":[{"addresses":["127.0.0.1:9000"],"headers":{"Authorization":"Basic YTpi"}}]}`, ""},
		{"mistake in what upstreams inherit", `{"credentials":{"client_id":"a","scopes":["a b"]},"upstreams":[{"addresses":["127.0.0.1:9000"],"off":true}]}`, "scopes: one is not a scope"},
		{"clients", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":["acme"]},{"keys":["b"],"off":true}],"default":{"off":true}}}`, ""},
		{"clients that are complete", `{"clients":{"by":"{http.auth.user.id}","named":[{"keys":["acme"],` + client + `}]}}`, ""},
		{"clients beside an upstream that is complete", `{"upstreams":[{"addresses":["127.0.0.1:9000"],` + client + `}],"clients":{"by":"{http.auth.user.id}","named":[{"keys":["acme"]}]}}`, ""},
		{"clients without a key's place", `{"credentials":{` + client + `},"clients":{"named":[{"keys":["acme"]}]}}`, "client_by is missing"},
		{"clients by nothing of the request", `{"credentials":{` + client + `},"clients":{"by":"{env.X}","named":[{"keys":["acme"]}]}}`, "client_by: has the same value for all requests"},
		{"clients by a text", `{"credentials":{` + client + `},"clients":{"by":"acme","named":[{"keys":["acme"]}]}}`, "client_by: must be one placeholder"},
		{"clients by two placeholders", `{"credentials":{` + client + `},"clients":{"by":"{a}{b}","named":[{"keys":["acme"]}]}}`, "client_by: must be one placeholder"},
		{"clients without names", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","default":{}}}`, "client_by: chooses among client blocks"},
		{"client that is null", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[null]}}`, "client 0: names no key"},
		{"client without keys", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"off":true}]}}`, "client 0: names no key"},
		{"client with an empty key", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":[""]}]}}`, "client: a key is empty"},
		{"client with a key of two lines", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":["a\nb"]}]}}`, "client: a key holds a character that can't be seen"},
		{"client with a blank behind its key", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":["a "]}]}}`, "client: a key holds a character that can't be seen"},
		{"client whose key is any", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":["*"]}]}}`, "client: * is no key"},
		{"client with a placeholder", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":["{env.A}"]}]}}`, "client: a key holds a brace"},
		{"client with the subject of a certificate", `{"credentials":{` + client + `},"clients":{"by":"{http.request.tls.client.subject}","named":[{"keys":["CN=acme,O=Acme Inc"]}]}}`, ""},
		{"client that is complete, beside an upstream that is off", `{"upstreams":[{"addresses":["127.0.0.1:9001"],"off":true}],"clients":{"by":"{http.auth.user.id}","named":[{"keys":["a"],` + client + `}]}}`, "upstream 127.0.0.1:9001: reverse_proxy has no such upstream"},
		{"client beside a secret of upstreams for nobody", `{"credentials":{"client_secret":"s"},"upstreams":[{"addresses":["127.0.0.1:9000"],` + client + `}],"clients":{"by":"{http.auth.user.id}","named":[{"keys":["a"]}]}}`, "client_secret has no effect"},
		{"clients with one key", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":["a"]},{"keys":["b","a"]}]}}`, "client: a key is named twice"},
		{"client that is off and not", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":["a"],"off":true,"client_id":"b"}]}}`, "client: off contradicts its other settings"},
		{"client default that is off and not", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":["a"]}],"default":{"off":true,"client_id":"b"}}}`, "client: off contradicts its other settings"},
		{"client that is incomplete", `{"clients":{"by":"{http.auth.user.id}","named":[{"keys":["a","b"],"client_id":"c"}]}}`, "client a b: token_url is missing"},
		{"client with another way to authenticate", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":["a"],"auth_method":"client_secret_post"}]}}`, "client a: client_secret is missing: set it, for example to {env.CLIENT_SECRET} (this block sets auth_method, so it inherits no client authentication from the settings around it: no client_secret)"},
		{"client with another server", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":["a"],"issuer":"https://other.example.com"}]}}`, "(this block sets issuer, so it inherits no client authentication from the settings around it: no token_url, client_secret)"},
		{"client with a mistake", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":["a"],"retry_on":[200]}]}}`, "client a: retry_on: write error statuses"},
		{"client with a header twice", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":["a"],"headers":{"X-A":"1","x-a":"2"}}]}}`, "client a: header: the same name is set twice"},
		{"client beside a secret for nobody", `{"credentials":{` + client + `},"clients":{"by":"{http.auth.user.id}","named":[{"keys":["a"],"client_secret":"b"}]}}`, "client_secret has no effect: each client block sets client authentication"},
		{"address with a range", `{"credentials":{` + client + `},"upstreams":[{"addresses":["127.0.0.1:9000-9001"],"off":true}]}`, "must be a single address"},
		{"address that is none", `{"credentials":{` + client + `},"upstreams":[{"addresses":["127.0.0.1:port"],"off":true}]}`, "upstream 127.0.0.1:port"},
	} {
		t.Run(test.name, func(t *testing.T) {
			defer func() { // a mistake in a config must not end a running Caddy
				if p := recover(); p != nil {
					t.Errorf("got panic %v, want an error", p)
				}
			}()
			_, _, err := loadTransport(t, "127.0.0.1:9000", json.RawMessage(test.config))
			wantError(t, err, test.want)
			if err != nil && strings.Contains(err.Error(), "hidden") {
				t.Errorf("got %q, want no password in it", err)
			}
		})
	}
}

// A key is read when the config is loaded. What can't be read must not keep
// Caddy from loading another config: to open a pipe would never return.
func TestFileThatIsNoneDoesNotHoldUpLoading(t *testing.T) {
	dir := t.TempDir()
	key := keytest.New(t)
	certificate := writeFile(t, filepath.Join(dir, "crt"), keytest.CertificatePEM(t, key))
	keyFile := writeFile(t, filepath.Join(dir, "key"), keytest.PKCS8(t, key))
	for name, is := range map[string]struct{ file, what string }{
		"pipe": {pipe(t, dir), "no regular file"}, "directory": {dir, "a directory"},
		"endless": {"/dev/zero", "no regular file"}, "too large": {fileOfSize(t, dir, maxSecretFile+1), "larger than 1 MiB"},
	} {
		content := "{file." + is.file + "}"
		const named = "the file that it names"
		for _, test := range []struct{ settings, want, what string }{
			{"private_key " + is.file, "private_key: ", named},
			{"private_key " + content, "private_key: ", content},
			{"client_certificate " + is.file + " " + keyFile, "client_certificate, the certificate: ", named},
			{"client_certificate " + certificate + " " + is.file, "client_certificate, its key: ", named},
			{"client_certificate " + certificate + " " + content, "client_certificate, its key: ", content},
			{"client_secret s\nscopes " + content, "scopes: ", content},
		} {
			t.Run(name+" "+test.want+test.what, func(t *testing.T) {
				adapted := encode(t, adaptCaddyfile(t, proxyConfig("127.0.0.1:9000", "token_url https://auth.example.com/token\nclient_id gateway\n"+test.settings)))
				transport := findModules(t, adapted, "handler", "reverse_proxy")[0]["transport"]
				loaded := make(chan error, 1)
				go func() {
					_, _, err := loadTransport(t, "127.0.0.1:9000", transport)
					loaded <- err
				}()
				select {
				case err := <-loaded:
					wantError(t, err, test.want+test.what+" is "+is.what)
				case <-time.After(patience):
					t.Fatalf("got nothing in %v, want an error", patience)
				}
			})
		}
	}
}

// Only a handler has upstreams to compare with.
func TestTransportOutsideOfReverseProxyLoads(t *testing.T) {
	base, err := caddy.ProvisionContext(new(caddy.Config))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := caddy.NewContext(base)
	defer cancel()
	_, err = ctx.LoadModuleByID("http.reverse_proxy.transport.oauth2", []byte(`{
		"credentials": {"token_url": "https://auth.example.com/token", "client_id": "gateway", "client_secret": "secret"},
		"upstreams": [{"addresses": ["api.example.com:443"], "tenant": {"value": "acme"}}]
	}`))
	wantError(t, err, "")
}

func TestValidatingMakesNoTokenRequest(t *testing.T) {
	requests := make(chan struct{}, 100)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		requests <- struct{}{}
		w.Header().Set("Content-Type", "application/json")
		w.Write([]byte(`{"access_token":"t","token_type":"Bearer","expires_in":3600}`))
	}))
	defer server.Close()
	settings := "token_url " + server.URL + "\nclient_id " + t.Name() + "\nclient_secret secret"
	source := strings.Replace(proxyConfig("127.0.0.1:9000", settings), "http://localhost:8080", "http://localhost:0", 1)

	wantError(t, validateCaddyfile(t, source), "")
	transport, cleanUp, err := loadSettings(t, "127.0.0.1:9000", settings)
	if err != nil {
		t.Fatal(err)
	}
	tokens := transport.fallback.source
	tokens.mu.Lock()
	if tokens.inflight != nil || tokens.timer != nil {
		t.Error("got a token request under way, want none before the config runs")
	}
	tokens.mu.Unlock()
	cleanUp()

	// The same config does make one once it runs, so one would have shown.
	if err := caddy.Run(adaptCaddyfile(t, source)); err != nil {
		t.Fatal(err)
	}
	defer caddy.Stop()
	select {
	case <-requests:
	case <-time.After(10 * time.Second):
		t.Fatal("got no token request, want one once the config runs")
	}
	if got := len(requests); got != 0 {
		t.Errorf("got %d token requests more than one, want 0", got)
	}
}

func TestNothingResolvedIsWrittenBack(t *testing.T) {
	secretFile := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secretFile, []byte("resolved-file"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TEST_TOKEN_URL", "https://resolved-host.example.com/token")
	t.Setenv("TEST_VALUE", "resolved-value")
	t.Setenv("TEST_UPSTREAM", "127.0.0.1:9000")
	credentials := map[string]any{
		"token_url":             "{env.TEST_TOKEN_URL}",
		"client_id":             "{env.TEST_VALUE}",
		"client_secret":         "{file." + secretFile + "}",
		"scopes":                []any{"{env.TEST_VALUE}", "b"},
		"audience":              []any{"{env.TEST_VALUE}", "b"},
		"params":                map[string]any{"organization": "{env.TEST_VALUE}"},
		"token_request_headers": map[string]any{"X-Api-Key": "{env.TEST_VALUE}"},
		"tenant":                map[string]any{"value": "{env.TEST_VALUE}"},
		"headers":               map[string]any{"X-Region": "{env.TEST_VALUE}"},
	}
	upstreams := []any{map[string]any{"addresses": []any{"{env.TEST_UPSTREAM}"}, "scopes": []any{"{env.TEST_VALUE}"}}}
	transport, _, err := loadTransport(t, "127.0.0.1:9000", map[string]any{"credentials": credentials, "upstreams": upstreams})
	if err != nil {
		t.Fatal(err)
	}
	if got := transport.fallback.endpoint.credentials.ClientID; got != "resolved-value" {
		t.Fatalf("got client_id %q, want that it was resolved", got)
	}

	if got, want := encode(t, transport.Credentials), encode(t, credentials); !slices.Equal(sortKeys(t, got), want) {
		t.Errorf("got credentials %s, want %s", got, want)
	}
	if got, want := encode(t, transport.Upstreams), encode(t, upstreams); !slices.Equal(sortKeys(t, got), want) {
		t.Errorf("got upstreams %s, want %s", got, want)
	}
	if got := encode(t, transport); strings.Contains(string(got), "resolved") {
		t.Errorf("got %s, want nothing in it that was resolved", got)
	}
}

func sortKeys(t *testing.T, encoded []byte) []byte {
	t.Helper()
	var v any
	if err := json.Unmarshal(encoded, &v); err != nil {
		t.Fatal(err)
	}
	return encode(t, v)
}

func TestHeaderUpWithoutEffectIsLogged(t *testing.T) {
	for _, test := range []struct {
		headerUp string
		want     bool
	}{
		{"Authorization secret", true},
		{"+X-Tenant-Id globex", true},
		{"x_tenant_id globex", true},
		{"X-Region us", true},
		{"X-Request-Id {http.request.uuid}", false},
		{"-Authorization", false},
	} {
		t.Run(test.headerUp, func(t *testing.T) {
			config := adaptCaddyfile(t, strings.Replace(proxyConfig("127.0.0.1:9000", clientSettings+"header X-Region eu"),
				"transport", "header_up "+test.headerUp+"\ntransport", 1))
			file := filepath.Join(t.TempDir(), "log")
			config.Logging = &caddy.Logging{Logs: map[string]*caddy.CustomLog{"default": {
				BaseLog: caddy.BaseLog{WriterRaw: encode(t, map[string]string{"output": "file", "filename": file})},
			}}}
			err := caddy.Validate(config)
			defer caddy.Validate(new(caddy.Config)) // logs to the console again
			if err != nil {
				t.Fatal(err)
			}
			log, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Contains(string(log), "header_up has no effect"); got != test.want {
				t.Errorf("got %v, want %v that the log says so:\n%s", got, test.want, log)
			}
		})
	}
}
