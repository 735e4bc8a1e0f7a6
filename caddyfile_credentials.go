// The Caddyfile grammar of credentials: one block, wherever it stands.

package outboundauth

import (
	"errors"
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

// unmarshalAll reads a block of settings, which is one of a kind: upstream or client. One that is
// off has none.
func (b *credentialsBlock) unmarshalAll(d *caddyfile.Dispenser, kind string, off bool) error {
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if off {
			return d.Errf("%s: off takes no block: remove one of the two", kind)
		}
		ours, err := b.unmarshal(d)
		if err != nil {
			return err
		}
		if !ours {
			return d.Errf("%s: the line does not begin with a setting of credentials, and such a block takes no others: options of transport http stand beside it", kind)
		}
	}
	return nil
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
