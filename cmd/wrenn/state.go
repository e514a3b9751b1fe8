package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"git.omukk.dev/wrenn/sandbox/internal/client"
)

func newPause(c *cli) *cobra.Command {
	var toDisk, filesOnly bool
	cmd := &cobra.Command{
		Use:   "pause ID...",
		Short: "Stop the vCPUs of sandboxes; their memory stays, or goes to disk",
		Long: `Stop the vCPUs of sandboxes. Their memory stays where it is. With --to-disk it
goes to the host's disk, and with --files-only it is given up: then sandboxes are
hibernated, take nothing but disk, and outlive the host's restart. 'wrenn resume'
lets them go on where they were; without their memory they boot, with the same id,
files and settings, and none of their programs.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, refs []string) error {
			return c.each(cmd, refs, func(ctx context.Context, s *client.Sandbox) error {
				pause := s.Pause
				if toDisk || filesOnly {
					pause = func(ctx context.Context) (string, error) { return s.Hibernate(ctx, filesOnly) }
				}
				detail, err := pause(ctx)
				if err == nil && detail != "" {
					fmt.Fprintf(cmd.ErrOrStderr(), "wrenn: sandbox %s is %s\n", s.ID, detail)
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&toDisk, "to-disk", false, "hibernate: write the memory to disk and end the VM")
	cmd.Flags().BoolVar(&filesOnly, "files-only", false, "hibernate without memory: keep the files and end the VM")
	return cmd
}

func newResume(c *cli) *cobra.Command {
	var filesOnly bool
	cmd := &cobra.Command{
		Use:     "resume ID...",
		Aliases: []string{"unpause"},
		Short:   "Let paused or hibernated sandboxes go on",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, refs []string) error {
			return c.each(cmd, refs, func(ctx context.Context, s *client.Sandbox) error { return s.Resume(ctx, filesOnly) })
		},
	}
	cmd.Flags().BoolVar(&filesOnly, "files-only", false, "boot a hibernated sandbox from its files and give its memory up")
	return cmd
}

func newStop(c *cli) *cobra.Command {
	var grace time.Duration
	cmd := &cobra.Command{
		Use:   "stop ID...",
		Short: "End the programs of sandboxes and keep their disks",
		Long: `End the programs of sandboxes, then their VMs, and keep their disks, which is
'wrenn pause --files-only' after SIGTERM for all programs. What has not ended after
--time ends with the VM. 'wrenn start' boots them again, with the same id, name and
settings and the start command of the template.`,
		Example: "  wrenn stop web\n  wrenn stop -t 0 3fa d49",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, refs []string) error {
			return c.each(cmd, refs, func(ctx context.Context, s *client.Sandbox) error {
				detail, err := s.Stop(ctx, grace)
				if err == nil && detail != "" {
					fmt.Fprintf(cmd.ErrOrStderr(), "wrenn: sandbox %s is %s\n", s.ID, detail)
				}
				return err
			})
		},
	}
	cmd.Flags().DurationVarP(&grace, "time", "t", 10*time.Second, "how long programs may take to end after SIGTERM; 0 sends none")
	return cmd
}

func newStart(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "start ID...",
		Short: "Boot stopped sandboxes again",
		Long: `Let sandboxes run that 'wrenn stop' has stopped: they boot from their disks, and the
start command of their templates runs. Paused and hibernated ones go on where they
were, as with 'wrenn resume'. One that runs is left as it is.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, refs []string) error {
			return c.each(cmd, refs, func(ctx context.Context, s *client.Sandbox) error {
				info, err := s.Info(ctx)
				if err != nil || info.GetStatus() == "running" {
					return err
				}
				return s.Resume(ctx, false)
			})
		},
	}
}

