package e2e

import (
	"fmt"
	"runtime"
	"strings"
	"time"
)

// chaosResults are all that TestChaos measures.
type chaosResults struct {
	cells  []*cellResult
	events []*eventResult
}

const chaosIntro = `# What the gateway does when things fail

Measured, and written here, by the chaos suite; run it in ` + "`e2e/`" + ` with

` + "```sh" + `
CHAOS_RESULTS=RESULTS.md go test -count=1 -run '^TestChaos$' .
` + "```" + `

Real processes: the gateway, the authorization server oidc-provider, and between them a fault injector; upstreams
verify every token. Each row is a gateway of its own under %d requests a second, sent when they are due, whatever
becomes of those before. %d of them ran at once on %d cores: waits of some 10 ms are the machine's.
` + "`token_timeout`" + ` is %v. The gateway gives up on an upstream for 30 s at its first failure
(` + "`fail_duration`" + `, ` + "`unhealthy_status 5xx`" + `), and never did.

- *lost*: not answered with 200. Every lost request was answered with 503 or 504 and Retry-After, unless the table
  says otherwise. "none" is a connection that was refused or broke.
- *longest wait*: of all requests, the lost ones included.
- *token requests*: those that reached the server, or connections that broke before; *during*: while the fault
  lasted. A refused connection reaches nobody, and isn't counted.
- *failed fetches*: how often the gateway gave up and backed off. The first includes two quick retries. While requests
  are refused, it waits for as long as the fault has lasted, 2 s at most, or as long as Retry-After asks. A server
  that is silent is asked again beside the first request.
- *recovery*: from the end of the fault until a request succeeded again.
- *resent*: the client's request met a connection that a reload had closed; the upstream never saw it.
`

var momentIntros = map[string]string{
	"cold":  "There is no token yet: the fault is there when the gateway starts. It lasts 2.5 s.",
	"fresh": "The fault begins 0.2 s after a token of 6 s was obtained, and ends before the renewal is due after 3 s.",
	"stale": "The fault is there when a token of 14 s is due for renewal after 7 s, and ends 3 s later. The token " +
		"is used for another 2.6 s: the nearer its end, the sooner the renewal is tried again.",
	"expired": "The fault begins before the renewal of a token of 6 s is due after 3 s, and ends after 7 s.",
}

func (r chaosResults) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, chaosIntro, chaosRate, chaosWorkers, runtime.NumCPU(), tokenTimeout)
	for _, m := range moments {
		fmt.Fprintf(&b, "\n## %s%s\n\n%s\n\n", strings.ToUpper(m.name[:1]), m.name[1:], momentIntros[m.name])
		b.WriteString("| fault | requests | lost | answers | longest wait | token requests | during | failed fetches | recovery |\n")
		b.WriteString("|---|--:|--:|---|--:|--:|--:|--:|--:|\n")
		for _, f := range faults {
			for _, c := range r.cells {
				if c.moment == m && c.fault == f {
					c.writeRow(&b)
				}
			}
		}
	}
	b.WriteString("\n## Restarts, reloads and clocks\n\n")
	b.WriteString("| event | requests | lost | answers | resent | longest wait | token requests | |\n")
	b.WriteString("|---|--:|--:|---|--:|--:|--:|---|\n")
	for _, e := range r.events {
		fmt.Fprintf(&b, "| %s | %d | %d | %s | %d | %s | %d | %s |\n", e.name, len(e.all), len(e.all.lost()),
			e.all.statuses(), e.all.resent(), milliseconds(e.all.longest()), e.attempts, e.note)
	}
	return b.String()
}

func (r *cellResult) writeRow(b *strings.Builder) {
	recovery := "–"
	if len(r.all.lost()) > 0 {
		recovery = milliseconds(r.recovery)
	}
	fmt.Fprintf(b, "| %s | %d | %d | %s | %s | %d | %d | %d | %s |\n", r.fault.name, len(r.all), len(r.all.lost()),
		r.all.statuses(), milliseconds(r.all.longest()), r.attempts, r.during, len(r.failed), recovery)
}

func milliseconds(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) }
