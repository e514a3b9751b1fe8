package e2e_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/network"
)

// samples are the times that one operation took, through the agent and with
// what it is made of alone.
type samples struct {
	name, floorName string
	agent, floor    []time.Duration
	// goal is the ratio that is aimed at, at the most; zero for none.
	goal float64
	// bytes is how many each operation moves; zero where that is not its point.
	bytes int64
}

// measured are the rows of the table that TestMain prints at the end.
var measured []*samples

func row(name, floorName string) *samples {
	s := &samples{name: name, floorName: floorName}
	measured = append(measured, s)
	return s
}

// timed adds the time that do takes.
func timed(b *testing.B, to *[]time.Duration, do func() error) {
	b.Helper()
	began := time.Now()
	err := do()
	*to = append(*to, time.Since(began))
	if err != nil {
		b.Fatal(err)
	}
}

// report makes the numbers part of the benchmark's own line as well.
func (s *samples) report(b *testing.B) {
	b.ReportMetric(0, "ns/op") // agent and floor in one would say nothing
	b.ReportMetric(millis(percentile(s.agent, 50)), "agent-p50-ms")
	b.ReportMetric(millis(percentile(s.floor, 50)), "floor-p50-ms")
}

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func percentile(d []time.Duration, p int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(d))
	return sorted[(len(sorted)-1)*p/100]
}

// megabytes is a rate in 10⁶ bytes a second.
func megabytes(n int64, d time.Duration) string {
	return fmt.Sprintf("%.1f", float64(n)/1e6/d.Seconds())
}

func printMeasured(w io.Writer) {
	if len(measured) == 0 {
		return
	}
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "\noperation\tn\tagent p50\tp95\tfloor p50\tp95\tratio\tgoal\t  MB/s: agent\tfloor\t  floor\t")
	for _, s := range measured {
		agent, floor := percentile(s.agent, 50), percentile(s.floor, 50)
		goal, rate, floorRate := "", "", ""
		if s.goal > 0 {
			goal = fmt.Sprintf("≤ %.2f", s.goal)
		}
		if s.bytes > 0 {
			rate, floorRate = megabytes(s.bytes, agent), megabytes(s.bytes, floor)
		}
		fmt.Fprintf(t, "%s\t%d\t%.2f ms\t%.2f ms\t%.2f ms\t%.2f ms\t%.2f\t%s\t%s\t%s\t  %s\t\n", s.name, len(s.agent),
			millis(agent), millis(percentile(s.agent, 95)), millis(floor), millis(percentile(s.floor, 95)),
			float64(agent)/float64(floor), goal, rate, floorRate, s.floorName)
	}
	t.Flush()
}

