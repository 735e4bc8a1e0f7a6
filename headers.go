// The headers that are sent upstream, and those that never pass.

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

// A headerTemplate is an identity header: the field, and the value with its
// placeholders.
type headerTemplate struct {
	field    string // canonical
	template string
	values   []string // ready to use, if template holds no placeholder
}

func newHeaderTemplate(field, value string) headerTemplate {
	h := headerTemplate{field: http.CanonicalHeaderKey(field), template: value}
	if !strings.ContainsAny(value, "{}") {
		h.values = []string{value}
	}
	return h
}

// set adds the header to out. An empty value sends no header; one that would
// break the header, or smuggle in another, is an error that does not quote
// it: it may come from the client.
func (h *headerTemplate) set(ctx context.Context, out http.Header) error {
	values := h.values
	if values == nil {
		repl, ok := replacerOf(ctx)
		if !ok {
			repl = caddy.NewReplacer()
		}
		// Only ever expand what stands in the config: expanding a value
		// again would let a client write `{env.SECRET}`.
		value := strings.TrimSpace(repl.ReplaceAll(h.template, ""))
		if !validHeaderValue(value) {
			return fmt.Errorf("header %s: the value of '%s' holds a control character", h.field, h.template)
		}
		values = []string{value}
	}
	if values[0] != "" {
		out[h.field] = values
	}
	return nil
}

// A fieldSet holds the names of headers that the gateway vouches for. What a
// client sends under such a name, or under one that an upstream may take for
// it, does not pass: CGI and its heirs map '-' and '_' to the same variable,
// some '.' too, and some whatever is no letter or digit.
type fieldSet struct {
	names   map[string]struct{} // folded
	lengths uint64              // bit n: a name of length n, modulo 64, is in names
}

func (s *fieldSet) add(field string) {
	if s.names == nil {
		s.names = make(map[string]struct{})
	}
	s.names[string(fold(nil, field))] = struct{}{}
	s.lengths |= 1 << (len(field) % 64)
}

// has is asked for each header of each request: comparing lengths answers
// most of these questions, and none of them allocates.
func (s *fieldSet) has(field string) bool {
	if s.lengths&(1<<(len(field)%64)) == 0 {
		return false
	}
	var buf [64]byte
	_, ok := s.names[string(fold(buf[:0], field))]
	return ok
}

// fold appends field to b in lower case, with '-' for all that is no letter or
// digit.
func fold(b []byte, field string) []byte {
	for _, c := range []byte(field) {
		switch {
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		case (c < 'a' || c > 'z') && (c < '0' || c > '9'):
			c = '-'
		}
		b = append(b, c)
	}
	return b
}

// without returns a copy of h that lacks the fields of the set. The values
// are shared with h: nobody writes to them on the way to the upstream.
func (s *fieldSet) without(h http.Header) http.Header {
	out := maps.Clone(h)
	if out == nil {
		out = make(http.Header)
	}
	s.deleteFrom(out)
	return out
}

// deleteFrom removes the fields of the set from h.
func (s *fieldSet) deleteFrom(h http.Header) {
	for field := range h {
		if s.has(field) {
			delete(h, field)
		}
	}
}

// A trailerBody fills the trailers of an outgoing request when its body ends:
// only then are they known, announced or not. They have a map of their own,
// because another attempt may still be sending the same body.
type trailerBody struct {
	io.ReadCloser
	from, to http.Header
	reserved *fieldSet
}

// Read implements io.Reader.
func (b *trailerBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF { //nolint:errorlint // a reader returns it unwrapped
		maps.Copy(b.to, b.from)
		b.reserved.deleteFrom(b.to)
	}
	return n, err
}

// validHeaderValue reports whether a value keeps to RFC 9110 §5.5: no control
// characters but the tab.
func validHeaderValue(v string) bool {
	return strings.IndexFunc(v, func(r rune) bool { return (r < ' ' && r != '\t') || r == 0x7f }) < 0
}

// checkHeaderValue tells what is wrong with a value that stands in the config. An
// empty one would send no header, and nobody needs to write that.
func checkHeaderValue(v string) error {
	switch {
	case strings.TrimSpace(v) == "":
		return errors.New("the value is missing: write one, or remove the setting")
	case !validHeaderValue(v):
		return errors.New("the value holds a control character")
	}
	return nil
}

// validHeaderField reports whether a name is a token (RFC 9110 §5.1).
func validHeaderField(name string) bool {
	return name != "" && strings.IndexFunc(name, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') &&
			!strings.ContainsRune("!#$%&'*+-.^_`|~", r)
	}) < 0
}

// hopHeaders belong to one connection (RFC 9110 §7.6.1) or to the framing of
// a message: neither an identity nor a token request may set them.
var hopHeaders = []string{
	"connection", "content-length", "host", "keep-alive", "proxy-connection",
	"te", "trailer", "transfer-encoding", "upgrade",
}

// checkHeaderField tells what is wrong with the name of a header that a setting
// sends. Neither hopHeaders nor reserved, which is in lower case, may be set.
func checkHeaderField(name string, reserved ...string) error {
	if !validHeaderField(name) {
		return fmt.Errorf("'%s' is not a header field name", name)
	}
	lower := strings.ToLower(name)
	if slices.Contains(hopHeaders, lower) || slices.Contains(reserved, lower) {
		return fmt.Errorf("the header %s is not free to set", name)
	}
	return nil
}
