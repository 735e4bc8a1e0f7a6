// The Caddyfile grammar.

package outboundauth

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
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
	for d.NextBlock(0) {
		switch d.Val() {
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
	return t.checkBlocks(base, blocks)
}

// unmarshalHTTP parses options of transport http. Where one is not known, the error
// is what unknown says: Caddy's quotes the word, which may be the second line of a
// secret.
func unmarshalHTTP(h *reverseproxy.HTTPTransport, d *caddyfile.Dispenser, unknown string) error {
	err := h.UnmarshalCaddyfile(d)
	if err == nil || !strings.HasPrefix(err.Error(), "unrecognized subdirective ") {
		return err
	}
	at := max(0, strings.LastIndex(err.Error(), ", at ")) // file and line end the text
	return errors.New(unknown + err.Error()[at:])
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
func (t *Transport) checkBlocks(base *credentialsBlock, blocks []*credentialsBlock) error {
	if len(t.Upstreams) == 0 || base.missing() == "" { // otherwise upstreams only inherit from it
		if err := t.checkBlock(base, nil); err != nil {
			return err
		}
	}
	var inheriting []*Credentials
	for i, upstream := range t.Upstreams {
		if upstream.Off {
			continue
		}
		if err := t.checkBlock(blocks[i], t.Credentials); err != nil {
			return err
		}
		inheriting = append(inheriting, upstream.Credentials)
	}
	if setting := base.unusedAuth(inheriting); setting != "" {
		at := base.seen[setting]
		return at.WrapErr(unusedAuthError(setting))
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

	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if off {
			return nil, nil, d.Err("upstream: off takes no block: remove one of the two")
		}
		ours, err := block.unmarshal(d)
		if err != nil {
			return nil, nil, err
		}
		if !ours {
			return nil, nil, d.Err("upstream: the line does not begin with a setting of credentials, and an upstream block takes no others: options of transport http stand beside it")
		}
	}
	if !off && len(block.seen) == 0 {
		return nil, nil, d.Err("upstream: has no settings of its own: open a block with them, or write off")
	}
	if !off {
		upstream.Credentials = &block.Credentials
	}
	return upstream, block, nil
}

// A credentialsBlock holds the settings of Credentials while they are read.
type credentialsBlock struct {
	Credentials

	// The places of the block and of its settings in the Caddyfile. Errors that
	// show only later name them.
	at   caddyfile.Dispenser
	seen map[string]caddyfile.Dispenser
}

func newCredentialsBlock(d *caddyfile.Dispenser) *credentialsBlock {
	return &credentialsBlock{seen: make(map[string]caddyfile.Dispenser), at: *d}
}

// unmarshal reads the setting at d. If Credentials has no such setting,
// unmarshal reads nothing and returns false.
func (b *credentialsBlock) unmarshal(d *caddyfile.Dispenser) (ours bool, err error) {
	setting := d.Val()
	parse, ours := credentialsSettings[setting]
	if !ours {
		return false, nil
	}
	if _, twice := b.seen[setting]; twice && !slices.Contains(repeatableSettings, setting) {
		return true, d.Errf("%s is set twice: keep one", setting)
	}
	at := *d
	b.seen[setting] = at
	if err := parse(&b.Credentials, d); err != nil {
		return true, err
	}
	if d.NextArg() {
		return true, d.Errf("%s: too many arguments; put a value that has spaces in quotes", setting)
	}
	if err := b.check(); err != nil {
		return true, at.WrapErr(err)
	}
	return true, nil
}

var repeatableSettings = []string{"param", "claim", "token_request_header", "header"}

// credentialsSettings has the parsers for the settings of Credentials, by name.
var credentialsSettings = map[string]func(*Credentials, *caddyfile.Dispenser) error{
	"name":          func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.Name) },
	"token_url":     func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.TokenURL) },
	"client_id":     func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.ClientID) },
	"client_secret": func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.ClientSecret) },
	"auth_method":   func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.AuthMethod) },

	"issuer":             func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.Issuer) },
	"basic_encoding":     func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.BasicEncoding) },
	"private_key":        func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.PrivateKey) },
	"key_id":             func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.KeyID) },
	"signing_alg":        func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.SigningAlg) },
	"assertion_audience": func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.AssertionAudience) },
	"assertion_typ":      func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.AssertionTyp) },
	"assertion_lifetime": func(c *Credentials, d *caddyfile.Dispenser) error { return durationArg(d, &c.AssertionLifetime) },
	"assertion_file":     func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.AssertionFile) },
	"client_certificate": func(c *Credentials, d *caddyfile.Dispenser) error {
		c.ClientCertificate = new(ClientCertificate)
		if !d.AllArgs(&c.ClientCertificate.Certificate, &c.ClientCertificate.Key) {
			return d.Err("client_certificate: write `client_certificate <certificate> <key>`")
		}
		return nil
	},
	"bind_certificate": func(c *Credentials, _ *caddyfile.Dispenser) error {
		c.BindCertificate = true
		return nil
	},
	"dpop": func(c *Credentials, d *caddyfile.Dispenser) error {
		if c.DPoP = dpop.ES256; d.CountRemainingArgs() == 0 {
			return nil
		}
		if err := oneArg(d, &c.DPoP); err != nil || c.DPoP != "off" {
			return err
		}
		return d.Err("dpop: off is no algorithm; write dpop into the blocks that need it, and not around them")
	},
	"share_tokens": unmarshalShareTokens,
	"grant_type":   func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.GrantType) },
	"subject":      func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.Subject) },
	"claim":        func(c *Credentials, d *caddyfile.Dispenser) error { return namedArg(d, &c.Claims, false) },
	"resource":     func(c *Credentials, d *caddyfile.Dispenser) error { return listArg(d, &c.Resource) },
	"scopes":       func(c *Credentials, d *caddyfile.Dispenser) error { return listArg(d, &c.Scopes) },
	"audience":     func(c *Credentials, d *caddyfile.Dispenser) error { return listArg(d, &c.Audience) },
	"param":        func(c *Credentials, d *caddyfile.Dispenser) error { return namedArg(d, &c.Params, false) },
	"token_request_header": func(c *Credentials, d *caddyfile.Dispenser) error {
		return namedArg(d, &c.TokenRequestHeaders, true)
	},
	"token_request":  func(c *Credentials, d *caddyfile.Dispenser) error { return oneArg(d, &c.TokenRequest) },
	"token_response": unmarshalTokenResponse,
	"token_timeout":  func(c *Credentials, d *caddyfile.Dispenser) error { return durationArg(d, &c.TokenTimeout) },
	"token_transport": func(c *Credentials, d *caddyfile.Dispenser) error {
		if d.CountRemainingArgs() > 0 {
			return d.Err("token_transport takes no arguments: write options of transport http in a block")
		}
		c.TokenTransport = new(reverseproxy.HTTPTransport)
		return unmarshalHTTP(c.TokenTransport, d.NewFromNextSegment(),
			"token_transport: a line does not begin with an option of transport http; check its first word")
	},
	"tenant": func(c *Credentials, d *caddyfile.Dispenser) error {
		c.Tenant = new(Tenant)
		switch args := d.RemainingArgs(); len(args) {
		case 1:
			c.Tenant.Value = args[0]
		case 2:
			if c.Tenant.Field, c.Tenant.Value = args[0], args[1]; args[0] == "" {
				return d.Err("tenant: the field is empty: write `tenant [<field>] <value>`")
			}
		default:
			return d.Err("tenant: write `tenant [<field>] <value>`")
		}
		return nil
	},
	"header": func(c *Credentials, d *caddyfile.Dispenser) error { return namedArg(d, &c.Headers, true) },
	"bearer_header": func(c *Credentials, d *caddyfile.Dispenser) error {
		c.BearerHeader = new(BearerHeader)
		switch args := d.RemainingArgs(); len(args) {
		case 2:
			c.BearerHeader.Scheme = &args[1]
			fallthrough
		case 1:
			c.BearerHeader.Field = args[0]
		default:
			return d.Err("bearer_header: write `bearer_header <field> [<scheme>]`")
		}
		return nil
	},
	"refresh_before":   func(c *Credentials, d *caddyfile.Dispenser) error { return durationArg(d, &c.RefreshBefore) },
	"max_lifetime":     func(c *Credentials, d *caddyfile.Dispenser) error { return durationArg(d, &c.MaxLifetime) },
	"default_lifetime": func(c *Credentials, d *caddyfile.Dispenser) error { return durationArg(d, &c.DefaultLifetime) },
	"retry_on": func(c *Credentials, d *caddyfile.Dispenser) error {
		var args []string
		if err := listArg(d, &args); err != nil {
			return err
		}
		if slices.Equal(args, []string{"off"}) {
			c.RetryOn = []int{retryOff}
			return nil
		}
		for _, arg := range args {
			status, err := strconv.Atoi(arg)
			switch {
			case arg == "grpc":
				status = retryGRPC
			case err != nil || status < 0 || status == retryGRPC: // -1 and 16 have names here
				return d.Err("retry_on: write statuses such as 401, grpc, or off")
			}
			c.RetryOn = append(c.RetryOn, status)
		}
		return nil
	},
	"replay_body": func(c *Credentials, d *caddyfile.Dispenser) error {
		var arg string
		if err := oneArg(d, &arg); err != nil {
			return err
		}
		size, err := parseSize(arg)
		if err != nil {
			return d.Err("replay_body: is not a size, such as 64KiB")
		}
		if size == 0 {
			size = replayNothing
		}
		c.ReplayBody = &ReplayBody{Size: size}
		if d.NextArg() {
			if d.Val() != "announce" {
				return d.Err("replay_body: write `replay_body <size> [announce]`")
			}
			c.ReplayBody.Announce = true
		}
		return nil
	},
}

