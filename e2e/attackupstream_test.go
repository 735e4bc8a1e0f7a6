package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
)

// attackUpstream is an upstream that misuses all that it is sent. It tells whether
// that is what it may be sent: no other's token, and nothing that a client claims.
type attackUpstream struct {
	owner   byte
	address string // as reverse_proxy has it
	issuer  *attackIssuer
	found   *findings

	unreachable bool // it gets no request at all
	tokenless   bool // in some configs at least, it gets no token, and all that clients claim

	tricks   map[string]http.Handler
	played   *tally // tricks
	admitted atomic.Int64
	requests atomic.Int64
}

// tenantOf is the tenant that only this upstream is told.
func tenantOf(owner byte) string { return "tenant-" + string(owner) }

func (u *attackUpstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u.judge(r)
	name := u.trick(r)
	u.played.add(name)
	u.tricks[name].ServeHTTP(w, r)
	// They are known now, if the trick has read the body.
	u.judgeFields(r, "trailer", r.Trailer)
}

// trick returns the name of the trick to play: that which the client asks for, except
// in health checks and in bursts of refusals.
func (u *attackUpstream) trick(r *http.Request) string {
	n := u.requests.Add(1)
	if strings.HasPrefix(r.URL.Path, healthPath) {
		return healthTricks[n%int64(len(healthTricks))]
	}
	if n%200 < 20 {
		return "refuse"
	}
	for part := range strings.SplitSeq(r.URL.Path, "/") {
		if _, ok := u.tricks[part]; ok {
			return part
		}
	}
	return "plain"
}

// judge notes what of a request should not have come here.
func (u *attackUpstream) judge(r *http.Request) {
	request := fmt.Sprintf("%s %s of %s: %v", r.Method, r.RequestURI, r.Host, r.Header)
	if others := foreign([]byte(request), string(u.owner)); others != "" {
		u.found.add("what belongs to another", "upstream %c got that of %s in %s", u.owner, others, request)
	}
	named := strings.HasPrefix(r.URL.Path, "/named") || strings.HasPrefix(r.URL.Path, "/dynamic")
	if u.unreachable || (named && u.owner != 'c') {
		u.found.add("request to an upstream without credentials", "upstream %c got %s", u.owner, request)
	}
	token, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	own := bearer && u.issuer.ownerOf(token) == u.owner
	if own {
		u.admitted.Add(1)
	}
	if u.tokenless {
		return
	}
	u.judgeFields(r, "header", r.Header)
	if strings.EqualFold(r.Method, http.MethodTrace) || strings.EqualFold(r.Method, "TRACK") {
		u.found.add("TRACE", "upstream %c got %s", u.owner, request)
	}
	// A check has a token only if there is one.
	isCheck := strings.HasPrefix(r.URL.Path, healthPath)
	if !own && (!isCheck || r.Header.Get("Authorization") != "") {
		u.found.add("request without a token of the upstream", "upstream %c got %s", u.owner, request)
	}
	if got := r.Header.Get("X-Tenant-Id"); got != tenantOf(u.owner) {
		u.found.add("another tenant", "upstream %c got %s", u.owner, request)
	}
}

// judgeFields notes the headers or trailers that may be taken for the gateway's, and
// those that come twice.
func (u *attackUpstream) judgeFields(r *http.Request, part string, fields http.Header) {
	for name, values := range fields {
		folded := strings.ToLower(strings.Map(foldField, name))
		if folded != "authorization" && folded != "x-tenant-id" || u.tokenless {
			continue
		}
		if part == "trailer" || len(values) != 1 || name != http.CanonicalHeaderKey(name) || folded != strings.ToLower(name) {
			u.found.add("forged identity", "upstream %c got the %s %s: %q in %s %s",
				u.owner, part, name, values, r.Method, r.RequestURI)
		}
	}
}

// foldField makes a name what CGI and its successors may take it for.
func foldField(r rune) rune {
	if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') {
		return '-'
	}
	return r
}
