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

// onOneLine writes line breaks as in an environment variable.
func onOneLine(source string) string { return strings.ReplaceAll(source, "\n", `\n`) }

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
		{"empty", "{env.TEST_KEY_EMPTY}", "", "private_key: evaluated placeholder {env.TEST_KEY_EMPTY} is empty"},
		{"unset", "{env.TEST_KEY_UNSET}", "", "private_key: evaluated placeholder {env.TEST_KEY_UNSET} is empty"},
		{"no such file", filepath.Join(dir, "none"), "", "private_key: reading the file that it names failed: no such file or directory"},
		{"a directory", dir, "", "private_key: reading the file that it names failed: it is no regular file of up to 1048576 bytes"},
		{"a file that is as large as it may be", writeFile(t, filepath.Join(dir, "large"), []byte(large)), large, ""},
		{"a file that is too large", fileOfSize(t, dir, maxSecretFile+1), "", "private_key: reading the file that it names failed: it is no regular file of up to 1048576 bytes"},
		{"a placeholder that is not known", "{en.TEST_KEY}", "", "private_key: is neither JSON nor a placeholder that is known; check its name"},
		{"a JWK that is cut", "{env.TEST_JWK_CUT}", "", "private_key: is neither JSON nor a placeholder that is known; check its name"},
		{"a key that lost its first line", "{env.TEST_KEY_WITHOUT_FIRST_LINE}", "", "private_key: reading the file"},
		{"something that is too long for a name", secret, "", "private_key: reading the file"},
		{"a name with a zero byte", "canary\x00", "", "private_key: reading the file"},
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
