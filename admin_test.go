package outboundauth

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// clients are the clients that the admin API lists.
func (g *gateway) clients() []clientStatus {
	g.t.Helper()
	r := g.ask(http.MethodGet, adminClients).want(g.t, http.StatusOK)
	if strings.Contains(r.body, "canary") {
		g.t.Errorf("got %s, want neither token nor secret", r.body)
	}
	var statuses []clientStatus
	if err := json.Unmarshal([]byte(r.body), &statuses); err != nil || statuses == nil {
		g.t.Fatalf("got %q, err %v, want a list", r.body, err)
	}
	return statuses
}

// only is the one client of the gateway.
func (g *gateway) only() clientStatus {
	g.t.Helper()
	clients := g.clients()
	if len(clients) != 1 {
		g.t.Fatalf("got %d clients, want one", len(clients))
	}
	return clients[0]
}

// adminGateway starts a gateway with one client, and returns where the admin
// API has it.
func adminGateway(t *testing.T, settings string) (g *gateway, auth *authServer, up *upstream, path string) {
	t.Helper()
	wantNothingLeft(t)
	auth = newAuthServer(t)
	up = newUpstream(t, auth)
	g = newOperableGateway(t)
	site := proxySite(up, auth, settings)
	g.load(strings.Replace(site, "/token\n", "/token?key=canary-query\n", 1))
	g.get().want(t, http.StatusOK)
	restAll()
	return g, auth, up, adminClients + "/" + g.only().ID
}

// sourceList returns the sources that are in use.
func sourceList() (list []*tokenSource) {
	sources.Range(func(_, source any) bool {
		if s := source.(*tokenSource); !s.when(func(s *tokenSource, _ time.Time) bool { return s.unused() }) {
			list = append(list, s)
		}
		return true
	})
	return list
}

// restAll lets a renewal be made now: see tokenSource.rested.
func restAll() {
	for _, s := range sourceList() {
		s.rested()
	}
}

func TestAdminListsClients(t *testing.T) {
	g, auth := statusGateway(t)
	clients := g.clients()
	if len(clients) != 2 {
		t.Fatalf("got %d clients, want 2", len(clients))
	}
	failing, good := clients[0], clients[1]
	for _, s := range sourceStatuses() { // of settings, which a secret may be guessed from
		if id := s.key.id(); strings.Contains(hex.EncodeToString(s.key[:]), id) || id != s.key.id() {
			t.Errorf("got id %s, want one that the settings don't tell", id)
		}
	}
	now := time.Now()
	if good.Name != "a-good" || good.TokenEndpoint != auth.URL+"/token" || good.ClientID != "good" || good.Issuer != "" ||
		good.AuthMethod != authBasic || good.GrantType != grantClientCredentials || good.State != stateFresh || good.Fetching {
		t.Errorf("got %+v, want the client as it is configured", good)
	}
	if good.Obtained == nil || now.Sub(*good.Obtained) > time.Minute || good.Renewal == nil || good.Expires == nil ||
		!good.Renewal.After(*good.Obtained) || !good.Expires.After(*good.Renewal) {
		t.Errorf("got obtained %v, renewal %v, expires %v, want them one after the other", good.Obtained, good.Renewal, good.Expires)
	}
	if good.Failures != 0 || good.LastError != nil || good.RetryAt != nil {
		t.Errorf("got %+v, want no failure", good)
	}
	if failing.State != stateAbsent || failing.Obtained != nil || failing.Renewal != nil || failing.Expires != nil {
		t.Errorf("got %+v, want no token", failing)
	}
	if e := failing.LastError; failing.Failures != 1 || failing.RetryAt == nil || !failing.RetryAt.After(now.Add(time.Second)) ||
		e == nil || e.Code != "invalid_client" || e.Status != http.StatusUnauthorized || e.Hint == "" {
		t.Errorf("got %+v with the error %+v, want the failure", failing, failing.LastError)
	}
	for _, client := range clients {
		r := g.ask(http.MethodGet, adminClients+"/"+client.ID).want(t, http.StatusOK)
		var one clientStatus
		if err := json.Unmarshal([]byte(r.body), &one); err != nil || one.ID != client.ID || one.Name != client.Name {
			t.Errorf("got %s, err %v, want %s", r.body, err, client.Name)
		}
		if got := r.header.Get("Content-Type"); got != "application/json" {
			t.Errorf("got the type %q, want JSON", got)
		}
	}
	g.load("respond ok")
	if got := g.clients(); len(got) != 0 {
		t.Errorf("got %d clients, want none", len(got))
	}
}

