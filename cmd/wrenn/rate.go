package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// parseRate reads bytes per second: "1500000", "10M", "10MB/s", "64KiB". K, M
// and G are powers of 1000, with an i of 1024. Empty and "0" are none.
func parseRate(text string) (int64, error) {
	s := strings.TrimSuffix(strings.TrimSpace(text), "/s")
	s = strings.TrimSuffix(s, "B")
	unit := float64(1)
	base := float64(1000)
	if t, ok := strings.CutSuffix(s, "i"); ok {
		s, base = t, 1024
	}
	for i, suffix := range []string{"K", "M", "G"} {
		if n := len(s) - 1; n >= 0 && strings.EqualFold(s[n:], suffix) {
			s, unit = s[:n], math.Pow(base, float64(i+1))
			break
		}
	}
	if s == "" && unit == 1 && base == 1000 {
		return 0, nil
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || n < 0 || base == 1024 && unit == 1 || !(n*unit < math.MaxInt64) {
		return 0, fmt.Errorf("%q is no rate: want bytes per second, like 1500000, 10M or 64KiB", text)
	}
	return int64(n * unit), nil
}
