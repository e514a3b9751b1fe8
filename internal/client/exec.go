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
	// termGrace is what a command gets between SIGTERM and SIGKILL, and what a guest
	// gets for its answer after ctx has ended.
	termGrace = 2 * time.Second
)

var (
	// errNoStart is why a connection ends whose guest did not start the command in
	// time, errLeft why it ends after ctx.
	errNoStart = errors.New("the command did not start in time")
	errLeft    = errors.New("the caller has left")
	// errGoesOn is why a connection to a command ends that goes on without it.
	errGoesOn = errors.New("the command goes on")
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
	// OutOfMemory, if not nil, is called before Exec returns when the guest's kernel
	// killed a process of the command because there was no memory. limit is how much the
	// programs of the sandbox may take together, in MiB; 0 if it is not known.
	OutOfMemory func(limit int)
	// StartWithin bounds the wait for the guest's word that the command has started;
	// 0 is no bound.
	StartWithin time.Duration

	// pid, if not 0, is of a process that runs, or has ended, to which Attach connects.
	pid uint32
	// detached leaves the command when it has started, held tells what of its output is
	// held and leaves it then.
	detached, held bool
}

// StartError is the guest's own word that a command cannot be started.
type StartError struct {
	// Status is what shells exit with then: 127 if the program does not exist,
	// 126 if it cannot be executed.
	Status int
	err    error
}

// Missing reports whether err says that a program does not exist.
func Missing(err error) bool {
	var start *StartError
	return errors.As(err, &start) && start.Status == errhttp.OfClass(errdefs.NotFound).NotStarted
}

func (e *StartError) Error() string { return e.err.Error() }
func (e *StartError) Unwrap() error { return e.err }

// Exec runs a command in the sandbox to its end and returns its exit status as
// shells count it: 128+N for a command that signal N ended. When ctx ends, the
// command gets SIGTERM and then SIGKILL, its end is awaited, and the error is the
// cause of ctx; a guest that does not say so in time is left. A read from
// Stdin may still be under way when Exec returns, and after the end of ctx a write of
// output: nothing can interrupt them. A command that cannot be started is a
// *StartError.
func (s *Sandbox) Exec(ctx context.Context, cmd Command) (status int, err error) {
	status, _, err = s.execute(ctx, cmd)
	return status, err
}

// execute is Exec that also returns the PID.
func (s *Sandbox) execute(ctx context.Context, cmd Command) (status int, pid uint32, err error) {
	// The stream outlives ctx, to see the end of an interrupted command.
	life, hangUp := context.WithCancelCause(context.WithoutCancel(ctx))
	defer hangUp(nil)
	x := &execution{
		Command: cmd, attached: cmd.pid != 0, guest: s.processes(cmd.User), grace: s.host.grace,
		life: life, hangUp: hangUp, started: make(chan struct{}),
	}
	defer context.AfterFunc(ctx, func() { x.awaitStart(x.grace, errLeft) })()
	if cmd.StartWithin > 0 {
		go x.awaitStart(cmd.StartWithin, errNoStart)
	}
	end, err := x.outcome(ctx)
	cause, why := context.Cause(ctx), context.Cause(life)
	switch {
	case cause != nil && end == nil && errors.Is(why, errLeft):
		return 0, 0, fmt.Errorf("sandbox %s does not say that the command has ended; it may run on: %w", s.ID, cause)
	case cause != nil:
		return 0, 0, cause
	case errors.Is(why, errNoStart):
		return 0, 0, errdefs.TimedOut.Errorf("sandbox %s did not start the command within %v; it may do so later", s.ID, cmd.StartWithin)
	case err != nil:
		return 0, 0, s.broken(ctx, err)
	case end == nil: // it was left
		return 0, x.pid, nil
	}
	if killed, limit := guest.OutOfMemory(end); killed && cmd.OutOfMemory != nil {
		cmd.OutOfMemory(limit)
	}
	status, err = guest.ExitCode(end)
	return status, x.pid, err
}

