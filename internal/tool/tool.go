// Package tool runs the programs of the host that Wrenn needs, such as apt and
// mke2fs.
package tool

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Command is one run of a tool. The tool ends with this process and with ctx.
// As root it runs in mount and process namespaces of its own: all that it
// started ends with it, even when this process is killed, and no other process
// sees what it mounts.
type Command struct {
	Name string
	Args []string
	Dir  string
	Env  []string // added to a plain environment
	// OnLine gets each line of output; called from one goroutine at a time.
	OnLine func(line string)
	// OnStatus gets each line written to file descriptor 3.
	OnStatus func(line string)
}

// Output runs the command and returns its standard output. A tool that is not
// installed is errdefs.Unavailable, a full disk errdefs.Exhausted.
func (c Command) Output(ctx context.Context) (string, error) {
	path, err := Find(c.Name)
	if err != nil {
		return "", err
	}
	var stdout bytes.Buffer
	out := &lineWriter{onLine: c.OnLine}
	cmd := exec.CommandContext(ctx, path, c.Args...)
	cmd.Dir = c.Dir
	// Proxies come from the caller's environment, language and dialogues do not.
	cmd.Env = append(os.Environ(), "LC_ALL=C", "LANGUAGE=", "DEBIAN_FRONTEND=noninteractive",
		"PATH="+Path)
	cmd.Env = append(cmd.Env, c.Env...)
	cmd.Stdout = &stdout
	if c.OnLine != nil {
		cmd.Stdout = io.MultiWriter(&stdout, out)
	}
	cmd.Stderr = out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS // Go makes it private, too
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// A descendant that keeps the pipe open does not delay the return.
	cmd.WaitDelay = 5 * time.Second

	statusDone := make(chan struct{})
	var statusRead, statusWrite *os.File
	if c.OnStatus != nil {
		r, w, err := os.Pipe()
		if err != nil {
			return "", fmt.Errorf("run %s: %w", c.Name, err)
		}
		defer r.Close()
		cmd.ExtraFiles = []*os.File{w}
		statusRead, statusWrite = r, w
		go func() {
			defer close(statusDone)
			for sc := bufio.NewScanner(r); sc.Scan(); {
				c.OnStatus(sc.Text())
			}
		}()
	} else {
		close(statusDone)
	}

	// The parent-death signal comes when the starting thread ends, so that
	// thread is kept until the command is done.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = cmd.Start()
	if statusWrite != nil {
		statusWrite.Close()
	}
	if err == nil {
		err = cmd.Wait()
	}
	if statusRead != nil {
		// The tool's last lines are read; a descendant that keeps the pipe open
		// does not delay the return.
		statusRead.SetReadDeadline(time.Now().Add(time.Second))
	}
	<-statusDone
	out.flush()
	if err == nil {
		return stdout.String(), nil
	}
	if ctx.Err() != nil {
		return "", fmt.Errorf("run %s: %w", c.Name, context.Cause(ctx))
	}
	said := out.tail()
	for _, full := range []string{"No space left on device", "enough free space", "ENOSPC"} {
		if strings.Contains(said, full) {
			return "", errdefs.Exhausted.Errorf("run %s: the disk is full: %s", c.Name, said)
		}
	}
	return "", fmt.Errorf("run %s: %w: %s", c.Name, err, said)
}

// Run is Output without the output.
func (c Command) Run(ctx context.Context) error {
	_, err := c.Output(ctx)
	return err
}

// Path is where an administrator's tools are; a user's PATH often lacks
// the sbin directories.
const Path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Find returns the absolute path of a program in Path. One that is not
// installed is errdefs.Unavailable.
func Find(name string) (string, error) {
	for dir := range strings.SplitSeq(Path, ":") {
		path := filepath.Join(dir, name)
		if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return path, nil
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("find %s: %w", name, err)
		}
	}
	return "", errdefs.Unavailable.Errorf("%s is not installed", name)
}

// lineWriter hands out complete lines and keeps the last few. Two streams may
// write to it.
type lineWriter struct {
	mu     sync.Mutex
	onLine func(string)
	part   []byte
	last   []string
}

const keptLines = 8

func (w *lineWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.part = append(w.part, b...)
	for {
		i := bytes.IndexAny(w.part, "\r\n")
		if i < 0 {
			// A line without an end must not fill the memory.
			if len(w.part) > 1<<16 {
				w.line(string(w.part))
				w.part = nil
			}
			return len(b), nil
		}
		w.line(string(w.part[:i]))
		w.part = append(w.part[:0], w.part[i+1:]...)
	}
}

// flush takes an unfinished last line for a line.
func (w *lineWriter) flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.line(string(w.part))
	w.part = nil
}

func (w *lineWriter) line(s string) {
	if s = strings.TrimSpace(s); s == "" {
		return
	}
	if w.last = append(w.last, s); len(w.last) > keptLines {
		w.last = w.last[1:]
	}
	if w.onLine != nil {
		w.onLine(s)
	}
}

func (w *lineWriter) tail() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.last, "; ")
}
