package outboundauth

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

func TestTokenRequestIsWhatTheConfigAsksFor(t *testing.T) {
	t.Setenv("TEST_REGION", "eu/1 ü")
	t.Setenv("TEST_API_KEY", "k3y")
	base := Credentials{TokenURL: "https://auth.example.com/token", ClientID: "id", ClientSecret: "secret"}
	request := func(path, auth, extra, body string) string {
		return "POST " + path + " HTTP/1.1\r\n" +
			"Host: auth.example.com\r\n" +
			"User-Agent: caddy-outbound-auth\r\n" +
			"Connection: close\r\n" +
			fmt.Sprintf("Content-Length: %d\r\n", len(body)) +
			"Accept: application/json\r\n" +
			auth +
			"Content-Type: application/x-www-form-urlencoded\r\n" +
			extra + "\r\n" + body
	}
	const basic = "Authorization: Basic aWQ6c2VjcmV0\r\n"

	for _, test := range []struct {
		name   string
		modify func(*Credentials)
		want   string
	}{
		{
			name:   "nothing but the grant, and no empty scope",
			modify: func(*Credentials) {},
			want:   request("/token", basic, "", "grant_type=client_credentials"),
		},
		{
			name:   "path and query of token_url are kept as written",
			modify: func(c *Credentials) { c.TokenURL = "https://auth.example.com/t%2Fa//token/?tenant=a%20b&x" },
			want:   request("/t%2Fa//token/?tenant=a%20b&x", basic, "", "grant_type=client_credentials"),
		},
		{
			name:   "token_url without a path",
			modify: func(c *Credentials) { c.TokenURL = "https://auth.example.com" },
			want:   request("/", basic, "", "grant_type=client_credentials"),
		},
		{
			name:   "scopes in one parameter",
			modify: func(c *Credentials) { c.Scopes = []string{"read:a", "write:a+b"} },
			want:   request("/token", basic, "", "grant_type=client_credentials&scope=read%3Aa+write%3Aa%2Bb"),
		},
		{
			name:   "audience once for each value",
			modify: func(c *Credentials) { c.Audience = []string{"https://b.example", "a"} },
			want:   request("/token", basic, "", "audience=https%3A%2F%2Fb.example&audience=a&grant_type=client_credentials"),
		},
		{
			name:   "param",
			modify: func(c *Credentials) { c.Params = map[string]string{"region": "{env.TEST_REGION}", "v&": "{2}"} },
			want:   request("/token", basic, "", "grant_type=client_credentials&region=eu%2F1+%C3%BC&v%26=%7B2%7D"),
		},
		{
			name: "token_request_header, which may replace the defaults",
			modify: func(c *Credentials) {
				c.TokenRequestHeaders = map[string]string{"X-Api-Key": "{env.TEST_API_KEY}", "Accept": "*/*"}
			},
			want: strings.Replace(request("/token", basic, "X-Api-Key: k3y\r\n", "grant_type=client_credentials"),
				"application/json", "*/*", 1),
		},
		{
			name:   "client_secret_post",
			modify: func(c *Credentials) { c.AuthMethod = authPost },
			want:   request("/token", "", "", "client_id=id&client_secret=secret&grant_type=client_credentials"),
		},
		{
			name:   "no authentication",
			modify: func(c *Credentials) { c.AuthMethod, c.ClientSecret = authNone, "" },
			want:   request("/token", "", "", "client_id=id&grant_type=client_credentials"),
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := base
			test.modify(&c)
			server := answering(http.StatusOK, goodAnswer)
			cl := newTestClient(t, c, server)
			for range 2 { // the second is the same as the first
				if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
					t.Fatalf("request() = %v, want no error", err)
				}
			}
			for _, got := range server.requests() {
				if got != test.want {
					t.Errorf("sent\n%q, want\n%q", got, test.want)
				}
			}
		})
	}
}

