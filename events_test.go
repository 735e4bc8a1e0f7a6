package outboundauth

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

func init() {
	caddy.RegisterModule(hook{})
}

// hook is an event handler, as an operator would subscribe one to be alerted.
// It calls the function that a test has set.
type hook struct{}

var hooked struct {
	mu sync.Mutex
	f  func(caddy.Event) // guarded by mu
}

func (hook) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.test_hook", New: func() caddy.Module { return new(hook) }}
}

func (hook) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }

func (hook) Handle(_ context.Context, event caddy.Event) error {
	hooked.mu.Lock()
	f := hooked.f
	hooked.mu.Unlock()
	if f != nil {
		f(event)
	}
	return nil
}

var _ caddyevents.Handler = hook{}

// onEvent has f called for each event that is subscribed to.
func onEvent(t *testing.T, f func(caddy.Event)) {
	t.Helper()
	set := func(f func(caddy.Event)) {
		hooked.mu.Lock()
		defer hooked.mu.Unlock()
		hooked.f = f
	}
	set(f)
	t.Cleanup(func() { set(nil) })
}

const subscriptions = `events {
	on oauth2_token_obtained test_hook
	on oauth2_token_failed test_hook
	on oauth2_token_rejected test_hook
}`

// eventLog records events.
type eventLog struct {
	mu     sync.Mutex
	events []caddy.Event // guarded by mu
}

func (l *eventLog) add(event caddy.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, event)
}

// wait returns the events, once there are this many.
func (l *eventLog) wait(t *testing.T, n int) []caddy.Event {
	t.Helper()
	var events []caddy.Event
	eventually(t, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		events = slices.Clone(l.events)
		return len(events) >= n
	}, "%d events", n)
	return events
}

func TestEventsReachSubscribers(t *testing.T) {
	var log eventLog
	onEvent(t, log.add)
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := newGateway(t)
	g.global = subscriptions
	start := time.Now()
	g.load(proxySite(up, auth, "name orders"))
	g.get().want(t, http.StatusOK)
	log.wait(t, 1)
	auth.revoke()
	wantAll(t, g.burst(20), http.StatusOK) // one token is rejected, by whomever
	log.wait(t, 3)
	source := sourceOf(t, "orders")
	for i, answer := range []func(http.ResponseWriter, tokenRequest) bool{
		refusing(http.StatusUnauthorized, `{"error":"invalid_client","error_description":"unknown client"}`),
		func(w http.ResponseWriter, r tokenRequest) bool {
			return refusing(http.StatusBadRequest, fmt.Sprintf(`{"error":"invalid_client","error_description":"%s"}`, r.secret))(w, r)
		},
	} {
		auth.script(answer)
		if _, err := source.rested().FetchNow(t.Context()); err == nil {
			t.Fatal("got a token, want the error")
		}
		log.wait(t, 4+i) // each is told beside the end of its fetch, and might come after the next
	}
	// A rejection is told beside the renewal that follows it.
	events := log.wait(t, 5)
	slices.SortStableFunc(events, func(a, b caddy.Event) int { return strings.Compare(a.Name(), b.Name()) })
	var names []string
	for _, event := range events {
		names = append(names, event.Name())
	}
	if want := []string{eventFailed, eventFailed, eventObtained, eventObtained, eventRefused}; !slices.Equal(names, want) {
		t.Fatalf("got the events %v, want %v", names, want)
	}
	for i, want := range []map[string]any{
		{"client": "orders", "error": "invalid_client", "error_description": "unknown client", "status": 401, "failures": 1},
		{"client": "orders", "error": "invalid_client", "status": 400, "failures": 2},
		{"client": "orders"},
		{"client": "orders"},
		{"client": "orders", "upstream": up.addr},
	} {
		data := maps.Clone(events[i].Data)
		for _, instant := range map[string][]string{
			eventObtained: {"renewal", "expires"}, eventFailed: {"retry_at"}, eventRefused: nil,
		}[events[i].Name()] {
			if at, ok := data[instant].(time.Time); !ok || at.Before(start.Add(5*time.Second)) || at.After(start.Add(2*time.Hour)) {
				t.Errorf("event %d: got %s %v, want it soon", i, instant, data[instant])
			}
			delete(data, instant)
		}
		for key, value := range want {
			if data[key] != value {
				t.Errorf("event %d: got %s %v, want %v", i, key, data[key], value)
			}
			delete(data, key)
		}
		if delete(data, "error_description"); len(data) != 0 {
			t.Errorf("event %d: got %v as well, want no more", i, data)
		}
		if origin := events[i].Origin(); origin == nil || origin.CaddyModule().ID != "http.reverse_proxy.transport.oauth2" {
			t.Errorf("event %d: got the origin %v, want the transport", i, origin)
		}
		if text := fmt.Sprintf("%#v", events[i].CloudEvent()) + fmt.Sprint(events[i].Data); strings.Contains(text, "canary") {
			t.Errorf("event %d: got %s, want neither token nor secret", i, text)
		}
	}
}

