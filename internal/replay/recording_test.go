package replay

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"testing"

	"github.com/outboundauth/caddy-outbound-auth/internal/replaytest"
)

// zeros are a body that takes no memory itself.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// liveHeap is what is in use, without what was given back to the pools.
func liveHeap() int64 {
	var m runtime.MemStats
	for range 3 {
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// Many clients may begin an upload and then send nothing more.
func TestStalledUploadsTakeNoMoreThanTheLimit(t *testing.T) {
	for _, test := range []struct{ uploads, limit, size, read int }{
		{200, DefaultLimit, 63 << 10, 512},
		{200, DefaultLimit, 63 << 10, 4 << 10}, // as net/http reads of a connection
		{200, DefaultLimit, 63 << 10, 32 << 10},
		{200, DefaultLimit, DefaultLimit, 4 << 10},
		{20, 1 << 20, 1<<20 - 1, 4 << 10},
		{200, 40_000, 39_000, 4 << 10},
		{1000, 10_000, 9_000, 4 << 10},
	} {
		t.Run(fmt.Sprintf("%d of %d, %d at a time", test.size, test.limit, test.read), func(t *testing.T) {
			bodies := make([]*Body, test.uploads)
			buf := make([]byte, test.read)
			before := liveHeap()
			for i := range bodies {
				bodies[i] = New(io.NopCloser(zeros{}), test.limit)
				first := bodies[i].First()
				for sent := 0; sent < test.size; {
					n, _ := first.Read(buf[:min(len(buf), test.size-sent)])
					sent += n
				}
			}
			each := (liveHeap() - before) / int64(test.uploads)
			runtime.KeepAlive(bodies)
			if most := int64(test.limit + test.limit/10); each > most {
				t.Errorf("got %d bytes of memory for an upload, want %d at most", each, most)
			}
		})
	}
}

// What a small body is recorded in is no more than it needs.
func TestStalledSmallUploadsTakeLittle(t *testing.T) {
	const uploads = 1000
	bodies := make([]*Body, uploads)
	before := liveHeap()
	for i := range bodies {
		bodies[i] = New(io.NopCloser(zeros{}), DefaultLimit)
		_, _ = bodies[i].First().Read(make([]byte, 2000))
	}
	each := (liveHeap() - before) / uploads
	runtime.KeepAlive(bodies)
	if each > 5000 {
		t.Errorf("got %d bytes of memory for an upload of 2000, want 5000 at most", each)
	}
}

// Recordings are used again, the large ones too. (With the race detector, a pool
// forgets a part of what it is given.)
func TestLargeRecordingsAreReused(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	const rounds, limit = 50, 1 << 20
	buf := make([]byte, 4<<10)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range rounds {
		b := New(io.NopCloser(zeros{}), limit)
		for first, sent := b.First(), 0; sent < limit; {
			n, _ := first.Read(buf)
			sent += n
		}
		b.Commit(t.Context())
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > rounds*limit/2 {
		t.Errorf("got %d bytes allocated for %d recordings of %d, want that they are used again", got, rounds, limit)
	}
}

// Whatever the limit, and however a body is read and written, the recording is
// what was read of it.
func TestRecordingInPieces(t *testing.T) {
	for _, limit := range []int{0, 1, pieceSize - 1, pieceSize, pieceSize + 1, 2 * pieceSize, 5*pieceSize + 7} {
		for _, chunk := range []int{1, 700, pieceSize, 3*pieceSize + 1} {
			data := replaytest.Pattern(limit + 2*pieceSize)
			b := New(io.NopCloser(bytes.NewReader(data)), limit)
			first := b.First()
			for sent := 0; sent < limit; {
				n, err := first.Read(make([]byte, min(chunk, limit-sent)))
				if err != nil {
					t.Fatal(err)
				}
				sent += n
			}
			if !b.Hold() {
				t.Fatalf("limit %d: Hold: got false, want true", limit)
			}
			got, err := io.ReadAll(&chunkReader{b.Again(true), chunk})
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("limit %d, %d at a time: got %d bytes, err %v, want all %d", limit, chunk, len(got), err, len(data))
			}
			b.Commit(t.Context())
		}
	}
}
