package envd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/api/filesystem"
)

// watchMask is what a watch asks the kernel for.
const watchMask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MODIFY | unix.IN_ATTRIB |
	unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

// fileEvent is what happened to one file; path is relative to the watch.
type fileEvent struct {
	path string
	kind filesystem.EventType
}

// watch reports the changes in a directory. Its methods except close are for one
// goroutine.
type watch struct {
	root      string
	recursive bool
	inotify   *os.File
	// dirs are the watched directories by watch descriptor, relative to root.
	dirs map[int32]string
	// leaving are directories that were moved away, by the cookie that their
	// arrival would carry.
	leaving map[uint32]string
	// scanned are files that were found in a new directory, whose events may
	// be on their way, too.
	scanned map[string]struct{}
	// lost is set when events are missing, until it is told.
	lost bool
	buf  []byte
}

// errEventsLost says that the kernel's queue has overflowed.
var errEventsLost = connect.NewError(connect.CodeDataLoss, errors.New("more happened than could be told: events were lost"))

// newWatch starts to watch a directory, which must exist. The caller must
// close it.
func newWatch(root string, recursive bool) (*watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("start to watch: %w", err))
	}
	w := &watch{
		root: root, recursive: recursive, inotify: os.NewFile(uintptr(fd), "inotify"),
		dirs: make(map[int32]string), leaving: make(map[uint32]string), scanned: make(map[string]struct{}),
		buf: make([]byte, 64<<10),
	}
	if err := w.add(".", nil); err != nil {
		w.close()
		return nil, fileError(err)
	}
	return w, nil
}

// close ends the watch; a next that waits returns.
func (w *watch) close() { _ = w.inotify.Close() }

// add watches a directory and, in a recursive watch, those below it. found,
// if not nil, is called for each file in them.
func (w *watch) add(dir string, found func(path string, entry fs.DirEntry)) error {
	raw, err := w.inotify.SyscallConn()
	if err != nil {
		return err
	}
	full := filepath.Join(w.root, dir)
	var wd int
	var addErr error
	if err := raw.Control(func(fd uintptr) { wd, addErr = unix.InotifyAddWatch(int(fd), full, watchMask) }); err != nil {
		return err
	}
	if addErr != nil {
		if errors.Is(addErr, syscall.ENOSPC) {
			return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("watch %s: too many watches", full))
		}
		return &fs.PathError{Op: "watch", Path: full, Err: addErr}
	}
	w.dirs[int32(wd)] = dir
	if !w.recursive {
		return nil
	}
	// The directory is read after that: later changes are events.
	entries, err := os.ReadDir(full)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		if found != nil {
			found(path, entry)
		}
		if entry.IsDir() {
			if err := w.add(path, found); err != nil && !gone(err) {
				return err
			}
		}
	}
	return nil
}

// gone reports whether a directory vanished, or was replaced, while it was
// looked at.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

// next waits for events. It returns errEventsLost when some are missing (the
// watch goes on), and os.ErrClosed after close.
func (w *watch) next() ([]fileEvent, error) {
	for {
		n, err := w.inotify.Read(w.buf)
		if err != nil {
			return nil, err
		}
		events, err := w.decode(w.buf[:n])
		if len(events) > 0 || err != nil {
			return events, err
		}
	}
}

// decode turns one read's worth of the kernel's events into ours.
func (w *watch) decode(data []byte) ([]fileEvent, error) {
	var events []fileEvent
	for len(data) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(data))
		mask := binary.NativeEndian.Uint32(data[4:])
		cookie := binary.NativeEndian.Uint32(data[8:])
		size := int(binary.NativeEndian.Uint32(data[12:]))
		name := string(bytes.TrimRight(data[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+size], "\x00"))
		data = data[unix.SizeofInotifyEvent+size:]

		dir, known := w.dirs[wd]
		switch {
		case mask&unix.IN_Q_OVERFLOW != 0:
			w.lost = true
		case mask&unix.IN_IGNORED != 0:
			delete(w.dirs, wd)
		case !known:
		case name == "" && dir != ".":
			// The parent's event tells it by name.
		default:
			events = w.one(events, filepath.Join(dir, name), mask, cookie)
		}
	}
	if pending, err := w.pending(); err == nil && pending == 0 {
		w.settle()
	}
	if w.lost {
		w.lost = false
		return events, errEventsLost
	}
	return events, nil
}

