package outboundauth

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"
)

// raw opens a connection to the gateway that does not hang for ever.
func (g *gateway) raw() net.Conn {
	g.t.Helper()
	conn, err := net.Dial("tcp", g.addr)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	return conn
}

func TestTrailersReachTheUpstream(t *testing.T) {
	for _, revoked := range []bool{false, true} { // the second attempt has them too
		t.Run(fmt.Sprint("revoked: ", revoked), func(t *testing.T) {
			g, auth, up := gateAndFakes(t, "")
			g.get().want(t, http.StatusOK)
			if revoked {
				auth.revoke()
			}
			req, err := http.NewRequest(http.MethodPost, "http://"+g.addr, chunked{strings.NewReader("body")})
			if err != nil {
				t.Fatal(err)
			}
			req.Trailer = http.Header{"X-Checksum": {"abc"}}
			res, err := g.client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if res.StatusCode != http.StatusOK {
				t.Errorf("got %d, want 200", res.StatusCode)
			}
			got := up.last(t)
			if got.body != "body" || got.trailer.Get("X-Checksum") != "abc" {
				t.Errorf("got %q with the trailer %v, want the body and X-Checksum: abc", got.body, got.trailer)
			}
		})
	}
}

// What a client may not say in a header, it may not say in a trailer.
func TestIdentityInTrailersIsRemoved(t *testing.T) {
	const byKey = "\nclient_by {http.request.header.X-Key}\nclient acme\nclient default off"
	for _, test := range []struct {
		announced bool
		more      string
	}{{true, ""}, {false, ""}, {true, byKey}, {false, byKey}} {
		announced := test.announced
		t.Run(fmt.Sprintf("announced: %t, a client that is off: %t", announced, test.more != ""), func(t *testing.T) {
			g, _, up := gateAndFakes(t, "header X-User someone"+test.more)
			if test.more != "" {
				up.auth = nil // it gets no token
			}
			announcement := ""
			if announced {
				announcement = "Trailer: X-Tenant-Id, x-user, X-Checksum\r\n"
			}
			conn := g.raw()
			fmt.Fprint(conn, "POST / HTTP/1.1\r\nHost: gateway.test\r\n"+announcement+"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"+
				"4\r\nbody\r\n0\r\nX-Tenant-Id: client-own\r\nx-user: client-own\r\nX_User: client-own\r\nX-Checksum: abc\r\n\r\n")
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || res.StatusCode != http.StatusOK {
				t.Fatalf("got %v, err %v, want 200", res, err)
			}
			got := up.last(t)
			for field, values := range got.trailer {
				if field != "X-Checksum" && len(values) > 0 {
					t.Errorf("got the trailer %s: %q, want it removed", field, values)
				}
			}
			if announced && got.trailer.Get("X-Checksum") != "abc" {
				t.Errorf("got the trailers %v, want X-Checksum", got.trailer)
			}
		})
	}
}

// The client ends its body just when the request is sent again. The trailers
// arrive with that end, in a map that both attempts know.
func TestTrailersThatArriveDuringTheRetry(t *testing.T) {
	const retries = 60
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	// A token for each retry, as a source spaces out its replacements.
	var site strings.Builder
	for i := range retries {
		fmt.Fprintf(&site, "handle /%d {\n%s\n}\n", i, proxySite(up, auth, fmt.Sprint("audience a", i)))
	}
	g := startGateway(t, site.String())
	eventually(t, func() bool { return cached() == retries }, "the tokens of the warm-up")
	up.script(up.refuseEarly)
	asked := make(chan struct{})
	auth.script(func(http.ResponseWriter, tokenRequest) bool { asked <- struct{}{}; return false })
	for i := range retries {
		auth.revoke()
		conn := g.raw()
		fmt.Fprintf(conn, "POST /%d HTTP/1.1\r\nHost: gateway.test\r\nTrailer: X-Checksum\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\nstart\r\n", i)
		<-asked
		time.Sleep(time.Duration(i%20) * 100 * time.Microsecond) // any moment from here on
		fmt.Fprint(conn, "3\r\nend\r\n0\r\nX-Checksum: abc\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || res.StatusCode != http.StatusOK {
			t.Fatalf("got %v, err %v, want 200", res, err)
		}
		if got := up.last(t); got.body != "startend" || got.trailer.Get("X-Checksum") != "abc" {
			t.Errorf("got %q with the trailer %v, want the body and X-Checksum: abc", got.body, got.trailer)
		}
		conn.Close()
	}
}

