// The Caddyfile grammar.

package outboundauth

import (
	"fmt"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// UnmarshalCaddyfile sets up the transport from Caddyfile tokens. Errors quote no
// argument of a setting: with {$X}, or in a line that is mistyped, any of them may
// be a secret or a part of one. Syntax:
//
//	transport oauth2 {
//		# the OAuth client
//		name                 <name>
//		token_url            <url>
//		issuer               <url>
//		client_id            <id>
//		client_secret        <secret>
//		auth_method          client_secret_basic | client_secret_post | client_secret_jwt |
//		                     private_key_jwt | tls_client_auth | none
//		basic_encoding       form | raw
//		private_key          <file>
//		key_id               <kid>
//		signing_alg          <alg>
//		assertion_audience   <audience>
//		assertion_typ        <type>
//		assertion_lifetime   <duration>
//		assertion_file       <file>
//		client_certificate   <certificate> <key>
//		bind_certificate
//		dpop                 [ES256 | EdDSA]
//		share_tokens         [<key> | off] {
//			key     <key>
//			storage <module> ...
//		}
//		grant_type           client_credentials | jwt_bearer | none | <another grant>
//		subject              <subject>
//		claim                <name> <value>
//		scopes               <scope...>
//		audience             <value...>
//		resource             <uri...>
//		param                <name> <value>
//		token_request_header <field> <value>
//		token_request        form | json
//		token_response {
//			access_token <pointer>
//			expires_in   <pointer> [<unit>]
//		}
//		token_timeout        <duration>
//		token_transport {
//			<option of transport http>
//		}
//
//		# what is sent to the upstream
//		tenant               [<field>] <value>
//		header               <field> <value>
//		bearer_header        <field> [<scheme>]
//
//		# the life of a token
//		refresh_before       <duration>
//		default_lifetime     <duration>
//		max_lifetime         <duration>
//		retry_on             (<status> | grpc)... | off
//		replay_body          <size> [announce]
//
//		# other credentials for some of the upstreams
//		upstream <address...> {
//			<any of the above>
//		}
//		upstream <address...> off
//
//		# other credentials for some of the requests
//		client_by            <placeholder>
//		client (<key...> | default) [{
//			<any of the above but upstream>
//		}]
//		client (<key...> | default) off
//
//		insecure_plaintext   token_url | upstream ...
//
//		<any option of transport http>
//	}
func (t *Transport) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.CountRemainingArgs() > 0 {
		return d.Err("transport oauth2 takes no argument: write its settings in a block")
	}
	segment := d.NextSegment()
	d = caddyfile.NewDispenser(segment)
	d.Next()

	// Settings that are not ours go to the http transport as whole segments. If
	// they went word by word, an argument could pass for one of our settings.
	rest := slices.Clone(segment[:min(2, len(segment))]) // the name and the opening brace

	base := newCredentialsBlock(d)
	var blocks []*credentialsBlock // one for each of t.Upstreams
	var keyed keyedBlocks
	for d.NextBlock(0) {
		switch d.Val() {
		case "client_by":
			if err := keyed.unmarshalBy(d); err != nil {
				return err
			}
		case "client":
			if err := keyed.unmarshal(d); err != nil {
				return err
			}
		case "upstream":
			upstream, block, err := unmarshalUpstream(d)
			if err != nil {
				return err
			}
			t.Upstreams = append(t.Upstreams, upstream)
			blocks = append(blocks, block)
		case "insecure_plaintext":
			if err := t.unmarshalPlaintext(d); err != nil {
				return err
			}
		default:
			ours, err := base.unmarshal(d)
			if err != nil {
				return err
			}
			if !ours {
				rest = append(rest, d.NextSegment()...)
			}
		}
	}
	if len(base.seen) > 0 {
		t.Credentials = &base.Credentials
	}
	if len(rest) > 2 {
		rest = append(rest, segment[len(segment)-1])
		err := unmarshalHTTP(t.HTTPTransport, caddyfile.NewDispenser(rest),
			"a line begins with neither a setting of transport oauth2 nor an option of transport http; check its first word")
		if err != nil {
			return err
		}
	}
	var err error
	if t.Clients, err = keyed.config(); err != nil {
		return err
	}
	return t.checkBlocks(base, blocks, keyed.blocks)
}

// unmarshalPlaintext parses insecure_plaintext.
func (t *Transport) unmarshalPlaintext(d *caddyfile.Dispenser) error {
	if t.InsecurePlaintext != nil {
		return d.Err("insecure_plaintext is set twice: put all on one line")
	}
	t.InsecurePlaintext = d.RemainingArgs()
	if len(t.InsecurePlaintext) == 0 {
		return d.Errf("insecure_plaintext: say where: %s", strings.Join(plaintextTargets, ", "))
	}
	for _, target := range t.InsecurePlaintext {
		if !slices.Contains(plaintextTargets, target) {
			return d.Errf("insecure_plaintext: is for %s only", strings.Join(plaintextTargets, " and "))
		}
	}
	return nil
}

