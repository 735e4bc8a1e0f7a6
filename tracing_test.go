package outboundauth

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

func TestFetchIsOneSpanLinkedToAllWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestSource(t, &scriptedRequester{lifetime: time.Hour, delay: time.Second})
		tracers := new(recordingTracers)
		requests := make([]*recordedSpan, 3)
		var wg sync.WaitGroup
		for i := range requests {
			ctx, span := tracers.request(t.Context())
			requests[i] = span
			wg.Go(func() { ask(ctx, s); span.End() })
			time.Sleep(100 * time.Millisecond) // the others join
		}
		wg.Go(func() { ask(t.Context(), s) }) // not traced
		wg.Wait()

		fetch := tracers.want(t, 1)[0]
		if fetch.parent.IsValid() || fetch.kind != trace.SpanKindClient {
			t.Errorf("got parent %v and kind %v, want a root and a client", fetch.parent, fetch.kind)
		}
		if got := fetch.ended.Sub(fetch.started); got != time.Second {
			t.Errorf("got a span of %v, want 1s", got)
		}
		if len(fetch.links) != len(requests) {
			t.Errorf("got %d links, want one to each of %d", len(fetch.links), len(requests))
		}
		for i, request := range requests {
			if !fetch.linksTo(request) {
				t.Errorf("request %d: no link to it", i)
			}
			if !request.linksTo(fetch) {
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
		tracers := new(recordingTracers)
		b := &block{client: &client{source: s}, bearerField: "Authorization"}
		s.Warm()
		synctest.Wait()
		ctx, span := tracers.request(t.Context())
		tok, _, err := s.Token(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.dress((&http.Request{Header: make(http.Header)}).WithContext(ctx), tok); err != nil {
			t.Fatal(err)
		}
		span.End()
		tracers.want(t, 0) // for a token from the cache
		time.Sleep(time.Hour)
		if links := tracers.want(t, 1)[0].links; len(links) != 0 {
			t.Errorf("got links %v from the renewal, want none", links)
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
				tracers := new(recordingTracers)
				ctx, span := tracers.request(t.Context())
				defer span.End()
				ask(ctx, s)
				fetch := tracers.want(t, 1)[0]
				if fetch.status != codes.Error || fetch.description != test.code {
					t.Errorf("got status %v %q, want an error %s", fetch.status, fetch.description, test.code)
				}
				if got := fetch.attributes["error.type"]; got != attribute.StringValue(test.code) {
					t.Errorf("got error.type %v, want %s", got, test.code)
				}
				if len(fetch.events) != test.events {
					t.Errorf("got events %v, want %d", fetch.events, test.events)
				}
				fetch.wantNoCanary(t)
			})
		})
	}
}

