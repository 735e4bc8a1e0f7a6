package outboundauth

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

// message is a message of gRPC: a flag, the length and the content.
const message = "\x00\x00\x00\x00\x05hello"

// endCall answers a call without a body: its status is in the header.
func endCall(w http.ResponseWriter, r *http.Request, contentType, status string) {
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Grpc-Status", status)
	h.Set("Grpc-Message", "of the upstream")
	if r.ProtoMajor > 1 {
		h["Content-Length"] = nil // as servers of gRPC send none
	}
	w.WriteHeader(http.StatusOK)
}

// answerCall answers a call with what it was sent. Its status comes behind that.
func answerCall(w http.ResponseWriter, r *http.Request, contentType, status string) {
	w.Header().Set("Content-Type", contentType)
	_ = http.NewResponseController(w).EnableFullDuplex() // as HTTP/2 is
	w.WriteHeader(http.StatusOK)
	for got := make([]byte, len(message)); ; {
		if _, err := io.ReadFull(r.Body, got); err != nil {
			break
		}
		_, _ = w.Write(got)
		_ = http.NewResponseController(w).Flush()
	}
	w.Header().Set(http.TrailerPrefix+"Grpc-Status", status)
}

// accepts reports whether a request has a token that is live.
func (u *upstream) accepts(r *http.Request) bool {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	return u.auth.holder(token) != ""
}

// callGateway runs a gateway that is sent calls over HTTP/2, and sends them on over this
// protocol.
func callGateway(t *testing.T, protocol, settings string) (*gateway, *authServer, *upstream) {
	t.Helper()
	auth := newAuthServer(t)
	up := newBothUpstream(t, auth)
	g := newGateway(t)
	g.global = "servers {\nprotocols h1 h2c\n}"
	g.load(over(protocol, up, auth, "", settings))
	transport := g.client.Transport.(*http.Transport)
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetUnencryptedHTTP2(true)
	return g, auth, up
}

// call calls a method. It returns what came back, and the status in the header or behind
// the body.
func (g *gateway) call(contentType string, body io.Reader) (content, inHeader, behind string) {
	g.t.Helper()
	req := newRequest(g.t, http.MethodPost, "http://"+g.addr+"/orders.Orders/Get", chunked{body})
	req.Header.Set("Content-Type", contentType)
	req.Header.Set("TE", "trailers")
	res, err := g.client.Do(req)
	if err != nil {
		g.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		g.t.Errorf("got %d, err %v, want 200", res.StatusCode, err)
	}
	return string(b), res.Header.Get("Grpc-Status"), res.Trailer.Get("Grpc-Status")
}

func TestRefusedCallIsSentAgain(t *testing.T) {
	for _, test := range []struct {
		protocol, settings, contentType string
		status                          string // of the refusal
		inHeader, behind                string // that the client gets
		asked                           int
	}{
		{"h2c", "", "application/grpc", "16", "", "0", 2},
		{"h2c", "", "application/grpc+proto", "16", "", "0", 2},
		{"h2c", "", "application/grpc;charset=utf-8", "16", "", "0", 2},
		{"h2c", "", "application/grpc-web+proto", "16", "", "0", 2},
		{"http", "", "application/grpc-web+proto", "16", "", "0", 2},
		{"http", "", "application/grpc-web-text", "16", "", "0", 2},
		{"h2c", "retry_on grpc", "application/grpc", "16", "", "0", 2},
		{"h2c", "retry_on 403 grpc", "application/grpc", "16", "", "0", 2},
		{"h2c", "retry_on 401", "application/grpc", "16", "16", "", 1},
		{"h2c", "retry_on off", "application/grpc", "16", "16", "", 1},
		{"h2c", "", "application/grpc", "7", "7", "", 1},
		{"h2c", "", "application/grpc", "160", "160", "", 1},
		{"h2c", "", "application/grpc", "", "", "", 1},
		{"h2c", "", "application/json", "16", "16", "", 1},
		{"http", "", "text/plain", "16", "16", "", 1},
	} {
		t.Run(fmt.Sprint(test.protocol, " ", test.settings, " ", test.contentType, " ", test.status), func(t *testing.T) {
			g, auth, up := callGateway(t, test.protocol, test.settings)
			refused := 0
			up.script(func(w http.ResponseWriter, r *http.Request) bool {
				if up.accepts(r) {
					answerCall(w, r, test.contentType, "0")
					return true
				}
				refused++ // one after the other
				_, _ = io.Copy(io.Discard, r.Body)
				endCall(w, r, test.contentType, test.status)
				return true
			})
			if content, inHeader, behind := g.call(test.contentType, strings.NewReader(message+message)); content != message+message || inHeader != "" || behind != "0" {
				t.Fatalf("got %q, status %q and %q, want the messages and 0 behind them", content, inHeader, behind)
			}
			auth.revoke()
			content, inHeader, behind := g.call(test.contentType, strings.NewReader(message+message))
			if inHeader != test.inHeader || behind != test.behind || (content == message+message) != (behind == "0") {
				t.Errorf("got %q, status %q and %q, want %q and %q", content, inHeader, behind, test.inHeader, test.behind)
			}
			if refused != 1 {
				t.Errorf("got %d refusals, want 1", refused)
			}
			auth.wantAsked(t, test.asked)
		})
	}
}

