package outboundauth

import (
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode"
)

// granted is a grant without a scope.
func granted(token string, lifetime time.Duration) grant {
	return grant{accessToken: token, lifetime: lifetime}
}

// oddly is a grant of the canary whose lifetime nobody understands.
func oddly(why string) grant { return grant{accessToken: canaryToken, odd: why} }

// answers are bodies of answers with status 200. An error code marks the bad
// ones; they are all transient, as nothing was refused, except those with an
// error of the server's own.
var answers = []struct {
	name, body string
	want       grant
	code       string // "": good
	permanent  bool
}{
	// Good ones.
	{name: "minimal", body: `{"access_token":"a"}`, want: granted("a", 0)},
	{name: "complete", body: goodAnswer, want: granted("t0ken", time.Hour)},
	{name: "white space around", body: "\r\n\t " + goodAnswer + "\n", want: granted("t0ken", time.Hour)},
	{name: "all characters of a token", body: `{"access_token":"!#$%&'()*+,-./:;<=>?@[]^_{|}~\"\\09AZaz"}`, want: granted("!#$%&'()*+,-./:;<=>?@[]^_{|}~\"\\09AZaz", 0)},
	{name: "escaped token", body: `{"access_token":"\u0061\/b"}`, want: granted("a/b", 0)},
	{name: "long token", body: `{"access_token":"` + strings.Repeat("x", 64<<10) + `"}`, want: granted(strings.Repeat("x", 64<<10), 0)},
	{name: "unknown members", body: `{"access_token":"a","x":{"y":[1]},"refresh_token":1,"scope":null,"expires":-1}`, want: granted("a", 0)},
	{name: "type in lower case", body: `{"access_token":"a","token_type":"bearer"}`, want: granted("a", 0)},
	{name: "type in upper case", body: `{"access_token":"a","token_type":"BEARER"}`, want: granted("a", 0)},
	{name: "type null", body: `{"access_token":"a","token_type":null}`, want: granted("a", 0)},
	{name: "type empty", body: `{"access_token":"a","token_type":""}`, want: granted("a", 0)},
	{name: "type BearerToken", body: `{"access_token":"a","token_type":"BearerToken"}`, want: granted("a", 0)},
	{name: "error null", body: `{"access_token":"a","error":null,"error_description":null}`, want: granted("a", 0)},
	{name: "error empty", body: `{"access_token":"a","error":""}`, want: granted("a", 0)},
	{name: "error false", body: `{"access_token":"a","error":false}`, want: granted("a", 0)},
	{name: "error 0", body: `{"access_token":"a","error":0,"errcode":0,"errmsg":"ok"}`, want: granted("a", 0)},
	{name: "error an object that says nothing", body: `{"access_token":"a","error":{"code":0,"message":"","more":{"x":null}}}`, want: granted("a", 0)},
	{name: "error an empty object", body: `{"access_token":"a","error":{ }}`, want: granted("a", 0)},
	{name: "status ok", body: `{"access_token":"a","status":"success","msg":""}`, want: granted("a", 0)},
	{name: "status approved", body: `{"access_token":"a","status":"approved"}`, want: granted("a", 0)},
	// The last one counts, as in encoding/json and most other decoders.
	{name: "token twice", body: `{"access_token":"a","access_token":"b"}`, want: granted("b", 0)},
	{name: "lifetime twice", body: `{"access_token":"a","expires_in":1,"expires_in":2}`, want: granted("a", 2*time.Second)},

	{name: "lifetime float", body: `{"access_token":"a","expires_in":3600.0}`, want: granted("a", time.Hour)},
	{name: "lifetime with a fraction", body: `{"access_token":"a","expires_in":1.5}`, want: granted("a", 1500*time.Millisecond)},
	{name: "lifetime with an exponent", body: `{"access_token":"a","expires_in":3.6e3}`, want: granted("a", time.Hour)},
	{name: "lifetime string", body: `{"access_token":"a","expires_in":"3600"}`, want: granted("a", time.Hour)},
	{name: "lifetime float in a string", body: `{"access_token":"a","expires_in":"3600.0"}`, want: granted("a", time.Hour)},
	{name: "lifetime string with spaces", body: `{"access_token":"a","expires_in":" 3600\n"}`, want: granted("a", time.Hour)},
	{name: "lifetime empty string", body: `{"access_token":"a","expires_in":""}`, want: granted("a", 0)},
	{name: "lifetime null", body: `{"access_token":"a","expires_in":null}`, want: granted("a", 0)},
	{name: "lifetime 0", body: `{"access_token":"a","expires_in":0}`, want: granted("a", 0)},
	{name: "lifetime -0", body: `{"access_token":"a","expires_in":-0.0}`, want: granted("a", 0)},
	{name: "lifetime too small to count", body: `{"access_token":"a","expires_in":1e-400}`, want: granted("a", 0)},
	{name: "lifetime above a float", body: `{"access_token":"a","expires_in":1e400}`, want: granted("a", maxLifetime)},
	{name: "lifetime above a float in a string", body: `{"access_token":"a","expires_in":"1e400"}`, want: granted("a", maxLifetime)},
	{name: "lifetime above an integer", body: `{"access_token":"a","expires_in":9223372036854775808}`, want: granted("a", maxLifetime)},
	{name: "lifetime of a thousand digits", body: `{"access_token":"a","expires_in":` + strings.Repeat("9", 1000) + `}`, want: granted("a", maxLifetime)},
	{name: "lifetime of 100 years", body: `{"access_token":"a","expires_in":3153600000}`, want: granted("a", maxLifetime)},

	// Not an object.
	{name: "nothing", body: "", code: codeInvalidResponse},
	{name: "HTML", body: "<!doctype html><title>Sign in</title> " + canaryToken, code: codeInvalidResponse},
	{name: "null", body: "null", code: codeInvalidResponse},
	{name: "array", body: `["` + canaryToken + `"]`, code: codeInvalidResponse},
	{name: "string", body: `"` + canaryToken + `"`, code: codeInvalidResponse},
	{name: "form", body: "access_token=" + canaryToken + "&token_type=bearer", code: codeInvalidResponse},
	{name: "truncated", body: `{"access_token":"` + canaryToken + `","expires_in":36`, code: codeInvalidResponse},
	{name: "garbage after it", body: goodAnswer + canaryToken, code: codeInvalidResponse},
	{name: "two objects", body: goodAnswer + goodAnswer, code: codeInvalidResponse},
	{name: "byte order mark", body: "\ufeff" + goodAnswer, code: codeInvalidResponse},
	{name: "UTF-16", body: "{\x00\"\x00a\x00\"\x00:\x001\x00}\x00", code: codeInvalidResponse},
	{name: "deeply nested", body: `{"access_token":"a","x":` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + `}`, code: codeInvalidResponse},
	{name: "over 1 MiB", body: `{"access_token":"` + strings.Repeat(canaryToken, 1<<20/len(canaryToken)+1) + `"}`, code: codeInvalidResponse},

	// No token that may be used.
	{name: "no token", body: `{"token_type":"Bearer","expires_in":3600}`, code: codeInvalidResponse},
	{name: "empty object", body: `{}`, code: codeInvalidResponse},
	{name: "other cases of the name", body: `{"ACCESS_TOKEN":"` + canaryToken + `","Access_Token":"` + canaryToken + `"}`, code: codeInvalidResponse},
	{name: "token empty", body: `{"access_token":""}`, code: codeInvalidResponse},
	{name: "token null", body: `{"access_token":null}`, code: codeInvalidResponse},
	{name: "token number", body: `{"access_token":123}`, code: codeInvalidResponse},
	{name: "token object", body: `{"access_token":{"value":"` + canaryToken + `"}}`, code: codeInvalidResponse},
	{name: "token array", body: `{"access_token":["` + canaryToken + `"]}`, code: codeInvalidResponse},
	{name: "token with CR LF", body: `{"access_token":"` + canaryToken + `\r\nX-Tenant-Id: other"}`, code: codeInvalidResponse},
	{name: "token with LF at its end", body: `{"access_token":"` + canaryToken + `\n"}`, code: codeInvalidResponse},
	{name: "token with NUL", body: `{"access_token":"` + canaryToken + `\u0000"}`, code: codeInvalidResponse},
	{name: "token with DEL", body: `{"access_token":"` + canaryToken + `\u007f"}`, code: codeInvalidResponse},
	{name: "token with a space", body: `{"access_token":"` + canaryToken + ` x"}`, code: codeInvalidResponse},
	{name: "token with a tab", body: `{"access_token":"` + canaryToken + `\t"}`, code: codeInvalidResponse},
	{name: "token beyond ASCII", body: `{"access_token":"` + canaryToken + `ü"}`, code: codeInvalidResponse},
	{name: "token not UTF-8", body: `{"access_token":"` + canaryToken + "\xff" + `"}`, code: codeInvalidResponse},
	{name: "token a lone surrogate", body: `{"access_token":"` + canaryToken + `\ud800"}`, code: codeInvalidResponse},

	{name: "token an error", body: `{"access_token":"error: ` + canaryToken + `"}`, code: codeInvalidResponse, permanent: true},
	{name: "token an error without a space", body: `{"access_token":"Error:` + canaryToken + `"}`, code: codeInvalidResponse, permanent: true},

	// Another type.
	{name: "type mac", body: `{"access_token":"` + canaryToken + `","token_type":"mac"}`, code: codeInvalidResponse, permanent: true},
	{name: "type DPoP", body: `{"access_token":"` + canaryToken + `","token_type":"DPoP"}`, code: codeInvalidResponse, permanent: true},
	{name: "type N_A", body: `{"access_token":"` + canaryToken + `","token_type":"N_A"}`, code: codeInvalidResponse, permanent: true},
	{name: "type with a space", body: `{"access_token":"` + canaryToken + `","token_type":"Bearer "}`, code: codeInvalidResponse, permanent: true},
	{name: "type that folds to bearer beyond ASCII", body: `{"access_token":"` + canaryToken + `","token_type":"Beaſer"}`, code: codeInvalidResponse, permanent: true},
	{name: "type number", body: `{"access_token":"` + canaryToken + `","token_type":1}`, code: codeInvalidResponse},
	{name: "type repeats the token", body: `{"access_token":"` + canaryToken + `","token_type":"` + canaryToken + `"}`, code: codeInvalidResponse, permanent: true},

	// A lifetime that nobody understands. The token is good.
	{name: "lifetime negative", body: `{"access_token":"` + canaryToken + `","expires_in":-1}`, want: oddly("is negative")},
	{name: "lifetime negative in a string", body: `{"access_token":"` + canaryToken + `","expires_in":"-0.5"}`, want: oddly("is negative")},
	{name: "lifetime below a float", body: `{"access_token":"` + canaryToken + `","expires_in":-1e400}`, want: oddly("is negative")},
	{name: "lifetime NaN", body: `{"access_token":"` + canaryToken + `","expires_in":NaN}`, code: codeInvalidResponse},
	{name: "lifetime NaN in a string", body: `{"access_token":"` + canaryToken + `","expires_in":"NaN"}`, want: oddly("is no number")},
	{name: "lifetime infinite", body: `{"access_token":"` + canaryToken + `","expires_in":"Infinity"}`, want: oddly("is no number")},
	{name: "lifetime words", body: `{"access_token":"` + canaryToken + `","expires_in":"abc"}`, want: oddly("is no number")},
	{name: "lifetime with a unit", body: `{"access_token":"` + canaryToken + `","expires_in":"3600s"}`, want: oddly("is no number")},
	{name: "lifetime hexadecimal", body: `{"access_token":"` + canaryToken + `","expires_in":"0x10"}`, want: oddly("is no number")},
	{name: "lifetime with separators", body: `{"access_token":"` + canaryToken + `","expires_in":"3_600"}`, want: oddly("is no number")},
	{name: "lifetime a date", body: `{"access_token":"` + canaryToken + `","expires_in":"2030-01-01T00:00:00Z"}`, want: oddly("is no number")},
	{name: "lifetime an object", body: `{"access_token":"` + canaryToken + `","expires_in":{"seconds":3600}}`, want: oddly("is no number")},
	{name: "lifetime an array", body: `{"access_token":"` + canaryToken + `","expires_in":[3600]}`, want: oddly("is no number")},
	{name: "lifetime a boolean", body: `{"access_token":"` + canaryToken + `","expires_in":true}`, want: oddly("is no number")},

	// An error, whatever the status says.
	{name: "error beside a token", body: `{"access_token":"` + canaryToken + `","error":"invalid_grant"}`, code: "invalid_grant", permanent: true},
	{name: "error only", body: `{"error":"invalid_client","error_description":"no"}`, code: "invalid_client", permanent: true},
	{name: "error that passes", body: `{"error":"temporarily_unavailable"}`, code: "temporarily_unavailable"},
	{name: "error an object", body: `{"error":{"code":"denied","message":"no"}}`, code: "denied", permanent: true},
	{name: "error an object beside a token", body: `{"access_token":"` + canaryToken + `","error":{"code":"denied"}}`, code: "denied", permanent: true},
	{name: "error true", body: `{"error":true}`, code: codeHTTPStatus, permanent: true},
	{name: "status error", body: `{"status":"error","msg":"no"}`, code: codeHTTPStatus, permanent: true},
	{name: "status Failed", body: `{"status":"Failed","access_token":"` + canaryToken + `"}`, code: codeHTTPStatus, permanent: true},
	{name: "errcode", body: `{"errcode":40013,"errmsg":"invalid appid"}`, code: "40013", permanent: true},
	{name: "errcode a string", body: `{"errcode":"E1"}`, code: "E1", permanent: true},
	{name: "fault", body: `{"fault":{"faultstring":"no","detail":{"errorcode":"steps.x"}}}`, code: "steps.x", permanent: true},
	{name: "fault a text", body: `{"fault":"` + "no" + `"}`, code: codeHTTPStatus, permanent: true},
}