func TestUpgradePassesThrough(t *testing.T) {
	g, auth, up := gateAndFakes(t, "tenant acme")
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		up.record(r)
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return true
		}
		defer conn.Close()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		for rw.Flush() == nil {
			line, err := rw.ReadString('\n')
			if err != nil {
				return true
			}
			_, _ = rw.WriteString("echo " + line)
		}
		return true
	})
	conn := g.raw()
	fmt.Fprint(conn, "GET /socket HTTP/1.1\r\nHost: gateway.test\r\nConnection: Upgrade\r\nUpgrade: echo\r\nAuthorization: Bearer client-own\r\n\r\n")
	r := bufio.NewReader(conn)
	res, err := http.ReadResponse(r, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("got %v, err %v, want 101", res, err)
	}
	for i := range 3 {
		fmt.Fprintf(conn, "line %d\n", i)
		if got, err := r.ReadString('\n'); got != fmt.Sprintf("echo line %d\n", i) {
			t.Fatalf("got %q, err %v, want the line back", got, err)
		}
	}
	got := up.last(t)
	if client := got.bearerOf(auth); client != "gateway" {
		t.Errorf("got the token of %q, want that of gateway", client)
	}
	got.wantHeader(t, "X-Tenant-Id", "acme")
}

// After an upgrade to another HTTP, a caller would send the upstream requests with an
// identity of its own.
func TestNoUpgradeToAnotherHTTP(t *testing.T) {
	for _, test := range []struct {
		upgrade string
		passes  bool
	}{
		{"h2c", false},
		{"H2C", false},
		{"h2c-14", false},
		{"h2", false},
		{"HTTP/2.0", false},
		{"http/1.1", false},
		{"TLS/1.0", false},
		{"TLS/1.2, HTTP/1.1", false},
		{"websocket, h2c", false},
		{"websocket , HTTP/2", false},
		{",, h2c", false},
		{"websocket", true},
		{"echo, x-h2c", true},
		{"SPDY/3.1", true},
	} {
		for _, off := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/off %v", test.upgrade, off), func(t *testing.T) {
				auth := newAuthServer(t)
				up := newUpstream(t, auth)
				up.script(func(w http.ResponseWriter, r *http.Request) bool {
					up.record(r)
					if r.Header.Get("Upgrade") == "" {
						return false
					}
					conn, rw, err := http.NewResponseController(w).Hijack()
					if err != nil {
						t.Error(err)
						return true
					}
					defer conn.Close()
					fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", r.Header.Get("Upgrade"))
					_ = rw.Flush()
					_, _ = io.Copy(conn, rw)
					return true
				})
				g := startGateway(t, proxySite(up, auth, map[bool]string{true: "upstream " + up.addr + " off"}[off]))
				conn := g.raw()
				fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: gateway.test\r\nConnection: Upgrade\r\nUpgrade: %s\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n", test.upgrade)
				res, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					t.Fatal(err)
				}
				want := map[bool]int{true: http.StatusSwitchingProtocols, false: http.StatusOK}[test.passes || off]
				if res.StatusCode != want {
					t.Errorf("got %d, want %d", res.StatusCode, want)
				}
				if header := up.last(t).header; want == http.StatusOK && (header["Connection"] != nil || header["Http2-Settings"] != nil) {
					t.Errorf("got %v, want nothing of the upgrade", header)
				}
				// When Caddy stops, it writes to a WebSocket while that is being copied.
				conn.Close()
				eventually(t, func() bool { return !tunnels() }, "the end of the tunnel")
			})
		}
	}
}

// tunnels reports whether the proxy has an upgraded connection.
func tunnels() bool {
	buf := make([]byte, 4<<20)
	return bytes.Contains(buf[:runtime.Stack(buf, true)], []byte("handleUpgradeResponse"))
}

// The proxy would open the tunnel: it compares a 101 with what the caller asked for.
func TestSwitchThatTheUpstreamWasNotAskedFor(t *testing.T) {
	for _, test := range []struct{ asked, switches string }{
		{"", "websocket"},
		{"", "h2c"},
		{"h2c", "h2c"},
		{"HTTP/2.0", "http/2.0"},
		{"websocket", "h2c"},
		{"websocket", ""},
	} {
		t.Run(test.asked+" and "+test.switches, func(t *testing.T) {
			g, _, up := gateAndFakes(t, "")
			up.script(func(w http.ResponseWriter, _ *http.Request) bool {
				conn, rw, err := http.NewResponseController(w).Hijack()
				if err != nil {
					t.Error(err)
					return true
				}
				defer conn.Close()
				fmt.Fprint(rw, "HTTP/1.1 101 Switching Protocols\r\n")
				if test.switches != "" {
					fmt.Fprintf(rw, "Connection: Upgrade\r\nUpgrade: %s\r\n", test.switches)
				}
				fmt.Fprint(rw, "\r\n")
				_ = rw.Flush()
				return true
			})
			conn := g.raw()
			fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: gateway.test\r\n")
			if test.asked != "" {
				fmt.Fprintf(conn, "Connection: Upgrade\r\nUpgrade: %s\r\n", test.asked)
			}
			fmt.Fprint(conn, "\r\n")
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || res.StatusCode != http.StatusBadGateway {
				t.Fatalf("got %v, err %v, want 502", res, err)
			}
			eventually(t, func() bool { return len(g.logged(errSwitched.Error())) > 0 }, "the reason in the log")
		})
	}
}

