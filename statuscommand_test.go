package outboundauth

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

func TestStatusTable(t *testing.T) {
	now := time.Date(2025, 3, 1, 12, 0, 0, 0, time.UTC)
	in := func(d time.Duration) *time.Time { t := now.Add(d); return &t }
	got := statusTable([]clientStatus{
		{ID: "0a0a0a0a0a0a", Name: "auth.example.com/fresh", State: stateFresh, Expires: in(time.Hour), Renewal: in(44*time.Minute + 400*time.Millisecond)},
		{ID: "0b0b0b0b0b0b", Name: "stale", State: stateStale, Fetching: true, Expires: in(time.Minute), Renewal: in(-time.Minute)},
		{
			ID: "0c0c0c0c0c0c", Name: "failing", State: stateExpired, Expires: in(-time.Second), Renewal: in(5 * time.Second), Failures: 7, RetryAt: in(90 * time.Second),
			LastError: &reportedError{Code: "invalid_client", Status: 401, Description: "not known", Hint: "check client_id"},
		},
		{ID: "0d0d0d0d0d0d", Name: "newest", State: stateAbsent, Failures: 1, RetryAt: in(-time.Second), LastError: &reportedError{Code: "network", Description: "connection refused"}},
		{ID: "0e0e0e0e0e0e", Name: "idle", State: stateExpired, Expires: in(-5 * time.Hour), Renewal: in(-6 * time.Hour)},
	}, 0, selection{}, now)
	want := `ID            CLIENT                  TOKEN            EXPIRES     RENEWAL   FAILURES  RETRY     LAST ERROR
0a0a0a0a0a0a  auth.example.com/fresh  fresh            in 1h0m0s   in 44m0s  0         -         
0b0b0b0b0b0b  stale                   stale, fetching  in 1m0s     due       0         -         
0c0c0c0c0c0c  failing                 expired          1s ago      in 5s     7         in 1m30s  invalid_client (status 401): not known (check client_id)
0d0d0d0d0d0d  newest                  absent           -           -         1         due       network: connection refused
0e0e0e0e0e0e  idle                    expired          5h0m0s ago  due       0         -         
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := statusTable(nil, 0, selection{}, now); got != "no OAuth clients\n" {
		t.Errorf("got %q, want that there are none", got)
	}
}

func TestStatusTableWithKeys(t *testing.T) {
	got := statusTable([]clientStatus{
		{ID: "0a0a0a0a0a0a", Name: "a", State: stateAbsent, description: description{Keys: []string{"acme", "globex\x1b"}}},
		{ID: "0b0b0b0b0b0b", Name: "b", State: stateAbsent},
	}, 0, selection{}, time.Now())
	want := `ID            CLIENT  KEYS          TOKEN   EXPIRES  RENEWAL  FAILURES  RETRY  LAST ERROR
0a0a0a0a0a0a  a       acme globex�  absent  -        -        0         -      
0b0b0b0b0b0b  b       -             absent  -        -        0         -      
`
	if want = strings.ReplaceAll(want, `\ufffd`, "\ufffd"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestStatusTableOfUpstreams(t *testing.T) {
	now := time.Date(2025, 3, 1, 12, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	got := statusTable([]clientStatus{
		{ID: "0a0a0a0a0a0a", Name: "orders", State: stateFresh, Upstreams: []reportedUpstream{
			{"api.example.com:443", verdictToken, true, ago(3 * time.Second)},
			{"unix//run/api.sock", verdictPath, false, ago(time.Hour)},
		}},
		{ID: "0b0b0b0b0b0b", Name: "well", State: stateFresh},
		{ID: "0c0c0c0c0c0c", Name: "search", State: stateFresh, UpstreamsLeftOut: 924, Upstreams: []reportedUpstream{
			{"10.0.0.1:80", verdictToken, false, ago(400 * time.Millisecond)},
		}},
	}, 0, selection{}, now)
	want := `ID            CLIENT  TOKEN  EXPIRES  RENEWAL  FAILURES  RETRY  LAST ERROR
0a0a0a0a0a0a  orders  fresh  -        -        0         -      
0b0b0b0b0b0b  well    fresh  -        -        0         -      
0c0c0c0c0c0c  search  fresh  -        -        0         -      

CLIENT  UPSTREAM             VERDICT          REFUSED
orders  api.example.com:443  token, refusing  3s ago
orders  unix//run/api.sock   path             1h0m0s ago
search  10.0.0.1:80          token            0s ago
search  and 924 more                          
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// Of a gateway with many clients, a limit leaves out most lines.
func TestStatusTableWithALimit(t *testing.T) {
	now := time.Date(2025, 3, 1, 12, 0, 0, 0, time.UTC)
	refusing := func(n int) (upstreams []reportedUpstream) {
		for i := range n {
			upstreams = append(upstreams, reportedUpstream{fmt.Sprint("10.0.0.", i, ":80"), verdictToken, true, now})
		}
		return upstreams
	}
	statuses := []clientStatus{
		{ID: "0a0a0a0a0a0a", Name: "orders", State: stateFresh, Upstreams: refusing(1)},
		{ID: "0b0b0b0b0b0b", Name: "search", State: stateFresh, Upstreams: refusing(100), UpstreamsLeftOut: 900},
		{ID: "0c0c0c0c0c0c", Name: "mail", State: stateFresh, Upstreams: refusing(5)},
	}
	got := statusTable(statuses, 9997, selection{limit: 3}, now)
	want := `ID            CLIENT  TOKEN  EXPIRES  RENEWAL  FAILURES  RETRY  LAST ERROR
0a0a0a0a0a0a  orders  fresh  -        -        0         -      
0b0b0b0b0b0b  search  fresh  -        -        0         -      
0c0c0c0c0c0c  mail    fresh  -        -        0         -      
and 9997 more

CLIENT  UPSTREAM     VERDICT          REFUSED
orders  10.0.0.0:80  token, refusing  0s ago
search  10.0.0.0:80  token, refusing  0s ago
search  10.0.0.1:80  token, refusing  0s ago
and 1003 more
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := statusTable(statuses[:1], 0, selection{limit: 1}, now); strings.Contains(got, "more") {
		t.Errorf("got\n%s\nwant that there is nothing more", got)
	}
	for _, s := range []selection{{name: "x"}, {states: []string{stateFailing}}} {
		if got := statusTable(nil, 0, s, now); got != "no OAuth clients match\n" {
			t.Errorf("got %q, want that none is selected", got)
		}
	}
}

// goodAndFailing are two clients.
const goodAndFailing = `reverse_proxy $A $B {
	lb_policy header X-To {
		fallback first
	}
	transport oauth2 {
		token_url $AUTH/token?key=canary-query
		client_secret canary-secret
		upstream $A {
			name a-good
			client_id good
		}
		upstream $B {
			name b-failing
			client_id failing
		}
	}
}`

// statusGateway has a healthy and a failing client.
func statusGateway(t *testing.T) (*gateway, *authServer) {
	t.Helper()
	auth := newAuthServer(t)
	auth.script(func(w http.ResponseWriter, r tokenRequest) bool {
		return r.client == "failing" && refusing(http.StatusUnauthorized, `{"error":"invalid_client","error_description":"not canary-secret"}`)(w, r)
	})
	g := newOperableGateway(t)
	g.load(expand(goodAndFailing, "$A", newUpstream(t, auth).addr, "$B", newUpstream(t, auth).addr, "$AUTH", auth.URL))
	eventually(t, func() bool {
		return !slices.ContainsFunc(sourceStatuses(), func(s *sourceStatus) bool { return s.state == stateAbsent && s.failures == 0 })
	}, "the warm-up")
	return g, auth
}

func TestStatusCommandShowsARunningCaddy(t *testing.T) {
	g, _ := statusGateway(t)
	var table, asJSON bytes.Buffer
	if err := showStatus(t.Context(), &table, g.admin, selection{}, 0, false); err != nil {
		t.Fatal(err)
	}
	want := regexp.MustCompile(`^ID .*\n` +
		`[0-9a-f]{12}  b-failing  absent  - +- +1 +in \d+s +invalid_client \(status 401\): .*check client_id.*\n` +
		`[0-9a-f]{12}  a-good     fresh   in (59m\d+s|1h0m0s)  +in \d+m\d+s +0 +- +\n$`)
	if !want.MatchString(table.String()) {
		t.Errorf("got\n%s\nwant two clients, that which fails first", table.String())
	}
	if err := showStatus(t.Context(), &asJSON, g.admin, selection{}, 0, true); err != nil {
		t.Fatal(err)
	}
	var statuses []clientStatus
	if err := json.Unmarshal(asJSON.Bytes(), &statuses); err != nil || len(statuses) != 2 || statuses[0].State != stateAbsent || statuses[1].Name != "a-good" {
		t.Errorf("got %s, err %v, want two clients, that which fails first", asJSON.Bytes(), err)
	}
	if got := table.String() + asJSON.String(); strings.Contains(got, "canary") {
		t.Errorf("got\n%s\nwant neither token, secret nor query", got)
	}
}

// runStatusCommand runs `caddy oauth2-status` in a process of its own, which is this test.
func runStatusCommand(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	child := exec.Command(os.Args[0], append([]string{"-test.run=^TestStatusCommandWithFlags$", "--", "oauth2-status"}, args...)...)
	child.Env = append(os.Environ(), statusInChild+"=1")
	var out, errs strings.Builder
	child.Stdout, child.Stderr = &out, &errs
	err = child.Run()
	stdout, _, _ = strings.Cut(out.String(), "PASS\n") // says the test
	return stdout, errs.String(), err
}

const statusInChild = "OUTBOUNDAUTH_TEST_STATUS"

func TestStatusCommandWithFlags(t *testing.T) {
	if os.Getenv(statusInChild) != "" {
		os.Args = append([]string{"caddy"}, flag.Args()...)
		caddycmd.Main()
		return
	}
	g := troubledGateway(t)
	for _, test := range []struct {
		flags string
		names []string
		more  string
	}{
		{"", []string{"d/permanent", "c/failing", "b/refused", "a/good"}, ""},
		{"--limit 3", []string{"d/permanent", "c/failing", "b/refused"}, "and 1 more\n"},
		{"--limit=2 --state=fresh,failing", []string{"d/permanent", "c/failing"}, "and 2 more\n"},
		{"--name *e* --state refused", []string{"b/refused"}, ""},
		{"--name a/good", []string{"a/good"}, ""},
		{"--name nobody", nil, ""},
	} {
		flags := append(strings.Fields(test.flags), "--address", g.admin)
		table, stderr, err := runStatusCommand(t, flags...)
		if err != nil {
			t.Fatalf("%s: got %v and %s", test.flags, err, stderr)
		}
		var names []string
		clients, _, _ := strings.Cut(table, "\n\n") // the upstreams follow
		for _, line := range regexp.MustCompile(`(?m)^[0-9a-f]{12}  (\S+) `).FindAllStringSubmatch(clients, -1) {
			names = append(names, line[1])
		}
		if !slices.Equal(names, test.names) || !strings.Contains(table, test.more) || strings.Contains(table, "more") != (test.more != "") {
			t.Errorf("%s: got\n%s\nwant %q and %q", test.flags, table, test.names, test.more)
		}
		if none := table == "no OAuth clients match\n"; none != (test.names == nil) {
			t.Errorf("%s: got\n%s", test.flags, table)
		}

		asJSON, stderr, err := runStatusCommand(t, append(flags, "--json")...)
		var statuses []clientStatus
		if err != nil || json.Unmarshal([]byte(asJSON), &statuses) != nil || len(statuses) != len(test.names) {
			t.Fatalf("%s: got %s, err %v and %s, want %q", test.flags, asJSON, err, stderr, test.names)
		}
		for i, s := range statuses {
			if s.Name != test.names[i] {
				t.Errorf("%s: got %s as number %d, want %s", test.flags, s.Name, i, test.names[i])
			}
		}
	}
}

func TestStatusCommandAsksNothingWithBadFlags(t *testing.T) {
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	t.Cleanup(server.Close)
	for _, test := range []struct {
		flags []string
		want  string
	}{
		{[]string{"--name", ""}, "--name: is empty"},
		{[]string{"--name", "[a"}, `--name: "[a" is not a pattern`},
		{[]string{"--state", "good"}, `--state: "good" is not known; name one or more of fresh, stale, expired, absent, failing, refused`},
		{[]string{"--state", ""}, `--state: "" is not known`},
		{[]string{"--limit", "0"}, `--limit: "0" is not a positive integer`},
		{[]string{"--limit", ""}, `--limit: "" is not a positive integer`},
		{[]string{"--limit", "\x1b[2J", "--watch", "--json"}, `--limit: "\x1b[2J" is not a positive integer`},
		{[]string{"--offset", "1"}, "unknown flag: --offset"},
		{[]string{"orders"}, "oauth2-status takes no arguments"},
	} {
		stdout, stderr, err := runStatusCommand(t, append(test.flags, "--address", server.Listener.Addr().String())...)
		stderr = strings.NewReplacer(`\\`, `\`, `\"`, `"`).Replace(stderr) // it is a line of Caddy's log
		if err == nil || stdout != "" || !strings.Contains(stderr, test.want) || strings.Contains(stderr, "\x1b") {
			t.Errorf("%q: got %q, %v and %q, want %q", test.flags, stdout, err, stderr, test.want)
		}
	}
	if got := asked.Load(); got != 0 {
		t.Errorf("got %d requests, want none", got)
	}
}

// A limit keeps the table on one screen, whatever the gateway has.
func TestStatusCommandWatchesOneScreen(t *testing.T) {
	const limit, lines = 10, 25
	statuses := slices.Repeat([]clientStatus{{
		ID: "0a0a0a0a0a0a", Name: "a-good", State: stateFresh, LastError: &reportedError{Code: "network", Description: "connection\nrefused"},
		Upstreams: slices.Repeat([]reportedUpstream{{Address: "a:443", Verdict: verdictToken}}, maxReportedUpstreams), UpstreamsLeftOut: 900,
	}}, limit)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if got := r.URL.Query().Get("limit"); got != "10" {
			t.Errorf("got the limit %q, want that of the command", got)
		}
		w.Header().Set("X-Total-Count", "10000")
		_ = answerJSON(w, statuses)
	}))
	t.Cleanup(server.Close)
	ctx, end := context.WithCancel(t.Context())
	b := &endingWriter{end: end}
	if err := showStatus(ctx, b, server.Listener.Addr().String(), selection{limit: limit}, time.Hour, false); err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(b.String(), "\n"); got != lines || !strings.Contains(b.String(), "and 9990 more\n") {
		t.Errorf("got %d lines in\n%s\nwant %d, and how many clients are left out", got, b.String(), lines)
	}
}

// endingWriter ends a context at the first of some writes that has a table.
type endingWriter struct {
	bytes.Buffer
	end context.CancelFunc
}

func (w *endingWriter) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte("a-good")) || bytes.Contains(b, []byte("no OAuth clients")) {
		w.end()
	}
	return w.Buffer.Write(b)
}

func (w *endingWriter) WriteString(s string) (int, error) { return w.Write([]byte(s)) }

func TestStatusCommandWatchesUntilItsContextEnds(t *testing.T) {
	g, _ := statusGateway(t)
	for _, asJSON := range []bool{false, true} {
		ctx, end := context.WithCancel(t.Context())
		w := &endingWriter{end: end}
		if err := showStatus(ctx, w, g.admin, selection{}, time.Millisecond, asJSON); err != nil {
			t.Errorf("got %v, want no error", err)
		}
		if cleared := strings.HasPrefix(w.String(), "\x1b[H\x1b[2J"); cleared == asJSON {
			t.Errorf("got a cleared screen: %v, with JSON %v", cleared, asJSON)
		}
		if got := strings.Count(w.String(), "a-good"); got != 1 {
			t.Errorf("got the client %d times, want once before the end", got)
		}
	}
}

// A Caddy that is watched may be restarted.
func TestStatusCommandGoesOnAfterAnError(t *testing.T) {
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if asked.Add(1) == 2 {
			http.Error(w, "restarting", http.StatusServiceUnavailable)
			return
		}
		_ = answerJSON(w, []clientStatus{})
	}))
	t.Cleanup(server.Close)
	for _, asJSON := range []bool{false, true} {
		asked.Store(0)
		ctx, end := context.WithCancel(t.Context())
		w := &endingWriter{end: func() {
			if asked.Load() == 3 {
				end()
			}
		}}
		err := showStatus(ctx, w, server.Listener.Addr().String(), selection{}, time.Millisecond, asJSON)
		end()
		if asJSON { // a program could not tell
			wantError(t, err, "503")
		} else if got := w.String(); err != nil || strings.Count(got, "no OAuth clients") != 2 || strings.Count(got, "503") != 1 {
			t.Errorf("got %q, err %v, want the error between two tables", got, err)
		}
	}
}

// Interrupting is all that helps if the admin API hangs.
func TestStatusCommandEndsWhileTheAdminAPIHangs(t *testing.T) {
	asked, released := make(chan struct{}, 1), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		asked <- struct{}{}
		<-released
	}))
	t.Cleanup(server.Close)
	t.Cleanup(func() { close(released) }) // before
	ctx, end := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- showStatus(ctx, new(bytes.Buffer), server.Listener.Addr().String(), selection{}, time.Millisecond, false)
	}()
	<-asked
	end()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Errorf("got nothing in %v, want the end", patience)
	}
}

func TestStatusCommandWithoutAnAdminAPI(t *testing.T) {
	html := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>")) }))
	t.Cleanup(html.Close)
	missing := httptest.NewServer(http.NotFoundHandler()) // as a Caddy without this module
	t.Cleanup(missing.Close)
	for name, test := range map[string]struct{ address, want string }{
		"nobody listens": {heldAddress(t), "asking the admin API"},
		"no address":     {"127.0.0.1:1-2", "invalid admin address"},
		"something else": {html.Listener.Addr().String(), "answered with something else"},
		"another Caddy":  {missing.Listener.Addr().String(), "is it a Caddy with transport oauth2?"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, every := range []time.Duration{0, time.Millisecond} {
				var b bytes.Buffer
				wantError(t, showStatus(t.Context(), &b, test.address, selection{}, every, false), test.want)
				if b.Len() != 0 {
					t.Errorf("got %q, want the error only", b.String())
				}
			}
		})
	}
}

// What comes from the config or a server must not control the terminal.
func TestStatusCommandShowsNoControlCharacters(t *testing.T) {
	evil := "evil\x1b[31m\x07\u009b31m\u202e\n\rclient\tx\x7f"
	status := clientStatus{
		ID: evil, Name: evil, State: evil, LastError: &reportedError{Code: evil, Description: evil, Hint: evil},
		Upstreams: []reportedUpstream{{Address: evil, Verdict: evil}},
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _ = answerJSON(w, []clientStatus{status}) }))
	t.Cleanup(server.Close)
	for _, asJSON := range []bool{false, true} {
		var b bytes.Buffer
		if err := showStatus(t.Context(), &b, server.Listener.Addr().String(), selection{}, 0, asJSON); err != nil {
			t.Fatal(err)
		}
		got := b.String()
		if i := strings.IndexFunc(got, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }); i >= 0 {
			t.Errorf("JSON %v: got %q, want printable characters only", asJSON, got)
		}
		if lines := strings.Count(got, "\n"); lines != map[bool]int{false: 5, true: 1}[asJSON] {
			t.Errorf("JSON %v: got %d lines in %q, want one for each client and upstream", asJSON, lines, got)
		}
	}
}

func TestStatusCommandShowsNoControlCharactersInErrors(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "evil\x1b[31m\u202e\nserver", http.StatusInternalServerError)
	}))
	t.Cleanup(server.Close)
	for _, asJSON := range []bool{false, true} {
		err := showStatus(t.Context(), new(bytes.Buffer), server.Listener.Addr().String(), selection{}, 0, asJSON)
		wantError(t, err, "server")
		if err != nil && strings.ContainsFunc(err.Error(), func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("got %q, want printable characters only", err)
		}
	}
}

func TestStatusCommandOverAUnixSocket(t *testing.T) {
	socket := t.TempDir() + "/admin.sock"
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && r.URL.Path == adminClients {
			_ = answerJSON(w, []clientStatus{})
		}
	})}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close() })
	var b bytes.Buffer
	if err := showStatus(t.Context(), &b, "unix/"+socket, selection{}, 0, false); err != nil || b.String() != "no OAuth clients\n" {
		t.Errorf("got %q, err %v, want that there are none", b.String(), err)
	}
}
