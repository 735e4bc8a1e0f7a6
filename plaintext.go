// Where secrets may travel unencrypted, and the URLs that they travel to.

package outboundauth

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
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
	return err == nil || staysOnMachine("tcp", host, false) || strings.HasSuffix(host, ".localhost")
}

// isThisMachine reports whether an address is that of this machine, or of what may be
// reached from here only: on the link, clouds have services that tell this machine its
// secrets.
func isThisMachine(addr netip.Addr) bool {
	addr = addr.Unmap()
	return addr.IsLoopback() || addr.IsUnspecified() || addr.IsLinkLocalUnicast()
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
