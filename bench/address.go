// Hosts and ports, for gateways that configure them apart.

package main

import (
	"fmt"
	"net"
	"net/url"
	"strconv"
)

// An address is the host and the port of a server.
type address struct {
	Host string
	Port int
}

func parseAddress(hostport string) (address, error) {
	host, text, err := net.SplitHostPort(hostport)
	if err != nil {
		return address{}, err
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return address{}, fmt.Errorf("address %s: write the port as a number", hostport)
	}
	return address{host, int(port)}, nil
}

// ListenAddress returns the address at which the gateway listens.
func (s *site) ListenAddress() (address, error) { return parseAddress(s.Listen) }

// TokenAddress returns the address of the token endpoint.
func (s *site) TokenAddress() (address, error) {
	endpoint, err := url.Parse(s.TokenURL)
	if err != nil {
		return address{}, err
	}
	return parseAddress(endpoint.Host)
}

// Address returns the address of the client's upstream.
func (c oauthClient) Address() (address, error) { return parseAddress(c.Upstream) }
