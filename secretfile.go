// Settings that are secrets, and files that hold a secret.

package outboundauth

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2"
)

// resolveSecret replaces the placeholders of a setting that may be secret. The
// error may name an empty placeholder, but never a value.
func resolveSecret(repl *caddy.Replacer, setting, template string) (value string, err error) {
	known := func(name string) bool {
		if strings.HasPrefix(name, filePlaceholder) {
			return true
		}
		_, ok := repl.Get(name)
		return ok
	}
	value = template
	if slices.ContainsFunc(placeholdersIn(template), known) {
		if value, err = repl.ReplaceOrErr(template, true, false); err != nil {
			return "", fmt.Errorf("%s: %w", setting, err)
		}
	}
	switch {
	case value == "":
		return "", fmt.Errorf("%s is empty", setting)
	case strings.TrimSpace(value) == "":
		return "", fmt.Errorf("%s holds nothing but white space", setting)
	}
	return value, nil
}

// filePlaceholder begins the names of the placeholders that read a file.
const filePlaceholder = "file."

// placeholdersIn returns the names of the placeholders that Caddy sees in a text. Not
// all of them have a value. A text without placeholders must not go through Caddy's
// replacer: it would take the backslash out of `\{`.
func placeholdersIn(text string) (names []string) {
	probe := caddy.NewEmptyReplacer()
	probe.Map(func(name string) (any, bool) {
		names = append(names, name)
		return nil, false
	})
	probe.ReplaceKnown(text, "")
	return names
}

// checkUTF8 refuses a text that is not UTF-8. JSON can't hold such a text. In JWTs, in
// the keys of sources and in the config itself, U+FFFD would take its place.
func checkUTF8(text string) error {
	switch {
	case isUTF16(text):
		return errors.New("is UTF-16: save it as UTF-8")
	case strings.ContainsRune(text, utf8.RuneError):
		return errors.New("is not UTF-8, or holds U+FFFD, which stands for what is not: write it in UTF-8")
	}
	return nil
}

// isUTF16 reports whether a text begins as files in UTF-16 do.
func isUTF16(text string) bool {
	return strings.HasPrefix(text, "\xff\xfe") || strings.HasPrefix(text, "\xfe\xff")
}

// readSource returns the content of a file. The setting names the file. But if
// its value begins as such a file does, the value is the content itself. No
// error quotes the value, because it may be a key without its first line.
func readSource(repl *caddy.Replacer, setting, template string) ([]byte, error) {
	value, err := resolveSecret(repl, setting, template)
	if err != nil {
		return nil, err
	}
	switch content := strings.TrimSpace(value); {
	case strings.HasPrefix(content, "-----BEGIN"):
		return []byte(content), nil
	case strings.HasPrefix(content, "{"):
		if json.Valid([]byte(content)) {
			return []byte(content), nil
		}
		return nil, fmt.Errorf("%s: is neither JSON nor a placeholder that is known; check its name", setting)
	}
	return readSecretFile(setting, value)
}

// maxSecretFile is how large a file that a setting names may be, in bytes. The
// largest files are certificates with their chain.
const maxSecretFile = 1 << 20

// readSecretFile reads the file that a setting names. It reads only regular
// files: opening another kind of file may never return, and reading it may never
// end.
func readSecretFile(setting, name string) ([]byte, error) {
	content, err := func() ([]byte, error) {
		info, err := os.Stat(name)
		if err != nil {
			return nil, err
		}
		if !info.Mode().IsRegular() || info.Size() > maxSecretFile {
			return nil, fmt.Errorf("it is no regular file of up to %d bytes", maxSecretFile)
		}
		file, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		return io.ReadAll(io.LimitReader(file, maxSecretFile))
	}()
	if err != nil {
		if reason, ok := errors.AsType[*fs.PathError](err); ok {
			err = reason.Err // leave out the file's name, see readSource
		}
		return nil, fmt.Errorf("%s: reading the file that it names failed: %w", setting, err)
	}
	return content, nil
}
