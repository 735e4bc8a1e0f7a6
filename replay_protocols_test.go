package outboundauth

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/replay"
	"github.com/outboundauth/caddy-outbound-auth/internal/replaytest"
)

// newBothUpstream starts an upstream that speaks HTTP/1.1 and HTTP/2.
func newBothUpstream(t *testing.T, auth *authServer) *upstream {
	t.Helper()
	up := newUnstartedUpstream(t, auth)
	up.Config.Protocols = new(http.Protocols)
	up.Config.Protocols.SetHTTP1(true)
	up.Config.Protocols.SetUnencryptedHTTP2(true)
	up.start()
	return up
}

// announce makes the gateway ask before it sends a body that it can't keep.
const announce = "replay_body 64KiB announce"

// over is the site of an upstream that is sent requests over this protocol.
func over(protocol string, up *upstream, auth *authServer, proxy, settings string) string {
	return strings.Replace(proxySite(up, auth, settings), "reverse_proxy "+up.addr+" {", "reverse_proxy "+protocol+"://"+up.addr+" {\n"+proxy, 1)
}

// refuseUnread is refuseEarly for both protocols: a stream of HTTP/2 ends
// without harm to its connection.
func (u *upstream) refuseUnread(w http.ResponseWriter, r *http.Request) bool {
	if r.ProtoMajor == 1 {
		return u.refuseEarly(w, r)
	}
	if token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); u.auth.holder(token) != "" {
		return false
	}
	refuse(w, http.StatusUnauthorized)
	return true
}

// inTime fails the test unless a request succeeds whose large body the upstream
// refuses unread. The gateway waits for that no longer than replay.MaxPause; on a busy
// machine, the upstream takes longer now and then. Then the body was on its way,
// and there is no second attempt: that tells nothing, and all starts again with
// begin.
func inTime(t *testing.T, begin func() (send func() reply)) reply {
	t.Helper()
	for deadline := time.Now().Add(3 * patience); ; {
		send := begin()
		start := time.Now()
		r := send()
		late := time.Since(start) > replay.MaxPause && time.Now().Before(deadline)
		if !late || r.status == http.StatusOK {
			return r.want(t, http.StatusOK)
		}
	}
}

// do sends a request that send cannot make.
func do(t *testing.T, client *http.Client, req *http.Request) reply {
	t.Helper()
	res, err := client.Do(req)
	if err != nil {
		return reply{err: err}
	}
	defer res.Body.Close()
	content, err := io.ReadAll(res.Body)
	return reply{res.StatusCode, res.Header, string(content), err}
}

func newRequest(t *testing.T, method, url string, body io.Reader) *http.Request {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

// generated is a body that exists nowhere as a whole.
func generated(size int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{1}), size)
}

// A body of any size is sent again as long as the upstream has not wanted it,
// and is never kept.
func TestHugeBodyIsRepeatedWithoutBeingKept(t *testing.T) {
	const size = 100_000_000
	hash := sha256.New()
	_, _ = io.Copy(hash, generated(size))
	want := fmt.Sprintf("%x", hash.Sum(nil))
	for _, test := range []struct {
		protocol string
		length   int64 // announced
	}{{"http", size}, {"h2c", size}, {"http", -1}, {"h2c", -1}} {
		t.Run(fmt.Sprint(test.protocol, ", length ", test.length), func(t *testing.T) {
			var auth *authServer
			var refused atomic.Int32
			var before, half atomic.Int64
			r := inTime(t, func() func() reply {
				auth = newAuthServer(t)
				up := newBothUpstream(t, auth)
				g := startGateway(t, over(test.protocol, up, auth, "", announce))
				g.get().want(t, http.StatusOK)
				auth.revoke()
				refused.Store(0)
				up.script(func(w http.ResponseWriter, r *http.Request) bool {
					if up.refuseUnread(w, r) {
						refused.Add(1)
						return true
					}
					h := sha256.New()
					n, err := io.CopyN(h, r.Body, size/2)
					half.Store(heap()) // with all that has been sent held, if it were
					rest, err2 := io.Copy(h, r.Body)
					fmt.Fprintf(w, "%d of %d %v %v %x", n+rest, r.ContentLength, err, err2, h.Sum(nil))
					return true
				})
				req := newRequest(t, http.MethodPost, "http://"+g.addr, generated(size))
				req.ContentLength = test.length
				before.Store(heap())
				return func() reply { return do(t, g.client, req) }
			})
			if want := fmt.Sprintf("%d of %d <nil> <nil> %s", size, test.length, want); r.body != want {
				t.Errorf("got %s, want %s", r.body, want)
			}
			if refused.Load() != 1 {
				t.Errorf("got %d refusals, want 1", refused.Load())
			}
			auth.wantAsked(t, 2)
			grown := (half.Load() - before.Load()) >> 10
			t.Logf("%d KiB more on the heap in the middle of %d KiB", grown, size>>10)
			if grown > 8<<10 {
				t.Errorf("got %d KiB held in the middle of a body of %d KiB, want little more than %d", grown, size>>10, defaultReplayBody>>10)
			}
		})
	}
}

