package launch

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// pipeSuffix makes a file's name the name of the pipe that leads to it.
	pipeSuffix = ".pipe"
	// outletBytes is how much is read from a pipe at a time.
	outletBytes = 64 << 10
	// outletPace is the time between two reads. floodPace is that time after a
	// read that filled its buffer, so that a guest that prints without end costs
	// the agent at most 1.3 MB/s.
	outletPace = 5 * time.Millisecond
	floodPace  = 50 * time.Millisecond
)

// outlet carries what a program prints from a named pipe into a file, and keeps
// that file within its bound, so that a program cannot fill a disk. The pipe holds
// 64 KiB. What the program prints while it is full, because no agent reads or the program
// is faster, is lost: the program does not wait for a reader.
type outlet struct {
	file    *os.File
	pipe    *os.File
	times   *os.File      // of a console; nil for other output
	carried func()        // called after a write into the file; may be nil
	quit    chan struct{} // closed by close
	done    chan struct{} // closed when carry has ended
}

// makeOutlet makes the pipe and returns the end that the program writes to,
// which the caller closes.
func makeOutlet(to print, carried func()) (*outlet, *os.File, error) {
	if err := os.Remove(to.pipe); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, nil, err
	}
	if err := unix.Mkfifo(to.pipe, 0o600); err != nil {
		return nil, nil, fmt.Errorf("make pipe: %w", err)
	}
	o, err := openOutlet(to, carried)
	if err != nil {
		return nil, nil, errors.Join(err, os.Remove(to.pipe))
	}
	// The pipe does not block the program either.
	fd, err := unix.Open(to.pipe, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open pipe: %w", err), o.closeFiles(), os.Remove(to.pipe))
	}
	go o.carry() // not before: a pipe without a writer is at its end
	return o, os.NewFile(uintptr(fd), to.pipe), nil
}

// takeOutlet carries on from the pipe of a program that runs.
func takeOutlet(to print, carried func()) (*outlet, error) {
	o, err := openOutlet(to, carried)
	if err != nil {
		return nil, err
	}
	go o.carry()
	return o, nil
}

func openOutlet(to print, carried func()) (_ *outlet, err error) {
	o := &outlet{carried: carried, quit: make(chan struct{}), done: make(chan struct{})}
	if o.file, err = os.OpenFile(to.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	if to.stamped {
		if o.times, err = os.OpenFile(to.path+vmm.TimesSuffix, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600); err != nil {
			return nil, errors.Join(err, o.closeFiles())
		}
	}
	if o.pipe, err = os.OpenFile(to.pipe, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("open pipe: %w", err), o.closeFiles())
	}
	return o, nil
}

func (o *outlet) closeFiles() (err error) {
	for _, f := range []*os.File{o.file, o.times, o.pipe} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return err
}

// carry ends when the program has ended or close is called.
func (o *outlet) carry() {
	defer close(o.done)
	defer func() { _ = o.closeFiles() }()
	pace := time.NewTimer(0)
	defer pace.Stop()
	buf := make([]byte, outletBytes)
	for {
		select {
		case <-pace.C:
		case <-o.quit:
			return
		}
		n, err := o.pipe.Read(buf)
		if n > 0 {
			o.write(buf[:n])
		}
		if err != nil {
			return
		}
		if n == len(buf) {
			pace.Reset(floodPace)
		} else {
			pace.Reset(outletPace)
		}
	}
}

// write carries what was read into the file. What the disk does not take is lost, as it
// is without an agent.
func (o *outlet) write(data []byte) {
	_, _ = o.file.Write(data)
	o.stamp()
	if cut, _ := trim(o.file.Name(), vmm.MaxConsoleBytes); cut > 0 {
		o.moveStamps(cut)
	}
	if o.carried != nil {
		o.carried()
	}
}

// maxStampsBytes is the size at which every second stamp of a console is dropped: the
// lines between get the time of the next.
const maxStampsBytes = 512 << 10

// stamp notes when the console had grown to its present size.
func (o *outlet) stamp() {
	if o.times == nil {
		return
	}
	info, err := o.file.Stat()
	if err != nil {
		return
	}
	_, _ = o.times.Write(vmm.Stamp{Size: info.Size(), At: time.Now()}.Append(nil))
	info, err = o.times.Stat()
	if err != nil {
		return
	}
	if torn := info.Size() % vmm.StampBytes; torn != 0 { // the disk was full
		_ = o.times.Truncate(info.Size() - torn)
	}
	if info.Size() > maxStampsBytes {
		o.rewriteStamps(func(stamps []vmm.Stamp) (kept []vmm.Stamp) {
			for i := len(stamps) - 1; i >= 0; i -= 2 {
				kept = append(kept, stamps[i])
			}
			slices.Reverse(kept)
			return kept
		})
	}
}

// moveStamps takes so many bytes at the beginning off all stamps.
func (o *outlet) moveStamps(bytes int64) {
	if o.times == nil {
		return
	}
	o.rewriteStamps(func(stamps []vmm.Stamp) (kept []vmm.Stamp) {
		for _, s := range stamps {
			if s.Size -= bytes; s.Size > 0 {
				kept = append(kept, s)
			}
		}
		return kept
	})
}

// rewriteStamps replaces the stamps. Without that, which a crash or a full disk may
// bring about, lines have the time of later ones.
func (o *outlet) rewriteStamps(change func([]vmm.Stamp) []vmm.Stamp) {
	data, err := vmm.Tail(o.times.Name(), 2*maxStampsBytes)
	if err != nil {
		return
	}
	var text []byte
	for _, s := range change(vmm.ParseStamps(data)) {
		text = s.Append(text)
	}
	if o.times.Truncate(0) == nil {
		_, _ = o.times.Write(text)
	}
}

// drain returns when all that a program printed, which has ended, is in the file.
func (o *outlet) drain() {
	// The pipe is at its end when no process has it open. Another process than
	// the program might, so the wait is bounded.
	_ = o.pipe.SetReadDeadline(time.Now().Add(time.Second))
	<-o.done
}

// close ends carry and leaves the rest of the output to the next agent.
func (o *outlet) close() {
	close(o.quit)
	_ = o.pipe.SetReadDeadline(time.Unix(1, 0))
	<-o.done
}

const trimmedMarker = "[earlier output was cut]\n"

// trim cuts a file that has grown beyond limit to its last half, from the beginning
// of a line where there is one, and returns by how much the file has become shorter. A
// program that appends to the file (O_APPEND) goes on undisturbed; what the program
// writes during the cut may be lost, or stand before what was kept. No file is no error.
func trim(path string, limit int64) (cut int64, err error) {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) || err == nil && info.Size() <= limit {
		return 0, nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return 0, fmt.Errorf("trim: %w", err)
	}
	defer f.Close()
	kept, err := vmm.Tail(path, limit/2)
	if err != nil {
		return 0, fmt.Errorf("trim: %w", err)
	}
	if i := bytes.IndexByte(kept[:min(len(kept), 4096)], '\n'); i >= 0 {
		kept = kept[i+1:]
	}
	if err := f.Truncate(0); err != nil {
		return 0, fmt.Errorf("trim: %w", err)
	}
	n, err := f.Write(append([]byte(trimmedMarker), kept...))
	if err != nil {
		return 0, fmt.Errorf("trim: %w", err)
	}
	return info.Size() - int64(n), nil
}
