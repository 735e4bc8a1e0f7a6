// The admin API: it shows the OAuth clients, and renews or forgets a token on request.

package outboundauth

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
)

func init() {
	caddy.RegisterModule(adminAPI{})
}

// adminClients is the path of the clients in the admin API.
const adminClients = "/oauth2/clients"

// totalHeader says how many clients a list would have without its limit.
const totalHeader = "X-Total-Count"

// adminAPI shows the OAuth clients. An operator can also renew or forget a token:
//
//	GET    /oauth2/clients             all clients, or those that the query selects
//	GET    /oauth2/clients/<id>        one client
//	POST   /oauth2/clients/<id>/renew  request a token now, and wait for it
//	DELETE /oauth2/clients/<id>/token  forget the token
//
// The query of the first has any of these parameters, and no others:
//
//	name   of the clients, or a pattern of path.Match in which * matches a slash, too
//	key    of requests whose client it is, as client_by has it
//	state  fresh, stale, expired, absent, failing or refused; or several, with commas
//	limit  how many clients to show at most; the header X-Total-Count says how many there are
//
// The clients come in this order: those whose last attempt to get a token failed for a
// reason that does not pass by itself, others whose last attempt failed, those whose token
// an upstream refuses, and the rest; of each, by name and then by ID.
//
// No answer holds a token or a secret. The last two answer 429 if it is too early.
type adminAPI struct{}

// CaddyModule returns the Caddy module information.
func (adminAPI) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.oauth2",
		New: func() caddy.Module { return new(adminAPI) },
	}
}

// Routes implements caddy.AdminRouter.
func (a adminAPI) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{
		{Pattern: adminClients, Handler: caddy.AdminHandlerFunc(a.serve)},
		{Pattern: adminClients + "/", Handler: caddy.AdminHandlerFunc(a.serve)},
	}
}

// clientStatus is what the admin API shows of a client.
type clientStatus struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	description

	State    string     `json:"state"`
	Fetching bool       `json:"fetching"` // a token request is under way
	Obtained *time.Time `json:"obtained,omitempty"`
	Renewal  *time.Time `json:"renewal,omitempty"`
	Expires  *time.Time `json:"expires,omitempty"`
	Shared   string     `json:"shared,omitempty"` // with share_tokens: own or taken, by which instance the token was asked for
	Bound    bool       `json:"bound"`            // the token is bound to a key or a certificate
	JKT      string     `json:"jkt,omitempty"`    // the thumbprint of the key (RFC 9449 §6.1)

	// The failures since the last success; empty if there are none.
	Failures  int            `json:"failures"`
	LastError *reportedError `json:"last_error,omitempty"`
	RetryAt   *time.Time     `json:"retry_at,omitempty"`

	// The upstreams that have refused a token, those first that refuse it now. There
	// may be many: UpstreamsLeftOut says how many more there are.
	Upstreams        []reportedUpstream `json:"upstreams,omitempty"`
	UpstreamsLeftOut int                `json:"upstreams_left_out,omitempty"`

	// These count for all clients of this name since the process started.
	Requests      map[string]uint64 `json:"requests"`
	TokenRequests map[string]uint64 `json:"token_requests"`
	Rejections    map[string]uint64 `json:"rejections"`
}

// shared says by which instance a shared token was asked for; "" if none is shared.
func (s *sourceStatus) shared() string {
	switch {
	case !s.ShareTokens || s.obtained.IsZero():
		return ""
	case s.taken:
		return "taken"
	}
	return "own"
}

// reportedUpstream is what the admin API shows of an upstream. It has nothing of the
// requests that were refused: a path can tell who the caller is.
type reportedUpstream struct {
	Address     string    `json:"address"`
	Verdict     string    `json:"verdict"`  // what its last refusal was about: the token, or the path
	Refusing    bool      `json:"refusing"` // it has accepted no request since it refused the token
	LastRefused time.Time `json:"last_refused"`
}

// maxReportedUpstreams is how many upstreams of a client the admin API shows at most.
const maxReportedUpstreams = 100

// reportUpstreams returns what the admin API shows of the upstreams, which are sorted by
// address, and how many it leaves out. It shows those that refuse the token, before those
// that have refused the latest.
func reportUpstreams(upstreams []upstreamStatus) (reported []reportedUpstream, leftOut int) {
	rank := func(u upstreamStatus) int {
		if u.refusesToken() {
			return 0
		}
		return 1
	}
	shown := slices.Clone(upstreams) // clients of other names have the same list
	if leftOut = max(0, len(shown)-maxReportedUpstreams); leftOut > 0 {
		slices.SortStableFunc(shown, func(a, b upstreamStatus) int {
			return cmp.Or(rank(a)-rank(b), b.refused.Compare(a.refused))
		})
		shown = shown[:maxReportedUpstreams]
	}
	// By address again: an order that changes with each refusal is hard to read.
	slices.SortFunc(shown, func(a, b upstreamStatus) int {
		return cmp.Or(rank(a)-rank(b), strings.Compare(a.address, b.address))
	})
	reported = make([]reportedUpstream, len(shown))
	for i, u := range shown {
		reported[i] = reportedUpstream{u.address, u.verdict, u.refusesToken(), u.refused}
	}
	return reported, leftOut
}