// one appends what an event of the kernel means.
func (w *watch) one(events []fileEvent, path string, mask, cookie uint32) []fileEvent {
	add := func(path string, kind filesystem.EventType) {
		events = append(events, fileEvent{path, kind})
	}
	_, scanned := w.scanned[path]
	isDir := mask&unix.IN_ISDIR != 0 && w.recursive
	if mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0 {
		delete(w.scanned, path)
		if !scanned {
			add(path, filesystem.EventType_EVENT_TYPE_CREATE)
		}
		if old, moved := w.leaving[cookie]; isDir && moved && mask&unix.IN_MOVED_TO != 0 {
			delete(w.leaving, cookie)
			w.rename(old, path)
		} else if isDir {
			// What was made in it before it was watched has no event.
			err := w.add(path, func(path string, entry fs.DirEntry) {
				if _, twice := w.scanned[path]; twice {
					return
				}
				w.scanned[path] = struct{}{}
				add(path, filesystem.EventType_EVENT_TYPE_CREATE)
				if info, err := entry.Info(); err == nil && info.Mode().IsRegular() && info.Size() > 0 {
					add(path, filesystem.EventType_EVENT_TYPE_WRITE)
				}
			})
			if err != nil && !gone(err) {
				w.lost = true
			}
		}
	}
	if mask&(unix.IN_MOVED_FROM|unix.IN_MOVE_SELF) != 0 {
		add(path, filesystem.EventType_EVENT_TYPE_RENAME)
		if isDir && mask&unix.IN_MOVED_FROM != 0 {
			w.leaving[cookie] = path
		}
	}
	if mask&unix.IN_ATTRIB != 0 {
		add(path, filesystem.EventType_EVENT_TYPE_CHMOD)
	}
	if mask&unix.IN_MODIFY != 0 {
		add(path, filesystem.EventType_EVENT_TYPE_WRITE)
	}
	if mask&(unix.IN_DELETE|unix.IN_DELETE_SELF) != 0 {
		delete(w.scanned, path)
		add(path, filesystem.EventType_EVENT_TYPE_REMOVE)
	}
	return events
}

// rename notes that a watched directory, with all below it, has a new path.
func (w *watch) rename(from, to string) {
	for wd, dir := range w.dirs {
		if dir == from {
			w.dirs[wd] = to
		} else if rest, below := strings.CutPrefix(dir, from+"/"); below {
			w.dirs[wd] = filepath.Join(to, rest)
		}
	}
}

// settle drops what was kept for pending events, when none is pending. Directories
// that were moved away and did not arrive have left the watch.
func (w *watch) settle() {
	clear(w.scanned)
	for cookie, from := range w.leaving {
		delete(w.leaving, cookie)
		for wd, dir := range w.dirs {
			if dir == from || strings.HasPrefix(dir, from+"/") {
				w.remove(wd)
			}
		}
	}
}

func (w *watch) remove(wd int32) {
	delete(w.dirs, wd)
	if raw, err := w.inotify.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(wd)) })
	}
}

// pending returns how many bytes of events wait to be read.
func (w *watch) pending() (n int, err error) {
	raw, err := w.inotify.SyscallConn()
	if err != nil {
		return 0, err
	}
	var ioctlErr error
	err = raw.Control(func(fd uintptr) { n, ioctlErr = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	return n, errors.Join(err, ioctlErr)
}

// networkMounts are file systems whose changes the kernel does not all see.
var networkMounts = map[int64]string{
	unix.NFS_SUPER_MAGIC: "NFS", unix.CIFS_SUPER_MAGIC: "CIFS", unix.SMB_SUPER_MAGIC: "SMB",
	unix.SMB2_SUPER_MAGIC: "SMB", unix.FUSE_SUPER_MAGIC: "FUSE",
}

func checkLocal(path string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return fileError(err)
	}
	if name, network := networkMounts[int64(st.Type)]; network {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("cannot watch %s: it is on a network file system (%s)", path, name))
	}
	return nil
}

// message is an event as clients see it; full is the file's own path, and d
// is nil where no entry is wanted.
func (e fileEvent) message(full string, d *describer) *filesystem.FilesystemEvent {
	m := &filesystem.FilesystemEvent{Name: e.path, Type: e.kind}
	switch e.kind {
	case filesystem.EventType_EVENT_TYPE_CREATE, filesystem.EventType_EVENT_TYPE_WRITE, filesystem.EventType_EVENT_TYPE_CHMOD:
		if d != nil {
			m.Entry, _ = d.entry(full)
		}
	}
	return m
}

// watcherIdle is how long after the last poll a watcher is removed.
const watcherIdle = time.Hour
