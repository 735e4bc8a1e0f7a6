// The upstreams of the reverse proxy: which there are, who chooses them, and where requests to each lead.

package outboundauth

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// routeTo returns where requests to an address lead. Nothing else says so: requests,
// health checks, the checks at load and oauth2-token all ask here.
func (t *Transport) routeTo(dial dialAddress) route {
	if r, ok := t.routes[dial]; ok {
		return r
	}
	if len(t.Upstreams) > 0 { // otherwise all have one route
		if r, ok := t.routes[dial.canonical()]; ok {
			return r
		}
	}
	return t.others
}

// routeOfCheck returns the route of a health check. It is the route of a request to the
// same address. With health_port, the check may go to another port of an upstream's
// host. Then it is the route that all upstreams on this host have, and the zero route
// if they have different ones. Any other address is that of health_upstream, which
// belongs to no upstream.
func (t *Transport) routeOfCheck(dial reverseproxy.DialInfo) route {
	checked := dialAddress{dial.Network, dial.Address}.canonical()
	if _, named := t.routes[checked]; named || !t.checksOthers {
		return t.routeTo(checked)
	}
	var found route
	for i, upstream := range t.byHost[canonicalHost(dial.Host)] {
		if i > 0 && upstream != found {
			return route{}
		}
		found = upstream
	}
	return found
}

// An upstreamName is what an upstream block or --upstream can name: an address, or the
// source of dynamic upstreams. Sources of other kinds than `a` and `srv` have no name.
type upstreamName struct {
	dialAddress
	anyPort bool // the address has no port: SRV records have it
}

// is reports whether an address that somebody wrote is this name.
func (n upstreamName) is(written dialAddress) bool {
	if !n.anyPort {
		return written == n.dialAddress
	}
	host, _, err := net.SplitHostPort(written.address)
	return err == nil && written.network == n.network && host == n.address
}

// configuredUpstreams is what the config of a reverse proxy says of its upstreams.
type configuredUpstreams struct {
	static    []staticUpstream
	dynamic   bool           // there are others, of sources
	sources   []upstreamName // none of them is the zero name
	byRequest string         // the first address or source that depends on the request; "": none
}

type staticUpstream struct {
	dialAddress // as it is dialed, and not canonical: net/http asks the proxies of the environment by this name
	written     string
}

// readUpstreams reads the upstreams of a handler, before it has loaded the sources of
// its dynamic ones.
func readUpstreams(handler *reverseproxy.Handler) (configuredUpstreams, error) {
	var all configuredUpstreams
	repl := caddy.NewReplacer()
	for _, u := range handler.Upstreams {
		if dependsOnRequest(repl, u.Dial) {
			all.byRequest = cmp.Or(all.byRequest, u.Dial)
			continue
		}
		dial, err := parseDialAddress(repl, u.Dial)
		if err != nil {
			return all, fmt.Errorf("upstream %s: %w", u.Dial, err)
		}
		all.static = append(all.static, staticUpstream{dial, u.Dial})
	}
	if handler.DynamicUpstreamsRaw != nil {
		all.dynamic = true
		all.readSource(repl, handler.DynamicUpstreamsRaw)
	}
	return all, nil
}

// readSource reads the config of a source of dynamic upstreams. If it can't be read,
// Caddy says so when it loads the source.
func (all *configuredUpstreams) readSource(repl *caddy.Replacer, raw json.RawMessage) {
	var kind struct{ Source string }
	_ = json.Unmarshal(raw, &kind)
	var name upstreamName
	switch kind.Source {
	case "multi":
		var multi reverseproxy.MultiUpstreams
		_ = json.Unmarshal(raw, &multi)
		for _, member := range multi.SourcesRaw {
			all.readSource(repl, member)
		}
		return
	case "a":
		var a reverseproxy.AUpstreams
		_ = json.Unmarshal(raw, &a)
		a.Port = cmp.Or(a.Port, "80") // as in its Provision
		dial, _ := parseDialAddress(repl, a.String())
		name.dialAddress = dial.canonical()
	case "srv":
		var srv reverseproxy.SRVUpstreams
		_ = json.Unmarshal(raw, &srv)
		if host, err := repl.ReplaceOrErr(srv.String(), true, true); err == nil {
			name = upstreamName{dialAddress{"tcp", canonicalHost(host)}, true}
		}
	}
	var config any
	_ = json.Unmarshal(raw, &config)
	all.byRequest = cmp.Or(all.byRequest, requestText(repl, config))
	all.sources = append(all.sources, name)
}

// requestText returns the first text in decoded JSON that depends on the request; ""
// if none does.
func requestText(repl *caddy.Replacer, config any) string {
	switch config := config.(type) {
	case string:
		if dependsOnRequest(repl, config) {
			return config
		}
	case []any:
		for _, element := range config {
			if text := requestText(repl, element); text != "" {
				return text
			}
		}
	case map[string]any:
		for _, key := range slices.Sorted(maps.Keys(config)) {
			if text := requestText(repl, config[key]); text != "" {
				return text
			}
		}
	}
	return ""
}

