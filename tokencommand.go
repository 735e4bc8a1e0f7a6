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
		Usage: "[--config <path>] [--adapter <name>] [--upstream <address>] [--explain] [--show-token] [--json]",
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
reverse_proxy. The token itself is shown only with --show-token.

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
			reports, err := requestTokens(config, fl.String("upstream"), fl.Bool("explain"))
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
// upstream's client. The reports are in the order of the config.
func requestTokens(config *caddy.Config, upstream string, explain bool) ([]tokenReport, error) {
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
	clients, err := selectClients(transports, upstream)
	if err != nil {
		return nil, err
	}
	reports := make([]tokenReport, len(clients))
	var wg sync.WaitGroup
	for i, c := range clients {
		wg.Go(func() { reports[i] = c.report(c.upstreams, explain) })
		if explain { // one by one, or chance would say which client of an issuer shows the look-up
			wg.Wait()
		}
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