func TestStreamingResponseIsNotHeldBack(t *testing.T) {
	g, _, up := gateAndFakes(t, "")
	next := make(chan struct{})
	up.script(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 3 {
			fmt.Fprintf(w, "data: %d\n", i)
			_ = http.NewResponseController(w).Flush()
			<-next // until the client has it
		}
		return true
	})
	res, err := g.client.Get("http://" + g.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	r := bufio.NewReader(res.Body)
	for i := range 3 {
		if got, err := r.ReadString('\n'); got != fmt.Sprintf("data: %d\n", i) {
			t.Fatalf("got %q, err %v, want event %d", got, err, i)
		}
		next <- struct{}{}
	}
}

// The upstream may answer while the client is still sending.
func TestAnswerBeforeTheEndOfTheBody(t *testing.T) {
	for _, protocol := range []string{"http", "h2c"} {
		for _, first := range []string{"", "refused"} {
			t.Run(protocol+" "+first, func(t *testing.T) {
				auth := newAuthServer(t)
				up := newUnstartedUpstream(t, auth)
				up.Config.Protocols = new(http.Protocols)
				up.Config.Protocols.SetHTTP1(true)
				up.Config.Protocols.SetUnencryptedHTTP2(true)
				up.start()
				up.script(func(w http.ResponseWriter, r *http.Request) bool {
					if token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); auth.holder(token) == "" {
						_ = http.NewResponseController(w).EnableFullDuplex()
						refuse(w, http.StatusUnauthorized)
						return true
					}
					_ = http.NewResponseController(w).EnableFullDuplex()
					w.WriteHeader(http.StatusRequestEntityTooLarge)
					return true
				})
				g := startGateway(t, strings.ReplaceAll(proxySite(up, auth, announce), "reverse_proxy ", "reverse_proxy "+protocol+"://"))
				eventually(t, func() bool { return cached() == 1 }, "the token of the warm-up")
				if first != "" {
					auth.revoke()
				}
				conn := g.raw()
				fmt.Fprint(conn, "POST / HTTP/1.1\r\nHost: gateway.test\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\nstart\r\n")
				res, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					t.Fatalf("got no answer while sending: %v, want 413", err)
				}
				if res.StatusCode != http.StatusRequestEntityTooLarge {
					t.Errorf("got %d, want 413", res.StatusCode)
				}
			})
		}
	}
}

// The upstream may end a call of which the client has sent a part, and waits for the
// answer before it sends more.
func TestAnswerEndsWhileTheClientWaits(t *testing.T) {
	for _, revoked := range []bool{false, true} {
		t.Run(fmt.Sprint("revoked: ", revoked), func(t *testing.T) {
			auth := newAuthServer(t)
			up := newBothUpstream(t, auth)
			g := newGateway(t)
			g.global = "servers {\nprotocols h1 h2c\n}"
			g.load(over("h2c", up, auth, "", ""))
			transport := g.client.Transport.(*http.Transport)
			transport.Protocols = new(http.Protocols)
			transport.Protocols.SetUnencryptedHTTP2(true)
			g.get().want(t, http.StatusOK)
			if revoked {
				auth.revoke()
			}
			up.script(func(w http.ResponseWriter, r *http.Request) bool {
				if up.refuseUnread(w, r) {
					return true
				}
				_, _ = io.ReadFull(r.Body, make([]byte, 5))
				fmt.Fprint(w, "one ")
				_ = http.NewResponseController(w).Flush()
				fmt.Fprint(w, "two")
				return true
			})
			source, sink := io.Pipe()
			defer source.Close()
			go func() { _, _ = io.WriteString(sink, "start") }()
			req := newRequest(t, http.MethodPost, "http://"+g.addr, source)
			answer := make(chan reply, 1)
			go func() { answer <- do(t, g.client, req) }()
			select {
			case r := <-answer:
				if r.want(t, http.StatusOK); r.body != "one two" {
					t.Errorf("got %q, want all of the answer", r.body)
				}
			case <-time.After(patience):
				t.Errorf("got no end of the answer in %v, want one while the client waits", patience)
			}
		})
	}
}

// What both ends stream at the same time.
func TestBodyIsPassedOnAsItComes(t *testing.T) {
	g, _, up := gateAndFakes(t, "")
	got := make(chan string)
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		buf := make([]byte, 100)
		for {
			n, err := r.Body.Read(buf)
			if n > 0 {
				got <- string(buf[:n])
			}
			if err != nil {
				return true
			}
		}
	})
	source, sink := io.Pipe()
	answer := make(chan reply, 1)
	go func() { answer <- g.send(http.MethodPost, "/", source) }()
	for i := range 3 {
		part := fmt.Sprint("part ", i)
		_, _ = io.WriteString(sink, part)
		if got := <-got; got != part {
			t.Fatalf("got %q, want %q before the next is sent", got, part)
		}
	}
	sink.Close()
	(<-answer).want(t, http.StatusOK)
}