// everyTrouble are clients of which each has another trouble, by name those last that
// need an operator most.
const everyTrouble = `reverse_proxy /refused $A {
	transport oauth2 {
		token_url $AUTH/token?key=canary-query
		client_secret canary-secret
		client_id c-refused
		name b/refused
		retry_on 401
	}
}
reverse_proxy $A $B $C {
	transport oauth2 {
		token_url $AUTH/token?key=canary-query
		client_secret canary-secret
		upstream $A {
			name a/good
			client_id good
		}
		upstream $B {
			name c/failing
			client_id failing
		}
		upstream $C {
			name d/permanent
			client_id permanent
		}
	}
}`

// troubledGateway has everyTrouble.
func troubledGateway(t *testing.T) *gateway {
	t.Helper()
	auth := newAuthServer(t)
	auth.script(func(w http.ResponseWriter, r tokenRequest) bool {
		switch r.client {
		case "failing":
			return refusingForLong(http.StatusServiceUnavailable, "")(w, r)
		case "permanent":
			return refusingForLong(http.StatusUnauthorized, `{"error":"invalid_client"}`)(w, r)
		}
		return false
	})
	a := newUpstream(t, auth)
	a.script(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/refused" {
			refuse(w, http.StatusUnauthorized)
		}
		return r.URL.Path == "/refused"
	})
	g := newOperableGateway(t)
	g.load(expand(everyTrouble, "$A", a.addr, "$B", newUpstream(t, auth).addr, "$C", newUpstream(t, auth).addr, "$AUTH", auth.URL))
	eventually(t, func() bool {
		return !slices.ContainsFunc(sourceStatuses(), func(s *sourceStatus) bool { return s.state == stateAbsent && s.failures == 0 })
	}, "the warm-up")
	g.send(http.MethodGet, "/refused", nil).want(t, http.StatusUnauthorized)
	eventually(t, func() bool {
		return slices.ContainsFunc(sourceStatuses(), func(s *sourceStatus) bool { return s.is(stateRefused) && !s.fetching })
	}, "the refusal")
	return g
}

func TestAdminListsTheClientsThatAreSelected(t *testing.T) {
	g := troubledGateway(t)
	for query, want := range map[string]struct {
		names []string
		total string
	}{
		"":                              {[]string{"d/permanent", "c/failing", "b/refused", "a/good"}, "4"},
		"?":                             {[]string{"d/permanent", "c/failing", "b/refused", "a/good"}, "4"},
		"?limit=3":                      {[]string{"d/permanent", "c/failing", "b/refused"}, "4"},
		"?limit=4":                      {[]string{"d/permanent", "c/failing", "b/refused", "a/good"}, "4"},
		"?state=failing":                {[]string{"d/permanent", "c/failing"}, "2"},
		"?state=failing&limit=1":        {[]string{"d/permanent"}, "2"},
		"?state=fresh":                  {[]string{"b/refused", "a/good"}, "2"},
		"?state=refused":                {[]string{"b/refused"}, "1"},
		"?state=refused,absent":         {[]string{"d/permanent", "c/failing", "b/refused"}, "3"},
		"?state=expired":                {nil, "0"},
		"?name=a/good":                  {[]string{"a/good"}, "1"},
		"?name=a%2Fgood":                {[]string{"a/good"}, "1"},
		"?name=good":                    {nil, "0"},
		"?name=*e*":                     {[]string{"d/permanent", "b/refused"}, "2"},
		"?name=[a-c]*&state=failing":    {[]string{"c/failing"}, "1"},
		"?limit=1&name=%2A&state=fresh": {[]string{"b/refused"}, "2"},
	} {
		for _, slash := range []string{"", "/"} {
			r := g.ask(http.MethodGet, adminClients+slash+query).want(t, http.StatusOK)
			var clients []clientStatus
			if err := json.Unmarshal([]byte(r.body), &clients); err != nil || clients == nil {
				t.Errorf("%q: got %q, err %v, want a list", query, r.body, err)
			}
			var names []string
			for _, c := range clients {
				names = append(names, c.Name)
			}
			if total := r.header.Get("X-Total-Count"); !slices.Equal(names, want.names) || total != want.total {
				t.Errorf("%q: got %q of %s, want %q of %s", query, names, total, want.names, want.total)
			}
		}
	}
}

