package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/internal/agent"
	"git.omukk.dev/wrenn/sandbox/internal/client"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/templates"
)

// stockNames are the names of the templates whose sources this program has.
func stockNames() string {
	var names []string
	for _, t := range templates.All() {
		names = append(names, t.Name)
	}
	return strings.Join(names, ", ")
}

// findStock returns the templates of those names.
func findStock(names []string) ([]templates.Stock, error) {
	var found []templates.Stock
	for _, name := range names {
		i := slices.IndexFunc(templates.All(), func(t templates.Stock) bool { return t.Name == name })
		switch {
		case name == "mcp-gateway":
			return nil, errors.New("template mcp-gateway is not offered: it is made of services that are not in Debian, PyPI or npm; " +
				"`wrenn template build` makes one of a Dockerfile of yours")
		case i < 0:
			return nil, fmt.Errorf("there is no source of a template %q here, but of %s; "+
				"`wrenn template build DIR` makes one of a Dockerfile", name, stockNames())
		}
		found = append(found, templates.All()[i])
	}
	return found, nil
}

// buildStock builds the templates that are not there: in the agent that serves the state
// directory, or in one of its own.
func buildStock(cmd *cobra.Command, cfg agent.Config, wanted []templates.Stock) (err error) {
	store, err := template.Open(cfg.StateDir, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	missing, err := missingStock(store, wanted)
	if err != nil {
		return err
	}
	for _, t := range wanted {
		if !slices.ContainsFunc(missing, func(m templates.Stock) bool { return m.Name == t.Name }) {
			fmt.Fprintf(cmd.ErrOrStderr(), "template %s  already there\n", t.Name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	cfg.Listen, cfg.Warm = "127.0.0.1:0", 0
	cfg.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelError}))
	own, err := agent.New(ctx, cfg)
	switch {
	case errdefs.ClassOf(err) == errdefs.Busy: // the agent that runs is asked
	case err != nil:
		return err
	default:
		ended := make(chan error, 1)
		go func() { ended <- own.Run(ctx) }()
		defer func() {
			cancel()
			err = errors.Join(err, <-ended)
		}()
	}
	c := &cli{stateDir: cfg.StateDir}
	if c.host, err = client.New("unix://"+agent.SocketPath(cfg.StateDir), ""); err != nil {
		return err
	}
	for _, t := range missing {
		if err := buildOne(cmd, c, t); err != nil {
			return fmt.Errorf("build template %s: %w", t.Name, err)
		}
	}
	return nil
}

// missingStock returns those of which no build can be used. That "base" leads to another
// template as long as there is none does not count.
func missingStock(store *template.Store, wanted []templates.Stock) (missing []templates.Stock, err error) {
	for _, t := range wanted {
		have, b, err := store.Resolve("", t.Name)
		switch class := errdefs.ClassOf(err); {
		case err == nil && b.Status == template.StatusReady && have.Is(t.Name):
		case err == nil, class == errdefs.NotFound, class == errdefs.WrongState: // a build of it may have failed
			missing = append(missing, t)
		default:
			return nil, err
		}
	}
	return missing, nil
}

// buildOne builds a template of its source, as `wrenn template build` does.
func buildOne(cmd *cobra.Command, c *cli, t templates.Stock) error {
	dir, err := os.MkdirTemp("", "wrenn-template-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.CopyFS(dir, t.Files); err != nil {
		return fmt.Errorf("unpack its source: %w", err)
	}
	b := dockerBuild{making: making{
		name: t.Name, vcpus: int32(t.VCPUs), memory: fmt.Sprintf("%dm", t.MemMiB), progress: "auto",
	}}
	req, archives, closed, err := b.read(cmd, dir)
	if err != nil {
		return err
	}
	defer closed()
	return b.run(cmd, c, req, func(ctx context.Context, v *buildView) error { return sendAll(ctx, c, v, archives) })
}
