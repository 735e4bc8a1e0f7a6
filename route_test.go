package outboundauth

import (
	"bufio"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// keyedSite is a site whose clients are chosen by the header X-Key.
const keyedSite = `reverse_proxy $UP {
	header_down X-Seen-Key "{http.oauth2.key}"
	transport oauth2 {
		token_url $AUTH/token
		dial_timeout 1m
		client_by {http.request.header.X-Key}
		client acme {
			client_id of-acme
			client_secret canary-secret-a
			tenant acme
		}
		client globex Initech {
			client_id of-globex
			client_secret canary-secret-g
			header X-Plan gold
		}
		client guests off
		$DEFAULT
	}
}`

func startKeyedGateway(t *testing.T, more string) (*gateway, *authServer, *upstream) {
	t.Helper()
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	return startGateway(t, expand(keyedSite, "$UP", up.addr, "$AUTH", auth.URL, "$DEFAULT", more)), auth, up
}

// A request has the credentials of its key, and nothing of another one's.
func TestClientByKey(t *testing.T) {
	g, auth, up := startKeyedGateway(t, "client default {\nclient_id of-nobody\nclient_secret canary-secret-d\n}")
	for _, test := range []struct {
		key                  string
		client, tenant, plan string
	}{
		{"acme", "of-acme", "acme", ""},
		{"globex", "of-globex", "", "gold"},
		{"Initech", "of-globex", "", "gold"},
		{"", "of-nobody", "", ""},
	} {
		// The last two are what others of the transport set: callers can't.
		r := g.get("X-Key", test.key, "X-Other", "kept", "X-Tenant-Id", "forged", "X_plan", "forged").want(t, http.StatusOK)
		got := up.last(t)
		if client := got.bearerOf(auth); client != test.client {
			t.Errorf("key %q: got the token of %q, want that of %q", test.key, client, test.client)
		}
		got.wantHeader(t, "X-Tenant-Id", test.tenant)
		got.wantHeader(t, "X-Plan", test.plan)
		got.wantHeader(t, "X-Other", "kept")
		if _, forged := got.header["X_plan"]; forged || r.header.Get("X-Seen-Key") != test.key {
			t.Errorf("key %q: got X_plan %t, and the key %q in the placeholder", test.key, forged, r.header.Get("X-Seen-Key"))
		}
	}
	auth.wantAsked(t, 3) // Initech is globex
}

// Requests of a client that is off go without a token, and without what others have.
func TestClientThatIsOff(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, nil)
	g := startGateway(t, expand(keyedSite, "$UP", up.addr, "$AUTH", auth.URL, "$DEFAULT", "client default off"))
	for _, key := range []string{"guests", ""} {
		g.send(http.MethodPost, "/", strings.NewReader("a body"), "X-Key", key, "Authorization", "Basic forged",
			"X-Tenant-Id", "forged", "x-plan", "forged", "Dpop", "forged", "X-Other", "kept").want(t, http.StatusOK)
		got := up.last(t)
		for _, field := range []string{"Authorization", "X-Tenant-Id", "X-Plan", "Dpop"} {
			got.wantHeader(t, field, "")
		}
		got.wantHeader(t, "X-Other", "kept")
		if got.body != "a body" {
			t.Errorf("got the body %q, want that of the request", got.body)
		}
	}
}

// It shares its connections with requests that have a token. So it can't become a tunnel, nor
// have a target that means another server.
func TestClientThatIsOffOpensNothing(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, nil)
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		protocol := r.Header.Get("X-Switch-To")
		if protocol == "" {
			protocol = r.Header.Get("Upgrade")
		}
		if protocol == "" {
			return false
		}
		conn, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return false
		}
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + protocol + "\r\n\r\n")
		_ = rw.Flush()
		_ = conn.Close()
		return true
	})
	g := startGateway(t, expand(keyedSite, "$UP", up.addr, "$AUTH", auth.URL, "$DEFAULT", "client default off"))
	ask := func(request string) int {
		t.Helper()
		conn := g.raw()
		fmt.Fprint(conn, strings.ReplaceAll(request, "\n", "\r\n")+"\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode
	}
	const upgrade = "\nConnection: Upgrade\nUpgrade: "
	for _, key := range []string{"", "\nX-Key: guests"} {
		for request, want := range map[string]int{
			"TRACE / HTTP/1.1\nHost: g":                                           http.StatusMethodNotAllowed,
			"track / HTTP/1.1\nHost: g":                                           http.StatusMethodNotAllowed,
			"GET http:http://evil.example/ HTTP/1.1\nHost: g":                     http.StatusBadRequest,
			"GET / HTTP/1.1\nHost: g" + upgrade + "websocket":                     http.StatusSwitchingProtocols,
			"GET / HTTP/1.1\nHost: g" + upgrade + "h2c\nHTTP2-Settings: AAMAAABk": http.StatusOK, // not upgraded
			"GET / HTTP/1.1\nHost: g" + upgrade + "h2c\nX-Switch-To: h2c":         http.StatusBadGateway,
			"GET / HTTP/1.1\nHost: g\nX-Switch-To: h2c":                           http.StatusBadGateway,
		} {
			if got := ask(request + key); got != want {
				t.Errorf("%q: got %d, want %d", request+key, got, want)
			}
		}
	}
}

