// The command fosite is an authorization server for the end-to-end tests, made
// of the library that Ory Hydra is made of. Its access tokens are opaque: only
// the server can tell what they are worth.
//
//	CLIENTS   the OAuth clients, a JSON array with the members of RFC 7591
//
//	POST /token        RFC 6749, client_credentials only
//	POST /introspect   RFC 7662, for every client that has a secret
//
// It listens on a free loopback port, prints {"token_url": "http://…",
// "introspection_url": "http://…"} once it is ready, and ends when its standard
// input does, so that it cannot outlive the test that started it.
package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/go-jose/go-jose/v3"
	"github.com/ory/fosite"
	"github.com/ory/fosite/compose"
	"github.com/ory/fosite/storage"
)

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
	base := "http://" + listener.Addr().String()
	config := &fosite.Config{
		TokenURL:                 base + "/token", // the one aud of an assertion
		AccessTokenLifespan:      time.Minute,
		ScopeStrategy:            fosite.ExactScopeStrategy,
		AudienceMatchingStrategy: fosite.ExactAudienceMatchingStrategy,
		GlobalSecret:             []byte(rand.Text() + rand.Text()),
		HashCost:                 4, // bcrypt's least: nobody is going to guess
	}
	store, err := newStore(config, os.Getenv("CLIENTS"))
	if err != nil {
		return fmt.Errorf("CLIENTS: %w", err)
	}
	s := &server{compose.Compose(config, store, compose.NewOAuth2HMACStrategy(config),
		compose.OAuth2ClientCredentialsGrantFactory, compose.OAuth2TokenIntrospectionFactory)}

	mux := http.NewServeMux()
	mux.HandleFunc("/token", s.token)
	mux.HandleFunc("/introspect", s.introspect)
	httpServer := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = httpServer.Close()
	}()
	err = json.NewEncoder(os.Stdout).Encode(map[string]string{
		"token_url":         config.TokenURL,
		"introspection_url": base + "/introspect",
	})
	if err != nil {
		return err
	}
	if err := httpServer.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// registration is an OAuth client as the test describes it.
type registration struct {
	ID     string              `json:"client_id"`
	Secret string              `json:"client_secret"`
	Method string              `json:"token_endpoint_auth_method"`
	Alg    string              `json:"token_endpoint_auth_signing_alg"`
	Keys   *jose.JSONWebKeySet `json:"jwks"`
}

func newStore(config *fosite.Config, clients string) (*storage.MemoryStore, error) {
	var registrations []registration
	if err := json.Unmarshal([]byte(clients), &registrations); err != nil {
		return nil, err
	}
	store := storage.NewMemoryStore()
	for _, r := range registrations {
		ctx := context.Background()
		hashed, err := config.GetSecretsHasher(ctx).Hash(ctx, []byte(r.Secret))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", r.ID, err)
		}
		// As an OpenID Connect client, it is held to its one method.
		store.Clients[r.ID] = &fosite.DefaultOpenIDConnectClient{
			DefaultClient: &fosite.DefaultClient{
				ID:         r.ID,
				Secret:     hashed,
				GrantTypes: []string{"client_credentials"},
				Scopes:     []string{"api:read", "api:write"},
				Audience:   []string{"https://api.example/"},
			},
			TokenEndpointAuthMethod:           r.Method,
			TokenEndpointAuthSigningAlgorithm: r.Alg,
			JSONWebKeys:                       r.Keys,
		}
	}
	return store, nil
}

type server struct {
	provider fosite.OAuth2Provider
}

func (s *server) token(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	request, err := s.provider.NewAccessRequest(ctx, r, new(fosite.DefaultSession))
	if err != nil {
		refused(err)
		s.provider.WriteAccessError(ctx, w, request, err)
		return
	}
	// The library has checked what was asked for; to grant it is left to us.
	for _, scope := range request.GetRequestedScopes() {
		request.GrantScope(scope)
	}
	for _, audience := range request.GetRequestedAudience() {
		request.GrantAudience(audience)
	}
	response, err := s.provider.NewAccessResponse(ctx, request)
	if err != nil {
		refused(err)
		s.provider.WriteAccessError(ctx, w, request, err)
		return
	}
	s.provider.WriteAccessResponse(ctx, w, request, response)
}

func (s *server) introspect(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	response, err := s.provider.NewIntrospectionRequest(ctx, r, new(fosite.DefaultSession))
	if err != nil {
		refused(err)
		s.provider.WriteIntrospectionError(ctx, w, err)
		return
	}
	s.provider.WriteIntrospectionResponse(ctx, w, response)
}

// refused logs more than the answer says, for whoever has a test to mend.
func refused(err error) {
	e := fosite.ErrorToRFC6749Error(err)
	log.Printf("%q", []string{e.ErrorField, e.GetDescription(), e.DebugField}) //nolint:gosec // G706: quoted
}
