package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
)

// command holds the flags that describe a command in a sandbox.
type command struct {
	env         []string
	cwd         string
	interactive bool
	tty         bool
}

func (x *command) flags(cmd *cobra.Command) {
	cmd.Flags().StringArrayVarP(&x.env, "env", "e", nil, "set NAME=VALUE for the command; may be repeated")
	cmd.Flags().StringVarP(&x.cwd, "workdir", "w", "", "directory of the command in the sandbox")
	cmd.Flags().BoolVarP(&x.interactive, "interactive", "i", false, "connect stdin (not supported yet)")
	cmd.Flags().BoolVarP(&x.tty, "tty", "t", false, "give the command a terminal (not supported yet)")
	cmd.Flags().SetInterspersed(false) // flags behind the command are its own
}

func (x *command) config(args []string) (*process.ProcessConfig, error) {
	if x.interactive || x.tty {
		return nil, errors.New("-i and -t are not supported yet: commands run without stdin and without a terminal; " +
			"pass input in the command itself, as in `wrenn exec ID -- sh -c 'echo hello | cat'`")
	}
	config := &process.ProcessConfig{Cmd: args[0], Args: args[1:], Envs: map[string]string{}}
	for _, kv := range x.env {
		name, value, ok := strings.Cut(kv, "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("--env %q is not of the form NAME=VALUE", kv)
		}
		config.Envs[name] = value
	}
	if x.cwd != "" {
		config.Cwd = &x.cwd
	}
	return config, nil
}

// guestHeaders names a sandbox to the data plane.
func guestHeaders(id string) connect.Interceptor {
	return headerInterceptor{id}
}

type headerInterceptor struct{ id string }

func (h headerInterceptor) set(header http.Header) {
	header.Set("E2b-Sandbox-Id", h.id)
	header.Set("Keepalive-Ping-Interval", "50")
}

func (h headerInterceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		h.set(req.Header())
		return next(ctx, req)
	}
}

func (h headerInterceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		h.set(conn.RequestHeader())
		return conn
	}
}

func (h headerInterceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// refusals makes errors of the answers that the data plane's proxy gives
// itself: of a stream that is not one, Connect reads no more than the status.
type refusals struct{ next http.RoundTripper }

func (r refusals) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := r.next.RoundTrip(req)
	if err != nil || !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json") {
		return resp, err
	}
	code, ok := refusalCodes[resp.StatusCode]
	if !ok {
		return resp, nil
	}
	defer resp.Body.Close()
	var refusal struct{ Message string }
	data, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err == nil {
		err = json.Unmarshal(data, &refusal)
	}
	if err != nil || refusal.Message == "" {
		return nil, connect.NewError(code, fmt.Errorf("the host answered %s", resp.Status))
	}
	return nil, connect.NewError(code, errors.New(refusal.Message))
}

var refusalCodes = map[int]connect.Code{
	http.StatusBadRequest:         connect.CodeInvalidArgument,
	http.StatusUnauthorized:       connect.CodeUnauthenticated,
	http.StatusNotFound:           connect.CodeNotFound,
	http.StatusConflict:           connect.CodeFailedPrecondition,
	http.StatusBadGateway:         connect.CodeUnavailable,
	http.StatusServiceUnavailable: connect.CodeUnavailable,
}