// Whoever has no client is refused, and nobody is asked for a token, nor is the upstream.
func TestRequestsWithoutAClient(t *testing.T) {
	before := keysRefused(t)
	g, auth, up := startKeyedGateway(t, "")
	eventually(t, func() bool { return len(auth.asked()) == 2 }, "the tokens of the two clients")
	keys := []string{
		"", "nobody", "ACME", "acme ", " acme/", "acme,acme", "../acme", "..", "%61cme", "acmé", "{env.HOME}", "acme\x01", "*", "default", "off",
		strings.Repeat("a", 65), "{http.request.header.X-Key}",
	}
	for _, key := range keys {
		r := g.get("X-Key", key)
		if strings.TrimSpace(key) == "acme" { // white space around a value is not a part of it
			r.want(t, http.StatusOK)
			continue
		}
		if r.err != nil { // net/http sends no such header
			continue
		}
		r.want(t, http.StatusForbidden)
	}
	g.get("X-Key", "acme", "X-Key", "acme").want(t, http.StatusForbidden)
	g.get("X-Key", "acme", "X-Key", "globex").want(t, http.StatusForbidden)
	auth.wantAsked(t, 2)
	if got := len(up.got()); got != 1 {
		t.Errorf("got %d requests at the upstream, want that of acme", got)
	}
	after := keysRefused(t)
	if after[keyMissing] != before[keyMissing]+1 || after[keyUnknown] < before[keyUnknown]+10 {
		t.Errorf("got %v refusals before and %v after", before, after)
	}
	if warned := g.logged(`"level":"warn"`, "client_by: every client can send this"); len(warned) != 1 {
		t.Errorf("got %q, want one warning about the header", warned)
	}
}

// keysRefused returns how many requests were refused because of their keys, by the reason.
func keysRefused(t *testing.T) map[string]float64 {
	t.Helper()
	counts := make(map[string]float64)
	for _, reason := range keyReasons {
		counts[reason] = valueOf(t, refusedKeysTotal.WithLabelValues(reason))
	}
	return counts
}

// valueOf returns the value of a counter.
func valueOf(t *testing.T, counter prometheus.Counter) float64 {
	t.Helper()
	var got dto.Metric
	if err := counter.Write(&got); err != nil {
		t.Fatal(err)
	}
	return got.GetCounter().GetValue()
}

// A refusal goes through handle_errors, and counts against no upstream.
func TestRefusedKeyIsAnErrorOfTheHandler(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	site := strings.Replace(keyedSite, "transport", "max_fails 1\nfail_duration 1m\nlb_retries 3\ntransport", 1) + `
	handle_errors {
		respond "{http.error.status_code} {http.oauth2.error}: {http.oauth2.error_description}"
	}`
	g := startGateway(t, expand(site, "$UP", up.addr, "$AUTH", auth.URL, "$DEFAULT", ""))
	for key, want := range map[string]string{"": errNoKey.text, "nobody": errUnknownKey.text, "{nobody}": errUnknownKey.text} {
		if got := g.get("X-Key", key).want(t, http.StatusForbidden).body; got != "403 client_key: "+want {
			t.Errorf("key %q: got %q, want what is wrong", key, got)
		}
	}
	g.get("X-Key", "acme").want(t, http.StatusOK)
}

