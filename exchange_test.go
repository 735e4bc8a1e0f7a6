package outboundauth

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// newResolver starts a DNS server that knows these names, as the hosts file of a
// machine or a name server of its network may, and returns its address.
func newResolver(t *testing.T, names map[string]string) string {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		buf := make([]byte, 512)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(resolve(buf[:n], names), from)
		}
	}()
	return conn.LocalAddr().String()
}

// resolve answers a DNS query (RFC 1035 §4.1).
func resolve(query []byte, names map[string]string) []byte {
	var name []string
	end := 12
	for query[end] != 0 {
		name = append(name, string(query[end+1:end+1+int(query[end])]))
		end += 1 + int(query[end])
	}
	end++
	kind := binary.BigEndian.Uint16(query[end:])
	answer := append([]byte(nil), query[:end+4]...)
	copy(answer[2:], []byte{0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0}) // a response with one question
	addr, err := netip.ParseAddr(names[strings.ToLower(strings.Join(name, "."))])
	if err != nil {
		answer[3] |= 3 // there is no such name
		return answer
	}
	if want := map[bool]uint16{true: 1, false: 28}[addr.Is4()]; kind == want {
		answer[7] = 1
		answer = append(answer, 0xc0, 12, 0, byte(kind), 0, 1, 0, 0, 0, 60, 0, byte(len(addr.AsSlice())))
		answer = append(answer, addr.AsSlice()...)
	}
	return answer
}

// ownAddresses returns the addresses of this machine's interfaces.
func ownAddresses(t *testing.T) []netip.Addr {
	t.Helper()
	prefixes, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	var own []netip.Addr
	for _, prefix := range prefixes {
		own = append(own, netip.MustParsePrefix(prefix.String()).Addr())
	}
	return own
}

// ownAddress returns the IPv4 address under which other machines know this one. It is
// a loopback address if there is none.
func ownAddress(t *testing.T) string {
	t.Helper()
	own := "127.0.0.1"
	for _, addr := range ownAddresses(t) {
		if addr.Is4() && !addr.IsLoopback() {
			own = addr.String()
		}
	}
	return own
}

// publishing has the issuer of a client know its token endpoint already.
func publishing(cl *client, tokenEndpoint string, fromHere bool) {
	i := cl.endpoint.discovery.issuerMetadata
	i.mu.Lock()
	defer i.mu.Unlock()
	i.current = &metadata{issuer: testIssuer, tokenEndpoint: tokenEndpoint, fromHere: fromHere}
	i.until = time.Now().Add(time.Hour)
	i.tried = time.Now()
}

// What a name means is for the resolver to say. An issuer elsewhere must not lead to
// this machine by any.
func TestTokenEndpointThatIsDialedOnThisMachine(t *testing.T) {
	names := map[string]string{"loopback.example": "127.0.0.1", "other-loopback.example": "127.0.0.2", "unspecified.example": "0.0.0.0", "own.example": ownAddress(t)}
	resolver := newResolver(t, names)
	for _, secure := range []bool{false, true} {
		for name := range names {
			for _, settings := range []string{"", "\nread_timeout 10s", "\ntls_server_name {env.TEST_SERVER_NAME}", "\nversions 1.1 2"} {
				if !secure && strings.Contains(settings, "tls") {
					continue
				}
				for _, fromHere := range []bool{false, true} {
					t.Run(fmt.Sprintf("TLS %v/%s%s/from here %v", secure, name, settings, fromHere), func(t *testing.T) {
						t.Setenv("TEST_SERVER_NAME", "example.com")
						var connections atomic.Int32
						server := httptest.NewUnstartedServer(page(http.StatusOK, goodAnswer))
						server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
							if state == http.StateActive { // it has sent something
								connections.Add(1)
							}
						}
						server.Config.ErrorLog = discardLog
						listener, err := net.Listen("tcp4", "0.0.0.0:0")
						if err != nil {
							t.Fatal(err)
						}
						server.Listener.Close()
						server.Listener = listener
						scheme, issuer := "http", strings.Replace(testIssuer, "https", "http", 1)
						if secure {
							server.StartTLS()
							scheme, issuer = "https", testIssuer
							settings += "\ntls_insecure_skip_verify"
						} else {
							server.Start()
						}
						t.Cleanup(server.Close)
						_, port, _ := net.SplitHostPort(listener.Addr().String())
						cl := newTransport(t, strings.Replace(issuerSecret, testIssuer, issuer, 1)+
							"insecure_plaintext token_url\ntoken_transport {\nresolvers "+resolver+settings+"\n}").fallback.client
						publishing(cl, scheme+"://"+name+":"+port+"/token", fromHere)

						_, err = cl.endpoint.locateAndRequest(t.Context(), nil)
						if fromHere {
							if err != nil || connections.Load() == 0 {
								t.Errorf("got %v and %d connections, want a token of an issuer on this machine", err, connections.Load())
							}
							return
						}
						got := wantTokenError(t, err, codeInvalidResponse, false)
						if !strings.Contains(got.Description, "is on this machine, though the issuer is not") || got.Hint != metadataHint {
							t.Errorf("got %v, want that it is on this machine, and what to change", err)
						}
						if !strings.Contains(settings, "tls_server_name") && connections.Load() != 0 {
							t.Errorf("got %d connections on which something was sent, want none", connections.Load())
						}
					})
				}
			}
		}
	}
}

