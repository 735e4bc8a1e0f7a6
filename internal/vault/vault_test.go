package vault

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

type record struct{ Token string }

func newVault(tb testing.TB, secret string) *Vault {
	tb.Helper()
	v, err := New([]byte(secret))
	if err != nil {
		tb.Fatal(err)
	}
	return v
}

func seal(tb testing.TB, v *Vault, name string, r record) []byte {
	tb.Helper()
	sealed, err := v.Seal(name, r)
	if err != nil {
		tb.Fatal(err)
	}
	return sealed
}

func TestSealedRecordIsOpened(t *testing.T) {
	for _, size := range []int{0, 1, 498, 499, 500, 501, 3000, 100_000} { // around the unit of sizes
		want := record{strings.Repeat("t", size)}
		sealed := seal(t, newVault(t, "secret"), "name", want)
		var got record
		if err := newVault(t, "secret").Open("name", sealed, &got); err != nil || got != want {
			t.Errorf("a token of %d bytes: got %d bytes, err %v, want it back", size, len(got.Token), err)
		}
	}
}

func TestNothingElseIsOpened(t *testing.T) {
	v := newVault(t, "secret")
	sealed := seal(t, v, "name", record{"token"})
	refused := func(what string, v *Vault, name string, sealed []byte) {
		t.Helper()
		var got record
		if err := v.Open(name, sealed, &got); err == nil || got != (record{}) {
			t.Errorf("%s: got %v, err %v, want an error", what, got, err)
		}
	}
	for i := range 8 * len(sealed) {
		flipped := bytes.Clone(sealed)
		flipped[i/8] ^= 1 << (i % 8)
		refused(fmt.Sprintf("bit %d flipped", i), v, "name", flipped)
	}
	for n := range sealed {
		refused(fmt.Sprintf("the first %d bytes", n), v, "name", sealed[:n])
	}
	refused("one more byte", v, "name", append(bytes.Clone(sealed), 0))
	refused("another name", v, "names", sealed)
	refused("another secret", newVault(t, "secret2"), "name", sealed)
	refused("too large", v, "name", seal(t, v, "name", record{strings.Repeat("t", maxSize)}))
	other, err := v.Seal("name", "no record")
	if err != nil {
		t.Fatal(err)
	}
	refused("another kind", v, "name", other)
}

// Whoever reads the storage sees neither what is in it, nor what is in it twice.
func TestNothingIsSeen(t *testing.T) {
	v := newVault(t, "secret")
	const canary = "canary-token"
	one, two := seal(t, v, "name", record{canary}), seal(t, v, "name", record{canary})
	if bytes.Equal(one, two) {
		t.Error("two records with the same content are the same bytes")
	}
	if bytes.Contains(one, []byte("canary")) || bytes.Contains(one, []byte("Token")) {
		t.Error("the content is seen")
	}
	if short, long := seal(t, v, "name", record{"t"}), seal(t, v, "name", record{strings.Repeat("t", 400)}); len(short) != len(long) {
		t.Errorf("got records of %d and %d bytes, want that nobody sees how long a token is", len(short), len(long))
	}
	if shown := fmt.Sprintf("%v %+v %#v %s", v, v, v, v); strings.Trim(shown, "vault ") != "" {
		t.Errorf("got %q, want no key", shown)
	}
}

func TestNames(t *testing.T) {
	v := newVault(t, "secret")
	names := make(map[string]string)
	for what, name := range map[string]string{
		"one":                v.Name("token", []byte("one")),
		"another":            v.Name("token", []byte("another")),
		"another kind":       v.Name("failed", []byte("one")),
		"another secret":     newVault(t, "secret2").Name("token", []byte("one")),
		"nothing":            v.Name("token", nil),
		"a kind in the rest": v.Name("to", []byte("ken\x00one")),
	} {
		if other, ok := names[name]; ok {
			t.Errorf("%s and %s have one name", what, other)
		}
		names[name] = what
		if len(name) != 2*nameSize || strings.Trim(name, "0123456789abcdef") != "" {
			t.Errorf("got the name %q, want %d hex digits", name, 2*nameSize)
		}
	}
	if again := newVault(t, "secret").Name("token", []byte("one")); names[again] != "one" {
		t.Error("two instances with one secret have different names")
	}
}

func FuzzOpen(f *testing.F) {
	v := newVault(f, "secret")
	f.Add([]byte(nil))
	f.Add(seal(f, v, "name", record{"token"}))
	f.Add(seal(f, v, "other name", record{"token"}))
	f.Fuzz(func(t *testing.T, sealed []byte) {
		var got record
		if err := v.Open("name", sealed, &got); err == nil && got.Token != "token" {
			t.Errorf("got %q, which nobody has sealed", got.Token)
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	v, r := newVault(b, "secret"), record{strings.Repeat("t", 1000)}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.Seal("name", r); err != nil {
			b.Fatal(err)
		}
	}
}
