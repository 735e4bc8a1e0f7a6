// Package vault seals what instances share through a storage. Whoever reads the storage learns
// nothing of it, and can change nothing of it unnoticed.
package vault

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
)

// A Vault seals records, and opens those of everybody who has the same secret. It is safe for
// concurrent use.
type Vault struct {
	aead  cipher.AEAD
	names []byte // the key of the names
}

// The keys are derived for this use alone. Another layout of records has another info.
const (
	salt = "caddy-outbound-auth"
	info = "shared token v1"

	keySize = 32 // of AES-256, and of the names
)

// New returns the vault of all who have a secret. A record lets everybody who reads it try
// secrets, as fast as they can: the secret must be too long for that.
func New(secret []byte) (*Vault, error) {
	keys, err := hkdf.Key(sha256.New, secret, []byte(salt), info, 2*keySize)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(keys[:keySize])
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	return &Vault{aead, keys[keySize:]}, nil
}

// Format keeps the keys out of everything that prints values.
func (v *Vault) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("vault")) }

// Name returns the name of a record of a kind. what is all that tells one record of this kind
// from the others. Without the secret, nobody can tell from a name what it stands for.
func (v *Vault) Name(kind string, what []byte) string {
	mac := hmac.New(sha256.New, v.names)
	mac.Write([]byte(kind))
	mac.Write([]byte{0}) // no kind has it
	mac.Write(what)
	return hex.EncodeToString(mac.Sum(nil)[:nameSize])
}

// nameSize is how much of the hash is the name, in bytes.
const nameSize = 16

// blockSize is the unit in which the size of a record shows, in bytes.
const blockSize = 512

// maxSize is how large a sealed record may be, in bytes. The storage may hold anything.
const maxSize = 1 << 20

// Seal returns a record as it is stored under a name.
func (v *Vault) Seal(name string, record any) ([]byte, error) {
	text, err := json.Marshal(record)
	if err != nil {
		return nil, err
	}
	if rest := len(text) % blockSize; rest > 0 { // white space behind JSON has no meaning
		text = append(text, bytes.Repeat([]byte(" "), blockSize-rest)...)
	}
	return v.aead.Seal(nil, nil, text, []byte(name)), nil //nolint:gosec // it makes a nonce at random
}

// errSealed does not say why: that is the text of whoever has damaged the record.
var errSealed = errors.New("damaged, or sealed with another secret")

// Open reads into record what Seal has sealed under the same name.
func (v *Vault) Open(name string, sealed []byte, record any) error {
	if len(sealed) > maxSize {
		return errSealed
	}
	text, err := v.aead.Open(nil, nil, sealed, []byte(name))
	if err != nil || json.Unmarshal(text, record) != nil {
		return errSealed
	}
	return nil
}
