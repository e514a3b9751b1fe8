package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// size holds the flags that describe a new sandbox.
type size struct {
	template string
	vcpus    int32
	memory   string
	timeout  time.Duration
	then     string
	deadline string
	atEnd    string
	name     string
	publish  []string
	busy     string
	disk     string
	user     string
	workdir  string
	env      vars
	labels   []string
	wake     bool
	vmm      string
	isolated string
	reach    reach
}

func (s *size) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.template, "template", "", `template or snapshot to start from (default "minimal")`)
	cmd.Flags().Int32Var(&s.vcpus, "vcpus", 0, "number of virtual CPUs (default 1, or the snapshot's)")
	cmd.Flags().StringVarP(&s.memory, "memory", "m", "", "memory in MiB, or with a unit: 512m, 2g (default 512, or the snapshot's)")
	cmd.Flags().StringVar(&s.name, "name", "", "name that stands for the id in all commands; no other sandbox of the project may have it")
	cmd.Flags().StringArrayVarP(&s.publish, "publish", "p", nil,
		"listen on 127.0.0.1 of the agent's host for a port of the sandbox: [HOSTPORT:]PORT; may be repeated")
	cmd.Flags().StringVar(&s.disk, "disk", "", "size of the disk in MiB, or with a unit: 10g (default the host's, or the snapshot's)")
	cmd.Flags().DurationVar(&s.timeout, "timeout", 0, "end the sandbox when this time passes without activity (10m, 1h); 0 is never")
	cmd.Flags().StringVar(&s.busy, "busy", "",
		"cpu: programs that use a fifth of a vCPU count as activity for --timeout (default no)")
	cmd.Flags().StringVar(&s.then, "on-timeout", "destroy", "what happens when --timeout passes: destroy, hibernate, or hibernate_files")
	cmd.Flags().StringVar(&s.deadline, "deadline", "",
		"end the sandbox after this time, whatever happens in it (2h), or at a time (2030-01-31T12:00:00Z)")
	cmd.Flags().StringVar(&s.atEnd, "on-deadline", "destroy", "what happens at --deadline: destroy, hibernate, or hibernate_files")
	cmd.Flags().BoolVar(&s.wake, "wake", false,
		"resume the sandbox, while it is paused or hibernated, for each exec, copy and request to a port")
	cmd.Flags().StringArrayVarP(&s.labels, "label", "l", nil,
		"set NAME=VALUE as metadata, by which ps --filter finds the sandbox; may be repeated")
	cmd.Flags().StringVar(&s.vmm, "vmm", "", "driver that runs the sandbox, of 'wrenn host' (default the first that can)")
	cmd.Flags().StringVar(&s.isolated, "isolation", "", "vm for a machine with a kernel of its own, however slow (default any driver)")
	s.reach.flags(cmd)
}

func (s *size) request() (*hostagentv1.CreateSandboxRequest, error) {
	mem, err := sizeOf("memory", s.memory)
	if err != nil {
		return nil, err
	}
	disk, err := sizeOf("disk", s.disk)
	if err != nil {
		return nil, err
	}
	timeout, err := wholeSeconds(s.timeout)
	if err != nil {
		return nil, err
	}
	env, err := s.env.read()
	if err != nil {
		return nil, err
	}
	labels, err := labelsOf(s.labels)
	if err != nil {
		return nil, err
	}
	policy, err := s.reach.policy()
	if err != nil {
		return nil, err
	}
	end, err := endAt(s.deadline)
	if err != nil {
		return nil, err
	}
	var deadline *timestamppb.Timestamp
	if !end.IsZero() {
		deadline = timestamppb.New(end)
	}
	publish, err := publishedPorts(s.publish)
	if err != nil {
		return nil, err
	}
	return &hostagentv1.CreateSandboxRequest{
		Publish:  publish,
		Busy:     s.busy,
		Template: s.template, Vcpus: s.vcpus, MemoryMb: mem, TimeoutSec: timeout, OnTimeout: s.then, Network: policy,
		Name: s.name, DiskMb: disk, Workdir: s.workdir, User: s.user, Envs: env, Metadata: labels, Deadline: deadline, OnDeadline: s.atEnd,
		AutoResume: s.wake,
		Vmm:        s.vmm, Isolation: s.isolated,
	}, nil
}

