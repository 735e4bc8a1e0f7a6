// The headers that are sent upstream, and the headers that are never passed on.

package outboundauth

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

// A headerTemplate is an identity header: its field name, and its value with
// placeholders.
type headerTemplate struct {
	field    string // the name, in canonical form
	template string
	values   []string // the value, ready to use; nil if template holds placeholders
}

func newHeaderTemplate(field, value string) headerTemplate {
	h := headerTemplate{field: http.CanonicalHeaderKey(field), template: value}
	if len(placeholdersIn(value)) == 0 {
		h.values = []string{value}
	}
	return h
}

// set adds the header to out. If the value is empty, no header is sent. A value
// that would break the header, or smuggle in another one, is an error. The error
// does not quote the value, which may come from the caller of the gateway.
func (h *headerTemplate) set(ctx context.Context, out http.Header) error {
	values := h.values
	if values == nil {
		repl, ok := replacerOf(ctx)
		if !ok {
			repl = caddy.NewReplacer()
		}
		// Expand only what stands in the config. If the result were expanded
		// again, a caller could send `{env.SECRET}`.
		value := strings.TrimSpace(repl.ReplaceAll(h.template, ""))
		if !validHeaderValue(value) {
			return fmt.Errorf("header %s: the value holds a control character", h.field)
		}
		values = []string{value}
	}
	if values[0] != "" {
		out[h.field] = values
	}
	return nil
}

// A fieldSet holds the names of headers that the gateway vouches for. Callers
// can't send a header under such a name, or under a name that an upstream may
// confuse with it. CGI and its successors map '-' and '_' to the same variable.
// Some of them also map '.' to it, and some map every byte that is no letter or
// digit.
type fieldSet struct {
	names map[string]struct{} // the names, as fold returns them
	marks uint64              // their marks, see markOf
}

func (s *fieldSet) add(field string) {
	if s.names == nil {
		s.names = make(map[string]struct{})
	}
	s.names[string(fold(nil, field))] = struct{}{}
	s.marks |= markOf(field)
}

// has reports whether the set holds field. It is called for each header of each
// request. So most calls only compare marks, and a name of up to 64 bytes costs no
// allocation.
func (s *fieldSet) has(field string) bool { return s.marks&markOf(field) != 0 && s.holds(field) }

// holds is the rest of has, which is so short without it that the compiler inlines it.
func (s *fieldSet) holds(field string) bool {
	var buf [64]byte
	_, ok := s.names[string(fold(buf[:0], field))]
	return ok
}

// markOf returns one bit, by the length and the first byte of a name. Names with
// different marks differ. Many have the same length: Authorization and Cache-Control.
func markOf(field string) uint64 {
	if field == "" {
		return 1
	}
	return 1 << ((uint(len(field)) + uint(folded[field[0]])) % 64)
}

// fold appends field to b, in lower case and with '-' in place of each byte that
// is no letter or digit.
func fold(b []byte, field string) []byte {
	for i := range len(field) {
		b = append(b, folded[field[i]])
	}
	return b
}

// folded holds what fold makes of each byte.
var folded = func() (folded [256]byte) {
	for i := range folded {
		switch c := byte(i); {
		case 'A' <= c && c <= 'Z':
			folded[i] = c + 'a' - 'A'
		case ('a' <= c && c <= 'z') || ('0' <= c && c <= '9'):
			folded[i] = c
		default:
			folded[i] = '-'
		}
	}
	return folded
}()

// without returns a copy of h without the fields of the set, and with room for more
// fields. The copy shares the values with h: nobody writes to them on the way to the
// upstream.
func (s *fieldSet) without(h http.Header, more int) http.Header {
	if h != nil && len(h)+more <= roomOf(len(h)) {
		out := maps.Clone(h) // at half the cost of the loop below
		s.deleteFrom(out)
		return out
	}
	out := make(http.Header, len(h)+more)
	for field, values := range h {
		if !s.has(field) {
			out[field] = values
		}
	}
	return out
}

