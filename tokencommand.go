// The command caddy oauth2-token: it obtains the tokens of a config, and shows what comes back.

package outboundauth

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// maxPrintedClaim is how many bytes of one text in a token are printed at most.
const maxPrintedClaim = 1000

// exitNoToken is the exit status if the config is good, but a token was not
// obtained.
const exitNoToken = 2

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "oauth2-token",
		Usage: "[--config <path>] [--adapter <name>] [--upstream <address>] [--show-token] [--json]",
		Short: "Obtains the access tokens of a config, and shows what comes back",
		Long: `
Loads the config like 'caddy validate', makes one token request for each OAuth
client in it, exactly as the gateway would, and shows the endpoint, the client,
which of its scopes were granted, the lifetime, and header and claims of a token
that is a JWT. If there is no token, it shows why, and what to change.

The config is the Caddyfile of the current directory unless --config names
another. --upstream picks the client of one upstream, written as in
reverse_proxy. The token itself is shown only with --show-token.

Placeholders are replaced in the environment of the command: {env.*} are its
own variables, and files have to be readable by its user.

The exit status is 0 if all tokens were obtained, 1 if the config can't be
loaded, and 2 if a token was not obtained.`,
		Flags: func() *flag.FlagSet {
			fs := flag.NewFlagSet("oauth2-token", flag.ExitOnError)
			fs.String("config", "", "Configuration file")
			fs.String("adapter", "", "Name of the config adapter")
			fs.String("upstream", "", "Only for the client of this upstream")
			fs.Bool("show-token", false, "Show the token itself")
			fs.Bool("json", false, "Write JSON")
			return fs
		}(),
		Func: func(fl caddycmd.Flags) (int, error) {
			if len(fl.Args()) > 0 {
				return caddy.ExitCodeFailedStartup, errors.New("oauth2-token takes no arguments; name the config with --config")
			}
			config, err := readConfig(fl.String("config"), fl.String("adapter"))
			if err != nil {
				return caddy.ExitCodeFailedStartup, err
			}
			reports, err := requestTokens(config, fl.String("upstream"))
			if err != nil {
				return caddy.ExitCodeFailedStartup, err
			}
			return writeReports(os.Stdout, reports, fl.Bool("show-token"), fl.Bool("json"))
		},
	})
}

// readConfig reads a config file. Without a name, it reads the Caddyfile in the
// current directory.
func readConfig(file, adapter string) (*caddy.Config, error) {
	if file == "" {
		file = "Caddyfile"
		if _, err := os.Stat(file); err != nil {
			return nil, errors.New("there is no Caddyfile in the current directory; name the config with --config")
		}
	}
	raw, _, _, err := caddycmd.LoadConfig(file, adapter)
	if err != nil {
		return nil, err
	}
	config := new(caddy.Config)
	if err := caddy.StrictUnmarshalJSON(caddy.RemoveMetaFields(raw), config); err != nil {
		return nil, fmt.Errorf("decoding config: %w", err)
	}
	return config, nil
}

// requestTokens provisions a config, and requests a token for each of its
// clients. If upstream is not empty, it requests only the token of that
// upstream's client.
func requestTokens(config *caddy.Config, upstream string) ([]tokenReport, error) {
	// The gateway may be running with this config. The command must neither
	// take its admin address nor write to its logs.
	config.Admin = &caddy.AdminConfig{Disabled: true}
	config.Logging = &caddy.Logging{Logs: map[string]*caddy.CustomLog{
		caddy.DefaultLoggerName: {BaseLog: caddy.BaseLog{Level: "ERROR"}}, // the reports tell everything
	}}
	before := loadedTransports()
	if _, err := caddy.ProvisionContext(config); err != nil {
		return nil, err
	}
	var transports []*Transport
	for _, t := range loadedTransports() {
		if !slices.Contains(before, t) {
			transports = append(transports, t)
			defer t.Cleanup() //nolint:errcheck // the command ends anyway
		}
	}
	if len(transports) == 0 {
		return nil, errors.New("the config has no transport oauth2")
	}
	clients, err := selectClients(transports, upstream)
	if err != nil {
		return nil, err
	}
	reports := make([]tokenReport, len(clients))
	var wg sync.WaitGroup
	for i, c := range clients {
		wg.Go(func() { reports[i] = c.report() })
	}
	wg.Wait()
	return reports, nil
}

// upstreamClient is a client and the upstreams that get its token.
type upstreamClient struct {
	*client
	upstreams []string
}