// dependsOnRequest reports whether a text has placeholders other than global ones, so
// that a request has a part in its value. Those of the environment and of files are
// the operator's.
func dependsOnRequest(repl *caddy.Replacer, text string) bool {
	_, err := repl.ReplaceOrErr(text, false, true)
	return err != nil
}

// parseDialAddress normalizes an address as the reverse proxy does before it
// dials. It is an error if the address depends on the request.
func parseDialAddress(repl *caddy.Replacer, address string) (dialAddress, error) {
	address, err := repl.ReplaceOrErr(address, true, true)
	if err != nil {
		return dialAddress{}, err
	}
	parsed, err := caddy.ParseNetworkAddress(address)
	if err != nil {
		return dialAddress{}, err
	}
	if parsed.PortRangeSize() != 1 {
		return dialAddress{}, errors.New("must be a single address")
	}
	return dialAddress{parsed.Network, parsed.JoinHostPort(0)}, nil
}

// assignRoutes gives each upstream of the proxy its route. The routes of the upstream
// blocks are there already.
//
// An address that a request can name gets a token only if a block names it: its
// client could name its own server, or choose among spellings, as localhost is not
// 127.0.0.1 to us. So beside blocks, nothing but what the config names gets a token.
// Without blocks, all upstreams have the same credentials, and the config names all.
func (t *Transport) assignRoutes(all configuredUpstreams) error {
	if len(t.Upstreams) == 0 && all.byRequest != "" {
		return fmt.Errorf("upstream %s: a request can name it, and every server on earth would get the token; "+
			"add `upstream <address> { … }` to transport oauth2 for each address that may get one", all.byRequest)
	}
	static := make(map[dialAddress]struct{}, len(all.static))
	for _, u := range all.static {
		static[u.canonical()] = struct{}{}
	}
	if !all.dynamic && all.byRequest == "" {
		for dial := range t.routes {
			if _, ok := static[dial]; !ok {
				return fmt.Errorf("upstream %s: reverse_proxy has no such upstream; write it as there", dial)
			}
		}
	}
	if len(t.Upstreams) > 0 {
		var err error
		if t.others, err = t.routeOfSources(all.sources); err != nil {
			return err
		}
	}
	t.nameUpstreams(all)
	for dial := range static {
		if _, listed := t.routes[dial]; !listed {
			t.routes[dial] = t.fallback
		}
	}
	return t.checkConnections()
}

// routeOfSources returns the route of all addresses that the sources yield: that of
// the upstream block which names the source. It is the zero route if none does. With
// several sources, nobody can tell which of them has yielded an address.
func (t *Transport) routeOfSources(sources []upstreamName) (route, error) {
	var found route
	for i, source := range sources {
		var own route
		for dial, r := range t.routes {
			if !source.is(dial) {
				continue
			}
			if own != r && !own.unknown() {
				return route{}, fmt.Errorf("upstream %s: named twice; dynamic upstreams from SRV records have one upstream block, whatever the port", source)
			}
			own = r
		}
		if i > 0 && own != found {
			return route{}, errors.New("dynamic multi: one upstream block names a part of its sources, but nobody can tell which of them yields an address; " +
				"name all sources in one block, or list the addresses that they yield")
		}
		found = own
	}
	return found, nil
}

// nameUpstreams lists what can be named: the upstreams as the proxy has them, and what
// only the blocks name.
func (t *Transport) nameUpstreams(all configuredUpstreams) {
	blocks := t.named
	t.named = nil
	listed := make(map[upstreamName]struct{}, len(all.static))
	name := func(n upstreamName) {
		if _, ok := listed[n]; !ok {
			listed[n] = struct{}{}
			t.named = append(t.named, n)
		}
	}
	for _, u := range all.static {
		name(upstreamName{dialAddress: u.canonical()})
	}
	for _, source := range all.sources {
		if source != (upstreamName{}) {
			name(source)
		}
	}
	for _, n := range blocks {
		if !slices.ContainsFunc(all.sources, func(source upstreamName) bool { return source.is(n.dialAddress) }) {
			name(n)
		}
	}
}

// checkConnections refuses addresses that differ in the network only, such as
// tcp4/localhost:80 and tcp6/localhost:80, and have different credentials. net/http
// keeps connections by the address alone, and would mix theirs.
func (t *Transport) checkConnections() error {
	networks := make(map[string]dialAddress)
	for dial, r := range t.routes {
		other, ok := networks[dial.address]
		if ok && t.routes[other] != r {
			return fmt.Errorf("upstream %s: with other credentials on %s and %s, but both share their connections; name both in one upstream block, or give each a reverse_proxy",
				dial.address, min(dial.network, other.network), max(dial.network, other.network))
		}
		networks[dial.address] = dial
	}
	return nil
}
