package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
)

// client calls a host agent.
type client struct {
	host string

	mu     sync.Mutex
	tokens map[string]string // of sandboxes, as far as they were asked for
}

func (c *client) agent() hostagentv1connect.HostAgentServiceClient {
	return hostagentv1connect.NewHostAgentServiceClient(http.DefaultClient, c.host)
}

// token returns what a sandbox's daemon demands of its callers.
func (c *client) token(ctx context.Context, id string) (string, error) {
	c.mu.Lock()
	token := c.tokens[id]
	c.mu.Unlock()
	if token != "" {
		return token, nil
	}
	resp, err := c.agent().GetSandbox(ctx, connect.NewRequest(&hostagentv1.GetSandboxRequest{SandboxId: id}))
	if err != nil {
		return "", err
	}
	c.keepToken(id, resp.Msg.AccessToken)
	return resp.Msg.AccessToken, nil
}

func (c *client) keepToken(id, token string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tokens == nil {
		c.tokens = make(map[string]string)
	}
	c.tokens[id] = token
}

// list returns the sandboxes of the host.
func (c *client) list(ctx context.Context, all bool) ([]*hostagentv1.SandboxInfo, error) {
	resp, err := c.agent().ListSandboxes(ctx, connect.NewRequest(&hostagentv1.ListSandboxesRequest{All: all}))
	if err != nil {
		return nil, err
	}
	return resp.Msg.Sandboxes, nil
}

// fullID is the length of a sandbox's ID as this version makes them.
const fullID = len("sb-0123456789abcdef")

// resolve turns what a person typed, an ID or the unambiguous beginning of
// one, with or without "sb-", into an ID.
func (c *client) resolve(ctx context.Context, ref string) (string, error) {
	if strings.HasPrefix(ref, "sb-") && len(ref) >= fullID || ref == "" {
		return ref, nil // the agent judges
	}
	sandboxes, err := c.list(ctx, true)
	if err != nil {
		return "", err
	}
	var ids []string
	for _, s := range sandboxes {
		if strings.HasPrefix(s.SandboxId, ref) || strings.HasPrefix(s.SandboxId, "sb-"+ref) {
			ids = append(ids, s.SandboxId)
		}
	}
	switch len(ids) {
	case 0:
		return "", fmt.Errorf("no sandbox's id begins with %q; `wrenn ps` lists them", ref)
	case 1:
		return ids[0], nil
	default:
		return "", fmt.Errorf("%q is the beginning of %d ids: %s", ref, len(ids), strings.Join(ids, " "))
	}
}

// printJSON prints an answer as scripts read it, as the RPC itself would.
func printJSON(w io.Writer, m proto.Message) error {
	data, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return err
	}
	// protojson varies its spacing on purpose.
	var v json.RawMessage = data
	out, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(w, string(out))
	return err
}

// size holds the flags that describe a new sandbox.
type size struct {
	template string
	vcpus    int32
	memory   string
	timeout  time.Duration
	then     string
	reach    reach
}

func (s *size) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.template, "template", "", `template or snapshot to start from (default "minimal")`)
	cmd.Flags().Int32Var(&s.vcpus, "vcpus", 0, "number of virtual CPUs (default 1, or the snapshot's)")
	cmd.Flags().StringVarP(&s.memory, "memory", "m", "", "memory in MiB, or with a unit: 512m, 2g (default 512, or the snapshot's)")
	cmd.Flags().DurationVar(&s.timeout, "timeout", 0, "end the sandbox after so long without activity (10m, 1h); 0 is never")
	cmd.Flags().StringVar(&s.then, "on-timeout", "destroy", "what happens then: destroy, or hibernate to disk")
	s.reach.flags(cmd)
}

func (s *size) request() (*hostagentv1.CreateSandboxRequest, error) {
	var mem int32
	if s.memory != "" {
		var err error
		if mem, err = parseMiB(s.memory); err != nil {
			return nil, err
		}
	}
	timeout, err := wholeSeconds(s.timeout)
	if err != nil {
		return nil, err
	}
	policy, err := s.reach.policy()
	if err != nil {
		return nil, err
	}
	return &hostagentv1.CreateSandboxRequest{
		Template: s.template, Vcpus: s.vcpus, MemoryMb: mem, TimeoutSec: timeout, OnTimeout: s.then, Network: policy,
	}, nil
}

// parseMiB reads a size as docker writes it; a bare number is MiB.
func parseMiB(s string) (int32, error) {
	text := strings.ToLower(strings.TrimSpace(s))
	text = strings.TrimSuffix(strings.TrimSuffix(text, "b"), "i")
	factor := 1.0
	switch {
	case strings.HasSuffix(text, "g"):
		factor, text = 1024, strings.TrimSuffix(text, "g")
	case strings.HasSuffix(text, "m"):
		text = strings.TrimSuffix(text, "m")
	}
	n, err := strconv.ParseFloat(text, 64)
	if err != nil || n*factor < 1 || n*factor > 1<<30 {
		return 0, fmt.Errorf("memory %q is not a size: give MiB, or a number with m or g", s)
	}
	return int32(n * factor), nil
}

