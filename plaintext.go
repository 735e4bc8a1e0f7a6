package outboundauth

import (
	"net/netip"
	"strings"

	"github.com/caddyserver/caddy/v2"
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
