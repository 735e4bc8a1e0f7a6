// The command caddy oauth2-status: it shows the admin API's answer as a table.

package outboundauth

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
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
		Usage: "[--address <admin address>] [--config <path> [--adapter <name>]] [--watch] [--json]",
		Short: "Shows the state of the OAuth clients of a running Caddy",
		Long: `
Asks the admin API of a running Caddy for its OAuth clients, and shows for each
the state of its token, how long it lives, and what went wrong last. A second
table shows the upstreams that have refused a token.

The admin API is expected at its default address, unless --address names
another, or --config a config that does. --watch repeats it every second, until
interrupted; --json writes what the admin API answers.`,
		Flags: func() *flag.FlagSet {
			fs := flag.NewFlagSet("oauth2-status", flag.ExitOnError)
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
			if err := showStatus(ctx, os.Stdout, address, every, fl.Bool("json")); err != nil {
				return caddy.ExitCodeFailedStartup, err
			}
			return caddy.ExitCodeSuccess, nil
		},
	})
}

// showStatus asks the admin API at address for the OAuth clients, and writes
// them. If every is 0, it does so once. Otherwise it repeats this at the
// interval every, until ctx ends.
func showStatus(ctx context.Context, w io.Writer, address string, every time.Duration, asJSON bool) error {
	for first := true; ; first = false {
		text, err := statusText(ctx, address, asJSON)
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return nil // the user has interrupted the command
		case first, asJSON:
			return err
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
func statusText(ctx context.Context, address string, asJSON bool) (string, error) {
	body, err := askAdmin(ctx, address, adminClients)
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
	return statusTable(statuses, time.Now()), nil
}

// askAdmin asks the admin API at address. Nobody can interrupt Caddy's client.
// When ctx ends, askAdmin does not wait for it: the command ends then, too.
func askAdmin(ctx context.Context, address, path string) ([]byte, error) {
	type answer struct {
		body []byte
		err  error
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
		answered <- answer{body, err}
	}()
	select {
	case a := <-answered:
		return a.body, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// statusTable returns one line for each client.
func statusTable(statuses []clientStatus, now time.Time) string {
	if len(statuses) == 0 {
		return "no OAuth clients\n"
	}
	var b strings.Builder
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "ID\tCLIENT\tTOKEN\tEXPIRES\tRENEWAL\tFAILURES\tRETRY\tLAST ERROR")
	for _, s := range statuses {
		lastError := ""
		if s.LastError != nil {
			lastError = s.LastError.text()
		}
		state := s.State
		if s.Fetching {
			state += ", fetching"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", oneLine(s.ID), oneLine(s.Name), oneLine(state),
			until(s.Expires, now, "ago"), until(s.Renewal, now, "due"), strconv.Itoa(s.Failures), until(s.RetryAt, now, "due"), oneLine(lastError))
	}
	_ = table.Flush() // can't fail: it writes to memory
	return b.String() + upstreamTable(statuses, now)
}

// upstreamTable returns one line for each upstream that has refused a token of a client,
// below an empty line. Without such upstreams, it returns nothing.
func upstreamTable(statuses []clientStatus, now time.Time) string {
	var b strings.Builder
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\nCLIENT\tUPSTREAM\tVERDICT\tREFUSED")
	some := false
	for _, s := range statuses {
		for _, u := range s.Upstreams {
			some = true
			verdict := u.Verdict
			if u.Refusing {
				verdict += ", refusing"
			}
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", oneLine(s.Name), oneLine(u.Address), oneLine(verdict), until(&u.LastRefused, now, "ago"))
		}
		if s.UpstreamsLeftOut > 0 {
			fmt.Fprintf(table, "%s\tand %d more\t\t\n", oneLine(s.Name), s.UpstreamsLeftOut)
		}
	}
	if !some {
		return ""
	}
	_ = table.Flush() // can't fail: it writes to memory
	return b.String()
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
