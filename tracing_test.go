package outboundauth

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// tracedContext is that of a request under a span of its own.
func tracedContext(t *testing.T, tracers trace.TracerProvider) (context.Context, trace.Span) {
	t.Helper()
	return tracers.Tracer("test").Start(t.Context(), "request")
}

func newTracers() (*tracetest.SpanRecorder, trace.TracerProvider) {
	recorder := tracetest.NewSpanRecorder()
	return recorder, sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder))
}

// fetchSpans returns the ended spans of fetches.
func fetchSpans(recorder *tracetest.SpanRecorder) []sdktrace.ReadOnlySpan {
	synctest.Wait()
	return slices.DeleteFunc(recorder.Ended(), func(s sdktrace.ReadOnlySpan) bool { return s.Name() != spanName })
}

func linksTo(links []sdktrace.Link, to trace.SpanContext) bool {
	return slices.ContainsFunc(links, func(l sdktrace.Link) bool { return l.SpanContext.Equal(to) })
}

func TestFetchIsOneSpanLinkedToAllWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestSource(t, &scriptedRequester{lifetime: time.Hour, delay: time.Second})
		recorder, tracers := newTracers()
		requests := make([]trace.Span, 3)
		var wg sync.WaitGroup
		for i := range requests {
			ctx, span := tracedContext(t, tracers)
			requests[i] = span
			wg.Go(func() { ask(ctx, s); span.End() })
			time.Sleep(100 * time.Millisecond) // the others join
		}
		wg.Go(func() { ask(t.Context(), s) }) // not traced
		wg.Wait()

		spans := fetchSpans(recorder)
		if len(spans) != 1 {
			t.Fatalf("got %d spans of fetches, want 1", len(spans))
		}
		fetch := spans[0]
		if fetch.Parent().IsValid() || fetch.SpanKind() != trace.SpanKindClient {
			t.Errorf("got parent %v and kind %v, want a root and a client", fetch.Parent(), fetch.SpanKind())
		}
		if got := fetch.EndTime().Sub(fetch.StartTime()); got != time.Second {
			t.Errorf("got a span of %v, want 1s", got)
		}
		if len(fetch.Links()) != len(requests) {
			t.Errorf("got %d links, want one to each of %d", len(fetch.Links()), len(requests))
		}
		for i, request := range requests {
			if !linksTo(fetch.Links(), request.SpanContext()) {
				t.Errorf("request %d: no link to it", i)
			}
			if !linksTo(request.(sdktrace.ReadOnlySpan).Links(), fetch.SpanContext()) {
				t.Errorf("request %d: no link from it to the fetch", i)
			}
		}
	})
}

// No request waits for a renewal in the background: what traced the requests
// that used the last token traces it.
func TestRenewalInTheBackgroundIsTraced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestSource(t, &scriptedRequester{lifetime: time.Hour})
		recorder, tracers := newTracers()
		b := &block{client: &client{source: s}, bearerField: "Authorization"}
		s.Warm()
		synctest.Wait()
		ctx, span := tracedContext(t, tracers)
		tok, _, err := s.Token(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.dress((&http.Request{Header: make(http.Header)}).WithContext(ctx), tok); err != nil {
			t.Fatal(err)
		}
		span.End()
		if got := len(fetchSpans(recorder)); got != 0 {
			t.Fatalf("got %d spans of fetches, want none for a token from the cache", got)
		}
		time.Sleep(time.Hour)
		if spans := fetchSpans(recorder); len(spans) != 1 || len(spans[0].Links()) != 0 {
			t.Fatalf("got spans %v, want one of the renewal, without links", spans)
		}
	})
}

