// What to change when the authorization server grants no token that can be used.

package outboundauth

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/outboundauth/caddy-outbound-auth/internal/clientcert"
	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/jwt"
)

// A denial is an answer that brought no token, with what tells the cause.
type denial struct {
	*tokenError
	*Credentials
	header    http.Header           // of the answer
	url       *url.URL              // of the token endpoint
	shown     string                // the same, if the issuer has named it and it may be shown
	metadata  *metadata             // of the issuer; nil without one
	sent      resolved              // what the request was made of
	presented *clientcert.Presented // the certificate
}

// advice says what to change: the likeliest first, with three settings at most. It is
// empty if the kind of the failure says it all.
func (r denial) advice() string {
	if r.blamesClient() || (r.permanent && r.grantsByParams()) {
		if odd := r.oddities(r.sent.values()); len(odd) > 0 {
			return strings.Join(odd[:min(len(odd), 3)], ", ") + ": correct that first"
		}
	}
	return r.mostLikely()
}

// mostLikely is advice without a look at the ends of the values that are sent.
func (r denial) mostLikely() string {
	code := knownCode(r.Code)
	switch {
	case jwt.Expired(r.sent.assertion): // some servers take that for a fault of their own
		return "the JWT in assertion_file has expired; see that it is renewed"
	case r.Status >= 300 && r.Status < 400:
		if r.Issuer != "" {
			return "the token endpoint in the issuer's metadata is not the final one; set token_url instead of issuer"
		}
		return "set token_url to where it leads, if a token endpoint is there"
	case r.Code == codeInvalidResponse:
		return r.unusableAdvice()
	case !r.permanent:
		return ""
	case r.isElsewhere():
		return r.elsewhereAdvice()
	case r.blamesClient() && r.authMethod() == authTLS && r.presented.Ignored():
		return "the server did not ask for the client_certificate: it may do so at another address; set token_url to that"
	}
	if demand := r.boundAdvice(code); demand != "" {
		return demand
	}
	if advice := r.codeAdvice(code); advice != "" {
		return advice
	}
	switch {
	case r.Status == http.StatusUnauthorized || r.Status == http.StatusForbidden:
		if r.answer == answerObject || r.answer == answerText || r.saysOnlyStatus() { // a gateway in front may say so
			_, names := r.clientSettings()
			return "check " + inWords(append([]string{r.server()}, names[:min(len(names), 2)]...))
		}
		return r.clientAdvice(r.doubt())
	case r.grantsByParams():
		return "check param, and whether " + r.server() + " is the right one"
	case r.answer == answerOAuthError, r.answer == answerOwnError,
		r.answer == answerObject && (r.spoken("scope") || r.spoken("audience") || r.spoken("client")):
		return "check " + inWords(r.requestSettings()) + ", and whether the client may use the " + r.grantType() + " grant"
	}
	return r.elsewhereAdvice() // a token endpoint would have said what it rejects
}

// codeAdvice is the advice on a code; "" if the code says nothing.
func (r denial) codeAdvice(code string) string {
	if r.sendsNoGrant() && (code == "unsupported_grant_type" || code == "unauthorized_client" || (code == "invalid_request" && r.spoken("grant_type"))) {
		return "set grant_type, which the server wants; or check " + r.server()
	}
	switch code {
	case "invalid_client":
		return r.clientAdvice("")
	case "invalid_grant":
		if r.grantsByJWT() {
			return r.grantAdvice()
		}
		if r.grantsByParams() {
			return r.clientAdvice("param")
		}
		return r.clientAdvice("scopes") // some servers do not tell it from invalid_client
	case "unauthorized_client":
		if r.blamesIdentity(code) {
			return r.clientAdvice("")
		}
		return r.allowAdvice()
	case "unsupported_grant_type":
		if r.metadata != nil && slices.Contains(r.metadata.grantTypes, r.sentGrant()) {
			return r.allowAdvice() + ": it lists this grant"
		}
		return fmt.Sprintf("check grant_type and %s, or %s", r.server(), r.allowAdvice())
	case "invalid_scope":
		if len(r.Scopes) == 0 {
			return "set scopes: the server wants some"
		}
		return "check scopes"
	case "invalid_target":
		return "check audience and resource"
	case "invalid_request":
		return "check " + inWords(r.requestSettings())
	case dpop.CodeUseNonce, dpop.CodeInvalidProof:
		return r.proofAdvice(code)
	}
	return ""
}

