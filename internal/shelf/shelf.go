// Package shelf uses a storage that may be slow, broken or gone, and whose locks may lie. It costs
// nobody more than a moment.
package shelf

import (
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// A Storage is the part of certmagic.Storage that all modules have, and do as one expects. Its
// other methods may end the process, or wait for seconds.
type Storage interface {
	Load(ctx context.Context, key string) ([]byte, error)
	Store(ctx context.Context, key string, value []byte) error
	Delete(ctx context.Context, key string) error
	Lock(ctx context.Context, name string) error
	Unlock(ctx context.Context, name string) error
}

const (
	// How long an operation may take. Somebody waits for what is read.
	readLimit  = 500 * time.Millisecond
	writeLimit = 2 * time.Second

	// How long a storage that has failed is left alone.
	rest = 30 * time.Second

	// How many operations may still be under way after their limit.
	maxHanging = 64
)

// ErrResting means that the storage has failed a moment ago, and was not asked.
var ErrResting = errors.New("the storage has failed a moment ago, and is left alone")

// errSlow does not say what was asked for: each caller knows that.
var errSlow = errors.New("the storage does not answer")

// A Shelf is a storage. It is safe for concurrent use.
type Shelf struct {
	storage Storage
	news    News

	mu            sync.Mutex
	reads, writes health    // guarded by mu, as all below: one may fail without the other
	hanging       int       // operations whose limit is over
	lockless      time.Time // until then, nobody waits for a lock
	doubted       bool      // locks have failed, and none was had since
}

// health is how operations of one kind go.
type health struct {
	down    bool      // the last one has failed
	resting time.Time // until then, there is none
}

// News is told how a storage goes. It must not use the shelf.
type News struct {
	Failed   func(error) // an outage has begun, with this error of the storage
	Back     func()      // it has ended
	Lockless func(error) // there are only errors instead of locks
}

// New returns a storage as a shelf.
func New(storage Storage, news News) *Shelf { return &Shelf{storage: storage, news: news} }

// Load returns what is stored under a key; nil if there is nothing.
func (s *Shelf) Load(ctx context.Context, key string) ([]byte, error) {
	var value []byte
	err := s.do(ctx, readLimit, &s.reads, func(ctx context.Context) (func(), error) {
		v, err := s.storage.Load(ctx, key)
		if errors.Is(err, fs.ErrNotExist) {
			v, err = nil, nil
		}
		return func() { value = v }, err
	})
	return value, err
}

// Store stores a value under a key.
func (s *Shelf) Store(ctx context.Context, key string, value []byte) error {
	return s.do(ctx, writeLimit, &s.writes, func(ctx context.Context) (func(), error) {
		return nil, s.storage.Store(ctx, key, value)
	})
}

// Delete deletes what is stored under a key. It is no error if there is nothing.
func (s *Shelf) Delete(ctx context.Context, key string) error {
	return s.do(ctx, writeLimit, &s.writes, func(ctx context.Context) (func(), error) {
		err := s.storage.Delete(ctx, key)
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return nil, err
	})
}

// do does one operation in a goroutine of its own: many storages don't care about a context.
// op returns a function that hands its result over, if anybody still waits for that.
func (s *Shelf) do(ctx context.Context, limit time.Duration, kind *health, op func(context.Context) (hand func(), err error)) error {
	if !s.asks(kind, time.Now()) {
		return ErrResting
	}
	limited, cancel := context.WithTimeout(ctx, limit)
	o := &operation{ended: make(chan struct{})}
	go func() {
		defer cancel()
		defer s.end(o)
		o.hand, o.err = safely(limited, op)
	}()
	select {
	case <-o.ended:
	case <-limited.Done():
	}
	err := s.outcome(o)
	if ctx.Err() != nil { // what it has come to says nothing about the storage
		return ctx.Err()
	}
	if errors.Is(err, context.DeadlineExceeded) { // it has seen the limit
		err = errSlow
	}
	s.note(kind, err)
	if err == nil && o.hand != nil {
		o.hand()
	}
	return err
}

// An operation is one that is under way.
type operation struct {
	ended chan struct{} // closed when the fields below do not change any more
	hand  func()
	err   error
	late  bool // guarded by the shelf's mu: nobody waits for it
}

// end notes that an operation has ended.
func (s *Shelf) end(o *operation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o.late {
		s.hanging--
	}
	close(o.ended)
}

// outcome returns the error of an operation for which nobody waits any more. It may still be
// under way.
func (s *Shelf) outcome(o *operation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-o.ended:
		return o.err
	default:
	}
	if !o.late {
		o.late = true
		s.hanging++
	}
	return errSlow
}

// safely turns a panic into an error: the storage is somebody else's module.
func safely[T any](ctx context.Context, op func(context.Context) (T, error)) (result T, err error) {
	defer func() {
		if recover() != nil { // the value may hold anything
			err = errPanic
		}
	}()
	return op(ctx)
}

var errPanic = errors.New("the storage has panicked")

