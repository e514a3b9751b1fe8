package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// direct is a client of the sandbox's envd without the agent between.
func (b *sandbox) direct() *guest.Client {
	b.t.Helper()
	return guest.New(netip.AddrPortFrom(b.addrs().HostIP, guestapi.Port), b.record().Token)
}

// bareHost runs VMs as a shell script would: the arguments are those of the
// agent's VMMs, and no record is written.
type bareHost struct {
	dir string
	net *network.Network
	// cold and warm are argument vectors: to boot, and to restore the snapshot
	// in the directory saved. placeDir stands for what is a VM's own, savedMemory
	// for the snapshot's.
	cold, warm []string
	saved      string
	// token is what the guests are told as their own, or know already.
	token string
	// seed is the disk of a VM that boots.
	seed   string
	places []*place
}

// place is where one VM runs.
type place struct {
	dir   string
	addrs network.Addrs
}

const (
	placeDir    = "{place}"
	savedMemory = "{memory}"
)

// newBareHost takes the argument vectors of the VMMs of two sandboxes, one
// booted (or nil) and one restored, and prepares the same network and disks
// for as many as that.
func newBareHost(b *testing.B, booted, restored *sandbox, places int) *bareHost {
	b.Helper()
	h := &bareHost{dir: b.TempDir(), saved: readyDir(b, restored), token: "bare"}
	if booted != nil {
		h.cold = bareArgs(b, booted)
	}
	h.warm = bareArgs(b, restored)
	for i, arg := range h.warm { // whatever the agent hands it the snapshot by
		before, rest, ok := strings.Cut(arg, "mem-path=")
		if _, after, more := strings.Cut(rest, ","); ok && more {
			h.warm[i] = before + "mem-path=" + savedMemory + "," + after
		}
	}
	like := restored
	seeds, _ := filepath.Glob(filepath.Join(like.a.stateDir, "seeds", "*.ext4"))
	if len(seeds) == 0 {
		b.Fatal("there is no seed of an overlay")
	}
	h.seed = seeds[0]

	h.net = network.New(network.Plan{
		Instance: strings.Replace(like.a.instance(), "wrenn", "bare", 1),
		// Beyond what the agents share, and rarely another benchmark's.
		Hosts: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(245 + 2*(os.Getpid()%5)), 0, 0}), 16),
		Veths: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(246 + 2*(os.Getpid()%5)), 0, 0}), 16),
	}, network.Options{Log: slog.New(slog.DiscardHandler)})
	ctx := context.Background()
	if err := h.net.Setup(ctx); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := h.net.Teardown(ctx); err != nil {
			b.Error(err)
		}
	})
	for range places {
		h.addPlace(b)
	}
	return h
}

func (h *bareHost) addPlace(b *testing.B) {
	b.Helper()
	p := &place{dir: filepath.Join(h.dir, fmt.Sprint(len(h.places)))}
	if err := os.MkdirAll(filepath.Join(p.dir, "empty"), 0o755); err != nil { // QEMU's root
		b.Fatal(err)
	}
	ctx := context.Background()
	slot, err := h.net.Acquire(ctx, vmm.Tap)
	if err == nil {
		err = h.net.Open(ctx, slot)
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := h.net.Close(ctx, slot); err != nil {
			b.Error(err)
		}
	})
	p.addrs = h.net.Plan().Addrs(slot)
	h.places = append(h.places, p)
}

// useStateOf has the bare VMs go on where a sandbox is now, which hibernates
// for that.
func (h *bareHost) useStateOf(b *testing.B, box *sandbox) {
	b.Helper()
	token := box.record().Token
	if err := box.hibernate(); err != nil {
		b.Fatal(err)
	}
	saved := filepath.Join(h.dir, "saved")
	if err := os.Mkdir(saved, 0o755); err != nil {
		b.Fatal(err)
	}
	for _, name := range []string{"mem", "state", "overlay.ext4"} {
		if err := copyFile(filepath.Join(saved, name), filepath.Join(box.a.stateDir, "sandboxes", box.id, "snapshot", name)); err != nil {
			b.Fatal(err)
		}
	}
	h.saved, h.token = saved, token
}

