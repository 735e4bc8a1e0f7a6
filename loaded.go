package outboundauth

import (
	"slices"
	"sync"
)

// loaded is the transports that are provisioned, oldest first.
var loaded struct {
	mu         sync.Mutex // guards all below
	transports []*Transport
}

func loadedTransports() []*Transport {
	loaded.mu.Lock()
	defer loaded.mu.Unlock()
	return slices.Clone(loaded.transports)
}

func (t *Transport) load() {
	loaded.mu.Lock()
	defer loaded.mu.Unlock()
	loaded.transports = append(loaded.transports, t)
}

func (t *Transport) unload() {
	loaded.mu.Lock()
	defer loaded.mu.Unlock()
	loaded.transports = slices.DeleteFunc(loaded.transports, func(other *Transport) bool { return other == t })
}
