package outboundauth

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// stubTransport answers at once, so that a benchmark sees what this module
// adds and not what a connection costs.
type stubTransport struct{ res http.Response }

func (s *stubTransport) RoundTrip(*http.Request) (*http.Response, error) { return &s.res, nil }

// upstreamContext is the context of a request on its way to an upstream, as
// the reverse proxy makes it. The proxy's key for the dial address is not
// exported, so a real handler has to make it.
func upstreamContext(tb testing.TB, dial string) context.Context {
	tb.Helper()
	grab := &grabTransport{}
	handler := &reverseproxy.Handler{Transport: grab, Upstreams: reverseproxy.UpstreamPool{{Dial: dial}}}
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = handler.Cleanup() })
	if err := handler.Provision(ctx); err != nil {
		tb.Fatal(err)
	}
	req := httptest.NewRequest(http.MethodGet, "http://example.com/", nil)
	repl := caddy.NewReplacer()
	req = caddyhttp.PrepareRequest(req, repl, httptest.NewRecorder(), &caddyhttp.Server{})
	next := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil })
	if err := handler.ServeHTTP(httptest.NewRecorder(), req, next); err != nil {
		tb.Fatal(err)
	}
	return grab.ctx
}

type grabTransport struct{ ctx context.Context }

func (g *grabTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	g.ctx = req.Context()
	return &http.Response{StatusCode: 200, Header: http.Header{}, Body: http.NoBody, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}, nil
}

// benchTransport returns a transport with n credentials, the last of them for
// the address in dial, each with a fresh token.
func benchTransport(tb testing.TB, n int, dial dialAddress) *Transport {
	tb.Helper()
	t := &Transport{HTTPTransport: new(reverseproxy.HTTPTransport), routes: make(map[dialAddress]route), logger: zap.NewNop()}
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	tb.Cleanup(cancel)
	if err := t.HTTPTransport.Provision(ctx); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = t.Cleanup() })
	for i := range n {
		b := newBlock(newTestClient(tb, Credentials{
			TokenURL: "https://auth.example/token",
			ClientID: fmt.Sprint("client-", i), ClientSecret: "secret",
			Tenant: &Tenant{Value: fmt.Sprint("tenant-", i)},
		}, nil))
		now := time.Now()
		b.source.current = &token{
			value:     strings.Repeat("x", 800),
			refreshAt: now.Add(time.Hour), usableTo: now.Add(time.Hour), expires: now.Add(time.Hour),
		}
		b.fields(&t.reserved)
		t.routes[dialAddress{"tcp", fmt.Sprintf("127.0.0.1:%d", 20000+i)}] = route{block: b}
		t.routes[dial] = route{block: b}
	}
	t.reserved.add(defaultBearerField)
	return t
}

// benchRequest is a GET with the headers that a proxied browser request has.
func benchRequest(ctx context.Context, url string) *http.Request {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		panic(err)
	}
	for i, name := range []string{
		"Accept", "Accept-Encoding", "Accept-Language", "Cache-Control", "Cookie", "Referer", "User-Agent",
		"Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Request-Id",
	} {
		req.Header.Set(name, fmt.Sprint("value ", i))
	}
	return req
}

// freshReplacer makes the replacer of a context a new one for each request, with what
// Caddy puts into it. It changes the replacer in place: another context would cost more
// than what is measured. For the same reason it makes many ahead, while the timer stands.
type freshReplacer struct {
	*caddy.Replacer
	ahead [64]caddy.Replacer
	left  int
}

func (r *freshReplacer) renew(b *testing.B) {
	if r.left == 0 {
		b.StopTimer()
		for i := range r.ahead {
			r.ahead[i] = *newRequestReplacer()
		}
		r.left = len(r.ahead)
		b.StartTimer()
	}
	r.left--
	*r.Replacer = r.ahead[r.left]
}