// An address of this machine may be on none of its interfaces: a route can make it so.
// And a sandbox may hide the interfaces.
func TestConnectionWithOneAddressAtBothEnds(t *testing.T) {
	for _, test := range []struct {
		local, peer string
		here        bool
	}{
		{"198.51.100.7:50000", "198.51.100.7:443", true},
		{"[::ffff:198.51.100.7]:50000", "198.51.100.7:443", true},
		{"[2001:db8::7]:50000", "[2001:db8::7]:443", true},
		{"198.51.100.7:50000", "198.51.100.8:50000", false},
		{"[2001:db8::7]:50000", "[2001:db8::8]:443", false},
	} {
		dial := watched(func(context.Context, string, string) (net.Conn, error) {
			return addressedConn{discarded(t), tcpAddr(test.local), tcpAddr(test.peer)}, nil
		})
		for _, elsewhere := range []bool{false, true} {
			d := &destination{elsewhere: elsewhere}
			conn, err := dial(d.to(t.Context()), "tcp", "as.example.com:443")
			if refused := errors.Is(err, errThisMachine); refused != (test.here && elsewhere) || (conn == nil) != refused || d.here.Load() != test.here {
				t.Errorf("%s to %s, elsewhere %v: got the error %v, and that it is here: %v", test.local, test.peer, elsewhere, err, d.here.Load())
			}
		}
	}
}

// addressedConn is a connection between other addresses than its own.
type addressedConn struct {
	net.Conn
	local, peer net.Addr
}

func (c addressedConn) LocalAddr() net.Addr  { return c.local }
func (c addressedConn) RemoteAddr() net.Addr { return c.peer }

func tcpAddr(addr string) net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(addr)) }

// discarded returns a connection to nobody.
func discarded(t *testing.T) net.Conn {
	conn, other := net.Pipe()
	t.Cleanup(func() { conn.Close(); other.Close() })
	return conn
}

// An issuer's own name may lead to several machines, of which this is one. Over TLS,
// its server proves that it is the issuer's.
func TestIssuerOnSeveralMachines(t *testing.T) {
	resolver := newResolver(t, map[string]string{"as.example.com": ownAddress(t), "other.example.com": ownAddress(t)})
	listener, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(page(http.StatusOK, goodAnswer))
	server.Listener.Close()
	server.Listener, server.Config.ErrorLog = listener, discardLog
	server.StartTLS()
	t.Cleanup(server.Close)
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	for _, test := range []struct {
		issuer, endpoint string
		want             bool
	}{
		{"https://as.example.com:" + port, "https://as.example.com:" + port + "/token", true},
		{"https://as.example.com:" + port, "https://AS.example.com:" + port + "/token", true},
		{"https://as.example.com:" + port, "https://other.example.com:" + port + "/token", false},
		{"https://as.example.com", "https://as.example.com:" + port + "/token", false}, // another service
		{"http://as.example.com:" + port, "http://as.example.com:" + port + "/token", false},
	} {
		cl := newTransport(t, strings.Replace(issuerSecret, testIssuer, test.issuer, 1)+
			"insecure_plaintext token_url\ntoken_transport {\ntls_insecure_skip_verify\nresolvers "+resolver+"\n}").fallback.client
		publishing(cl, test.endpoint, false)
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); (err == nil) != test.want {
			t.Errorf("%s at %s: got %v, want a token: %v", test.endpoint, test.issuer, err, test.want)
		}
	}
}

