package outboundauth

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// chunked hides a body's length.
type chunked struct{ io.Reader }

func TestRevokedTokenIsReplacedUnnoticed(t *testing.T) {
	for _, test := range []struct {
		name, method string
		body         func() io.Reader
	}{
		{"GET", http.MethodGet, func() io.Reader { return nil }},
		{"POST", http.MethodPost, func() io.Reader { return strings.NewReader("body") }},
		{"PUT without a body", http.MethodPut, func() io.Reader { return http.NoBody }},
		{"chunked", http.MethodPost, func() io.Reader { return chunked{strings.NewReader("body")} }},
		{"just what is kept", http.MethodPost, func() io.Reader { return strings.NewReader(strings.Repeat("x", defaultReplayBody)) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			g, auth, up := gateAndFakes(t, "tenant acme")
			g.send(test.method, "/", test.body()).want(t, http.StatusOK)
			first := up.last(t)
			auth.revoke()
			if r := g.send(test.method, "/", test.body()).want(t, http.StatusOK); r.body != "accepted" {
				t.Errorf("got %q, want the answer to the second attempt", r.body)
			}
			auth.wantAsked(t, 2)
			all := up.got()
			if len(all) != 3 {
				t.Fatalf("got %d requests at the upstream, want 3", len(all))
			}
			refused, accepted := all[1], all[2]
			if client := accepted.bearerOf(auth); client != "gateway" {
				t.Errorf("got the token of %q, want a new one of gateway", client)
			}
			accepted.wantHeader(t, "X-Tenant-Id", "acme")
			for _, got := range []received{refused, accepted} {
				if got.body != first.body || got.bodyErr != nil {
					t.Errorf("got a body of %d bytes, err %v, want all %d", len(got.body), got.bodyErr, len(first.body))
				}
				if got.method != test.method || got.header.Get("Content-Length") != first.header.Get("Content-Length") {
					t.Errorf("got %s with %v, want it as the first", got.method, got.header)
				}
			}
		})
	}
}

func TestOneTokenRequestReplacesTheTokenForAll(t *testing.T) {
	g, auth, up := gateAndFakes(t, "")
	g.get().want(t, http.StatusOK)
	auth.revoke()
	wantAll(t, g.burst(200), http.StatusOK)
	auth.wantAsked(t, 2)
	if got := g.logged("the upstream refused the token", `"client_id":"gateway"`, `"upstream":"`+up.addr+`"`); len(got) != 1 {
		t.Errorf("got %q in the log, want one line", got)
	}
}

// What was read and not kept cannot be sent again: the client has to.
func TestBodyThatWasReadIsNotRepeated(t *testing.T) {
	for _, test := range []struct {
		name, setting string
		size          int
	}{
		{"default limit", "", defaultReplayBody + 1},
		{"own limit", "replay_body 1KiB", 2000},
		{"nothing is kept", "replay_body 0", 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			g, auth, up := gateAndFakes(t, test.setting)
			g.get().want(t, http.StatusOK)
			auth.revoke()
			body := strings.Repeat("x", test.size)
			r := g.send(http.MethodPost, "/", strings.NewReader(body)).want(t, http.StatusUnauthorized)
			if r.body != "refused" || r.header.Get("Www-Authenticate") == "" {
				t.Errorf("got %v %q, want the upstream's answer whole", r.header, r.body)
			}
			if got := len(up.got()); got != 2 {
				t.Errorf("got %d requests at the upstream, want 2", got)
			}
			// A new token is on its way for the next.
			g.send(http.MethodPost, "/", strings.NewReader(body)).want(t, http.StatusOK)
			auth.wantAsked(t, 2)
		})
	}
}

// refuseEarly answers requests without a live token without reading their
// body. The connection stays open: closed with unread data in it, it would be
// reset, and the answer might be lost on its way.
func (u *upstream) refuseEarly(w http.ResponseWriter, r *http.Request) bool {
	if token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); u.auth.holder(token) != "" {
		return false
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	time.AfterFunc(patience, func() { _ = conn.Close() })
	_, _ = io.WriteString(conn, "HTTP/1.1 401 Unauthorized\r\nConnection: close\r\nContent-Length: 7\r\n\r\nrefused")
	return true
}