// What the proxy has read ahead is still sent twice.
func TestBufferedBodyIsRepeated(t *testing.T) {
	for _, test := range []struct {
		name   string
		size   int
		unread bool // when it is refused
	}{
		{"shorter than what is kept", 30_000, false},
		{"longer than what is kept", 5 * defaultReplayBody, true},
		{"longer than the buffer", 3 << 20, true},
	} {
		for _, known := range []bool{true, false} {
			t.Run(fmt.Sprint(test.name, ", of known length: ", known), func(t *testing.T) {
				var auth *authServer
				var up *upstream
				data := string(replaytest.Pattern(test.size))
				inTime(t, func() func() reply {
					auth = newAuthServer(t)
					up = newUpstream(t, auth)
					g := startGateway(t, over("http", up, auth, "request_buffers 1MiB", announce))
					g.get().want(t, http.StatusOK)
					auth.revoke()
					if test.unread {
						up.script(up.refuseUnread)
					}
					var body io.Reader = strings.NewReader(data)
					if !known {
						body = chunked{body}
					}
					return func() reply { return g.send(http.MethodPost, "/", body) }
				})
				if got := up.last(t); got.body != data || got.bodyErr != nil {
					t.Errorf("got a body of %d bytes, err %v, want all %d", len(got.body), got.bodyErr, len(data))
				}
				auth.wantAsked(t, 2)
			})
		}
	}
}

// A client that waits to be asked for its body is asked once somebody wants
// it, and sends it once.
func TestClientsOwnExpectationIsKept(t *testing.T) {
	for _, size := range []int{100, 5 * defaultReplayBody} {
		for _, revoked := range []bool{false, true} {
			t.Run(fmt.Sprint(size, " revoked: ", revoked), func(t *testing.T) {
				var up *upstream
				data := string(replaytest.Pattern(size))
				var asked atomic.Int32
				var start time.Time
				inTime(t, func() func() reply {
					var g *gateway
					var auth *authServer
					g, auth, up = gateAndFakes(t, "")
					g.client.Transport.(*http.Transport).ExpectContinueTimeout = patience
					g.get().want(t, http.StatusOK)
					if revoked {
						auth.revoke()
					}
					up.script(up.refuseUnread)
					req := newRequest(t, http.MethodPost, "http://"+g.addr, strings.NewReader(data))
					req.Header.Set("Expect", "100-continue")
					asked.Store(0)
					trace := &httptrace.ClientTrace{Got100Continue: func() { asked.Add(1) }}
					start = time.Now()
					return func() reply { return do(t, g.client, req.WithContext(httptrace.WithClientTrace(req.Context(), trace))) }
				})
				if took := time.Since(start); asked.Load() == 0 || took > patience/2 {
					t.Errorf("got %d interim answers and the last after %v, want to be asked for the body soon", asked.Load(), took)
				}
				got := up.last(t)
				got.wantHeader(t, "Expect", "100-continue")
				if got.body != data || got.bodyErr != nil {
					t.Errorf("got a body of %d bytes, err %v, want all %d", len(got.body), got.bodyErr, len(data))
				}
			})
		}
	}
}

// An upgrade is a GET like any other until the upstream has accepted it.
func TestRefusedUpgradeIsRepeated(t *testing.T) {
	g, auth, up := gateAndFakes(t, "")
	g.get().want(t, http.StatusOK)
	auth.revoke()
	var refused atomic.Int32
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Upgrade") != "echo" || r.Header.Get("Connection") != "Upgrade" {
			t.Errorf("got %v, want the upgrade in each attempt", r.Header)
		}
		if token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); auth.holder(token) == "" {
			refused.Add(1)
			refuse(w, http.StatusUnauthorized)
			return true
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return true
		}
		defer conn.Close()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(conn, rw)
		return true
	})
	conn, r := g.upgrade()
	for i := range 100 {
		line := fmt.Sprintln("line", i, strings.Repeat("x", 1000))
		_, _ = io.WriteString(conn, line)
		if got, err := r.ReadString('\n'); got != line {
			t.Fatalf("got %d bytes, err %v, want line %d back", len(got), err, i)
		}
	}
	if refused.Load() != 1 {
		t.Errorf("got %d refusals, want 1", refused.Load())
	}
	auth.wantAsked(t, 2)
}