// An issuer whose name leads to this machine may name what is there, by any name.
func TestIssuerOnThisMachineByName(t *testing.T) {
	own := ownAddress(t)
	resolver := newResolver(t, map[string]string{"as.example.com": "127.0.0.1", "token.example.com": "127.0.0.1", "own.example.com": own})
	for _, test := range []struct{ host, endpoint string }{
		{"as.example.com", "http://as.example.com:$PORT/token"},
		{"as.example.com", "http://token.example.com:$PORT/token"},
		{"as.example.com", "http://127.0.0.1:$PORT/token"},
		{"as.example.com", "http://own.example.com:$PORT/token"},
		{"own.example.com", "http://own.example.com:$PORT/token"},
		{"own.example.com", "http://token.example.com:$PORT/token"},
		{"own.example.com", "http://" + own + ":$PORT/token"},
		{own, "http://" + own + ":$PORT/token"},
		{own, "http://own.example.com:$PORT/token"},
	} {
		var issuer, tokenEndpoint string
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/token" {
				_, _ = io.WriteString(w, goodAnswer)
				return
			}
			_, _ = io.WriteString(w, document(issuer, tokenEndpoint))
		}))
		listener, err := net.Listen("tcp4", "0.0.0.0:0")
		if err != nil {
			t.Fatal(err)
		}
		server.Listener.Close()
		server.Listener = listener
		server.Start()
		t.Cleanup(server.Close)
		_, port, _ := net.SplitHostPort(listener.Addr().String())
		issuer, tokenEndpoint = "http://"+test.host+":"+port, expand(test.endpoint, "$PORT", port)
		cl := newTransport(t, strings.Replace(issuerSecret, testIssuer, issuer, 1)+
			"insecure_plaintext token_url\ntoken_transport {\nresolvers "+resolver+"\n}").fallback.client
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
			t.Errorf("%s at %s: got %v, want a token", test.endpoint, test.host, err)
		}
	}
}

// A redirect may lead to another machine of the same name. Metadata is from here only
// if each answer on the way to it was.
func TestRedirectedMetadataIsFromHereOnlyIfAllIs(t *testing.T) {
	const endpoint = "https://127.0.0.1/token"
	for _, here := range [][]bool{{true, true}, {true, false}, {false, true}, {false, false}} {
		t.Run(fmt.Sprint(here), func(t *testing.T) {
			p := newPublisher("")
			p.publish(oauthPlace, redirects(http.StatusFound, "/x"))
			p.publish(testIssuer+"/x", page(http.StatusOK, document(testIssuer, endpoint)))
			p.publish(endpoint, page(http.StatusOK, goodAnswer))
			asked := 0
			cl, _ := discovering(t, issuerSecret, roundTripFunc(func(req *http.Request) (*http.Response, error) {
				if d, ok := req.Context().Value(destinationKey{}).(*destination); ok && asked < len(here) && here[asked] {
					d.here.Store(true)
				}
				asked++
				return p.RoundTrip(req)
			}))
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			if want := here[0] && here[1]; (err == nil) != want {
				t.Errorf("got %v, want a token: %v", err, want)
			}
		})
	}
}

// A proxy on this machine leads elsewhere, and where, only it knows.
func TestTokenEndpointBehindAProxyOnThisMachine(t *testing.T) {
	var asked atomic.Pointer[url.URL]
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.URL)
		_, _ = io.WriteString(w, goodAnswer)
	}))
	t.Cleanup(proxy.Close)
	cl := newTransport(t, strings.Replace(issuerSecret, testIssuer, "http://as.example.com", 1)+
		"insecure_plaintext token_url\ntoken_transport {\nnetwork_proxy url "+proxy.URL+"\n}").fallback.client
	publishing(cl, "http://127.1/token", false) // which is known without a connection
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	wantTokenError(t, err, codeInvalidResponse, false)
	publishing(cl, "http://token.example.com/token", false)
	if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
		t.Errorf("got %v, want a token", err)
	}
	if u := asked.Load(); u == nil || u.Host != "token.example.com" {
		t.Errorf("got the request for %v at the proxy, want that of the token endpoint", u)
	}
}

// Only token endpoints that were discovered may not be on this machine.
func TestTokenURLOnThisMachineByName(t *testing.T) {
	auth := newAuthServer(t)
	resolver := newResolver(t, map[string]string{"as.example.com": "127.0.0.1"})
	_, port, _ := net.SplitHostPort(auth.Listener.Addr().String())
	cl := newTransport(t, "token_url http://as.example.com:"+port+"/token\nclient_id gateway\nclient_secret s\n"+
		"insecure_plaintext token_url\ntoken_transport {\nresolvers "+resolver+"\n}").fallback.client
	if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
		t.Errorf("got %v, want a token", err)
	}
}
