package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// injectorListener hands connections to the injector's HTTP server, unless
// the fault that is on deals with them.
type injectorListener struct {
	net.Listener
	inj *injector
}

// Accept implements net.Listener.
func (l *injectorListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		tracked := &injectorConn{TCPConn: conn.(*net.TCPConn), inj: l.inj}
		l.inj.mu.Lock()
		l.inj.conns[tracked] = true
		f := l.inj.fault
		l.inj.mu.Unlock()
		if f == nil || f.accept == nil {
			return tracked, nil
		}
		l.inj.count()
		go f.accept(tracked)
	}
}

// injectorConn is a connection that the injector can break from outside.
type injectorConn struct {
	*net.TCPConn
	inj *injector
}

// Close implements net.Conn.
func (c *injectorConn) Close() error {
	c.inj.mu.Lock()
	delete(c.inj.conns, c)
	c.inj.mu.Unlock()
	return c.TCPConn.Close()
}

// reset ends the connection the hard way.
func (c *injectorConn) reset() {
	c.SetLinger(0)
	c.Close()
}

// closeConns breaks all open connections.
func (inj *injector) closeConns() {
	inj.mu.Lock()
	var open []*injectorConn
	for c := range inj.conns {
		open = append(open, c)
	}
	inj.mu.Unlock()
	for _, c := range open {
		c.reset()
	}
}

// newCertificate returns a certificate for the loopback address that nobody
// but itself has signed, and the file to trust it by.
func newCertificate(t *testing.T) (cert tls.Certificate, trust string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		Subject:               pkix.Name{CommonName: "fault injector"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	trust = filepath.Join(t.TempDir(), "injector.pem")
	block := &pem.Block{Type: "CERTIFICATE", Bytes: der}
	if err := os.WriteFile(trust, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, trust
}
