package outboundauth

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/outboundauth/caddy-outbound-auth/internal/clientcert"
	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
)

// documentedGrants are the token requests of docs/providers.md, in the order of
// its blocks, and what the documentation named there says of them.
var documentedGrants = []struct {
	name string // its first word is in the heading above the block
	env  map[string]string

	metadata string // of the issuer, at OpenID Connect's place; discovery if set

	url         string            // with its query
	basic       string            // id:secret as in the Authorization header
	form        map[string]string // without the JWT
	jwt         string            // the parameter that is a JWT
	file        bool              // it is that of a file
	header      map[string]any    // of the JWT
	claims      map[string]any    // without jti and the times
	thumbprint  bool              // the JWT names the certificate
	certificate bool              // is presented

	answer string
	want   grant
}{
	{
		name: "Auth0 with a secret",
		env: map[string]string{
			"AUTH0_DOMAIN": "tenant.eu.auth0.com", "AUTH0_CLIENT_ID": "id", "AUTH0_CLIENT_SECRET": "s-_cret",
		},
		url: "https://tenant.eu.auth0.com/oauth/token",
		form: map[string]string{
			"grant_type": "client_credentials", "client_id": "id", "client_secret": "s-_cret", "audience": "https://api.example.com",
		},
		answer: `{"access_token":"eyJz93a...k4laUWw","token_type":"Bearer","expires_in":86400}`,
		want:   grant{accessToken: "eyJz93a...k4laUWw", lifetime: 24 * time.Hour},
	},
	{
		name: "Auth0 with a key",
		env: map[string]string{
			"AUTH0_DOMAIN": "tenant.eu.auth0.com", "AUTH0_CLIENT_ID": "id", "AUTH0_KEY_ID": "my kid",
		},
		url: "https://tenant.eu.auth0.com/oauth/token",
		form: map[string]string{
			"grant_type": "client_credentials", "client_id": "id", "audience": "https://api.example.com",
			"client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
		},
		jwt:    "client_assertion",
		header: map[string]any{"alg": "RS256", "typ": "JWT", "kid": "my kid"},
		claims: map[string]any{"iss": "id", "sub": "id", "aud": "https://tenant.eu.auth0.com/"}, // with the slash
		answer: `{"access_token":"eyJz93a...k4laUWw","scope":"read:orders","token_type":"Bearer","expires_in":86400}`,
		want:   grant{accessToken: "eyJz93a...k4laUWw", lifetime: 24 * time.Hour, scope: "read:orders"},
	},
	{
		name: "Microsoft Entra ID with a secret",
		env: map[string]string{
			"AZURE_TENANT_ID": "contoso.onmicrosoft.com", "AZURE_CLIENT_ID": "535fb089-9ff3-47b6-9bfb-4f1264799865", "AZURE_CLIENT_SECRET": "qW~g.Y&+%",
		},
		url: "https://login.microsoftonline.com/contoso.onmicrosoft.com/oauth2/v2.0/token",
		form: map[string]string{
			"grant_type": "client_credentials", "scope": "https://graph.microsoft.com/.default",
			"client_id": "535fb089-9ff3-47b6-9bfb-4f1264799865", "client_secret": "qW~g.Y&+%",
		},
		answer: `{"token_type":"Bearer","expires_in":3599,"ext_expires_in":3599,"access_token":"eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzI1NiIsIng1dCI6Ik1uQ19WWmNBVGZNNXBP..."}`,
		want:   grant{accessToken: "eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzI1NiIsIng1dCI6Ik1uQ19WWmNBVGZNNXBP...", lifetime: 3599 * time.Second},
	},
	{
		name: "Microsoft Entra ID with a certificate",
		env:  map[string]string{"AZURE_TENANT_ID": "contoso.onmicrosoft.com", "AZURE_CLIENT_ID": "97e0a5b7"},
		url:  "https://login.microsoftonline.com/contoso.onmicrosoft.com/oauth2/v2.0/token",
		form: map[string]string{
			"grant_type": "client_credentials", "scope": "https://graph.microsoft.com/.default", "client_id": "97e0a5b7",
			"client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
		},
		jwt:         "client_assertion",
		header:      map[string]any{"alg": "PS256", "typ": "JWT"},
		claims:      map[string]any{"iss": "97e0a5b7", "sub": "97e0a5b7", "aud": "https://login.microsoftonline.com/contoso.onmicrosoft.com/oauth2/v2.0/token"},
		thumbprint:  true,
		certificate: true,
		answer:      `{"token_type":"Bearer","expires_in":3599,"access_token":"eyJ0eXAiOiJK..."}`,
		want:        grant{accessToken: "eyJ0eXAiOiJK...", lifetime: 3599 * time.Second},
	},
	{
		name: "Microsoft Entra ID with workload identity federation",
		env:  map[string]string{"AZURE_TENANT_ID": "contoso.onmicrosoft.com", "AZURE_CLIENT_ID": "97e0a5b7"},
		url:  "https://login.microsoftonline.com/contoso.onmicrosoft.com/oauth2/v2.0/token",
		form: map[string]string{
			"grant_type": "client_credentials", "scope": "https://graph.microsoft.com/.default", "client_id": "97e0a5b7",
			"client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
		},
		jwt:  "client_assertion",
		file: true,

		answer: `{"token_type":"Bearer","expires_in":86399,"ext_expires_in":86399,"access_token":"eyJ0eXAiOiJK..."}`,
		want:   grant{accessToken: "eyJ0eXAiOiJK...", lifetime: 86399 * time.Second},
	},
	{
		name:   "Okta with a secret",
		env:    map[string]string{"OKTA_DOMAIN": "example.okta.com", "OKTA_CLIENT_ID": "0oab8eb55Kb9jdMIr5d6", "OKTA_CLIENT_SECRET": "s-_cret"},
		url:    "https://example.okta.com/oauth2/default/v1/token",
		basic:  "0oab8eb55Kb9jdMIr5d6:s-_cret",
		form:   map[string]string{"grant_type": "client_credentials", "scope": "orders.read"},
		answer: `{"access_token":"eyJhbG[...]1LQ","token_type":"Bearer","expires_in":3600,"scope":"orders.read"}`,
		want:   grant{accessToken: "eyJhbG[...]1LQ", lifetime: time.Hour, scope: "orders.read"},
	},
	{
		name: "Okta with a key",
		env:  map[string]string{"OKTA_DOMAIN": "example.okta.com", "OKTA_CLIENT_ID": "0oar95zt9zIpYuz6A0h7", "OKTA_KEY_ID": "my_key_id"},
		url:  "https://example.okta.com/oauth2/v1/token",
		form: map[string]string{
			"grant_type": "client_credentials", "scope": "okta.users.read", "client_id": "0oar95zt9zIpYuz6A0h7",
			"client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
		},
		jwt:    "client_assertion",
		header: map[string]any{"alg": "RS256", "typ": "JWT", "kid": "my_key_id"},
		claims: map[string]any{"iss": "0oar95zt9zIpYuz6A0h7", "sub": "0oar95zt9zIpYuz6A0h7", "aud": "https://example.okta.com/oauth2/v1/token"},
		answer: `{"token_type":"Bearer","expires_in":3600,"access_token":"eyJraWQiOiJ.....UfThlJ7w","scope":"okta.users.read"}`,
		want:   grant{accessToken: "eyJraWQiOiJ.....UfThlJ7w", lifetime: time.Hour, scope: "okta.users.read"},
	},
	{
		name: "Keycloak with a secret",
		env: map[string]string{
			"KEYCLOAK_DOMAIN": "sso.example.com", "KEYCLOAK_REALM": "demo", "KEYCLOAK_CLIENT_ID": "product-sa-client", "KEYCLOAK_CLIENT_SECRET": "password",
		},
		metadata: keycloakMetadata,
		url:      "https://sso.example.com/realms/demo/protocol/openid-connect/token",
		basic:    "product-sa-client:password",
		form:     map[string]string{"grant_type": "client_credentials"},
		answer:   `{"access_token":"eyJhbGciOiJSUzI1NiIs...","expires_in":60,"refresh_expires_in":0,"token_type":"Bearer","not-before-policy":0,"scope":"email profile"}`,
		want:     grant{accessToken: "eyJhbGciOiJSUzI1NiIs...", lifetime: time.Minute, scope: "email profile"},
	},
	{
		name:     "Keycloak with a key",
		env:      map[string]string{"KEYCLOAK_DOMAIN": "sso.example.com", "KEYCLOAK_REALM": "demo", "KEYCLOAK_CLIENT_ID": "gateway"},
		metadata: keycloakMetadata,
		url:      "https://sso.example.com/realms/demo/protocol/openid-connect/token",
		form: map[string]string{
			"grant_type": "client_credentials", "client_id": "gateway",
			"client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
		},
		jwt:    "client_assertion",
		header: map[string]any{"alg": "RS256", "typ": "client-authentication+jwt"},
		claims: map[string]any{"iss": "gateway", "sub": "gateway", "aud": "https://sso.example.com/realms/demo"},
		answer: `{"access_token":"eyJhbGciOiJSUzI1NiIs...","expires_in":60,"token_type":"Bearer","scope":"email profile"}`,
		want:   grant{accessToken: "eyJhbGciOiJSUzI1NiIs...", lifetime: time.Minute, scope: "email profile"},
	},
	{
		name:        "Keycloak with a certificate",
		env:         map[string]string{"KEYCLOAK_DOMAIN": "sso.example.com", "KEYCLOAK_REALM": "demo", "KEYCLOAK_CLIENT_ID": "gateway"},
		metadata:    keycloakMetadata,
		url:         "https://mtls.sso.example.com/realms/demo/protocol/openid-connect/token",
		form:        map[string]string{"grant_type": "client_credentials", "client_id": "gateway"},
		certificate: true,
		answer:      `{"access_token":"eyJhbGciOiJSUzI1NiIs...","expires_in":60,"token_type":"Bearer","scope":"email profile"}`,
		want:        grant{accessToken: "eyJhbGciOiJSUzI1NiIs...", lifetime: time.Minute, scope: "email profile"},
	},
	{
		name: "Amazon Cognito",
		env: map[string]string{
			"COGNITO_PREFIX": "mydomain", "AWS_REGION": "us-east-1",
			"COGNITO_CLIENT_ID": "djc98u3jiedmi283eu928", "COGNITO_CLIENT_SECRET": "abcdef01234567890",
		},
		url:    "https://mydomain.auth.us-east-1.amazoncognito.com/oauth2/token",
		basic:  "djc98u3jiedmi283eu928:abcdef01234567890",
		form:   map[string]string{"grant_type": "client_credentials", "scope": "https://api.example.com/orders.read"},
		answer: `{"access_token":"eyJra1example","token_type":"Bearer","expires_in":3600}`,
		want:   grant{accessToken: "eyJra1example", lifetime: time.Hour},
	},
	{
		name:   "Google service accounts",
		env:    map[string]string{"GOOGLE_CLIENT_EMAIL": "gateway@project.iam.gserviceaccount.com"},
		url:    "https://oauth2.googleapis.com/token",
		form:   map[string]string{"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer"},
		jwt:    "assertion",
		header: map[string]any{"alg": "RS256", "typ": "JWT", "kid": "370ab79b4513eb9bad7c9bd16a95cb76b5b2a56a"},
		claims: map[string]any{
			"iss":   "gateway@project.iam.gserviceaccount.com",
			"sub":   "gateway@project.iam.gserviceaccount.com", // RFC 7523 §3; optional here
			"scope": "https://www.googleapis.com/auth/devstorage.read_only",
			"aud":   "https://oauth2.googleapis.com/token",
		},
		// Tokens end in dots.
		answer: `{"access_token":"ya29.c.c0ASRK0GZ........","expires_in":3599,"token_type":"Bearer"}`,
		want:   grant{accessToken: "ya29.c.c0ASRK0GZ........", lifetime: 3599 * time.Second},
	},
	{
		name:   "Salesforce with a key",
		env:    map[string]string{"SALESFORCE_CONSUMER_KEY": "3MVG99OxTyEMCQ3g_.", "SALESFORCE_USERNAME": "my@email.com"},
		url:    "https://login.salesforce.com/services/oauth2/token",
		form:   map[string]string{"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer"},
		jwt:    "assertion",
		header: map[string]any{"alg": "RS256", "typ": "JWT"},
		claims: map[string]any{"iss": "3MVG99OxTyEMCQ3g_.", "sub": "my@email.com", "aud": "https://login.salesforce.com"},
		answer: `{"access_token":"00Dxx0000001gPL!AR8AQJXg5oj8jXSgxJfA0lBog.39AsX.LVpxezPwuX5VAIrrbbHMuol7GQxnMeYMN7cj8EoWr78nt1u44zU31IbYNNJguseu",
			"scope":"web openid api id","instance_url":"https://example.my.salesforce.com",
			"id":"https://login.salesforce.com/id/00Dxx0000001gPLEAY/005xx000001SwiUAAS","token_type":"Bearer"}`,
		want: grant{
			accessToken: "00Dxx0000001gPL!AR8AQJXg5oj8jXSgxJfA0lBog.39AsX.LVpxezPwuX5VAIrrbbHMuol7GQxnMeYMN7cj8EoWr78nt1u44zU31IbYNNJguseu",
			scope:       "web openid api id",
		},
	},
	{
		name: "Salesforce with client credentials",
		env: map[string]string{
			"SALESFORCE_DOMAIN": "example.my.salesforce.com", "SALESFORCE_CONSUMER_KEY": "3MVG99OxTyEMCQ3g_.", "SALESFORCE_CONSUMER_SECRET": "1955279925675241571",
		},
		url: "https://example.my.salesforce.com/services/oauth2/token",
		form: map[string]string{
			"grant_type": "client_credentials", "client_id": "3MVG99OxTyEMCQ3g_.", "client_secret": "1955279925675241571",
		},
		answer: `{"access_token":"your_access_token","signature":"your_signature","scope":"cdp_query_api api","instance_url":"instance_url",
			"id":"https://org_domain/id/00fdg000000dfgfgs/00gfd000000fsdghjr","token_type":"Bearer","issued_at":"4564564565767"}`,
		want: grant{accessToken: "your_access_token", scope: "cdp_query_api api"},
	},
	{
		name:  "PayPal",
		env:   map[string]string{"PAYPAL_CLIENT_ID": "AYSq3RDGsmBLJE-otTkBtM_jBRd", "PAYPAL_CLIENT_SECRET": "EGnHDxD_qRPdaLdZz8iCr8N7_MzF-YHPTkjs6NKYQvQSBngp4PTTVWkPZRbL"},
		url:   "https://api-m.sandbox.paypal.com/v1/oauth2/token",
		basic: "AYSq3RDGsmBLJE-otTkBtM_jBRd:EGnHDxD_qRPdaLdZz8iCr8N7_MzF-YHPTkjs6NKYQvQSBngp4PTTVWkPZRbL",
		form:  map[string]string{"grant_type": "client_credentials"},
		answer: `{"scope":"https://uri.paypal.com/services/invoicing https://api-m.paypal.com/v1/payments/.* openid",
			"access_token":"A21AAFEpH4PsADK7qSS7pSRsgzfENtu-Q1ysgEDVDESseMHBYXVJYE8ovjj68elIDy8nF26AwPhfXTIeWAZHSLIsQkSYz9ifg",
			"token_type":"Bearer","app_id":"APP-80W284485P519543T","expires_in":31668,"nonce":"2020-04-03T15:35:36ZaYZlGvEkV4yVSz8g6bAKFoGSEzuy3CQcz3ljhibkOHg"}`,
		want: grant{
			accessToken: "A21AAFEpH4PsADK7qSS7pSRsgzfENtu-Q1ysgEDVDESseMHBYXVJYE8ovjj68elIDy8nF26AwPhfXTIeWAZHSLIsQkSYz9ifg",
			lifetime:    31668 * time.Second,
			scope:       "https://uri.paypal.com/services/invoicing https://api-m.paypal.com/v1/payments/.* openid",
		},
	},
	{
		name: "SAP with a secret",
		env: map[string]string{
			"XSUAA_SUBDOMAIN": "test-me", "XSUAA_LANDSCAPE": "eu20.hana.ondemand.com",
			"XSUAA_CLIENT_ID": "sb-orders!t12345|app!b1", "XSUAA_CLIENT_SECRET": "riH+a/b$c=",
		},
		url: "https://test-me.authentication.eu20.hana.ondemand.com/oauth/token",
		form: map[string]string{
			"grant_type": "client_credentials", "client_id": "sb-orders!t12345|app!b1", "client_secret": "riH+a/b$c=",
		},
		answer: `{"access_token":"eyJ...mh0d","token_type":"bearer","expires_in":43199,"scope":"uaa.resource","jti":"df6cb84439a541fab33d5b7c298debe1"}`,
		want:   grant{accessToken: "eyJ...mh0d", lifetime: 43199 * time.Second, scope: "uaa.resource"},
	},
	{
		name: "SAP with a certificate",
		env: map[string]string{
			"XSUAA_SUBDOMAIN": "test-me", "XSUAA_LANDSCAPE": "eu20.hana.ondemand.com",
			"XSUAA_CLIENT_ID": "sb-na-edb111d1-2c22-3eca-444-869fde307ac7!a5017",
		},
		url:         "https://test-me.authentication.cert.eu20.hana.ondemand.com/oauth/token",
		form:        map[string]string{"grant_type": "client_credentials", "client_id": "sb-na-edb111d1-2c22-3eca-444-869fde307ac7!a5017"},
		certificate: true,
		answer:      `{"access_token":"eyJ...mh0d","token_type":"bearer","expires_in":43199,"scope":"uaa.resource","jti":"df6cb84439a541fab33d5b7c298debe1"}`,
		want:        grant{accessToken: "eyJ...mh0d", lifetime: 43199 * time.Second, scope: "uaa.resource"},
	},
	{
		name: "Glewlwyd with a secret",
		env: map[string]string{
			"GLEWLWYD_DOMAIN": "glewlwyd.example.com", "GLEWLWYD_CLIENT_ID": "gateway", "GLEWLWYD_CLIENT_SECRET": "s%3A+c/r=t &?#e~",
		},
		url:    "https://glewlwyd.example.com/api/oidc/token",
		basic:  "gateway:s%3A+c/r=t &?#e~", // the server does not decode it
		form:   map[string]string{"grant_type": "client_credentials", "scope": "orders"},
		answer: `{"access_token":"eyJ0eXAiOiJhdCtqd3QiLCJ...","token_type":"bearer","expires_in":3600,"scope":"orders"}`,
		want:   grant{accessToken: "eyJ0eXAiOiJhdCtqd3QiLCJ...", lifetime: time.Hour, scope: "orders"},
	},
	{
		name: "Glewlwyd with a key",
		env:  map[string]string{"GLEWLWYD_DOMAIN": "glewlwyd.example.com", "GLEWLWYD_CLIENT_ID": "gateway", "GLEWLWYD_KEY_ID": "2026-11"},
		url:  "https://glewlwyd.example.com/api/oidc/token",
		form: map[string]string{
			"grant_type": "client_credentials", "scope": "orders", "client_id": "gateway",
			"client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
		},
		jwt:    "client_assertion",
		header: map[string]any{"alg": "RS256", "typ": "JWT", "kid": "2026-11"},
		claims: map[string]any{"iss": "gateway", "sub": "gateway", "aud": "https://glewlwyd.example.com/api/oidc/token"},
		answer: `{"access_token":"eyJ0eXAiOiJhdCtqd3QiLCJ...","token_type":"bearer","expires_in":3600,"scope":"orders"}`,
		want:   grant{accessToken: "eyJ0eXAiOiJhdCtqd3QiLCJ...", lifetime: time.Hour, scope: "orders"},
	},
	{
		name: "Glewlwyd with a certificate",
		env:  map[string]string{"GLEWLWYD_DOMAIN": "glewlwyd.example.com", "GLEWLWYD_CLIENT_ID": "gateway"},
		// It does not list the grant, though it has it.
		metadata: `{"issuer":"https://glewlwyd.example.com/api/oidc","token_endpoint":"https://glewlwyd.example.com/api/oidc/token",
			"grant_types_supported":["authorization_code","implicit"],
			"token_endpoint_auth_methods_supported":["client_secret_basic","client_secret_post","client_secret_jwt","private_key_jwt","tls_client_auth","self_signed_tls_client_auth"],
			"mtls_endpoint_aliases":{"token_endpoint":"https://glewlwyd.example.com/api/oidc/mtls/token"}}`,
		url:         "https://glewlwyd.example.com/api/oidc/mtls/token",
		form:        map[string]string{"grant_type": "client_credentials", "scope": "orders", "client_id": "gateway"},
		certificate: true,
		answer:      `{"access_token":"eyJ0eXAiOiJhdCtqd3QiLCJ...","token_type":"bearer","expires_in":3600,"scope":"orders"}`,
		want:        grant{accessToken: "eyJ0eXAiOiJhdCtqd3QiLCJ...", lifetime: time.Hour, scope: "orders"},
	},
	{
		name:     "Ory Hydra with a secret",
		env:      map[string]string{"HYDRA_DOMAIN": "hydra.example.com", "HYDRA_CLIENT_ID": "gateway", "HYDRA_CLIENT_SECRET": "s+c/r=t"},
		metadata: hydraMetadata,
		url:      "https://hydra.example.com/oauth2/token",
		basic:    "gateway:s%2Bc%2Fr%3Dt", // url_encode() in the documentation
		form:     map[string]string{"grant_type": "client_credentials", "scope": "orders.read", "audience": "https://api.example.com"},
		answer:   `{"access_token":"ory_at_9uWNt2F...","expires_in":3599,"scope":"orders.read","token_type":"bearer"}`,
		want:     grant{accessToken: "ory_at_9uWNt2F...", lifetime: 3599 * time.Second, scope: "orders.read"},
	},
	{
		name:     "Ory Hydra with a key",
		env:      map[string]string{"HYDRA_DOMAIN": "hydra.example.com", "HYDRA_CLIENT_ID": "gateway"},
		metadata: hydraMetadata,
		url:      "https://hydra.example.com/oauth2/token",
		form: map[string]string{
			"grant_type": "client_credentials", "scope": "orders.read", "audience": "https://api.example.com", "client_id": "gateway",
			"client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
		},
		jwt:    "client_assertion",
		header: map[string]any{"alg": "RS256", "typ": "client-authentication+jwt"},
		claims: map[string]any{"iss": "gateway", "sub": "gateway", "aud": "https://hydra.example.com/oauth2/token"},
		answer: `{"access_token":"ory_at_9uWNt2F...","expires_in":3599,"scope":"orders.read","token_type":"bearer"}`,
		want:   grant{accessToken: "ory_at_9uWNt2F...", lifetime: 3599 * time.Second, scope: "orders.read"},
	},
	{
		name: "Dex",
		env:  map[string]string{"DEX_DOMAIN": "dex.example.com", "DEX_CLIENT_ID": "gateway", "DEX_CLIENT_SECRET": "s-_cret"},
		metadata: `{"issuer":"https://dex.example.com/dex","token_endpoint":"https://dex.example.com/dex/token",
			"grant_types_supported":["authorization_code","client_credentials"],
			"token_endpoint_auth_methods_supported":["client_secret_basic","client_secret_post"]}`,
		url:    "https://dex.example.com/dex/token",
		basic:  "gateway:s-_cret",
		form:   map[string]string{"grant_type": "client_credentials"},
		answer: `{"access_token":"eyJhbGciOiJSUzI1NiIsImtpZCI6...","token_type":"bearer","expires_in":86399}`,
		want:   grant{accessToken: "eyJhbGciOiJSUzI1NiIsImtpZCI6...", lifetime: 86399 * time.Second},
	},
	{
		name: "Casdoor with a secret",
		env:  map[string]string{"CASDOOR_DOMAIN": "casdoor.example.com", "CASDOOR_CLIENT_ID": "c58c1a3d9e", "CASDOOR_CLIENT_SECRET": "s%3A+c/r=t"},
		url:  "https://casdoor.example.com/api/login/oauth/access_token",
		form: map[string]string{"grant_type": "client_credentials", "client_id": "c58c1a3d9e", "client_secret": "s%3A+c/r=t"},
		// A refresh token comes with it, which is ignored.
		answer: `{"access_token":"eyJhb...","id_token":"eyJhb...","refresh_token":"eyJhb...","token_type":"Bearer","expires_in":10080,"scope":"openid"}`,
		want:   grant{accessToken: "eyJhb...", lifetime: 10080 * time.Second, scope: "openid"},
	},
	{
		name: "Casdoor with a key",
		env:  map[string]string{"CASDOOR_DOMAIN": "casdoor.example.com", "CASDOOR_CLIENT_ID": "c58c1a3d9e"},
		url:  "https://casdoor.example.com/api/login/oauth/access_token",
		form: map[string]string{
			"grant_type": "client_credentials", "client_id": "c58c1a3d9e",
			"client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
		},
		jwt:    "client_assertion",
		header: map[string]any{"alg": "RS256", "typ": "JWT"},
		claims: map[string]any{"iss": "c58c1a3d9e", "sub": "c58c1a3d9e", "aud": "https://casdoor.example.com/api/login/oauth/access_token"},
		answer: `{"access_token":"eyJhb...","token_type":"Bearer","expires_in":10080,"scope":"openid"}`,
		want:   grant{accessToken: "eyJhb...", lifetime: 10080 * time.Second, scope: "openid"},
	},
	{
		name: "LemonLDAP::NG",
		env:  map[string]string{"LEMONLDAP_DOMAIN": "auth.example.com", "LEMONLDAP_CLIENT_ID": "gateway", "LEMONLDAP_CLIENT_SECRET": "s%3A+c/r=t"},
		metadata: `{"issuer":"https://auth.example.com","token_endpoint":"https://auth.example.com/oauth2/token",
			"grant_types_supported":["authorization_code","client_credentials"],
			"token_endpoint_auth_methods_supported":["client_secret_post","client_secret_basic"]}`,
		url: "https://auth.example.com/oauth2/token",
		form: map[string]string{
			"grant_type": "client_credentials", "client_id": "gateway", "client_secret": "s%3A+c/r=t", "scope": "orders:read",
		},
		answer: `{"access_token":"b5a2c5f7e9...","expires_in":3600,"scope":"orders:read","token_type":"Bearer"}`,
		want:   grant{accessToken: "b5a2c5f7e9...", lifetime: time.Hour, scope: "orders:read"},
	},
	{
		name: "django-oauth-toolkit",
		env: map[string]string{
			"DJANGO_DOMAIN": "django.example.com", "DJANGO_CLIENT_ID": "axXSSBVuvOyGVzh4PurvKaq5MHXMm7FtrHgDMi4u", "DJANGO_CLIENT_SECRET": "1fuv5WVfR7A5BlF0o155H7s5bLgXlwWLhi3Y7pdJ",
		},
		url:    "https://django.example.com/o/token/",
		basic:  "axXSSBVuvOyGVzh4PurvKaq5MHXMm7FtrHgDMi4u:1fuv5WVfR7A5BlF0o155H7s5bLgXlwWLhi3Y7pdJ",
		form:   map[string]string{"grant_type": "client_credentials", "scope": "read"},
		answer: `{"access_token":"PaZDOD5UwzbGOFsQr34LQ7JUYOj3yK","expires_in":36000,"token_type":"Bearer","scope":"read write"}`,
		want:   grant{accessToken: "PaZDOD5UwzbGOFsQr34LQ7JUYOj3yK", lifetime: 10 * time.Hour, scope: "read write"},
	},
	{
		name: "Zitadel with a secret",
		env: map[string]string{
			"ZITADEL_DOMAIN": "sso.example.com", "ZITADEL_PROJECT_ID": "69234237810729019",
			"ZITADEL_CLIENT_ID": "78366401571920522@amce", "ZITADEL_CLIENT_SECRET": "veryweaksecret!",
		},
		metadata: zitadelMetadata,
		url:      "https://sso.example.com/oauth/v2/token",
		basic:    "78366401571920522%40amce:veryweaksecret%21", // as in the documentation
		form: map[string]string{
			"grant_type": "client_credentials", "scope": "openid urn:zitadel:iam:org:project:id:69234237810729019:aud",
		},
		answer: `{"access_token":"MtjHodGy4zxKylDOhg6kW90WeEQs2q...","token_type":"Bearer","expires_in":43199}`,
		want:   grant{accessToken: "MtjHodGy4zxKylDOhg6kW90WeEQs2q...", lifetime: 43199 * time.Second},
	},
	{
		name: "Zitadel with a key",
		env: map[string]string{
			"ZITADEL_DOMAIN": "sso.example.com", "ZITADEL_PROJECT_ID": "69234237810729019",
			"ZITADEL_USER_ID": "100507859606888466", "ZITADEL_KEY_ID": "100509901696068329",
		},
		metadata: zitadelMetadata,
		url:      "https://sso.example.com/oauth/v2/token",
		form: map[string]string{
			"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "scope": "openid urn:zitadel:iam:org:project:id:69234237810729019:aud",
		},
		jwt:    "assertion",
		header: map[string]any{"alg": "RS256", "typ": "JWT", "kid": "100509901696068329"},
		claims: map[string]any{"iss": "100507859606888466", "sub": "100507859606888466", "aud": "https://sso.example.com"},
		answer: `{"access_token":"MtjHodGy4zxKylDOhg6kW90WeEQs2q...","token_type":"Bearer","expires_in":43199}`,
		want:   grant{accessToken: "MtjHodGy4zxKylDOhg6kW90WeEQs2q...", lifetime: 43199 * time.Second},
	},
	{
		name:   "Zoom",
		env:    map[string]string{"ZOOM_CLIENT_ID": "JKpCm2xCRLqJHkU", "ZOOM_CLIENT_SECRET": "Gv0xkYtbJkuC", "ZOOM_ACCOUNT_ID": "gYz8S9w5Q5yrDoIvmdClYw"},
		url:    "https://zoom.us/oauth/token",
		basic:  "JKpCm2xCRLqJHkU:Gv0xkYtbJkuC",
		form:   map[string]string{"grant_type": "account_credentials", "account_id": "gYz8S9w5Q5yrDoIvmdClYw"},
		answer: `{"access_token":"eyJzdiI6...","token_type":"bearer","expires_in":3600,"scope":"user:read:user:admin","api_url":"https://api.zoom.us"}`,
		want:   grant{accessToken: "eyJzdiI6...", lifetime: time.Hour, scope: "user:read:user:admin"},
	},
	{
		name:  "Apigee",
		env:   map[string]string{"APIGEE_CLIENT_ID": "kWocGgKENrdWRT0jq4l0F0ACnPAQsD3", "APIGEE_CLIENT_SECRET": "6WADDsZNIGDcZOaX"},
		url:   "https://api.example.com/oauth/client_credential/accesstoken?grant_type=client_credentials",
		basic: "kWocGgKENrdWRT0jq4l0F0ACnPAQsD3:6WADDsZNIGDcZOaX",
		form:  map[string]string{"grant_type": "client_credentials"}, // as well
		// All its numbers are texts.
		answer: `{"issued_at":"1416157639014","application_name":"e49ef95f-6d32-4062-ac9a-3beea62ca922","scope":"","status":"approved",
			"api_product_list":"[Test App product]","expires_in":"3599","developer.email":"testdev@example.com","organization_id":"0",
			"token_type":"BearerToken","client_id":"kWocGgKENrdWRT0jq4l0F0ACnPAQsD3","access_token":"WNSnwquKualbgnGeAK0EXGqzO3A",
			"organization_name":"example","refresh_token_expires_in":"0","refresh_count":"0"}`,
		want: grant{accessToken: "WNSnwquKualbgnGeAK0EXGqzO3A", lifetime: 3599 * time.Second},
	},
}