// asks reports whether the storage may be asked. Of those who come when its rest is over, one
// asks, and the others go on without it until that has an answer.
func (s *Shelf) asks(kind *health, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Before(kind.resting) || s.hanging >= maxHanging {
		return false
	}
	if kind.down {
		kind.resting = now.Add(rest)
	}
	return true
}

// note notes how an operation has ended.
func (s *Shelf) note(kind *health, err error) {
	s.mu.Lock()
	was := s.reads.down || s.writes.down
	switch {
	case err == nil:
		*kind = health{}
	case !kind.down:
		*kind = health{true, time.Now().Add(rest)}
	}
	is := s.reads.down || s.writes.down
	s.mu.Unlock()
	switch {
	case is && !was:
		s.news.Failed(err)
	case was && !is:
		s.news.Back()
	}
}

// A Lock is one that somebody wants, or has. It only saves work: some storages give a lock to
// everybody.
type Lock struct {
	shelf     *Shelf
	wanted    context.CancelFunc
	got, lost chan struct{}
	lose      func()                // closes lost; it may be called again
	erred     atomic.Pointer[error] // the last error, if there was nothing else so far
	o         *operation
}

// triedSuffix is behind the name of a lock in the key of a value that means nothing. It is stored
// to find out whether anything can be.
const triedSuffix = "-try"

const (
	// About how long a lock waits after an error, which may mean that somebody else has it.
	retryLock = 200 * time.Millisecond

	// How long nobody waits for a lock after there were only errors.
	locklessFor = 5 * time.Minute
)

// Lock begins to wait for a lock. The caller has to release it, whether it was obtained or not.
// The storage sees no deadline: some keep a lock for as long as its context lasts.
func (s *Shelf) Lock(ctx context.Context, name string) *Lock {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	l := &Lock{shelf: s, wanted: cancel, got: make(chan struct{}), lost: make(chan struct{}), o: &operation{ended: make(chan struct{})}}
	l.lose = sync.OnceFunc(func() { close(l.lost) })
	if !s.locks(time.Now()) {
		l.lose()
		s.end(l.o)
		return l
	}
	go func() {
		defer s.end(l.o)
		if !l.acquire(ctx, name) {
			l.lose()
			return
		}
		close(l.got)
		<-ctx.Done()
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeLimit)
		defer cancel()
		// An error says only that the lock was lost, or that it ends by itself.
		_, _ = safely(limited, func(ctx context.Context) (any, error) { return nil, s.storage.Unlock(ctx, name) })
	}()
	return l
}

// locks reports whether it is of use to wait for a lock.
func (s *Shelf) locks(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !now.Before(s.lockless) && !now.Before(s.writes.resting) && s.hanging < maxHanging
}

// acquire reports whether the lock was obtained. It tries until ctx ends, or until the storage
// fails.
func (l *Lock) acquire(ctx context.Context, name string) bool {
	s := l.shelf
	// Somebody else has the lock, or nothing can be written at all.
	writes := func() bool {
		return s.do(ctx, readLimit, &s.writes, func(ctx context.Context) (func(), error) {
			return nil, s.storage.Store(ctx, name+triedSuffix, []byte("1"))
		}) == nil
	}
	silent := time.AfterFunc(readLimit, func() {
		if ctx.Err() == nil && !writes() && ctx.Err() == nil {
			l.lose()
		}
	})
	defer silent.Stop()
	for {
		_, err := safely(ctx, func(ctx context.Context) (any, error) { return nil, s.storage.Lock(ctx, name) })
		if err == nil { // also if it comes too late: then it has to be given back
			s.mu.Lock()
			s.doubted = false
			s.mu.Unlock()
			l.erred.Store(nil)
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		l.erred.Store(&err)
		if !writes() {
			return false
		}
		pause := time.NewTimer(retryLock + rand.N(2*retryLock)) //nolint:gosec // no secret
		select {
		case <-ctx.Done():
			pause.Stop()
			return false
		case <-pause.C:
		}
	}
}

// Got returns a channel that is closed when the lock was obtained.
func (l *Lock) Got() <-chan struct{} { return l.got }

// Lost returns a channel that is closed when the lock can't be obtained.
func (l *Lock) Lost() <-chan struct{} { return l.lost }

// Doubt notes that the lock was wanted for too long. If there were only errors, they may mean
// that the storage has no locks: nobody waits for one for a while.
func (l *Lock) Doubt() {
	err := l.erred.Load()
	if err == nil {
		return // somebody has it
	}
	s := l.shelf
	s.mu.Lock()
	s.lockless = time.Now().Add(locklessFor)
	news := !s.doubted
	s.doubted = true
	s.mu.Unlock()
	if news {
		s.news.Lockless(*err)
	}
}

// Release gives the lock back, or ends the wait for it. It does not wait until that is done.
func (l *Lock) Release() {
	l.wanted()
	time.AfterFunc(writeLimit, func() { _ = l.shelf.outcome(l.o) }) // if it hangs
}