func TestAdminRefusesQueries(t *testing.T) {
	g := newOperableGateway(t)
	g.load("respond ok")
	for query, want := range map[string]string{
		"name=[a":    `name: \"[a\" is not a pattern`,
		"state=good": `state: \"good\" is not known; name one or more of fresh, stale, expired, absent, failing, refused`,
		"limit=0":    `limit: \"0\" is not a positive integer`,
		"limit=+5":   `limit: \" 5\" is not a positive integer`,
		"limit":      `limit: \"\" is not a positive integer`,
		"client=a":   `\"client\": is not a parameter of this list; it has name, key, state, limit`,
		"name=%zz":   `the query can't be read: invalid URL escape \"%zz\"`,
		"limit=1;a":  `the query can't be read`,
	} {
		r := g.ask(http.MethodGet, adminClients+"?"+query).want(t, http.StatusBadRequest)
		if !strings.Contains(r.body, want) || r.header.Get("X-Total-Count") != "" {
			t.Errorf("%q: got %s, want %s", query, r.body, want)
		}
	}
}

// Clients that share a token share an ID, too.
func TestAdminShowsOneClientOfAnID(t *testing.T) {
	auth := newAuthServer(t)
	up := newUpstream(t, auth)
	g := newOperableGateway(t)
	g.load(strings.Replace(proxySite(up, auth, "name b"), "reverse_proxy", "reverse_proxy /b", 1) + "\n" + proxySite(up, auth, "name a"))
	clients := g.clients()
	if len(clients) != 2 || clients[0].ID != clients[1].ID || clients[0].Name != "a" || clients[1].Name != "b" {
		t.Fatalf("got %+v, want two clients with one ID", clients)
	}
	r := g.ask(http.MethodGet, adminClients+"/"+clients[0].ID).want(t, http.StatusOK)
	var one clientStatus
	if err := json.Unmarshal([]byte(r.body), &one); err != nil || one.Name != "a" || one.ID != clients[0].ID {
		t.Errorf("got %s, err %v, want the first of the list", r.body, err)
	}
}

