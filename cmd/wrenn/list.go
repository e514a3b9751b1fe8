package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/client"
)

// rough is a duration as people say it.
func rough(d time.Duration) string {
	switch d = max(d, 0); {
	case d/time.Second == 1:
		return "1 second"
	case d < 2*time.Minute:
		return fmt.Sprintf("%d seconds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d minutes", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d hours", int(d.Hours()))
	default:
		return fmt.Sprintf("%d days", int(d.Hours()/24))
	}
}

func newInspect(c *cli) *cobra.Command {
	var token bool
	cmd := &cobra.Command{
		Use:   "inspect ID",
		Short: "Print all that the agent knows of a sandbox, as JSON",
		Long: `Print all that the agent knows of a sandbox, as JSON. A sandbox that ended by itself
is known for some time, with the reason. The access token is not printed; --token
prints nothing else, for clients of the sandbox's daemon.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := c.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if token {
				return printToken(cmd, s)
			}
			info, err := s.Info(cmd.Context())
			if err != nil {
				return err
			}
			return printJSON(cmd.OutOrStdout(), info)
		},
	}
	cmd.Flags().BoolVar(&token, "token", false, "print the sandbox's access token alone; who has it commands the sandbox")
	return cmd
}

// printToken prints the access token of a sandbox.
func printToken(cmd *cobra.Command, s *client.Sandbox) error {
	token, err := s.Token(cmd.Context())
	if err != nil {
		return err
	}
	if token == "" {
		return fmt.Errorf("sandbox %s has ended, and its token with it", s.ID)
	}
	_, err = fmt.Fprintln(cmd.OutOrStdout(), token)
	return err
}

func newLogs(c *cli) *cobra.Command {
	var tail int32
	var raw, timestamps, follow bool
	cmd := &cobra.Command{
		Use:   "logs ID [PID]",
		Short: "Print a guest's console, or the last output of a command",
		Long: `Print the end of a guest's serial console: the messages of its kernel and of envd.
Programs in the sandbox can write there, too. Characters that control a terminal
are printed as \uXXXX, even if stdout is not a terminal; --raw prints all bytes as
they are.

With PID, print what the sandbox still has of the output of a command that was started
from outside, 256 KiB at most: of one that runs, of the last 32 that were started
with 'exec -d' and have ended, and for 30 seconds of others. --follow goes on until the
command has ended.`,
		Example: "  wrenn logs 3fa\n  wrenn logs -f 3fa 512",
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := c.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			out, errOut := cmd.OutOrStdout(), cmd.ErrOrStderr()
			if raw {
				out, errOut = os.Stdout, os.Stderr
			}
			switch {
			case len(args) == 2 && (timestamps || tail != 0):
				return errors.New("--timestamps and --tail-bytes are for the console, not for the output of a command")
			case len(args) == 2:
				return printOutput(cmd.Context(), s, args[1], out, errOut, follow)
			case follow:
				return errors.New("--follow needs the PID of a command: wrenn logs -f ID PID")
			}
			console, err := s.Console(cmd.Context(), tail, timestamps)
			if err != nil {
				return err
			}
			_, err = out.Write(console)
			return err
		},
	}
	cmd.Flags().BoolVar(&raw, "raw", false, "print the bytes as they are; a terminal obeys them")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "of a command: go on until it has ended")
	cmd.Flags().BoolVarP(&timestamps, "timestamps", "t", false, "put before each line the time at which the host read it")
	cmd.Flags().Int32Var(&tail, "tail-bytes", 0, "how much from the end; 0 is 64 KiB, 1 MiB at most")
	return cmd
}

func newEvents(c *cli) *cobra.Command {
	var after uint64
	var noFollow, asJSON bool
	cmd := &cobra.Command{
		Use:   "events [ID]",
		Short: "Print changes of sandboxes as they happen",
		Long: `Print each change of all sandboxes, or of one, of state, timeout, deadline and network
policy, and each snapshot and fork: first what the agent remembers, which is what
happened in the last 7 days, then new changes as they happen. Each line begins with a
cursor. --after CURSOR prints only what came after that line. --json shows also which
caller asked for a change.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &hostagentv1.WatchEventsRequest{After: after, NoFollow: noFollow}
			if len(args) == 1 {
				s, err := c.find(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				req.SandboxId = s.ID
			}
			for got, err := range c.host.Events(cmd.Context(), req) {
				if err == nil && got.Event != nil {
					err = printEvent(cmd.OutOrStdout(), got.Event, asJSON)
				}
				if err != nil && cmd.Context().Err() == nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().Uint64Var(&after, "after", 0, "only events with a higher cursor")
	cmd.Flags().BoolVar(&noFollow, "no-follow", false, "end after the remembered events")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object a line")
	return cmd
}

func printEvent(out io.Writer, e *hostagentv1.Event, asJSON bool) error {
	if asJSON {
		line, err := protojson.Marshal(e)
		if err != nil {
			return err
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, line); err != nil {
			return err
		}
		_, err = fmt.Fprintln(out, compact.String())
		return err
	}
	what := e.To
	switch {
	case e.Kind != "":
		what = e.Kind + ", " + e.To
		if e.Detail != "" {
			what += ": " + e.Detail
		}
	case e.Reason != "":
		what += " (" + e.Reason + ")"
	}
	at := time.UnixMilli(e.TimeUnixMs).Format("2006-01-02 15:04:05.000")
	_, err := fmt.Fprintln(out, printableLine(fmt.Sprintf("%d  %s  %s  %s", e.Cursor, at, e.SandboxId, what)))
	return err
}

func newVersion(c *cli) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program and of the host agent",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			agent, err := c.version(cmd.Context())
			out := cmd.OutOrStdout()
			if asJSON {
				v := map[string]any{"client": buildVersion(), "host": nil}
				if err == nil {
					v["host"] = map[string]string{
						"version": agent.Version, "vmm": agent.Vmm, "vmmVersion": agent.VmmVersion,
						"isolation": agent.Isolation, "speed": agent.Speed, "why": agent.Why,
					}
				}
				return printIndented(out, v)
			}
			host := ""
			if err != nil {
				host = explain(err)
			} else {
				host = fmt.Sprintf("%s, sandboxes by %s %s", agent.Version, agent.Vmm, agent.VmmVersion)
			}
			fmt.Fprintf(out, "client  %s\nhost    %s\n", buildVersion(), printableLine(host))
			if err == nil {
				fmt.Fprintf(out, "        %s\n", printableLine(fmt.Sprintf("isolated by %s, %s: %s", agent.Isolation, agent.Speed, agent.Why)))
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print as JSON")
	return cmd
}

// version asks the host agent for its version.
func (c *cli) version(ctx context.Context) (*hostagentv1.GetVersionResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if err := c.connect(nil, nil); err != nil {
		return nil, err
	}
	return c.host.Version(ctx)
}
