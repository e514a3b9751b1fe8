package main

import (
	"bytes"
	"regexp"
	"slices"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
)

// A detached command is left running; its output and its end can be had later.
func TestDetachedCommand(t *testing.T) {
	a := &clienttest.Agent{Archive: []byte("\x1b[31mout\n"), Exit: 3, Endless: 1}
	url := a.Serve(t)
	if stdout, stderr, status := wrenn(t, url, "exec", "-d", clienttest.ID, "x"); stdout != "7\n" || status != 0 {
		t.Errorf("exec -d: %q, %q, status %d", stdout, stderr, status)
	}
	if got := a.Signaled(); len(got) > 0 {
		t.Errorf("exec -d sent it %v", got)
	}
	if stdout, stderr, status := wrenn(t, url, "logs", clienttest.ID, "7"); stdout != "\\u001b[31mout\n" || status != 0 {
		t.Errorf("logs of one that runs: %q, %q, status %d", stdout, stderr, status)
	}
	if stdout, stderr, status := wrenn(t, url, "kill", clienttest.ID, "7"); stdout != "7\n" || status != 0 {
		t.Errorf("kill: %q, %q, status %d", stdout, stderr, status)
	}
	if got := a.Signaled(); len(got) != 1 || got[0] != process.Signal_SIGNAL_SIGTERM {
		t.Errorf("kill sent %v", got)
	}
	// It has had its signal, so that it ends now.
	if stdout, stderr, status := wrenn(t, url, "attach", clienttest.ID, "7"); stdout != "\x1b[31mout\n" || status != 3 {
		t.Errorf("attach: %q, %q, status %d", stdout, stderr, status)
	}
	for args, want := range map[string]int{"attach": 125, "logs": 1} {
		stdout, stderr, status := wrenn(t, url, args, clienttest.ID, "8")
		if stdout != "" || status != want || !strings.Contains(stderr, "process 8 was not started with wrenn") {
			t.Errorf("%s of another: %q, %q, status %d", args, stdout, stderr, status)
		}
	}
}

func TestProcesses(t *testing.T) {
	url := (&clienttest.Agent{Text: "a\x1b\tb"}).Serve(t)
	stdout, stderr, status := wrenn(t, url, "ps", clienttest.ID)
	for _, want := range []string{`yes +sh a\\u001b\\u0009b`, `8 +7 +root .* 1\.5s +1\.0 MiB +no +sleep 9`, `9 +- +- .* exit status 3 +true`} {
		if !regexp.MustCompile(want).MatchString(stdout) {
			t.Errorf("no %s in\n%s", want, stdout)
		}
	}
	if status != 0 || stderr != "" {
		t.Errorf("status %d, %q", status, stderr)
	}
	if stdout, _, _ := wrenn(t, url, "ps", "-q", clienttest.ID); stdout != "7\n8\n" {
		t.Errorf("-q: %q", stdout)
	}
	if stdout, _, _ := wrenn(t, url, "ps", "--json", clienttest.ID); !strings.Contains(stdout, `"ended": "exit status 3"`) {
		t.Errorf("--json: %s", stdout)
	}
}

// No rune is passed on in parts, and nothing is lost.
func TestRunes(t *testing.T) {
	text := "aé☃😀\xff\xe2\x98z\xf0\x9f"
	for size := 1; size < 5; size++ {
		var out bytes.Buffer
		r := &runes{w: printer{&out}}
		for rest := []byte(text); len(rest) > 0; {
			n := min(size, len(rest))
			if _, err := r.Write(rest[:n]); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		r.flush()
		if got := out.String(); got != printable(text) {
			t.Errorf("by %d: %q, want %q", size, got, printable(text))
		}
	}
}

// stop tells the programs of a sandbox that runs, waits for them, and keeps its files. One
// that stands still cannot be told.
func TestStop(t *testing.T) {
	for status, want := range map[string][]string{"running": {"sh"}, "paused": nil} {
		a := &clienttest.Agent{Status: status}
		stdout, stderr, exit := wrenn(t, a.Serve(t), "stop", "-t", "150ms", clienttest.ID)
		if stdout != clienttest.ID+"\n" || exit != 0 || !slices.Contains(a.Calls(), "PauseSandbox") || !slices.Equal(a.Started(), want) {
			t.Errorf("%s: %q, %q, status %d; calls %q, commands %q", status, stdout, stderr, exit, a.Calls(), a.Started())
		}
	}
}

// What runs needs no start.
func TestStartOfARunningOne(t *testing.T) {
	a := &clienttest.Agent{}
	stdout, stderr, exit := wrenn(t, a.Serve(t), "start", clienttest.ID)
	if stdout != clienttest.ID+"\n" || exit != 0 || slices.Contains(a.Calls(), "ResumeSandbox") {
		t.Errorf("%q, %q, status %d; calls %q", stdout, stderr, exit, a.Calls())
	}
}
