package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"git.omukk.dev/wrenn/sandbox/internal/agent"
	"git.omukk.dev/wrenn/sandbox/internal/host"
	"git.omukk.dev/wrenn/sandbox/internal/progress"
	"git.omukk.dev/wrenn/sandbox/internal/setup"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// beside is where the build puts another program: beside this one.
func beside(program string) string {
	exe, err := os.Executable()
	if err != nil {
		return program
	}
	return filepath.Join(filepath.Dir(exe), program)
}

func newSetup() *cobra.Command {
	var c *hostFlags
	var o setup.Options
	var names []string
	cmd := &cobra.Command{
		Use:   "setup",
		Short: "Install and prepare what the host needs",
		Long: `Install missing packages through apt, and prepare the guest kernel, the initrd
with the guest daemon, the template "minimal" and a boot snapshot of it, from
which sandboxes start, in the state directory. What is there and complete is
kept, so that setup can be run again at any time; the next run completes an
interrupted one.
With --template also a template is built whose source this program has; one that is
there is kept.
Address ranges are chosen among those that are free on this host, and recorded.
It needs root.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errors.New("setup needs root: sudo wrenn setup")
			}
			stock, err := findStock(names)
			if err != nil {
				return err
			}
			cfg, err := c.host()
			if err != nil {
				return err
			}
			if _, err := os.Stat(o.Envd); err != nil {
				return fmt.Errorf("find the guest daemon: %w; build it with `make build`, or name it with --envd", err)
			}
			p := newProgress(os.Stderr)
			defer p.end()
			if err := setup.InstallMissing(cmd.Context(), p.show); err != nil {
				return err
			}
			store, err := template.Open(cfg.StateDir, slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			if err := setup.Run(cmd.Context(), store, o, p.show); err != nil {
				return err
			}
			if err := prepareBoot(cmd.Context(), cfg, p.show); err != nil {
				return err
			}
			p.end()
			if err := buildStock(cmd, cfg, stock); err != nil {
				return err
			}
			serve := "wrenn serve"
			if cfg.StateDir != agent.DefaultStateDir {
				serve += " --state-dir " + cfg.StateDir
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "ready in %s; run the host agent with `%s`\n", cfg.StateDir, serve)
			return nil
		},
	}
	c = newHostFlags(cmd)
	cmd.Flags().StringVar(&o.Envd, "envd", env("WRENN_ENVD", beside("envd")), "the guest daemon to put into the initrd (env WRENN_ENVD)")
	cmd.Flags().StringVar(&o.Kernel, "kernel", "", `guest kernel: "debian", or the path of a vmlinux or bzImage; empty keeps what is there`)
	cmd.Flags().StringArrayVar(&names, "template", nil, "a template to build as well, of "+stockNames()+"; may be repeated")
	cmd.Flags().StringVar(&o.Modules, "modules", "", "directory of the modules that belong to --kernel")
	return cmd
}

// progressLine shows what setup does: one line a step, which a terminal sees
// change.
type progressLine struct {
	w       io.Writer
	tty     bool
	current string
	began   time.Time
	shown   time.Time
}

func newProgress(w io.Writer) *progressLine {
	f, ok := w.(*os.File)
	return &progressLine{w: w, tty: ok && term.IsTerminal(int(f.Fd()))}
}

func (p *progressLine) show(e progress.Event) {
	now := time.Now()
	switch e.Phase {
	case progress.Began:
		p.end()
		p.current, p.began = e.Step, now
		p.line(e, "")
	case progress.Going:
		// A log is not a terminal: a line every few seconds tells enough.
		every := 5 * time.Second
		if p.tty {
			every = 100 * time.Millisecond
		}
		if now.Sub(p.shown) >= every {
			p.line(e, "")
		}
	case progress.Did:
		p.line(e, fmt.Sprintf("done in %.1fs", now.Sub(p.began).Seconds()))
		p.current = ""
	case progress.Kept:
		p.line(e, "already there")
		p.current = ""
	}
}

func (p *progressLine) line(e progress.Event, outcome string) {
	p.shown = time.Now()
	text := fmt.Sprintf("%-14s", e.Step)
	if e.Total > 0 && outcome == "" {
		const width = 24
		full := int(min(e.Done, e.Total) * width / e.Total)
		text += fmt.Sprintf(" [%s%s] %3d%%", strings.Repeat("#", full), strings.Repeat("-", width-full), min(e.Done, e.Total)*100/e.Total)
	}
	for _, s := range []string{e.Detail, outcome} {
		if s != "" {
			text += "  " + printableLine(s)
		}
	}
	switch {
	case !p.tty && e.Phase == progress.Began:
		return // what follows says as much
	case !p.tty:
		fmt.Fprintln(p.w, strings.TrimRight(text, " "))
		return
	}
	if runes := []rune(text); len(runes) > 100 {
		text = string(runes[:100])
	}
	end := ""
	if outcome != "" {
		end = "\n"
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s%s", text, end)
}

// end closes the line of a step that did not come to its end.
func (p *progressLine) end() {
	if p.current != "" && p.tty {
		fmt.Fprintln(p.w)
	}
	p.current = ""
}

func newDoctor() *cobra.Command {
	var c *hostFlags
	var envd string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what the host has and lacks, and how to mend it",
		Long: `Look at everything that a host needs to run sandboxes: say whether it is there,
why it matters, and the command that mends it. The exit status is 1 when
something required is missing. As root it sees more.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := c.host()
			if err != nil {
				return err
			}
			checks, err := cfg.Doctor(cmd.Context(), envd)
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if asJSON {
				enc := json.NewEncoder(out)
				enc.SetIndent("", "  ")
				if err := enc.Encode(checks); err != nil {
					return err
				}
			} else {
				printChecks(out, checks)
			}
			if !host.Ready(checks) {
				return exitError(1)
			}
			return nil
		},
	}
	c = newHostFlags(cmd)
	cmd.Flags().StringVar(&envd, "envd", env("WRENN_ENVD", beside("envd")), "the guest daemon that the initrd should hold (env WRENN_ENVD)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print as JSON")
	return cmd
}

// printChecks prints checks for a person, and what follows from them.
func printChecks(w io.Writer, checks []host.Check) {
	seen := map[string]bool{}
	for _, c := range checks {
		mark := "ok"
		switch {
		case c.Unknown:
			mark = "??"
		case !c.OK && c.Level == host.Required:
			mark = "NO"
		case !c.OK:
			mark = "--"
		}
		seen[mark] = true
		fmt.Fprintf(w, "%s  %-18s %s\n", mark, c.Name, c.Found)
		fmt.Fprintf(w, "    %-18s why:  %s\n", "", c.Why)
		if c.Fix != "" {
			fmt.Fprintf(w, "    %-18s mend: %s\n", "", c.Fix)
		}
	}
	fmt.Fprintln(w)
	if seen["--"] {
		fmt.Fprintln(w, "-- is optional: sandboxes run without it, slower or less contained.")
	}
	if seen["??"] {
		fmt.Fprintln(w, "?? could not be looked at.")
	}
	switch {
	case host.Ready(checks):
		fmt.Fprintln(w, "This host can run sandboxes.")
	case seen["NO"]:
		fmt.Fprintln(w, "This host cannot run sandboxes yet: mend what is marked NO.")
	default:
		fmt.Fprintln(w, "Whether this host can run sandboxes is not known: run `wrenn doctor` as root.")
	}
}
