package outboundauth

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"

	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// testKeys are one key of each kind, generated when the first test asks:
// RSA takes a while.
var testKeys = map[string]func() crypto.Signer{
	"RSA":     sync.OnceValue(func() crypto.Signer { return mustGenerate(rsa.GenerateKey(rand.Reader, 2048)) }),
	"P-256":   sync.OnceValue(func() crypto.Signer { return mustGenerate(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }),
	"P-384":   sync.OnceValue(func() crypto.Signer { return mustGenerate(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)) }),
	"P-521":   sync.OnceValue(func() crypto.Signer { return mustGenerate(ecdsa.GenerateKey(elliptic.P521(), rand.Reader)) }),
	"Ed25519": sync.OnceValue(func() crypto.Signer { return ed25519.NewKeyFromSeed([]byte(rand.Text() + "123456")[:ed25519.SeedSize]) }),
}

// algorithms are those that fit a kind of key, the default first.
var algorithms = map[string][]string{
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

// newKey generates a key that no other test has.
func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func pemOf(label string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: label, Bytes: der})
}

func pkcs8PEM(tb testing.TB, key any) []byte {
	tb.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		tb.Fatal(err)
	}
	return pemOf("PRIVATE KEY", der)
}

func sec1PEM(tb testing.TB, key *ecdsa.PrivateKey) []byte {
	tb.Helper()
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		tb.Fatal(err)
	}
	return pemOf("EC PRIVATE KEY", der)
}

