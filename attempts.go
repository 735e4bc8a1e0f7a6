// The token requests of one fetch: one after another, or side by side.

package outboundauth

import (
	"cmp"
	"context"
	"errors"
	"net/url"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/dpop"
	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
	"github.com/outboundauth/caddy-outbound-auth/internal/shelf"
)

// A requester makes the token requests of a source. All configs that need the
// same token share one source. Each of these configs brings its own requester.
type requester interface {
	// locate returns the URL of the token endpoint. It may have to look the URL up.
	// Its error, too, shows none of the granted tokens.
	locate(ctx context.Context, granted redact.Secrets) (*url.URL, error)

	// newKey makes the key that the token of one fetch is bound to. It returns nil if
	// tokens are not bound to a key.
	newKey() (*dpop.Key, error)

	// request makes one token request at u, for a token that is bound to key. The grant
	// says when the request began, and how long it took. The error shows none of the
	// granted tokens, which the server may repeat.
	request(ctx context.Context, u *url.URL, key *dpop.Key, granted redact.Secrets) (grant, error)

	// fingerprint returns a text that changes when the client's secrets change,
	// and that does not hold them. It may do I/O, because placeholders can name
	// files.
	fingerprint(ctx context.Context) string

	// concurrent reports whether several token requests may be under way at once.
	concurrent() bool

	// repeatable reports whether a token request that failed may be repeated at once.
	repeatable() bool

	// share returns where the token is shared with other instances; nil if it is not. It may
	// do I/O, as fingerprint does.
	share(ctx context.Context) *shared

	// describe says who the client is. It does no I/O.
	describe() description

	// fetched is called when a fetch has ended, with a token or with err.
	// failures is how many fetches failed before this one. A call may begin
	// while another one is under way.
	fetched(t *token, err *fetchError, failures int)
}

// errReleased ends a fetch that was abandoned, because the last config that used
// the source was unloaded. It is not context.Canceled: Caddy takes every
// context.Canceled for a caller who went away.
var errReleased = errors.New("the configuration that asked for the token was unloaded")

// attempts makes the token requests of one fetch. Only the goroutine of the fetch uses
// it.
type attempts struct {
	requester
	life     lifecycle
	current  *token         // the token that is to be replaced, or nil
	granted  redact.Secrets // the last tokens
	failures int            // how many fetches failed before this one
	last     *fetchError    // the error of the last one; nil if it did not fail
	silence  time.Duration  // how long the server may be silent before it is asked again

	joined <-chan struct{}  // holds an element if a caller has begun to wait
	needed func() bool      // whether callers wait, and have no token
	queued func(*slot)      // is called when the fetch begins to wait for its turn
	newest func() requester // of the source: its config may have been reloaded meanwhile

	// Tokens of others that were asked for before that don't count. It changes when an operator
	// takes one out of use.
	notBefore func() time.Time

	view   fleetView
	shared *shared     // where others may have a token; nil if nothing is shared
	lock   *shelf.Lock // on what is shared; nil if it is neither had nor wanted
	asked  bool        // the server was sent a request

	secrets string    // the fingerprint of those that are sent
	url     *url.URL  // the token endpoint's
	key     *dpop.Key // for all requests of the fetch: of a token whose answer was lost, the server may remember the first
	slot    *slot     // of the fetch
	began   time.Time // when the first request began; before that, when the fetch did
	tried   time.Time // when the last request began
	retries []retry
	quick   int // how many of them were quick
}

// retry is another token request of a fetch: when it was decided on, and which error
// was the cause. The error is errSilent if the request before is still under way.
type retry struct {
	at    time.Time
	cause error
}

// attempt is the result of one token request of a fetch.
type attempt struct {
	first bool // it was the first of the fetch
	slot  *slot
	t     *token
	spent bool // there was a grant, but nothing is left of its life
	err   error
}

// obtain makes the token requests of a fetch, when it is its turn. Until then, the time
// of the fetch stands still.
func (a *attempts) obtain(ctx context.Context) (*token, error) {
	since := a.began
	if err := a.find(ctx, a.life.fetchTimeout-time.Since(since)); err != nil {
		return nil, err
	}
	left := a.life.fetchTimeout - time.Since(since)

	who := a.describe()
	// An origin may have many token endpoints, each of a tenant with clients of its own.
	client := a.url.Path + " " + cmp.Or(who.ClientID, who.name)
	a.slot = queues.of(a.url, who.endpoint).take(client, a.failures > 0)
	defer a.slot.release()
	a.queued(a.slot)
	if err := a.slot.wait(ctx, a.joined); err != nil {
		return nil, err
	}
	a.requester = a.newest()
	ctx, cancel := context.WithTimeout(ctx, left)
	defer cancel()
	if a.slot.waited { // the secrets may have changed
		if err := a.look(ctx); err != nil {
			return nil, err
		}
	}
	if err := safely(func() (err error) {
		a.key, err = a.newKey()
		return err
	}); err != nil {
		return nil, err
	}
	return a.ask(ctx)
}

// look notes the fingerprint of the secrets. A placeholder may panic.
func (a *attempts) look(ctx context.Context) error {
	return safely(func() error {
		a.secrets = a.fingerprint(ctx)
		return nil
	})
}