func TestFailuresAreTold(t *testing.T) {
	refused := &tokenError{Endpoint: "auth.example", Status: 401, Code: "invalid_client", Description: "canary", permanent: true}
	for name, test := range map[string]struct {
		err    error
		code   string
		events int // retries
	}{
		"refused":      {refused, "invalid_client", 0},
		"network":      {&tokenError{Endpoint: "auth.example", Code: codeNetwork, Description: "canary"}, codeNetwork, quickRetries},
		"another kind": {errors.New("canary"), codeInvalidResponse, quickRetries},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestSource(t, &scriptedRequester{fail: func(context.Context, int) error { return test.err }})
				recorder, tracers := newTracers()
				ctx, span := tracedContext(t, tracers)
				defer span.End()
				ask(ctx, s)
				spans := fetchSpans(recorder)
				if len(spans) != 1 {
					t.Fatalf("got %d spans of fetches, want 1", len(spans))
				}
				if got, want := spans[0].Status(), (sdktrace.Status{Code: codes.Error, Description: test.code}); got != want {
					t.Errorf("got status %v, want %v", got, want)
				}
				if !slices.Contains(spans[0].Attributes(), attribute.String("error.type", test.code)) {
					t.Errorf("got attributes %v, want error.type %s", spans[0].Attributes(), test.code)
				}
				if len(spans[0].Events()) != test.events {
					t.Errorf("got events %v, want %d", spans[0].Events(), test.events)
				}
			})
		})
	}
}

// While the server's refusal stands, a fetch only looks for another secret.
func TestNoSpanWithoutTokenRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{fail: func(context.Context, int) error { return &tokenError{Code: "invalid_client", permanent: true} }}
		s := newTestSource(t, r)
		recorder, tracers := newTracers()
		ctx, span := tracedContext(t, tracers)
		defer span.End()
		ask(ctx, s)
		time.Sleep(secretCheckInterval)
		ask(ctx, s)
		expectRequests(t, r, 1)
		if got := len(fetchSpans(recorder)); got != 1 || r.looked != 2 {
			t.Errorf("got %d spans after looking %d times, want 1 after 2", got, r.looked)
		}
	})
}

// During an outage from the start, requests are answered at once, and no fetch
// has somebody waiting for it.
func TestFetchesOfAnOutageAreTraced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestSource(t, &scriptedRequester{fail: func(context.Context, int) error {
			return &tokenError{Code: "unauthorized_client", permanent: true}
		}})
		recorder, tracers := newTracers()
		s.Warm()
		synctest.Wait()
		ctx, span := tracedContext(t, tracers)
		ask(ctx, s)
		span.End()
		time.Sleep(10 * time.Second)
		if got := len(fetchSpans(recorder)); got != 1 {
			t.Errorf("got %d spans of fetches, want one of the next try", got)
		}
	})
}

func TestSpansAreUTF8(t *testing.T) {
	for _, a := range attributes(description{name: "orders", TokenEndpoint: "https://x%ff.example:8443/token"}) {
		if value := a.Value.String(); !utf8.ValidString(value) {
			t.Errorf("got %s %q, want UTF-8", a.Key, value)
		}
	}
}

// Clients that come and go must not fill the memory while a server hangs: a span
// has so many links only, and no link needs what a client said of its trace.
func TestLinksAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestSource(t, &scriptedRequester{lifetime: time.Hour, delay: time.Second})
		_, tracers := newTracers()
		state, err := trace.ParseTraceState("client=" + strings.Repeat("x", 200))
		if err != nil {
			t.Fatal(err)
		}
		remote := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{1}, TraceState: state, Remote: true})
		parent := trace.ContextWithRemoteSpanContext(t.Context(), remote)
		for range maxLinks + 100 {
			ctx, span := tracers.Tracer("test").Start(parent, "request")
			ctx, leave := context.WithCancel(ctx)
			go func() { ask(ctx, s); span.End() }()
			synctest.Wait()
			leave()
		}
		synctest.Wait()
		s.mu.Lock()
		defer s.mu.Unlock()
		if got := len(s.inflight.links); got != maxLinks {
			t.Errorf("got %d links, want %d", got, maxLinks)
		}
		for _, link := range s.inflight.links {
			if got := link.SpanContext.TraceState(); got.Len() != 0 {
				t.Fatalf("got the trace state %q of a client, want none", got)
			}
		}
	})
}

