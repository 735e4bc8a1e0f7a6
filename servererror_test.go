package outboundauth

import (
	"net/http"
	"strings"
	"testing"
)

// What servers say, in all their forms.
func TestWhatAServerSays(t *testing.T) {
	for _, test := range []struct{ body, code, text string }{
		{`{"error":"invalid_client","error_description":"no"}`, "invalid_client", "no"},
		{`{"error":"e","error_description":["one","two"]}`, "e", "one; two"},
		{`{"error":"e","errorDescription":"no"}`, "e", "no"},
		{`{"error":"e","message":"no"}`, "e", "no"},
		{`{"error":"e","msg":"no"}`, "e", "no"},
		{`{"error":"e","reason":"no"}`, "e", "no"},
		{`{"error":"e","detail":"no"}`, "e", "no"},
		{`{"title":"Bad","detail":"no"}`, "", "Bad: no"},
		{`{"title":"Bad"}`, "", "Bad"},
		{`{"errors":[{"detail":"no"},{"detail":"else"}]}`, "", "no"},
		{`{"errors":[{"code":1,"message":"no"}]}`, "", "no"},
		{`{"errors":["no"]}`, "", "no"},
		{`{"errors":{"detail":"no"}}`, "", ""},
		{`{"error":{"code":"e","message":"no"}}`, "e", "no"},
		{`{"error":{"code":401,"message":"no","status":"UNAUTHENTICATED"}}`, "UNAUTHENTICATED", "no"},
		{`{"error":{"code":401,"message":"no"}}`, "401", "no"},
		{`{"error":{"message":["one","two"]}}`, "", "one; two"},
		{`{"errcode":40013,"errmsg":"no"}`, "40013", "no"},
		{`{"ErrorCode":"e","Error":"no"}`, "e", "no"},
		{`{"fault":{"faultstring":"no","detail":{"errorcode":"e"}}}`, "e", "no"},
		{`{"status":"error","msg":"no"}`, "", "no"},
		{`{"error":9,"result":0}`, "9", ""},
		{`{"error":true,"error_description":{"a":"b"},"message":5,"errors":[[]],"fault":[],"errcode":{}}`, "", ""},
		{`{}`, "", ""},
	} {
		parsed, err := parseMembers([]byte(test.body))
		if err != nil {
			t.Fatal(err)
		}
		if got := parsed.complaint(); got.code != test.code || got.text != test.text {
			t.Errorf("%s: got %q and %q, want %q and %q", test.body, got.code, got.text, test.code, test.text)
		}
	}
}

func TestPages(t *testing.T) {
	for _, test := range []struct{ kind, body, title string }{
		{"text/html", "no element", ""},
		{"text/html;charset=utf-8", "<title>a</title>", "a"},
		{"application/xhtml+xml", "<title>a</title>", "a"},
		{"", "<!DOCTYPE html><title> a\n &amp;  b </title>", "a & b"},
		{"text/plain", "\n <HTML><head><TITLE lang=en>a</TITLE>", "a"},
		{"text/html", "<title>" + strings.Repeat(" ", maxSearchedPage) + "a</title>", ""},
		{"text/html", "<title>no end", ""},
	} {
		if !isHTML(http.Header{"Content-Type": {test.kind}}, []byte(test.body)) {
			t.Errorf("%.40q is no page, want one", test.body)
		}
		if got := pageTitle([]byte(test.body)); got != test.title {
			t.Errorf("%.40q has the title %q, want %q", test.body, got, test.title)
		}
	}
	for _, body := range []string{"", "{}", "<?xml version='1.0'?>", "404 page not found"} {
		if isHTML(http.Header{"Content-Type": {"text/plain"}}, []byte(body)) {
			t.Errorf("%q is a page, want none", body)
		}
	}
	// Some send JSON as HTML.
	if got := kindOfAnswer(serverAnswer{header: http.Header{"Content-Type": {"text/html"}}, body: []byte(`{"error":"x"}`)}, nil, complaint{oauth: true}); got != answerOAuthError {
		t.Errorf("got the kind %d, want an OAuth error", got)
	}
}

