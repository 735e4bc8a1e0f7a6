// The client key: where it comes from, which ones a config names, and what is wrong with that.

package outboundauth

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// keyedClient is a client block of the config.
type keyedClient struct {
	keys []string // none: those of requests without a key
	off  bool
	*Credentials
}

// name returns how the Caddyfile names the block.
func (k keyedClient) name() string {
	if len(k.keys) == 0 {
		return "client default"
	}
	return "client " + strings.Join(k.keys, " ")
}

// all returns the client blocks. cs may be nil.
func (cs *ClientsByKey) all() (all []keyedClient) {
	if cs == nil {
		return nil
	}
	for _, c := range cs.Named {
		all = append(all, newKeyedClient(c.Keys, c.Off, c.Credentials))
	}
	if d := cs.Default; d != nil {
		all = append(all, newKeyedClient(nil, d.Off, d.Credentials))
	}
	return all
}

func newKeyedClient(keys []string, off bool, c *Credentials) keyedClient {
	own := Credentials{ofServer: true}
	if c != nil {
		own = *c
		own.ofServer = true
	}
	return keyedClient{keys, off, &own}
}

// credentials returns those of the client blocks.
func (cs *ClientsByKey) credentials() (all []*Credentials) {
	for _, c := range cs.all() {
		if !c.off {
			all = append(all, c.Credentials)
		}
	}
	return all
}

// placeholder returns that of the client key, without braces.
func (cs *ClientsByKey) placeholder() string { return strings.Trim(cs.By, "{}") }

// check returns what is wrong with the client blocks. What a block lacks shows only together
// with what it inherits.
func (cs *ClientsByKey) check() error {
	if err := checkClientBy(cs.By); err != nil {
		return err
	}
	if len(cs.Named) == 0 {
		return errNoNamedClient
	}
	named := make(map[string]bool)
	for i, c := range cs.Named {
		switch {
		case c == nil || len(c.Keys) == 0:
			return fmt.Errorf("client %d: names no key", i)
		case c.Off && c.Credentials != nil:
			return errOffAndMore
		}
		for _, key := range c.Keys {
			if err := checkClientKey(key); err != nil {
				return err
			}
			if named[key] {
				return errKeyTwice
			}
			named[key] = true
		}
	}
	if d := cs.Default; d != nil && d.Off && d.Credentials != nil {
		return errOffAndMore
	}
	for _, k := range cs.all() {
		if err := k.check(); err != nil {
			return fmt.Errorf("%s: %w", k.name(), err)
		}
	}
	return nil
}

var errKeyTwice = errors.New("client: a key is named twice; each belongs to one client block")

var errOffAndMore = errors.New("client: off contradicts its other settings: remove one of the two")

var errNoNamedClient = errors.New("client_by: chooses among client blocks; add `client <key> { … }`, or remove it")

// constantNamespaces are the beginnings of placeholders that have the same value for all
// requests.
var constantNamespaces = []string{"env.", "file.", "system."}

// checkClientBy checks the placeholder of the client key.
func checkClientBy(by string) error {
	names := placeholdersIn(by)
	switch {
	case by == "":
		return errNoClientBy
	case len(names) != 1 || "{"+names[0]+"}" != by:
		return errors.New("client_by: must be one placeholder, such as {http.auth.user.id}, and nothing else")
	case hasPrefixOf(constantNamespaces, names[0]):
		return errors.New("client_by: has the same value for all requests; name a placeholder of the request, such as {http.auth.user.id}")
	}
	return nil
}

var errNoClientBy = errors.New("client_by is missing: client blocks need a placeholder of the request that has the client key, such as {http.auth.user.id}")

// anybodysNamespaces are the beginnings of placeholders whose value every client chooses.
var anybodysNamespaces = []string{
	"http.request.header.", "http.request.cookie.", "http.request.uri", "http.request.orig_uri", "http.request.body",
}

func hasPrefixOf(prefixes []string, name string) bool {
	return slices.ContainsFunc(prefixes, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// warning returns what operators should know about the placeholder of the client key; "" if
// nothing.
func (cs *ClientsByKey) warning() string {
	if !hasPrefixOf(anybodysNamespaces, cs.placeholder()) {
		return ""
	}
	return "client_by: every client can send this, and so choose whose credentials it uses; " +
		"authenticate clients before, and take what says who they are: {http.auth.user.id} of an authentication handler, " +
		"or a header that forward_auth replaces (copy_headers), or that request_header deletes for everybody else"
}

// checkClientKey checks a key of the config. It quotes none: a mistyped line may hold a secret.
func checkClientKey(key string) error {
	switch {
	case key == "":
		return errors.New("client: a key is empty; requests without a key are those of `client default`")
	case checkUTF8(key) != nil || strings.TrimSpace(key) != key || strings.IndexFunc(key, func(r rune) bool { return !unicode.IsPrint(r) }) >= 0:
		return errors.New("client: a key holds a character that can't be seen, which no client key has")
	case key == "*": // who writes that means any key
		return errors.New("client: * is no key; name each key that has a client")
	case strings.ContainsAny(key, "{}"):
		return errors.New("client: a key holds a brace; there are no placeholders here: write the key as requests have it")
	}
	return nil
}
