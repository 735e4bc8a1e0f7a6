package e2e

import (
	"testing"
	"time"
)

// TestClientAuthentication obtains a token as each client of the server, among
// them some whose id and secret are full of characters that a header or a form
// must not hold as they are. RFC 6749 permits printable ASCII, and the server
// takes no more than that.
func TestClientAuthentication(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	for _, c := range clients(t) {
		t.Run(c.ID, func(t *testing.T) {
			before := as.tokenRequests(t)
			u := newUpstream(t, as, c)
			gw := startProxy(t, proxy{to: u.serve(t), as: as, client: c})
			for range 3 {
				gw.get(t, "/", 200)
			}
			u.wantAccepted(t, 3, "HTTP/1.1")
			if got := as.tokenRequests(t) - before; got != 1 {
				t.Errorf("token requests = %d, want 1", got)
			}
		})
	}
}
