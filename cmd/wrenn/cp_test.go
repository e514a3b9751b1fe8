package main

import "testing"

func TestParsePlace(t *testing.T) {
	for in, want := range map[string]place{
		"3fa:/root/x": {"3fa", "/root/x"},
		"sb-3fa:x":    {"sb-3fa", "x"},
		"3fa:":        {"3fa", ""},
		"3fa:a:b":     {"3fa", "a:b"},
		"file":        {"", "file"},
		"./a:b":       {"", "./a:b"},
		"/a:b":        {"", "/a:b"},
		"a.b:c":       {"", "a.b:c"},
		":x":          {"", ":x"},
		"-":           {"", "-"},
	} {
		if got := parsePlace(in); got != want {
			t.Errorf("%q: %+v, want %+v", in, got, want)
		}
	}
}
