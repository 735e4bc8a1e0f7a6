package jwt

import (
	"encoding/base64"
	"maps"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
)

func TestJWTIsDecodedForShow(t *testing.T) {
	token := func(parts ...string) string {
		for i := range parts {
			parts[i] = base64.RawURLEncoding.EncodeToString([]byte(parts[i]))
		}
		return strings.Join(parts, ".")
	}
	header, claims, ok := Decode(token(`{"alg":"none"}`, `{"sub":"jane","n":1}`, ""))
	if !ok || !maps.Equal(header, map[string]any{"alg": "none"}) || !maps.Equal(claims, map[string]any{"sub": "jane", "n": 1.0}) {
		t.Errorf("got %v, %v, %v, want header and claims", header, claims, ok)
	}
	for name, opaque := range map[string]string{
		"empty":               "",
		"opaque":              "t0ken",
		"two parts":           token(`{}`, `{}`),
		"four parts":          token(`{}`, `{}`, "", ""),
		"encrypted":           token(`{"alg":"dir"}`, "", "iv", "text", "tag"),
		"dots":                "..",
		"header not base64":   "!." + token(`{}`, ""),
		"padded":              "e30=.e30=.c2ln",
		"claims not JSON":     token(`{}`, `{`, ""),
		"claims a list":       token(`{}`, `[]`, ""),
		"claims null":         token(`{}`, `null`, ""),
		"header null":         token(`null`, `{}`, ""),
		"two objects in one":  token(`{}`, `{}{}`, ""),
		"a number of a claim": token(`{}`, `1`, ""),
	} {
		if header, claims, ok := Decode(opaque); ok || header != nil || claims != nil {
			t.Errorf("%s: got %v, %v, %v, want that it is no JWT", name, header, claims, ok)
		}
	}
}

func TestKeyThatCannotSignIsAnError(t *testing.T) {
	for name, key := range map[string]*Key{
		"algorithm that does not fit": {key: keytest.Keys["P-256"](), alg: jose.RS256},
		"unknown algorithm":           {key: keytest.Keys["P-256"](), alg: "XY256"},
		"no key":                      {alg: jose.RS256},
	} {
		got, err := key.Sign("JWT", map[string]any{"sub": "sub", "aud": "aud"})
		if got != "" {
			t.Errorf("%s: got %q, want no JWT", name, got)
		}
		wantError(t, err, "signing the JWT with "+string(key.alg)+" failed")
	}
}
