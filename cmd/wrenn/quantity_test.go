package main

import "testing"

func TestParseRate(t *testing.T) {
	for text, want := range map[string]int64{
		"": 0, "0": 0, "1500000": 1500000, "10M": 10_000_000, "10MB/s": 10_000_000, "10mb": -1, "10m": 10_000_000,
		"64KiB": 64 << 10, "64Ki": 64 << 10, "1.5G": 1_500_000_000, "2GiB/s": 2 << 30, " 8k ": 8000,
		"fast": -1, "-1": -1, "10i": -1, "M": -1, "10 M": -1, "1e30": -1, "NaN": -1, "Inf": -1, "10Mbit": -1, "0x10": -1,
	} {
		got, err := parseRate(text)
		if want < 0 && err == nil || want >= 0 && (err != nil || got != want) {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
}