// find finds the token endpoint. It tries again as ask does.
func (a *attempts) find(ctx context.Context, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	a.began = time.Now()
	for {
		a.tried = time.Now()
		err := safely(func() (err error) {
			a.url, err = a.locate(ctx, a.granted)
			return err
		})
		switch {
		case errors.Is(context.Cause(ctx), errReleased):
			return errReleased
		case err == nil:
			return nil
		case !a.retriesQuickly(ctx, attempt{err: err}):
			return err
		}
	}
}

// ask makes token requests until one brings a token.
//
// After a transient error it tries again, up to three times in all. It does so only if
// the fetch before did not fail. A fetch after a failed one is a repetition already,
// and the waits between repetitions grow. If nothing is left of a grant's life, it does
// not try again at once: the next grant would be no better.
//
// A server may accept a request and never answer it: it has restarted, or something in
// between has lost the connection. While callers wait without a token, ask asks
// again beside the request that is under way, if no other client waits for its turn. The
// first token wins.
func (a *attempts) ask(ctx context.Context) (*token, error) {
	requests, cancel := context.WithCancelCause(ctx)
	defer cancel(errSilent) // those that have lost
	ended := make(chan attempt, maxAttempts)
	sent, underWay := 0, 0
	next := time.NewTimer(a.silence)
	defer next.Stop()
	try := func(t *slot) {
		a.tried = time.Now()
		sent++
		underWay++
		next.Reset(a.silence)
		go func(first bool) {
			end := a.attempt(requests, t)
			end.first, end.slot = first, t
			ended <- end
		}(sent == 1)
	}
	a.began, a.asked = time.Now(), true
	try(a.slot)
	var told error // why an attempt failed while others went on
	for {
		select {
		case end := <-ended:
			underWay--
			switch {
			case end.err == nil:
				return end.t, nil
			case errors.Is(context.Cause(ctx), errReleased):
				return nil, errReleased
			case underWay > 0 && ctx.Err() != nil: // the others end, too
				if end.first && told == nil {
					told = end.err // it tells best what all the time was spent on
				}
			case underWay > 0 && !leftAlone(end.err): // the others may have more luck
				end.slot.release()
				told = end.err
				a.silence = min(a.silence, maxAskedBackoff) // the server is not silent
				next.Reset(time.Until(a.tried.Add(a.silence)))
			case ctx.Err() != nil && told != nil:
				return nil, told
			case !a.retriesQuickly(ctx, end):
				return nil, end.err
			default:
				try(a.slot)
			}
			continue
		case <-next.C:
		case <-a.joined:
		}
		if !a.concurrent() || underWay == maxAttempts || time.Since(a.tried) < a.silence || !a.needed() {
			continue
		}
		extra, ok := a.slot.extra(a.slot.client)
		if !ok {
			next.Reset(a.silence)
			continue
		}
		a.retries = append(a.retries, retry{time.Now(), errSilent})
		try(extra)
	}
}

// retriesQuickly reports whether an attempt that has failed is repeated at once. Before
// that, it waits for a moment.
func (a *attempts) retriesQuickly(ctx context.Context, failed attempt) bool {
	if ctx.Err() != nil || a.failures > 0 || a.quick == quickRetries || failed.spent || leftAlone(failed.err) {
		return false
	}
	if a.slot != nil && (!a.repeatable() || !a.slot.mayRepeat()) { // without a slot, only the issuer was asked
		return false
	}
	decided := time.Now()
	delay := time.NewTimer(jitter(quickRetryDelay << a.quick))
	defer delay.Stop()
	select {
	case <-delay.C:
	case <-ctx.Done():
		return false
	}
	if a.slot != nil && !a.slot.repeat() {
		return false
	}
	a.quick++
	a.retries = append(a.retries, retry{decided, failed.err})
	return true
}

// attempt makes one token request in a slot, which is given back if there is no answer for
// long.
func (a *attempts) attempt(ctx context.Context, t *slot) (end attempt) {
	silent := time.AfterFunc(longestSlot, t.release)
	defer silent.Stop()
	if t != a.slot {
		defer t.release()
	}
	end.err = safely(func() error {
		t, g, err := a.life.requestToken(ctx, a.requester, a.url, a.key, a.current, a.granted)
		end.t, end.spent = t, err != nil && g.accessToken != ""
		return err
	})
	if !isGivenUp(ctx) {
		t.answered(end.err == nil || end.spent, end.err)
	}
	return end
}

// isGivenUp reports whether nobody needs a token request any more. Its error then says
// nothing about the server.
func isGivenUp(ctx context.Context) bool {
	cause := context.Cause(ctx)
	return errors.Is(cause, errSilent) || errors.Is(cause, errReleased)
}

// requestToken makes one token request at u, and a token of the grant, which is bound to
// key. A source and `caddy oauth2-token` get all their tokens from it. If nothing is left of
// the grant's life, requestToken returns an error together with the grant. current is the
// token that the new one replaces, or nil.
func (l lifecycle) requestToken(ctx context.Context, r requester, u *url.URL, key *dpop.Key, current *token, granted redact.Secrets) (*token, grant, error) {
	g, err := r.request(ctx, u, key, granted)
	if err != nil {
		return nil, grant{}, err
	}
	t, err := l.newToken(g, current)
	return t, g, err
}
