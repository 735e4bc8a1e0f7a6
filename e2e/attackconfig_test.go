package e2e

import (
	"fmt"
	"strings"
)

// attackRoutes are what clients can ask for: the paths, and the upstreams whose answers
// they may get there.
var attackRoutes = []attackRoute{
	{"/sockets", "ab"},
	{"/ports", "cd"},
	{"/h2c", "e"},
	{"/off", "f"},
	{"/named", "c"},   // the client names the upstream: c gets its token, all others nothing
	{"/dynamic", "c"}, // likewise
	{"/unissued", ""},
}

type attackRoute struct{ path, owners string }

// attackErrors has the gateway's own errors tell all that they can, and lets the test
// know that they are the gateway's.
const attackErrors = `handle_errors {
	header X-Gateway-Error yes
	respond "{err.status_code} {err.message} {http.oauth2.error} {http.oauth2.error_description}" {err.status_code}
}`

// attackClaims sets headers from what a client claims: Caddy's server drops such names
// before the transport sees them.
const attackClaims = `@claim header X-Claim *
request_header @claim X_Tenant_Id {header.X-Claim}
request_header @claim X.Tenant-Id {header.X-Claim}
request_header @claim X-Tenant_Id {header.X-Claim}`

// site returns the n-th config. Each has other clients than the one before, in blocks
// of another order, or outside of blocks. In some, d gets no token.
func (f *attackField) site(n int) string {
	up := func(owner byte) *attackUpstream { return f.upstreams[owner] }
	c, e := up('c'), up('e')
	chosen := f.credentials(n, nobody) + "\nupstream " + c.address + " {\n" + f.credentials(n, c.owner) + "\n}"
	return strings.Join([]string{
		"log", attackErrors, attackClaims,
		f.checked("/sockets", up('a').address+" "+up('b').address,
			f.blocks(n, up('a'), up('b'))+"\nresponse_header_timeout 1s\nmax_response_header 16KiB"),
		f.checked("/ports", c.address+" "+up('d').address,
			f.blocks(n, up('c'), up('d'))+"\nreplay_body 64KiB announce"),
		f.checked("/h2c", "h2c://"+e.address, f.credentials(n, e.owner)),
		f.checked("/off", up('f').address, "upstream "+up('f').address+" off"),
		f.proxy("/unissued", up('r').address, "", f.credentials(n, 'r')),
		f.proxy("/named", "{header.X-Upstream}", "", chosen),
		f.proxy("/dynamic", "", "dynamic a {\nname {header.X-Host}\nport {header.X-Port}\n}", chosen),
	}, "\n")
}

// nobody owns tokens that are for no upstream.
const nobody = 'n'

// proxy returns a route to the upstreams. Idle connections end soon: those that a reload
// has left behind are not to be taken for leaks.
func (f *attackField) proxy(path, to, options, transport string) string {
	return fmt.Sprintf("handle %s/* {\nreverse_proxy %s {\n%s\ntransport oauth2 {\nkeepalive 3s\n%s\n}\n}\n}", path, to, options, transport)
}

// checked is proxy for upstreams that are checked all the time, and tried one after
// the other.
func (f *attackField) checked(path, to, transport string) string {
	return f.proxy(path, to, `lb_policy round_robin
lb_retries 1
health_uri `+healthPath+`
health_interval 250ms
health_timeout 1s
health_follow_redirects`, transport)
}

// credentials returns what is set for an upstream in the n-th config.
func (f *attackField) credentials(n int, owner byte) string {
	version := n % attackVersions
	return fmt.Sprintf(`token_url %s
client_id %s
client_secret {env.%s}
auth_method %s
scopes read write
param code {env.ATTACK_FORM}
token_request_header X-Code {env.ATTACK_FORM}
token_timeout 2s
tenant %s`, f.tokenURL, clientID(owner, version), secretName(owner, version),
		[]string{"client_secret_basic", "client_secret_post"}[version%2], tenantOf(owner))
}

// blocks returns the credentials of two upstreams in the n-th config: with a block for
// each, or with the settings of one outside of its block.
func (f *attackField) blocks(n int, first, second *attackUpstream) string {
	block := func(u *attackUpstream) string {
		return fmt.Sprintf("upstream %s {\n%s\n}\n", u.address, f.credentials(n, u.owner))
	}
	if n%2 == 1 {
		first, second = second, first
	}
	switch n / 2 % 4 {
	case 1:
		return f.credentials(n, first.owner) + "\n" + block(second)
	case 2:
		return block(second) + f.credentials(n, first.owner)
	case 3:
		for _, u := range []*attackUpstream{first, second} {
			if u.tokenless {
				return strings.ReplaceAll(block(first)+block(second), block(u), "upstream "+u.address+" off\n")
			}
		}
	}
	return block(first) + block(second)
}

// brokenSite returns directives that Caddy doesn't load.
func (f *attackField) brokenSite(n int) string {
	u := f.upstreams['c']
	return f.proxy("/broken", u.address, "", f.credentials(n, u.owner)+"\nupstream 127.0.0.1:1 {\nclient_id other\n}")
}
