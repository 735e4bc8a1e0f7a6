package outboundauth

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// The command showed the clients of several servers in another order each time.
func TestTokenCommandKeepsTheOrderOfTheConfig(t *testing.T) {
	auth := newAuthServer(t)
	var source strings.Builder
	source.WriteString("{\nauto_https off\n}\n")
	var want []string
	client := func(name string) string {
		want = append(want, name)
		return expand("transport oauth2 {\ntoken_url $AUTH/token\nclient_id $NAME\nclient_secret s\nname $NAME\n}\n", "$AUTH", auth.URL, "$NAME", name)
	}
	for i := range 12 { // srv0 to srv11
		fmt.Fprintf(&source, "http://127.0.0.1:%d {\nhandle /a/* {\nreverse_proxy 127.0.0.1:9000 {\n%s}\n}\n", 101+i, client(fmt.Sprintf("z%d", i)))
		fmt.Fprintf(&source, "reverse_proxy 127.0.0.1:9001 {\n%s}\n}\n", client(fmt.Sprintf("a%d", i)))
	}
	for i := range 6 { // Caddy provisions named routes in the order of a map, too
		fmt.Fprintf(&source, "&(route%d) {\nreverse_proxy 127.0.0.1:9002 {\n%s}\n}\n", i, client(fmt.Sprintf("n%d", i)))
	}
	source.WriteString("http://127.0.0.1:113 {\n")
	for i := range 6 {
		fmt.Fprintf(&source, "handle /%d {\ninvoke route%d\n}\n", i, i)
	}
	source.WriteString("}\n")
	for range 5 {
		reports, err := requestTokens(adaptCaddyfile(t, source.String()), wantedClients{}, false)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, r := range reports {
			got = append(got, r.Name)
		}
		if !slices.Equal(got, want) {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
}
