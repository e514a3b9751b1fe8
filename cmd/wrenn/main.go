// Command wrenn is the host agent of a machine that runs sandboxes, and the
// client of one.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"git.omukk.dev/wrenn/sandbox/internal/agent"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs/errhttp"
)

// version is set by the build.
var version = "dev"

// exitError ends the program with the status of a command that it ran.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// statusError is an error that ends the program with a status of its own.
type statusError struct {
	status int
	err    error
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

// signalError is why the program's context ended.
type signalError struct{ syscall.Signal }

func (e signalError) Error() string { return e.Signal.String() + " signal received" }

// status is the exit status of a program that the signal ended.
func (e signalError) status() int { return 128 + int(e.Signal) }

// sameSignal is how soon after the first signal another one is taken for the same:
// timeout(1) sends its signal to the program and then to its process group.
const sameSignal = 200 * time.Millisecond

// untilSignal returns a context that ends with the first SIGINT, SIGTERM or SIGHUP.
// The second one ends the program at once, as if it were not handled.
func untilSignal() context.Context {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	received := make(chan os.Signal, 1)
	signal.Notify(received, signals...)
	go func() {
		cancel(signalError{(<-received).(syscall.Signal)})
		time.Sleep(sameSignal)
		signal.Reset(signals...)
	}()
	return ctx
}

func main() {
	ctx := untilSignal()
	cmd, err := newRoot().ExecuteContextC(ctx)
	if err == nil {
		return
	}
	status, quiet := exitStatus(ctx, cmd, err)
	if !quiet {
		complain("%s", explain(err))
	}
	os.Exit(status)
}

// ownStatus is the annotation of a command whose own errors end the program with
// another status than 1.
const ownStatus = "status"

// likeDocker are the annotations of the commands that pass on the exit status of a
// command in a sandbox.
func likeDocker() map[string]string {
	return map[string]string{ownStatus: strconv.Itoa(errhttp.NotTheCommand)}
}

// exitStatus returns the status that an error of cmd ends the program with; quiet
// means that no message is printed.
func exitStatus(ctx context.Context, cmd *cobra.Command, err error) (status int, quiet bool) {
	var exit exitError
	var own *statusError
	var sig signalError
	switch {
	case errors.As(err, &exit):
		return int(exit), true
	case errors.As(err, &own):
		return own.status, false
	case errors.As(context.Cause(ctx), &sig):
		return sig.status(), false
	}
	if status, err := strconv.Atoi(cmd.Annotations[ownStatus]); err == nil {
		return status, false
	}
	return 1, false
}

// explain is an error as a person wants to read it, with the next step.
func explain(err error) string {
	var cerr *connect.Error
	if !errors.As(err, &cerr) {
		return err.Error()
	}
	if cerr.Code() == connect.CodeUnavailable && errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Sprintf("no host agent answers (%s); start one with `wrenn serve`, or name another with --host", cerr.Message())
	}
	if cerr.Code() == connect.CodeUnauthenticated && strings.Contains(cerr.Message(), "key") {
		return fmt.Sprintf("%s; give it with --api-key or WRENN_API_KEY, or run wrenn as root on the host", cerr.Message())
	}
	_, hint, _ := strings.Cut(err.Error(), cerr.Error())
	return fmt.Sprintf("%s (%s)%s", cerr.Message(), cerr.Code(), hint)
}

