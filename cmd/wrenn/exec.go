package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/client"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// command holds the flags that describe a command in a sandbox.
type command struct {
	env         vars
	cwd         string
	user        string
	interactive bool
	tty         bool
	within      time.Duration // --connect-timeout
}

// patience adds --connect-timeout.
func (x *command) patience(cmd *cobra.Command) {
	cmd.Flags().DurationVar(&x.within, "connect-timeout", 30*time.Second,
		"give up when the agent, or then the sandbox, does not answer for so long; 0 is never")
}

// find returns the sandbox that an argument names, within --connect-timeout.
func (x *command) find(ctx context.Context, c *cli, ref string) (*client.Sandbox, error) {
	if x.within <= 0 {
		return c.find(ctx, ref)
	}
	late := errdefs.TimedOut.Errorf("host agent %s did not answer within %v", c.addr, x.within)
	// A deadline would travel in the request, and the agent's word of it come first.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer time.AfterFunc(x.within, func() { cancel(late) }).Stop()
	s, err := c.find(ctx, ref)
	if err != nil && errors.Is(context.Cause(ctx), late) {
		return nil, late
	}
	return s, err
}

func (x *command) flags(cmd *cobra.Command) {
	x.env.flags(cmd, "the command")
	cmd.Flags().StringVarP(&x.cwd, "workdir", "w", "", "directory of the command in the sandbox")
	cmd.Flags().StringVarP(&x.user, "user", "u", "", "user of the command in the sandbox: a name, a uid, or uid:gid")
	cmd.Flags().BoolVarP(&x.interactive, "interactive", "i", false, "connect stdin")
	cmd.Flags().BoolVarP(&x.tty, "tty", "t", false, "run the command in this terminal")
	x.patience(cmd)
	cmd.Flags().SetInterspersed(false) // flags behind the command are its own
}

// connected is the command connected to this program as the flags say.
func (x *command) connected(args []string) (client.Command, error) {
	cmd := client.Command{
		Cmd: args[0], Args: args[1:], Cwd: x.cwd, User: x.user, Stdout: os.Stdout, Stderr: os.Stderr,
		StartWithin: x.within, OutOfMemory: func(limit int) {
			text := ""
			if limit > 0 {
				text = fmt.Sprintf(", limit %d MiB", limit)
			}
			complain("killed: out of memory%s: the sandbox's kernel ended a process of the command; --memory at create gives more", text)
		},
	}
	var err error
	if cmd.Env, err = x.env.read(); err != nil {
		return cmd, err
	}
	if x.interactive || x.tty {
		cmd.Stdin = os.Stdin
	}
	if x.tty {
		if !term.IsTerminal(int(os.Stdin.Fd())) {
			return cmd, errors.New("-t needs a terminal, and stdin is none; -i alone connects stdin whatever it is")
		}
		// A command that a closed terminal leaves behind could not be reached.
		cmd.Terminal, cmd.Tied = os.Stdin, true
	}
	return cmd, nil
}

func newExec(c *cli) *cobra.Command {
	var x command
	var detach bool
	cmd := &cobra.Command{
		Use:         "exec ID [--] COMMAND [ARG...]",
		Short:       "Run a command in a running sandbox",
		Annotations: likeDocker(),
		Long: `Run a command in a running sandbox. Output is printed as the command writes it.
The exit status is the command's own, or 128+N if signal N ended the command,
127 if the command does not exist, 126 if it cannot be executed, 125 for any
other error: arguments, agent, sandbox, user, or directory.

With -i, the command reads stdin. With -t, it runs in this terminal, and all
keys go to it, Ctrl-C too. Without -t, Ctrl-C ends the command, and the exit
status is 130. A sandbox that does not confirm that end is left after 4 seconds.

With -d, the command is left to itself, and its PID is printed. 'wrenn attach ID PID'
connects to it again, 'wrenn logs ID PID' prints the last 256 KiB of its output, and
'wrenn kill ID PID' ends it. With -i, too, its stdin stays open for an attach.`,
		Example: `  wrenn exec 3fa -- sh -c 'echo $HOME; exit 3'
  wrenn exec -it 3fa -- python3
  wrenn exec -d 3fa -- python3 -m http.server 8000
  tar c dir | wrenn exec -i 3fa -- tar x -C /tmp`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 && strings.HasPrefix(args[1], "-") && args[1] != "--" {
				return fmt.Errorf("flags stand before the id: wrenn exec %s … %s COMMAND; a command that begins with - follows --", args[1], args[0])
			}
			return cobra.MinimumNArgs(2)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			command, err := x.connected(withoutDash(args[1:]))
			if err != nil {
				return err
			}
			s, err := x.find(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			if !detach {
				return exit(s.Exec(cmd.Context(), command))
			}
			pid, err := s.Detach(cmd.Context(), command)
			if err != nil {
				return exit(0, err)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), pid)
			return err
		},
	}
	x.flags(cmd)
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "leave the command to itself and print its PID")
	return cmd
}