// proofAdvice says what to do if the server wants a proof of possession, or another one.
func (r denial) proofAdvice(code string) string {
	switch {
	case r.DPoP == "":
		return "add dpop: the server binds the tokens of this client to a key"
	case code == dpop.CodeUseNonce:
		return "ask who runs the authorization server: it does not accept the nonce that it sends, or sends none (DPoP-Nonce)"
	case r.metadata != nil && r.metadata.unlistedProof(r.DPoP):
		return "set dpop to an algorithm that the server lists (dpop_signing_alg_values_supported)"
	}
	return "check the clock of this machine, the algorithm of dpop, and whether the server expects proofs for the URL that is asked (" + r.server() + ")"
}

// allowAdvice says that the server has to allow the client the grant.
func (r denial) allowAdvice() string {
	if r.grantsByJWT() {
		return "allow this client the jwt-bearer grant for this subject at the authorization server"
	}
	return "allow this client the " + r.grantType() + " grant at the authorization server"
}

// sentGrant returns the grant as it is sent.
func (r denial) sentGrant() string {
	if r.grantsByJWT() {
		return grantJWTBearerURN
	}
	return r.grantType()
}

// server names the setting that says which server is asked.
func (c *Credentials) server() string {
	if c.Issuer != "" {
		return "issuer"
	}
	return "token_url"
}

// blamesClient reports whether the server may not have accepted who the client is.
func (r denial) blamesClient() bool {
	switch code := knownCode(r.Code); {
	case r.Status == 0 || r.isElsewhere():
		return false
	case code == "invalid_client" || code == "invalid_grant" || r.blamesIdentity(code):
		return true
	case code != "":
		return false
	}
	return r.Status == http.StatusUnauthorized || r.Status == http.StatusForbidden
}

// blamesIdentity reports whether the code of a client without the grant stands for one with
// a wrong secret or key, as Keycloak has it. Its words tell the two apart.
func (r denial) blamesIdentity(code string) bool {
	said := strings.ReplaceAll(strings.ToLower(r.Description), "client_secret_", "") // the beginning of methods
	return code == "unauthorized_client" && (strings.Contains(said, "invalid client credentials") ||
		strings.Contains(said, "client authentication") || strings.Contains(said, "secret"))
}

// isElsewhere reports whether something answered that is no token endpoint.
func (r denial) isElsewhere() bool {
	if r.asksForUser() {
		return true
	}
	if r.answer == answerOAuthError && knownCode(r.Code) != "" {
		return false
	}
	switch r.Status {
	case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusGone, http.StatusMisdirectedRequest:
		return true
	case http.StatusUnauthorized:
		// A token endpoint asks for the client's credentials (RFC 6749 §5.2). What asks
		// for a user's login is something else.
		scheme, _, _ := strings.Cut(r.header.Get("Www-Authenticate"), " ")
		known := []string{"", "basic", "bearer", "dpop", "digest", "negotiate", "ntlm", "oauth"}
		if knownCode(r.Code) == "" && !slices.Contains(known, strings.ToLower(scheme)) {
			return true
		}
	}
	return r.permanent && (r.answer == answerPage || (r.answer == answerText && r.Status == http.StatusBadRequest))
}

// asksForUser reports whether the server speaks of what an authorization endpoint takes, to
// which users are sent. A token endpoint takes a redirect_uri, too (RFC 6749 §4.1.3), and has
// an error code for it.
func (r denial) asksForUser() bool {
	code, said := knownCode(r.Code), strings.ToLower(r.Code+" "+r.Description)
	switch {
	case r.grantsByParams() || r.Status < 400:
		return false
	case code == "invalid_request":
		return strings.Contains(said, "response_type")
	}
	return code == "" && (strings.Contains(said, "redirect_uri") || strings.Contains(said, "response_type"))
}

// elsewhereAdvice says how to find the token endpoint.
func (r denial) elsewhereAdvice() string {
	switch {
	case r.Issuer != "":
		return "the issuer's metadata names this address, and no token endpoint seems to be there: check issuer, or set token_url instead"
	case r.url != nil && r.url.Scheme == "http" && r.Status == http.StatusBadRequest:
		return "check token_url: no token endpoint seems to be there, or its port wants https; or set issuer instead, which finds it"
	}
	return "check token_url: no token endpoint seems to be there; or set issuer instead, which finds it"
}

