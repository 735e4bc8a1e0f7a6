// Who an OAuth client is: the part that everybody may know.

package outboundauth

// description describes the client of a requester. Metrics and spans use it. The
// admin API and `caddy oauth2-token` show it in JSON.
type description struct {
	name     string
	endpoint string // host of the token endpoint or issuer, as the config has it

	TokenEndpoint string   `json:"token_endpoint,omitempty"` // empty until it has been discovered
	Issuer        string   `json:"issuer,omitempty"`
	ClientID      string   `json:"client_id,omitempty"`
	AuthMethod    string   `json:"auth_method,omitempty"`
	GrantType     string   `json:"grant_type"`
	DPoP          string   `json:"dpop,omitempty"` // the algorithm of the keys that its tokens are bound to
	ShareTokens   bool     `json:"share_tokens,omitempty"`
	Scopes        []string `json:"scopes,omitempty"` // the scopes that the client asks for
	Keys          []string `json:"keys,omitempty"`   // the client keys of its requests
}
