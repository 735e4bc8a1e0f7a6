package outboundauth

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
)

// pipe makes a file that nobody writes to: to open it would not return.
func pipe(tb testing.TB, dir string) string {
	tb.Helper()
	name := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(name, 0o600); err != nil {
		tb.Fatal(err)
	}
	return name
}

// fileOfSize makes a file that takes no room.
func fileOfSize(tb testing.TB, dir string, size int64) string {
	tb.Helper()
	name := writeFile(tb, filepath.Join(dir, fmt.Sprint(size)), nil)
	if err := os.Truncate(name, size); err != nil {
		tb.Fatal(err)
	}
	return name
}

// utf16Text is an ASCII text as Windows saves it for those who ask for Unicode.
func utf16Text(ascii string) []byte {
	encoded := []byte("\xff\xfe")
	for _, c := range []byte(ascii) {
		encoded = append(encoded, c, 0)
	}
	return encoded
}

// onOneLine writes line breaks as in an environment variable.
func onOneLine(source string) string { return strings.ReplaceAll(source, "\n", `\n`) }

// What somebody has to correct is told, and nothing else of a secret.
func TestOddEnds(t *testing.T) {
	for text, want := range map[string]string{
		"":                        "",
		"canary":                  "",
		"ca na\nry\ufeffx":        "", // between the ends, it may well be meant
		"canary\xff":              "", // bytes that are no text
		"\xe9canary":              "",
		"canary\n":                "ends with a line break",
		"canary\r":                "ends with a line break",
		"canary\r\n\r\n":          "ends with a line break",
		"canary ":                 "ends with a blank",
		" canary":                 "begins with a blank",
		"\tcanary\t":              "begins with white space and ends with white space",
		"canary\u00a0":            "ends with white space",
		"\ufeffcanary":            "begins with a byte order mark (U+FEFF)",
		"\ufeffcanary\n":          "begins with a byte order mark (U+FEFF) and ends with a line break",
		"\ufeff":                  "begins with a byte order mark (U+FEFF) and ends with a byte order mark (U+FEFF)",
		"canary\u200b":            "ends with a character that can't be seen",
		"canary\x1b":              "ends with a character that can't be seen",
		"\xff\xfec\x00a\x00":      "is UTF-16",
		"\xfe\xff\x00c\x00a":      "is UTF-16",
		"c\x00a\x00n\x00\r\x00\n": "holds zero bytes, as UTF-16 does",
		"canary\x00":              "holds zero bytes, as UTF-16 does",
		"c a":                     "",
		"\u00fccanary\U0001f511":  "",
	} {
		if got := oddEnds(text); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func TestReadSource(t *testing.T) {
	dir := t.TempDir()
	key := string(keytest.PKCS8(t, keytest.New(t)))
	file := writeFile(t, filepath.Join(dir, "key"), []byte(key))
	large := strings.Repeat("k", maxSecretFile)
	t.Setenv("TEST_KEY", key)
	t.Setenv("TEST_KEY_ON_ONE_LINE", onOneLine(key))
	t.Setenv("TEST_KEY_FILE", file)
	t.Setenv("TEST_KEY_WITHOUT_FIRST_LINE", "canary"+strings.SplitN(key, "\n", 2)[1])
	t.Setenv("TEST_KEY_EMPTY", "")
	t.Setenv("TEST_KEY_BLANK", " \r\n")
	t.Setenv("TEST_KEY_MARKED", byteOrderMark+key)
	t.Setenv("TEST_KEY_FILE_BREAK", file+"\n")
	jwk := string(keytest.JWK(t, keytest.New(t), nil))
	t.Setenv("TEST_JWK", jwk)
	t.Setenv("TEST_JWK_CUT", strings.TrimSuffix(strings.Replace(jwk, "{", `{"kid":"canary",`, 1), "}"))
	secret := "canary-" + strings.Repeat("x", 10_000)

	for _, test := range []struct{ name, template, content, want string }{
		{"file", file, key, ""},
		{"file named by a placeholder", "{env.TEST_KEY_FILE}", key, ""},
		{"file in a directory named by a placeholder", strings.TrimSuffix(file, "key") + "{env.TEST_NAME}", key, ""},
		{"content of a file", "{file." + file + "}", strings.TrimSpace(key), ""},
		{"content of the environment", "{env.TEST_KEY}", strings.TrimSpace(key), ""},
		{"content on one line", "{env.TEST_KEY_ON_ONE_LINE}", onOneLine(key), ""},
		{"JWK of the environment", "{env.TEST_JWK}", jwk, ""},
		{"JWK in the config", jwk, jwk, ""},
		{"content in the config", key, strings.TrimSpace(key), ""},
		{"empty", "{env.TEST_KEY_EMPTY}", "", "private_key: {env.TEST_KEY_EMPTY} is empty: set it where Caddy is started"},
		{"content with a byte order mark", "{env.TEST_KEY_MARKED}", strings.TrimSpace(key), ""},
		{"file with a byte order mark", writeFile(t, filepath.Join(dir, "marked"), []byte(byteOrderMark+key+"\r\n\r\n")), key, ""},
		{"file in UTF-16", writeFile(t, filepath.Join(dir, "utf16"), utf16Text(key)), "", "private_key: the file that it names is UTF-16: save it as UTF-8"},
		{"content in UTF-16", "{file." + filepath.Join(dir, "utf16") + "}", "", "private_key: is UTF-16: save it as UTF-8"},
		{"name with a line break", "{env.TEST_KEY_FILE_BREAK}", "", "private_key: the file that it names does not exist (the name ends with a line break): create the file, or correct its path"},
		{"white space", "{env.TEST_KEY_BLANK}", "", "private_key holds nothing but white space: write a value"},
		{"unset", "{env.TEST_KEY_UNSET}", "", "private_key: {env.TEST_KEY_UNSET} is not set in the environment of this process: set it where Caddy is started"},
		{"no such file", filepath.Join(dir, "none"), "", "private_key: the file that it names does not exist: create the file, or correct its path"},
		{"a directory", dir, "", "private_key: the file that it names is a directory: name a file in it"},
		{"an empty file", writeFile(t, filepath.Join(dir, "empty"), nil), "", "private_key: the file that it names is empty: write the value into the file"},
		{"content of a pipe", "{file." + pipe(t, dir) + "}", "", "/pipe} is no regular file: name one"},
		{"a file that is as large as it may be", writeFile(t, filepath.Join(dir, "large"), []byte(large)), large, ""},
		{"a file that is too large", fileOfSize(t, dir, maxSecretFile+1), "", "private_key: the file that it names is larger than 1 MiB, which is all that Caddy reads: correct its path"},
		{"a placeholder that is not known", "{en.TEST_KEY}", "", "private_key: is neither JSON nor a placeholder that is known; check its name"},
		{"a JWK that is cut", "{env.TEST_JWK_CUT}", "", "private_key: is neither JSON nor a placeholder that is known; check its name"},
		{"a key that lost its first line", "{env.TEST_KEY_WITHOUT_FIRST_LINE}", "", "private_key: the file that it names "},
		{"something that is too long for a name", secret, "", "private_key: the file that it names "},
		{"a name with a zero byte", "canary\x00", "", "private_key: the file that it names "},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("TEST_NAME", "key")
			got, err := readSource(caddy.NewReplacer(), "private_key", test.template)
			wantError(t, err, test.want)
			wantNoCanary(t, err)
			if got := strings.TrimSpace(string(got)); got != strings.TrimSpace(test.content) {
				t.Errorf("got %d bytes, want the %d of the key", len(got), len(test.content))
			}
		})
	}
}
