package launch

import (
	"bytes"
	"errors"
	"fmt"
	"os"
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
// that file within its bound, so that a program cannot fill a disk. While no agent
// reads, the pipe holds 64 KiB of the output and the rest is lost: the program
// does not wait for a reader.
type outlet struct {
	file    *os.File
	pipe    *os.File
	carried func()        // called after a write into the file; may be nil
	quit    chan struct{} // closed by close
	done    chan struct{} // closed when carry has ended
}

// makeOutlet makes the pipe and returns the end that the program writes to,
// which the caller closes.
func makeOutlet(pipe, path string, carried func()) (*outlet, *os.File, error) {
	if err := os.Remove(pipe); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, nil, err
	}
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		return nil, nil, fmt.Errorf("make pipe: %w", err)
	}
	o, err := openOutlet(pipe, path, carried)
	if err != nil {
		return nil, nil, errors.Join(err, os.Remove(pipe))
	}
	// The pipe does not block the program either.
	fd, err := unix.Open(pipe, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open pipe: %w", err), o.pipe.Close(), o.file.Close(), os.Remove(pipe))
	}
	go o.carry() // not before: a pipe without a writer is at its end
	return o, os.NewFile(uintptr(fd), pipe), nil
}

// takeOutlet carries on from the pipe of a program that runs.
func takeOutlet(pipe, path string, carried func()) (*outlet, error) {
	o, err := openOutlet(pipe, path, carried)
	if err != nil {
		return nil, err
	}
	go o.carry()
	return o, nil
}

func openOutlet(pipe, path string, carried func()) (*outlet, error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	in, err := os.OpenFile(pipe, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open pipe: %w", err), file.Close())
	}
	return &outlet{file: file, pipe: in, carried: carried, quit: make(chan struct{}), done: make(chan struct{})}, nil
}

// carry ends when the program has ended or close is called.
func (o *outlet) carry() {
	defer close(o.done)
	defer o.pipe.Close()
	defer o.file.Close()
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
			// What the disk does not take is lost, as it is without an agent.
			_, _ = o.file.Write(buf[:n])
			_ = trim(o.file.Name(), vmm.MaxConsoleBytes)
			if o.carried != nil {
				o.carried()
			}
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
// of a line where there is one. A program that appends to the file (O_APPEND) goes
// on undisturbed; what the program writes during the cut may be lost, or stand
// before what was kept. No file is no error.
func trim(path string, limit int64) error {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) || err == nil && info.Size() <= limit {
		return nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return fmt.Errorf("trim: %w", err)
	}
	defer f.Close()
	kept, err := vmm.Tail(path, limit/2)
	if err != nil {
		return fmt.Errorf("trim: %w", err)
	}
	if i := bytes.IndexByte(kept[:min(len(kept), 4096)], '\n'); i >= 0 {
		kept = kept[i+1:]
	}
	if err := f.Truncate(0); err != nil {
		return fmt.Errorf("trim: %w", err)
	}
	if _, err := f.Write(append([]byte(trimmedMarker), kept...)); err != nil {
		return fmt.Errorf("trim: %w", err)
	}
	return nil
}
