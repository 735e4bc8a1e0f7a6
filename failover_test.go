package outboundauth

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/outboundauth/caddy-outbound-auth/internal/replaytest"
)

// breakConnection ends a request without an answer, after recording it.
func (u *upstream) breakConnection(w http.ResponseWriter, r *http.Request) bool {
	u.record(r)
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	conn.Close()
	return true
}

func TestRetryNeverCarriesAnotherUpstreamsIdentity(t *testing.T) {
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		for _, ops := range []struct{ name, lines string }{
			{"without header ops", ""},                // then the attempts share one header map
			{"with header ops", "header_up X-Op set"}, // then each has its own
		} {
			t.Run(method+" "+ops.name, func(t *testing.T) {
				auth := newAuthServer(t)
				a, b := newUpstream(t, auth), newUpstream(t, auth)
				a.script(a.breakConnection)
				g := startGateway(t, expand(`reverse_proxy $A $B {
					lb_policy first
					lb_retries 2
					lb_retry_match {
						method GET POST
					}
					fail_duration 1m
					request_buffers 64KiB
					$OPS
					transport oauth2 {
						upstream $A {
							token_url $AUTH/token
							client_id a
							client_secret sa
							tenant of-a
							header X-Only-A of-a
						}
						upstream $B {
							token_url $AUTH/token
							client_id b
							client_secret sb
							tenant of-b
							header X-Only-B of-b
						}
					}
				}`, "$A", a.addr, "$B", b.addr, "$AUTH", auth.URL, "$OPS", ops.lines))
				var body io.Reader
				if method == http.MethodPost {
					body = strings.NewReader("body")
				}
				g.send(method, "/", body, "Authorization", "Bearer client-own", "X-Only-A", "client-own", "X-Only-B", "client-own").
					want(t, http.StatusOK)

				for _, test := range []struct {
					up           *upstream
					name, others string
				}{{a, "a", "b"}, {b, "b", "a"}} {
					got := test.up.last(t)
					if client := got.bearerOf(auth); client != test.name {
						t.Errorf("%s: got the token of %q, want its own", test.name, client)
					}
					got.wantHeader(t, "X-Tenant-Id", "of-"+test.name)
					for field, values := range got.header {
						for _, value := range values {
							if strings.HasSuffix(value, "of-"+test.others) || value == "client-own" {
								t.Errorf("%s: got %s: %s, want nothing of the other's or the client's", test.name, field, value)
							}
						}
					}
					if body != nil && got.body != "body" {
						t.Errorf("%s: got the body %q, want it whole", test.name, got.body)
					}
				}
			})
		}
	}
}

// A connection that cannot be made leaves the body to the next upstream.
func TestUnreachableUpstreamLeavesTheBody(t *testing.T) {
	auth := newAuthServer(t)
	b := newUpstream(t, auth)
	g := startGateway(t, expand(`reverse_proxy $NOBODY $B {
		lb_policy first
		lb_retries 2
		fail_duration 1m
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret s
		}
	}`, "$NOBODY", heldAddress(t), "$B", b.addr, "$AUTH", auth.URL))
	body := strings.Repeat("0123456789", 20_000)
	g.send(http.MethodPost, "/", strings.NewReader(body)).want(t, http.StatusOK)
	if got := b.last(t); got.body != body || got.bodyErr != nil {
		t.Errorf("got a body of %d bytes, err %v, want all %d", len(got.body), got.bodyErr, len(body))
	}
}

// The proxy may go on to the next upstream with a body of which the first has had
// some, before this body is closed.
func TestBodyThatWasSentIsNotSentElsewhere(t *testing.T) {
	for _, settings := range []string{"token_url $AUTH/token\nclient_id gateway\nclient_secret s", "upstream $UP off"} {
		t.Run(settings, func(t *testing.T) {
			auth := newAuthServer(t)
			up := newUpstream(t, auth) // both
			closing := make(chan struct{})
			end := sync.OnceFunc(func() { close(closing) })
			t.Cleanup(end)
			up.script(func(w http.ResponseWriter, r *http.Request) bool {
				broken := len(up.got()) == 0 && up.breakConnection(w, r)
				if !broken {
					up.record(r)
					end()
				}
				return true
			})
			words := []string{"$AUTH", auth.URL, "$UP", up.addr}
			first := newTransport(t, expand("token_url $AUTH/token\nclient_id gateway\nclient_secret s", words...))
			second := newTransport(t, expand(settings, words...))
			_, _ = proxyThrough(t, roundTripFunc(func(req *http.Request) (*http.Response, error) {
				if _, err := first.RoundTrip(req); err == nil {
					t.Error("first upstream: got an answer, want a broken connection")
				}
				return second.RoundTrip(req)
			}), up.addr, httptest.NewRequest(http.MethodGet, "/", &closingSlowly{Reader: strings.NewReader("body"), end: closing}))
			for _, got := range up.got()[1:] {
				if got.bodyErr == nil {
					t.Errorf("second upstream: got the body %q, want none that looks whole", got.body)
				}
			}
		})
	}
}

