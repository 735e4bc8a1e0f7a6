// One request to the authorization server, and its answer.

package outboundauth

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// tokenTransport is a transport to a token endpoint, with the part of its config that
// decides which server it reaches. This is a part of the sourceKey.
type tokenTransport struct {
	http.RoundTripper
	config  []byte
	server  func() (json.RawMessage, error) // config, with files by their content; only those who share a token need it
	proxied bool                            // connections go through a proxy, see usesProxy
}

// identity returns a transport without the settings that say only how long to wait, and
// how connections are used. The others decide which server is reached, and as whom.
func identity(h reverseproxy.HTTPTransport) reverseproxy.HTTPTransport {
	h.KeepAlive, h.MaxConnsPerHost, h.Versions = nil, 0, nil
	h.DialTimeout, h.FallbackDelay, h.ResponseHeaderTimeout, h.ExpectContinueTimeout, h.ReadTimeout, h.WriteTimeout = 0, 0, 0, 0, 0, 0
	h.MaxResponseHeaderSize, h.WriteBufferSize, h.ReadBufferSize = 0, 0, 0
	if h.TLS != nil {
		tls := *h.TLS
		tls.HandshakeTimeout = 0
		h.TLS = &tls
	}
	return h
}

// A destination says where a request to the authorization server may lead, and where
// it has led. The context of the request holds it.
type destination struct {
	elsewhere bool        // it must not lead to this machine
	proxied   atomic.Bool // a proxy makes the connection: nobody here sees where it leads
	here      atomic.Bool // it has led to this machine
}

type destinationKey struct{}

var errThisMachine = errors.New("is on this machine, though the issuer is not")

// to returns a context whose requests have this destination.
func (d *destination) to(ctx context.Context) context.Context {
	return context.WithValue(ctx, destinationKey{}, d)
}

// watchDestinations makes a transport check the destinations of its requests. Only
// the address that is dialed shows where a name leads.
func watchDestinations(h *http.Transport) {
	if proxy := h.Proxy; proxy != nil {
		h.Proxy = func(req *http.Request) (*url.URL, error) {
			through, err := proxy(req)
			if d, ok := req.Context().Value(destinationKey{}).(*destination); ok && through != nil {
				d.proxied.Store(true)
			}
			return through, err
		}
	}
	h.DialContext = watched(h.DialContext)
	if h.DialTLSContext != nil {
		h.DialTLSContext = watched(h.DialTLSContext)
	}
}

// watched returns a dial function that also checks the address of the connection. If
// the request must not lead there, it closes the connection, and nothing of the
// request is sent.
func watched(dial dialFunc) dialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		d, ok := ctx.Value(destinationKey{}).(*destination)
		if err != nil || !ok || d.proxied.Load() {
			return conn, err
		}
		if endsHere(conn) {
			d.here.Store(true)
			if d.elsewhere {
				_ = conn.Close()
				return nil, errThisMachine
			}
		}
		return conn, nil
	}
}

// endsHere reports whether a connection leads to this machine. Between two machines, no
// connection has one address at both ends. This also finds addresses that no interface
// has: a route may make them this machine's.
func endsHere(conn net.Conn) bool {
	peer, ok := conn.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return false
	}
	local, ok := conn.LocalAddr().(*net.TCPAddr)
	return (ok && local.IP.Equal(peer.IP)) || isThisMachine(peer.AddrPort().Addr())
}

type dialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

// newServerRequest makes a request to the authorization server. If body is
// empty, the request has no body.
func newServerRequest(ctx context.Context, method string, u *url.URL, header http.Header, body string) *http.Request {
	for field, value := range map[string]string{"Accept": "application/json", "User-Agent": "caddy-outbound-auth"} {
		if header.Get(field) == "" { // otherwise token_request_header has set it
			header.Set(field, value)
		}
	}
	// Caddy's HTTP transport needs a replacer in the context. The other values
	// that it looks for belong to requests of the proxy only.
	ctx = context.WithValue(ctx, caddy.ReplacerCtxKey, caddy.NewReplacer())
	to := *u // a copy, because the transport may write to it
	req := (&http.Request{
		Method: method,
		URL:    &to,
		Host:   to.Host,
		Header: header,
		// The next request comes only in minutes. If a server sends a text on
		// an idle connection, net/http logs the beginning of the text.
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

// withoutQuery returns scheme, host and path of a URL. The rest may hold a key.
func withoutQuery(u *url.URL) string {
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
}

// maxAnswer is the size of the largest answer that is accepted, in bytes.
// RFC 6749 §5.1 does not limit a token. Real tokens have a few kilobytes.
const maxAnswer = 1 << 20

// serverAnswer is an answer of the authorization server. Its body is cut one
// byte after maxAnswer. The zero value stands for no answer.
type serverAnswer struct {
	status int
	header http.Header
	body   []byte
}

// exchanges are the requests that were made with a context, and their answers. Only
// `caddy oauth2-token --explain` asks for them. They are safe for concurrent use.
type exchanges struct {
	mu  sync.Mutex
	all []exchanged // guarded by mu
}

// exchanged is one request to the authorization server, and what came of it.
type exchanged struct {
	req    *http.Request
	answer serverAnswer
	err    error
}

type exchangesKey struct{}

// of returns a context whose requests are noted.
func (e *exchanges) of(ctx context.Context) context.Context {
	return context.WithValue(ctx, exchangesKey{}, e)
}

func (e *exchanges) add(one exchanged) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, one)
}

// list returns what was noted so far.
func (e *exchanges) list() []exchanged {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.all)
}

// exchange sends a request to the authorization server, and reads the answer.
func exchange(ctx context.Context, transport http.RoundTripper, req *http.Request) (serverAnswer, error) {
	a, err := send(ctx, transport, req)
	if noted, ok := ctx.Value(exchangesKey{}).(*exchanges); ok {
		noted.add(exchanged{req, a, err})
	}
	return a, err
}

func send(ctx context.Context, transport http.RoundTripper, req *http.Request) (serverAnswer, error) {
	// An http.Client would follow a redirect, and would send the client's
	// secret elsewhere. RoundTrip does not follow it.
	res, err := transport.RoundTrip(req)
	if err != nil {
		return serverAnswer{}, err
	}
	// If the server switches protocols, net/http hands over the connection. The
	// end of ctx would then not end a read. So AfterFunc closes the body.
	stop := context.AfterFunc(ctx, func() { _ = safely(res.Body.Close) })
	defer stop()
	defer res.Body.Close()
	a := serverAnswer{status: res.StatusCode, header: res.Header}
	if a.status != http.StatusSwitchingProtocols {
		a.body, err = io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	}
	return a, err
}
