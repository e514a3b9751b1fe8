package main

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"text/tabwriter"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

func newSnapshot(c *cli) *cobra.Command {
	var asJSON, filesOnly bool
	cmd := &cobra.Command{
		Use:   "snapshot ID [NAME]",
		Short: "Keep the present state of a sandbox under a name",
		Long: `Keep the present state of a sandbox and print the name of the snapshot. Without a
NAME, one is made up. The sandbox goes on. It stops while its memory is copied; how
long that took is printed on stderr.

'wrenn create NAME' and 'wrenn run --template NAME' make sandboxes that go on with
the memory, the processes and the disk of the snapshot, any number of times, even
after the sandbox is destroyed. Each has its own id, network and token. With
--files-only the disk alone is kept, and they boot from it. A NAME may have a tag, as
in prepared:v2; each tag is a snapshot of its own.

All that is in the memory of the sandbox or on its disk is in the snapshot, secrets
too.`,
		Example: "  wrenn snapshot 3fa prepared\n  wrenn create prepared\n  wrenn snapshots\n  wrenn snapshot rm prepared",
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := c.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			name := ""
			if len(args) > 1 {
				if name = args[1]; name == "" {
					return errors.New("the snapshot's name is empty; leave it out to have one made up")
				}
			}
			done := spin("copying the sandbox")
			resp, err := s.Snapshot(cmd.Context(), name, filesOnly)
			done()
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), resp)
			}
			fmt.Fprintln(cmd.OutOrStdout(), resp.Snapshot.Name)
			fmt.Fprintln(cmd.ErrOrStderr(), times(resp.PausedMs, resp.TookMs))
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the answer as JSON")
	cmd.Flags().BoolVar(&filesOnly, "files-only", false, "keep the disk and not the memory")
	list := newSnapshots(c)
	list.Use, list.Aliases = "ls", []string{"list"}
	cmd.AddCommand(newSnapshotRm(c), list)
	return cmd
}

func newSnapshotRm(c *cli) *cobra.Command {
	var force bool
	var project string
	cmd := &cobra.Command{
		Use:     "rm NAME...",
		Aliases: []string{"delete"},
		Short:   "Delete snapshots; sandboxes made from them go on",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, names []string) error {
			var errs []error
			for _, name := range names {
				err := c.host.DeleteSnapshot(cmd.Context(), project, name)
				if err != nil && !(force && connect.CodeOf(err) == connect.CodeNotFound) {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(cmd.OutOrStdout(), name)
			}
			return all(errs)
		},
	}
	cmd.Flags().StringVar(&project, "project", "", "project of the snapshots, for who commands the host; your own when empty")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not fail for a snapshot that does not exist")
	return cmd
}

// all is what a command ends with that went on after errors: one is the
// program's, several are printed.
func all(errs []error) error {
	if len(errs) > 1 {
		for _, err := range errs {
			complain("%s", explain(err))
		}
		return exitError(1)
	}
	return errors.Join(errs...)
}

func newSnapshots(c *cli) *cobra.Command {
	var quiet, asJSON bool
	cmd := &cobra.Command{
		Use:   "snapshots",
		Short: "List snapshots",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			resp, err := c.host.Snapshots(cmd.Context())
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			switch {
			case asJSON:
				return printJSON(out, resp)
			case quiet:
				for _, s := range resp.Snapshots {
					if s.Project == "" {
						fmt.Fprintln(out, s.Name)
					}
				}
				return nil
			}
			w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
			head := []any{"NAME", "SANDBOX ID", "TEMPLATE", "VCPUS", "MEMORY", "SIZE", "CREATED"}
			others := slices.ContainsFunc(resp.Snapshots, func(s *hostagentv1.Snapshot) bool { return s.Project != "" })
			if others {
				head = append(head, "PROJECT")
			}
			row(w, head...)
			for _, s := range resp.Snapshots {
				cells := []any{s.Name, s.SandboxId, s.Template, s.Vcpus, fmt.Sprintf("%d MiB", s.MemoryMb),
					fmt.Sprintf("%d MiB", (s.SizeBytes+1<<20-1)>>20), rough(time.Since(time.Unix(s.CreatedAtUnix, 0))) + " ago"}
				if others {
					cells = append(cells, cmp.Or(s.Project, "-"))
				}
				row(w, cells...)
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only names, without those of other projects")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the answer as JSON")
	return cmd
}
