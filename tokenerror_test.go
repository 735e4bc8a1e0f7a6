package outboundauth

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

const wwwAuthenticate = `Basic realm="` + canarySecret + `"`

// refusals are answers with a status that is not 200.
var refusals = []struct {
	name      string
	status    int
	header    map[string]string
	body      string
	code      string
	permanent bool
	want      string // in the error
}{
	{name: "moved", status: 301, body: canaryToken, code: codeHTTPStatus, permanent: true, want: "set token_url to where it leads, if a token endpoint is there"},

	{name: "invalid_request", status: 400, body: `{"error":"invalid_request"}`, code: "invalid_request", permanent: true, want: "(check scopes and auth_method)"},
	{name: "invalid_client", status: 400, body: `{"error":"invalid_client"}`, code: "invalid_client", permanent: true, want: "(check client_id, client_secret and auth_method)"},
	{name: "invalid_grant", status: 400, body: `{"error":"invalid_grant"}`, code: "invalid_grant", permanent: true},
	{name: "unauthorized_client", status: 400, body: `{"error":"unauthorized_client"}`, code: "unauthorized_client", permanent: true, want: "(allow this client the client_credentials grant"},
	{name: "unsupported_grant_type", status: 400, body: `{"error":"unsupported_grant_type"}`, code: "unsupported_grant_type", permanent: true, want: "(check grant_type and token_url"},
	{name: "invalid_scope", status: 400, body: `{"error":"invalid_scope","error_description":"unknown: x"}`, code: "invalid_scope", permanent: true, want: "status 400: invalid_scope: unknown: x (set scopes: the server wants some)"},
	{name: "invalid_target", status: 400, body: `{"error":"invalid_target"}`, code: "invalid_target", permanent: true, want: "(check "},
	{name: "use_dpop_nonce", status: 400, header: map[string]string{"DPoP-Nonce": canaryToken}, body: `{"error":"use_dpop_nonce"}`, code: "use_dpop_nonce", permanent: true},
	{name: "temporarily_unavailable", status: 400, body: `{"error":"temporarily_unavailable"}`, code: "temporarily_unavailable"},
	{name: "server_error", status: 400, body: `{"error":"server_error"}`, code: "server_error"},
	{name: "slow_down", status: 400, body: `{"error":"slow_down"}`, code: "slow_down"},
	{name: "code of its own", status: 400, body: `{"error":"AADSTS7000215"}`, code: "AADSTS7000215", permanent: true},
	{name: "code that is a sentence", status: 400, body: `{"error":"an \"error\"\r\nof\ttwo\\lines ü"}`, code: "an erroroftwolines", permanent: true},
	{name: "code without end", status: 400, body: `{"error":"` + strings.Repeat("x", 5000) + `"}`, code: strings.Repeat("x", 64) + "…", permanent: true},
	{name: "code an object", status: 400, body: `{"error":{"code":{"a":"` + canaryToken + `"}}}`, code: codeHTTPStatus, permanent: true},
	{name: "description of many lines", status: 400, body: `{"error":"invalid_request","error_description":" a\r\nb\u0000\u001b[31m\u0085\u2028c "}`, code: "invalid_request", permanent: true, want: ": a  b  [31m  c ("},
	{name: "description without end", status: 400, body: `{"error":"invalid_request","error_description":"` + strings.Repeat("ü", 5000) + `"}`, code: "invalid_request", permanent: true, want: "ü… ("},
	{name: "description an object", status: 400, body: `{"error":"invalid_request","error_description":{"a":"` + canaryToken + `"}}`, code: "invalid_request", permanent: true},
	{name: "errorDescription", status: 400, body: `{"error":"x","errorDescription":"in camel case"}`, code: "x", permanent: true, want: ": x: in camel case"},
	{name: "message", status: 400, body: `{"message":"in words"}`, code: codeHTTPStatus, permanent: true, want: "http_status: in words"},
	{name: "garbage", status: 400, body: canarySecret, code: codeHTTPStatus, permanent: true},

	{name: "401", status: 401, header: map[string]string{"WWW-Authenticate": wwwAuthenticate}, body: `{"error":"invalid_client","error_description":"Bad credentials"}`, code: "invalid_client", permanent: true, want: "status 401: invalid_client: Bad credentials (check"},
	{name: "401 without a body", status: 401, header: map[string]string{"WWW-Authenticate": wwwAuthenticate}, code: codeHTTPStatus, permanent: true, want: "status 401"},
	{name: "403 without a body", status: 403, code: codeHTTPStatus, permanent: true, want: "status 403"},
	{name: "404 in HTML", status: 404, body: "<h1>Not found: " + canaryToken + "</h1>", code: codeHTTPStatus, permanent: true, want: "status 404"},
	{name: "405", status: 405, code: codeHTTPStatus, permanent: true},
	{name: "408", status: 408, code: codeHTTPStatus},
	{name: "415 with a token", status: 415, body: `{"access_token":"` + canaryToken + `"}`, code: codeHTTPStatus, permanent: true},
	{name: "425", status: 425, code: codeHTTPStatus},
	{name: "429", status: 429, header: map[string]string{"Retry-After": "120"}, code: codeHTTPStatus},
	{name: "429 with an error", status: 429, body: `{"error":"invalid_client"}`, code: "invalid_client"},
	{name: "500 in HTML", status: 500, body: "<h1>" + canarySecret + "</h1>", code: codeHTTPStatus, want: "status 500"},
	{name: "500 with an error", status: 500, body: `{"error":"invalid_client"}`, code: "invalid_client"},
	{name: "502 in HTML", status: 502, body: "<h1>Bad Gateway</h1>", code: codeHTTPStatus, want: "status 502"},
	{name: "503", status: 503, header: map[string]string{"Retry-After": "120"}, body: "<h1>Maintenance</h1>", code: codeHTTPStatus, want: "status 503"},
	{name: "511", status: 511, body: "<h1>Portal</h1>", code: codeHTTPStatus},
	{name: "999", status: 999, code: codeHTTPStatus},

	// What the client sent comes back.
	{name: "code repeats the secret", status: 400, body: `{"error":"` + canarySecret + `"}`, code: codeHTTPStatus, permanent: true},
	{name: "code repeats the secret in pieces", status: 400, body: `{"error":"canary\u0007-s3cret"}`, code: codeHTTPStatus, permanent: true},
	{name: "description repeats the secret", status: 401, body: `{"error":"invalid_client","error_description":"not the secret: ` + canarySecret + `"}`, code: "invalid_client", permanent: true, want: "not shown"},
	{name: "description repeats the header", status: 401, body: `{"error":"invalid_client","error_description":"Basic aWQ6Y2FuYXJ5LXMzY3JldA=="}`, code: "invalid_client", permanent: true, want: "not shown"},
	{name: "message repeats the secret", status: 500, body: `{"message":"` + canarySecret + `"}`, code: codeHTTPStatus, want: "not shown"},
	{name: "description repeats the token", status: 400, body: `{"error":"invalid_scope","access_token":"` + canaryToken + `","error_description":"issued ` + canaryToken + ` without scope"}`, code: "invalid_scope", permanent: true},
}