// checkBlocks finds mistakes that show only when the whole block has been read.
// Provision would find them too, but it knows neither file nor line.
func (t *Transport) checkBlocks(base *credentialsBlock, upstreams, keyed []*credentialsBlock) error {
	if len(t.Upstreams) == 0 || t.missingFor(&base.Credentials) == nil { // otherwise upstreams only inherit from it
		if err := t.checkClients(base, nil, keyed); err != nil {
			return err
		}
	}
	var inheriting []*Credentials
	if t.Clients != nil && t.missingFor(t.Credentials) == nil {
		inheriting = t.Clients.credentials()
	}
	for i, upstream := range t.Upstreams {
		if upstream.Off {
			continue
		}
		if err := t.checkClients(upstreams[i], t.Credentials, keyed); err != nil {
			return err
		}
		inheriting = append(inheriting, upstream.Credentials)
		if setting := upstream.unusedAuth(t.Clients.credentials()); setting != "" {
			at := upstreams[i].seen[setting]
			return at.WrapErr(unusedAuthError(setting, t.Clients != nil))
		}
	}
	if t.Clients == nil && base.missing() == "" { // it is a client itself
		return nil
	}
	if setting := base.unusedAuth(inheriting); setting != "" {
		at := base.seen[setting]
		return at.WrapErr(unusedAuthError(setting, t.Clients != nil))
	}
	return nil
}

// checkClients checks the clients that a block leads to: its own, or those of the client blocks
// that inherit from it. base is around the block.
func (t *Transport) checkClients(block *credentialsBlock, base *Credentials, keyed []*credentialsBlock) error {
	if t.Clients == nil {
		return t.checkBlock(block, base)
	}
	merged := block.inherit(base)
	if err := t.checkPlaintext(block, &merged); err != nil {
		return err
	}
	for _, k := range keyed {
		// The server may be around the block, which keeps it off.
		if own := block.authSettings(); base != nil && len(own) > 0 && k.inherits("token_url") && merged.TokenURL+merged.Issuer == "" && base.TokenURL+base.Issuer != "" {
			return block.at.WrapErr(fmt.Errorf("transport oauth2: %s (this block sets %s, so no client block inherits any client authentication from the settings around it)", merged.missing(), own[0]))
		}
		if err := t.checkBlock(k, &merged); err != nil {
			return err
		}
	}
	return nil
}

// checkBlock checks a block, with the settings that it inherits from base.
func (t *Transport) checkBlock(block *credentialsBlock, base *Credentials) error {
	if missing := block.missingBeside(base); missing != "" {
		return block.at.WrapErr(fmt.Errorf("transport oauth2: %s", missing))
	}
	merged := block.inherit(base)
	if err := merged.checkTogether(); err != nil {
		// The error begins with the name of a setting. It names the line of
		// this setting, or of the block if the block does not have the setting.
		setting, _, _ := strings.Cut(strings.ReplaceAll(err.Error(), ":", " "), " ")
		if at, ok := block.seen[setting]; ok {
			return at.WrapErr(err)
		}
		return block.at.WrapErr(err)
	}
	return t.checkPlaintext(block, &merged)
}

// checkPlaintext checks the URLs of a block. merged has what it inherits.
func (t *Transport) checkPlaintext(block *credentialsBlock, merged *Credentials) error {
	for setting, raw := range map[string]string{"token_url": block.TokenURL, "issuer": block.Issuer} {
		at, ok := block.seen[setting]
		if !ok || slices.Contains(t.InsecurePlaintext, plaintextTokenURL) {
			continue
		}
		if u, err := parseTokenURL(raw); err == nil { // otherwise the URL has placeholders
			if err := checkPlaintext(u, usesProxy(merged.TokenTransport)); err != nil {
				return at.WrapErr(fmt.Errorf("%s: %w", setting, err))
			}
		}
	}
	return nil
}

// unmarshalUpstream parses an upstream block:
//
//	upstream <address...> {
//		<settings of the credentials>
//	}
//	upstream <address...> off
func unmarshalUpstream(d *caddyfile.Dispenser) (*Upstream, *credentialsBlock, error) {
	block := newCredentialsBlock(d)

	// The reverse proxy's own parser reads the addresses. So each address means
	// the same in both places, also one with a scheme or a port range.
	directive := d.Token()
	directive.Text = "reverse_proxy"
	tokens := []caddyfile.Token{directive}
	var off bool
	for d.NextArg() {
		if off {
			return nil, nil, d.Err("upstream: off comes last")
		}
		if off = d.Val() == "off"; !off {
			tokens = append(tokens, d.Token())
		}
	}
	if len(tokens) == 1 {
		return nil, nil, d.Err("upstream: name the address of an upstream, as reverse_proxy has it")
	}
	var proxy reverseproxy.Handler
	if err := proxy.UnmarshalCaddyfile(caddyfile.NewDispenser(tokens)); err != nil {
		return nil, nil, err
	}
	upstream := &Upstream{Off: off}
	for _, u := range proxy.Upstreams {
		upstream.Addresses = append(upstream.Addresses, u.Dial)
	}

	if err := block.unmarshalAll(d, "upstream", off); err != nil {
		return nil, nil, err
	}
	if !off && len(block.seen) == 0 {
		return nil, nil, d.Err("upstream: has no settings of its own: open a block with them, or write off")
	}
	if !off {
		upstream.Credentials = &block.Credentials
	}
	return upstream, block, nil
}
