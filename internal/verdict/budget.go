package verdict

import "time"

const (
	// So many new tokens may be of no use in a short time, and after that one in each
	// refill.
	budget = 10
	refill = 30 * time.Second

	// What noise can't use up. Half of it is for strong evidence, and the other half for
	// an upstream that has refused nothing before, or is silent: clients can bring about
	// strong evidence, but not those.
	reserve = 2
)

// A Budget limits the new tokens that refusals bring about, for all upstreams that get
// the same token. If each upstream had a budget of its own, five hundred of them would
// be an attack on the authorization server. The zero Budget is full.
type Budget struct {
	spent   float64
	counted time.Time // until when the refill has been counted
	last    time.Time // when a refusal last brought about a new token
}

// since is the time since a refusal last brought about a new token.
func (b *Budget) since(now time.Time) time.Duration { return now.Sub(b.last) }

// affords reports whether one more new token may be of no use.
func (b *Budget) affords(now time.Time) bool { return b.left(now) >= 1+reserve }

// affordsHalf is affords for those who may use half of the reserve.
func (b *Budget) affordsHalf(now time.Time) bool { return b.left(now) >= 1+reserve/2 }

// affordsReserve is affords for those who may use all of it.
func (b *Budget) affordsReserve(now time.Time) bool { return b.left(now) >= 1 }

func (b *Budget) left(now time.Time) float64 {
	b.spent = max(0, b.spent-float64(now.Sub(b.counted))/float64(refill))
	b.counted = now
	return budget - b.spent
}

// spend pays for a new token.
func (b *Budget) spend(now time.Time) {
	b.spent++
	b.last = now
}

// refund gives back what a new token has cost: it has helped, or there was none.
func (b *Budget) refund() { b.spent-- }
