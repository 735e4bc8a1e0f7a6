package outboundauth

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

func TestFieldSetKnowsEverySpelling(t *testing.T) {
	var set fieldSet
	for _, field := range []string{"Authorization", "X-Tenant-Id", "x_user.Name", "X-" + strings.Repeat("a", 70), "_Internal"} {
		set.add(field)
	}
	for _, test := range []struct {
		field string
		want  bool
	}{
		{"Authorization", true},
		{"authorization", true},
		{"AUTHORIZATION", true},
		{"X-Tenant-Id", true},
		{"x-tenant-id", true},
		{"X_Tenant_Id", true},
		{"X.Tenant.Id", true},
		{"x_tenant.id", true},
		{"X-TENANT_ID", true},
		{"X-User-Name", true},
		{"x.user_name", true},
		{"X_" + strings.Repeat("A", 70), true}, // longer than what is folded without allocation
		{"_internal", true},
		{"-Internal", true},
		{"~internal", true},

		{"", false},
		{"X-Tenant-I", false},
		{"X-Tenant-Idx", false},
		{"XTenantId", false},
		{"Cache-Control", false}, // of the same length as Authorization
		{"Internal-", false},
		{"X-Tenant-Ie", false}, // of the same length, with the same beginning
		{"X--Tenant-I", false},
		{"Proxy-Authorization", false},
		{"X-" + strings.Repeat("a", 70-64), false}, // of the same length modulo 64
		{"X-" + strings.Repeat("a", 69) + "b", false},
	} {
		if got := set.has(test.field); got != test.want {
			t.Errorf("has(%q): got %v, want %v", test.field, got, test.want)
		}
	}
	if (&fieldSet{}).has("Authorization") {
		t.Error("got a field in the empty set, want none")
	}
}

