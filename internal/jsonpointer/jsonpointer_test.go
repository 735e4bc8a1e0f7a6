package jsonpointer

import (
	"encoding/json"
	"strings"
	"testing"
)

// document is that of RFC 6901 §5, and more.
const document = `{
	"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, "g|h": 4, "i\\j": 5, "k\"l": 6, " ": 7, "m~n": 8,
	"~1": 9, "deep": {"er": [{"01": null}, 12345678901234567890]}, "twice": 1, "twice": 2, "nothing": null
}`

func TestFind(t *testing.T) {
	for _, test := range []struct{ pointer, want string }{
		{"/foo", `["bar", "baz"]`},
		{"/foo/0", `"bar"`},
		{"/foo/1", `"baz"`},
		{"/", "0"},
		{"/a~1b", "1"},
		{"/c%d", "2"},
		{"/e^f", "3"},
		{"/g|h", "4"},
		{`/i\j`, "5"},
		{`/k"l`, "6"},
		{"/ ", "7"},
		{"/m~0n", "8"},
		{"/~01", "9"}, // not a slash
		{"/deep/er/0/01", "null"},
		{"/deep/er/1", "12345678901234567890"},
		{"/twice", "2"},
		{"/nothing", "null"},

		// Nothing there.
		{"/bar", ""},
		{"/FOO", ""},
		{"/foo/2", ""},
		{"/foo/-", ""},
		{"/foo/-1", ""},
		{"/foo/+1", ""},
		{"/foo/01", ""},
		{"/foo/1.0", ""},
		{"/foo/", ""},
		{"/foo/99999999999999999999", ""},
		{"/foo/0/b", ""},
		{"/nothing/x", ""},
		{"/foo/0/0", ""},
	} {
		p, err := Parse(test.pointer)
		if err != nil {
			t.Fatalf("Parse(%q) = %v", test.pointer, err)
		}
		got, ok := p.Find([]byte(document))
		if string(got) != test.want || ok != (test.want != "") {
			t.Errorf("%q finds %q, %v, want %q", test.pointer, got, ok, test.want)
		}
	}
}

func TestDocumentThatIsNotJSON(t *testing.T) {
	p, _ := Parse("/a")
	for _, document := range []string{"", "null", "{", `{"a":1}x`, `"a"`, "[1]", `{"a":`} {
		if got, ok := p.Find([]byte(document)); ok {
			t.Errorf("found %q in %q, want nothing", got, document)
		}
	}
}

func TestBadPointers(t *testing.T) {
	for _, pointer := range []string{"", "foo", "data.token", "#/foo", "$.data", " /foo", "/~", "/~2", "/a~", "/~~0", "/~00~"} {
		if _, err := Parse(pointer); err == nil {
			t.Errorf("Parse(%q) = nil, want an error", pointer)
		}
	}
}

// FuzzPointer holds that a pointer finds what decoding finds, step by step.
func FuzzPointer(f *testing.F) {
	f.Add("/foo/0", document)
	f.Add("/deep/er/0/01", document)
	f.Add("/~01/a~1b", `{"~1":{"a/b":[]}}`)
	f.Fuzz(func(t *testing.T, text, document string) {
		p, err := Parse(text)
		if err != nil {
			return
		}
		got, ok := p.Find([]byte(document))
		if ok && !json.Valid(got) {
			t.Errorf("%q finds %q, want JSON", text, got)
		}
		var value any
		if json.Unmarshal([]byte(document), &value) != nil {
			if ok {
				t.Errorf("found %q in what is not JSON", got)
			}
			return
		}
		for token := range strings.SplitSeq(text[1:], "/") {
			token = strings.ReplaceAll(strings.ReplaceAll(token, "~1", "/"), "~0", "~")
			var here bool
			switch in := value.(type) {
			case map[string]any:
				value, here = in[token]
			case []any:
				for i := range in {
					if quoted, _ := json.Marshal(i); string(quoted) == token {
						value, here = in[i], true
						break
					}
				}
			}
			if !here {
				if ok {
					t.Errorf("%q finds %q, want nothing", text, got)
				}
				return
			}
		}
		var same any
		_ = json.Unmarshal(got, &same)
		a, _ := json.Marshal(value)
		if b, _ := json.Marshal(same); !ok || string(a) != string(b) {
			t.Errorf("%q finds %s, want %s", text, b, a)
		}
	})
}
