package outboundauth

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
)

// explained returns the steps of a client's report as lines.
func explained(t *testing.T, settings string, p http.RoundTripper) (string, tokenReport) {
	t.Helper()
	cl, _ := discovering(t, settings, p)
	report := cl.report(nil, true)
	var b strings.Builder
	for _, s := range report.Steps {
		b.WriteString(s.Title + "\n")
		for _, line := range s.Lines {
			b.WriteString("  " + line + "\n")
		}
	}
	return b.String(), report
}

// volatile are the parts of an explanation that differ each time.
var volatile = regexp.MustCompile(`("jti":")[^"]*|("(?:exp|iat|nbf)":)\d+`)

func TestExplanationOfASuccess(t *testing.T) {
	p := newPublisher("")
	p.publish(oauthPlace, page(http.StatusNotFound, "nothing here"))
	p.publish(openidPlace, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		page(http.StatusOK, document(testIssuer, tokenPlace, `"token_endpoint_auth_methods_supported":["private_key_jwt"]`))(w, nil)
	})
	p.publish(tokenPlace, page(http.StatusOK, `{"access_token":"t0ken","token_type":"Bearer","expires_in":"60","scope":"a","x":{"y":1}}`))
	key := writeFile(t, t.TempDir()+"/key.pem", keytest.PKCS8(t, keytest.New(t)))
	got, _ := explained(t, "issuer "+testIssuer+"\nclient_id gateway\nprivate_key "+key+"\nkey_id k1\nscopes a\naudience orders billing\nparam password canary", p)
	got = volatile.ReplaceAllString(got, "${1}${2}0")
	want := `look up the metadata: GET https://as.example.com/.well-known/oauth-authorization-server
  status 404
  no JSON object
look up the metadata: GET https://as.example.com/.well-known/openid-configuration
  status 200, application/json
  members: issuer, token_endpoint, token_endpoint_auth_methods_supported
  issuer https://as.example.com
  token_endpoint https://as.example.com/token
  token_endpoint_auth_methods_supported private_key_jwt
authenticate the client with private_key_jwt: there is a private_key
request the token: POST https://as.example.com/token
  Accept: application/json
  Content-Type: application/x-www-form-urlencoded
  User-Agent: caddy-outbound-auth
  audience=orders
  audience=billing
  client_assertion=…
    header {"alg":"ES256","kid":"k1","typ":"client-authentication+jwt"}
    claims {"aud":"https://as.example.com","exp":0,"iat":0,"iss":"gateway","jti":"0","nbf":0,"sub":"gateway"}
  client_assertion_type=urn:ietf:params:oauth:client-assertion-type:jwt-bearer
  client_id=gateway
  grant_type=client_credentials
  password=…
  scope=a
read the answer
  status 200
  members: access_token, expires_in, scope, token_type, x
  access_token: a token of 5 characters
  token_type: Bearer
  expires_in: 1m0s
  scope: a
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// The steps end where the way to the token has ended.
func TestExplanationOfAFailure(t *testing.T) {
	basic := issuerSecret + "basic_encoding raw\n"
	for _, test := range []struct {
		name, settings string
		pages          map[string]http.HandlerFunc
		want           string
	}{
		{"no metadata", basic, map[string]http.HandlerFunc{oauthPlace: page(404, ""), openidPlace: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "https://other.example.com/metadata?key=canary")
			w.WriteHeader(http.StatusFound)
		}}, `look up the metadata: GET https://as.example.com/.well-known/oauth-authorization-server
  status 404
  no JSON object
look up the metadata: GET https://as.example.com/.well-known/openid-configuration
  status 302
  Location: https://other.example.com/metadata?…
  no JSON object
authenticate the client with client_secret_basic: there is a client_secret, and no auth_method
  basic_encoding raw
`},
		{
			"refused", "token_url " + tokenPlace + "?key=canary\nclient_id gateway\nclient_secret " + canarySecret + "\ntoken_request json\nauth_method client_secret_post\n",
			map[string]http.HandlerFunc{tokenPlace + "?key=canary": page(401, `{"error":"invalid_client","`+canarySecret+`":1}`)},
			`authenticate the client with client_secret_post: auth_method says so
request the token: POST https://as.example.com/token?…
  Accept: application/json
  Content-Type: application/json
  User-Agent: caddy-outbound-auth
  client_id=gateway
  client_secret=…
  grant_type=client_credentials
read the answer
  status 401
  members: …, error
`,
		},
		{"no connection", issuerSecret, map[string]http.HandlerFunc{oauthPlace: page(200, document(testIssuer, tokenPlace, `"token_endpoint_auth_methods_supported":["client_secret_post"]`)), tokenPlace: refusesConnections}, `look up the metadata: GET https://as.example.com/.well-known/oauth-authorization-server
  status 200
  members: issuer, token_endpoint, token_endpoint_auth_methods_supported
  issuer https://as.example.com
  token_endpoint https://as.example.com/token
  token_endpoint_auth_methods_supported client_secret_post
authenticate the client with client_secret_basic: there is a client_secret, and no auth_method
  basic_encoding form
  the server does not list this auth_method; it lists client_secret_post
request the token: POST https://as.example.com/token
  Accept: application/json
  Authorization: Basic …
  Content-Type: application/x-www-form-urlencoded
  User-Agent: caddy-outbound-auth
  grant_type=client_credentials
read the answer
  no answer
`},
		{"no secret", "token_url " + tokenPlace + "\nclient_id gateway\nclient_secret {file./nowhere}\n", nil, `authenticate the client with client_secret_basic: there is a client_secret, and no auth_method
  basic_encoding form
