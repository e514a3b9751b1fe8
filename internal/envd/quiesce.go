package envd

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// A guest is quiet when its CPUs did next to nothing for quietFor, looked at
	// every quietLook.
	quietFor  = 200 * time.Millisecond
	quietLook = 40 * time.Millisecond
	// maxQuiet bounds the wait; a guest that is never quiet is good enough.
	maxQuiet = 5 * time.Second
)

// quiesce brings what is written to the disk, before the host takes a picture
// of it. With ?quiet=1 it waits, too, until the guest has nothing to do.
func (s *Server) quiesce(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Get("quiet") != "" && s.guest {
		s.rehearse(r.Context())
		waitQuiet(r.Context())
	}
	if s.guest {
		unix.Sync()
	}
	// The connection would be in the picture.
	w.Header().Set("Connection", "close")
	w.WriteHeader(http.StatusNoContent)
}

// rehearse does once what every clone does first, so that what is made or read
// at the first use is in the picture already. Nothing of it is visible
// afterwards.
func (s *Server) rehearse(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, maxQuiet)
	defer cancel()
	var req initRequest
	stamp := time.Now()
	sample := initRequest{
		Timestamp: &stamp, DefaultUser: "root", EnvVars: map[string]string{"A": "b"},
		SandboxID: "sb-0123456789abcdef", Entropy: make([]byte, 64), Restored: true,
	}
	body, err := json.Marshal(sample)
	if err == nil {
		err = json.Unmarshal(body, &req)
	}
	if err == nil {
		err = req.check(s.accounts)
	}
	if err == nil {
		err = setMachineID()
	}
	var uts unix.Utsname
	if err == nil {
		err = unix.Uname(&uts)
	}
	if err == nil {
		err = setHostname(unix.ByteSliceToString(uts.Nodename[:]), s.addr)
	}
	if err == nil {
		// Shells and programs come from the disk the first time.
		err = exec.CommandContext(ctx, "/bin/sh", "-c", "ls / | cat; id; date; uname; [ ! -x /bin/bash ] || /bin/bash -c :").Run()
	}
	if err != nil {
		s.log.Warn("rehearse", "err", err)
	}
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

// setMachineID gives the machine an identity of its own: no two sandboxes
// have the same, though they come from one image or one snapshot.
func setMachineID() error {
	id := randomUUID() // as machine-id(5) has it
	if err := replaceFile("/etc/machine-id", hex.EncodeToString(id[:])+"\n"); err != nil {
		return fmt.Errorf("write machine-id: %w", err)
	}
	return nil
}

// bootIDFile is where the kernel tells boots apart.
const bootIDFile = "/proc/sys/kernel/random/boot_id"

// setBootID gives this boot another id. The kernel draws its own when somebody
// first reads it, and never again; so a file is laid over it.
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

// openConns knows the connections that are open, and since when each has had
// something to say.
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

// of reports whether a request came over a connection.
func of(r *http.Request, conn net.Conn) bool {
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
