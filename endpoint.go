package outboundauth

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
)

// endpoint makes the token requests of one client at one token endpoint
// (RFC 6749 §3.2). It is the requester of a tokenSource; its fields do not
// change once it is in use.
type endpoint struct {
	url    *url.URL
	method string // of client authentication
	id     string
	scopes []string

	// Each sent as one `audience`.
	audience []string

	// Still with their placeholders, which are resolved for each request: a
	// secret that was rotated is used without a reload.
	secret  string
	params  map[string]string
	headers map[string]string

	transport http.RoundTripper // token_transport
	logger    *zap.Logger
}

// resolved is an endpoint's templates with the placeholders replaced. It
// lives no longer than a request.
type resolved struct {
	secret          string
	params, headers map[string]string
}

// resolve replaces the placeholders by the values that they have now, with a
// replacer that knows nothing of any request. They may name files, and reading
// a file can't be interrupted: then it goes on by itself when ctx ends.
func (e *endpoint) resolve(ctx context.Context) (resolved, error) {
	type result struct {
		resolved
		err error
	}
	done := make(chan result, 1)
	go func() {
		var res result
		res.err = safely(func() (err error) {
			res.resolved, err = e.resolveNow()
			return err
		})
		done <- res
	}()
	select {
	case res := <-done:
		if res.err != nil {
			return resolved{}, &tokenError{Endpoint: e.url.Host, Code: codeConfiguration, Description: res.err.Error(), permanent: true}
		}
		return res.resolved, nil
	case <-ctx.Done():
		return resolved{}, &tokenError{Endpoint: e.url.Host, Code: codeTimeout, Description: "reading the client's secrets from their files took too long"}
	}
}

func (e *endpoint) resolveNow() (resolved, error) {
	repl := caddy.NewReplacer()
	r := resolved{params: make(map[string]string, len(e.params)), headers: make(map[string]string, len(e.headers))}
	var err error
	if needsSecret(e.method) {
		if r.secret, err = resolveSecret(repl, "client_secret", e.secret); err != nil {
			return resolved{}, err
		}
	}
	for name, value := range e.params {
		if r.params[name], err = resolveSecret(repl, "param "+name, value); err != nil {
			return resolved{}, err
		}
	}
	for name, value := range e.headers {
		if r.headers[name], err = resolveSecret(repl, "token_request_header "+name, value); err != nil {
			return resolved{}, err
		}
		if !validHeaderValue(r.headers[name]) {
			return resolved{}, fmt.Errorf("token_request_header %s: the value holds a control character", name)
		}
	}
	return r, nil
}

// fingerprint implements requester.
func (e *endpoint) fingerprint(ctx context.Context) string {
	r, err := e.resolve(ctx)
	if err != nil {
		return err.Error()
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %q", r.secret, r.params, r.headers)) // maps print sorted
	return string(sum[:])
}

// request implements requester.
func (e *endpoint) request(ctx context.Context) (grant, error) {
	r, err := e.resolve(ctx)
	if err != nil {
		return grant{}, err
	}
	req, secrets := e.newRequest(ctx, r)

	// RoundTrip and not an http.Client: a redirect is not followed, as it
	// would send the client's secret elsewhere.
	res, err := e.transport.RoundTrip(req)
	if err != nil {
		return grant{}, networkError(ctx, e.url.Host, err)
	}
	// Switching protocols, net/http hands over the connection, and ctx would
	// not end a read.
	stop := context.AfterFunc(ctx, func() { _ = res.Body.Close() })
	defer stop()
	defer res.Body.Close()
	if res.StatusCode == http.StatusSwitchingProtocols {
		return e.read(res, nil, secrets)
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxTokenResponse+1))
	if err != nil {
		return grant{}, networkError(ctx, e.url.Host, err)
	}
	return e.read(res, body, secrets)
}

