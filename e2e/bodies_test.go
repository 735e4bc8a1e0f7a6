package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

const (
	bigBody = 100 << 20

	// memoryLimit is by how much the gateway may grow while a big body passes.
	memoryLimit = bigBody / 2
)

// TestBigUpload sends a body that is known to neither side in advance.
func TestBigUpload(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	u.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hash := sha256.New()
		n, err := io.Copy(hash, r.Body)
		fmt.Fprintf(w, "%d %x %v", n, hash.Sum(nil), err)
	})
	gw := startProxy(t, proxy{to: u.serve(t), as: as, client: c})
	gw.get(t, "/", 200) // what the first request costs isn't the body's cost

	before := gw.peakMemory()
	hash := sha256.New()
	resp := do(t, newRequest(t, "POST", gw.url, io.TeeReader(newBigBody(), hash)))
	if want := fmt.Sprintf("%d %x <nil>", bigBody, hash.Sum(nil)); string(resp.body) != want {
		t.Errorf("upstream got = %s, want %s", resp.body, want)
	}
	gw.wantMemory(t, before)
	u.wantAccepted(t, 2, "HTTP/1.1")
}

func TestBigDownload(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	sent := make(chan string, 1)
	u.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/big" {
			return
		}
		hash := sha256.New()
		io.Copy(w, io.TeeReader(newBigBody(), hash))
		sent <- hex.EncodeToString(hash.Sum(nil))
	})
	gw := startProxy(t, proxy{to: u.serve(t), as: as, client: c})
	gw.get(t, "/", 200)

	before := gw.peakMemory()
	resp, err := http.DefaultClient.Do(newRequest(t, "GET", gw.url+"/big", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	hash := sha256.New()
	n, err := io.Copy(hash, resp.Body)
	if err != nil || n != bigBody {
		t.Fatalf("download = %d bytes, %v, want %d", n, err, bigBody)
	}
	if got, want := hex.EncodeToString(hash.Sum(nil)), <-sent; got != want {
		t.Errorf("download's SHA-256 = %s, want %s", got, want)
	}
	gw.wantMemory(t, before)
	u.wantAccepted(t, 2, "HTTP/1.1")
}

// TestTrailers sends headers that are known only after the body, both ways.
func TestTrailers(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	u := newUpstream(t, as, c)
	u.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Response-Sum")
		io.Copy(w, r.Body)
		w.Header().Set("X-Response-Sum", "response-"+r.Trailer.Get("X-Request-Sum"))
	})
	gw := startProxy(t, proxy{to: u.serve(t), as: as, client: c})

	req := newRequest(t, "POST", gw.url, nil)
	req.Trailer = http.Header{"X-Request-Sum": nil}
	req.ContentLength = -1
	// The trailer is set while the body is read, after the headers went out.
	req.Body = io.NopCloser(io.MultiReader(strings.NewReader("chunk"), readerFunc(func([]byte) (int, error) {
		req.Trailer.Set("X-Request-Sum", "request")
		return 0, io.EOF
	})))
	resp := do(t, req)
	if got, want := resp.Trailer.Get("X-Response-Sum"), "response-request"; got != want {
		t.Errorf("response trailer = %q, want %q", got, want)
	}
	if got, want := string(resp.body), "chunk"; got != want {
		t.Errorf("body = %q, want %q", got, want)
	}
	u.wantAccepted(t, 1, "HTTP/1.1")
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// newBigBody returns bytes that don't compress, made as they are read.
func newBigBody() io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{}), bigBody)
}

// peakMemory returns the most memory that the gateway has had at any time, in
// bytes, or zero where the system doesn't tell.
func (gw *gateway) peakMemory() int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", gw.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	_, peak, _ := strings.Cut(string(status), "VmHWM:")
	var kib int
	fmt.Sscanf(peak, "%d kB", &kib)
	return kib << 10
}

// wantMemory fails the test if the gateway has grown too much since.
func (gw *gateway) wantMemory(t *testing.T, before int) {
	t.Helper()
	grown := gw.peakMemory() - before
	if grown > memoryLimit {
		t.Errorf("gateway grew by %d MiB, want %d at most", grown>>20, memoryLimit>>20)
	}
	t.Logf("the gateway's peak memory grew by %d MiB from %d", grown>>20, before>>20)
}
