// One request to the authorization server: sent, and its answer received.

package outboundauth

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

// tokenTransport is the way to a token endpoint: the transport, and its config,
// which is part of what tells token sources apart.
type tokenTransport struct {
	http.RoundTripper
	config  []byte
	proxied bool // see usesProxy
}

// newServerRequest makes a request to the authorization server. An empty body is
// none.
func newServerRequest(ctx context.Context, method string, u *url.URL, header http.Header, body string) *http.Request {
	for field, value := range map[string]string{"Accept": "application/json", "User-Agent": "caddy-outbound-auth"} {
		if header.Get(field) == "" { // else by token_request_header
			header.Set(field, value)
		}
	}
	// Caddy's HTTP transport looks for a replacer in the context, and for
	// nothing else that this one could have.
	ctx = context.WithValue(ctx, caddy.ReplacerCtxKey, caddy.NewReplacer())
	to := *u // the transport may write to it
	req := (&http.Request{
		Method: method,
		URL:    &to,
		Host:   to.Host,
		Header: header,
		// It is made once in minutes. Of what a server sends on an idle
		// connection, net/http would write the beginning to the log.
		Close: true,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}).WithContext(ctx)
	if body != "" {
		req.ContentLength = int64(len(body))
		req.GetBody = func() (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(body)), nil
		}
		req.Body, _ = req.GetBody()
	}
	return req
}

// maxAnswer bounds the answer of a token endpoint, in bytes. RFC 6749
// §5.1 leaves the size of a token open; a real one has a few kilobytes.
const maxAnswer = 1 << 20

// serverAnswer is what the authorization server said, up to a byte more than
// maxAnswer. The zero value stands for no answer.
type serverAnswer struct {
	status int
	header http.Header
	body   []byte
}

// exchange sends a request to the authorization server, and reads the answer.
func exchange(ctx context.Context, transport http.RoundTripper, req *http.Request) (serverAnswer, error) {
	// RoundTrip and not an http.Client: a redirect is not followed, as it
	// would send the client's secret elsewhere.
	res, err := transport.RoundTrip(req)
	if err != nil {
		return serverAnswer{}, err
	}
	// Switching protocols, net/http hands over the connection, and ctx would
	// not end a read.
	stop := context.AfterFunc(ctx, func() { _ = res.Body.Close() })
	defer stop()
	defer res.Body.Close()
	a := serverAnswer{status: res.StatusCode, header: res.Header}
	if a.status != http.StatusSwitchingProtocols {
		a.body, err = io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	}
	return a, err
}
