package template

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// stageNamed makes all of a named snapshot but its name.
func stageNamed(t *testing.T, s *Store, name string) Stage {
	t.Helper()
	stage, err := s.StageSnapshot(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stage.Discard)
	disk := filepath.Join(t.TempDir(), "disk")
	if err := errors.Join(os.WriteFile(disk, []byte("disk of "+name), 0o600), os.WriteFile(filepath.Join(stage.Dir, "mem"), []byte("memory"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := stage.AddOverlay(t.Context(), disk); err != nil {
		t.Fatal(err)
	}
	return stage
}

func namedMeta(at time.Time) Meta {
	return Meta{Key: "k", Shape: Shape{"qemu", 1, 512, 4096}, Source: &Source{Sandbox: "sb-1", Template: "minimal", Base: "b", CloneKey: "secret", Synced: true, CreatedAt: at}}
}

func TestNamedSnapshots(t *testing.T) {
	s := readyStore(t)
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for i, name := range []string{"old", "new"} {
		if _, err := s.Snapshot(t.Context(), name); errdefs.ClassOf(err) != errdefs.NotFound {
			t.Errorf("none is there: %v", err)
		}
		stage := stageNamed(t, s, name)
		if list, err := s.Snapshots(); err != nil || len(list) != i {
			t.Errorf("an unfinished one is listed: %v, %v", list, err)
		}
		if err := stage.Publish(t.Context(), namedMeta(at.Add(time.Duration(i)*time.Hour))); err != nil {
			t.Fatal(err)
		}
	}
	list, err := s.Snapshots()
	if err != nil || len(list) != 2 || list[0].Name != "new" || list[1].Name != "old" || list[0].Bytes == 0 {
		t.Fatalf("list %+v, %v", list, err)
	}
	snap, err := View(s.Dir(), s.log).Snapshot(t.Context(), "new") // another process's, which reads it all
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(snap.Source, namedMeta(at.Add(time.Hour)).Source) || snap.Shape != namedMeta(at).Shape || snap.Key != "k" {
		t.Errorf("it says %+v", snap.Meta)
	}
	if data, err := os.ReadFile(snap.Overlay); err != nil || string(data) != "disk of new" {
		t.Errorf("its disk is %q, %v", data, err)
	}
	if info, err := os.Stat(filepath.Join(snap.Dir, readyManifest)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("others may read its key: %v, %v", info.Mode(), err)
	}

	for name, want := range map[string]*errdefs.Class{
		"new": errdefs.AlreadyExists, "minimal": errdefs.AlreadyExists, "lock": errdefs.InvalidArgument,
		"": errdefs.InvalidArgument, "..": errdefs.InvalidArgument, "../x": errdefs.InvalidArgument, "A": errdefs.InvalidArgument,
		".hidden": errdefs.InvalidArgument, "-rf": errdefs.InvalidArgument, "a\x00b": errdefs.InvalidArgument,
	} {
		if _, err := s.StageSnapshot(t.Context(), name); errdefs.ClassOf(err) != want {
			t.Errorf("begin %q: %v, want %v", name, err, want)
		}
	}
	// Of two at once the first wins.
	first, second := stageNamed(t, s, "twice"), stageNamed(t, s, "twice")
	if err := first.Publish(t.Context(), namedMeta(at)); err != nil {
		t.Fatal(err)
	}
	if err := second.Publish(t.Context(), namedMeta(at)); errdefs.ClassOf(err) != errdefs.AlreadyExists {
		t.Errorf("the second: %v", err)
	}
	second.Discard()

	for _, name := range []string{"new", "old", "twice"} {
		if err := s.DropSnapshot(name); err != nil {
			t.Error(err)
		}
		if err := s.DropSnapshot(name); errdefs.ClassOf(err) != errdefs.NotFound {
			t.Errorf("dropped twice: %v", err)
		}
	}
	for _, name := range []string{"", "..", "lock", "../templates"} {
		if err := s.DropSnapshot(name); err == nil {
			t.Errorf("dropped %q", name)
		}
	}
	left, err := os.ReadDir(s.snapshots())
	if err != nil || len(left) != 1 || left[0].Name() != "lock" {
		t.Errorf("left: %v, %v", left, err)
	}
}

// An unfinished snapshot is garbage at the next start, unless it is still being
// made.
func TestUnfinishedSnapshot(t *testing.T) {
	s := readyStore(t)
	stage := stageNamed(t, s, "half")
	dead := filepath.Join(s.snapshots(), ".snapshot-dead")
	if err := os.Mkdir(dead, 0o700); err != nil {
		t.Fatal(err)
	}
	reopen := func() {
		t.Helper()
		if _, err := Open(s.Dir(), slog.New(slog.DiscardHandler)); err != nil {
			t.Fatal(err)
		}
	}
	reopen()
	if _, err := os.Stat(stage.Dir); err != nil {
		t.Errorf("another process removed it: %v", err)
	}
	stage.Discard()
	reopen()
	if _, err := os.Stat(dead); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("garbage is kept: %v", err)
	}
	if list, err := s.Snapshots(); err != nil || len(list) != 0 {
		t.Errorf("listed: %v, %v", list, err)
	}
}

func TestDamagedNamedSnapshot(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(dir string) error
		says   string
	}{
		"a bit of the memory": {func(dir string) error {
			if err := os.Remove(filepath.Join(dir, "mem")); err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, "mem"), []byte("mEmory"), 0o444)
		}, "mem is not what was written"},
		"a shorter disk": {func(dir string) error { return os.Truncate(filepath.Join(dir, readyOverlay), 1) }, "overlay.ext4 has 1 bytes, want 12"},
		"no memory":      {func(dir string) error { return os.Remove(filepath.Join(dir, "mem")) }, "mem is missing"},
		"no manifest":    {func(dir string) error { return os.Remove(filepath.Join(dir, readyManifest)) }, "manifest.json is missing"},
		"a ready one's manifest": {func(dir string) error {
			return os.WriteFile(filepath.Join(dir, readyManifest), []byte(`{"format":1,"files":{"mem":{"size":6}}}`), 0o600)
		}, "names no source"},
	} {
		t.Run(name, func(t *testing.T) {
			s := readyStore(t)
			if err := stageNamed(t, s, "snap").Publish(t.Context(), namedMeta(time.Now())); err != nil {
				t.Fatal(err)
			}
			if err := c.damage(s.snapshotDir("snap")); err != nil {
				t.Fatal(err)
			}
			_, err := View(s.Dir(), s.log).Snapshot(t.Context(), "snap")
			if errdefs.ClassOf(err) != errdefs.Corrupt || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), s.Dir()) {
				t.Errorf("it says %v, want corrupt: %s", err, c.says)
			}
			if err := s.DropSnapshot("snap"); err != nil {
				t.Errorf("it cannot be deleted: %v", err)
			}
		})
	}
}
