package outboundauth

import (
	"fmt"
	"sync/atomic"
	"time"
)

// revocations are when tokens are revoked during an attack: six times.
func revocations() []time.Duration {
	all := make([]time.Duration, 6)
	for i := range all {
		all[i] = 2*time.Minute + time.Duration(i)*47300*time.Millisecond
	}
	return all
}

// each makes calls at a distance.
func each(every time.Duration, call func(i int, at time.Duration) []*rigCall) func(time.Duration) []*rigCall {
	return func(lasts time.Duration) (all []*rigCall) {
		for i := range int(lasts / every) {
			all = append(all, call(i, time.Duration(i)*every+every/2)...)
		}
		return all
	}
}

// falseEvidence has a path accepted, and refused a moment later: that is strong evidence
// against the token. It takes another path each time, as a path is believed once.
func falseEvidence(addresses ...string) func(time.Duration) []*rigCall {
	return each(time.Second, func(i int, at time.Duration) (all []*rigCall) {
		for _, address := range addresses {
			kind := fmt.Sprint("GET /search/", i)
			all = append(all, &rigCall{at: at, address: address, kind: kind, good: true},
				&rigCall{at: at + 50*time.Millisecond, address: address, kind: kind})
			at += 100 * time.Millisecond
		}
		return all
	})
}

// attacks are what a client can do who knows all this. He must not be able to delay the
// healing of others.
func attacks() []verdictHistory {
	good := goodStream(5, "GET /strict")
	return []verdictHistory{{
		id: "A1", name: "false evidence 1/s, good 5/s, revoked six times",
		streams: []rigStream{good}, attack: falseEvidence(addressA), revoked: revocations(),
		bounds: usually.losing(10, time.Second),
	}, {
		id: "A2", name: "false evidence 1/s by clients that leave at once, good 5/s, revoked six times",
		streams: []rigStream{good}, revoked: revocations(),
		attack: each(time.Second, func(_ int, at time.Duration) []*rigCall {
			return []*rigCall{
				{at: at, address: addressA, kind: "GET /search", good: true},
				{at: at + 50*time.Millisecond, address: addressA, kind: "GET /search", leaves: 7 * time.Millisecond},
			}
		}),
		bounds: usually.losing(10, time.Second),
	}, {
		id: "A3", name: "false evidence 1/s at two addresses, good 5/s at B, revoked six times",
		streams: []rigStream{good.at(always(addressB))}, revoked: revocations(),
		attack: falseEvidence(addressA, "192.0.2.77:443"),
		bounds: usually.losing(20, time.Second),
	}, {
		id: "A4", name: "bursts of accepted requests and one that is refused, good 5/s, revoked six times",
		streams: []rigStream{good}, revoked: revocations(),
		attack: each(3*time.Second, func(i int, at time.Duration) []*rigCall {
			all := make([]*rigCall, 60)
			for j := range all {
				all[j] = &rigCall{at: at + time.Duration(2*j)*time.Millisecond, address: addressA, kind: "GET /own", good: true}
			}
			return append(all, &rigCall{at: at + 140*time.Millisecond, address: addressA, kind: fmt.Sprint("GET /x", i)})
		}),
		bounds: usually.losing(10, time.Second),
	}, {
		id: "A5", name: "40 good kinds that a client has made noisy, good 5/s, revoked six times",
		streams: []rigStream{goodStreamOf(5, anyOf(40, "GET /s%d"))}, revoked: revocations(),
		attack: each(1500*time.Millisecond, func(i int, at time.Duration) []*rigCall {
			return []*rigCall{{at: at, address: addressA, kind: fmt.Sprint("GET /s", i%40)}}
		}),
		// All of the second minute, the 40 are still being learned.
		bounds: usually.asking(12, 7, 10).losing(20, 2*time.Second),
	}, {
		id: "A6", name: "one of two hosts behind an address revokes six times, good 20/s",
		streams: []rigStream{goodStream(20, "GET /strict")}, revoked: revocations(),
		settings: rigSettings{rule: oneOfTwoHosts()},
		bounds:   usually.losing(20, time.Second),
	}, slowPasswords(), {
		id: "A8", name: "wrong passwords 5/s get 401, and then 429, right ones 0.2/s",
		streams:  []rigStream{noiseStream(5, "POST /login"), goodStream(0.2, "POST /login")},
		settings: rigSettings{rule: tooManyAttempts},
		bounds:   usually,
	}}
}

// slowPasswords is an attack on the accounts of others: each wrong password is to be
// counted twice.
func slowPasswords() verdictHistory {
	h := verdictHistory{
		id: "A7", name: "wrong passwords 1/s that take 5 s, noise 50/s, good 5/s, then revoked",
		streams: []rigStream{goodStream(5, "GET /strict"), noiseStreamOf(50, anyPath)}, revoked: atRevocation(),
		attack: each(time.Second, func(_ int, at time.Duration) []*rigCall {
			return []*rigCall{{at: at, address: addressA, kind: "POST /login", slow: 5 * time.Second}}
		}),
		bounds: usually.waiting(12 * time.Second),
	}
	h.bounds.slowAgain = 40
	return h
}

// tooManyAttempts is the rule of an upstream that answers the second attempt of a request
// with another error.
func tooManyAttempts(s rigSight) rigJudgement {
	if !s.good && len(s.receipts) > 0 {
		s.rigCall.refusal = rigRefusal{429, ""}
		return refusesRequest
	}
	return judgeByToken(s)
}

// oneOfTwoHosts is the rule of an address with two hosts behind it, of which one never
// notices that a token is revoked.
func oneOfTwoHosts() func(rigSight) rigJudgement {
	var n atomic.Int64
	return func(s rigSight) rigJudgement {
		if n.Add(1)%2 == 0 && s.good {
			return acceptsRequest
		}
		return judgeByToken(s)
	}
}
