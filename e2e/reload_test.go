package e2e

import (
	"testing"
	"time"
)

// TestReloadUnderLoad reloads changed configs with the same client, whose
// token outlives them all.
//
// Go's HTTP server closes a connection whose request it is reading when it is
// told to shut down, which happens on a busy machine whatever the transport.
// The client sends such a request again; the upstream must not have seen it.
func TestReloadUnderLoad(t *testing.T) {
	const reloads = 5
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	p := proxy{to: u.serve(t), as: as, client: c}
	gw := startProxy(t, p)

	done := make(chan struct{})
	var result loadResult
	go func() {
		defer close(done)
		result = load{url: gw.url, rate: 200, duration: 8 * time.Second, resend: true}.run()
	}()
	for n := range reloads {
		time.Sleep(time.Second)
		gw.reload(t, generation(n+1, p.String()))
	}
	<-done
	// The last config is the one that answers: none of them was ignored.
	gw.wantGeneration(t, reloads)

	tokens := as.tokenRequests(t)
	t.Logf("%v; %v; %d token requests", result, u, tokens)
	result.wantAll(t)
	u.wantAccepted(t, result.sent+1, "HTTP/1.1")
	if tokens != 1 {
		t.Errorf("token requests = %d, want 1", tokens)
	}
}
