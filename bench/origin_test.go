package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestOriginAnswersItsClientAlone(t *testing.T) {
	a := newAuthority([]oauthClient{alice, bob}, time.Hour)
	local := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 80}
	handler := &origin{authority: a, clients: map[string]oauthClient{local.String(): {ID: "alice", Tenant: "tenant-a"}}}
	for _, c := range []struct {
		path, token, tenant string
		want                int
	}{
		{"/orders", a.issue(alice), "tenant-a", http.StatusOK},
		{"/orders", a.issue(bob), "tenant-a", http.StatusUnauthorized},
		{"/orders", a.issue(alice), "tenant-b", http.StatusUnauthorized},
		{"/orders", "", "tenant-a", http.StatusUnauthorized},
		{denied + "x", a.issue(alice), "tenant-a", http.StatusUnauthorized},
	} {
		req := httptest.NewRequest(http.MethodPost, c.path, strings.NewReader("body"))
		req.Header.Set("Authorization", "Bearer "+c.token)
		req.Header.Set("X-Tenant", c.tenant)
		req = req.WithContext(context.WithValue(req.Context(), http.LocalAddrContextKey, local))
		recorder := httptest.NewRecorder()
		handler.ServeHTTP(recorder, req)
		if recorder.Code != c.want {
			t.Errorf("%s, tenant %s: got status %d, want %d", c.path, c.tenant, recorder.Code, c.want)
		}
	}
}

func TestOriginSpeaksTLS(t *testing.T) {
	cert, ca, err := newCertificate()
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	for version := 1; version <= 2; version++ {
		handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.ProtoMajor) })
		port, server, err := serve(handler, &cert, version == 2)
		if err != nil {
			t.Fatal(err)
		}
		client := &http.Client{Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, ForceAttemptHTTP2: true,
		}}
		res, err := client.Get(fmt.Sprint("https://127.0.0.1:", port))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if string(body) != fmt.Sprint(version) {
			t.Errorf("got HTTP/%s, want HTTP/%d", body, version)
		}
		client.CloseIdleConnections()
		_ = server.Close()
	}
}

func TestOriginAddressesDiffer(t *testing.T) {
	seen := make(map[string]bool)
	for i := range 10_000 {
		address := originAddress(i, 80)
		if seen[address] || !strings.HasPrefix(address, "127.") {
			t.Fatalf("upstream %d has the address %s", i, address)
		}
		seen[address] = true
	}
}