// create makes a sandbox, with a sign of life while it boots.
func (c *client) create(ctx context.Context, s *size) (*hostagentv1.CreateSandboxResponse, error) {
	req, err := s.request()
	if err != nil {
		return nil, err
	}
	defer spin("booting a sandbox")()
	resp, err := c.agent().CreateSandbox(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	c.keepToken(resp.Msg.SandboxId, resp.Msg.AccessToken)
	resp.Msg.AccessToken = "" // it is not printed by the way
	return resp.Msg, nil
}

// spin shows on a terminal that something goes on, until stopped.
func spin(what string) (stop func()) {
	if !term.IsTerminal(int(os.Stderr.Fd())) {
		return func() {}
	}
	done, gone := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(gone)
		start := time.Now()
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-done:
				fmt.Fprint(os.Stderr, "\r\x1b[K")
				return
			case <-tick.C:
				fmt.Fprintf(os.Stderr, "\r%c %s… %.1fs", `|/-\`[i%4], what, time.Since(start).Seconds())
			}
		}
	}()
	return func() { close(done); <-gone }
}

func newCreate(c *client) *cobra.Command {
	var s size
	var asJSON, verbose bool
	cmd := &cobra.Command{
		Use:   "create [TEMPLATE]",
		Short: "Create a sandbox and print its id",
		Long: `Create a sandbox from a template or a snapshot, wait until commands can run in
it, and print its id. It stays until 'wrenn rm', or until its --timeout has
passed without activity.`,
		Example: "  wrenn create --memory 1g --vcpus 2 --timeout 30m\n  wrenn create my-snapshot",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				if s.template != "" && s.template != args[0] {
					return fmt.Errorf("two templates are named: %q and %q", args[0], s.template)
				}
				s.template = args[0]
			}
			resp, err := c.create(cmd.Context(), &s)
			if err != nil {
				return err
			}
			if verbose {
				fmt.Fprintln(cmd.ErrOrStderr(), printableLine(course(resp)))
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), resp)
			}
			fmt.Fprintln(cmd.OutOrStdout(), resp.SandboxId)
			return nil
		},
	}
	s.flags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the answer as JSON")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "say on stderr what the sandbox started from and what the time went into")
	return cmd
}

// course says in a line what a sandbox started from, and what that took.
func course(resp *hostagentv1.CreateSandboxResponse) string {
	line := "started from: " + resp.StartedFrom
	if resp.Why != "" {
		line += " (" + resp.Why + ")"
	}
	for i, p := range resp.Phases {
		line += fmt.Sprintf("%s %s %.1f ms", map[bool]string{true: ";", false: ","}[i == 0], p.Name, p.Ms)
	}
	return line
}

func newPs(c *client) *cobra.Command {
	var all, quiet, asJSON bool
	cmd := &cobra.Command{
		Use:     "ps",
		Aliases: []string{"ls", "list"},
		Short:   "List sandboxes",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			sandboxes, err := c.list(cmd.Context(), all)
			if err != nil {
				return err
			}
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
			w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
			row(w, "SANDBOX ID", "TEMPLATE", "STATUS", "VCPUS", "MEMORY", "ADDRESS", "CREATED", "EXPIRES")
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
				row(w, s.SandboxId, s.Template, statusText(s), s.Vcpus, fmt.Sprintf("%d MiB", s.MemoryMb), s.HostIp, created, expires)
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also those that ended by themselves not long ago")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print ids alone")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the answer as JSON")
	return cmd
}

// statusText is a sandbox's state, with the reason if it has one.
func statusText(s *hostagentv1.SandboxInfo) string {
	if s.Reason == "" {
		return s.Status
	}
	return s.Status + " (" + s.Reason + ")"
}

// rough is a duration as people say it.
func rough(d time.Duration) string {
	switch d = max(d, 0); {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d seconds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d minutes", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d hours", int(d.Hours()))
	default:
		return fmt.Sprintf("%d days", int(d.Hours()/24))
	}
}

// each runs do for every sandbox named, prints the name of each that
// succeeded, and goes on after one that did not.
func (c *client) each(cmd *cobra.Command, refs []string, do func(ctx context.Context, id string) error) error {
	var errs []error
	for _, ref := range refs {
		id, err := c.resolve(cmd.Context(), ref)
		if err == nil {
			err = do(cmd.Context(), id)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintln(cmd.OutOrStdout(), ref)
	}
	return all(errs)
}

func newPause(c *client) *cobra.Command {
	var toDisk bool
	cmd := &cobra.Command{
		Use:   "pause ID...",
		Short: "Stop the vCPUs of sandboxes; their memory stays, or goes to disk",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, refs []string) error {
			return c.each(cmd, refs, func(ctx context.Context, id string) error {
				_, err := c.agent().PauseSandbox(ctx, connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: id, ToDisk: toDisk}))
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&toDisk, "to-disk", false, "hibernate: write the memory to disk and end the VM")
	return cmd
}

func newFork(c *client) *cobra.Command {
	var count int32
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "fork ID",
		Short: "Make new sandboxes from the present state of one, which goes on",
		Long: `Make new sandboxes from the present state of one, and print their ids. They have
the memory, the processes and the disk of their source, and an id, a network and
a token of their own. The source stands still only while its state is copied; how
long that took is printed on stderr. To keep a state for later, make a snapshot.`,
		Example: "  wrenn fork 3fa\n  wrenn fork 3fa -n 10",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := c.resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			resp, err := c.agent().ForkSandbox(cmd.Context(), connect.NewRequest(&hostagentv1.ForkSandboxRequest{SandboxId: id, Count: count}))
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), resp.Msg)
			}
			for _, box := range resp.Msg.Sandboxes {
				fmt.Fprintln(cmd.OutOrStdout(), box.SandboxId)
			}
			fmt.Fprintln(cmd.ErrOrStderr(), times(resp.Msg.PausedMs, resp.Msg.TookMs))
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

func newResume(c *client) *cobra.Command {
	return &cobra.Command{
		Use:     "resume ID...",
		Aliases: []string{"unpause"},
		Short:   "Let paused or hibernated sandboxes go on where they stopped",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, refs []string) error {
			return c.each(cmd, refs, func(ctx context.Context, id string) error {
				_, err := c.agent().ResumeSandbox(ctx, connect.NewRequest(&hostagentv1.ResumeSandboxRequest{SandboxId: id}))
				return err
			})
		},
	}
}

func (c *client) destroy(ctx context.Context, id string) error {
	_, err := c.agent().DestroySandbox(ctx, connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: id}))
	return err
}

func newRm(c *client) *cobra.Command {
	var force, all bool
	cmd := &cobra.Command{
		Use:     "rm ID...",
		Aliases: []string{"destroy", "kill"},
		Short:   "Destroy sandboxes, whatever their state",
		Args: func(cmd *cobra.Command, args []string) error {
			if all && len(args) == 0 {
				return nil
			}
			return cobra.MinimumNArgs(1)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, refs []string) error {
			if all {
				sandboxes, err := c.list(cmd.Context(), true)
				if err != nil {
					return err
				}
				for _, s := range sandboxes {
					if !slices.Contains(refs, s.SandboxId) {
						refs = append(refs, s.SandboxId)
					}
				}
			}
			return c.each(cmd, refs, func(ctx context.Context, id string) error {
				err := c.destroy(ctx, id)
				if force && connect.CodeOf(err) == connect.CodeNotFound {
					return nil
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "that a sandbox does not exist is no error")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "every sandbox of the host")
	return cmd
}

func newLogs(c *client) *cobra.Command {
	var tail int32
	var raw bool
	cmd := &cobra.Command{
		Use:   "logs ID",
		Short: "Print a guest's console",
		Long: `Print the end of a guest's serial console: what its kernel and envd had to say.
A program in the sandbox can write there, too. What would move a cursor, or do
more to a terminal, is shown as \uXXXX, also where stdout is none; --raw prints the
bytes as they are.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := c.resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			resp, err := c.agent().GetConsole(cmd.Context(), connect.NewRequest(&hostagentv1.GetConsoleRequest{SandboxId: id, TailBytes: tail}))
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if raw {
				out = os.Stdout
			}
			_, err = out.Write(resp.Msg.Console)
			return err
		},
	}
	cmd.Flags().BoolVar(&raw, "raw", false, "print the bytes as they are; a terminal obeys them")
	cmd.Flags().Int32Var(&tail, "tail-bytes", 0, "how much from the end; 0 is 64 KiB, 1 MiB at most")
	return cmd
}