func TestTokenAnswerIsReadStrictly(t *testing.T) {
	for _, test := range answers {
		t.Run(test.name, func(t *testing.T) {
			cl := newTestClient(t, canaryCredentials("https://auth.example.com/token"), answering(http.StatusOK, test.body))
			got, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			got.issued, got.took = time.Time{}, 0
			if got != test.want {
				t.Errorf("request() = %v, want %v", got, test.want)
			}
			if test.code == "" {
				if err != nil {
					t.Errorf("request() = %v, want no error", err)
				}
				return
			}
			refused := wantTokenError(t, err, test.code, test.permanent)
			if refused.Status != http.StatusOK {
				t.Errorf("Status = %d, want 200", refused.Status)
			}
			wantNoCanary(t, err)
		})
	}
}

func TestOnlyStatus200And201BringAToken(t *testing.T) {
	for _, status := range []int{202, 203, 204, 205, 206} {
		cl := newTestClient(t, canaryCredentials("https://auth.example.com/token"), answering(status, `{"access_token":"`+canaryToken+`"}`))
		_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
		got := wantTokenError(t, err, codeInvalidResponse, false)
		if got.Status != status {
			t.Errorf("Status = %d, want %d", got.Status, status)
		}
		wantNoCanary(t, err)
	}
	cl := newTestClient(t, canaryCredentials("https://auth.example.com/token"), answering(202, `{"error":"invalid_scope"}`))
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	wantTokenError(t, err, "invalid_scope", true)
	cl = newTestClient(t, canaryCredentials("https://auth.example.com/token"), answering(201, goodAnswer))
	if got, err := cl.endpoint.locateAndRequest(t.Context(), nil); err != nil || got.accessToken != "t0ken" {
		t.Errorf("got %v, err %v, want the token of the answer 201", got, err)
	}
}