func TestRefusalIsClassified(t *testing.T) {
	for _, test := range refusals {
		t.Run(test.name, func(t *testing.T) {
			server := &wire{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				for field, value := range test.header {
					w.Header().Set(field, value)
				}
				w.WriteHeader(test.status)
				_, _ = io.WriteString(w, test.body)
			})}
			cl := newTestClient(t, canaryCredentials("https://auth.example.com/token"), server)
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			got := wantTokenError(t, err, test.code, test.permanent)
			if got.Status != test.status {
				t.Errorf("Status = %d, want %d", got.Status, test.status)
			}
			if !strings.HasPrefix(err.Error(), "token endpoint auth.example.com: ") || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error = %v, want the endpoint and %q in it", err, test.want)
			}
			if want := parseRetryAfter(http.Header{"Retry-After": {test.header["Retry-After"]}}, time.Now()); got.RetryAfter() != want || retryAfter(err) != want {
				t.Errorf("RetryAfter() = %v, want %v", got.RetryAfter(), want)
			}
			wantNoCanary(t, err)
		})
	}
}

func TestRetryAfterDateIsHonoured(t *testing.T) {
	server := &wire{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", time.Now().Add(2*time.Minute).UTC().Format(http.TimeFormat))
		w.WriteHeader(http.StatusServiceUnavailable)
	})}
	cl := newTestClient(t, canaryCredentials("https://auth.example.com/token"), server)
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	got := wantTokenError(t, err, codeHTTPStatus, false)
	if d := got.RetryAfter(); d < 110*time.Second || d > 2*time.Minute {
		t.Errorf("RetryAfter() = %v, want about 2m", d)
	}
}

