// The upstreams, and the certificates that they show.

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// An origin is the upstreams of all clients. Each answers what has its client's token and
// tenant.
type origin struct {
	authority *authority
	clients   map[string]oauthClient // by the addresses of their upstreams
	proto     atomic.Int64           // the major version of HTTP in the last request
}

// page is the body of each good answer: 1 KiB.
var page = []byte(strings.Repeat("0123456789abcde\n", 64))

// denied begins the paths that no token opens.
const denied = "/denied/"

// ServeHTTP implements http.Handler.
func (o *origin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	o.proto.Store(int64(r.ProtoMajor))
	client := o.clients[r.Context().Value(http.LocalAddrContextKey).(net.Addr).String()]
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !o.authority.accepts(token, client) || r.Header.Get("X-Tenant") != client.Tenant || strings.HasPrefix(r.URL.Path, denied) {
		w.Header().Set("Www-Authenticate", `Bearer error="invalid_token"`)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	buf := copyBuffers.Get().(*[64 << 10]byte)
	_, err := io.CopyBuffer(onlyWriter{}, r.Body, buf[:])
	copyBuffers.Put(buf)
	if err != nil {
		return // the gateway has gone away
	}
	w.Header().Set("Content-Type", "text/plain")
	_, _ = w.Write(page)
}

// Uploads are many and large: they share the buffers that they are read with.
var copyBuffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// onlyWriter is io.Discard without its own buffers of 8 KiB.
type onlyWriter struct{}

// Write implements io.Writer.
func (onlyWriter) Write(p []byte) (int, error) { return len(p), nil }

// originAddress returns the address of the upstream with this number. All of them have
// one port, and so one listener: 10,000 would leave too few ports and files for
// connections.
func originAddress(i, port int) string {
	if i == 0 {
		return fmt.Sprintf("127.0.0.1:%d", port)
	}
	return fmt.Sprintf("127.1.%d.%d:%d", i/250, 1+i%250, port)
}

// serve serves handler at one port of all addresses of this machine's loopback interface.
// With a certificate, it speaks TLS.
func serve(handler http.Handler, cert *tls.Certificate, http2 bool) (port int, server *http.Server, err error) {
	config := net.ListenConfig{Control: func(_, _ string, conn syscall.RawConn) (err error) {
		if controlErr := conn.Control(func(fd uintptr) { err = syscall.BindToDevice(int(fd), "lo") }); controlErr != nil {
			return controlErr
		}
		return err
	}}
	ln, err := config.Listen(context.Background(), "tcp4", ":0")
	if err != nil {
		return 0, nil, err
	}
	port = ln.Addr().(*net.TCPAddr).Port
	server = &http.Server{
		Handler:           handler,
		ErrorLog:          log.New(io.Discard, "", 0), // gateways that end leave half a handshake
		ReadHeaderTimeout: time.Minute,
	}
	if cert == nil {
		go func() { _ = server.Serve(ln) }()
		return port, server, nil
	}
	server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS12}
	server.Protocols = new(http.Protocols)
	server.Protocols.SetHTTP1(!http2)
	server.Protocols.SetHTTP2(http2)
	go func() { _ = server.ServeTLS(ln, "", "") }()
	return port, server, nil
}

// newCertificate returns a certificate for this machine, and the PEM of the CA that has
// signed it.
func newCertificate() (cert tls.Certificate, ca []byte, err error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return cert, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return cert, nil, err
	}
	now := time.Now()
	issuer := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench CA"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"},
		NotBefore: issuer.NotBefore, NotAfter: issuer.NotAfter,
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	caDER, err := x509.CreateCertificate(rand.Reader, issuer, issuer, &caKey.PublicKey, caKey)
	if err != nil {
		return cert, nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, issuer, &key.PublicKey, caKey)
	if err != nil {
		return cert, nil, err
	}
	cert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}), nil
}
