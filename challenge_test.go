package outboundauth

import (
	"net/http"
	"strings"
	"testing"
)

// challenges are fields with the error that they tell.
var challenges = []struct {
	name   string
	fields []string
	want   string
}{
	{"none", nil, ""},

	// The documents that define them.
	{"RFC 6750 §3: no token", []string{`Bearer realm="example"`}, ""},
	{"RFC 6750 §3: expired", []string{`Bearer realm="example", error="invalid_token", error_description="The access token expired"`}, "invalid_token"},
	{"RFC 9110 §11.6.1: without Bearer", []string{`Basic realm="simple", Newauth realm="apps", type=1, title="Login to \"apps\""`}, ""},
	{"RFC 9110 §11.6.1: before Bearer", []string{`Newauth realm="apps", type=1, title="Login to \"apps\"", Bearer error="invalid_token"`}, "invalid_token"},
	{"RFC 9449 §7.1", []string{`DPoP realm="WallyWorld", algs="ES256 PS256"`}, ""},
	{"RFC 9449 §7.1: another key", []string{`DPoP error="invalid_token", error_description="Invalid DPoP key binding", algs="ES256"`}, "invalid_token"},
	{"RFC 9449 §7.2", []string{`Bearer error="invalid_token", error_description="Multiple methods used to include access token"`}, "invalid_token"},
	{"RFC 9449 §7.2: both schemes", []string{`Bearer, DPoP algs="ES256 PS256"`}, ""},
	{"RFC 9449 §9", []string{`DPoP error="use_dpop_nonce", error_description="Resource server requires nonce in DPoP proof"`}, "use_dpop_nonce"},
	{"RFC 9470 §3", []string{`Bearer error="insufficient_user_authentication", error_description="A different authentication level is required", acr_values="myACR"`}, "insufficient_user_authentication"},
	{"RFC 9728 §5.1", []string{`Bearer resource_metadata="https://resource.example.com/.well-known/oauth-protected-resource"`}, ""},

	// Servers.
	{"Keycloak", []string{`Bearer realm="master", error="invalid_token", error_description="Token verification failed"`}, "invalid_token"},
	{"Spring", []string{`Bearer error="insufficient_scope", error_description="The request requires higher privileges than provided by the access token.", error_uri="https://tools.ietf.org/html/rfc6750#section-3.1"`}, "insufficient_scope"},
	{"ASP.NET", []string{`Bearer error="invalid_token", error_description="The token expired at '01/02/2024 03:04:05'"`}, "invalid_token"},
	{"Azure", []string{`Bearer realm="", authorization_uri="https://login.microsoftonline.com/common/oauth2/authorize", error="invalid_token"`}, "invalid_token"},
	{"Azure, claims", []string{`Bearer realm="", authorization_uri="https://login.microsoftonline.com/common/oauth2/authorize", client_id="00000003-0000-0000-c000-000000000000", error="insufficient_claims", claims="eyJhIjp7fX0="`}, "insufficient_claims"},
	{"Azure, claims first", []string{`Bearer claims="eyJhIjp7fX0==", error="insufficient_claims"`}, "insufficient_claims"},
	{"Kong, without commas", []string{`Bearer realm="service" error="invalid_token" error_description="The access token is invalid or has expired"`}, "invalid_token"},
	{"Kong, a key", []string{`Key realm="kong"`}, ""},
	{"AWS, without commas", []string{`Bearer scope="" error="invalid_token" error_description="the token does not have a valid audience"`}, "invalid_token"},
	{"AWS, no token", []string{`Bearer`}, ""},
	{"GitHub", []string{`Bearer error="invalid_request", error_description="No access token was provided in this request"`}, "invalid_request"},
	{"GitHub, Git", []string{`Basic realm="GitHub"`}, ""},
	{"GitHub, packages", []string{`Bearer realm="https://ghcr.io/token",service="ghcr.io",scope="repository:user/image:pull"`}, ""},
	{"oauthlib 3.0, a comma behind the scheme", []string{`Bearer, error="invalid_token", error_description="The access token expired"`}, "invalid_token"},
	{"Google", []string{`Bearer realm="https://accounts.google.com/", error="invalid_token"`}, "invalid_token"},
	{"Windows", []string{`Negotiate`, `NTLM`}, ""},

	// Several challenges.
	{"Basic before Bearer", []string{`Basic realm="a", Bearer error="invalid_token"`}, "invalid_token"},
	{"Basic behind Bearer", []string{`Bearer error="invalid_token", Basic realm="a", error="other"`}, "invalid_token"},
	{"the error of Basic", []string{`Bearer realm="a", Basic error="invalid_token"`}, ""},
	{"two fields", []string{`Basic realm="a"`, `Bearer error="invalid_token"`}, "invalid_token"},
	{"the error in the second field", []string{`Bearer realm="a"`, `Bearer error="insufficient_scope"`}, "insufficient_scope"},
	{"the error in the second challenge", []string{`Bearer realm="a", Bearer error="insufficient_scope"`}, "insufficient_scope"},
	{"a scheme does not reach into the next field", []string{`Bearer`, `error="invalid_token"`}, ""},
	{"an unreadable field before", []string{`Bearer realm="a`, `Bearer error="invalid_token"`}, "invalid_token"},
	{"a scheme alone before", []string{`Negotiate, Bearer error="invalid_token"`}, "invalid_token"},
	{"a token68 before", []string{`Negotiate YII/+a-._~==, Bearer error="invalid_token"`}, "invalid_token"},
	{"a token68 without padding before", []string{`Negotiate YIIa, Bearer error="invalid_token"`}, "invalid_token"},
	{"a token68 that is a scheme", []string{`Negotiate Bearer, error="invalid_token"`}, ""},
	{"a token68 that is a parameter", []string{`Bearer error=, DPoP error="invalid_token"`}, "invalid_token"},
	{"a token68 of ours", []string{`Bearer error`}, ""},
	{"no comma between challenges", []string{`Basic realm="a" Bearer error="invalid_token"`}, "invalid_token"},

	// Spelling.
	{"upper case", []string{`BEARER REALM="a", ERROR="invalid_token"`}, "invalid_token"},
	{"lower case", []string{`bearer error=invalid_token`}, "invalid_token"},
	{"the case of the value", []string{`Bearer error="Invalid_Token"`}, "Invalid_Token"},
	{"dpop", []string{`dpop error=invalid_token`}, "invalid_token"},
	{"a token as value", []string{`Bearer error=invalid_token,realm=a`}, "invalid_token"},
	{"a URL that is not quoted", []string{`Bearer realm=https://a.example/?b=c error=invalid_token`}, "invalid_token"},
	{"white space around =", []string{"Bearer realm = \"a\" ,\terror\t=  \"invalid_token\" "}, "invalid_token"},
	{"no white space", []string{`Bearer realm="a",error="invalid_token"`}, "invalid_token"},
	{"empty elements", []string{`, ,Bearer realm="a",, ,error="invalid_token",`}, "invalid_token"},
	{"many spaces", []string{"  Bearer   error=\"invalid_token\""}, "invalid_token"},
	{"escapes", []string{`Bearer error="inv\alid\_token"`}, "invalid_token"},
	{"an escape at the end", []string{`Bearer realm="a\\", error="invalid_token"`}, "invalid_token"},
	{"commas in a string", []string{`Bearer realm="a, Basic b, error=c", error="invalid_token"`}, "invalid_token"},
	{"an error in a string", []string{`Bearer realm="a\", error=\"invalid_token"`}, ""},
	{"Bearer in a string", []string{`Basic realm="Bearer error=invalid_token"`}, ""},
	{"an empty error", []string{`Bearer error="", Bearer error="invalid_token"`}, "invalid_token"},
	{"an empty parameter", []string{`Bearer a="b", realm=, error="invalid_token"`}, "invalid_token"},
	{"the first of two", []string{`Bearer error="invalid_token", error="insufficient_scope"`}, "invalid_token"},
	{"other parameters", []string{`Bearer error_description="error", xerror="a", error_uri="b"`}, ""},
	{"other schemes", []string{`BearerX error="a", XBearer error="b", Bear error="c"`}, ""},

	// Junk.
	{"empty", []string{""}, ""},
	{"no scheme", []string{`error="invalid_token"`}, ""},
	{"a string first", []string{`"Bearer error=invalid_token`}, ""},
	{"= first", []string{`=Bearer error=invalid_token`}, ""},
	{"a string without an end", []string{`Bearer error="invalid_token`}, ""},
	{"a string that ends with an escape", []string{`Bearer error="invalid_token\`}, ""},
	{"a string behind a string", []string{`Bearer realm="a""b", error="invalid_token"`}, ""},
	{"bytes", []string{"\x00\xff\xfe Bearer\x80 error=\"invalid_token\""}, ""},
	{"only commas", []string{",,,,"}, ""},
	{"only =", []string{"===="}, ""},
}

func TestChallengeError(t *testing.T) {
	for _, test := range challenges {
		t.Run(test.name, func(t *testing.T) {
			h := make(http.Header)
			for _, field := range test.fields {
				h.Add("WWW-Authenticate", field)
			}
			if got := challengeError(h); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

// A long field is not read, and the others are.
func TestLongChallenge(t *testing.T) {
	const size = 1 << 20
	for _, part := range []string{"a", ",", " ", "=", `"`, `\`, `a,`, `a=`, `a=b,`, `a="b",`, `"\"`, `Bearer `} {
		long := "Bearer " + strings.Repeat(part, size/len(part)) + `, Bearer error="invalid_token"`
		if got := challengeError(http.Header{"Www-Authenticate": {long}}); got != "" {
			t.Errorf("1 MiB of %q: got %q, want none", part, got)
		}
		if got := challengeError(http.Header{"Www-Authenticate": {long, `Bearer error="insufficient_scope"`}}); got != "insufficient_scope" {
			t.Errorf("1 MiB of %q before another: got %q, want the error of the other", part, got)
		}
	}
	const code = `Bearer error="invalid_token"`
	for _, length := range []int{maxChallenge, maxChallenge + 1} {
		field := strings.Repeat(",", length-len(code)) + code
		if got := challengeError(http.Header{"Www-Authenticate": {field}}); (got == "invalid_token") != (length <= maxChallenge) {
			t.Errorf("%d bytes: got %q, want it to be read up to %d", length, got, maxChallenge)
		}
	}
}

// What is found stands in the field, and so do the names of a scheme and of the parameter.
// No field hides the next, and no string what stands behind it.
func FuzzChallengeError(f *testing.F) {
	for _, test := range challenges {
		f.Add(strings.Join(test.fields, ", "))
	}
	f.Fuzz(func(t *testing.T, field string) {
		h := http.Header{"Www-Authenticate": {field}}
		got := challengeError(h)
		lower := strings.ToLower(field)
		if got != "" && !strings.Contains(lower, "error") {
			t.Errorf("got %q, want none without its name", got)
		}
		if got != "" && !strings.Contains(lower, "bearer") && !strings.Contains(lower, "dpop") {
			t.Errorf("got %q, want none without a scheme", got)
		}
		if got != "" && !strings.Contains(strings.ReplaceAll(field, `\`, ""), strings.ReplaceAll(got, `\`, "")) {
			t.Errorf("got %q, want a part of the field", got)
		}
		h["Www-Authenticate"] = []string{field, `Bearer error="after"`}
		if after := challengeError(h); after != got && (got != "" || after != "after") {
			t.Errorf("got %q before another field, want %q or that of the other", after, got)
		}
		h["Www-Authenticate"] = []string{`Basic realm="` + escapeQuoted.Replace(field) + `", Bearer error="behind"`}
		if behind := challengeError(h); behind != "behind" && len(field) < maxChallenge/4 {
			t.Errorf("got %q behind the field as a string, want behind", behind)
		}
	})
}

var escapeQuoted = strings.NewReplacer(`\`, `\\`, `"`, `\"`)