// newClientStatus returns what the admin API shows of the client of a source.
func newClientStatus(s sourceStatus) clientStatus {
	status := clientStatus{
		ID:          s.key.id(),
		Name:        s.name,
		description: s.description,
		State:       s.state,
		Fetching:    s.fetching,
		Obtained:    instant(s.obtained),
		Renewal:     instant(s.renewal),
		Expires:     instant(s.expires),
		Shared:      s.shared(),
		Bound:       s.bound,
		JKT:         s.thumbprint,
		Failures:    s.failures,
		RetryAt:     instant(s.retryAt),
	}
	if s.err != nil {
		status.LastError = reportError(s.err)
	}
	status.Upstreams, status.UpstreamsLeftOut = reportUpstreams(s.upstreams)
	status.Requests, status.TokenRequests, status.Rejections = countersOf(s.name).counts()
	return status
}

// instant returns t for JSON, or nil if t is zero. encoding/json leaves out a
// nil pointer, but not a zero time.
func instant(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// clientStatuses returns the statuses of the clients that are selected, in the order of
// selection.of, and how many there are without its limit.
func clientStatuses(selected selection) (statuses []clientStatus, total int) {
	shown, total := selected.of(sourceStatuses())
	statuses = make([]clientStatus, len(shown)) // never nil: in JSON, an empty list is []
	for i, s := range shown {
		statuses[i] = newClientStatus(*s)
	}
	return statuses, total
}

func (adminAPI) serve(w http.ResponseWriter, r *http.Request) error {
	path := strings.Trim(strings.TrimPrefix(r.URL.Path, adminClients), "/")
	if path == "" {
		if err := allowOnly(w, r, http.MethodGet); err != nil {
			return err
		}
		return answerList(w, r)
	}
	id, action, _ := strings.Cut(path, "/")
	key, source, ok := sourceByID(id)
	if !ok {
		return adminError(http.StatusNotFound, fmt.Errorf("there is no client %q; GET %s lists them", id, adminClients))
	}
	switch action {
	case "":
		if err := allowOnly(w, r, http.MethodGet); err != nil {
			return err
		}
	case "renew":
		if err := allowOnly(w, r, http.MethodPost); err != nil {
			return err
		}
		if _, err := source.FetchNow(r.Context()); err != nil {
			return forcedError(w, err)
		}
	case "token":
		if err := allowOnly(w, r, http.MethodDelete); err != nil {
			return err
		}
		if err := source.Forget(r.Context()); err != nil {
			return forcedError(w, err)
		}
	default:
		return adminError(http.StatusNotFound, errors.New("a client has renew and token only"))
	}
	statuses := source.statuses(time.Now())
	if len(statuses) == 0 {
		return adminError(http.StatusNotFound, errors.New("the client has just been unloaded"))
	}
	// Clients of several names share the source: it is the first that a list shows.
	status := slices.MinFunc(statuses, func(a, b sourceStatus) int { return strings.Compare(a.name, b.name) })
	status.key = key
	return answerJSON(w, newClientStatus(status))
}

// answerList answers with the clients that the query selects. The header says how many
// there are without its limit: the body is a list of clients, and nothing else.
func answerList(w http.ResponseWriter, r *http.Request) error {
	params, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return adminError(http.StatusBadRequest, fmt.Errorf("the query can't be read: %w", err))
	}
	selected, err := parseSelection(params)
	if err != nil {
		return adminError(http.StatusBadRequest, err)
	}
	statuses, total := clientStatuses(selected)
	w.Header().Set(totalHeader, strconv.Itoa(total))
	return answerJSON(w, statuses)
}

// sourceByID finds the source of the client that has this id.
func sourceByID(id string) (found sourceKey, source *tokenSource, ok bool) {
	sources.Range(func(key, value any) bool {
		if key := key.(sourceKey); key.id() == id {
			found, source = key, value.(*tokenSource)
			ok = len(source.statuses(time.Now())) > 0 // false: no client is attached to it yet
		}
		return !ok
	})
	return found, source, ok
}

func allowOnly(w http.ResponseWriter, r *http.Request, method string) error {
	if r.Method == method {
		return nil
	}
	w.Header().Set("Allow", method)
	return adminError(http.StatusMethodNotAllowed, fmt.Errorf("use %s", method))
}

// forcedError is the error of an operator's request that brings about a token request.
func forcedError(w http.ResponseWriter, err error) error {
	if early, ok := errors.AsType[*earlyError](err); ok {
		w.Header().Set("Retry-After", secondsUntil(early.until))
		return adminError(http.StatusTooManyRequests, err)
	}
	return adminError(http.StatusBadGateway, err)
}

func adminError(status int, err error) error {
	return caddy.APIError{HTTPStatus: status, Err: err}
}

func answerJSON(w http.ResponseWriter, v any) error {
	w.Header().Set("Content-Type", "application/json")
	return json.NewEncoder(w).Encode(v)
}

// Interface guards.
var (
	_ caddy.Module      = adminAPI{}
	_ caddy.AdminRouter = adminAPI{}
)
