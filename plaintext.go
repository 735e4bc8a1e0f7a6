// Where secrets may travel unencrypted, and the URLs that they travel to.

package outboundauth

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
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

// staysOnMachine reports whether a connection to host over network stays on this
// machine. Nobody outside can see such a connection, so secrets need no
// encryption there. For other connections, RFC 6749 §3.2 and RFC 6750 §5.3 ask
// for TLS. If host is empty, the loopback interface is dialed. proxied says that
// a proxy makes all connections except those to Unix sockets; see usesProxy.
func staysOnMachine(network, host string, proxied bool) bool {
	if caddy.IsUnixNetwork(network) {
		return true
	}
	if proxied {
		return false
	}
	if caddy.IsFdNetwork(network) {
		return true
	}
	if host == "" || strings.EqualFold(host, "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && addr.Unmap().IsLoopback()
}

// namesThisMachine reports whether a host may be a name of this machine. It knows
// more names than staysOnMachine: here, one name too many does no harm. It does not
// know the names that only a resolver knows; see isThisMachine.
func namesThisMachine(host string) bool {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if addr, err := netip.ParseAddr(host); err == nil {
		return isThisMachine(addr)
	}
	// Some resolvers take numbers for parts of an IPv4 address: 127.1, 0x7f000001.
	_, err := strconv.ParseUint(host[strings.LastIndexByte(host, '.')+1:], 0, 64)
	own, _ := os.Hostname()
	return err == nil || staysOnMachine("tcp", host, false) || strings.HasSuffix(host, ".localhost") || strings.EqualFold(host, own)
}

// isThisMachine reports whether an address is that of this machine, or of what may be
// reached from here only: on the link, clouds have services that tell this machine its
// secrets.
func isThisMachine(addr netip.Addr) bool {
	addr = addr.Unmap().WithZone("")
	own, _ := net.InterfaceAddrs() // a sandbox may forbid the question; then the rest has to do
	return slices.ContainsFunc([]netip.Addr{addr, carriedIPv4(addr)}, func(addr netip.Addr) bool {
		return addr.IsLoopback() || addr.IsUnspecified() || addr.IsLinkLocalUnicast() ||
			slices.ContainsFunc(own, func(a net.Addr) bool {
				prefix, ok := a.(*net.IPNet)
				return ok && prefix.IP.Equal(addr.AsSlice())
			})
	})
}

// ipv4Carriers are the IPv6 addresses that carry an IPv4 address, and where it begins.
var ipv4Carriers = []struct {
	prefix netip.Prefix
	at     int
}{
	{netip.MustParsePrefix("::/96"), 12},           // IPv4-compatible (RFC 4291 §2.5.5.1)
	{netip.MustParsePrefix("::ffff:0:0:0/96"), 12}, // IPv4-translated (RFC 2765 §2.1)
	{netip.MustParsePrefix("64:ff9b::/96"), 12},    // NAT64 (RFC 6052 §2.1)
	{netip.MustParsePrefix("64:ff9b:1::/48"), 12},  // NAT64 of a network (RFC 8215)
	{netip.MustParsePrefix("2002::/16"), 2},        // 6to4 (RFC 3056 §2)
}

// carriedIPv4 returns the IPv4 address to which a router or a proxy may lead what is
// sent to an IPv6 address. Any other address it returns as it is.
func carriedIPv4(addr netip.Addr) netip.Addr {
	for _, carrier := range ipv4Carriers {
		if carrier.prefix.Contains(addr) {
			b := addr.As16()
			return netip.AddrFrom4([4]byte(b[carrier.at:]))
		}
	}
	return addr
}

// usesProxy reports whether the config says that connections are made through a
// proxy. The proxy may be on another machine, and sees everything that is not
// encrypted.
func usesProxy(h *reverseproxy.HTTPTransport) bool {
	return h != nil && (len(h.NetworkProxyRaw) > 0 || h.ForwardProxyURL != "")
}

// parseTokenURL parses the URL of a token endpoint (RFC 6749 §3.2).
func parseTokenURL(raw string) (*url.URL, error) {
	u, err := parseServerURL(raw, "https://auth.example.com/oauth2/token")
	if err == nil && (u.Fragment != "" || strings.HasSuffix(raw, "#")) {
		return nil, errors.New("must have no fragment (RFC 6749 section 3.2)")
	}
	return u, err
}

// parseIssuer parses an issuer identifier (RFC 8414 §2).
func parseIssuer(raw string) (*url.URL, error) {
	u, err := parseServerURL(raw, "https://auth.example.com")
	if err == nil && strings.Contains(u.Path, "/.well-known/") {
		return nil, errors.New("is the address of the issuer's metadata: write the issuer itself, without `/.well-known/` and the name behind that")
	}
	if err == nil && (u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.HasSuffix(raw, "#")) {
		return nil, errors.New("must have no query and no fragment (RFC 8414 section 2)")
	}
	return u, err
}

// parseServerURL parses a URL of an authorization server. No error quotes the
// URL, because it may hold a password or a key.
func parseServerURL(raw, example string) (*url.URL, error) {
	u, err := url.Parse(raw)
	odd := oddEnds(raw)
	switch {
	case odd != "":
		return nil, errors.New(odd + ": must be an absolute URL, such as " + example)
	case err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Hostname() == "":
		return nil, errors.New("must be an absolute URL, such as " + example)
	case u.User != nil:
		return nil, errors.New("must hold no user and password; use client_id and client_secret")
	}
	return u, nil
}

// checkPlaintext refuses a token endpoint to which the client's secret would
// travel unencrypted. The error does not name it: it may come from metadata.
func checkPlaintext(u *url.URL, proxied bool) error {
	if u.Scheme == "https" {
		return nil
	}
	// Those of the environment are asked for LocalHost, though not for localhost.
	if proxy, err := http.ProxyFromEnvironment(&http.Request{URL: u}); proxy != nil || err != nil {
		proxied = true
	}
	if staysOnMachine("tcp", u.Hostname(), proxied) {
		return nil
	}
	return errors.New("the client's credentials would go to another machine unencrypted; use https://, or allow it with `insecure_plaintext " + plaintextTokenURL + "`")
}

func plaintextError(address string) error {
	return fmt.Errorf("the token would go to upstream %s unencrypted; use https://, or allow it with `insecure_plaintext %s`",
		address, plaintextUpstream)
}
