// One token for a fleet: whether this instance takes the token of another one, or asks the server.

package outboundauth

import (
	"context"
	"errors"
	"slices"
	"time"
)

// get returns the token of another instance, or else makes the token requests. Their time begins
// after that.
func (a *attempts) get(ctx context.Context) (*token, error) {
	a.shared = shareOf(ctx, a.requester)
	if a.shared != nil && !a.view.alone {
		if t, err := a.take(ctx); t != nil || err != nil {
			return t, err
		}
		if a.shared != nil {
			a.shared.count(sharedMissing)
		}
		a.began, a.tried = time.Now(), time.Now()
	}
	return a.obtain(ctx)
}

// shareOf returns where a requester shares its token; nil if it does not. A placeholder may panic.
func shareOf(ctx context.Context, r requester) (s *shared) {
	_ = safely(func() error {
		s = r.share(ctx)
		return nil
	})
	return s
}

// take returns the token of another instance, if there is one that is better than the current
// one. While another instance asks the server, take waits. If it returns neither a token nor an
// error, this instance has to ask. It then has the lock, unless that can't be had.
func (a *attempts) take(ctx context.Context) (*token, error) {
	t, held, err := a.lookAround(ctx)
	if t != nil || err != nil || a.shared == nil {
		return t, err
	}
	patience := time.NewTimer(a.sharedPatience())
	defer patience.Stop()
	// From then on, failures of others hold nobody back who has no token: the lock is enough.
	heldMost := time.Now().Add(heldWithoutToken)
	look := time.NewTicker(lookAgain)
	defer look.Stop()
	var got <-chan struct{} // closed when the lock is had; nil if it is not wanted now
	for {
		if got == nil && !time.Now().Before(held) {
			a.lock = a.shared.Lock(ctx, a.shared.token)
			got = a.lock.Got()
		}
		had := false
		var lost <-chan struct{}
		if a.lock != nil {
			lost = a.lock.Lost()
		}
		select {
		case <-got:
			had = true
		case <-lost: // the storage can't be written, or has no locks
			had = true
		case <-look.C:
		case <-patience.C:
			if a.lock != nil {
				a.shared.count(sharedLockTimeout)
				a.lock.Doubt()
			}
			return nil, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		// Whoever has or had the lock may have stored a token, or have failed.
		t, held, err = a.lookAround(ctx)
		switch {
		case t != nil || err != nil || a.shared == nil:
			return t, err
		case held.After(heldMost):
			held = heldMost
		}
		switch {
		case time.Now().Before(held):
			a.unlock() // others may ask meanwhile
			got = nil
		case had:
			return nil, nil
		}
	}
}

// sharedPatience returns how long the token of another instance is waited for. Nobody waits for a
// renewal: then it is as long as the token request of the other one may take.
func (a *attempts) sharedPatience() time.Duration {
	most := leastSharedPatience + jitter(mostSharedPatience-leastSharedPatience)
	if a.current != nil && !a.view.refused && time.Now().Add(a.life.fetchTimeout+most).Before(a.current.usableTo) {
		return a.life.fetchTimeout + most
	}
	return most
}

// lookAround returns the token of another instance. If there is none, but another instance has
// failed, it returns an error if the current token is good for longer than the server is let
// alone. Otherwise it returns until when this instance waits: not for long.
func (a *attempts) lookAround(ctx context.Context) (t *token, held time.Time, err error) {
	t, newest := a.lookFor(ctx)
	if t != nil || a.shared == nil {
		return t, time.Time{}, nil
	}
	now := time.Now()
	f := a.shared.failure(ctx, now, newest)
	if f.Until == 0 {
		return nil, time.Time{}, nil
	}
	until := time.UnixMilli(f.Until)
	ignored := a.view.held.instance == f.By && a.view.held.times >= mostHeld
	if a.current != nil && until.Before(a.current.usableTo) && !a.view.refused && !ignored {
		return nil, time.Time{}, a.heldError(f.By, until)
	}
	if f.By == a.shared.by {
		return nil, time.Time{}, nil // its own back-off is over
	}
	if soon := time.UnixMilli(f.At).Add(heldWithoutToken); soon.Before(until) {
		until = soon
	}
	if !now.Before(until) {
		return nil, time.Time{}, nil
	}
	return nil, until, nil
}

// lookFor returns the token that is shared, if it is better than the current one: a newer one,
// and a fresh one if the current one is valid. It also returns its record. If the storage can't
// be read, nothing is shared any more.
func (a *attempts) lookFor(ctx context.Context) (*token, sharedToken) {
	now := time.Now()
	r, err := a.shared.look(ctx, now)
	if err != nil {
		a.shared.count(sharedUnavailable)
		a.shared = nil
		return nil, sharedToken{}
	}
	if r.Token == "" || !r.sent().After(a.notBefore()) || slices.Contains(a.granted, r.Token) {
		return nil, r
	}
	t := a.life.token(r.grant(now), now)
	valid := false
	if c := a.current; c != nil {
		if !r.sent().After(c.grant.issued.Round(0)) {
			return nil, r
		}
		valid = now.Before(c.expires)
	}
	if t.inReserve(now) || (valid && !now.Before(t.refreshAt)) {
		return nil, r
	}
	a.shared.count(sharedTaken)
	return t, r
}

// heldError is the error of a fetch that leaves the server alone. If this instance has failed
// itself, the error is still that one.
func (a *attempts) heldError(by string, until time.Time) error {
	if by != a.shared.by || a.last == nil {
		return failedElsewhere(a.describe().endpoint, by, until)
	}
	failure, ok := errors.AsType[*tokenError](a.last)
	if !ok {
		return failedElsewhere(a.describe().endpoint, by, until)
	}
	own := *failure // a copy: others read the error
	own.heldBy, own.heldUntil = by, until
	return &own
}

// failedElsewhere is the error of an instance that lets the server alone, because another one has
// failed.
func failedElsewhere(endpoint, by string, until time.Time) error {
	return &tokenError{
		Endpoint: endpoint, Code: "temporarily_unavailable", heldBy: by, heldUntil: until,
		Description: "another instance has just failed to obtain the token; this one has not asked",
	}
}

// publish shares how the fetch has ended, and gives the lock back. It uses the storage of the
// newest config: Caddy closes those of the others.
func (a *attempts) publish(ctx context.Context, t *token, failed *fetchError) {
	defer a.unlock()
	ctx = context.WithoutCancel(ctx) // each operation has its limit
	if a.shared == nil || (t == nil && failed == nil) {
		return
	}
	s := shareOf(ctx, a.newest())
	switch {
	case s == nil:
	case t != nil && !t.grant.taken:
		s.store(ctx, t.grant, a.granted)
	case failed != nil && a.asked && isOfServer(failed):
		s.storeFailure(ctx, failed.retryAt)
	}
}

// isOfServer reports whether a failure is probably that of the server, passes by itself, and so
// concerns all instances.
func isOfServer(err error) bool {
	failure, ok := errors.AsType[*tokenError](err)
	return ok && !failure.permanent && !failure.local && failure.heldUntil.IsZero()
}

// unlock gives the lock back, or waits for it no longer.
func (a *attempts) unlock() {
	if a.lock != nil {
		a.lock.Release()
		a.lock = nil
	}
}

// isElsewhere reports whether an error is that of failedElsewhere.
func isElsewhere(err error) bool { return !heldUntil(err).IsZero() }

// heldUntil returns until when this instance lets the server alone because another one has failed.
func heldUntil(err error) time.Time {
	if failure, ok := errors.AsType[*tokenError](err); ok {
		return failure.heldUntil
	}
	return time.Time{}
}
