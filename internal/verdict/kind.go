package verdict

import "hash/maphash"

// A Kind tells requests apart that an upstream may treat differently: the same path with
// the same method is one kind.
type Kind uint64

var seed = maphash.MakeSeed()

// KindOf returns the kind of a request. A health check is of another kind than a request
// of a client to the same path.
func KindOf(method, path string, check bool) Kind {
	return Kind(maphash.Comparable(seed, struct {
		method, path string
		check        bool
	}{method, path, check}))
}

// maxKinds is how many kinds a place remembers at least: those accepted last. It
// remembers twice as many at most. A client can make any number of them.
const maxKinds = 512

// kinds remembers the kinds of the requests that an upstream has accepted, and whether a
// new token was once of no use to a request of this kind. It has two generations: when
// the young one is full, the old one is forgotten. So nothing is ordered by age, and
// most acceptances change nothing.
type kinds struct{ young, old map[Kind]bool }

func (k *kinds) get(kind Kind) (noisy, known bool) {
	if noisy, known = k.young[kind]; known {
		return noisy, true
	}
	noisy, known = k.old[kind]
	return noisy, known
}

func (k *kinds) knows(kind Kind) bool {
	_, known := k.get(kind)
	return known
}

// trusts reports whether a kind is known, and not noisy.
func (k *kinds) trusts(kind Kind) bool {
	noisy, known := k.get(kind)
	return known && !noisy
}

// accept notes that a request of this kind was accepted.
func (k *kinds) accept(kind Kind) {
	if _, ok := k.young[kind]; !ok {
		noisy, _ := k.get(kind)
		k.put(kind, noisy)
	}
}

// distrust notes that a new token was of no use to a request of this kind.
func (k *kinds) distrust(kind Kind) {
	if k.knows(kind) {
		k.put(kind, true)
	}
}

func (k *kinds) put(kind Kind, noisy bool) {
	if k.young == nil || len(k.young) >= maxKinds {
		k.young, k.old = make(map[Kind]bool), k.young
	}
	k.young[kind] = noisy
}
