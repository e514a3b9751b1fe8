package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"git.omukk.dev/wrenn/sandbox/api/process"
)

// usage is what a sandbox uses, and what runs in it.
type usage struct {
	CPUCount   int     `json:"cpu_count"`
	CPUUsedPct float64 `json:"cpu_used_pct"`
	MemTotal   int64   `json:"mem_total"`
	MemUsed    int64   `json:"mem_used"`
	MemCache   int64   `json:"mem_cache"`
	DiskUsed   int64   `json:"disk_used"`
	DiskTotal  int64   `json:"disk_total"`

	Processes []runningProcess `json:"processes"`
}

type runningProcess struct {
	PID  uint32   `json:"pid"`
	Tag  string   `json:"tag,omitempty"`
	Cmd  string   `json:"cmd"`
	Args []string `json:"args"`
}

func newTop(c *client) *cobra.Command {
	var asJSON, once bool
	cmd := &cobra.Command{
		Use:   "top ID",
		Short: "Show what a running sandbox uses",
		Long: `Show CPU, memory and disk of a running sandbox, and the commands that were
started in it from outside: every second on a terminal, until Ctrl-C, else once.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			id, err := c.resolve(ctx, args[0])
			if err != nil {
				return err
			}
			live := !asJSON && !once && term.IsTerminal(int(os.Stdout.Fd()))
			tick := time.NewTicker(time.Second)
			defer tick.Stop()
			for {
				u, err := c.usage(ctx, id)
				switch {
				case err != nil && ctx.Err() != nil && live:
					return nil
				case err != nil:
					return err
				case asJSON:
					enc := json.NewEncoder(cmd.OutOrStdout())
					enc.SetIndent("", "  ")
					return enc.Encode(u)
				case !live:
					u.print(cmd.OutOrStdout(), id)
					return nil
				}
				var page strings.Builder
				u.print(&page, id)
				// From the top, each line to its end, then what is below.
				fmt.Fprint(os.Stdout, "\x1b[H"+strings.ReplaceAll(printable(page.String()), "\n", "\x1b[K\n")+"\x1b[J")
				select {
				case <-ctx.Done():
					return nil // Ctrl-C is how one leaves
				case <-tick.C:
				}
			}
		},
	}
	cmd.Flags().BoolVar(&once, "once", false, "show it once, on a terminal too")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print it once, as JSON")
	return cmd
}

// usage asks a sandbox what it uses.
func (c *client) usage(ctx context.Context, id string) (*usage, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.host+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.guestHTTP(req, id)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	u := &usage{Processes: []runningProcess{}}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(u); err != nil {
		return nil, fmt.Errorf("read the sandbox's metrics: %w", err)
	}
	list, err := c.processes(id, "").List(ctx, connect.NewRequest(&process.ListRequest{}))
	if err != nil {
		return nil, err
	}
	for _, p := range list.Msg.Processes {
		u.Processes = append(u.Processes, runningProcess{p.Pid, p.GetTag(), p.GetConfig().GetCmd(), p.GetConfig().GetArgs()})
	}
	return u, nil
}

func (u *usage) print(w io.Writer, id string) {
	part := func(used, total int64) string {
		return fmt.Sprintf("%s of %s (%d%%)", bytesText(used), bytesText(total), used*100/max(total, 1))
	}
	fmt.Fprintf(w, "%s  %s\n\n", id, time.Now().Format(time.TimeOnly))
	fmt.Fprintf(w, "CPU     %.1f%% of %d\n", u.CPUUsedPct, u.CPUCount)
	fmt.Fprintf(w, "memory  %s, and %s cache\n", part(u.MemUsed, u.MemTotal), bytesText(u.MemCache))
	fmt.Fprintf(w, "disk    %s\n\n", part(u.DiskUsed, u.DiskTotal))
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	row(t, "PID", "COMMAND")
	for _, p := range u.Processes {
		row(t, p.PID, oneLine(append([]string{p.Cmd}, p.Args...)))
	}
	t.Flush()
}

// oneLine is a command as it fits a line.
func oneLine(argv []string) string {
	line := printableLine(strings.Join(argv, " "))
	if runes := []rune(line); len(runes) > 100 {
		return string(runes[:99]) + "…"
	}
	return line
}
