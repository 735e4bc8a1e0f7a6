package replay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/outboundauth/caddy-outbound-auth/internal/replaytest"
)

func readN(t *testing.T, r io.Reader, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		t.Fatalf("reading %d bytes: %v", n, err)
	}
	return b
}

func TestReplayRepeatsWhatIsRecorded(t *testing.T) {
	const limit = 1000
	for _, test := range []struct {
		size, read int // of it, by the first attempt
		want       bool
	}{
		{0, 0, true},
		{10, 0, true},
		{10, 10, true},
		{limit, limit, true},
		{limit + 1, limit, true},
		{limit + 1, limit + 1, false},
		{50 * limit, 0, true},
		{50 * limit, limit / 2, true},
		{50 * limit, limit, true},
		{50 * limit, limit + 1, false},
		{50 * limit, 50 * limit, false},
	} {
		t.Run(fmt.Sprintf("%d of %d", test.read, test.size), func(t *testing.T) {
			data := replaytest.Pattern(test.size)
			source := &replaytest.Body{Reader: bytes.NewReader(data)}
			b := New(source, limit)
			first := b.First()
			if got := readN(t, first, test.read); !bytes.Equal(got, data[:test.read]) {
				t.Errorf("first attempt: got %d other bytes, want those of the body", len(got))
			}
			if got := b.Hold(); got != test.want {
				t.Fatalf("Hold: got %v, want %v", got, test.want)
			}
			attempt, want := first, data[test.read:]
			if test.want {
				attempt, want = b.Again(true), data
				if n, err := first.Read(make([]byte, 1)); n != 0 || !errors.Is(err, errSuperseded) {
					t.Errorf("first attempt after that: got %d, %v, want %v", n, err, errSuperseded)
				}
			}
			b.Commit(t.Context())
			if got, err := io.ReadAll(attempt); err != nil || !bytes.Equal(got, want) {
				t.Errorf("got %d bytes, err %v, want %d and none", len(got), err, len(want))
			}
		})
	}
}

// RoundTrip of an HTTP transport may return while the body is still sent: the
// recording must last until then, though others reuse the buffers.
func TestRecordingLastsUntilItIsSent(t *testing.T) {
	data := replaytest.Pattern(5000)
	b := New(&replaytest.Body{Reader: bytes.NewReader(data)}, 4000)
	readN(t, b.First(), 3000)
	if !b.Hold() {
		t.Fatal("Hold: got false, want true")
	}
	second := b.Again(true)
	got := readN(t, second, 100)
	b.Commit(t.Context()) // RoundTrip has returned
	for range 10 {
		other := New(io.NopCloser(strings.NewReader(strings.Repeat("-", 4000))), 4000)
		readN(t, other.First(), 4000)
		other.Commit(t.Context())
	}
	rest, err := io.ReadAll(second)
	if got = append(got, rest...); err != nil || !bytes.Equal(got, data) {
		t.Errorf("got %d bytes, err %v, want the whole body of %d", len(got), err, len(data))
	}
}

func TestRecordingIsBounded(t *testing.T) {
	const limit = 1000
	b := New(io.NopCloser(bytes.NewReader(replaytest.Pattern(100*limit))), limit)
	first := b.First()
	for buf := make([]byte, 700); ; {
		_, err := first.Read(buf)
		b.mu.Lock()
		if b.recorded != nil && b.recorded.size > limit {
			t.Fatalf("got %d bytes recorded, want no more than %d", b.recorded.size, limit)
		}
		b.mu.Unlock()
		if err != nil {
			break
		}
	}
	if b.recorded != nil {
		t.Error("got a recording of a body that is too large, want none")
	}
}

// What the first attempt is reading when it is given up belongs to the second.
func TestReadThatIsUnderWayIsNotLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source, sink := io.Pipe()
		watched := &replaytest.Body{Reader: source}
		b := New(watched, 1000)
		first := b.First()
		firstErr := make(chan error, 1)
		go func() {
			got, err := io.ReadAll(first)
			if string(got) != "one " {
				err = fmt.Errorf("got %q, want only what came before the refusal", got)
			}
			firstErr <- err
		}()
		_, _ = io.WriteString(sink, "one ")
		synctest.Wait() // the first attempt reads again
		if !b.Hold() {
			t.Fatal("Hold: got false, want true")
		}
		second := b.Again(true)
		secondGot := make(chan []byte, 1)
		go func() {
			got, err := io.ReadAll(second)
			if err != nil {
				t.Error(err)
			}
			secondGot <- got
		}()
		synctest.Wait()
		_, _ = io.WriteString(sink, "two ")
		_, _ = io.WriteString(sink, "three")
		sink.Close()
		if err := <-firstErr; !errors.Is(err, errSuperseded) {
			t.Errorf("first attempt: got %v, want %v", err, errSuperseded)
		}
		if got := <-secondGot; string(got) != "one two three" {
			t.Errorf("second attempt: got %q, want the whole body", got)
		}
		if watched.Twice.Load() {
			t.Error("the body was read by two at once, want one at a time")
		}
	})
}

