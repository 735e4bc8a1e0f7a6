package outboundauth

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// oddToken has the characters that %q and JSON write in another way, and looks the
// same in no two of its parts.
const oddToken = `canary"t0ken\of/the+orders-4711"`

// issuingOdd issues tokens with odd characters: canary"t0ken\…-1, and so on.
func issuingOdd() func(http.ResponseWriter, tokenRequest) bool {
	var mu sync.Mutex
	issued := 0
	return func(w http.ResponseWriter, _ tokenRequest) bool {
		mu.Lock()
		defer mu.Unlock()
		issued++
		fmt.Fprintf(w, `{"access_token":%q,"token_type":"Bearer","expires_in":3600}`, fmt.Sprintf("%s-%d", oddToken, issued))
		return true
	}
}

// wantNoOddToken fails the test if a text holds eight characters of the token in a
// row, as it is or in base64.
func wantNoOddToken(t *testing.T, where, text string) {
	t.Helper()
	forms := []string{oddToken}
	for i := range 3 {
		forms = append(forms, base64.RawStdEncoding.EncodeToString([]byte("   "[:i] + oddToken))[4:])
	}
	for _, form := range forms {
		for i := range len(form) - 8 {
			if at := strings.Index(text, form[i:i+8]); at >= 0 {
				t.Errorf("%s: got a part of the token in %.300q", where, text[max(0, at-200):])
				return
			}
		}
	}
}

// tellingAnswers are answers to a request that a client can't read, and that tell
// the token. net/http quotes most of them in its errors.
var tellingAnswers = map[string]func(token string) string{
	"status line":        func(token string) string { return "HTTP/1.1 " + token + "\r\n\r\n" },
	"protocol":           func(token string) string { return token + "\r\n\r\n" },
	"status":             func(token string) string { return "HTTP/1.1 20" + token + " OK\r\n\r\n" },
	"header":             func(token string) string { return "HTTP/1.1 200 OK\r\n" + token + "\r\n\r\n" },
	"a half in a header": func(token string) string { return "HTTP/1.1 200 OK\r\n" + token[:len(token)/2] + "\r\n\r\n" },
	"base64 in a header": func(token string) string {
		return "HTTP/1.1 200 OK\r\n" + base64.StdEncoding.EncodeToString([]byte(token)) + "\r\n\r\n"
	},
	"length":              func(token string) string { return "HTTP/1.1 200 OK\r\nContent-Length: " + token + "\r\n\r\n" },
	"encoding":            func(token string) string { return "HTTP/1.1 200 OK\r\nTransfer-Encoding: " + token + "\r\n\r\n" },
	"interim answer":      func(token string) string { return "HTTP/1.1 103 Early\r\n" + token + "\r\n\r\n" },
	"chunk":               func(token string) string { return chunkedAnswer + token + "\r\n" },
	"trailer":             func(token string) string { return chunkedAnswer + "0\r\n" + token + "\r\n\r\n" },
	"trailer in its name": func(token string) string { return chunkedAnswer + "0\r\nX " + token + ": x\r\n\r\n" },
	"two lengths": func(token string) string {
		return "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: " + token + "\r\n\r\n"
	},
}

const chunkedAnswer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

// tellingUpstream answers each request as answer says, which is given the tokens
// so far, of this request last. It returns the upstream's address.
func tellingUpstream(t *testing.T, answer func(tokens []string, r *http.Request) string) string {
	t.Helper()
	var mu sync.Mutex
	var tokens []string
	server := rawServer(t, func(conn net.Conn, r *bufio.Reader) {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, req.Body)
		mu.Lock()
		if token, ok := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer "); ok {
			tokens = append(tokens, token)
		}
		said := answer(tokens, req)
		mu.Unlock()
		_, _ = io.WriteString(conn, said)
	})
	u, err := url.Parse(server)
	if err != nil {
		t.Fatal(err)
	}
	return u.Host
}

// oddSite is a site that proxies to addr, with odd tokens.
func oddSite(t *testing.T, addr, proxy string) string {
	t.Helper()
	auth := newAuthServer(t)
	auth.script(issuingOdd())
	return expand(`reverse_proxy $UP {
		$PROXY
		transport oauth2 {
			token_url $AUTH/token
			client_id gateway
			client_secret s
			dial_timeout 1m
		}
	}
	handle_errors {
		respond "{err.status_code} {err.message} {err.trace}"
	}`, "$UP", addr, "$PROXY", proxy, "$AUTH", auth.URL)
}

