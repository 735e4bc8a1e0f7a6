package shelf

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/shelftest"
)

func wantAsked(t *testing.T, st *shelftest.Storage, asked ...string) {
	t.Helper()
	synctest.Wait()
	if got := st.Asked(); !slices.Equal(got, asked) {
		t.Errorf("the storage was asked %q, want %q", got, asked)
	}
}

// told is what a shelf has told of its storage.
type told struct {
	mu   sync.Mutex
	news []string // guarded by mu
}

func (o *told) add(news string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.news = append(o.news, news)
}

func (o *told) want(t *testing.T, news ...string) {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	if !slices.Equal(o.news, news) {
		t.Errorf("got told %q, want %q", o.news, news)
	}
}

func newShelf(st Storage) (*Shelf, *told) {
	o := new(told)
	return New(st, News{
		Failed: func(err error) { o.add(err.Error()) }, Back: func() { o.add("back") }, Lockless: func(err error) { o.add("its locks: " + err.Error()) },
	}), o
}

var errDown = errors.New("down")

func refuses(context.Context, string) error { return errDown }

func TestValues(t *testing.T) {
	s, o := newShelf(new(shelftest.Storage))
	ctx := t.Context()
	load := func(want string) {
		t.Helper()
		if got, err := s.Load(ctx, "k"); err != nil || string(got) != want {
			t.Errorf("Load() = %q, %v, want %q", got, err, want)
		}
	}
	load("")
	if err := s.Store(ctx, "k", []byte("v")); err != nil {
		t.Error(err)
	}
	load("v")
	for range 2 {
		if err := s.Delete(ctx, "k"); err != nil {
			t.Error(err)
		}
	}
	load("")
	o.want(t)
}

// A storage that fails is asked once in 30 s, and told of once.
func TestStorageThatFailsIsLeftAlone(t *testing.T) {
	for name, fault := range map[string]struct {
		fault func(context.Context, string) error
		err   error
		takes time.Duration
	}{
		"refuses":    {refuses, errDown, 0},
		"is slow":    {func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }, errSlow, readLimit},
		"panics":     {func(context.Context, string) error { panic("secret") }, errPanic, 0},
		"is too old": {func(ctx context.Context, _ string) error { time.Sleep(10 * time.Second); return nil }, errSlow, readLimit},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				st := &shelftest.Storage{Fault: fault.fault}
				s, o := newShelf(st)
				start := time.Now()
				if _, err := s.Load(t.Context(), "k"); !errors.Is(err, fault.err) || time.Since(start) != fault.takes {
					t.Errorf("Load() = %v after %v, want %v after %v", err, time.Since(start), fault.err, fault.takes)
				}
				for range 100 {
					if _, err := s.Load(t.Context(), "k"); !errors.Is(err, ErrResting) {
						t.Fatalf("Load() = %v, want that the storage is not asked", err)
					}
				}
				time.Sleep(rest)
				var probes sync.WaitGroup
				for range 10 {
					probes.Go(func() { _, _ = s.Load(t.Context(), "k") })
				}
				probes.Wait()
				wantAsked(t, st, "load k", "load k") // one of ten asks
				o.want(t, fault.err.Error())
				st.With(nil)
				time.Sleep(rest)
				if _, err := s.Load(t.Context(), "k"); err != nil {
					t.Errorf("Load() = %v, want that the storage is asked again", err)
				}
				if err := s.Store(t.Context(), "k", nil); err != nil {
					t.Error(err)
				}
				o.want(t, fault.err.Error(), "back")
				time.Sleep(time.Minute)
			})
		})
	}
}

// A caller that goes away says nothing about the storage.
func TestCallerThatGoesAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, o := newShelf(&shelftest.Storage{Fault: func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }})
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := s.Load(ctx, "k"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Load() = %v, want the end of the caller's time", err)
		}
		o.want(t)
	})
}

// Operations that never end are not piled up.
func TestOperationsThatNeverEnd(t *testing.T) {
	st := new(shelftest.Storage)
	release := make(chan struct{})
	st.With(func(context.Context, string) error { <-release; return nil })
	s, _ := newShelf(st)
	var all sync.WaitGroup
	for range 2 * maxHanging {
		all.Go(func() { _, _ = s.Load(t.Context(), "k") })
	}
	all.Wait()
	s.mu.Lock()
	s.reads.resting = time.Time{}
	hanging := s.hanging
	s.mu.Unlock()
	if hanging != 2*maxHanging {
		t.Errorf("got %d operations that hang, want %d", hanging, 2*maxHanging)
	}
	if _, err := s.Load(t.Context(), "k"); !errors.Is(err, ErrResting) {
		t.Errorf("Load() = %v, want that there is not one more", err)
	}
	close(release)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := s.Load(t.Context(), "k"); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the storage is not asked again, although all operations have ended")
		}
	}
}

func TestLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := new(shelftest.Storage)
		s, _ := newShelf(st)
		got := func(l *Lock) bool {
			synctest.Wait()
			select {
			case <-l.Got():
				return true
			default:
				return false
			}
		}
		first, second, third := s.Lock(t.Context(), "k"), s.Lock(t.Context(), "other"), s.Lock(t.Context(), "k")
		if !got(second) {
			t.Error("a free lock was not obtained")
		}
		if got(first) == got(third) {
			t.Fatal("both or none have a lock, want one")
		}
		if got(third) {
			first, third = third, first
		}
		first.Release()
		time.Sleep(time.Second)
		if !got(third) {
			t.Error("a lock that was released was not obtained")
		}
		fourth := s.Lock(t.Context(), "k")
		fourth.Release() // it does not wait any more
		third.Release()
		second.Release()
		time.Sleep(time.Minute)
		if n := st.Locks(); n > 0 {
			t.Errorf("got %d locks that nobody has released", n)
		}
	})
}

