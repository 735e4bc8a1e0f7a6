package outboundauth

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/replay"
)

// Whatever an upstream and its clients do, refusals cause few token requests.
func TestRefusalsCauseFewTokenRequests(t *testing.T) {
	long := strings.Repeat("x", 2*defaultReplayBody)
	refuseAll := func(w http.ResponseWriter, r *http.Request) bool {
		_, _ = io.Copy(io.Discard, r.Body)
		refuse(w, http.StatusUnauthorized)
		return true
	}
	var requests atomic.Int64
	for _, test := range []struct {
		name   string
		answer func(http.ResponseWriter, *http.Request) bool
		send   func(*gateway)
	}{
		{"all requests", refuseAll, func(g *gateway) { g.get() }},
		{"every second request", func(w http.ResponseWriter, r *http.Request) bool {
			return requests.Add(1)%2 == 1 && refuseAll(w, r)
		}, func(g *gateway) { g.get() }},
		{"bodies too long to be repeated", refuseAll, func(g *gateway) {
			g.send(http.MethodPost, "/", strings.NewReader(long))
		}},
		{"the same, of unknown length", refuseAll, func(g *gateway) {
			g.send(http.MethodPost, "/", struct{ io.Reader }{strings.NewReader(long)})
		}},
		{"the second attempt breaks", func(w http.ResponseWriter, r *http.Request) bool {
			if requests.Add(1)%2 == 1 {
				return refuseAll(w, r)
			}
			panic(http.ErrAbortHandler)
		}, func(g *gateway) { g.get() }},
		{"clients that leave", func(w http.ResponseWriter, r *http.Request) bool {
			time.Sleep(2 * time.Millisecond) // so that they leave during the second attempt too
			return refuseAll(w, r)
		}, func(g *gateway) {
			ctx, cancel := context.WithTimeout(context.Background(), 3*time.Millisecond)
			defer cancel()
			g.sendCtx(ctx, http.MethodGet, "/", nil)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g, auth, up := gateAndFakes(t, "")
			up.Config.ErrorLog = discardLog
			g.get().want(t, http.StatusOK)
			requests.Store(0)
			up.script(test.answer)
			for range 5 { // who is refused may have to wait for a second
				var wg sync.WaitGroup
				for range 12 {
					wg.Go(func() { test.send(g) })
				}
				wg.Wait()
			}
			if got := len(auth.asked()); got > 12 {
				t.Errorf("got %d token requests for 60 refusals, want 12 at most", got)
			}
		})
	}
}

// A refusal by one path, while there is no other token to be had, takes
// nothing from those that accept it.
func TestRefusalDuringAnOutageTakesNoToken(t *testing.T) {
	g, auth, up := gateAndFakes(t, "")
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/login" {
			return false
		}
		refuse(w, http.StatusUnauthorized)
		return true
	})
	g.get().want(t, http.StatusOK)
	auth.script(refusing(http.StatusTooManyRequests, ""))
	g.send(http.MethodGet, "/login", nil).want(t, http.StatusUnauthorized)
	g.get().want(t, http.StatusOK)
}

// To the reverse proxy, an error of the dialer says that nothing was sent. It
// would send the next upstream a body of which nothing is left.
func TestSecondAttemptThatCannotConnectIsNotTriedElsewhere(t *testing.T) {
	auth := newAuthServer(t)
	a, b := newUpstream(t, auth), newUpstream(t, auth)
	a.script(func(w http.ResponseWriter, r *http.Request) bool {
		_, _ = io.Copy(io.Discard, r.Body)
		_ = a.Listener.Close()
		w.Header().Set("Connection", "close")
		refuse(w, http.StatusUnauthorized)
		return true
	})
	g := startGateway(t, expand(`reverse_proxy $A $B {
		lb_policy first
		lb_retries 3
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret s
		}
	}`, "$A", a.addr, "$B", b.addr, "$AUTH", auth.URL))
	g.send(http.MethodPost, "/", struct{ io.Reader }{strings.NewReader("the body")}).want(t, http.StatusBadGateway)
	if got := b.got(); len(got) != 0 {
		t.Errorf("got %d requests at the next upstream, with %q, want none", len(got), got[0].body)
	}
}

// A match on the answer of an upstream must not take a missing token for one.
func TestMissingTokenIsNoAnswerToRetryOn(t *testing.T) {
	for _, users := range []string{"", "not method DELETE"} {
		auth := newAuthServer(t)
		up := newUpstream(t, auth)
		auth.script(refusing(http.StatusUnauthorized, `{"error":"invalid_client"}`))
		g := startGateway(t, expand("reverse_proxy $UP {\n"+
			"lb_retries 3\n"+
			"lb_retry_match {\nexpression `{rp.header.X-Served-By} != \"me\"`\n$USERS\n}\n"+
			"transport oauth2 {\ntoken_url $AUTH/token\nclient_id gateway\nclient_secret s\n}\n}",
			"$UP", up.addr, "$AUTH", auth.URL, "$USERS", users))
		r := g.get().want(t, http.StatusServiceUnavailable)
		if r.header.Get("Retry-After") == "" {
			t.Error("got no Retry-After, want one")
		}
		if got := len(g.logged("upstream roundtrip")); got != 1 {
			t.Errorf("got %d attempts, want 1", got)
		}
		g.stop()
	}
}

