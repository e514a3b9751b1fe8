package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// callTimeout bounds a call whose caller sets no limit. A sound sentry answers
	// most in a millisecond.
	callTimeout = 10 * time.Second
	// lastWord is how long a call still waits for its answer when its context has
	// ended: without it it is not known whether the call took effect.
	lastWord = 250 * time.Millisecond
	// maxAnswer bounds what is read of an answer, in bytes.
	maxAnswer = 8 << 20
	// queuePoll is the time between two attempts to connect while the sentry's queue
	// is full.
	queuePoll = 5 * time.Millisecond
)

// refusal is the sentry's answer to a call that it could not do.
type refusal struct{ text string }

func (e *refusal) Error() string { return errdefs.Foreign(e.text) }

// call makes one call over a connection of its own, and passes files along. The
// answer to it is decoded into result, if that is not nil. If the sentry answers with
// an error, that is a *refusal. After other errors it is not known whether the call took
// effect; errdefs.Unavailable says that the sentry has ended or is stuck.
func call(ctx context.Context, socket string, limit time.Duration, method string, arg, result any, files ...*os.File) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errdefs.Unavailable.Errorf("the VMM did not answer within %s", limit))
	defer cancel()
	conn, err := dial(ctx, socket)
	if err != nil {
		return fmt.Errorf("call %s: %w", method, broken(ctx, err))
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now().Add(lastWord)) })
	defer stop()
	answer, err := exchange(conn, method, arg, files)
	if err != nil {
		return fmt.Errorf("call %s: %w", method, broken(ctx, err))
	}
	if !answer.Success {
		return fmt.Errorf("call %s: %w", method, &refusal{answer.Err})
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(answer.Result, result); err != nil {
		return fmt.Errorf("call %s: %w", method, err)
	}
	return nil
}

// dial connects to the control socket.
func dial(ctx context.Context, socket string) (*net.UnixConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	for errors.Is(err, unix.EAGAIN) && ctx.Err() == nil {
		if err := sleep(ctx, queuePoll); err != nil {
			return nil, err
		}
		conn, err = d.DialContext(ctx, "unix", socket)
	}
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

// exchange sends a call and receives the answer.
func exchange(conn *net.UnixConn, method string, arg any, files []*os.File) (a answer, err error) {
	request, err := json.Marshal(request{method, arg})
	if err != nil {
		return a, err
	}
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	// The descriptors travel with the first byte.
	n, _, err := conn.WriteMsgUnix(request, rights, nil)
	runtime.KeepAlive(files)
	if err == nil && n < len(request) {
		_, err = conn.Write(request[n:])
	}
	if err != nil {
		return a, err
	}
	in := &io.LimitedReader{R: conn, N: maxAnswer}
	if err = json.NewDecoder(in).Decode(&a); err != nil && in.N <= 0 {
		err = errors.New("its answer is too long")
	}
	return a, err
}

// broken says why a call has no answer: because its time is over, or because the
// sentry has ended.
func broken(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if errors.Is(err, io.EOF) || errors.As(err, new(*net.OpError)) {
		return vmm.Cancelled(ctx, errdefs.Unavailable.Errorf("the VMM does not answer: %w", err))
	}
	return errdefs.Unavailable.Errorf("the VMM does not answer: %s", errdefs.Foreign(err.Error()))
}

// sleep waits for d or for ctx.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// listen makes the control socket and returns it as a file that the sentry inherits.
func listen(path string) (*os.File, error) {
	if err := remove(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	return l.File()
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
