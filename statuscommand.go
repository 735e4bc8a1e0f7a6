// The command caddy oauth2-status: it shows the admin API's answer as a table.

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
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddyserver/caddy/v2"
)

// watchInterval is how long --watch waits before it asks the admin API again.
const watchInterval = time.Second

// clearScreen makes a terminal clear its screen, and go on at the top.
const clearScreen = "\x1b[H\x1b[2J"

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "oauth2-status",
		Usage: "[--name <pattern>] [--key <client key>] [--state <states>] [--limit <number>] [--address <admin address>] [--config <path> [--adapter <name>]] [--watch] [--json]",
		Short: "Shows the state of the OAuth clients of a running Caddy",
		Long: `
Asks the admin API of a running Caddy for its OAuth clients, and shows for each
the state of its token, how long it lives, and what went wrong last. A second
table shows the upstreams that have refused a token.

Those clients come first that need somebody to look: those that fail to get a
token for a reason that does not pass by itself, then others that fail, then
those whose token an upstream refuses. Each group is sorted by name.

--name shows the clients of one name, or of a pattern: * stands for any text,
? for one character, [a-z] for one of several. A slash is a character like all
others. Write a backslash before one of these that is a part of the name.
--key shows the client of the requests that have this client key (client_by).
--state shows the clients in one of some states, with commas between them:
fresh, stale, expired or absent is the state of the token; failing means that
the last attempt to get a token failed, refused that an upstream refuses the
token now. --limit shows so many clients at most, and so many upstreams; below
each table, it says how many more there are.

The admin API is expected at its default address, unless --address names
another, or --config a config that does. --watch repeats it every second, until
interrupted; --json writes what the admin API answers.`,
		Flags: func() *flag.FlagSet {
			fs := flag.NewFlagSet("oauth2-status", flag.ExitOnError)
			fs.String(paramName, "", "Only clients of this name or `pattern`")
			fs.String(paramKey, "", "Only the client of this client `key`")
			fs.String(paramState, "", "Only clients in one of these `states`: "+strings.Join(selectableStates, ","))
			fs.String(paramLimit, "", "Only this `number` of clients")
			fs.String("address", "", "Address of the admin API")
			fs.String("config", "", "Configuration file that names the address")
			fs.String("adapter", "", "Name of the config adapter")
			fs.Bool("watch", false, "Repeat until interrupted")
			fs.Bool("json", false, "Write JSON")
			return fs
		}(),
		Func: func(fl caddycmd.Flags) (int, error) {
			if fl.NArg() > 0 {
				return caddy.ExitCodeFailedStartup, errors.New("oauth2-status takes no arguments; name the admin API with --address")
			}
			selected, err := selectedByFlags(fl)
			if err != nil {
				return caddy.ExitCodeFailedStartup, err
			}
			address, err := caddycmd.DetermineAdminAPIAddress(fl.String("address"), nil, fl.String("config"), fl.String("adapter"))
			if err != nil {
				return caddy.ExitCodeFailedStartup, err
			}
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
			defer stop()
			var every time.Duration
			if fl.Bool("watch") {
				every = watchInterval
			}
			if err := showStatus(ctx, os.Stdout, address, selected, every, fl.Bool("json")); err != nil {
				return caddy.ExitCodeFailedStartup, err
			}
			return caddy.ExitCodeSuccess, nil
		},
	})
}

// selectedByFlags returns which clients to show. The admin API would find the same
// mistakes, but nobody would have to wait for it.
func selectedByFlags(fl caddycmd.Flags) (selection, error) {
	params := make(url.Values)
	for _, param := range selectionParams {
		if fl.Changed(param) { // a flag that is given, but empty, is a mistake
			params.Set(param, fl.String(param))
		}
	}
	selected, err := parseSelection(params)
	if err != nil {
		err = fmt.Errorf("--%w", err) // it begins with the name of the parameter
	}
	return selected, err
}

// showStatus asks the admin API at address for the OAuth clients that are selected,
// and writes them. If every is 0, it does so once. Otherwise it repeats this at the
// interval every, until ctx ends.
func showStatus(ctx context.Context, w io.Writer, address string, selected selection, every time.Duration, asJSON bool) error {
	for first := true; ; first = false {
		text, err := statusText(ctx, address, selected, asJSON)
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return nil // the user has interrupted the command
		case first, asJSON:
			return errors.New(oneLine(err.Error())) // it may quote what has answered
		default: // Caddy may be restarting
			text = oneLine(err.Error()) + "\n"
		}
		if every > 0 && !asJSON {
			text = clearScreen + text
		}
		if _, err := io.WriteString(w, text); err != nil || every == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(every):
		}
	}
}