// reportOf returns what the admin API says about a client's upstreams, as JSON.
func reportOf(t *testing.T, upstreams []upstreamStatus) string {
	t.Helper()
	text, err := json.Marshal(newClientStatus(sourceStatus{description: description{name: t.Name()}, upstreams: upstreams}))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestAdminShowsUpstreamsThatRefused(t *testing.T) {
	at := time.Date(2025, 3, 1, 12, 0, 0, 0, time.UTC)
	got := reportOf(t, []upstreamStatus{
		{"a:443", verdictPath, false, at},
		{"b:443", verdictToken, false, at},
		{"unix//run/c.sock", verdictToken, true, at.Add(time.Second)},
	})
	want := `,"upstreams":[` +
		`{"address":"unix//run/c.sock","verdict":"token","refusing":true,"last_refused":"2025-03-01T12:00:01Z"},` +
		`{"address":"a:443","verdict":"path","refusing":false,"last_refused":"2025-03-01T12:00:00Z"},` +
		`{"address":"b:443","verdict":"token","refusing":false,"last_refused":"2025-03-01T12:00:00Z"}],"requests":`
	if !strings.Contains(got, want) {
		t.Errorf("got %s, want %s in it", got, want)
	}
	if got := reportOf(t, nil); strings.Contains(got, "upstreams") {
		t.Errorf("got %s, want no upstreams", got)
	}
}

// A client may have a thousand dynamic upstreams. Those are left out that matter least.
func TestAdminShowsNotAllUpstreamsThatRefused(t *testing.T) {
	const all, refusing = 1000, 20
	at := time.Now()
	var upstreams []upstreamStatus
	for i := range all {
		u := upstreamStatus{fmt.Sprintf("10.0.0.1:%d", 1000+i), verdictPath, false, at.Add(time.Duration(i) * time.Second)}
		if i%(all/refusing) == 0 {
			u.verdict, u.refusing, u.refused = verdictToken, true, at.Add(-time.Hour)
		}
		upstreams = append(upstreams, u)
	}
	before := slices.Clone(upstreams)
	got, leftOut := reportUpstreams(upstreams)
	if len(got) != maxReportedUpstreams || leftOut != all-maxReportedUpstreams {
		t.Fatalf("got %d and %d left out, want %d of %d", len(got), leftOut, maxReportedUpstreams, all)
	}
	for i, u := range got {
		if u.Refusing != (i < refusing) {
			t.Errorf("upstream %d: got refusing %v, want the %d that refuse first", i, u.Refusing, refusing)
		}
		if latest := at.Add((all - maxReportedUpstreams) * time.Second); !u.Refusing && u.LastRefused.Before(latest) {
			t.Errorf("upstream %d: got one that refused at %v, want the latest", i, u.LastRefused)
		}
		if i > 0 && u.Refusing == got[i-1].Refusing && u.Address <= got[i-1].Address {
			t.Errorf("got %s behind %s, want them by address", u.Address, got[i-1].Address)
		}
	}
	if !slices.Equal(upstreams, before) {
		t.Error("got another order of the statuses, which clients of other names share")
	}
}

func TestAdminCountsWhatMetricsCount(t *testing.T) {
	name := newName()
	g, auth, up, _ := adminGateway(t, "scopes read write\nname "+name)
	wantAll(t, g.burst(2), http.StatusOK)
	auth.revoke()
	g.get().want(t, http.StatusOK)
	got := g.only()
	for _, test := range []struct {
		counts map[string]uint64
		label  string
		want   uint64
	}{
		{got.TokenRequests, "ok", 2},
		{got.Rejections, "recovered", 1},
		{got.Rejections, "no_token", 0},
	} {
		if test.counts[test.label] != test.want {
			t.Errorf("%s: got %d, want %d", test.label, test.counts[test.label], test.want)
		}
	}
	scraped := g.scrape().of(name)
	total := uint64(0)
	for use, count := range got.Requests {
		total += count
		if want := scraped[fmt.Sprintf("requests_total{token=%q}", use)]; float64(count) != want {
			t.Errorf("%s: got %d, want %v as in the metrics", use, count, want)
		}
	}
	if want := uint64(4); total != want || len(up.got()) != 5 {
		t.Errorf("got %v for %d requests at the upstream, want %d", got.Requests, len(up.got()), want)
	}
	if !slices.Equal(got.Scopes, []string{"read", "write"}) {
		t.Errorf("got scopes %v, want read and write", got.Scopes)
	}
}

func TestAdminShowsAFetchInFlight(t *testing.T) {
	auth := newAuthServer(t)
	release := auth.hang()
	defer release()
	g := newOperableGateway(t)
	g.load(proxySite(newUpstream(t, auth), auth, "name "+newName()))
	eventually(t, func() bool { return len(auth.asked()) == 1 }, "the token request of the warm-up")
	if got := g.only(); !got.Fetching || got.State != stateAbsent {
		t.Errorf("got %+v, want a fetch and no token", got)
	}
}

func TestAdminShowsADiscoveredEndpoint(t *testing.T) {
	auth := newAuthServer(t)
	mux := http.NewServeMux()
	issuer := httptest.NewServer(mux)
	t.Cleanup(issuer.Close)
	found := make(chan struct{})
	mux.HandleFunc("/.well-known/oauth-authorization-server", func(w http.ResponseWriter, _ *http.Request) {
		<-found
		fmt.Fprintf(w, `{"issuer":%q,"token_endpoint":%q}`, issuer.URL, auth.URL+"/token?key=canary-query")
	})
	release := sync.OnceFunc(func() { close(found) })
	t.Cleanup(release) // before the server is closed
	g := newOperableGateway(t)
	g.load(strings.Replace(proxySite(newUpstream(t, auth), auth, ""), "token_url "+auth.URL+"/token", "issuer "+issuer.URL, 1))
	if got := g.only(); got.TokenEndpoint != "" || got.Issuer != issuer.URL {
		t.Errorf("got the endpoint %q of %q, want none yet", got.TokenEndpoint, got.Issuer)
	}
	release()
	g.get().want(t, http.StatusOK)
	if got := g.only(); got.TokenEndpoint != auth.URL+"/token" {
		t.Errorf("got the endpoint %q, want what was discovered, without its query", got.TokenEndpoint)
	}
}

func TestAdminRenews(t *testing.T) {
	g, auth, up, path := adminGateway(t, "")
	before := g.only()
	r := g.ask(http.MethodPost, path+"/renew").want(t, http.StatusOK)
	var after clientStatus
	if err := json.Unmarshal([]byte(r.body), &after); err != nil || after.ID != before.ID || after.Obtained == nil || !after.Obtained.After(*before.Obtained) {
		t.Errorf("got %s, err %v, want a newer token than of %v", r.body, err, before.Obtained)
	}
	auth.wantAsked(t, 2)
	g.get().want(t, http.StatusOK)
	up.last(t).wantHeader(t, "Authorization", "Bearer canary-token-2-of-gateway")
	auth.wantAsked(t, 2)
}

// Many renewals in a row are one token request each second at most, and none while the
// server has asked for time or refuses the client.
func TestAdminRenewalsAreLimited(t *testing.T) {
	renew := func(g *gateway, path string, want int, says string) {
		t.Helper()
		r := g.ask(http.MethodPost, path+"/renew").want(t, want)
		seconds, err := strconv.Atoi(r.header.Get("Retry-After"))
		if early := want == http.StatusTooManyRequests; early != (err == nil && seconds > 0) || !strings.Contains(r.body, says) || strings.Contains(r.body, "canary") {
			t.Errorf("got Retry-After %q with %d and %s, want when to try again if it is too early, and %q", r.header.Get("Retry-After"), r.status, r.body, says)
		}
	}
	g, auth, _, path := adminGateway(t, "")
	renew(g, path, http.StatusOK, "fresh")
	asked := len(auth.asked())
	started := time.Now()
	for range 50 {
		g.ask(http.MethodPost, path+"/renew")
		g.ask(http.MethodDelete, path+"/token")
		g.get().want(t, http.StatusOK)
	}
	if got, most := len(auth.asked())-asked, int(time.Since(started)/forcedInterval)+1; got > most {
		t.Errorf("got %d token requests for 50 renewals in %v, want %d at most", got, time.Since(started), most)
	}
	for _, answer := range []struct {
		script func(http.ResponseWriter, tokenRequest) bool
		says   string
	}{
		{refusingForLong(http.StatusServiceUnavailable, `canary`), "asks to be left alone"},
		{refusingForLong(http.StatusUnauthorized, `{"error":"invalid_client"}`), "refused the client"},
	} {
		restAll()
		auth.script(answer.script)
		renew(g, path, http.StatusBadGateway, "token endpoint")
		asked := len(auth.asked())
		for _, s := range sourceList() {
			s.mu.Lock()
			s.requested = s.requested.Add(-forcedInterval)
			s.mu.Unlock()
		}
		for range 50 {
			renew(g, path, http.StatusTooManyRequests, answer.says)
		}
		auth.wantAsked(t, asked)
	}
}

// A fault that passes has passed when the operator says so.
func TestAdminRenewsDuringABackOff(t *testing.T) {
	g, auth, _, path := adminGateway(t, "")
	g.ask(http.MethodDelete, path+"/token").want(t, http.StatusOK)
	for _, answer := range []struct {
		status     int
		body, code string
	}{
		{http.StatusUnauthorized, fmt.Sprintf(`{"error":"invalid_client","error_description":"canary-secret %s"}`, "is wrong"), "invalid_client"},
		{http.StatusServiceUnavailable, `{"access_token":"canary-token"}`, "http_status"},
		{http.StatusOK, `{"access_token":"canary-token","token_type":"mac"}`, "invalid_response"},
	} {
		auth.script(refusing(answer.status, answer.body))
		restAll()
		r := g.ask(http.MethodPost, path+"/renew").want(t, http.StatusBadGateway)
		if !strings.Contains(r.body, answer.code) || strings.Contains(r.body, "canary") {
			t.Errorf("got %s, want %s and no secret", r.body, answer.code)
		}
		if got := g.only(); got.State != stateAbsent || got.LastError == nil || got.LastError.Code != answer.code || got.RetryAt == nil {
			t.Errorf("got %+v, want a back-off after %s", got, answer.code)
		}
	}
	if got := g.logged("canary-"); len(got) != 0 {
		t.Errorf("got %q in the log, want no secret", got)
	}
	auth.script(nil)
	restAll()
	g.ask(http.MethodPost, path+"/renew").want(t, http.StatusOK)
	if got := g.only(); got.State != stateFresh || got.Failures != 0 || got.LastError != nil || got.RetryAt != nil {
		t.Errorf("got %+v, want the end of the back-off", got)
	}
	g.get().want(t, http.StatusOK)
}

// A failed renewal leaves the token, which is still good, in use.
func TestAdminRenewalThatFailsKeepsTheToken(t *testing.T) {
	g, auth, up, path := adminGateway(t, "")
	auth.script(refusingForLong(http.StatusUnauthorized, `{"error":"invalid_client"}`))
	g.ask(http.MethodPost, path+"/renew").want(t, http.StatusBadGateway)
	if got := g.only(); got.State != stateFresh || got.Failures != 1 {
		t.Errorf("got %+v, want the token and a failure", got)
	}
	g.get().want(t, http.StatusOK)
	up.last(t).wantHeader(t, "Authorization", "Bearer canary-token-1-of-gateway")
}

// The renewal belongs to the source, and goes on when the operator has gone.
func TestAdminRenewalOutlivesItsClient(t *testing.T) {
	g, auth, _, path := adminGateway(t, "name "+newName())
	release := auth.hang()
	defer release()
	ctx, giveUp := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+g.admin+path+"/renew", nil)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() {
		res, err := g.client.Do(req)
		if err == nil {
			err = res.Body.Close()
		}
		ended <- err
	}()
	eventually(t, func() bool { return waiting() == 1 }, "the renewal to wait")
	if got := g.only(); !got.Fetching || got.State != stateFresh {
		t.Errorf("got %+v, want a fetch, and the token in use", got)
	}
	wantAll(t, g.burst(3), http.StatusOK) // need not wait
	giveUp()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that the client gave up", err)
	}
	eventually(t, func() bool { return waiting() == 0 }, "the handler to end")
	release()
	eventually(t, func() bool { c := g.only(); return !c.Fetching && c.TokenRequests["ok"] == 2 }, "the renewed token")
}