// It is too late for the call itself.
func TestRefusalInTrailersIsForTheNextCall(t *testing.T) {
	g, auth, up := callGateway(t, "h2c", "")
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		status := "0"
		if !up.accepts(r) {
			status = "16"
		}
		answerCall(w, r, "application/grpc", status)
		return true
	})
	call := func(want string) {
		t.Helper()
		if content, _, behind := g.call("application/grpc", strings.NewReader(message)); content != message || behind != want {
			t.Errorf("got %q and status %q, want the message and %s", content, behind, want)
		}
	}
	call("0")
	auth.revoke()
	call("16")
	eventually(t, func() bool { return len(auth.asked()) == 2 }, "another token")
	eventually(t, func() bool { return theSource(t).Peek().value != "canary-token-1-of-gateway" }, "that it is used")
	call("0")
	auth.wantAsked(t, 2)
}

// The client has sent a part of a stream, and waits.
func TestRefusedStreamIsSentAgain(t *testing.T) {
	g, auth, up := callGateway(t, "h2c", "")
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		if up.accepts(r) {
			answerCall(w, r, "application/grpc", "0")
		} else {
			endCall(w, r, "application/grpc", "16")
		}
		return true
	})
	g.call("application/grpc", strings.NewReader(message))
	auth.revoke()
	source, sink := io.Pipe()
	go func() { _, _ = io.WriteString(sink, message) }()
	req := newRequest(t, http.MethodPost, "http://"+g.addr, source)
	req.Header.Set("Content-Type", "application/grpc")
	res, err := g.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	for range 3 {
		got := make([]byte, len(message))
		if _, err := io.ReadFull(res.Body, got); err != nil || string(got) != message {
			t.Fatalf("got %q, err %v, want each message as it is sent", got, err)
		}
		_, _ = io.WriteString(sink, message)
	}
	sink.Close()
	_, _ = io.Copy(io.Discard, res.Body)
	if got := res.Trailer.Get("Grpc-Status"); got != "0" {
		t.Errorf("got the status %q, want 0", got)
	}
	auth.wantAsked(t, 2)
}

// A call whose new token is refused too ends with the upstream's answer.
func TestCallIsRefusedAgain(t *testing.T) {
	g, auth, up := callGateway(t, "h2c", "")
	n := 0
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		n++ // one after the other
		_, _ = io.Copy(io.Discard, r.Body)
		endCall(w, r, "application/grpc", "16")
		return true
	})
	if content, inHeader, _ := g.call("application/grpc", strings.NewReader(message)); content != "" || inHeader != "16" {
		t.Errorf("got %q, status %q, want 16 in the header", content, inHeader)
	}
	if n != 2 {
		t.Errorf("got %d attempts, want 2", n)
	}
	auth.wantAsked(t, 2)
}

// A call that can't be sent again still gets the next one a new token.
func TestRefusedCallThatIsTooLong(t *testing.T) {
	g, auth, up := callGateway(t, "h2c", "")
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		if up.accepts(r) {
			answerCall(w, r, "application/grpc", "0")
			return true
		}
		_, _ = io.Copy(io.Discard, r.Body)
		endCall(w, r, "application/grpc", "16")
		return true
	})
	g.call("application/grpc", strings.NewReader(message))
	auth.revoke()
	long := strings.Repeat(message, 2*defaultReplayBody/len(message))
	if content, inHeader, _ := g.call("application/grpc", strings.NewReader(long)); content != "" || inHeader != "16" {
		t.Errorf("got %d bytes, status %q, want 16 in the header", len(content), inHeader)
	}
	if content, _, behind := g.call("application/grpc", strings.NewReader(long)); content != long || behind != "0" {
		t.Errorf("got %d bytes, status %q behind them, want all and 0", len(content), behind)
	}
	auth.wantAsked(t, 2)
}

func TestRefusedHealthCheckOfGRPC(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	var refused, accepted int
	up.script(func(w http.ResponseWriter, r *http.Request) bool {
		up.mu.Lock()
		defer up.mu.Unlock()
		if up.accepts(r) {
			accepted++
			endCall(w, r, "application/grpc", "0")
		} else {
			refused++
			endCall(w, r, "application/grpc", "16")
		}
		return true
	})
	startGateway(t, expand(checkedSite, "$UP", up.addr, "$AUTH", auth.URL, "$PROXY", ""))
	count := func() (int, int) {
		up.mu.Lock()
		defer up.mu.Unlock()
		return refused, accepted
	}
	eventually(t, func() bool { _, accepted := count(); return accepted > 0 }, "a check that is accepted")
	auth.revoke()
	eventually(t, func() bool { refused, _ := count(); return refused > 0 }, "a check that is refused")
	_, before := count()
	eventually(t, func() bool { _, accepted := count(); return accepted > before }, "a check with another token")
	auth.wantAsked(t, 2)
}

