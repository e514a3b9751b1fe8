package e2e_test

import (
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
)

// coldAgent is an agent that has no ready snapshots and cannot make any: a file
// is where its template keeps them. Each of its sandboxes boots.
func coldAgent(b *testing.B) *agent {
	b.Helper()
	a := benchAgent(b)
	ready := filepath.Join(a.buildDir(b, "minimal"), "ready")
	err := os.RemoveAll(ready)
	if err == nil {
		err = os.WriteFile(ready, nil, 0o444)
	}
	if err != nil {
		b.Fatal(err)
	}
	return a
}

// restoredBox is a sandbox that came from a ready snapshot.
func (a *agent) restoredBox(b *testing.B) *sandbox {
	b.Helper()
	box := a.create(b, nil)
	if !box.record().Restored { // it has made the snapshot
		box = a.create(b, nil)
	}
	if !box.record().Restored {
		b.Fatal("no sandbox is restored")
	}
	return box
}

// started is how long a sandbox took to be there, and to have run a command.
type started struct{ ready, exec time.Duration }

// starts adds what a round of creates took.
func starts(round []started, ready, exec *[]time.Duration) {
	for _, s := range round {
		*ready, *exec = append(*ready, s.ready), append(*exec, s.exec)
	}
}

// startTimed creates a sandbox and runs a command in it.
func (a *agent) startTimed(ctx context.Context, req *hostagentv1.CreateSandboxRequest, cmd string, args ...string) (s started,
	made *hostagentv1.CreateSandboxResponse, err error) {
	began := time.Now()
	resp, err := a.CreateSandbox(ctx, connect.NewRequest(req))
	if err != nil {
		return s, nil, err
	}
	s.ready = time.Since(began)
	ran, err := a.Exec(ctx, connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: resp.Msg.SandboxId, Cmd: cmd, Args: args}))
	s.exec = time.Since(began)
	if err == nil && ran.Msg.ExitCode != 0 {
		err = fmt.Errorf("%s ended with %d", cmd, ran.Msg.ExitCode)
	}
	return s, resp.Msg, err
}

