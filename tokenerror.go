// Why there is no token, in words that may be shown.

package outboundauth

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Our own short codes, for failures in which the authorization server sent no
// `error` (RFC 6749 §5.2). Together with the server's codes, they are a small,
// fixed vocabulary for logs and metrics.
const (
	codeTimeout         = "timeout"
	codeNetwork         = "network"
	codeInvalidResponse = "invalid_response"
	codeHTTPStatus      = "http_status"
	codeConfiguration   = "configuration"
	codeMethod          = "method"     // that the client uses
	codeClientKey       = "client_key" // that the request has, or has not
)

// withheld stands for a text of the server that repeats a secret.
const withheld = "(repeats the client's credentials, and is not shown)"

// tokenError says why a token request failed. Every part of it may be logged and
// shown: no part holds a secret, token, form or body.
type tokenError struct {
	Endpoint    string // the host that was asked, for a token or for the issuer's metadata
	Status      int    // the HTTP status; 0 if there was no answer
	Code        string // the server's OAuth error code, or one of our own codes
	Description string // the reason in words, the server's or our own
	Hint        string // what the operator has to change

	answer     answerKind
	permanent  bool
	local      bool      // the fault is on this machine
	heldBy     string    // see heldUntil
	heldUntil  time.Time // another instance has asked, and this one does not before that; zero if this one has
	retryAfter time.Duration
	leadsTo    string // where a redirect leads: the server's words, which nobody has searched for secrets
}

// answerKind says what an answer without a token is. What to change depends on it.
type answerKind int

const (
	answerNone       answerKind = iota // there was no answer
	answerEmpty                        // without a body
	answerText                         // no JSON object, and no page
	answerPage                         // of HTML
	answerObject                       // a JSON object that does not say that it is an error
	answerOwnError                     // an error in a vendor's own form
	answerOAuthError                   // an error as RFC 6749 §5.2 has it
	answerGrant                        // a token that can't be used
)

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
	if advice := e.remedy(); advice != "" {
		b.WriteString(" (" + advice + ")")
	}
	return b.String()
}

// leading returns the error with where the redirect leads, in words that may be shown.
func (e *tokenError) leading(to string) *tokenError {
	shown := *e
	shown.Description, shown.leadsTo = e.Description+": "+to, ""
	return &shown
}

// Permanent reports whether it is useless to repeat the request.
func (e *tokenError) Permanent() bool { return e.permanent }

// RetryAfter returns how long the server asked us to wait; 0 if it did not ask.
func (e *tokenError) RetryAfter() time.Duration { return e.retryAfter }

// transientCodes are the codes that blame the state of the server and not the
// request. Servers send them with a status in the 400s, too.
var transientCodes = []string{"temporarily_unavailable", "server_error", "slow_down"}

// classify decides whether an answer without a token is a permanent failure. A
// failure with 408, 425, 429 or a status in the 500s passes by itself. So does a
// failure with a transient code. The server will reject all other requests
// again.
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

// remedy returns the hint or, if there is none, advice for this kind of failure.
func (e *tokenError) remedy() string {
	switch {
	case e.Hint != "":
		return e.Hint
	case e.Code == codeNetwork:
		return "check host and port of token_url or issuer, and whether this machine may reach them: by a firewall, or a network_proxy in token_transport"
	case e.Code == codeTimeout:
		return "see whether the authorization server answers, and whether this machine may reach it"
	case e.Code == codeConfiguration:
		return "correct the setting that is named"
	case e.Status == http.StatusTooManyRequests:
		return "wait: the server limits the rate of token requests"
	case e.Status >= 500, slices.Contains(transientCodes, e.Code):
		return "wait, or ask who runs the authorization server: the fault is there"
	case e.Code == codeInvalidResponse:
		return "check token_url: no token endpoint seems to be there"
	}
	return "ask who runs the authorization server what it rejects"
}

// A settingError says what is wrong with a setting and, apart from that, what to do. No
// part quotes a value.
type settingError struct {
	wrong, todo string
	cause       error // may be nil
}

func (e *settingError) Error() string { return e.wrong + ": " + e.todo }

func (e *settingError) Unwrap() error { return e.cause }

// configurationError describes a token request that is not made because of a setting.
func configurationError(endpoint string, err error) *tokenError {
	e := &tokenError{Endpoint: endpoint, Code: codeConfiguration, Description: err.Error(), permanent: true}
	if setting, ok := errors.AsType[*settingError](err); ok {
		e.Description, e.Hint = setting.wrong, setting.todo
	}
	return e
}

// networkError describes a request that got no answer.
func networkError(ctx context.Context, endpoint string, err error) *tokenError {
	// net/http has its own error for a context that has ended, so ask the context.
	if errors.Is(ctx.Err(), context.DeadlineExceeded) || timedOut(err) {
		return &tokenError{
			Endpoint: endpoint, Code: codeTimeout, Description: errNoAnswer.Error(),
			Hint: "raise token_timeout if the server is just slow",
		}
	}
	reason := networkReason(err)
	e := &tokenError{Endpoint: endpoint, Code: codeNetwork, Description: reason.Error()}
	switch {
	case errors.Is(reason, errUnknownAuthority):
		e.Hint = "name its CA with tls_trust_pool in token_transport"
	case errors.Is(reason, errNoTLS), errors.Is(reason, errBroken):
		e.Hint = "check the scheme and port of token_url or issuer"
	case errors.Is(reason, errCutOff), errors.Is(err, syscall.ECONNRESET): // what speaks no TLS may end a connection in silence
		e.Hint = "check the scheme and port of token_url or issuer, or see why the server closes connections"
	}
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

// reportError returns what operators are told about err, the reason why there is
// no token.
func reportError(err error) *reportedError {
	if failure, ok := errors.AsType[*tokenError](err); ok {
		return &reportedError{failure.Code, failure.Description, failure.Status, failure.remedy()}
	}
	// The server granted a token that can't be used, or there was a panic.
	if setting, ok := errors.AsType[*settingError](err); ok {
		return &reportedError{Code: codeInvalidResponse, Description: setting.wrong, Hint: setting.todo}
	}
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

// safely calls f and turns a panic into an error. Nobody else could recover a
// panic in our own goroutines, so it would end the whole server. The error does
// not show the panic's value, because the value could hold parts of the request.
func safely(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the token request panicked with a value of type %T; please report it as a bug", p)
		}
	}()
	return f()
}