// Whatever an operator does in a handler, requests go on.
func TestSlowEventHandlersHoldUpNobody(t *testing.T) {
	for _, name := range []string{eventObtained, eventFailed, eventRefused} {
		t.Run(name, func(t *testing.T) {
			entered, released := make(chan struct{}, 100), make(chan struct{})
			release := sync.OnceFunc(func() { close(released) })
			onEvent(t, func(event caddy.Event) {
				if event.Name() == name {
					entered <- struct{}{}
					<-released
				}
			})
			auth := newAuthServer(t)
			up := newUpstream(t, auth)
			if name == eventFailed {
				auth.script(refusing(http.StatusUnauthorized, `{"error":"invalid_client"}`))
			}
			g := newGateway(t)
			g.global = subscriptions
			g.client.Timeout = patience / 2
			defer release() // or the gateway would wait
			g.load(proxySite(up, auth, "name orders"))
			switch name {
			case eventObtained:
				<-entered // of the warm-up
				wantAll(t, g.burst(3), http.StatusOK)
			case eventFailed:
				<-entered
				wantAll(t, g.burst(3), http.StatusServiceUnavailable)
				auth.script(nil)
				if _, err := sourceOf(t, "orders").rested().FetchNow(t.Context()); err != nil {
					t.Fatal(err)
				}
				g.get().want(t, http.StatusOK)
			case eventRefused:
				g.get().want(t, http.StatusOK)
				auth.revoke()
				wantAll(t, g.burst(3), http.StatusOK)
				<-entered
			}
			// Nor does an unload wait.
			loaded := make(chan error, 1)
			go func() { loaded <- g.tryLoad("respond gone") }()
			select {
			case err := <-loaded:
				if err != nil {
					t.Errorf("got %v, want no error", err)
				}
			case <-time.After(patience):
				t.Errorf("got no new config in %v, want one", patience)
				release()
				<-loaded
			}
		})
	}
}

// A handler is somebody else's code.
func TestPanickingEventHandlersEndNothing(t *testing.T) {
	onEvent(t, func(caddy.Event) { panic("canary-panic") })
	auth := newAuthServer(t)
	g := newGateway(t)
	g.global = subscriptions
	g.load(proxySite(newUpstream(t, auth), auth, "name orders"))
	g.get().want(t, http.StatusOK)
	auth.revoke()
	g.get().want(t, http.StatusOK)
	for _, event := range []string{eventObtained, eventRefused} {
		eventually(t, func() bool { return len(g.logged("a handler of an event panicked", event)) > 0 }, "a line in the log on %s", event)
	}
	if strings.Contains(g.logs(), "canary-panic") {
		t.Error("got the panic's value in the log, want its type only")
	}
}

// The fetch of a config that has just ended is no fault of anybody.
func TestEventsOfAConfigThatIsGone(t *testing.T) {
	var log eventLog
	onEvent(t, log.add)
	auth := newAuthServer(t)
	release := auth.hang()
	defer release()
	up := newUpstream(t, auth)
	g := newGateway(t)
	g.global = subscriptions
	g.load(proxySite(up, auth, ""))
	answer := make(chan reply)
	go func() { answer <- g.get() }()
	eventually(t, func() bool { return waiting() == 1 }, "the request to wait")
	g.load("respond gone")
	release()
	(<-answer).want(t, http.StatusOK)
	g.client.CloseIdleConnections()
	g.stop()
	wantNothingLeft(t)
	if got := g.logged(`"level":"error"`); len(got) != 0 {
		t.Errorf("got %q in the log, want no error", got)
	}
}

// accessLog has the fields that an operator would add.
const accessLog = `log_append client {http.oauth2.client}
	log_append token {http.oauth2.token}
	log_append wait_ms {http.oauth2.wait_ms}
	log_append retried {http.oauth2.retried}
	`

// logFields are what the access log has of the token.
type logFields struct {
	Client  any `json:"client"`
	Token   any `json:"token"`
	Wait    any `json:"wait_ms"`
	Retried any `json:"retried"`
	Status  int `json:"status"`
}

// accesses returns the lines of the access log, once there are this many.
func (g *gateway) accesses(n int) []logFields {
	g.t.Helper()
	var lines []string
	eventually(g.t, func() bool { lines = g.logged("http.log.access"); return len(lines) >= n }, "%d lines in the access log", n)
	fields := make([]logFields, len(lines))
	for i, line := range lines {
		if err := json.Unmarshal([]byte(line), &fields[i]); err != nil {
			g.t.Fatal(err)
		}
	}
	return fields
}

