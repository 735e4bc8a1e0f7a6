package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var alice, bob = oauthClient{Host: "c0.test", ID: "alice", Secret: "a"}, oauthClient{Host: "c1.test", ID: "bob", Secret: "b"}

// ask sends a token request of a client, and returns the status and the token.
func ask(t *testing.T, a *authority, id, secret string) (status int, token string) {
	t.Helper()
	form := url.Values{"grant_type": {"client_credentials"}}
	req := httptest.NewRequest(http.MethodPost, "/token", strings.NewReader(form.Encode()))
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.SetBasicAuth(id, secret)
	recorder := httptest.NewRecorder()
	a.ServeHTTP(recorder, req)
	var body struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(recorder.Body.Bytes(), &body); err != nil {
		t.Fatal(err)
	}
	return recorder.Code, body.AccessToken
}

func TestAuthorityKnowsWhichTokensAreValid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority([]oauthClient{alice, bob}, 10*time.Second)
		began := time.Now()
		status, token := ask(t, a, "alice", "a")
		if status != http.StatusOK || len(token) != tokenLength {
			t.Fatalf("got status %d and a token of %d bytes", status, len(token))
		}
		if status, _ := ask(t, a, "alice", "b"); status != http.StatusUnauthorized {
			t.Errorf("a wrong secret: got status %d", status)
		}
		if !a.accepts(token, alice) || a.accepts(token, bob) || a.accepts("x", alice) || !a.accepts(a.static, bob) {
			t.Error("a token is valid for its client alone, and the static one for all")
		}
		time.Sleep(4 * time.Second)
		if !a.couldServe("alice", began, time.Now()) || a.couldServe("bob", began, time.Now()) {
			t.Error("alice alone had a token")
		}
		a.revoke()
		if a.accepts(token, alice) {
			t.Error("a revoked token is accepted")
		}
		if !a.accepts(a.static, alice) {
			t.Error("the static token was revoked, too")
		}
		revoked := time.Now()
		if !a.couldServe("alice", began, revoked) || a.couldServe("alice", began, revoked.Add(1)) {
			t.Error("the token was valid until it was revoked, and no longer")
		}
		if got := a.tokenRequests(); got != 1 {
			t.Errorf("got %d token requests, want the one that had the right secret", got)
		}
	})
}

func TestAuthorityFollowsItsScript(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority([]oauthClient{alice}, 10*time.Second)
		a.answer = func(since time.Duration) answer {
			switch {
			case since < 5*time.Second:
				return answer{delay: time.Second}
			case since < 10*time.Second:
				return answer{status: http.StatusServiceUnavailable}
			}
			return answer{}
		}
		began := time.Now()
		if status, _ := ask(t, a, "alice", "a"); status != http.StatusOK || time.Since(began) != time.Second {
			t.Errorf("got status %d after %v", status, time.Since(began))
		}
		time.Sleep(5 * time.Second)
		if status, _ := ask(t, a, "alice", "a"); status != http.StatusServiceUnavailable {
			t.Errorf("got status %d", status)
		}
		a.begin()
		if status, _ := ask(t, a, "alice", "a"); status != http.StatusOK || a.tokenRequests() != 1 {
			t.Errorf("got status %d, and %d token requests since the beginning", status, a.tokenRequests())
		}
	})
}

func TestAuthorityLimitsTokenRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority([]oauthClient{alice}, 10*time.Second)
		a.limit = 2
		for second := range 2 {
			for i, want := range []int{http.StatusOK, http.StatusOK, http.StatusTooManyRequests} {
				if status, _ := ask(t, a, "alice", "a"); status != want {
					t.Errorf("second %d, request %d: got status %d, want %d", second, i, status, want)
				}
			}
			time.Sleep(time.Second)
		}
	})
}
