package gvisor

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// sentry returns the path of the program, or skips the test.
func sentry(t testing.TB) string {
	t.Helper()
	path := filepath.Join(os.Getenv("WRENN_BIN"), "sentry")
	if !filepath.IsAbs(path) {
		path = "../../../bin/sentry"
	}
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	testenv.Program(t, path)
	return path
}

// subject is a driver with a guest of one tiny program.
func subject(t testing.TB) vmmtest.Subject {
	t.Helper()
	testenv.Root(t)
	cfg := Config{Sentry: sentry(t), UID: 871234, GID: 871235}
	testenv.NoLeaks(t, "vmmtest-")
	top, err := os.MkdirTemp("/run", "vmmtest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	guest := func(name string, program []byte) string {
		path := filepath.Join(top, name)
		if err := os.WriteFile(path, image(program), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	id := filepath.Base(top)
	spec := vmm.Spec{
		ID: id, VCPUs: 1, MemMiB: 64, Init: guest("stays", stays("hello\n")), UID: cfg.UID, GID: cfg.GID,
		Console: filepath.Join(t.TempDir(), "console.log"),
	}
	n := 0
	place := func(spec vmm.Spec) vmm.Spec {
		spec.RunDir = filepath.Join(top, strconv.Itoa(n))
		if err := os.Mkdir(spec.RunDir, 0o700); err != nil {
			t.Fatal(err)
		}
		return spec
	}
	spec = place(spec)
	return vmmtest.Subject{
		Driver: New(cfg),
		Again:  func() vmm.Driver { return New(cfg) },
		Spec:   spec,
		Clone: func() vmm.Spec {
			n++
			clone := spec
			clone.ID = fmt.Sprintf("%s-%d", id, n)
			clone.Console = filepath.Join(t.TempDir(), "console.log")
			return place(clone)
		},
		Exiting: func(s *vmm.Spec) { s.Init = guest("ends", says("bye\n")) },
		Live:    func() int { return len(processes(t, id)) },
	}
}

// processes returns the /proc directories of the sentries of a VM, without the processes
// in which they run the guests' programs: those are children of sentries.
func processes(t testing.TB, id string) []string {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, f := range all {
		cmdline, err := os.ReadFile(f)
		if err != nil || !bytes.Contains(cmdline, []byte("\x00boot\x00")) || !bytes.Contains(cmdline, []byte(id)) {
			continue
		}
		status, err := os.ReadFile(filepath.Dir(f) + "/status")
		if err == nil && !strings.Contains(string(status), "\nState:\tZ") && innermostPID(string(status)) == "1" {
			found = append(found, filepath.Dir(f))
		}
	}
	return found
}

// innermostPID is a process's number in its own namespace.
func innermostPID(status string) string {
	_, after, _ := strings.Cut(status, "\nNSpid:")
	line, _, _ := strings.Cut(after, "\n")
	fields := strings.Fields(line)
	if len(fields) == 0 {
		return ""
	}
	return fields[len(fields)-1]
}

func TestContract(t *testing.T) {
	vmmtest.Run(t, func(t *testing.T) vmmtest.Subject { return subject(t) })
}

// stays is an x86-64 program that prints a text and sleeps until it is ended.
func stays(text string) []byte {
	return loop(call64(34, 0, 0, 0), text) // pause()
}

// floods is a program that prints a text without end.
func floods(text string) []byte {
	again := call64(1, 1, 0, uint32(len(text)))
	binary.LittleEndian.PutUint32(again[11:], textAt(2*callBytes+2))
	return loop(again, text)
}

// loop is a program that prints a text and makes a system call again and again.
func loop(again []byte, text string) []byte {
	code := append(call64(1, 1, 0, uint32(len(text))), again...)
	code = append(code, 0xeb, 0xfe-callBytes) // jump back to the call
	binary.LittleEndian.PutUint32(code[11:], textAt(len(code)))
	return elf(append(code, text...))
}
