package main

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/redis/go-redis/v9"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func init() { caddy.RegisterModule(new(Storage)) }

const (
	lockTTL  = 5 * time.Second // of a lock whose holder has died
	lockPoll = 1 * time.Second
)

// Storage is a storage in Redis. It does what the modules in use do: it stores values for ever,
// and tries a lock once a second. Unlike some of them, it does not connect when it is loaded.
type Storage struct {
	Address string `json:"address"`

	client *redis.Client
	mu     sync.Mutex
	held   map[string]heldLock // guarded by mu
}

// A heldLock is a lock of this process. end stops the goroutine that prolongs it.
type heldLock struct {
	token string
	end   context.CancelFunc
}

// CaddyModule implements caddy.Module.
func (*Storage) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.storage.e2e_redis", New: func() caddy.Module { return new(Storage) }}
}

// UnmarshalCaddyfile implements caddyfile.Unmarshaler. The setting is `e2e_redis <address>`.
func (s *Storage) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.Args(&s.Address) {
		return d.ArgErr()
	}
	return nil
}

// Provision implements caddy.Provisioner.
func (s *Storage) Provision(caddy.Context) error {
	s.client = redis.NewClient(&redis.Options{Addr: s.Address})
	s.held = make(map[string]heldLock)
	return nil
}

// Cleanup implements caddy.CleanerUpper.
func (s *Storage) Cleanup() error { return s.client.Close() }

// CertMagicStorage implements caddy.StorageConverter.
func (s *Storage) CertMagicStorage() (certmagic.Storage, error) { return s, nil }

// Load implements certmagic.Storage.
func (s *Storage) Load(ctx context.Context, key string) ([]byte, error) {
	value, err := s.client.Get(ctx, key).Bytes()
	if errors.Is(err, redis.Nil) {
		err = fs.ErrNotExist
	}
	return value, err
}

// Store implements certmagic.Storage.
func (s *Storage) Store(ctx context.Context, key string, value []byte) error {
	return s.client.Set(ctx, key, value, 0).Err()
}

// Delete implements certmagic.Storage.
func (s *Storage) Delete(ctx context.Context, key string) error { return s.client.Del(ctx, key).Err() }

// Exists implements certmagic.Storage.
func (s *Storage) Exists(ctx context.Context, key string) bool {
	n, err := s.client.Exists(ctx, key).Result()
	return err == nil && n > 0
}

// List implements certmagic.Storage.
func (s *Storage) List(ctx context.Context, path string, _ bool) ([]string, error) {
	var keys []string
	for all := s.client.Scan(ctx, 0, path+"*", 0).Iterator(); all.Next(ctx); {
		keys = append(keys, all.Val())
	}
	return keys, nil
}

// Stat implements certmagic.Storage.
func (s *Storage) Stat(ctx context.Context, key string) (certmagic.KeyInfo, error) {
	value, err := s.Load(ctx, key)
	return certmagic.KeyInfo{Key: key, Size: int64(len(value)), IsTerminal: true}, err
}

// Lock implements certmagic.Locker.
func (s *Storage) Lock(ctx context.Context, name string) error {
	token := rand.Text()
	for {
		err := s.client.SetArgs(ctx, lockKey(name), token, redis.SetArgs{Mode: "NX", TTL: lockTTL}).Err()
		if err == nil {
			s.prolong(name, token)
			return nil
		}
		if !errors.Is(err, redis.Nil) { // which says that somebody else has it
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lockPoll):
		}
	}
}

// prolong keeps a lock until it is given back.
func (s *Storage) prolong(name, token string) {
	ctx, end := context.WithCancel(context.Background())
	s.mu.Lock()
	s.held[name] = heldLock{token, end}
	s.mu.Unlock()
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(lockTTL / 2):
				s.client.Expire(ctx, lockKey(name), lockTTL)
			}
		}
	}()
}

// Unlock implements certmagic.Locker.
func (s *Storage) Unlock(ctx context.Context, name string) error {
	s.mu.Lock()
	lock, ok := s.held[name]
	delete(s.held, name)
	s.mu.Unlock()
	if !ok {
		return errors.New("the lock is not held")
	}
	lock.end()
	if holder, err := s.client.Get(ctx, lockKey(name)).Result(); err != nil || holder != lock.token {
		return err
	}
	return s.client.Del(ctx, lockKey(name)).Err()
}

func lockKey(name string) string { return "locks/" + strings.ReplaceAll(name, " ", "_") }

// Interface guards.
var (
	_ caddy.Provisioner      = (*Storage)(nil)
	_ caddy.CleanerUpper     = (*Storage)(nil)
	_ caddy.StorageConverter = (*Storage)(nil)
	_ caddyfile.Unmarshaler  = (*Storage)(nil)
	_ certmagic.Storage      = (*Storage)(nil)
)