func TestSecretsAreResolvedForEachRequest(t *testing.T) {
	file := filepath.Join(t.TempDir(), "param")
	server := answering(http.StatusOK, goodAnswer)
	c := Credentials{
		TokenURL: "https://auth.example.com/token", ClientID: "id", AuthMethod: authPost,
		ClientSecret:        "{env.TEST_ROTATED}",
		Params:              map[string]string{"extra": "{file." + file + "}"},
		TokenRequestHeaders: map[string]string{"X-Key": "key {env.TEST_ROTATED}"},
	}
	t.Setenv("TEST_ROTATED", "unset at first")
	cl := newTestClient(t, c, server)

	var before string
	for i, value := range []string{"first", "second"} {
		t.Setenv("TEST_ROTATED", value)
		if err := os.WriteFile(file, []byte(value+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		fingerprint := cl.endpoint.fingerprint(t.Context())
		if fingerprint == before {
			t.Error("fingerprint() is the same for another secret")
		}
		if got := cl.endpoint.fingerprint(t.Context()); got != fingerprint {
			t.Errorf("fingerprint() = %x, want %x as before", got, fingerprint)
		}
		if strings.Contains(fingerprint, value) {
			t.Errorf("fingerprint() holds the secret %q", value)
		}
		before = fingerprint

		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Fatalf("request() = %v, want no error", err)
		}
		sent := server.requests()[i]
		head, body, _ := strings.Cut(sent, "\r\n\r\n")
		if want := "client_id=id&client_secret=" + value + "&extra=" + value + "&grant_type=client_credentials"; body != want {
			t.Errorf("sent the form %q, want %q", body, want)
		}
		if want := "X-Key: key " + value; !strings.Contains(head, want) {
			t.Errorf("sent the header %q, want %q in it", head, want)
		}
	}
	if cl.endpoint.credentials.ClientSecret != c.ClientSecret {
		t.Errorf("the endpoint keeps the secret %q, want the placeholder %q", cl.endpoint.credentials.ClientSecret, c.ClientSecret)
	}
}

func TestUnusableSecretMakesNoRequest(t *testing.T) {
	t.Setenv("TEST_EMPTY", "")
	t.Setenv("TEST_CONTROL", canarySecret+"\r\nX-Admin: 1")
	missing := filepath.Join(t.TempDir(), "none")
	for _, test := range []struct {
		name string
		c    Credentials
		want string // in the error
	}{
		{"client_secret empty", Credentials{ClientSecret: "{env.TEST_EMPTY}"}, "client_secret: {env.TEST_EMPTY} is empty"},
		{"client_secret in part", Credentials{ClientSecret: canarySecret + "{env.TEST_EMPTY}"}, "{env.TEST_EMPTY}"},
		{"client_secret unset", Credentials{ClientSecret: "{env.TEST_UNSET_VARIABLE}"}, "client_secret: {env.TEST_UNSET_VARIABLE} is not set"},
		{"client_secret in the body", Credentials{AuthMethod: authPost, ClientSecret: "{env.TEST_EMPTY}"}, "{env.TEST_EMPTY}"},
		{"client_secret in a missing file", Credentials{ClientSecret: "{file." + missing + "}"}, "client_secret: {file." + missing + "} does not exist"},
		{"param", Credentials{Params: map[string]string{"p": "{env.TEST_EMPTY}"}}, "param p: {env.TEST_EMPTY} is empty"},
		{"token_request_header", Credentials{TokenRequestHeaders: map[string]string{"X-Key": "{env.TEST_EMPTY}"}}, "token_request_header X-Key: {env.TEST_EMPTY} is empty"},
		{"token_request_header of two lines", Credentials{TokenRequestHeaders: map[string]string{"X-Key": "{env.TEST_CONTROL}"}}, "token_request_header X-Key: the value holds a control character"},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.c.TokenURL, test.c.ClientID = "https://auth.example.com/token", "id"
			if test.c.ClientSecret == "" {
				test.c.ClientSecret = canarySecret
			}
			server := answering(http.StatusOK, goodAnswer)
			cl := newTestClient(t, test.c, server)
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			wantTokenError(t, err, codeConfiguration, true)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("request() = %v, want %q in it", err, test.want)
			}
			if got := len(server.requests()); got != 0 {
				t.Errorf("%d requests were made, want 0", got)
			}
			if cl.endpoint.fingerprint(t.Context()) == "" {
				t.Error(`fingerprint() = "", want one that changes when the secret is there`)
			}
		})
	}
}