// unusableAdvice says what to do about a successful answer that brings no token.
func (r denial) unusableAdvice() string {
	switch {
	case r.answer == answerOwnError: // where the token belongs
		return r.clientAdvice("scopes")
	case r.answer == answerGrant && r.DPoP != "" && strings.Contains(r.Description, "token_type"):
		return "have the authorization server bind the tokens of this client to a key (DPoP), or remove dpop"
	case r.answer == answerGrant && strings.Contains(r.Description, "DPoP"):
		return "add dpop: the server binds the tokens of this client to a key"
	case r.answer == answerGrant && r.TokenResponse != nil:
		return "check token_response: there seems to be no token"
	case r.answer == answerGrant && strings.Contains(r.Description, "token_type is"):
		return "register the client at the authorization server for bearer tokens"
	case r.answer == answerGrant:
		return "ask who runs the authorization server: the fault is there"
	case r.TokenResponse != nil:
		return "check token_response and token_url"
	case r.answer == answerObject && r.Issuer == "":
		return "check token_url; or set token_response, if the server has other names for the token"
	}
	return r.elsewhereAdvice()
}

// boundAdvice says what to do if the server demands tokens that are bound to a key. Or it
// may demand them: it says of the request only that it is invalid, but its metadata speaks
// of them.
func (r denial) boundAdvice(code string) string {
	// Some servers call the grant invalid, but client credentials are none that could be.
	invalidGrant := code == "invalid_grant" && !r.grantsByJWT() && !r.grantsByParams()
	if code != "invalid_request" && !invalidGrant {
		return ""
	}
	const proved, bound = "add dpop", "set client_certificate and bind_certificate"
	switch {
	case r.spoken("dpop"):
		return r.proofAdvice(dpop.CodeInvalidProof)
	case r.DPoP != "", r.BindCertificate, r.ClientCertificate != nil:
		return ""
	case r.spoken("mtls"), r.spoken("client certificate"):
		return bound + ": the server binds the tokens of this client"
	}
	saysMore := r.Description != "" && knownCode(r.Description) != code && r.Description != oidcProviderInvalid
	if r.metadata == nil || saysMore {
		return ""
	}
	var ways []string
	if r.metadata.bindsCertificates {
		ways = append(ways, bound)
	}
	if len(r.metadata.dpopAlgs) > 0 {
		ways = append(ways, proved)
	}
	if len(ways) == 0 {
		return ""
	}
	otherwise := "check " + r.requestSettings()[0]
	if invalidGrant {
		otherwise = r.codeAdvice(code)
	}
	return "the server may want tokens that are bound to a key: " + strings.Join(ways, ", or ") + "; else " + otherwise
}

// oidcProviderInvalid is all that the npm package oidc-provider says of an invalid grant. Its
// log says more.
const oidcProviderInvalid = "grant request is invalid"

// doubt names what else a refusal without a known code may be about.
func (r denial) doubt() string {
	switch {
	case r.authMethod() == authTLS || r.answer == answerOwnError:
		return r.server()
	case len(r.Audience) > 0 || len(r.Resource) > 0:
		return r.requestSettings()[0]
	}
	return "scopes"
}

// saysOnlyStatus reports whether the server only says in words what its status says.
func (r denial) saysOnlyStatus() bool {
	return strings.EqualFold(r.Code, http.StatusText(r.Status))
}

// spoken reports whether the server speaks of something.
func (r denial) spoken(word string) bool {
	return strings.Contains(strings.ToLower(r.Description), word)
}

// clientAdvice says what to change about who the client is. also is another setting that
// may be the cause, or empty.
func (r denial) clientAdvice(also string) string {
	lead, names := r.clientSettings()
	if r.sendsNoGrant() && r.authMethod() == authNone {
		lead, names = "", []string{"param"}
	}
	most := 3
	if lead != "" {
		most--
	}
	if also != "" {
		names = append(slices.Clip(names[:min(len(names), most-1)]), also)
	}
	names = names[:min(len(names), most)]
	switch {
	case lead == "":
		return "check " + inWords(names)
	case len(names) == 0:
		return lead
	}
	return lead + "; or check " + inWords(names)
}

