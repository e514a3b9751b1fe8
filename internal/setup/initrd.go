package setup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// initrdFormat is raised when this file changes what an initrd or an init image holds, so
// that those made before are made again.
const initrdFormat = 2

// writeInitrd writes the guest's initrd to the new file path: envd as /init,
// the modules in /modules with their load order in /modules/list (one file
// name a line), and the directories that envd mounts on. The modules are in dir/modules;
// the archive loadableFile in dir, if it is there, follows.
//
// It is not compressed: under an emulated CPU, too, the guest then boots as
// fast as with gzip, lz4 or zstd, and making it costs nothing.
func writeInitrd(path, envd, dir string, modules []string) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("write initrd: %w", err)
	}
	defer f.Close()
	bw := bufio.NewWriterSize(f, 1<<20)
	w := &cpioWriter{w: bw}
	for _, dir := range []string{"dev", "proc", "sys", "run", "tmp", "base", "overlay", "newroot", "modules"} {
		w.entry(cpioEntry{name: dir, mode: 0o040755})
	}
	// The kernel opens /dev/console for init before devtmpfs is mounted.
	w.entry(cpioEntry{name: "dev/console", mode: 0o020600, major: 5, minor: 1})
	w.entry(cpioEntry{name: "dev/null", mode: 0o020666, major: 1, minor: 3})
	w.file("init", 0o100755, envd)
	list := ""
	for _, m := range modules {
		list += m + "\n"
		w.file("modules/"+m, 0o100644, filepath.Join(dir, "modules", m))
	}
	w.entry(cpioEntry{name: "modules/list", mode: 0o100644, size: int64(len(list)), body: strings.NewReader(list)})
	w.entry(cpioEntry{name: "TRAILER!!!"})
	w.archive(filepath.Join(dir, loadableFile))
	if w.err != nil {
		return fmt.Errorf("write initrd: %w", w.err)
	}
	if err := bw.Flush(); err != nil {
		return fmt.Errorf("write initrd: %w", err)
	}
	return f.Close()
}

// writeInit makes the new file path an EROFS with envd as /init and nothing else: what drivers
// without kernel and initrd start. It uses the new directory work beside it.
func writeInit(ctx context.Context, path, work, envd string) error {
	if err := os.Mkdir(work, 0o755); err != nil {
		return fmt.Errorf("write init image: %w", err)
	}
	defer os.RemoveAll(work)
	init := filepath.Join(work, "init")
	err := copyFile(init, envd)
	for _, name := range []string{init, work} { // whatever the umask
		if err == nil {
			err = os.Chmod(name, 0o755)
		}
	}
	sec, _ := strconv.ParseInt(template.BuildTime, 10, 64)
	for _, name := range []string{init, work} { // equal inputs make equal images
		if err == nil {
			err = os.Chtimes(name, time.Unix(sec, 0), time.Unix(sec, 0))
		}
	}
	if err == nil {
		err = template.PackEROFS(ctx, path, work)
	}
	if err != nil {
		return fmt.Errorf("write init image: %w", err)
	}
	return nil
}

func copyFile(to, from string) error {
	r, err := os.Open(from)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700)
	if err != nil {
		return err
	}
	defer w.Close()
	if _, err := io.Copy(w, r); err != nil {
		return err
	}
	return w.Close()
}

// writeTree writes the new archive path of all below dir.
func writeTree(path, dir string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	bw := bufio.NewWriterSize(f, 1<<20)
	w := &cpioWriter{w: bw}
	err = filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || file == dir {
			return err
		}
		name, err := filepath.Rel(dir, file)
		switch {
		case err != nil:
			return err
		case d.IsDir():
			w.entry(cpioEntry{name: name, mode: 0o040755})
		default:
			w.file(name, 0o100644, file)
		}
		return w.err
	})
	if err != nil {
		return err
	}
	w.entry(cpioEntry{name: "TRAILER!!!"})
	if w.err != nil {
		return w.err
	}
	if err := bw.Flush(); err != nil {
		return err
	}
	return f.Close()
}

// cpioEntry is one entry of an archive; everything in it belongs to root and
// dates from 1970, so that equal inputs make equal initrds.
type cpioEntry struct {
	name         string
	mode         uint32 // type and permissions, as in stat
	major, minor uint32 // of a device node
	size         int64
	body         io.Reader // exactly size bytes
}

// cpioWriter writes the "newc" format, the one that the kernel unpacks: it is
// a header of 13 hexadecimal numbers, name and body, each padded to 4 bytes.
// The first error sticks and stops everything.
type cpioWriter struct {
	w   io.Writer
	ino uint32
	off int64
	err error
}

func (w *cpioWriter) entry(e cpioEntry) {
	if w.err != nil {
		return
	}
	if e.size > 0xffffffff {
		w.err = fmt.Errorf("%s has %d bytes: too large for the format", e.name, e.size)
		return
	}
	w.ino++
	nlink := 1
	if e.mode&0o170000 == 0o040000 {
		nlink = 2
	}
	w.write([]byte(fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		w.ino, e.mode, 0, 0, nlink, 0, e.size, 0, 0, e.major, e.minor, len(e.name)+1, 0, e.name)))
	w.pad()
	if e.size > 0 && w.err == nil {
		n, err := io.CopyN(w.w, e.body, e.size)
		w.off += n
		if err != nil {
			w.err = fmt.Errorf("%s: %w", e.name, err)
		}
	}
	w.pad()
}

// file adds the regular file at path.
func (w *cpioWriter) file(name string, mode uint32, path string) {
	if w.err != nil {
		return
	}
	f, err := os.Open(path)
	if err != nil {
		w.err = err
		return
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		w.err = err
		return
	}
	if !fi.Mode().IsRegular() {
		w.err = fmt.Errorf("%s is not a regular file", path)
		return
	}
	w.entry(cpioEntry{name: name, mode: mode, size: fi.Size(), body: f})
}

// archive adds the archive at path, if it is there: the kernel unpacks one after the other.
func (w *cpioWriter) archive(path string) {
	if w.err != nil {
		return
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		w.err = err
		return
	}
	defer f.Close()
	n, err := io.Copy(w.w, f)
	w.off += n
	w.err = err
	w.pad()
}

func (w *cpioWriter) pad() {
	if rest := w.off % 4; rest != 0 {
		w.write(make([]byte, 4-rest))
	}
}

func (w *cpioWriter) write(b []byte) {
	if w.err != nil {
		return
	}
	n, err := w.w.Write(b)
	w.off += int64(n)
	w.err = err
}
