package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// The distribution of Keycloak that is tested. It runs on Java 17, which is Debian 12's.
const (
	keycloakName = "keycloak-26.7.3" // also the directory in the zip
	keycloakZip  = "https://repo1.maven.org/maven2/org/keycloak/keycloak-quarkus-dist/26.7.3/keycloak-quarkus-dist-26.7.3.zip"
	keycloakSum  = "27a6535553c3cdcd083872ba40629efafb3475e3b758e0c6f691395561dd0f1f" // SHA-256 of the zip

	// downloadTimeout is how long the download of its 177 MB may take.
	downloadTimeout = 10 * time.Minute
)

// unpackKeycloak writes the distribution to a new directory. It downloads it only once.
func unpackKeycloak(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), downloadTimeout)
	defer cancel()
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	file, err := cachedFile(ctx, filepath.Join(cache, "caddy-outbound-auth"), keycloakName+".zip", keycloakZip, keycloakSum)
	if err != nil {
		return fmt.Errorf("downloading Keycloak: %w", err)
	}
	unpack := exec.CommandContext(ctx, "go", "run", "./keycloak", file, keycloakName, dir)
	if out, err := unpack.CombinedOutput(); err != nil {
		return fmt.Errorf("unpacking Keycloak: %w\n%s", err, out)
	}
	return nil
}

// cachedFile returns the path of a file with this sum. It downloads the file if the
// directory does not have it, or has something else under its name.
func cachedFile(ctx context.Context, dir, name, url, sum string) (string, error) {
	path := filepath.Join(dir, name)
	if cached, err := os.Open(path); err == nil {
		defer cached.Close()
		if checkSum(cached, sum) == nil {
			return path, nil
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	const tries = 3 // a network may fail for a moment
	var err error
	for range tries {
		if err = download(ctx, path, url, sum); err == nil || ctx.Err() != nil {
			break
		}
	}
	return path, err
}

// download writes a file that has this sum. Another test may read the file, or download
// it as well: nobody ever finds a part of it under its name.
func download(ctx context.Context, path, url, sum string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	part, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(part.Name())
	defer part.Close()
	if err := checkSum(io.TeeReader(resp.Body, part), sum); err != nil {
		return fmt.Errorf("GET %s: %w", url, err)
	}
	if err := part.Close(); err != nil {
		return err
	}
	return os.Rename(part.Name(), path)
}

// checkSum reads to the end, and returns an error unless that has this SHA-256.
func checkSum(r io.Reader, want string) error {
	hash := sha256.New()
	if _, err := io.Copy(hash, r); err != nil {
		return err
	}
	if got := hex.EncodeToString(hash.Sum(nil)); got != want {
		return fmt.Errorf("got the SHA-256 %s, want %s", got, want)
	}
	return nil
}

// TestCachedFile downloads a file once, and again if what is in the cache is broken.
// Nothing but the right content gets there.
func TestCachedFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	const content = "right"
	sum := sha256.Sum256([]byte(content))
	downloads, served := 0, content
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		downloads++
		io.WriteString(w, served)
	}))
	closeAtEnd(t, server)
	cached := func() (string, error) {
		return cachedFile(t.Context(), dir, "file", server.URL, hex.EncodeToString(sum[:]))
	}
	wantContent := func(total int) string {
		t.Helper()
		path, err := cached()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != content {
			t.Errorf("file = %q, %v, want %q", got, err, content)
		}
		if downloads != total {
			t.Errorf("downloads = %d, want %d", downloads, total)
		}
		return path
	}
	wantContent(1)
	path := wantContent(1)
	replaceFile(t, path, []byte("broken"))
	wantContent(2)

	replaceFile(t, path, []byte("broken"))
	served = "wrong"
	if _, err := cached(); err == nil {
		t.Error("cachedFile() of a wrong download = nil, want an error")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("files in the cache = %v, %v, want the one of before", left, err)
	}
	served = content
	wantContent(6) // three of them brought what is wrong
}
