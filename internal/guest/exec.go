package guest

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const (
	// DefaultMaxOutput is Command.MaxOutput if that is zero.
	DefaultMaxOutput = 1 << 20
	// endSlack is how much longer than the command's time limit Exec waits
	// for the guest to say that the command has ended.
	endSlack = 10 * time.Second
)

// Command is a command that Exec runs to its end.
type Command struct {
	Cmd  string
	Args []string
	Env  map[string]string
	// Cwd and User default to those of Init.
	Cwd  string
	User string
	// Timeout ends the command with all its descendants; zero means never.
	Timeout time.Duration
	// MaxOutput bounds the bytes kept of each stream; zero means
	// DefaultMaxOutput.
	MaxOutput int
	// Output, if not nil, gets what the command writes as it comes, and before Exec
	// returns; Result then has none of it. data is valid until Output returns. MaxOutput,
	// if not zero, bounds both streams together.
	Output func(stderr bool, data []byte)
	// Whole ends what the command leaves in the background with the command.
	Whole bool
}

// Result is the outcome of a command.
type Result struct {
	// Stdout and Stderr end with a line that counts the missing bytes when
	// there were more than Command.MaxOutput.
	Stdout, Stderr []byte
	// ExitCode is the exit status, or 128+N for a command that signal N
	// ended.
	ExitCode int
	// Signal is the signal that ended the command; 0 if none did.
	Signal syscall.Signal
	// OutOfMemory says that the guest's kernel killed a process of the command
	// because there was no memory.
	OutOfMemory bool
	// MemoryLimit is how much the programs of the guest may take together, in MiB, as
	// the guest tells it with OutOfMemory; 0 if it does not.
	MemoryLimit int
	// Detail is what the guest says about an end other than exit status 0:
	// "signal: killed", "out of memory: signal: killed".
	Detail string
}

// Exec runs a command in the guest, without input, and returns when it has
// ended; descendants that it leaves in the background live on. When Timeout
// passes, the command and its descendants are ended before Exec returns
// errdefs.TimedOut, with what was written until then in Result. They are ended
// as well when ctx is cancelled or the host dies. A program that does not
// exist is errdefs.NotFound, a request that cannot be carried out
// errdefs.InvalidArgument. A guest that dies or falls silent is
// errdefs.Unavailable.
func (c *Client) Exec(ctx context.Context, cmd Command) (Result, error) {
	limit := cmd.MaxOutput
	if limit <= 0 {
		limit = DefaultMaxOutput
	}
	// The guest keeps the time limit, because it knows when the command has
	// ended: the limit is in the header only. The end of ctx cancels.
	ctx, cancel := stopWith(ctx, cmd.Timeout)
	defer cancel()

	req := cmd.request()
	req.Header().Set(guestapi.HeaderLifetime, guestapi.LifetimeStream)
	if cmd.Whole {
		req.Header().Set(guestapi.HeaderLifetime, guestapi.LifetimeCommand)
	}
	if cmd.Timeout > 0 {
		millis := min(max(cmd.Timeout.Milliseconds(), 1), 9_999_999_999)
		req.Header().Set("Connect-Timeout-Ms", strconv.FormatInt(millis, 10))
	}

	out, errOut := &capture{limit: limit, name: "stdout"}, &capture{limit: limit, name: "stderr"}
	output := bounded(cmd.Output, cmd.MaxOutput)
	if output == nil {
		output = func(stderr bool, data []byte) {
			if stderr {
				errOut.write(data)
			} else {
				out.write(data)
			}
		}
	}
	end, err := c.follow(ctx, req, func() {}, output)
	result := Result{Stdout: out.bytes(), Stderr: errOut.bytes(), ExitCode: -1}
	if err != nil {
		return result, execError(ctx, cmd, err)
	}
	return result, result.ended(end)
}

