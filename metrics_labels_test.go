package outboundauth

import (
	"crypto/rand"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
)

func TestClientsOfOneNameShareTheirMetrics(t *testing.T) {
	auth := newAuthServer(t)
	auth.script(func(w http.ResponseWriter, r tokenRequest) bool {
		return r.client == "failing" && refusingForLong(http.StatusUnauthorized, `{"error":"invalid_client"}`)(w, r)
	})
	a, b, c := newUpstream(t, auth), newUpstream(t, auth), newUpstream(t, auth)
	g, name := newOperableGateway(t), newName()
	g.load(expand(`route /a {
			reverse_proxy $A {
				transport oauth2 {
					name $NAME
					token_url $AUTH
					client_id good
					client_secret s
				}
			}
		}
		reverse_proxy $B $C {
			lb_policy header X-To {
				fallback first
			}
			transport oauth2 {
				token_url $AUTH
				client_secret s
				upstream $B {
					name $NAME
					client_id failing
				}
				upstream $C {
					name $NAME
					client_id good
					scopes more
				}
			}
		}`, "$A", a.addr, "$B", b.addr, "$C", c.addr, "$NAME", name, "$AUTH", auth.URL))
	g.send(http.MethodGet, "/a", nil).want(t, http.StatusOK)
	g.get().want(t, http.StatusServiceUnavailable)
	eventually(t, func() bool {
		got := g.scrape().of(name)
		return got[`token_requests_total{result="ok"}`] == 2 && got["consecutive_failures"] > 0
	}, "tokens of two clients and the failure of the third")
	for range 20 { // the order of sources is random
		got := g.scrape()
		got.of(name).want(t, series{
			`token_state{state="fresh"}`: 0, `token_state{state="absent"}`: 1,
			"consecutive_failures": 1, "permanent_error": 1, "token_expiry_timestamp_seconds": 0,
			`requests_total{token="none"}`: 1, `token_requests_total{result="invalid_client"}`: 1,
		})
		got.want(t, series{"sources": 3})
	}
}

func TestNamesOfClients(t *testing.T) {
	transport := newTransport(t, `
		token_url https://auth.example.com/token?key=secret
		client_id gateway
		client_secret s
		upstream 127.0.0.1:9000 {
			scopes other
		}
		upstream 127.0.0.1:9001 {
			client_id billing
		}
		upstream 127.0.0.1:9002 {
			issuer https://login.example.com:8443/realm
			client_secret s
		}
		upstream 127.0.0.1:9003 {
			name orders
		}`)
	for address, want := range map[string]string{
		"127.0.0.1:9000": "auth.example.com/gateway",
		"127.0.0.1:9001": "auth.example.com/billing",
		"127.0.0.1:9002": "login.example.com:8443/gateway",
		"127.0.0.1:9003": "orders",
	} {
		if got := transport.routes[dialAddress{"tcp", address}].endpoint.metrics.name; got != want {
			t.Errorf("%s: got the name %q, want %q", address, got, want)
		}
	}

	// A name belongs to its client, and is not inherited by another.
	transport = newTransport(t, `
		name main
		token_url https://auth.example.com/token
		client_id gateway
		client_secret s
		upstream 127.0.0.1:9000 {
			scopes other
		}
		upstream 127.0.0.1:9001 {
			client_id billing
		}
		upstream 127.0.0.1:9002 {
			token_url https://login.example.com/token
			client_secret s
		}`)
	for address, want := range map[string]string{
		"127.0.0.1:9000": "main",
		"127.0.0.1:9001": "auth.example.com/billing",
		"127.0.0.1:9002": "login.example.com/gateway",
	} {
		if got := transport.routes[dialAddress{"tcp", address}].endpoint.metrics.name; got != want {
			t.Errorf("%s: got the name %q, want %q", address, got, want)
		}
	}
}

