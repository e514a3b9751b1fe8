package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"git.omukk.dev/wrenn/sandbox/api/filesystem/filesystemconnect"
	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs/errhttp"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
)

// command holds the flags that describe a command in a sandbox.
type command struct {
	env         []string
	cwd         string
	user        string
	interactive bool
	tty         bool
}

func (x *command) flags(cmd *cobra.Command) {
	cmd.Flags().StringArrayVarP(&x.env, "env", "e", nil, "set NAME=VALUE for the command, or pass on our NAME; may be repeated")
	cmd.Flags().StringVarP(&x.cwd, "workdir", "w", "", "directory of the command in the sandbox")
	cmd.Flags().StringVarP(&x.user, "user", "u", "", "user of the command in the sandbox")
	cmd.Flags().BoolVarP(&x.interactive, "interactive", "i", false, "connect stdin")
	cmd.Flags().BoolVarP(&x.tty, "tty", "t", false, "run the command in this terminal")
	cmd.Flags().SetInterspersed(false) // flags behind the command are its own
}

// variables reads flags of the form NAME=VALUE, or NAME for our own variable,
// whose value no list of processes shows then.
func variables(flags []string) (map[string]string, error) {
	env := map[string]string{}
	for _, kv := range flags {
		name, value, ok := strings.Cut(kv, "=")
		if !ok {
			value, ok = os.LookupEnv(name)
		}
		switch {
		case name == "":
			return nil, errors.New("--env needs NAME=VALUE, or NAME to pass on a variable")
		case ok:
			env[name] = value
		}
	}
	return env, nil
}

// session is the command connected as the flags say.
func (x *command) session(args []string) (*session, error) {
	s := &session{
		config: &process.ProcessConfig{Cmd: args[0], Args: args[1:]},
		user:   x.user, stdout: os.Stdout, stderr: os.Stderr,
	}
	var err error
	if s.config.Envs, err = variables(x.env); err != nil {
		return nil, err
	}
	if x.cwd != "" {
		s.config.Cwd = &x.cwd
	}
	if x.interactive || x.tty {
		s.stdin = os.Stdin
	}
	if x.tty {
		if !term.IsTerminal(int(os.Stdin.Fd())) {
			return nil, errors.New("-t needs a terminal, and stdin is none; -i alone connects stdin whatever it is")
		}
		// What a terminal that closes leaves behind, nobody would find.
		s.terminal, s.tied = os.Stdin, true
	}
	return s, nil
}

// withToken shows the token of the sandbox that a request names.
type withToken struct {
	client *client
	next   http.RoundTripper
}

func (t withToken) RoundTrip(req *http.Request) (*http.Response, error) {
	token, err := t.client.token(req.Context(), req.Header.Get("E2b-Sandbox-Id"))
	if err != nil {
		if req.Body != nil {
			req.Body.Close()
		}
		// What came over the wire would be taken for the guest's own word.
		if cerr := new(connect.Error); errors.As(err, &cerr) && connect.IsWireError(err) {
			err = connect.NewError(cerr.Code(), errors.New(cerr.Message()))
		}
		return nil, err
	}
	req = req.Clone(req.Context())
	req.Header.Set("X-Access-Token", token)
	return t.next.RoundTrip(req)
}

// processes and filesystem are clients of a sandbox's envd, which act as user.
func (c *client) processes(id, user string) processconnect.ProcessClient {
	return processconnect.NewProcessClient(c.dataPlane(), c.host, guest.ClientOptions(), connect.WithInterceptors(guestHeaders{id, user}))
}

func (c *client) filesystem(id, user string) filesystemconnect.FilesystemClient {
	return filesystemconnect.NewFilesystemClient(c.dataPlane(), c.host, guest.ClientOptions(), connect.WithInterceptors(guestHeaders{id, user}))
}

// guestHeaders names a sandbox and a user in it to the data plane.
type guestHeaders struct{ id, user string }

func (h guestHeaders) set(header http.Header) {
	header.Set("E2b-Sandbox-Id", h.id)
	header.Set("Keepalive-Ping-Interval", "50")
	if h.user != "" {
		header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(h.user+":")))
	}
}

