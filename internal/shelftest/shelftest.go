// Package shelftest has a storage in memory, with the habits and the faults of real ones.
package shelftest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"
)

// A Storage is one in memory. It is safe for concurrent use. Its fields must not change while it
// is used, except by With.
type Storage struct {
	Delay time.Duration // of each operation
	Poll  time.Duration // how often a lock that is taken is tried again; 0 means a second
	TTL   time.Duration // how long a lock lasts whose holder has died; 0 means for ever

	// Whether everybody gets a lock, as with S3; and whether an error says that somebody has
	// it, as with PostgreSQL.
	Lies, Errs bool

	// Fault runs at the beginning of each operation, which is its method and its key.
	Fault func(ctx context.Context, op string) error

	mu     sync.Mutex
	values map[string][]byte    // guarded by mu, as all below
	locks  map[string]time.Time // until when; zero if the holder lives
	asked  []string
}

// ErrTaken says that somebody else has a lock.
var ErrTaken = errors.New("key is locked")

// With changes the faults.
func (s *Storage) With(fault func(ctx context.Context, op string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Fault = fault
}

func (s *Storage) begin(ctx context.Context, op, key string) error {
	s.mu.Lock()
	s.asked = append(s.asked, op+" "+key)
	fault := s.Fault
	s.mu.Unlock()
	if s.Delay > 0 {
		time.Sleep(s.Delay)
	}
	if fault == nil {
		return nil
	}
	return fault(ctx, op+" "+key)
}

// Load returns what is stored under a key.
func (s *Storage) Load(ctx context.Context, key string) ([]byte, error) {
	if err := s.begin(ctx, "load", key); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	value, ok := s.values[key]
	if !ok {
		return nil, fmt.Errorf("%s: %w", key, fs.ErrNotExist)
	}
	return bytes.Clone(value), nil
}

// Store stores a value under a key.
func (s *Storage) Store(ctx context.Context, key string, value []byte) error {
	if err := s.begin(ctx, "store", key); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.values == nil {
		s.values = make(map[string][]byte)
	}
	s.values[key] = bytes.Clone(value)
	return nil
}

// Delete deletes what is stored under a key.
func (s *Storage) Delete(ctx context.Context, key string) error {
	if err := s.begin(ctx, "delete", key); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.values, key)
	return nil
}

// Lock takes a lock.
func (s *Storage) Lock(ctx context.Context, name string) error {
	if err := s.begin(ctx, "lock", name); err != nil {
		return err
	}
	for {
		if s.Lies || s.lock(name) {
			return nil
		}
		if s.Errs {
			return ErrTaken
		}
		poll := s.Poll
		if poll == 0 {
			poll = time.Second
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(poll):
		}
	}
}

func (s *Storage) lock(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if until, ok := s.locks[name]; ok && (until.IsZero() || time.Now().Before(until)) {
		return false
	}
	if s.locks == nil {
		s.locks = make(map[string]time.Time)
	}
	s.locks[name] = time.Time{}
	return true
}

// Unlock gives a lock back.
func (s *Storage) Unlock(ctx context.Context, name string) error {
	if err := s.begin(ctx, "unlock", name); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.locks, name)
	return nil
}

// Abandon takes a lock whose holder dies.
func (s *Storage) Abandon(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	until := time.Now().Add(s.TTL)
	if s.TTL == 0 {
		until = time.Time{}
	}
	s.locks = map[string]time.Time{name: until}
}

// Locks returns how many locks somebody has.
func (s *Storage) Locks() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.locks)
}

// Asked returns the operations so far, and forgets them.
func (s *Storage) Asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.asked
	s.asked = nil
	return asked
}

// Values returns what is stored.
func (s *Storage) Values() map[string][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	values := make(map[string][]byte, len(s.values))
	for key, value := range s.values {
		values[key] = bytes.Clone(value)
	}
	return values
}

// Replace replaces what is stored.
func (s *Storage) Replace(values map[string][]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.values = values
}