// BenchmarkHost times what a user waits for, each beside its bare floor: the
// same QEMU arguments and the same guest with no agent between.
func BenchmarkHost(b *testing.B) {
	a := startAgent(b)
	box := a.create(b, nil)
	if !box.record().Restored {
		box = a.create(b, nil)
	}
	memory := int32(511) // each size is the first of its kind, and boots
	firstOfItsKind := func() *hostagentv1.CreateSandboxRequest {
		memory--
		return &hostagentv1.CreateSandboxRequest{MemoryMb: memory}
	}
	booted := a.create(b, firstOfItsKind())
	bare := newBareHost(b, booted, box)
	if err := booted.destroy(); err != nil {
		b.Fatal(err)
	}
	vm, err := bare.boot(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { vm.end() }()
	direct := box.direct()
	defer direct.Close()
	ctx := b.Context()

	b.Run("Exec", func(b *testing.B) {
		s := row("exec true", "process.Start to envd")
		for b.Loop() {
			for range 10 {
				timed(b, &s.agent, func() error { _, err := box.exec("true"); return err })
				timed(b, &s.floor, func() error { _, err := direct.Exec(ctx, guest.Command{Cmd: "true"}); return err })
			}
		}
		s.report(b)
	})
	b.Run("PauseResume", func(b *testing.B) {
		pause, resume := row("pause", "QMP stop"), row("resume", "QMP cont, POST /init")
		for b.Loop() {
			timed(b, &pause.agent, box.pause)
			timed(b, &resume.agent, box.resume)
			timed(b, &pause.floor, func() error { return vm.qmp("stop") })
			timed(b, &resume.floor, func() error {
				if err := vm.qmp("cont"); err != nil {
					return err
				}
				return vm.guest.Init(ctx, guest.Init{})
			})
		}
		pause.report(b)
	})
	vm.end() // each VM below boots beside the same one neighbour
	b.Run("CreateDestroy", func(b *testing.B) {
		ready, first := row("create from a ready snapshot", "QEMU restores, /init"), row("create, boots and makes the snapshot", "QEMU boots, /init")
		destroy := row("destroy", "QMP quit")
		create := func(req *hostagentv1.CreateSandboxRequest, to *[]time.Duration) {
			made := &sandbox{t: b, a: a}
			timed(b, to, func() error {
				resp, err := a.CreateSandbox(ctx, connect.NewRequest(req))
				if err == nil {
					made.id = resp.Msg.SandboxId
				}
				return err
			})
			timed(b, &destroy.agent, made.destroy)
		}
		for i := 0; b.Loop(); i++ {
			create(&hostagentv1.CreateSandboxRequest{}, &ready.agent)
			bare.freshDisk(b, bare.ready)
			timed(b, &ready.floor, func() (err error) { vm, err = bare.restore(ctx); return err })
			timed(b, &destroy.floor, vm.quit)
			vm.end()
			if i >= maxBig {
				continue
			}
			create(firstOfItsKind(), &first.agent)
			bare.freshDisk(b, bare.seed)
			timed(b, &first.floor, func() (err error) { vm, err = bare.boot(ctx); return err })
			timed(b, &destroy.floor, vm.quit)
			vm.end()
		}
		ready.report(b)
	})
	// In the order in which a user meets them.
	slices.SortStableFunc(measured, func(x, y *samples) int { return rank(x.name) - rank(y.name) })
}

func rank(name string) int {
	return slices.Index([]string{"create from a ready snapshot", "create, boots and makes the snapshot", "exec true", "pause", "resume", "destroy"}, name)
}

// direct is a client of the sandbox's envd without the agent between.
func (b *sandbox) direct() *guest.Client {
	b.t.Helper()
	var record struct{ Token string }
	data, err := os.ReadFile(filepath.Join(b.a.stateDir, "sandboxes", b.id, "record.json"))
	if err == nil {
		err = json.Unmarshal(data, &record)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return guest.New(netip.AddrPortFrom(b.addrs().HostIP, guest.Port), record.Token)
}

// bareHost runs VMs as a shell script would.
type bareHost struct {
	dir   string
	addrs network.Addrs
	// cold and warm are argument vectors: to boot, and to restore the snapshot
	// whose device state is in state. seed and ready are the disks for them.
	cold, warm         []string
	seed, ready, state string
}

// newBareHost takes the argument vectors of the VMMs of two sandboxes, one
// booted and one restored, and prepares the same network and disks for others.
func newBareHost(b *testing.B, booted, restored *sandbox) *bareHost {
	h := &bareHost{dir: b.TempDir()}
	if err := os.Mkdir(filepath.Join(h.dir, "empty"), 0o755); err != nil { // QEMU's root
		b.Fatal(err)
	}
	argv := func(like *sandbox) []string {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", like.vmmPID()))
		if err != nil {
			b.Fatal(err)
		}
		mine := strings.NewReplacer(
			filepath.Join(like.a.stateDir, "sandboxes", like.id), h.dir,
			filepath.Join("/run", like.a.instance(), like.id), h.dir,
			"wrenn-"+like.id, "bare")
		return strings.Split(strings.TrimRight(mine.Replace(string(cmdline)), "\x00"), "\x00")
	}
	h.cold, h.warm = argv(booted), argv(restored)
	for _, arg := range h.warm {
		if _, rest, ok := strings.Cut(arg, "mem-path="); ok {
			memory, _, _ := strings.Cut(rest, ",")
			h.state = filepath.Join(filepath.Dir(memory), "state")
			h.ready = filepath.Join(filepath.Dir(memory), "overlay.ext4")
		}
	}
	like := restored
	seeds, _ := filepath.Glob(filepath.Join(like.a.stateDir, "seeds", "*.ext4"))
	if len(seeds) == 0 {
		b.Fatal("there is no seed of an overlay")
	}
	h.seed = seeds[0]

	n := network.New(network.Plan{
		Instance: strings.Replace(like.a.instance(), "wrenn", "bare", 1),
		// Beyond what the agents share, and rarely another benchmark's.
		Hosts: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(245 + 2*(os.Getpid()%5)), 0, 0}), 16),
		Veths: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(246 + 2*(os.Getpid()%5)), 0, 0}), 16),
	}, network.Options{Log: slog.New(slog.DiscardHandler)})
	ctx := context.Background()
	if err := n.Setup(ctx); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := n.Teardown(ctx); err != nil {
			b.Error(err)
		}
	})
	slot, err := n.Acquire(ctx)
	if err == nil {
		err = n.Open(ctx, slot)
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := n.Close(ctx, slot); err != nil {
			b.Error(err)
		}
	})
	h.addrs = n.Plan().Addrs(slot)
	h.freshDisk(b, h.seed)
	return h
}