// While the token is replaced, the first attempt reads no further.
func TestHeldAttemptWaits(t *testing.T) {
	for _, retried := range []bool{true, false} {
		t.Run(fmt.Sprint("sent again: ", retried), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				data := replaytest.Pattern(5000)
				watched := &replaytest.Body{Reader: bytes.NewReader(data)}
				b := New(watched, 1000)
				first := b.First()
				readN(t, first, 500)
				if !b.Hold() {
					t.Fatal("Hold: got false, want true")
				}
				done := make(chan error, 1)
				go func() {
					_, err := io.ReadAll(first)
					done <- err
				}()
				synctest.Wait()
				if got := len(data) - watched.Reader.(*bytes.Reader).Len(); got != 500 {
					t.Errorf("got %d bytes read, want no more than 500 while held", got)
				}
				if retried {
					if got, err := io.ReadAll(b.Again(true)); err != nil || !bytes.Equal(got, data) {
						t.Errorf("got %d bytes, err %v, want all %d", len(got), err, len(data))
					}
				} else {
					b.Commit(t.Context())
				}
				if err := <-done; (err != nil) != retried {
					t.Errorf("first attempt: got %v, want an error only if there is a second", err)
				}
			})
		})
	}
}

func TestReplayPassesOnTheEndOfTheBody(t *testing.T) {
	broken := errors.New("the client went away")
	for _, test := range []struct {
		name   string
		reader io.Reader
		want   error
	}{
		{"end with the last byte", iotest.DataErrReader(strings.NewReader("body")), nil},
		{"end after the last byte", strings.NewReader("body"), nil},
		{"error", io.MultiReader(strings.NewReader("body"), iotest.ErrReader(broken)), broken},
		{"error with the last byte", iotest.DataErrReader(io.MultiReader(strings.NewReader("body"), iotest.ErrReader(broken))), broken},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := New(io.NopCloser(test.reader), 100)
			again := func() io.ReadCloser { return b.Again(true) }
			for i, attempt := range []func() io.ReadCloser{b.First, again} {
				if got, err := io.ReadAll(attempt()); string(got) != "body" || !errors.Is(err, test.want) {
					t.Errorf("attempt %d: got %q, %v, want the body and %v", i+1, got, err, test.want)
				}
				if i == 0 && !b.Hold() {
					t.Fatal("Hold: got false, want true")
				}
			}
		})
	}
}

// The body is closed once, and not before it is known that no attempt follows.
func TestReplayClosesTheBodyOnce(t *testing.T) {
	for _, test := range []struct {
		name  string
		steps string // f: close the first, a: again, s: close the second, c: commit
		want  []int  // closed so often after each step
	}{
		{"closed before RoundTrip returns", "fc", []int{0, 1}},
		{"closed after RoundTrip has returned", "cf", []int{0, 1}},
		{"closed often", "ffccff", []int{0, 0, 1, 1, 1, 1}},
		{"sent again", "fasc", []int{0, 0, 1, 1}},
		{"sent again, closed late", "facs", []int{0, 0, 0, 1}},
		{"the first is closed after the second has begun", "afcs", []int{0, 0, 0, 1}},
		{"the first is closed last", "ascf", []int{0, 1, 1, 1}},
		{"sent again, closed often", "ffassccff", []int{0, 0, 0, 1, 1, 1, 1, 1, 1}},
		{"never closed", "c", []int{0}},
	} {
		t.Run(test.name, func(t *testing.T) {
			watched := &replaytest.Body{Reader: strings.NewReader("body")}
			b := New(watched, 100)
			first := b.First()
			var second io.ReadCloser
			for i, step := range test.steps {
				switch step {
				case 'f':
					first.Close()
				case 'a':
					b.Hold()
					second = b.Again(true)
				case 's':
					second.Close()
				case 'c':
					b.Commit(t.Context())
				}
				if got := int(watched.Closes.Load()); got != test.want[i] {
					t.Errorf("after %s: got the body closed %d times, want %d", test.steps[:i+1], got, test.want[i])
				}
			}
		})
	}
}

