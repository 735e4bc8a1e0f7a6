package jwt

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/go-jose/go-jose/v4"

	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// canarySecret is what must appear in no error.
const canarySecret = "canary-s3cret"

func wantError(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("got error %q, want none", err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("got error %v, want one that contains %q", err, want)
	}
}

// wantNoCanary checks all ways in which an error may be shown, and all that it
// wraps. It also holds the text to one line of a reasonable length.
func wantNoCanary(t *testing.T, err error) {
	t.Helper()
	for ; err != nil; err = errors.Unwrap(err) {
		text := fmt.Sprintf("%v %+v %#v %q", err, err, err, err)
		for _, canary := range []string{"canary", "Y2FuYXJ5", "CANARY"} {
			if strings.Contains(text, canary) {
				t.Errorf("%.200q holds the secret", text)
			}
		}
		if got := err.Error(); len(got) > 600 || strings.ContainsFunc(got, unicode.IsControl) {
			t.Errorf("the error has %d bytes, %.100q, want one line of 600 at most", len(got), got)
		}
	}
}

func sec1PEM(tb testing.TB, key *ecdsa.PrivateKey) []byte {
	tb.Helper()
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		tb.Fatal(err)
	}
	return keytest.PEM("EC PRIVATE KEY", der)
}

// escaped writes line breaks as in an environment variable.
func escaped(source []byte) []byte {
	return bytes.ReplaceAll(source, []byte("\n"), []byte(`\n`))
}

