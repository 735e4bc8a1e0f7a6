package outboundauth

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// TestExamplesWork loads what users are asked to start with, as far as that is
// possible without its servers.
func TestExamplesWork(t *testing.T) {
	files, err := filepath.Glob("examples/*.Caddyfile")
	if err != nil || len(files) == 0 {
		t.Fatalf("got %d files in examples, err %v, want some", len(files), err)
	}
	for _, file := range append(files, "example.Caddyfile") {
		t.Run(file, func(t *testing.T) {
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got := caddyfile.Format(content); !bytes.Equal(got, content) {
				t.Errorf("got an example that is not formatted, want\n%s", got)
			}
			setPlaceholders(t, content)
			wantError(t, validateCaddyfile(t, string(content)), "")
			if !bytes.Contains(content, []byte("transport oauth2")) {
				t.Error("got no `transport oauth2`, want an example of it")
			}
		})
	}
}

// pages returns the texts for users, README.md and the pages of docs/, by path.
func pages(t *testing.T) map[string]string {
	t.Helper()
	paths, err := filepath.Glob("docs/*.md")
	if err != nil || len(paths) == 0 {
		t.Fatalf("got %d pages in docs, err %v, want some", len(paths), err)
	}
	texts := make(map[string]string)
	for _, path := range append(paths, "README.md") {
		texts[path] = readFile(t, path)
	}
	return texts
}

// TestDocumentedCaddyfilesWork loads each block of the pages that is a Caddyfile
// or a part of one.
func TestDocumentedCaddyfilesWork(t *testing.T) {
	for path, text := range pages(t) {
		if path == "docs/providers.md" {
			continue // its blocks have tests of their own
		}
		for _, block := range fencedBlocks(text, "caddyfile") {
			t.Run(fmt.Sprintf("%s line %d", path, block.line), func(t *testing.T) {
				setPlaceholders(t, []byte(block.text))
				wantError(t, validateCaddyfile(t, withSecretFiles(t, completeCaddyfile(block.text))), "")
				if got := caddyfile.Format([]byte(block.text)); string(got) != block.text {
					t.Errorf("got a block that is not formatted, want\n%s", got)
				}
			})
		}
	}
	if len(fencedBlocks(readFile(t, "README.md"), "caddyfile")) == 0 {
		t.Error("got no ```caddyfile block in README.md, want some")
	}
}

// TestReadmeIsShort keeps it short enough to be read. Words are those of wc -w.
func TestReadmeIsShort(t *testing.T) {
	const limit = 2600
	if words := len(strings.Fields(readFile(t, "README.md"))); words > limit {
		t.Errorf("got %d words in README.md, want %d at most: move what not every user needs to docs/", words, limit)
	}
}

func TestReadmeLeadsToEveryPage(t *testing.T) {
	readme := readFile(t, "README.md")
	for path := range pages(t) {
		if path != "README.md" && !strings.Contains(readme, "]("+path) {
			t.Errorf("got no link to %s in README.md, want one", path)
		}
	}
}

// The rule of inheritance refers to a group of the table of settings.
func TestReadmeListsClientAuthentication(t *testing.T) {
	_, table, _ := strings.Cut(readFile(t, "README.md"), "\n**Client authentication** |\n")
	group, _, _ := strings.Cut(table, "\n**")
	var got []string
	for line := range strings.Lines(group) {
		name, _, _ := strings.Cut(strings.TrimPrefix(line, "`"), "`")
		got = append(got, strings.Fields(name)[0])
	}
	if want := authSettings; !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))) {
		t.Errorf("got the group %q, want %q", got, want)
	}
}

func TestReadmeNamesEverySetting(t *testing.T) {
	readme := readFile(t, "README.md")
	names := slices.Sorted(maps.Keys(credentialsSettings))
	for _, name := range append(names, "upstream", "client_by", "client", "insecure_plaintext") {
		if !namesSetting(readme, name) {
			t.Errorf("got nothing about %s in README.md, want `%s` explained", name, name)
		}
	}
}

