package outboundauth

import (
	"encoding/json"
	"io"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// The lines around what is kept of an example by somebody who has an account.
const (
	keepFrom = "\n# ---- The gateway: keep it ---"
	keepTo   = "\n# ---- The demonstration: delete it, from here to the end ---"
)

// kept does with an example what its comments tell those to do who have an account: it
// keeps the gateway, and writes what stands after `Yours:` in the place of the next line.
func kept(t *testing.T, source string) string {
	t.Helper()
	_, part, begins := strings.Cut(source, keepFrom)
	part, _, ends := strings.Cut(part, keepTo)
	if !begins || !ends {
		t.Fatalf("got an example without %q or without %q, want both", keepFrom, keepTo)
	}
	_, part, _ = strings.Cut(part, "\n\n") // the rest of the first line
	var config strings.Builder
	yours := ""
	for line := range strings.Lines(part) {
		indent, own, found := strings.Cut(line, "# Yours: ")
		switch {
		case found:
			yours = indent + own
			continue
		case yours != "":
			if got, want := strings.Fields(line)[0], strings.Fields(yours)[0]; got != want {
				t.Errorf("got %q after a comment about %s, want this setting", line, want)
			}
			line, yours = yours, ""
		}
		config.WriteString(line)
	}
	return config.String()
}

// demonstrations are what the comments of the examples promise, beside what the
// providers document.
var demonstrations = map[string]struct {
	method, ask string // a request
	refusal     string // file with the documented answer to a wrong secret, if there is one
	said        string // what the comments quote of the answer
	advice      string // what the log says
}{
	"idnow":           {http.MethodGet, "/api/v1/flows/ident/test/sessions", "", "invalid_client", "check client_id, client_secret and auth_method"},
	"didit":           {http.MethodPost, "/v1/session/", "", "Unknown application", "check token_url, client_id and client_secret"},
	"risk-data":       {http.MethodGet, "/persons?name=Smith", "risk_data_invalid_client.json", "Bad credentials", "check client_id, client_secret and auth_method"},
	"screening-eagle": {http.MethodGet, "/api/inspections/42", "screening_eagle_error.json", "permission denied", "check client_id, client_secret and scopes"},
	"personify":       {http.MethodGet, "/customers/42", "personify_error.json", "Invalid client credentials", "check client_id, client_secret and auth_method"},
}

// A runningExample is an example that runs in this process.
type runningExample struct {
	*gateway
	config string            // its Caddyfile
	at     *strings.Replacer // writes the ports that it listens on for those in the file
}

// runExample runs an example on free ports: those in the file may be those of a Caddy
// that somebody tries it with.
func runExample(t *testing.T, source string) *runningExample {
	t.Helper()
	g := newGateway(t)
	ports := []string{":8080", portOf(t, g.addr)}
	for _, port := range []string{":9400", ":9401"} {
		ports = append(ports, port, portOf(t, heldAddress(t)))
	}
	e := &runningExample{gateway: g, at: strings.NewReplacer(ports...)}
	// A busy machine may take longer to connect than Caddy waits by default.
	e.config = strings.Replace(e.at.Replace(source), "transport oauth2 {", "transport oauth2 {\n\tdial_timeout 1m", 1)

	config := adaptCaddyfile(t, e.config)
	config.Logging = &caddy.Logging{Logs: map[string]*caddy.CustomLog{caddy.DefaultLoggerName: {BaseLog: caddy.BaseLog{
		WriterRaw: encode(t, map[string]string{"output": "file", "filename": filepath.Join(g.dir, "log")}),
	}}}}
	if err := caddy.Run(config); err != nil {
		t.Fatal(err)
	}
	return e
}

func portOf(t *testing.T, addr string) string {
	t.Helper()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	return ":" + port
}

// ask sends the gateway a request, with a token and a tenant of the caller's own.
func (e *runningExample) ask(method, path string) reply {
	return e.send(method, path, nil, "Host", "localhost", "Authorization", "Bearer the-callers-own", "X-Tenant-Id", "the-callers-own")
}

// token reads which token the demonstration of the API has received.
func (r reply) token(t *testing.T) string {
	t.Helper()
	match := regexp.MustCompile(`(?m)^  Authorization: Bearer (demonstration\.\d+\.\S+)$`).FindStringSubmatch(r.body)
	if match == nil {
		t.Fatalf("got %q, want a token in it", r.body)
	}
	return match[1]
}

// exampleOf reads the example of a provider, with the replacements.
func exampleOf(t *testing.T, name string, edit []string) string {
	t.Helper()
	source := readFile(t, filepath.Join("examples", name+".Caddyfile"))
	if len(edit) > 0 && !strings.Contains(source, edit[0]) {
		t.Fatalf("the example has no %q to replace", edit[0])
	}
	return strings.NewReplacer(edit...).Replace(source)
}

// TestExamplesShowTokens runs each example of a provider, and does what its comments say.
// The demonstrations have to be as strict as the provider, or they would show nothing.
func TestExamplesShowTokens(t *testing.T) {
	for _, p := range providers {
		t.Run(p.name, func(t *testing.T) {
			d, source := demonstrations[p.example], exampleOf(t, p.example, p.edit)
			if !strings.Contains(source, "http://localhost:8080"+d.ask) {
				t.Errorf("got comments without a request for %s, want one", d.ask)
			}
			e := runExample(t, source)

			r := e.ask(d.method, d.ask).want(t, http.StatusOK)
			if want := "received " + d.method + " " + d.ask + "\n"; !strings.Contains(r.body, want) {
				t.Errorf("got %q, want %q in it", r.body, want)
			}
			if got := strings.Contains(r.body, "\n  X-Tenant-Id: acme\n"); got != (p.wantTenant != "") || strings.Contains(r.body, "the-callers-own") {
				t.Errorf("got %q, want the gateway's tenant: %t", r.body, p.wantTenant != "")
			}
			if first, second := r.token(t), e.ask(d.method, d.ask).want(t, http.StatusOK).token(t); first != second {
				t.Errorf("got the token %s after %s, want the same", second, first)
			}
			reports, err := requestTokens(adaptCaddyfile(t, e.config), wantedClients{}, false)
			if err != nil || len(reports) != 1 {
				t.Fatalf("got %d reports, err %v, want one", len(reports), err)
			}
			if r := reports[0]; r.Error != nil || r.Lifetime != p.wantLife.Seconds() || r.Granted != strings.Join(r.Scopes, " ") || len(r.Warnings) > 0 {
				t.Errorf("got %+v from oauth2-token, want a token for %v with all scopes", r, p.wantLife)
			}
			e.wantDocumented(t, p.wantRequest, p.answer, d.refusal)
			e.wantLiveTokens(t, d.method, d.ask)
		})
	}
}

// TestExamplesShowWrongSecrets runs each example of a provider with a wrong secret.
func TestExamplesShowWrongSecrets(t *testing.T) {
	for _, p := range providers {
		t.Run(p.name, func(t *testing.T) {
			d, source := demonstrations[p.example], exampleOf(t, p.example, p.edit)
			if comments, _, _ := strings.Cut(source, "\n{\n"); !strings.Contains(comments, d.said) {
				t.Errorf("got comments without %q, want that quoted", d.said)
			}
			// As the command of the comments.
			e := runExample(t, regexp.MustCompile(`client_secret .*`).ReplaceAllString(source, "client_secret wrong"))

			if r := e.ask(d.method, d.ask).want(t, http.StatusServiceUnavailable); r.header.Get("Retry-After") == "" {
				t.Errorf("got %v, want Retry-After", r.header)
			}
			eventually(t, func() bool { return len(e.logged("obtaining token failed", d.said, d.advice)) > 0 },
				"%q and %q in the log:\n%s", d.said, d.advice, e.logs())
		})
	}
}

// wantDocumented asks the demonstrations of a provider without the gateway.
func (e *runningExample) wantDocumented(t *testing.T, request, answer, refusal string) {
	t.Helper()
	status, got := e.requestToken(t, request, "demonstration-secret")
	want := decoded(t, documented(t, answer))
	delete(want, "exp") // of Didit: Caddy can't add
	if status != http.StatusOK || !slices.Equal(slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want))) ||
		got["expires_in"] != want["expires_in"] || got["token_type"] != want["token_type"] {
		t.Errorf("got %d %v, want the form of %v", status, got, want)
	}
	status, got = e.requestToken(t, request, "wrong")
	if status != http.StatusUnauthorized || (refusal != "" && !maps.Equal(got, decoded(t, documented(t, refusal)))) {
		t.Errorf("got %d %v after a wrong secret, want 401 and what is documented", status, got)
	}
}

