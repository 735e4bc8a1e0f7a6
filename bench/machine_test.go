package main

import "testing"

func TestMachineInWords(t *testing.T) {
	for amount, want := range map[string]string{"24684096 kB": "25 GB", "8000000 kB": "8 GB", "": ""} {
		if got := gigabytes(amount); got != want {
			t.Errorf("gigabytes(%q) = %q, want %q", amount, got, want)
		}
	}
	for release, want := range map[string]string{"6.1.0-26-amd64": "6.1.0", "6.18.44": "6.18.44"} {
		if got := kernelVersion(release); got != want {
			t.Errorf("kernelVersion(%q) = %q, want %q", release, got, want)
		}
	}
}