// TestDocumentsNameEveryJSONField looks for the names that differ from those of
// the Caddyfile as well.
func TestDocumentsNameEveryJSONField(t *testing.T) {
	text := readFile(t, "README.md") + readFile(t, "docs/json.md")
	for _, name := range append(jsonNames(reflect.TypeFor[Credentials]()), "credentials", "upstreams", "addresses", "off", "clients", "by", "named", "keys", "default", "insecure_plaintext") {
		if !namesSetting(text, name) {
			t.Errorf("got nothing about %s in README.md and docs/json.md, want `%s` explained", name, name)
		}
	}
}

// namesSetting reports whether a text has the name as code: several are words that
// occur in any text.
func namesSetting(text, name string) bool {
	return regexp.MustCompile("(?m)`" + name + "[` ]|^\\s*(# )?" + name + "\\s").MatchString(text)
}

func TestDocumentedJSONWorks(t *testing.T) {
	proxies := 0
	for path, text := range pages(t) {
		for _, block := range fencedBlocks(text, "json") {
			setPlaceholders(t, []byte(block.text))
			for _, proxy := range findModules(t, []byte(block.text), "handler", "reverse_proxy") {
				proxies++
				delete(proxy, "handler")
				if _, _, err := loadProxy(t, encode(t, proxy)); err != nil {
					t.Errorf("%s line %d: got %v, want that it loads", path, block.line, err)
				}
			}
		}
	}
	if proxies == 0 {
		t.Error("got no ```json block with a reverse_proxy, want one")
	}
}

type fencedBlock struct {
	line int // of its first line
	text string
}

// fencedBlocks returns the code blocks of a Markdown text in a language.
func fencedBlocks(markdown, language string) []fencedBlock {
	var blocks []fencedBlock
	var block *fencedBlock
	var indent string
	number := 0
	for line := range strings.Lines(markdown) {
		number++
		trimmed := strings.TrimSpace(line)
		switch {
		case block == nil && trimmed == "```"+language:
			indent, _, _ = strings.Cut(line, "`")
			block = &fencedBlock{line: number + 1}
		case block != nil && trimmed == "```":
			blocks = append(blocks, *block)
			block = nil
		case block != nil:
			block.text += strings.TrimPrefix(line, indent)
		}
	}
	return blocks
}

// completeCaddyfile adds to a fragment what it stands in, as its first word
// tells: settings of `transport oauth2`, its block, or a directive.
func completeCaddyfile(fragment string) string {
	tokens, err := caddyfile.Tokenize([]byte(fragment), "README.md")
	if err != nil || len(tokens) == 0 {
		return fragment
	}
	first := tokens[0].Text
	_, isSetting := settingSamples[first]
	switch {
	case isSetting || first == "upstream" || first == "insecure_plaintext":
		settings := fragment + "\n"
		for line := range strings.Lines(clientSettings) {
			name, _, _ := strings.Cut(line, " ")
			if !strings.Contains("\n"+fragment, "\n"+name+" ") &&
				(name != "client_secret" || !strings.Contains("\n"+fragment, "\nauth_method none")) {
				settings += line
			}
		}
		// Dynamic upstreams may have any address that the fragment names.
		return strings.Replace(proxyConfig("", settings), "transport", "dynamic a localhost 9000\ntransport", 1)
	case first == "transport":
		return "http://localhost:8080 {\nreverse_proxy https://api.example.com {\n" + fragment + "\n}\n}\n"
	case slices.Contains([]string{"reverse_proxy", "handle", "handle_path", "route", "handle_errors", "metrics", "log"}, first):
		return "http://localhost:8080 {\n" + fragment + "\n}\n"
	}
	return fragment
}