func TestAdminRenewalEndsWithTheTokenTimeout(t *testing.T) {
	g, auth, _, path := adminGateway(t, "token_timeout 300ms")
	defer auth.hang()()
	if r := g.ask(http.MethodPost, path+"/renew").want(t, http.StatusBadGateway); !strings.Contains(r.body, "timeout") {
		t.Errorf("got %s, want a timeout", r.body)
	}
}

func TestAdminForgetsTheToken(t *testing.T) {
	g, auth, up, path := adminGateway(t, "")
	r := g.ask(http.MethodDelete, path+"/token").want(t, http.StatusOK)
	var after clientStatus
	if err := json.Unmarshal([]byte(r.body), &after); err != nil || after.State != stateAbsent || after.Expires != nil {
		t.Errorf("got %s, err %v, want no token", r.body, err)
	}
	auth.wantAsked(t, 1) // none before it is needed
	g.get().want(t, http.StatusOK)
	up.last(t).wantHeader(t, "Authorization", "Bearer canary-token-2-of-gateway")
	auth.wantAsked(t, 2)

	// It is not a last resort either.
	auth.script(refusingForLong(http.StatusServiceUnavailable, ""))
	restAll()
	g.ask(http.MethodDelete, path+"/token").want(t, http.StatusOK)
	g.ask(http.MethodDelete, path+"/token").want(t, http.StatusOK) // again
	g.get().want(t, http.StatusServiceUnavailable)
}