`},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPublisher("")
			for place, handler := range test.pages {
				p.publish(place, handler)
			}
			got, report := explained(t, test.settings, p)
			if got != test.want || report.Error == nil {
				t.Errorf("got the error %v and\n%s\nwant one, and\n%s", report.Error, got, test.want)
			}
		})
	}
}

// A server that hangs is when an explanation is wanted most.
func TestExplanationOfATimeout(t *testing.T) {
	p := newPublisher("")
	p.publish(tokenPlace, hangs)
	cl, _ := discovering(t, "token_url "+tokenPlace+"\nclient_id gateway\nclient_secret "+canarySecret+"\ntoken_timeout 1s\n", p)
	synctest.Test(t, func(t *testing.T) {
		report := cl.report(nil, true)
		if report.Error == nil || report.Error.Code != codeTimeout || len(report.Steps) != 3 || !slices.Contains(report.Steps[2].Lines, "no answer") {
			t.Errorf("got the error %v and the steps %q, want a timeout, and that there was no answer", report.Error, report.Steps)
		}
	})
}

// A server may repeat what it was sent wherever it writes something.
func TestExplanationShowsNoSecret(t *testing.T) {
	everywhere := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/"+canarySecret)
		w.Header().Set("Location", "/"+canarySecret)
		page(http.StatusOK, `{"access_token":"canary-token","token_type":"Bearer","`+canarySecret+`":1,"canary-token":2,"expires_in":"`+canarySecret+`","scope":"`+canarySecret+` Y2FuYXJ5LXNlY3JldA=="}`)(w, nil)
	}
	canaryJWT := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"canary"}`)) + ".c2ln"
	p := newPublisher(document(testIssuer, tokenPlace+"?key=canary", `"token_endpoint_auth_methods_supported":["client_secret_basic","`+canarySecret+`"],"`+canarySecret+`":1`))
	p.publish(tokenPlace, everywhere)
	p.publish(tokenPlace+"?key=canary", everywhere)
	settings := "param p " + canarySecret + "\nparam scope2 canary-other\ntoken_request_header X-Key " + canarySecret + "\ntoken_request_header Accept canary-accept\ntoken_request_header User-Agent canary-user\n"
	for _, client := range []string{
		issuerSecret,
		issuerSecret + "auth_method client_secret_post\n",
		issuerSecret + "auth_method client_secret_post\ntoken_request json\n",
		"token_url " + tokenPlace + "\ngrant_type none\ntoken_request json\ntoken_response {\naccess_token /access_token\n}\n",
		"token_url " + tokenPlace + "\nclient_id gateway\ngrant_type account_credentials\nclient_secret " + canarySecret + "\nparam assertion " + canaryJWT + "\n",
	} {
		got, report := explained(t, client+settings, p)
		if len(report.Steps) < 3 || !strings.Contains(got, "\n  p=…\n") || !strings.Contains(got, "\n  X-Key: …\n") {
			t.Errorf("%s: got\n%s\nwant all steps", client, got)
		}
		report.Token = ""
		text, _ := json.Marshal(report)
		wantNoCanaryIn(t, string(text))
	}
}

// A login may consist of a header alone.
func TestExplanationOfARequestWithoutABody(t *testing.T) {
	p := newPublisher("")
	got, report := explained(t, "token_url "+tokenPlace+"\ngrant_type none\ntoken_request_header X-Key "+canarySecret+"\n", p)
	if report.Error != nil || !strings.Contains(got, "\n  X-Key: …\nread the answer\n") {
		t.Errorf("got the error %v and\n%s\nwant all steps", report.Error, got)
	}
}

// What several clients of one issuer share, one of them looks up.
func TestExplanationOfASharedLookUp(t *testing.T) {
	p := newPublisher(document(testIssuer, tokenPlace))
	explained(t, issuerSecret, p)
	cl, _ := discovering(t, issuerSecret+"scopes other\n", p)
	if _, err := cl.endpoint.locate(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	steps := cl.report(nil, true).Steps
	if len(steps) != 4 || steps[0].Title != "the token endpoint is known from a look-up for another client" {
		t.Errorf("got %q, want four steps without a look-up", steps)
	}
}

func TestTokenCommandExplains(t *testing.T) {
	auth := newAuthServer(t)
	config := adaptCaddyfile(t, "http://127.0.0.1:1 {\n"+expand(threeOfTwoClients, "$AUTH", auth.URL)+"\n}")
	reports, err := requestTokens(config, wantedClients{upstream: "127.0.0.1:9001"}, true)
	if err != nil || len(reports) != 1 {
		t.Fatalf("got %d reports, err %v, want 1", len(reports), err)
	}
	var b strings.Builder
	if _, err := writeReports(&b, reports, false, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"scopes           read write\nstep 1           authenticate the client with client_secret_basic: there is a client_secret, and no auth_method\n                 basic_encoding form\n",
		"step 2           request the token: POST " + auth.URL + "/token?…\n                 Accept: application/json\n                 Authorization: Basic …\n",
		"\nstep 3           read the answer\n                 status 200",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("got\n%s\nwant %q in it", b.String(), want)
		}
	}
	wantNoCanaryIn(t, strings.ReplaceAll(b.String(), reports[0].Token, ""))
}

func TestExplanationNamesAFewMembersOnly(t *testing.T) {
	var members []string
	for c := 'a'; c <= 'z'; c++ {
		members = append(members, `"`+string(c)+`":1`, `"`+string(c)+`2":1`)
	}
	p := newPublisher(document(testIssuer, tokenPlace, members...))
	got, _ := explained(t, issuerSecret, p)
	line := got[strings.Index(got, "members: "):]
	line, _, _ = strings.Cut(line, "\n")
	if names := strings.Split(line, ", "); len(names) != maxExplained+1 || !slices.Contains(names, "and 14 more") {
		t.Errorf("got %q, want %d names and that there are 14 more", line, maxExplained)
	}
}
