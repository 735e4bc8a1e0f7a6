package redact

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"html"
	"net/url"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"
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
	echoes["split by zero-width spaces, quoted"] = inQuotes("%+q", between(secret, "\u200b", 1))
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

// inJSON returns a text as it stands between the quotes of JSON.
func inJSON(s string) string {
	encoded, _ := json.Marshal(s)
	return string(encoded[1 : len(encoded)-1])
}

// inQuotes returns a text as it stands between the quotes of %q or %+q.
func inQuotes(format, s string) string {
	quoted := fmt.Sprintf(format, s)
	return quoted[1 : len(quoted)-1]
}

// escapes write a text in ways that servers have.
var escapes = map[string]func(string) string{
	"JSON":         inJSON,
	"JSON in JSON": func(s string) string { return inJSON(inJSON(s)) },
	"JSON, every character": func(s string) string {
		var b strings.Builder
		for _, unit := range utf16.Encode([]rune(s)) {
			fmt.Fprintf(&b, `\u%04X`, unit)
		}
		return b.String()
	},
	"JSON with slashes": func(s string) string { return strings.ReplaceAll(inJSON(s), "/", `\/`) },
	"%q":                func(s string) string { return inQuotes("%q", s) },
	"%+q":               func(s string) string { return inQuotes("%+q", s) },
	"%q in %q":          func(s string) string { return inQuotes("%q", inQuotes("%q", s)) },
	"%q in JSON":        func(s string) string { return inJSON(inQuotes("%q", s)) },
	"single quotes":     func(s string) string { return strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) },
	"JSON in a URL":     func(s string) string { return url.QueryEscape(inJSON(s)) },
	"JSON in HTML":      func(s string) string { return html.EscapeString(inJSON(s)) },
	"a URL in JSON":     func(s string) string { return inJSON(url.PathEscape(s)) },
	"hexadecimal bytes": func(s string) string { return bytewise(`\x%02x`, s) },
	"octal bytes":       func(s string) string { return bytewise(`\%03o`, s) },
}

func bytewise(format, s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		fmt.Fprintf(&b, format, c)
	}
	return b.String()
}

// In these secrets, fewer than eight characters in a row stand for themselves.
func TestSecretIsFoundBehindEscapes(t *testing.T) {
	for _, secret := range []string{`a"b\c"d\e"f`, `s3"cr\3t/ü/"'"<x>`, "🔑\"🗝\"🔒", `\"\"\"\"\"\"`, "tab\tand\nline", `'a"b'c"d'`} {
		for name, escape := range escapes {
			if echo := escape(secret); !(Secrets{secret}).In("not good: \"" + echo + `" (sic)`) {
				t.Errorf("%s: %q may be shown, want not: it tells the secret %q", name, echo, secret)
			}
		}
	}
	for _, harmless := range []string{`C:\users\new\table`, `the scope "a\b" is not known`, `\u`, `\u12`, `\x`, `\ud800\u`, `\400`, `\U99999999`} {
		if (Secrets{"canary-secret"}).In(harmless) {
			t.Errorf("%q may not be shown, want that it may", harmless)
		}
	}
}

// Whatever a secret is, and whatever stands around it.
func FuzzSecretIsFound(f *testing.F) {
	f.Add("a\"b\\c\"d", "not good: ", "!")
	f.Add("süßes öl%41", "%5", "\\u")
	f.Add("\xff\xfe\xfd\xfc", `\`, "")
	f.Fuzz(func(t *testing.T, secret, before, after string) {
		Clean(secret, len(before))
		var secrets Secrets
		secrets.Add(secret)
		if len(secrets) == 0 {
			return
		}
		for name, escape := range escapes {
			if name == "hexadecimal bytes" || name == "octal bytes" || strings.ToValidUTF8(secret, "") == secret {
				// What comes before may begin an escape that takes of the secret.
				if echo := before + " " + escape(secrets[0]) + " " + after; !secrets.In(echo) {
					t.Errorf("%s: %q may be shown, want not: it tells the secret %q", name, echo, secret)
				}
			}
		}
	})
}