func (h *bareHost) freshDisk(b testing.TB, from string) {
	out, err := exec.Command("cp", "--sparse=always", from, filepath.Join(h.dir, "overlay.ext4")).CombinedOutput()
	if err != nil {
		b.Fatalf("copy overlay: %v: %s", err, out)
	}
}

// bareVM is a VM that nobody looks after.
type bareVM struct {
	cmd   *exec.Cmd
	conn  net.Conn
	lines *bufio.Reader
	guest *guest.Client
}

// boot starts a VM and returns when its envd answers.
func (h *bareHost) boot(ctx context.Context) (*bareVM, error) { return h.run(ctx, h.cold) }

// restore does so with one that goes on where the snapshot was made.
func (h *bareHost) restore(ctx context.Context) (*bareVM, error) {
	state, err := os.Open(h.state)
	if err != nil {
		return nil, err
	}
	defer state.Close()
	return h.run(ctx, h.warm, state)
}

func (h *bareHost) run(ctx context.Context, argv []string, more ...*os.File) (*bareVM, error) {
	socket := filepath.Join(h.dir, "qmp.sock")
	os.Remove(socket)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	listener.SetUnlinkOnClose(false)
	file, err := listener.File()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	v := &bareVM{guest: guest.New(netip.AddrPortFrom(h.addrs.HostIP, guest.Port), "")}
	v.cmd = exec.Command("nsenter", append([]string{"--net=" + h.addrs.NetNSPath}, argv...)...)
	v.cmd.ExtraFiles = append([]*os.File{file}, more...)
	if err := v.cmd.Start(); err != nil {
		return nil, err
	}
	limit, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	if v.conn, err = net.Dial("unix", socket); err == nil {
		v.lines = bufio.NewReader(v.conn)
		_, err = v.lines.ReadString('\n') // the greeting
	}
	if err == nil {
		err = v.qmp("qmp_capabilities")
	}
	if err == nil && len(more) > 0 {
		err = v.qmp("cont")
	}
	if err == nil {
		err = v.guest.WaitReady(limit)
	}
	if err == nil {
		err = v.guest.Init(limit, guest.Init{})
	}
	if err != nil {
		v.end()
		return nil, err
	}
	return v, nil
}

// qmp runs one command of QEMU's monitor.
func (v *bareVM) qmp(command string) error {
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
