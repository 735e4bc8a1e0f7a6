// What a fleet shares: the records, and who can read them.

package outboundauth

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/clientcert"
	"github.com/outboundauth/caddy-outbound-auth/internal/keytest"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
	"github.com/outboundauth/caddy-outbound-auth/internal/shelf"
	"github.com/outboundauth/caddy-outbound-auth/internal/shelftest"
)

// Which token of another instance is taken: a newer one that is good for longer.
func TestWhichSharedTokenIsTaken(t *testing.T) {
	const life = time.Hour
	for _, test := range []struct {
		name          string
		sent, current time.Duration // how long ago; current 0: there is none
		same          bool          // the same token
		notBefore     time.Duration // how long ago an operator took a token out of use; 0: never
		lifetime      time.Duration
		want          bool
	}{
		{"there is none", 10 * time.Minute, 0, false, 0, life, true},
		{"none, and it is stale", 50 * time.Minute, 0, false, 0, life, true},
		{"none, and it is in its reserve", life - time.Second, 0, false, 0, life, false},
		{"none, and it has expired", 2 * time.Hour, 0, false, 0, life, false},
		{"none, and the server named no lifetime", time.Minute, 0, false, 0, 0, true},
		{"none, and it is too old without a lifetime", time.Hour, 0, false, 0, 0, false},
		{"a newer one", 10 * time.Minute, 20 * time.Minute, false, 0, life, true},
		{"a newer one that is stale", 50 * time.Minute, 55 * time.Minute, false, 0, life, false},
		{"a newer one that is stale, after the end", 50 * time.Minute, 2 * time.Hour, false, 0, life, true},
		{"an older one", 20 * time.Minute, 10 * time.Minute, false, 0, life, false},
		{"an older one after the end", 3 * time.Hour, 2 * time.Hour, false, 0, 4 * time.Hour, false},
		{"as old", 10 * time.Minute, 10 * time.Minute, false, 0, life, false},
		{"the same one", 10 * time.Minute, 20 * time.Minute, true, 0, life, false},
		{"clocks that differ", -4 * time.Second, 0, false, 0, life, true},
		{"from the future", -6 * time.Second, 0, false, 0, life, false},
		{"taken out of use", 10 * time.Minute, 0, false, 9 * time.Minute, life, false},
		{"newer than what was taken out of use", 10 * time.Minute, 0, false, 11 * time.Minute, life, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(24 * time.Hour) // clocks do not begin today
				f := newFleet(t, new(shelftest.Storage), 1)
				n := f.nodes[0]
				n.share(t.Context()).store(t.Context(), grant{accessToken: "canary-shared", lifetime: test.lifetime, issued: time.Now().Add(-test.sent)}, nil)
				a := &attempts{requester: n, life: testLife, shared: n.share(t.Context())}
				a.notBefore = func() time.Time {
					if test.notBefore == 0 {
						return time.Time{}
					}
					return time.Now().Add(-test.notBefore)
				}
				if test.current != 0 {
					value := "canary-own"
					if test.same {
						value = "canary-shared"
					}
					a.current = testLife.token(grant{accessToken: value, lifetime: life, issued: time.Now().Add(-test.current)}, time.Now())
					a.granted = redact.Secrets{value}
				}
				got, _ := a.lookFor(t.Context())
				if (got != nil) != test.want {
					t.Fatalf("got a token: %t, want %t", got != nil, test.want)
				}
				if got != nil && (got.value != "canary-shared" || !got.grant.taken || got.grant.issued.After(time.Now())) {
					t.Errorf("got %q, taken %t, issued in the future %t", got.value, got.grant.taken, got.grant.issued.After(time.Now()))
				}
				if warned := len(f.warnings) > 0; warned != (test.sent < -maxClockSkew) {
					t.Errorf("got the warnings %v", f.warnings)
				}
			})
		})
	}
}

