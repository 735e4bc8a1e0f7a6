package outboundauth

import (
	"encoding/base64"
	"fmt"
	"html"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

func TestClientAuthenticationIsEncoded(t *testing.T) {
	// RFC 6749 §2.3.1 and appendix B: both parts of Basic are form-encoded.
	for _, test := range []struct {
		name, id, secret string
		wantBasic        string // before base64
		wantForm         string
	}{
		{"plain", "id", "secret", "id:secret", "client_id=id&client_secret=secret"},
		{"colon", "a:b", "c:d", "a%3Ab:c%3Ad", "client_id=a%3Ab&client_secret=c%3Ad"},
		{"percent", "a%3Ab", "100%", "a%253Ab:100%25", "client_id=a%253Ab&client_secret=100%25"},
		{"plus and space", "a+b", "c d", "a%2Bb:c+d", "client_id=a%2Bb&client_secret=c+d"},
		{"ampersand and equals", "a&b=c", "d&e=f", "a%26b%3Dc:d%26e%3Df", "client_id=a%26b%3Dc&client_secret=d%26e%3Df"},
		{"umlaut", "jürgen", "süß", "j%C3%BCrgen:s%C3%BC%C3%9F", "client_id=j%C3%BCrgen&client_secret=s%C3%BC%C3%9F"},
		{"base64", "id", "aB+/cd==", "id:aB%2B%2Fcd%3D%3D", "client_id=id&client_secret=aB%2B%2Fcd%3D%3D"},
		{"URL as id", "https://app.example/", "s", "https%3A%2F%2Fapp.example%2F:s", "client_id=https%3A%2F%2Fapp.example%2F&client_secret=s"},
		{"unreserved", "a-b_c.d~e", "*", "a-b_c.d~e:%2A", "client_id=a-b_c.d~e&client_secret=%2A"},
	} {
		t.Run(test.name, func(t *testing.T) {
			form, header := url.Values{}, http.Header{}
			authenticate(authBasic, test.id, test.secret, form, header)
			got, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(header.Get("Authorization"), "Basic "))
			if err != nil || string(got) != test.wantBasic {
				t.Errorf("Basic credentials = %q, %v, want %q", got, err, test.wantBasic)
			}
			if len(form) != 0 {
				t.Errorf("the form holds %v beside the Authorization header, want one method only", form)
			}
			// A server that follows the RFC gets back what was configured.
			id, secret, _ := strings.Cut(string(got), ":")
			if id, err := url.QueryUnescape(id); err != nil || id != test.id {
				t.Errorf("the server reads the id %q, %v, want %q", id, err, test.id)
			}
			if secret, err := url.QueryUnescape(secret); err != nil || secret != test.secret {
				t.Errorf("the server reads the secret %q, %v, want %q", secret, err, test.secret)
			}

			form, header = url.Values{}, http.Header{}
			authenticate(authPost, test.id, test.secret, form, header)
			if got := form.Encode(); got != test.wantForm {
				t.Errorf("form = %q, want %q", got, test.wantForm)
			}
			if len(header) != 0 {
				t.Errorf("the header holds %v beside the form, want one method only", header)
			}
		})
	}
}

func TestNoAuthenticationSendsTheIDOnly(t *testing.T) {
	form, header := url.Values{}, http.Header{}
	sensitive := authenticate(authNone, "id", "", form, header)
	if got := form.Encode(); got != "client_id=id" || len(header) != 0 {
		t.Errorf("form = %q, header = %v, want client_id=id and none", got, header)
	}
	if len(sensitive) != 0 {
		t.Errorf("sensitive = %q, want nothing: the id is not secret", sensitive)
	}
}

func TestEveryFormOfTheSecretIsSensitive(t *testing.T) {
	const secret = "Abc+d/e f&ghijk"
	escaped := url.QueryEscape(secret)
	basic := base64.StdEncoding.EncodeToString([]byte("id:" + escaped))
	for _, method := range []string{authBasic, authPost} {
		secrets := authenticate(method, "id", secret, url.Values{}, http.Header{})
		echoes := []string{
			secret, escaped, url.PathEscape(secret), strings.ToLower(escaped), strings.ToUpper(secret),
			html.EscapeString(secret), fmt.Sprintf("%x", secret), base64.StdEncoding.EncodeToString([]byte(secret)),
			secret[:telltale], secret[len(secret)-telltale:],
		}
		if method == authBasic {
			echoes = append(echoes, basic)
		}
		for _, echo := range echoes {
			if !secrets.in("the secret '" + echo + "' is wrong") {
				t.Errorf("%s: %q may be shown, want not: it repeats the secret", method, echo)
			}
		}
		for _, harmless := range []string{"", "Bad credentials", "client id is unknown", secret[:telltale-1]} {
			if secrets.in(harmless) {
				t.Errorf("%s: %q may not be shown, want that it may", method, harmless)
			}
		}
	}
}
