package outboundauth

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode"
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
	}, now)
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
	if got := statusTable(nil, now); got != "no OAuth clients\n" {
		t.Errorf("got %q, want that there are none", got)
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
	}, now)
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
		return !slices.ContainsFunc(sourceStatuses(), func(s sourceStatus) bool { return s.state == stateAbsent && s.failures == 0 })
	}, "the warm-up")
	return g, auth
}

func TestStatusCommandShowsARunningCaddy(t *testing.T) {
	g, _ := statusGateway(t)
	var table, asJSON bytes.Buffer
	if err := showStatus(t.Context(), &table, g.admin, 0, false); err != nil {
		t.Fatal(err)
	}
	want := regexp.MustCompile(`^ID .*\n` +
		`[0-9a-f]{12}  b-failing  absent  - +- +1 +in \d+s +invalid_client \(status 401\): .*check client_id.*\n` +
		`[0-9a-f]{12}  a-good     fresh   in (59m\d+s|1h0m0s)  +in \d+m\d+s +0 +- +\n$`)
	if !want.MatchString(table.String()) {
		t.Errorf("got\n%s\nwant two clients, that which fails first", table.String())
	}
	if err := showStatus(t.Context(), &asJSON, g.admin, 0, true); err != nil {
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
		if err := showStatus(ctx, w, g.admin, time.Millisecond, asJSON); err != nil {
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
		err := showStatus(ctx, w, server.Listener.Addr().String(), time.Millisecond, asJSON)
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
		ended <- showStatus(ctx, new(bytes.Buffer), server.Listener.Addr().String(), time.Millisecond, false)
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
				wantError(t, showStatus(t.Context(), &b, test.address, every, false), test.want)
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
		if err := showStatus(t.Context(), &b, server.Listener.Addr().String(), 0, asJSON); err != nil {
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
	if err := showStatus(t.Context(), &b, "unix/"+socket, 0, false); err != nil || b.String() != "no OAuth clients\n" {
		t.Errorf("got %q, err %v, want that there are none", b.String(), err)
	}
}
