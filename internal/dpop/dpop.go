// Package dpop proves the possession of the key that a token is bound to (RFC 9449).
package dpop

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/net/http/httpguts"
)

// The algorithms that sign proofs. All servers that know DPoP know ES256; Okta, for example,
// does not know EdDSA.
const (
	ES256 = "ES256"
	EdDSA = "EdDSA"
)

// Algorithms are the names of all algorithms.
var Algorithms = []string{ES256, EdDSA}

// Header is the field of a proof (§4.1), and NonceHeader that of a nonce (§8.1), both in
// canonical form.
const (
	Header      = "Dpop"
	NonceHeader = "Dpop-Nonce"
)

// Scheme is the authentication scheme of tokens that are bound to a key (§7.1), and their
// token_type (§5).
const Scheme = "DPoP"

// The error codes that a server has for proofs (§5, §7.1, §8).
const (
	CodeUseNonce     = "use_dpop_nonce"
	CodeInvalidProof = "invalid_dpop_proof"
)

// A Key signs the proofs for the tokens that are bound to it. It exists in memory alone. It
// is safe for concurrent use.
type Key struct {
	signer     jose.Signer
	thumbprint string
}

// NewKey makes a key for one of the algorithms.
func NewKey(alg string) (*Key, error) {
	var private crypto.Signer
	var err error
	switch alg {
	case ES256:
		private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case EdDSA:
		_, private, err = ed25519.GenerateKey(rand.Reader)
	default:
		err = fmt.Errorf("no algorithm of proofs: %q", alg)
	}
	if err != nil {
		return nil, err
	}
	// The header of a proof has the public key (§4.2).
	options := (&jose.SignerOptions{EmbedJWK: true}).WithType("dpop+jwt")
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(alg), Key: private}, options)
	if err != nil {
		return nil, err
	}
	public := jose.JSONWebKey{Key: private.Public()}
	thumbprint, err := public.Thumbprint(crypto.SHA256)
	if err != nil {
		return nil, err
	}
	return &Key{signer, base64.RawURLEncoding.EncodeToString(thumbprint)}, nil
}

// Thumbprint returns the JWK thumbprint (RFC 7638) by which a token names its key: the `jkt`
// in its `cnf` (§6.1). It is no secret.
func (k *Key) Thumbprint() string { return k.thumbprint }

// Format keeps the key out of everything that prints values.
func (k *Key) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("key")) }

// claims are those of a proof (§4.2).
type claims struct {
	ID       string `json:"jti"`
	Method   string `json:"htm"`
	URI      string `json:"htu"`
	IssuedAt int64  `json:"iat"`
	Token    string `json:"ath,omitempty"`
	Nonce    string `json:"nonce,omitempty"`
}

// Proof makes the proof for one request. Each request needs its own: servers refuse one that
// they have seen. tokenHash is Hash of the access token that the request carries; "" if it
// carries none. nonce is the last one of the server; "" if it has named none.
func (k *Key) Proof(method, uri, tokenHash, nonce string) (string, error) {
	payload, err := json.Marshal(claims{
		ID: rand.Text(), Method: method, URI: uri, IssuedAt: time.Now().Unix(), Token: tokenHash, Nonce: nonce,
	})
	if err != nil {
		return "", err
	}
	signed, err := k.signer.Sign(payload)
	if err != nil {
		return "", err
	}
	return signed.CompactSerialize()
}

// Prove adds a proof to a request, in place of the one that it may have. tokenHash and nonce are
// those of Proof. Nothing may change the request's method, its URL or its Host after that.
//
// Caddy writes the port of an HTTPS upstream into Host, even if it is 443. Of such a host, some
// servers make a URL without the port, and others one with it. So the port is left out.
func (k *Key) Prove(req *http.Request, tokenHash, nonce string) error {
	req.Host = Host(req)
	proof, err := k.Proof(req.Method, URI(req), tokenHash, nonce)
	if err != nil {
		return fmt.Errorf("dpop: the proof could not be signed: %w", err)
	}
	req.Header[Header] = []string{proof}
	return nil
}

// Hash returns what stands for a token in a proof: `ath` (§4.2).
func Hash(accessToken string) string {
	sum := sha256.Sum256([]byte(accessToken))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// Host returns the host that a request is for, as net/http sends it, without the port that its
// scheme has by default.
func Host(req *http.Request) string {
	host := req.Host
	if host == "" {
		host = req.URL.Host
	}
	if ascii, err := httpguts.PunycodeHostPort(host); err == nil { // otherwise net/http sends nothing
		host = withoutZone(ascii)
	}
	switch req.URL.Scheme {
	case "https":
		return strings.TrimSuffix(host, ":443")
	case "http":
		return strings.TrimSuffix(host, ":80")
	}
	return host
}

// URI returns the target of a request as its server sees it, without query and fragment:
// `htu` (§4.2). Whoever verifies the proof puts the target together from the scheme, the
// field Host and the path on the request line (RFC 9110 §7.1). So they stand here as net/http
// sends them, if Host is set to that of the function Host.
func URI(req *http.Request) string {
	path := req.URL.EscapedPath()
	switch path {
	case "":
		path = "/"
	case "*":
		path = "" // RFC 9112 §3.3
	}
	return req.URL.Scheme + "://" + Host(req) + path
}

// withoutZone removes the zone of an IPv6 address: it means something on this machine alone
// (RFC 6874 §1).
func withoutZone(host string) string {
	end := strings.LastIndexByte(host, ']')
	if end < 0 || host[0] != '[' {
		return host
	}
	if zone := strings.IndexByte(host[:end], '%'); zone > 0 {
		return host[:zone] + host[end:]
	}
	return host
}

// maxServers is how many servers have their nonces kept. Whoever has more is asked for
// another proof now and then.
const maxServers = 1024

// Nonces keeps the last nonce of each server. The zero value is ready to use. It is safe for
// concurrent use, and readers wait for nobody.
type Nonces struct {
	byServer sync.Map // the nonces, as text
	count    atomic.Int64
}

// Of returns the nonce for the next proof that a server is sent; "" if it has named none.
func (n *Nonces) Of(server any) string {
	nonce, _ := n.byServer.Load(server)
	text, _ := nonce.(string)
	return text
}

// Keep keeps the nonce that an answer of a server has, if it has one.
func (n *Nonces) Keep(server any, h http.Header) {
	nonce := Nonce(h)
	if nonce == "" || n.Of(server) == nonce {
		return
	}
	if _, known := n.byServer.Swap(server, nonce); !known && n.count.Add(1) > maxServers {
		n.byServer.Clear()
		n.count.Store(0)
	}
}

// maxNonce is how long a nonce may be, in bytes. Each proof carries it.
const maxNonce = 1 << 10

// Nonce returns the nonce that an answer has for the next proofs (§8.2, §9); "" if it has none
// that can be used.
func Nonce(h http.Header) string {
	nonce := h.Get("DPoP-Nonce")
	if len(nonce) > maxNonce || strings.ContainsFunc(nonce, notNonce) {
		return ""
	}
	return nonce
}

// notNonce reports whether a character can't stand in a nonce (§8.1, RFC 6749 appendix A).
func notNonce(c rune) bool { return c <= ' ' || c > '~' || c == '"' || c == '\\' }