// Each form passes the one exit.
func TestNoFormShowsASecret(t *testing.T) {
	for _, secret := range []string{canarySecret, "canary-param-5", "canary-header"} {
		for _, body := range []string{
			`{"error":"SECRET"}`, `{"error":"e","error_description":["a","SECRET"]}`, `{"msg":"SECRET"}`, `{"reason":"SECRET"}`, `{"detail":"SECRET"}`,
			`{"title":"a","detail":"SECRET"}`, `{"errors":[{"detail":"SECRET"}]}`, `{"error":{"code":"SECRET","message":"SECRET","status":"SECRET"}}`,
			`{"errcode":"SECRET","errmsg":"SECRET"}`, `{"ErrorCode":"SECRET","Error":"SECRET"}`, `{"fault":{"faultstring":"SECRET","detail":{"errorcode":"SECRET"}}}`,
			`<html><title>SECRET</title>`, `{"access_token":"a","token_type":"SECRET"}`, `{"access_token":"error: SECRET"}`,
		} {
			for _, status := range []int{200, 400, 401, 404, 500} {
				body := strings.ReplaceAll(body, "SECRET", secret)
				cl, logs := discovering(t, "token_url "+tokenPlace+"\nclient_id gateway\nclient_secret "+canarySecret+"\nparam p canary-param-5\ntoken_request_header X-Key canary-header", answering(status, body))
				_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
				if err == nil {
					t.Fatalf("%d %s: got a token, want an error", status, body)
				}
				for _, shown := range []string{err.Error(), reportError(err).text()} {
					if strings.Contains(shown, secret) {
						t.Errorf("%d %s: got %s, want nothing of the secret", status, body, shown)
					}
				}
				if logs.Len() > 0 && strings.Contains(logs.All()[0].Message, secret) {
					t.Errorf("got the warning %s", logs.All()[0].Message)
				}
			}
		}
		redirect := answering(0, "")
		redirect.Handler = redirects(302, "https://"+secret+".example.com/"+secret+"?"+secret)
		cl, _ := discovering(t, "token_url "+tokenPlace+"\nclient_id gateway\nclient_secret "+canarySecret+"\nparam p canary-param-5\ntoken_request_header X-Key canary-header", redirect)
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("got %v, want an error without the secret", err)
		}
	}
}

// What is long is cut before it is searched, and what is shown is part of what was searched.
func TestLongAnswerShowsNoSecret(t *testing.T) {
	const secret = "x#y$z%w&v!" // few letters, so only the whole gives it away
	for _, pad := range []int{0, 300, 5000} {
		for _, code := range []string{`x\"#\"y\"$\"z\"%\"w\"&\"v\"!`, "x\u200b#y\u200b$z\u200b%w\u200b&v\u200b!"} {
			cl, _ := discovering(t, "token_url "+tokenPlace+"\nclient_id a\nclient_secret \""+secret+"\"", answering(http.StatusBadRequest, `{"error":"`+code+strings.Repeat(" q", pad)+`"}`))
			if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err == nil || strings.Contains(err.Error(), secret) {
				t.Errorf("got %v, want an error without the secret", err)
			}
		}
	}
}

// An answer may repeat a token of its own in another member, and so may a later one.
func TestTokensOfAnAnswerAreNotShown(t *testing.T) {
	const token = "canary-token-of-an-answer"
	body := ""
	server := &wire{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(body)) })}
	cl, _ := discovering(t, "token_url "+tokenPlace+"\n"+secretClient, server)
	for _, body = range []string{
		`{"error":"TOKEN","access_token":"TOKEN"}`,
		`{"access_token":"x","refresh_token":"TOKEN","token_type":"TOKEN"}`,
		`{"status":"error","msg":"TOKEN","token":"TOKEN"}`,
		`{"error":{"code":"TOKEN","message":"TOKEN","accessToken":"TOKEN"}}`,
		`{"error":"invalid_scope","error_description":"the former one was TOKEN"}`,
	} {
		body = strings.ReplaceAll(body, "TOKEN", token)
		if _, err := cl.endpoint.locateAndRequest(t.Context(), nil); err == nil || strings.Contains(err.Error(), token) {
			t.Errorf("%s: got %v, want an error without the token", body, err)
		}
	}
}

// The escapes of a title are no escapes of ours.
func TestTitleThatRepeatsTheSecretInEscapes(t *testing.T) {
	quoted := strings.NewReplacer("-", `\\u002d`).Replace(canarySecret)
	cl, _ := discovering(t, "token_url "+tokenPlace+"\n"+secretClient, answering(http.StatusBadRequest, "<html><title>"+quoted+"</title>"))
	_, err := cl.endpoint.locateAndRequest(t.Context(), nil)
	wantError(t, err, "not shown")
}
