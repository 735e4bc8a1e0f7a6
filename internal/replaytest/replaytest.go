// Package replaytest has bodies for tests of what sends them twice.
package replaytest

import (
	"fmt"
	"io"
	"sync/atomic"
)

// A Body is a request's body that notes how it is used.
type Body struct {
	io.Reader
	Reading atomic.Bool // is being read
	Twice   atomic.Bool // was read by two at once
	Late    atomic.Bool // was read after Close
	Closes  atomic.Int32
}

// Read implements io.Reader.
func (b *Body) Read(p []byte) (int, error) {
	if !b.Reading.CompareAndSwap(false, true) {
		b.Twice.Store(true)
	}
	defer b.Reading.Store(false)
	if b.Closes.Load() > 0 {
		b.Late.Store(true)
	}
	return b.Reader.Read(p)
}

// Close implements io.Closer.
func (b *Body) Close() error {
	b.Closes.Add(1)
	return nil
}

// Pattern returns n bytes of which each stretch is different.
func Pattern(n int) []byte {
	b := make([]byte, 0, n+8)
	for i := 0; len(b) < n; i++ {
		b = fmt.Append(b, i, " ")
	}
	return b[:n]
}