// While the server's refusal stands, a fetch only looks for another secret.
func TestNoSpanWithoutTokenRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &scriptedRequester{fail: func(context.Context, int) error { return &tokenError{Code: "invalid_client", permanent: true} }}
		s := newTestSource(t, r)
		tracers := new(recordingTracers)
		ctx, span := tracers.request(t.Context())
		defer span.End()
		ask(ctx, s)
		time.Sleep(secretCheckInterval)
		ask(ctx, s)
		expectRequests(t, r, 1)
		tracers.want(t, 1)
		if r.looked != 2 {
			t.Errorf("got %d looks at the secret, want 2: or this test sees nothing", r.looked)
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
		tracers := new(recordingTracers)
		s.Warm()
		synctest.Wait()
		ctx, span := tracers.request(t.Context())
		ask(ctx, s)
		span.End()
		time.Sleep(10 * time.Second)
		tracers.want(t, 1) // of the next try
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
		tracers := new(recordingTracers)
		state, err := trace.ParseTraceState("client=" + strings.Repeat("x", 200))
		if err != nil {
			t.Fatal(err)
		}
		remote := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{1}, TraceState: state, Remote: true})
		parent := trace.ContextWithRemoteSpanContext(t.Context(), remote)
		for range maxLinks + 100 {
			ctx, span := tracers.request(parent)
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

// Through the whole transport, to a real server. The fetch began before there was
// a request.
func TestTokenRequestsAreTraced(t *testing.T) {
	auth := newAuthServer(t)
	release := auth.hang() // so that a request waits
	defer release()
	up := newUpstream(t, auth)
	transport := newTransport(t, "token_url "+auth.URL+"/token\nclient_id gateway\nclient_secret canary-secret\n"+
		"name orders\nscopes canary-scope")
	tracers := new(recordingTracers)
	ctx, request := tracers.request(upstreamContext(t, up.addr))
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+up.addr, nil)
	if err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() {
		res, err := transport.RoundTrip(req)
		if err == nil {
			res.Body.Close()
		}
		request.End()
		answered <- err
	}()
	eventually(t, func() bool { return waiting() == 1 }, "a request that waits")
	release()
	if err := <-answered; err != nil {
		t.Fatal(err)
	}

	fetch := tracers.fetches()[0]
	if fetch.parent.IsValid() || fetch.context.TraceID() == request.context.TraceID() {
		t.Errorf("got parent %v and trace %v, want a trace of its own", fetch.parent, fetch.context.TraceID())
	}
	for _, pair := range [][2]*recordedSpan{{fetch, request}, {request, fetch}} {
		if len(pair[0].links) != 1 || !pair[0].linksTo(pair[1]) {
			t.Errorf("span %q: got links %v, want one to %q", pair[0].name, pair[0].links, pair[1].name)
		}
	}
	host, portText, _ := net.SplitHostPort(auth.Listener.Addr().String())
	port, _ := strconv.Atoi(portText)
	if want := map[attribute.Key]attribute.Value{
		"oauth2.client":             attribute.StringValue("orders"),
		"http.request.method":       attribute.StringValue("POST"),
		"http.response.status_code": attribute.IntValue(200),
		"server.address":            attribute.StringValue(host),
		"server.port":               attribute.IntValue(port),
	}; !maps.Equal(fetch.attributes, want) {
		t.Errorf("got attributes %v, want %v", fetch.attributes, want)
	}

	// The renewal is a span, too, and nothing of the credentials is in any.
	if _, err := transport.fallback.source.rested().FetchNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := len(tracers.fetches()); got != 2 {
		t.Errorf("got %d spans of fetches, want 2", got)
	}
	for _, span := range tracers.spans {
		span.wantNoCanary(t)
	}
}

// recordingTracers make spans as the SDK of OpenTelemetry does, and keep what is
// told of each until it ends.
type recordingTracers struct {
	noop.TracerProvider

	mu    sync.Mutex
	spans []*recordedSpan // guarded by mu, as is what they hold
}

func (r *recordingTracers) Tracer(string, ...trace.TracerOption) trace.Tracer {
	return recordingTracer{tracers: r}
}

// request starts the span of a request with this context, and returns that of
// what is done for it.
func (r *recordingTracers) request(ctx context.Context) (context.Context, *recordedSpan) {
	ctx, span := r.Tracer("test").Start(ctx, "request")
	return ctx, span.(*recordedSpan)
}

// fetches returns the ended spans of fetches.
func (r *recordingTracers) fetches() []*recordedSpan {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(r.spans), func(s *recordedSpan) bool { return s.name != spanName || s.ended.IsZero() })
}

// want fails the test unless so many fetches are spans, and returns these.
func (r *recordingTracers) want(t *testing.T, fetches int) []*recordedSpan {
	t.Helper()
	synctest.Wait()
	spans := r.fetches()
	if len(spans) != fetches {
		t.Fatalf("got %d spans of fetches, want %d", len(spans), fetches)
	}
	return spans
}

type recordingTracer struct {
	noop.Tracer
	tracers *recordingTracers
}