// unmarshalTokenResponse reads where the token is in the answer:
//
//	token_response {
//		access_token <pointer>
//		expires_in   <pointer> [<unit>]
//	}
func unmarshalTokenResponse(c *Credentials, d *caddyfile.Dispenser) error {
	if d.CountRemainingArgs() > 0 {
		return d.Err("token_response takes no arguments: write access_token and expires_in in a block")
	}
	r := new(TokenResponse)
	c.TokenResponse = r
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		member, into := d.Val(), &r.AccessToken
		switch member {
		case "access_token":
		case "expires_in":
			into = &r.ExpiresIn
		default:
			return d.Err("token_response: a line begins with neither access_token nor expires_in")
		}
		if *into != "" {
			return d.Errf("token_response: %s is set twice: keep one", member)
		}
		if err := oneArg(d, into); err != nil {
			return err
		}
		if member == "expires_in" && d.NextArg() {
			r.ExpiresInUnit = d.Val()
		}
		if d.NextArg() {
			return d.Errf("token_response: %s: too many arguments", member)
		}
		if err := c.checkExchange(); err != nil {
			return d.WrapErr(err)
		}
	}
	return nil
}

// unmarshalShareTokens reads how tokens are shared:
//
//	share_tokens [<key>|off] {
//		key     <key>
//		storage <module> [...]
//	}
func unmarshalShareTokens(c *Credentials, d *caddyfile.Dispenser) error {
	s := new(ShareTokens)
	c.ShareTokens = s
	if d.CountRemainingArgs() > 0 {
		if err := oneArg(d, &s.Key); err != nil {
			return err
		}
		if s.Key == "off" {
			s.Off, s.Key = true, ""
		}
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		switch d.Val() {
		case "key":
			if s.Key != "" {
				return d.Err("share_tokens: key is set twice: keep one")
			}
			if err := oneArg(d, &s.Key); err != nil {
				return err
			}
			if d.NextArg() {
				return d.Err("share_tokens: key: too many arguments; put a value that has spaces in quotes")
			}
		case "storage":
			if s.StorageRaw != nil {
				return d.Err("share_tokens: storage is set twice: keep one")
			}
			if err := unmarshalStorage(s, d); err != nil {
				return err
			}
		default:
			return d.Err("share_tokens: a line begins with neither key nor storage")
		}
	}
	return nil
}

