package outboundauth

import (
	"net/netip"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// What insecure_plaintext can name.
const (
	plaintextTokenURL = "token_url"
	plaintextUpstream = "upstream"
)

var plaintextTargets = []string{plaintextTokenURL, plaintextUpstream}

// staysOnMachine tells whether a connection to host over network can be seen
// by nobody outside this machine, so that secrets may pass it unencrypted
// (RFC 6749 §3.2 and RFC 6750 §5.3 ask for TLS). An empty host is dialed on
// the loopback interface.
func staysOnMachine(network, host string) bool {
	if caddy.IsUnixNetwork(network) || caddy.IsFdNetwork(network) {
		return true
	}
	if host == "" || strings.EqualFold(host, "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && addr.Unmap().IsLoopback()
}

// staysOnMachine is the same for this transport.
func (t *Transport) staysOnMachine(network, host string) bool {
	return staysOnMachine(network, host) && (!t.proxied || caddy.IsUnixNetwork(network))
}

// usesProxy tells whether connections are made through a proxy, which may be
// on another machine and is told everything that is not encrypted. The proxies
// in the environment are not used for loopback addresses.
func usesProxy(h *reverseproxy.HTTPTransport) bool {
	return h != nil && (len(h.NetworkProxyRaw) > 0 || h.ForwardProxyURL != "")
}
