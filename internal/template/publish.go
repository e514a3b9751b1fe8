package template

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/digest"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

var errLocked = errors.New("locked by another process")

// lock is an flock on a directory's lock file; it ends with the process.
type lock struct{ f *os.File }

func (l *lock) unlock() { l.f.Close() }

func tryLock(dir string) (*lock, error) { return tryFlock(lockOf(dir), unix.LOCK_EX) }

// lockOf is a directory's lock file.
func lockOf(dir string) string { return filepath.Join(dir, "lock") }

func tryFlock(path string, how int) (*lock, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err != unix.EINTR {
			break
		}
	}
	if err == nil {
		return &lock{f}, nil
	}
	f.Close()
	if err == unix.EWOULDBLOCK {
		return nil, errLocked
	}
	return nil, fmt.Errorf("lock %s: %w", path, err)
}

// waitLock takes dir's lock, waiting within ctx. onWait, if not nil, is called
// once when there is something to wait for.
func waitLock(ctx context.Context, dir string, onWait func()) (*lock, error) {
	return waitFlock(ctx, lockOf(dir), unix.LOCK_EX, onWait)
}

// shareLock takes dir's lock together with others that share it.
func shareLock(ctx context.Context, dir string) (*lock, error) {
	return waitFlock(ctx, lockOf(dir), unix.LOCK_SH, nil)
}

