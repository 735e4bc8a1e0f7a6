// Why a connection failed, in words of this machine.

package outboundauth

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/outboundauth/caddy-outbound-auth/internal/redact"
)

// How much of a foreign text is shown, in bytes.
const (
	maxShownCode        = 64
	maxShownValue       = 200 // of a URL
	maxShownList        = 300 // of names and addresses
	maxShownDescription = 400
)

// Reasons why a connection failed. Those who know what the connection is for say
// what to do about them.
var (
	errUnknownAuthority = errors.New("the server's certificate is signed by an unknown authority")
	errNoTLS            = errors.New("the server does not speak TLS there")
	errNoAnswer         = errors.New("no answer in time")
	errCutOff           = errors.New("the server closed the connection before its answer was complete")
	errBroken           = errors.New("the connection broke, or the answer is not HTTP")
)

// networkReason returns what may be said of an error of a connection. Only texts that
// are known to come from this machine are quoted: net/http repeats parts of a
// malformed answer, and a server may send back what we sent. It may also write that
// into its certificate, or into the frame that ends a connection of HTTP/2.
func networkReason(err error) error {
	var (
		dial      reverseproxy.DialError
		op        *net.OpError
		dns       *net.DNSError
		cert      *tls.CertificateVerificationError
		invalid   x509.CertificateInvalidError
		hostname  x509.HostnameError
		authority x509.UnknownAuthorityError
		record    tls.RecordHeaderError
		alert     tls.AlertError
	)
	switch {
	case errors.As(err, &dial): // of Caddy's dialer; hides the error within
		return shortReason(dial.Error())
	case errors.As(err, &dns):
		return shortReason(dns.Error())
	case errors.As(err, &hostname):
		return shortReason("the server's certificate is not valid for " + hostname.Host)
	case errors.As(err, &authority):
		return errUnknownAuthority
	case errors.As(err, &invalid):
		return errors.New("the server's certificate is not valid: " + certificateFault(invalid))
	case errors.As(err, &cert):
		return errors.New("the server's certificate is not valid")
	case errors.As(err, &record), errors.Is(err, http.ErrSchemeMismatch):
		return errNoTLS
	case errors.As(err, &alert):
		return alert
	case errors.As(err, &op):
		return shortReason(operation(op).Error())
	case timedOut(err):
		return errNoAnswer
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errCutOff
	}
	return errBroken
}

// shortReason makes an error of a text with a name in it, which somebody else may
// have chosen: of a host, for example.
func shortReason(text string) error { return errors.New(redact.Clean(text, maxShownList)) }

// timedOut reports whether an error, or one that it wraps, is a timeout.
func timedOut(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.As(err, &timeout) && timeout.Timeout()
}

// certificateFault says what is wrong with a certificate, without the names in it.
func certificateFault(err x509.CertificateInvalidError) string {
	if err.Reason == x509.Expired && err.Cert != nil {
		return "it has expired, or is not valid yet: it is valid from " +
			err.Cert.NotBefore.UTC().Format(time.RFC3339) + " to " + err.Cert.NotAfter.UTC().Format(time.RFC3339)
	}
	return x509.CertificateInvalidError{Reason: err.Reason}.Error()
}

// operation returns an error of package net with nothing in it but what this machine
// says. A proxy's words, for example, can be the reason of an operation.
func operation(op *net.OpError) *net.OpError {
	shown := *op
	switch within := op.Err.(type) { //nolint:errorlint // each level is looked at
	case *os.SyscallError, syscall.Errno, *net.DNSError:
	case *net.OpError:
		shown.Err = operation(within)
	default:
		switch {
		case op.Op == "remote error", op.Op == "local error": // alerts of crypto/tls
		case timedOut(within):
			shown.Err = os.ErrDeadlineExceeded
		case errors.Is(within, net.ErrClosed):
			shown.Err = net.ErrClosed
		default:
			shown.Err = errors.New("failed")
		}
	}
	return &shown
}