// keycloakMetadata has another host for certificates, which a server may have.
const keycloakMetadata = `{"issuer":"https://sso.example.com/realms/demo",
	"token_endpoint":"https://sso.example.com/realms/demo/protocol/openid-connect/token",
	"token_endpoint_auth_methods_supported":["private_key_jwt","client_secret_basic","client_secret_post","tls_client_auth","client_secret_jwt"],
	"token_endpoint_auth_signing_alg_values_supported":["PS256","RS256","ES256"],
	"mtls_endpoint_aliases":{"token_endpoint":"https://mtls.sso.example.com/realms/demo/protocol/openid-connect/token"}}`

// The issuer's slash at the end belongs to its name.
const hydraMetadata = `{"issuer":"https://hydra.example.com/","token_endpoint":"https://hydra.example.com/oauth2/token",
	"grant_types_supported":["authorization_code","implicit","client_credentials","refresh_token"],
	"token_endpoint_auth_methods_supported":["client_secret_post","client_secret_basic","private_key_jwt","none"]}`

const zitadelMetadata = `{"issuer":"https://sso.example.com","token_endpoint":"https://sso.example.com/oauth/v2/token",
	"grant_types_supported":["authorization_code","client_credentials","urn:ietf:params:oauth:grant-type:jwt-bearer"],
	"token_endpoint_auth_methods_supported":["none","client_secret_basic","client_secret_post","private_key_jwt"]}`