// The streams of one client's connection recover each for itself.
func TestRecoveryForHTTP2Clients(t *testing.T) {
	for _, protocol := range []string{"http", "h2c"} {
		t.Run(protocol, func(t *testing.T) {
			auth := newAuthServer(t)
			up := newBothUpstream(t, auth)
			g := newGateway(t)
			g.global = "servers {\nprotocols h1 h2c\n}"
			g.load(over(protocol, up, auth, "", ""))
			transport := g.client.Transport.(*http.Transport)
			transport.Protocols = new(http.Protocols)
			transport.Protocols.SetUnencryptedHTTP2(true)
			client := &http.Client{Transport: transport, Timeout: patience}
			do(t, client, newRequest(t, http.MethodGet, "http://"+g.addr, nil)).want(t, http.StatusOK)
			auth.revoke()

			data := string(replaytest.Pattern(10_000))
			var wg sync.WaitGroup
			for i := range 40 {
				var body io.Reader
				method := http.MethodGet
				if i%2 == 1 {
					method, body = http.MethodPost, strings.NewReader(data)
				}
				if i%4 == 3 {
					body = chunked{body}
				}
				req := newRequest(t, method, "http://"+g.addr+"/"+method, body)
				wg.Go(func() {
					if r := do(t, client, req); r.err != nil || r.status != http.StatusOK {
						t.Errorf("got %d %q, err %v, want 200", r.status, r.body, r.err)
					}
				})
			}
			wg.Wait()
			auth.wantAsked(t, 2)
			// Their lines come after the answers.
			eventually(t, func() bool { return len(g.logged("handled request")) >= 41 }, "41 lines in the access log")
			if got := g.logged("handled request", `"proto":"HTTP/2.0"`); len(got) != 41 {
				t.Errorf("got %d requests over HTTP/2, want all 41", len(got))
			}
			for _, got := range up.got() {
				if got.method == http.MethodPost && got.body != data && got.bearerOf(auth) != "" {
					t.Errorf("got a body of %d bytes, err %v, want all %d", len(got.body), got.bodyErr, len(data))
				}
			}
		})
	}
}

// Trailers that the client sends when the second attempt has long begun.
func TestTrailersThatArriveAfterTheReplay(t *testing.T) {
	for _, protocol := range []string{"http", "h2c"} {
		t.Run(protocol, func(t *testing.T) {
			auth := newAuthServer(t)
			up := newBothUpstream(t, auth)
			g := startGateway(t, over(protocol, up, auth, "", ""))
			g.get().want(t, http.StatusOK)
			auth.revoke()
			replayed := make(chan string, 1)
			up.script(func(w http.ResponseWriter, r *http.Request) bool {
				if up.refuseUnread(w, r) {
					return true
				}
				start := make([]byte, 5)
				_, _ = io.ReadFull(r.Body, start)
				replayed <- string(start)
				return false
			})
			conn := g.raw()
			fmt.Fprint(conn, "POST / HTTP/1.1\r\nHost: gateway.test\r\nTrailer: X-Checksum, X-Tenant-Id\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\nstart\r\n")
			select {
			case got := <-replayed:
				if got != "start" {
					t.Errorf("got %q again, want what was sent before", got)
				}
			case <-time.After(patience):
				t.Fatal("got no second attempt, want one before the client has ended its body")
			}
			fmt.Fprint(conn, "3\r\nend\r\n0\r\nX-Checksum: abc\r\nX-Tenant-Id: client-own\r\n\r\n")
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || res.StatusCode != http.StatusOK {
				t.Fatalf("got %v, err %v, want 200", res, err)
			}
			got := up.last(t)
			if got.body != "end" || got.trailer.Get("X-Checksum") != "abc" || got.trailer.Get("X-Tenant-Id") != "" {
				t.Errorf("got %q with the trailer %v, want the rest and X-Checksum: abc only", got.body, got.trailer)
			}
		})
	}
}