func TestNothingThatAnUpstreamSaysIsInAnError(t *testing.T) {
	for name, answer := range tellingAnswers {
		t.Run(name, func(t *testing.T) {
			addr := tellingUpstream(t, func(tokens []string, _ *http.Request) string { return answer(tokens[len(tokens)-1]) })
			g := startGateway(t, oddSite(t, addr, ""))
			r := g.get()
			if (r.err == nil) != !strings.Contains(name, "chunk") && (r.err == nil) != !strings.Contains(name, "trailer") {
				t.Errorf("got err %v, want an answer, or a broken one", r.err)
			}
			wantNoOddToken(t, "the answer", r.body)
			wantNoOddToken(t, "the log", g.logs())
		})
		// The first token is not the one of the attempt that fails.
		t.Run(name+", of the token before", func(t *testing.T) {
			addr := tellingUpstream(t, func(tokens []string, _ *http.Request) string {
				if len(tokens) == 1 {
					return "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
				}
				return answer(tokens[0])
			})
			g := startGateway(t, oddSite(t, addr, ""))
			r := g.get()
			wantNoOddToken(t, "the answer", r.body)
			wantNoOddToken(t, "the log", g.logs())
		})
	}
}

// Caddy logs what is wrong with a health check, in operation.
func TestNothingThatAnUpstreamSaysToAHealthCheckIsLogged(t *testing.T) {
	redirect := func(location string) string {
		return "HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\nLocation: " + location + "\r\n\r\n"
	}
	answers := map[string]func(token, path string) string{
		"redirect that can't be read": func(token, _ string) string { return redirect("http://[" + token) },
		"redirect in a circle":        func(token, _ string) string { return redirect("/" + token) },
		"redirect, escaped":           func(token, _ string) string { return redirect("/" + url.PathEscape(token)) },
		"redirect to another host":    func(token, _ string) string { return redirect("http://elsewhere.example/" + token) },
		"redirect to no HTTP":         func(token, _ string) string { return redirect("gopher://elsewhere.example/" + token) },
		"redirect to nothing": func(token, path string) string {
			if path == "/health" {
				return redirect("/" + token)
			}
			return ""
		},
	}
	for name, answer := range tellingAnswers {
		answers[name] = func(token, _ string) string { return answer(token) }
	}
	for name, answer := range answers {
		for _, follow := range []string{"", "health_follow_redirects"} {
			if follow != "" && !strings.Contains(name, "redirect") {
				continue
			}
			t.Run(name+" "+follow, func(t *testing.T) {
				addr := tellingUpstream(t, func(tokens []string, r *http.Request) string {
					if len(tokens) == 0 {
						return "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
					}
					return answer(tokens[len(tokens)-1], r.URL.Path)
				})
				g := startGateway(t, oddSite(t, addr, "health_uri /health\nhealth_interval 20ms\nhealth_timeout 200ms\nhealth_body .\n"+follow))
				eventually(t, func() bool { return len(g.logged(`reverse_proxy.health_checker.active"`)) >= 3 }, "failed checks in the log")
				wantNoOddToken(t, "the log", g.logs())
			})
		}
	}
}

// HTTP/2 has a text of the server in the frame that ends a connection.
func TestNothingThatAnUpstreamSaysOverHTTP2IsInAnError(t *testing.T) {
	server := rawServer(t, func(conn net.Conn, r *bufio.Reader) {
		const settings, headers, goAway = 4, 1, 7
		frame := func(kind byte, payload []byte) {
			_, _ = conn.Write(append([]byte{0, 0, byte(len(payload)), kind, 0, 0, 0, 0, 0}, payload...))
		}
		_, _ = r.Discard(len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
		frame(settings, nil)
		for {
			var head [9]byte
			if _, err := io.ReadFull(r, head[:]); err != nil {
				return
			}
			_, _ = r.Discard(int(head[0])<<16 | int(head[1])<<8 | int(head[2]))
			if head[3] == headers {
				frame(goAway, append([]byte{0, 0, 0, 1, 0, 0, 0, 1}, oddToken...)) // PROTOCOL_ERROR
				return
			}
		}
	})
	u, err := url.Parse(server)
	if err != nil {
		t.Fatal(err)
	}
	g := startGateway(t, oddSite(t, "h2c://"+u.Host, ""))
	r := g.get().want(t, http.StatusBadGateway)
	wantNoOddToken(t, "the answer", r.body)
	wantNoOddToken(t, "the log", g.logs())
}

// The names in a certificate are the server's words, too.
func TestNamesInTheCertificateOfAnUpstreamAreNotShown(t *testing.T) {
	certificate := selfSigned(t, time.Now().Add(time.Hour), "canary-name.example")
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_ = conn.(*tls.Conn).Handshake()
			conn.Close()
		}
	}()
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	g := startGateway(t, oddSite(t, "https://localhost:"+port, ""))
	r := g.get().want(t, http.StatusBadGateway)
	if !strings.Contains(r.body, "certificate is not valid for localhost") || strings.Contains(r.body+g.logs(), "canary-name") {
		t.Errorf("got %q, want that the certificate is not valid for localhost, and no name in it", r.body)
	}
}

