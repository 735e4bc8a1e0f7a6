package outboundauth

import (
	"errors"
	"math/rand/v2"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
)

func TestSelectionByName(t *testing.T) {
	for _, test := range []struct {
		pattern, name string
		want          bool
	}{
		{"orders", "orders", true},
		{"orders", "orders-2", false},
		{"orders", "Orders", false},
		{"order", "orders", false},
		{"tenant-1*", "tenant-1", true},
		{"tenant-1*", "tenant-12", true},
		{"tenant-1*", "tenant-2", false},
		{"tenant-?", "tenant-12", false},
		{"tenant-[1-3]", "tenant-2", true},
		{"tenant-[^1-3]", "tenant-2", false},
		{"*", "", true},

		// A slash is no border.
		{"*", "auth.example.com/https://client.example.com/", true},
		{"auth.example.com*", "auth.example.com/orders", true},
		{"*orders", "auth.example.com/orders", true},
		{"a?b", "a/b", true},
		{"a[^b]b", "a/b", true},
		{"a[/x]b", "a/b", true},
		{`a\/b`, "a/b", true},
		{"auth.example.com/*", "auth.example.org/orders", false},
		{"*/orders", "auth.example.com-orders", false},

		// Names that mean something else as a pattern.
		{"[::1]:9400/orders", "[::1]:9400/orders", true},
		{"[::1]:9400/*", "[::1]:9400/orders", false},
		{`\[::1]:9400/*`, "[::1]:9400/orders", true},
		{`auth/DOMAIN\user`, `auth/DOMAIN\user`, true},
		{`auth/DOMAIN\\*`, `auth/DOMAIN\user`, true},
		{"Bücher*", "Bücher/\uFFFD", true},
		{"\uFFFD?\uFFFD", "\uFFFD/\uFFFD", true},
	} {
		s, err := parseSelection(url.Values{"name": {test.pattern}})
		if err != nil {
			t.Errorf("%q: got %v, want a pattern", test.pattern, err)
		}
		if got := s.selects(&sourceStatus{description: description{name: test.name}}); got != test.want {
			t.Errorf("%q selects %q: got %v, want %v", test.pattern, test.name, got, test.want)
		}
	}
}

// A pattern comes from whoever may ask the admin API, and must not keep it busy.
func TestSelectionByAnEvilPattern(t *testing.T) {
	s := selection{name: strings.Repeat("*a", 2000) + "*b"}
	started := time.Now()
	if s.selectsName(strings.Repeat("a/", 2000)) {
		t.Error("got a match, want none")
	}
	if took := time.Since(started); took > patience {
		t.Errorf("took %v, want less than %v", took, patience)
	}
}

func TestSelectionByState(t *testing.T) {
	all := map[string]sourceStatus{
		"fresh":   {state: stateFresh},
		"stale":   {state: stateStale},
		"expired": {state: stateExpired},
		"absent":  {state: stateAbsent},
		"failing": {state: stateFresh, failures: 1, err: errors.New("no answer")},
		"wrong":   {state: stateAbsent, failures: 1, err: &tokenError{Code: "invalid_client", permanent: true}},
		"refused": {state: stateStale, upstreams: []upstreamStatus{{"a:443", verdictPath, true, time.Now()}, {"b:443", verdictToken, true, time.Now()}}},
		// Upstreams have refused, but not the token that there is now.
		"accepted": {state: stateStale, upstreams: []upstreamStatus{{"a:443", verdictPath, true, time.Now()}, {"b:443", verdictToken, false, time.Now()}}},
	}
	for states, want := range map[string][]string{
		"fresh":                  {"failing", "fresh"},
		"stale":                  {"accepted", "refused", "stale"},
		"expired":                {"expired"},
		"absent":                 {"absent", "wrong"},
		"failing":                {"failing", "wrong"},
		"refused":                {"refused"},
		"refused,failing":        {"failing", "refused", "wrong"},
		"absent,failing,absent":  {"absent", "failing", "wrong"},
		"fresh,stale,expired":    {"accepted", "expired", "failing", "fresh", "refused", "stale"},
		"absent,expired,refused": {"absent", "expired", "refused", "wrong"},
	} {
		s, err := parseSelection(url.Values{"state": {states}})
		if err != nil {
			t.Errorf("%s: got %v, want states", states, err)
		}
		var got []string
		for name, status := range all {
			if s.selects(&status) {
				got = append(got, name)
			}
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", states, got, want)
		}
	}
}

func TestSelectionByKey(t *testing.T) {
	s, err := parseSelection(url.Values{"key": {"acme"}})
	if err != nil || s.query() != "?key=acme" {
		t.Fatalf("got %q, err %v, want the query", s.query(), err)
	}
	for _, test := range []struct {
		keys []string
		want bool
	}{
		{nil, false},
		{[]string{"globex", "acme"}, true},
		{[]string{"acme-2", "ACME", "a*"}, false},
	} {
		if got := s.selects(&sourceStatus{description: description{Keys: test.keys}}); got != test.want {
			t.Errorf("%q: got %v, want %v", test.keys, got, test.want)
		}
	}
}

