package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/term"

	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs/errhttp"
)

const (
	// inputSize is how much of stdin travels at once.
	inputSize = 32 << 10
	// startGraces is how many times termGrace a guest gets to start a command
	// after an interrupt, so that it can be ended.
	startGraces = 5
)

// notFoundStatus is the exit status for a command that the sandbox does not have.
var notFoundStatus = errhttp.OfClass(errdefs.NotFound).NotStarted

// termGrace is what a command gets between SIGTERM and SIGKILL. Tests shorten it.
var termGrace = 2 * time.Second

// session is one command in a sandbox and what it is connected to here.
type session struct {
	config *process.ProcessConfig
	user   string // empty: the sandbox's default
	// tied ends the command and its descendants when the connection does.
	tied bool
	// stdin is nil for none. With a terminal it is that terminal, and so is
	// all output.
	stdin          io.Reader
	stdout, stderr io.Writer
	terminal       *os.File
}

// run runs a command in a sandbox and returns its exit status. When ctx ends
// the command is asked to end, then killed; a signal that ended ctx is the
// status, as shells count it. A read from stdin that is under way then is not
// waited for: nothing can interrupt it.
func (c *client) run(ctx context.Context, id string, s *session) (int, error) {
	guest := c.processes(id, s.user)
	// Not ctx itself: the end of the stream is awaited after an interrupt, too.
	life, hangUp := context.WithCancel(context.WithoutCancel(ctx))
	defer hangUp()
	hasInput := s.stdin != nil
	req := connect.NewRequest(&process.StartRequest{Process: s.config, Stdin: &hasInput})
	if s.terminal != nil {
		req.Msg.Pty = &process.PTY{Size: terminalSize(s.terminal)}
	}
	if s.tied {
		req.Header().Set("Wrenn-Process-Lifetime", "stream")
	}
	// What a guest has not started yet cannot be asked to end. It gets some time
	// to start it, so that nothing runs on that nobody asked for any more.
	begun := make(chan struct{})
	defer context.AfterFunc(ctx, func() {
		select {
		case <-life.Done():
		case <-begun:
		case <-time.After(startGraces * termGrace):
			hangUp()
		}
	})()
	events, err := guest.Start(life, req)
	if err != nil {
		return 0, err
	}
	defer events.Close()

	started := false
	for events.Receive() {
		switch event := events.Msg().GetEvent().GetEvent().(type) {
		case *process.ProcessEvent_Start:
			if started {
				continue
			}
			started = true
			close(begun)
			self := &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: event.Start.Pid}}
			if s.terminal != nil {
				restore, err := rawTerminal(s.terminal)
				if err != nil {
					return 0, err
				}
				defer restore()
				// A second signal ends us at once.
				defer context.AfterFunc(ctx, restore)()
				var resizing sync.WaitGroup
				resizing.Go(func() { followSize(life, s.terminal, guest, self) })
				defer resizing.Wait()
				defer hangUp()
			}
			defer context.AfterFunc(ctx, func() { interrupt(life, guest, self, hangUp) })()
			if s.stdin != nil {
				go feed(life, guest, self, s.stdin, s.terminal != nil)
			}
		case *process.ProcessEvent_Data:
			if err := s.write(event.Data); err != nil {
				return 0, fmt.Errorf("write output: %w", err)
			}
		case *process.ProcessEvent_End:
			if status, ok := signalled(ctx); ok {
				return status, nil
			}
			return exitStatus(event.End)
		}
	}
	err = events.Err()
	if status, ok := signalled(ctx); ok {
		return status, nil
	}
	switch {
	case err == nil:
		return 0, errors.New("the stream ended before the command did; whether it still runs is unknown")
	case started || !connect.IsWireError(err):
		return 0, err
	}
	// The guest's own word on why it did not start.
	if status := errhttp.OfCode(connect.CodeOf(err)).NotStarted; status != 1 {
		return 0, &statusError{status, err}
	}
	return 0, err
}

func (s *session) write(data *process.ProcessEvent_DataEvent) error {
	out, text := s.stdout, data.GetStdout()
	if pty := data.GetPty(); len(pty) > 0 {
		text = pty
	}
	if stderr := data.GetStderr(); len(stderr) > 0 {
		out, text = s.stderr, stderr
	}
	_, err := out.Write(text)
	return err
}

// feed sends what it reads to a process, in order, and then the end of it. That
// a process takes no more is no error: the end of the process says what was.
func feed(ctx context.Context, guest processconnect.ProcessClient, self *process.ProcessSelector, from io.Reader, terminal bool) {
	stream := guest.StreamInput(ctx)
	err := stream.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Start{
		Start: &process.StreamInputRequest_StartEvent{Process: self},
	}})
	buf := make([]byte, inputSize)
	for err == nil {
		var n int
		n, err = from.Read(buf)
		if n == 0 {
			continue
		}
		input := &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: buf[:n]}}
		if terminal {
			input.Input = &process.ProcessInput_Pty{Pty: buf[:n]}
		}
		if serr := stream.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Data{
			Data: &process.StreamInputRequest_DataEvent{Input: input},
		}}); serr != nil {
			err = serr
		}
	}
	_, _ = stream.CloseAndReceive()
	if !terminal {
		_, _ = guest.CloseStdin(ctx, connect.NewRequest(&process.CloseStdinRequest{Process: self}))
	}
}

// interrupt asks a process to end, then insists, then leaves.
func interrupt(ctx context.Context, guest processconnect.ProcessClient, self *process.ProcessSelector, hangUp func()) {
	defer hangUp()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, signal := range []process.Signal{process.Signal_SIGNAL_SIGTERM, process.Signal_SIGNAL_SIGKILL} {
		_, _ = guest.SendSignal(ctx, connect.NewRequest(&process.SendSignalRequest{Process: self, Signal: signal}))
		select {
		case <-ctx.Done(): // the end was seen
			return
		case <-time.After(termGrace):
		}
	}
}

// rawTerminal hands every key on as it is, until restored. Restoring again
// does nothing.
func rawTerminal(f *os.File) (restore func(), err error) {
	fd := int(f.Fd())
	before, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fmt.Errorf("prepare the terminal: %w", err)
	}
	return sync.OnceFunc(func() { _ = term.Restore(fd, before) }), nil
}

func terminalSize(f *os.File) *process.PTY_Size {
	cols, rows, err := term.GetSize(int(f.Fd()))
	if err != nil || cols <= 0 || rows <= 0 {
		cols, rows = 80, 24
	}
	return &process.PTY_Size{Cols: uint32(cols), Rows: uint32(rows)}
}

// followSize keeps a process's terminal as large as ours until ctx ends.
func followSize(ctx context.Context, f *os.File, guest processconnect.ProcessClient, self *process.ProcessSelector) {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	defer signal.Stop(changed)
	for {
		// At first, too: it may have changed while the command started.
		_, _ = guest.Update(ctx, connect.NewRequest(&process.UpdateRequest{Process: self, Pty: &process.PTY{Size: terminalSize(f)}}))
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}