func newRecover(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "recover ID...",
		Short: "Look again at sandboxes that are unknown or unreachable",
		Long: `Have the agent look again, now, at sandboxes that 'wrenn ps' shows as unknown or
unreachable; 'wrenn inspect' says why they are. The record of an unknown sandbox,
record.json on the host, cannot be used. Mend that file, or replace it with
record.prev.json from the same directory, and recover the sandbox; or destroy
the sandbox with 'wrenn rm'.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, refs []string) error {
			return c.each(cmd, refs, func(ctx context.Context, s *client.Sandbox) error { return s.Recover(ctx) })
		},
	}
}

func newFork(c *cli) *cobra.Command {
	var count int32
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "fork ID",
		Short: "Make new sandboxes from the present state of one",
		Long: `Make new sandboxes from the present state of one, and print their ids. Each has the
memory, the processes and the disk of the source, and its own id, network and
token. The source stops while its state is copied; how long that took is printed
on stderr. To keep a state for later, use 'wrenn snapshot'.`,
		Example: "  wrenn fork 3fa\n  wrenn fork 3fa -n 10",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := c.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			resp, err := s.Fork(cmd.Context(), count)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), resp)
			}
			for _, box := range resp.Sandboxes {
				fmt.Fprintln(cmd.OutOrStdout(), box.SandboxId)
			}
			fmt.Fprintln(cmd.ErrOrStderr(), times(resp.PausedMs, resp.TookMs))
			return nil
		},
	}
	cmd.Flags().Int32VarP(&count, "count", "n", 1, "how many")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the answer as JSON")
	return cmd
}

// times says how long it took to copy a sandbox.
func times(pausedMs, tookMs int64) string {
	return fmt.Sprintf("done in %d ms; the source stood still for %d ms", tookMs, pausedMs)
}

func newRm(c *cli) *cobra.Command {
	var force, all bool
	cmd := &cobra.Command{
		Use:     "rm ID...",
		Aliases: []string{"destroy"},
		Short:   "Destroy sandboxes, whatever their state",
		Long: `Destroy the sandboxes that are named, whatever their state. With --all, destroy
every sandbox of the host except hibernated ones; with
--all --force, those too. On a terminal, --all without --force asks first.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if all && len(args) == 0 {
				return nil
			}
			return cobra.MinimumNArgs(1)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, refs []string) error {
			if all {
				more, err := c.all(cmd, refs, force)
				if err != nil {
					return err
				}
				refs = append(refs, more...)
			}
			return c.each(cmd, refs, func(ctx context.Context, s *client.Sandbox) error {
				err := s.Destroy(ctx)
				if force && connect.CodeOf(err) == connect.CodeNotFound {
					return nil
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not fail for a sandbox that does not exist; with --all, ask nothing and spare none")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "every sandbox of the host that is not hibernated")
	return cmd
}

// all are the ids that `rm --all` destroys beside those that are named. Without force,
// hibernated sandboxes are spared, and a person at a terminal is asked.
func (c *cli) all(cmd *cobra.Command, named []string, force bool) ([]string, error) {
	sandboxes, err := c.host.List(cmd.Context(), true, nil)
	if err != nil {
		return nil, err
	}
	var ids []string
	spared, alive := 0, 0
	for _, s := range sandboxes {
		switch {
		case slices.Contains(named, s.SandboxId):
			continue
		case s.Status == "hibernated" && !force:
			spared++
			continue
		case s.Status != "stopped":
			alive++
		}
		ids = append(ids, s.SandboxId)
	}
	if spared > 0 {
		fmt.Fprintf(cmd.ErrOrStderr(), "wrenn: %d hibernated stay; --force destroys them too\n", spared)
	}
	in, ok := cmd.InOrStdin().(*os.File)
	if force || alive == 0 || !ok || !term.IsTerminal(int(in.Fd())) {
		return ids, nil
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "Destroy all %d sandboxes that live? [y/N] ", alive)
	answer := make(chan string, 1)
	go func() { // nothing can interrupt a read from a terminal
		line, _ := bufio.NewReader(in).ReadString('\n')
		answer <- strings.ToLower(strings.TrimSpace(line))
	}()
	select {
	case said := <-answer:
		if said == "y" || said == "yes" {
			return ids, nil
		}
		return nil, errors.New("no sandbox was destroyed")
	case <-cmd.Context().Done():
		return nil, context.Cause(cmd.Context())
	}
}

func newTimeout(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "timeout ID DURATION",
		Short:   "Set the idle timeout of a sandbox",
		Long:    "Set how long a sandbox may be without activity, from now on, until it expires; 0 is\nwithout end.",
		Example: "  wrenn timeout 3fa 30m",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			timeout, err := time.ParseDuration(args[1])
			if err != nil {
				return fmt.Errorf("%q is not a duration such as 90s, 30m or 2h", args[1])
			}
			seconds, err := wholeSeconds(timeout)
			if err != nil {
				return err
			}
			s, err := c.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			resp, err := s.SetTimeout(cmd.Context(), seconds)
			if err != nil {
				return err
			}
			if at := resp.ExpiresAtUnix; at != 0 {
				fmt.Fprintf(cmd.OutOrStdout(), "%s expires at %s if nothing happens in it\n", s.ID, time.Unix(at, 0).Format(time.DateTime))
			} else {
				fmt.Fprintf(cmd.OutOrStdout(), "%s does not expire\n", s.ID)
			}
			return nil
		},
	}
}

func newDeadline(c *cli) *cobra.Command {
	var then string
	cmd := &cobra.Command{
		Use:   "deadline ID DURATION|TIME|never",
		Short: "Set when a sandbox ends, whatever happens in it",
		Long: `Set after which time from now, or at which time, a sandbox ends, whatever happens in
it. The time 0s is now. A hibernated sandbox has no running deadline: the resume
drops one that has passed.`,
		Example: "  wrenn deadline 3fa 2h\n  wrenn deadline 3fa 2030-01-31T12:00:00Z --on-deadline hibernate",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			at, err := endAt(args[1])
			if err != nil {
				return err
			}
			s, err := c.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if err := s.SetDeadline(cmd.Context(), at, then); err != nil {
				return err
			}
			if at.IsZero() {
				fmt.Fprintf(cmd.OutOrStdout(), "%s has no deadline\n", s.ID)
			} else {
				fmt.Fprintf(cmd.OutOrStdout(), "%s ends at %s\n", s.ID, at.Local().Format(time.DateTime))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&then, "on-deadline", "", "what happens then: destroy, hibernate, or hibernate_files (default as before)")
	return cmd
}
