package firecracker

import (
	"os"
	"path/filepath"
	"testing"
)

// A snapshot with a link in the place of its memory, as a VMM that was taken
// over might make one, shows nothing of the host to a clone.
func TestSnapshotWithALink(t *testing.T) {
	s := subject(t, install(t, fakeSettings{}, true))
	v := boot(t, s)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := v.Snapshot(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{memoryName, stateName} {
		path := filepath.Join(dir, name)
		if err := os.Rename(path, path+".real"); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(path+".real", path); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Driver.(*Driver).Restore(t.Context(), s.Clone(), dir); err == nil {
			t.Errorf("restored through a link to the %s", name)
		}
		if err := os.Rename(path+".real", path); err != nil {
			t.Fatal(err)
		}
	}
}
