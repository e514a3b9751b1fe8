package vmm

import (
	"path/filepath"
	"slices"
	"testing"
)

func TestKillStrays(t *testing.T) {
	root := filepath.Join(t.TempDir(), "run")
	start := func(dir string) *Process {
		t.Helper()
		p, err := Launch(Program{Args: []string{"/bin/sleep", "60"}, RunDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Kill(t.Context()) })
		return p
	}
	stray, kept := start(filepath.Join(root, "sb-1")), start(filepath.Join(root, "sb-2"))
	others := []*Process{start(filepath.Join(root+"-other", "sb-1")), start(filepath.Join(root, "deeper", "sb-1")), start("")}

	names, err := KillStrays(t.Context(), root, func(name string) bool { return name == "sb-2" })
	if err != nil || !slices.Equal(names, []string{"sb-1"}) {
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
	if names, err := KillStrays(t.Context(), root, func(name string) bool { return name == "sb-2" }); err != nil || len(names) != 0 {
		t.Errorf("second time: %v, %v", names, err)
	}
}