func TestFieldSetCopiesTheHeader(t *testing.T) {
	var set fieldSet
	set.add("X-Tenant-Id")
	given := http.Header{"X-Tenant-Id": {"a"}, "x_tenant.id": {"b"}, "X_TENANT_ID": {"c"}, "Accept": {"d", "e"}}
	before := given.Clone()
	got := set.without(given, 0)
	if want := (http.Header{"Accept": {"d", "e"}}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	got.Set("New", "value")
	if !reflect.DeepEqual(given, before) {
		t.Errorf("got %v, want the header that was given unchanged: %v", given, before)
	}
	if got := set.without(nil, 0); got == nil || len(got) != 0 {
		t.Errorf("got %v of no header, want an empty one that can be written to", got)
	}
}

// A map that grows for one more field costs more than its copy.
func TestCopyOfHeaderHasRoomForMore(t *testing.T) {
	var set fieldSet
	set.add("Authorization")
	values, added := []string{"value"}, []string{"A", "B", "C"}
	for n := range 40 {
		h := make(http.Header)
		for i := range n {
			h[fmt.Sprint("Field-", i)] = values
		}
		for more := range len(added) + 1 {
			bare := allocations(func() { set.without(h, more) })
			filled := allocations(func() {
				out := set.without(h, more)
				for _, field := range added[:more] {
					out[field] = values
				}
			})
			if n+more > 8 && filled > bare { // a smaller map is made in full only when it is written to
				t.Errorf("got %v allocations for %d fields and %d more, want %v: no map that grows", filled, n, more, bare)
			}
		}
	}
}

func TestCopyOfHeaderWithoutRoomLeavesTheFieldsOut(t *testing.T) {
	var set fieldSet
	set.add("X-Tenant-Id")
	want := make(http.Header)
	for i := range 7 {
		want.Set(fmt.Sprint("Field-", i), "value")
	}
	given := want.Clone()
	given["x_tenant_id"] = []string{"a"}
	before := given.Clone()
	if got := set.without(given, 2); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if !reflect.DeepEqual(given, before) {
		t.Errorf("got %v, want the header that was given unchanged: %v", given, before)
	}
}

func TestFieldLookupAllocatesNothing(t *testing.T) {
	var set fieldSet
	set.add("X-Tenant-Id")
	if got := allocations(func() { set.has("X_Tenant.Id") }); got != 0 {
		t.Errorf("got %v allocations, want 0", got)
	}
}

func TestHeaderTemplate(t *testing.T) {
	t.Setenv("OUTBOUNDAUTH_TEST_CANARY", "canary-env")
	repl := caddy.NewReplacer()
	repl.Set("client.says", "{env.OUTBOUNDAUTH_TEST_CANARY}")
	repl.Set("client.none", "")
	repl.Set("client.crlf", "a\r\nX-Injected: b")
	repl.Set("client.nul", "a\x00b")
	repl.Set("client.del", "a\x7fb")
	repl.Set("client.tab", "a\tb")
	repl.Set("client.utf8", "jürgen")
	for _, test := range []struct {
		name, template string
		want           []string
		wantErr        bool
	}{
		{"literal", "acme", []string{"acme"}, false},
		{"literal with a backslash", `a\{b\}{`, []string{`a\{b\}{`}, false},
		{"many braces", strings.Repeat("{", 200), []string{strings.Repeat("{", 200)}, false},
		{"backslash beside a placeholder", `\{{client.utf8}\}`, []string{"{jürgen}"}, false},
		{"empty", "", nil, false},
		{"global placeholder", "{env.OUTBOUNDAUTH_TEST_CANARY}", []string{"canary-env"}, false},
		{"what a placeholder holds is not expanded", "{client.says}", []string{"{env.OUTBOUNDAUTH_TEST_CANARY}"}, false},
		{"empty placeholder", "{client.none}", nil, false},
		{"unknown placeholder", "{no.such}", nil, false},
		{"part of a value", "tenant-{client.utf8}", []string{"tenant-jürgen"}, false},
		{"tab", "{client.tab}", []string{"a\tb"}, false},
		{"line break", "{client.crlf}", nil, true},
		{"zero byte", "{client.nul}", nil, true},
		{"delete", "{client.del}", nil, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHeaderTemplate("x-tenant", test.template)
			out := http.Header{}
			err := h.set(context.WithValue(t.Context(), caddy.ReplacerCtxKey, repl), out)
			if (err != nil) != test.wantErr {
				t.Fatalf("got error %v, want one: %v", err, test.wantErr)
			}
			if err != nil && (strings.ContainsAny(err.Error(), "\r\n\x00\x7f") || strings.Contains(err.Error(), "Injected")) {
				t.Errorf("got error %q, want it not to quote the value", err)
			}
			if got := out["X-Tenant"]; !slices.Equal(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

// The reverse proxy sends the same request to the next upstream, and logs it.
func TestCallersRequestIsUnchanged(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	transport := newTransport(t, expand(`token_url $AUTH/token
		client_id gateway
		client_secret s
		tenant acme
		header X-User someone`, "$AUTH", auth.URL))

	var before, after *http.Request
	var headerBefore http.Header
	spy := roundTripFunc(func(req *http.Request) (*http.Response, error) {
		before, after, headerBefore = new(http.Request), req, req.Header.Clone()
		*before = *req
		return transport.RoundTrip(req)
	})
	for _, refusals := range []int{0, 1, 2} { // with and without a retry
		req := httptest.NewRequest(http.MethodPost, "http://gateway.test/path", strings.NewReader("body"))
		req.Header.Set("Authorization", "Bearer of-the-client")
		req.Header.Set("X-Tenant-Id", "other")
		req.Header["x_tenant.id"] = []string{"alias"}
		left := refusals
		up.script(func(w http.ResponseWriter, r *http.Request) bool {
			if left == 0 {
				return false
			}
			left--
			up.record(r)
			refuse(w, http.StatusUnauthorized)
			return true
		})
		if _, err := proxyThrough(t, spy, up.addr, req); err != nil {
			t.Fatalf("got %v, want no error", err)
		}
		got := up.last(t)
		got.wantHeader(t, "X-Tenant-Id", "acme")
		got.wantHeader(t, "X-User", "someone")
		for _, values := range got.header {
			for _, value := range values {
				if value == "alias" || value == "other" || strings.Contains(value, "of-the-client") {
					t.Errorf("got the client's own %q at the upstream, want it removed", value)
				}
			}
		}
		if !reflect.DeepEqual(after.Header, headerBefore) {
			t.Errorf("header after %d refusals: got %v, want %v", refusals, after.Header, headerBefore)
		}
		if after.Body != before.Body || after.URL != before.URL || after.Host != before.Host || after.ContentLength != before.ContentLength {
			t.Errorf("request after %d refusals: got %v, want it unchanged", refusals, after)
		}
	}
}
