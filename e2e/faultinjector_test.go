package e2e

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"
)

// injector stands between the gateway and the authorization server, and
// passes everything on until it is told of a fault.
type injector struct {
	url   string
	trust string // the file of the certificate to trust, if it speaks TLS

	// rewrite changes the server's answers on the way; set before use.
	rewrite func(answer map[string]any)

	addr   string
	server *http.Server
	certs  [2]tls.Certificate // good and untrusted

	mu        sync.Mutex // guards all below
	backend   string     // URL of the authorization server
	fault     *fault     // nil: healthy
	listener  net.Listener
	conns     map[*injectorConn]bool
	attempts  []time.Time // when token requests came, or connections that broke before
	delivered []time.Time // when tokens were passed on
	tokens    []string    // all that the server issued, delivered or not
	quiet     time.Time   // no request before: what the last Retry-After asked for
	early     int         // requests that came before
}

// newInjector returns an injector in front of as.
func newInjector(t *testing.T, as *authServer, https bool) *injector {
	t.Helper()
	inj := &injector{backend: as.issuer, conns: make(map[*injectorConn]bool)}
	inj.server = &http.Server{
		Handler:  inj,
		ErrorLog: log.New(io.Discard, "", 0), // it would complain of its own faults
	}
	// It is held while nobody listens there, too: otherwise the next test to look
	// for a free port would be given it, and answer the gateway.
	inj.addr = heldAddress(t)
	inj.url = "http://" + inj.addr
	if https {
		inj.url = "https://" + inj.addr
		inj.certs[0], inj.trust = newCertificate(t)
		inj.certs[1], _ = newCertificate(t)
	}
	inj.serve(t)
	t.Cleanup(func() {
		inj.server.Close()
		inj.closeConns()
	})
	return inj
}

// serve accepts connections in the background until its listener is closed.
func (inj *injector) serve(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", inj.addr)
	if err != nil {
		t.Fatal(err)
	}
	inj.mu.Lock()
	inj.listener = l
	inj.mu.Unlock()
	var accepts net.Listener = &injectorListener{Listener: l, inj: inj}
	if inj.trust != "" {
		accepts = tls.NewListener(accepts, &tls.Config{
			GetCertificate: inj.certificate,
			// A resumed session would not look at the certificate.
			SessionTicketsDisabled: true,
		})
	}
	go inj.server.Serve(accepts)
}

// certificate chooses the certificate of a connection.
func (inj *injector) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if f := inj.current(); f != nil && f.untrusted {
		inj.count()
		return &inj.certs[1], nil
	}
	return &inj.certs[0], nil
}

// current returns the fault that is on, or nil.
func (inj *injector) current() *fault {
	inj.mu.Lock()
	defer inj.mu.Unlock()
	return inj.fault
}

// begin turns a fault on. Where it is one of the connection, those that are
// open break too.
func (inj *injector) begin(t *testing.T, f *fault) time.Time {
	t.Helper()
	inj.mu.Lock()
	inj.fault = f
	l := inj.listener
	inj.mu.Unlock()
	if f.refuse {
		l.Close()
	}
	if f.belowHTTP() {
		inj.closeConns()
	}
	return time.Now()
}

// heal turns the fault off. Requests that hang go on hanging, as they do at a
// server that was restarted behind a load balancer.
func (inj *injector) heal(t *testing.T) time.Time {
	t.Helper()
	inj.mu.Lock()
	f := inj.fault
	inj.fault = nil
	inj.mu.Unlock()
	if f.refuse {
		inj.serve(t)
	}
	return time.Now()
}

// redirect has another authorization server answer from now on.
func (inj *injector) redirect(as *authServer) {
	inj.mu.Lock()
	defer inj.mu.Unlock()
	inj.backend = as.issuer
}

// count notes a token request.
func (inj *injector) count() {
	inj.mu.Lock()
	defer inj.mu.Unlock()
	now := time.Now()
	inj.attempts = append(inj.attempts, now)
	if now.Before(inj.quiet) {
		inj.early++
	}
}

// keepQuiet notes that the gateway was asked to stay away until then.
func (inj *injector) keepQuiet(until time.Time) {
	inj.mu.Lock()
	defer inj.mu.Unlock()
	inj.quiet = until
}

// ServeHTTP implements http.Handler.
func (inj *injector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	inj.count()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	if f := inj.current(); f != nil && f.answer != nil {
		f.answer(inj, w, r)
		return
	}
	status, answer := inj.genuine(r)
	inj.deliver(w, status, "application/json", answer)
}

// genuine asks the authorization server. If there is none, the connection to
// the gateway breaks, as it would without an injector.
func (inj *injector) genuine(r *http.Request) (status int, answer []byte) {
	inj.mu.Lock()
	backend := inj.backend
	inj.mu.Unlock()
	req, err := http.NewRequestWithContext(r.Context(), r.Method, backend+r.URL.Path, r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	req.Header = r.Header.Clone()
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	defer resp.Body.Close()
	if answer, err = io.ReadAll(resp.Body); err != nil {
		panic(http.ErrAbortHandler)
	}
	var members map[string]any
	if json.Unmarshal(answer, &members) == nil {
		if inj.rewrite != nil {
			inj.rewrite(members)
			answer, _ = json.Marshal(members)
		}
		if token, ok := members["access_token"].(string); ok {
			inj.mu.Lock()
			inj.tokens = append(inj.tokens, token)
			inj.mu.Unlock()
		}
	}
	return resp.StatusCode, answer
}

// deliver passes an answer on, whole.
func (inj *injector) deliver(w http.ResponseWriter, status int, contentType string, answer []byte) {
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	w.Write(answer)
	if status == http.StatusOK {
		inj.mu.Lock()
		defer inj.mu.Unlock()
		inj.delivered = append(inj.delivered, time.Now())
	}
}

// injectorCounts is what an injector has seen.
type injectorCounts struct {
	attempts, delivered []time.Time
	tokens              []string
	early               int
}

func (inj *injector) counts() injectorCounts {
	inj.mu.Lock()
	defer inj.mu.Unlock()
	return injectorCounts{
		attempts:  slices.Clone(inj.attempts),
		delivered: slices.Clone(inj.delivered),
		tokens:    slices.Clone(inj.tokens),
		early:     inj.early,
	}
}

// between returns how many of the instants lie in [from, to).
func between(instants []time.Time, from, to time.Time) int {
	n := 0
	for _, at := range instants {
		if !at.Before(from) && at.Before(to) {
			n++
		}
	}
	return n
}

// eventually waits until the condition holds, and fails the test if that
// takes longer than limit.
func eventually(t *testing.T, limit time.Duration, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("got nothing in %v, want that %s", limit, what)
		}
	}
}