// The proxy's next try has the client of the same key, and the key of one request is not that of
// the next.
func TestClientKeyAfterARetry(t *testing.T) {
	auth := newAuthServer(t)
	up, last := newUpstream(t, auth), newUpstream(t, auth)
	site := strings.Replace(keyedSite, "reverse_proxy $UP {", "reverse_proxy "+heldAddress(t)+" $UP {\nlb_policy first\nlb_retries 2\nfail_duration 1m\n", 1)
	site = strings.Replace(site, "transport oauth2", `@accepted status 200
	handle_response @accepted {
		reverse_proxy `+last.addr+` {
			transport oauth2 {
				token_url $AUTH/token
				dial_timeout 1m
				client_by {http.request.header.X-Second}
				client plain {
					client_id of-plain
					client_secret s
				}
				client default off
			}
		}
	}
	transport oauth2`, 1)
	g := startGateway(t, "log\nlog_append key {http.oauth2.key}\n"+expand(site, "$UP", up.addr, "$AUTH", auth.URL, "$DEFAULT", ""))
	g.get("X-Key", "acme", "X-Second", "plain").want(t, http.StatusOK)
	if first, second := up.last(t).bearerOf(auth), last.last(t).bearerOf(auth); first != "of-acme" || second != "of-plain" {
		t.Errorf("got the tokens of %q and %q, want those of of-acme and of-plain", first, second)
	}
	g.get("X-Key", "acme", "X-Second", "nobody").want(t, http.StatusForbidden)
	eventually(t, func() bool { return len(g.logged(`"status":403`, "handled request")) == 1 }, "a line of the access log")
	if line := g.logged(`"status":403`, "handled request")[0]; strings.Contains(line, `"key":"acme"`) {
		t.Errorf("got %s, want no key of a request that was refused", line)
	}
}

// A key can come from anything, for example from a map of the host.
func TestClientKeyOfAMap(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	site := `map {http.request.host} {tenant} {
		a.example.com acme
		b.example.com globex
	}
	` + strings.Replace(keyedSite, "{http.request.header.X-Key}", "{tenant}", 1)
	g := startGateway(t, expand(site, "$UP", up.addr, "$AUTH", auth.URL, "$DEFAULT", ""))
	for host, client := range map[string]string{"a.example.com": "of-acme", "b.example.com": "of-globex"} {
		g.get("Host", host).want(t, http.StatusOK)
		if got := up.last(t).bearerOf(auth); got != client {
			t.Errorf("%s: got the token of %q, want that of %q", host, got, client)
		}
	}
	g.get("Host", "c.example.com").want(t, http.StatusForbidden)
	if warned := g.logged("client_by"); len(warned) != 0 {
		t.Errorf("got %q, want no warning", warned)
	}
}

// The upstream's own rules come first, and its settings are inherited.
func TestClientsBesideUpstreams(t *testing.T) {
	auth, other := newAuthServer(t), newAuthServer(t)
	first, second, third := newUpstream(t, auth), newUpstream(t, nil), newUpstream(t, other)
	g := startGateway(t, expand(`reverse_proxy {http.request.header.X-Up} {
		transport oauth2 {
			token_url $AUTH/token
			client_by {http.request.header.X-Key}
			upstream $A {
				audience of-a
				tenant of-a
			}
			upstream $B off
			upstream $C {
				token_url $OTHER/token
			}
			client acme {
				client_id of-acme
				client_secret canary-secret-a
				tenant acme
			}
			client globex {
				client_id of-globex
				client_secret canary-secret-g
				audience of-globex
			}
		}
	}`, "$AUTH", auth.URL, "$OTHER", other.URL, "$A", first.addr, "$B", second.addr, "$C", third.addr))
	for _, test := range []struct {
		up                         *upstream
		server                     *authServer
		key                        string
		client, audience, tenantID string
	}{
		{first, auth, "acme", "of-acme", "of-a", "acme"},
		{first, auth, "globex", "of-globex", "of-globex", "of-a"},
		{third, other, "acme", "of-acme", "", "acme"},
		{third, other, "globex", "of-globex", "of-globex", ""},
	} {
		g.get("X-Up", test.up.addr, "X-Key", test.key).want(t, http.StatusOK)
		got := test.up.last(t)
		if client := got.bearerOf(test.server); client != test.client {
			t.Errorf("%s: got the token of %q, want that of %q", test.key, client, test.client)
		}
		got.wantHeader(t, "X-Tenant-Id", test.tenantID)
		asked := func(r tokenRequest) bool { return r.client == test.client && r.form.Get("audience") == test.audience }
		if !slices.ContainsFunc(test.server.asked(), asked) {
			t.Errorf("%s: got no token request for the audience %q", test.key, test.audience)
		}
	}
	for _, key := range []string{"acme", "nobody", ""} { // it needs no client
		g.get("X-Up", second.addr, "X-Key", key, "Authorization", "Basic kept").want(t, http.StatusOK)
		second.last(t).wantHeader(t, "Authorization", "Basic kept")
	}
	g.get("X-Up", first.addr, "X-Key", "nobody").want(t, http.StatusForbidden)
	g.get("X-Up", heldAddress(t), "X-Key", "acme").want(t, http.StatusBadGateway) // no block names it
}

