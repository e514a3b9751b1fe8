package vmm

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
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
		p, err := Launch(program)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Kill(context.Background()) })
		return p
	}
	if os.Geteuid() == 0 { // a cgroup whose process is gone, too
		group, err := openCgroup(parent + "/sb-0")
		if err == nil {
			err = group.create(Limits{})
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