// The rest of the body, of any size, has not been read by anybody when an
// upstream looks at the header only.
func TestLargeBodyIsRepeatedIfTheUpstreamRefusedEarly(t *testing.T) {
	part, rest := strings.Repeat("0123456789", 1000), strings.Repeat("abcdefghij", 50_000)
	for _, test := range []struct {
		name string
		body func(second <-chan struct{}) io.Reader
	}{
		{"chunked, from a slow client", func(second <-chan struct{}) io.Reader {
			source, sink := io.Pipe()
			go func() {
				_, _ = io.WriteString(sink, part)
				<-second // until then, the client is slow
				_, err := io.WriteString(sink, rest)
				sink.CloseWithError(err)
			}()
			return source
		}},
		{"of known length, from a fast client", func(<-chan struct{}) io.Reader { return strings.NewReader(part + rest) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			var auth *authServer
			var up *upstream
			inTime(t, func() func() reply {
				var g *gateway
				g, auth, up = gateAndFakes(t, announce)
				g.get().want(t, http.StatusOK)
				auth.revoke()
				second := make(chan struct{})
				up.script(func(w http.ResponseWriter, r *http.Request) bool {
					if up.refuseEarly(w, r) {
						return true
					}
					close(second)
					return false
				})
				return func() reply { return g.send(http.MethodPost, "/", test.body(second)) }
			})
			if got := up.last(t); got.body != part+rest || got.bodyErr != nil {
				t.Errorf("got a body of %d bytes, err %v, want all %d", len(got.body), got.bodyErr, len(part+rest))
			}
			auth.wantAsked(t, 2)
		})
	}
}

// An upstream may know no expectations and say so (RFC 9110 §15.5.18). The
// client has none, so it must not get that answer.
func TestUpstreamThatKnowsNoExpectation(t *testing.T) {
	body := strings.Repeat("x", 10*defaultReplayBody)
	var up *upstream
	inTime(t, func() func() reply {
		var g *gateway
		g, _, up = gateAndFakes(t, announce)
		up.script(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Expect") == "" {
				return false
			}
			w.WriteHeader(http.StatusExpectationFailed)
			return true
		})
		return func() reply { return g.send(http.MethodPost, "/", strings.NewReader(body)) }
	})
	if got := up.last(t).body; got != body {
		t.Errorf("got a body of %d bytes, want all %d", len(got), len(body))
	}
}

func TestRetryOn(t *testing.T) {
	for _, test := range []struct {
		setting string
		status  int // of the refusal
		want    int
		asked   int
	}{
		{"", 401, 200, 2},
		{"", 403, 403, 1},
		{"retry_on 401 403", 401, 200, 2},
		{"retry_on 401 403", 403, 200, 2},
		{"retry_on 403", 401, 401, 1},
		{"retry_on 503", 503, 200, 2},
		{"retry_on off", 401, 401, 1},
	} {
		t.Run(fmt.Sprint(test.setting, " ", test.status), func(t *testing.T) {
			g, auth, up := gateAndFakes(t, test.setting)
			g.get().want(t, http.StatusOK)
			auth.revoke()
			up.script(func(w http.ResponseWriter, r *http.Request) bool {
				if token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); auth.holder(token) != "" {
					return false
				}
				refuse(w, test.status)
				return true
			})
			r := g.send(http.MethodPost, "/", strings.NewReader("body")).want(t, test.want)
			if test.want != http.StatusOK && r.body != "refused" {
				t.Errorf("got %q, want the upstream's answer", r.body)
			}
			g.get().want(t, test.want) // neither was the token dropped for later
			auth.wantAsked(t, test.asked)
		})
	}
}

// An upstream that refuses everything must not make the gateway ask the
// authorization server for a token for each request.
func TestUpstreamThatAlwaysRefuses(t *testing.T) {
	g, auth, up := gateAndFakes(t, "")
	answer := strings.Repeat("not for you ", 20_000) // more than is read to reuse a connection
	up.script(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("X-Reason", "blocked")
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = io.WriteString(w, answer)
		return true
	})
	for range 5 {
		for _, r := range g.burst(100) {
			r.want(t, http.StatusUnauthorized)
			if r.body != answer || r.header.Get("X-Reason") != "blocked" {
				t.Fatalf("got %d bytes and %v, want the upstream's answer whole", len(r.body), r.header)
			}
		}
	}
	if got := len(auth.asked()); got > 5 {
		t.Errorf("got %d token requests, want a handful", got)
	}
}