// withoutDash drops the "--" between a sandbox and its command.
func withoutDash(args []string) []string {
	if len(args) > 1 && args[0] == "--" {
		return args[1:]
	}
	return args
}

// exit makes the end of a command that of this program.
func exit(status int, err error) error {
	var start *client.StartError
	var sig signalError
	switch {
	case errors.As(err, &start):
		return &statusError{start.Status, err}
	case errors.As(err, &sig) && err.Error() == sig.Error():
		return exitError(sig.status())
	case errors.As(err, &sig):
		return &statusError{sig.status(), err}
	case err == nil && status != 0:
		return exitError(status)
	}
	return err
}

func newShell(c *cli) *cobra.Command {
	var x command
	cmd := &cobra.Command{
		Use:         "shell ID",
		Short:       "Open a shell in a running sandbox",
		Annotations: likeDocker(),
		Long: `Open a login shell in a running sandbox: bash, or sh if there is no bash. The exit
status is the shell's. When the connection ends, the shell and its programs end
too. If stdin is not a terminal, the shell reads its commands from stdin.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := x.find(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			x.interactive, x.tty = true, term.IsTerminal(int(os.Stdin.Fd()))
			shell, err := x.connected([]string{"sh"})
			if err != nil {
				return err
			}
			return exit(s.Shell(cmd.Context(), shell))
		},
	}
	cmd.Flags().StringVarP(&x.user, "user", "u", "", "user of the shell in the sandbox")
	x.patience(cmd)
	return cmd
}

func newRun(c *cli) *cobra.Command {
	var s size
	var x command
	cmd := &cobra.Command{
		Use:         "run [--] COMMAND [ARG...]",
		Short:       "Run a command in a sandbox of its own, destroyed afterwards",
		Annotations: likeDocker(),
		Long: `Create a sandbox, run a command in it, print its output, destroy the sandbox, and
exit with the command's status. 125 to 127 mean what they mean for 'wrenn exec'.`,
		Example: "  wrenn run -- sh -c 'uname -a; id'\n  wrenn run -m 1g -it -- bash",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			command, err := x.connected(args)
			if err != nil {
				return err
			}
			made, err := c.create(cmd.Context(), &s)
			if err != nil {
				return err
			}
			sandbox := c.host.Sandbox(made.SandboxId)
			defer func() {
				ctx, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), 30*time.Second)
				defer cancel()
				if derr := sandbox.Destroy(ctx); derr != nil {
					complain("sandbox %s is still there: %s", sandbox.ID, explain(derr))
				}
			}()
			status, err := sandbox.Exec(cmd.Context(), command)
			if client.Missing(err) && s.template == "" && c.isTemplate(cmd.Context(), args[0]) {
				err = fmt.Errorf("%w; did you mean --template %s?", err, args[0])
			}
			return exit(status, err)
		},
	}
	s.flags(cmd)
	x.flags(cmd)
	return cmd
}

// beforeColon is a name without its tag.
func beforeColon(name string) string {
	name, _, _ = strings.Cut(name, ":")
	return name
}

// isTemplate reports whether a sandbox can start from what has that name.
func (c *cli) isTemplate(ctx context.Context, name string) bool {
	if name == "minimal" {
		return true
	}
	templates, err := c.host.Templates().List(ctx)
	if err == nil && slices.ContainsFunc(templates.Templates, func(t *hostagentv1.Template) bool {
		return slices.Contains(t.Names, beforeColon(name))
	}) {
		return true
	}
	snapshots, err := c.host.Snapshots(ctx)
	return err == nil && slices.ContainsFunc(snapshots.Snapshots, func(s *hostagentv1.Snapshot) bool {
		return s.Name == name && s.Project == ""
	})
}