// Never an older token over a newer one, but over one that nobody can use.
func TestNewerRecordStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, new(shelftest.Storage), 1)
		s := f.nodes[0].share(t.Context())
		store := func(token string, ago time.Duration) {
			s.store(t.Context(), grant{accessToken: token, lifetime: time.Hour, issued: time.Now().Add(-ago)}, nil)
		}
		want := func(token string) {
			t.Helper()
			if got, err := s.look(t.Context(), time.Now()); err != nil || got.Token != token {
				t.Errorf("got %q, err %v, want %q", got.Token, err, token)
			}
		}
		store("canary-1", time.Minute)
		store("canary-0", 2*time.Minute)
		want("canary-1")
		store("canary-2", 0)
		want("canary-2")
		store("canary-future", -time.Hour)
		want("")
		store("canary-3", 0)
		want("canary-3")

		// The clock of another instance is ahead. What it has stored was revoked, and replaced here.
		store("canary-ahead", -3*time.Second)
		want("canary-ahead")
		s.store(t.Context(), grant{accessToken: "canary-4", lifetime: time.Hour, issued: time.Now()}, redact.Secrets{"canary-ahead"})
		want("canary-4")
	})
}

// sharingClient returns a client that shares its token in a storage.
func sharingClient(t *testing.T, c Credentials, storage *shelftest.Storage) *client {
	t.Helper()
	if c.ShareTokens == nil {
		c.ShareTokens = new(ShareTokens)
	}
	cl := newTestClient(t, c, answering(http.StatusOK, strings.Replace(goodAnswer, "t0ken", canaryToken, 1)))
	cl.endpoint.sharing = &sharing{
		shelf: shelf.New(storage, shelf.News{Failed: func(error) {}, Back: func() {}, Lockless: func(error) {}}), server: json.RawMessage("null"), logger: zap.NewNop(),
		count: func(string) {},
	}
	return cl
}

