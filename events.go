// The events that operators can subscribe to.

package outboundauth

import (
	"fmt"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

// The names of the events. The comment behind a name lists the data of the
// event.
const (
	eventObtained = "oauth2_token_obtained" // client, expires, renewal
	eventFailed   = "oauth2_token_failed"   // client, error, error_description, status, failures, retry_at
	eventRefused  = "oauth2_token_rejected" // client, upstream
)

// emitter emits events in the name of a transport. Caddy calls the handlers
// before emit returns. The handlers of events about tokens run in the goroutine
// of the fetch, when all who wait for the fetch know its result.
type emitter struct {
	app    *caddyevents.App
	ctx    caddy.Context // the context of the transport, which is the origin of its events
	logger *zap.Logger
}

func (e *emitter) emit(event string, data map[string]any) {
	if e == nil {
		return
	}
	// In our own goroutine, a panic of a handler would end the whole server.
	defer func() {
		if p := recover(); p != nil {
			e.logger.Error("a handler of an event panicked", zap.String("event", event), zap.String("panic", fmt.Sprintf("%T", p)))
		}
	}()
	// To Caddy, an event of a config that has ended is an error.
	if e.ctx.Err() == nil && e.app.ShouldEmit(event) {
		e.app.Emit(e.ctx, event, data)
	}
}