// What an upstream answers to a call, as it is read.
func TestWatchedCalls(t *testing.T) {
	const ok, no, unknown = "accepted", "refused", ""
	grpc := func(w http.ResponseWriter) { w.Header().Set("Content-Type", "application/grpc+proto") }
	behind := func(w http.ResponseWriter, status string) { w.Header().Set(http.TrailerPrefix+"Grpc-Status", status) }
	write := func(w http.ResponseWriter) {
		_, _ = io.WriteString(w, message)
		_ = http.NewResponseController(w).Flush()
	}
	for _, test := range []struct {
		name   string
		answer func(http.ResponseWriter)
		want   string
	}{
		{"refused", func(w http.ResponseWriter) { grpc(w); write(w); behind(w, "16") }, no},
		{"refused in announced trailers", func(w http.ResponseWriter) {
			grpc(w)
			w.Header().Set("Trailer", "Grpc-Status")
			write(w)
			w.Header().Set("Grpc-Status", "16")
		}, no},
		{"refused behind an empty body", func(w http.ResponseWriter) { grpc(w); _ = http.NewResponseController(w).Flush(); behind(w, "16") }, no},
		{"refused before an empty body", func(w http.ResponseWriter) {
			grpc(w)
			w.Header().Set("Grpc-Status", "16")
			_ = http.NewResponseController(w).Flush()
		}, no},
		{"refused, of known length", func(w http.ResponseWriter) {
			grpc(w)
			w.Header().Set("Content-Length", fmt.Sprint(len(message)))
			w.Header().Set("Grpc-Status", "16")
			write(w)
		}, no},
		{"accepted", func(w http.ResponseWriter) { grpc(w); write(w); behind(w, "0") }, ok},
		{"another status", func(w http.ResponseWriter) { grpc(w); write(w); behind(w, "7") }, ok},
		{"the trailers count", func(w http.ResponseWriter) {
			grpc(w)
			w.Header().Set("Grpc-Status", "16")
			write(w)
			behind(w, "0")
		}, ok},
		{"no status", func(w http.ResponseWriter) { grpc(w); write(w) }, unknown},
		{"the status of gRPC-Web", func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", "application/grpc-web+proto")
			write(w)
			_, _ = io.WriteString(w, "\x80\x00\x00\x00\x10grpc-status:16\r\n")
		}, unknown},
		{"no call", func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", "application/json")
			write(w)
			behind(w, "16")
		}, unknown},
		{"broken off", func(w http.ResponseWriter) { grpc(w); write(w); panic(http.ErrAbortHandler) }, unknown},
		{"without a body", func(w http.ResponseWriter) { grpc(w); w.Header().Set("Grpc-Status", "16") }, unknown}, // see refusedCall
	} {
		for _, protocol := range []int{1, 2} {
			for _, read := range []string{"to the end", "one byte", "nothing"} {
				t.Run(fmt.Sprint(test.name, " over HTTP/", protocol, ", read ", read), func(t *testing.T) {
					up := newBothUpstream(t, nil)
					up.Config.ErrorLog = discardLog
					up.script(func(w http.ResponseWriter, _ *http.Request) bool { test.answer(w); return true })
					transport := &http.Transport{Protocols: new(http.Protocols)}
					transport.Protocols.SetHTTP1(protocol == 1)
					transport.Protocols.SetUnencryptedHTTP2(protocol == 2)
					defer transport.CloseIdleConnections()
					res, err := transport.RoundTrip(newRequest(t, http.MethodPost, "http://"+up.addr, strings.NewReader(message)))
					if err != nil {
						t.Fatal(err)
					}
					res.Body = foreignBody{res.Body, t.Context()}
					var got []string
					watchCall(res, func(refused bool) { got = append(got, map[bool]string{true: no, false: ok}[refused]) })
					want := unknown
					switch read {
					case "to the end":
						want = test.want
						_, _ = io.ReadAll(res.Body)
						_, _ = res.Body.Read(make([]byte, 1)) // the end again
					case "one byte":
						if _, err := res.Body.Read(make([]byte, 1)); err == io.EOF { // an empty body
							want = test.want
						}
					}
					if err := res.Body.Close(); err != nil {
						t.Error(err)
					}
					if strings.Join(got, " ") != want {
						t.Errorf("got %q, want %q", got, want)
					}
				})
			}
		}
	}
}
