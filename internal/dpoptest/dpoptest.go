// Package dpoptest checks proofs of possession as a server does (RFC 9449 §4.3), with nothing
// that makes them.
package dpoptest

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Leeway is how far the clock of a client may be off.
const Leeway = time.Minute

// Errors that are not about the proof itself.
var (
	ErrNoProof = errors.New("there is no proof")
	ErrNonce   = errors.New("the proof has no nonce, or another one")
)

// A Server checks the proofs that it is sent. It is safe for concurrent use.
type Server struct {
	// Accepts reports whether a nonce is good; nil if the server wants none.
	Accepts func(nonce string) bool

	mu   sync.Mutex
	seen map[string]bool // guarded by mu: the jti of all proofs
}

// A Proof is what a proof that was checked says.
type Proof struct {
	Header, Claims map[string]any
	Thumbprint     string
}

// Check checks the proof of a request. token is the access token that came with it; "" if it
// is a token request.
func (s *Server) Check(r *http.Request, token string) (Proof, error) {
	fields := r.Header["Dpop"]
	if len(fields) == 0 {
		return Proof{}, ErrNoProof
	}
	if len(fields) > 1 {
		return Proof{}, errors.New("there is more than one proof") // 1
	}
	p, err := Parse(fields[0])
	if err != nil {
		return p, err
	}
	if method := p.Claims["htm"]; method != r.Method { // 8
		return p, fmt.Errorf("htm is %v, and the method %s", method, r.Method)
	}
	if uri := p.Claims["htu"]; uri != URI(r) { // 9
		return p, fmt.Errorf("htu is %v, and the URI %s", uri, URI(r))
	}
	nonce, _ := p.Claims["nonce"].(string)
	if s.Accepts != nil && !s.Accepts(nonce) { // 10
		return p, ErrNonce
	}
	issued, _ := p.Claims["iat"].(float64)
	if age := time.Since(time.Unix(int64(issued), 0)); age < -Leeway || age > Leeway+time.Second { // 11
		return p, fmt.Errorf("iat is %v ago", age)
	}
	want := any(nil)
	if token != "" { // 12
		sum := sha256.Sum256([]byte(token))
		want = base64.RawURLEncoding.EncodeToString(sum[:])
	}
	if p.Claims["ath"] != want {
		return p, fmt.Errorf("ath is %v, want %v", p.Claims["ath"], want)
	}
	return p, s.note(p)
}

// note refuses a proof that was there before (§11.1).
func (s *Server) note(p Proof) error {
	id, _ := p.Claims["jti"].(string)
	s.mu.Lock()
	defer s.mu.Unlock()
	if id == "" || s.seen[id] {
		return fmt.Errorf("jti %q is empty, or was there before", id)
	}
	if s.seen == nil {
		s.seen = make(map[string]bool)
	}
	s.seen[id] = true
	return nil
}

// URI returns the URI of a request that a server has received, without its query.
func URI(r *http.Request) string {
	scheme := "http"
	if r.TLS != nil {
		scheme = "https"
	}
	path, _, _ := strings.Cut(r.RequestURI, "?")
	if path == "*" {
		path = ""
	}
	return scheme + "://" + r.Host + path
}

// Parse reads a proof, and verifies its signature with the key in its header.
func Parse(proof string) (p Proof, err error) {
	parts := strings.Split(proof, ".")
	if len(parts) != 3 {
		return p, fmt.Errorf("the proof has %d parts", len(parts))
	}
	if p.Header, err = object(parts[0]); err != nil {
		return p, err
	}
	if p.Claims, err = object(parts[1]); err != nil {
		return p, err
	}
	for name := range p.Claims {
		switch name {
		case "jti", "htm", "htu", "iat", "ath", "nonce":
		default:
			return p, fmt.Errorf("there is a claim %s", name)
		}
	}
	if p.Header["typ"] != "dpop+jwt" || len(p.Header) != 3 {
		return p, fmt.Errorf("the header has typ %v and %d members, want dpop+jwt, alg and jwk", p.Header["typ"], len(p.Header))
	}
	jwk, _ := p.Header["jwk"].(map[string]any)
	if jwk["d"] != nil || jwk["k"] != nil {
		return p, errors.New("jwk holds a secret")
	}
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil {
		return p, err
	}
	if !verify(p.Header["alg"], jwk, []byte(parts[0]+"."+parts[1]), signature) {
		return p, fmt.Errorf("the signature is not valid (alg %v)", p.Header["alg"])
	}
	p.Thumbprint = thumbprint(jwk)
	return p, nil
}

func object(part string) (into map[string]any, err error) {
	raw, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		return nil, err
	}
	err = json.Unmarshal(raw, &into)
	return into, err
}

// verify verifies a signature (RFC 7518 §3.4, RFC 8037 §3.1).
func verify(alg any, jwk map[string]any, signed, signature []byte) bool {
	coordinate := func(name string) []byte {
		text, _ := jwk[name].(string)
		raw, _ := base64.RawURLEncoding.DecodeString(text)
		return raw
	}
	switch alg {
	case "ES256":
		point := append(append([]byte{4}, coordinate("x")...), coordinate("y")...)
		public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
		if err != nil || len(signature) != 64 {
			return false
		}
		sum := sha256.Sum256(signed)
		return ecdsa.Verify(public, sum[:], new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:]))
	case "EdDSA":
		x := coordinate("x")
		return len(x) == ed25519.PublicKeySize && ed25519.Verify(x, signed, signature)
	}
	return false
}

// thumbprint returns the thumbprint of a key (RFC 7638 §3.2, RFC 8037 §2).
func thumbprint(jwk map[string]any) string {
	text := fmt.Sprintf(`{"crv":%q,"kty":%q,"x":%q`, jwk["crv"], jwk["kty"], jwk["x"])
	if jwk["kty"] == "EC" {
		text += fmt.Sprintf(`,"y":%q`, jwk["y"])
	}
	sum := sha256.Sum256([]byte(text + "}"))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}
