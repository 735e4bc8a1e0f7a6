// Settings that are secrets, and files that hold a secret.

package outboundauth

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unicode"
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

// byteOrderMark is what some editors begin a file in UTF-8 with.
const byteOrderMark = "\uFEFF"

// oddEnds says with what invisible character a text begins or ends, which is rarely
// meant. It returns "" if there is none. It says nothing else about the text.
func oddEnds(text string) string {
	switch {
	case isUTF16(text):
		return "is UTF-16"
	case strings.Contains(text, "\x00"):
		return "holds zero bytes, as UTF-16 does"
	}
	first, _ := utf8.DecodeRuneInString(text)
	last, _ := utf8.DecodeLastRuneInString(text)
	var odd []string
	if what := unseen(first); what != "" {
		odd = append(odd, "begins with "+what)
	}
	if what := unseen(last); what != "" {
		odd = append(odd, "ends with "+what)
	}
	return strings.Join(odd, " and ")
}

// unseen says what a character is that nobody sees; "" if it is none.
func unseen(r rune) string {
	switch {
	case r == utf8.RuneError: // no text
		return ""
	case r == '\n' || r == '\r':
		return "a line break"
	case r == ' ':
		return "a blank"
	case string(r) == byteOrderMark:
		return "a byte order mark (U+FEFF)"
	case unicode.IsSpace(r):
		return "white space"
	case !unicode.IsPrint(r):
		return "a character that can't be seen"
	}
	return ""
}

// trimText returns a text without what may stand around a key, a certificate or a JWT.
func trimText(text string) string {
	return strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(text), byteOrderMark))
}

// readSource returns the content of a file. The setting names the file. But if
// its value begins as such a file does, the value is the content itself. No
// error quotes the value, because it may be a key without its first line.
func readSource(repl *caddy.Replacer, setting, template string) ([]byte, error) {
	value, err := resolveSecret(repl, setting, template)
	if err != nil {
		return nil, err
	}
	switch content := trimText(value); {
	case isUTF16(value):
		return nil, fmt.Errorf("%s: is UTF-16: save it as UTF-8", setting)
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

// openSecretFile opens a file that a setting names. It opens only regular files:
// opening another kind of file may never return, and reading it may never end.
func openSecretFile(name string) (*os.File, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxSecretFile {
		return nil, fmt.Errorf("it is no regular file of up to %d bytes", maxSecretFile)
	}
	return os.Open(name)
}

// readSecretFile reads the file that a setting names, with a key, a certificate or a
// JWT. It leaves out a byte order mark.
func readSecretFile(setting, name string) ([]byte, error) {
	content, err := func() ([]byte, error) {
		file, err := openSecretFile(name)
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
		err = fmt.Errorf("%s: reading the file that it names failed: %w", setting, err)
		if odd := oddEnds(name); odd != "" {
			err = fmt.Errorf("%w (the name %s)", err, odd)
		}
		return nil, err
	}
	if isUTF16(string(content[:min(2, len(content))])) {
		return nil, fmt.Errorf("%s: the file that it names is UTF-16: save it as UTF-8", setting)
	}
	return bytes.TrimPrefix(content, []byte(byteOrderMark)), nil
}

// canRead reports whether Caddy can replace the placeholders of a template now, without
// a wait and without an error in the log.
func canRead(template string) bool {
	for _, name := range placeholdersIn(template) {
		if name, ok := strings.CutPrefix(name, filePlaceholder); ok {
			file, err := openSecretFile(name)
			if err != nil {
				return false
			}
			file.Close()
		}
	}
	return true
}
