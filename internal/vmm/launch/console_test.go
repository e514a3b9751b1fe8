package launch

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

func TestTrim(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console.log")
	if _, err := trim(path, 100); err != nil {
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
	if _, err := trim(path, 70); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); len(got) != 70 {
		t.Errorf("a file at its limit was cut to %q", got)
	}
	if _, err := trim(path, 69); err != nil {
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
	if _, err := trim(path, 50_000); err != nil {
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
		if got, err := vmm.Tail(path, n); err != nil || string(got) != want {
			t.Errorf("Tail %d = %q, %v", n, got, err)
		}
	}
}

// A program that an earlier version started appends to its console itself.
func TestConsoleOfAnEarlierVersion(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console")
	ref := launch(t, sh("exec yes console >>"+path)).Ref()
	ref.Console = path
	adopted, err := Adopt(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	defer adopted.Kill(t.Context())
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if text, err := os.ReadFile(path); err == nil && bytes.Contains(text, []byte(trimmedMarker)) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("it was never cut")
		}
	}
}

// What a program prints without end fills no disk, while an agent runs and while
// none does. It is not held up then, and heard again by the next agent.
func TestOutputIsBounded(t *testing.T) {
	dir := t.TempDir()
	p := sh(`trap '' PIPE; line=$(printf '%01000d' 7); i=0
		while :; do echo $line; echo $line >&2; i=$((i+1)); echo $i >` + dir + `/progress; done`)
	p.Log, p.Console = filepath.Join(dir, "log"), filepath.Join(dir, "console")
	process := launch(t, p)
	size := func() (n int64) {
		for _, path := range []string{p.Log, p.Console} {
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if n = max(n, info.Size()); info.Size() > vmm.MaxConsoleBytes+outletBytes {
				t.Fatalf("%s has %d bytes", filepath.Base(path), info.Size())
			}
		}
		return n
	}
	progress := func() string {
		data, _ := os.ReadFile(filepath.Join(dir, "progress"))
		return string(data)
	}
	until := func(what string, done func() bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); !done(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal(what)
			}
		}
	}
	until("it was never cut", func() bool {
		size()
		data, _ := os.ReadFile(p.Console)
		return bytes.HasPrefix(data, []byte(trimmedMarker))
	})

	for _, o := range process.outlets { // as when the agent dies
		o.close()
	}
	before, at := size(), progress()
	for range 3 {
		until("it waits for a reader", func() bool { return progress() != at })
		at = progress()
	}
	if after := size(); after != before {
		t.Errorf("without an agent it went from %d to %d bytes", before, after)
	}
	adopted, err := Adopt(t.Context(), process.Ref())
	if err != nil {
		t.Fatal(err)
	}
	until("the next agent hears nothing", func() bool { return size() != before })
	if err := adopted.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	wait(t, process)
	if left, err := filepath.Glob(dir + "/*" + pipeSuffix); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// talker is a program that prints numbered lines of 500 bytes to its console.
type talker struct {
	t       *testing.T
	path    string   // of the console
	say     *os.File // where it is told how many to print
	printed int
}

const talkerScript = `pad=$(printf '%0500d' 0); i=0
	while read -r n; do n=$((i+n)); while [ $i -lt $n ]; do echo "line $i $pad"; i=$((i+1)); done; done <`

func (*talker) line(number int) string { return fmt.Sprintf("line %d %0500d", number, 0) }

// stamped says whether the time is noted at which the console was last written.
func (k *talker) stamped() bool {
	info, err := os.Stat(k.path)
	times, err2 := os.ReadFile(k.path + vmm.TimesSuffix)
	if err := errors.Join(err, err2); err != nil {
		k.t.Fatal(err)
	}
	stamps := vmm.ParseStamps(times)
	return len(stamps) > 0 && stamps[len(stamps)-1].Size == info.Size()
}

func (k *talker) lines() []vmm.Line {
	lines, err := vmm.Lines(k.path)
	if err != nil {
		k.t.Fatal(err)
	}
	return lines
}

// print has the program print so many lines, and returns when the last is there.
func (k *talker) print(n int) (from, to time.Time) {
	k.t.Helper()
	from = time.Now().Truncate(time.Millisecond)
	fmt.Fprintln(k.say, n)
	k.printed += n
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		lines := k.lines()
		if n := len(lines); n > 0 && string(lines[n-1].Text) == k.line(k.printed-1) && k.stamped() {
			return from, time.Now()
		}
		if time.Now().After(deadline) {
			k.t.Fatalf("line %d was not printed", k.printed-1)
		}
	}
}

// printUntilCut prints until the console is cut, and returns the times of the last
// lines. It prints no more at once than the pipe holds: what comes faster than it is
// read is lost.
func (k *talker) printUntilCut() (from, to time.Time) {
	k.t.Helper()
	for {
		from, to = k.print(32) // a quarter of what a pipe holds
		text, err := os.ReadFile(k.path)
		if err != nil || k.printed*len(k.line(0)) > 2*vmm.MaxConsoleBytes {
			k.t.Fatalf("it is not cut: %v", err)
		}
		if bytes.HasPrefix(text, []byte(trimmedMarker)) {
			return from, to
		}
	}
}

