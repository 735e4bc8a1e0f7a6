package main

import "testing"

func TestAddresses(t *testing.T) {
	s := &site{
		Listen: "127.0.0.1:8080", TokenURL: "http://localhost:9000/token",
		Clients: []oauthClient{{Upstream: "[::1]:7000"}},
	}
	for name, test := range map[string]struct {
		get  func() (address, error)
		want address
	}{
		"listen":   {s.ListenAddress, address{"127.0.0.1", 8080}},
		"token":    {s.TokenAddress, address{"localhost", 9000}},
		"upstream": {s.Client().Address, address{"::1", 7000}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := test.get()
			if err != nil || got != test.want {
				t.Errorf("got %v, %v; want %v", got, err, test.want)
			}
		})
	}
	for _, bad := range []string{"localhost", "localhost:http", "localhost:70000"} {
		if got, err := parseAddress(bad); err == nil {
			t.Errorf("%s is taken for %v", bad, got)
		}
	}
}
