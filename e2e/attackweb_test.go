package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"time"
)

// attackPatience is how long a client waits for an answer.
const attackPatience = 2500 * time.Millisecond

// webTrick is a request of HTTP whose parts claim what they shouldn't.
type webTrick struct {
	title    string
	protocol string // of attackClient.web
	method   string
	header   http.Header
	body     func() io.Reader // nil: none
	trailer  http.Header
	host     bool // that of another upstream
	leave    int  // after so many bytes of the answer's body; 0: at its end
}

// webTricks are sent over HTTP/1.1, and over HTTP/2 where it can have them.
func webTricks() []webTrick {
	short := func() io.Reader { return strings.NewReader("what a client sends") }
	long := func() io.Reader { return strings.NewReader(strings.Repeat("long ", 20<<10)) }
	endless := func() io.Reader { return &stalling{left: 4, pause: 400 * time.Millisecond} }
	unsized := func() io.Reader { return io.MultiReader(strings.NewReader("of a length that nobody knows")) }
	tricks := []webTrick{
		{title: "nothing claimed"},
		{title: "token", header: http.Header{"Authorization": {"Bearer forged"}}},
		{title: "two tokens", header: http.Header{"Authorization": {"Bearer forged", "Basic Zm9yZ2Vk"}}},
		{title: "tenant", header: http.Header{"X-Tenant-Id": {"forged"}}},
		{title: "two tenants", header: http.Header{"X-Tenant-Id": {"forged", tenantOf('a')}}},
		{title: "case", header: http.Header{"x-TENANT-id": {"forged"}, "AUTHORIZATION": {"Bearer forged"}}},
		{title: "underscores", header: http.Header{"X_Tenant_Id": {"forged"}, "x_tenant-id": {"forged"}}},
		{title: "dots", header: http.Header{"X.Tenant.Id": {"forged"}, "X-Tenant.Id": {"forged"}}},
		{title: "other bytes", header: http.Header{"X~Tenant|Id": {"forged"}, "X'Tenant+Id": {"forged"}}},
		{title: "names that Caddy lets pass", header: http.Header{"X-Claim": {"forged"}}},
		{title: "hop by hop", header: http.Header{"Connection": {"Authorization, X-Tenant-Id"}, "X-Tenant-Id": {"forged"}}},
		{title: "mark of the gateway", header: http.Header{"Proxy-Authorization": {"forged"}, "X-Gateway": {"forged"}}},
		{title: "host", host: true},
		{title: "forwarded", header: http.Header{"X-Forwarded-Host": {"forged"}, "Forwarded": {"host=forged"}}},
		{title: "short body", method: http.MethodPost, body: short},
		{title: "long body", method: http.MethodPut, body: long},
		{title: "stalled body", method: http.MethodPost, body: endless},
		{title: "unknown length", method: http.MethodPost, body: unsized},
		{title: "asks whether to go on", method: http.MethodPost, body: long, header: http.Header{"Expect": {"100-continue"}}},
		{
			title: "trailers", method: http.MethodPost, body: unsized,
			trailer: http.Header{"Authorization": {"Bearer forged"}, "X-Tenant-Id": {"forged"}, "X_Tenant_Id": {"forged"}},
		},
		{title: "leaves early", leave: 1},
		{title: "leaves in the middle", leave: 8 << 10},
		{title: "HEAD", method: http.MethodHead},
		{title: "OPTIONS", method: http.MethodOptions},
		{title: "an unknown method", method: "STEAL"},
		{title: "TRACE", method: http.MethodTrace},
		{title: "TRACK", method: "TRACK"},
		{title: "trace", method: "trace"},
	}
	var all []webTrick
	for _, protocol := range []string{"HTTP/1.1", "h2c"} {
		for _, trick := range tricks {
			trick.protocol = protocol
			if protocol == "h2c" && trick.header["Connection"] != nil {
				continue
			}
			all = append(all, trick)
		}
	}
	return all
}

func (w webTrick) name() string { return w.title + " over " + w.protocol }

func (w webTrick) asksToGoOn() bool { return w.header["Expect"] != nil }

// send sends the request, and returns the answers that announce the answer, and it.
func (w webTrick) send(c *attackClient, a attack) [][]byte {
	var early announced
	ctx, leave := context.WithTimeout(context.Background(), attackPatience)
	defer leave()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got1xxResponse: early.add})
	req, err := w.request(ctx, c, a)
	if err != nil {
		c.found.add("request that can't be made", "%s: %v", w.name(), err)
		return nil
	}
	resp, err := c.web[w.protocol].Do(req)
	if err != nil {
		return early.take()
	}
	defer resp.Body.Close()
	most := int64(256 << 10)
	if w.leave > 0 {
		most = int64(w.leave)
	}
	var answer bytes.Buffer
	fmt.Fprintf(&answer, "%s %v\n", resp.Status, resp.Header)
	io.Copy(&answer, io.LimitReader(resp.Body, most))
	fmt.Fprint(&answer, resp.Trailer)
	return append(early.take(), answer.Bytes())
}

func (w webTrick) request(ctx context.Context, c *attackClient, a attack) (*http.Request, error) {
	var body io.Reader
	if w.body != nil {
		body = w.body()
	}
	req, err := http.NewRequestWithContext(ctx, w.method, "http://"+c.site+a.path(), body)
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, w.header)
	for name, value := range c.chosen(a.n) {
		req.Header.Set(name, value)
	}
	if w.host {
		req.Host = c.other(a.n / 2)
	}
	if w.trailer != nil {
		req.Trailer = w.trailer.Clone()
	}
	return req, nil
}

// newWebClient returns a client that follows no redirect.
func newWebClient(h2c bool) *http.Client {
	transport := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 8, ExpectContinueTimeout: time.Second}
	if h2c {
		transport.Protocols = new(http.Protocols)
		transport.Protocols.SetUnencryptedHTTP2(true)
	}
	return &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// announced are answers of the kind 1xx.
type announced struct {
	mu  sync.Mutex
	all [][]byte
}

func (e *announced) add(code int, header textproto.MIMEHeader) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, fmt.Append(nil, code, header))
	return nil
}

func (e *announced) take() [][]byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.all
}

// stalling is a body that comes slowly, and then breaks.
type stalling struct {
	left  int
	pause time.Duration
}

func (s *stalling) Read(p []byte) (int, error) {
	if s.left == 0 {
		return 0, errors.New("the client has changed its mind")
	}
	s.left--
	time.Sleep(s.pause)
	return copy(p, strings.Repeat("stall", 1<<10)), nil
}
