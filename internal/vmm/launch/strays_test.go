package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

func TestKillStrays(t *testing.T) {
	root := filepath.Join(t.TempDir(), "run")
	parent := fmt.Sprintf("wrenn-strays-%d", os.Getpid())
	start := func(dir string) *Process {
		t.Helper()
		program := Program{Args: []string{"/bin/sleep", "60"}, RunDir: dir}
		if os.Geteuid() == 0 && filepath.Dir(dir) == root {
			program.Cgroup = parent + "/" + filepath.Base(dir)
		}
		p, err := Start(program)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Kill(context.Background()) })
		return p
	}
	if os.Geteuid() == 0 { // a cgroup whose process is gone, too
		group, err := openCgroup(parent + "/sb-0")
		if err == nil {
			err = group.create(vmm.Limits{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	stray, kept := start(filepath.Join(root, "sb-1")), start(filepath.Join(root, "sb-2"))
	others := []*Process{start(filepath.Join(root+"-other", "sb-1")), start(filepath.Join(root, "deeper", "sb-1")), start("")}

	names, err := KillStrays(t.Context(), root, parent, func(name string) bool { return name == "sb-2" })
	want := []string{"sb-1"}
	if os.Geteuid() == 0 {
		want = []string{"sb-0", "sb-1"}
	}
	if err != nil || !slices.Equal(names, want) {
		t.Errorf("killed %v, %v", names, err)
	}
	<-stray.Done()
	for _, p := range append(others, kept) {
		select {
		case <-p.Done():
			t.Errorf("a process that was to be kept %s", p.Exit())
		default:
		}
	}
	if names, err := KillStrays(t.Context(), root, parent, func(name string) bool { return name == "sb-2" }); err != nil || len(names) != 0 {
		t.Errorf("second time: %v, %v", names, err)
	}
}

func TestNetNSOf(t *testing.T) {
	root := filepath.Join(t.TempDir(), "run")
	p, err := Start(Program{Args: []string{"/bin/sleep", "60"}, RunDir: filepath.Join(root, "sb-1")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Kill(context.Background()) })
	file := filepath.Join(t.TempDir(), "no-namespace")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const ours = "/proc/self/ns/net"
	for _, c := range []struct {
		name  string
		paths []string
		want  string
	}{
		{"sb-1", []string{file, file + "-gone", ours}, ours},
		{"sb-1", []string{file}, ""},
		{"sb-2", []string{ours}, ""},
	} {
		if got, err := NetNSOf(root, c.name, c.paths); got != c.want || err != nil {
			t.Errorf("%s is in %q of %q, %v; want %q", c.name, got, c.paths, err, c.want)
		}
	}
}

// An agent that has no more descriptors knows nothing of a process; that is no
// proof that it has ended.
func TestWithoutDescriptorsNothingIsProven(t *testing.T) {
	root := filepath.Join(t.TempDir(), "run")
	p, err := Start(Program{Args: []string{"/bin/sleep", "60"}, RunDir: filepath.Join(root, "sb-1")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Kill(context.Background()) })
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 64, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	var held []int
	release := func() {
		for _, fd := range held {
			unix.Close(fd)
		}
		held = nil
		unix.Setrlimit(unix.RLIMIT_NOFILE, &was)
	}
	defer release()
	fill := func() {
		for fd, err := unix.Dup(0); err == nil; fd, err = unix.Dup(0) {
			held = append(held, fd)
		}
	}
	fill()
	for spare := range 2 { // none is left; one is, for the pidfd
		if spare > 0 {
			unix.Close(held[len(held)-1])
			held = held[:len(held)-1]
		}
		if _, err := Adopt(t.Context(), p.Ref()); err == nil || errors.Is(err, errdefs.NotFound) {
			t.Errorf("with %d descriptors: %v", spare, err)
		}
	}
	fill()
	_, kill := KillStrays(t.Context(), root, fmt.Sprintf("wrenn-strays-%d", os.Getpid()), func(string) bool { return false })
	_, find := NetNSOf(root, "sb-1", nil)
	release()
	if kill == nil || find == nil {
		t.Errorf("with no descriptors strays are killed with %v and found with %v", kill, find)
	}
}