func TestSecondRefusalReachesTheClient(t *testing.T) {
	g, auth, up := gateAndFakes(t, "")
	g.get().want(t, http.StatusOK)
	n := 0
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		n++ // one after the other
		up.record(r)
		w.Header().Set("X-Attempt", fmt.Sprint(n))
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, "refusal ", n)
		return true
	})
	r := g.send(http.MethodPost, "/", strings.NewReader("body")).want(t, http.StatusUnauthorized)
	if r.body != "refusal 2" || r.header.Get("X-Attempt") != "2" || len(r.header.Values("X-Attempt")) != 1 {
		t.Errorf("got %q %v, want the second refusal", r.body, r.header)
	}
	auth.wantAsked(t, 2)
	// The token is not to blame: accepted again, it is used.
	up.script(nil)
	g.get().want(t, http.StatusOK)
	auth.wantAsked(t, 2)
}

func TestRecoveryWithoutANewToken(t *testing.T) {
	for _, test := range []struct {
		name     string
		settings string
		answer   func(*authServer) func(http.ResponseWriter, tokenRequest) bool
	}{
		{"the authorization server is down", "", func(*authServer) func(http.ResponseWriter, tokenRequest) bool {
			return refusing(http.StatusServiceUnavailable, "down")
		}},
		{"it refuses", "", func(*authServer) func(http.ResponseWriter, tokenRequest) bool {
			return refusing(http.StatusBadRequest, `{"error":"unauthorized_client"}`)
		}},
		{"it hangs", "token_timeout 2s", func(*authServer) func(http.ResponseWriter, tokenRequest) bool {
			return func(_ http.ResponseWriter, r tokenRequest) bool { <-r.ctx.Done(); return true }
		}},
		{"it issues the same token again", "", func(*authServer) func(http.ResponseWriter, tokenRequest) bool {
			return refusing(http.StatusOK, `{"access_token":"canary-token-1-of-gateway","expires_in":3600}`)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g, auth, up := gateAndFakes(t, test.settings)
			g.get().want(t, http.StatusOK)
			auth.revoke()
			auth.script(test.answer(auth))
			r := g.send(http.MethodPost, "/", strings.NewReader("body")).want(t, http.StatusUnauthorized)
			if r.body != "refused" || r.header.Get("Www-Authenticate") == "" {
				t.Errorf("got %v %q, want the upstream's answer whole", r.header, r.body)
			}
			if got := len(up.got()); got != 2 {
				t.Errorf("got %d requests at the upstream, want 2: no second attempt", got)
			}
		})
	}
}

// The upstream's refusal of one request says nothing about a token that has
// replaced the refused one meanwhile.
func TestLateRefusalDoesNotDropTheNewToken(t *testing.T) {
	g, auth, up := gateAndFakes(t, "")
	g.get().want(t, http.StatusOK)
	auth.revoke()
	late := make(chan struct{})
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if r.URL.Path == "/late" && auth.holder(token) == "" {
			<-late
		}
		return false
	})
	answer := make(chan reply)
	go func() { answer <- g.send(http.MethodGet, "/late", nil) }()
	g.get().want(t, http.StatusOK)
	close(late)
	(<-answer).want(t, http.StatusOK)
	g.get().want(t, http.StatusOK)
	auth.wantAsked(t, 2)
}

// The dial function of the second try may still run when the next handler of the request
// writes its variables: with a forward_auth in front, Go ended the server.
func TestSecondTryHasVariablesOfItsOwn(t *testing.T) {
	auth := newAuthServer(t)
	transport := newTransport(t, "token_url "+auth.URL+"/token\nclient_id gateway\nclient_secret s")
	var seen []map[string]any
	transport.plaintext = true
	transport.HTTPTransport.Transport.RegisterProtocol("stub", roundTripFunc(func(req *http.Request) (*http.Response, error) {
		vars, _ := req.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
		seen = append(seen, maps.Clone(vars))
		caddyhttp.SetVar(req.Context(), "try", len(seen))
		status := http.StatusOK
		if len(seen) == 1 {
			status = http.StatusUnauthorized
		}
		return &http.Response{StatusCode: status, Header: http.Header{}, Body: http.NoBody, Request: req}, nil
	}))
	req := proxied(t, "127.0.0.1:9000", "/")
	req.URL.Scheme = "stub"
	caddyhttp.SetVar(req.Context(), "before", true)
	res, err := transport.RoundTrip(req)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("got %v, err %v, want a second try that succeeds", res, err)
	}
	if len(seen) != 2 || seen[1]["before"] != true {
		t.Errorf("got the variables %v, want those of the request in both tries", seen)
	}
	if got := caddyhttp.GetVar(req.Context(), "try"); got != 1 {
		t.Errorf("got %v as the last try that wrote a variable of the request, want 1", got)
	}
}