// bareArgs is how the sandbox's VMM was started.
func bareArgs(b *testing.B, like *sandbox) []string {
	b.Helper()
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", like.vmmPID()))
	if err != nil {
		b.Fatal(err)
	}
	mine := strings.NewReplacer(
		filepath.Join(like.a.stateDir, "sandboxes", like.id), placeDir,
		filepath.Join("/run", like.a.instance(), like.id), placeDir,
		"wrenn-"+like.id, "bare")
	return strings.Split(strings.TrimRight(mine.Replace(string(cmdline)), "\x00"), "\x00")
}

// readyDir is the ready snapshot of the sandbox's size.
func readyDir(b *testing.B, like *sandbox) string {
	b.Helper()
	info := like.info()
	manifests, _ := filepath.Glob(filepath.Join(like.a.buildDir(b, info.Template), "ready", "*", "manifest.json"))
	for _, path := range manifests {
		var manifest struct {
			Shape struct {
				VCPUs  int32
				MemMiB int32 `json:"mem_mib"`
			}
		}
		data, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(data, &manifest)
		}
		if err != nil {
			b.Fatal(err)
		}
		if manifest.Shape.VCPUs == info.Vcpus && manifest.Shape.MemMiB == info.MemoryMb {
			return filepath.Dir(path)
		}
	}
	b.Fatalf("template %q has no ready snapshot of this size: %q", info.Template, manifests)
	return ""
}

// disk gives a place a disk of its own.
func (h *bareHost) disk(p *place, from string) error {
	return copyFile(filepath.Join(p.dir, "overlay.ext4"), from)
}

func (h *bareHost) bootDisk(p *place) error { return h.disk(p, h.seed) }
func (h *bareHost) restoreDisk(p *place) error {
	return h.disk(p, filepath.Join(h.saved, "overlay.ext4"))
}

// copyFile copies what is in a file and not its holes, as cp does.
func copyFile(to, from string) error {
	if out, err := exec.Command("cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("copy %s: %w: %s", filepath.Base(from), err, out)
	}
	return nil
}

// turns has as many start at a time as the agent lets: more would only make
// each other late.
type turns chan struct{}

func newTurns() turns { return make(turns, max(2, runtime.NumCPU())) }

// take waits for a turn to do something.
func (t turns) take(do func() error) error {
	t <- struct{}{}
	defer func() { <-t }()
	return do()
}

// bareVM is a VM without an agent.
type bareVM struct {
	cmd    *exec.Cmd
	stderr bytes.Buffer // to be read when it has ended
	conn   net.Conn
	lines  *bufio.Reader
	guest  *guest.Client
}

// boot starts a VM and returns when its envd answers and knows who it is.
func (h *bareHost) boot(ctx context.Context, p *place) (*bareVM, error) {
	v, err := h.start(p, h.cold, nil)
	if err == nil {
		err = v.guest.WaitReady(ctx)
	}
	if err == nil {
		_, err = v.guest.Init(ctx, h.identity(false))
	}
	return v.orEnd(err)
}

// wake restores the ready snapshot and lets it run.
func (h *bareHost) wake(p *place) (*bareVM, error) {
	state, err := os.Open(filepath.Join(h.saved, "state"))
	if err != nil {
		return nil, err
	}
	defer state.Close()
	v, err := h.start(p, h.warm, state)
	if err == nil {
		err = v.qmp("cont")
	}
	return v.orEnd(err)
}

// restore does so and tells the guest who it is, as the agent must.
func (h *bareHost) restore(ctx context.Context, p *place) (*bareVM, error) {
	v, err := h.wake(p)
	if err == nil {
		_, err = v.guest.Init(ctx, h.identity(true))
	}
	return v.orEnd(err)
}

