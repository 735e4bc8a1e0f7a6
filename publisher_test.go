package outboundauth

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// The issuer of these tests, and the pages that its server may have.
const (
	testIssuer  = "https://as.example.com"
	oauthPlace  = testIssuer + "/.well-known/oauth-authorization-server"
	openidPlace = testIssuer + "/.well-known/openid-configuration"
	tokenPlace  = testIssuer + "/token"
	movedPlace  = testIssuer + "/moved/token"

	issuerClient = "issuer " + testIssuer + "\nclient_id gateway\n"
	issuerSecret = issuerClient + "client_secret " + canarySecret + "\n"
)

// A publisher is an authorization server without a network: pages by URL, and
// nothing (404) elsewhere. It notes what it is asked.
type publisher struct {
	mu     sync.Mutex
	pages  map[string]http.HandlerFunc
	asked  []string // method and URL
	header http.Header
	form   url.Values
}

// newPublisher makes a server with this metadata at the place of RFC 8414,
// which issues tokens.
func newPublisher(metadata string) *publisher {
	return &publisher{pages: map[string]http.HandlerFunc{
		oauthPlace: page(http.StatusOK, metadata),
		tokenPlace: page(http.StatusOK, goodAnswer),
		movedPlace: page(http.StatusOK, goodAnswer),
	}}
}

func page(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// refusesConnections is the page of a server that is not there.
func refusesConnections(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// hangs is the page of a server that never answers.
func hangs(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

func redirects(status int, to string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", to)
		w.WriteHeader(status)
	}
}

// RoundTrip implements http.RoundTripper.
func (p *publisher) RoundTrip(req *http.Request) (res *http.Response, err error) {
	at := req.URL.Scheme + "://" + req.Host + req.URL.RequestURI()
	var body []byte
	if req.Body != nil {
		if body, err = io.ReadAll(req.Body); err != nil {
			return nil, err
		}
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.asked = append(p.asked, req.Method+" "+at)
	p.header, p.form = req.Header.Clone(), form
	serve, ok := p.pages[at]
	p.mu.Unlock()
	if !ok {
		serve = http.NotFound
	}

	defer func() {
		switch broken := recover(); broken {
		case nil:
		case io.EOF:
			res, err = nil, io.EOF
		default:
			res, err = nil, reverseproxy.NewDialError(syscall.ECONNREFUSED)
		}
	}()
	rec := httptest.NewRecorder()
	serve(rec, req)
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	return rec.Result(), nil
}

// publish replaces a page.
func (p *publisher) publish(at string, serve http.HandlerFunc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pages[at] = serve
}

// sent is what the last request consisted of.
func (p *publisher) sent() (http.Header, url.Values) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.header, p.form
}

// wantAsked fails the test unless these were the requests since the last call.
func (p *publisher) wantAsked(t *testing.T, want ...string) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !slices.Equal(p.asked, want) {
		t.Errorf("got the requests\n%q, want\n%q", p.asked, want)
	}
	p.asked = nil
}

// sortAsked is for requests that are made at the same time.
func (p *publisher) sortAsked() {
	p.mu.Lock()
	defer p.mu.Unlock()
	slices.Sort(p.asked)
}

// newCountingIssuer starts an issuer whose token endpoint is that of auth, and
// counts how often it is looked up.
func newCountingIssuer(t *testing.T, auth *authServer) (issuer *httptest.Server, lookups *atomic.Int32) {
	t.Helper()
	lookups = new(atomic.Int32)
	issuer = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		lookups.Add(1)
		_, _ = io.WriteString(w, document(issuer.URL, auth.URL+"/token"))
	}))
	t.Cleanup(issuer.Close)
	return issuer, lookups
}

// document is the metadata of an issuer; more are other members of it.
func document(issuer, tokenEndpoint string, more ...string) string {
	return fmt.Sprintf(`{"issuer":%q,"token_endpoint":%q%s}`, issuer, tokenEndpoint, strings.Join(append([]string{""}, more...), ","))
}

// discovering provisions a client of these settings as Caddy does, but for the
// network.
func discovering(t *testing.T, settings string, p http.RoundTripper) (*client, *observer.ObservedLogs) {
	t.Helper()
	cl := newTransport(t, settings).fallback.client
	core, logs := observer.New(zapcore.WarnLevel)
	cl.endpoint.transport = p
	if d := cl.endpoint.discovery; d != nil {
		d.transport = p
	}
	cl.endpoint.logTo(zap.New(core))
	return cl, logs
}
