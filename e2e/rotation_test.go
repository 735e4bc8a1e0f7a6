package e2e

import (
	"crypto"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// rotation replaces what a client authenticates with.
type rotation struct {
	name  string
	start client // the client before
	next  client // and after, under the same id

	settings []string
	replace  func(t *testing.T) // makes the gateway's files hold the next
	certs    int                // how many the upstream sees; 0: it doesn't ask

	upstream *upstream
	bound    *tlsUpstream // the same, if it asks for certificates
}

// TestRotationUnderLoad replaces keys, certificates, secrets and assertions
// while requests go through and tokens are renewed. The order is the
// unfavourable one: the server knows only the new one before the gateway does,
// and refuses a renewal. The token at hand bridges that; no request fails, and
// nobody reloads the gateway.
//
// One after the other: all loads at once are more than a busy machine can carry,
// and then the requests that are waiting only grow.
func TestRotationUnderLoad(t *testing.T) {
	as := startAuthServer(t, 5*time.Second)
	for _, r := range []*rotation{rotateKey(t, as), rotateCertificate(t, as), rotateSecret(t, as), rotateAssertions(t, as)} {
		t.Run(r.name, func(t *testing.T) { r.run(t, as) })
	}
}

func (r *rotation) run(t *testing.T, as *authServer) {
	as.register(t, r.start)
	gw := startRoutes(t, []route{r.serve(t, as)})
	gw.get(t, routePath(0), 200)
	requests := &steadyLoad{url: gw.url + routePath(0), rate: 100}
	requests.start()
	stop := sync.OnceValue(requests.stop)
	t.Cleanup(func() { stop() })

	as.register(t, r.next)
	replaced, granted := false, 0 // tokens, until then
	await(t, "second renewal", func() bool {
		stats := as.stats(t)
		if !replaced && stats.Refused[r.start.ID] > 0 {
			r.replace(t)
			replaced, granted = true, stats.Granted[r.start.ID]
		}
		// By the second renewal, nothing is left of what was before.
		return replaced && stats.Granted[r.start.ID] >= granted+2
	})

	all := stop()
	lost := all.lost()
	stats := as.stats(t)
	t.Logf("%d requests, the longest %v; %v; tokens granted %d, refused %d",
		len(all), all.longest(), r.upstream, stats.Granted[r.start.ID], stats.Refused[r.start.ID])
	for _, o := range lost[:min(len(lost), 5)] {
		t.Errorf("request %v after the first: %v", o.due.Sub(all[0].due), o)
	}
	if len(lost) != 0 {
		t.Errorf("%d of %d requests were lost, want none", len(lost), len(all))
	}
	proto := "HTTP/1.1"
	if r.bound != nil {
		proto = "HTTP/2.0"
		r.bound.wantCertificates(t, r.certs)
	}
	r.upstream.wantAccepted(t, len(all)+1, proto)
}

// serve starts the upstream, and returns the way to it.
func (r *rotation) serve(t *testing.T, as *authServer) route {
	t.Helper()
	if r.certs > 0 {
		r.bound = newTLSUpstream(t, as, r.start, true)
		r.upstream = r.bound.upstream
		return r.bound.route(as, r.settings)
	}
	r.upstream = newUpstream(t, as, r.start)
	return route{client: r.start, to: r.upstream.serve(t), settings: r.settings}
}

// await fails the test if the condition isn't met in time.
func await(t *testing.T, what string, met func() bool) {
	t.Helper()
	const limit = 30 * time.Second
	deadline := time.Now().Add(limit)
	for !met() {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within %v", what, limit)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func rotateKey(t *testing.T, as *authServer) *rotation {
	before, after := newKey(t, "ES256"), newKey(t, "ES256")
	c := client{ID: "key", Method: "private_key_jwt", Keys: keySet(before, "")}
	next := c
	next.Keys = keySet(after, "")
	file := writeFile(t, "key.pem", pkcs8(t, before))
	return &rotation{
		name: "private key", start: c, next: next,
		settings: []string{as.tokenURL(), "private_key " + file},
		replace:  func(t *testing.T) { replaceFile(t, file, pkcs8(t, after)) },
	}
}

// rotateCertificate has each token go out over a connection with the
// certificate that it is bound to, the old one as well as the new one.
func rotateCertificate(t *testing.T, as *authServer) *rotation {
	before, after := selfSigned(t, "before"), selfSigned(t, "after")
	c := client{ID: "certificate", Method: "self_signed_tls_client_auth", Keys: before.keys(), Bound: true}
	next := c
	next.Keys = after.keys()
	files := before.write(t)
	return &rotation{
		name: "client certificate", start: c, next: next,
		settings: []string{"token_url " + as.mtls + "/token", files.setting(), "bind_certificate"},
		replace:  func(t *testing.T) { files.replace(t, after) },
		certs:    2,
	}
}

func rotateSecret(t *testing.T, as *authServer) *rotation {
	c := client{ID: "secret", Secret: "the secret before the rotation", Method: "client_secret_basic"}
	next := c
	next.Secret = "the secret after the rotation"
	file := writeFile(t, "secret", []byte(c.Secret+"\n"))
	return &rotation{
		name: "secret file", start: c, next: next,
		settings: []string{as.tokenURL(), "client_secret {file." + file + "}"},
		replace:  func(t *testing.T) { replaceFile(t, file, []byte(next.Secret+"\n")) },
	}
}

// rotateAssertions has the one who writes the assertions change its key.
// There is a new one for each token request, since the server takes none twice.
func rotateAssertions(t *testing.T, as *authServer) *rotation {
	before, after := newKey(t, "ES256"), newKey(t, "ES256")
	c := client{ID: "assertion", Method: "private_key_jwt", Keys: keySet(before, "")}
	next := c
	next.Keys = keySet(after, "")
	file := filepath.Join(t.TempDir(), "token")
	w := &assertionWriter{file: file, clientID: c.ID, audience: as.issuer, key: before}
	w.run(t)
	return &rotation{
		name: "assertion file", start: c, next: next,
		settings: []string{as.tokenURL(), "assertion_file " + file},
		replace:  func(*testing.T) { w.use(after) },
	}
}

// assertionWriter keeps an assertion fresh, as an agent beside the gateway does.
type assertionWriter struct {
	file, clientID, audience string

	mu  sync.Mutex
	key crypto.Signer
}

// run writes one assertion at once, and others until the test ends.
func (w *assertionWriter) run(t *testing.T) {
	t.Helper()
	if err := w.write(); err != nil {
		t.Fatal(err)
	}
	var (
		writing sync.WaitGroup
		ended   = make(chan struct{})
		ticker  = time.NewTicker(50 * time.Millisecond)
	)
	writing.Go(func() {
		for {
			select {
			case <-ticker.C:
				if err := w.write(); err != nil {
					t.Errorf("writing an assertion: %v", err)
				}
			case <-ended:
				return
			}
		}
	})
	t.Cleanup(func() {
		ticker.Stop()
		close(ended)
		writing.Wait()
	})
}

func (w *assertionWriter) write() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	data, err := signAssertion(w.key, w.clientID, w.audience, time.Now().Add(time.Minute))
	if err != nil {
		return err
	}
	return replace(w.file, data)
}

// use has the assertions signed with another key from now on.
func (w *assertionWriter) use(key crypto.Signer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.key = key
}
