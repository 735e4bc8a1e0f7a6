package outboundauth

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

const (
	recipesPage   = "docs/recipes.md"
	demonstration = "Try a recipe" // the section whose servers play the other parts
)

// A recipe is a section of the page that has a config.
type recipe struct {
	name   string // its heading
	config string
	text   string // all but the config and the commands
	shown  []shownCommand
}

// A shownCommand is a command of the page, and what the page says that it shows.
type shownCommand struct {
	command string
	output  []string // lines
}

var fences = regexp.MustCompile("(?ms)^```.*?^```$")

// readRecipes returns the recipes of the page, and the demonstration.
func readRecipes(t *testing.T) (recipes []recipe, demo recipe) {
	t.Helper()
	_, page, _ := strings.Cut(readFile(t, recipesPage), "\n## ")
	for section := range strings.SplitSeq(page, "\n## ") {
		heading, rest, _ := strings.Cut(section, "\n")
		configs := fencedBlocks(rest, "caddyfile")
		if len(configs) != 1 {
			t.Fatalf("%s: got %d configs, want one", heading, len(configs))
		}
		r := recipe{name: heading, config: configs[0].text, text: fences.ReplaceAllString(rest, "")}
		for _, block := range fencedBlocks(rest, "text") {
			for line := range strings.Lines(block.text) {
				line = strings.TrimSuffix(line, "\n")
				if command, ok := strings.CutPrefix(line, "$ "); ok {
					r.shown = append(r.shown, shownCommand{command: command})
				} else if n := len(r.shown); n > 0 {
					r.shown[n-1].output = append(r.shown[n-1].output, line)
				}
			}
		}
		if heading == demonstration {
			demo = r
		} else {
			recipes = append(recipes, r)
		}
	}
	return recipes, demo
}

func recipeNamed(t *testing.T, name string) recipe {
	t.Helper()
	recipes, _ := readRecipes(t)
	for _, r := range recipes {
		if r.name == name {
			return r
		}
	}
	t.Fatalf("got no recipe %q in %s, want one", name, recipesPage)
	return recipe{}
}

// TestRecipesAreComplete looks for what each recipe has to say, at a length that is
// read.
func TestRecipesAreComplete(t *testing.T) {
	recipes, _ := readRecipes(t)
	top, _, _ := strings.Cut(readFile(t, recipesPage), "\n## ")
	for _, r := range recipes {
		if link := fmt.Sprintf("\n- [%s](#%s): ", r.name, anchors("## " + r.name)[0]); !strings.Contains(top, link) {
			t.Errorf("%s: got no such line at the top of the page, want %q", r.name, link)
		}
		for _, part := range []string{"\nYou need it if ", "\n**See that it works.**", "\n**What it is not for.**"} {
			if strings.Count(r.text, part) != 1 {
				t.Errorf("%s: got %d parts that begin with %q, want one", r.name, strings.Count(r.text, part), part)
			}
		}
		if words := len(strings.Fields(r.text)); words > 220 {
			t.Errorf("%s: got %d words beside the config, want 220 at most", r.name, words)
		}
		if len(r.shown) == 0 {
			t.Errorf("%s: got no command, want one that shows that it works", r.name)
		}
	}
	if len(recipes) < 10 {
		t.Errorf("got %d recipes, want all ten", len(recipes))
	}
}

// TestRecipesShowWhatTheySay runs each recipe with the servers of the page, as a reader
// does, and looks whether the commands of the page show what it says.
func TestRecipesShowWhatTheySay(t *testing.T) {
	recipes, demo := readRecipes(t)
	for _, r := range recipes {
		t.Run(r.name, func(t *testing.T) {
			g := newGateway(t)
			for _, shown := range demo.shown {
				for _, variable := range regexp.MustCompile(`([A-Z_]+)=(\w+)`).FindAllStringSubmatch(shown.command, -1) {
					t.Setenv(variable[1], variable[2])
				}
			}
			var pairs, ports []string
			for _, row := range regexp.MustCompile("(?m)^\\| `(.*)` \\| `(.*)` \\|$").FindAllStringSubmatch(demo.text, -1) {
				pairs = append(pairs, row[1], row[2])
			}
			for _, port := range []string{":9400", ":9401", ":9402"} {
				ports = append(ports, port, heldAddress(t)[len("127.0.0.1"):])
			}
			config := strings.NewReplacer(pairs...).Replace(r.config) + "\n" + demo.config
			config = strings.ReplaceAll(replaced(t, config, ports...), " unix//tmp/", " unix/"+socketDir(t)+"/")
			g.serve(config)
			for _, shown := range r.shown {
				got := g.curl(shown.command)
				if !showsLines(withoutTimes(got), withoutTimes(shown.output)) {
					t.Errorf("%s: got\n%s\nwant\n%s", shown.command, strings.Join(got, "\n"), strings.Join(shown.output, "\n"))
				}
			}
		})
	}
}

// replaced replaces the first of each pair by the second. All of the first must be there:
// otherwise the page and the test have moved apart.
func replaced(t *testing.T, config string, pairs ...string) string {
	t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(config, pairs[i]) {
			t.Fatalf("got a config without %q, want to replace it:\n%s", pairs[i], config)
		}
	}
	return strings.NewReplacer(pairs...).Replace(config)
}

