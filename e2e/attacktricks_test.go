package e2e

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// healthPath is where the gateway checks the upstreams' health.
const healthPath = "/health"

// healthTricks are what checks get, one after the other. Most are good, so that
// upstreams are up most of the time.
var healthTricks = []string{
	"plain", "redirect", "plain", "malformed", "plain", "plain", "refuse", "plain", "echo", "reset", "plain",
}

// attackPlays are the tricks that clients ask for.
var attackPlays = []string{
	"plain", "echo", "refuse", "bar", "flood", "redirect", "noexpect", "huge", "slow", "bomb", "hang", "abort", "reset", "early",
	"malformed",
}

// newTricks returns what the upstream of an owner can do, by name. elsewhere are
// addresses of other upstreams.
func newTricks(owner byte, elsewhere []string) map[string]http.Handler {
	private := canary(owner, 0)
	return map[string]http.Handler{
		"plain":     plain{private},
		"echo":      echo{},
		"refuse":    refuse{},
		"bar":       &bar{then: plain{private}},
		"flood":     flood{private},
		"redirect":  &redirect{elsewhere: elsewhere},
		"noexpect":  refuseExpectation{then: plain{private}},
		"huge":      huge{then: plain{private}},
		"slow":      slow{private},
		"bomb":      bomb{zipped: zipped(1 << 20)},
		"hang":      hanging{},
		"abort":     abort{private},
		"reset":     raw{head: "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + private, reset: true},
		"early":     raw{head: "HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno", reset: true},
		"malformed": &malformed{},
	}
}

// plain reads the request and answers with what only the upstream's clients may see.
type plain struct{ private string }

func (p plain) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	w.Header().Set("X-Private", p.private)
	io.WriteString(w, p.private)
}

// echo answers with the request, in header, body and trailers.
type echo struct{}

func (echo) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	for name, values := range r.Header {
		h["X-Echo-"+name] = values
	}
	h.Set("Proxy-Authorization", r.Header.Get("Authorization")) // a mark of the gateway has this name
	h.Set("Trailer", "X-Echo-Trailer")
	io.WriteString(w, r.Method+" "+r.RequestURI+"\n")
	r.Header.Write(w)
	io.Copy(w, io.LimitReader(r.Body, 64<<10))
	h.Set("X-Echo-Trailer", r.Header.Get("Authorization"))
}

// refuse refuses every token, and repeats it.
type refuse struct{}

func (refuse) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Www-Authenticate", `Bearer error="invalid_token", error_description="`+r.Header.Get("Authorization")+`"`)
	http.Error(w, r.Header.Get("Authorization"), http.StatusUnauthorized)
}

// bar refuses a token until another one comes, which it lets in: the gateway gets
// another, and sends the request again.
type bar struct {
	then http.Handler

	mu     sync.Mutex
	barred string
}

func (b *bar) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if b.refuses(r.Header.Get("Authorization")) {
		refuse{}.ServeHTTP(w, r)
		return
	}
	b.then.ServeHTTP(w, r)
}

func (b *bar) refuses(authorization string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.barred != "" && b.barred != authorization {
		b.barred = ""
		return false
	}
	b.barred = authorization
	return true
}

// flood announces an answer again and again, and repeats the token in each.
type flood struct{ private string }

func (f flood) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	// Over HTTP/2, the headers may be on their way until the end: they must stay.
	w.Header().Set("X-Echo", r.Header.Get("Authorization"))
	for range 50 {
		w.WriteHeader(http.StatusEarlyHints)
	}
	io.WriteString(w, f.private)
}

// redirect leads to another upstream, with the token in the address.
type redirect struct {
	elsewhere []string
	answered  atomic.Int64
}

func (d *redirect) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n := int(d.answered.Add(1))
	to := &url.URL{Scheme: "http", Host: d.elsewhere[n%len(d.elsewhere)], Path: healthPath + "/stolen"}
	to.RawQuery = url.Values{"token": {r.Header.Get("Authorization")}}.Encode()
	status := []int{http.StatusFound, http.StatusTemporaryRedirect, http.StatusPermanentRedirect}[n%3]
	http.Redirect(w, r, to.String(), status)
}

// refuseExpectation lets no client go on that asks whether it may.
type refuseExpectation struct{ then http.Handler }

func (e refuseExpectation) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Expect") != "" {
		http.Error(w, r.Header.Get("Authorization"), http.StatusExpectationFailed)
		return
	}
	e.then.ServeHTTP(w, r)
}

// huge answers with more headers than some gateways take.
type huge struct{ then http.Handler }

func (h huge) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	for range 32 {
		w.Header().Add("X-Huge", strings.Repeat("h", 1<<10))
	}
	h.then.ServeHTTP(w, r)
}

// slow takes its time for the header, and for each part of the body.
type slow struct{ private string }

func (s slow) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	time.Sleep(300 * time.Millisecond)
	for range 10 {
		io.WriteString(w, s.private)
		if http.NewResponseController(w).Flush() != nil {
			return
		}
		time.Sleep(30 * time.Millisecond)
	}
}

// bomb answers with little that becomes much.
type bomb struct{ zipped []byte }

func (b bomb) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Encoding", "gzip")
	w.Write(b.zipped)
}

func zipped(size int) []byte {
	var to bytes.Buffer
	w := gzip.NewWriter(&to)
	w.Write(make([]byte, size))
	w.Close()
	return to.Bytes()
}

// hanging doesn't answer, and ends no later than the client.
type hanging struct{}

func (hanging) ServeHTTP(_ http.ResponseWriter, r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-time.After(1500 * time.Millisecond):
	}
	panic(http.ErrAbortHandler)
}

// abort breaks off its answer. Over HTTP/2, it resets the stream.
type abort struct{ private string }

func (a abort) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	io.WriteString(w, a.private)
	http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}