func TestAdminRefusesWhatIsNotThere(t *testing.T) {
	g, auth, _, path := adminGateway(t, "")
	for _, test := range []struct {
		method, path string
		status       int
	}{
		{http.MethodGet, adminClients + "/", http.StatusOK},
		{http.MethodGet, path + "/", http.StatusOK},
		{http.MethodPost, adminClients, http.StatusMethodNotAllowed},
		{http.MethodDelete, adminClients, http.StatusMethodNotAllowed},
		{http.MethodPost, path, http.StatusMethodNotAllowed},
		{http.MethodDelete, path, http.StatusMethodNotAllowed},
		{http.MethodGet, path + "/renew", http.StatusMethodNotAllowed},
		{http.MethodDelete, path + "/renew", http.StatusMethodNotAllowed},
		{http.MethodGet, path + "/token", http.StatusMethodNotAllowed},
		{http.MethodPost, path + "/token", http.StatusMethodNotAllowed},
		{http.MethodGet, adminClients + "/000000000000", http.StatusNotFound},
		{http.MethodPost, adminClients + "/000000000000/renew", http.StatusNotFound},
		{http.MethodGet, path[:len(path)-1], http.StatusNotFound},
		{http.MethodGet, path + "/secret", http.StatusNotFound},
		{http.MethodPost, path + "/renew/more", http.StatusNotFound},
		{http.MethodGet, adminClients + "s", http.StatusNotFound},
	} {
		r := g.ask(test.method, test.path)
		if r.err != nil || r.status != test.status {
			t.Errorf("%s %s: got %d %q, err %v, want %d", test.method, test.path, r.status, r.body, r.err, test.status)
		}
		if allowed := r.header.Get("Allow"); (allowed != "") != (test.status == http.StatusMethodNotAllowed) {
			t.Errorf("%s %s: got Allow %q with %d", test.method, test.path, allowed, r.status)
		}
	}
	auth.wantAsked(t, 1)
	if got := g.only().State; got != stateFresh {
		t.Errorf("got the state %s, want that nothing happened", got)
	}
}

