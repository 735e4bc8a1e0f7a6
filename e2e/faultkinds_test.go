package e2e

import (
	"bytes"
	"io"
	"net/http"
	"strconv"
	"time"
)

// retryAfter is how long a server that sends 429 asks to be left alone.
const retryAfter = 2 * time.Second

// fault is a way in which an authorization server can fail. One of refuse,
// accept, untrusted and answer says how.
type fault struct {
	name  string
	https bool // it needs a token endpoint with TLS

	refuse    bool                // nobody listens
	accept    func(*injectorConn) // instead of TLS and HTTP
	untrusted bool                // the certificate is another
	answer    func(*injector, http.ResponseWriter, *http.Request)

	// slow faults last until the gateway gives up.
	slow bool
	// throttles: the server says when to come again.
	throttles bool
	// harmless faults are none to the gateway: it reads the answer anyway.
	harmless bool
}

// belowHTTP tells whether the fault breaks connections that are open.
func (f *fault) belowHTTP() bool { return f.answer == nil }

var faults = []*fault{
	{name: "connection refused", refuse: true},
	{name: "connection reset", answer: reset},
	{name: "no answer", answer: hang, slow: true},
	{name: "slow body", answer: slowBody, slow: true},
	{name: "500", answer: status500},
	{name: "429, seconds", answer: tooManySeconds, throttles: true},
	{name: "429, date", answer: tooManyDate, throttles: true},
	{name: "HTML page", answer: page},
	{name: "token labelled HTML", answer: mislabelled, harmless: true},
	{name: "truncated JSON", answer: truncated},
	{name: "broken body", answer: brokenBody},
	{name: "endless answer", answer: endless},
	{name: "TLS handshake breaks", https: true, accept: brokenHandshake},
	{name: "TLS certificate untrusted", https: true, untrusted: true},
}

// reset breaks the connection once the request is read.
func reset(_ *injector, w http.ResponseWriter, _ *http.Request) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	conn.(*injectorConn).reset()
}

// hang answers nothing until the gateway goes away.
func hang(_ *injector, _ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// slowBody sends a good answer, too slowly to be of use.
func slowBody(inj *injector, w http.ResponseWriter, r *http.Request) {
	_, answer := inj.genuine(r)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
	for i := range answer {
		if _, err := w.Write(answer[i : i+1]); err != nil {
			return
		}
		http.NewResponseController(w).Flush()
		select {
		case <-time.After(50 * time.Millisecond):
		case <-r.Context().Done():
			return
		}
	}
}

func status500(inj *injector, w http.ResponseWriter, _ *http.Request) {
	http.Error(w, "out of order", http.StatusInternalServerError)
}

func tooManySeconds(inj *injector, w http.ResponseWriter, _ *http.Request) {
	inj.keepQuiet(time.Now().Add(retryAfter))
	w.Header().Set("Retry-After", strconv.Itoa(int(retryAfter.Seconds())))
	http.Error(w, "too many requests", http.StatusTooManyRequests)
}

// tooManyDate names the instant, which is of whole seconds.
func tooManyDate(inj *injector, w http.ResponseWriter, _ *http.Request) {
	until := time.Now().Add(retryAfter).Truncate(time.Second)
	inj.keepQuiet(until)
	w.Header().Set("Retry-After", until.UTC().Format(http.TimeFormat))
	http.Error(w, "too many requests", http.StatusTooManyRequests)
}

// page is what a proxy or a portal in front of the server may send.
func page(_ *injector, w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	io.WriteString(w, "<!doctype html><title>Maintenance</title><p>We'll be back soon.")
}

// mislabelled sends a good answer under the wrong media type.
func mislabelled(inj *injector, w http.ResponseWriter, r *http.Request) {
	status, answer := inj.genuine(r)
	inj.deliver(w, status, "text/html", answer)
}

// truncated sends half of a good answer as if it were the whole.
func truncated(inj *injector, w http.ResponseWriter, r *http.Request) {
	_, answer := inj.genuine(r)
	w.Header().Set("Content-Type", "application/json")
	w.Write(answer[:len(answer)/2])
}

// brokenBody sends half of a good answer and breaks the connection.
func brokenBody(inj *injector, w http.ResponseWriter, r *http.Request) {
	_, answer := inj.genuine(r)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
	w.Write(answer[:len(answer)/2])
	http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

// endless sends as much as the gateway reads.
func endless(_ *injector, w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	io.WriteString(w, `{"token_type":"Bearer","access_token":"`)
	for chunk := bytes.Repeat([]byte{'a'}, 32<<10); ; {
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

// brokenHandshake answers the first message of TLS with what is none.
func brokenHandshake(c *injectorConn) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	c.Read(make([]byte, 4<<10))
	c.Write(bytes.Repeat([]byte{0x16, 0x03, 0x03, 0x00, 0x05}, 4))
}