// endAt reads a deadline: so long from now, a time, or "never" or nothing for none.
func endAt(text string) (time.Time, error) {
	if text == "" || text == "never" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return time.Now().Add(d), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return at, fmt.Errorf("deadline %q is neither a duration such as 30m or 2h nor a time such as 2030-01-31T12:00:00Z", text)
	}
	return at, nil
}

// labelsOf reads flags of the form NAME=VALUE, or NAME for an empty value.
func labelsOf(flags []string) (map[string]string, error) {
	labels := map[string]string{}
	for _, label := range flags {
		name, value, _ := strings.Cut(label, "=")
		if name == "" {
			return nil, fmt.Errorf("--label %q: want NAME=VALUE", label)
		}
		labels[name] = value
	}
	return labels, nil
}

// wholeSeconds is a timeout as the API counts it.
func wholeSeconds(d time.Duration) (int32, error) {
	if d < 0 || d%time.Second != 0 {
		return 0, fmt.Errorf("timeout %s is not a whole number of seconds from 0 up", d)
	}
	return int32(min(d/time.Second, 1<<31-1)), nil
}

// create makes a sandbox, and shows on a terminal how long that takes. The answer
// has no access token, so that no command can print it by mistake.
func (c *cli) create(ctx context.Context, s *size) (*hostagentv1.CreateSandboxResponse, error) {
	req, err := s.request()
	if err != nil {
		return nil, err
	}
	defer spin("booting a sandbox")()
	resp, err := c.host.Create(ctx, req)
	switch {
	case connect.CodeOf(err) == connect.CodeNotFound:
		err = fmt.Errorf("%w; `wrenn template ls` lists templates, `wrenn snapshots` snapshots", err)
	case connect.CodeOf(err) == connect.CodeFailedPrecondition && strings.Contains(err.Error(), "not ready"):
		err = fmt.Errorf("%w; `wrenn template ls -a` lists builds, `wrenn template inspect` says why", err)
	}
	if err != nil {
		return nil, err
	}
	resp.AccessToken = ""
	for _, p := range resp.Publish {
		complain("%s", publishedText(p))
	}
	return resp, nil
}

func newCreate(c *cli) *cobra.Command {
	var s size
	var asJSON, verbose bool
	cmd := &cobra.Command{
		Use:   "create [TEMPLATE]",
		Short: "Create a sandbox and print its id",
		Long: `Create a sandbox from a template or a snapshot, wait until commands can run in
it, and print its id. The sandbox stays until 'wrenn rm' destroys it, or until
its --timeout passes without activity. --name gives it a name that can be used in
place of the id, until it has ended.`,
		Example: `  wrenn create --memory 1g --vcpus 2 --timeout 30m
  wrenn create --name web --label team=blue --disk 10g -e COLOUR=red -w /srv
  wrenn create my-snapshot`,
		Args: cobra.MaximumNArgs(1),
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
				fmt.Fprintln(cmd.ErrOrStderr(), printableLine(fmt.Sprintf("runs on: %s, %s; %s", resp.Vmm, resp.Isolation, resp.VmmWhy)))
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), resp)
			}
			fmt.Fprintln(cmd.OutOrStdout(), resp.SandboxId)
			return nil
		},
	}
	s.flags(cmd)
	cmd.Flags().StringVarP(&s.user, "user", "u", "",
		"user of programs that are started without a user: a name, a uid, or uid:gid (default the template's)")
	cmd.Flags().StringVarP(&s.workdir, "workdir", "w", "",
		"directory of programs that are started without one (default the template's, or the user's home)")
	s.env.flags(cmd, "all programs")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the answer as JSON")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "print on stderr what the sandbox started from and how long each step took")
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