func TestRetryAfterIsReadInBothForms(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, test := range []struct {
		value string
		want  time.Duration
	}{
		{"", 0},
		{"0", 0},
		{"120", 2 * time.Minute},
		{" 7 ", 7 * time.Second},
		{"Fri, 02 Jan 2026 03:04:35 GMT", 30 * time.Second},
		{"Friday, 02-Jan-26 03:04:35 GMT", 30 * time.Second},
		{"Fri Jan  2 03:04:35 2026", 30 * time.Second},
		{"Fri, 02 Jan 2026 03:04:04 GMT", 0}, // in the past
		{"99999999999999999999999", maxLifetime},
		{"18446744073709551615", maxLifetime},
		{"-1", 0},
		{"1.5", 0},
		{"0x10", 0},
		{"soon", 0},
	} {
		h := http.Header{"Retry-After": {test.value}}
		if got := parseRetryAfter(h, now); got != test.want {
			t.Errorf("parseRetryAfter(%q) = %v, want %v", test.value, got, test.want)
		}
	}
	if got := parseRetryAfter(http.Header{}, now); got != 0 {
		t.Errorf("parseRetryAfter() = %v without the header, want 0", got)
	}
}

// FuzzTokenResponse holds what any answer may do: bring a token that fits a
// header, for a bounded time, or an error that fits a log line.
func FuzzTokenResponse(f *testing.F) {
	for _, answer := range answers {
		if len(answer.body) < 4096 {
			f.Add(http.StatusOK, "", []byte(answer.body))
		}
	}
	for _, refusal := range refusals {
		f.Add(refusal.status, refusal.header["Retry-After"], []byte(refusal.body))
	}
	u := mustParse(testTokenURL)
	sensitive := authenticated(f, authBasic, "id", canarySecret, map[string][]string{}, http.Header{})

	clients := []Credentials{
		{},
		{TokenResponse: &TokenResponse{AccessToken: "/data/0/token", ExpiresIn: "/data/0/ttl", ExpiresInUnit: "d"}, GrantType: grantNone},
	}

	f.Fuzz(func(t *testing.T, status int, header string, body []byte) {
		a := serverAnswer{status: status, header: http.Header{"Retry-After": {header}, "Location": {header}, "Content-Type": {header}}, body: body}
		c := clients[len(header)%len(clients)]
		got, err := c.readAnswer(u, u.Host, a, sensitive)
		if err != nil {
			if got != (grant{}) {
				t.Errorf("readAnswer() = %v beside an error, want none", got)
			}
			text := err.Error()
			if len(text) > 900 {
				t.Errorf("the error has %d bytes, want 900 at most", len(text))
			}
			if strings.ContainsFunc(text, func(r rune) bool { return unicode.IsControl(r) || r == '\u2028' || r == '\u2029' }) {
				t.Errorf("the error is %q, want no control characters", text)
			}
			for _, secret := range sensitive {
				if strings.Contains(text, secret) {
					t.Errorf("the error %q holds the secret", text)
				}
			}
			if d := retryAfter(err); d < 0 {
				t.Errorf("retryAfter() = %v, want 0 at least", d)
			}
			return
		}
		if status != http.StatusOK && status != http.StatusCreated {
			t.Errorf("status %d brought a token, want 200 and 201 only", status)
		}
		if got.accessToken == "" {
			t.Error("the token is empty")
		}
		for _, c := range []byte(got.accessToken) {
			if c < 0x21 || c > 0x7e {
				t.Errorf("the token holds the byte %#x, want none outside 0x21 to 0x7e", c)
			}
		}
		if got.lifetime < 0 || got.lifetime > maxLifetime {
			t.Errorf("the lifetime is %v, want it within 0 and %v", got.lifetime, maxLifetime)
		}
	})
}