func TestFragmentsOfCaddyfilesAreCompleted(t *testing.T) {
	for _, test := range []struct{ fragment, want string }{
		{"tenant acme", ""},
		{"client_id public\nauth_method none", ""},
		{"upstream https://us.api.example.com {\n\tclient_id other\n}\nupstream https://eu.api.example.com off", ""},
		{"transport oauth2 {\n\t" + clientSettings + "}", ""},
		{"reverse_proxy 127.0.0.1:9000 {\ntransport oauth2 {\n" + clientSettings + "}\n}", ""},
		{":8080 {\n\trespond ok\n}", ""},
		{"tenant", "tenant: write"}, // a mistake shows
		{"transport oauth2 {\n\ttoken_uri https://auth.example.com\n}", "a line begins with neither a setting of transport oauth2"},
	} {
		t.Run(test.fragment, func(t *testing.T) {
			_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(completeCaddyfile(test.fragment)), nil)
			wantError(t, err, test.want)
		})
	}
}

// withSecretFiles makes the files below /run/secrets that a Caddyfile names, and
// lets it name those.
func withSecretFiles(t *testing.T, source string) string {
	t.Helper()
	if !strings.Contains(source, " /run/secrets/") {
		return source
	}
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	for name, content := range map[string][]byte{
		"private_key.pem":      keyPEM,
		"service_account.json": encode(t, map[string]string{"private_key_id": "1", "private_key": string(keyPEM)}),
		"client.key":           keyPEM,
		"client.crt":           pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return strings.ReplaceAll(source, " /run/secrets/", " "+dir+"/")
}

var environmentPlaceholder = regexp.MustCompile(`\{(?:env\.|\$)(\w+)`)

// setPlaceholders gives each environment variable that a Caddyfile names a
// value that is plausible where such a name is used.
func setPlaceholders(t *testing.T, source []byte) {
	t.Helper()
	for _, match := range environmentPlaceholder.FindAllSubmatch(source, -1) {
		name, value := string(match[1]), "value-of-a-placeholder"
		switch {
		case strings.Contains(name, "URL"):
			value = "https://auth.example.com/token"
		case strings.HasSuffix(name, "HOST"), strings.HasSuffix(name, "DOMAIN"):
			value = "api.example.com"
		case strings.HasSuffix(name, "ADDR"), strings.HasSuffix(name, "ADDRESS"), strings.HasSuffix(name, "UPSTREAM"):
			value = "127.0.0.1:9000"
		}
		t.Setenv(name, value)
	}
}

// TestLinksLeadSomewhere looks for the files and headings that the documents
// refer to.
func TestLinksLeadSomewhere(t *testing.T) {
	const home = "https://github.com/outboundauth/caddy-outbound-auth"
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	for _, pattern := range []string{"*.md", "docs/*.md", "grafana/*.md", "e2e/*.md", "bench/*.md", ".github/*/*.md", ".github/*/*.yml"} {
		documents, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, document := range documents {
			for _, match := range link.FindAllStringSubmatch(readFile(t, document), -1) {
				path, anchor, _ := strings.Cut(match[1], "#")
				target := document
				if file, ok := strings.CutPrefix(path, home+"/blob/main/"); ok {
					target = file
				} else if path == home && anchor != "" {
					target = "README.md" // which is shown there
				} else if strings.Contains(path, "://") {
					continue
				} else if path != "" {
					target = filepath.Join(filepath.Dir(document), path)
				}
				if _, err := os.Stat(target); err != nil {
					t.Errorf("%s: got a link to %s, want a file there", document, match[1])
				} else if anchor != "" && !slices.Contains(anchors(readFile(t, target)), anchor) {
					t.Errorf("%s: got a link to %s, want a heading like that", document, match[1])
				}
			}
		}
	}
}

var notInAnchors = regexp.MustCompile("[^a-z0-9 _-]")

// anchors returns what the headings of a Markdown text are called in links.
func anchors(markdown string) []string {
	var all []string
	for line := range strings.Lines(markdown) {
		if heading, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " "); ok && line[0] == '#' {
			slug := notInAnchors.ReplaceAllString(strings.ToLower(strings.TrimSpace(heading)), "")
			all = append(all, strings.ReplaceAll(slug, " ", "-"))
		}
	}
	return all
}