// withoutLocks is the fault of a storage that gives nobody the lock k.
func withoutLocks(_ context.Context, op string) error {
	if op == "lock k" {
		return errDown
	}
	return nil
}

// Some storages say with an error that somebody else has the lock, and others give a lock to
// those who do not want it any more.
func TestLocksThatLie(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := new(shelftest.Storage)
		st.With(withoutLocks)
		s, o := newShelf(st)
		l := s.Lock(t.Context(), "k")
		time.Sleep(time.Second)
		st.With(nil)
		<-l.Got()
		l.Release()
		synctest.Wait()
		if n := len(st.Asked()); n < 6 || n > 16 {
			t.Errorf("the storage was asked %d times, want some tries in a second", n)
		}
		o.want(t) // an error of a lock is no fault

		st.With(func(_ context.Context, op string) error {
			if op == "lock k" {
				time.Sleep(10 * time.Second) // whatever its context says
			}
			return nil
		})
		late := s.Lock(t.Context(), "k")
		time.Sleep(time.Second)
		late.Release()
		time.Sleep(time.Minute)
		wantAsked(t, st, "lock k", "store k-try", "unlock k")
		s.mu.Lock()
		defer s.mu.Unlock()
		if n := st.Locks(); s.hanging != 0 || n > 0 {
			t.Errorf("got %d operations under way and %d locks, want none", s.hanging, n)
		}
	})
}

// A storage that can only be read has no locks. What can be read is read all the same, and is no
// sign that it can be written again.
func TestStorageThatCannotBeWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := new(shelftest.Storage)
		st.With(func(_ context.Context, op string) error {
			if strings.HasPrefix(op, "load ") {
				return nil
			}
			return errDown
		})
		s, o := newShelf(st)
		for range 100 {
			l := s.Lock(t.Context(), "k")
			<-l.Lost()
			l.Release()
			if _, err := s.Load(t.Context(), "k"); err != nil {
				t.Fatalf("Load() = %v, want what is there", err)
			}
			if err := s.Store(t.Context(), "k", nil); err == nil {
				t.Error("Store() = nil, want an error")
			}
			time.Sleep(rest / 2)
		}
		o.want(t, "down")
		st.With(nil)
		time.Sleep(rest)
		l := s.Lock(t.Context(), "k")
		<-l.Got()
		l.Release()
		if err := s.Store(t.Context(), "k", nil); err != nil {
			t.Error(err)
		}
		o.want(t, "down", "back")
		time.Sleep(time.Minute)
	})
}

// A storage may hang with everything that it has to write.
func TestLockThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := new(shelftest.Storage)
		st.With(func(ctx context.Context, op string) error {
			if !strings.HasPrefix(op, "load ") {
				<-ctx.Done()
			}
			return ctx.Err()
		})
		s, o := newShelf(st)
		start := time.Now()
		l := s.Lock(t.Context(), "k")
		<-l.Lost()
		if took := time.Since(start); took > 2*readLimit {
			t.Errorf("the lock was given up after %v, want %v", took, 2*readLimit)
		}
		l.Release()
		o.want(t, "the storage does not answer")
		time.Sleep(time.Minute)
	})
}

// A storage may have values, but no locks. Nobody waits for one again and again.
func TestLocksThatOnlyErr(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := new(shelftest.Storage)
		st.With(withoutLocks)
		s, o := newShelf(st)
		for range 3 {
			l := s.Lock(t.Context(), "k")
			select {
			case <-l.Lost():
				t.Error("the lock was given up at once")
			case <-time.After(5 * time.Second):
			}
			l.Doubt()
			l.Release()
			again := s.Lock(t.Context(), "k")
			select {
			case <-again.Lost():
			case <-time.After(time.Second):
				t.Error("the lock is waited for again at once")
			}
			again.Release()
			time.Sleep(locklessFor)
		}
		o.want(t, "its locks: down")
		st.With(nil)
		l := s.Lock(t.Context(), "k")
		<-l.Got()
		l.Doubt() // there was something else than errors
		l.Release()
		time.Sleep(time.Minute)
		o.want(t, "its locks: down")
	})
}

// Whoever does not want the lock any more writes nothing: the storage may be closed.
func TestLockThatIsNotWantedAnyMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := new(shelftest.Storage)
		s, _ := newShelf(st)
		first, second := s.Lock(t.Context(), "k"), s.Lock(t.Context(), "k")
		synctest.Wait()
		second.Release()
		first.Release()
		time.Sleep(time.Minute)
		for _, op := range st.Asked() {
			if strings.HasPrefix(op, "store ") {
				t.Errorf("got %q", op)
			}
		}
		if n := st.Locks(); n > 0 {
			t.Errorf("got %d locks, want none", n)
		}
	})
}

// The lock outlives the context of who wanted it: it is released, whatever has happened.
func TestLockHasNoDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := new(shelftest.Storage)
		seen := make(chan context.Context, 1)
		st.With(func(ctx context.Context, op string) error {
			if op == "lock k" {
				seen <- ctx
			}
			return ctx.Err()
		})
		s, _ := newShelf(st)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		l := s.Lock(ctx, "k")
		<-l.Got()
		time.Sleep(time.Minute)
		ctx = <-seen
		if _, ok := ctx.Deadline(); ok || ctx.Err() != nil {
			t.Error("the lock's context has ended with that of its caller")
		}
		l.Release()
		time.Sleep(time.Second)
		wantAsked(t, st, "lock k", "unlock k")
	})
}