// Start implements trace.Tracer. A span without a parent begins a trace.
func (r recordingTracer) Start(ctx context.Context, name string, options ...trace.SpanStartOption) (context.Context, trace.Span) {
	config := trace.NewSpanStartConfig(options...)
	s := &recordedSpan{tracers: r.tracers, name: name, kind: config.SpanKind(), started: config.Timestamp(), links: config.Links()}
	if s.started.IsZero() {
		s.started = time.Now()
	}
	if !config.NewRoot() {
		s.parent = trace.SpanContextFromContext(ctx)
	}
	s.SetAttributes(config.Attributes()...)

	r.tracers.mu.Lock()
	defer r.tracers.mu.Unlock()
	r.tracers.spans = append(r.tracers.spans, s)
	of := trace.SpanContextConfig{TraceID: s.parent.TraceID(), TraceFlags: trace.FlagsSampled, TraceState: s.parent.TraceState()}
	binary.BigEndian.PutUint64(of.SpanID[:], uint64(len(r.tracers.spans)))
	if !s.parent.IsValid() {
		copy(of.TraceID[:], of.SpanID[:])
	}
	s.context = trace.NewSpanContext(of)
	return trace.ContextWithSpan(ctx, s), s
}

type recordedSpan struct {
	trace.Span // nil: what is not implemented here, nobody may call
	tracers    *recordingTracers

	context, parent trace.SpanContext
	name            string
	kind            trace.SpanKind
	started, ended  time.Time
	links           []trace.Link
	attributes      map[attribute.Key]attribute.Value
	events          []recordedEvent
	status          codes.Code
	description     string
}

type recordedEvent struct {
	name       string
	at         time.Time
	attributes []attribute.KeyValue
}

// record lets change happen if the span has not ended.
func (s *recordedSpan) record(change func()) {
	s.tracers.mu.Lock()
	defer s.tracers.mu.Unlock()
	if s.ended.IsZero() {
		change()
	}
}

func (s *recordedSpan) SpanContext() trace.SpanContext       { return s.context }
func (s *recordedSpan) TracerProvider() trace.TracerProvider { return s.tracers }

func (s *recordedSpan) IsRecording() (recording bool) {
	s.record(func() { recording = true })
	return recording
}

func (s *recordedSpan) End(options ...trace.SpanEndOption) {
	s.record(func() {
		config := trace.NewSpanEndConfig(options...)
		if s.ended = config.Timestamp(); s.ended.IsZero() {
			s.ended = time.Now()
		}
	})
}

func (s *recordedSpan) AddLink(link trace.Link) {
	s.record(func() { s.links = append(s.links, link) })
}

func (s *recordedSpan) AddEvent(name string, options ...trace.EventOption) {
	config := trace.NewEventConfig(options...)
	s.record(func() { s.events = append(s.events, recordedEvent{name, config.Timestamp(), config.Attributes()}) })
}

func (s *recordedSpan) SetAttributes(attributes ...attribute.KeyValue) {
	s.record(func() {
		if s.attributes == nil {
			s.attributes = make(map[attribute.Key]attribute.Value)
		}
		for _, a := range attributes {
			s.attributes[a.Key] = a.Value
		}
	})
}

func (s *recordedSpan) SetStatus(code codes.Code, description string) {
	s.record(func() { s.status, s.description = code, description })
}

// linksTo reports whether s, which has ended, has a link to another.
func (s *recordedSpan) linksTo(other *recordedSpan) bool {
	return slices.ContainsFunc(s.links, func(l trace.Link) bool { return l.SpanContext.Equal(other.context) })
}

// wantNoCanary fails the test if s, which has ended, tells what nobody may know.
func (s *recordedSpan) wantNoCanary(t *testing.T) {
	t.Helper()
	if told := fmt.Sprintf("%+v", *s); strings.Contains(told, "canary") {
		t.Errorf("got %s, want no canary in it", told)
	}
}