// net/http may close a body while it reads it, and read on. It then reads what is
// being closed.
func TestClosedBodyIsNotRead(t *testing.T) {
	for _, test := range []struct {
		name  string
		again bool
		late  bool // Commit comes after Close
	}{
		{"the first attempt", false, false},
		{"the first attempt, before RoundTrip returns", false, true},
		{"the second attempt", true, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				source, sink := io.Pipe()
				watched := &replaytest.Body{Reader: source}
				b := New(watched, 100)
				attempt := b.First()
				if test.again {
					b.Hold()
					attempt = b.Again(true)
				}
				if !test.late {
					b.Commit(t.Context())
				}
				var first, second error
				go func() {
					_, first = attempt.Read(make([]byte, 3))
					_, second = attempt.Read(make([]byte, 3))
				}()
				synctest.Wait() // it is being read
				attempt.Close()
				go func() {
					_, _ = io.WriteString(sink, "abcdef")
				}()
				synctest.Wait()
				if first != nil || second == nil {
					t.Errorf("got %v, then %v, want what came during Close, and then an error", first, second)
				}
				b.Commit(t.Context())
				synctest.Wait()
				if watched.Late.Load() || watched.Closes.Load() != 1 {
					t.Errorf("got the body closed %d times, read after that: %v, want it closed once, and not read",
						watched.Closes.Load(), watched.Late.Load())
				}
				source.Close()
			})
		})
	}
}

// While nothing comes from the client, closing the body ends the read: the end of an
// answer over HTTP/2 waits for that, and the client may wait for this end.
func TestCloseEndsAStalledRead(t *testing.T) {
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprint("before RoundTrip returns: ", late), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				source, sink := io.Pipe()
				watched := &replaytest.Body{Reader: source}
				b := New(endsReads{watched, source}, 100)
				b.CloseEndsReads()
				attempt := b.First()
				ended := make(chan error, 1)
				go func() {
					_, err := io.ReadAll(attempt)
					ended <- err
				}()
				_, _ = io.WriteString(sink, "start")
				synctest.Wait() // it is being read
				if late {
					attempt.Close()
				}
				b.Commit(t.Context())
				attempt.Close()
				start := time.Now()
				if err := <-ended; !errors.Is(err, io.ErrClosedPipe) || time.Since(start) > maxStall {
					t.Errorf("got %v after %v, want the read ended soon", err, time.Since(start))
				}
				synctest.Wait()
				if got := watched.Closes.Load(); got != 1 {
					t.Errorf("got the body closed %d times, want once", got)
				}
			})
		})
	}
}

// endsReads is a body whose reads end when it is closed, as those of a server's
// body over HTTP/2.
type endsReads struct {
	*replaytest.Body
	source io.Closer
}

func (e endsReads) Close() error {
	_ = e.Body.Close()
	return e.source.Close()
}

// A server's body that is closed may wait for the client. Meanwhile, neither
// RoundTrip nor its answer may.
func TestSlowCloseHoldsNothingUp(t *testing.T) {
	for _, test := range []struct{ name, steps string }{
		{"the transport is closing the second attempt's body", "asc"},
		{"the transport has closed the body", "fc"},
	} {
		t.Run(test.name, func(t *testing.T) {
			client, closing := make(chan struct{}), make(chan struct{})
			b := New(slowClose{strings.NewReader("body"), closing, client}, 100)
			first := b.First()
			second := first
			_, _ = first.Read(make([]byte, 1)) // closing what nobody has read costs nothing
			for _, step := range test.steps {
				switch step {
				case 'f':
					first.Close() // not yet the body itself
				case 'a':
					b.Hold()
					second = b.Again(true)
				case 's':
					go second.Close() // as net/http does for HTTP/2
					<-closing
				}
			}
			committed := make(chan struct{})
			go func() { b.Commit(t.Context()); close(committed) }()
			select {
			case <-committed:
			case <-time.After(10 * time.Second):
				t.Error("got RoundTrip waiting for the client, want that it returns")
			}
			close(client)
			<-committed
		})
	}
}

type slowClose struct {
	io.Reader
	closing, client chan struct{}
}

func (s slowClose) Close() error {
	close(s.closing)
	<-s.client
	return nil
}