// clientSettings names the settings that tell who the client is, the likeliest first. If
// one is to be set that is not, lead says so.
func (r denial) clientSettings() (lead string, names []string) {
	if r.metadata != nil {
		if setting, listed := r.metadata.unlisted(r.Credentials); listed != "" {
			return "set " + setting + " to what the server lists: " + listed, []string{"client_id"}
		}
	}
	switch r.authMethod() {
	case authBasic:
		plain := r.ClientID + strings.TrimSpace(r.sent.secret) // what stands around it is told apart
		switch {
		case strings.Contains(r.ClientID, ":"):
			return "set auth_method client_secret_post, as many servers do not decode a colon in the id", []string{"client_id", "client_secret"}
		case url.QueryEscape(plain) == plain: // basic_encoding changes nothing
			return "", []string{"client_id", "client_secret", "auth_method"}
		case r.BasicEncoding == basicRaw:
			return "set basic_encoding form, if the server decodes the secret", []string{"client_secret", "auth_method"}
		}
		return "set basic_encoding raw, as many servers do not decode id and secret", []string{"client_id", "client_secret"}
	case authSecretJWT:
		lead, names = r.jwtSettings("client_secret")
		return lead, append(names, "auth_method")
	case authKeyJWT:
		if !r.usesKey() {
			return "", []string{"assertion_file (issuer, subject, audience and expiry of its JWT)", "client_id", "auth_method"}
		}
		return r.jwtSettings("private_key", "key_id")
	case authTLS:
		if r.Issuer == "" {
			return "", []string{"client_id", "client_certificate", "token_url"} // certificates may have an address of their own
		}
		return "", []string{"client_id", "client_certificate", "auth_method"}
	case authByGrant:
		return r.grantSettings()
	case authNone:
		return "set client_secret, if the client has one", []string{"client_id"}
	}
	return "", []string{"client_id", "client_secret", "auth_method"}
}

// jwtSettings is clientSettings for a JWT that these settings sign. If the server says
// what it is that does not fit, that comes first.
func (r denial) jwtSettings(signing ...string) (lead string, names []string) {
	// Without a code, it may be that of the token.
	ofAudience := r.spoken("audience") && (knownCode(r.Code) != "" || len(r.Audience) == 0)
	ofSignature := !ofAudience && (r.spoken("signature") || r.spoken("public key"))
	if lead = r.audienceAdvice(); lead != "" && !ofSignature {
		return lead, signing
	}
	if ofAudience {
		return "", append([]string{"assertion_audience"}, signing...)
	}
	return "", append(signing, "assertion_audience")
}

// audienceAdvice names the audience that most servers accept, if the JWT has another one
// only because there is an issuer.
func (r denial) audienceAdvice() string {
	issuer, err := url.Parse(r.Issuer)
	if r.Issuer == "" || r.AssertionAudience != "" || err != nil {
		return ""
	}
	if r.url != nil && originOf(r.url) != originOf(issuer) {
		return "" // a bad issuer could have JWTs signed that are meant for another server
	}
	if r.shown == "" || strings.HasSuffix(r.shown, "…") {
		return "set assertion_audience to the URL of the token endpoint, which many servers want"
	}
	return "set assertion_audience " + r.shown + ", which many servers want"
}

// grantAdvice says what to change about the JWT that the token is granted for.
func (r denial) grantAdvice() string {
	lead, names := r.grantSettings()
	if lead != "" {
		return lead + "; or check " + inWords(names)
	}
	return "check " + inWords(names)
}

// grantSettings names the settings of that JWT, as clientSettings does.
func (r denial) grantSettings() (lead string, names []string) {
	if r.AssertionFile != "" {
		return "", []string{"assertion_file (issuer, subject, audience and expiry of its JWT)"}
	}
	names = []string{"client_id", "private_key", "assertion_audience"}
	if r.Subject != "" {
		names = []string{"subject", "private_key", "client_id"}
	}
	if lead = r.audienceAdvice(); lead != "" {
		return lead, names[:2]
	}
	return "", names
}

// requestSettings names the settings that a request is made of, three at most: those
// first of which the server speaks, then those that few servers know.
func (r denial) requestSettings() []string {
	var spokenOf, names []string
	for _, setting := range []struct {
		name        string
		set, spoken bool
	}{
		{"audience", len(r.Audience) > 0, r.spoken("audience")},
		{"resource", len(r.Resource) > 0, r.spoken("resource")},
		{"param", len(r.Params) > 0, slices.ContainsFunc(sortedKeys(r.Params), func(name string) bool { return len(name) > 3 && r.spoken(strings.ToLower(name)) })},
		{"assertion_file", r.AssertionFile != "", r.spoken("assertion")},
		{"key_id", r.usesKey(), r.spoken("kid")},
		{"private_key", r.usesKey(), r.spoken("signature")},
		{"scopes", true, r.spoken("scope")},
		{"auth_method", true, r.spoken("authentication")},
	} {
		switch {
		case !setting.set:
		case setting.spoken:
			spokenOf = append(spokenOf, setting.name)
		default:
			names = append(names, setting.name)
		}
	}
	names = append(spokenOf, names...)
	return names[:min(len(names), 3)]
}

// inWords returns names in words.
func inWords(names []string) string {
	last := len(names) - 1
	if last == 0 {
		return names[0]
	}
	return strings.Join(names[:last], ", ") + " and " + names[last]
}
