package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
)

// attackIssuer is an authorization server whose tokens tell for which upstream they
// are. Now and then it fails, and its error repeats all that the client has sent.
type attackIssuer struct {
	found *findings

	mu       sync.Mutex
	secrets  map[string]string // by client id
	owners   map[string]byte   // by token
	requests int
}

func newAttackIssuer(found *findings) *attackIssuer {
	return &attackIssuer{found: found, secrets: make(map[string]string), owners: make(map[string]byte)}
}

// register makes a client known. Its id begins with the upstream's name.
func (i *attackIssuer) register(id, secret string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.secrets[id] = secret
}

// ownerOf returns the upstream that a token is for; 0 if the token is none.
func (i *attackIssuer) ownerOf(token string) byte {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.owners[token]
}

func (i *attackIssuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		i.found.add("token request that can't be read", "%v", err)
	}
	id, secret, basic := r.BasicAuth()
	if basic {
		id, _ = url.QueryUnescape(id)
		secret, _ = url.QueryUnescape(secret)
	} else {
		id, secret = r.PostForm.Get("client_id"), r.PostForm.Get("client_secret")
	}
	// The form and the header name what they hold, and in them the secrets stand.
	repeated := fmt.Sprintf("%v %v %q %s", r.PostForm, r.Header, secret, encodeAll(secret))

	i.mu.Lock()
	defer i.mu.Unlock()
	i.requests++
	known, registered := i.secrets[id]
	switch {
	case !registered || secret != known:
		i.found.add("token request with a wrong secret", "client %q, header %v", id, r.Header)
		answerToken(w, http.StatusUnauthorized, "invalid_client", repeated)
	case strings.HasPrefix(id, "r"):
		answerToken(w, http.StatusBadRequest, "invalid_scope", repeated)
	case i.requests%5 == 0:
		answerToken(w, http.StatusInternalServerError, "server_error", repeated)
	default:
		token := canary(id[0], i.requests)
		if strings.ContainsRune("bd", rune(id[0])) {
			token = oddCanary(id[0], i.requests)
		}
		i.owners[token] = id[0]
		answerJSON(w, http.StatusOK, map[string]any{
			"access_token": token, "token_type": "Bearer", "expires_in": 5, "scope": "read " + secret,
		})
	}
}

// answerToken answers a token request with an error.
func answerToken(w http.ResponseWriter, status int, code, description string) {
	answerJSON(w, status, map[string]any{"error": code, "error_description": description})
}

func answerJSON(w http.ResponseWriter, status int, answer map[string]any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(answer)
}
