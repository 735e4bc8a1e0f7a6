package e2e

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// collector receives spans by OTLP, as Caddy's tracing sends them.
type collector struct {
	mu    sync.Mutex
	spans []*tracepb.Span
	raw   bytes.Buffer
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	var sent tracepb.TracesData // the same bytes as a request to export it
	if err == nil {
		err = proto.Unmarshal(body, &sent)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.raw.Write(body)
	for _, resource := range sent.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			c.spans = append(c.spans, scope.GetSpans()...)
		}
	}
}

// named returns the spans that have this name, as they came.
func (c *collector) named(name string) []*tracepb.Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(c.spans), func(s *tracepb.Span) bool { return s.GetName() != name })
}

// TestCaddyTracesTokenRequests has Caddy's own tracing send spans to a collector.
// Only requests know of it: the fetch with which the gateway starts is no span.
func TestCaddyTracesTokenRequests(t *testing.T) {
	const fetchName, requestName = "oauth2 token request", "gateway"
	c := new(collector)
	srv := httptest.NewServer(c)
	closeAtEnd(t, srv)
	as := startAuthServer(t, time.Hour) // no renewal comes by itself
	client := basicClient(t)
	u := newUpstream(t, as, client)
	gw := startGateway(t, gatewayConfig{
		site: "tracing {\nspan " + requestName + "\n}\n" +
			proxy{to: u.serve(t), as: as, client: client, extra: []string{"name orders"}}.String(),
		env: []string{
			"E2E_SECRET=" + client.Secret,
			"OTEL_TRACES_EXPORTER=otlp",
			"OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf",
			"OTEL_EXPORTER_OTLP_ENDPOINT=" + srv.URL,
			"OTEL_BSP_SCHEDULE_DELAY=10", // ms
		},
	})
	id := ""
	await(t, "token from the start", func() bool {
		var clients []struct{ ID, State string }
		getJSON(t, "http://"+gw.admin+"/oauth2/clients", &clients)
		if len(clients) != 1 {
			t.Fatalf("got %d clients, want 1", len(clients))
		}
		id = clients[0].ID
		return clients[0].State == "fresh"
	})
	operate := func(method, path string) {
		t.Helper()
		await(t, method+" "+path, func() bool {
			resp := do(t, newRequest(t, method, "http://"+gw.admin+"/oauth2/clients/"+id+path, nil))
			early := resp.StatusCode == http.StatusTooManyRequests // within a second of the last token request
			if resp.StatusCode != http.StatusOK && !early {
				t.Fatalf("%s %s = %s, want 200\n%s", method, path, resp.Status, resp.body)
			}
			return !early
		})
	}

	operate("DELETE", "/token") // so that the request waits for the next
	gw.get(t, "/", http.StatusOK)
	await(t, "span of each", func() bool { return len(c.named(fetchName)) > 0 && len(c.named(requestName)) > 0 })
	fetch, request := c.named(fetchName)[0], c.named(requestName)[0]
	if len(fetch.GetParentSpanId()) != 0 || bytes.Equal(fetch.GetTraceId(), request.GetTraceId()) {
		t.Errorf("got parent %x and trace %x, want a trace of its own", fetch.GetParentSpanId(), fetch.GetTraceId())
	}
	for _, pair := range [][2]*tracepb.Span{{fetch, request}, {request, fetch}} {
		links := pair[0].GetLinks()
		if len(links) != 1 || !bytes.Equal(links[0].GetSpanId(), pair[1].GetSpanId()) {
			t.Errorf("span %q: got links %v, want one to span %x", pair[0].GetName(), links, pair[1].GetSpanId())
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
			t.Errorf("attribute %s = %s, want %s", key, attributes[key], want)
		}
	}

	// The renewal is a span, too, and nothing of the credentials is in any.
	operate("POST", "/renew")
	gw.get(t, "/", http.StatusOK) // with the token of the renewal, which the upstream sees
	await(t, "span of the renewal", func() bool { return len(c.named(fetchName)) >= 2 })
	gw.stop() // the collector has everything
	if got := len(c.named(fetchName)); got != 2 {
		t.Errorf("got %d spans of fetches, want 2", got)
	}
	tokens := u.tokensSeen()
	if len(tokens) != 2 {
		t.Errorf("tokens = %d, want 2", len(tokens))
	}
	canaries := append(strings.Fields(scopes), client.Secret, url.QueryEscape(client.Secret))
	for _, token := range tokens {
		canaries = append(canaries, token[strings.LastIndex(token, ".")+1:]) // the signature
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, canary := range canaries {
		if bytes.Contains(c.raw.Bytes(), []byte(canary)) {
			t.Errorf("found %.12q… in what was sent to the collector, want it nowhere", canary)
		}
	}
	u.wantAccepted(t, 2, "HTTP/1.1")
}
