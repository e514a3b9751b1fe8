package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/client"
)

func newPs(c *cli) *cobra.Command {
	var all, quiet, asJSON bool
	var filters []string
	cmd := &cobra.Command{
		Use:     "ps [ID]",
		Aliases: []string{"ls", "list"},
		Short:   "List sandboxes, or the processes in one",
		Long: `List sandboxes, or with ID all processes in a sandbox: those that were started from
outside, which can be attached to, all others, and for a while those that were started
with 'exec -d' and have ended. --filter lists only some sandboxes:

  label=NAME=VALUE   that have this label; label=NAME for any value of it
  name=TEXT          whose name has this text in it
  state=STATE        running, paused, hibernated and the like; stopped implies --all

Several filters for labels must all be true, and one of several for names or states.`,
		Example: "  wrenn ps -f label=team=blue -f state=paused -f state=hibernated -q",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return c.processes(cmd, args[0], quiet, asJSON)
			}
			f, err := parseFilters(filters)
			if err != nil {
				return err
			}
			sandboxes, err := c.host.List(cmd.Context(), all || slices.Contains(f.states, "stopped"), f.labels)
			if err != nil {
				return err
			}
			sandboxes = slices.DeleteFunc(sandboxes, func(s *hostagentv1.SandboxInfo) bool { return !f.match(s) })
			out := cmd.OutOrStdout()
			switch {
			case asJSON:
				return printJSON(out, &hostagentv1.ListSandboxesResponse{Sandboxes: sandboxes})
			case quiet:
				for _, s := range sandboxes {
					fmt.Fprintln(out, s.SandboxId)
				}
				return nil
			}
			return printSandboxes(out, sandboxes)
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also list sandboxes that ended by themselves, for as long as the agent remembers them")
	cmd.Flags().StringArrayVarP(&filters, "filter", "f", nil, "list only some: label=NAME=VALUE, name=TEXT or state=STATE; may be repeated")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only ids, or PIDs")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the answer as JSON")
	return cmd
}

func printSandboxes(out io.Writer, sandboxes []*hostagentv1.SandboxInfo) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	row(w, "SANDBOX ID", "TEMPLATE", "STATUS", "VCPUS", "MEMORY", "ADDRESS", "CREATED", "EXPIRES", "NAME")
	for _, s := range sandboxes {
		created, expires := "-", "never"
		if s.CreatedAtUnix > 0 {
			created = rough(time.Since(time.Unix(s.CreatedAtUnix, 0))) + " ago"
		}
		if s.ExpiresAtUnix != 0 {
			expires = "in " + rough(time.Until(time.Unix(s.ExpiresAtUnix, 0)))
		} else if s.TimeoutSec != 0 || s.CreatedAtUnix <= 0 || s.Status == "stopped" {
			expires = "-"
		}
		address := cmp.Or(s.HostIp, "-")
		if s.Status == "stopped" {
			address = "-" // another sandbox may have it by now
		}
		row(w, s.SandboxId, cmp.Or(s.Snapshot, s.Template), client.StatusText(s), s.Vcpus,
			fmt.Sprintf("%d MiB", s.MemoryMb), address, created, expires, cmp.Or(s.Name, "-"))
	}
	return w.Flush()
}

// states are what --filter state= takes.
var states = []string{"creating", "running", "paused", "hibernated", "stopping", "stopped", "unknown"}

// filters say which sandboxes ps lists.
type filters struct {
	labels map[string]string // the agent's own filter
	keys   []string          // of labels with any value
	names  []string          // parts of names
	states []string
}

func parseFilters(texts []string) (filters, error) {
	f := filters{labels: map[string]string{}}
	for _, text := range texts {
		key, value, _ := strings.Cut(text, "=")
		switch {
		case value == "":
			return f, fmt.Errorf("--filter %q: want label=NAME=VALUE, name=TEXT or state=STATE", text)
		case key == "label":
			name, wanted, pair := strings.Cut(value, "=")
			has, twice := f.labels[name]
			switch {
			case name == "" || twice && pair && has != wanted:
				return f, fmt.Errorf("--filter %q: want label=NAME=VALUE, and one value for each name", text)
			case pair:
				f.labels[name] = wanted
			default:
				f.keys = append(f.keys, name)
			}
		case key == "name":
			f.names = append(f.names, value)
		case key == "state" || key == "status":
			if !slices.Contains(states, value) {
				return f, fmt.Errorf("--filter %q: want one of %s", text, strings.Join(states, ", "))
			}
			f.states = append(f.states, value)
		default:
			return f, fmt.Errorf("--filter %q: want label=NAME=VALUE, name=TEXT or state=STATE", text)
		}
	}
	return f, nil
}

// match says whether a sandbox passes what the agent does not filter.
func (f filters) match(s *hostagentv1.SandboxInfo) bool {
	for _, key := range f.keys {
		if _, ok := s.Metadata[key]; !ok {
			return false
		}
	}
	named := func(part string) bool { return strings.Contains(s.Name, part) }
	return (len(f.names) == 0 || slices.ContainsFunc(f.names, named)) && (len(f.states) == 0 || slices.Contains(f.states, s.Status))
}