// Whoever reads the storage learns nothing, and whoever writes to it can only take away.
func TestStorageKnowsNothing(t *testing.T) {
	storage := new(shelftest.Storage)
	cl := sharingClient(t, Credentials{Name: newName(), TokenURL: tokenPlace, ClientID: "canary-client-id", ClientSecret: canarySecret + " of more than twenty bytes"}, storage)
	tok, _, err := cl.source.Token(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return len(storage.Values()) == 1 && storage.Locks() == 0 }, "a record, and no lock")
	s := cl.endpoint.share(t.Context())
	s.storeFailure(t.Context(), time.Now().Add(time.Minute))
	values := storage.Values()
	if len(values) != 2 {
		t.Fatalf("got %d records, want one of the token and one of the failure", len(values))
	}
	for key, value := range values {
		for _, text := range []string{key, string(value)} {
			wantNoCanaryIn(t, text)
			for _, known := range []string{"canary-client-id", "as.example.com", "token_url", tok.value} {
				if strings.Contains(text, known) {
					t.Errorf("%q is in the storage", known)
				}
			}
		}
	}
	look := func() (token string, failed bool) {
		got, err := s.look(t.Context(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		other := *s
		other.by = "another instance"
		return got.Token, other.failure(t.Context(), time.Now(), sharedToken{}).Until != 0
	}
	if token, failed := look(); token != tok.value || !failed {
		t.Fatalf("got %q, failed %t, want what was stored", token, failed)
	}
	for key, value := range values {
		for i := range 8 * len(value) {
			flipped := bytes.Clone(value)
			flipped[i/8] ^= 1 << (i % 8)
			changed := maps.Clone(values)
			changed[key] = flipped
			storage.Replace(changed)
			token, failed := look()
			if (key == s.token && token != "") || (key == s.failed && failed) {
				t.Fatalf("bit %d of %s: got a record that nobody has stored", i, key)
			}
		}
	}
	storage.Replace(map[string][]byte{s.token: values[s.failed], s.failed: values[s.token]})
	if token, failed := look(); token != "" || failed {
		t.Error("got records under each other's name")
	}
	other := sharingClient(t, Credentials{Name: newName(), TokenURL: tokenPlace, ClientID: "canary-client-id", ClientSecret: canarySecret + " of another fleet altogether"}, storage)
	s2 := other.endpoint.share(t.Context())
	if s2.token == s.token || s2.failed == s.failed {
		t.Error("two fleets with other secrets have records of one name")
	}
	storage.Replace(map[string][]byte{s2.token: values[s.token], s2.failed: values[s.failed]})
	s = s2
	if token, failed := look(); token != "" || failed {
		t.Error("got records of another secret")
	}
}

// The key is what all instances have.
func TestSharedKey(t *testing.T) {
	dir := t.TempDir()
	key := keytest.New(t)
	pkcs8 := writeFile(t, filepath.Join(dir, "key"), keytest.PKCS8(t, key))
	certificate := writeFile(t, filepath.Join(dir, "crt"), keytest.CertificatePEM(t, key))
	short := writeFile(t, filepath.Join(dir, "short"), []byte("nineteen characters"))
	own := writeFile(t, filepath.Join(dir, "own"), []byte("a key of more than twenty characters"))
	for _, test := range []struct {
		name string
		c    Credentials
		want string // error
	}{
		{"a secret", Credentials{ClientSecret: "a secret of 20 bytes"}, ""},
		{"a short secret", Credentials{ClientSecret: "a secret of 19 byte"}, "the client_secret is shorter than 20 bytes"},
		{"a short secret with a key", Credentials{ClientSecret: "s", ShareTokens: &ShareTokens{Key: "{file." + own + "}"}}, ""},
		{"a short key", Credentials{ClientSecret: "a secret of 20 bytes", ShareTokens: &ShareTokens{Key: "{file." + short + "}"}}, "the key is shorter than 20 bytes"},
		{"a key that is missing", Credentials{ClientSecret: "a secret of 20 bytes", ShareTokens: &ShareTokens{Key: "{file." + dir + "/nowhere}"}}, "share_tokens"},
		{"a private key", Credentials{AuthMethod: authKeyJWT, PrivateKey: pkcs8}, ""},
		{"a certificate", Credentials{AuthMethod: authTLS, ClientCertificate: &ClientCertificate{Certificate: certificate, Key: pkcs8}}, ""},
		{"none, with a key", Credentials{AuthMethod: authNone, ShareTokens: &ShareTokens{Key: "{file." + own + "}"}}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := test.c
			c.TokenURL, c.ClientID = "https://auth.example.com/token", "gateway"
			if c.ShareTokens == nil {
				c.ShareTokens = new(ShareTokens)
			}
			wantUsable(t, "settings", c)
			r, err := c.resolve(t.Context(), new(clientcert.Cache))
			if err != nil {
				t.Fatal(err)
			}
			got, err := c.sharedKey(r)
			wantError(t, err, test.want)
			if err == nil && len(got) < minSharedKey {
				t.Errorf("got a key of %d bytes", len(got))
			}
		})
	}
}