func TestEchoedParametersAreNotShown(t *testing.T) {
	t.Setenv("TEST_ECHO", "canary/+ü key")
	param := Credentials{Params: map[string]string{"extra": "{env.TEST_ECHO}"}}
	header := Credentials{TokenRequestHeaders: map[string]string{"X-Key": "Key {env.TEST_ECHO}"}}
	for _, test := range []struct {
		name string
		c    Credentials
		echo string
	}{
		{"param", param, "canary/+ü key"},
		{"param, as in the form", param, "canary%2F%2B%C3%BC+key"},
		{"token_request_header", header, "Key canary/+ü key"},
		{"token_request_header, without its scheme", header, "canary/+ü key"},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.c.TokenURL, test.c.ClientID, test.c.ClientSecret = "https://auth.example.com/token", "id", canarySecret
			cl := newTestClient(t, test.c, answering(http.StatusBadRequest,
				`{"error":"invalid_request","error_description":"cannot read `+test.echo+`"}`))
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			wantTokenError(t, err, "invalid_request", true)
			wantNoCanary(t, err)
		})
	}
}

// rawServer serves connections by hand and returns the URL of the server.
func rawServer(t *testing.T, serve func(net.Conn, *bufio.Reader)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				serve(conn, bufio.NewReader(conn))
			}()
		}
	}()
	return "http://" + l.Addr().String() + "/token"
}

// saying returns a server that reads the request and says something.
func saying(t *testing.T, answer string) string {
	t.Helper()
	return rawServer(t, func(conn net.Conn, r *bufio.Reader) {
		if req, err := http.ReadRequest(r); err == nil {
			_, _ = io.Copy(io.Discard, req.Body)
		}
		_, _ = io.WriteString(conn, answer)
	})
}

func TestBrokenAnswerIsTransient(t *testing.T) {
	var bomb bytes.Buffer
	zip := gzip.NewWriter(&bomb)
	_, _ = zip.Write(bytes.Repeat([]byte(" "), 64<<20))
	_ = zip.Close()

	const ok = "HTTP/1.1 200 OK\r\n"
	for _, test := range []struct {
		name   string
		answer string
		code   string
		want   string // in the error
	}{
		{"nothing", "", codeNetwork, "closed the connection"},
		{"not HTTP", "SSH-2.0-" + canarySecret + "\r\n" + canaryToken, codeNetwork, "not HTTP"},
		{"status line that repeats the secret", "HTTP/1.1 " + canarySecret + "\r\n\r\n", codeNetwork, "not HTTP"},
		{"reason that repeats the secret", "HTTP/1.1 500 " + canarySecret + "\r\nContent-Length: 0\r\n\r\n", codeHTTPStatus, "status 500"},
		{"header that repeats the secret", ok + canarySecret + " " + canaryToken + "\r\n\r\n", codeNetwork, "not HTTP"},
		{"length that repeats the secret", ok + "Content-Length: " + canarySecret + "\r\n\r\n", codeNetwork, "not HTTP"},
		{"encoding that repeats the secret", ok + "Transfer-Encoding: " + canarySecret + "\r\n\r\n", codeNetwork, "not HTTP"},
		{"chunk that repeats the secret", ok + "Transfer-Encoding: chunked\r\n\r\n" + canarySecret + "\r\n", codeNetwork, "not HTTP"},
		{"trailer that repeats the secret", ok + "Transfer-Encoding: chunked\r\n\r\n0\r\n" + canarySecret + "\r\n\r\n", codeNetwork, "not HTTP"},
		{"endless header", ok + "X: " + strings.Repeat(canarySecret, 1<<20), codeNetwork, ""},
		{"cut off in the header", ok + "X-Secret: " + canarySecret, codeNetwork, "closed the connection"},
		{"cut off in the body", ok + "Content-Length: 999\r\n\r\n" + `{"access_token":"` + canaryToken + `"}`, codeNetwork, "before its answer was complete"},
		{"gzip that is none", ok + "Content-Encoding: gzip\r\n\r\n" + canaryToken, codeNetwork, "not HTTP"},
		{"gzip bomb", ok + "Content-Encoding: gzip\r\n\r\n" + bomb.String(), codeInvalidResponse, "larger than"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cl := newTestClient(t, canaryCredentials(saying(t, test.answer)), networkTransport(t))
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			wantTokenError(t, err, test.code, false)
			if err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("error = %v, want %q in it", err, test.want)
			}
			wantNoCanary(t, err)
		})
	}
}

