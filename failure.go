// Requests that do not go upstream: each becomes an error of the handler, not of the upstream.

package outboundauth

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// The reverse proxy takes every error of a transport for a failure of the
// upstream: it counts the error against the upstream's health, and tries the
// next upstream. But no upstream is to blame for a missing token. So the
// transport returns no error. It returns a response that no upstream can send:
// a mark in a header distinguishes it. A response route in front of the user's
// own routes turns this response into the error. The error then goes to
// handle_errors like any other.
//
// Caddy redacts this header in its logs. The header has no meaning in a
// response (RFC 9110 §11.7.2).
const failureField = "Proxy-Authorization"

// failureMark is the value of failureField. Each process has another value,
// which upstreams can't guess. Transport.send also removes the field from their
// answers.
var failureMark = rand.Text()

func init() {
	caddy.RegisterModule(failureHandler{})
}

// failureHandler raises the error of a request that did not go upstream. The
// `oauth2` transport adds it to its own reverse proxy. Configs have no use for it.
type failureHandler struct{}

// CaddyModule returns the Caddy module information.
func (failureHandler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.oauth2_failure",
		New: func() caddy.Module { return new(failureHandler) },
	}
}

// ServeHTTP implements caddyhttp.MiddlewareHandler.
func (failureHandler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	repl, _ := replacerOf(r.Context()) // Caddy's server has set a replacer
	failure, _ := repl.Get(phFailure)
	err, ok := failure.(error)
	if !ok {
		return next.ServeHTTP(w, r)
	}
	repl.Delete(phFailure)
	repl.Delete(phFailed)
	repl.Delete("http.reverse_proxy.header." + failureField) // nobody needs to see the mark
	if seconds := retryAfterSeconds(err); seconds != "" {
		w.Header().Set("Retry-After", seconds)
	}
	if _, ok := errors.AsType[methodError](err); ok {
		w.Header().Set("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
	}
	return err
}

// A methodError refuses the method of a request.
type methodError string

func (e methodError) Error() string { return string(e) }

const (
	errTrace   = methodError("TRACE and TRACK are refused: an upstream answers them with what it was sent, the token included; use another method")
	errConnect = methodError("CONNECT is refused: it asks the upstream for a tunnel, through which the client could send requests of its own; use another method")
)

// A keyError refuses a request because of its client key. Whoever tries keys learns nothing
// more.
type keyError struct{ reason, text string }

func (e keyError) Error() string { return e.text }

var (
	errNoKey      = keyError{keyMissing, "the request has no client key, and no client block is the default"}
	errUnknownKey = keyError{keyUnknown, "no client has the client key of this request"}
)

// checkMethod refuses methods whose answer would hand the token to the client: the
// request itself (RFC 9110 §9.3.8), or a tunnel (§9.3.6). TRACK is what another server
// calls TRACE, and some take a method in any case. The proxy has already made a GET of
// the CONNECT of a WebSocket.
func checkMethod(method string) error {
	switch strings.ToUpper(method) {
	case http.MethodTrace, "TRACK":
		return errTrace
	case http.MethodConnect:
		return errConnect
	}
	return nil
}

// installFailureRoute adds the response route for failures to the handler. The
// transport's Provision calls it, and the handler provisions its response
// routes after its transport.
func installFailureRoute(handler *reverseproxy.Handler) error {
	handler.HandleResponse = slices.Insert(handler.HandleResponse, 0, caddyhttp.ResponseHandler{
		Match: &caddyhttp.ResponseMatcher{Headers: http.Header{failureField: {failureMark}}},
		Routes: caddyhttp.RouteList{{
			HandlersRaw: []json.RawMessage{json.RawMessage(`{"handler": "oauth2_failure"}`)},
		}},
	})
	if handler.LoadBalancing == nil {
		return nil
	}
	// The handler evaluates lb_retry_match before the response routes. It must
	// not take the marked response for an upstream's answer.
	for i, matchers := range handler.LoadBalancing.RetryMatchRaw {
		if matchers == nil { // it is null in JSON, and matches everything
			matchers = make(caddy.ModuleMap)
			handler.LoadBalancing.RetryMatchRaw[i] = matchers
		}
		not := []json.RawMessage{json.RawMessage(`{"vars": {"{` + phFailed + `}": ["true"]}}`)}
		if raw, ok := matchers["not"]; ok {
			var users []json.RawMessage
			if err := json.Unmarshal(raw, &users); err != nil {
				return fmt.Errorf("lb_retry_match: %w", err)
			}
			not = append(not, users...)
		}
		raw, err := json.Marshal(not)
		if err != nil {
			return err
		}
		matchers["not"] = raw
	}
	return nil
}

// setFailurePlaceholders sets the placeholders that tell why there is no token:
// code, description and status. The code is an OAuth error code, or one of
// ours. The status is that of the token endpoint's answer, or empty if there
// was no answer.
func setFailurePlaceholders(repl *caddy.Replacer, err error) {
	code, description, status := codeConfiguration, err.Error(), ""
	if failure, ok := errors.AsType[*tokenError](err); ok {
		code, description = failure.Code, failure.Description
		if failure.Status != 0 {
			status = strconv.Itoa(failure.Status)
		}
	} else if errors.Is(err, context.DeadlineExceeded) {
		code = codeTimeout
	} else if _, ok := errors.AsType[*fetchError](err); ok {
		code = codeInvalidResponse // the server has granted a token that can't be used
	} else if _, ok := errors.AsType[methodError](err); ok {
		code = codeMethod
	} else if _, ok := errors.AsType[keyError](err); ok {
		code = codeClientKey
	}
	repl.Set(phError, code)
	repl.Set(phDescription, description)
	repl.Set(phStatus, status)
}

// retryAfterSeconds returns in how many seconds another request may succeed
// (RFC 9110 §10.2.3). It returns "" if waiting does not help.
func retryAfterSeconds(err error) string {
	failed, ok := errors.AsType[*fetchError](err)
	if !ok {
		return ""
	}
	return secondsUntil(failed.retryAt)
}

// secondsUntil returns how long an instant is away, as Retry-After has it.
func secondsUntil(t time.Time) string {
	return strconv.Itoa(max(1, int(math.Ceil(time.Until(t).Seconds()))))
}

// Interface guards.
var (
	_ caddy.Module                = failureHandler{}
	_ caddyhttp.MiddlewareHandler = failureHandler{}
)
