package main

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

func TestLabels(t *testing.T) {
	for _, c := range []struct {
		flags []string
		want  map[string]string
	}{
		{nil, nil},
		{[]string{"a=1", "b", "c=", "d=x=y"}, map[string]string{"a": "1", "b": "", "c": "", "d": "x=y"}},
		{[]string{"a=1", "a=2"}, map[string]string{"a": "2"}},
	} {
		if got, err := labelsOf(c.flags); err != nil || !maps.Equal(got, c.want) {
			t.Errorf("%q: %v, %v", c.flags, got, err)
		}
	}
}

func TestFilters(t *testing.T) {
	f, err := parseFilters([]string{"label=a=1", "label=b=", "label=c=x=y", "label=a=1", "label=k", "name=we", "name=db", "state=paused"})
	if want := map[string]string{"a": "1", "b": "", "c": "x=y"}; err != nil || !maps.Equal(f.labels, want) {
		t.Errorf("filters: %v, %v", f, err)
	}
	k := map[string]string{"k": ""}
	for _, c := range []struct {
		s    *hostagentv1.SandboxInfo
		want bool
	}{
		{&hostagentv1.SandboxInfo{Name: "web", Status: "paused", Metadata: k}, true},
		{&hostagentv1.SandboxInfo{Name: "old-db", Status: "paused", Metadata: k}, true},
		{&hostagentv1.SandboxInfo{Name: "web", Status: "running", Metadata: k}, false},
		{&hostagentv1.SandboxInfo{Name: "web", Status: "paused"}, false},
		{&hostagentv1.SandboxInfo{Status: "paused", Metadata: k}, false},
	} {
		if got := f.match(c.s); got != c.want {
			t.Errorf("%v: %v", c.s, got)
		}
	}
	if !(filters{}).match(&hostagentv1.SandboxInfo{}) {
		t.Error("no filter lets nothing through")
	}
}

func TestEnvFile(t *testing.T) {
	t.Setenv("WRENN_TEST_PASSED", "on")
	os.Unsetenv("WRENN_TEST_MISSING")
	file := func(text string) string {
		path := filepath.Join(t.TempDir(), "vars")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	v := vars{pairs: []string{"B=2"}, files: []string{
		file("\ufeffA=1\r\n\n  # B=0\n"),
		file("C=\"two words\" # kept\nWRENN_TEST_PASSED\nWRENN_TEST_MISSING\nA=3\nB=0"),
	}}
	got, err := v.read()
	want := map[string]string{"A": "3", "B": "2", "C": `"two words" # kept`, "WRENN_TEST_PASSED": "on"}
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
	for _, text := range []string{"=x", "export A=1", "A B"} {
		if got, err := (&vars{files: []string{file("\n" + text)}}).read(); err == nil || !strings.Contains(err.Error(), "line 2") {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}

func TestEndAt(t *testing.T) {
	now := time.Now()
	for text, want := range map[string]time.Time{
		"": {}, "never": {}, "0s": now, "2h": now.Add(2 * time.Hour),
		"2030-01-31T12:00:00+01:00": time.Date(2030, 1, 31, 11, 0, 0, 0, time.UTC),
	} {
		got, err := endAt(text)
		if err != nil || got.IsZero() != want.IsZero() || got.Sub(want).Abs() > time.Minute {
			t.Errorf("%q: %s, %v", text, got, err)
		}
	}
}
