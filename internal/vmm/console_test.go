package vmm

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTrim(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console.log")
	if err := trim(path, 100); err != nil {
		t.Errorf("no file: %v", err)
	}
	writer, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	for i := range 10 {
		fmt.Fprintf(writer, "line %d\n", i)
	}
	if err := trim(path, 70); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); len(got) != 70 {
		t.Errorf("a file at its limit was cut to %q", got)
	}
	if err := trim(path, 69); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(writer, "line 10")
	want := trimmedMarker + "line 6\nline 7\nline 8\nline 9\nline 10\n"
	if got, _ := os.ReadFile(path); string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if err := os.WriteFile(path, bytes.Repeat([]byte("x"), 100_000), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := trim(path, 50_000); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); len(got) != 25_000+len(trimmedMarker) {
		t.Errorf("one long line was cut to %d bytes", len(got))
	}
}

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("0123456789"), 0o600); err != nil {
		t.Fatal(err)
	}
	for n, want := range map[int64]string{0: "", 3: "789", 10: "0123456789", 99: "0123456789"} {
		if got, err := Tail(path, n); err != nil || string(got) != want {
			t.Errorf("Tail %d = %q, %v", n, got, err)
		}
	}
}

// A program that prints without end keeps running, and its files keep small.
func TestOutputIsBounded(t *testing.T) {
	dir := t.TempDir()
	p := sh("yes console >>" + dir + "/console & yes log; kill $!")
	p.Log, p.Console = dir+"/log", dir+"/console"
	// timeout ends both: a session's leader alone would leave the other.
	p.Args = append([]string{"/usr/bin/timeout", "2.5"}, p.Args...)
	process := launch(t, p)
	exit := wait(t, process)
	if strings.Contains(exit.Detail, "error") || !strings.HasSuffix(exit.Detail, "log") || len(exit.Detail) > detailBytes {
		t.Errorf("detail %q", exit.Detail)
	}
	for _, name := range []string{"log", "console"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Size() > MaxConsoleBytes {
			t.Errorf("%s: %d bytes, %v", name, info.Size(), err)
		}
	}
}