// unmarshalStorage reads a storage module, and its own settings.
func unmarshalStorage(s *ShareTokens, d *caddyfile.Dispenser) error {
	var name string
	if err := oneArg(d, &name); err != nil {
		return err
	}
	const namespace = "caddy.storage."
	if _, err := caddy.GetModule(namespace + name); err != nil { // the error quotes the name
		return d.Err("share_tokens: storage: there is no such storage module; build Caddy with it, or check its name")
	}
	module, err := caddyfile.UnmarshalModule(d, namespace+name)
	if err != nil {
		return err
	}
	if _, ok := module.(caddy.StorageConverter); !ok {
		return d.Err("share_tokens: storage: the module is no storage")
	}
	s.StorageRaw = caddyconfig.JSONModuleObject(module, "module", name, nil)
	return nil
}

// oneArg reads the single argument of a setting.
func oneArg(d *caddyfile.Dispenser, value *string) error {
	setting := d.Val()
	if !d.NextArg() || d.Val() == "" {
		return d.Errf("%s: a value is missing", setting)
	}
	*value = d.Val()
	return nil
}

// listArg reads the arguments of a setting, one or more.
func listArg(d *caddyfile.Dispenser, values *[]string) error {
	setting := d.Val()
	if *values = d.RemainingArgs(); len(*values) == 0 {
		return d.Errf("%s: a value is missing", setting)
	}
	return nil
}

