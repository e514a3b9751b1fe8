package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"git.omukk.dev/wrenn/sandbox/internal/client"
)

func newTop(c *cli) *cobra.Command {
	var asJSON, once bool
	cmd := &cobra.Command{
		Use:   "top ID",
		Short: "Show what a running sandbox uses",
		Long: `Show how much CPU, memory and disk a running sandbox uses, and the commands that
were started in it from outside: on a terminal every second until Ctrl-C, otherwise
once.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := c.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if !asJSON && !once && term.IsTerminal(int(os.Stdout.Fd())) {
				return watchUsage(cmd, s)
			}
			u, err := s.Usage(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printIndented(cmd.OutOrStdout(), u)
			}
			printUsage(cmd.OutOrStdout(), s.ID, u)
			return nil
		},
	}
	cmd.Flags().BoolVar(&once, "once", false, "show it once, on a terminal too")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print it once, as JSON")
	return cmd
}

// watchUsage shows on the terminal what a sandbox uses, until Ctrl-C.
func watchUsage(cmd *cobra.Command, s *client.Sandbox) error {
	ctx := cmd.Context()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		u, err := s.Usage(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		var page strings.Builder
		printUsage(&page, s.ID, u)
		// From the top, each line to its end, then what is below.
		fmt.Fprint(os.Stdout, "\x1b[H"+strings.ReplaceAll(printable(page.String()), "\n", "\x1b[K\n")+"\x1b[J")
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func printUsage(w io.Writer, id string, u *client.Usage) {
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
