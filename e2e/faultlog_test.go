package e2e

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// failedFetch is what the gateway logs when it obtained no token, its quick
// retries included.
type failedFetch struct {
	at, retryAt time.Time
	err         string
}

// failedFetches returns those that the gateway has logged so far.
func failedFetches(t *testing.T, logged string) []failedFetch {
	t.Helper()
	var failed []failedFetch
	lines := bufio.NewScanner(strings.NewReader(logged))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if !strings.Contains(lines.Text(), "obtaining token failed") {
			continue
		}
		var line struct {
			TS      float64 `json:"ts"`
			RetryAt float64 `json:"retry_at"`
			Error   string  `json:"error"`
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatalf("log line %s: %v", lines.Text(), err)
		}
		failed = append(failed, failedFetch{at: instant(line.TS), retryAt: instant(line.RetryAt), err: line.Error})
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return failed
}

func instant(seconds float64) time.Time { return time.UnixMicro(int64(seconds * 1e6)) }

// wantBackoff fails the test if a fetch came earlier than was announced, or
// if more time was announced than the n-th failure in a row permits: 1 s, 2 s,
// 4 s … up to 30 s, or what the server asked for.
func wantBackoff(t *testing.T, failed []failedFetch, asked time.Duration) {
	t.Helper()
	for i, f := range failed {
		// The log is written a moment after the time is set.
		longest := max(min(time.Second<<i, 30*time.Second), 2*time.Second, asked)
		if wait := f.retryAt.Sub(f.at); wait > longest {
			t.Errorf("failure %d (%s): got a back-off of %v, want %v at most", i+1, f.err, wait, longest)
		}
		// A request may shorten a wait, but not one that the server asked for.
		if i > 0 && asked > 0 && f.at.Before(failed[i-1].retryAt) {
			t.Errorf("failure %d: got %v before its time, want it no earlier than announced",
				i+1, failed[i-1].retryAt.Sub(f.at))
		}
	}
}

// wantNothingSecret fails the test if the text holds the client's secret in
// any form, or a token or a piece of one.
func wantNothingSecret(t *testing.T, text string, c client, tokens []string) {
	t.Helper()
	if !strings.Contains(text, "upstream roundtrip") {
		t.Error("got a log without requests, want one to look for secrets in")
	}
	canaries := []string{
		c.Secret, url.QueryEscape(c.Secret), url.PathEscape(c.Secret),
		base64.StdEncoding.EncodeToString([]byte(url.QueryEscape(c.ID) + ":" + url.QueryEscape(c.Secret))),
		base64.StdEncoding.EncodeToString([]byte(c.ID + ":" + c.Secret)),
	}
	for _, token := range tokens {
		// All begin alike; the signature is what makes each a token.
		canaries = append(canaries, token[:24], token[strings.LastIndex(token, ".")+1:])
	}
	slices.Sort(canaries)
	for _, canary := range slices.Compact(canaries) {
		if at := strings.Index(text, canary); at >= 0 {
			t.Errorf("got %.12q… in the log after %s, want no secret and no token there",
				canary, text[max(0, at-300):at])
		}
	}
}