// statusText asks the admin API once, and returns the text to show.
func statusText(ctx context.Context, address string, selected selection, asJSON bool) (string, error) {
	header, body, err := askAdmin(ctx, address, adminClients+selected.query())
	if err != nil {
		return "", err
	}
	var statuses []clientStatus
	if err := json.Unmarshal(body, &statuses); err != nil {
		return "", fmt.Errorf("the admin API at %s answered with something else: %w", address, err)
	}
	if asJSON {
		return string(bytes.Map(printable, body)), nil
	}
	left := 0
	if total, err := strconv.Atoi(header.Get(totalHeader)); err == nil {
		left = total - len(statuses)
	}
	return statusTable(statuses, left, selected, time.Now()), nil
}

// askAdmin asks the admin API at address. Nobody can interrupt Caddy's client.
// When ctx ends, askAdmin does not wait for it: the command ends then, too.
func askAdmin(ctx context.Context, address, path string) (http.Header, []byte, error) {
	type answer struct {
		header http.Header
		body   []byte
		err    error
	}
	answered := make(chan answer, 1)
	go func() {
		res, err := caddycmd.AdminAPIRequest(address, http.MethodGet, path, http.Header{"Connection": {"close"}}, nil)
		if err != nil {
			if strings.Contains(err.Error(), "HTTP 404") {
				err = fmt.Errorf("%w (is it a Caddy with transport oauth2?)", err)
			}
			answered <- answer{err: fmt.Errorf("asking the admin API: %w", err)}
			return
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		answered <- answer{res.Header, body, err}
	}()
	select {
	case a := <-answered:
		return a.header, a.body, a.err
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
}

// statusTable returns one line for each client, and says how many more there are: left.
func statusTable(statuses []clientStatus, left int, selected selection, now time.Time) string {
	switch {
	case len(statuses) > 0:
	case selected.name != "" || selected.key != "" || len(selected.states) > 0:
		return "no OAuth clients match\n"
	default:
		return "no OAuth clients\n"
	}
	var b strings.Builder
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	byKey := slices.ContainsFunc(statuses, func(s clientStatus) bool { return len(s.Keys) > 0 })
	fmt.Fprint(table, "ID\tCLIENT\t")
	if byKey {
		fmt.Fprint(table, "KEYS\t")
	}
	fmt.Fprintln(table, "TOKEN\tEXPIRES\tRENEWAL\tFAILURES\tRETRY\tLAST ERROR")
	for _, s := range statuses {
		lastError := ""
		if s.LastError != nil {
			lastError = s.LastError.text()
		}
		state := s.State
		if s.Shared != "" {
			state += ", " + s.Shared
		}
		if s.Fetching {
			state += ", fetching"
		}
		fmt.Fprintf(table, "%s\t%s\t", oneLine(s.ID), oneLine(s.Name))
		if byKey {
			fmt.Fprintf(table, "%s\t", cmp.Or(oneLine(strings.Join(s.Keys, " ")), "-"))
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\n", oneLine(state),
			until(s.Expires, now, "ago"), until(s.Renewal, now, "due"), strconv.Itoa(s.Failures), until(s.RetryAt, now, "due"), oneLine(lastError))
	}
	_ = table.Flush() // can't fail: it writes to memory
	return b.String() + more(left) + upstreamTable(statuses, selected.limit, now)
}

// more says how many lines a table does not show.
func more(left int) string {
	if left <= 0 {
		return ""
	}
	return fmt.Sprintf("and %d more\n", left)
}

// upstreamTable returns one line for each upstream that has refused a token of a client,
// below an empty line. Without such upstreams, it returns nothing. It has limit lines of
// upstreams at most, if limit is not 0: a screen has room for so many.
func upstreamTable(statuses []clientStatus, limit int, now time.Time) string {
	var b strings.Builder
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\nCLIENT\tUPSTREAM\tVERDICT\tREFUSED")
	lines, left := 0, 0
	for _, s := range statuses {
		shown := s.Upstreams
		if limit > 0 {
			shown = shown[:min(len(shown), limit-lines)]
		}
		for _, u := range shown {
			verdict := u.Verdict
			if u.Refusing {
				verdict += ", refusing"
			}
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", oneLine(s.Name), oneLine(u.Address), oneLine(verdict), until(&u.LastRefused, now, "ago"))
		}
		lines += len(shown)
		switch {
		case limit > 0:
			left += len(s.Upstreams) - len(shown) + s.UpstreamsLeftOut
		case s.UpstreamsLeftOut > 0:
			fmt.Fprintf(table, "%s\tand %d more\t\t\n", oneLine(s.Name), s.UpstreamsLeftOut)
		}
	}
	if lines == 0 {
		return ""
	}
	_ = table.Flush() // can't fail: it writes to memory
	return b.String() + more(left)
}

// oneLine returns s as one line, for a cell of the table.
func oneLine(s string) string {
	return strings.Map(printable, strings.Join(strings.Fields(s), " "))
}

// until tells how far away t is. If t has passed, until returns the word
// passed. If that word is "ago", until also tells how long ago t was.
func until(t *time.Time, now time.Time, passed string) string {
	if t == nil {
		return "-"
	}
	distance := t.Sub(now).Round(time.Second)
	switch {
	case distance > 0:
		return "in " + distance.String()
	case passed == "ago":
		return (-distance).String() + " ago"
	}
	return passed
}
