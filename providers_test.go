package outboundauth

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// providers are services that document how to obtain their tokens. The files
// in testdata/providers are the examples of their documentation, and the
// configs are those in examples/.
var providers = []struct {
	name    string
	example string
	edit    []string // replacements in the example
	env     string   // prefix of the variables that the example reads

	wantRequest string
	answer      string
	wantToken   string
	wantLife    time.Duration
	wantScope   string
	wantTenant  string // what the upstream is sent as X-Tenant-Id

	refusals []documentedRefusal
}{
	{
		name: "IDnow with client_secret_basic", example: "idnow", env: "IDNOW",
		wantRequest: documentedRequest("auth.idnow.example", "/oidc/token", documentedBasic, "grant_type=client_credentials"),
		answer:      "idnow_token.json",
		wantToken:   "eyJh...QifQ.eyJ...hIOw",
		wantLife:    24 * time.Hour,
	},
	{
		name: "IDnow with client_secret_post", example: "idnow", env: "IDNOW",
		edit: []string{"auth_method client_secret_basic", "auth_method client_secret_post"},
		wantRequest: documentedRequest("auth.idnow.example", "/oidc/token", "",
			"client_id=your-client-id&client_secret=your-client-secret&grant_type=client_credentials"),
		answer:    "idnow_token.json",
		wantToken: "eyJh...QifQ.eyJ...hIOw",
		wantLife:  24 * time.Hour,
	},
	{
		// No token_type, members that are unknown, and a path whose slash at
		// the end matters.
		name: "Didit", example: "didit", env: "DIDIT",
		wantRequest: documentedRequest("apx.didit.me", "/auth/v2/token/", documentedBasic, "grant_type=client_credentials"),
		answer:      "didit_token.json",
		wantToken:   "your-cient-access-token",
		wantLife:    24 * time.Hour,
		refusals: []documentedRefusal{
			// Documented is only that the reason stands in `message`.
			{status: 401, body: `{"message":"Unknown application"}`, code: codeHTTPStatus, description: "Unknown application", permanent: true},
		},
	},
	{
		name: "risk data", example: "risk-data", env: "RISK_DATA",
		wantRequest: documentedRequest("login.risk-data.example", "/oauth/token", documentedBasic,
			"grant_type=client_credentials&scope=persons.search+companies.read+credit_decisions.create"),
		answer:    "risk_data_token.json",
		wantToken: "eyJhb....seAtPCCQ",
		wantLife:  time.Hour,
		wantScope: "<token scope>",
		refusals: []documentedRefusal{
			{status: 401, file: "risk_data_invalid_client.json", code: "invalid_client", description: "Bad credentials", permanent: true},
		},
	},
	{
		// An id_token and a refresh_token, which are ignored, and errors with
		// a member of another name.
		name: "Screening Eagle", example: "screening-eagle", env: "SCREENING_EAGLE",
		wantRequest: documentedRequest("api.screening-eagle.example", "/api/id/v1/auth/token", documentedBasic,
			"grant_type=client_credentials&scope=openid+email+profile+inspect"),
		answer:    "screening_eagle_token.json",
		wantToken: "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJhdWQiOiJpbnRlZ3JhdGlvbi1kZXYtVk5aUXFEdDRIdiIsImV4cCI6MTcxNjQ2NjIxOCwianRpIjoiYjc4N2FiMTUtNDgxNS00MTFmLTkzYjctYzc5YWIxNWYwZDg3IiwiaWF0IjoxNzE1ODYxNDE4LCJpc3MiOiJTY3JlZW5pbmcgRWFnbGUgSUQiLCJzdWIiOiIxMzAyIiwic2NwIjoib3BlbmlkIGVtYWlsIHByb2ZpbGUgaW5zcGVjdCIsInNjb3BlcyI6WyJ1c2VyIl0sInVzZXJJRCI6MTMwMiwidXNlclJlZ2lvbiI6IlNHIn0.zsN5ys3qdmcJmJwzZHR9c9LC92KPTh2-NaliF2eSHFc",
		wantLife:  7 * 24 * time.Hour,
		wantScope: "openid email profile inspect",
		refusals: []documentedRefusal{
			{status: 400, file: "screening_eagle_error.json", code: "Forbidden", description: "permission denied", permanent: true},
			{status: 401, file: "screening_eagle_error.json", code: "Forbidden", description: "permission denied", permanent: true},
			{status: 403, file: "screening_eagle_error.json", code: "Forbidden", description: "permission denied", permanent: true},
			{status: 404, file: "screening_eagle_error.json", code: "Forbidden", description: "permission denied", permanent: true},
			{status: 500, file: "screening_eagle_error.json", code: "Forbidden", description: "permission denied"},
		},
	},
	{
		name: "Personify", example: "personify", env: "PERSONIFY",
		wantRequest: documentedRequest("prod.personifyauth.com", "/connect/token", "",
			"client_id=your-client-id&client_secret=your-client-secret&grant_type=client_credentials&scope=idp_api"),
		answer:     "personify_token.json",
		wantToken:  "<jwt_access_token>",
		wantLife:   time.Hour,
		wantScope:  "idp_api",
		wantTenant: "tenant-id",
		refusals: []documentedRefusal{
			// Which of the two statuses it has is not documented.
			{status: 400, file: "personify_error.json", code: "invalid_client", description: "Invalid client credentials", permanent: true},
			{status: 401, file: "personify_error.json", code: "invalid_client", description: "Invalid client credentials", permanent: true},
		},
	},
}

