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

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
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
	registry.MustRegister(sourceCollector{}, requestsTotal)
	if _, err := registry.Gather(); err != nil {
		t.Errorf("got %v, want metrics of %q", err, transport.fallback.endpoint.metrics.name)
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
	registry.MustRegister(tokenRequestsTotal, tokenRequestDuration, requestsTotal, waitDuration, refusedRequestsTotal, refusedTokensTotal, sourceCollector{})
	families, err := registry.Gather()
	if err != nil || len(families) != 15 {
		t.Fatalf("got %d metrics, err %v, want 15", len(families), err)
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
	metricsOf(t.Name()).tokenRequested(0, &tokenError{Code: codeTimeout})
	if _, got, _ := metricsOf(t.Name()).counts(); got[codeTimeout] != 1 {
		t.Errorf("got %v, want the time-out that was counted before", got)
	}
}