// newRequest builds the token request (RFC 6749 §4.4.2), and returns what of
// it must not be shown.
func (e *endpoint) newRequest(ctx context.Context, r resolved) (*http.Request, confidential) {
	form := url.Values{"grant_type": {"client_credentials"}}
	if len(e.scopes) > 0 { // a parameter without a value is left out (§3.2)
		form.Set("scope", strings.Join(e.scopes, " "))
	}
	if len(e.audience) > 0 {
		form["audience"] = e.audience
	}
	header := http.Header{
		"Accept":       {"application/json"},
		"Content-Type": {"application/x-www-form-urlencoded"},
		"User-Agent":   {"caddy-outbound-auth"},
	}
	secrets := authenticate(e.method, e.id, r.secret, form, header)
	for name, value := range r.params {
		form.Set(name, value)
		secrets.addReplaced(e.params[name], value)
	}
	for name, value := range r.headers {
		header.Set(name, value)
		secrets.addReplaced(e.headers[name], value)
	}

	// Caddy's HTTP transport looks for a replacer in the context, and for
	// nothing else that this one could have.
	ctx = context.WithValue(ctx, caddy.ReplacerCtxKey, caddy.NewReplacer())
	body := form.Encode()
	u := *e.url // the transport may write to it
	return (&http.Request{
		Method:        http.MethodPost,
		URL:           &u,
		Host:          u.Host,
		Header:        header,
		Body:          io.NopCloser(strings.NewReader(body)),
		ContentLength: int64(len(body)),
		// It is made once in minutes. Of what a server sends on an idle
		// connection, net/http would write the beginning to the log.
		Close: true,
		GetBody: func() (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(body)), nil
		},
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}).WithContext(ctx), secrets
}

// read turns an answer into a grant or a *tokenError.
func (e *endpoint) read(res *http.Response, body []byte, secrets confidential) (grant, error) {
	failure := &tokenError{Endpoint: e.url.Host, Status: res.StatusCode}
	if res.StatusCode >= 300 && res.StatusCode < 400 {
		failure.Code = codeHTTPStatus
		failure.Description = "a redirect, which is not followed because it would take the client's credentials elsewhere"
		failure.Hint = "set token_url to the final address"
		return grant{}, failure.classify()
	}
	if len(body) > maxTokenResponse {
		return grant{}, e.unreadable(failure, fmt.Errorf("the answer is larger than %d bytes", maxTokenResponse))
	}
	answer, err := parseTokenResponse(body)
	code, description := answer.refusal()
	description = description[:min(len(description), 4<<10)] // more is not shown, and need not be searched

	if res.StatusCode == http.StatusOK && code == "" {
		if err != nil {
			return grant{}, e.unreadable(failure, err)
		}
		g, err := answer.grant()
		if err != nil {
			return grant{}, e.unreadable(failure, err)
		}
		return g, nil
	}

	if res.StatusCode != http.StatusOK && res.StatusCode < 300 && code == "" {
		return grant{}, e.unreadable(failure, errors.New("the status of a token answer is 200"))
	}
	for _, name := range []string{"access_token", "refresh_token", "id_token"} {
		issued, _ := answer.str(name)
		secrets.add(issued)
	}
	failure.retryAfter = parseRetryAfter(res.Header, time.Now())
	// The raw texts are asked too: cleaning may join or cut a secret.
	failure.Code = errorCode(code)
	if secrets.in(code) || secrets.in(failure.Code) {
		if _, known := hints[code]; !known {
			failure.Code = codeHTTPStatus
		}
	}
	failure.Description = clean(description, 200)
	if secrets.in(description) || secrets.in(clean(description, len(description))) {
		failure.Description = "the server's description repeats the client's credentials, and is not shown"
	}
	return grant{}, failure.classify()
}

// unreadable is an answer that is neither a token nor a refusal: it counts as
// a passing fault of the server, or of something in front of it.
func (e *endpoint) unreadable(failure *tokenError, err error) *tokenError {
	failure.Code, failure.Description = codeInvalidResponse, err.Error()
	return failure
}

// fetched implements requester: one line in the log for each fetch that fails,
// and one when that is over.
func (e *endpoint) fetched(t *token, err *fetchError, failures int) {
	client := []zap.Field{zap.String("token_endpoint", e.url.Host), zap.String("client_id", e.id)}
	switch {
	case err != nil:
		if errors.Is(err, errReleased) {
			return
		}
		e.logger.Warn("obtaining token failed", append(client,
			zap.Error(err.err), zap.Int("failures", failures+1), zap.Time("retry_at", err.retryAt))...)
	case failures > 0:
		e.logger.Info("obtaining token succeeded again", append(client,
			zap.Int("failures", failures), zap.Time("expires", t.expires))...)
	default:
		e.logger.Debug("obtained token", append(client,
			zap.Time("expires", t.expires), zap.Time("renewal", t.refreshAt))...)
	}
}

// errorCode returns a code as RFC 6749 §5.2 permits it: it becomes part of
// log lines.
func errorCode(code string) string {
	if code == "" {
		return codeHTTPStatus
	}
	code = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' || r == '"' || r == '\\' {
			return -1
		}
		return r
	}, code)
	return clean(code, 64)
}