func TestAccessLogTellsHowRequestsGotTheirTokens(t *testing.T) {
	auth := newAuthServer(t)
	release := auth.hang()
	defer release()
	up := newUpstream(t, auth)
	g := newGateway(t)
	g.load(accessLog + proxySite(up, auth, "name orders"))
	waits := func(n int, release func(), want logFields) {
		t.Helper()
		answer := make(chan reply)
		go func() { answer <- g.get() }()
		eventually(t, func() bool { return waiting() == 1 }, "the request to wait")
		started := time.Now()
		eventually(t, func() bool { return time.Since(started) > 20*time.Millisecond }, "some waiting")
		release()
		(<-answer).want(t, http.StatusOK)
		got := g.accesses(n)[n-1]
		if wait, ok := got.Wait.(float64); !ok || wait < 20 || wait > 60_000 {
			t.Errorf("request %d: got a wait of %v, want at least 20 milliseconds", n, got.Wait)
		}
		if got.Wait = nil; got != want {
			t.Errorf("request %d: got %v, want %v", n, got, want)
		}
	}
	waits(1, release, logFields{"orders", "fetched", nil, false, http.StatusOK})

	next := func(n int, want logFields) {
		t.Helper()
		g.send(http.MethodPost, "/", strings.NewReader("body"), "X-Client", "{http.oauth2.client}").want(t, want.Status)
		if got := g.accesses(n)[n-1]; got != want {
			t.Errorf("request %d: got %v, want %v", n, got, want)
		}
	}
	next(2, logFields{"orders", "fresh", 0.0, false, http.StatusOK})
	auth.revoke()
	waits(3, auth.hang(), logFields{"orders", "fresh", nil, true, http.StatusOK})
	sourceOf(t, "orders").age(due)
	next(4, logFields{"orders", "stale", 0.0, false, http.StatusOK})
	eventually(t, func() bool { return len(auth.asked()) == 3 && sourceOf(t, "orders").Peek() != nil }, "the renewal")
	auth.script(refusing(http.StatusUnauthorized, `{"error":"invalid_client"}`))
	_, _ = sourceOf(t, "orders").rested().FetchNow(t.Context())
	_ = sourceOf(t, "orders").rested().Forget(t.Context())
	g.get().want(t, http.StatusServiceUnavailable)
	got := g.accesses(5)[4]
	if got.Client != "orders" || got.Token != "none" || got.Retried != false || got.Status != http.StatusServiceUnavailable {
		t.Errorf("got %v, want that there was no token", got)
	}
}

func TestPlaceholdersInTheResponse(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	site := strings.Replace(proxySite(up, auth, "name orders"), "{\n", `{
		header_down X-Token "{http.oauth2.client} {http.oauth2.token} {http.oauth2.wait_ms} {http.oauth2.retried}"
		`, 1)
	g := startGateway(t, site)
	g.get().want(t, http.StatusOK)
	if got := g.get().want(t, http.StatusOK).header.Get("X-Token"); got != "orders fresh 0 false" {
		t.Errorf("got %q, want the placeholders' values", got)
	}
}

// What is logged is the last try of the proxy.
func TestAccessLogAfterARetryAtAnotherUpstream(t *testing.T) {
	for _, test := range []struct {
		name, second string
		want         logFields
	}{
		{"another client", "{\nname second\ntoken_url $AUTH/token\nclient_id b\nclient_secret sb\n}", logFields{"second", "fresh", 0.0, false, http.StatusOK}},
		{"off", "off", logFields{Status: http.StatusOK}},
	} {
		t.Run(test.name, func(t *testing.T) {
			auth := newAuthServer(t)
			a, b := newUpstream(t, auth), newUpstream(t, nil)
			g := startGateway(t, expand(accessLog+`reverse_proxy $A $B {
				lb_policy first
				lb_retries 2
				fail_duration 1m
				transport oauth2 {
					upstream $A {
						name first
						token_url $AUTH/token
						client_id a
						client_secret sa
					}
					upstream $B $SECOND
				}
			}`, "$A", a.addr, "$B", b.addr, "$AUTH", auth.URL, "$SECOND", expand(test.second, "$AUTH", auth.URL)))
			g.get().want(t, http.StatusOK)
			eventually(t, func() bool {
				return !slices.ContainsFunc(sourceStatuses(), func(s *sourceStatus) bool { return s.state != stateFresh })
			}, "the warm-up")
			auth.revoke()
			// The first tries a new token before it breaks, so retried was true.
			var tries atomic.Int32
			a.script(func(w http.ResponseWriter, r *http.Request) bool {
				if tries.Add(1) == 1 {
					return false // refuse it
				}
				return a.breakConnection(w, r)
			})
			g.get().want(t, http.StatusOK)
			if len(b.got()) != 1 || tries.Load() < 2 {
				t.Fatalf("got %d requests at the first upstream and %d at the second, want the move to the second", tries.Load(), len(b.got()))
			}
			if got := g.accesses(2)[1]; got != test.want {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

// Without the transport there is nothing to tell.
func TestPlaceholdersOfAnUpstreamThatIsOff(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, nil)
	g := startGateway(t, accessLog+proxySite(up, auth, "upstream "+up.addr+" off"))
	g.get().want(t, http.StatusOK)
	if got, want := g.accesses(1)[0], (logFields{Status: http.StatusOK}); got != want {
		t.Errorf("got %v, want %v", got, want)
	}
}
