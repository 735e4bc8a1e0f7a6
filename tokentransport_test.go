package outboundauth

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// Over HTTP/2, token requests that close their connection would take those of
// each other away, and dial again: with many clients, a storm.
func TestTokenRequestsMakeOneConnectionEach(t *testing.T) {
	const clients = 100
	var connections atomic.Int32
	server := httptest.NewUnstartedServer(newAuthServer(t))
	server.EnableHTTP2 = true
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	server.StartTLS()
	t.Cleanup(server.Close)

	var settings strings.Builder
	fmt.Fprintf(&settings, "token_transport {\ntls_insecure_skip_verify\n}\n")
	for i := range clients {
		fmt.Fprintf(&settings, "upstream 127.0.0.1:%d {\ntoken_url %s/token\nclient_id c%d\nclient_secret s\n}\n", 20000+i, server.URL, i)
	}
	transport := newTransport(t, settings.String())
	if err := onStarted(transport.opened.acquired).Handle(t.Context(), caddy.Event{}); err != nil {
		t.Fatal(err)
	}
	for _, cl := range transport.opened.acquired {
		if _, _, err := cl.source.Token(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := connections.Load(); got != clients {
		t.Errorf("got %d connections, want %d", got, clients)
	}
}
