// What caddy oauth2-token --explain shows: each step on the way to a token, without its secrets.

package outboundauth

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// ellipsis stands for a secret, and for all that may be one.
const ellipsis = "…"

// maxExplained is how many members of an answer are named at most.
const maxExplained = 40

// An explainedStep is one step on the way to a token.
type explainedStep struct {
	Title string   `json:"title"`
	Lines []string `json:"lines,omitempty"`
}

// An explanation tells what was said to the authorization server. All foreign texts pass
// its method show.
type explanation struct {
	*endpoint
	secrets redact.Secrets
	steps   []explainedStep
}

// explain returns the steps that led to the grant g, or to no grant. seen are the requests.
func (e *endpoint) explain(ctx context.Context, seen []exchanged, g grant) []explainedStep {
	x := explanation{endpoint: e}
	var err error
	if x.secrets, err = e.secrets(ctx); err != nil { // nobody knows what to hide
		x.authentication()
		return x.steps
	}
	isRequest := func(one exchanged) bool { return one.req.Method == http.MethodPost }
	for _, one := range seen {
		if isRequest(one) { // metadata has names like token_endpoint
			x.secrets = append(x.secrets, e.credentials.tokensIn(one.answer.body)...)
		}
	}
	if e.discovery != nil && e.discovery.known() != nil && (len(seen) == 0 || isRequest(seen[0])) {
		x.add("the token endpoint is known from a look-up for another client")
	}
	for i, one := range seen {
		if !isRequest(one) {
			x.lookUp(one)
			continue
		}
		if !slices.ContainsFunc(seen[:i], isRequest) {
			x.authentication()
		}
		x.request(one.req)
		lines := x.answered(one)
		if i < len(seen)-1 && demandsNonce(one.answer) {
			lines = append(lines, "error: "+dpop.CodeUseNonce+"; the server wants its nonce, so the request is sent again")
		}
		if i == len(seen)-1 && g.accessToken != "" { // else the error says what is wrong
			lines = append(lines, x.used(one, g)...)
		}
		x.add("read the answer", lines...)
	}
	if !slices.ContainsFunc(seen, isRequest) {
		x.authentication()
	}
	return x.steps
}

func (x *explanation) add(title string, lines ...string) {
	x.steps = append(x.steps, explainedStep{title, lines})
}

// show returns a text as it may be shown.
func (x *explanation) show(text string, limit int) string {
	if shown, ok := mayShow(text, limit, x.secrets); ok {
		return shown
	}
	return ellipsis
}

// showURL returns a URL as it may be shown. A query may hold a key.
func (x *explanation) showURL(u *url.URL) string {
	shown := x.show(withoutQuery(u), maxShownDescription)
	if u.RawQuery != "" {
		shown += "?" + ellipsis
	}
	return shown
}

// showEndpoint returns an endpoint of the metadata as it may be shown; "" if there is none.
func (x *explanation) showEndpoint(endpoint string) string {
	u, err := url.Parse(endpoint)
	if err != nil {
		return "no URL"
	}
	return x.showURL(u)
}

// authentication tells how the client authenticates, and why.
func (x *explanation) authentication() {
	c := &x.credentials
	method, why := c.chosenAuth()
	var lines []string
	if method == authBasic {
		lines = append(lines, "basic_encoding "+cmp.Or(c.BasicEncoding, basicForm))
	}
	if x.discovery != nil {
		if m := x.discovery.known(); m != nil {
			if setting, names := m.unlisted(c); setting != "" {
				lines = append(lines, "the server does not list this "+setting+"; it lists "+names)
			}
		}
	}
	if method == authByGrant {
		x.add("authenticate the client with the assertion alone: "+why, lines...)
		return
	}
	x.add(fmt.Sprintf("authenticate the client with %s: %s", method, why), lines...)
}

// lookUp tells what is published at one place.
func (x *explanation) lookUp(one exchanged) {
	lines := x.answered(one)
	if m, err := parseMetadata(one.answer.body); one.answer.status == http.StatusOK && err == nil {
		for _, used := range []struct{ name, value string }{
			{"issuer", m.issuer},
			{"token_endpoint", x.showEndpoint(m.tokenEndpoint)},
			{"mtls_endpoint_aliases: token_endpoint", x.showEndpoint(m.mtlsTokenEndpoint)},
			{"token_endpoint_auth_methods_supported", strings.Join(m.authMethods, " ")},
			{"token_endpoint_auth_signing_alg_values_supported", strings.Join(m.signingAlgs, " ")},
			{"dpop_signing_alg_values_supported", strings.Join(m.dpopAlgs, " ")},
		} {
			if used.value != "" {
				lines = append(lines, used.name+" "+x.show(used.value, maxShownDescription))
			}
		}
	}
	x.add("look up the metadata: GET "+x.showURL(one.req.URL), lines...)
}

