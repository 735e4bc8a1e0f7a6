package outboundauth

import (
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

// The events that operators can subscribe to.
const (
	eventObtained = "oauth2_token_obtained" // client, expires, renewal
	eventFailed   = "oauth2_token_failed"   // client, error, error_description, status, failures, retry_at
	eventRejected = "oauth2_token_rejected" // client
)

// emitter emits events in the name of a transport. Caddy calls the handlers
// before emit returns: those of tokens run in the goroutine of the fetch, when
// its result is known to all who wait for it.
type emitter struct {
	app *caddyevents.App
	ctx caddy.Context // of the transport, which is the origin of its events
}

func (e *emitter) emit(event string, data map[string]any) {
	// Caddy takes it for an error if the config has ended.
	if e != nil && e.ctx.Err() == nil && e.app.ShouldEmit(event) {
		e.app.Emit(e.ctx, event, data)
	}
}