// namedArg reads a name and a value, and adds them to values. The case of a
// header field's name does not matter.
func namedArg(d *caddyfile.Dispenser, values *map[string]string, isField bool) error {
	setting := d.Val()
	var name, value string
	if !d.AllArgs(&name, &value) {
		return d.Errf("%s: write `%s <name> <value>`", setting, setting)
	}
	if isField {
		name = http.CanonicalHeaderKey(name)
	}
	if _, ok := (*values)[name]; ok {
		return d.Errf("%s: the same name is set twice: keep one", setting)
	}
	if *values == nil {
		*values = make(map[string]string)
	}
	(*values)[name] = value
	return nil
}

// durationArg reads a duration, in Caddy's notation.
func durationArg(d *caddyfile.Dispenser, value *caddy.Duration) error {
	setting := d.Val()
	var arg string
	if err := oneArg(d, &arg); err != nil {
		return err
	}
	parsed, err := caddy.ParseDuration(arg)
	if err != nil || parsed <= 0 {
		return d.Errf("%s: is not a duration above 0, such as 30s or 5m", setting)
	}
	*value = caddy.Duration(parsed)
	return nil
}

// parseSize reads a size in Caddy's notation. It uses the parser of
// read_buffer, an option of the http transport whose value is a size.
func parseSize(size string) (int64, error) {
	tokens, err := caddyfile.Tokenize([]byte("http {\nread_buffer "+strconv.Quote(size)+"\n}"), "")
	if err != nil {
		return 0, err
	}
	var h reverseproxy.HTTPTransport
	if err := h.UnmarshalCaddyfile(caddyfile.NewDispenser(tokens)); err != nil {
		return 0, err
	}
	if h.ReadBufferSize < 0 {
		return 0, errors.New("too large")
	}
	return int64(h.ReadBufferSize), nil
}
