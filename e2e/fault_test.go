package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"
)

// TestFaultsAreFaults shows that a client gets no token while a fault lasts,
// and gets one before and after. No gateway takes part.
func TestFaultsAreFaults(t *testing.T) {
	as := startAuthServer(t, time.Minute)
	c := basicClient(t)
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			inj := newInjector(t, as, f.https)
			transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: x509.NewCertPool()}}
			if inj.trust != "" {
				pem, err := os.ReadFile(inj.trust)
				if err != nil {
					t.Fatal(err)
				}
				transport.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem)
			}
			defer transport.CloseIdleConnections()
			// Long enough for a busy machine, where an answer is to come.
			httpClient := &http.Client{Transport: transport, Timeout: startTimeout}

			wantToken := func(when string, want bool) {
				t.Helper()
				if got := askToken(t, httpClient, inj, c); got != want {
					t.Errorf("token %s the fault: got %v, want %v", when, got, want)
				}
			}
			wantToken("before", true)
			inj.begin(t, f)
			if f.slow {
				httpClient.Timeout = time.Second
			}
			wantToken("during", f.harmless)
			httpClient.Timeout = startTimeout
			before := len(inj.counts().attempts)
			inj.heal(t)
			wantToken("after", true)

			want := 2 // a refused connection is not seen
			if f.refuse {
				want = 1
			}
			if before != want {
				t.Errorf("attempts: got %d, want %d", before, want)
			}
		})
	}
}

// askToken tells whether the injector gave out a token.
func askToken(t *testing.T, httpClient *http.Client, inj *injector, c client) bool {
	t.Helper()
	form := url.Values{"grant_type": {"client_credentials"}, "scope": {scopes}, "resource": {resource}}
	req := newRequest(t, "POST", inj.url+"/token", strings.NewReader(form.Encode()))
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.SetBasicAuth(url.QueryEscape(c.ID), url.QueryEscape(c.Secret))
	resp, err := httpClient.Do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil || resp.StatusCode != http.StatusOK {
		return false
	}
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	return json.Unmarshal(body, &answer) == nil && answer.AccessToken != ""
}