func TestTokenRequestHasNoValueOfAnotherContext(t *testing.T) {
	type key struct{}
	repl := caddy.NewReplacer()
	repl.Set("http.request.host", "upstream.example")
	ctx := context.WithValue(t.Context(), key{}, "the proxied request's")
	ctx = context.WithValue(ctx, caddy.ReplacerCtxKey, repl)
	ctx = context.WithValue(ctx, caddyhttp.VarsCtxKey, map[string]any{"client_ip": "192.0.2.1"})
	ctx = context.WithValue(ctx, dialInfoKey, reverseproxy.DialInfo{Network: "tcp", Address: "upstream.example:443"})
	if _, ok := reverseproxy.GetDialInfo(ctx); !ok {
		t.Fatal("the context of the proxied request has no dial info, so this test proves nothing")
	}

	server := answering(http.StatusOK, goodAnswer)
	cl := newTestClient(t, Credentials{TokenURL: "https://auth.example.com/token", ClientID: "clean", ClientSecret: "secret"}, server)
	if _, _, err := cl.source.Token(ctx); err != nil {
		t.Fatalf("Token() = %v, want no error", err)
	}
	got := server.contexts[0]
	if info, ok := reverseproxy.GetDialInfo(got); ok {
		t.Errorf("the token request would be sent to %v, the upstream", info)
	}
	for _, k := range []any{key{}, caddyhttp.VarsCtxKey} {
		if v := got.Value(k); v != nil {
			t.Errorf("Value(%v) = %v, want nil", k, v)
		}
	}
	if own, ok := got.Value(caddy.ReplacerCtxKey).(*caddy.Replacer); !ok || own == repl {
		t.Errorf("the replacer is %v, want one that knows nothing of the request", own)
	}
	if _, ok := got.Deadline(); !ok {
		t.Error("the token request has no deadline, want token_timeout")
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	elsewhere := make(chan string, 10)
	second := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		elsewhere <- r.Method + " " + r.Host
		_, _ = io.WriteString(w, goodAnswer)
	}))
	defer second.Close()

	for _, status := range []int{300, 301, 302, 303, 304, 307, 308} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			first := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Location", second.URL+"/?"+canarySecret)
				w.WriteHeader(status)
			}))
			defer first.Close()
			cl := newTestClient(t, canaryCredentials(first.URL), networkTransport(t))
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			got := wantTokenError(t, err, codeHTTPStatus, true)
			if got.Status != status || got.Hint == "" {
				t.Errorf("request() = %v, want the status %d and a hint", err, status)
			}
			wantNoCanary(t, err)
		})
	}
	close(elsewhere)
	for hit := range elsewhere {
		t.Errorf("the redirect was followed: %s", hit)
	}
}

func TestSlowServerIsTimeout(t *testing.T) {
	for name, answer := range map[string]func(http.ResponseWriter, <-chan struct{}){
		"no answer": func(_ http.ResponseWriter, gone <-chan struct{}) { <-gone },
		"half an answer": func(w http.ResponseWriter, gone <-chan struct{}) {
			_, _ = io.WriteString(w, `{"access_token":"`+canaryToken)
			w.(http.Flusher).Flush()
			<-gone
		},
		"an answer that trickles": func(w http.ResponseWriter, gone <-chan struct{}) {
			for {
				_, _ = io.WriteString(w, " ")
				w.(http.Flusher).Flush()
				select {
				case <-gone:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body) // so that the server notices when the client goes
				answer(w, r.Context().Done())
			}))
			defer server.Close()
			c := canaryCredentials(server.URL)
			c.TokenTimeout = caddy.Duration(60 * time.Millisecond)
			cl := newTestClient(t, c, networkTransport(t))

			started := time.Now()
			_, _, err := cl.source.Token(t.Context())
			if took := time.Since(started); took > 5*time.Second {
				t.Errorf("Token() took %v, want about 60ms", took)
			}
			wantTokenError(t, err, codeTimeout, false)
			wantNoCanary(t, err)
			if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Token() = %v, which wraps an error of a context that is not the caller's", err)
			}
			if got := statusOf(err); got != http.StatusGatewayTimeout {
				t.Errorf("statusOf() = %d, want 504", got)
			}
		})
	}
}

