package e2e

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
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// rsaKey is one for all: to make one takes a quarter of a second.
var rsaKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

// newKey returns a private key for the algorithm.
func newKey(t *testing.T, algorithm string) crypto.Signer {
	t.Helper()
	var (
		key crypto.Signer
		err error
	)
	switch algorithm {
	case "ES256":
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ES384":
		key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "ES512":
		key, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	case "EdDSA":
		_, key, err = ed25519.GenerateKey(rand.Reader)
	default:
		key, err = rsaKey()
	}
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// keySet is how a server is told of a client's key.
func keySet(key crypto.Signer, id string) *jose.JSONWebKeySet {
	return &jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: id, Use: "sig"}}}
}

func pkcs8(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func pkcs1(key *rsa.PrivateKey) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
}

func sec1(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

func jwk(t *testing.T, key crypto.Signer, id, algorithm string) []byte {
	t.Helper()
	data, err := json.Marshal(jose.JSONWebKey{Key: key, KeyID: id, Algorithm: algorithm, Use: "sig"})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestSigningAlgorithms authenticates with each algorithm that the server
// offers. The server takes from each client no other than its own.
func TestSigningAlgorithms(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	var offered struct {
		Algorithms []string `json:"token_endpoint_auth_signing_alg_values_supported"`
	}
	getJSON(t, as.issuer+"/.well-known/openid-configuration", &offered)
	want := []string{
		"ES256", "ES384", "ES512", "EdDSA", "HS256", "HS384", "HS512",
		"PS256", "PS384", "PS512", "RS256", "RS384", "RS512",
	}
	if slices.Sort(offered.Algorithms); !slices.Equal(offered.Algorithms, want) {
		t.Fatalf("server offers %q, want %q", offered.Algorithms, want)
	}
	// The key says which, or nothing else is usual.
	derived := []string{"ES256", "ES384", "ES512", "EdDSA", "HS256", "RS256"}

	var (
		routes    []route
		upstreams []*upstream
	)
	// RFC 7518 §3.2 wants it as long as the hash.
	secret := strings.Repeat("a secret of a client, ", 4)
	for _, algorithm := range offered.Algorithms {
		c := client{ID: "client of " + algorithm, Algorithm: algorithm}
		settings := []string{as.tokenURL()}
		if !slices.Contains(derived, algorithm) {
			settings = append(settings, "signing_alg "+algorithm)
		}
		if strings.HasPrefix(algorithm, "HS") {
			c.Method, c.Secret = "client_secret_jwt", secret
			settings = append(settings, "client_secret {env.E2E_SECRET}")
		} else {
			key := newKey(t, algorithm)
			c.Method, c.Keys = "private_key_jwt", keySet(key, "key of "+algorithm)
			settings = append(settings, "private_key "+writeFile(t, "key.pem", pkcs8(t, key)), "key_id `key of "+algorithm+"`")
		}
		as.register(t, c)
		u := newUpstream(t, as, c)
		upstreams = append(upstreams, u)
		routes = append(routes, route{client: c, to: u.serve(t), settings: settings})
	}
	gw := startRoutes(t, routes, "E2E_SECRET="+secret)

	for i, algorithm := range offered.Algorithms {
		t.Run(algorithm, func(t *testing.T) {
			c, u := routes[i].client, upstreams[i]
			gw.get(t, routePath(i), 200)
			gw.get(t, routePath(i), 200)
			u.wantAccepted(t, 2, "HTTP/1.1")
			stats := as.stats(t)
			if got := stats.Granted[c.ID]; got != 1 {
				t.Errorf("tokens granted = %d, want 1", got)
			}
			// Without an issuer, what servers in the field expect.
			used := stats.Assertions[c.ID]
			if used.Header.Algorithm != algorithm || used.Header.Type != "JWT" || used.Claims.Audience != as.issuer+"/token" {
				t.Errorf("assertion = %+v, want one signed with %s, of type JWT, for %s/token", used, algorithm, as.issuer)
			}
			if want := "key of " + algorithm; c.Method == "private_key_jwt" && used.Header.KeyID != want {
				t.Errorf("kid = %q, want %q", used.Header.KeyID, want)
			}
		})
	}
}

// TestPrivateKeySources has keys in all forms in which people keep them, and
// in all places.
func TestPrivateKeySources(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	rsaSigner, err := rsaKey()
	if err != nil {
		t.Fatal(err)
	}
	ec := newKey(t, "ES256").(*ecdsa.PrivateKey)
	ed := newKey(t, "EdDSA")
	ecFile := writeFile(t, "ec.pem", pkcs8(t, ec))

	tests := []struct {
		name    string
		key     crypto.Signer
		setting string
		kid     string // in the assertion
		alg     string
	}{
		{"PKCS#1 file", rsaSigner, writeFile(t, "pkcs1.pem", pkcs1(rsaSigner)), "", "RS256"},
		{"PKCS#8 file, RSA", rsaSigner, writeFile(t, "pkcs8.pem", pkcs8(t, rsaSigner)), "", "RS256"},
		{"PKCS#8 file, EC", ec, ecFile, "", "ES256"},
		{"PKCS#8 file, Ed25519", ed, writeFile(t, "ed.pem", pkcs8(t, ed)), "", "EdDSA"},
		{"SEC1 file", ec, writeFile(t, "sec1.pem", sec1(t, ec)), "", "ES256"},
		// OpenSSL writes the curve in front of the key.
		{"SEC1 file with parameters", ec, writeFile(t, "sec1.pem", slices.Concat(
			pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte("\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07")}),
			sec1(t, ec))), "", "ES256"},
		{"JWK file", ec, writeFile(t, "ec.jwk", jwk(t, ec, "of the JWK", "")), "of the JWK", "ES256"},
		{"JWK file that names the algorithm", rsaSigner, writeFile(t, "rsa.jwk", jwk(t, rsaSigner, "rsa", "PS384")), "rsa", "PS384"},
		{"PEM in the environment", ec, "{env.E2E_PEM}", "", "ES256"},
		{"JWK in the environment", ec, "{env.E2E_JWK}", "env", "ES256"},
		{"path in the environment", ec, "{env.E2E_PATH}", "", "ES256"},
		{"PEM by file placeholder", ec, "{file." + ecFile + "}", "", "ES256"},
		{"JWK by file placeholder", ec, "{file." + writeFile(t, "ec.jwk", jwk(t, ec, "file", "")) + "}", "file", "ES256"},
	}
	var (
		routes    []route
		upstreams []*upstream
	)
	for _, tt := range tests {
		c := client{ID: tt.name, Method: "private_key_jwt", Keys: keySet(tt.key, tt.kid)}
		as.register(t, c)
		u := newUpstream(t, as, c)
		upstreams = append(upstreams, u)
		routes = append(routes, route{
			client: c, to: u.serve(t),
			settings: []string{as.tokenURL(), "private_key " + tt.setting},
		})
	}
	gw := startRoutes(t, routes,
		"E2E_PEM="+string(pkcs8(t, ec)), "E2E_JWK="+string(jwk(t, ec, "env", "")), "E2E_PATH="+ecFile)

	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			gw.get(t, routePath(i), 200)
			upstreams[i].wantAccepted(t, 1, "HTTP/1.1")
			used := as.stats(t).Assertions[tt.name].Header
			if used.KeyID != tt.kid || used.Algorithm != tt.alg {
				t.Errorf("assertion's header = %+v, want kid %q and alg %s", used, tt.kid, tt.alg)
			}
		})
	}
}