// BenchmarkCreate times the way to a sandbox beside the same VMM, with the same
// arguments and the same guest, and no agent. Each round of the agent's is
// followed by one of the floor's, so that a machine that changes its speed
// changes it for both.
func BenchmarkCreate(b *testing.B) {
	a := benchAgent(b)
	box := a.restoredBox(b)
	cold := coldAgent(b)
	like := cold.create(b, nil)
	bare := newBareHost(b, like, box, 16)
	if err := like.destroy(); err != nil {
		b.Fatal(err)
	}
	ctx := b.Context()

	parts := phaseTimes{}
	var readyP50 time.Duration
	destroy := &samples{name: "destroy", floorName: "QMP quit"}
	for _, n := range []int{1, 4, 16} {
		b.Run(fmt.Sprintf("Ready%d", n), func(b *testing.B) {
			many := ""
			if n > 1 {
				many = fmt.Sprintf(", %d at once", n)
			}
			var first *samples
			if n == 1 {
				first = row("create from a ready snapshot", "bare QEMU restores it, first answer of GET /health")
				first.goal = 1.15
			}
			ready := row("create from a ready snapshot"+many, "bare QEMU restores it, POST /init with the identity")
			exec := row("create and first exec"+many, "the same, then process.Start to envd")
			if n == 1 {
				ready.goal = 1.15
			}
			booted, why := 0, ""
			repeat(b, (100+n-1)/n, 2*time.Minute, func() {
				round, made := make([]started, n), make([]*hostagentv1.CreateSandboxResponse, n)
				atOnce(b, n, func(i int) (err error) {
					round[i], made[i], err = a.startTimed(ctx, &hostagentv1.CreateSandboxRequest{}, "true")
					return err
				})
				starts(round, &ready.agent, &exec.agent)
				if n == 1 {
					parts.add(made[0].Phases)
				}
				for _, m := range made {
					x := &sandbox{b, a, m.SandboxId}
					if !x.record().Restored { // its user waited all the same
						booted, why = booted+1, m.Why
					}
					if n == 1 {
						timed(b, &destroy.agent, x.destroy)
					} else if err := x.destroy(); err != nil {
						b.Fatal(err)
					}
				}

				vms := make([]*bareVM, n)
				defer func() {
					for _, vm := range vms {
						vm.end()
					}
				}()
				for _, p := range bare.places[:n] {
					if err := bare.restoreDisk(p); err != nil {
						b.Fatal(err)
					}
				}
				turns := newTurns()
				atOnce(b, n, func(i int) (err error) {
					began := time.Now()
					err = turns.take(func() error { vms[i], err = bare.restore(ctx, bare.places[i]); return err })
					if err != nil {
						return err
					}
					round[i].ready = time.Since(began)
					_, err = vms[i].guest.Exec(ctx, guest.Command{Cmd: "true"})
					round[i].exec = time.Since(began)
					return err
				})
				starts(round, &ready.floor, &exec.floor)
				if n > 1 {
					return
				}
				timed(b, &destroy.floor, vms[0].quit)
				vms[0].end()
				if err := bare.restoreDisk(bare.places[0]); err != nil {
					b.Fatal(err)
				}
				timed(b, &first.floor, func() (err error) { vms[0], err = bare.answer(ctx, bare.places[0]); return err })
			})
			if n == 1 {
				first.agent, readyP50 = ready.agent, percentile(ready.agent, 50)
			}
			ready.report(b)
			if booted > 0 {
				remark("%d of %d creates%s had to boot, and are in the rows (%s).", booted, len(ready.agent), many, why)
			}
		})
	}
	parts.remark("a create from a ready snapshot")

	// boots times creates that boot beside bare boots.
	boots := func(b *testing.B, name string, create func() (*agent, *hostagentv1.CreateSandboxRequest)) *samples {
		s := row(name, "bare QEMU boots, POST /init with the identity")
		repeat(b, maxBig, time.Minute, func() {
			a, req := create()
			made := &sandbox{t: b, a: a}
			timed(b, &s.agent, func() error {
				resp, err := a.CreateSandbox(ctx, connect.NewRequest(req))
				if err == nil {
					made.id = resp.Msg.SandboxId
				}
				return err
			})
			if made.record().Restored {
				b.Fatal("a sandbox that was to boot was restored")
			}
			timed(b, &destroy.agent, made.destroy)
			if err := bare.bootDisk(bare.places[0]); err != nil {
				b.Fatal(err)
			}
			var vm *bareVM
			defer func() { vm.end() }()
			timed(b, &s.floor, func() (err error) { vm, err = bare.boot(ctx, bare.places[0]); return err })
			timed(b, &destroy.floor, vm.quit)
		})
		s.report(b)
		return s
	}
	b.Run("Cold", func(b *testing.B) {
		pure := boots(b, "cold create, no snapshot made", func() (*agent, *hostagentv1.CreateSandboxRequest) {
			return cold, &hostagentv1.CreateSandboxRequest{}
		})
		if readyP50 > 0 {
			remark("A create from a ready snapshot is %.1f × faster than a cold one that makes none (p50; goal ≥ 15 ×).",
				float64(percentile(pure.agent, 50))/float64(readyP50))
		}
	})
	b.Run("First", func(b *testing.B) {
		memory := int32(511) // each size is the first of its kind
		boots(b, "create, boots and makes the snapshot", func() (*agent, *hostagentv1.CreateSandboxRequest) {
			memory--
			return a, &hostagentv1.CreateSandboxRequest{MemoryMb: memory}
		})
	})
	if len(destroy.agent) > 0 {
		measured = append(measured, destroy)
	}
}

// phaseTimes are the times of the phases of many operations, in their order.
type phaseTimes struct {
	names []string
	times map[string][]time.Duration
}

func (p *phaseTimes) add(phases []*hostagentv1.Phase) {
	for _, phase := range phases {
		if p.times == nil {
			p.times = map[string][]time.Duration{}
		}
		if !slices.Contains(p.names, phase.Name) {
			p.names = append(p.names, phase.Name)
		}
		p.times[phase.Name] = append(p.times[phase.Name], time.Duration(phase.Ms*float64(time.Millisecond)))
	}
}

// remark says what the phases took.
func (p *phaseTimes) remark(of string) {
	var parts []string
	for _, name := range p.names {
		parts = append(parts, fmt.Sprintf("%s %.2f", name, millis(percentile(p.times[name], 50))))
	}
	if len(parts) > 0 {
		remark("Phases of %s, p50 in ms, some at the same time: %s.", of, strings.Join(parts, ", "))
	}
}

// warmPool is how many guests wait in BenchmarkWarm.
const warmPool = 4

