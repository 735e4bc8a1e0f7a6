package clientcert

import (
	"bytes"
	"context"
	"crypto/tls"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
)

// pairPEM makes a certificate and its key.
func pairPEM(t *testing.T) (certificate, key []byte) {
	t.Helper()
	k := keytest.New(t)
	return keytest.CertificatePEM(t, k), keytest.PKCS8(t, k)
}

func TestPairIsTheSameUntilItChanges(t *testing.T) {
	var cache Cache
	certificate, key := pairPEM(t)
	first, err := cache.Pair(certificate, key)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := cache.Pair(bytes.Clone(certificate), bytes.Clone(key)); err != nil || again != first {
		t.Errorf("got %p, %v for the same texts, want %p", again, err, first)
	}

	// One file has been replaced, the other not yet.
	other, otherKey := pairPEM(t)
	if got, err := cache.Pair(other, key); err == nil {
		t.Errorf("got %p with the key of another certificate, want an error", got)
	}
	if got, err := cache.Pair(certificate, key); err != nil || got != first {
		t.Errorf("got %p, %v after an error, want %p, which was good", got, err, first)
	}
	second, err := cache.Pair(other, otherKey)
	if err != nil || second == first {
		t.Errorf("got %p, %v for another certificate, want another value", second, err)
	}
}

// Whoever binds a token to a certificate needs to know how long it is valid.
func TestPairHasItsLeaf(t *testing.T) {
	for _, setting := range []string{"", "x509keypairleaf=0"} {
		t.Setenv("GODEBUG", setting)
		certificate, key := pairPEM(t)
		pair, err := new(Cache).Pair(certificate, key)
		if err != nil || pair.Leaf == nil || !bytes.Equal(pair.Leaf.Raw, pair.Certificate[0]) {
			t.Errorf("GODEBUG=%s: got none, or one that is not parsed, err %v, want a parsed certificate", setting, err)
		}
	}
}

// A request presents the certificate of its context to a server that asks, and
// it can be told afterwards whether one did.
func TestRequestPresentsItsCertificate(t *testing.T) {
	certificate, err := new(Cache).Pair(pairPEM(t))
	if err != nil {
		t.Fatal(err)
	}
	bare := func(ctx context.Context, _ *tls.Certificate) (context.Context, *Presented) { return ctx, nil }
	for _, test := range []struct {
		name        string
		auth        tls.ClientAuthType
		with        func(context.Context, *tls.Certificate) (context.Context, *Presented)
		certificate *tls.Certificate
		presented   bool
		ignored     bool
	}{
		{"asked for", tls.RequestClientCert, With, certificate, true, false},
		{"not asked for", tls.NoClientCert, With, certificate, false, true},
		{"none, asked for", tls.RequestClientCert, With, nil, false, false},
		{"none, not asked for", tls.NoClientCert, With, nil, false, false},
		{"a context without", tls.RequestClientCert, bare, nil, false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got [][]byte
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				for _, c := range r.TLS.PeerCertificates {
					got = append(got, c.Raw)
				}
			}))
			server.TLS = &tls.Config{ClientAuth: test.auth}
			server.StartTLS()
			defer server.Close()
			client := server.Client()
			Present(client.Transport.(*http.Transport).TLSClientConfig)

			ctx, presented := test.with(t.Context(), test.certificate)
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL, nil)
			if err != nil {
				t.Fatal(err)
			}
			res, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_ = res.Body.Close()
			if len(got) > 0 != test.presented || (test.presented && !bytes.Equal(got[0], certificate.Certificate[0])) {
				t.Errorf("got %d certificates at the server, want that it is presented the one: %v", len(got), test.presented)
			}
			if presented != nil && presented.Ignored() != test.ignored {
				t.Errorf("got that it was ignored: %v, want %v", presented.Ignored(), test.ignored)
			}
		})
	}
}