// A client may be unloaded while its token is renewed.
func TestAdminWhileTheClientIsUnloaded(t *testing.T) {
	g, auth, _, path := adminGateway(t, "")
	release := auth.hang()
	defer release()
	ended := make(chan error)
	go func() { // not through Caddy, which waits for its requests
		ended <- adminAPI{}.serve(httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, path+"/renew", nil))
	}()
	eventually(t, func() bool { return waiting() == 1 }, "the renewal to wait")
	g.load("respond gone")
	if got := g.clients(); len(got) != 0 {
		t.Errorf("got %d clients, want none", len(got))
	}
	release()
	select {
	case err := <-ended:
		if failed, ok := errors.AsType[caddy.APIError](err); !ok || failed.HTTPStatus != http.StatusNotFound {
			t.Errorf("got %v, want 404", err)
		}
	case <-time.After(patience):
		t.Fatalf("got nothing in %v, want the end of the renewal", patience)
	}
	g.ask(http.MethodPost, path+"/renew").want(t, http.StatusNotFound)
	wantNothingLeft(t)
}

// The race detector watches.
func TestAdminConcurrently(t *testing.T) {
	const rounds = 25
	g, auth, up, path := adminGateway(t, "")
	var wg sync.WaitGroup
	loop := func(f func() reply, allowed ...int) {
		wg.Go(func() {
			for range rounds {
				r := f()
				// Caddy drops a connection now and then when it hands over a listener.
				if r.err == nil && !slices.Contains(allowed, r.status) {
					t.Errorf("got %d %q, want one of %v", r.status, r.body, allowed)
				}
				// The metrics have the names of other tests' clients: no canary may be one.
				if strings.Contains(r.body, "canary") {
					t.Errorf("got %q, want no secret", r.body)
				}
			}
		})
	}
	loop(func() reply { return g.get() }, http.StatusOK)
	loop(func() reply { return g.get() }, http.StatusOK)
	loop(func() reply { return g.ask(http.MethodGet, adminClients) }, http.StatusOK)
	loop(func() reply { return g.ask(http.MethodGet, path) }, http.StatusOK, http.StatusNotFound)
	loop(func() reply { restAll(); return g.ask(http.MethodPost, path+"/renew") }, http.StatusOK, http.StatusNotFound, http.StatusTooManyRequests)
	loop(func() reply { restAll(); return g.ask(http.MethodDelete, path+"/token") }, http.StatusOK, http.StatusNotFound, http.StatusTooManyRequests)
	loop(func() reply { return g.ask(http.MethodGet, "/metrics") }, http.StatusOK)
	for i := range 5 {
		g.load(fmt.Sprintf("respond /version %d\n", i) + strings.Replace(proxySite(up, auth, ""), "/token\n", "/token?key=canary-query\n", 1))
	}
	wg.Wait()
	g.get().want(t, http.StatusOK)
}
