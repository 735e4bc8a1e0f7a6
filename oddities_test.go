package outboundauth

import (
	"fmt"
	"io/fs"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2"

	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
)

// What each warning at load says at its end.
const (
	sentAsItIs = "; it is sent as it is: correct it, unless that is meant"
	noToken    = "; until then, no token can be requested"
)

// warned makes a client of c, and returns what is logged then, but for what it is about.
func warned(t *testing.T, c Credentials, server http.RoundTripper) (cl *client, warnings []string) {
	t.Helper()
	core, logs := observer.New(zapcore.WarnLevel)
	cl = newLoggingClient(t, c, server, zap.New(core))
	for _, entry := range logs.TakeAll() {
		setting, odd := strings.CutSuffix(entry.Message, sentAsItIs)
		setting, absent := strings.CutSuffix(setting, noToken)
		if odd == absent {
			t.Errorf("got %q in the log, want what to do", entry.Message)
		}
		warnings = append(warnings, setting)
		wantNoCanaryIn(t, entry.Message)
	}
	return cl, warnings
}

// A file of a secret often ends with a line break, which is not part of it. What else
// nobody sees at its ends is sent, told at load, and told when the server refuses it.
func TestWhatNobodySeesAtTheEndsOfASecret(t *testing.T) {
	dir := t.TempDir()
	for i, test := range []struct{ content, file, env string }{ // what is told of it in a file, and in a variable
		{"canary", "", ""},
		{"canary\n", "", "ends with a line break"},
		{"canary\r\n", "", "ends with a line break"},
		{"canary\n\n", "ends with a line break beside the final one", "ends with a line break"},
		{"canary\r\n\r\n", "ends with a line break beside the final one", "ends with a line break"},
		{"canary \n", "ends with a blank", "ends with a line break"},
		{"canary ", "ends with a blank", "ends with a blank"},
		{"\ncanary", "begins with a line break", "begins with a line break"},
		{byteOrderMark + "canary\r\n", "begins with a byte order mark (U+FEFF)", "begins with a byte order mark (U+FEFF) and ends with a line break"},
		{byteOrderMark + "canary\n\n", "begins with a byte order mark (U+FEFF) and ends with a line break beside the final one", "begins with a byte order mark (U+FEFF) and ends with a line break"},
		{string(utf16Text("canary\r\n")), "is UTF-16", ""}, // no variable holds zero bytes
		{string(utf16Text("canary\r\n")[2:]), "holds zero bytes, as UTF-16 does", ""},
	} {
		file := writeFile(t, filepath.Join(dir, fmt.Sprint(i)), []byte(test.content))
		for template, want := range map[string]string{"{file." + file + "}": test.file, "{env.TEST_SECRET}": test.env} {
			sent := strings.TrimSuffix(strings.TrimSuffix(test.content, "\n"), "\r") // as Caddy reads a file
			if strings.HasPrefix(template, "{env.") {
				if strings.Contains(test.content, "\x00") {
					continue
				}
				t.Setenv("TEST_SECRET", test.content)
				sent = test.content
			}
			t.Run(fmt.Sprintf("%q as %.5s", test.content, template), func(t *testing.T) {
				c := Credentials{TokenURL: testTokenURL, ClientID: "id", ClientSecret: template, AuthMethod: authPost}
				server := answering(http.StatusUnauthorized, `{"error":"invalid_client"}`)
				cl, warnings := warned(t, c, server)
				_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
				got := wantTokenError(t, err, "invalid_client", true)
				wantNoCanary(t, err)
				const check = "check client_id, client_secret and auth_method"
				if want == "" {
					if len(warnings) > 0 || got.Hint != check {
						t.Errorf("got the warnings %q and the hint %q, want none, and %q", warnings, got.Hint, check)
					}
				} else {
					want := "client_secret " + want
					if !slices.Equal(warnings, []string{want}) || got.Hint != want+": correct that first" {
						t.Errorf("got the warnings %q and the hint %q, want %q and what to check", warnings, got.Hint, want)
					}
				}
				cl.endpoint.transport = answering(http.StatusOK, goodAnswer)
				if form := requestForm(t, cl, cl.endpoint.transport.(*wire)); form.Get("client_secret") != sent {
					t.Errorf("got the secret %q, want %q", form.Get("client_secret"), sent)
				}
			})
		}
	}
}

