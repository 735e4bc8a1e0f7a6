package outboundauth

import (
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
)

// servedAnswer is what real servers answer to a token request, as it was seen.
type servedAnswer struct {
	name     string
	settings string // of the client; KEY is a file
	metadata string // members of the issuer's metadata, beside the endpoint
	at       string // the URL of the endpoint; tokenPlace by default
	status   int
	header   string // "Field: value"
	body     string // or the error of the connection, see cut
	want     string // the error, behind the name of the host
}

const (
	nothingThere = " (check token_url: no token endpoint seems to be there; or set issuer instead, which finds it)"
	wantsHTTPS   = " (check token_url: no token endpoint seems to be there, or its port wants https; or set issuer instead, which finds it)"
	secretClient = "client_id gateway\nclient_secret " + canarySecret
	plainSecret  = "client_id gateway\nclient_secret s3cr3t-of-it"
	oddSecret    = "client_id gateway\nclient_secret \"s%3A+c/r=t &?#e~\""
	keyClient    = "client_id gateway\nprivate_key KEY"
	localPlace   = "http://127.0.0.1:22444/token"
)

// servedAnswers are from Glewlwyd, Hydra, Dex, Casdoor, go-oidc, LemonLDAP::NG and
// django-oauth-toolkit, and from public reports about others.
var servedAnswers = []servedAnswer{
	// Something else than the token endpoint.
	{"404 of Go", plainSecret, "", "", 404, "Content-Type: text/plain", "404 page not found\n", "status 404: http_status" + nothingThere},
	{"404 of Casdoor", plainSecret, "", "", 404, "", "", "status 404: http_status" + nothingThere},
	{"404 of Django", plainSecret, "", "", 404, "Content-Type: text/html; charset=utf-8", "\n<!doctype html>\n<html lang=\"en\">\n<head>\n  <title>Not Found</title>\n</head></html>", `status 404: http_status: an HTML page with the title "Not Found"` + nothingThere},
	{"404 of Glewlwyd", plainSecret, "", "", 404, "", `{"error":"resource not found","message":"no resource available at this address"}`, "status 404: resource not found: no resource available at this address" + nothingThere},
	{"404 with an issuer", plainSecret, `{"x":0}`, "", 404, "", "", "status 404: http_status (the issuer's metadata names this address, and no token endpoint seems to be there: check issuer, or set token_url instead)"},
	{"405", plainSecret, "", "", 405, "Allow: GET", "", "status 405: http_status" + nothingThere},
	{"authorization endpoint of Dex", plainSecret, "", "", 400, "Content-Type: text/html", "<!DOCTYPE html><html><head><title>dex</title></head><body>Bad Request</body></html>", `status 400: http_status: an HTML page with the title "dex"` + nothingThere},
	{"TLS port of Go", plainSecret, "", localPlace, 400, "", "Client sent an HTTP request to an HTTPS server.\n", "status 400: http_status" + wantsHTTPS},
	{"TLS port of nginx", plainSecret, "", localPlace, 400, "Content-Type: text/html", "<html>\r\n<head><title>400 The plain HTTP request was sent to HTTPS port</title></head>", `status 400: http_status: an HTML page with the title "400 The plain HTTP request was sent to HTTPS port"` + wantsHTTPS},
	{"plain port of starman", plainSecret, "", "", 0, "", "", "network: the server closed the connection before its answer was complete (check the scheme and port of token_url or issuer, or see why the server closes connections)"},
	{"portal of LemonLDAP", plainSecret, "", "", 401, "WWW-Authenticate: SSO https://portal.example.com", `{"error":"9","result":0}`, "status 401: 9" + nothingThere},
	{"portal of LemonLDAP in HTML", plainSecret, "", "", 401, "WWW-Authenticate: SSO https://portal.example.com", "<!DOCTYPE html><title>Authentication portal</title>", `status 401: http_status: an HTML page with the title "Authentication portal"` + nothingThere},
	{"login page", plainSecret, "", "", 200, "Content-Type: text/html", "<!doctype html><title>Sign in</title>", `status 200: invalid_response: an HTML page with the title "Sign in", and no JSON object` + nothingThere},
	{"redirect of Hydra", plainSecret, "", "", 302, "Location: https://ui.example.com/login?login_challenge=abc", "", "status 302: http_status: a redirect to https://ui.example.com/login, which is not followed because it would take the client's credentials elsewhere (set token_url to where it leads, if a token endpoint is there)"},
	{"redirect of Django", plainSecret, "", "", 301, "Location: /o/token/", "", "status 301: http_status: a redirect to https://as.example.com/o/token/, which is not followed because it would take the client's credentials elsewhere (set token_url to where it leads, if a token endpoint is there)"},

	// The client.
	{"wrong secret", plainSecret, "", "", 401, `WWW-Authenticate: Basic realm="token"`, `{"error":"invalid_client"}`, "status 401: invalid_client (check client_id, client_secret and auth_method)"},
	{"wrong secret at Glewlwyd", plainSecret, "", "", 403, "", "", "status 403: http_status (check client_id, client_secret and scopes)"},
	{"odd secret that is not decoded", oddSecret, "", "", 401, "", `{"error":"invalid_client"}`, "status 401: invalid_client (set basic_encoding raw, as many servers do not decode id and secret; or check client_id and client_secret)"},
	{"odd secret at Glewlwyd", oddSecret, "", "", 403, "", "", "status 403: http_status (set basic_encoding raw, as many servers do not decode id and secret; or check client_id and scopes)"},
	{"odd secret, raw", oddSecret + "\nbasic_encoding raw", "", "", 401, "", `{"error":"invalid_client"}`, "status 401: invalid_client (set basic_encoding form, if the server decodes the secret; or check client_secret and auth_method)"},
	{"id with a colon", "client_id gate:way\nclient_secret s3cr3t-of-it", "", "", 401, "", `{"error":"invalid_client"}`, "status 401: invalid_client (set auth_method client_secret_post, as many servers do not decode a colon in the id; or check client_id and client_secret)"},
	{"key at Hydra", keyClient, `{"x":0}`, "", 401, "", `{"error":"invalid_client","error_description":"Claim 'audience' from 'client_assertion' must match the authorization server's token endpoint"}`, "status 401: invalid_client: Claim 'audience' from 'client_assertion' must match the authorization server's token endpoint (set assertion_audience " + tokenPlace + ", which many servers want; or check private_key and key_id)"},
	{"key at Glewlwyd", keyClient, `{"x":0}`, "", 403, "", "", "status 403: http_status (set assertion_audience " + tokenPlace + ", which many servers want; or check private_key and scopes)"},
	{"method that Hydra does not list", "client_id gateway\nauth_method client_secret_jwt\nclient_secret s3cr3t-of-it-that-is-long-enough-for-it", `{"token_endpoint_auth_methods_supported":["client_secret_post","client_secret_basic","x"]}`, "", 401, "", `{"error":"invalid_client"}`, "status 401: invalid_client (set auth_method to what the server lists: client_secret_basic client_secret_post; or check client_id)"},
	{"key, with the audience", keyClient + "\nassertion_audience " + tokenPlace, `{"x":0}`, "", 401, "", `{"error":"invalid_client"}`, "status 401: invalid_client (check private_key, key_id and assertion_audience)"},
	{"key, with token_url", keyClient, "", "", 401, "", `{"error":"invalid_client"}`, "status 401: invalid_client (check private_key, key_id and assertion_audience)"},
	{"key at Casdoor", keyClient, `{"x":0}`, "", 200, "", `{"status":"error","msg":"client certificate is not configured for application: [admin/gw]","data":null}`, "status 200: http_status: client certificate is not configured for application: [admin/gw] (check key_id, private_key and scopes, and whether the client may use the client_credentials grant)"},
	{"Apigee", plainSecret, "", "", 401, "", `{"ErrorCode" : "invalid_client", "Error" :"ClientId is Invalid"}`, "status 401: invalid_client: ClientId is Invalid (check client_id, client_secret and auth_method)"},
	{"gateway of Apigee", plainSecret, "", "", 401, "", `{"fault":{"faultstring":"Invalid ApiKey","detail":{"errorcode":"oauth.v2.InvalidApiKey"}}}`, "status 401: oauth.v2.InvalidApiKey: Invalid ApiKey (check client_id, client_secret and token_url)"},
	{"Entra", plainSecret, "", "", 401, "", `{"error":"invalid_client","error_description":"AADSTS7000215: Invalid client secret provided. Ensure the secret being sent in the request is the client secret value, not the client secret ID. Trace ID: 0d1 Correlation ID: 2f3","error_codes":[7000215]}`, "status 401: invalid_client: AADSTS7000215: Invalid client secret provided. Ensure the secret being sent in the request is the client secret value, not the client secret ID. Trace ID: 0d1 Correlation ID: 2f3 (check client_id, client_secret and auth_method)"},
	{"Zoom", plainSecret, "", "", 400, "", `{"reason":"Invalid client_id or client_secret","error":"invalid_client"}`, "status 400: invalid_client: Invalid client_id or client_secret (check client_id, client_secret and auth_method)"},

	// The grant and the request.
	{"grant at Glewlwyd", plainSecret, "", "", 400, "", `{"error":"authorization_type_invalid"}`, "status 400: authorization_type_invalid (allow this client the client_credentials grant at the authorization server)"},
	{"scope at Glewlwyd", plainSecret + "\nscopes a", "", "", 400, "", `{"error":"scope_invalid"}`, "status 400: scope_invalid (check scopes)"},
	{"no scope", plainSecret, "", "", 400, "", `{"error":"invalid_scope"}`, "status 400: invalid_scope (set scopes: the server wants some)"},
	{"grant at Casdoor", plainSecret, `{"grant_types_supported":["password","client_credentials"]}`, "", 400, "", `{"error":"unsupported_grant_type","error_description":"grant_type: client_credentials is not supported in this application"}`, "status 400: unsupported_grant_type: grant_type: client_credentials is not supported in this application (allow this client the client_credentials grant at the authorization server: it lists this grant)"},
	{"grant that nobody lists", plainSecret, "", "", 400, "", `{"error":"unsupported_grant_type"}`, "status 400: unsupported_grant_type (check grant_type and token_url, or allow this client the client_credentials grant at the authorization server)"},
	{"audience at Hydra", plainSecret + "\naudience https://api.example.com", "", "", 400, "", `{"error":"invalid_request","error_description":"Requested audience has not been whitelisted"}`, "status 400: invalid_request: Requested audience has not been whitelisted (check audience, scopes and auth_method)"},
	{"bound tokens at go-oidc", plainSecret, `{"dpop_signing_alg_values_supported":["ES256"],"tls_client_certificate_bound_access_tokens":true}`, "", 400, "", `{"error":"invalid_request","error_description":"invalid request"}`, "status 400: invalid_request: invalid request (the server may want tokens that are bound to a key: set client_certificate and bind_certificate, or add dpop; else check scopes)"},
	{"code of its own", plainSecret, "", "", 400, "", `{"error":"E4711","error_description":"no"}`, "status 400: E4711: no (check scopes and auth_method, and whether the client may use the client_credentials grant)"},
	{"key at fosite", keyClient + "\nscopes a\naudience a\nresource https://a.example.com\nparam a b", "", "", 400, "", `{"error":"invalid_request","error_description":"The JSON Web Token uses signing key with kid 'other', which could not be found."}`, "status 400: invalid_request: The JSON Web Token uses signing key with kid 'other', which could not be found. (check key_id, audience and resource)"},
	{"problem of RFC 9457", plainSecret, "", "", 400, "Content-Type: application/problem+json", `{"type":"about:blank","title":"Bad Request","detail":"scope is missing","status":400}`, "status 400: http_status: Bad Request: scope is missing (check scopes and auth_method, and whether the client may use the client_credentials grant)"},
	{"problem that says nothing", plainSecret, "", "", 400, "Content-Type: application/problem+json", `{"title":"Bad Request","status":400}`, "status 400: http_status: Bad Request" + nothingThere},
	{"gateway in front", plainSecret, "", "", 403, "", `{"message":"Missing Authentication Token"}`, "status 403: http_status: Missing Authentication Token (check token_url, client_id and client_secret)"},
	{"Spring", plainSecret, "", "", 401, "", `{"status":401,"error":"Unauthorized","path":"/oauth/tokn"}`, "status 401: Unauthorized (check token_url, client_id and client_secret)"},
	{"Keycloak, unknown client", plainSecret, "", "", 404, "", `{"error":"invalid_client","error_description":"Client not found"}`, "status 404: invalid_client: Client not found (check client_id, client_secret and auth_method)"},
	{"Keycloak, unknown client since 26", plainSecret, "", "", 401, "", `{"error":"invalid_client","error_description":"Invalid client or Invalid client credentials"}`, "status 401: invalid_client: Invalid client or Invalid client credentials (check client_id, client_secret and auth_method)"},
	{"Keycloak, wrong secret", plainSecret, "", "", 401, "", `{"error":"unauthorized_client","error_description":"Invalid client or Invalid client credentials"}`, "status 401: unauthorized_client: Invalid client or Invalid client credentials (check client_id, client_secret and auth_method)"},
	{"Keycloak, wrong secret of a JWT", "auth_method client_secret_jwt\n" + plainSecret + "-that-is-long-enough-for-it", `{"x":0}`, "", 400, "", `{"error":"unauthorized_client","error_description":"Client authentication with client secret signed JWT failed: Signature on JWT token by client secret  failed validation"}`, "status 400: unauthorized_client: Client authentication with client secret signed JWT failed: Signature on JWT token by client secret  failed validation (check client_secret, assertion_audience and auth_method)"},
	{"Keycloak, no service account", plainSecret, "", "", 401, "", `{"error":"unauthorized_client","error_description":"Client not enabled to retrieve service account"}`, "status 401: unauthorized_client: Client not enabled to retrieve service account (allow this client the client_credentials grant at the authorization server)"},
	{"Keycloak, wrong key", keyClient, `{"x":0}`, "", 400, "", `{"error":"invalid_client","error_description":"Client authentication with signed JWT failed: Signature on JWT token failed validation"}`, "status 400: invalid_client: Client authentication with signed JWT failed: Signature on JWT token failed validation (check private_key, key_id and assertion_audience)"},
	{"Keycloak, unknown kid", keyClient, `{"x":0}`, "", 400, "", `{"error":"invalid_client","error_description":"Unable to load public key"}`, "status 400: invalid_client: Unable to load public key (check private_key, key_id and assertion_audience)"},
	{"Keycloak, wrong audience", keyClient + "\nassertion_audience https://other.example", "", "", 400, "", `{"error":"invalid_client","error_description":"Invalid token audience"}`, "status 400: invalid_client: Invalid token audience (check assertion_audience, private_key and key_id)"},
	{"bound tokens at oidc-provider", plainSecret, `{"dpop_signing_alg_values_supported":["ES256"]}`, "", 400, "", `{"error":"invalid_grant","error_description":"grant request is invalid"}`, "status 400: invalid_grant: grant request is invalid (the server may want tokens that are bound to a key: add dpop; else check client_id, client_secret and scopes)"},
	{"invalid grant that means the client", plainSecret, `{"dpop_signing_alg_values_supported":["ES256"]}`, "", 400, "", `{"error":"invalid_grant","error_description":"Invalid client credentials"}`, "status 400: invalid_grant: Invalid client credentials (check client_id, client_secret and scopes)"},
	{"Keycloak, DPoP", plainSecret, "", "", 400, "", `{"error":"invalid_request","error_description":"DPoP proof is missing"}`, "status 400: invalid_request: DPoP proof is missing (add dpop: the server binds the tokens of this client to a key)"},
	{"Keycloak, bound tokens", plainSecret, "", "", 400, "", `{"error":"invalid_request","error_description":"Client Certification missing for MTLS HoK Token Binding"}`, "status 400: invalid_request: Client Certification missing for MTLS HoK Token Binding (set client_certificate and bind_certificate: the server binds the tokens of this client)"},
	{"Keycloak, authorization endpoint", plainSecret, "", "", 400, "", `{"error":"Invalid parameter: redirect_uri"}`, "status 400: Invalid parameter: redirect_uri" + nothingThere},
	{"authorization endpoint that knows the form of errors", plainSecret, "", "", 400, "", `{"error":"invalid_request","error_description":"response_type is missing"}`, "status 400: invalid_request: response_type is missing" + nothingThere},
	{"token endpoint that wants a redirect_uri", plainSecret, "", "", 400, "", `{"error":"invalid_request","error_description":"Missing redirect_uri param is required."}`, "status 400: invalid_request: Missing redirect_uri param is required. (check scopes and auth_method)"},
	{"Keycloak before 26, wrong key", keyClient, `{"x":0}`, "", 400, "", `{"error":"unauthorized_client","error_description":"Client authentication with signed JWT failed: Unable to load public key"}`, "status 400: unauthorized_client: Client authentication with signed JWT failed: Unable to load public key (check private_key, key_id and assertion_audience)"},
	{"method that is not allowed", plainSecret, "", "", 400, "", `{"error":"unauthorized_client","error_description":"client_secret_basic is not allowed"}`, "status 400: unauthorized_client: client_secret_basic is not allowed (allow this client the client_credentials grant at the authorization server)"},
	{"audience of the token", keyClient + "\naudience a", `{"x":0}`, "", 403, "", `{"error":"access_denied","error_description":"not for this audience"}`, "status 403: access_denied: not for this audience (set assertion_audience https://as.example.com/token, which many servers want; or check private_key and audience)"},
	{"grant that has credentials in its name", plainSecret, "", "", 400, "", `{"error":"unauthorized_client","error_description":"The client is not allowed the grant client_credentials"}`, "status 400: unauthorized_client: The client is not allowed the grant client_credentials (allow this client the client_credentials grant at the authorization server)"},
	{"audience, with bound tokens in the metadata", plainSecret + "\naudience a", `{"dpop_signing_alg_values_supported":["ES256"]}`, "", 400, "", `{"error":"invalid_request","error_description":"Requested audience has not been whitelisted"}`, "status 400: invalid_request: Requested audience has not been whitelisted (check audience, scopes and auth_method)"},
	{"Okta", plainSecret, "", "", 401, "", `{"errorCode":"invalid_client","errorSummary":"Invalid value for 'client_id' parameter."}`, "status 401: invalid_client: Invalid value for 'client_id' parameter. (check client_id, client_secret and auth_method)"},
	{"GitHub", plainSecret, "", "", 200, "", `{"error":"incorrect_client_credentials","error_description":"The client_id and/or client_secret passed are incorrect."}`, "status 200: incorrect_client_credentials: The client_id and/or client_secret passed are incorrect. (check client_id, client_secret and auth_method)"},
	{"error in the place of the token", plainSecret, "", "", 200, "", `{"access_token":"error: invalid client"}`, "status 200: invalid_response: access_token holds the text of an error, and no token (check client_id, client_secret and scopes)"},
	{"login that is refused", "grant_type none\nparam user a\nparam password b", "", "", 200, "", `{"ok":false,"text":"wrong password"}`, "status 200: invalid_response: the answer has no access_token (check token_url; or set token_response, if the server has other names for the token)"},
	{"login that wants a grant", "grant_type none\nparam user a", "", "", 400, "", `{"error":"invalid_request","error_description":"Missing grant_type"}`, "status 400: invalid_request: Missing grant_type (set grant_type, which the server wants; or check token_url)"},
	{"login with a null token", "grant_type none\nparam user a\ntoken_response {\naccess_token /data/token\n}", "", "", 200, "", `{"status":"error","msg":"account is disabled","data":{"token":null}}`, "status 200: http_status: account is disabled (check param, and whether token_url is the right one)"},
	{"WeChat", plainSecret, "", "", 200, "", `{"errcode":40013,"errmsg":"invalid appid"}`, "status 200: 40013: invalid appid (check scopes and auth_method, and whether the client may use the client_credentials grant)"},

	// What was granted.
	{"DPoP token of Glewlwyd", plainSecret, "", "", 200, "", `{"access_token":"` + canaryToken + `","token_type":"DPoP"}`, `status 200: invalid_response: granted, but token_type is "DPoP" and not Bearer (add dpop: the server binds the tokens of this client to a key)`},
	{"bearer token where DPoP is set", plainSecret + "\ndpop", "", "", 200, "", `{"access_token":"` + canaryToken + `","token_type":"Bearer"}`, `status 200: invalid_response: granted, but token_type is "Bearer" and not DPoP (have the authorization server bind the tokens of this client to a key (DPoP), or remove dpop)`},
	{"no token", plainSecret, "", "", 200, "", `{"token":"` + canaryToken + `"}`, "status 200: invalid_response: the answer has no access_token (check token_url; or set token_response, if the server has other names for the token)"},
	{"nothing at the pointer", plainSecret + "\ntoken_response {\naccess_token /data/token\n}", "", "", 200, "", `{"msg":"` + canaryToken + `"}`, "status 200: invalid_response: the answer has nothing at the access_token of token_response (check token_response and token_url)"},
}

