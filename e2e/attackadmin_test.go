package e2e

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// attackAdmin is the operator of the gateway that is attacked. No answer may show the
// operator anything that is secret.
type attackAdmin struct {
	gw     *gateway
	found  *findings
	client *http.Client
}

func newAttackAdmin(gw *gateway, found *findings) *attackAdmin {
	return &attackAdmin{gw: gw, found: found, client: &http.Client{
		Transport: &http.Transport{DisableKeepAlives: true}, // the admin API begins anew with each config
		Timeout:   30 * time.Second,
	}}
}

// ask sends a request to the admin API. A reload may have closed the connection: the
// request is then sent again.
func (o *attackAdmin) ask(t *testing.T, method, path string, body []byte) (status int, answer []byte) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(startTimeout); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if status, answer, err = o.askOnce(t, method, path, body); err == nil {
			if others := shownIn(answer); others != "" {
				o.found.add("answer of the admin API with a secret", "%s %s: what belongs to %s in %.2000s", method, path, others, answer)
			}
			return status, answer
		}
	}
	t.Fatalf("%s %s: %v", method, path, err)
	return 0, nil
}

func (o *attackAdmin) askOnce(t *testing.T, method, path string, body []byte) (status int, answer []byte, err error) {
	t.Helper()
	req := newRequest(t, method, "http://"+o.gw.admin+path, bytes.NewReader(body))
	req.Header.Set("Content-Type", "text/caddyfile")
	resp, err := o.client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(resp.Body)
	return resp.StatusCode, answer, err
}

// load has the gateway load a config, which it is to accept or to refuse.
func (o *attackAdmin) load(t *testing.T, site string, status int) {
	t.Helper()
	config, err := os.ReadFile(o.gw.writeCaddyfile(t, site))
	if err != nil {
		t.Fatal(err)
	}
	if got, answer := o.ask(t, http.MethodPost, "/load", config); got != status {
		t.Fatalf("POST /load: got %d %s, want %d", got, answer, status)
	}
}

// look asks for all that there is to see, and has a token renewed and another one
// forgotten.
func (o *attackAdmin) look(t *testing.T, n int) {
	t.Helper()
	for _, path := range []string{"/config/", "/metrics", "/reverse_proxy/upstreams", "/debug/vars", "/debug/pprof/goroutine?debug=2"} {
		o.ask(t, http.MethodGet, path, nil)
	}
	_, answer := o.ask(t, http.MethodGet, "/oauth2/clients", nil)
	var clients []struct{ ID string }
	if err := json.Unmarshal(answer, &clients); err != nil {
		t.Fatalf("GET /oauth2/clients: %v", err)
	}
	for i, c := range clients {
		switch (i + n) % len(clients) {
		case 0:
			o.ask(t, http.MethodPost, "/oauth2/clients/"+c.ID+"/renew", nil)
		case 1:
			o.ask(t, http.MethodDelete, "/oauth2/clients/"+c.ID+"/token", nil)
		}
	}
}

// goroutines returns how many the gateway has, and which.
func (o *attackAdmin) goroutines(t *testing.T) (count int, profile string) {
	t.Helper()
	_, answer := o.ask(t, http.MethodGet, "/debug/pprof/goroutine?debug=1", nil)
	line, profile, _ := strings.Cut(string(answer), "\n")
	count, err := strconv.Atoi(line[strings.LastIndex(line, " ")+1:])
	if err != nil {
		t.Fatalf("goroutine profile begins with %q", line)
	}
	return count, profile
}

// rest waits until the gateway has no more than enough goroutines, but not longer than
// patience. It returns the least number that it had, and their stacks.
func (o *attackAdmin) rest(t *testing.T, enough int, patience time.Duration) (least int, profile string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(250 * time.Millisecond) {
		if count, now := o.goroutines(t); least == 0 || count < least {
			least, profile = count, now
		}
		if least <= enough || time.Now().After(deadline) {
			return least, profile
		}
	}
}