// newRequestReplacer returns a replacer such as a proxied request has in the end. Caddy
// sets some of the placeholders only after the round trip. But its map grows for them in
// any case, whether the transport sets some or not.
func newRequestReplacer() *caddy.Replacer {
	repl := caddy.NewReplacer()
	repl.Map(func(name string) (any, bool) {
		if name == "http.request.header.X-Key" {
			return benchKey, true
		}
		return nil, strings.HasPrefix(name, "http.request.")
	})
	for _, name := range proxyPlaceholders {
		repl.Set(name, 1)
	}
	return repl
}

// benchKey is the client key of all requests. Its value becomes an interface as that of a header
// does.
var benchKey = "key-9999"

var proxyPlaceholders = append([]string{
	"http.reverse_proxy.upstream.requests", "http.reverse_proxy.upstream.max_requests", "http.reverse_proxy.upstream.fails",
	"http.reverse_proxy.upstream.latency", "http.reverse_proxy.upstream.latency_ms", // from here on after the round trip
	"http.reverse_proxy.status_code", "http.reverse_proxy.status_text",
	"http.reverse_proxy.header.Content-Type", "http.reverse_proxy.header.Date",
	"http.reverse_proxy.upstream.duration", "http.reverse_proxy.upstream.duration_ms",
	"http.reverse_proxy.retries", "http.reverse_proxy.duration", "http.reverse_proxy.duration_ms",
}, upstreamPlaceholders...)

// BenchmarkRoundTrip compares this transport with the one it embeds, over a
// connection that costs nothing and over a real one on the loopback interface. All
// of it runs beside 10,000 clients: the garbage collector has the same work each time.
func BenchmarkRoundTrip(b *testing.B) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }))
	defer server.Close()
	dial := dialAddress{"tcp", strings.TrimPrefix(server.URL, "http://")}
	ctx := upstreamContext(b, dial.address)
	repl := &freshReplacer{Replacer: ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer)}
	few, many, keyed := benchTransport(b, 1, dial), benchTransport(b, 10_000, dial), benchTransport(b, 10_000, dial)
	ch := &choice{placeholder: "http.request.header.X-Key", named: make(map[string]route)}
	for i := range 10_000 {
		ch.named[fmt.Sprint("key-", i)] = keyed.routes[dialAddress{"tcp", fmt.Sprintf("127.0.0.1:%d", 20000+i)}]
	}
	keyed.routes[dial] = route{choice: ch}
	for _, t := range []*Transport{few, many, keyed} {
		t.HTTPTransport.Transport.RegisterProtocol("stub", &stubTransport{res: http.Response{StatusCode: 204, Body: http.NoBody}})
		t.plaintext = true
	}
	run := func(name, url string, rt http.RoundTripper, header http.Header) {
		b.Run(name, func(b *testing.B) {
			req := benchRequest(ctx, url)
			maps.Copy(req.Header, header)
			b.ReportAllocs()
			for b.Loop() {
				repl.renew(b)
				res, err := rt.RoundTrip(req)
				if err != nil {
					b.Fatal(err)
				}
				_, _ = io.Copy(io.Discard, res.Body)
				res.Body.Close()
			}
		})
	}
	for _, connection := range []struct{ name, url string }{
		{"stub", "stub" + strings.TrimPrefix(server.URL, "http")}, {"loopback", server.URL},
	} {
		// With the headers that the other one adds: the server's part of the work
		// counts too.
		dressed := (&http.Request{Header: make(http.Header)}).WithContext(ctx)
		r := few.routes[dial]
		if err := r.dress(dressed, r.source.Peek()); err != nil {
			b.Fatal(err)
		}
		run(connection.name+"/1/http", connection.url, few.HTTPTransport, dressed.Header)
		run(connection.name+"/1/oauth2", connection.url, few, nil)
		run(connection.name+"/10000/oauth2", connection.url, many, nil)
		run(connection.name+"/10000/oauth2, by key", connection.url, keyed, nil)
	}
	// Upstreams have refused a token: another one, and this one.
	source := few.routes[dial].source
	source.doubts(dialAddress{"tcp", "127.0.0.1:1"})
	run("stub/1/oauth2, another place", "stub"+strings.TrimPrefix(server.URL, "http"), few, nil)
	source.doubts(dial)
	run("stub/1/oauth2, its place", "stub"+strings.TrimPrefix(server.URL, "http"), few, nil)
}

