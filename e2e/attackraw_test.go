package e2e

import (
	"bytes"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// rawTrick is what no library sends. In its text, $PATH is what the attack asks for,
// $HOST the gateway, $OTHER an upstream, and $CLAIM headers that claim an identity.
type rawTrick struct {
	title string
	text  string
	stall time.Duration // before the client leaves
	leave bool          // without waiting for an answer
}

const claim = "Authorization: Bearer forged\r\nX-Tenant-Id: forged\r\nX_Tenant_Id: forged\r\n"

// chunked is a body that ends with trailers.
const chunked = "5\r\nhello\r\n0\r\n$CLAIM\r\n"

var rawTricks = []rawTrick{
	// Whom is it for?
	{title: "absolute form", text: "GET http://$OTHER$PATH HTTP/1.1\r\nHost: $OTHER\r\n$CLAIM$END"},
	{title: "absolute form and another host", text: "GET http://$OTHER$PATH HTTP/1.1\r\nHost: $HOST\r\n$END"},
	{title: "absolute form with https", text: "GET https://user:pass@$OTHER$PATH HTTP/1.1\r\nHost: $HOST\r\n$END"},
	{title: "two hosts", text: "GET $PATH HTTP/1.1\r\nHost: $HOST\r\nHost: $OTHER\r\n$END"},
	{title: "no host", text: "GET $PATH HTTP/1.1\r\n$END"},
	{title: "CONNECT", text: "CONNECT $OTHER HTTP/1.1\r\nHost: $OTHER\r\n$CLAIM$END"},
	{title: "OPTIONS for all", text: "OPTIONS * HTTP/1.1\r\nHost: $HOST\r\n$CLAIM$END"},
	{title: "TRACE with a limit", text: "TRACE $PATH HTTP/1.1\r\nHost: $HOST\r\nMax-Forwards: 0\r\n$END"},
	{title: "line breaks in the path", text: "GET $PATH/%0d%0aX-Tenant-Id:%20forged HTTP/1.1\r\nHost: $HOST\r\n$END"},
	{title: "dots in the path", text: "GET $PATH/../../..//off/../$PATH HTTP/1.1\r\nHost: $HOST\r\n$END"},

	// Old and new versions.
	{title: "HTTP/1.0", text: "GET $PATH HTTP/1.0\r\n$CLAIM\r\n"},
	{title: "HTTP/1.0 kept alive", text: "GET $PATH HTTP/1.0\r\nHost: $HOST\r\nConnection: keep-alive, Authorization\r\n$CLAIM\r\n"},
	{title: "HTTP/1.0 in chunks", text: "POST $PATH HTTP/1.0\r\nHost: $HOST\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked},
	{title: "HTTP/0.9", text: "GET $PATH\r\n\r\n"},
	{title: "HTTP/9.9", text: "GET $PATH HTTP/9.9\r\nHost: $HOST\r\n$END"},
	{title: "upgrade to h2c", text: "GET $PATH HTTP/1.1\r\nHost: $HOST\r\nConnection: Upgrade, HTTP2-Settings\r\n" +
		"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n$CLAIM\r\n"},
	{title: "upgrade to WebSocket", text: "GET $PATH HTTP/1.1\r\nHost: $HOST\r\nConnection: Upgrade, Authorization\r\n" +
		"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: Zm9yZ2VkZm9yZ2VkMTIzNA==\r\n$CLAIM\r\n"},
	{title: "HTTP/2 broken off", text: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x08\x01"},

	// Where does it end?
	{title: "length and chunks", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n$HIDDEN"},
	{title: "chunks and length", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n5\r\nhello\r\n0\r\n\r\n$HIDDEN"},
	{title: "chunks in another word", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nContent-Length: 5\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n$HIDDEN"},
	{title: "chunks twice", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n$HIDDEN"},
	{title: "chunks and a blank", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nContent-Length: 5\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n$HIDDEN"},
	{title: "chunks, folded", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nContent-Length: 5\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n$HIDDEN"},
	{title: "chunk extensions", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nTransfer-Encoding: chunked\r\n\r\n5;a=\"\n\"\r\nhello\r\n0;b\r\n\r\n$HIDDEN"},
	{title: "chunk of a wrong size", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\nhello\r\n0\r\n\r\n$HIDDEN"},
	{title: "two lengths", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\nhello$HIDDEN"},
	{title: "length with a sign", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nContent-Length: +0\r\n\r\n$HIDDEN"},
	{title: "GET with a body", text: "GET $PATH HTTP/1.1\r\nHost: $HOST\r\nContent-Length: 5\r\n\r\nhello$HIDDEN"},
	{title: "pipeline", text: "GET $PATH HTTP/1.1\r\nHost: $HOST\r\n\r\nPOST $PATH/2 HTTP/1.1\r\nHost: $HOST\r\nContent-Length: 2\r\n\r\nok$HIDDEN"},
	{title: "line feeds alone", text: "GET $PATH HTTP/1.1\nHost: $HOST\nAuthorization: Bearer forged\nX-Tenant-Id: forged\nConnection: close\n\n"},
	{title: "returns alone", text: "GET $PATH HTTP/1.1\r\nHost: $HOST\r\nX-Other: a\rX-Tenant-Id: forged\r\n$END"},
	{title: "folded header", text: "GET $PATH HTTP/1.1\r\nHost: $HOST\r\nX-Other: a\r\n Authorization: Bearer forged\r\n$END"},
	{title: "blank after a name", text: "GET $PATH HTTP/1.1\r\nHost: $HOST\r\nX-Tenant-Id : forged\r\n$END"},
	{title: "NUL in a value", text: "GET $PATH HTTP/1.1\r\nHost: $HOST\r\nX-Tenant-Id: forged\x00\r\n$END"},
	{title: "many headers", text: "GET $PATH HTTP/1.1\r\nHost: $HOST\r\n" + strings.Repeat("X-Tenant-Id: forged\r\n", 500) + "$END"},
	{title: "trailers", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nConnection: close\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n" +
		"Trailer: Authorization, X-Tenant-Id\r\n\r\n" + chunked},
	{title: "trailers that were not announced", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked},
	{title: "another expectation", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nExpect: forged\r\nContent-Length: 2\r\n\r\nok$HIDDEN"},

	// Who leaves?
	{title: "leaves in the headers", text: "GET $PATH HTTP/1.1\r\nHost: $HO", leave: true},
	{title: "leaves after the headers", text: "GET $PATH HTTP/1.1\r\nHost: $HOST\r\n\r\n", leave: true},
	{title: "leaves after a while", text: "GET $PATH HTTP/1.1\r\nHost: $HOST\r\n\r\n", leave: true, stall: 200 * time.Millisecond},
	{title: "leaves in the body", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nContent-Length: 64512\r\n\r\n$BODY", leave: true},
	{title: "leaves in a chunk", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n$BODY", leave: true},
	{
		title: "stalls in the body", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nContent-Length: 64512\r\n\r\n$BODY",
		leave: true, stall: 1500 * time.Millisecond,
	},
	{title: "stalls in the headers", text: "POST $PATH HTTP/1.1\r\nHost: $HOST\r\nX-Slow: ", leave: true, stall: 1500 * time.Millisecond},
}

// hidden is a request that somebody may take for a part of the one before.
const hidden = "GET $PATH/hidden HTTP/1.1\r\nHost: $OTHER\r\n$END"

func (r rawTrick) name() string { return r.title }

func (r rawTrick) asksToGoOn() bool { return false }

func (r rawTrick) send(c *attackClient, a attack) [][]byte {
	conn, err := net.DialTimeout("tcp", c.site, attackPatience)
	if err != nil {
		return nil
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(attackPatience))
	if _, err := io.WriteString(conn, r.fill(c, a)); err != nil && r.leave {
		return nil
	}
	if r.leave {
		time.Sleep(r.stall)
		conn.(*net.TCPConn).SetLinger(0)
		return nil
	}
	answer, _ := io.ReadAll(io.LimitReader(conn, 256<<10))
	return splitAnswers(answer)
}

func (r rawTrick) fill(c *attackClient, a attack) string {
	var chosen strings.Builder
	for name, value := range c.chosen(a.n) {
		chosen.WriteString(name + ": " + value + "\r\n")
	}
	text := strings.ReplaceAll(r.text, "$HIDDEN", hidden)
	return strings.NewReplacer(
		"$PATH", a.path(),
		"$HOST", c.site,
		"$OTHER", c.other(a.n/2),
		"$CLAIM", claim,
		"$END", chosen.String()+claim+"Connection: close\r\n\r\n",
		"$BODY", strings.Repeat("body "+strconv.Itoa(a.n), 1<<10),
	).Replace(text)
}

// splitAnswers returns the answers that came over a connection one by one.
func splitAnswers(all []byte) [][]byte {
	var answers [][]byte
	for part := range bytes.SplitSeq(all, []byte("HTTP/1.")) {
		if len(part) > 0 {
			answers = append(answers, part)
		}
	}
	return answers
}

// clientTricks are all that the client can do.
func clientTricks() []clientTrick {
	var all []clientTrick
	for _, trick := range webTricks() {
		all = append(all, trick)
	}
	for _, trick := range rawTricks {
		all = append(all, trick)
	}
	return all
}