// However the two attempts and the refusal interleave, no byte is lost or
// doubled.
func TestReplayInterleavings(t *testing.T) {
	deadline := time.Now().Add(2 * time.Second)
	for n := 0; n < 500 && time.Now().Before(deadline); n++ {
		seed := rand.Uint64()
		if !interleave(t, seed) {
			t.Fatalf("with seed %d", seed)
		}
	}
}

func interleave(t *testing.T, seed uint64) bool {
	r := rand.New(rand.NewPCG(seed, 0))
	data := replaytest.Pattern(r.IntN(3000))
	limit := r.IntN(2000)
	refusedAfter := r.IntN(len(data) + 1) // bytes that the first attempt has sent
	chunks := [3]int{1 + r.IntN(700), 1 + r.IntN(700), 1 + r.IntN(700)}

	watched := &replaytest.Body{Reader: &chunkReader{bytes.NewReader(data), chunks[0]}}
	b := New(watched, limit)
	first := b.First()
	refused := make(chan struct{})
	var got1 []byte
	var err1 error
	var wg sync.WaitGroup
	wg.Go(func() {
		defer first.Close()
		signal := sync.OnceFunc(func() { close(refused) })
		defer signal()
		buf := make([]byte, chunks[1])
		for err1 == nil {
			var n int
			n, err1 = first.Read(buf)
			if got1 = append(got1, buf[:n]...); len(got1) >= refusedAfter {
				signal() // and reads on, as net/http would
			}
		}
	})
	<-refused
	want1 := data
	held := b.Hold()
	if held {
		second := b.Again(true)
		var got2 []byte
		buf := make([]byte, chunks[2])
		var err error
		for err == nil {
			var n int
			n, err = second.Read(buf)
			got2 = append(got2, buf[:n]...)
		}
		second.Close()
		wg.Wait()
		if !errors.Is(err, io.EOF) || !bytes.Equal(got2, data) {
			t.Errorf("second attempt: got %d bytes, %v, want all %d", len(got2), err, len(data))
		}
		want1 = data[:min(len(got1), len(data))]
		if len(got1) > limit && len(got1) < len(data) {
			t.Errorf("got a second attempt after %d bytes, want none after %d", len(got1), limit)
		}
	}
	b.Commit(t.Context())
	wg.Wait()
	if !bytes.Equal(got1, want1) {
		t.Errorf("first attempt, held %v: got %d bytes, want %d", held, len(got1), len(want1))
	}
	// It may be closed in a goroutine of its own.
	for deadline := time.Now().Add(10 * time.Second); watched.Closes.Load() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("got the body open after 10 s, want it closed")
		}
	}
	if watched.Twice.Load() || watched.Late.Load() || watched.Closes.Load() != 1 {
		t.Errorf("got the body read by two %v, read late %v, closed %d times, want it read by one and closed once",
			watched.Twice.Load(), watched.Late.Load(), watched.Closes.Load())
	}
	return !t.Failed()
}

// A chunkReader returns at most n bytes at a time.
type chunkReader struct {
	io.Reader
	n int
}

func (c *chunkReader) Read(p []byte) (int, error) { return c.Reader.Read(p[:min(len(p), c.n)]) }

// A body can be sent more than twice, as long as no attempt has read more than is kept.
func TestBodyIsSentThreeTimes(t *testing.T) {
	const limit = 3 * pieceSize / 2
	data := replaytest.Pattern(2 * limit)
	for _, first := range []int{0, 1, pieceSize, limit} {
	second:
		for _, second := range []int{0, 1, pieceSize, limit, limit + 1} {
			b := New(io.NopCloser(bytes.NewReader(data)), limit)
			attempt := b.First()
			for i, n := range []int{first, second} {
				if _, err := io.ReadFull(attempt, make([]byte, n)); err != nil {
					t.Fatal(err)
				}
				if held := b.Hold(); held != (n <= limit) {
					t.Errorf("attempt %d has read %d bytes of %d: Hold() = %t", i, n, limit, held)
				} else if !held {
					continue second
				}
				before := attempt
				attempt = b.Again(i == 1 && second%2 == 0)
				if n, err := before.Read(make([]byte, 1)); n != 0 || err == nil {
					t.Errorf("attempt %d reads on: %d, %v", i, n, err)
				}
			}
			b.Commit(t.Context()) // the answer may come before the body is sent
			if got, err := io.ReadAll(attempt); err != nil || !bytes.Equal(got, data) {
				t.Errorf("after %d and %d bytes: got %d bytes, err %v, want all %d", first, second, len(got), err, len(data))
			}
			if err := attempt.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}