// HTTP/1.0 knows no interim answers (RFC 9110 §15.2), and this one is not for
// the client: it is the gateway that has asked.
func TestContinueIsNotForwardedToAClientThatHasNotAsked(t *testing.T) {
	g, _, _ := gateAndFakes(t, announce)
	g.get().want(t, http.StatusOK)
	conn := g.raw()
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	body := strings.Repeat("x", 2*defaultReplayBody)
	go fmt.Fprintf(conn, "POST / HTTP/1.0\r\nHost: gateway.test\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil || !strings.Contains(line, " 200 ") {
		t.Errorf("got %q, err %v, want 200", line, err)
	}
}

// An upstream that does not answer the announcement costs one pause, and costs the
// other upstreams nothing.
func TestAnnouncementThatIsNotAnsweredIsNotRepeated(t *testing.T) {
	auth := newAuthServer(t)
	silent, other := newUpstream(t, auth), newUpstream(t, auth)
	announced := make(map[*upstream]int)
	var mu sync.Mutex
	for _, up := range []*upstream{silent, other} {
		up.script(func(_ http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Expect") == "" {
				return false
			}
			mu.Lock()
			announced[up]++
			mu.Unlock()
			if up == silent {
				time.Sleep(2 * replay.MaxPause) // before it reads
			}
			return false
		})
	}
	g := startGateway(t, strings.Replace(proxySite(silent, auth, announce),
		"reverse_proxy "+silent.addr+" {", "reverse_proxy "+silent.addr+" "+other.addr+" {\nlb_policy round_robin", 1))
	body := strings.Repeat("x", 2*defaultReplayBody)
	for range 6 {
		g.send(http.MethodPost, "/", strings.NewReader(body)).want(t, http.StatusOK)
	}
	if got := announced[silent]; got != 1 {
		t.Errorf("got %d requests with an announcement, want only the first", got)
	}
	if got := announced[other]; got == 0 {
		t.Errorf("got %d of the other upstream's %d, want that it is asked", got, len(other.got()))
	}
}

// What net/http quotes of an answer that is not HTTP may be the token.
func TestUpstreamThatRepeatsTheTokenInAnError(t *testing.T) {
	g, auth, up := gateAndFakes(t, "")
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\n%s\r\n\r\n", r.Header.Get("Authorization"))
		return true
	})
	g.get().want(t, http.StatusBadGateway)
	if got := g.logged(fmt.Sprintf("canary-token-%d-of-", len(auth.asked()))); len(got) != 0 {
		t.Errorf("got the token in the log: %q", got)
	}
}

// Reading a file can't be interrupted, but nobody waits for it longer than
// token_timeout, and a later fetch reads it anew.
func TestSecretThatCannotBeReadHoldsNothing(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "secret")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := startGateway(t, expand(`reverse_proxy $UP {
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret {file.$PIPE}
			token_timeout 100ms
		}
	}`, "$UP", up.addr, "$AUTH", auth.URL, "$PIPE", pipe))
	g.get().want(t, http.StatusGatewayTimeout)
	const todo = "(name files on a disk that answers, and no pipe to which nobody writes)"
	eventually(t, func() bool { return len(g.logged("obtaining token failed", todo)) > 0 }, "%q in the log", todo)

	// Whoever still waits for the pipe gets the secret, and the next fetch too.
	done := make(chan struct{})
	defer func() { <-done }()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
			if f, err := openPipe(pipe); err == nil {
				_, _ = io.WriteString(f, "s")
				_ = f.Close()
			}
		}
	}()
	eventually(t, func() bool { return g.get().status == http.StatusOK }, "a token once the secret can be read")
}

// A proxy on another machine reads what is not encrypted, wherever it goes.
func TestProxiedLoopbackAddressIsNotOnThisMachine(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	t.Setenv("AUTH_URL", auth.URL)
	g := newGateway(t)
	err := g.tryLoad(proxySite(up, auth, "network_proxy url http://127.0.0.1:1"))
	if err == nil || !strings.Contains(err.Error(), "the token would go to upstream") {
		t.Errorf("got %v, want that the token would be unencrypted", err)
	}
	err = g.tryLoad(strings.Replace(proxySite(up, auth, "token_transport {\nnetwork_proxy url http://127.0.0.1:1\n}"), auth.URL, "{env.AUTH_URL}", 1))
	if err == nil || !strings.Contains(err.Error(), "credentials would go to") {
		t.Errorf("got %v, want that the credentials would be unencrypted", err)
	}
}

func openPipe(path string) (io.WriteCloser, error) {
	fd, err := syscall.Open(path, syscall.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err // nobody reads
	}
	return fdWriter(fd), nil
}

type fdWriter int

func (fd fdWriter) Write(p []byte) (int, error) { return syscall.Write(int(fd), p) }
func (fd fdWriter) Close() error                { return syscall.Close(int(fd)) }

// After a 101 the connection is no longer net/http's, and a read of it would
// not end with the context.
func TestSwitchingProtocolsDoesNotHoldAFetch(t *testing.T) {
	done := make(chan struct{})
	url := rawServer(t, func(conn net.Conn, r *bufio.Reader) {
		_, _ = http.ReadRequest(r)
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
		<-done
	})
	defer close(done)
	cl := newTestClient(t, canaryCredentials(url), networkTransport(t))
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	wantTokenError(t, err, codeInvalidResponse, false)
}