type documentedRefusal struct {
	status            int
	file, body        string // one of them
	code, description string
	permanent         bool
}

// documentedBasic is what the providers document for the Authorization
// header, `"Basic " + Base64(client_id:client_secret)`.
var documentedBasic = "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("your-client-id:your-client-secret")) + "\r\n"

// documentedRequest is a token request as it is sent.
func documentedRequest(host, path, authorization, form string) string {
	return "POST " + path + " HTTP/1.1\r\n" +
		"Host: " + host + "\r\n" +
		"User-Agent: caddy-outbound-auth\r\n" +
		"Connection: close\r\n" +
		fmt.Sprintf("Content-Length: %d\r\n", len(form)) +
		"Accept: application/json\r\n" +
		authorization +
		"Content-Type: application/x-www-form-urlencoded\r\n" +
		"\r\n" + form
}

func documented(t *testing.T, file string) string {
	t.Helper()
	body, err := os.ReadFile(filepath.Join("testdata", "providers", file))
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// loadExample loads the transport of an example as part of its reverse proxy, with what
// belongs to an account in the place of the demonstration. Its token requests go to the
// token server, and the proxied ones to upstream.
func loadExample(t *testing.T, example, env string, edit []string, tokens *wire, upstream http.Handler) (*Transport, string) {
	t.Helper()
	t.Setenv(env+"_CLIENT_ID", "your-client-id")
	t.Setenv(env+"_CLIENT_SECRET", "your-client-secret")
	t.Setenv(env+"_TENANT", "tenant-id")

	config := kept(t, exampleOf(t, example, edit))
	proxies := findModules(t, encode(t, adaptCaddyfile(t, config)), "handler", "reverse_proxy")
	if len(proxies) != 1 {
		t.Fatalf("the example has %d reverse proxies, want 1", len(proxies))
	}
	dial := proxies[0]["upstreams"].([]any)[0].(map[string]any)["dial"].(string)
	transport, _, err := loadTransport(t, dial, proxies[0]["transport"])
	if err != nil {
		t.Fatalf("the example does not load: %v", err)
	}
	transport.fallback.endpoint.transport = tokens

	server := httptest.NewServer(upstream)
	t.Cleanup(server.Close)
	toServer := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, server.Listener.Addr().String())
	}
	// What the transport takes for TLS: the test needs the request, not the
	// encryption.
	transport.HTTPTransport.Transport = &http.Transport{DialTLSContext: toServer}
	t.Cleanup(transport.HTTPTransport.Transport.CloseIdleConnections)
	return transport, dial
}

// proxied is a request on its way to an upstream.
func proxied(t *testing.T, dial, path string) *http.Request {
	t.Helper()
	host, port, err := net.SplitHostPort(dial)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.WithValue(t.Context(), caddyhttp.VarsCtxKey, map[string]any{})
	ctx = context.WithValue(ctx, caddy.ReplacerCtxKey, caddy.NewReplacer())
	ctx = context.WithValue(ctx, dialInfoKey, reverseproxy.DialInfo{Network: "tcp", Address: dial, Host: host, Port: port})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+dial+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer the-callers-own")
	req.Header.Set("X-Tenant-Id", "the-callers-own")
	return req
}