// declaredTests returns the names of all tests.
func declaredTests(t *testing.T) map[string]bool {
	t.Helper()
	declared := make(map[string]bool)
	for _, pattern := range []string{"*_test.go", "internal/*/*_test.go", "e2e/*_test.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			for _, match := range regexp.MustCompile(`(?m)^func (Test\w+)\(t `).FindAllStringSubmatch(readFile(t, file), -1) {
				declared[match[1]] = true
			}
		}
	}
	return declared
}

// TestRequirementsAreProved looks for the tests that docs/dpop.md names.
func TestRequirementsAreProved(t *testing.T) {
	declared := declaredTests(t)
	named := regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(readFile(t, "docs/dpop.md"), -1)
	if len(named) < 20 {
		t.Fatalf("got %d tests in docs/dpop.md, want some for each requirement", len(named))
	}
	for _, name := range named {
		if !declared[name[1]] {
			t.Errorf("got %s in docs/dpop.md, want the name of a test there is", name[1])
		}
	}
}

// TestPromisesAreProved looks for the tests that SECURITY.md names: each promise has
// one at least, and each test is there.
func TestPromisesAreProved(t *testing.T) {
	declared := declaredTests(t)
	promises := 0
	for line := range strings.Lines(readFile(t, "SECURITY.md")) {
		row := strings.Split(strings.TrimSpace(line), "|")
		if len(row) != 4 || strings.TrimSpace(row[1]) == "promise" || strings.HasPrefix(row[1], "---") {
			continue
		}
		promises++
		tests := strings.Fields(row[2])
		if len(tests) == 0 {
			t.Errorf("%s: got no test, want one that proves it", row[1])
		}
		for _, test := range tests {
			if !declared[strings.Trim(test, "`")] {
				t.Errorf("%s: got %s, want the name of a test there is", row[1], test)
			}
		}
	}
	if promises < 20 {
		t.Errorf("got %d promises in SECURITY.md, want them all", promises)
	}
}

// TestTroubleshootingQuotesMessages looks for each message that the page
// explains among those of the program. A part that varies is written as `…`.
func TestTroubleshootingQuotesMessages(t *testing.T) {
	page := readFile(t, "docs/troubleshooting.md")
	quotes := regexp.MustCompile("(?m)^\\*\\*`(.*)`\\*\\*$").FindAllStringSubmatch(page, -1)
	if len(quotes) < 20 {
		t.Fatalf("got %d messages in docs/troubleshooting.md, want them all", len(quotes))
	}

	t.Setenv("TEST_UNSET", "")
	_, err := caddy.NewReplacer().ReplaceOrErr("{env.TEST_UNSET}", true, true)
	messages := strings.ReplaceAll(err.Error(), "TEST_UNSET", "X") // it is Caddy's
	for _, pattern := range []string{"*.go", "internal/*/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if !strings.HasSuffix(file, "_test.go") {
				messages += literals(t, file)
			}
		}
	}
	for _, answer := range servedAnswers { // messages that are put together
		messages += answer.want + "\n"
	}
	varying := regexp.MustCompile(`…|: |\(|\)|^check |\d+(\.\d+)+(:\d+)?`)
	for _, quote := range quotes {
		for _, part := range varying.Split(quote[1], -1) {
			part = strings.TrimPrefix(strings.TrimSpace(part), "check ")
			if !strings.Contains(messages, part) && !strings.HasPrefix(part, "status ") {
				t.Errorf("%s: got no message with %q in the program", quote[1], part)
			}
		}
	}
}

// literals returns the strings of a Go file, without the verbs of formats.
func literals(t *testing.T, file string) string {
	t.Helper()
	parsed, err := parser.ParseFile(gotoken.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	ast.Inspect(parsed, func(n ast.Node) bool {
		if literal, ok := n.(*ast.BasicLit); ok && literal.Kind == gotoken.STRING {
			text, err := strconv.Unquote(literal.Value)
			if err != nil {
				t.Fatal(err)
			}
			all.WriteString(text + "\n")
		}
		return true
	})
	return all.String()
}