// providerBlocks returns the blocks of docs/providers.md, and the heading above
// each.
func providerBlocks(t *testing.T) (blocks []fencedBlock, headings []string) {
	t.Helper()
	page, err := os.ReadFile("docs/providers.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks = fencedBlocks(string(page), "caddyfile")
	lines := strings.Split(string(page), "\n")
	for _, block := range blocks {
		heading := ""
		for _, line := range lines[:block.line] {
			if strings.HasPrefix(line, "## ") {
				heading = line
			}
		}
		headings = append(headings, heading)
	}
	if len(blocks) != len(documentedGrants) {
		t.Fatalf("got %d blocks in docs/providers.md, want one for each of the %d token requests of this test", len(blocks), len(documentedGrants))
	}
	return blocks, headings
}

// providerFiles writes what the providers want in the place of /run/secrets,
// with an RSA key: several take no other.
func providerFiles(t *testing.T) (dir string, certificate []byte) {
	t.Helper()
	dir = t.TempDir()
	key := keytest.Keys["RSA"]()
	keyPEM := keytest.PKCS8(t, key)
	certificate = keytest.Certificate(t, key)
	for name, content := range map[string][]byte{
		"private_key.pem": keyPEM,
		"client.key":      keyPEM,
		"client.crt":      keytest.PEM("CERTIFICATE", certificate),
		// As it is downloaded: client_id is a number, and not what is asked for.
		"service_account.json": encode(t, map[string]string{
			"type": "service_account", "project_id": "project", "private_key": string(keyPEM),
			"private_key_id": "370ab79b4513eb9bad7c9bd16a95cb76b5b2a56a",
			"client_email":   "gateway@project.iam.gserviceaccount.com", "client_id": "113258942105700140798",
			"token_uri": "https://oauth2.googleapis.com/token",
		}),
	} {
		writeFile(t, filepath.Join(dir, name), content)
	}
	return dir, certificate
}

// federatedToken is what a platform writes into the assertion_file.
const federatedToken = "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJodHRwczovL2lzc3Vlci5leGFtcGxlIn0.c2lnbmF0dXJl"

// TestProviderDocumentWorks loads each block as it stands there.
func TestProviderDocumentWorks(t *testing.T) {
	blocks, headings := providerBlocks(t)
	for i, block := range blocks {
		t.Run(documentedGrants[i].name, func(t *testing.T) {
			name, _, _ := strings.Cut(documentedGrants[i].name, " ")
			if !strings.Contains(headings[i], name) {
				t.Fatalf("line %d stands below %q, want the block of %s there", block.line, headings[i], name)
			}
			if got := caddyfile.Format([]byte(block.text)); string(got) != block.text {
				t.Errorf("line %d: got a block that is not formatted, want\n%s", block.line, got)
			}
			setPlaceholders(t, []byte(block.text))
			dir, _ := providerFiles(t)
			t.Setenv("AZURE_FEDERATED_TOKEN_FILE", writeFile(t, filepath.Join(dir, "token"), []byte(federatedToken)))
			source := strings.ReplaceAll(completeCaddyfile(block.text), " /run/secrets/", " "+dir+"/")
			wantError(t, validateCaddyfile(t, source), "")
		})
	}
}

// clientWords are the words of the table of docs/providers.md, by what the settings of
// a block say.
var clientWords = []struct {
	word string
	is   func(*Credentials) bool
}{
	{"basic", func(c *Credentials) bool { return c.authMethod() == authBasic }},
	{"post", func(c *Credentials) bool { return c.authMethod() == authPost }},
	{"secret JWT", func(c *Credentials) bool { return c.authMethod() == authSecretJWT }},
	{"key", func(c *Credentials) bool { return c.authMethod() == authKeyJWT && c.usesKey() }},
	{"JWT file", func(c *Credentials) bool { return c.authMethod() == authKeyJWT && !c.usesKey() }},
	{"certificate", func(c *Credentials) bool { return c.authMethod() == authTLS }},
	{"service account", func(c *Credentials) bool { return c.grantsByJWT() }},
}

// providerTable returns the cells of the table of docs/providers.md, without the first
// one, by the name in the first one.
func providerTable(t *testing.T) map[string][]string {
	t.Helper()
	rows := make(map[string][]string)
	for line := range strings.Lines(readFile(t, "docs/providers.md")) {
		row := regexp.MustCompile(`^\| \[([^]]+)\]\(#[^)]+\) \|(.*)\|$`).FindStringSubmatch(strings.TrimSpace(line))
		if row == nil {
			continue
		}
		cells := strings.Split(row[2], "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if len(cells) != 4 || rows[row[1]] != nil {
			t.Fatalf("got the row %q, want one of 5 cells for each provider", line)
		}
		rows[row[1]] = cells
	}
	return rows
}

// TestProviderTable compares the table with the blocks: each heading has a row, and each
// block does what its row says.
func TestProviderTable(t *testing.T) {
	rows := providerTable(t)
	blocks, headings := providerBlocks(t)
	for i, block := range blocks {
		p := documentedGrants[i]
		t.Run(p.name, func(t *testing.T) {
			row, ok := rows[strings.TrimSpace(strings.TrimPrefix(headings[i], "## "))]
			if !ok {
				t.Fatalf("line %d: got no row of the table for %q, want one", block.line, headings[i])
			}
			words := strings.Split(row[0], ", ")
			c := providerCredentials(t, block.text)
			for _, w := range clientWords {
				if w.is(c) && !slices.Contains(words, w.word) {
					t.Errorf("got the row %q, want %q among its words for the client", row, w.word)
				}
			}
			if slices.Contains(words, "basic") && c.authMethod() == authBasic && c.BasicEncoding == basicRaw && !strings.Contains(row[2], "`basic_encoding raw`") {
				t.Errorf("got the row %q, want that it names basic_encoding raw", row)
			}
			if audience, _ := p.claims["aud"].(string); !namesAudience(row[1], audience, p.url, p.metadata) {
				t.Errorf("got the row %q, want that it names the audience %s", row, audience)
			}
			if seen := strings.Contains(providerSection(t, headings[i]), "*Seen with "); seen != (row[3] != "") {
				t.Errorf("got the row %q, want a version if, and only if, the section begins with one", row)
			}
		})
	}
	examples, err := filepath.Glob("examples/*.Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	headed := len(slices.Compact(slices.Clone(headings)))
	if want := headed + len(examples) - 1; len(rows) != want { // gateway.Caddyfile is for all others
		t.Errorf("got %d rows, want %d: one for each heading with a block, and for each example of a provider", len(rows), want)
	}
}

// namesAudience reports whether a cell says which audience a JWT has.
func namesAudience(cell, audience, tokenEndpoint, metadata string) bool {
	switch {
	case audience == "": // there is no JWT
		return true
	case audience == tokenEndpoint:
		return strings.Contains(cell, "token endpoint")
	case strings.Contains(metadata, fmt.Sprintf("%q:%q", "issuer", audience)):
		return strings.Contains(cell, "issuer")
	case strings.HasSuffix(audience, ".auth0.com/"):
		return cell == "the tenant, with `/`"
	}
	return cell == "`"+audience+"`"
}

// providerSection returns what stands below a heading of docs/providers.md.
func providerSection(t *testing.T, heading string) string {
	t.Helper()
	_, section, _ := strings.Cut(readFile(t, "docs/providers.md"), heading)
	section, _, _ = strings.Cut(section, "\n## ")
	return section
}

// providerCredentials returns the settings of a block.
func providerCredentials(t *testing.T, block string) *Credentials {
	t.Helper()
	proxies := findModules(t, encode(t, adaptCaddyfile(t, completeCaddyfile(block))), "handler", "reverse_proxy")
	if len(proxies) != 1 {
		t.Fatalf("the block has %d reverse proxies, want 1", len(proxies))
	}
	var transport Transport
	if err := json.Unmarshal(encode(t, proxies[0]["transport"]), &transport); err != nil {
		t.Fatal(err)
	}
	return transport.Credentials
}

// TestProviderLinksToExamples finds files that were moved.
func TestProviderLinksToExamples(t *testing.T) {
	page, err := os.ReadFile("docs/providers.md")
	if err != nil {
		t.Fatal(err)
	}
	examples, err := filepath.Glob("examples/*.Caddyfile")
	if err != nil || len(examples) == 0 {
		t.Fatalf("got %d examples, err %v, want some", len(examples), err)
	}
	links := make(map[string]bool)
	for _, match := range regexp.MustCompile(`\]\((\.\.[^)]*)\)`).FindAllStringSubmatch(string(page), -1) {
		file := filepath.Join("docs", match[1])
		links[file] = true
		if _, err := os.Stat(file); err != nil {
			t.Errorf("got a link to %s, want a file there: %v", match[1], err)
		}
	}
	for _, example := range examples {
		if !links[example] {
			t.Errorf("got no link to %s, want one", example)
		}
	}
}

// TestProviderTokenRequests compares the token request that each block makes
// with what the provider documents, and reads the provider's answer.
func TestProviderTokenRequests(t *testing.T) {
	blocks, _ := providerBlocks(t)
	for i, p := range documentedGrants {
		t.Run(p.name, func(t *testing.T) {
			dir, certificate := providerFiles(t)
			t.Setenv("AZURE_FEDERATED_TOKEN_FILE", writeFile(t, filepath.Join(dir, "token"), []byte(federatedToken)))
			for name, value := range p.env {
				t.Setenv(name, value)
			}
			tokens := answering(http.StatusOK, p.answer)
			transport, dial, got := loadProvider(t, strings.ReplaceAll(blocks[i].text, " /run/secrets/", " "+dir+"/"), tokens, p.metadata)

			g, err := transport.fallback.endpoint.locateAndRequest(t.Context(), nil)
			g.issued, g.took = time.Time{}, 0
			if err != nil || g != p.want {
				t.Fatalf("request() = %v, %v, want %v", g, err, p.want)
			}
			wantProviderRequest(t, tokens, p.url, p.basic, p.form, p.jwt, func(token string) {
				if p.file {
					if token != federatedToken {
						t.Errorf("got the JWT %q, want that of the file", token)
					}
					return
				}
				header, claims := verified(t, token, keytest.Keys["RSA"]().Public(), p.header["alg"].(string))
				want := maps.Clone(p.header)
				if p.thumbprint {
					sum := sha256.Sum256(certificate)
					want["x5t#S256"] = base64.RawURLEncoding.EncodeToString(sum[:])
				}
				wantMembers(t, "header", header, want)
				takeTimes(t, claims, time.Minute)
				wantMembers(t, "claims", claims, p.claims)
			})
			presents := clientcert.Ask(tokens.contexts[0])
			if has := presents != nil; has != p.certificate {
				t.Errorf("a certificate is presented: %t, want %t", has, p.certificate)
			} else if has && string(presents.Certificate[0]) != string(certificate) {
				t.Error("got another certificate, want that of the config")
			}

			res, err := transport.RoundTrip(proxied(t, dial, "/"))
			if err != nil {
				t.Fatalf("RoundTrip() = %v, want no error", err)
			}
			_ = res.Body.Close()
			if sent := (*got).Get("Authorization"); sent != "Bearer "+p.want.accessToken {
				t.Errorf("the upstream was sent Authorization %q, want the provider's token", sent)
			}
			wantLifetime := p.want.lifetime
			if wantLifetime == 0 {
				wantLifetime = 15 * time.Minute // default_lifetime of the block
			}
			tok, _, err := transport.fallback.source.Token(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if left := time.Until(tok.expires); left > wantLifetime || left < wantLifetime-patience {
				t.Errorf("the token is used for %v, want about %v", left, wantLifetime)
			}
		})
	}
}

// wantProviderRequest fails the test unless exactly this was sent first.
func wantProviderRequest(t *testing.T, tokens *wire, target, basic string, form map[string]string, jwt string, check func(string)) {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	_, body, _ := strings.Cut(tokens.requests()[0], "\r\n\r\n")
	sent, err := url.ParseQuery(body)
	if err != nil {
		t.Fatal(err)
	}
	if jwt != "" {
		check(sent.Get(jwt))
		sent.Del(jwt)
	}
	want := url.Values{}
	for name, value := range form {
		want.Set(name, value)
	}
	if sent.Encode() != want.Encode() {
		t.Errorf("sent the form %s, want %s", sent.Encode(), want.Encode())
	}
	authorization := ""
	if basic != "" {
		authorization = "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(basic)) + "\r\n"
	}
	if got, want := tokens.requests()[0], documentedRequest(u.Host, u.RequestURI(), authorization, body); got != want {
		t.Errorf("sent\n%q, want\n%q", got, want)
	}
}

// loadProvider loads the transport of a block. Its token requests go to the
// token server, its look-ups get the metadata, and what it proxies goes to an
// upstream that notes the headers.
func loadProvider(t *testing.T, block string, tokens *wire, metadata string) (transport *Transport, dial string, got *http.Header) {
	t.Helper()
	proxies := findModules(t, encode(t, adaptCaddyfile(t, completeCaddyfile(block))), "handler", "reverse_proxy")
	if len(proxies) != 1 {
		t.Fatalf("the block has %d reverse proxies, want 1", len(proxies))
	}
	dial = proxies[0]["upstreams"].([]any)[0].(map[string]any)["dial"].(string)
	transport, _, err := loadTransport(t, dial, proxies[0]["transport"])
	if err != nil {
		t.Fatalf("the block does not load: %v", err)
	}
	endpoint := transport.fallback.endpoint
	endpoint.transport = tokens
	if (endpoint.discovery != nil) != (metadata != "") {
		t.Fatalf("there is a look-up: %t, want %t", endpoint.discovery != nil, metadata != "")
	}
	if endpoint.discovery != nil {
		var published struct{ Issuer string }
		if err := json.Unmarshal([]byte(metadata), &published); err != nil {
			t.Fatal(err)
		}
		endpoint.discovery.transport = roundTripFunc(func(req *http.Request) (*http.Response, error) {
			rec := httptest.NewRecorder()
			// Not at the place of RFC 8414: several of these servers have no metadata there.
			place := strings.TrimSuffix(published.Issuer, "/") + "/.well-known/openid-configuration"
			if req.Method != http.MethodGet || req.URL.String() != place {
				rec.WriteHeader(http.StatusNotFound)
				return rec.Result(), nil
			}
			_, _ = io.WriteString(rec, metadata)
			return rec.Result(), nil
		})
	}

	got = new(http.Header)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { *got = r.Header }))
	t.Cleanup(server.Close)
	transport.HTTPTransport.Transport = &http.Transport{
		// What the transport takes for TLS, as in loadExample.
		DialTLSContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, server.Listener.Addr().String())
		},
	}
	t.Cleanup(transport.HTTPTransport.Transport.CloseIdleConnections)
	return transport, dial, got
}