// Labels are UTF-8; the host of a URL can be anything.
func TestNameThatIsNotUTF8(t *testing.T) {
	transport := newTransport(t, "token_url https://auth%ff.example.com/token\nclient_id gateway\nclient_secret s")
	if name := transport.fallback.endpoint.metrics.name; !strings.Contains(name, "auth\uFFFD") {
		t.Errorf("got the name %q, want one with a replacement", name)
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(sourceCollector{}, requestsTotal, waitDuration)
	if _, err := registry.Gather(); err != nil {
		t.Errorf("got %v, want metrics of %q", err, transport.fallback.endpoint.metrics.name)
	}
}

// The histograms are those of the endpoint's host, whatever its clients are called. The
// path may hold a key. What an issuer's metadata says is not bounded by the config.
func TestDurationsBelongToTheHost(t *testing.T) {
	name := newName()
	a, b, issuer := newName()+".example", newName()+".example:8443", newName()+".example"
	transport := newTransport(t, expand(`
		client_id gateway
		client_secret s
		token_url https://$A/canary-key/token?key=canary-key
		upstream 127.0.0.1:9000 {
			name $NAME
		}
		upstream 127.0.0.1:9001 {
			name $NAME
			token_url https://$B/token
			client_secret s
		}
		upstream 127.0.0.1:9002 {
			name other
			scopes other
		}
		upstream 127.0.0.1:9003 {
			issuer https://$ISSUER/canary-realm
			client_secret s
		}`, "$A", a, "$B", b, "$ISSUER", issuer, "$NAME", name))
	for port, took := range map[string]time.Duration{"9000": time.Second, "9001": 2 * time.Second, "9002": 3 * time.Second, "9003": 4 * time.Second} {
		m := transport.routes[dialAddress{"tcp", "127.0.0.1:" + port}].endpoint.metrics
		m.tokenRequested(took, nil)
		m.requested(t.Context(), acquisition{tokenWaited, took})
	}
	for _, histogram := range []*prometheus.HistogramVec{tokenRequestDuration, waitDuration} {
		for host, want := range map[string]struct {
			count uint64
			sum   float64
		}{a: {2, 4}, b: {1, 2}, issuer: {1, 4}} {
			var got dto.Metric
			if err := histogram.WithLabelValues(host).(prometheus.Metric).Write(&got); err != nil {
				t.Fatal(err)
			}
			if h := got.GetHistogram(); h.GetSampleCount() != want.count || h.GetSampleSum() != want.sum {
				t.Errorf("%s: got %d durations of %v seconds in all, want %d of %v", host, h.GetSampleCount(), h.GetSampleSum(), want.count, want.sum)
			}
		}
	}
	requests, tokenRequests, _ := countersOf(name).counts()
	if requests["fetched"] != 2 || tokenRequests[resultOK] != 2 {
		t.Errorf("got %v and %v, want the two of both hosts", requests, tokenRequests)
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(tokenRequestDuration, waitDuration)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprint(families); strings.Contains(text, "canary") || !strings.Contains(text, a) {
		t.Error("got a path in the labels, want hosts only")
	}
}

// count returns how many series have a label whose value begins so. Buckets count.
func (s series) count(label, prefix string) (n int) {
	for name := range s {
		if strings.Contains(name, label+`="`+prefix) {
			n++
		}
	}
	return n
}

// perClient is how many series a client may have.
const perClient = 28

// A client has few series, also after a failure and refusals: each error code adds one.
func TestAClientHasFewSeries(t *testing.T) {
	auth := newAuthServer(t)
	auth.script(refusing(http.StatusServiceUnavailable, ""))
	up := newUpstream(t, auth)
	g, name := newOperableGateway(t), newName()
	g.load(proxySite(up, auth, "name "+name))
	counted := func(series string) func() bool {
		return func() bool { return g.scrape().of(name)[series] > 0 }
	}
	eventually(t, counted(`token_requests_total{result="http_status"}`), "a failure")
	auth.script(nil)
	eventually(t, func() bool { return g.get().status == http.StatusOK }, "a token")
	auth.revoke()
	g.get().want(t, http.StatusOK)
	eventually(t, counted(`rejections_total{outcome="recovered"}`), "a refusal that a new token ends")
	up.script(func(w http.ResponseWriter, _ *http.Request) bool { refuse(w, http.StatusUnauthorized); return true })
	g.get().want(t, http.StatusUnauthorized)
	got, refusals := g.scrape(), 0.0
	for _, outcome := range refusalOutcomes {
		refusals += got.of(name)[fmt.Sprintf("rejections_total{outcome=%q}", outcome)]
	}
	if refusals != 2 {
		t.Errorf("got %v refusals, want both", refusals)
	}
	if n := got.count("client", name+`"`); n > perClient || n != len(got.of(name)) {
		t.Errorf("got %d series, %d of them no buckets, want %d at most, and no buckets", n, len(got.of(name)), perClient)
	}
}

// Clients of one endpoint share what is dear.
func TestManyClientsHaveFewSeries(t *testing.T) {
	const clients, constant = 300, 50
	auth := newAuthServer(t)
	auth.script(refusingForLong(http.StatusUnauthorized, `{"error":"invalid_client"}`))
	g, name := newOperableGateway(t), newName()
	var upstreams, blocks strings.Builder
	for i := range clients {
		address := fmt.Sprint("127.0.0.1:", 10_000+i)
		fmt.Fprintf(&upstreams, " %s", address)
		fmt.Fprintf(&blocks, "upstream %s {\nname %s-%d\nclient_id %d\n}\n", address, name, i, i)
	}
	g.load(expand("reverse_proxy $UPSTREAMS {\ntransport oauth2 {\ntoken_url $AUTH/token\nclient_secret s\n$BLOCKS\n}\n}",
		"$UPSTREAMS", upstreams.String(), "$AUTH", auth.URL, "$BLOCKS", blocks.String()))
	var got series
	eventually(t, func() bool {
		got = g.scrape()
		failed := 0.0
		for series, value := range got {
			if strings.HasPrefix(series, `token_requests_total{client="`+name) && strings.HasSuffix(series, `result="invalid_client"}`) {
				failed += value
			}
		}
		return failed == clients
	}, "a failure of each client")
	got.want(t, series{"sources": clients})
	n := got.count("client", name+"-") + got.count("endpoint", auth.Listener.Addr().String()+`"`)
	t.Logf("%d series for %d clients", n, clients)
	if n > clients*perClient+constant || n < clients {
		t.Errorf("got %d series for %d clients, want %d for each and %d more at most", n, clients, perClient, constant)
	}
}

// Nothing that a client of the proxy or a server sends makes a series.
func TestHostileClientsAddNoSeries(t *testing.T) {
	const clients, requests = 8, 10_000
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.HasSuffix(r.URL.Path, "00"):
			refuse(w, http.StatusUnauthorized)
		case strings.HasSuffix(r.URL.Path, "50"):
			panic(http.ErrAbortHandler)
		}
		return true
	})
	g, name := newOperableGateway(t), newName()
	g.load(proxySite(up, auth, "name "+name+"\nheader X-Caller {http.request.header.X-Caller}"))
	g.get().want(t, http.StatusOK)
	auth.script(func(w http.ResponseWriter, r tokenRequest) bool {
		return refusing(http.StatusBadRequest, fmt.Sprintf(`{"error":"hostile-%s"}`, rand.Text()))(w, r)
	})
	source := sourceOf(t, name)
	if _, err := source.rested().FetchNow(t.Context()); err == nil {
		t.Fatal("got a token, want the error")
	}
	before := g.scrape()

	var wg sync.WaitGroup
	for client := range clients {
		wg.Go(func() {
			for i := client; i < requests; i += clients {
				x := fmt.Sprint("hostile-", rand.Text(), "-", i)
				method := [...]string{http.MethodGet, http.MethodOptions, "HOSTILE" + rand.Text()[:8]}[i%3] // Caddy takes no longer ones
				r := g.send(method, "/"+x, nil, "Host", x, x, x, "X-Caller", x, "Authorization", x, "User-Agent", x)
				if r.err != nil {
					t.Errorf("request %d: got %v, want an answer", i, r.err)
					return
				}
				if i%1000 == 0 {
					_, _ = source.rested().FetchNow(t.Context()) // another code of the server's making
				}
			}
		})
	}
	wg.Wait()

	after := g.scrape()
	if got := slices.Sorted(maps.Keys(after)); !slices.Equal(got, slices.Sorted(maps.Keys(before))) {
		t.Errorf("got %d series, want the %d from before", len(got), len(before))
	}
	total := func(s series) (n float64) {
		for _, use := range tokenUses {
			n += s.of(name)[fmt.Sprintf("requests_total{token=%q}", use)]
		}
		return n
	}
	if got := total(after) - total(before); got < requests {
		t.Errorf("got %v requests counted, want at least %d", got, requests)
	}
	if body := g.ask(http.MethodGet, "/metrics").body; strings.Contains(strings.ToLower(body), "hostile") {
		t.Error("got what clients or the server sent in the metrics, want nothing of it")
	}
}

