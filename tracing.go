// The spans of fetches.

package outboundauth

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// A fetch is a span of its own and the root of its trace: it serves many
// requests, and may outlast each of them. Links lead from it to those that wait
// for it, and back. It is made when the fetch has ended, because only a request
// can tell what traces it, and the fetch may have begun before there was one.
const (
	tracerName = "github.com/outboundauth/caddy-outbound-auth"
	spanName   = "oauth2 token request"
)

// Traced notes what traces the request that ctx belongs to. It traces the next
// fetch as well, also if nobody waits for that.
func (s *tokenSource) Traced(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noteTracers(ctx)
}

// noteTracers is Traced; mu is held. Caddy keeps its tracer provider to itself,
// but a span knows it. One of a config that has ended makes spans that go
// nowhere.
func (s *tokenSource) noteTracers(ctx context.Context) {
	if span := trace.SpanFromContext(ctx); span.SpanContext().IsValid() {
		s.tracers = span.TracerProvider()
	}
}

// maxLinks is how many links a span has by default. Others would be dropped when
// it is made.
const maxLinks = 128

// linkTo notes a request that waits for the fetch. The source's mu is held.
func (f *fetch) linkTo(ctx context.Context) {
	if waiting := trace.SpanContextFromContext(ctx); waiting.IsValid() && len(f.links) < maxLinks {
		// Without what the client said of it, which holds on to all of its
		// headers.
		waiting = waiting.WithTraceState(trace.TraceState{})
		f.links = append(f.links, trace.Link{SpanContext: waiting})
	}
}

// linkFrom links a request that has waited with the fetch, which has ended.
func linkFrom(ctx context.Context, fetch trace.SpanContext) {
	if fetch.IsValid() {
		trace.SpanFromContext(ctx).AddLink(trace.Link{SpanContext: fetch})
	}
}

// trace makes the span of a fetch that has ended in err, before anybody knows.
// What an error says in words stays in the log: spans go to other people.
func (s *tokenSource) trace(f *fetch, r requester, err error) {
	s.mu.Lock()
	tracers, links := s.tracers, f.links
	s.mu.Unlock()
	if tracers == nil {
		return
	}
	_, span := tracers.Tracer(tracerName).Start(context.Background(), spanName,
		trace.WithSpanKind(trace.SpanKindClient), trace.WithTimestamp(f.started),
		trace.WithLinks(links...), trace.WithAttributes(attributes(r.describe())...))
	defer span.End()
	f.span = span.SpanContext()
	if !span.IsRecording() {
		return
	}
	for _, retry := range f.retries {
		span.AddEvent("retry", trace.WithTimestamp(retry.at), trace.WithAttributes(errorType(retry.cause)))
	}
	if len(f.retries) > 0 {
		span.SetAttributes(attribute.Int("http.request.resend_count", len(f.retries)))
	}
	status := http.StatusOK
	if err != nil {
		failed := reportError(err)
		status = failed.Status
		span.SetAttributes(errorType(err))
		span.SetStatus(codes.Error, failed.Code)
	}
	if status != 0 {
		span.SetAttributes(attribute.Int("http.response.status_code", status))
	}
}

// attributes are what a span tells of a client, by the semantic conventions for
// HTTP. All of them are UTF-8: one that is not would cost a whole batch of spans.
func attributes(d description) []attribute.KeyValue {
	attributes := []attribute.KeyValue{
		attribute.String("oauth2.client", d.name),
		attribute.String("http.request.method", http.MethodPost),
	}
	if u, err := url.Parse(d.TokenEndpoint); err == nil && u.Host != "" {
		attributes = append(attributes, attribute.String("server.address", strings.ToValidUTF8(u.Hostname(), "\uFFFD")))
		if port, err := strconv.Atoi(u.Port()); err == nil {
			attributes = append(attributes, attribute.Int("server.port", port))
		}
	}
	return attributes
}

func errorType(err error) attribute.KeyValue {
	return attribute.String("error.type", reportError(err).Code)
}
