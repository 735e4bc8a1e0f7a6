package e2e

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The upstreams. Which of them gets requests, and which tokens, is in attackconfig_test.go.
const (
	attackSockets = "ab"     // on Unix sockets
	attackPorts   = "cdefgr" // on ports
)

// attackVersions is how many clients each upstream has. Each config takes another.
const attackVersions = 3

// attackField is all around the gateway that is attacked.
type attackField struct {
	found     *findings
	played    *tally // tricks of upstreams
	issuer    *attackIssuer
	tokenURL  string
	upstreams map[byte]*attackUpstream
	env       []string // the secrets
}

// newAttackField starts the authorization server and the upstreams.
func newAttackField(t *testing.T) *attackField {
	t.Helper()
	found := newFindings()
	f := &attackField{
		found:     found,
		played:    newTally(),
		issuer:    newAttackIssuer(found),
		upstreams: make(map[byte]*attackUpstream),
		env:       []string{"ATTACK_FORM=" + oddCanary(secretOwner, 0)},
	}
	tokens := httptest.NewServer(f.issuer)
	closeAtEnd(t, tokens)
	f.tokenURL = tokens.URL + "/token"
	f.registerClients()

	listeners := make(map[byte]net.Listener)
	dir, err := os.MkdirTemp("", "") // the path of a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	for _, owner := range []byte(attackSockets) {
		listeners[owner] = listen(t, "unix", filepath.Join(dir, string(owner)))
	}
	for _, owner := range []byte(attackPorts) {
		listeners[owner] = listen(t, "tcp", "127.0.0.1:0")
	}
	for owner, listener := range listeners {
		f.serve(t, owner, listener, listeners)
	}
	return f
}

func listen(t *testing.T, network, address string) net.Listener {
	t.Helper()
	listener, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	return listener
}

// registerClients has the server know the clients, and puts their secrets into the
// gateway's environment.
func (f *attackField) registerClients() {
	for n, owner := range []byte(attackSockets + attackPorts + "n") {
		for version := range attackVersions {
			secret := oddCanary(secretOwner, 1+n*attackVersions+version)
			f.issuer.register(clientID(owner, version), secret)
			f.env = append(f.env, secretName(owner, version)+"="+secret)
		}
	}
}

func clientID(owner byte, version int) string { return fmt.Sprintf("%c-%d", owner, version) }

// secretName returns the environment variable that has the secret of a client.
func secretName(owner byte, version int) string {
	return strings.ToUpper(fmt.Sprintf("ATTACK_%c_%d", owner, version))
}

// serve starts the upstream of an owner. It speaks HTTP/1.1, but for e.
func (f *attackField) serve(t *testing.T, owner byte, listener net.Listener, all map[byte]net.Listener) {
	var elsewhere []string
	for _, other := range []byte("cdeg") {
		if other != owner {
			elsewhere = append(elsewhere, all[other].Addr().String())
		}
	}
	u := &attackUpstream{
		owner:       owner,
		address:     listener.Addr().String(),
		issuer:      f.issuer,
		found:       f.found,
		unreachable: strings.ContainsRune("gr", rune(owner)),
		tokenless:   strings.ContainsRune("df", rune(owner)),
		tricks:      newTricks(owner, elsewhere),
		played:      f.played,
	}
	if listener.Addr().Network() == "unix" {
		u.address = "unix/" + u.address
	}
	f.upstreams[owner] = u

	srv := httptest.NewUnstartedServer(u)
	srv.Listener.Close()
	srv.Listener = listener
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // of clients that leave
	if owner == 'e' {
		srv.Config.Protocols = new(http.Protocols)
		srv.Config.Protocols.SetUnencryptedHTTP2(true)
	}
	srv.Start()
	closeAtEnd(t, srv)
}