func newRoot() *cobra.Command {
	c := &cli{}
	root := &cobra.Command{
		Use:   "wrenn",
		Short: "Run other people's code safely, in microVMs on a machine you own",
		Long: `Wrenn runs other people's code in sandboxes: microVMs with a Linux, a disk and
a network of their own, on a machine that you own.

On the host, as root:
  wrenn setup          install and prepare what the host needs
  wrenn serve          run the host agent
  wrenn doctor         say what is missing, and how to mend it
  wrenn key create     make an API key for clients over TCP
  wrenn env            print what E2B's clients need to use this host

Then, as any user who can reach the agent:
  wrenn run -- uname -a          a sandbox for one command
  id=$(wrenn create)             a sandbox to keep
  wrenn exec $id -- python3 -c 'print(6*7)'
  wrenn rm $id
  wrenn template build -t app .  a template of a Dockerfile
  wrenn template pull alpine     a template of an image
  wrenn create app               a sandbox with it`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       buildVersion(),
	}
	root.SetFlagErrorFunc(flagHint)
	root.SetOut(printer{os.Stdout})
	root.SetErr(printer{os.Stderr})
	f := root.PersistentFlags()
	f.StringVarP(&c.addr, "host", "H", env("WRENN_HOST", ""),
		"URL of the host agent; empty for the Unix socket of the one on --state-dir, or "+overTCP+" if you may not open that (env WRENN_HOST)")
	f.StringVar(&c.key, "api-key", "", "API key to show to the agent, over TCP (env WRENN_API_KEY)")
	f.StringVar(&c.stateDir, "state-dir", env("WRENN_STATE_DIR", agent.DefaultStateDir),
		"state directory of the agent on this host to speak to (env WRENN_STATE_DIR)")
	root.AddGroup(&cobra.Group{ID: "host", Title: "On the host:"}, &cobra.Group{ID: "sandbox", Title: "Sandboxes:"})
	gc := newGC(c)
	gc.PersistentPreRunE = c.connect
	for _, cmd := range []*cobra.Command{newSetup(), newServe(), newDoctor(), newKey(c), newEnv(c), gc} {
		cmd.GroupID = "host"
		root.AddCommand(cmd)
	}
	for _, cmd := range []*cobra.Command{
		newRun(c), newCreate(c), newPs(c), newExec(c), newAttach(c), newShell(c), newKill(c), newCp(c), newTop(c), newPort(c),
		newStop(c), newStart(c), newPause(c), newResume(c), newRecover(c), newFork(c), newSnapshot(c), newSnapshots(c), newRm(c),
		newTimeout(c), newDeadline(c), newNetwork(c), newInspect(c), newLogs(c), newEvents(c), newVerify(c), newTemplate(c),
	} {
		cmd.GroupID = "sandbox"
		cmd.PersistentPreRunE = c.connect
		root.AddCommand(cmd)
	}
	root.AddCommand(newHost(c), newDrain(c), newVersion(c))
	for _, cmd := range root.Commands() {
		cmd.SuggestFor = otherVerbs[cmd.Name()]
	}
	return root
}

// otherVerbs are commands of other tools of this kind, by the one that is meant.
var otherVerbs = map[string][]string{
	"template": {"image", "images", "build", "pull", "import", "export", "templates"},
	"snapshot": {"commit", "checkpoint", "save"}, "rm": {"delete", "remove", "terminate"},
	"cp": {"copy", "upload", "download"}, "top": {"stats", "metrics"}, "shell": {"ssh", "sh", "login", "console"},
	"ps": {"sandboxes"}, "inspect": {"info", "show", "describe"}, "gc": {"prune"}, "pause": {"hibernate", "suspend", "sleep"},
	"create": {"new", "launch", "spawn"}, "port": {"forward", "expose", "publish"}, "start": {"boot"}, "stop": {"halt", "shutdown"},
}

// otherNames are flags of other tools of this kind, each with the one that is meant.
var otherNames = map[string]string{
	"image": "template", "snapshot": "template", "from": "template", "cpu": "vcpus", "cpus": "vcpus", "mem": "memory", "ram": "memory",
	"ttl": "timeout", "idle-timeout": "timeout", "cwd": "workdir", "dir": "workdir", "envs": "env",
	"number": "count", "tail": "tail-bytes", "stdin": "interactive", "hibernate": "to-disk",
	"metadata": "label", "labels": "label", "port": "publish", "ports": "publish", "expose": "publish", "storage": "disk", "size": "disk",
	"hostname": "name", "background": "detach", "detached": "detach", "all-processes": "all", "grace": "time",
}

// flagHint adds to an error about a flag which one may be meant.
func flagHint(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		return err
	}
	typed, meant := unknown.GetSpecifiedName(), ""
	if cmd.Flags().Lookup(otherNames[typed]) != nil {
		meant = otherNames[typed]
	}
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if len(typed) > 2 && (strings.HasPrefix(f.Name, typed) || strings.HasPrefix(typed, f.Name)) {
			meant = f.Name
		}
	})
	if meant == "" {
		return err
	}
	return fmt.Errorf("%w; did you mean --%s?", err, meant)
}

// env is an environment variable with a default: the defaults of flags.
func env(name, def string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return def
}

// buildVersion is the version of this program, with the commit where no
// release named it.
func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && version == "dev" {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				return version + "-" + s.Value[:12]
			}
		}
	}
	return version
}