// What a server sends on a connection that is kept for the next request,
// net/http writes to the log, where it could be the secret.
func TestNoConnectionIsKept(t *testing.T) {
	closed := make(chan error, 1)
	url := rawServer(t, func(conn net.Conn, r *bufio.Reader) {
		req, err := http.ReadRequest(r)
		if err == nil {
			_, err = io.Copy(io.Discard, req.Body)
		}
		if err == nil {
			_, _ = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(goodAnswer), goodAnswer)
			_, err = r.ReadByte()
		}
		closed <- err
	})
	cl := newTestClient(t, canaryCredentials(url), networkTransport(t))
	if _, _, err := cl.source.Token(t.Context()); err != nil {
		t.Fatalf("Token() = %v, want no error", err)
	}
	if err := <-closed; !errors.Is(err, io.EOF) {
		t.Errorf("the connection ended with %v, want that the client closes it", err)
	}
}

func TestFetchesAreLoggedWithoutSecrets(t *testing.T) {
	core, logs := observer.New(zapcore.DebugLevel)
	status := http.StatusUnauthorized
	server := &wire{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		if status == http.StatusOK {
			_, _ = io.WriteString(w, `{"access_token":"`+canaryToken+`"}`)
		} else {
			_, _ = io.WriteString(w, `{"error":"invalid_client","error_description":"unknown: `+canarySecret+`"}`)
		}
	})}
	c := canaryCredentials("https://auth.example.com/token")
	c.ClientSecret = "{env.TEST_LOGGED_SECRET}"
	t.Setenv("TEST_LOGGED_SECRET", canarySecret)
	cl := newLoggingClient(t, c, server, zap.New(core))

	fetch := func(n int) {
		_, _, _ = cl.source.Token(t.Context())
		cl.source.drop()
		// The fetch ends, for its callers, before its line is written.
		eventually(t, func() bool { return logs.Len() >= n }, "%d lines", n)
	}
	fetch(1)
	cl.endpoint.fetched(nil, &fetchError{err: errReleased}, 1) // no news
	status = http.StatusOK
	cl.source.mu.Lock()
	cl.source.lastErr = &fetchError{err: cl.source.lastErr.err} // the back-off is over
	cl.source.mu.Unlock()
	fetch(2)
	fetch(3)

	want := []struct {
		level   zapcore.Level
		message string
	}{
		{zapcore.WarnLevel, "obtaining token failed"},
		{zapcore.InfoLevel, "obtaining token succeeded again"},
		{zapcore.DebugLevel, "obtained token"},
	}
	entries := logs.All()
	if len(entries) != len(want) {
		t.Fatalf("got %d log entries %v, want %d", len(entries), entries, len(want))
	}
	for i, entry := range entries {
		if entry.Level != want[i].level || entry.Message != want[i].message {
			t.Errorf("entry %d is %v %q, want %v %q", i, entry.Level, entry.Message, want[i].level, want[i].message)
		}
		fields := entry.ContextMap()
		if fields["token_endpoint"] != "auth.example.com" || fields["client_id"] != c.ClientID {
			t.Errorf("entry %d has the fields %v, want the token endpoint's host and the client's id", i, fields)
		}
		wantNoCanaryIn(t, fmt.Sprint(fields))
	}
}

// A token request that another has overtaken got no answer, and not a network error.
func TestOvertakenRequestCountsAsTimeout(t *testing.T) {
	auth := newAuthServer(t)
	var asked atomic.Int32
	auth.script(func(_ http.ResponseWriter, r tokenRequest) bool {
		if asked.Add(1) > 1 {
			return false
		}
		<-r.ctx.Done()
		return true
	})
	up := newUpstream(t, auth)
	g := newOperableGateway(t)
	name := newName()
	g.load(proxySite(up, auth, "token_timeout 400ms\nname "+name))
	g.get().want(t, http.StatusOK)
	eventually(t, func() bool {
		got := g.scrape().of(name)
		return got[`token_requests_total{result="timeout"}`] == 1 && got[`token_requests_total{result="ok"}`] == 1
	}, "a timeout and a token")
}
