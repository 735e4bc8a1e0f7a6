package replay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/replaytest"
)

// A body that is too large to be recorded waits until the upstream wants it.
func TestLargeBodyPausesForTheUpstream(t *testing.T) {
	const limit, pause = 1000, time.Second
	for _, test := range []struct {
		name string
		do   func(*Body)
		want time.Duration
	}{
		{"the upstream says nothing", func(*Body) {}, pause},
		{"it wants the body", func(b *Body) { time.Sleep(pause / 4); b.proceed() }, pause / 4},
		{"it wanted it before", func(b *Body) { b.proceed() }, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				data := replaytest.Pattern(3 * limit)
				b := New(io.NopCloser(bytes.NewReader(data)), limit)
				b.pause = pause
				first := b.First()
				start := time.Now()
				go test.do(b)
				synctest.Wait()
				readN(t, first, 1)
				if got := time.Since(start); got != test.want {
					t.Errorf("got a wait of %v, want %v", got, test.want)
				}
				rest, err := io.ReadAll(first)
				if err != nil || !bytes.Equal(rest, data[1:]) {
					t.Errorf("got %d bytes, err %v, want %d", len(rest), err, len(data)-1)
				}
				if got := time.Since(start); got != test.want {
					t.Errorf("got another wait, till %v, want none", got)
				}
			})
		})
	}
}

// Of a body of unknown length, what can be recorded is sent at once.
func TestBodyOfUnknownLengthPausesWhenItIsTooLong(t *testing.T) {
	const limit, pause = 1000, time.Second
	for _, test := range []struct {
		size int
		want time.Duration
	}{{0, 0}, {limit - 1, 0}, {limit + 1, pause}, {3 * limit, pause}} {
		synctest.Test(t, func(t *testing.T) {
			data := replaytest.Pattern(test.size)
			b := New(io.NopCloser(bytes.NewReader(data)), limit)
			b.pause, b.pauseAt = pause, limit
			first := b.First()
			start := time.Now()
			readN(t, first, min(test.size, limit))
			if got := time.Since(start); got != 0 {
				t.Errorf("got a wait of %v for what is recorded of %d bytes, want none", got, test.size)
			}
			rest, err := io.ReadAll(first)
			if err != nil || len(rest) != max(0, test.size-limit) {
				t.Errorf("got %d bytes more, err %v, want %d", len(rest), err, max(0, test.size-limit))
			}
			if got := time.Since(start); got != test.want {
				t.Errorf("got a wait of %v for %d bytes, want %v", got, test.size, test.want)
			}
		})
	}
}

// An answer may end only when all of the body has been read, or with the
// request.
func TestHeldAttemptGoesOnForASlowAnswer(t *testing.T) {
	for _, slow := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			watched := &replaytest.Body{Reader: bytes.NewReader(replaytest.Pattern(3000))}
			b := New(watched, 1000)
			first := b.First()
			readN(t, first, 10)
			if !b.Hold() {
				t.Fatal("Hold: got false, want true")
			}
			ended := make(chan error, 1)
			go func() {
				_, err := io.ReadAll(first)
				ended <- err
			}()
			synctest.Wait()
			ctx, requestEnds := context.WithCancel(t.Context())
			defer requestEnds()
			b.Commit(ctx)
			left := 0
			if !slow {
				requestEnds()
				left = 2990
			}
			err := <-ended
			if got := watched.Reader.(*bytes.Reader).Len(); got != left || slow != (err == nil) {
				t.Errorf("slow: %v: ReadAll() = %v with %d bytes left unread, want %d", slow, err, got, left)
			}
		})
	}
}

// An upstream that has answered without asking for the body does not want it.
// The attempt must not read it, but not end either while the answer comes.
func TestBodyThatIsNotWantedIsNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		watched := &replaytest.Body{Reader: bytes.NewReader(replaytest.Pattern(3000))}
		b := New(watched, 1000)
		b.pause = time.Second
		ended := make(chan error, 1)
		go func() {
			_, err := b.First().Read(make([]byte, 100))
			ended <- err
		}()
		synctest.Wait()
		ctx, requestEnds := context.WithCancel(t.Context())
		b.Commit(ctx)
		time.Sleep(time.Minute)
		select {
		case err := <-ended:
			t.Fatalf("Read() = %v while the answer may still be coming, want that it waits", err)
		default:
		}
		requestEnds()
		if err := <-ended; !errors.Is(err, errSuperseded) {
			t.Errorf("Read() = %v, want %v", err, errSuperseded)
		}
		if got := watched.Reader.(*bytes.Reader).Len(); got != 3000 {
			t.Errorf("got %d bytes read, want none", 3000-got)
		}
	})
}

func TestRefusalDuringThePause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		data := replaytest.Pattern(3000)
		b := New(io.NopCloser(bytes.NewReader(data)), 1000)
		b.pause = time.Second
		first := b.First()
		go func() { _, _ = io.ReadAll(first) }()
		synctest.Wait()
		if !b.Hold() {
			t.Fatal("Hold: got false, want true")
		}
		time.Sleep(time.Minute) // getting the token takes longer than the pause
		if got, err := io.ReadAll(b.Again(true)); err != nil || !bytes.Equal(got, data) {
			t.Errorf("got %d bytes, err %v, want all %d", len(got), err, len(data))
		}
	})
}
