// The keys that sign JWTs.

package jwt

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
)

// Algorithms are the algorithms that sign. client_secret_jwt and private_key_jwt
// may use them (RFC 7518 §3.1, RFC 8037).
var Algorithms = []string{
	"RS256", "RS384", "RS512", "PS256", "PS384", "PS512",
	"ES256", "ES384", "ES512", "EdDSA", "HS256", "HS384", "HS512",
}

// minRSABits is how many bits an RSA key must have at least to sign (RFC 7518
// §3.3).
const minRSABits = 2048

// MinSecretBytes are how many bytes a client's secret needs at least to sign (RFC 7518
// §3.2).
var MinSecretBytes = map[string]int{"HS256": 32, "HS384": 48, "HS512": 64}

// A ShortSecretError says that a client's secret has too few bytes for an algorithm.
type ShortSecretError struct {
	Alg   string
	Bytes int
}

func (e *ShortSecretError) Error() string {
	return fmt.Sprintf("has %d bytes, too few for %s (RFC 7518 section 3.2)", e.Bytes, e.Alg)
}

// A Key signs JWTs.
type Key struct {
	key        any // a crypto.Signer, or a []byte for HS*
	alg        jose.SignatureAlgorithm
	id         string // kid; may be empty
	thumbprint string // x5t#S256 of the certificate; may be empty
}

// Format keeps the key out of everything that prints values.
func (Key) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("private key")) }

// PKCS8 returns the private key as PKCS #8 (RFC 5958): the same bytes, whatever the format that it
// was read from.
func (k *Key) PKCS8() ([]byte, error) { return x509.MarshalPKCS8PrivateKey(k.key) }

// SecretKey returns a client's secret as a key. alg is the algorithm in the
// config, or empty.
func SecretKey(secret, alg string) *Key {
	return &Key{key: []byte(secret), alg: jose.SignatureAlgorithm(cmp.Or(alg, string(jose.HS256)))}
}

// ParseKey reads a private key in PEM or as a JWK. No error quotes the key. alg
// and id are the algorithm and the key ID in the config, or empty.
func ParseKey(source []byte, alg, id string) (*Key, error) {
	// The key files of Google's service accounts are JSON around PEM.
	var account struct {
		PrivateKey string `json:"private_key"`
		ID         string `json:"private_key_id"`
	}
	if json.Unmarshal(source, &account) == nil && account.PrivateKey != "" {
		source, id = []byte(account.PrivateKey), cmp.Or(id, account.ID)
	}
	k := &Key{alg: jose.SignatureAlgorithm(alg), id: id}
	var certificates []*x509.Certificate
	if source = bytes.TrimSpace(source); bytes.HasPrefix(source, []byte("{")) {
		var set struct{ Keys []json.RawMessage }
		if json.Unmarshal(source, &set) == nil && set.Keys != nil {
			return nil, errors.New("is a set of JWKs; take the one that signs out of it")
		}
		var jwk jose.JSONWebKey
		if err := jwk.UnmarshalJSON(source); err != nil || !jwk.Valid() {
			return nil, errors.New("is not a JWK that can be read (RFC 7517)")
		}
		if jwk.IsPublic() {
			return nil, errors.New("is a public key; the private one signs")
		}
		if jwk.Algorithm == "Ed25519" { // RFC 9864 gives the same algorithm another name
			jwk.Algorithm = string(jose.EdDSA)
		}
		if jwk.Algorithm != "" && !slices.Contains(Algorithms, jwk.Algorithm) {
			return nil, errors.New("is a JWK whose alg is none that signs: remove it, or set it to the signing_alg")
		}
		if alg != "" && jwk.Algorithm != "" && alg != jwk.Algorithm {
			return nil, fmt.Errorf("the JWK is for %s only: set signing_alg to that, or remove it", jwk.Algorithm)
		}
		if alg == "" {
			k.alg = jose.SignatureAlgorithm(jwk.Algorithm)
		}
		if id == "" {
			k.id = jwk.KeyID
		}
		k.key, certificates = jwk.Key, jwk.Certificates
		k.thumbprint = base64.RawURLEncoding.EncodeToString(jwk.CertificateThumbprintSHA256)
	} else {
		var err error
		if k.key, certificates, err = parsePEM(source); err != nil {
			return nil, err
		}
	}
	if len(certificates) > 0 {
		if err := k.setCertificate(certificates[0]); err != nil {
			return nil, err
		}
	}
	return k, k.fit()
}