// closingSlowly is a body whose first Close takes its time.
type closingSlowly struct {
	io.Reader
	end    chan struct{}
	closed atomic.Bool
}

func (c *closingSlowly) Close() error {
	if !c.closed.Swap(true) {
		<-c.end
	}
	return nil
}

// A missing token is not the upstream's fault: its health does not suffer,
// and no other upstream is tried.
func TestMissingTokenIsNoFailureOfTheUpstream(t *testing.T) {
	auth := newAuthServer(t)
	a, b := newUpstream(t, auth), newUpstream(t, auth)
	auth.script(refusing(http.StatusBadRequest, `{"error":"invalid_client"}`))
	t.Setenv("OUTBOUNDAUTH_TEST_SECRET", "old")
	g := startGateway(t, expand(`reverse_proxy $A $B {
		lb_policy first
		lb_retries 5
		fail_duration 1m
		unhealthy_status 4xx 5xx
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret {env.OUTBOUNDAUTH_TEST_SECRET}
			upstream $B off
		}
	}`, "$A", a.addr, "$B", b.addr, "$AUTH", auth.URL))
	for range 3 {
		g.get().want(t, http.StatusServiceUnavailable)
	}
	if got := len(a.got()) + len(b.got()); got != 0 {
		t.Errorf("got %d requests upstream, want none", got)
	}
	// With a new secret, the back-off of the refusal ends.
	auth.script(nil)
	t.Setenv("OUTBOUNDAUTH_TEST_SECRET", "new")
	eventually(t, func() bool { return g.get().status == http.StatusOK }, "that the first upstream is used again")
	if got := a.last(t).bearerOf(auth); got != "gateway" {
		t.Errorf("got the token of %q, want that of gateway", got)
	}
	if got := len(b.got()); got != 0 {
		t.Errorf("got %d requests at the second upstream, want none: the first is healthy", got)
	}
}

// An upstream may answer before it has had the body. Its connection may be reading the
// body still when the proxy goes on to the next upstream: by itself, or by a proxy that
// handles the answer.
func TestEarlyAnswerLeavesTheNextUpstreamNoRest(t *testing.T) {
	const client = "token_url $AUTH/token\nclient_id gateway\nclient_secret s\n"
	retrying := func(settings string) string {
		return `reverse_proxy $A $B {
			lb_policy first
			lb_retries 1
			unhealthy_status 500
			max_fails 1
			fail_duration 1s
			lb_retry_match ` + "`{rp.status_code} == 500`" + `
			transport oauth2 {
				` + settings + `
			}
		}`
	}
	for name, site := range map[string]string{
		"off":       retrying("upstream $A off\nupstream $B {\n" + client + "}"),
		"retry_on":  retrying(client + "retry_on off"),
		"by itself": retrying(client),
		"nested": `reverse_proxy $A {
			transport oauth2 {
				` + client + `
			}
			@bad status 500
			handle_response @bad {
				reverse_proxy $B {
					transport oauth2 {
						` + client + `
						tenant b
					}
				}
			}
		}`,
	} {
		t.Run(name, func(t *testing.T) {
			auth := newAuthServer(t)
			a, b := newUpstream(t, auth), newUpstream(t, auth)
			a.script(func(w http.ResponseWriter, r *http.Request) bool {
				w.WriteHeader(http.StatusInternalServerError) // and the body is not read
				_ = http.NewResponseController(w).Flush()
				return true
			})
			g := startGateway(t, expand(site, "$AUTH", auth.URL, "$A", a.addr, "$B", b.addr))
			body := string(replaytest.Pattern(20_000))
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for range 50 {
						g.send(http.MethodPost, "/", struct{ io.Reader }{strings.NewReader(body)}) // chunked
					}
				})
			}
			wg.Wait()
			for _, got := range b.got() {
				if got.bodyErr == nil && got.body != body {
					t.Fatalf("next upstream: got a body of %d bytes that looks whole, want %d, or none", len(got.body), len(body))
				}
			}
			g.send(http.MethodGet, "/", nil)
			if len(b.got()) == 0 {
				t.Error("next upstream: got no request, want some")
			}
		})
	}
}
