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

// Each fetch has its own span, which is the root of a trace: the fetch serves
// many requests, and may last longer than each of them. Links lead from the span
// to the requests that wait for the fetch, and back. The span is made when the
// fetch has ended. The tracer provider is known only from a traced request, and
// the fetch may have begun before that.
const (
	tracerName = "github.com/outboundauth/caddy-outbound-auth"
	spanName   = "oauth2 token request"
)

// Traced notes the tracer provider of the request that ctx belongs to. The
// provider also traces the next fetch, even if nobody waits for that fetch.
func (s *tokenSource) Traced(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noteTracers(ctx)
}

// noteTracers does what Traced does. Caddy does not hand out its tracer
// provider, but each span knows it. If the config of a provider has ended,
// nobody gets the provider's spans. mu is held.
func (s *tokenSource) noteTracers(ctx context.Context) {
	if span := trace.SpanFromContext(ctx); span.SpanContext().IsValid() {
		s.tracers = span.TracerProvider()
	}
}

// maxLinks is how many links a span has by default. If it had more, they would
// be dropped.
const maxLinks = 128

// linkTo notes a request that waits for the fetch. The source's mu is held.
func (f *fetch) linkTo(ctx context.Context) {
	if waiting := trace.SpanContextFromContext(ctx); waiting.IsValid() && len(f.links) < maxLinks {
		// Leave out the trace state, which the caller sent. It keeps all headers
		// of the request in memory.
		waiting = waiting.WithTraceState(trace.TraceState{})
		f.links = append(f.links, trace.Link{SpanContext: waiting})
	}
}

// linkFrom links a request with the fetch that it has waited for. The fetch has
// ended.
func linkFrom(ctx context.Context, fetch trace.SpanContext) {
	if fetch.IsValid() {
		trace.SpanFromContext(ctx).AddLink(trace.Link{SpanContext: fetch})
	}
}

// trace makes the span of a fetch that has ended with err, or with a token if
// err is nil. It runs before anybody learns the result. The span has only the
// error's code. The error's description stays in the log, because spans go to
// other people.
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
	for _, retry := range f.attempts.retries {
		span.AddEvent("retry", trace.WithTimestamp(retry.at), trace.WithAttributes(errorType(retry.cause)))
	}
	if len(f.attempts.retries) > 0 {
		span.SetAttributes(attribute.Int("http.request.resend_count", len(f.attempts.retries)))
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

// attributes returns what a span says about a client, by the semantic
// conventions for HTTP. All values are UTF-8: with another value, a whole batch
// of spans would be lost.
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
