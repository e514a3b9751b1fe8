package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

func newDrain(c *cli) *cobra.Command {
	var hibernate bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "drain",
		Short: "Let a host take no more sandboxes, and end its agent",
		Long: `Let a host take no more sandboxes, and end its agent when no sandbox has a VM any more:
to maintain the machine, or to give it back. Sandboxes go on until they end or hibernate
by themselves; with --hibernate they are written to disk now, and the next agent resumes
them. /readyz and wrenn host say that the host is drained.

After --timeout the agent ends in any case. VMs that are left then go on without it, and
drain ends with status 1. Nothing is destroyed, whatever --on-shutdown of serve says.`,
		Example:           "  wrenn drain --hibernate\n  wrenn drain --timeout 2h",
		Args:              cobra.NoArgs,
		PersistentPreRunE: c.connect,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if timeout < time.Second {
				return errors.New("--timeout must be a second or more")
			}
			left, err := c.host.Drain(cmd.Context(), hibernate, timeout)
			switch {
			case err != nil:
				return err
			case left > 0:
				return fmt.Errorf("the agent ends, and %d sandboxes still have a VM", left)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), "drained")
			return err
		},
	}
	cmd.Flags().BoolVar(&hibernate, "hibernate", false, "write the sandboxes to disk instead of waiting for their end")
	cmd.Flags().DurationVar(&timeout, "timeout", 10*time.Minute, "end the agent after that in any case")
	return cmd
}