// endlessAnswer is an answer, and its body, that never ends.
type endlessAnswer struct {
	read   int
	closed bool
}

func (a *endlessAnswer) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Body: a}, nil
}

func (a *endlessAnswer) Read(p []byte) (int, error) {
	a.read += len(p)
	return copy(p, bytes.Repeat([]byte("x"), len(p))), nil
}

func (a *endlessAnswer) Close() error {
	a.closed = true
	return nil
}

func TestEndlessAnswerIsCutOff(t *testing.T) {
	server := new(endlessAnswer)
	cl := newTestClient(t, canaryCredentials("https://auth.example.com/token"), server)
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	wantTokenError(t, err, codeInvalidResponse, false)
	if server.read > maxAnswer+1 || !server.closed {
		t.Errorf("read %d bytes, closed: %v, want %d at most and true", server.read, server.closed, maxAnswer+1)
	}
}

func TestResetConnectionIsNetworkError(t *testing.T) {
	url := rawServer(t, func(conn net.Conn, r *bufio.Reader) {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, req.Body)
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"+canaryToken)
		time.Sleep(20 * time.Millisecond) // so that the client is in the body
		_ = conn.(*net.TCPConn).SetLinger(0)
	})
	cl := newTestClient(t, canaryCredentials(url), networkTransport(t))
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	wantTokenError(t, err, codeNetwork, false)
	if err != nil && !strings.Contains(err.Error(), "connection reset by peer") {
		t.Errorf("error = %v, want it to say that the connection was reset", err)
	}
	wantNoCanary(t, err)
}

func TestUnreachableServerIsNamed(t *testing.T) {
	cl := newTestClient(t, canaryCredentials("http://"+heldAddress(t)), networkTransport(t))
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	wantTokenError(t, err, codeNetwork, false)
	if err != nil && !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("error = %v, want it to say that the connection was refused", err)
	}
	wantNoCanary(t, err)
}

// selfSigned returns a certificate for the names.
func selfSigned(t *testing.T, expires time.Time, names ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: names, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: expires.Add(-time.Hour), NotAfter: expires,
	}, &x509.Certificate{SerialNumber: big.NewInt(1)}, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestTLSFailureSaysWhatToChange(t *testing.T) {
	later := time.Now().Add(time.Hour)
	longNames := make([]string, 50)
	for i := range longNames {
		longNames[i] = strings.Repeat("x", 50) + ".example"
	}
	for _, test := range []struct {
		name   string
		config *tls.Config // nil: no TLS
		host   string
		code   string
		want   string
	}{
		{"plain port", nil, "127.0.0.1", codeNetwork, "does not speak TLS there (check the scheme and port of token_url or issuer)"},
		{"unknown CA", &tls.Config{Certificates: []tls.Certificate{selfSigned(t, later)}}, "127.0.0.1", codeNetwork, "unknown authority (name its CA with tls_trust_pool in token_transport)"},
		{"expired", &tls.Config{Certificates: []tls.Certificate{selfSigned(t, time.Now().Add(-time.Hour))}}, "127.0.0.1", codeNetwork, "expired"},
		{"another name", &tls.Config{Certificates: []tls.Certificate{selfSigned(t, later, "other.example")}}, "localhost", codeNetwork, "the server's certificate is not valid for localhost"},
		{"names that would break a log line", &tls.Config{Certificates: []tls.Certificate{selfSigned(t, later, "a\r\nb\x1b[31m")}}, "localhost", codeNetwork, "not valid for localhost"},
		{"names without end", &tls.Config{Certificates: []tls.Certificate{selfSigned(t, later, longNames...)}}, "localhost", codeNetwork, "not valid for localhost"},
		{"a name that is the secret", &tls.Config{Certificates: []tls.Certificate{selfSigned(t, later, canarySecret)}}, "localhost", codeNetwork, "not valid for localhost"},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				t.Error("the request was sent, want the handshake to fail")
			}))
			server.Config.ErrorLog = log.New(io.Discard, "", 0)
			if test.config == nil {
				server.Start()
			} else {
				server.TLS = test.config
				server.StartTLS()
			}
			defer server.Close()
			_, port, err := net.SplitHostPort(server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			cl := newTestClient(t, canaryCredentials("https://"+net.JoinHostPort(test.host, port)), networkTransport(t))
			_, err = cl.endpoint.locateAndRequest(t.Context(), nil)
			wantTokenError(t, err, test.code, false)
			if err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("error = %v, want %q in it", err, test.want)
			}
			wantNoCanary(t, err)
		})
	}
}