// want checks the time of a line.
func (k *talker) want(number int, from, to time.Time) {
	k.t.Helper()
	for _, l := range k.lines() {
		if string(l.Text) == k.line(number) {
			if l.At.Before(from) || l.At.After(to) {
				k.t.Errorf("line %d is of %s, printed from %s to %s", number, l.At, from, to)
			}
			return
		}
	}
	k.t.Errorf("line %d is not there", number)
}

// Each line has the time at which it was read, also after the console was cut and after
// another agent carries on.
func TestLinesHaveTimes(t *testing.T) {
	dir := t.TempDir()
	k := &talker{t: t, path: filepath.Join(dir, "console")}
	say := filepath.Join(dir, "say")
	p := sh(talkerScript + say)
	p.Console, p.Log = k.path, filepath.Join(dir, "log")
	err := unix.Mkfifo(say, 0o600)
	if err == nil {
		k.say, err = os.OpenFile(say, os.O_RDWR, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer k.say.Close()
	process := launch(t, p)

	from, to := k.print(10)
	k.want(0, from, to)
	from2, to2 := k.print(1)
	k.want(9, from, to)
	k.want(10, from2, to2)
	from, to = k.printUntilCut()
	last := k.printed - 1
	from2, to2 = k.print(1)
	k.want(last, from, to)
	k.want(last+1, from2, to2)

	for _, o := range process.outlets { // as when the agent dies
		o.close()
	}
	adopted, err := Adopt(t.Context(), process.Ref())
	if err != nil {
		t.Fatal(err)
	}
	defer adopted.Kill(t.Context())
	from3, to3 := k.print(1)
	k.want(last, from, to)
	k.want(last+1, from2, to2)
	k.want(last+2, from3, to3)
}

// Stamps that are damaged or missing cost lines their own time and nothing else.
func TestLinesWithoutTimes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console")
	if lines, err := vmm.Lines(path); err != nil || len(lines) != 0 {
		t.Errorf("no console: %v, %v", lines, err)
	}
	written := time.Now().Add(-time.Hour).Truncate(time.Second)
	at := func(n int) time.Time { return time.Unix(int64(n), 0).UTC() }
	for name, c := range map[string]struct {
		stamps []vmm.Stamp
		want   []time.Time
	}{
		"none":             {nil, []time.Time{written, written, written}},
		"all":              {[]vmm.Stamp{{Size: 2, At: at(1)}, {Size: 4, At: at(2)}, {Size: 5, At: at(3)}}, []time.Time{at(1), at(2), at(3)}},
		"one missing":      {[]vmm.Stamp{{Size: 2, At: at(1)}, {Size: 5, At: at(3)}}, []time.Time{at(1), at(3), at(3)}},
		"the last missing": {[]vmm.Stamp{{Size: 2, At: at(1)}}, []time.Time{at(1), written, written}},
		"of before a cut":  {[]vmm.Stamp{{Size: 900, At: at(1)}, {Size: 4, At: at(2)}, {Size: 5, At: at(3)}}, []time.Time{at(2), at(2), at(3)}},
	} {
		var times []byte
		for _, s := range c.stamps {
			times = s.Append(times)
		}
		err := errors.Join(os.WriteFile(path, []byte("a\nb\nc"), 0o600), os.WriteFile(path+vmm.TimesSuffix, append(times, "torn"...), 0o600),
			os.Chtimes(path, written, written))
		if err != nil {
			t.Fatal(err)
		}
		lines, err := vmm.Lines(path)
		if err != nil || len(lines) != 3 {
			t.Fatalf("%s: %v, %v", name, lines, err)
		}
		for i, l := range lines {
			if !l.At.Equal(c.want[i]) || string(l.Text) != string("abc"[i]) {
				t.Errorf("%s: line %d is %q of %s, want %s", name, i, l.Text, l.At, c.want[i])
			}
		}
	}
}

// The last words are in the file when the end is told.
func TestLastWords(t *testing.T) {
	for range 20 {
		p := sh("i=0; while [ $i -lt 500 ]; do echo line $i; i=$((i+1)); done; echo end >&2")
		p.Log, p.Console = filepath.Join(t.TempDir(), "log"), filepath.Join(t.TempDir(), "console")
		if exit := wait(t, launch(t, p)); exit.Detail != "end" {
			t.Errorf("detail %q", exit.Detail)
		}
		if text, err := os.ReadFile(p.Console); err != nil || !strings.HasPrefix(string(text), "line 0\n") || !strings.HasSuffix(string(text), "line 499\n") {
			t.Errorf("console %q, %v", text, err)
		}
	}
}
