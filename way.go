// What lies on the way to an upstream: proxies, what they are told, and the server's name in TLS.

package outboundauth

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// exceptSockets returns a function that says which proxy a request goes through, as
// proxy does, but none for Unix sockets. Caddy dials these itself in any case, while
// net/http would keep the connection as one to the proxy, which all upstreams share.
func exceptSockets(proxy func(*http.Request) (*url.URL, error)) func(*http.Request) (*url.URL, error) {
	return func(req *http.Request) (*url.URL, error) {
		if dial, ok := reverseproxy.GetDialInfo(req.Context()); ok && caddy.IsUnixNetwork(dial.Network) {
			return nil, nil
		}
		return proxy(req)
	}
}

// proxyOf returns the proxy that an unencrypted request goes through: that of
// network_proxy, or one of the environment. It is nil if there is none. What is
// encrypted goes through a tunnel to the address that would be dialed.
func (t *Transport) proxyOf(req *http.Request) *url.URL {
	if req.URL.Scheme == "https" || t.HTTPTransport.Transport.Proxy == nil {
		return nil
	}
	proxy, err := t.HTTPTransport.Transport.Proxy(req)
	if err != nil {
		return new(url.URL) // net/http will say what is wrong, and send nothing
	}
	return proxy
}

// checkProxied refuses an unencrypted request that a proxy would take to another host
// than the upstream. net/http tells an HTTP proxy the host in the field Host, which is
// the client's unless header_up sets it. A SOCKS proxy is told the address that would be
// dialed.
func checkProxied(req *http.Request, dial reverseproxy.DialInfo, proxy *url.URL) error {
	if proxy == nil || (proxy.Scheme != "http" && proxy.Scheme != "https") {
		return nil
	}
	host := cmp.Or(req.Host, req.URL.Host)
	named := strings.EqualFold(host, dial.Address) ||
		(dial.Port == "80" && strings.EqualFold(host, strings.TrimSuffix(dial.Address, ":80")))
	if named {
		return nil
	}
	return fmt.Errorf("header_up: a proxy takes unencrypted requests to where Host says, and that is not upstream %s; "+
		"write `header_up Host {upstream_hostport}` in reverse_proxy, or use https://", dial.Address)
}

// upstreamPlaceholders are those of a request that depend on its upstream alone.
var upstreamPlaceholders = []string{
	"http.reverse_proxy.upstream.address", "http.reverse_proxy.upstream.hostport",
	"http.reverse_proxy.upstream.host", "http.reverse_proxy.upstream.port",
}

// checkWay refuses settings by which a request would choose who gets what is sent to
// its upstream. Provision forgets network_proxy.
func checkWay(h *reverseproxy.HTTPTransport) error {
	repl := caddy.NewReplacer()
	verified := h.TLS != nil && len(h.TLS.ExceptPorts) == 0 && !h.TLS.InsecureSkipVerify
	if !verified { // else the upstream proves who it is
		var config any
		_ = json.Unmarshal(h.NetworkProxyRaw, &config) // Caddy says what is wrong with it
		if text := cmp.Or(requestText(repl, config), requestText(repl, h.ForwardProxyURL)); text != "" {
			return fmt.Errorf("network_proxy: a request can choose the proxy by %s, and every server on earth would get the token; "+
				"use global placeholders, such as {env.X}, or https:// for the upstreams", text)
		}
	}
	if h.TLS == nil {
		return nil
	}
	for _, name := range upstreamPlaceholders {
		repl.Set(name, name)
	}
	if dependsOnRequest(repl, h.TLS.ServerName) {
		return fmt.Errorf("tls_server_name: a request can choose whose certificate is accepted by %s; "+
			"write a name, or use global placeholders or {http.reverse_proxy.upstream.host}", h.TLS.ServerName)
	}
	return nil
}
