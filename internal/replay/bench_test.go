package replay

import (
	"bytes"
	"fmt"
	"io"
	"testing"

	"github.com/outboundauth/caddy-outbound-auth/internal/replaytest"
)

// BenchmarkRecording measures what it costs to record a body that is sent once, as
// net/http reads it, and one that is sent again.
func BenchmarkRecording(b *testing.B) {
	for _, size := range []int{2 << 10, 60 << 10} {
		data := replaytest.Pattern(size)
		buf := make([]byte, 32<<10)
		for _, again := range []bool{false, true} {
			b.Run(fmt.Sprintf("%d KiB/again %v", size>>10, again), func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(int64(size))
				source := bytes.NewReader(data)
				for b.Loop() {
					source.Reset(data)
					body := New(io.NopCloser(source), DefaultLimit)
					attempt := body.First()
					for {
						if _, err := attempt.Read(buf); err != nil {
							break
						}
					}
					attempt.Close()
					if again {
						body.Hold()
						attempt = body.Again(true)
						for {
							if _, err := attempt.Read(buf); err != nil {
								break
							}
						}
						attempt.Close()
					}
					body.Commit(b.Context())
				}
			})
		}
	}
}
