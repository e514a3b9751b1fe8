package template

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/tool"
)

// used is what the file takes up on disk, in bytes.
func used(t *testing.T, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Blocks * 512
}

func TestNewOverlay(t *testing.T) {
	s := open(t, t.TempDir())
	for _, mib := range []int{MinOverlayMiB, 1000, DefaultOverlayMiB, 64 << 10} {
		path := filepath.Join(t.TempDir(), "overlay.ext4")
		if err := s.NewOverlay(context.Background(), path, mib); err != nil {
			t.Fatalf("%d MiB: %v", mib, err)
		}
		fi, err := os.Stat(path)
		if err != nil || fi.Size() != int64(mib)<<20 || fi.Mode().Perm() != 0o600 {
			t.Errorf("%d MiB: %v, %v", mib, fi, err)
		}
		// The file system's own tables grow by 48 bytes a MiB or so.
		if got, limit := used(t, path), int64(512<<10+mib*128); got > limit {
			t.Errorf("%d MiB: takes up %d bytes, more than %d", mib, got, limit)
		}
		if err := (tool.Command{Name: "e2fsck", Args: []string{"-fn", path}}).Run(context.Background()); err != nil {
			t.Errorf("%d MiB: %v", mib, err)
		}
		// Inode tables that were not written must not be zeroed by the guest
		// either: that would fill in the holes.
		out, err := tool.Command{Name: "dumpe2fs", Args: []string{path}}.Output(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if groups, zeroed := count(out, "Inode table at"), count(out, "ITABLE_ZEROED"); groups == 0 || groups != zeroed {
			t.Errorf("%d MiB: %d of %d inode tables are marked as zeroed", mib, zeroed, groups)
		}
		if count(out, "has_journal") != 0 {
			t.Errorf("%d MiB: has a journal", mib)
		}
	}
}

func count(s, sub string) (n int) {
	for i := 0; i+len(sub) <= len(s); i++ {
		if s[i:i+len(sub)] == sub {
			n++
		}
	}
	return n
}

func TestNewOverlayRefuses(t *testing.T) {
	s := open(t, t.TempDir())
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "overlay.ext4")
	for _, mib := range []int{-1, 0, MinOverlayMiB - 1, MaxOverlayMiB + 1, 1 << 40} {
		if err := s.NewOverlay(ctx, path, mib); !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("%d MiB: %v, want invalid argument", mib, err)
		}
	}
	if err := s.NewOverlay(ctx, path, MinOverlayMiB); err != nil {
		t.Fatal(err)
	}
	// A disk that is there is neither overwritten nor removed.
	if err := s.NewOverlay(ctx, path, MinOverlayMiB); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over an existing file: %v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}

	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	for what, mib := range map[string]int{"seed": 100, "clone": MinOverlayMiB} {
		gone := filepath.Join(t.TempDir(), "overlay.ext4")
		err := s.NewOverlay(cancelled, gone, mib)
		if _, serr := os.Stat(gone); err == nil || !errors.Is(serr, fs.ErrNotExist) {
			// A reflink is one call: there is nothing to cancel in it.
			t.Errorf("cancelled %s: %v, file: %v", what, err, serr)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(s.seeds(), ".*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

func TestNewOverlayOnAFullDisk(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	testenv.NoLeaks(t, dir)
	s := open(t, filepath.Join(dir, "state"))
	small := filepath.Join(dir, "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("wrenn-test", small, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	path := filepath.Join(small, "overlay.ext4")
	if err := s.NewOverlay(context.Background(), path, DefaultOverlayMiB); !errors.Is(err, errdefs.Exhausted) {
		t.Errorf("NewOverlay = %v, want exhausted", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a part is left: %v", err)
	}
}

// Many at once, of a size whose seed is not there yet.
func TestNewOverlayConcurrently(t *testing.T) {
	dir := t.TempDir()
	s := open(t, filepath.Join(dir, "state"))
	var group sync.WaitGroup
	for i := range 16 {
		group.Go(func() {
			if err := s.NewOverlay(context.Background(), filepath.Join(dir, strconv.Itoa(i)), 128); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
}

func BenchmarkNewOverlay(b *testing.B) {
	dir := b.TempDir()
	s, err := Open(filepath.Join(dir, "state"), nil)
	if err != nil {
		b.Fatal(err)
	}
	for _, mib := range []int{DefaultOverlayMiB, 64 << 10} {
		b.Run(strconv.Itoa(mib)+"MiB", func(b *testing.B) {
			path := filepath.Join(dir, "overlay.ext4")
			if err := s.NewOverlay(context.Background(), path, mib); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				os.Remove(path)
				if err := s.NewOverlay(context.Background(), path, mib); err != nil {
					b.Fatal(err)
				}
			}
			fi, err := os.Stat(path)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(fi.Sys().(*syscall.Stat_t).Blocks)/2, "KiB/overlay")
			os.Remove(path)
		})
	}
}