func TestPlainRequestToTLSPortIsRefused(t *testing.T) {
	server := httptest.NewTLSServer(http.NotFoundHandler())
	defer server.Close()
	cl := newTestClient(t, canaryCredentials("http://"+server.Listener.Addr().String()), networkTransport(t))
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	wantTokenError(t, err, codeHTTPStatus, true)
	wantNoCanary(t, err)
}

// TestNetworkErrorsAreTold has the errors of the transport that are too slow
// or too dependent on the machine to provoke.
func TestNetworkErrorsAreTold(t *testing.T) {
	refused := &net.OpError{Op: "dial", Net: "tcp", Addr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 443}, Err: os.NewSyscallError("connect", errors.New("no route to host"))}
	lookup := &net.DNSError{Err: "no such host", Name: "auth.example.com", IsNotFound: true}
	dialTimeout := &net.OpError{Op: "dial", Net: "tcp", Err: os.ErrDeadlineExceeded}
	expired, cancel := context.WithTimeout(context.Background(), 0)
	defer cancel()
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for _, test := range []struct {
		name string
		ctx  context.Context
		err  error
		code string
		want string
	}{
		{"dial", t.Context(), refused, codeNetwork, "dial tcp 192.0.2.1:443: connect: no route to host"},
		{"dial, as Caddy wraps it", t.Context(), reverseproxy.NewDialError(refused), codeNetwork, "dial tcp 192.0.2.1:443: connect: no route to host"},
		{"DNS", t.Context(), &net.OpError{Op: "dial", Net: "tcp", Err: lookup}, codeNetwork, "lookup auth.example.com: no such host"},
		{"DNS, as Caddy wraps it", t.Context(), reverseproxy.NewDialError(&net.OpError{Op: "dial", Net: "tcp", Err: lookup}), codeNetwork, "lookup auth.example.com: no such host"},
		{"dial timeout", t.Context(), dialTimeout, codeTimeout, "no answer in time"},
		{"dial timeout, as Caddy wraps it", t.Context(), reverseproxy.NewDialError(dialTimeout), codeNetwork, "dial tcp: i/o timeout"},
		{"TLS alert", t.Context(), &net.OpError{Op: "remote error", Err: tls.AlertError(42)}, codeNetwork, "tls: bad certificate"},
		{"token_timeout", expired, errors.New(canarySecret), codeTimeout, "raise token_timeout"},
		{"given up", ended, context.Canceled, codeNetwork, ""},
		{"unknown", t.Context(), errors.New(canarySecret), codeNetwork, "the connection broke"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := networkError(test.ctx, "auth.example.com", test.err)
			wantTokenError(t, err, test.code, false)
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("error = %v, want %q in it", err, test.want)
			}
			if errors.Is(err, context.Canceled) {
				t.Error("the error wraps context.Canceled, which Caddy takes for a client that went away")
			}
			wantNoCanary(t, err)
		})
	}
}