func TestSelectionErrors(t *testing.T) {
	evil := "\x1b[31m\u202e\n\u009b"
	for query, want := range map[string]string{
		"name=":                         "name: is empty; name a client or a pattern, or leave it out",
		"name=[a":                       `name: "[a" is not a pattern; write a \ before each [`,
		`name=a\`:                       `name: "a\\" is not a pattern`,
		"name=[]":                       "is not a pattern",
		"name=a&name=b":                 "name: is given 2 times; give it once",
		"key=":                          "key: is empty; name a client key, or leave it out",
		"key=a&key=b":                   "key: is given 2 times",
		"state=":                        `state: "" is not known; name one or more of fresh, stale, expired, absent, failing, refused`,
		"state=Fresh":                   `state: "Fresh" is not known`,
		"state=fresh,":                  `state: "" is not known`,
		"state=stale, fresh":            `state: " fresh" is not known`,
		"state=ok,fresh":                `state: "ok" is not known`,
		"state=fresh&state=absent":      "state: is given 2 times",
		"limit=":                        `limit: "" is not a positive integer; name one, or leave it out`,
		"limit=0":                       `limit: "0" is not a positive integer`,
		"limit=-1":                      "is not a positive integer",
		"limit=1.5":                     "is not a positive integer",
		"limit=0x10":                    "is not a positive integer",
		"limit=99999999999999999999999": "is not a positive integer",
		"limit=1&limit=1":               "limit: is given 2 times",
		"Limit=1":                       `"Limit": is not a parameter of this list; it has name, key, state, limit`,
		"offset=1&limit=x":              `limit: "x"`,
		"sort=1&sort=2":                 `"sort": is not a parameter`,
		"name=[" + evil:                 "is not a pattern",
		"state=" + evil:                 "is not known",
		"limit=" + evil:                 "is not a positive integer",
		evil + "=1":                     "is not a parameter",
	} {
		params := make(url.Values)
		for pair := range strings.SplitSeq(query, "&") {
			param, value, _ := strings.Cut(pair, "=")
			params.Add(param, value)
		}
		got, err := parseSelection(params)
		wantError(t, err, want)
		if !reflect.ValueOf(got).IsZero() {
			t.Errorf("%q: got %+v with the error, want nothing", query, got)
		}
		if err != nil && strings.ContainsFunc(err.Error(), func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q: got %q, want printable characters only", query, err)
		}
	}
}

// What the command asks is what the admin API reads.
func TestSelectionAsAQuery(t *testing.T) {
	for _, want := range []selection{
		{},
		{limit: 20},
		{name: "auth.example.com/a&b=c#d+*?", states: []string{stateFailing, stateRefused}, limit: 1},
	} {
		query := want.query()
		if (query == "") != reflect.ValueOf(want).IsZero() {
			t.Errorf("got the query %q for %+v", query, want)
		}
		params, err := url.ParseQuery(strings.TrimPrefix(query, "?"))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parseSelection(params); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, err %v of %q, want %+v", got, err, query, want)
		}
	}
}

func TestSelectionOrder(t *testing.T) {
	refused := []upstreamStatus{{"a:443", verdictToken, true, time.Now()}}
	rejected := &tokenError{Code: "invalid_client", permanent: true}
	named := func(name string) description { return description{name: name} }
	sorted := []sourceStatus{
		{description: named("d1"), state: stateFresh, failures: 1, err: rejected},
		{description: named("d2"), state: stateAbsent, failures: 9, err: rejected, upstreams: refused},
		{description: named("c1"), state: stateAbsent, failures: 1, err: errors.New("no answer")},
		{description: named("c2"), state: stateFresh, failures: 5, err: errors.New("no answer"), upstreams: refused},
		{description: named("b1"), state: stateStale, upstreams: refused},
		{description: named("b2"), state: stateFresh, upstreams: refused},
		{description: named("a1"), state: stateAbsent},
		{description: named("a2"), state: stateFresh, upstreams: []upstreamStatus{{"a:443", verdictPath, true, time.Now()}}},
		{description: named("a3"), state: stateExpired}, // idle
	}
	// Of one name, by ID.
	same := []sourceStatus{{key: sourceKey{1}}, {key: sourceKey{2}}, {key: sourceKey{3}}}
	slices.SortFunc(same, func(a, b sourceStatus) int { return strings.Compare(a.key.id(), b.key.id()) })
	for i := range same {
		same[i].name, same[i].state = "same", stateFresh
	}
	sorted = append(sorted, same...)

	for range 50 {
		shuffled := slices.Clone(sorted)
		rand.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		for _, limit := range []int{0, 1, 5, len(sorted), 1000} {
			want := sorted
			if limit > 0 {
				want = sorted[:min(limit, len(sorted))]
			}
			shown, total := selection{limit: limit}.of(pointers(shuffled))
			if total != len(sorted) || len(shown) != len(want) {
				t.Fatalf("limit %d: got %d of %d clients, want %d of %d", limit, len(shown), total, len(want), len(sorted))
			}
			for i := range shown {
				if shown[i].name != want[i].name || shown[i].key != want[i].key {
					t.Fatalf("limit %d: got %s as number %d, want %s", limit, shown[i].name, i, want[i].name)
				}
			}
		}
	}
}

func pointers(statuses []sourceStatus) (all []*sourceStatus) {
	for i := range statuses {
		all = append(all, &statuses[i])
	}
	return all
}
