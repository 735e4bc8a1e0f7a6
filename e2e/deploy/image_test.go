package deploy

import (
	"archive/tar"
	"compress/gzip"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const image = "localhost/caddy-outbound-auth"

// buildah builds and runs images without a daemon, and without a container in
// the strict sense: in a chroot, which works in a container of CI as well.
type buildah struct{ dir string }

func (b buildah) command(args ...string) *exec.Cmd {
	cmd := exec.Command("buildah", append([]string{
		"--storage-driver", "vfs",
		"--root", filepath.Join(b.dir, "root"), "--runroot", filepath.Join(b.dir, "run"),
	}, args...)...)
	// The builder's cache mounts go to TMPDIR.
	cmd.Env = append(os.Environ(), "BUILDAH_ISOLATION=chroot", "TMPDIR="+b.dir)
	return cmd
}

func (b buildah) do(t *testing.T, args ...string) string {
	t.Helper()
	return strings.TrimSpace(output(t, b.command(args...)))
}

// TestImage builds the Dockerfile and runs what comes out of it. The image that
// it starts from is replaced by one that has this machine's programs and Go, so
// that no registry is asked for anything.
func TestImage(t *testing.T) {
	b := buildah{t.TempDir()}
	// Without root, the files of the image's user are somebody else's, which only
	// buildah can remove.
	t.Cleanup(func() {
		b.do(t, "rm", "--all")
		b.do(t, "rmi", "--all", "--force")
	})
	b.build(t)

	var inspected struct {
		OCIv1 struct {
			Config struct {
				User            string
				Entrypoint, Cmd []string
				Env             []string
				Volumes         map[string]any
			} `json:"config"`
		}
	}
	if err := json.Unmarshal([]byte(b.do(t, "inspect", "--type", "image", image)), &inspected); err != nil {
		t.Fatal(err)
	}
	config := inspected.OCIv1.Config
	user, _, _ := strings.Cut(config.User, ":")
	if uid, err := strconv.Atoi(user); err != nil || uid == 0 {
		t.Fatalf("got user %q, want the number of one who isn't root", config.User)
	}

	t.Run("holds nothing else", func(t *testing.T) {
		got := b.files(t)
		want := []string{
			"config " + config.User, "data " + config.User,
			"etc/ssl/certs/ca-certificates.crt 0:0", "usr/bin/caddy 0:0",
		}
		if !slices.Equal(got, want) {
			t.Errorf("got files and owners\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		for _, dir := range []string{"/data", "/config"} {
			if _, ok := config.Volumes[dir]; !ok {
				t.Errorf("got volumes %v, want %s among them", config.Volumes, dir)
			}
		}
	})

	t.Run("has the module", func(t *testing.T) {
		modules := b.do(t, "run", b.container(t), "--", config.Entrypoint[0], "list-modules")
		if !slices.Contains(strings.Fields(modules), "http.reverse_proxy.transport.oauth2") {
			t.Errorf("got modules\n%s\nwant the transport among them", modules)
		}
	})

	t.Run("serves the demonstration", func(t *testing.T) {
		caddyfile := readFile(t, "../../example.Caddyfile")
		gateway := heldPort(t)
		ports := []string{"8080", gateway}
		for _, port := range []string{"9400", "9401", "9402", "9403"} {
			ports = append(ports, port, heldPort(t))
		}
		// All at once: one of the new ports may have another's digits in it.
		caddyfile = replace(t, caddyfile, ports...)
		caddy := b.serve(t, caddyfile, slices.Concat(config.Entrypoint, config.Cmd))

		status, body := caddy.get(t, http.DefaultClient, "http://127.0.0.1:"+gateway+"/orders/42")
		if want := "Authorization: Bearer orders."; status != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("got status %d, body %q, want 200 and %q", status, body, want)
		}
		checkUnprivileged(t, caddy.group)
	})

	// Its own CA is the first thing that Caddy writes to its data.
	t.Run("keeps its data", func(t *testing.T) {
		port := heldPort(t) // for TCP, so without HTTP/3
		caddy := b.serve(t, fmt.Sprintf("{\n\tadmin off\n\tskip_install_trust\n\tauto_https disable_redirects\n\tservers {\n\t\tprotocols h1 h2\n\t}\n}\n"+
			"https://localhost:%s {\n\tbind 127.0.0.1\n\ttls internal\n\trespond kept\n}\n", port),
			slices.Concat(config.Entrypoint, config.Cmd))
		transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
		defer transport.CloseIdleConnections()
		if status, body := caddy.get(t, &http.Client{Transport: transport}, "https://localhost:"+port); body != "kept" {
			t.Errorf("got status %d, body %q, want kept", status, body)
		}
	})
}

// build builds the image, with the caches of this machine's Go in place of the
// builder's.
func (b buildah) build(t *testing.T) {
	t.Helper()
	version := regexp.MustCompile(`(?m)^ARG GO_VERSION=(.+)$`).FindStringSubmatch(readFile(t, "../../Dockerfile"))
	if version == nil {
		t.Fatal("got a Dockerfile without GO_VERSION, want it")
	}
	if !strings.Contains(readFile(t, "../../go.mod"), "\ngo "+version[1]+".") {
		t.Errorf("got Go %s in the Dockerfile, want what go.mod names", version[1])
	}

	base := filepath.Join(b.dir, "base")
	for _, dir := range []string{"usr", "go", "root", "tmp", "etc/ssl/certs"} {
		if err := os.MkdirAll(filepath.Join(base, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"bin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+name, filepath.Join(base, name)); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(base, "etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")
	writeFile(t, filepath.Join(base, "etc/ssl/certs/ca-certificates.crt"), readFile(t, "/etc/ssl/certs/ca-certificates.crt"))

	var goEnv struct{ GOROOT, GOMODCACHE, GOCACHE string }
	if err := json.Unmarshal([]byte(output(t, exec.Command("go", "env", "-json"))), &goEnv); err != nil {
		t.Fatal(err)
	}
	container := b.do(t, "from", "scratch")
	b.do(t, "copy", container, base, "/")
	b.do(t, "config", "--env", "PATH=/toolchain/bin:/usr/bin", "--env", "GOPATH=/go", "--env", "GOTOOLCHAIN=local", container)
	b.do(t, "commit", container, "docker.io/library/golang:"+version[1])

	b.do(t, "build", "--pull-never", "--network", "host", "--tag", image,
		"--volume", "/usr:/usr:ro", "--volume", goEnv.GOROOT+":/toolchain:ro",
		"--volume", goEnv.GOMODCACHE+":/go/pkg/mod", "--volume", goEnv.GOCACHE+":/root/.cache/go-build",
		"../..")
}

// files returns the files and the empty directories of the image, with their
// owners.
func (b buildah) files(t *testing.T) []string {
	t.Helper()
	dir := filepath.Join(b.dir, "pushed")
	b.do(t, "push", image, "dir:"+dir)
	var manifest struct{ Layers []struct{ Digest string } }
	if err := json.Unmarshal([]byte(readFile(t, filepath.Join(dir, "manifest.json"))), &manifest); err != nil {
		t.Fatal(err)
	}
	owners := make(map[string]string)
	for _, layer := range manifest.Layers {
		file, err := os.Open(filepath.Join(dir, strings.TrimPrefix(layer.Digest, "sha256:")))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		unzipped, err := gzip.NewReader(file)
		if err != nil {
			t.Fatal(err)
		}
		for r := tar.NewReader(unzipped); ; {
			header, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			name := strings.Trim(filepath.Clean(header.Name), "/.")
			owners[name] = fmt.Sprintf("%d:%d", header.Uid, header.Gid)
		}
	}
	var files []string
	for name, owner := range owners {
		isParent := func(other string) bool { return name == "" || strings.HasPrefix(other, name+"/") }
		parent := false
		for other := range owners {
			parent = parent || isParent(other)
		}
		if !parent {
			files = append(files, name+" "+owner)
		}
	}
	slices.Sort(files)
	return files
}

// container returns a container of the image.
func (b buildah) container(t *testing.T) string {
	t.Helper()
	return b.do(t, "from", "--pull-never", image)
}

// serve runs the image with a Caddyfile, without any capability, until the test
// ends.
func (b buildah) serve(t *testing.T, caddyfile string, command []string) *program {
	t.Helper()
	file := writeFile(t, filepath.Join(t.TempDir(), "Caddyfile"), caddyfile)
	args := []string{"run", "--cap-drop", "all", "--volume", file + ":/etc/caddy/Caddyfile:ro", b.container(t), "--"}
	return start(t, b.command(append(args, command...)...))
}

// checkUnprivileged checks who runs Caddy in a process group, and with which
// capabilities.
func checkUnprivileged(t *testing.T, group int) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, file := range files {
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // ended meanwhile
		}
		// pid (command) state parent group ...
		var state string
		var parent, itsGroup int
		_, rest, ok := strings.Cut(string(stat), " (caddy) ")
		if !ok {
			continue
		}
		if _, err := fmt.Sscan(rest, &state, &parent, &itsGroup); err != nil || itsGroup != group {
			continue
		}
		found++
		status := readFile(t, filepath.Join(filepath.Dir(file), "status"))
		if regexp.MustCompile(`(?m)^Uid:\s.*\b0\b`).MatchString(status) || !regexp.MustCompile(`(?m)^CapEff:\s+0+$`).MatchString(status) {
			t.Errorf("got a process with\n%s\nwant another user than root, without capabilities", status)
		}
	}
	if found == 0 {
		t.Error("got no process of Caddy, want one")
	}
}