// selectClients returns the clients of all upstreams in the order of the
// config, or only the client of one upstream. Equal clients share one token, so
// it returns only one of them.
func selectClients(transports []*Transport, upstream string) ([]*upstreamClient, error) {
	wanted, err := parseUpstream(upstream)
	if err != nil {
		return nil, err
	}
	var selected []*upstreamClient
	byKey := make(map[sourceKey]*upstreamClient)
	known := make(map[string]bool)
	off := false
	for _, t := range transports {
		for _, n := range t.named {
			r := t.routeTo(n.dialAddress)
			if r.unknown() {
				continue // only what it yields has credentials
			}
			known[n.String()] = true
			if upstream != "" && !n.is(wanted) {
				continue
			}
			if r.block == nil {
				off = true
				continue
			}
			if _, ok := byKey[r.key]; !ok {
				byKey[r.key] = &upstreamClient{client: r.client}
				selected = append(selected, byKey[r.key])
			}
			if c := byKey[r.key]; !slices.Contains(c.upstreams, n.String()) {
				c.upstreams = append(c.upstreams, n.String())
			}
		}
		// Upstreams that the config does not name get the token of this one.
		if r := t.others; r.block != nil && upstream == "" && byKey[r.key] == nil {
			byKey[r.key] = &upstreamClient{client: r.client}
			selected = append(selected, byKey[r.key])
		}
	}
	switch {
	case len(selected) > 0:
		return selected, nil
	case upstream == "":
		return nil, errors.New("all upstreams are off: there is no token to obtain")
	case off:
		return nil, fmt.Errorf("--upstream %s: it is off, and gets no token", upstream)
	case len(known) == 0:
		return nil, fmt.Errorf("--upstream %s: all upstreams are dynamic; leave it out", upstream)
	}
	return nil, fmt.Errorf("--upstream %s: the config has no such upstream; it has %s",
		upstream, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
}

// parseUpstream reads an address as reverse_proxy does. For "", it returns the
// zero address.
func parseUpstream(upstream string) (dialAddress, error) {
	if upstream == "" {
		return dialAddress{}, nil
	}
	tokens, err := caddyfile.Tokenize([]byte("reverse_proxy "+strconv.Quote(upstream)), "--upstream")
	if err != nil {
		return dialAddress{}, err
	}
	var proxy reverseproxy.Handler
	if err := proxy.UnmarshalCaddyfile(caddyfile.NewDispenser(tokens)); err != nil {
		return dialAddress{}, err
	}
	if len(proxy.Upstreams) != 1 {
		return dialAddress{}, errors.New("--upstream: name a single upstream")
	}
	dial, err := parseDialAddress(caddy.NewReplacer(), proxy.Upstreams[0].Dial)
	return dial.canonical(), err
}

// tokenReport is the result of a client's token request.
type tokenReport struct {
	Upstreams     []string `json:"upstreams,omitempty"`
	TokenEndpoint string   `json:"token_endpoint"` // "" if it was not discovered
	description

	// Of the scopes that are configured.
	Granted    string   `json:"granted_scope,omitempty"`
	NotGranted []string `json:"not_granted,omitempty"`

	// What to change although there is a token. The log has it as warnings.
	Advice string `json:"advice,omitempty"`

	Lifetime float64    `json:"lifetime,omitempty"` // in seconds
	Expires  *time.Time `json:"expires,omitempty"`
	Renewal  *time.Time `json:"renewal,omitempty"`

	Token  string         `json:"token,omitempty"`
	Header map[string]any `json:"header,omitempty"`
	Claims map[string]any `json:"claims,omitempty"`

	Error *reportedError `json:"error,omitempty"`

	length int // the token's length, in characters
}

// report requests a token like the source, but only once, and returns the result.
func (c *upstreamClient) report() tokenReport {
	r := tokenReport{Upstreams: c.upstreams}
	ctx, cancel := context.WithTimeout(context.Background(), c.endpoint.credentials.lifecycle().fetchTimeout)
	defer cancel()
	var (
		t *token
		g grant
	)
	err := safely(func() error {
		u, err := c.endpoint.locate(ctx, nil)
		if err == nil {
			t, g, err = c.endpoint.credentials.lifecycle().requestToken(ctx, c.endpoint, u, nil, nil)
		}
		return err
	})
	r.description = c.endpoint.describe()
	r.TokenEndpoint = r.description.TokenEndpoint
	if err != nil {
		r.Error = reportError(err)
		return r
	}
	r.NotGranted = c.endpoint.lacking(g.scope)
	r.Granted = strings.Join(slices.DeleteFunc(slices.Clone(r.Scopes), func(scope string) bool {
		return slices.Contains(r.NotGranted, scope)
	}), " ")
	r.Lifetime = t.expires.Sub(g.issued).Round(time.Second).Seconds()
	r.Expires, r.Renewal = &t.expires, &t.refreshAt
	r.Token, r.length = t.value, len(t.value)
	header, claims, isJWT := jwt.Decode(t.value)
	settings := &c.endpoint.credentials
	switch {
	case len(r.NotGranted) > 0:
		r.Advice = "check scopes, or what the authorization server allows the client"
	case g.odd != "":
		r.Advice = "set default_lifetime: the expires_in of the answer " + g.odd
	case isForOthers(claims, slices.Concat(settings.Audience, settings.Resource)):
		r.Advice = "check audience and resource: the aud of the token has none of them, so the server may ignore them"
	}
	if isJWT {
		if secrets, err := c.endpoint.secrets(ctx); err == nil { // else a file has changed since
			r.Header, r.Claims = shownObject(header, secrets), shownObject(claims, secrets)
		}
	}
	return r
}

// isForOthers reports whether the claims of a JWT name audiences (RFC 9068 §2.2), and none
// of those that were asked for.
func isForOthers(claims map[string]any, asked []string) bool {
	aud, ok := claims["aud"].([]any)
	if one, isText := claims["aud"].(string); isText {
		aud, ok = []any{one}, true
	}
	return ok && len(asked) > 0 && !slices.ContainsFunc(asked, func(name string) bool { return slices.Contains(aud, any(name)) })
}

// shownObject returns a part of a token as it may be shown: cleaned and cut, and
// without texts that hold one of the secrets.
func shownObject(object map[string]any, secrets redact.Secrets) map[string]any {
	shown := make(map[string]any, len(object))
	for name, value := range object {
		shown[shownText(name, maxPrintedClaim, secrets)] = shownValue(value, secrets)
	}
	return shown
}

func shownValue(value any, secrets redact.Secrets) any {
	switch value := value.(type) {
	case string:
		return shownText(value, maxPrintedClaim, secrets)
	case float64:
		if secrets.In(strconv.FormatFloat(value, 'f', -1, 64)) {
			return withheld
		}
	case []any:
		shown := make([]any, len(value))
		for i := range value {
			shown[i] = shownValue(value[i], secrets)
		}
		return shown
	case map[string]any:
		return shownObject(value, secrets)
	}
	return value
}

// writeReports writes the reports as text for people, or as JSON for programs.
// It returns the exit status.
func writeReports(w io.Writer, reports []tokenReport, showToken, asJSON bool) (status int, err error) {
	failed := 0
	for i := range reports {
		if reports[i].Error != nil {
			failed++
		}
		if !showToken {
			reports[i].Token = ""
		}
	}
	if asJSON {
		var b bytes.Buffer
		encoder := json.NewEncoder(&b)
		encoder.SetIndent("", "  ")
		encoder.SetEscapeHTML(false)
		if err = encoder.Encode(reports); err == nil {
			_, err = w.Write(bytes.Map(printable, b.Bytes()))
		}
	} else {
		for i := range reports {
			if i > 0 && err == nil {
				_, err = fmt.Fprintln(w)
			}
			if err == nil {
				err = reports[i].write(w)
			}
		}
	}
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	if failed > 0 {
		return exitNoToken, fmt.Errorf("no token for %d of %d clients", failed, len(reports))
	}
	return caddy.ExitCodeSuccess, nil
}

// printable replaces characters that a terminal would obey, or would not show.
// Scopes and claims come from the server, so they may hold such characters.
func printable(r rune) rune {
	if r != '\n' && !unicode.IsPrint(r) {
		return unicode.ReplacementChar
	}
	return r
}

// write writes the report as lines. Each line has a name and a value.
func (r *tokenReport) write(w io.Writer) error {
	var b strings.Builder
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%-16s %s\n", name, strings.Map(printable, value))
		}
	}
	line("upstreams", strings.Join(r.Upstreams, ", "))
	line("issuer", r.Issuer)
	line("token endpoint", r.TokenEndpoint)
	line("client", r.ClientID)
	line("auth method", cmp.Or(r.AuthMethod, "the assertion alone"))
	line("grant", r.GrantType)
	line("scopes", strings.Join(r.Scopes, " "))
	if e := r.Error; e != nil {
		line("error", e.title())
		line("", e.Description)
		line("what to change", e.Hint)
	} else {
		line("granted", r.Granted)
		line("not granted", strings.Join(r.NotGranted, " "))
		line("what to change", r.Advice)
		line("lifetime", fmt.Sprint(time.Duration(r.Lifetime)*time.Second))
		line("expires", r.Expires.Local().Format(time.RFC3339))
		line("renewal", r.Renewal.Local().Format(time.RFC3339))
		kind := "opaque"
		if r.Claims != nil {
			kind = "a JWT"
		}
		line("token", fmt.Sprintf("%s, %d characters", kind, r.length))
		line("", r.Token)
		for _, part := range []struct {
			name string
			of   map[string]any
		}{{"header", r.Header}, {"claims", r.Claims}} {
			if part.of == nil {
				continue
			}
			indented, err := json.MarshalIndent(part.of, strings.Repeat(" ", 17), "  ")
			if err != nil {
				return err
			}
			line(part.name, string(indented))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