// bounded is an output that gets no more than limit bytes, if that is not zero, and is told
// once that there were more.
func bounded(output func(stderr bool, data []byte), limit int) func(stderr bool, data []byte) {
	if output == nil || limit <= 0 {
		return output
	}
	return func(stderr bool, data []byte) {
		if limit < 0 {
			return
		}
		n := min(len(data), limit)
		if n > 0 {
			output(stderr, data[:n])
		}
		if limit -= n; n < len(data) {
			limit = -1
			output(true, []byte("\n[wrenn: the rest of the output is missing]\n"))
		}
	}
}

// ended notes how a command ended.
func (r *Result) ended(end *process.ProcessEvent_EndEvent) error {
	code, err := ExitCode(end)
	if err != nil {
		return errdefs.Unavailable.Errorf("run command: %w", err)
	}
	r.ExitCode, r.Signal = code, endedBy(end)
	r.OutOfMemory, r.MemoryLimit = OutOfMemory(end)
	r.Detail = errdefs.Foreign(end.GetError())
	return nil
}

// request is what starts the command, without input.
func (cmd Command) request() *connect.Request[process.StartRequest] {
	req := connect.NewRequest(&process.StartRequest{
		Process: &process.ProcessConfig{Cmd: cmd.Cmd, Args: cmd.Args, Envs: cmd.Env},
		Stdin:   new(bool),
	})
	if cmd.Cwd != "" {
		req.Msg.Process.Cwd = &cmd.Cwd
	}
	if cmd.User != "" {
		req.Header().Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(cmd.User+":")))
	}
	return req
}

// Ended is how a command of Start ended.
type Ended struct {
	Result
	// Err is not nil if the guest could not say.
	Err error
}