// Shell runs a login shell in the sandbox, bash or else sh, connected as cmd
// says.
func (s *Sandbox) Shell(ctx context.Context, cmd Command) (status int, err error) {
	for _, shell := range []string{"bash", "sh"} {
		cmd.Cmd, cmd.Args = shell, []string{"-l"}
		status, err = s.Exec(ctx, cmd)
		if !Missing(err) {
			break
		}
	}
	return status, err
}

// execution is a command that runs.
type execution struct {
	Command
	guest processconnect.ProcessClient
	// attached: the command was started by another call.
	attached bool
	life     context.Context // of the connection
	hangUp   func(why error) // ends it
	grace    time.Duration   // between SIGTERM and SIGKILL

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
	switch {
	case x.Tied:
		req.Header().Set(guestapi.HeaderLifetime, guestapi.LifetimeStream)
	case x.detached:
		req.Header().Set(guestapi.HeaderLifetime, guestapi.LifetimeDetached)
	}
	return req
}

// awaitStart ends the connection if the command has not started within limit. After
// the end of ctx the guest still gets some time: a command that has not started
// cannot be asked to end, and one that starts later runs on without its caller.
func (x *execution) awaitStart(limit time.Duration, why error) {
	select {
	case <-x.life.Done():
	case <-x.started:
	case <-time.After(limit):
		x.hangUp(why)
	}
}

// outcome is what run returns. It does not wait for a write of output that blocks
// after the connection has been given up.
func (x *execution) outcome(ctx context.Context) (*process.ProcessEvent_EndEvent, error) {
	var end *process.ProcessEvent_EndEvent
	var err error
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		end, err = x.run(ctx)
	}()
	select {
	case <-returned:
		return end, err
	case <-x.life.Done():
	}
	var late <-chan time.Time
	if why := context.Cause(x.life); !errors.Is(why, context.Canceled) {
		late = time.After(x.grace / 4)
	}
	select {
	case <-returned:
		return end, err
	case <-late:
		return nil, context.Cause(x.life)
	}
}

// run starts the command and passes its output on until it ends.
func (x *execution) run(ctx context.Context) (*process.ProcessEvent_EndEvent, error) {
	events, err := x.open()
	if err != nil {
		return nil, err
	}
	defer events.Close()
	defer x.hangUp(nil) // Close reads what is left of the stream
	more := x.untilIdle()
	for events.Receive() {
		more()
		switch event := events.event().GetEvent().(type) {
		case *process.ProcessEvent_Start:
			if x.self != nil {
				continue
			}
			x.pid = event.Start.Pid
			x.self = &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: event.Start.Pid}}
			close(x.started)
			if x.detached {
				return nil, nil
			}
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
	case x.held && x.self != nil && (err == nil || errors.Is(context.Cause(x.life), errGoesOn)):
		return nil, nil
	case err == nil:
		return nil, errors.New("the stream ended before the command did; whether it still runs is unknown")
	case x.attached && x.self == nil:
		return nil, notCommand(x.pid, err)
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
	keepRunning := context.AfterFunc(ctx, x.leave)
	if x.Stdin != nil {
		go x.feed()
	}
	return func() {
		keepRunning()
		x.hangUp(nil)
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
	defer x.hangUp(errLeft)
	grace := x.grace
	for _, signal := range []process.Signal{process.Signal_SIGNAL_SIGTERM, process.Signal_SIGNAL_SIGKILL} {
		step, cancel := context.WithTimeout(x.life, grace)
		_, err := x.guest.SendSignal(step, connect.NewRequest(&process.SendSignalRequest{Process: x.self, Signal: signal}))
		<-step.Done()
		cancel()
		if x.life.Err() != nil { // the end was seen
			return
		}
		if err != nil { // the guest does not answer: SIGKILL is on its way, no more
			grace /= 4
		}
	}
}