// BenchmarkWarm times a create that takes a guest from the pool, and its first
// command, beside a container of gVisor's that runs the same.
func BenchmarkWarm(b *testing.B) {
	help, err := exec.Command(filepath.Join(binDir(b), "wrenn"), "serve", "--help").CombinedOutput()
	if err != nil || !strings.Contains(string(help), "--warm ") {
		b.Skip("this wrenn has no pool of waiting guests")
	}
	a := benchAgent(b, fmt.Sprintf("--warm=%d", warmPool))
	ctx := b.Context()
	b.Run("Echo", func(b *testing.B) {
		peer, err := newGVisor(b)
		whatFloor := "runsc --platform=systrap run of busybox echo, until it is gone"
		if err != nil {
			whatFloor = "gVisor was not measured: " + err.Error()
		}
		create := row("create from the pool", "")
		echo := row("create from the pool, exec echo", whatFloor)
		all := row("the same, and destroy", whatFloor)
		if peer != nil {
			echo.goal = 1
		}
		missed, parts := 0, phaseTimes{}
		repeat(b, 100, 2*time.Minute, func() {
			// Nothing is being filled up while either is measured.
			waitFor(b, "the pool to be full", func() bool { return a.metric(b, `wrenn_warm{state="ready"}`) == fmt.Sprint(warmPool) })
			if peer != nil {
				timed(b, &echo.floor, peer.echo)
			}
			s, made, err := a.startTimed(ctx, &hostagentv1.CreateSandboxRequest{}, "echo", "hello")
			if err != nil {
				b.Fatal(err)
			}
			began := time.Now()
			if err := (&sandbox{b, a, made.SandboxId}).destroy(); err != nil {
				b.Fatal(err)
			}
			if made.StartedFrom == "warm" {
				create.agent = append(create.agent, s.ready)
				echo.agent = append(echo.agent, s.exec)
				all.agent = append(all.agent, s.exec+time.Since(began))
				parts.add(made.Phases)
			} else {
				missed++
			}
		})
		all.floor = echo.floor
		echo.report(b)
		parts.remark("a create from the pool")
		if missed > 0 {
			remark("%d of %d creates found the pool empty and are not in its rows.", missed, missed+len(echo.agent))
		}
	})
}

// metric is the value of one of the agent's numbers, by name and labels; empty
// if there is none.
func (a *agent) metric(b *testing.B, name string) string {
	b.Helper()
	resp, err := http.Get(a.url + "/metrics")
	if err != nil {
		b.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// gVisor runs busybox in containers of its own, as bare as runsc has them.
type gVisor struct {
	runsc, root, bundle string
	made                int
}

// newGVisor looks for runsc and a busybox that needs no libraries, and makes a
// bundle; its error says what is not there.
func newGVisor(b *testing.B) (*gVisor, error) {
	b.Helper()
	runsc, err := exec.LookPath("runsc")
	if err != nil {
		return nil, errors.New("runsc is not in PATH")
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return nil, errors.New("busybox is not in PATH")
	}
	if program, err := elf.Open(busybox); err != nil {
		return nil, errors.New("busybox is no ELF program")
	} else {
		libraries, err := program.ImportedLibraries()
		program.Close()
		if err == nil && len(libraries) > 0 {
			return nil, errors.New("busybox is not linked statically")
		}
	}
	dir := b.TempDir()
	g := &gVisor{runsc: runsc, root: filepath.Join(dir, "state"), bundle: filepath.Join(dir, "bundle")}
	rootfs := filepath.Join(g.bundle, "rootfs", "bin")
	if err := os.MkdirAll(rootfs, 0o755); err != nil {
		b.Fatal(err)
	}
	if err := copyFile(filepath.Join(rootfs, "busybox"), busybox); err != nil {
		b.Fatal(err)
	}
	if err := os.Symlink("busybox", filepath.Join(rootfs, "echo")); err != nil {
		b.Fatal(err)
	}
	type object = map[string]any
	config, err := json.Marshal(object{
		"ociVersion": "1.0.0",
		"process": object{"args": []string{"/bin/echo", "hello"}, "cwd": "/", "user": object{"uid": 0, "gid": 0},
			"env": []string{"PATH=/bin"}},
		"root":     object{"path": "rootfs", "readonly": true},
		"hostname": "echo",
		"linux": object{"namespaces": []object{
			{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
		}},
	})
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(g.bundle, "config.json"), config, 0o644); err != nil {
		b.Fatal(err)
	}
	if err := g.echo(); err != nil { // the first reads it all from disk
		return nil, fmt.Errorf("runsc does not run: %w", err)
	}
	return g, nil
}

// echo runs one container to its end.
func (g *gVisor) echo() error {
	g.made++
	out, err := exec.Command(g.runsc, "--root="+g.root, "--platform=systrap", "--network=none", "--ignore-cgroups",
		"run", "--bundle="+g.bundle, fmt.Sprintf("echo-%d-%d", os.Getpid(), g.made)).CombinedOutput()
	if text := strings.TrimSpace(string(out)); err != nil || text != "hello" {
		return fmt.Errorf("%v: %.300s", err, text)
	}
	return nil
}