// wantLiveTokens asks the demonstration of an API without the gateway.
func (e *runningExample) wantLiveTokens(t *testing.T, method, path string) {
	t.Helper()
	for _, authorization := range []string{"", "Bearer stolen", "Bearer demonstration.1.dead"} {
		req, err := http.NewRequest(method, e.api(t)+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", authorization)
		if status, body := e.do(t, req); status != http.StatusUnauthorized {
			t.Errorf("got %d %q with %q, want 401", status, body, authorization)
		}
	}
}

// requestToken sends a token request as a provider documents it.
func (e *runningExample) requestToken(t *testing.T, request, secret string) (status int, answer map[string]any) {
	t.Helper()
	head, form, _ := strings.Cut(request, "\r\n\r\n")
	form = strings.NewReplacer("your-client-id", "demonstration", "your-client-secret", secret).Replace(form)
	req, err := http.NewRequest(http.MethodPost, e.at.Replace("http://127.0.0.1:9400")+strings.Fields(head)[1], strings.NewReader(form))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if strings.Contains(head, documentedBasic) {
		req.SetBasicAuth("demonstration", secret)
	}
	status, body := e.do(t, req)
	return status, decoded(t, body)
}

func (e *runningExample) do(t *testing.T, req *http.Request) (status int, body string) {
	t.Helper()
	res, err := e.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	content, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(content)
}

// api is where the demonstration of the API is.
func (e *runningExample) api(t *testing.T) string {
	t.Helper()
	match := regexp.MustCompile(`(?m)^\treverse_proxy (http://127\.0\.0\.1:\d+) \{$`).FindStringSubmatch(e.config)
	if match == nil {
		t.Fatalf("got no reverse_proxy to a demonstration, want one in\n%s", e.config)
	}
	return match[1]
}

func decoded(t *testing.T, text string) map[string]any {
	t.Helper()
	var object map[string]any
	if err := json.Unmarshal([]byte(text), &object); err != nil {
		t.Fatalf("got %v, want that this is a JSON object: %q", err, text)
	}
	return object
}

// TestNothingOfDemonstrationsIsKept has what the comments make of an example: it works
// without the rest of the file, and asks the provider.
func TestNothingOfDemonstrationsIsKept(t *testing.T) {
	for name := range demonstrations {
		t.Run(name, func(t *testing.T) {
			config := kept(t, exampleOf(t, name, nil))
			if got := string(caddyfile.Format([]byte(config))); got != config {
				t.Errorf("got\n%s\nwant it formatted:\n%s", config, got)
			}
			for _, part := range []string{"demonstration", ":94", "acme"} {
				if strings.Contains(config, part) {
					t.Errorf("got\n%s\nwant no %q in it", config, part)
				}
			}
			setPlaceholders(t, []byte(config))
			wantError(t, validateCaddyfile(t, config), "")
		})
	}
}
