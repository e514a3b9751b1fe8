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
	"syscall"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
)

// version is set by the build.
var version = "dev"

// exitError ends the program with a status of somebody else's choosing.
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

// signalled is the exit status of a program that a signal ended.
func signalled(ctx context.Context) (status int, ok bool) {
	var sig signalError
	if errors.As(context.Cause(ctx), &sig) {
		return 128 + int(sig.Signal), true
	}
	return 0, false
}

// untilSignal returns a context that the first signal to end ends. A second
// one ends the program the hard way.
func untilSignal() context.Context {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	received := make(chan os.Signal, 1)
	signal.Notify(received, signals...)
	go func() {
		sig := <-received
		signal.Reset(signals...)
		cancel(signalError{sig.(syscall.Signal)})
	}()
	return ctx
}

func main() {
	ctx := untilSignal()
	err := newRoot().ExecuteContext(ctx)
	if err == nil {
		return
	}
	status := 1
	var exit exitError
	var own *statusError
	if errors.As(err, &exit) {
		os.Exit(int(exit))
	} else if errors.As(err, &own) {
		status = own.status
	} else if n, ok := signalled(ctx); ok {
		status = n
	}
	complain("%s", explain(err))
	os.Exit(status)
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
	return fmt.Sprintf("%s (%s)", cerr.Message(), cerr.Code())
}

func newRoot() *cobra.Command {
	c := &client{}
	root := &cobra.Command{
		Use:   "wrenn",
		Short: "Run other people's code safely, in microVMs on a machine you own",
		Long: `Wrenn runs other people's code in sandboxes: microVMs with a Linux, a disk and
a network of their own, on a machine that you own.

On the host, as root:
  wrenn setup          install and prepare what the host needs
  wrenn serve          run the host agent
  wrenn doctor         say what is missing, and how to mend it

Then, as anybody who may reach the agent:
  wrenn run -- uname -a          a sandbox for one command
  id=$(wrenn create)             a sandbox to keep
  wrenn exec $id -- python3 -c 'print(6*7)'
  wrenn rm $id`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       buildVersion(),
	}
	root.SetOut(printer{os.Stdout})
	root.SetErr(printer{os.Stderr})
	root.PersistentFlags().StringVarP(&c.host, "host", "H", env("WRENN_HOST", "http://127.0.0.1:50051"), "URL of the host agent (env WRENN_HOST)")
	root.AddGroup(&cobra.Group{ID: "host", Title: "On the host:"}, &cobra.Group{ID: "sandbox", Title: "Sandboxes:"})
	add := func(group string, cmds ...*cobra.Command) {
		for _, cmd := range cmds {
			cmd.GroupID = group
			root.AddCommand(cmd)
		}
	}
	add("host", newSetup(), newServe(), newDoctor())
	add("sandbox", newRun(c), newCreate(c), newPs(c), newExec(c), newShell(c), newCp(c), newTop(c), newPort(c), newPause(c), newResume(c), newFork(c), newSnapshot(c), newSnapshots(c), newRm(c),
		newTimeout(c), newNetwork(c), newInspect(c), newLogs(c), newEvents(c), newVerify(c))
	root.AddCommand(newVersion(c))
	return root
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