// Health checks have no key.
func TestHealthChecksBesideClientKeys(t *testing.T) {
	for _, test := range []struct{ byDefault, client string }{
		{"client default {\nclient_id of-nobody\nclient_secret canary-secret-d\n}", "of-nobody"},
		{"client default off", ""},
		{"", ""},
	} {
		auth := newAuthServer(t)
		up := newUpstream(t, auth)
		n := up.checked(http.StatusOK)
		site := strings.Replace(keyedSite, "transport", "health_uri /health\nhealth_interval 20ms\ntransport", 1)
		g := startGateway(t, expand(site, "$UP", up.addr, "$AUTH", auth.URL, "$DEFAULT", test.byDefault))
		eventually(t, func() bool { return n.Load() >= 3 }, "health checks")
		check := up.checks()[2]
		if got := check.bearerOf(auth); got != test.client {
			t.Errorf("%q: got a health check with the token of %q, want that of %q", test.byDefault, got, test.client)
		}
		g.get("X-Key", "acme").want(t, http.StatusOK)
		g.stop()
	}
}

// No request ever has another client's token or tenant, whatever is revoked meanwhile. And the
// clients of one server do not wait for another one's.
func TestManyClientsByKey(t *testing.T) {
	const clients, requests = 100, 1000
	auth, hanging := newAuthServer(t), newAuthServer(t)
	release := hanging.hang()
	defer release()
	up := newUpstream(t, auth)
	var blocks strings.Builder
	for i := range clients {
		fmt.Fprintf(&blocks, "client key-%d {\nclient_id of-key-%d\nclient_secret canary-%d\ntenant key-%d\n}\n", i, i, i, i)
	}
	fmt.Fprintf(&blocks, "client stuck {\ntoken_url %s/token\nclient_id stuck\nclient_secret s\ntoken_timeout 1m\n}\n", hanging.URL)
	site := expand(keyedSite, "$UP", up.addr, "$AUTH", auth.URL, "$DEFAULT", blocks.String())
	g := startGateway(t, site)
	var stuck sync.WaitGroup
	var answered atomic.Int32
	for range 20 {
		stuck.Go(func() {
			g.get("X-Key", "stuck")
			answered.Add(1)
		})
	}
	var wrong sync.Map
	up.script(func(_ http.ResponseWriter, r *http.Request) bool {
		bearer, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		key := r.Header.Get("X-Tenant-Id")
		if _, of, _ := strings.Cut(bearer, "-of-of-"); of != key || r.Header.Get("X-Key") != key {
			wrong.Store(r.Header.Get("X-Key"), bearer+" of "+key)
		}
		return false
	})
	var sent sync.WaitGroup
	for i := range requests {
		sent.Go(func() {
			r := g.get("X-Key", "key-"+strconv.Itoa(i%clients))
			if r.err != nil || r.status >= 500 {
				t.Errorf("got %d, err %v, want an answer of the upstream", r.status, r.err)
			}
		})
		if i%200 == 199 {
			time.Sleep(time.Millisecond)
			auth.revoke()
		}
	}
	sent.Wait()
	if got := answered.Load(); got != 0 {
		t.Errorf("got %d answers for the client whose server hangs, before or while the others had theirs", got)
	}
	wrong.Range(func(key, got any) bool {
		t.Errorf("a request of %s had %v", key, got)
		return true
	})

	// A reload fetches nothing for clients in use.
	for i := range clients {
		g.get("X-Key", "key-"+strconv.Itoa(i)).want(t, http.StatusOK)
	}
	before := len(auth.asked())
	g.load(site + "\n# reloaded")
	for i := range clients {
		g.get("X-Key", "key-"+strconv.Itoa(i)).want(t, http.StatusOK)
	}
	auth.wantAsked(t, before)
	release()
	stuck.Wait()
}
