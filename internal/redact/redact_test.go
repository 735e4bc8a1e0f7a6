package redact

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
)

func TestOutsideTextIsCleaned(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"", ""},
		{"  a b\t", "a b"},
		{"\r\na\x00\x7f\u0085b", "a   b"},
		{"a\u2028\u2029b\x1b[", "a  b ["},
		{"a\xff\xfeb", "ab"},
		{"0123456789", "0123456789"},
		{"0123456789x", "0123456789…"},
		{"012345678ü", "012345678…"}, // not cut in a character
	} {
		if got := Clean(test.in, 10); got != test.want {
			t.Errorf("Clean(%q) = %q, want %q", test.in, got, test.want)
		}
	}
}

// Servers repeat in their own ways what they were sent, and some on purpose.
func TestSecretIsFoundInDisguise(t *testing.T) {
	const secret = "Abc+d/e=f&ghijk~%25"
	hexadecimal := hex.EncodeToString([]byte(secret))
	// between puts something between the characters, or between every n of them.
	between := func(s, separator string, n int) string {
		return strings.Join(slices.Collect(func(yield func(string) bool) {
			for chunk := range slices.Chunk([]rune(s), n) {
				if !yield(string(chunk)) {
					return
				}
			}
		}), separator)
	}
	twice := url.QueryEscape(url.QueryEscape(secret))
	echoes := map[string]string{
		"as it is":                         secret,
		"in upper case":                    strings.ToUpper(secret),
		"hexadecimal":                      hexadecimal,
		"hexadecimal in upper case":        strings.ToUpper(hexadecimal),
		"hexadecimal with colons":          between(hexadecimal, ":", 2),
		"hexadecimal with spaces":          between(hexadecimal, " ", 2),
		"hexadecimal with colons, a part":  between(hexadecimal[10:2*Telltale+10], ":", 2),
		"URL-encoded":                      url.QueryEscape(secret),
		"URL-encoded as a path":            url.PathEscape(secret),
		"URL-encoded twice":                twice,
		"URL-encoded twice, in lower case": strings.ToLower(twice),
		"URL-encoded, every character":     "%" + between(hexadecimal, "%", 2),
		"URL-encoded twice, every one":     "%25" + between(hexadecimal, "%25", 2),
		"split by zero-width spaces":       between(secret, "\u200b", 1),
		"split by zero-width joiners":      between(secret, "\u200d", 3),
		"split by byte order marks":        between(secret, "\ufeff", Telltale-1),
		"split by soft hyphens":            between(secret, "\u00ad", 2),
		"split by line breaks":             between(secret, "\r\n", 4),
		"split by spaces":                  between(secret, " ", 1),
		"split by control characters":      between(secret, "\x00", 1),
	}
	// What stands before the secret shifts its base64.
	for _, before := range []string{"", "a", "ab", "abc", "id:", "client-secret="} {
		for _, after := range []string{"", "z", "zz"} {
			for name, encoding := range map[string]*base64.Encoding{"base64": base64.StdEncoding, "base64url": base64.RawURLEncoding} {
				encoded := encoding.EncodeToString([]byte(before + secret + after))
				echoes[fmt.Sprintf("%s between %q and %q", name, before, after)] = encoded
				echoes[fmt.Sprintf("%s between %q and %q in lines", name, before, after)] = between(encoded, "\n", 5)
			}
		}
	}
	echoes["hexadecimal with hyphens"] = between(hexadecimal, "-", 2)
	secrets := Secrets{secret}
	for name, echo := range echoes {
		if !secrets.In("100% wrong: '" + echo + "'!") {
			t.Errorf("%s: %q may be shown, want not: it tells the secret", name, echo)
		}
	}
	// Nothing of it need be longer than what makes a secret known.
	for _, secret := range []string{"ab cd ef gh ij", "12:34:56:78:9a", "süßes öl für ärzte", "4d2a-7f6e-63f5"} {
		for _, separator := range []string{"\u200b", "\n", " "} {
			if echo := between(secret, separator, 1); !(Secrets{secret}).In("wrong: " + echo) {
				t.Errorf("%q may be shown, want not: it tells the secret %q", echo, secret)
			}
		}
	}
	for _, harmless := range []string{
		"The client's credentials are not valid, or it may not do this.",
		"AADSTS7000215: Invalid client secret provided. Trace ID: 4d2a7f6e-63f5-4a0b-9f0f-0a8f5f3c1b00",
		strings.Repeat("0123456789abcdef", 20),
		between(secret, " and ", Telltale-1),
	} {
		if secrets.In(harmless) {
			t.Errorf("%q may not be shown, want that it may", harmless)
		}
	}
}