// keyForms are all forms in which a key may be written.
func keyForms(tb testing.TB, key crypto.Signer) map[string][]byte {
	tb.Helper()
	forms := map[string][]byte{"PKCS#8": keytest.PKCS8(tb, key)}
	switch key := key.(type) {
	case *rsa.PrivateKey:
		forms["PKCS#1"] = keytest.PEM("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key))
	case *ecdsa.PrivateKey:
		forms["SEC 1"] = sec1PEM(tb, key)
	}
	for name, source := range maps.Clone(forms) {
		forms[name+" on one line"] = escaped(source)
		forms[name+" with the line breaks of Windows"] = bytes.ReplaceAll(source, []byte("\n"), []byte("\r\n"))
		forms[name+" with text around it"] = slices.Concat([]byte("Key of the gateway:\n\n"), source, []byte("(end)\n"))
		forms[name+" with white space around it"] = slices.Concat([]byte("\n \t"), source, []byte("\n\n"))
		forms[name+" with parameters before it"] = slices.Concat(keytest.PEM("EC PARAMETERS", []byte{6, 0}), source)
	}
	jwk := keytest.JWK(tb, key, nil)
	forms["JWK"] = jwk
	forms["JWK with white space around it"] = slices.Concat([]byte("\n "), jwk, []byte("\n"))
	forms["JWK for signatures"] = keytest.JWK(tb, key, map[string]any{"use": "sig", "key_ops": []string{"sign"}})
	return forms
}

func TestPrivateKeyIsReadInEveryForm(t *testing.T) {
	for kind, key := range keytest.Keys {
		for form, source := range keyForms(t, key()) {
			t.Run(kind+" "+form, func(t *testing.T) {
				before := bytes.Clone(source)
				got, err := ParseKey(source, "", "2024")
				if err != nil {
					t.Fatal(err)
				}
				signer, ok := got.key.(interface{ Equal(crypto.PrivateKey) bool })
				if !ok || !signer.Equal(key()) {
					t.Errorf("got another key (%T), want the one that was written", got.key)
				}
				if string(got.alg) != keytest.Algorithms[kind][0] || got.id != "2024" || got.thumbprint != "" {
					t.Errorf("got alg %q, kid %q, x5t#S256 %q, want %s, 2024 and none", got.alg, got.id, got.thumbprint, keytest.Algorithms[kind][0])
				}
				if !bytes.Equal(source, before) {
					t.Error("got that the source was changed, want it as it was")
				}
			})
		}
	}
}

func TestSigningAlgFitsTheKey(t *testing.T) {
	for kind, fitting := range keytest.Algorithms {
		source := keytest.PKCS8(t, keytest.Keys[kind]())
		for _, alg := range append(slices.Clone(Algorithms), "none", "ES256K") {
			t.Run(kind+" "+alg, func(t *testing.T) {
				got, err := ParseKey(source, alg, "")
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
			got, err := ParseKey(keytest.JWK(t, keytest.Keys[test.kind](), test.members), test.alg, test.id)
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
`, encodeString(string(keytest.PKCS8(t, keytest.Keys["RSA"]()))))
	for _, test := range []struct{ id, want string }{{"", "0123456789abcdef"}, {"2024", "2024"}} {
		got, err := ParseKey(file, "", test.id)
		if err != nil {
			t.Fatal(err)
		}
		if !keytest.Keys["RSA"]().(*rsa.PrivateKey).Equal(got.key) || got.id != test.want || got.alg != jose.RS256 {
			t.Errorf("got %T, kid %q, alg %q, want the key of the file, %q, RS256", got.key, got.id, got.alg, test.want)
		}
	}
}

func TestCertificateOfTheKeyIsNoted(t *testing.T) {
	for kind := range keytest.Keys {
		t.Run(kind, func(t *testing.T) {
			key := keytest.Keys[kind]()
			der := keytest.Certificate(t, key)
			sum := sha256.Sum256(der)
			want := base64.RawURLEncoding.EncodeToString(sum[:])
			keyPEM, leaf, ca := keytest.PKCS8(t, key), keytest.PEM("CERTIFICATE", der), keytest.CertificatePEM(t, keytest.New(t))
			for form, source := range map[string][]byte{
				"after the key":       slices.Concat(keyPEM, leaf),
				"before the key":      slices.Concat(leaf, keyPEM),
				"with its CA's":       slices.Concat(keyPEM, leaf, ca),
				"around the key":      slices.Concat(leaf, keyPEM, ca),
				"on one line":         escaped(slices.Concat(keyPEM, leaf)),
				"in a JWK":            keytest.JWK(t, key, map[string]any{"x5c": []string{base64.StdEncoding.EncodeToString(der)}}),
				"by its thumbprint":   keytest.JWK(t, key, map[string]any{"x5t#S256": want}),
				"in a JWK, both ways": keytest.JWK(t, key, map[string]any{"x5c": []string{base64.StdEncoding.EncodeToString(der)}, "x5t#S256": want}),
			} {
				got, err := ParseKey(source, "", "")
				if err != nil {
					t.Errorf("%s: got %v, want no error", form, err)
				} else if got.thumbprint != want {
					t.Errorf("%s: got x5t#S256 %q, want %q", form, got.thumbprint, want)
				}
			}

			_, err := ParseKey(slices.Concat(keyPEM, ca), "", "")
			wantError(t, err, "the certificate beside it is for another key")
		})
	}
}

// unusableKeys are sources that are refused, with a part of the error.
func unusableKeys(tb testing.TB) map[string]struct{ source, want string } {
	tb.Helper()
	key, other := keytest.New(tb), keytest.New(tb)
	good := string(keytest.PKCS8(tb, key))
	der := keytest.Certificate(tb, key)
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
		"PEM that is cut":                   {string(keytest.PEM("PRIVATE KEY", pemBytes(tb, good)[:50])), "can't be read: it is not complete, or the key is of a kind that no algorithm of JWTs fits"},
		"PKCS#1 that is cut":                {string(keytest.PEM("RSA PRIVATE KEY", smallDER[:50])), "can't be read: it is not complete, or the key is of a kind that no algorithm of JWTs fits"},
		"SEC 1 that is cut":                 {string(keytest.PEM("EC PRIVATE KEY", pemBytes(tb, string(sec1PEM(tb, key)))[:20])), "can't be read: it is not complete, or the key is of a kind that no algorithm of JWTs fits"},
		"a label that is another form's":    {string(keytest.PEM("RSA PRIVATE KEY", pemBytes(tb, good))), "can't be read"},
		"PKCS#8, encrypted":                 {string(keytest.PEM("ENCRYPTED PRIVATE KEY", smallDER)), encrypted},
		"PKCS#1, encrypted":                 {string(pem.EncodeToMemory(legacy)), encrypted},
		"PKCS#1, encrypted, on one line":    {string(escaped(pem.EncodeToMemory(legacy))), encrypted},
		"a public key":                      {string(keytest.PEM("PUBLIC KEY", public)), onlyPublic},
		"a public key of RSA":               {string(keytest.PEM("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(&small.PublicKey))), onlyPublic},
		"a certificate":                     {string(keytest.PEM("CERTIFICATE", der)), onlyPublic},
		"a certificate that is cut":         {good + string(keytest.PEM("CERTIFICATE", der[:50])), "holds a certificate that can't be read"},
		"a certificate of another key":      {good + string(keytest.CertificatePEM(tb, other)), "the certificate beside it is for another key"},
		"a certificate signing request":     {string(keytest.PEM("CERTIFICATE REQUEST", der)), noKey},
		"two keys":                          {good + string(keytest.PKCS8(tb, other)), "holds more than one private key; keep one"},
		"two keys of different forms":       {good + string(sec1PEM(tb, key)), "holds more than one private key; keep one"},
		"RSA of 1024 bits":                  {string(keytest.PEM("RSA PRIVATE KEY", smallDER)), tooFew},
		"RSA of 1024 bits in PKCS#8":        {string(keytest.PKCS8(tb, small)), tooFew},
		"RSA of 1024 bits in a JWK":         {string(keytest.JWK(tb, small, nil)), tooFew},
		"P-224":                             {string(keytest.PKCS8(tb, p224)), noKind},
		"P-224 in SEC 1":                    {string(sec1PEM(tb, p224)), noKind},
		"X25519":                            {string(keytest.PKCS8(tb, x25519)), noKind},
		"secp256k1":                         {string(keytest.PEM("PRIVATE KEY", secp256k1)), "can't be read"},
		"JWK, public":                       {string(keytest.JWK(tb, key.Public(), nil)), "is a public key; the private one signs"},
		"JWK, public, Ed25519":              {string(keytest.JWK(tb, keytest.Keys["Ed25519"]().Public(), nil)), "is a public key; the private one signs"},
		"JWK of a secret":                   {string(keytest.JWK(tb, []byte(canarySecret), nil)), noJWK},
		"JWK of another curve":              {`{"kty":"EC","crv":"secp256k1","x":"AQ","y":"AQ","d":"` + canarySecret + `"}`, noJWK},
		"JWK of another kind":               {`{"kty":"` + canarySecret + `"}`, noJWK},
		"JWK with a certificate of another": {string(keytest.JWK(tb, other, map[string]any{"x5c": []string{base64.StdEncoding.EncodeToString(der)}})), noJWK},
		"JWK with an algorithm of its own":  {string(keytest.JWK(tb, key, map[string]any{"alg": canarySecret + "\n" + canarySecret})), "signing_alg"},
		"JWK Set":                           {`{"keys":[` + string(keytest.JWK(tb, key, nil)) + `]}`, "is a set of JWKs; take the one that signs out of it"},
		"JWK that is cut":                   {string(keytest.JWK(tb, key, nil)[:60]), noJWK},
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
			_, err := ParseKey([]byte(test.source), "", "")
			wantError(t, err, test.want)
			wantNoCanary(t, err)
			keytest.WantQuotesNothing(t, err, test.source)
		})
	}
}

// Keys come from anywhere, and errors about them go to the log.
var variable = regexp.MustCompile(`[A-Z]S\d{3}|EdDSA|P-\d+|\d+`)

// neutral returns an error without the names and numbers that differ from key
// to key.
func neutral(err string) string { return variable.ReplaceAllString(err, "*") }

func FuzzPrivateKey(f *testing.F) {
	for _, kind := range slices.Sorted(maps.Keys(keytest.Keys)) {
		forms := keyForms(f, keytest.Keys[kind]())
		for _, form := range []string{"PKCS#8", "PKCS#8 on one line", "PKCS#1", "SEC 1", "JWK for signatures"} {
			if source, ok := forms[form]; ok {
				f.Add(source, keytest.Algorithms[kind][0], "2024")
			}
		}
	}
	var own strings.Builder // our own words, which the fuzzer finds too
	say := func(source []byte, alg string) {
		if _, err := ParseKey(source, alg, ""); err != nil {
			own.WriteString(neutral(err.Error()) + "\n")
		}
	}
	for _, unusable := range unusableKeys(f) {
		f.Add([]byte(unusable.source), "ES256", "")
		say([]byte(unusable.source), "")
	}
	for _, kind := range slices.Sorted(maps.Keys(keytest.Keys)) {
		for _, form := range keyForms(f, keytest.Keys[kind]()) {
			for _, alg := range Algorithms {
				say(form, alg)
			}
		}
	}
	f.Fuzz(func(t *testing.T, source []byte, alg, id string) {
		if len(source) > 4<<10 {
			return // large RSA keys take long
		}
		if !slices.Contains(Algorithms, alg) {
			alg = ""
		}
		key, err := ParseKey(bytes.Clone(source), alg, id)
		if err != nil {
			said := neutral(err.Error())
			for i := range len(said) - redact.Telltale + 1 {
				if part := said[i : i+redact.Telltale]; strings.Contains(string(source), part) && !strings.Contains(own.String(), part) {
					t.Fatalf("got %q, which quotes %q of the source", err, part)
				}
			}
			return
		}
		if !slices.Contains(Algorithms, string(key.alg)) || strings.HasPrefix(string(key.alg), "HS") {
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