// Instances share only if they agree on what is granted, and by whom. Two of them with different
// methods of authentication do.
func TestWhoSharesWithWhom(t *testing.T) {
	dir := t.TempDir()
	base := Credentials{
		TokenURL: tokenPlace, ClientID: "gateway", ClientSecret: canarySecret + " of more than twenty bytes", ShareTokens: new(ShareTokens),
		Scopes: []string{"a", "b"}, Audience: []string{"a"}, Params: map[string]string{"a": "1"},
	}
	name := func(c Credentials, server json.RawMessage) string {
		t.Helper()
		cl := sharingClient(t, c, new(shelftest.Storage))
		cl.endpoint.sharing.server = server
		return cl.endpoint.share(t.Context()).token
	}
	null := json.RawMessage("null")
	first := name(base, null)
	for what, change := range map[string]struct {
		change func(*Credentials)
		same   bool
	}{
		"auth_method":         {func(c *Credentials) { c.AuthMethod = authPost }, true},
		"the order of scopes": {func(c *Credentials) { c.Scopes = []string{"b", "a"} }, true},
		"refresh_before":      {func(c *Credentials) { c.RefreshBefore = 1e9 }, true},
		"tenant":              {func(c *Credentials) { c.Tenant = &Tenant{Value: "acme"} }, true},
		"name":                {func(c *Credentials) { c.Name = "another" }, true},
		"client_secret":       {func(c *Credentials) { c.ClientSecret += "!" }, false},
		"client_id":           {func(c *Credentials) { c.ClientID = "another" }, false},
		"token_url":           {func(c *Credentials) { c.TokenURL += "2" }, false},
		"scopes":              {func(c *Credentials) { c.Scopes = []string{"a"} }, false},
		"audience":            {func(c *Credentials) { c.Audience = []string{"b"} }, false},
		"resource":            {func(c *Credentials) { c.Resource = []string{"https://b.example.com"} }, false},
		"param":               {func(c *Credentials) { c.Params = map[string]string{"a": "2"} }, false},
		"header":              {func(c *Credentials) { c.TokenRequestHeaders = map[string]string{"X-Tenant": "a"} }, false},
		"token_response":      {func(c *Credentials) { c.TokenResponse = &TokenResponse{AccessToken: "/a"} }, false},
	} {
		c := base
		change.change(&c)
		if got := name(c, null); (got == first) != change.same {
			t.Errorf("%s: one record for both: %t, want %t", what, got == first, change.same)
		}
	}

	// The JWT of a file is another one each hour, but it says whose it is.
	jwtOf := func(claims string) string {
		return writeFile(t, filepath.Join(dir, "jwt"), []byte(base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`))+"."+base64.RawURLEncoding.EncodeToString([]byte(claims))+".c2ln"))
	}
	byFile := Credentials{TokenURL: tokenPlace, ClientID: "gateway", AuthMethod: authKeyJWT, ShareTokens: &ShareTokens{Key: "a key of more than twenty characters"}}
	alice := func(claims string) string {
		c := byFile
		c.AssertionFile = jwtOf(claims)
		return name(c, null)
	}
	one := alice(`{"iss":"a","sub":"alice","jti":"1","exp":4102444800}`)
	if one != alice(`{"iss":"a","sub":"alice","jti":"2","exp":4102444801}`) {
		t.Error("two JWTs of one subject have different records")
	}
	for _, claims := range []string{`,"scope":"all"`, `,"aud":"another"`, `,"target_audience":"another"`} {
		if one == alice(`{"iss":"a","sub":"alice"`+claims+`,"jti":"1","exp":4102444800}`) {
			t.Errorf("JWTs with and without %s have one record", claims)
		}
	}
	if one != alice(`{"iss":"a","sub":"alice","exp":4102444801,"kubernetes.io":{"pod":{"name":"a"}}}`) {
		t.Error("the JWTs of two pods have different records")
	}
	if one == alice(`{"iss":"a","sub":"bobby","jti":"1","exp":4102444800}`) || one == alice(`{"iss":"b","sub":"alice","jti":"1","exp":4102444800}`) {
		t.Error("the JWTs of two subjects, or of two issuers, have one record")
	}

	// The same file name, with another content.
	ca := filepath.Join(dir, "ca.pem")
	transport := reverseproxy.HTTPTransport{TLS: &reverseproxy.TLSConfig{CARaw: json.RawMessage(fmt.Sprintf(`{"provider":"file","pem_files":[%q]}`, ca))}}
	var names []string
	for _, content := range []string{"one", "another", "one"} {
		writeFile(t, ca, []byte(content))
		server, err := contentIdentity(encode(t, transport))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(server, []byte(dir)) {
			t.Errorf("got %s, want no name of a file", server)
		}
		names = append(names, name(base, server))
	}
	transport.TLS.CARaw = json.RawMessage(fmt.Sprintf(`{"provider":"combined","sources":[{"provider":"file","pem_files":[%q]}]}`, ca))
	nested, err := contentIdentity(encode(t, transport))
	if err != nil || bytes.Contains(nested, []byte(dir)) {
		t.Errorf("got %s, err %v, want no name of a file", nested, err)
	}
	transport.TLS.CARaw = json.RawMessage(`{"provider":"pki_root","authority":["local"]}`)
	_, err = contentIdentity(encode(t, transport))
	wantError(t, err, "nobody can tell whether all instances trust the same CA")
	if names[0] == names[1] || names[0] != names[2] || slices.Contains(names, first) {
		t.Errorf("got the records %q for CAs one, another, one", names)
	}
}

// Operators see what is shared, and nothing that is secret.
func TestSharingIsShown(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g, name := newOperableGateway(t), newName()
	dir := t.TempDir()
	g.global = "storage file_system " + dir
	g.load(proxySite(up, auth, "name "+name+"\nshare_tokens a-key-of-the-whole-fleet"))
	g.get().want(t, http.StatusOK)
	counted := func(want series) {
		t.Helper()
		eventually(t, func() bool {
			got := g.scrape().of(name)
			for series, value := range want {
				if got[series] != value {
					return false
				}
			}
			return true
		}, fmt.Sprint(want))
	}
	counted(series{
		`shared_tokens_total{result="stored"}`: 1, `shared_tokens_total{result="missing"}`: 1, `shared_tokens_total{result="taken"}`: 0,
		`shared_tokens_total{result="unreadable"}`: 0, `shared_tokens_total{result="unavailable"}`: 0, `shared_tokens_total{result="lock_timeout"}`: 0,
	})
	if body := g.ask(http.MethodGet, "/oauth2/clients?name="+name).body; !strings.Contains(body, `"share_tokens":true`) || !strings.Contains(body, `"shared":"own"`) {
		t.Errorf("got %s, want that the token is shared, and its own", body)
	}
	records := func() (n int) {
		files, _ := filepath.Glob(filepath.Join(dir, "oauth2", "tokens", "*"))
		return len(files)
	}
	if records() != 1 {
		t.Errorf("got %d records, want one", records())
	}

	// An operator renews, and takes out of use.
	source := sourceOf(t, name)
	source.rested()
	path := "/oauth2/clients/" + g.only().ID
	g.ask(http.MethodPost, path+"/renew").want(t, http.StatusOK)
	counted(series{`shared_tokens_total{result="stored"}`: 2, `shared_tokens_total{result="missing"}`: 1})
	source.rested()
	g.ask(http.MethodDelete, path+"/token").want(t, http.StatusOK)
	if records() != 0 {
		t.Errorf("got %d records of a token that was taken out of use, want none", records())
	}
	g.get().want(t, http.StatusOK)
	counted(series{`shared_tokens_total{result="stored"}`: 3, `shared_tokens_total{result="taken"}`: 0})
	wantNoCanaryIn(t, g.logs())
}

// A record whose key can't be had stays, and the operator is told.
func TestForgetWithoutTheKey(t *testing.T) {
	file := writeFile(t, filepath.Join(t.TempDir(), "key"), []byte("a key of more than twenty characters"))
	c := Credentials{TokenURL: tokenPlace, ClientID: "gateway", ClientSecret: "s", ShareTokens: &ShareTokens{Key: "{file." + file + "}"}}
	storage := new(shelftest.Storage)
	cl := sharingClient(t, c, storage)
	if _, _, err := cl.source.Token(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return len(storage.Values()) == 1 }, "a record")
	writeFile(t, file, nil)
	wantError(t, cl.source.rested().Forget(t.Context()), "others may still take it")
	writeFile(t, file, []byte("a key of more than twenty characters"))
	if err := cl.source.rested().Forget(t.Context()); err != nil || len(storage.Values()) > 0 {
		t.Errorf("Forget() = %v, want no record", err)
	}
}

// Clients that inherit one token_transport share it. One that may not be shared is an error for
// those that share, whichever was opened first.
func TestTransportThatCannotBeCompared(t *testing.T) {
	for _, blocks := range [][]string{{"share_tokens off", "share_tokens"}, {"share_tokens", "share_tokens off"}} {
		g := newGateway(t)
		g.global = "skip_install_trust\npki {\nca local {\nname test\n}\n}\nstorage file_system " + t.TempDir()
		err := g.tryLoad(fmt.Sprintf(`reverse_proxy 127.0.0.1:9000 127.0.0.1:9001 {
			transport oauth2 {
				token_url https://as.example.com/token
				client_secret a-secret-of-more-than-twenty-bytes
				token_transport {
					tls_trust_pool pki_root local
				}
				upstream 127.0.0.1:9000 {
					client_id a
					%s
				}
				upstream 127.0.0.1:9001 {
					client_id a
					%s
				}
			}
		}`, blocks[0], blocks[1]))
		wantError(t, err, "nobody can tell whether all instances trust the same CA")
	}
}
