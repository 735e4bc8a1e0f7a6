// Why there is no token, in words that may be shown.

package outboundauth

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// Short codes of our own, for failures in which the authorization server sent
// no `error` of its own (RFC 6749 §5.2). With the server's codes they make up
// a small, fixed vocabulary for logs and metrics.
const (
	codeTimeout         = "timeout"
	codeNetwork         = "network"
	codeInvalidResponse = "invalid_response"
	codeHTTPStatus      = "http_status"
	codeConfiguration   = "configuration"
)

// How much of a foreign text is shown, in bytes.
const (
	maxShownCode        = 64
	maxShownValue       = 200 // of a member of metadata
	maxShownList        = 300 // of names, addresses or scopes
	maxShownDescription = 400
)

// tokenError is why a token request failed. Every part of it may be logged
// and shown: it holds no secret, token, form or body.
type tokenError struct {
	Endpoint    string // host that was asked: of the token endpoint, or of the issuer's metadata
	Status      int    // HTTP status; 0 without an answer
	Code        string // the OAuth error code, or one of ours
	Description string // in words: the server's, or ours
	Hint        string // what to change

	permanent  bool
	retryAfter time.Duration
}

func (e *tokenError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "token endpoint %s: ", e.Endpoint)
	if e.Status != 0 {
		fmt.Fprintf(&b, "status %d: ", e.Status)
	}
	b.WriteString(e.Code)
	if e.Description != "" {
		b.WriteString(": " + e.Description)
	}
	if e.Hint != "" {
		b.WriteString(" (" + e.Hint + ")")
	}
	return b.String()
}

// Permanent tells that repeating the request will not help.
func (e *tokenError) Permanent() bool { return e.permanent }

// RetryAfter is how long the server asked to be left alone; 0 if it did not.
func (e *tokenError) RetryAfter() time.Duration { return e.retryAfter }

// transientCodes are those that a server sends with a status in the 400s
// although it means its own state, not the request.
var transientCodes = []string{"temporarily_unavailable", "server_error", "slow_down"}

// classify decides whether an answer other than a token is permanent. A status
// in the 500s, 408, 425 and 429 pass by themselves; what else the server
// rejects, it will reject again.
func (e *tokenError) classify() *tokenError {
	switch {
	case e.Status >= 500, e.Status == http.StatusRequestTimeout, e.Status == http.StatusTooEarly,
		e.Status == http.StatusTooManyRequests:
		e.permanent = false
	default:
		e.permanent = !slices.Contains(transientCodes, e.Code)
	}
	return e
}

// remedy returns the hint, or what to do about failures that are no matter of
// the configuration as long as they pass by themselves.
func (e *tokenError) remedy() string {
	switch {
	case e.Hint != "":
		return e.Hint
	case e.Code == codeNetwork:
		return "check host and port of token_url or issuer, and whether this machine may reach them: by a firewall, or a network_proxy in token_transport"
	case e.Code == codeInvalidResponse:
		return "check token_url: what answers there does not seem to be a token endpoint"
	case e.Code == codeConfiguration:
		return "correct the setting that is named"
	case e.Status == http.StatusTooManyRequests:
		return "wait: the server limits the rate of token requests"
	case e.Status >= 500:
		return "wait, or ask who runs the authorization server: the fault is there"
	}
	return "ask who runs the authorization server what it rejects"
}

// networkError describes a request that got no answer. Only errors whose text
// is known to come from this machine are quoted: those of net/http repeat
// parts of a malformed answer, and a server may send back what we sent.
func networkError(ctx context.Context, endpoint string, err error) *tokenError {
	e := &tokenError{Endpoint: endpoint, Code: codeNetwork}
	var (
		dial      reverseproxy.DialError
		op        *net.OpError
		dns       *net.DNSError
		cert      *tls.CertificateVerificationError
		hostname  x509.HostnameError
		authority x509.UnknownAuthorityError
		record    tls.RecordHeaderError
		alert     tls.AlertError
		timeout   interface{ Timeout() bool }
	)
	switch {
	// net/http gives its own text to the end of a context, so ask the context.
	case errors.Is(ctx.Err(), context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		e.Code = codeTimeout
		e.Description = "no answer in time"
		e.Hint = "raise token_timeout if the server is just slow"
	case errors.As(err, &dial): // of Caddy's dialer; hides the error within
		e.Description = dial.Error()
	case errors.As(err, &dns):
		e.Description = dns.Error()
	case errors.As(err, &hostname):
		e.Description = hostname.Error()
	case errors.As(err, &authority):
		e.Description = authority.Error()
		e.Hint = "name its CA with tls_trust_pool in token_transport"
	case errors.As(err, &cert):
		e.Description = "the server's certificate is not valid: " + cert.Err.Error()
	case errors.As(err, &record):
		e.Description = "the server does not speak TLS there"
		e.Hint = "check the scheme and port of token_url"
	case errors.As(err, &alert):
		e.Description = alert.Error()
	case errors.As(err, &op):
		e.Description = op.Error()
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		e.Description = "the server closed the connection before its answer was complete"
	default:
		e.Description = "the connection broke, or the answer is not HTTP"
	}
	e.Description = redact.Clean(e.Description, maxShownList) // the names in a certificate come from outside
	return e
}

// reportedError is an error as operators see it: in the admin API, in spans, in
// events and on the command line.
type reportedError struct {
	Code        string `json:"code"`
	Description string `json:"description,omitempty"`
	Status      int    `json:"status,omitempty"`
	Hint        string `json:"hint,omitempty"`
}

// reportError returns what is told of the reason why there is no token.
func reportError(err error) *reportedError {
	if failure, ok := errors.AsType[*tokenError](err); ok {
		return &reportedError{failure.Code, failure.Description, failure.Status, failure.remedy()}
	}
	// What was granted can't be used, or there was a panic.
	return &reportedError{Code: codeInvalidResponse, Description: err.Error()}
}

// title returns the code, with the status if there was an answer.
func (e *reportedError) title() string {
	if e.Status == 0 {
		return e.Code
	}
	return fmt.Sprintf("%s (status %d)", e.Code, e.Status)
}

// text returns an error in one line.
func (e *reportedError) text() string {
	text := e.title()
	if e.Description != "" {
		text += ": " + e.Description
	}
	if e.Hint != "" {
		text += " (" + e.Hint + ")"
	}
	return text
}

// safely turns a panic into an error: in a goroutine of ours nobody else could
// recover it, and it would end the whole server. The panic's value is not
// shown because it could hold what the request held.
func safely(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the token request panicked with a value of type %T; please report it as a bug", p)
		}
	}()
	return f()
}
