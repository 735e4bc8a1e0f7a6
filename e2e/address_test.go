package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// heldAddress is where nobody listens unless the test has somebody do so: a
// socket is bound to it until the test ends, so that it is given to no other
// listener and to no outgoing connection, and connections to it are refused.
// Caddy can listen there, since it shares its ports with sockets that have these
// options, and so can any program that sets SO_REUSEADDR, as Go does.
func heldAddress(t *testing.T) string {
	t.Helper()
	fd := newSocket(t, unix.SOCK_STREAM, unix.SO_REUSEADDR, unix.SO_REUSEPORT)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: loopback}); err != nil {
		t.Fatal(err)
	}
	bound, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", bound.(*unix.SockaddrInet4).Port)
}

// heldHTTP3Address is heldAddress, held for QUIC as well.
func heldHTTP3Address(t *testing.T) string {
	t.Helper()
	for {
		addr := heldAddress(t)
		err := holdDatagrams(t, addr)
		if err == nil {
			return addr
		}
		// Somebody has the port for datagrams. Nobody has relied on it yet.
		if !errors.Is(err, unix.EADDRINUSE) {
			t.Fatal(err)
		}
	}
}

// holdDatagrams holds an address for UDP, which Caddy can share. The socket is
// connected, to itself: it gets no datagram of others.
func holdDatagrams(t *testing.T, addr string) error {
	t.Helper()
	fd := newSocket(t, unix.SOCK_DGRAM, unix.SO_REUSEPORT)
	itself := &unix.SockaddrInet4{Port: int(netip.MustParseAddrPort(addr).Port()), Addr: loopback}
	if err := unix.Bind(fd, itself); err != nil {
		return err
	}
	return unix.Connect(fd, itself)
}

var loopback = [4]byte{127, 0, 0, 1}

// newSocket returns a socket with these options that no process inherits. It
// is closed when the test ends.
func newSocket(t *testing.T, kind int, options ...int) int {
	t.Helper()
	syscall.ForkLock.RLock()
	fd, err := unix.Socket(unix.AF_INET, kind, 0)
	if err == nil {
		unix.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	for _, option := range options {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, 1); err != nil {
			t.Fatal(err)
		}
	}
	return fd
}
