// What caddy oauth2-token reports of one client: its token, or why there is none.

package outboundauth

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
)

// tokenReport is the result of a client's token request.
type tokenReport struct {
	Name          string   `json:"name"`
	Upstreams     []string `json:"upstreams,omitempty"`
	TokenEndpoint string   `json:"token_endpoint"` // "" if it was not discovered
	description

	Steps    []explainedStep `json:"steps,omitempty"`    // only if somebody wants an explanation
	Warnings []string        `json:"warnings,omitempty"` // those of the log, and what only the token shows

	// Of the scopes that are configured.
	Granted    string   `json:"granted_scope,omitempty"`
	NotGranted []string `json:"not_granted,omitempty"`

	Lifetime float64    `json:"lifetime,omitempty"` // in seconds
	Expires  *time.Time `json:"expires,omitempty"`
	Renewal  *time.Time `json:"renewal,omitempty"`

	JKT string `json:"jkt,omitempty"` // the thumbprint of the key that the token is bound to

	Token  string         `json:"token,omitempty"`
	Header map[string]any `json:"header,omitempty"`
	Claims map[string]any `json:"claims,omitempty"`

	Error *reportedError `json:"error,omitempty"`

	length int // the token's length, in characters
}

// report requests a token like the source, but only once, and returns the result. With
// explain, the report has each step. Nobody else may use the client.
func (cl *client) report(upstreams []string, explain bool) tokenReport {
	e := cl.endpoint
	var (
		logged warningLog
		seen   exchanges
		t      *token
		g      grant
	)
	e.logTo(logged.logger())
	limit := e.credentials.lifecycle().fetchTimeout
	err := safely(func() error {
		ctx, cancel := context.WithTimeout(seen.of(context.Background()), limit)
		defer cancel()
		key, err := e.newKey()
		if err != nil {
			return err
		}
		u, err := e.locate(ctx, nil)
		if err == nil {
			t, g, err = e.credentials.lifecycle().requestToken(ctx, e, u, key, nil, nil)
		}
		return err
	})
	d := e.describe()
	r := tokenReport{Name: d.name, Upstreams: upstreams, TokenEndpoint: d.TokenEndpoint, description: d}
	ctx, cancel := context.WithTimeout(context.Background(), limit) // to read the secrets again
	defer cancel()
	if explain {
		unexplained := safely(func() error {
			r.Steps = e.explain(ctx, seen.list(), g)
			return nil
		})
		err = cmp.Or(err, unexplained)
	}
	e.warnOfValues()
	r.Warnings = logged.list()
	if err == nil {
		e.reportToken(ctx, &r, t, g)
		return r
	}
	r.Error = reportError(err)
	r.Warnings = slices.DeleteFunc(r.Warnings, func(warning string) bool { // what the error says
		return r.Error.Description != "" && strings.HasPrefix(warning, r.Error.Description)
	})
	return r
}

// reportToken reports the token t of the grant g.
func (e *endpoint) reportToken(ctx context.Context, r *tokenReport, t *token, g grant) {
	r.NotGranted = e.lacking(g.scope)
	r.Granted = strings.Join(slices.DeleteFunc(slices.Clone(r.Scopes), func(scope string) bool {
		return slices.Contains(r.NotGranted, scope)
	}), " ")
	r.Lifetime = t.expires.Sub(g.issued).Round(time.Second).Seconds()
	r.Expires, r.Renewal = &t.expires, &t.refreshAt
	r.Token, r.length = t.value, len(t.value)
	header, claims, isJWT := jwt.Decode(t.value)
	if t.key != nil {
		r.JKT = t.key.Thumbprint()
	}
	if !isJWT {
		return
	}
	if warning := bindingWarning(claims, r.JKT); warning != "" {
		r.Warnings = append(r.Warnings, warning)
	}
	if isForOthers(claims, slices.Concat(e.credentials.Audience, e.credentials.Resource)) {
		r.Warnings = append(r.Warnings, "the aud of the token has none of what is configured, so the server may ignore it; check audience and resource")
	}
	if secrets, err := e.secrets(ctx); err == nil { // else a file has changed since
		r.Header, r.Claims = shownObject(header, secrets), shownObject(claims, secrets)
	}
}