// Start starts a command that goes on when the call has ended; tag names it among the
// guest's processes. It returns when the command runs. Until ctx ends, what the command
// writes is given to cmd.Output, which must not be nil, and ended gets how it ended.
// ended is closed when the guest is not listened to any more.
func (c *Client) Start(ctx context.Context, cmd Command, tag string) (ended <-chan Ended, err error) {
	req := cmd.request()
	req.Msg.Tag = &tag
	began, result := make(chan error, 1), make(chan Ended, 1)
	go func() {
		defer close(result)
		end, err := c.follow(ctx, req, func() { began <- nil }, cmd.Output)
		if err != nil {
			err = execError(ctx, cmd, err)
			select {
			case began <- err:
			default:
			}
			if ctx.Err() == nil {
				result <- Ended{Err: err}
			}
			return
		}
		var r Result
		err = r.ended(end)
		result <- Ended{r, err}
	}()
	select {
	case err := <-began:
		return result, err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// follow reads a Start stream up to its end event. began is called when the command runs.
func (c *Client) follow(
	ctx context.Context, req *connect.Request[process.StartRequest], began func(), output func(stderr bool, data []byte),
) (*process.ProcessEvent_EndEvent, error) {
	stream, err := c.process.Start(ctx, req)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	for stream.Receive() {
		switch event := stream.Msg().GetEvent().GetEvent().(type) {
		case *process.ProcessEvent_Start:
			began()
			began = func() {}
		case *process.ProcessEvent_Data:
			if data := event.Data.GetStdout(); len(data) > 0 {
				output(false, data)
			}
			if data := event.Data.GetStderr(); len(data) > 0 {
				output(true, data)
			}
		case *process.ProcessEvent_End:
			return event.End, nil
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return nil, errNoEnd
}

var (
	errNoEnd  = errors.New("the stream ended before the command did")
	errSilent = errors.New("the guest did not confirm the command's end")
)

// stopWith returns a context without a deadline that is cancelled when ctx
// ends, or when timeout, if any, has passed by a margin.
func stopWith(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	inner, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })
	timer := &time.Timer{}
	if timeout > 0 {
		timer = time.AfterFunc(timeout+endSlack, func() { cancel(errSilent) })
	}
	return inner, func() {
		stop()
		if timeout > 0 {
			timer.Stop()
		}
		cancel(nil)
	}
}

// execError gives the error of a run its class.
func execError(ctx context.Context, cmd Command, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		switch {
		case errors.Is(cause, errSilent):
			return errdefs.TimedOut.Errorf("command timed out after %v, and %w", cmd.Timeout, cause)
		case errors.Is(cause, context.DeadlineExceeded):
			return errdefs.TimedOut.Errorf("run command: %w", cause)
		}
		return fmt.Errorf("run command: %w", cause)
	}
	var coded *connect.Error
	if !errors.As(err, &coded) || !connect.IsWireError(coded) {
		// The error is the connection's and not the guest's.
		return errdefs.Unavailable.Errorf("run command: %s", plain(err))
	}
	switch code, said := coded.Code(), errdefs.Foreign(coded.Message()); {
	case code == connect.CodeDeadlineExceeded && cmd.Timeout > 0:
		return errdefs.TimedOut.Errorf("command timed out after %v", cmd.Timeout)
	case code == connect.CodeNotFound:
		return errdefs.NotFound.Errorf("%s in the guest", said)
	case code == connect.CodeInvalidArgument, code == connect.CodePermissionDenied,
		// A user that the guest does not have, or our own token.
		code == connect.CodeUnauthenticated:
		return errdefs.InvalidArgument.Errorf("run command: %s", said)
	case code == connect.CodeResourceExhausted:
		return errdefs.Exhausted.Errorf("run command: %s", said)
	default:
		return errdefs.Unavailable.Errorf("run command: %s", said)
	}
}

// ExitCode turns an end event into a shell's exit code, 0 to 255. A number that no
// process can end with is an error: an exit status has eight bits, so 256 would
// become success.
func ExitCode(end *process.ProcessEvent_EndEvent) (int, error) {
	switch code := end.GetExitCode(); {
	case code >= 0 && code <= 255:
		return int(code), nil
	case code != -1 || end.GetExited():
		return -1, fmt.Errorf("the guest tells of exit status %d, which no process has", code)
	}
	return 128 + int(endedBy(end)), nil
}

// OutOfMemory reports whether the guest's kernel killed a process of the command
// because there was no memory, and how much the programs of the guest may take together,
// in MiB; 0 if the guest does not say.
func OutOfMemory(end *process.ProcessEvent_EndEvent) (yes bool, limit int) {
	rest, yes := strings.CutPrefix(end.GetError(), guestapi.OutOfMemory)
	if !yes {
		return false, 0
	}
	if _, err := fmt.Sscanf(rest, guestapi.MemoryLimit, &limit); err != nil || limit < 0 || limit > maxMemoryLimit {
		return true, 0
	}
	return true, limit
}

// maxMemoryLimit is more than any guest has, in MiB.
const maxMemoryLimit = 1 << 24

// endedBy is the signal in the status of an end, such as "signal: killed (core
// dumped)"; 0 if there is none.
func endedBy(end *process.ProcessEvent_EndEvent) syscall.Signal {
	if end.GetExited() {
		return 0
	}
	for sig := syscall.Signal(1); sig < 65; sig++ {
		text := "signal: " + sig.String()
		if status := end.GetStatus(); status == text || status == text+" (core dumped)" {
			return sig
		}
	}
	return 0
}

// capture keeps the beginning of a stream and counts the rest.
type capture struct {
	name    string
	limit   int
	kept    []byte
	dropped int64
}

func (c *capture) write(data []byte) {
	n := min(len(data), c.limit-len(c.kept))
	c.kept = append(c.kept, data[:n]...)
	c.dropped += int64(len(data) - n)
}

func (c *capture) bytes() []byte {
	if c.dropped == 0 {
		return c.kept
	}
	return fmt.Appendf(c.kept, "\n[wrenn: %d bytes of %s are missing]\n", c.dropped, c.name)
}
