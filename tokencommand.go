// The command caddy oauth2-token: it obtains the tokens of a config, and shows what comes back.

package outboundauth

import (
	"bytes"
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

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// The exit status if the config is good, but a token was not obtained, or was granted
// for less than the scopes that are configured.
const (
	exitNoToken  = 2
	exitNarrowed = 3
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "oauth2-token",
		Usage: "[--config <path>] [--adapter <name>] [--upstream <address>] [--key <client key>] [--explain] [--show-token] [--json]",
		Short: "Obtains the access tokens of a config, and shows what comes back",
		Long: `
Loads the config like 'caddy validate', makes one token request for each OAuth
client in it, exactly as the gateway would, and shows its name, the endpoint, the
client, which of its scopes were granted, the lifetime, and header and claims of a
token that is a JWT. It shows what the gateway would log as warnings about the
client. If there is no token, it shows why, and what to change.

--explain shows each step as well: the metadata that was looked up, how the client
authenticates and why, the token request with … for each secret, and what the
answer has.

The config is the Caddyfile of the current directory unless --config names
another. --upstream picks the client of one upstream, written as in
reverse_proxy, and --key the client of requests with one client key (client_by).
The token itself is shown only with --show-token.

Placeholders are replaced in the environment of the command: {env.*} are its
own variables, and files have to be readable by its user.

The exit status is 0 if all tokens were obtained, 1 if the config can't be
loaded, 2 if a token was not obtained, and 3 if a token was granted for less than
the scopes that are configured.`,
		Flags: func() *flag.FlagSet {
			fs := flag.NewFlagSet("oauth2-token", flag.ExitOnError)
			fs.String("config", "", "Configuration file")
			fs.String("adapter", "", "Name of the config adapter")
			fs.String("upstream", "", "Only for the client of this upstream")
			fs.String("key", "", "Only for the client of this client key")
			fs.Bool("explain", false, "Show each step on the way to the token")
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
			reports, err := requestTokens(config, wantedClients{fl.String("upstream"), fl.String("key")}, fl.Bool("explain"))
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
// clients that are wanted. The reports are in the order of the config.
func requestTokens(config *caddy.Config, wanted wantedClients, explain bool) ([]tokenReport, error) {
	// The gateway may be running with this config. The command must neither
	// take its admin address nor write to its logs.
	config.Admin = &caddy.AdminConfig{Disabled: true}
	config.Logging = &caddy.Logging{Logs: map[string]*caddy.CustomLog{
		caddy.DefaultLoggerName: {BaseLog: caddy.BaseLog{Level: "ERROR"}}, // the reports tell everything
	}}
	places := placesIn(config) // now: Caddy forgets the JSON of what it has loaded
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
	places.sort(transports)
	clients, err := wanted.in(transports)
	if err != nil {
		return nil, err
	}
	reports := make([]tokenReport, len(clients))
	var wg sync.WaitGroup
	for i, c := range clients {
		wg.Go(func() {
			reports[i] = c.report(c.upstreams, explain)
			reports[i].Keys = c.keys
		})
		if explain { // one by one, or chance would say which client of an issuer shows the look-up
			wg.Wait()
		}
	}
	wg.Wait()
	return reports, nil
}

// upstreamClient is a client, the upstreams that get its token, and the client keys of the
// requests that have it.
type upstreamClient struct {
	*client
	upstreams, keys []string
}

// wantedClients says whose tokens are wanted. "" is any of them.
type wantedClients struct{ upstream, key string }

// in returns the clients that are wanted, in the order of the config. Equal clients share one
// token, so it returns only one of them.
func (w wantedClients) in(transports []*Transport) ([]*upstreamClient, error) {
	wanted, err := parseUpstream(w.upstream)
	if err != nil {
		return nil, err
	}
	f := foundClients{
		wantedClients: w,
		bySource:      make(map[sourceKey]*upstreamClient), upstreams: make(map[string]bool), keys: make(map[string]bool),
	}
	for _, t := range transports {
		for _, n := range t.named {
			r := t.routeTo(n.dialAddress)
			if r.unknown() {
				continue // only what it yields has credentials
			}
			f.upstreams[n.String()] = true
			if w.upstream == "" || n.is(wanted) {
				f.add(r, n.String())
			}
		}
		if w.upstream == "" { // upstreams that the config does not name get the tokens of this one
			f.add(t.others, "")
		}
	}
	if len(f.clients) == 0 {
		return nil, f.none()
	}
	return f.clients, nil
}

// foundClients are the clients that are wanted, as far as they were found.
type foundClients struct {
	wantedClients

	clients  []*upstreamClient
	bySource map[sourceKey]*upstreamClient

	upstreams, keys map[string]bool // that there are
	off, keyOff     bool            // what was wanted is off
}

// add adds the clients of a route. upstream is "" if the config does not name it.
func (f *foundClients) add(r route, upstream string) {
	f.off = f.off || r.off
	if r.choice != nil {
		for key, of := range r.choice.named {
			f.keys[key] = true
			f.keyOff = f.keyOff || (key == f.key && of.off)
		}
	}
	for b := range r.blocks() {
		if f.key != "" && !slices.Contains(b.endpoint.keys, f.key) {
			continue
		}
		c := f.bySource[b.key]
		if c == nil {
			c = &upstreamClient{client: b.client}
			f.bySource[b.key] = c
			f.clients = append(f.clients, c)
		}
		if upstream != "" && !slices.Contains(c.upstreams, upstream) {
			c.upstreams = append(c.upstreams, upstream)
		}
		for _, key := range b.endpoint.keys {
			if !slices.Contains(c.keys, key) {
				c.keys = append(c.keys, key)
			}
		}
	}
}

// none says why there is no client that is wanted.
func (f *foundClients) none() error {
	list := func(names map[string]bool) string { return strings.Join(slices.Sorted(maps.Keys(names)), ", ") }
	switch {
	case f.keyOff:
		return fmt.Errorf("--key %s: it is off, and gets no token", f.key)
	case f.key != "" && len(f.keys) == 0:
		return fmt.Errorf("--key %s: the config has no client keys there; leave it out", f.key)
	case f.key != "":
		return fmt.Errorf("--key %s: the config has no such client key; it has %s", f.key, list(f.keys))
	case f.upstream == "" && len(f.keys) > 0:
		return errors.New("all clients are off: there is no token to obtain")
	case f.upstream == "":
		return errors.New("all upstreams are off: there is no token to obtain")
	case f.off:
		return fmt.Errorf("--upstream %s: it is off, and gets no token", f.upstream)
	case len(f.upstreams) == 0:
		return fmt.Errorf("--upstream %s: all upstreams are dynamic; leave it out", f.upstream)
	}
	return fmt.Errorf("--upstream %s: the config has no such upstream; it has %s", f.upstream, list(f.upstreams))
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

// writeReports writes the reports as text for people, or as JSON for programs.
// It returns the exit status.
func writeReports(w io.Writer, reports []tokenReport, showToken, asJSON bool) (status int, err error) {
	failed, narrowed := 0, 0
	for i := range reports {
		if reports[i].Error != nil {
			failed++
		}
		if len(reports[i].NotGranted) > 0 {
			narrowed++
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
	switch {
	case failed > 0:
		return exitNoToken, fmt.Errorf("no token for %d of %d clients", failed, len(reports))
	case narrowed > 0:
		return exitNarrowed, fmt.Errorf("less than the configured scopes for %d of %d clients", narrowed, len(reports))
	}
	return caddy.ExitCodeSuccess, nil
}