func newInspect(c *client) *cobra.Command {
	var token bool
	cmd := &cobra.Command{
		Use:   "inspect ID",
		Short: "Print all that is known of a sandbox, as JSON",
		Long: `Print all that is known of a sandbox, as JSON; also of one that has ended by
itself not long ago, with the reason. Its access token is not part of that:
--token prints it alone, for clients of the sandbox's daemon.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := c.resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			resp, err := c.agent().GetSandbox(cmd.Context(), connect.NewRequest(&hostagentv1.GetSandboxRequest{SandboxId: id}))
			if err != nil {
				return err
			}
			if token {
				if resp.Msg.AccessToken == "" {
					return fmt.Errorf("sandbox %s has ended, and its token with it", id)
				}
				fmt.Fprintln(cmd.OutOrStdout(), resp.Msg.AccessToken)
				return nil
			}
			return printJSON(cmd.OutOrStdout(), resp.Msg.Sandbox)
		},
	}
	cmd.Flags().BoolVar(&token, "token", false, "print the sandbox's access token alone; who has it commands the sandbox")
	return cmd
}

func newTimeout(c *client) *cobra.Command {
	return &cobra.Command{
		Use:     "timeout ID DURATION",
		Short:   "Set after how much inactivity a sandbox expires",
		Long:    "Set after how much inactivity, counted from now, a sandbox expires; 0 is never.",
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
			id, err := c.resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			resp, err := c.agent().SetTimeout(cmd.Context(), connect.NewRequest(&hostagentv1.SetTimeoutRequest{SandboxId: id, TimeoutSec: seconds}))
			if err != nil {
				return err
			}
			if at := resp.Msg.ExpiresAtUnix; at != 0 {
				fmt.Fprintf(cmd.OutOrStdout(), "%s expires at %s if nothing happens in it\n", id, time.Unix(at, 0).Format(time.DateTime))
			} else {
				fmt.Fprintf(cmd.OutOrStdout(), "%s does not expire\n", id)
			}
			return nil
		},
	}
}

// wholeSeconds is a timeout as the API counts it.
func wholeSeconds(d time.Duration) (int32, error) {
	if d < 0 || d%time.Second != 0 {
		return 0, fmt.Errorf("timeout %s is not a whole number of seconds from 0 up", d)
	}
	return int32(min(d/time.Second, 1<<31-1)), nil
}

func newEvents(c *client) *cobra.Command {
	var after uint64
	var noFollow, asJSON bool
	cmd := &cobra.Command{
		Use:   "events [ID]",
		Short: "Print changes of state as they happen",
		Long: `Print every change of state of every sandbox, or of one: first those that are
remembered, then new ones as they happen. Each has a cursor; --after CURSOR goes
on where an earlier look ended.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &hostagentv1.WatchEventsRequest{After: after, NoFollow: noFollow}
			if len(args) == 1 {
				id, err := c.resolve(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				req.SandboxId = id
			}
			stream, err := c.agent().WatchEvents(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			defer stream.Close()
			out := cmd.OutOrStdout()
			for stream.Receive() {
				e := stream.Msg().Event
				if e == nil {
					continue
				}
				if asJSON {
					line, err := protojson.Marshal(e)
					if err != nil {
						return err
					}
					var compact bytes.Buffer
					if err := json.Compact(&compact, line); err != nil {
						return err
					}
					fmt.Fprintln(out, compact.String())
					continue
				}
				reason := ""
				if e.Reason != "" {
					reason = " (" + e.Reason + ")"
				}
				at := time.UnixMilli(e.TimeUnixMs).Format("2006-01-02 15:04:05.000")
				fmt.Fprintln(out, printableLine(fmt.Sprintf("%d  %s  %s  %s%s", e.Cursor, at, e.SandboxId, e.To, reason)))
			}
			if cmd.Context().Err() != nil {
				return nil // Ctrl-C is how one leaves
			}
			return stream.Err()
		},
	}
	cmd.Flags().Uint64Var(&after, "after", 0, "only events with a higher cursor")
	cmd.Flags().BoolVar(&noFollow, "no-follow", false, "end after the remembered events")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object a line")
	return cmd
}

func newVersion(c *client) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program and of the host agent",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), 3*time.Second)
			defer cancel()
			agent, err := c.agent().GetVersion(ctx, connect.NewRequest(&hostagentv1.GetVersionRequest{}))
			out := cmd.OutOrStdout()
			if asJSON {
				v := map[string]any{"client": buildVersion(), "host": nil}
				if err == nil {
					v["host"] = map[string]string{"version": agent.Msg.Version, "vmm": agent.Msg.Vmm, "vmmVersion": agent.Msg.VmmVersion}
				}
				enc := json.NewEncoder(out)
				enc.SetIndent("", "  ")
				return enc.Encode(v)
			}
			host := ""
			if err != nil {
				host = explain(err)
			} else {
				host = fmt.Sprintf("%s, sandboxes by %s %s", agent.Msg.Version, agent.Msg.Vmm, agent.Msg.VmmVersion)
			}
			fmt.Fprintf(out, "client  %s\nhost    %s\n", buildVersion(), printableLine(host))
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print as JSON")
	return cmd
}
