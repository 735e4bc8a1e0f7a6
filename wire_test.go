package outboundauth

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"unicode"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// wire is a token endpoint without a network: it notes each request as the
// bytes that would be sent, and answers what a server would read of them. So
// the URL can be that of a real provider.
type wire struct {
	http.Handler

	mu       sync.Mutex
	sent     []string
	contexts []context.Context
}

func (w *wire) RoundTrip(req *http.Request) (*http.Response, error) {
	var b bytes.Buffer
	if err := req.Write(&b); err != nil {
		return nil, err
	}
	again, err := req.GetBody() // for a connection that breaks at once
	if err != nil {
		return nil, err
	}
	if body, _ := io.ReadAll(again); !bytes.HasSuffix(b.Bytes(), append([]byte("\r\n\r\n"), body...)) {
		return nil, fmt.Errorf("GetBody() gives %q, want the body that was sent", body)
	}
	w.mu.Lock()
	w.sent = append(w.sent, b.String())
	w.contexts = append(w.contexts, req.Context())
	w.mu.Unlock()

	received, err := http.ReadRequest(bufio.NewReader(&b))
	if err != nil {
		return nil, err
	}
	rec := httptest.NewRecorder()
	w.ServeHTTP(rec, received.WithContext(req.Context()))
	return rec.Result(), nil
}

func (w *wire) requests() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sent
}

// answering returns a wire whose server gives one answer to everything.
func answering(status int, body string) *wire {
	return &wire{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})}
}

// newTestClient makes a client of c as the product does.
func newTestClient(t testing.TB, c Credentials, way http.RoundTripper) *client {
	t.Helper()
	return newLoggingClient(t, c, way, zap.NewNop())
}

// releasing is held from the release of a client to the end of its source's afterlife:
// its timer may belong to a bubble, and nobody else may stop it.
var releasing sync.Mutex

func newLoggingClient(t testing.TB, c Credentials, way http.RoundTripper, logger *zap.Logger) *client {
	t.Helper()
	expanded, err := c.expand(caddy.NewReplacer())
	if err != nil {
		t.Fatalf("expand() = %v, want no error", err)
	}
	e, err := newEndpoint(expanded, c.TokenURL, tokenTransport{RoundTripper: way, config: []byte("null")}, false, logger, nil)
	if err != nil {
		t.Fatalf("newEndpoint() = %v, want no error", err)
	}
	cl, err := newClient(e, []byte("null"))
	if err != nil {
		t.Fatalf("newClient() = %v, want no error", err)
	}
	t.Cleanup(func() {
		releasing.Lock()
		defer releasing.Unlock()
		_ = cl.release()
		cl.source.endNow() // and not all others: a benchmark has 10,000 clients
	})
	return cl
}

// networkTransport is the token_transport that the product has by default.
func networkTransport(t *testing.T) http.RoundTripper {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	h := new(reverseproxy.HTTPTransport)
	if err := h.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = h.Cleanup()
		cancel()
	})
	return h
}

const goodAnswer = `{"access_token":"t0ken","token_type":"Bearer","expires_in":3600}`

const testTokenURL = "https://auth.example.com/token"

// What must appear in no error: servers of these tests send it back in every
// part of their answers.
const (
	canarySecret = "canary-s3cret"
	canaryToken  = "canary-t0ken"
)

// canaryForms are the secret and the token as they may be echoed.
var canaryForms = []string{"canary", "Y2FuYXJ5", "CANARY"}

func canaryCredentials(tokenURL string) Credentials {
	return Credentials{TokenURL: tokenURL, ClientID: "id", ClientSecret: canarySecret}
}

// wantTokenError checks what an error tells a machine.
func wantTokenError(t *testing.T, err error, code string, wantPermanent bool) *tokenError {
	t.Helper()
	var got *tokenError
	if !errors.As(err, &got) {
		t.Errorf("error = %v (%T), want a token error with the code %s", err, err, code)
		return new(tokenError)
	}
	if got.Code != code {
		t.Errorf("Code = %q, want %q (%v)", got.Code, code, err)
	}
	if got.Permanent() != wantPermanent || isPermanent(err) != wantPermanent {
		t.Errorf("Permanent() = %v, want %v (%v)", got.Permanent(), wantPermanent, err)
	}
	return got
}

// wantNoCanary checks all ways in which an error may be shown, and all that
// it wraps. It also holds the text to one line of a reasonable length.
func wantNoCanary(t *testing.T, err error) {
	t.Helper()
	for ; err != nil; err = errors.Unwrap(err) {
		shown, _ := json.Marshal(err)
		wantNoCanaryIn(t, fmt.Sprintf("%v %+v %#v %q %s", err, err, err, err, shown))
		if several, ok := err.(interface{ Unwrap() []error }); ok {
			for _, wrapped := range several.Unwrap() {
				wantNoCanary(t, wrapped)
			}
		}
		if got := err.Error(); len(got) > 600 || strings.ContainsFunc(got, unicode.IsControl) {
			t.Errorf("the error has %d bytes, %.100q, want one line of 600 at most", len(got), got)
		}
	}
}

func wantNoCanaryIn(t *testing.T, text string) {
	t.Helper()
	for _, canary := range canaryForms {
		if strings.Contains(text, canary) {
			t.Errorf("%.200q holds the secret or the token", text)
			return
		}
	}
}

func mustParse(raw string) *url.URL {
	u, err := url.Parse(raw)
	if err != nil {
		panic(err)
	}
	return u
}
