package main

import "testing"

func TestUnits(t *testing.T) {
	for _, test := range []struct{ got, want string }{
		{count(0), "0"},
		{count(999), "999"},
		{count(1500), "1,500"},
		{count(1234567), "1,234,567"},
		{perSecond(31456), "31,500 req/s"},
		{perSecond(10.94), "10.9 req/s"},
		{megabytes(61_400_000), "61.4 MB"},
		{megabytes(1_234_000_000), "1,230 MB"},
		{microseconds(41.04e-6), "41.0 µs"},
		{microseconds(9.999e-6), "10.0 µs"},
		{microseconds(0.1074), "107,000 µs"},
		{duration(0), "0 s"},
		{duration(0.000853), "0.853 ms"},
		{duration(0.9994), "999 ms"},
		{duration(0.9996), "1.00 s"},
		{duration(29.04), "29.0 s"},
	} {
		if test.got != test.want {
			t.Errorf("got %q, want %q", test.got, test.want)
		}
	}
}

func TestTimes(t *testing.T) {
	for _, test := range []struct {
		ratios []float64
		want   string
	}{
		{[]float64{1.0081}, "1.008"},
		{[]float64{1.0081, 0.99, 1.0312}, "≈ 1.008 (0.990–1.031)"},
		{[]float64{1.008, 1.001, 1.031}, "1.008 (1.001–1.031)"},
		{[]float64{0.98, 0.97, 0.999}, "0.980 (0.970–0.999)"},
		{[]float64{1.008, 1.0004, 1.031}, "≈ 1.008 (1.000–1.031)"}, // it reads as 1
		{[]float64{0.98, 0.97, 0.9996}, "≈ 0.980 (0.970–1.000)"},
		{[]float64{12.34, 12, 13}, "12.3 (12.0–13.0)"},
		{[]float64{0.31, 0.3, 0.32}, "0.310 (0.300–0.320)"},
	} {
		if got := times(sumUp(test.ratios)); got != test.want {
			t.Errorf("%v: got %q, want %q", test.ratios, got, test.want)
		}
	}
}
