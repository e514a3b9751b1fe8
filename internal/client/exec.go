package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs/errhttp"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const (
	// inputSize is how much of stdin travels at once.
	inputSize = 32 << 10
	// termGrace is what a command gets between SIGTERM and SIGKILL.
	termGrace = 2 * time.Second
	// startGraces is how many times termGrace a guest gets to start a command
	// after ctx has ended, so that the command can be ended.
	startGraces = 5
	// interruptTimeout bounds all that is tried to end a command.
	interruptTimeout = 10 * time.Second
)

// Command is a command to be run in a sandbox, and what it is connected to.
type Command struct {
	Cmd  string
	Args []string
	Env  map[string]string
	// Cwd and User default to the sandbox's.
	Cwd  string
	User string
	// Tied ends the command and its descendants when the connection ends.
	Tied bool
	// Stdin is nil for none.
	Stdin io.Reader
	// Stdout and Stderr get the bytes that the command writes; nil drops them.
	Stdout, Stderr io.Writer
	// Terminal, if not nil, is a terminal of this machine that the command runs in.
	// Stdin is that terminal too, and all output goes to Stdout. It hands on every
	// key as it is until Exec returns.
	Terminal *os.File
}

// StartError is the guest's own word that a command cannot be started.
type StartError struct {
	// Status is what shells exit with then: 127 if the program does not exist,
	// 126 if it cannot be executed.
	Status int
	err    error
}

// missing reports whether err says that a program does not exist.
func missing(err error) bool {
	var start *StartError
	return errors.As(err, &start) && start.Status == errhttp.OfClass(errdefs.NotFound).NotStarted
}

func (e *StartError) Error() string { return e.err.Error() }
func (e *StartError) Unwrap() error { return e.err }

// Exec runs a command in the sandbox to its end and returns its exit status as
// shells count it: 128+N for a command that signal N ended. When ctx ends, the
// command gets SIGTERM and then SIGKILL, its end is awaited, and the error is the
// cause of ctx. A read from Stdin may still be under way when Exec returns:
// nothing can interrupt it. A command that cannot be started is a *StartError.
func (s *Sandbox) Exec(ctx context.Context, cmd Command) (status int, err error) {
	// The stream outlives ctx, to see the end of an interrupted command.
	life, hangUp := context.WithCancel(context.WithoutCancel(ctx))
	defer hangUp()
	x := &execution{
		Command: cmd, guest: s.processes(cmd.User), grace: s.host.grace,
		life: life, hangUp: hangUp, started: make(chan struct{}),
	}
	defer context.AfterFunc(ctx, x.awaitStart)()
	end, err := x.run(ctx)
	if cause := context.Cause(ctx); cause != nil {
		return 0, cause
	}
	if err != nil {
		return 0, err
	}
	return guest.ExitCode(end)
}

// Shell runs a login shell in the sandbox, bash or else sh, connected as cmd
// says.
func (s *Sandbox) Shell(ctx context.Context, cmd Command) (status int, err error) {
	for _, shell := range []string{"bash", "sh"} {
		cmd.Cmd, cmd.Args = shell, []string{"-l"}
		status, err = s.Exec(ctx, cmd)
		if !missing(err) {
			break
		}
	}
	return status, err
}

// execution is a command that runs.
type execution struct {
	Command
	guest  processconnect.ProcessClient
	life   context.Context // of the connection
	hangUp func()          // ends it
	grace  time.Duration   // between SIGTERM and SIGKILL

	started chan struct{}            // closed when self is known
	self    *process.ProcessSelector // nil until then
}

// request is the call that starts the command.
func (x *execution) request() *connect.Request[process.StartRequest] {
	hasInput := x.Stdin != nil
	req := connect.NewRequest(&process.StartRequest{
		Process: &process.ProcessConfig{Cmd: x.Cmd, Args: x.Args, Envs: x.Env}, Stdin: &hasInput,
	})
	if x.Cwd != "" {
		req.Msg.Process.Cwd = &x.Cwd
	}
	if x.Terminal != nil {
		req.Msg.Pty = &process.PTY{Size: terminalSize(x.Terminal)}
	}
	if x.Tied {
		req.Header().Set(guestapi.HeaderLifetime, guestapi.LifetimeStream)
	}
	return req
}