func TestAdviceOnWhatServersAnswer(t *testing.T) {
	key := writeFile(t, filepath.Join(t.TempDir(), "key"), keytest.PKCS8(t, keytest.New(t)))
	for _, test := range servedAnswers {
		t.Run(test.name, func(t *testing.T) {
			at := test.at
			if at == "" {
				at = tokenPlace
			}
			server := "token_url " + at
			if test.metadata != "" {
				server = "issuer " + testIssuer
			}
			p := newPublisher(strings.Replace(test.metadata, "{", `{"issuer":"`+testIssuer+`","token_endpoint":"`+tokenPlace+`",`, 1))
			p.publish(at, func(w http.ResponseWriter, r *http.Request) {
				if test.status == 0 {
					panic(io.EOF)
				}
				if field, value, ok := strings.Cut(test.header, ": "); ok {
					w.Header().Set(field, value)
				}
				page(test.status, test.body)(w, r)
			})
			cl, _ := discovering(t, server+"\n"+strings.ReplaceAll(test.settings, "KEY", key), p)
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			if err == nil {
				t.Fatal("got a token, want an error")
			}
			_, got, _ := strings.Cut(err.Error(), ": ")
			if got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
			// The log has the error, the commands and the admin API have its parts.
			if parts := reportError(err); !strings.HasSuffix(got, " ("+parts.Hint+")") {
				t.Errorf("got the advice %q in the parts of the error, want that of the log: %s", parts.Hint, got)
			}
			wantNoCanary(t, err)
			names := settingName.FindAllString(reportError(err).Hint, -1)
			names = slices.DeleteFunc(slices.Compact(names), func(name string) bool { return credentialsSettings[name] == nil })
			if len(names) > 3 {
				t.Errorf("the advice names %v, want three settings at most", names)
			}
		})
	}
}
