package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// streamTimeout is for exchanges in which each side waits for the other: one
// that is held up on the way would never end.
const streamTimeout = 20 * time.Second

func TestWebSocket(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	u.handler = http.HandlerFunc(echoMessages)
	gw := startProxy(t, proxy{to: u.serve(t), as: as, client: c})

	ctx, cancel := context.WithTimeout(t.Context(), streamTimeout)
	defer cancel()
	conn, _, err := websocket.Dial(ctx, gw.url+"/ws", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.CloseNow()
	messages := [][]byte{[]byte("one"), {}, []byte("three"), bytes.Repeat([]byte{0, 255}, 10_000), []byte("five")}
	for i, want := range messages {
		if err := conn.Write(ctx, websocket.MessageBinary, want); err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		_, got, err := conn.Read(ctx)
		if err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("echo of message %d = %d bytes, want the %d sent", i, len(got), len(want))
		}
	}
	if err := conn.Close(websocket.StatusNormalClosure, ""); err != nil {
		t.Errorf("Close() = %v, want nil", err)
	}
	// One request, the upgrade, carried the token.
	u.wantAccepted(t, 1, "HTTP/1.1")
}

// echoMessages is a WebSocket server that sends back what it is sent.
func echoMessages(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer conn.CloseNow()
	for {
		kind, message, err := conn.Read(r.Context())
		if err != nil {
			return
		}
		if conn.Write(r.Context(), kind, message) != nil {
			return
		}
	}
}

// TestServerSentEvents has the upstream wait with each event until the client
// got the last one.
func TestServerSentEvents(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	next := make(chan struct{}, 1)
	u.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 5 {
			select {
			case <-next:
			case <-r.Context().Done():
				return
			}
			fmt.Fprintf(w, "data: %d\n\n", i)
			w.(http.Flusher).Flush()
		}
	})
	gw := startProxy(t, proxy{to: u.serve(t), as: as, client: c})

	ctx, cancel := context.WithTimeout(t.Context(), streamTimeout)
	defer cancel()
	next <- struct{}{}
	resp, err := http.DefaultClient.Do(newRequest(t, "GET", gw.url+"/events", nil).WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	events := 0
	for lines.Scan() {
		got, isEvent := strings.CutPrefix(lines.Text(), "data: ")
		if !isEvent {
			continue
		}
		if want := fmt.Sprint(events); got != want {
			t.Errorf("event = %q, want %q", got, want)
		}
		events++
		next <- struct{}{}
	}
	if err := lines.Err(); err != nil || events != 5 {
		t.Errorf("stream ended after %d events: %v, want 5", events, err)
	}
	u.wantAccepted(t, 1, "HTTP/1.1")
}