// socketDir is a directory for Unix sockets. Their paths are limited to about a hundred
// bytes, and those of t.TempDir may be longer.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hop")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// serve runs a config of the page. Its text is not changed, but what is around it: the
// ports, the place of the log, and the patience with busy upstreams. All sites have an
// access log.
func (g *gateway) serve(source string) {
	g.t.Helper()
	adapted, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(source), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		g.t.Fatalf("adapting the recipe: %v\n%s", err, source)
	}
	var config map[string]any
	if err := json.Unmarshal(adapted, &config); err != nil {
		g.t.Fatal(err)
	}
	config["admin"] = map[string]any{"disabled": true, "config": map[string]any{"persist": false}}
	config["storage"] = map[string]any{"module": "file_system", "root": filepath.Join(g.dir, "storage")}
	log := member(config, "logging", "logs", "default")
	log["level"] = "DEBUG"
	log["writer"] = map[string]any{"output": "file", "filename": filepath.Join(g.dir, "log")}
	member(config, "apps", "http")["grace_period"] = "10s"
	for _, server := range member(config, "apps", "http", "servers") {
		server := server.(map[string]any)
		server["logs"] = map[string]any{}
		for i, listen := range server["listen"].([]any) {
			if listen == ":8080" {
				server["listen"].([]any)[i] = g.addr
			}
		}
	}
	walkObjects(config, func(object map[string]any) {
		if object["handler"] == "reverse_proxy" {
			transport := member(object, "transport")
			if transport["protocol"] == nil {
				transport["protocol"] = "http"
			}
			transport["dial_timeout"] = "1m"
		}
	})
	if err := caddy.Load(encode(g.t, config), false); err != nil {
		g.t.Fatalf("loading the recipe: %v\n%s", err, source)
	}
}

// member returns an object inside of another one. It makes what is missing.
func member(object map[string]any, path ...string) map[string]any {
	for _, name := range path {
		inner, ok := object[name].(map[string]any)
		if !ok {
			inner = make(map[string]any)
			object[name] = inner
		}
		object = inner
	}
	return object
}

// curl does what a command of the page does, and returns the lines that curl shows.
func (g *gateway) curl(command string) []string {
	g.t.Helper()
	method, address, headers, proxy := http.MethodGet, "", make(http.Header), ""
	withHeaders := false
	words := shellWord.FindAllString(command, -1)
	for i := 1; i < len(words); i++ {
		word := strings.Trim(words[i], "'")
		argument := func() string { i++; return strings.Trim(words[i], "'") }
		switch word {
		case "-i":
			withHeaders = true
		case "-X":
			method = argument()
		case "-x":
			proxy = argument()
		case "-H":
			field, value, _ := strings.Cut(argument(), ": ")
			headers.Add(field, value)
		default:
			address = word
		}
	}
	here := strings.NewReplacer("localhost:8080", g.addr)
	req, err := http.NewRequest(method, here.Replace(address), nil)
	if err != nil || words[0] != "curl" {
		g.t.Fatalf("%s: got error %v, want a command of curl", command, err)
	}
	req.Header = headers
	client := g.client
	if proxy != "" {
		client = proxiedClient(g.t, here.Replace(proxy))
	}
	res, err := client.Do(req)
	if err != nil {
		g.t.Fatalf("%s: %v", command, err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		g.t.Fatalf("%s: %v", command, err)
	}
	var shown strings.Builder
	if withHeaders {
		fmt.Fprintf(&shown, "%s %s\n", res.Proto, res.Status)
		_ = res.Header.Write(&shown)
		shown.WriteString("\n")
	}
	shown.Write(body)
	return strings.Split(strings.TrimSuffix(strings.ReplaceAll(shown.String(), "\r\n", "\n"), "\n"), "\n")
}

var shellWord = regexp.MustCompile(`'[^']*'|[^' ]+`)

// proxiedClient is an application whose http_proxy and https_proxy are the gateway.
func proxiedClient(t *testing.T, proxy string) *http.Client {
	t.Helper()
	address, err := url.Parse(proxy)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{Proxy: http.ProxyURL(address)}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 3 * patience}
}

var unixTime = regexp.MustCompile(`\d{10}`)

// withoutTimes replaces what is different in each run.
func withoutTimes(lines []string) []string {
	return strings.Split(unixTime.ReplaceAllString(strings.Join(lines, "\n"), "TIME"), "\n")
}

// showsLines compares lines with those of the page, where … stands for any lines, or none.
func showsLines(got, want []string) bool {
	switch {
	case len(want) == 0:
		return len(got) == 0
	case want[0] == "…":
		return showsLines(got, want[1:]) || (len(got) > 0 && showsLines(got[1:], want))
	}
	return len(got) > 0 && strings.TrimRight(got[0], " ") == want[0] && showsLines(got[1:], want[1:])
}

func TestShownLinesAreCompared(t *testing.T) {
	for _, test := range []struct {
		got, want string
		shows     bool
	}{
		{"a\nb", "a\nb", true},
		{"a\nb", "a", false},
		{"a", "a\nb", false},
		{"a\nb\nc", "a\n…", true},
		{"a", "a\n…", true},
		{"a\nb\nc", "a\n…\nc", true},
		{"a\nb\nc", "…\nb", false},
		{"token 1795382789", "token 1795382790", true},
		{"token 1", "token 2", false},
	} {
		got, want := strings.Split(test.got, "\n"), strings.Split(test.want, "\n")
		if shows := showsLines(withoutTimes(got), withoutTimes(want)); shows != test.shows {
			t.Errorf("%q, %q: got %v, want %v", test.got, test.want, shows, test.shows)
		}
	}
}
