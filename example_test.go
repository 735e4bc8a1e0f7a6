package outboundauth_test

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/outboundauth/caddy-outbound-auth" // registers transport oauth2
)

// A gateway in a Go program: its clients call a plain URL, and the upstream
// receives an access token and the name of the tenant.
func Example() {
	authServer := httptest.NewServer(tokenEndpoint{})
	defer authServer.Close()
	upstream := httptest.NewServer(ordersAPI{})
	defer upstream.Close()
	// Caddy is handed a listener, so that its port is known before it starts, and
	// taken by nobody else.
	gateway, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer gateway.Close()
	socket, err := gateway.(*net.TCPListener).File()
	if err != nil {
		log.Fatal(err)
	}
	defer socket.Close()

	caddyfile := fmt.Sprintf(`
		{
			admin off
			auto_https off
			default_bind fd/%d
			persist_config off
			storage_check off
			storage_clean_interval off
			log {
				output discard
			}
		}
		http://%s {
			reverse_proxy %s {
				transport oauth2 {
					token_url %s/token
					client_id gateway
					client_secret open-sesame
					scopes orders:read
					tenant acme
				}
			}
		}`, socket.Fd(), gateway.Addr(), upstream.URL, authServer.URL)
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), nil)
	if err != nil {
		log.Fatal(err)
	}
	if err := caddy.Load(config, false); err != nil {
		log.Fatal(err)
	}
	defer caddy.Stop()

	res, err := http.Get("http://" + gateway.Addr().String() + "/orders/42")
	if err != nil {
		log.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(string(body))

	// Output:
	// The upstream received GET /orders/42
	//   Authorization: Bearer token-of-gateway-for-orders:read
	//   X-Tenant-Id: acme
}

// tokenEndpoint is a demonstration authorization server: it issues a token to
// the one client that it knows.
type tokenEndpoint struct{}

func (tokenEndpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id, secret, _ := r.BasicAuth()
	if secret != "open-sesame" || r.FormValue("grant_type") != "client_credentials" {
		http.Error(w, `{"error":"invalid_client"}`, http.StatusUnauthorized)
		return
	}
	fmt.Fprintf(w, `{"access_token":"token-of-%s-for-%s","token_type":"Bearer","expires_in":3600}`, id, r.FormValue("scope"))
}

// ordersAPI is a demonstration upstream: it answers with what it received.
type ordersAPI struct{}

func (ordersAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(w, "The upstream received %s %s\n", r.Method, r.URL)
	for _, field := range []string{"Authorization", "X-Tenant-Id"} {
		fmt.Fprintf(w, "  %s: %s\n", field, r.Header.Get(field))
	}
}