func (h guestHeaders) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		ctx, cancel := context.WithTimeout(ctx, guestPatience)
		defer cancel()
		h.set(req.Header())
		resp, err := next(ctx, req)
		return resp, foreign(err)
	}
}

func (h guestHeaders) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		h.set(conn.RequestHeader())
		return guestStream{conn}
	}
}

// guestStream is a stream whose errors may be a guest's words.
type guestStream struct{ connect.StreamingClientConn }

func (s guestStream) Receive(m any) error { return foreign(s.StreamingClientConn.Receive(m)) }

func (h guestHeaders) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
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
	row, ok := errhttp.OfStatus(resp.StatusCode)
	if !ok {
		return resp, nil
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	resp.Body.Close()
	var refusal struct {
		Code    json.RawMessage
		Message string
	}
	if err == nil {
		err = json.Unmarshal(data, &refusal)
	}
	if err != nil || refusal.Message == "" {
		return nil, connect.NewError(row.Code, fmt.Errorf("the host answered %s", errdefs.Foreign(resp.Status)))
	}
	if bytes.HasPrefix(refusal.Code, []byte(`"`)) {
		// A code with a name is the guest's own error in Connect's form.
		resp.Body = io.NopCloser(bytes.NewReader(data))
		return resp, nil
	}
	return nil, connect.NewError(row.Code, errors.New(errdefs.Foreign(refusal.Message)))
}

func newExec(c *client) *cobra.Command {
	var x command
	cmd := &cobra.Command{
		Use:   "exec ID [--] COMMAND [ARG...]",
		Short: "Run a command in a running sandbox",
		Long: `Run a command in a running sandbox. Its output comes as it is written; the exit
status is the command's own, 128+N when signal N ended it, 127 when it does not
exist, 126 when it cannot be executed.

With -i the command reads our stdin, with -t it runs in our terminal: keys,
Ctrl-C too, go to it. Without -t, Ctrl-C ends the command, and the exit status
is 130.`,
		Example: "  wrenn exec 3fa -- sh -c 'echo $HOME; exit 3'\n  wrenn exec -it 3fa -- python3\n  tar c dir | wrenn exec -i 3fa -- tar x -C /tmp",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := x.session(withoutDash(args[1:]))
			if err != nil {
				return err
			}
			id, err := c.resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return exit(c.run(cmd.Context(), id, s))
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

func newShell(c *client) *cobra.Command {
	var user string
	cmd := &cobra.Command{
		Use:   "shell ID",
		Short: "Open a shell in a running sandbox",
		Long: `Open a login shell, bash or else sh, in a running sandbox; the exit status is
the shell's. The shell and what runs in it end when the connection does. Where
stdin is no terminal, the shell reads its commands from it.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := c.resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			x := command{user: user, interactive: true, tty: term.IsTerminal(int(os.Stdin.Fd()))}
			var missing *statusError
			for _, shell := range []string{"bash", "sh"} {
				var s *session
				if s, err = x.session([]string{shell, "-l"}); err != nil {
					return err
				}
				var status int
				status, err = c.run(cmd.Context(), id, s)
				if !errors.As(err, &missing) || missing.status != notFoundStatus {
					return exit(status, err)
				}
			}
			return err
		},
	}
	cmd.Flags().StringVarP(&user, "user", "u", "", "user of the shell in the sandbox")
	return cmd
}

func newRun(c *client) *cobra.Command {
	var s size
	var x command
	cmd := &cobra.Command{
		Use:   "run [--] COMMAND [ARG...]",
		Short: "Run a command in a sandbox of its own, destroyed afterwards",
		Long: `Create a sandbox, run a command in it with its output here, destroy the sandbox,
and exit with the command's status.`,
		Example: "  wrenn run -- sh -c 'uname -a; id'\n  wrenn run -m 1g -it -- bash",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			session, err := x.session(args)
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
					complain("sandbox %s is still there: %s", sandbox.SandboxId, explain(derr))
				}
			}()
			return exit(c.run(cmd.Context(), sandbox.SandboxId, session))
		},
	}
	s.flags(cmd)
	x.flags(cmd)
	return cmd
}