// request tells what a token request consists of. Only what is no secret for sure is shown.
func (x *explanation) request(req *http.Request) {
	var lines []string
	for _, field := range slices.Sorted(maps.Keys(req.Header)) {
		value := ellipsis
		switch _, own := x.credentials.TokenRequestHeaders[field]; {
		case own: // it may be a secret, whatever its name
		case field == "Authorization" && strings.HasPrefix(req.Header.Get(field), "Basic "):
			value = "Basic " + ellipsis
		case field == "Accept" || field == "Content-Type" || field == "User-Agent":
			value = x.show(req.Header.Get(field), maxShownValue)
		}
		if field == dpop.Header && x.credentials.DPoP != "" { // otherwise token_request_header has set it
			lines = append(append(lines, dpop.Scheme+": "+value), x.proof(req.Header.Get(field))...)
			continue
		}
		lines = append(lines, x.show(field, maxShownValue)+": "+value)
	}
	form := x.parameters(req)
	for _, name := range slices.Sorted(maps.Keys(form)) {
		for _, value := range form[name] {
			lines = append(lines, x.parameter(name, value)...)
		}
	}
	x.add("request the token: POST "+x.showURL(req.URL), lines...)
}

// parameters returns the parameters of a token request.
func (x *explanation) parameters(req *http.Request) url.Values {
	if req.GetBody == nil { // without a grant, there may be no parameter
		return nil
	}
	body, _ := req.GetBody() // can't fail, nor can the reading: it is in memory
	text, _ := io.ReadAll(body)
	if x.credentials.TokenRequest != asJSON {
		form, _ := url.ParseQuery(string(text))
		return form
	}
	form := make(url.Values)
	parsed, _ := parseMembers(text)
	for name, raw := range parsed {
		var value string
		var values []string
		if json.Unmarshal(raw, &value) == nil {
			values = []string{value}
		} else {
			_ = json.Unmarshal(raw, &values) // there is nothing else
		}
		form[name] = values
	}
	return form
}

// parameter tells what a parameter says. Those of `param` may be secrets, and so may those
// that nobody here knows.
func (x *explanation) parameter(name, value string) []string {
	line := x.show(name, maxShownValue) + "="
	if _, own := x.credentials.Params[name]; own {
		return []string{line + ellipsis}
	}
	switch name {
	case "grant_type", "scope", "audience", "resource", "client_id", "client_assertion_type":
		return []string{line + x.show(value, maxShownDescription)}
	case "assertion", "client_assertion":
		return append([]string{line + ellipsis}, x.assertion(value)...)
	}
	return []string{line + ellipsis}
}

// assertion tells what a JWT of a token request says. Without its signature, it is of no
// use to anybody.
func (x *explanation) assertion(text string) []string {
	header, claims, ok := jwt.Decode(text)
	if !ok {
		return nil
	}
	return x.jwt(header, claims)
}

// jwt tells what a JWT says.
func (x *explanation) jwt(header, claims map[string]any) []string {
	object := func(object map[string]any) string {
		shown, _ := json.Marshal(shownObject(object, x.secrets))
		return string(shown)
	}
	return []string{"  header " + object(header), "  claims " + object(claims)}
}

// proof tells what a proof says, without the public key and the nonce.
func (x *explanation) proof(text string) []string {
	header, claims, ok := jwt.Decode(text)
	if !ok {
		return nil
	}
	header["jwk"] = ellipsis
	if _, ok := claims["nonce"]; ok {
		claims["nonce"] = ellipsis
	}
	return x.jwt(header, claims)
}

// answered tells what an answer consists of.
func (x *explanation) answered(one exchanged) []string {
	if one.err != nil {
		return []string{"no answer"} // the error says why
	}
	line := fmt.Sprintf("status %d", one.answer.status)
	if kind := one.answer.header.Get("Content-Type"); kind != "" {
		line += ", " + x.show(kind, maxShownValue)
	}
	lines := []string{line}
	if location := one.answer.header.Get("Location"); location != "" {
		if to, err := one.req.URL.Parse(location); err == nil {
			lines = append(lines, "Location: "+x.showURL(to))
		}
	}
	parsed, err := parseMembers(one.answer.body)
	if err != nil {
		return append(lines, "no JSON object")
	}
	names := slices.Sorted(maps.Keys(parsed))
	more := len(names) - maxExplained
	names = names[:min(len(names), maxExplained)] // before the search for secrets, which takes time
	for i := range names {
		names[i] = x.show(names[i], maxShownCode)
	}
	if more > 0 {
		names = append(names, fmt.Sprintf("and %d more", more))
	}
	return append(lines, "members: "+strings.Join(names, ", "))
}

// used tells what is used of the answer with the grant g.
func (x *explanation) used(one exchanged, g grant) []string {
	token, lifetime := "access_token", "expires_in"
	if r := x.credentials.TokenResponse; r != nil {
		token, lifetime = cmp.Or(r.AccessToken, token), cmp.Or(r.ExpiresIn, lifetime)
	}
	lines := []string{fmt.Sprintf("%s: a token of %d characters", token, len(g.accessToken))}
	if parsed, _ := parseMembers(one.answer.body); parsed.text("token_type") != "" && !x.credentials.findsToken() {
		lines = append(lines, "token_type: "+x.show(parsed.text("token_type"), maxShownCode))
	}
	switch {
	case g.odd != "":
		lines = append(lines, lifetime+" "+g.odd+": default_lifetime counts")
	case g.lifetime == 0:
		lines = append(lines, "no lifetime: default_lifetime counts")
	default:
		lines = append(lines, lifetime+": "+g.lifetime.String())
	}
	if g.scope == "" {
		return append(lines, "no scope: all that was asked for is granted")
	}
	return append(lines, "scope: "+x.show(g.scope, maxShownDescription))
}