func TestMetricsAreNamedByTheConventions(t *testing.T) {
	newTransport(t, "token_url https://auth.example.com/token\nclient_id "+newName()+"\nclient_secret s")
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(tokenRequestsTotal, tokenRequestDuration, requestsTotal, waitDuration, refusedRequestsTotal, refusedTokensTotal,
		sourceCollector{}, originCollector{{endpoint: newName()}})
	families, err := registry.Gather()
	if err != nil || len(families) != 19 {
		t.Fatalf("got %d metrics, err %v, want 19", len(families), err)
	}
	for _, family := range families { // the linter compares each with each
		family.Metric = family.Metric[:min(len(family.Metric), 20)]
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range problems {
		t.Errorf("got %s: %s, want no problem", problem.Metric, problem.Text)
	}
	page := readFile(t, "docs/operate.md")
	for _, family := range families {
		if !strings.Contains(page, "`"+family.GetName()+"`") {
			t.Errorf("got nothing about %s in docs/operate.md, want it explained", family.GetName())
		}
	}
}

// A client that is loaded anew goes on with what was counted under its name.
func TestCountsBelongToTheName(t *testing.T) {
	metricsOf(t.Name(), "a.example").tokenRequested(0, &tokenError{Code: codeTimeout})
	if _, got, _ := countersOf(t.Name()).counts(); got[codeTimeout] != 1 {
		t.Errorf("got %v, want the time-out that was counted before", got)
	}
}