// BenchmarkRoundTripWithBody compares the same for requests with a body, of which
// what may have to be sent again is recorded.
func BenchmarkRoundTripWithBody(b *testing.B) {
	dial := dialAddress{"tcp", "127.0.0.1:20000"}
	ctx := upstreamContext(b, dial.address)
	t := benchTransport(b, 1, dial)
	t.plaintext = true
	t.HTTPTransport.Transport.RegisterProtocol("stub", readingTransport{})
	for _, size := range []int{2 << 10, 60 << 10} {
		data := bytes.Repeat([]byte{'x'}, size)
		for name, rt := range map[string]http.RoundTripper{"http": t.HTTPTransport, "oauth2": t} {
			b.Run(fmt.Sprintf("%d KiB/%s", size>>10, name), func(b *testing.B) {
				req := benchRequest(ctx, "stub://"+dial.address)
				req.Method, req.ContentLength = http.MethodPost, int64(size)
				source := bytes.NewReader(data)
				b.ReportAllocs()
				b.SetBytes(int64(size))
				for b.Loop() {
					source.Reset(data)
					req.Body = io.NopCloser(source)
					if _, err := rt.RoundTrip(req); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// readingTransport is stubTransport for requests with a body.
type readingTransport struct{}

var readBuffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

func (readingTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	buf := readBuffers.Get().(*[32 << 10]byte)
	defer readBuffers.Put(buf)
	for {
		if _, err := req.Body.Read(buf[:]); err != nil {
			break
		}
	}
	_ = req.Body.Close()
	return &http.Response{StatusCode: http.StatusNoContent, Body: http.NoBody}, nil
}

// BenchmarkAdmin asks the admin API of a gateway with many clients: for all of them, for
// the few that an operator reads, and for one.
func BenchmarkAdmin(b *testing.B) {
	const clients = 10_000
	t := benchTransport(b, clients, dialAddress{"tcp", "127.0.0.1:1"})
	one := t.routes[dialAddress{"tcp", "127.0.0.1:1"}].key.id()
	for _, asked := range []struct{ name, path string }{
		{"all", adminClients},
		{"20", adminClients + "?limit=20"},
		{"named", adminClients + "?name=*-1234"},
		{"failing", adminClients + "?state=failing"},
		{"one", adminClients + "/" + one},
	} {
		b.Run(asked.name, func(b *testing.B) {
			req := httptest.NewRequest(http.MethodGet, asked.path, nil)
			b.ReportAllocs()
			for b.Loop() {
				if err := (adminAPI{}).serve(httptest.NewRecorder(), req); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkProvisionPool loads a pool whose upstreams have a block each. What an upstream
// takes must not depend on the size of the pool.
func BenchmarkProvisionPool(b *testing.B) {
	for _, size := range []int{100, 10_000} {
		var upstreams reverseproxy.UpstreamPool
		var blocks []*Upstream
		for i := range size {
			dial := fmt.Sprintf("127.1.%d.%d:80", i/250, 1+i%250)
			upstreams = append(upstreams, &reverseproxy.Upstream{Dial: dial})
			blocks = append(blocks, &Upstream{
				Addresses:   []string{dial},
				Credentials: &Credentials{TokenURL: "http://127.0.0.1:1/token", ClientID: fmt.Sprint(i), ClientSecret: "secret"},
			})
		}
		raw, err := json.Marshal(&Transport{HTTPTransport: new(reverseproxy.HTTPTransport), Upstreams: blocks})
		if err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			for b.Loop() {
				ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
				if err != nil {
					b.Fatal(err)
				}
				ctx, cancel := caddy.NewContext(ctx)
				handler := &reverseproxy.Handler{TransportRaw: caddyconfig.JSONModuleObject(json.RawMessage(raw), "protocol", "oauth2", nil), Upstreams: upstreams}
				if err := handler.Provision(ctx); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				_ = handler.Cleanup()
				cancel()
				b.StartTimer()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*size), "ns/upstream")
		})
	}
}