// Each setting that is sent can be read from such a file.
func TestWhatNobodySeesAtTheEndsOfASetting(t *testing.T) {
	t.Setenv("TEST_VALUE", "canary \n")
	t.Setenv("TEST_FIELD", "canary ")
	const value = "{env.TEST_VALUE}"
	key := string(keytest.PKCS8(t, keytest.New(t)))
	c := Credentials{
		Name:     newName(), // or the metrics of all tests would have the client_id
		TokenURL: testTokenURL, ClientID: value, ClientSecret: value, AuthMethod: authSecretJWT, KeyID: value, AssertionAudience: value,
		Audience: []string{"a", value, "b"}, Resource: []string{"https://api.example.com/ "},
		GrantType: grantJWTBearer, PrivateKey: key, Subject: value, Claims: map[string]string{"c": value},
		Params: map[string]string{"p": value, "q": "plain"}, TokenRequestHeaders: map[string]string{"X-H": "{env.TEST_FIELD}"},
	}
	_, warnings := warned(t, c, answering(http.StatusOK, goodAnswer))
	want := []string{
		"assertion_audience ends with a line break", "audience ends with a line break", "claim c ends with a line break",
		"client_id ends with a line break", "client_secret ends with a line break", "key_id ends with a line break",
		"param p ends with a line break", "resource ends with a blank", "subject ends with a line break", "token_request_header X-H ends with a blank",
	}
	if !slices.Equal(warnings, want) {
		t.Errorf("got the warnings %q, want %q", warnings, want)
	}
}

// Neither is an error that is about something else a reason to speak of the secret.
func TestOddSecretThatTheServerDoesNotMean(t *testing.T) {
	t.Setenv("TEST_SECRET", "canary\n")
	c := Credentials{TokenURL: testTokenURL, ClientID: "id", ClientSecret: "{env.TEST_SECRET}"}
	for code, want := range map[string]string{
		"invalid_scope": "set scopes: the server wants some",
		"E1":            "client_secret ends with a line break: correct that first",
	} {
		_, err := newTestClient(t, c, answering(http.StatusForbidden, fmt.Sprintf(`{"error":%q}`, code))).endpoint.locateAndRequest(t.Context(), nil)
		if got := wantTokenError(t, err, code, true); got.Hint != want {
			t.Errorf("%s: got %v, want the hint %q", code, err, want)
		}
	}
}

// A config may be loaded where its secrets are not, as `caddy validate` does. Nobody
// waits there for what can't be read at once: a pipe may have its value later.
func TestSecretsThatAreNotThereWhenTheConfigIsLoaded(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TEST_EMPTY", "")
	missing := filepath.Join(dir, "missing")
	const create, set = "create the file, or correct its path", "set it where Caddy is started, in its service or its shell, and start it again"
	for name, test := range map[string]struct{ placeholder, wrong, todo string }{
		"missing":             {"{file." + missing + "}", "does not exist", create},
		"missing, relative":   {"{file.no-such/secret}", "does not exist", create + ", which is relative to Caddy's working directory"},
		"missing, with blank": {"{file." + missing + " }", "does not exist (the name ends with a blank)", create},
		"below a file":        {"{file." + writeFile(t, filepath.Join(dir, "file"), []byte("x")) + "/secret}", "can't be read (not a directory)", "check the file and its path"},
		"empty":               {"{file." + writeFile(t, filepath.Join(dir, "empty"), nil) + "}", "is empty", "write the value into the file"},
		"line break":          {"{file." + writeFile(t, filepath.Join(dir, "line"), []byte("\r\n")) + "}", "is empty", "write the value into the file"},
		"directory":           {"{file." + dir + "}", "is a directory", "name a file in it"},
		"too large":           {"{file." + fileOfSize(t, dir, maxSecretFile+1) + "}", "is larger than 1 MiB, which is all that Caddy reads", "correct its path"},
		"unset":               {"{env.TEST_NOT_SET}", "is not set in the environment of this process", set},
		"empty variable":      {"{env.TEST_EMPTY}", "is empty", set},
		"pipe":                {"{file." + pipe(t, dir) + "}", "", ""},
		"endless":             {"{file./dev/zero}", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			server := answering(http.StatusOK, goodAnswer)
			cl, warnings := warned(t, Credentials{TokenURL: testTokenURL, ClientID: "id", ClientSecret: canarySecret + test.placeholder}, server)
			var want []string
			wrong := "client_secret: " + test.placeholder + " " + test.wrong
			if test.wrong != "" {
				want = []string{wrong + ": " + test.todo}
			}
			if !slices.Equal(warnings, want) {
				t.Errorf("got the warnings %q, want %q", warnings, want)
			}
			if test.wrong == "" {
				return
			}
			_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
			got := wantTokenError(t, err, codeConfiguration, true)
			wantNoCanary(t, err)
			if got.Description != wrong || got.Hint != test.todo {
				t.Errorf("got the description %q and the hint %q, want %q and %q", got.Description, got.Hint, wrong, test.todo)
			}
			if len(server.requests()) > 0 {
				t.Error("got a token request, want none")
			}
		})
	}
}

// A device has no end, and what it yields is no secret.
func TestSecretOfADeviceMakesNoRequest(t *testing.T) {
	for device, want := range map[string]string{"/dev/zero": "is larger than 1 MiB, which is all that Caddy reads", "/dev/null": "is empty"} {
		cl := newTestClient(t, Credentials{TokenURL: testTokenURL, ClientID: "id", ClientSecret: "{file." + device + "}"}, answering(http.StatusOK, goodAnswer))
		_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
		if got := wantTokenError(t, err, codeConfiguration, true); got.Description != "client_secret: {file."+device+"} "+want {
			t.Errorf("got %v, want that it %s", err, want)
		}
	}
}