// answer restores it and returns at its first answer to anything.
func (h *bareHost) answer(ctx context.Context, p *place) (*bareVM, error) {
	v, err := h.wake(p)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, v.guest.URL()+"/health", nil)
	if err == nil {
		var resp *http.Response
		if resp, err = v.guest.HTTPClient().Do(req); err == nil {
			resp.Body.Close()
		}
	}
	return v.orEnd(err)
}

// identity is what the agent tells a new sandbox of itself.
func (h *bareHost) identity(restored bool) guest.Init {
	entropy := make([]byte, 64)
	_, _ = rand.Read(entropy)
	const name = "sb-1111111111111111"
	return guest.Init{
		AccessToken: h.token, Hostname: name, SandboxID: name,
		DefaultUser: "root", Env: map[string]string{}, Entropy: entropy, Restored: restored,
	}
}

// start starts a VMM and takes its monitor; with a state, that of a VM which
// waits to go on.
func (h *bareHost) start(p *place, argv []string, state *os.File) (*bareVM, error) {
	socket := filepath.Join(p.dir, "qmp.sock")
	os.Remove(socket)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	listener.SetUnlinkOnClose(false)
	file, err := listener.File()
	listener.Close()
	if err != nil {
		return nil, err
	}
	v := &bareVM{guest: guest.New(netip.AddrPortFrom(p.addrs.HostIP, guestapi.Port), h.token)}
	own := strings.NewReplacer(placeDir, p.dir, savedMemory, filepath.Join(h.saved, "mem"))
	args := []string{"--net=" + p.addrs.NetNSPath}
	for _, arg := range argv {
		args = append(args, own.Replace(arg))
	}
	v.cmd = exec.Command("nsenter", args...)
	v.cmd.ExtraFiles = []*os.File{file}
	if state != nil {
		v.cmd.ExtraFiles = append(v.cmd.ExtraFiles, state)
	}
	v.cmd.Stderr = &v.stderr
	err = v.cmd.Start()
	file.Close() // the VMM alone has it: its end is the end of the connection
	if err != nil {
		return nil, err
	}
	if v.conn, err = net.Dial("unix", socket); err == nil {
		v.lines = bufio.NewReader(v.conn)
		_ = v.conn.SetDeadline(time.Now().Add(startLimit))
		_, err = v.lines.ReadString('\n') // the greeting
	}
	if err == nil {
		err = v.qmp("qmp_capabilities")
	}
	if _, ended := v.orEnd(err); ended != nil {
		return nil, fmt.Errorf("start QEMU: %w: %s", err, v.stderr.String())
	}
	return v, nil
}

// orEnd returns the VM, or the error and no VM.
func (v *bareVM) orEnd(err error) (*bareVM, error) {
	if err != nil {
		v.end()
		return nil, err
	}
	return v, nil
}

// qmp runs one command of QEMU's monitor.
func (v *bareVM) qmp(command string) error {
	_ = v.conn.SetDeadline(time.Now().Add(startLimit))
	if _, err := fmt.Fprintf(v.conn, "{\"execute\":%q}\n", command); err != nil {
		return err
	}
	for {
		line, err := v.lines.ReadString('\n')
		switch {
		case err != nil:
			return err
		case strings.Contains(line, `"return"`):
			return nil
		case strings.Contains(line, `"error"`):
			return fmt.Errorf("qmp %s: %s", command, line)
		}
	}
}

// quit ends the VM as QEMU likes it best.
func (v *bareVM) quit() error {
	if err := v.qmp("quit"); err != nil {
		return err
	}
	return v.cmd.Wait()
}

// end ends the VM, whatever became of it.
func (v *bareVM) end() {
	if v == nil {
		return
	}
	v.guest.Close()
	if v.conn != nil {
		v.conn.Close()
	}
	_ = v.cmd.Process.Kill()
	_ = v.cmd.Wait()
}
