package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"
)

// TestHTTP3RevokedTokenIsReplaced has the upstream refuse a token that it has
// accepted before. HTTP/3 is the protocol in which the length of any request
// may be unknown to the gateway, even of one that has no body.
func TestHTTP3RevokedTokenIsReplaced(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	content := make([]byte, 10<<10)
	if _, err := io.ReadFull(newBigBody(), content); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		method string
		body   func() io.Reader // one for each request
		want   string           // what the upstream is to get, as bodySum tells it
	}{
		{
			"no body", "GET",
			func() io.Reader { return nil },
			fmt.Sprintf("GET 0 %x", sha256.Sum256(nil)),
		},
		{
			"known length", "POST",
			func() io.Reader { return bytes.NewReader(content) },
			fmt.Sprintf("POST %d %x", len(content), sha256.Sum256(content)),
		},
		{
			"unannounced length", "POST",
			func() io.Reader { return piecemeal(content) },
			fmt.Sprintf("POST -1 %x", sha256.Sum256(content)),
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := as.tokenRequests(t)
			u := newUpstream(t, as, c)
			u.handler = http.HandlerFunc(bodySum)
			// By the time of a refusal, the client's body has all been sent,
			// so that only the gateway can send it again.
			srv := httptest.NewServer(bodyFirst{u})
			closeAtEnd(t, srv)
			gw := startGateway(t, gatewayConfig{
				site:  proxy{to: srv.Listener.Addr().String(), as: as, client: c}.String(),
				env:   []string{"E2E_SECRET=" + c.Secret},
				https: true,
			})
			httpClient := gw.http3Client(t)
			send := func() {
				t.Helper()
				resp := doWith(t, httpClient, newRequest(t, tt.method, gw.url, tt.body()))
				if got := string(resp.body); resp.StatusCode != http.StatusOK || got != tt.want {
					t.Errorf("answer = %s %s, want 200 and %s", resp.Status, got, tt.want)
				}
			}

			send()
			u.revoke()
			send()
			u.wantAccepted(t, 2, "HTTP/1.1")
			if got := u.revokedSeen(); got != 1 {
				t.Errorf("requests with the revoked token = %d, want 1", got)
			}
			if got := len(u.tokensSeen()); got != 2 {
				t.Errorf("tokens accepted = %d, want 2", got)
			}
			if got := as.tokenRequests(t) - before; got != 2 {
				t.Errorf("token requests = %d, want 2", got)
			}
		})
	}
}

// http3Client returns a client that speaks nothing but HTTP/3.
func (gw *gateway) http3Client(t *testing.T) *http.Client {
	t.Helper()
	config, err := gw.tlsConfig()
	if err != nil {
		t.Fatal(err)
	}
	transport := &http3.Transport{TLSClientConfig: config}
	t.Cleanup(func() { transport.Close() })
	return &http.Client{Transport: transport, Timeout: streamTimeout}
}

// piecemeal returns a reader whose length http.NewRequest can't tell.
func piecemeal(content []byte) io.Reader {
	r, w := io.Pipe()
	go func() {
		defer w.Close()
		for piece := range slices.Chunk(content, 1000) {
			if _, err := w.Write(piece); err != nil {
				return // the client has closed its end
			}
		}
	}()
	return r
}

// bodyFirst is an upstream that reads a body before it looks at the token.
type bodyFirst struct{ *upstream }

func (u bodyFirst) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	u.upstream.ServeHTTP(w, r)
}

// bodySum answers with the method, the length that was announced, and the
// SHA-256 of the body.
func bodySum(w http.ResponseWriter, r *http.Request) {
	hash := sha256.New()
	if _, err := io.Copy(hash, r.Body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	fmt.Fprintf(w, "%s %d %x", r.Method, r.ContentLength, hash.Sum(nil))
}