// stream runs a command in a sandbox, its output on ours, and returns its exit
// status. When ctx ends the command is killed.
func (c *client) stream(ctx context.Context, id string, config *process.ProcessConfig) (int, error) {
	guest := processconnect.NewProcessClient(&http.Client{Transport: refusals{http.DefaultTransport}}, c.host, connect.WithInterceptors(guestHeaders(id)))
	// Not ctx itself: the end of the stream is awaited after an interrupt, too.
	life, hangUp := context.WithCancel(context.WithoutCancel(ctx))
	defer hangUp()
	events, err := guest.Start(life, connect.NewRequest(&process.StartRequest{Process: config, Stdin: new(bool)}))
	if err != nil {
		return 0, err
	}
	defer events.Close()
	for events.Receive() {
		switch event := events.Msg().GetEvent().GetEvent().(type) {
		case *process.ProcessEvent_Start:
			stop := context.AfterFunc(ctx, func() { interrupt(guest, event.Start.Pid, hangUp) })
			defer stop()
		case *process.ProcessEvent_Data:
			if out := event.Data.GetStdout(); len(out) > 0 {
				if _, err := os.Stdout.Write(out); err != nil {
					return 0, fmt.Errorf("write output: %w", err)
				}
			}
			if out := event.Data.GetStderr(); len(out) > 0 {
				os.Stderr.Write(out)
			}
		case *process.ProcessEvent_End:
			return exitStatus(event.End), nil
		}
	}
	if err := events.Err(); err != nil {
		return 0, err
	}
	return 0, errors.New("the stream ended before the command did; whether it still runs is unknown")
}

// interrupt asks a process to end, then insists, then leaves.
func interrupt(guest processconnect.ProcessClient, pid uint32, hangUp func()) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	send := func(signal process.Signal) {
		guest.SendSignal(ctx, connect.NewRequest(&process.SendSignalRequest{
			Process: &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: pid}}, Signal: signal,
		}))
	}
	send(process.Signal_SIGNAL_SIGTERM)
	grace := time.NewTimer(2 * time.Second)
	defer grace.Stop()
	<-grace.C
	send(process.Signal_SIGNAL_SIGKILL)
	hangUp()
}

// exitStatus is a process's end as shells count it.
func exitStatus(end *process.ProcessEvent_EndEvent) int {
	if end.Exited {
		return int(end.ExitCode)
	}
	name := strings.TrimSuffix(strings.TrimPrefix(end.Status, "signal: "), " (core dumped)")
	for n := syscall.Signal(1); n <= 64; n++ {
		if n.String() == name {
			return 128 + int(n)
		}
	}
	return 255
}

func newExec(c *client) *cobra.Command {
	var x command
	cmd := &cobra.Command{
		Use:   "exec ID [--] COMMAND [ARG...]",
		Short: "Run a command in a running sandbox",
		Long: `Run a command in a running sandbox. Its output comes as it is written; the exit
status is the command's own, or 128+N when signal N ended it.`,
		Example: "  wrenn exec 3fa -- sh -c 'echo $HOME; exit 3'",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			config, err := x.config(withoutDash(args[1:]))
			if err != nil {
				return err
			}
			id, err := c.resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return exit(c.stream(cmd.Context(), id, config))
		},
	}
	x.flags(cmd)
	return cmd
}

// withoutDash drops the "--" between a sandbox and its command.
func withoutDash(args []string) []string {
	if len(args) > 1 && args[0] == "--" {
		return args[1:]
	}
	return args
}

func exit(status int, err error) error {
	if err == nil && status != 0 {
		return exitError(status)
	}
	return err
}

func newRun(c *client) *cobra.Command {
	var s size
	var x command
	cmd := &cobra.Command{
		Use:   "run [--] COMMAND [ARG...]",
		Short: "Run a command in a sandbox of its own, destroyed afterwards",
		Long: `Create a sandbox, run a command in it with its output here, destroy the sandbox,
and exit with the command's status.`,
		Example: "  wrenn run -- sh -c 'uname -a; id'\n  wrenn run -m 1g -- python3 -c 'print(6*7)'",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			config, err := x.config(args)
			if err != nil {
				return err
			}
			sandbox, err := c.create(cmd.Context(), &s)
			if err != nil {
				return err
			}
			defer func() {
				ctx, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), 30*time.Second)
				defer cancel()
				if derr := c.destroy(ctx, sandbox.SandboxId); derr != nil {
					fmt.Fprintf(os.Stderr, "wrenn: sandbox %s is still there: %s\n", sandbox.SandboxId, explain(derr))
				}
			}()
			return exit(c.stream(cmd.Context(), sandbox.SandboxId, config))
		},
	}
	s.flags(cmd)
	x.flags(cmd)
	return cmd
}
