package qemu

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// callTimeout bounds a QMP call whose caller sets no limit. A sound QEMU answers in
// milliseconds.
const callTimeout = 10 * time.Second

// maxAnswer bounds what is read from QEMU for one call, in bytes: the answer, and
// the events before it.
const maxAnswer = 1 << 20

var errTooLong = errors.New("its answer is too long")

// queuePoll is the time between two attempts to connect while QEMU's queue, which
// has room for two connections, is full.
const queuePoll = 5 * time.Millisecond

// The states of a VM that matter here, as query-status names them.
const (
	statusRunning   = "running"
	statusPaused    = "paused"
	statusInMigrate = "inmigrate"
	// statusIOError is a VM that QEMU stopped because a disk did not take a write.
	statusIOError = "io-error"
	// statusInternalError is a VM that QEMU stopped because KVM cannot run it on.
	// It can only be reset.
	statusInternalError = "internal-error"
)

// refusal is QEMU's answer to a call that it refuses; the call had no effect.
type refusal struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *refusal) Error() string { return errdefs.Foreign(e.Desc) }

// bounded is a reader that fails once it has read left bytes.
type bounded struct {
	io.Reader
	left int
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errTooLong
	}
	n, err := b.Reader.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

// monitor is one connection to a QEMU, for one operation at a time.
type monitor struct {
	ctx  context.Context // of the operation
	conn *net.UnixConn
	in   *bounded
	dec  *json.Decoder
	stop func() bool // ends the breaking of conn by ctx
}

// dial connects to the QMP socket at path and waits until QEMU serves it. ctx
// is that of the connection's first operation. When QEMU dies, or has died, every wait
// ends at once with errdefs.Unavailable.
func dial(ctx context.Context, path string) (*monitor, error) {
	m := &monitor{ctx: ctx}
	if err := m.connect(path); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (m *monitor) connect(path string) error {
	var d net.Dialer
	conn, err := d.DialContext(m.ctx, "unix", path)
	for errors.Is(err, unix.EAGAIN) && m.ctx.Err() == nil {
		// The socket's queue is full.
		select {
		case <-m.ctx.Done():
		case <-time.After(queuePoll):
			conn, err = d.DialContext(m.ctx, "unix", path)
		}
	}
	if err != nil {
		return m.broken(err)
	}
	m.conn, m.in = conn.(*net.UnixConn), &bounded{conn, maxAnswer}
	m.dec = json.NewDecoder(m.in)
	m.begin(m.ctx)
	// QEMU reads the first command after its greeting: it need not be waited for.
	const first = "qmp_capabilities"
	id, err := m.send(first, nil, nil)
	if err != nil {
		return err
	}
	var greeting struct {
		QMP *json.RawMessage `json:"QMP"`
	}
	if err := m.dec.Decode(&greeting); err != nil {
		return m.broken(err)
	}
	if greeting.QMP == nil {
		return errdefs.Unavailable.Errorf("the VMM's control socket does not speak QMP")
	}
	return m.receive(first, id, nil)
}

// begin lets ctx bound what follows.
func (m *monitor) begin(ctx context.Context) {
	conn := m.conn
	m.ctx, m.stop = ctx, context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
}

// end undoes begin. It is false if ctx has ended, and the connection with it.
func (m *monitor) end() bool { return m.stop() }

func (m *monitor) close() {
	if m.conn != nil {
		m.stop()
		m.conn.Close()
	}
}

// open says whether QEMU has not closed the connection.
func (m *monitor) open() bool {
	raw, err := m.conn.SyscallConn()
	if err != nil {
		return false
	}
	const closed = unix.POLLHUP | unix.POLLRDHUP | unix.POLLERR
	poll := []unix.PollFd{{Events: unix.POLLRDHUP}}
	var perr error
	err = raw.Control(func(fd uintptr) {
		poll[0].Fd = int32(fd)
		_, perr = unix.Poll(poll, 0)
	})
	return err == nil && perr == nil && poll[0].Revents&closed == 0
}

// call runs one command. After an error that is no *refusal it is not known whether
// the command took effect.
func (m *monitor) call(command string, arguments, result any) error {
	return m.callWith(command, arguments, result, nil)
}

// callWith passes descriptors along with the command.
func (m *monitor) callWith(command string, arguments, result any, rights []byte) error {
	id, err := m.send(command, arguments, rights)
	if err != nil {
		return err
	}
	return m.receive(command, id, result)
}

// send sends a command. QEMU runs one after the other: more may be sent before the
// answer to the first is received.
func (m *monitor) send(command string, arguments any, rights []byte) (id string, err error) {
	// QEMU may answer a command of a broken connection on the next connection.
	id = rand.Text()
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        string `json:"id"`
	}{command, arguments, id})
	if err != nil {
		return "", fmt.Errorf("qmp %s: %w", command, err)
	}
	if _, _, err := m.conn.WriteMsgUnix(append(request, '\n'), rights, nil); err != nil {
		return "", fmt.Errorf("qmp %s: %w", command, m.broken(err))
	}
	return id, nil
}

// receive reads up to the answer to a command that was sent.
func (m *monitor) receive(command, id string, result any) error {
	m.in.left = maxAnswer
	for {
		var reply struct {
			Event  string          `json:"event"`
			Return json.RawMessage `json:"return"`
			Error  *refusal        `json:"error"`
			ID     string          `json:"id"`
		}
		if err := m.dec.Decode(&reply); err != nil {
			return fmt.Errorf("qmp %s: %w", command, m.broken(err))
		}
		switch {
		case reply.Event != "":
			continue // events are not used
		case reply.ID != "" && reply.ID != id:
			continue // another command's
		case reply.Error != nil:
			return fmt.Errorf("qmp %s: %w", command, reply.Error)
		case result != nil:
			if err := json.Unmarshal(reply.Return, result); err != nil {
				return fmt.Errorf("qmp %s: %w", command, err)
			}
		}
		return nil
	}
}

// broken says why the connection failed: because its time is over, or because QEMU
// has ended.
func (m *monitor) broken(err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) || errors.As(err, new(*net.OpError)) {
		return vmm.Cancelled(m.ctx, errdefs.Unavailable.Errorf("the VMM does not answer: %w", err))
	}
	return vmm.Cancelled(m.ctx, errdefs.Unavailable.Errorf("the VMM does not answer: %s", errdefs.Foreign(err.Error())))
}

const queryStatus = "query-status"

// status asks for the VM's state.
func (m *monitor) status() (string, error) {
	id, err := m.send(queryStatus, nil, nil)
	if err != nil {
		return "", err
	}
	return m.receiveStatus(id)
}

func (m *monitor) receiveStatus(id string) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	err := m.receive(queryStatus, id, &s)
	return errdefs.Foreign(s.Status), err
}

// passFile gives QEMU an open file, and returns the path under which QEMU finds it.
func (m *monitor) passFile(set int, f *os.File) (path string, err error) {
	err = m.callWith("add-fd", map[string]any{"fdset-id": set}, nil, unix.UnixRights(int(f.Fd())))
	return fmt.Sprintf("/dev/fdset/%d", set), err
}

// dropFile makes QEMU close the file of a set.
func (m *monitor) dropFile(set int) error {
	return m.call("remove-fd", map[string]any{"fdset-id": set}, nil)
}

// saveDevices writes the state of all devices, without memory, to a path. It
// is meant for Xen, whose guests' memory QEMU does not hold; here the memory
// is copied beside it.
func (m *monitor) saveDevices(path string) error {
	// A "live" save would give the disks up.
	return m.call("xen-save-devices-state", map[string]any{"filename": path, "live": false}, nil)
}