// jwkOf encodes a key as a JWK, with more members, or other values of them.
func jwkOf(tb testing.TB, key any, more map[string]any) []byte {
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

// certificateOf returns a certificate that a key has signed itself.
func certificateOf(tb testing.TB, key crypto.Signer) []byte {
	tb.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	return der
}

func certificatePEM(tb testing.TB, key crypto.Signer) []byte {
	tb.Helper()
	return pemOf("CERTIFICATE", certificateOf(tb, key))
}

// writeFile writes a file, and returns its name.
func writeFile(tb testing.TB, name string, content []byte) string {
	tb.Helper()
	if err := os.WriteFile(name, content, 0o600); err != nil {
		tb.Fatal(err)
	}
	return name
}

// escaped writes line breaks as in an environment variable.
func escaped(source []byte) []byte {
	return bytes.ReplaceAll(source, []byte("\n"), []byte(`\n`))
}

// keyForms are all forms in which a key may be written.
func keyForms(tb testing.TB, key crypto.Signer) map[string][]byte {
	tb.Helper()
	forms := map[string][]byte{"PKCS#8": pkcs8PEM(tb, key)}
	switch key := key.(type) {
	case *rsa.PrivateKey:
		forms["PKCS#1"] = pemOf("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key))
	case *ecdsa.PrivateKey:
		forms["SEC 1"] = sec1PEM(tb, key)
	}
	for name, source := range maps.Clone(forms) {
		forms[name+" on one line"] = escaped(source)
		forms[name+" with the line breaks of Windows"] = bytes.ReplaceAll(source, []byte("\n"), []byte("\r\n"))
		forms[name+" with text around it"] = slices.Concat([]byte("Key of the gateway:\n\n"), source, []byte("(end)\n"))
		forms[name+" with white space around it"] = slices.Concat([]byte("\n \t"), source, []byte("\n\n"))
		forms[name+" with parameters before it"] = slices.Concat(pemOf("EC PARAMETERS", []byte{6, 0}), source)
	}
	jwk := jwkOf(tb, key, nil)
	forms["JWK"] = jwk
	forms["JWK with white space around it"] = slices.Concat([]byte("\n "), jwk, []byte("\n"))
	forms["JWK for signatures"] = jwkOf(tb, key, map[string]any{"use": "sig", "key_ops": []string{"sign"}})
	return forms
}

func TestPrivateKeyIsReadInEveryForm(t *testing.T) {
	for kind, key := range testKeys {
		for form, source := range keyForms(t, key()) {
			t.Run(kind+" "+form, func(t *testing.T) {
				before := bytes.Clone(source)
				got, err := parsePrivateKey(source, "", "2024")
				if err != nil {
					t.Fatal(err)
				}
				signer, ok := got.key.(interface{ Equal(crypto.PrivateKey) bool })
				if !ok || !signer.Equal(key()) {
					t.Errorf("got another key (%T), want the one that was written", got.key)
				}
				if string(got.alg) != algorithms[kind][0] || got.id != "2024" || got.thumbprint != "" {
					t.Errorf("got alg %q, kid %q, x5t#S256 %q, want %s, 2024 and none", got.alg, got.id, got.thumbprint, algorithms[kind][0])
				}
				if !bytes.Equal(source, before) {
					t.Error("got that the source was changed, want it as it was")
				}
			})
		}
	}
}

func TestSigningAlgFitsTheKey(t *testing.T) {
	for kind, fitting := range algorithms {
		source := pkcs8PEM(t, testKeys[kind]())
		for _, alg := range append(slices.Clone(signingAlgs), "none", "ES256K") {
			t.Run(kind+" "+alg, func(t *testing.T) {
				got, err := parsePrivateKey(source, alg, "")
				if slices.Contains(fitting, alg) {
					if err != nil || string(got.alg) != alg {
						t.Errorf("got %v, %v, want that it signs with %s", got, err, alg)
					}
					return
				}
				if got != nil && err == nil {
					t.Fatal("got a key, want an error")
				}
				wantError(t, err, kind)
				wantError(t, err, "the signing_alg "+alg+" does not fit: use "+strings.Join(fitting, ", "))
			})
		}
	}
}

func TestJWKNamesAlgorithmAndID(t *testing.T) {
	for _, test := range []struct {
		name, kind string
		members    map[string]any
		alg, id    string // configured
		wantAlg    string
		wantID     string
		want       string // error
	}{
		{name: "neither", kind: "RSA", wantAlg: "RS256"},
		{name: "both", kind: "RSA", members: map[string]any{"alg": "PS384", "kid": "a"}, wantAlg: "PS384", wantID: "a"},
		{name: "key_id comes first", kind: "P-256", members: map[string]any{"kid": "a"}, id: "b", wantAlg: "ES256", wantID: "b"},
		{name: "signing_alg says the same", kind: "RSA", members: map[string]any{"alg": "PS384"}, alg: "PS384", wantAlg: "PS384"},
		{name: "signing_alg says what the JWK leaves open", kind: "RSA", alg: "RS512", wantAlg: "RS512"},
		{name: "signing_alg says another", kind: "RSA", members: map[string]any{"alg": "PS384"}, alg: "RS256", want: "the JWK is for PS384 only: set signing_alg to that, or remove it"},
		{name: "algorithm of another kind", kind: "RSA", members: map[string]any{"alg": "ES256"}, want: "is an RSA key"},
		{name: "algorithm of another curve", kind: "P-256", members: map[string]any{"alg": "ES384"}, want: "is a key on the curve P-256"},
		{name: "algorithm by the name of RFC 9864", kind: "Ed25519", members: map[string]any{"alg": "Ed25519"}, wantAlg: "EdDSA"},
		{name: "algorithm by both names", kind: "Ed25519", members: map[string]any{"alg": "Ed25519"}, alg: "EdDSA", wantAlg: "EdDSA"},
		{name: "algorithm of RFC 9864 of another kind", kind: "P-256", members: map[string]any{"alg": "Ed25519"}, want: "is a key on the curve P-256"},
		{name: "algorithm of RFC 9864 that nothing here has", kind: "Ed25519", members: map[string]any{"alg": "Ed448"}, want: "whose alg is none that signs"},
		{name: "algorithm that encrypts", kind: "RSA", members: map[string]any{"alg": "RSA-OAEP"}, want: "alg"},
		{name: "algorithm of a secret", kind: "RSA", members: map[string]any{"alg": "HS256"}, want: "does not fit"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := parsePrivateKey(jwkOf(t, testKeys[test.kind](), test.members), test.alg, test.id)
			wantError(t, err, test.want)
			if err == nil && (string(got.alg) != test.wantAlg || got.id != test.wantID) {
				t.Errorf("got alg %q, kid %q, want %q, %q", got.alg, got.id, test.wantAlg, test.wantID)
			}
		})
	}
}

// Google's service accounts have a JSON file around their key.
func TestKeyFileOfAServiceAccount(t *testing.T) {
	file := fmt.Appendf(nil, `{
  "type": "service_account",
  "project_id": "project",
  "private_key_id": "0123456789abcdef",
  "private_key": %s,
  "client_email": "gateway@project.iam.gserviceaccount.com",
  "token_uri": "https://oauth2.googleapis.com/token"
}
`, encodeString(string(pkcs8PEM(t, testKeys["RSA"]()))))
	for _, test := range []struct{ id, want string }{{"", "0123456789abcdef"}, {"2024", "2024"}} {
		got, err := parsePrivateKey(file, "", test.id)
		if err != nil {
			t.Fatal(err)
		}
		if !testKeys["RSA"]().(*rsa.PrivateKey).Equal(got.key) || got.id != test.want || got.alg != jose.RS256 {
			t.Errorf("got %T, kid %q, alg %q, want the key of the file, %q, RS256", got.key, got.id, got.alg, test.want)
		}
	}
}

func TestCertificateOfTheKeyIsNoted(t *testing.T) {
	for kind := range testKeys {
		t.Run(kind, func(t *testing.T) {
			key := testKeys[kind]()
			der := certificateOf(t, key)
			sum := sha256.Sum256(der)
			want := base64.RawURLEncoding.EncodeToString(sum[:])
			keyPEM, leaf, ca := pkcs8PEM(t, key), pemOf("CERTIFICATE", der), certificatePEM(t, newKey(t))
			for form, source := range map[string][]byte{
				"after the key":       slices.Concat(keyPEM, leaf),
				"before the key":      slices.Concat(leaf, keyPEM),
				"with its CA's":       slices.Concat(keyPEM, leaf, ca),
				"around the key":      slices.Concat(leaf, keyPEM, ca),
				"on one line":         escaped(slices.Concat(keyPEM, leaf)),
				"in a JWK":            jwkOf(t, key, map[string]any{"x5c": []string{base64.StdEncoding.EncodeToString(der)}}),
				"by its thumbprint":   jwkOf(t, key, map[string]any{"x5t#S256": want}),
				"in a JWK, both ways": jwkOf(t, key, map[string]any{"x5c": []string{base64.StdEncoding.EncodeToString(der)}, "x5t#S256": want}),
			} {
				got, err := parsePrivateKey(source, "", "")
				if err != nil {
					t.Errorf("%s: got %v, want no error", form, err)
				} else if got.thumbprint != want {
					t.Errorf("%s: got x5t#S256 %q, want %q", form, got.thumbprint, want)
				}
			}

			_, err := parsePrivateKey(slices.Concat(keyPEM, ca), "", "")
			wantError(t, err, "the certificate beside it is for another key")
		})
	}
}

// unusableKeys are sources that are refused, with a part of the error.
func unusableKeys(tb testing.TB) map[string]struct{ source, want string } {
	tb.Helper()
	key, other := newKey(tb), newKey(tb)
	good := string(pkcs8PEM(tb, key))
	der := certificateOf(tb, key)
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		tb.Fatal(err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		tb.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	x25519, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	secp256k1, err := asn1.Marshal(struct { // PKCS#8 with a curve that Go does not have
		Version   int
		Algorithm struct{ Kind, Curve asn1.ObjectIdentifier }
		Key       []byte
	}{Algorithm: struct{ Kind, Curve asn1.ObjectIdentifier }{
		asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}, asn1.ObjectIdentifier{1, 3, 132, 0, 10},
	}, Key: pemBytes(tb, string(sec1PEM(tb, key)))})
	if err != nil {
		tb.Fatal(err)
	}
	smallDER := x509.MarshalPKCS1PrivateKey(small)
	//nolint:staticcheck // No one should write this form, but files have it.
	legacy, err := x509.EncryptPEMBlock(rand.Reader, "RSA PRIVATE KEY", smallDER, []byte("password"), x509.PEMCipherAES256)
	if err != nil {
		tb.Fatal(err)
	}
	encoded := base64.StdEncoding.EncodeToString(pemBytes(tb, good))
	const encrypted, tooFew, noKind = "is encrypted; decrypt it", "has 1024 bits, too few to sign with: 2048 at least", "no algorithm of JWTs fits"
	const noKey, onlyPublic, noJWK = "holds no private key: it must be PEM or a JWK", "holds no private key, only a public one", "is not a JWK that can be read"

	return map[string]struct{ source, want string }{
		"empty":                             {"", noKey},
		"white space":                       {" \n\t\n", noKey},
		"garbage":                           {strings.Repeat("c4n4ry-Zk9", 10), noKey},
		"a path":                            {"/etc/caddy/client.key", noKey},
		"DER":                               {string(pemBytes(tb, good)), noKey},
		"base64 without its first line":     {encoded, noKey},
		"PEM without its last line":         {strings.Split(good, "-----END")[0], noKey},
		"PEM without line breaks":           {strings.ReplaceAll(good, "\n", " "), noKey},
		"PEM that is cut":                   {string(pemOf("PRIVATE KEY", pemBytes(tb, good)[:50])), "can't be read: it is not complete, or the key is of a kind that no algorithm of JWTs fits"},
		"PKCS#1 that is cut":                {string(pemOf("RSA PRIVATE KEY", smallDER[:50])), "can't be read: it is not complete, or the key is of a kind that no algorithm of JWTs fits"},
		"SEC 1 that is cut":                 {string(pemOf("EC PRIVATE KEY", pemBytes(tb, string(sec1PEM(tb, key)))[:20])), "can't be read: it is not complete, or the key is of a kind that no algorithm of JWTs fits"},
		"a label that is another form's":    {string(pemOf("RSA PRIVATE KEY", pemBytes(tb, good))), "can't be read"},
		"PKCS#8, encrypted":                 {string(pemOf("ENCRYPTED PRIVATE KEY", smallDER)), encrypted},
		"PKCS#1, encrypted":                 {string(pem.EncodeToMemory(legacy)), encrypted},
		"PKCS#1, encrypted, on one line":    {string(escaped(pem.EncodeToMemory(legacy))), encrypted},
		"a public key":                      {string(pemOf("PUBLIC KEY", public)), onlyPublic},
		"a public key of RSA":               {string(pemOf("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(&small.PublicKey))), onlyPublic},
		"a certificate":                     {string(pemOf("CERTIFICATE", der)), onlyPublic},
		"a certificate that is cut":         {good + string(pemOf("CERTIFICATE", der[:50])), "holds a certificate that can't be read"},
		"a certificate of another key":      {good + string(certificatePEM(tb, other)), "the certificate beside it is for another key"},
		"a certificate signing request":     {string(pemOf("CERTIFICATE REQUEST", der)), noKey},
		"two keys":                          {good + string(pkcs8PEM(tb, other)), "holds more than one private key; keep one"},
		"two keys of different forms":       {good + string(sec1PEM(tb, key)), "holds more than one private key; keep one"},
		"RSA of 1024 bits":                  {string(pemOf("RSA PRIVATE KEY", smallDER)), tooFew},
		"RSA of 1024 bits in PKCS#8":        {string(pkcs8PEM(tb, small)), tooFew},
		"RSA of 1024 bits in a JWK":         {string(jwkOf(tb, small, nil)), tooFew},
		"P-224":                             {string(pkcs8PEM(tb, p224)), noKind},
		"P-224 in SEC 1":                    {string(sec1PEM(tb, p224)), noKind},
		"X25519":                            {string(pkcs8PEM(tb, x25519)), noKind},
		"secp256k1":                         {string(pemOf("PRIVATE KEY", secp256k1)), "can't be read"},
		"JWK, public":                       {string(jwkOf(tb, key.Public(), nil)), "is a public key; the private one signs"},
		"JWK, public, Ed25519":              {string(jwkOf(tb, testKeys["Ed25519"]().Public(), nil)), "is a public key; the private one signs"},
		"JWK of a secret":                   {string(jwkOf(tb, []byte(canarySecret), nil)), noJWK},
		"JWK of another curve":              {`{"kty":"EC","crv":"secp256k1","x":"AQ","y":"AQ","d":"` + canarySecret + `"}`, noJWK},
		"JWK of another kind":               {`{"kty":"` + canarySecret + `"}`, noJWK},
		"JWK with a certificate of another": {string(jwkOf(tb, other, map[string]any{"x5c": []string{base64.StdEncoding.EncodeToString(der)}})), noJWK},
		"JWK with an algorithm of its own":  {string(jwkOf(tb, key, map[string]any{"alg": canarySecret + "\n" + canarySecret})), "signing_alg"},
		"JWK Set":                           {`{"keys":[` + string(jwkOf(tb, key, nil)) + `]}`, "is a set of JWKs; take the one that signs out of it"},
		"JWK that is cut":                   {string(jwkOf(tb, key, nil)[:60]), noJWK},
		"JWK Set without a key":             {`{"keys":[]}`, "is a set of JWKs"},
		"JSON of another kind":              {`{"type":"service_account","key":` + string(encodeString(good)) + `}`, noJWK},
		"key file of a service account without the key": {`{"type":"service_account","private_key":""}`, noJWK},
		"key file of a service account with another":    {`{"private_key":"` + canarySecret + `"}`, noKey},
		"JSON, empty": {`{}`, noJWK},
	}
}

// pemBytes returns what stands in the first block.
func pemBytes(tb testing.TB, source string) []byte {
	tb.Helper()
	block, _ := pem.Decode([]byte(source))
	if block == nil {
		tb.Fatalf("got no PEM in %d bytes, want some", len(source))
	}
	return block.Bytes
}

func encodeString(s string) []byte {
	encoded, _ := json.Marshal(s)
	return encoded
}

func TestUnusablePrivateKeyIsRefused(t *testing.T) {
	for name, test := range unusableKeys(t) {
		t.Run(name, func(t *testing.T) {
			_, err := parsePrivateKey([]byte(test.source), "", "")
			wantError(t, err, test.want)
			wantNoCanary(t, err)
			wantQuotesNothing(t, err, test.source)
		})
	}
}

// wantQuotesNothing fails the test if an error repeats a part of the source
// that tells something about it.
func wantQuotesNothing(t *testing.T, err error, source string) {
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

func TestPrivateKeyIsNotPrinted(t *testing.T) {
	for kind := range testKeys {
		t.Run(kind, func(t *testing.T) {
			source := pkcs8PEM(t, testKeys[kind]())
			key, err := parsePrivateKey(source, "", "2024")
			if err != nil {
				t.Fatal(err)
			}
			r := resolved{
				secret: canarySecret, key: key, keySource: source, assertion: canaryToken,
				subject: canarySecret, claims: map[string]string{"a": canarySecret},
				params: map[string]string{"a": canarySecret}, headers: map[string]string{"a": canarySecret},
			}
			for _, v := range []any{key, *key, r, &r, []*privateKey{key}, []resolved{r}, map[string]any{"a": key, "b": r}, struct{ Key any }{key}} {
				for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d", "%x", "%X", "%o"} {
					wantNoKey(t, fmt.Sprintf("%s of a %T", verb, v), fmt.Sprintf(verb, v), testKeys[kind]())
				}
				wantNoKey(t, fmt.Sprintf("a log entry with a %T", v), logged(t, v), testKeys[kind]())
			}
		})
	}
}

// logged returns what the encoders of zap make of a value.
func logged(t *testing.T, v any) string {
	t.Helper()
	var text strings.Builder
	for _, encoder := range []zapcore.Encoder{
		zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()),
		zapcore.NewConsoleEncoder(zap.NewDevelopmentEncoderConfig()),
	} {
		entry, err := encoder.EncodeEntry(zapcore.Entry{}, []zapcore.Field{zap.Any("v", v), zap.Reflect("w", v)})
		if err != nil {
			t.Fatal(err)
		}
		text.WriteString(entry.String())
	}
	return text.String()
}

// wantNoKey fails the test if a text holds key material, or a secret.
func wantNoKey(t *testing.T, where, text string, key crypto.Signer) {
	t.Helper()
	var secret []byte
	switch key := key.(type) {
	case *rsa.PrivateKey:
		secret = key.D.Bytes()
	case *ecdsa.PrivateKey:
		secret, _ = key.Bytes()
	case ed25519.PrivateKey:
		secret = key.Seed()
	}
	if len(secret) < 32 {
		t.Fatalf("got a secret of %d bytes, want one to look for", len(secret))
	}
	start := secret[4:12]
	bytesOf := fmt.Sprintf("%d", start)
	for _, form := range []string{
		bytesOf[1 : len(bytesOf)-1], string(start), hex.EncodeToString(start), strings.ToUpper(hex.EncodeToString(start)),
		fmt.Sprintf("%#v", start)[len("[]byte{"):40], new(big.Int).SetBytes(secret).String()[:12],
		base64.StdEncoding.EncodeToString(secret)[8:16],
	} {
		if strings.Contains(text, form) {
			t.Errorf("%s: got %.200q, which holds the key", where, text)
			return
		}
	}
	wantNoCanaryIn(t, text)
}

// pipe makes a file that nobody writes to: to open it would not return.
func pipe(tb testing.TB, dir string) string {
	tb.Helper()
	name := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(name, 0o600); err != nil {
		tb.Fatal(err)
	}
	return name
}

// fileOfSize makes a file that takes no room.
func fileOfSize(tb testing.TB, dir string, size int64) string {
	tb.Helper()
	name := writeFile(tb, filepath.Join(dir, fmt.Sprint(size)), nil)
	if err := os.Truncate(name, size); err != nil {
		tb.Fatal(err)
	}
	return name
}

func TestReadSource(t *testing.T) {
	dir := t.TempDir()
	key := string(pkcs8PEM(t, newKey(t)))
	file := writeFile(t, filepath.Join(dir, "key"), []byte(key))
	large := strings.Repeat("k", maxSecretFile)
	t.Setenv("TEST_KEY", key)
	t.Setenv("TEST_KEY_ON_ONE_LINE", string(escaped([]byte(key))))
	t.Setenv("TEST_KEY_FILE", file)
	t.Setenv("TEST_KEY_WITHOUT_FIRST_LINE", "canary"+strings.SplitN(key, "\n", 2)[1])
	t.Setenv("TEST_KEY_EMPTY", "")
	jwk := string(jwkOf(t, newKey(t), nil))
	t.Setenv("TEST_JWK", jwk)
	t.Setenv("TEST_JWK_CUT", strings.TrimSuffix(strings.Replace(jwk, "{", `{"kid":"canary",`, 1), "}"))
	secret := "canary-" + strings.Repeat("x", 10_000)

	for _, test := range []struct{ name, template, content, want string }{
		{"file", file, key, ""},
		{"file named by a placeholder", "{env.TEST_KEY_FILE}", key, ""},
		{"file in a directory named by a placeholder", strings.TrimSuffix(file, "key") + "{env.TEST_NAME}", key, ""},
		{"content of a file", "{file." + file + "}", strings.TrimSpace(key), ""},
		{"content of the environment", "{env.TEST_KEY}", strings.TrimSpace(key), ""},
		{"content on one line", "{env.TEST_KEY_ON_ONE_LINE}", string(escaped([]byte(key))), ""},
		{"JWK of the environment", "{env.TEST_JWK}", jwk, ""},
		{"JWK in the config", jwk, jwk, ""},
		{"content in the config", key, strings.TrimSpace(key), ""},
		{"empty", "{env.TEST_KEY_EMPTY}", "", "private_key: evaluated placeholder {env.TEST_KEY_EMPTY} is empty"},
		{"unset", "{env.TEST_KEY_UNSET}", "", "private_key: evaluated placeholder {env.TEST_KEY_UNSET} is empty"},
		{"no such file", filepath.Join(dir, "none"), "", "private_key: reading the file that it names failed: no such file or directory"},
		{"a directory", dir, "", "private_key: reading the file that it names failed: it is no regular file of up to 1048576 bytes"},
		{"a file that is as large as it may be", writeFile(t, filepath.Join(dir, "large"), []byte(large)), large, ""},
		{"a file that is too large", fileOfSize(t, dir, maxSecretFile+1), "", "private_key: reading the file that it names failed: it is no regular file of up to 1048576 bytes"},
		{"a placeholder that is not known", "{en.TEST_KEY}", "", "private_key: is neither JSON nor a placeholder that is known; check its name"},
		{"a JWK that is cut", "{env.TEST_JWK_CUT}", "", "private_key: is neither JSON nor a placeholder that is known; check its name"},
		{"a key that lost its first line", "{env.TEST_KEY_WITHOUT_FIRST_LINE}", "", "private_key: reading the file"},
		{"something that is too long for a name", secret, "", "private_key: reading the file"},
		{"a name with a zero byte", "canary\x00", "", "private_key: reading the file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("TEST_NAME", "key")
			got, err := readSource(caddy.NewReplacer(), "private_key", test.template)
			wantError(t, err, test.want)
			wantNoCanary(t, err)
			if got := strings.TrimSpace(string(got)); got != strings.TrimSpace(test.content) {
				t.Errorf("got %d bytes, want the %d of the key", len(got), len(test.content))
			}
		})
	}
}

// Keys come from anywhere, and errors about them go to the log.
var variable = regexp.MustCompile(`[A-Z]S\d{3}|EdDSA|P-\d+|\d+`)

// neutral returns an error without the names and numbers that differ from key
// to key.
func neutral(err string) string { return variable.ReplaceAllString(err, "*") }

func FuzzPrivateKey(f *testing.F) {
	for _, kind := range slices.Sorted(maps.Keys(testKeys)) {
		forms := keyForms(f, testKeys[kind]())
		for _, form := range []string{"PKCS#8", "PKCS#8 on one line", "PKCS#1", "SEC 1", "JWK for signatures"} {
			if source, ok := forms[form]; ok {
				f.Add(source, algorithms[kind][0], "2024")
			}
		}
	}
	var own strings.Builder // our own words, which the fuzzer finds too
	say := func(source []byte, alg string) {
		if _, err := parsePrivateKey(source, alg, ""); err != nil {
			own.WriteString(neutral(err.Error()) + "\n")
		}
	}
	for _, unusable := range unusableKeys(f) {
		f.Add([]byte(unusable.source), "ES256", "")
		say([]byte(unusable.source), "")
	}
	for _, kind := range slices.Sorted(maps.Keys(testKeys)) {
		for _, form := range keyForms(f, testKeys[kind]()) {
			for _, alg := range signingAlgs {
				say(form, alg)
			}
		}
	}
	f.Fuzz(func(t *testing.T, source []byte, alg, id string) {
		if len(source) > 4<<10 {
			return // large RSA keys take long
		}
		if !slices.Contains(signingAlgs, alg) {
			alg = ""
		}
		key, err := parsePrivateKey(bytes.Clone(source), alg, id)
		if err != nil {
			said := neutral(err.Error())
			for i := range len(said) - redact.Telltale + 1 {
				if part := said[i : i+redact.Telltale]; strings.Contains(string(source), part) && !strings.Contains(own.String(), part) {
					t.Fatalf("got %q, which quotes %q of the source", err, part)
				}
			}
			return
		}
		if !slices.Contains(signingAlgs, string(key.alg)) || strings.HasPrefix(string(key.alg), "HS") {
			t.Errorf("got the algorithm %q, want one for private keys", key.alg)
		}
		if (alg != "" && string(key.alg) != alg) || (id != "" && key.id != id) {
			t.Errorf("got alg %q, kid %q, want what is configured: %q, %q", key.alg, key.id, alg, id)
		}
		if _, ok := key.key.(crypto.Signer); !ok {
			t.Errorf("got a %T, want a key that signs", key.key)
		}
	})
}
