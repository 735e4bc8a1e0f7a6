// Who a client is, as far as everybody may know.

package outboundauth

// description is the client of a requester: for metrics and spans, and in JSON for the admin API and `caddy oauth2-token`.
type description struct {
	name string

	TokenEndpoint string   `json:"token_endpoint,omitempty"` // not known before it has been discovered
	Issuer        string   `json:"issuer,omitempty"`
	ClientID      string   `json:"client_id,omitempty"`
	AuthMethod    string   `json:"auth_method,omitempty"`
	GrantType     string   `json:"grant_type"`
	Scopes        []string `json:"scopes,omitempty"` // asked for
}
