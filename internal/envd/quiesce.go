package envd

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	processv1 "git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const (
	// A guest is quiet when its CPUs did next to nothing for quietFor, looked at
	// every quietLook.
	quietFor  = 200 * time.Millisecond
	quietLook = 40 * time.Millisecond
	// maxQuiet bounds the wait; a guest that is never quiet is good enough.
	maxQuiet = 5 * time.Second
)

// quiesce writes what is in memory to the disk, before the host makes a snapshot.
// With ?quiet=1 it rehearses first and waits until the guest has nothing to do.
func (s *Server) quiesce(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Get(guestapi.QueryQuiet) != "" && s.guest {
		s.rehearse(r.Context())
		waitQuiet(r.Context())
	}
	if s.guest {
		unix.Sync()
	}
	// The connection would be in the snapshot.
	w.Header().Set("Connection", "close")
	w.WriteHeader(http.StatusNoContent)
}

// rehearse does what every copy of this guest does first. What is made, read or
// translated at its first use is in the snapshot then. A second Server answers, on
// the loopback, so that this one does not change; only the processes are shared.
func (s *Server) rehearse(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, maxQuiet)
	defer cancel()
	if err := s.playOnce(ctx); err != nil {
		s.log.Warn("rehearse", "err", err)
	}
	// The garbage is collected now and not during the first requests.
	debug.FreeOSMemory()
}

func (s *Server) playOnce(ctx context.Context) error {
	second := New(Config{Log: slog.New(slog.DiscardHandler), Body: s.body, Addr: s.addr})
	second.processes.children, second.processes.cgroups = s.processes.children, s.processes.cgroups
	defer second.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	serving, stop := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() { served <- second.Serve(serving, l) }()
	defer func() { stop(); <-served }()

	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	stamp := time.Now()
	body, err := json.Marshal(initRequest{
		AccessToken: "rehearsal", Timestamp: &stamp, DefaultUser: "root", EnvVars: map[string]string{},
		Hostname: unix.ByteSliceToString(uts.Nodename[:]), SandboxID: "sb-0123456789abcdef",
		Entropy: make([]byte, 64), Restored: true,
	})
	if err != nil {
		return err
	}
	if err := ask(ctx, l.Addr(), guestapi.PathInit, "application/json", body); err != nil {
		return err
	}
	// Shells and programs come from the disk the first time.
	for _, config := range []*processv1.ProcessConfig{
		{Cmd: "/bin/sh", Args: []string{"-c", "ls / | cat; id; date; uname; [ ! -x /bin/bash ] || /bin/bash -c :"}},
		{Cmd: "echo", Args: []string{"ready"}},
	} {
		start, err := proto.Marshal(&processv1.StartRequest{Process: config, Stdin: new(bool)})
		if err != nil {
			return err
		}
		// A message of a stream: no flags, its length, itself.
		message := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(start))), start...)
		if err := ask(ctx, l.Addr(), processconnect.ProcessStartProcedure, "application/connect+proto", message); err != nil {
			return err
		}
	}
	return nil
}

// ask sends one request and takes all of its answer.
func ask(ctx context.Context, addr net.Addr, path, kind string, body []byte) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, addr.Network(), addr.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr.String()+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", kind)
	req.Header.Set("Connect-Protocol-Version", "1")
	req.Header.Set("Connect-Timeout-Ms", "5000")
	req.Header.Set(guestapi.HeaderLifetime, guestapi.LifetimeStream)
	req.Header.Set(guestapi.HeaderToken, "rehearsal")
	if err := req.Write(conn); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s is answered with %s", path, resp.Status)
	}
	return nil
}

func waitQuiet(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, maxQuiet)
	defer cancel()
	tick := time.NewTicker(quietLook)
	defer tick.Stop()
	since := time.Now()
	busy, ok := busyTicks()
	for ok && time.Since(since) < quietFor {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now, _ := busyTicks()
		if now > busy+1 { // looking takes some time itself
			since = time.Now()
		}
		busy = now
	}
}

// busyTicks is the time that all CPUs spent working, in the kernel's ticks.
func busyTicks() (n uint64, ok bool) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, false
	}
	line, _, _ := bytes.Cut(data, []byte("\n"))
	for i, field := range bytes.Fields(line) {
		// cpu user nice system idle iowait irq softirq …
		if i == 0 || i == 4 || i == 5 || i > 7 {
			continue
		}
		ticks, err := strconv.ParseUint(string(field), 10, 64)
		if err != nil {
			return 0, false
		}
		n += ticks
	}
	return n, true
}

// setMachineID gives the machine a new id, so that no two sandboxes from one image
// or snapshot have the same.
func setMachineID() error {
	id := randomUUID() // as machine-id(5) has it
	if err := replaceFile("/etc/machine-id", hex.EncodeToString(id[:])+"\n"); err != nil {
		return fmt.Errorf("write machine-id: %w", err)
	}
	return nil
}

// bootIDFile is where the kernel tells boots apart.
const bootIDFile = "/proc/sys/kernel/random/boot_id"

// setBootID gives this boot another id. The kernel draws its own at the first read
// and keeps it, so a file is mounted over it.
func setBootID() error {
	id := randomUUID()
	f, err := os.CreateTemp("/run", ".boot-id-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // the mount keeps it
	_, err = fmt.Fprintf(f, "%x-%x-%x-%x-%x\n", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
	if err := errors.Join(err, f.Chmod(0o444), f.Close()); err != nil {
		return err
	}
	// One of before, of a clone's clone.
	if err := unix.Unmount(bootIDFile, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", bootIDFile, err)
	}
	if err := unix.Mount(f.Name(), bootIDFile, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount over %s: %w", bootIDFile, err)
	}
	const readOnly = unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("", bootIDFile, "", readOnly, ""); err != nil {
		return fmt.Errorf("protect %s: %w", bootIDFile, err)
	}
	return nil
}

// randomUUID is a version 4 UUID.
func randomUUID() (id [16]byte) {
	rand.Read(id[:]) // never fails
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return id
}

// openConns knows the open connections and when each last began a request.
type openConns struct {
	mu   sync.Mutex
	open map[net.Conn]time.Time
}

func (c *openConns) state(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch state {
	case http.StateNew, http.StateActive:
		if c.open == nil {
			c.open = map[net.Conn]time.Time{}
		}
		c.open[conn] = time.Now()
	case http.StateClosed, http.StateHijacked:
		delete(c.open, conn)
	}
}

// connKey is the key under which a request's context has its connection.
type connKey struct{}

// of reports whether a request came over a connection.
func of(r *http.Request, conn net.Conn) bool {
	if own, ok := r.Context().Value(connKey{}).(net.Conn); ok {
		return own == conn
	}
	local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	return ok && conn.LocalAddr().String() == local.String() && conn.RemoteAddr().String() == r.RemoteAddr
}

// age is how long ago a request began to arrive.
func (c *openConns) age(r *http.Request) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn, since := range c.open {
		if of(r, conn) {
			return time.Since(since)
		}
	}
	return 0
}

// closeOthers closes all connections but that of a request.
func (c *openConns) closeOthers(r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn := range c.open {
		if !of(r, conn) {
			_ = conn.Close()
		}
	}
}
