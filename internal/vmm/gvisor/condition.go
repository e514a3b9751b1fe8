package gvisor

import (
	"bytes"
	"context"
	"errors"
	"os"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// condition is what a guest does. A sentry counts pauses: a second one needs a second
// resume, and a resume too many ends it. And it does not tell the count. So the
// driver keeps the condition in a file beside the control socket, for the next agent
// too. Who reads or changes it holds the file's lock.
type condition byte

const (
	// created: nothing has begun. A VM that was restored is so until its first Resume.
	created condition = 'c'
	running condition = 'r'
	paused  condition = 'p'
	// changing: a Pause or Resume was sent, and its answer has not come.
	changing condition = '?'
	// loading is the same for the loading of a snapshot.
	loading condition = 'l'
)

const (
	controlName = "gvisor.sock"
	stateSuffix = ".state"
	// statePoll is the time between two questions for a condition, and between two
	// attempts at the lock.
	statePoll = 2 * time.Millisecond
)

func statePath(control string) string { return control + stateSuffix }

// alone calls f while no other call, of this agent or another, may change the VM's
// condition. If the VM has ended the error is errdefs.Unavailable.
func (v *vm) alone(ctx context.Context, f func() error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	gone := errdefs.Unavailable.Errorf("it has ended")
	select {
	case <-v.Done():
		return gone
	default:
	}
	file, err := os.Open(statePath(v.state.Control))
	if errors.Is(err, os.ErrNotExist) {
		return gone // its directory is removed after its end
	}
	if err != nil {
		return err
	}
	defer file.Close()
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f()
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return err
		}
		if err := sleep(ctx, statePoll); err != nil {
			return err
		}
	}
}

// read returns the condition that was written last.
func (v *vm) read() (condition, error) {
	data, err := os.ReadFile(statePath(v.state.Control))
	if err != nil {
		return 0, err
	}
	if len(data) != 1 {
		return 0, errors.New("the file of its condition is damaged")
	}
	return condition(data[0]), nil
}

// write overwrites the one byte of the file.
func (v *vm) write(c condition) error {
	f, err := os.OpenFile(statePath(v.state.Control), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte{byte(c)}, 0)
	return errors.Join(err, f.Close())
}

// known returns the condition, and asks the sentry if a call's answer was lost.
func (v *vm) known(ctx context.Context) (condition, error) {
	c, err := v.read()
	if err != nil || c != changing && c != loading {
		return c, err
	}
	if c == loading {
		c, err = v.awaitLoaded(ctx)
	} else {
		c, err = v.look(ctx)
	}
	if err != nil {
		return 0, err
	}
	return c, v.write(c)
}

// awaitLoaded waits for the end of a loading whose answer was lost. If the sentry never
// got the call, the VM is still to be loaded.
func (v *vm) awaitLoaded(ctx context.Context) (condition, error) {
	const never = time.Second
	for began := time.Now(); ; {
		var now int
		if err := v.call(ctx, callTimeout, methodState, v.state.ID, &now); err != nil {
			return 0, err
		}
		switch {
		case now == stateRunning:
			return running, nil
		case now != stateCreating:
			return 0, errors.Join(errdefs.Unavailable.Errorf("its snapshot does not load"), v.Fail())
		case time.Since(began) > never:
			return created, nil
		}
		if err := sleep(ctx, statePoll); err != nil {
			return 0, err
		}
	}
}

// goroutines separates the stacks of a sentry's goroutines; initTask is in that of the
// guest's first thread, whose number is an argument of the function; stopped is in that
// of each thread that stands still.
var (
	goroutines = []byte("\n\n")
	initTask   = regexp.MustCompile(`kernel\.\(\*Task\)\.run\(0x[0-9a-f]+\??, 0x1\??\)`)
	stopped    = []byte("kernel.(*Task).doStop(")
)

// look finds out whether the guest stands still: its first thread does so only then.
func (v *vm) look(ctx context.Context) (condition, error) {
	var stacks string
	if err := v.call(ctx, callTimeout, methodStacks, struct{}{}, &stacks); err != nil {
		return 0, err
	}
	for g := range bytes.SplitSeq([]byte(stacks), goroutines) {
		if !initTask.Match(g) {
			continue
		}
		if bytes.Contains(g, stopped) {
			return paused, nil
		}
		return running, nil
	}
	return 0, errdefs.Unavailable.Errorf("its guest has ended")
}

// pause stops the guest. It is called alone.
func (v *vm) pause(ctx context.Context) error {
	c, err := v.known(ctx)
	if err != nil || c != running {
		return err
	}
	return v.send(ctx, methodPause, running, paused)
}

// resume lets the guest run. It is called alone.
func (v *vm) resume(ctx context.Context) error {
	c, err := v.known(ctx)
	switch {
	case err != nil || c == running:
		return err
	case c == created:
		return v.load(ctx)
	}
	return v.send(ctx, methodResume, paused, running)
}

// send makes a call that changes the condition from one to another.
func (v *vm) send(ctx context.Context, method string, from, to condition) error {
	if err := v.write(changing); err != nil {
		return err
	}
	err := v.call(ctx, callTimeout, method, struct{}{}, nil)
	var no *refusal
	switch {
	case err == nil:
		return v.write(to)
	case errors.As(err, &no):
		return errors.Join(err, v.write(from))
	}
	return err
}

// said returns what a sentry answered to a call that it refused, in one line.
func said(err error) (string, bool) {
	var no *refusal
	if !errors.As(err, &no) {
		return "", false
	}
	return strings.Join(strings.Fields(no.Error()), " "), true
}
