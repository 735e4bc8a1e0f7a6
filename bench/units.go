// How a table writes a number.

package main

import (
	"math"
	"strconv"
	"strings"
)

// significant writes a number with three digits that count. The machine's noise is
// larger than what the fourth would say.
func significant(x float64) string {
	rounded, _ := strconv.ParseFloat(strconv.FormatFloat(x, 'e', 2, 64), 64)
	decimals := 0
	if size := math.Abs(rounded); size != 0 && size < 100 {
		decimals = 2 - int(math.Floor(math.Log10(size)))
	}
	return thousands(strconv.FormatFloat(rounded, 'f', decimals, 64))
}

// thousands separates the thousands: 1,500.
func thousands(number string) string {
	whole, fraction, dot := strings.Cut(number, ".")
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if dot {
		return whole + "." + fraction
	}
	return whole
}

func count(n float64) string { return thousands(strconv.FormatFloat(n, 'f', 0, 64)) }

func perSecond(rate float64) string { return significant(rate) + " req/s" }

func megabytes(bytes float64) string { return significant(bytes/1e6) + " MB" }

func microseconds(seconds float64) string { return significant(seconds*1e6) + " µs" }

func duration(seconds float64) string {
	if seconds == never {
		return "never"
	}
	if seconds > 0 && seconds < 0.9995 { // which is not 1,000 ms
		return significant(seconds*1e3) + " ms"
	}
	return significant(seconds) + " s"
}

// times writes a ratio. One that is below 1 in some rounds, and above it in others,
// says nothing: the sign shows that.
func times(f figure) string {
	digits := func(x float64) string {
		if x > 0.5 && x < 2 {
			return strconv.FormatFloat(x, 'f', 3, 64)
		}
		return significant(x)
	}
	text := digits(f.median)
	if f.rounds == 1 {
		return text
	}
	text += " (" + digits(f.least) + "–" + digits(f.most) + ")"
	// What reads as 1 is as near as that.
	if digits(f.least) == "1.000" || digits(f.most) == "1.000" || f.least < 1 && f.most > 1 {
		return "≈ " + text
	}
	return text
}
