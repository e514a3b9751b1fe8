package gvisor

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// times are what steps took, by their names, in the order of their first.
type times struct {
	names []string
	took  map[string][]time.Duration
}

func (s *times) add(name string, began time.Time) {
	if s.took == nil {
		s.took = map[string][]time.Duration{}
	}
	if s.took[name] == nil {
		s.names = append(s.names, name)
	}
	s.took[name] = append(s.took[name], time.Since(began))
}

func (s *times) report(b *testing.B) {
	for _, name := range s.names {
		all := s.took[name]
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, name+"-ms")
	}
}

// BenchmarkGuest measures what the driver's part of a sandbox's life takes, each step from
// the begin of the first: a boot to the first command's end, pause and resume, a snapshot,
// and its copy to the first command's end.
func BenchmarkGuest(b *testing.B) {
	s := subject(b)
	withEnvd(b, &s)
	ctx := context.Background()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	var t times
	begin := func(name string, spec vmm.Spec, in guest.Init, key string, boot func(vmm.Spec) (vmm.VM, error)) (*vm, *guest.Client) {
		began := time.Now()
		v, err := boot(spec)
		must(err)
		t.add(name+"-start", began)
		addr := netip.AddrPortFrom(spec.Boot.Addr.Addr(), guestapi.Port)
		k := guest.New(addr, key)
		defer k.Close()
		must(k.WaitReady(ctx))
		t.add(name+"-ready", began)
		in.Time, in.AccessToken, in.Hostname, in.SandboxID, in.CloneKey = time.Now(), token, "sb-bench", spec.ID, "key"
		_, err = k.Init(ctx, in)
		must(err)
		c := guest.New(addr, token)
		echo(b, c)
		t.add(name+"-exec", began)
		return v.(*vm), c
	}
	dir := b.TempDir()
	for b.Loop() {
		v, c := begin("cold", s.Clone(), guest.Init{}, token, func(spec vmm.Spec) (vmm.VM, error) { return s.Driver.Start(ctx, spec) })
		began := time.Now()
		echo(b, c)
		t.add("exec", began)
		_, err := c.Freeze(ctx)
		must(err)
		began = time.Now()
		must(v.Pause(ctx))
		t.add("pause", began)
		began = time.Now()
		at := dir + "/" + strconv.Itoa(len(t.took["pause"]))
		must(os.Mkdir(at, 0o700))
		must(v.Snapshot(ctx, at))
		t.add("snapshot", began)
		began = time.Now()
		must(v.Resume(ctx))
		t.add("resume", began)
		began = time.Now()
		must(v.Kill(ctx))
		t.add("kill", began)
		c.Close()
		restorer := s.Driver.(vmm.Restorer)
		v, c = begin("restored", s.Clone(), guest.Init{Restored: true}, "key", func(spec vmm.Spec) (vmm.VM, error) {
			v, err := restorer.Restore(ctx, spec, at)
			if err != nil {
				return nil, err
			}
			return v, v.Resume(ctx)
		})
		must(v.Kill(ctx))
		c.Close()
	}
	t.report(b)
}

func echo(b *testing.B, c *guest.Client) {
	b.Helper()
	r, err := c.Exec(context.Background(), guest.Command{Cmd: "echo", Args: []string{"hello"}})
	if err != nil || string(r.Stdout) != "hello\n" {
		b.Fatal(err, r)
	}
}

// BenchmarkIdle measures what an idle guest takes of the host, beside others.
func BenchmarkIdle(b *testing.B) {
	s := subject(b)
	withEnvd(b, &s)
	for b.Loop() {
		var vms []*vm
		for _, n := range []int{1, 4, 16} {
			for len(vms) < n {
				spec := s.Clone()
				v, err := s.Driver.Start(context.Background(), spec)
				if err != nil {
					b.Fatal(err)
				}
				vms = append(vms, v.(*vm))
				defer v.Kill(context.Background())
				c := guest.New(netip.AddrPortFrom(spec.Boot.Addr.Addr(), guestapi.Port), token)
				if err := c.WaitReady(context.Background()); err != nil {
					b.Fatal(err)
				}
				c.Close()
			}
			time.Sleep(time.Second) // what is left of the boot
			before := cpuTime(b, vms)
			time.Sleep(2 * time.Second)
			used := cpuTime(b, vms) - before
			b.ReportMetric(float64(pss(b, vms))/float64(n)/(1<<20), fmt.Sprintf("MiB-at-%d", n))
			b.ReportMetric(used.Seconds()/2/float64(n)*100, fmt.Sprintf("CPU%%-at-%d", n))
		}
		for _, v := range vms {
			if err := v.Kill(context.Background()); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// family lists a sentry and the processes in which it runs its guest's programs.
func family(v *vm) (dirs []string) {
	todo := []string{strconv.Itoa(v.state.Process.PID)}
	for len(todo) > 0 {
		dir := "/proc/" + todo[0]
		dirs, todo = append(dirs, dir), todo[1:]
		tasks, _ := os.ReadDir(dir + "/task") // a process that has ended has none
		for _, task := range tasks {
			children, _ := os.ReadFile(dir + "/task/" + task.Name() + "/children")
			todo = append(todo, strings.Fields(string(children))...)
		}
	}
	return dirs
}

func pss(b *testing.B, vms []*vm) (bytes int64) {
	b.Helper()
	for _, v := range vms {
		for _, dir := range family(v) {
			text, err := os.ReadFile(dir + "/smaps_rollup")
			if err != nil {
				continue
			}
			for line := range strings.Lines(string(text)) {
				if value, ok := strings.CutPrefix(line, "Pss:"); ok {
					n, _ := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
					bytes += n << 10
				}
			}
		}
	}
	return bytes
}

// cpuTime is what the processes have used of the host's CPUs.
func cpuTime(b *testing.B, vms []*vm) (all time.Duration) {
	b.Helper()
	for _, v := range vms {
		for _, dir := range family(v) {
			stat, err := os.ReadFile(dir + "/stat")
			if err != nil {
				continue
			}
			fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
			for _, f := range fields[11:13] {
				n, _ := strconv.Atoi(f)
				all += time.Duration(n) * (time.Second / 100)
			}
		}
	}
	return all
}
