// How what does not go upstream becomes an error of the handler, not of the upstream.

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
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// The reverse proxy takes every error of a transport for a failure of the
// upstream: it counts it against the upstream's health and tries the next
// one. A missing token is neither's fault. So the transport does not return
// an error but a response that no upstream can send, marked in a header; a
// response route in front of the user's own turns it into the error. From
// there, it goes to handle_errors like any other.
//
// The header is one that Caddy redacts in its logs, and that means nothing in a
// response (RFC 9110 §11.7.2).
const failureField = "Proxy-Authorization"

// failureMark is the value of the field, new in each process. Upstreams can't
// guess it, and it would be taken from them: see
// Transport.send.
var failureMark = rand.Text()

func init() {
	caddy.RegisterModule(failureHandler{})
}

// failureHandler raises the error of a request that did not go upstream. The
// `oauth2` transport adds it to the reverse proxy that it is part of; it is
// of no use in a config.
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
	repl, _ := replacerOf(r.Context()) // Caddy's server has set it
	failure, _ := repl.Get(phFailure)
	err, ok := failure.(error)
	if !ok {
		return next.ServeHTTP(w, r)
	}
	repl.Delete(phFailure)
	repl.Delete(phFailed)
	repl.Delete("http.reverse_proxy.header." + failureField) // the mark is nobody's business
	if seconds := retryAfterSeconds(err); seconds != "" {
		w.Header().Set("Retry-After", seconds)
	}
	return err
}

// installFailureRoute gives the handler the route. The handler provisions its
// response routes after its transport, whose Provision calls this.
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
	// lb_retry_match comes before the response routes: it must not take the
	// marked response for one of an upstream.
	for i, matchers := range handler.LoadBalancing.RetryMatchRaw {
		if matchers == nil { // null in JSON, which matches everything
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

// setFailurePlaceholders sets the placeholders that tell why there is no token: the OAuth
// error code or one of ours, the description, and the status with which the
// token endpoint answered, if it did.
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
		code = codeInvalidResponse // what was granted can't be used
	}
	repl.Set(phError, code)
	repl.Set(phDescription, description)
	repl.Set(phStatus, status)
}

// retryAfterSeconds tells when asking again may help (RFC 9110 §10.2.3); ""
// if it is not a matter of time.
func retryAfterSeconds(err error) string {
	failed, ok := errors.AsType[*fetchError](err)
	if !ok {
		return ""
	}
	return strconv.Itoa(max(1, int(math.Ceil(time.Until(failed.retryAt).Seconds()))))
}

// Interface guards.
var (
	_ caddy.Module                = failureHandler{}
	_ caddyhttp.MiddlewareHandler = failureHandler{}
)
