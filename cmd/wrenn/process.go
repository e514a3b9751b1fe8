package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/internal/client"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

func newAttach(c *cli) *cobra.Command {
	var x command
	cmd := &cobra.Command{
		Use:         "attach ID PID",
		Short:       "Connect to a command that runs in a sandbox",
		Annotations: likeDocker(),
		Long: `Connect to a command that was started with 'exec -d', or whose connection was lost:
print what the sandbox still has of its output, 256 KiB at most, then what it
writes, until it ends, and exit with its status. Ctrl-C leaves the command, which
goes on; with -t, it goes to the command as all keys do. 'wrenn ps ID' lists PIDs.`,
		Example: "  wrenn attach 3fa 512\n  wrenn attach -i web 512",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			pid, err := parsePID(args[1])
			if err != nil {
				return err
			}
			command, err := x.connected([]string{""})
			if err != nil {
				return err
			}
			s, err := x.find(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			return exit(s.Attach(cmd.Context(), pid, command))
		},
	}
	cmd.Flags().BoolVarP(&x.interactive, "interactive", "i", false, "connect stdin")
	cmd.Flags().BoolVarP(&x.tty, "tty", "t", false, "connect this terminal to the command's")
	x.patience(cmd)
	return cmd
}

func newKill(c *cli) *cobra.Command {
	var signal string
	cmd := &cobra.Command{
		Use:   "kill ID PID...",
		Short: "Send a signal to processes in a sandbox",
		Long: `Send a signal to processes in a sandbox, SIGTERM unless --signal says another. Those
that were not started from outside, and other signals, take a shell in the sandbox.`,
		Example: "  wrenn kill 3fa 512\n  wrenn kill -s HUP web 512 513",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return fmt.Errorf("wrenn kill ends processes: wrenn kill %[1]s PID; `wrenn rm %[1]s` destroys the sandbox", args[0])
			}
			return cobra.MinimumNArgs(2)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			name := strings.TrimPrefix(strings.ToUpper(signal), "SIG")
			var pids []uint32
			for _, arg := range args[1:] {
				pid, err := parsePID(arg)
				if err != nil {
					return err
				}
				pids = append(pids, pid)
			}
			s, err := c.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			var errs []error
			for _, pid := range pids {
				if err := kill(cmd.Context(), s, pid, name); err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(cmd.OutOrStdout(), pid)
			}
			return all(errs)
		},
	}
	cmd.Flags().StringVarP(&signal, "signal", "s", "TERM", "name or number of the signal")
	return cmd
}

// kill sends a signal to a process in a sandbox.
func kill(ctx context.Context, s *client.Sandbox, pid uint32, name string) error {
	signals := map[string]process.Signal{
		"TERM": process.Signal_SIGNAL_SIGTERM, "15": process.Signal_SIGNAL_SIGTERM,
		"KILL": process.Signal_SIGNAL_SIGKILL, "9": process.Signal_SIGNAL_SIGKILL,
	}
	if signal, ok := signals[name]; ok {
		err := s.Signal(ctx, pid, signal)
		if connect.CodeOf(err) != connect.CodeNotFound || !connect.IsWireError(err) {
			return err
		}
	}
	var said strings.Builder
	status, err := s.Exec(ctx, client.Command{
		Cmd: "sh", Args: []string{"-c", `kill -s "$0" "$1"`, name, strconv.FormatUint(uint64(pid), 10)}, User: "root", Stderr: &said,
		StartWithin: 30 * time.Second,
	})
	if err == nil && status != 0 {
		// What the shell says names itself, and the line.
		err = errdefs.NotFound.Errorf("process %d: %s", pid, errdefs.Foreign(said.String()[strings.LastIndex(said.String(), ": ")+1:]))
	}
	return err
}

func parsePID(text string) (uint32, error) {
	pid, err := strconv.ParseUint(text, 10, 31)
	if err != nil || pid == 0 {
		return 0, fmt.Errorf("%q is no PID: `wrenn ps ID` lists those of a sandbox", text)
	}
	return uint32(pid), nil
}

// printOutput prints what a sandbox has of the output of a command.
func printOutput(ctx context.Context, s *client.Sandbox, ref string, out, errOut io.Writer, follow bool) error {
	pid, err := parsePID(ref)
	if err != nil {
		return err
	}
	stdout, stderr := &runes{w: out}, &runes{w: errOut}
	defer stdout.flush()
	defer stderr.flush()
	cmd := client.Command{Stdout: stdout, Stderr: stderr, StartWithin: 30 * time.Second}
	if !follow {
		return s.Output(ctx, pid, cmd)
	}
	_, err = s.Attach(ctx, pid, cmd)
	if cause := context.Cause(ctx); cause != nil && errors.Is(err, cause) {
		return nil // Ctrl-C ends the following
	}
	return err
}

// runes passes on what is written with no rune in parts.
type runes struct {
	w    io.Writer
	held []byte // the beginning of a rune
}

func (r *runes) Write(data []byte) (int, error) {
	text := append(r.held, data...)
	end := len(text)
	for i := end - 1; i >= 0 && i >= end-utf8.UTFMax; i-- {
		if utf8.RuneStart(text[i]) {
			if !utf8.FullRune(text[i:]) {
				end = i
			}
			break
		}
	}
	r.held = append([]byte(nil), text[end:]...)
	_, err := r.w.Write(text[:end])
	return len(data), err
}

func (r *runes) flush() { _, _ = r.w.Write(r.held) }

// processes prints the processes in a sandbox.
func (c *cli) processes(cmd *cobra.Command, ref string, quiet, asJSON bool) error {
	s, err := c.find(cmd.Context(), ref)
	if err != nil {
		return err
	}
	list, err := s.Processes(cmd.Context())
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	switch {
	case asJSON:
		return printIndented(out, guestapi.Processes{Processes: list})
	case quiet:
		for _, p := range list {
			if p.Ended == "" {
				fmt.Fprintln(out, p.PID)
			}
		}
		return nil
	}
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	row(w, "PID", "PPID", "USER", "STARTED", "CPU", "MEMORY", "ATTACH", "COMMAND")
	for _, p := range list {
		started := rough(time.Since(time.Unix(p.Started, 0))) + " ago"
		line := oneLine(p.Args)
		switch {
		case p.Ended != "":
			row(w, p.PID, "-", "-", started, "-", "-", p.Ended, line)
		case p.Command:
			row(w, p.PID, p.PPID, p.User, started, cpuTime(p.CPU), bytesText(p.Memory), "yes", line)
		default:
			row(w, p.PID, p.PPID, p.User, started, cpuTime(p.CPU), bytesText(p.Memory), "no", line)
		}
	}
	return w.Flush()
}

// cpuTime is a time that a CPU has worked.
func cpuTime(ms int64) string { return fmt.Sprintf("%.1fs", float64(ms)/1000) }