// The tests may run as root, who may read everything.
func TestFileThatMayNotBeRead(t *testing.T) {
	file := writeFile(t, filepath.Join(t.TempDir(), "secret"), []byte("x"))
	for _, err := range []error{&fs.PathError{Op: "open", Path: file, Err: syscall.EACCES}, &fs.PathError{Op: "stat", Path: file, Err: syscall.EPERM}} {
		wantError(t, fileError("client_secret", "{file."+file+"}", file, err),
			"client_secret: {file."+file+"} may not be read by the user that Caddy runs as: allow this user to read the file, and to enter its directory")
	}
}

// Each setting says for itself what it lacks, once.
func TestEachSettingWithoutItsFileIsNamed(t *testing.T) {
	missing := "{file." + filepath.Join(t.TempDir(), "missing") + "}"
	const is = " does not exist: create the file, or correct its path"
	key := string(keytest.PKCS8(t, keytest.New(t)))
	_, warnings := warned(t, Credentials{
		TokenURL: testTokenURL, ClientID: "id", ClientSecret: missing, GrantType: grantJWTBearer, PrivateKey: key,
		Subject: missing, Claims: map[string]string{"c": missing + missing},
		Params: map[string]string{"p": missing, "q": "plain"}, TokenRequestHeaders: map[string]string{"X-H": "Key " + missing},
	}, nil)
	var want []string
	for _, setting := range []string{"claim c", "client_secret", "param p", "subject", "token_request_header X-H"} {
		want = append(want, setting+": "+missing+is)
	}
	if !slices.Equal(warnings, want) {
		t.Errorf("got the warnings %q, want %q", warnings, want)
	}
	for template, want := range map[string]string{
		missing: "assertion_file: " + missing + is, "/no/such/file": "assertion_file: the file that it names" + is,
	} {
		if _, warnings := warned(t, Credentials{TokenURL: testTokenURL, AssertionFile: template}, nil); !slices.Equal(warnings, []string{want}) {
			t.Errorf("got the warnings %q, want %q", warnings, want)
		}
	}
	// What is read only when the config is loaded can't come later.
	_, err := Credentials{TokenURL: testTokenURL, ClientID: missing, ClientSecret: "s"}.expand(caddy.NewReplacer())
	if wantError(t, err, "client_id: "+missing+is); err != nil && strings.Contains(err.Error(), "known here") {
		t.Errorf("got %v, want no word about placeholders that are not known", err)
	}
}

// What holds nothing but white space is no secret, as in the config.
func TestSecretOfWhiteSpaceMakesNoRequest(t *testing.T) {
	file := writeFile(t, filepath.Join(t.TempDir(), "secret"), []byte("\n \n"))
	server := answering(http.StatusOK, goodAnswer)
	_, err := newTestClient(t, Credentials{TokenURL: testTokenURL, ClientID: "id", ClientSecret: "{file." + file + "}"}, server).endpoint.locateAndRequest(t.Context(), nil)
	if got := wantTokenError(t, err, codeConfiguration, true); got.Description != "client_secret holds nothing but white space" || got.Hint != "write a value" {
		t.Errorf("got %v, want that there is no secret", err)
	}
	if len(server.requests()) > 0 {
		t.Error("got a token request, want none")
	}
}

// A URL never ends so: it is an error that says where to look.
func TestURLWithWhatNobodySees(t *testing.T) {
	for value, want := range map[string]string{
		"https://auth.example.com\n":               "ends with a line break: must be an absolute URL",
		"https://auth.example.com/ ":               "ends with a blank: must be an absolute URL",
		byteOrderMark + "https://auth.example.com": "begins with a byte order mark (U+FEFF): must be an absolute URL",
	} {
		t.Setenv("TEST_URL", value)
		for setting, c := range map[string]Credentials{
			"token_url": {TokenURL: "{env.TEST_URL}", ClientID: "id", ClientSecret: "s"},
			"issuer":    {Issuer: "{env.TEST_URL}", ClientID: "id", ClientSecret: "s"},
		} {
			_, err := c.expand(caddy.NewReplacer())
			wantError(t, err, setting+": "+want)
		}
	}
}

// Around a JWT, as around a key, nothing of this does harm.
func TestAssertionWithWhatNobodySees(t *testing.T) {
	token := string(jwtWith(`{"sub":"` + strings.Repeat("x", minInlineJWT) + `"}`))
	dir := t.TempDir()
	t.Setenv("TEST_JWT", byteOrderMark+token+"\r\n\r\n")
	marked := writeFile(t, filepath.Join(dir, "marked"), []byte(byteOrderMark+token+"\n\n"))
	wide := writeFile(t, filepath.Join(dir, "wide"), utf16Text(token))
	for template, want := range map[string]string{marked: "", "{env.TEST_JWT}": "", "{file." + marked + "}": "", wide: "assertion_file: the file that it names is UTF-16: save it as UTF-8"} {
		got, err := readAssertion(caddy.NewReplacer(), template)
		wantError(t, err, want)
		if want == "" && got != token {
			t.Errorf("%s: got %q, want the JWT", template, got)
		}
	}
}