// TestProviderReadsEncodedBasic has what the page says of SAP instead of
// client_secret_post: form-encoded, and announced as such.
func TestProviderReadsEncodedBasic(t *testing.T) {
	tokens := answering(http.StatusOK, goodAnswer)
	cl := newTestClient(t, Credentials{
		TokenURL: testTokenURL, ClientID: "sb-orders!t12345", ClientSecret: "riH+c=", AuthMethod: authBasic,
		TokenRequestHeaders: map[string]string{"X-CF-ENCODED-CREDENTIALS": "true"},
	}, tokens)
	if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	basic := base64.StdEncoding.EncodeToString([]byte("sb-orders%21t12345:riH%2Bc%3D"))
	sent := tokens.requests()[0]
	for _, want := range []string{"\r\nAuthorization: Basic " + basic + "\r\n", "\r\nX-Cf-Encoded-Credentials: true\r\n"} {
		if !strings.Contains(sent, want) {
			t.Errorf("sent\n%q, want %q in it", sent, want)
		}
	}
}

// TestProviderRefusalsAreUnderstood has errors as the providers document them,
// with members of their own.
func TestProviderRefusalsAreUnderstood(t *testing.T) {
	for _, test := range []struct {
		provider, body string
		status         int
		wantCode       string
		wantIn         string
	}{
		{
			"Microsoft Entra ID",
			`{"error":"invalid_scope","error_description":"AADSTS70011: The provided value for the input parameter 'scope' is not valid.\r\nTrace ID: 255d1aef","error_codes":[70011],"timestamp":"2016-01-09 02:02:12Z","trace_id":"255d1aef"}`,
			http.StatusBadRequest, "invalid_scope", "AADSTS70011",
		},
		{
			"Okta", `{"error":"invalid_dpop_proof","error_description":"The DPoP proof JWT header is missing."}`,
			http.StatusBadRequest, "invalid_dpop_proof", "DPoP proof",
		},
		{
			"Salesforce", `{"error":"invalid_grant","error_description":"audience is invalid"}`,
			http.StatusBadRequest, "invalid_grant", "audience is invalid",
		},
		{
			"Zoom", `{"reason":"unsupported grant type","error":"unsupported_grant_type"}`,
			http.StatusBadRequest, "unsupported_grant_type", "unsupported grant type",
		},
	} {
		t.Run(test.provider, func(t *testing.T) {
			c := Credentials{TokenURL: testTokenURL, ClientID: "id", ClientSecret: "secret"}
			cl := newTestClient(t, c, answering(test.status, test.body))
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			failure := wantTokenError(t, err, test.wantCode, true)
			if !strings.Contains(failure.Description, test.wantIn) || strings.ContainsAny(fmt.Sprint(err), "\r\n") {
				t.Errorf("request() = %q, want %q in one line", err, test.wantIn)
			}
		})
	}
}