// A collector receives spans by OTLP, as Caddy's tracing sends them.
type collector struct {
	mu    sync.Mutex
	spans []*tracepb.Span // guarded by mu
	raw   bytes.Buffer    // guarded by mu
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	var export collectorpb.ExportTraceServiceRequest
	if err == nil {
		err = proto.Unmarshal(body, &export)
	}
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.raw.Write(body)
	for _, resource := range export.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			c.spans = append(c.spans, scope.GetSpans()...)
		}
	}
}

// wait returns the spans that have this name, once there are n.
func (c *collector) wait(t *testing.T, name string, n int) []*tracepb.Span {
	t.Helper()
	var named []*tracepb.Span
	eventually(t, func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		named = slices.DeleteFunc(slices.Clone(c.spans), func(s *tracepb.Span) bool { return s.GetName() != name })
		return len(named) >= n
	}, "%d spans %q", n, name)
	return named
}

// With Caddy's own tracing, of which only a request knows.
func TestCaddyTracesTokenRequests(t *testing.T) {
	c := new(collector)
	server := httptest.NewServer(c)
	t.Cleanup(server.Close)
	t.Setenv("OTEL_TRACES_EXPORTER", "otlp")
	t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.URL)
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "10") // ms

	auth := newAuthServer(t)
	release := auth.hang() // so that a request waits
	defer release()
	up := newUpstream(t, auth)
	g := startGateway(t, "tracing {\nspan gateway\n}\n"+proxySite(up, auth, "name orders\nscopes canary-scope"))
	source := sourceOf(t, "orders")
	var wg sync.WaitGroup
	wg.Go(func() { wantAll(t, g.burst(1), http.StatusOK) })
	eventually(t, func() bool { // it joins the fetch that began with the config
		source.mu.Lock()
		defer source.mu.Unlock()
		return source.inflight != nil && source.inflight.waiters > 0
	}, "a request that waits")
	release()
	wg.Wait()

	fetch, request := c.wait(t, spanName, 1)[0], c.wait(t, "gateway", 1)[0]
	if len(fetch.GetParentSpanId()) != 0 || bytes.Equal(fetch.GetTraceId(), request.GetTraceId()) {
		t.Errorf("got parent %x and trace %x, want a trace of its own", fetch.GetParentSpanId(), fetch.GetTraceId())
	}
	for _, pair := range [][2]*tracepb.Span{{fetch, request}, {request, fetch}} {
		links := pair[0].GetLinks()
		if len(links) != 1 || !bytes.Equal(links[0].GetSpanId(), pair[1].GetSpanId()) {
			t.Errorf("span %q: got links %v, want one to span %s", pair[0].GetName(), links, hex.EncodeToString(pair[1].GetSpanId()))
		}
	}
	attributes := make(map[string]string)
	for _, a := range fetch.GetAttributes() {
		attributes[a.GetKey()] = a.GetValue().String()
	}
	for key, want := range map[string]string{
		"oauth2.client":             "orders",
		"http.request.method":       "POST",
		"http.response.status_code": "200",
		"server.address":            "127.0.0.1",
	} {
		if !strings.Contains(attributes[key], want) {
			t.Errorf("attribute %s: got %s, want %s", key, attributes[key], want)
		}
	}

	// The renewal is a span, too, and nothing of the credentials is in any.
	if _, err := source.FetchNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.wait(t, spanName, 2)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, canary := range []string{"canary-token", "canary-scope", "canary-secret"} {
		if bytes.Contains(c.raw.Bytes(), []byte(canary)) {
			t.Errorf("got %q in what was sent to the collector, want it nowhere", canary)
		}
	}
}