func waitFlock(ctx context.Context, path string, how int, onWait func()) (*lock, error) {
	for {
		l, err := tryFlock(path, how)
		if !errors.Is(err, errLocked) {
			return l, err
		}
		if onWait != nil {
			onWait()
			onWait = nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for %s: %w", filepath.Dir(path), context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// publish makes the complete directory tmp visible as dst, in one step also
// where dst exists; tmp is then what was there.
func publish(tmp, dst, manifestName string, v any, m *manifest) error {
	err := seal(tmp, manifestName, v, m, hashFile)
	if err == nil {
		err = replace(tmp, dst)
	}
	if err != nil {
		return fmt.Errorf("publish %s: %w", filepath.Base(dst), err)
	}
	return nil
}

// seal brings the directory tmp to the disk as it is to be published. The
// manifest v, whose common part is m, is written last: m.Files is filled with
// every regular file in tmp, as hash sees it.
func seal(tmp, manifestName string, v any, m *manifest, hash func(path string) (File, error)) error {
	err := filepath.WalkDir(tmp, func(path string, d os.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case path == tmp: // it is flushed when the manifest is in it
			return os.Chmod(path, 0o755)
		case d.IsDir():
			return errors.Join(os.Chmod(path, 0o755), flush(path))
		case d.Type().IsRegular():
			// What is published is immutable. Every user that may enter the state
			// directory may read it, such as that of a VMM.
			return os.Chmod(path, 0o444)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return sealFiles(tmp, manifestName, v, m, hash)
}

// sealFiles is seal for files whose modes are as they are to be.
func sealFiles(tmp, manifestName string, v any, m *manifest, hash func(path string) (File, error)) error {
	var paths []string
	err := filepath.WalkDir(tmp, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			paths = append(paths, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	// All files go to the disk while the CPUs digest them. The manifest is written
	// when both have ended for each.
	var wg sync.WaitGroup
	files, errs := make([]File, len(paths)), make([]error, 2*len(paths))
	for i, path := range paths {
		wg.Go(func() { errs[2*i] = flush(path) })
		wg.Go(func() { files[i], errs[2*i+1] = hash(path) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	m.Format = formatVersion
	m.Files = map[string]File{}
	for i, path := range paths {
		rel, err := filepath.Rel(tmp, path)
		if err != nil {
			return err
		}
		m.Files[rel] = files[i]
	}
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if err := writeSynced(filepath.Join(tmp, manifestName), append(b, '\n')); err != nil {
		return err
	}
	return flush(tmp)
}

// SealState writes the manifest of a directory that holds the state of a
// sandbox: the digest of each file. It returns when all of it is on the disk. The
// modes of the files stay, for a disk in it may have another name.
func SealState(ctx context.Context, dir string) error {
	var m manifest
	err := sealFiles(dir, manifestFile, &m, &m, func(path string) (File, error) { return digestState(ctx, path) })
	return noSpace("seal state", err)
}

// digestState returns the digest of a file of a sandbox's state. The file becomes
// as small as it can. Memory that its driver has digested is not read again.
func digestState(ctx context.Context, path string) (File, error) {
	if dir, name := filepath.Split(path); name == snapfile.MemoryName {
		if f, ok := snapfile.MemoryDigest(dir); ok {
			return f, nil
		}
	}
	return snapfile.Dig(ctx, path)
}

// State is a directory that SealState sealed, as its manifest describes it.
type State struct {
	dir      string
	manifest manifest
}

// OpenState reads the manifest of a directory and looks whether all files are there with
// their sizes: errdefs.Corrupt if not. Contents are Verify's.
func OpenState(dir string) (State, error) {
	s := State{dir: dir}
	err := readManifest(dir, manifestFile, &s.manifest, &s.manifest)
	return s, damage(err)
}

// Verify reads all files, or those with these names: errdefs.Corrupt if one is not what was
// written, or is none of the directory's.
func (s State) Verify(ctx context.Context, names ...string) error {
	m := s.manifest
	if len(names) > 0 {
		m.Files = map[string]File{}
	}
	for _, name := range names {
		file, ok := s.manifest.Files[name]
		if !ok {
			return errdefs.Corrupt.Errorf("it has no digest of %s", name)
		}
		m.Files[name] = file
	}
	return m.verify(ctx, s.dir, snapfile.Digest)
}

// damage is the class of an error of readManifest. What cannot be read now may
// be read later and is not damaged.
func damage(err error) error {
	switch {
	case err == nil:
		return nil
	case errdefs.CannotRead(err):
		return unreadable("it", err)
	case errors.Is(err, fs.ErrNotExist):
		return errdefs.Corrupt.Errorf("it is incomplete: it has no manifest")
	}
	return errdefs.Corrupt.Errorf("%w", err)
}

// verify compares the files in dir with their digests: errdefs.Corrupt if one is
// not what was written. other computes the digests of files that have no digest of
// their pieces.
func (m manifest) verify(ctx context.Context, dir string, other func(context.Context, string) (File, error)) error {
	return m.verifyBy(ctx, dir, func(ctx context.Context, path string, want File) (File, error) {
		if want.Pieces != "" {
			return snapfile.Digest(ctx, path)
		}
		return other(ctx, path)
	})
}

// verifyBy is verify with digests that read computes.
func (m manifest) verifyBy(ctx context.Context, dir string, read reader) error {
	for name, want := range m.Files {
		got, err := read(ctx, filepath.Join(dir, name), want)
		if err != nil {
			return err
		}
		if got != want {
			return errdefs.Corrupt.Errorf("%s is not what was written", name)
		}
	}
	return nil
}

// add makes the sealed directory tmp visible as dst; fs.ErrExist says that one
// is there. On error dst is as it was.
func add(tmp, dst string) error {
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, dst, unix.RENAME_NOREPLACE); err != nil {
		return err
	}
	if err := flush(filepath.Dir(dst)); err != nil {
		return errors.Join(err, os.Rename(dst, tmp))
	}
	return nil
}

// replace is add that changes places with what is there.
func replace(tmp, dst string) error {
	err := add(tmp, dst)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, dst, unix.RENAME_EXCHANGE); err != nil {
		return err
	}
	return flush(filepath.Dir(dst))
}

// removeGarbage removes everything in dir whose name begins with a dot.
func removeGarbage(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			errs = append(errs, removeTree(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// removeTree removes path and everything below. What is mounted below is
// unmounted first, and if that is refused nothing is removed: a bind mount
// left there leads into the host.
func removeTree(path string) error {
	points, err := mountPointsBelow(path)
	if err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	for i := len(points) - 1; i >= 0; i-- {
		if err := unix.Unmount(points[i], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", points[i], err)
		}
	}
	return os.RemoveAll(path)
}

// mountPointsBelow lists the mount points at or below path, in mount order.
func mountPointsBelow(path string) ([]string, error) {
	path, err := filepath.EvalSymlinks(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var points []string
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		fields := strings.Fields(sc.Text())
		if len(fields) < 5 {
			continue
		}
		if p := unescapeMount(fields[4]); p == path || strings.HasPrefix(p, path+"/") {
			points = append(points, p)
		}
	}
	return points, sc.Err()
}

// unescapeMount undoes the kernel's octal escapes (\040 for a space).
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func hashFile(path string) (File, error) {
	size, sum, err := digest.File(path)
	return File{Size: size, SHA256: sum}, err
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

// flush brings a file or directory to the disk.
func flush(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