// TestAssertionSettings overrides what else is in an assertion.
func TestAssertionSettings(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	key := newKey(t, "ES256")
	c := client{ID: "jwt", Method: "private_key_jwt", Keys: keySet(key, "")}
	as.register(t, c)
	u := newUpstream(t, as, c)
	gw := startRoutes(t, []route{{client: c, to: u.serve(t), settings: []string{
		as.tokenURL(),
		"private_key " + writeFile(t, "key.pem", pkcs8(t, key)),
		"assertion_audience " + as.issuer,
		"assertion_typ client-authentication+jwt",
		"assertion_lifetime 10m",
	}}})
	gw.get(t, routePath(0), 200)
	u.wantAccepted(t, 1, "HTTP/1.1")

	used := as.stats(t).Assertions[c.ID]
	if used.Header.Type != "client-authentication+jwt" || used.Claims.Audience != as.issuer {
		t.Errorf("assertion = %+v, want the type client-authentication+jwt and the audience %s", used, as.issuer)
	}
	if left := time.Until(time.Unix(used.Claims.Expiry, 0)); left < 9*time.Minute || left > 10*time.Minute {
		t.Errorf("assertion lives for another %v, want up to 10m", left)
	}
}

// signAssertion returns a JWT with which a client may authenticate once. It is
// not the gateway that makes it. The key is for ES256.
func signAssertion(key crypto.Signer, clientID, audience string, expiry time.Time) ([]byte, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, nil)
	if err != nil {
		return nil, err
	}
	signed, err := jwt.Signed(signer).Claims(jwt.Claims{
		Issuer:   clientID,
		Subject:  clientID,
		Audience: jwt.Audience{audience},
		Expiry:   jwt.NewNumericDate(expiry),
		ID:       rand.Text(),
	}).Serialize()
	return []byte(signed), err
}

// TestAssertionFile authenticates with a JWT that something else writes. The
// server takes each but once, so the second token needs another.
func TestAssertionFile(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	key := newKey(t, "ES256")
	c := client{ID: "workload", Method: "private_key_jwt", Keys: keySet(key, "")}
	as.register(t, c)
	u := newUpstream(t, as, c)
	fresh := func() []byte {
		t.Helper()
		signed, err := signAssertion(key, c.ID, as.issuer, time.Now().Add(time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		return signed
	}
	file := writeFile(t, "token", append(fresh(), '\n'))
	gw := startRoutes(t, []route{{client: c, to: u.serve(t), settings: []string{as.tokenURL(), "assertion_file " + file}}})

	gw.get(t, routePath(0), 200)
	replaceFile(t, file, fresh())
	u.revoke()
	gw.get(t, routePath(0), 200)
	if got := as.stats(t).Granted[c.ID]; got != 2 {
		t.Errorf("tokens granted = %d, want 2", got)
	}
	u.wantAccepted(t, 2, "HTTP/1.1")
}