// roomOf returns how many elements a map of n elements can hold before it grows, as Go's
// maps are made: 8, 14, 28 and so on. A clone has no more room than its original. For it
// to grow costs more than all of the copying. If the room is another, nothing but time
// is lost.
func roomOf(n int) int {
	if n <= 8 {
		return 8
	}
	room := 14
	for room < n {
		room *= 2
	}
	return room
}

// deleteFrom removes the fields of the set from h.
func (s *fieldSet) deleteFrom(h http.Header) {
	for field := range h {
		if s.has(field) {
			delete(h, field)
		}
	}
}

// keepHTTP removes an upgrade to a protocol that carries HTTP requests. After such an
// upgrade, the caller would speak with the upstream itself: its next requests would go
// with an identity of its own, over a connection that this token has opened. Nobody has
// to upgrade (RFC 9110 §7.8), and the upgrade to h2c is obsolete (RFC 9113 §3.1).
func keepHTTP(h http.Header) {
	offers, ok := h["Upgrade"]
	if ok && slices.ContainsFunc(offers, carriesHTTP) {
		delete(h, "Upgrade")
		delete(h, "Connection")
		delete(h, "Http2-Settings")
	}
}

// carriesHTTP reports whether a list of protocols names one that carries HTTP: HTTP/2.0,
// h2c and its drafts, such as h2c-14, or TLS/1.0, in which HTTP goes on (RFC 2817).
func carriesHTTP(protocols string) bool {
	for protocol := range strings.SplitSeq(protocols, ",") {
		protocol = strings.ToLower(strings.TrimSpace(protocol))
		if strings.HasPrefix(protocol, "http") || strings.HasPrefix(protocol, "h2") || strings.HasPrefix(protocol, "tls") {
			return true
		}
	}
	return false
}

// A trailerBody fills the trailers of an outgoing request when the body ends.
// Nobody knows them before that, whether they were announced or not. The
// outgoing request has its own map of trailers, because another attempt may
// still be sending the same body.
type trailerBody struct {
	io.ReadCloser
	from, to http.Header
	reserved *fieldSet
}

// Read implements io.Reader.
func (b *trailerBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF { //nolint:errorlint // a reader returns io.EOF unwrapped
		maps.Copy(b.to, b.from)
		b.reserved.deleteFrom(b.to)
	}
	return n, err
}

// validHeaderValue reports whether a value follows RFC 9110 §5.5: the tab is the
// only control character in it.
func validHeaderValue(v string) bool {
	return strings.IndexFunc(v, func(r rune) bool { return (r < ' ' && r != '\t') || r == 0x7f }) < 0
}

// checkHeaderValue returns what is wrong with a header's value in the config. An
// empty value is an error: no header would be sent, and nobody needs a setting
// for that.
func checkHeaderValue(v string) error {
	switch {
	case strings.TrimSpace(v) == "":
		return errors.New("the value is missing: write one, or remove the setting")
	case !validHeaderValue(v):
		return errors.New("the value holds a control character")
	}
	return checkUTF8(v)
}

// validHeaderField reports whether a name is a token (RFC 9110 §5.1).
func validHeaderField(name string) bool {
	return name != "" && strings.IndexFunc(name, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') &&
			!strings.ContainsRune("!#$%&'*+-.^_`|~", r)
	}) < 0
}

// hopHeaders are the headers that belong to one connection (RFC 9110 §7.6.1),
// and those that frame a message. No setting may send a header with such a name.
var hopHeaders = []string{
	"connection", "content-length", "host", "keep-alive", "proxy-connection",
	"te", "trailer", "transfer-encoding", "upgrade",
}

// checkHeaderField returns what is wrong with the name of a header that a
// setting sends. The names in hopHeaders and reserved are not allowed. reserved
// is in lower case.
func checkHeaderField(name string, reserved ...string) error {
	if !validHeaderField(name) {
		return errors.New("the name is not that of a header field")
	}
	lower := strings.ToLower(name)
	if slices.Contains(hopHeaders, lower) || slices.Contains(reserved, lower) {
		return fmt.Errorf("the header %s is not free to set", name)
	}
	return nil
}
