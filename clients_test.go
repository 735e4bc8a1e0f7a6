package outboundauth

import (
	"reflect"
	"slices"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// Only options that do not say which server is reached may be left out. An option
// that is new in Caddy counts.
func TestIdentityOfATokenTransport(t *testing.T) {
	leftOut := []string{
		"KeepAlive", "MaxConnsPerHost", "DialTimeout", "FallbackDelay", "ResponseHeaderTimeout", "ExpectContinueTimeout",
		"MaxResponseHeaderSize", "WriteBufferSize", "ReadBufferSize", "ReadTimeout", "WriteTimeout", "Versions",
		"HandshakeTimeout", // of TLS
	}
	fresh := func() reverseproxy.HTTPTransport {
		return reverseproxy.HTTPTransport{TLS: new(reverseproxy.TLSConfig)}
	}
	plain := encode(t, identity(fresh()))
	eachOption := func(options reflect.Type, of func(*reverseproxy.HTTPTransport) any) {
		for _, option := range reflect.VisibleFields(options) {
			if !option.IsExported() || option.Tag.Get("json") == "-" || option.Name == "TLS" {
				continue
			}
			h := fresh()
			set(t, option.Name, reflect.ValueOf(of(&h)).Elem().FieldByIndex(option.Index))
			before := encode(t, h)
			if same, want := slices.Equal(encode(t, identity(h)), plain), slices.Contains(leftOut, option.Name); same != want {
				t.Errorf("%s: left out is %v, want %v", option.Name, same, want)
			}
			if !slices.Equal(encode(t, h), before) {
				t.Errorf("%s: the transport was changed, want a copy", option.Name)
			}
		}
	}
	eachOption(reflect.TypeFor[reverseproxy.HTTPTransport](), func(h *reverseproxy.HTTPTransport) any { return h })
	eachOption(reflect.TypeFor[reverseproxy.TLSConfig](), func(h *reverseproxy.HTTPTransport) any { return h.TLS })
}

// set gives an option a value that is not its default.
func set(t *testing.T, name string, option reflect.Value) {
	t.Helper()
	switch option.Kind() {
	case reflect.Bool:
		option.SetBool(true)
	case reflect.Int, reflect.Int64:
		option.SetInt(1)
	case reflect.String:
		option.SetString("a")
	case reflect.Pointer:
		option.Set(reflect.New(option.Type().Elem()))
	case reflect.Slice:
		if option.Type().Elem().Kind() == reflect.Uint8 { // raw JSON
			option.SetBytes([]byte(`{}`))
		} else {
			option.Set(reflect.ValueOf([]string{"a"}))
		}
	default:
		t.Fatalf("%s is a %v, which this test can't set", name, option.Kind())
	}
}
