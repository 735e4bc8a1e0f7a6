// Settings that are secrets, and files that hold one.

package outboundauth

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

// resolveSecret replaces the placeholders of a setting that may be secret.
// The error names a placeholder that is empty, never a value.
func resolveSecret(repl *caddy.Replacer, setting, template string) (string, error) {
	value, err := repl.ReplaceOrErr(template, true, false)
	if err != nil {
		return "", fmt.Errorf("%s: %w", setting, err)
	}
	if value == "" {
		return "", fmt.Errorf("%s is empty", setting)
	}
	return value, nil
}

// readSource reads a setting that names a file or, if its value begins like
// what the file would hold, is its content. No error quotes the value, which
// may be a key that lost its first line.
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

// maxSecretFile bounds the files that settings name, in bytes: certificates
// with their chain are the largest.
const maxSecretFile = 1 << 20

// readSecretFile reads the file that a setting names. Of others than regular
// files, opening one may never return, and reading never end.
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
			err = reason.Err // without the name, see readSource
		}
		return nil, fmt.Errorf("%s: reading the file that it names failed: %w", setting, err)
	}
	return content, nil
}
