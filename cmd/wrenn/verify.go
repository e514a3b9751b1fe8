package main

import (
	"context"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/client"
)

func newVerify(c *cli) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "verify [NAME...]",
		Short: "Read snapshots, templates and hibernated sandboxes and check their digests",
		Long: `Read all files that sandboxes start from, and compare them with the digests that were
recorded when they were written: the guest kernel, templates with their boot
snapshots, named snapshots, and hibernated sandboxes. With a NAME, read only that
template, snapshot or hibernated sandbox. Nothing is changed. The exit status is 1
if something is damaged.

A damaged boot snapshot is replaced by the next create that would use it. A damaged
template or kernel is made again by 'wrenn setup' when its directory is removed. A
damaged snapshot or hibernated sandbox is refused when it is used.`,
		Example: "  wrenn verify\n  wrenn verify prepared sb-0123456789abcdef",
		RunE: func(cmd *cobra.Command, names []string) error {
			found, err := verify(cmd.Context(), c.host, names)
			if err != nil {
				return err
			}
			return printVerified(cmd, found, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object for each")
	return cmd
}

// verify returns what the host has read, when all of it is.
func verify(ctx context.Context, host *client.Host, names []string) (found []*hostagentv1.VerifyResponse, err error) {
	defer spin("reading")()
	for v, err := range host.Verify(ctx, names...) {
		if err != nil {
			return nil, err
		}
		found = append(found, v)
	}
	return found, nil
}

// printVerified prints what was found, and says how many are damaged.
func printVerified(cmd *cobra.Command, found []*hostagentv1.VerifyResponse, asJSON bool) error {
	damaged := 0
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
	if !asJSON {
		row(w, "KIND", "NAME", "STATUS")
	}
	for _, v := range found {
		status := "intact"
		if v.Problem != "" {
			damaged++
			status = v.Problem
		}
		if !asJSON {
			row(w, v.Kind, v.Name, status)
		} else if err := printJSON(cmd.OutOrStdout(), v); err != nil {
			return err
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if damaged > 0 {
		return fmt.Errorf("%d of %d are damaged", damaged, len(found))
	}
	return nil
}