// The proxy decides by the error what it answers, and whether it tries another
// upstream.
func TestErrorOfAnUpstreamMeansTheSameToTheProxy(t *testing.T) {
	refused := reverseproxy.NewDialError(&net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)})
	leaves, leave := context.WithCancel(t.Context())
	leave()
	expired, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	for _, test := range []struct {
		name          string
		ctx           context.Context
		err           error
		dial, timeout bool
		is            error
		want          string
	}{
		{"dial", t.Context(), refused, true, false, nil, "connection refused"},
		{"dial through a proxy", t.Context(), &net.OpError{Op: "proxyconnect", Net: "tcp", Err: refused}, true, false, nil, "connection refused"},
		{"dial that takes too long", t.Context(), reverseproxy.NewDialError(os.ErrDeadlineExceeded), true, false, nil, "i/o timeout"},
		{"the client left", leaves, context.Canceled, false, false, context.Canceled, ""},
		{"the client left, wrapped", leaves, fmt.Errorf("%w: canary", context.Canceled), false, false, context.Canceled, ""},
		{"somebody else left", t.Context(), fmt.Errorf("%w: canary", context.Canceled), false, false, nil, "the connection broke"},
		{"an end of time", expired, context.DeadlineExceeded, false, true, context.DeadlineExceeded, ""},
		{"a timeout", t.Context(), &net.OpError{Op: "read", Net: "tcp", Err: os.ErrDeadlineExceeded}, false, true, nil, "read tcp: i/o timeout"},
		{"a timeout of another kind", t.Context(), timeoutError("canary"), false, true, nil, "no answer in time"},
		{"reset", t.Context(), &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", syscall.ECONNRESET)}, false, false, nil, "connection reset by peer"},
		{"an operation with a text in it", t.Context(), &net.OpError{Op: "proxyconnect", Net: "tcp", Err: errors.New("canary")}, false, false, nil, "proxyconnect tcp: failed"},
		{"the end", t.Context(), io.EOF, false, false, nil, "closed the connection"},
		{"anything else", t.Context(), errors.New("canary"), false, false, nil, "the connection broke"},
		{"of the body", t.Context(), fmt.Errorf("canary: %w", &ownError{caddyhttp.Error(413, &http.MaxBytesError{Limit: 10})}), false, false, nil, "request body too large"},
		{"of the body, to end it all", t.Context(), &ownError{http.ErrAbortHandler}, false, false, http.ErrAbortHandler, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := upstreamFailure(test.ctx, test.err)
			if _, ok := errors.AsType[reverseproxy.DialError](got); ok != test.dial {
				t.Errorf("got %v (%T), want an error of the dialer: %v", got, got, test.dial)
			}
			if netErr, ok := got.(net.Error); (ok && netErr.Timeout()) != test.timeout { //nolint:errorlint // as the proxy does
				t.Errorf("got %v (%T), want a timeout: %v", got, got, test.timeout)
			}
			if (test.is != nil && !errors.Is(got, test.is)) || (test.is == nil && errors.Is(got, context.Canceled)) {
				t.Errorf("got %v (%T), want %v", got, got, test.is)
			}
			if test.want != "" {
				wantError(t, got, test.want)
			}
			wantNoCanary(t, got)
		})
	}
}

type timeoutError string

func (e timeoutError) Error() string { return string(e) }
func (timeoutError) Timeout() bool   { return true }
func (timeoutError) Temporary() bool { return true }

// What is wrong with the request itself is told by those who read its body.
func TestErrorOfTheRequestsBodyIsTheClients(t *testing.T) {
	for _, protocol := range []string{"http", "h2c"} {
		for _, off := range []bool{false, true} {
			auth := newAuthServer(t)
			up := newBothUpstream(t, auth)
			settings := ""
			if off {
				settings = "upstream " + up.addr + " off"
			}
			g := startGateway(t, "request_body {\nmax_size 10B\n}\n"+over(protocol, up, auth, "", settings)+handleErrors)
			r := g.send(http.MethodPost, "/", struct{ io.Reader }{strings.NewReader(strings.Repeat("x", 1000))}).
				want(t, http.StatusRequestEntityTooLarge)
			if !strings.Contains(r.body, "request body too large") {
				t.Errorf("got %q over %s, off: %v, want that the body is too large", r.body, protocol, off)
			}
			g.stop()
		}
	}
}

func TestUpstreamThatIsSlowIsATimeout(t *testing.T) {
	for _, option := range []string{"response_header_timeout 50ms", "read_timeout 50ms"} {
		g, _, up := gateAndFakes(t, option)
		up.script(func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true })
		g.get().want(t, http.StatusGatewayTimeout)
		g.stop()
	}
}
