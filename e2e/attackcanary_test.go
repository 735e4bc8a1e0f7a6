package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
)

// secretOwner owns what only the gateway and the authorization server may know:
// secrets of clients, and values of the token request.
const secretOwner = 's'

// canaryOwners are all whose canaries are looked for: the upstreams, each of which
// owns its tokens and its private data, n, whose tokens are for nobody, and secretOwner.
const canaryOwners = attackSockets + attackPorts + "n" + string(secretOwner)

// canary returns the n-th canary of an owner. It is made of four equal blocks, so
// that half of it is found as well. The length of a block is a multiple of three:
// in base64, all blocks look the same.
func canary(owner byte, n int) string {
	return strings.Repeat(bait(owner)+fmt.Sprintf("%05x", n), 4)
}

// bait returns what each block of a canary has, and what tells the owner.
func bait(owner byte) string {
	two := strings.Repeat(string(owner), 2)
	return two + "kanari" + two
}

// oddCanary returns a canary with the characters that JSON, %q and URLs write in
// another way.
func oddCanary(owner byte, n int) string {
	whole := canary(owner, n)
	half := len(whole) / 2
	return whole[:half] + `"\/+` + whole[half:]
}

// A spelling has what to look for in a text: a bait, as others may have written it.
type spelling struct {
	owner         byte
	plain, digits []byte   // looked for in lower case
	base64        [][]byte // one for each place in a group of three bytes
}

func newSpelling(owner byte, bait string) spelling {
	s := spelling{owner: owner, plain: []byte(bait), digits: []byte(hex.EncodeToString([]byte(bait)))}
	for shift := range 3 {
		encoded := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("-", shift) + bait))
		// What the neighbours have a part in is left out.
		from, to := (shift*8+5)/6, (shift+len(bait))*8/6
		s.base64 = append(s.base64, []byte(encoded[from:to]))
	}
	return s
}

// in reports whether a text, which lower has in lower case, shows the bait.
func (s spelling) in(text, lower []byte) bool {
	if bytes.Contains(lower, s.plain) || bytes.Contains(lower, s.digits) {
		return true
	}
	for _, encoded := range s.base64 {
		if bytes.Contains(text, encoded) {
			return true
		}
	}
	return false
}

var (
	anySpelling = newSpelling(0, "kanari")
	spellings   = func() (all []spelling) {
		for _, owner := range []byte(canaryOwners) {
			all = append(all, newSpelling(owner, bait(owner)))
		}
		return all
	}()
)

// shownIn returns whose canaries a text shows, or parts of them: as they are, in
// another case, in base64 or in hexadecimal digits.
func shownIn(text []byte) (owners string) {
	lower := bytes.ToLower(text)
	if !anySpelling.in(text, lower) {
		return ""
	}
	for _, s := range spellings {
		if s.in(text, lower) {
			owners += string(s.owner)
		}
	}
	return owners
}

// foreign returns the owners of canaries in a text that are none of those permitted.
func foreign(text []byte, permitted string) string {
	return strings.Map(func(owner rune) rune {
		if strings.ContainsRune(permitted, owner) {
			return -1
		}
		return owner
	}, shownIn(text))
}

// TestCanariesAreFound shows that the attack's search finds what others may make of
// a canary, and nothing else.
func TestCanariesAreFound(t *testing.T) {
	for _, whole := range []string{canary('c', 7), oddCanary('c', 7)} {
		encode := base64.StdEncoding.EncodeToString
		for name, text := range map[string]string{
			"as it is":      "x" + whole + "x",
			"quoted":        fmt.Sprintf("%q", whole),
			"quoted twice":  fmt.Sprintf("%q", fmt.Sprintf("%q", whole)),
			"the beginning": whole[:len(whole)/2],
			"the end":       whole[len(whole)/2:],
			"upper case":    strings.ToUpper(whole),
			"hexadecimal":   hex.EncodeToString([]byte(whole)),
			"base64":        encode([]byte(whole)),
			"base64, 1":     encode([]byte(":" + whole)),
			"base64, 2":     encode([]byte("c:" + whole)),
			"in pieces":     strings.Join(pieces(whole), " "),
		} {
			if got := shownIn([]byte(text)); got != "c" {
				t.Errorf("%s: got canaries of %q in %s, want those of c", name, got, text)
			}
		}
		if got := foreign([]byte(whole+canary('d', 1)), "c"); got != "d" {
			t.Errorf("got %q as foreign, want d", got)
		}
	}
	for _, text := range []string{"", "a canary", strings.Repeat("kan ari", 100), encodeAll("carry canaries")} {
		if got := shownIn([]byte(text)); got != "" {
			t.Errorf("got canaries of %q in %q, want none", got, text)
		}
	}
}

// encodeAll returns a text in base64, moved by no byte, by one and by two.
func encodeAll(text string) string {
	var all strings.Builder
	for shift := range 3 {
		all.WriteString(base64.StdEncoding.EncodeToString([]byte(strings.Repeat(":", shift)+text)) + "\n")
	}
	return all.String()
}

// pieces cuts a text into parts that are a little longer than a block of a canary.
func pieces(text string) []string {
	var all []string
	for len(text) > 32 {
		all = append(all, text[:24])
		text = text[24:]
	}
	return append(all, text)
}
