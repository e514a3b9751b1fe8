package envd

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// trimEvery is how often a guest looks whether trimAfter KiB were written since it last
	// gave back what is free.
	trimEvery = 30 * time.Second
	trimAfter = 64 << 10
	// trimPiece is how much of the disk is looked at at once, in bytes, every trimPause: the
	// host counts what is given back as written, and programs write, too.
	trimPiece = 128 << 20
	trimPause = time.Second
	// trimAtFreeze bounds how much longer a freeze takes.
	trimAtFreeze = 500 * time.Millisecond
	// trimLeast is the shortest free range that is given back, in bytes. With the mount
	// option discard, which knows no such bound, a delete of 3,000 small files took
	// five times as long.
	trimLeast = 256 << 10
	// fitrim is FITRIM of linux/fs.h: _IOWR('X', 121, struct fstrim_range).
	fitrim = 0xc0185879
	// resizeFS is EXT4_IOC_RESIZE_FS of linux/ext4.h: _IOW('f', 16, __u64), the new size in
	// blocks.
	resizeFS = 0x40086610
)

// Disk is the disk of a guest that its programs write. It is safe for concurrent use.
type Disk struct {
	// root is the directory of its file system, to which no path leads.
	root *os.File
	// written is the file that counts the KiB written to it.
	written string

	mu sync.Mutex
	// trimmed is what was written before the last whole trim began, and begun what was
	// before this one did.
	trimmed, begun uint64
	// next is where the next piece begins, in bytes; 0 if no trim is under way.
	next uint64
	// cannot says that the disk cannot be trimmed: its VMM may not take back what is free.
	cannot bool
}

func newDisk(root *os.File, device string) *Disk {
	return &Disk{root: root, written: filepath.Join("/sys/fs/ext4", device, "session_write_kbytes")}
}

// grow makes the file system as large as its device, which is larger where a build goes on
// with the disk of a template that had less.
func (d *Disk) grow(device string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	var has [4]byte // s_blocks_count_lo of the superblock
	if _, err := f.ReadAt(has[:], 1024+4); err != nil {
		return err
	}
	const block = 4096
	blocks := uint64(size) / block
	if blocks <= uint64(binary.LittleEndian.Uint32(has[:])) {
		return nil
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, d.root.Fd(), resizeFS, uintptr(unsafe.Pointer(&blocks))); errno != 0 {
		return fmt.Errorf("make the disk larger: %w", errno)
	}
	return nil
}

// trim gives free pieces of the disk back to the host for about limit, at least one, if
// enough was written since the last time. It says whether there are more. A disk that
// cannot be trimmed is one error, and no more after that.
func (d *Disk) trim(limit time.Duration) (more bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cannot {
		return false, nil
	}
	if d.next == 0 {
		if due, err := d.begin(); err != nil || !due {
			return false, err
		}
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(d.root.Fd()), &fs); err != nil {
		return false, err
	}
	size := fs.Blocks * uint64(fs.Bsize)
	for began := time.Now(); ; {
		// struct fstrim_range
		piece := struct{ start, length, least uint64 }{d.next, trimPiece, trimLeast}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, d.root.Fd(), fitrim, uintptr(unsafe.Pointer(&piece)))
		if errno != 0 && errno != unix.EINTR {
			d.cannot = true
			return false, fmt.Errorf("trim the disk: %w", errno)
		}
		if d.next += trimPiece; d.next >= size {
			d.next, d.trimmed = 0, d.begun
			return false, nil
		}
		if time.Since(began) >= limit {
			return true, nil
		}
	}
}

// begin says whether enough was written for a trim. Called with mu held.
func (d *Disk) begin() (due bool, err error) {
	text, err := os.ReadFile(d.written)
	if err == nil {
		d.begun, err = strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	}
	if err != nil {
		d.cannot = true
		return false, fmt.Errorf("trim the disk: %w", err)
	}
	return d.begun >= d.trimmed+trimAfter, nil
}

// KeepTrimmed trims the disk from time to time until ctx ends.
func (s *Server) KeepTrimmed(ctx context.Context) {
	timer := time.NewTimer(trimEvery)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		wait := trimEvery
		if s.trim(0) {
			wait = trimPause
		}
		timer.Reset(wait)
	}
}

func (s *Server) trim(limit time.Duration) (more bool) {
	if s.disk == nil {
		return false
	}
	more, err := s.disk.trim(limit)
	if err != nil {
		s.log.Info("what is deleted stays on the host", "err", err)
	}
	return more
}