func TestDocumentedProvidersAreSpokenTo(t *testing.T) {
	for _, p := range providers {
		t.Run(p.name, func(t *testing.T) {
			var got http.Header
			tokens := answering(http.StatusOK, documented(t, p.answer))
			transport, dial := loadExample(t, p.example, p.env, p.edit, tokens, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				got = r.Header
			}))

			g, err := transport.fallback.endpoint.locateAndRequest(t.Context(), nil)
			g.issued, g.took = time.Time{}, 0
			if want := (grant{accessToken: p.wantToken, lifetime: p.wantLife, scope: p.wantScope}); err != nil || g != want {
				t.Errorf("request() = %v, %v, want %v", g, err, want)
			}
			if sent := tokens.requests()[0]; sent != p.wantRequest {
				t.Errorf("sent\n%q, want\n%q", sent, p.wantRequest)
			}

			res, err := transport.RoundTrip(proxied(t, dial, "/"))
			if err != nil {
				t.Fatalf("RoundTrip() = %v, want no error", err)
			}
			_ = res.Body.Close()
			if want := []string{"Bearer " + p.wantToken}; !slices.Equal(got["Authorization"], want) {
				t.Errorf("the upstream was sent Authorization %q, want %q", got["Authorization"], want)
			}
			if got := strings.Join(got["X-Tenant-Id"], ", "); got != p.wantTenant {
				t.Errorf("the upstream was sent X-Tenant-Id %q, want %q", got, p.wantTenant)
			}
			tok, _, err := transport.fallback.source.Token(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if ahead := tok.expires.Sub(tok.refreshAt); ahead < 60*time.Second || ahead > p.wantLife/2 {
				t.Errorf("the token is renewed %v before its end, want a minute at least and half its life at most", ahead)
			}
		})
	}
}

func TestDocumentedRefusalsAreUnderstood(t *testing.T) {
	for _, p := range providers {
		for _, refusal := range p.refusals {
			t.Run(fmt.Sprintf("%s %d", p.name, refusal.status), func(t *testing.T) {
				body := refusal.body
				if refusal.file != "" {
					body = documented(t, refusal.file)
				}
				tokens := answering(refusal.status, body)
				transport, dial := loadExample(t, p.example, p.env, p.edit, tokens, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
					t.Error("the upstream was sent a request without a token")
				}))
				_, err := transport.fallback.endpoint.locateAndRequest(t.Context(), nil)
				got := wantTokenError(t, err, refusal.code, refusal.permanent)
				if got.Status != refusal.status || got.Description != refusal.description {
					t.Errorf("request() = %v, want the status %d and the description %q", err, refusal.status, refusal.description)
				}
				if strings.Contains(err.Error(), "your-client-secret") {
					t.Errorf("the error %q holds the secret", err)
				}

				// How the proxy tells its client is tested with the transport.
				if res, _ := transport.RoundTrip(proxied(t, dial, "/")); res != nil {
					_ = res.Body.Close()
				}
			})
		}
	}
}

// TestInvalidTokenIsReplaced has the answer that the API of the risk data
// provider gives to a token that it does not accept any more.
func TestInvalidTokenIsReplaced(t *testing.T) {
	refusal := documented(t, "risk_data_invalid_token.json")
	for _, test := range []struct {
		name         string
		accepted     string // the token that the API accepts
		wantStatus   int
		wantBody     string
		wantUpstream []string
	}{
		{"the next one is accepted", "t2", http.StatusOK, "persons", []string{"Bearer t1", "Bearer t2"}},
		{"the next one is refused as well", "none", http.StatusUnauthorized, refusal, []string{"Bearer t1", "Bearer t2"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			issued := 0
			tokens := &wire{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				issued++
				_, _ = fmt.Fprintf(w, `{"access_token":"t%d","token_type":"Bearer","expires_in":3600}`, issued)
			})}
			var sent []string
			transport, dial := loadExample(t, "risk-data", "RISK_DATA", nil, tokens, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				sent = append(sent, r.Header.Get("Authorization"))
				if r.Header.Get("Authorization") != "Bearer "+test.accepted {
					w.WriteHeader(http.StatusUnauthorized)
					_, _ = io.WriteString(w, refusal)
					return
				}
				_, _ = io.WriteString(w, "persons")
			}))
			res, err := transport.RoundTrip(proxied(t, dial, "/persons?name=Smith"))
			if err != nil {
				t.Fatalf("RoundTrip() = %v, want no error", err)
			}
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			if err != nil || res.StatusCode != test.wantStatus || string(body) != test.wantBody {
				t.Errorf("got %d %q, %v, want %d %q", res.StatusCode, body, err, test.wantStatus, test.wantBody)
			}
			if !slices.Equal(sent, test.wantUpstream) {
				t.Errorf("the upstream was sent %q, want %q", sent, test.wantUpstream)
			}
		})
	}
}
