package e2e

import (
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// raw answers with these bytes, whatever they are, and ends the connection.
type raw struct {
	head  string
	reset bool          // the end is no orderly one
	stay  time.Duration // before the end
}

func (a raw) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil { // over HTTP/2
		panic(http.ErrAbortHandler)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * time.Second))
	io.WriteString(conn, a.head)
	time.Sleep(a.stay)
	if tcp, ok := conn.(*net.TCPConn); ok && a.reset {
		tcp.SetLinger(0)
	}
}

// malformedAnswers are answers that net/http takes for none of HTTP. Its errors quote
// most of them.
var malformedAnswers = []string{
	"HTTP/1.1 $\r\n\r\n",
	"$\r\n\r\n",
	"HTTP/1.1 200 OK\r\n$\r\n\r\n",
	"HTTP/1.1 200 OK\r\n$: x\r\n\r\n",
	"HTTP/1.1 200 OK\r\nX: x\x00$\r\n\r\n",
	"HTTP/1.1 200 OK\r\nContent-Length: $\r\n\r\n",
	"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: $\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: $\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n$\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;$\r\nok$\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n2\r\nok\r\n0\r\n$\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTrailer: $\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 20\r\n\r\n$",
	"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nX-Stray: $\r\n\r\n",
	"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: $\r\n\r\n",
	"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n$",
	"HTTP/1.1 100 $\r\n\r\nHTTP/1.1 103 $\r\n$\r\n\r\n",
	"HTTP/1.1 302 Found\r\nLocation: ://$\r\nContent-Length: 0\r\n\r\n",
	"HTTP/1.1 302 Found\r\nLocation: http://$\r\nContent-Length: 0\r\n\r\n",
	"HTTP/2.0 200 $\r\n\r\n",
	"\x00\x00\x12\x04\x00\x00\x00\x00\x00$",
}

// malformed answers with each of malformedAnswers in turn. It repeats the request's
// Authorization header there, each time in another way.
type malformed struct{ answered atomic.Int64 }

func (m *malformed) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n := int(m.answered.Add(1))
	said := repeats(r.Header.Get("Authorization"))
	answer := malformedAnswers[n%len(malformedAnswers)]
	text := strings.ReplaceAll(answer, "$", said[n/len(malformedAnswers)%len(said)])
	raw{head: text, stay: 20 * time.Millisecond}.ServeHTTP(w, r)
}

// repeats returns ways to say the same: as it is, quoted, in base64, and in parts.
func repeats(said string) []string {
	_, token, _ := strings.Cut(said, " ")
	return []string{
		said,
		fmt.Sprintf("%q", said),
		base64.StdEncoding.EncodeToString([]byte(said)),
		strings.Join(pieces(token), " "),
		token[len(token)/2:],
		token,
		strings.ToUpper(token),
		fmt.Sprintf("%x", said),
	}
}
