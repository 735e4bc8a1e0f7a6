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
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2"
)

// resolveSecret replaces the placeholders of a setting that may be secret. The
// error may name an empty placeholder, but never a value. mayWait is that of contentOf.
func resolveSecret(repl *caddy.Replacer, setting, template string, mayWait bool) (value string, err error) {
	known := func(name string) bool {
		if strings.HasPrefix(name, filePlaceholder) {
			return true
		}
		_, ok := repl.Get(name)
		return ok
	}
	value = template
	if slices.ContainsFunc(placeholdersIn(template), known) {
		if value, err = replacePlaceholders(repl, setting, template, mayWait, false); err != nil {
			return "", err
		}
	}
	switch {
	case value == "":
		return "", fmt.Errorf("%s is empty", setting)
	case strings.TrimSpace(value) == "":
		return "", &settingError{wrong: setting + " holds nothing but white space", todo: "write a value"}
	}
	return value, nil
}

// The beginnings of the names of placeholders that read a file, or a variable.
const (
	filePlaceholder     = "file."
	variablePlaceholder = "env."
)

// replacePlaceholders replaces the placeholders of a setting, as Caddy's replacer does.
// But Caddy does not tell why there is no value, and logs what it can't read each time.
// So files are read here. strict says that an unknown placeholder is an error.
func replacePlaceholders(repl *caddy.Replacer, setting, text string, mayWait, strict bool) (string, error) {
	var fault error
	replacer := caddy.NewEmptyReplacer()
	replacer.Map(func(name string) (any, bool) { // the first that yields "" ends the replacement
		if file, ok := strings.CutPrefix(name, filePlaceholder); ok {
			content, err := contentOf(file, mayWait)
			content = bytes.TrimSuffix(bytes.TrimSuffix(content, []byte("\n")), []byte("\r")) // as Caddy
			if err == nil && len(content) == 0 {
				err = errEmptyFile
			}
			if err != nil {
				fault = fileError(setting, "{"+name+"}", file, err)
				return "", true
			}
			return string(content), true
		}
		value, ok := repl.Get(name)
		if variable, ofEnv := strings.CutPrefix(name, variablePlaceholder); ofEnv && value == "" {
			fault = variableError(setting, variable)
		}
		return value, ok
	})
	value, err := replacer.ReplaceOrErr(text, true, strict)
	switch {
	case fault != nil:
		return "", fault
	case err != nil:
		return "", fmt.Errorf("%s: %w", setting, err)
	}
	return value, nil
}

// variableError says why an environment variable has no value.
func variableError(setting, variable string) error {
	wrong := "is not set in the environment of this process"
	if _, set := os.LookupEnv(variable); set {
		wrong = "is empty"
	}
	return &settingError{
		wrong: fmt.Sprintf("%s: {%s%s} %s", setting, variablePlaceholder, variable, wrong),
		todo:  "set it where Caddy is started, in its service or its shell, and start it again",
	}
}

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
	value, err := resolveSecret(repl, setting, template, false)
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

// maxSecretFile is how large a file that a setting names may be, in bytes. Caddy reads
// no more of one. The largest files are certificates with their chain.
const maxSecretFile = 1 << 20

// What contentOf and those who call it find wrong with a file.
var (
	errDirectory  = errors.New("is a directory")
	errNotRegular = errors.New("is no regular file")
	errLargeFile  = errors.New("is too large")
	errEmptyFile  = errors.New("is empty")
)

// contentOf returns the content of a file that a setting names. It reads a pipe or a
// device only if mayWait says so: to open it may never return.
func contentOf(name string, mayWait bool) ([]byte, error) {
	info, err := os.Stat(name)
	switch {
	case err != nil:
		return nil, err
	case info.IsDir():
		return nil, errDirectory
	case !info.Mode().IsRegular() && !mayWait:
		return nil, errNotRegular
	}
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, maxSecretFile+1)) // a device may have no end
	if err == nil && len(content) > maxSecretFile {
		err = errLargeFile
	}
	return content, err
}

// fileFaults say what is wrong with a file, and what to do.
var fileFaults = []struct {
	err         error
	wrong, todo string
}{
	{fs.ErrNotExist, "does not exist", "create the file, or correct its path"},
	{fs.ErrPermission, "may not be read by the user that Caddy runs as", "allow this user to read the file, and to enter its directory"},
	{errEmptyFile, "is empty", "write the value into the file"},
	{errDirectory, "is a directory", "name a file in it"},
	{errNotRegular, "is no regular file", "name one: a pipe or a device could keep Caddy waiting"},
	{errLargeFile, "is larger than 1 MiB, which is all that Caddy reads", "correct its path"},
}

// fileError says why the content of a file can't be used. what stands for the file in
// the error, which does not quote its name.
func fileError(setting, what, name string, err error) error {
	if reason, ok := errors.AsType[*fs.PathError](err); ok {
		err = reason.Err // leave out the file's name, see readSource
	}
	wrong, todo := fmt.Sprintf("can't be read (%v)", err), "check the file and its path"
	for _, fault := range fileFaults {
		if errors.Is(err, fault.err) {
			wrong, todo = fault.wrong, fault.todo
		}
	}
	if odd := oddEnds(name); odd != "" {
		wrong += " (the name " + odd + ")"
	}
	if errors.Is(err, fs.ErrNotExist) && !filepath.IsAbs(name) {
		todo += ", which is relative to Caddy's working directory"
	}
	return &settingError{wrong: setting + ": " + what + " " + wrong, todo: todo, cause: err}
}

// readSecretFile reads the file that a setting names, with a key, a certificate or a
// JWT. It leaves out a byte order mark.
func readSecretFile(setting, name string) ([]byte, error) {
	content, err := contentOf(name, false)
	if err == nil && len(content) == 0 {
		err = errEmptyFile
	}
	if err != nil {
		return nil, fileError(setting, "the file that it names", name, err)
	}
	if isUTF16(string(content[:min(2, len(content))])) {
		return nil, fmt.Errorf("%s: the file that it names is UTF-16: save it as UTF-8", setting)
	}
	return bytes.TrimPrefix(content, []byte(byteOrderMark)), nil
}
