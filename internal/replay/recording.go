// What is kept of a body.

package replay

import "sync"

// pieceSize is how much of a body is kept in one piece, in bytes. Most bodies need
// one only.
const pieceSize = 4 << 10

// A recording keeps the beginning of a body, in pieces: it never takes more memory
// than what it keeps, but for what is left of the last piece. A buffer that grows
// would take up to twice as much.
type recording struct {
	pieces [][]byte // all of pieceSize, but for the last of a recording that is full
	size   int      // what is kept, in bytes
}

// Recordings and pieces are reused: most bodies are small, and few are sent again.
var (
	recordings = sync.Pool{New: func() any { return new(recording) }}
	pieces     = sync.Pool{New: func() any { return new([pieceSize]byte) }}
)

// write keeps p. With it, no more than limit bytes may be kept.
func (r *recording) write(p []byte, limit int) {
	for len(p) > 0 {
		number, start := r.size/pieceSize, r.size%pieceSize
		if number == len(r.pieces) {
			r.pieces = append(r.pieces, newPiece(limit-r.size))
		}
		n := copy(r.pieces[number][start:], p)
		r.size += n
		p = p[n:]
	}
}

// newPiece returns a piece; a smaller one if no more than that is needed.
func newPiece(needed int) []byte {
	if needed < pieceSize {
		return make([]byte, needed)
	}
	return pieces.Get().(*[pieceSize]byte)[:]
}

// read copies what is kept from offset on to p.
func (r *recording) read(p []byte, offset int) (n int) {
	for n < len(p) && offset < r.size {
		number, start := offset/pieceSize, offset%pieceSize
		end := min(pieceSize, r.size-number*pieceSize)
		copied := copy(p[n:], r.pieces[number][start:end])
		n += copied
		offset += copied
	}
	return n
}

// free gives the recording back.
func (r *recording) free() {
	for _, piece := range r.pieces {
		if len(piece) == pieceSize {
			pieces.Put((*[pieceSize]byte)(piece))
		}
	}
	clear(r.pieces)
	r.pieces, r.size = r.pieces[:0], 0
	recordings.Put(r)
}
