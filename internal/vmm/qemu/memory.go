package qemu

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

const pageSize = 4096

// ram is the guest's memory as QEMU has mapped it.
type ram struct {
	pid    int
	size   int64
	shared bool
	file   *os.File // what is mapped
	areas  []area
}

// area is one mapping of a part of the file.
type area struct{ start, end, offset int64 }

// findRAM looks for the one file of that size that a QEMU has mapped.
func findRAM(pid int, size int64) (*ram, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return nil, err
	}
	for _, fd := range fds {
		// Stat first: opening a device or a pipe might have an effect.
		info, err := os.Stat(fd)
		if err != nil || !info.Mode().IsRegular() || info.Size() != size {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(fd, &st); err != nil {
			continue
		}
		areas, shared := areasOf(string(maps), st.Ino)
		if areas == nil || total(areas) != size {
			continue // a disk that happens to be as large
		}
		f, err := os.Open(fd)
		if err != nil {
			return nil, err
		}
		return &ram{pid: pid, size: size, shared: shared, file: f, areas: areas}, nil
	}
	return nil, errors.New("no mapping of its size")
}

// areasOf finds the mappings of an inode in a /proc/PID/maps.
func areasOf(maps string, inode uint64) (areas []area, shared bool) {
	for line := range strings.Lines(maps) {
		var a area
		var perms, device string
		var ino uint64
		n, _ := fmt.Sscanf(line, "%x-%x %s %x %s %d", &a.start, &a.end, &perms, &a.offset, &device, &ino)
		if n == 6 && ino == inode && strings.HasPrefix(perms, "rw") {
			areas = append(areas, a)
			shared = strings.HasSuffix(perms, "s")
		}
	}
	return areas, shared
}

func total(areas []area) (n int64) {
	for _, a := range areas {
		n += a.end - a.start
	}
	return n
}

// copyTo writes the memory to an empty file.
func (r *ram) copyTo(ctx context.Context, out *os.File) (snapfile.File, error) {
	from, err := snapfile.FileSource(r.file)
	if err != nil || r.shared {
		if err == nil {
			return snapfile.Write(ctx, out, from)
		}
		return snapfile.File{}, err
	}
	pages, err := openPages(r)
	if err != nil {
		return snapfile.File{}, err
	}
	defer pages.close()
	if snapfile.Clone(out, r.file) == nil {
		return snapfile.File{Size: r.size}, pages.overwrite(ctx, out)
	}
	return snapfile.Write(ctx, out, pages.over(from))
}

// pages are those of a private mapping that are no longer shared with its file.
type pages struct {
	ram          *ram
	mem, pagemap *os.File
}

func openPages(r *ram) (*pages, error) {
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", r.pid))
	if err != nil {
		return nil, err
	}
	pagemap, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", r.pid))
	if err != nil {
		return nil, errors.Join(err, mem.Close())
	}
	return &pages{r, mem, pagemap}, nil
}

func (p *pages) close() {
	p.mem.Close()
	p.pagemap.Close()
}

// over returns the memory: the file's contents, and these pages over it.
func (p *pages) over(file snapfile.Source) snapfile.Source {
	in := map[int64]bool{}
	for _, n := range file.Pieces {
		in[n] = true
	}
	all := snapfile.Source{Size: p.ram.size}
	for n := range (p.ram.size + snapfile.PieceBytes - 1) / snapfile.PieceBytes {
		all.Pieces = append(all.Pieces, n)
	}
	all.ReadAt = func(buf []byte, at int64) (none bool, err error) {
		runs, err := p.runs(at, int64(len(buf)))
		if err != nil {
			return false, err
		}
		switch inFile := in[at/snapfile.PieceBytes]; {
		case len(runs) == 0 && !inFile:
			return true, nil
		case !inFile:
			clear(buf)
		case len(runs) != 1 || runs[0].length != int64(len(buf)):
			if none, err = file.ReadAt(buf, at); none || err != nil {
				return none, err
			}
		}
		for _, run := range runs {
			if _, err := p.mem.ReadAt(buf[run.offset-at:][:run.length], run.address); err != nil {
				return false, err
			}
		}
		return false, nil
	}
	return all
}

// overwrite writes the pages to a file that has the contents of the mapped one.
func (p *pages) overwrite(ctx context.Context, out *os.File) error {
	buf := make([]byte, snapfile.PieceBytes)
	for at := int64(0); at < p.ram.size; at += snapfile.PieceBytes {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		runs, err := p.runs(at, min(snapfile.PieceBytes, p.ram.size-at))
		if err != nil {
			return err
		}
		for _, run := range runs {
			part := buf[:run.length]
			if _, err := p.mem.ReadAt(part, run.address); err != nil {
				return err
			}
			if _, err := out.WriteAt(part, run.offset); err != nil {
				return err
			}
		}
	}
	return nil
}

// run is pages in a row: where they are in the memory and in QEMU's address space.
type run struct{ offset, address, length int64 }

// runs lists the pages of a part of the memory that are QEMU's own.
func (p *pages) runs(at, n int64) (runs []run, err error) {
	for _, a := range p.ram.areas {
		begin, end := max(at, a.offset), min(at+n, a.offset+a.end-a.start)
		if begin >= end {
			continue
		}
		address := a.start + begin - a.offset
		entries := make([]byte, (end-begin)/pageSize*8)
		if _, err := p.pagemap.ReadAt(entries, address/pageSize*8); err != nil {
			return nil, err
		}
		for i := int64(0); i < int64(len(entries)/8); {
			from := i
			for i < int64(len(entries)/8) && written(binary.NativeEndian.Uint64(entries[i*8:])) {
				i++
			}
			if i > from {
				runs = append(runs, run{begin + from*pageSize, address + from*pageSize, (i - from) * pageSize})
			} else {
				i++
			}
		}
	}
	return runs, nil
}

// written reports whether a pagemap entry of a private file mapping means a
// page of the process's own: in memory or in swap, and not the file's.
func written(entry uint64) bool {
	const filePage, swapped, present = 1 << 61, 1 << 62, 1 << 63
	return entry&swapped != 0 || entry&present != 0 && entry&filePage == 0
}