// awaitStart gives a guest some time to start the command after ctx has ended.
// A command that is not started yet cannot be asked to end, and one that starts
// later would run on although its caller is gone.
func (x *execution) awaitStart() {
	select {
	case <-x.life.Done():
	case <-x.started:
	case <-time.After(startGraces * x.grace):
		x.hangUp()
	}
}

// run starts the command and passes its output on until it ends.
func (x *execution) run(ctx context.Context) (*process.ProcessEvent_EndEvent, error) {
	events, err := x.guest.Start(x.life, x.request())
	if err != nil {
		return nil, err
	}
	defer events.Close()
	for events.Receive() {
		switch event := events.Msg().GetEvent().GetEvent().(type) {
		case *process.ProcessEvent_Start:
			if x.self != nil {
				continue
			}
			x.self = &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: event.Start.Pid}}
			close(x.started)
			disconnect, err := x.connect(ctx)
			if err != nil {
				return nil, err
			}
			defer disconnect()
		case *process.ProcessEvent_Data:
			if err := x.write(event.Data); err != nil {
				return nil, fmt.Errorf("write output: %w", err)
			}
		case *process.ProcessEvent_End:
			return event.End, nil
		}
	}
	err = events.Err()
	switch {
	case err == nil:
		return nil, errors.New("the stream ended before the command did; whether it still runs is unknown")
	case x.self != nil || !connect.IsWireError(err):
		return nil, err
	}
	if status := errhttp.OfCode(connect.CodeOf(err)).NotStarted; status != errhttp.NotTheCommand {
		return nil, &StartError{status, err}
	}
	return nil, err
}

// connect connects the terminal, stdin and the end of ctx to the command that
// has started. disconnect ends the connection to the guest too.
func (x *execution) connect(ctx context.Context) (disconnect func(), err error) {
	restore := func() {}
	var resizing sync.WaitGroup
	if x.Terminal != nil {
		if restore, err = rawTerminal(x.Terminal); err != nil {
			return nil, err
		}
		resizing.Go(x.followSize)
	}
	// A second signal may end this program at once: the terminal is restored at the first.
	keepRaw := context.AfterFunc(ctx, restore)
	keepRunning := context.AfterFunc(ctx, x.interrupt)
	if x.Stdin != nil {
		go x.feed()
	}
	return func() {
		keepRunning()
		x.hangUp()
		resizing.Wait()
		keepRaw()
		restore()
	}, nil
}

func (x *execution) write(data *process.ProcessEvent_DataEvent) error {
	out, text := x.Stdout, data.GetStdout()
	if pty := data.GetPty(); len(pty) > 0 {
		text = pty
	}
	if stderr := data.GetStderr(); len(stderr) > 0 {
		out, text = x.Stderr, stderr
	}
	if out == nil {
		return nil
	}
	_, err := out.Write(text)
	return err
}

// feed sends Stdin to the command, in order, and then its end. That the command
// takes no more is no error: its exit status says how it ended.
func (x *execution) feed() {
	stream := x.guest.StreamInput(x.life)
	err := stream.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Start{
		Start: &process.StreamInputRequest_StartEvent{Process: x.self},
	}})
	buf := make([]byte, inputSize)
	for err == nil {
		var n int
		n, err = x.Stdin.Read(buf)
		if n == 0 {
			continue
		}
		input := &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: buf[:n]}}
		if x.Terminal != nil {
			input.Input = &process.ProcessInput_Pty{Pty: buf[:n]}
		}
		if serr := stream.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Data{
			Data: &process.StreamInputRequest_DataEvent{Input: input},
		}}); serr != nil {
			err = serr
		}
	}
	_, _ = stream.CloseAndReceive()
	if x.Terminal == nil {
		_, _ = x.guest.CloseStdin(x.life, connect.NewRequest(&process.CloseStdinRequest{Process: x.self}))
	}
}

// interrupt sends SIGTERM, then SIGKILL, then hangs up.
func (x *execution) interrupt() {
	defer x.hangUp()
	ctx, cancel := context.WithTimeout(x.life, interruptTimeout)
	defer cancel()
	for _, signal := range []process.Signal{process.Signal_SIGNAL_SIGTERM, process.Signal_SIGNAL_SIGKILL} {
		_, _ = x.guest.SendSignal(ctx, connect.NewRequest(&process.SendSignalRequest{Process: x.self, Signal: signal}))
		select {
		case <-ctx.Done(): // the end was seen
			return
		case <-time.After(x.grace):
		}
	}
}
