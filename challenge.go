// stub

package outboundauth

import (
	"net/http"
	"strings"
)

func challengeError(h http.Header) string {
	v := h.Get("Www-Authenticate")
	for _, e := range []string{"invalid_token", "insufficient_scope"} {
		if strings.Contains(v, `"`+e+`"`) {
			return e
		}
	}
	return ""
}
