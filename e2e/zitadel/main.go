// The command zitadel is an authorization server for the end-to-end tests: the
// example server of zitadel/oidc with clients of our own. Its access tokens are
// JWTs, for the one resource server of the tests.
//
//	CLIENTS   the OAuth clients, a JSON array with the members of RFC 7591
//
//	GET /__stats   {"client_secret_basic": 1, "client_secret_post": 2}
//
// The example takes a client's secret from wherever it is. So the server counts
// in which way each token request brought it.
//
// It listens on a free loopback port, prints {"issuer": "http://…",
// "token_url": "http://…"} once it is ready, and ends when its standard input
// does, so that it cannot outlive the test that started it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/zitadel/oidc/v3/example/server/exampleop"
	"github.com/zitadel/oidc/v3/example/server/storage"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

const tokenPath = "/oauth/token"

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	issuer := "http://" + listener.Addr().String()
	clients, err := newClients(os.Getenv("CLIENTS"))
	if err != nil {
		return fmt.Errorf("CLIENTS: %w", err)
	}
	stored := &store{storage.NewStorage(storage.NewUserStore(issuer)), clients}

	mux := http.NewServeMux()
	requests := new(tokenRequests)
	example := exampleop.SetupServer(issuer, stored, nil, false)
	mux.Handle("/", example)
	mux.Handle(tokenPath, requests.count(example))
	mux.Handle("/__stats", requests)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = server.Close()
	}()
	err = json.NewEncoder(os.Stdout).Encode(map[string]string{
		"issuer":    issuer,
		"token_url": issuer + tokenPath,
	})
	if err != nil {
		return err
	}
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// client is one of the example's, that may have tokens of its own.
type client struct {
	*storage.Client
	secret string
}

func (c *client) GrantTypes() []oidc.GrantType {
	return []oidc.GrantType{oidc.GrantTypeClientCredentials}
}
func (c *client) AccessTokenType() op.AccessTokenType { return op.AccessTokenTypeJWT }

func newClients(text string) (map[string]*client, error) {
	var registrations []struct {
		ID     string `json:"client_id"`
		Secret string `json:"client_secret"`
	}
	if err := json.Unmarshal([]byte(text), &registrations); err != nil {
		return nil, err
	}
	clients := make(map[string]*client)
	for _, r := range registrations {
		clients[r.ID] = &client{storage.WebClient(r.ID, r.Secret), r.Secret}
	}
	return clients, nil
}

// store is the example's storage, whose only client with this grant is built
// in, and whose tokens are for that client itself and name no scope.
type store struct {
	*storage.Storage
	clients map[string]*client
}

var _ op.ClientCredentialsStorage = (*store)(nil)

// ClientCredentials implements op.ClientCredentialsStorage.
func (s *store) ClientCredentials(_ context.Context, id, secret string) (op.Client, error) {
	c, ok := s.clients[id]
	if !ok || c.secret != secret {
		return nil, fmt.Errorf("unknown client, or not its secret: %q", id)
	}
	return c, nil
}

// ClientCredentialsTokenRequest implements op.ClientCredentialsStorage.
func (s *store) ClientCredentialsTokenRequest(_ context.Context, id string, scopes []string) (op.TokenRequest, error) {
	return &oidc.JWTTokenRequest{
		Subject:  id,
		Audience: []string{"https://api.example/"},
		Scopes:   scopes,
	}, nil
}

// GetPrivateClaimsFromScopes implements op.Storage.
func (s *store) GetPrivateClaimsFromScopes(_ context.Context, _, _ string, scopes []string) (map[string]any, error) {
	return map[string]any{"scope": strings.Join(scopes, " ")}, nil
}

// tokenRequests counts the token requests by how they brought the secret.
type tokenRequests struct {
	mu          sync.Mutex
	basic, post int
}

func (n *tokenRequests) count(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _, basic := r.BasicAuth()
		post := r.PostFormValue("client_secret") != ""
		n.mu.Lock()
		if basic {
			n.basic++
		}
		if post {
			n.post++
		}
		n.mu.Unlock()
		next.ServeHTTP(w, r)
	})
}

func (n *tokenRequests) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	n.mu.Lock()
	defer n.mu.Unlock()
	_ = json.NewEncoder(w).Encode(map[string]int{
		"client_secret_basic": n.basic,
		"client_secret_post":  n.post,
	})
}
