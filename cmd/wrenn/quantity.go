package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// quantity reads a number that may have a unit: K, M or G, and an i behind it for
// binary. power is 1 for K and so on, 0 for none.
func quantity(text string) (n float64, power int, binary, ok bool) {
	text, binary = strings.CutSuffix(text, "i")
	if last := len(text) - 1; last >= 0 {
		if power = 1 + strings.IndexByte("kmg", text[last]|0x20); power > 0 {
			text = text[:last]
		}
	}
	n, err := strconv.ParseFloat(text, 64)
	return n, power, binary, err == nil && n >= 0 && (power > 0 || !binary)
}

// sizeOf reads a size that a flag has, in MiB; 0 if it has none.
func sizeOf(flag, text string) (int32, error) {
	if text == "" {
		return 0, nil
	}
	n, err := parseMiB(text)
	if err != nil {
		return 0, fmt.Errorf("%s %q is not a size: give MiB, or a number with m or g", flag, text)
	}
	return n, nil
}

// parseMiB reads a size of memory as docker writes it: MiB, or a number with k, m
// or g, which are powers of 1024, in either case and with "B" or "iB" behind it.
func parseMiB(text string) (int32, error) {
	s := strings.TrimSuffix(strings.ToLower(strings.TrimSpace(text)), "b")
	n, power, _, ok := quantity(s)
	if power > 0 {
		n *= math.Pow(1024, float64(power-2))
	}
	if !ok || n < 1 || n > 1<<30 {
		return 0, fmt.Errorf("memory %q is not a size: give MiB, or a number with m or g", text)
	}
	return int32(n), nil
}

// parseRate reads bytes per second: "1500000", "10M", "10MB/s", "64KiB". K, M
// and G are powers of 1000, with an i of 1024. Empty and "0" are none.
func parseRate(text string) (int64, error) {
	s := strings.TrimSuffix(strings.TrimSuffix(strings.TrimSpace(text), "/s"), "B")
	if s == "" {
		return 0, nil
	}
	n, power, binary, ok := quantity(s)
	base := 1000.0
	if binary {
		base = 1024
	}
	if n *= math.Pow(base, float64(power)); !ok || n >= math.MaxInt64 {
		return 0, fmt.Errorf("%q is no rate: want bytes per second, like 1500000, 10M or 64KiB", text)
	}
	return int64(n), nil
}
