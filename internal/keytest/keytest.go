// Package keytest makes keys and certificates for the tests of other packages.
package keytest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"maps"
	"math/big"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// Keys are one key of each kind, generated when the first test asks:
// RSA takes a while.
var Keys = map[string]func() crypto.Signer{
	"RSA":     sync.OnceValue(func() crypto.Signer { return mustGenerate(rsa.GenerateKey(rand.Reader, 2048)) }),
	"P-256":   sync.OnceValue(func() crypto.Signer { return mustGenerate(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }),
	"P-384":   sync.OnceValue(func() crypto.Signer { return mustGenerate(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)) }),
	"P-521":   sync.OnceValue(func() crypto.Signer { return mustGenerate(ecdsa.GenerateKey(elliptic.P521(), rand.Reader)) }),
	"Ed25519": sync.OnceValue(func() crypto.Signer { return ed25519.NewKeyFromSeed([]byte(rand.Text() + "123456")[:ed25519.SeedSize]) }),
}

// Algorithms are those that fit a kind of key, the default first.
var Algorithms = map[string][]string{
	"RSA":     {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"},
	"P-256":   {"ES256"},
	"P-384":   {"ES384"},
	"P-521":   {"ES512"},
	"Ed25519": {"EdDSA"},
}

func mustGenerate[K crypto.Signer](key K, err error) crypto.Signer {
	if err != nil {
		panic(err)
	}
	return key
}

// New generates a key that no other test has.
func New(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func PEM(label string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: label, Bytes: der})
}

func PKCS8(tb testing.TB, key any) []byte {
	tb.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		tb.Fatal(err)
	}
	return PEM("PRIVATE KEY", der)
}

// JWK encodes a key as a JWK, with more members, or other values of them.
func JWK(tb testing.TB, key any, more map[string]any) []byte {
	tb.Helper()
	encoded, err := jose.JSONWebKey{Key: key}.MarshalJSON()
	if err != nil {
		tb.Fatal(err)
	}
	members := make(map[string]any)
	if err := json.Unmarshal(encoded, &members); err != nil {
		tb.Fatal(err)
	}
	maps.Copy(members, more)
	if encoded, err = json.Marshal(members); err != nil {
		tb.Fatal(err)
	}
	return encoded
}

// Certificate returns a certificate that a key has signed itself.
func Certificate(tb testing.TB, key crypto.Signer) []byte {
	tb.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	return der
}

func CertificatePEM(tb testing.TB, key crypto.Signer) []byte {
	tb.Helper()
	return PEM("CERTIFICATE", Certificate(tb, key))
}

// WantQuotesNothing fails the test if an error repeats a part of the source
// that tells something about it.
func WantQuotesNothing(t *testing.T, err error, source string) {
	t.Helper()
	if err == nil {
		return
	}
	text := err.Error()
	for _, label := range []string{"EC PRIVATE KEY", "RSA PRIVATE KEY", "PRIVATE KEY"} { // say what it is
		text = strings.ReplaceAll(text, `"`+label+`"`, "")
	}
	for i := range len(text) - redact.Telltale + 1 {
		if part := text[i : i+redact.Telltale]; strings.Contains(source, part) {
			t.Errorf("got %q, which quotes %q of the source", err, part)
			return
		}
	}
}