// parsePEM returns the private key, and the certificates beside it.
func parsePEM(source []byte) (key any, certificates []*x509.Certificate, err error) {
	// In environment variables, line breaks are often written as \n.
	if !bytes.ContainsRune(source, '\n') {
		source = bytes.ReplaceAll(source, []byte(`\n`), []byte("\n"))
	}
	public := false
	for {
		var block *pem.Block
		if block, source = pem.Decode(source); block == nil {
			break
		}
		switch block.Type {
		case "PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY":
			if key != nil {
				return nil, nil, errors.New("holds more than one private key; keep one")
			}
			if block.Headers["DEK-Info"] != "" {
				return nil, nil, errors.New("is encrypted; decrypt it, for example with openssl pkey")
			}
			if key, err = parseDER(block); err != nil {
				return nil, nil, err
			}
		case "ENCRYPTED PRIVATE KEY":
			return nil, nil, errors.New("is encrypted; decrypt it, for example with openssl pkey")
		case "CERTIFICATE":
			certificate, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, nil, errors.New("holds a certificate that can't be read")
			}
			certificates = append(certificates, certificate)
		case "PUBLIC KEY", "RSA PUBLIC KEY":
			public = true
		}
	}
	switch {
	case key == nil && (public || len(certificates) > 0):
		return nil, nil, errors.New("holds no private key, only a public one")
	case key == nil:
		return nil, nil, errors.New("holds no private key: it must be PEM or a JWK")
	}
	return key, certificates, nil
}

// parseDER reads a key in the form that its label names.
func parseDER(block *pem.Block) (key any, err error) {
	switch block.Type {
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	if err != nil {
		return nil, fmt.Errorf("the block %q can't be read: it is not complete, or the key is of a kind that no algorithm of JWTs fits", block.Type)
	}
	return key, nil
}

// Certify notes the certificate by which some servers know the key, unless the
// key has one already. A certificate for another key changes nothing.
func (k *Key) Certify(certificate *x509.Certificate) {
	if k.thumbprint == "" {
		_ = k.setCertificate(certificate)
	}
}

// setCertificate notes the certificate by which some servers know the key. A
// certificate for another key is an error.
func (k *Key) setCertificate(certificate *x509.Certificate) error {
	if !belongs(certificate, k.key) {
		return errors.New("the certificate beside it is for another key")
	}
	sum := sha256.Sum256(certificate.Raw)
	k.thumbprint = base64.RawURLEncoding.EncodeToString(sum[:])
	return nil
}

// belongs reports whether a certificate is for a private key.
func belongs(certificate *x509.Certificate, key any) bool {
	signer, ok := key.(crypto.Signer)
	if !ok {
		return false
	}
	public, ok := certificate.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(signer.Public())
}

// fit derives the algorithm from the key if no algorithm is set. It returns an
// error if the algorithm does not fit the key.
func (k *Key) fit() error {
	var fitting []jose.SignatureAlgorithm
	kind := ""
	switch key := k.key.(type) {
	case *rsa.PrivateKey:
		if bits := key.N.BitLen(); bits < minRSABits {
			return fmt.Errorf("has %d bits, too few to sign with: %d at least (RFC 7518 section 3.3)", bits, minRSABits)
		}
		fitting, kind = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512}, "an RSA key"
	case *ecdsa.PrivateKey:
		kind = "a key on the curve " + key.Curve.Params().Name
		switch key.Curve {
		case elliptic.P256():
			fitting = []jose.SignatureAlgorithm{jose.ES256}
		case elliptic.P384():
			fitting = []jose.SignatureAlgorithm{jose.ES384}
		case elliptic.P521():
			fitting = []jose.SignatureAlgorithm{jose.ES512}
		}
	case ed25519.PrivateKey:
		fitting, kind = []jose.SignatureAlgorithm{jose.EdDSA}, "an Ed25519 key"
	}
	if len(fitting) == 0 {
		return errors.New("is of a kind that no algorithm of JWTs fits: use RSA, P-256, P-384, P-521 or Ed25519")
	}
	if k.alg == "" {
		k.alg = fitting[0]
	}
	if slices.Contains(fitting, k.alg) {
		return nil
	}
	return fmt.Errorf("is %s, which the signing_alg %s does not fit: use %s", kind, k.alg, joinAlgs(fitting))
}

func joinAlgs(algs []jose.SignatureAlgorithm) string {
	names := make([]string, len(algs))
	for i, alg := range algs {
		names[i] = string(alg)
	}
	return strings.Join(names, ", ")
}