// bindingWarning returns what is wrong with the claims of a token that is bound to the key with
// this thumbprint (RFC 9449 §6.1); "" if nothing is, or if it is bound to none.
func bindingWarning(claims map[string]any, thumbprint string) string {
	confirmation, _ := claims["cnf"].(map[string]any)
	named, _ := confirmation["jkt"].(string)
	switch {
	case thumbprint == "" || named == thumbprint:
		return ""
	case named == "":
		return "the token does not name the key that it is bound to (cnf), so an upstream has to ask the server for that"
	}
	return "the token names another key (cnf) than the one that the gateway has for it, so an upstream will refuse it; ask who runs the authorization server"
}

// A warningLog collects warnings as the gateway would log them. A look-up that nobody
// waits for any more may still write.
type warningLog struct {
	mu    sync.Mutex
	lines bytes.Buffer // guarded by mu
}

// logger returns a logger into the log.
func (l *warningLog) logger() *zap.Logger {
	encoder := zapcore.NewJSONEncoder(zapcore.EncoderConfig{MessageKey: "msg"})
	return zap.New(zapcore.NewCore(encoder, zapcore.AddSync(l), zap.WarnLevel))
}

// Write implements io.Writer.
func (l *warningLog) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lines.Write(line)
}

// list returns the warnings. Each has its fields behind it, without those that say which
// client it is about.
func (l *warningLog) list() (warnings []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for decoder := json.NewDecoder(&l.lines); ; {
		var fields map[string]any
		if decoder.Decode(&fields) != nil { // io.EOF: zap writes nothing else
			return warnings
		}
		text, _ := fields["msg"].(string)
		var more []string
		for _, name := range slices.Sorted(maps.Keys(fields)) {
			switch name {
			case "msg", "client", "client_id", "token_endpoint", "issuer", "auth_method": // the report has them
			default:
				more = append(more, fmt.Sprintf("%s: %v", name, fields[name]))
			}
		}
		if len(more) > 0 {
			text += " (" + strings.Join(more, ", ") + ")"
		}
		warnings = append(warnings, text)
	}
}

// isForOthers reports whether the claims of a JWT name audiences (RFC 9068 §2.2), and none
// of those that were asked for.
func isForOthers(claims map[string]any, asked []string) bool {
	aud, ok := claims["aud"].([]any)
	if one, isText := claims["aud"].(string); isText {
		aud, ok = []any{one}, true
	}
	return ok && len(asked) > 0 && !slices.ContainsFunc(asked, func(name string) bool { return slices.Contains(aud, any(name)) })
}

// write writes the report as lines. Each line has a name and a value.
func (r *tokenReport) write(w io.Writer) error {
	var b strings.Builder
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%-16s %s\n", name, strings.Map(printable, value))
		}
	}
	line("name", r.Name)
	line("upstreams", strings.Join(r.Upstreams, ", "))
	line("issuer", r.Issuer)
	line("token endpoint", r.TokenEndpoint)
	line("client", r.ClientID)
	line("client keys", strings.Join(r.Keys, " "))
	line("auth method", cmp.Or(r.AuthMethod, "the assertion alone"))
	line("grant", r.GrantType)
	line("scopes", strings.Join(r.Scopes, " "))
	for i, step := range r.Steps {
		line(fmt.Sprintf("step %d", i+1), step.Title)
		for _, text := range step.Lines {
			line("", text)
		}
	}
	for _, warning := range r.Warnings {
		line("warning", warning)
	}
	if e := r.Error; e != nil {
		line("error", e.title())
		line("", e.Description)
		line("what to change", e.Hint)
	} else {
		line("granted", r.Granted)
		line("not granted", strings.Join(r.NotGranted, " "))
		line("lifetime", fmt.Sprint(time.Duration(r.Lifetime)*time.Second))
		line("expires", r.Expires.Local().Format(time.RFC3339))
		line("renewal", r.Renewal.Local().Format(time.RFC3339))
		kind := "opaque"
		if r.Claims != nil {
			kind = "a JWT"
		}
		if r.JKT != "" {
			line("bound to", "a key with the thumbprint "+r.JKT+" (dpop "+r.DPoP+")")
		}
		line("token", fmt.Sprintf("%s, %d characters", kind, r.length))
		line("", r.Token)
		for _, part := range []struct {
			name string
			of   map[string]any
		}{{"header", r.Header}, {"claims", r.Claims}} {
			if part.of == nil {
				continue
			}
			indented, err := json.MarshalIndent(part.of, strings.Repeat(" ", 17), "  ")
			if err != nil {
				return err
			}
			line(part.name, string(indented))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// printable replaces characters that a terminal would obey, or would not show.
// Scopes and claims come from the server, so they may hold such characters.
func printable(r rune) rune {
	if r != '\n' && !unicode.IsPrint(r) {
		return unicode.ReplacementChar
	}
	return r
}