// Of a request over HTTP/3, the length is unknown even without a body: then
// net/http reads from the body before it sends the header.
func TestBodyOfUnknownLengthInAGet(t *testing.T) {
	for _, size := range []int{0, 1, 10_000, defaultReplayBody / 2} {
		for _, revoked := range []bool{false, true} {
			t.Run(fmt.Sprint(size, " revoked: ", revoked), func(t *testing.T) {
				auth := newAuthServer(t)
				up := newUpstream(t, auth)
				transport := newTransport(t, expand("token_url $AUTH/token\nclient_id gateway\nclient_secret s", "$AUTH", auth.URL))
				data := string(replaytest.Pattern(size))
				send := func() *replaytest.Body {
					t.Helper()
					watched := &replaytest.Body{Reader: strings.NewReader(data)}
					req := newRequest(t, http.MethodGet, "http://"+up.addr, watched).WithContext(upstreamContext(t, up.addr))
					req.ContentLength = -1
					res, err := transport.RoundTrip(req)
					if err != nil {
						t.Fatalf("got %v, want no error", err)
					}
					defer res.Body.Close()
					if content, err := io.ReadAll(res.Body); res.StatusCode != http.StatusOK || string(content) != "accepted" {
						t.Errorf("got %d %q, err %v, want 200", res.StatusCode, content, err)
					}
					return watched
				}
				send()
				if revoked {
					auth.revoke()
				}
				up.script(up.refuseUnread)
				watched := send()
				if got := up.last(t); got.body != data || got.bodyErr != nil {
					t.Errorf("got a body of %d bytes, err %v, want all %d", len(got.body), got.bodyErr, len(data))
				}
				eventually(t, func() bool { return watched.Closes.Load() == 1 && !watched.Reading.Load() }, "the body closed once")
				if watched.Twice.Load() || watched.Late.Load() {
					t.Errorf("got the body read by two at once: %v, after its end: %v, want neither", watched.Twice.Load(), watched.Late.Load())
				}
				auth.wantAsked(t, 1+map[bool]int{true: 1}[revoked])
			})
		}
	}
}

// Only bodies that may be too long to be recorded are announced, and only where the
// config or a refusal says so: nothing else should depend on whether an upstream
// knows of interim answers.
func TestWhoAsksWhetherTheBodyIsWanted(t *testing.T) {
	auth := newAuthServer(t)
	up, other := newUpstream(t, auth), newUpstream(t, auth)
	const never = "retry_on off"
	for _, test := range []struct {
		name, method string
		length       int64
		header       string    // with a value
		settings     string    // of the transport
		refused      *upstream // that has just refused a token
		want         string
	}{
		{name: "short", method: "POST", length: 100, settings: announce},
		{name: "long", method: "POST", length: 2 * defaultReplayBody, settings: announce, want: "100-continue"},
		{name: "long, unasked", method: "POST", length: 2 * defaultReplayBody},
		{name: "long, after a refusal", method: "POST", length: 2 * defaultReplayBody, refused: up, want: "100-continue"},
		{name: "short, after a refusal", method: "POST", length: 100, refused: up},
		{name: "long, after the refusal of another upstream", method: "POST", length: 2 * defaultReplayBody, refused: other},
		{name: "long, for which there is no second attempt", method: "POST", length: 2 * defaultReplayBody, settings: never},
		{name: "longer than what is kept", method: "POST", length: 5000, settings: "replay_body 4KiB announce", want: "100-continue"},
		{name: "of which nothing is kept", method: "POST", length: 100, settings: "replay_body 0 announce", want: "100-continue"},
		{name: "of unknown length", method: "PUT", length: -1, settings: announce, want: "100-continue"},
		{name: "of unknown length, unasked", method: "PUT", length: -1},
		{name: "short, which the caller announces", method: "POST", length: 100, header: "Expect: 100-continue", want: "100-continue"},
		{name: "of unknown length, after a refusal", method: "PUT", length: -1, refused: up, want: "100-continue"},
		{name: "GET over HTTP/3", method: "GET", length: -1, settings: announce},
		{name: "gRPC", method: "POST", length: -1, header: "Content-Type: application/grpc+proto", settings: announce},
		{name: "upgrade", method: "POST", length: -1, header: "Upgrade: other", settings: announce},
	} {
		t.Run(test.name, func(t *testing.T) {
			// A client of its own, as a source that has waited in vain, on a busy machine, does not ask again.
			transport := newTransport(t, expand("token_url $AUTH/token\nclient_id $ID\nclient_secret s\n$SETTINGS",
				"$AUTH", auth.URL, "$ID", newName(), "$SETTINGS", test.settings))
			if test.refused != nil {
				transport.fallback.source.doubts(dialAddress{"tcp", test.refused.addr})
			}
			req := newRequest(t, test.method, "http://"+up.addr, bytes.NewReader(replaytest.Pattern(int(max(test.length, 100))))).
				WithContext(upstreamContext(t, up.addr))
			req.ContentLength = test.length
			if field, value, ok := strings.Cut(test.header, ": "); ok {
				req.Header.Set(field, value)
			}
			res, err := transport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			_ = res.Body.Close()
			up.last(t).wantHeader(t, "Expect", test.want)
		})
	}
}
