package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

func newHost(c *cli) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "host",
		Short: "Print what a host may give to sandboxes, and what is in use",
		Long: `Print what a host may give to sandboxes, what of it is in use, what guests run on, and
which templates there are. Hosts whose drivers have the same snapshot key restore each
other's snapshots; --json has it.`,
		Args:              cobra.NoArgs,
		PersistentPreRunE: c.connect,
		RunE: func(cmd *cobra.Command, _ []string) error {
			host, err := c.host.About(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), host)
			}
			return printHost(cmd.OutOrStdout(), host)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print as JSON")
	return cmd
}

func printHost(out io.Writer, h *hostagentv1.GetHostResponse) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	status := "ready"
	if h.Draining {
		status = "draining"
	}
	row(w, "STATUS", cmp.Or(h.Fault, status))
	row(w, "VERSION", h.Version)
	for i, d := range h.Drivers {
		head, text := "ALSO", fmt.Sprintf("%s %s, cpu %s; %s, %s", d.Name, d.Version, d.Cpu, d.Isolation, d.Speed)
		if i == 0 {
			head, text = "VMM", text+": "+d.Why
		}
		if d.Unusable != "" {
			head, text = "NOT USABLE", d.Name+": "+d.Unusable
		}
		row(w, head, printableLine(text))
	}
	used, limit := h.GetUsed(), h.GetLimit()
	row(w, "SANDBOXES", fmt.Sprintf("%d of %d%s", used.GetSandboxes(), limit.GetSandboxes(), byStatus(h.Sandboxes)))
	row(w, "VCPUS", fmt.Sprintf("%d of %d", used.GetVcpus(), limit.GetVcpus()))
	row(w, "MEMORY", fmt.Sprintf("%d of %d MiB", used.GetMemoryMb(), limit.GetMemoryMb()))
	row(w, "DISK", fmt.Sprintf("%d of %d MiB; %s free, %s are kept free",
		used.GetDiskMb(), limit.GetDiskMb(), bytesText(h.DiskFreeBytes), bytesText(h.DiskKeptBytes)))
	row(w, "WARM", fmt.Sprintf("%d of %d", h.Warm, h.WarmWanted))
	row(w, "TEMPLATES", strings.Join(h.Templates, ", "))
	return w.Flush()
}

// byStatus is the number of sandboxes of each status, in parentheses.
func byStatus(sandboxes map[string]int32) string {
	var parts []string
	for _, status := range slices.Sorted(maps.Keys(sandboxes)) {
		if n := sandboxes[status]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, status))
		}
	}
	if parts == nil {
		return ""
	}
	return " (" + strings.Join(parts, ", ") + ")"
}
