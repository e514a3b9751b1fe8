package client

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// Detach starts a command, leaves it to itself and returns its PID. The sandbox keeps the
// last of its output, and its end.
func (s *Sandbox) Detach(ctx context.Context, cmd Command) (pid uint32, err error) {
	cmd.detached, cmd.Tied, cmd.Stdout, cmd.Stderr = true, false, nil, nil
	_, pid, err = s.execute(ctx, cmd)
	return pid, err
}

// Attach connects to a command that was started before, as cmd says, and returns its exit
// status when it has ended. What the sandbox still has of its output comes first. When ctx
// ends the command goes on without its caller, and the error is the cause of ctx.
func (s *Sandbox) Attach(ctx context.Context, pid uint32, cmd Command) (status int, err error) {
	cmd.pid = pid
	return s.Exec(ctx, cmd)
}

// Output writes what the sandbox still has of a command's output to the Stdout and Stderr
// of cmd.
func (s *Sandbox) Output(ctx context.Context, pid uint32, cmd Command) error {
	cmd.pid, cmd.held = pid, true
	_, err := s.Exec(ctx, cmd)
	return err
}

// Signal sends SIGTERM or SIGKILL to a command that was started from outside.
func (s *Sandbox) Signal(ctx context.Context, pid uint32, signal process.Signal) error {
	_, err := call(ctx, s.processes("").SendSignal, &process.SendSignalRequest{
		Process: &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: pid}}, Signal: signal,
	})
	return err
}

// Processes asks the sandbox for all its processes. All of the answer is the guest's word.
func (s *Sandbox) Processes(ctx context.Context) ([]guestapi.Process, error) {
	ctx, cancel := context.WithTimeout(ctx, guestPatience)
	defer cancel()
	list := guestapi.Processes{}
	if err := s.getJSON(ctx, guestapi.PathProcesses, "processes", 32<<20, &list); err != nil {
		return nil, err
	}
	return list.Processes, nil
}

// processEvents is what the streams of Start and Connect have in common.
type processEvents interface {
	Receive() bool
	Err() error
	Close() error
	event() *process.ProcessEvent
}

type startEvents struct {
	*connect.ServerStreamForClient[process.StartResponse]
}

func (s startEvents) event() *process.ProcessEvent { return s.Msg().GetEvent() }

type connectEvents struct {
	*connect.ServerStreamForClient[process.ConnectResponse]
}

func (s connectEvents) event() *process.ProcessEvent { return s.Msg().GetEvent() }

// open starts the command, or connects to the one that is named.
func (x *execution) open() (processEvents, error) {
	if x.pid == 0 {
		events, err := x.guest.Start(x.life, x.request())
		return startEvents{events}, err
	}
	req := connect.NewRequest(&process.ConnectRequest{
		Process: &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: x.pid}},
	})
	req.Header().Set(guestapi.HeaderOffset, "stdout=0,stderr=0,pty=0")
	if x.held {
		req.Header().Set(guestapi.HeaderFollow, guestapi.FollowNot)
	}
	events, err := x.guest.Connect(x.life, req)
	return connectEvents{events}, err
}

// heldWithin is how long a guest may take to tell more of what it holds of an output.
const heldWithin = 2 * time.Second

// untilIdle hangs up when more is not called for a while, if all that is asked for is what
// the guest holds: one of an earlier version goes on telling.
func (x *execution) untilIdle() (more func()) {
	if !x.held {
		return func() {}
	}
	idle := time.AfterFunc(heldWithin, func() { x.hangUp(errGoesOn) })
	context.AfterFunc(x.life, func() { idle.Stop() })
	return func() { idle.Reset(heldWithin) }
}

// leave is what becomes of a command when ctx ends: one that this program has started
// ends, and any other goes on.
func (x *execution) leave() {
	if x.attached {
		x.hangUp(errGoesOn)
		return
	}
	x.interrupt()
}

// notCommand adds to a guest's word that it knows no such process what it may be.
func notCommand(pid uint32, err error) error {
	if connect.CodeOf(err) != connect.CodeNotFound {
		return err
	}
	return fmt.Errorf("%w; process %d was not started with wrenn, or has ended long ago", err, pid)
}
