package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
)

// BenchmarkRunning times what is done with a sandbox that runs.
func BenchmarkRunning(b *testing.B) {
	a := benchAgent(b)
	box := a.restoredBox(b)
	bare := newBareHost(b, nil, box, 1)
	direct := box.direct()
	defer direct.Close()
	ctx := b.Context()

	b.Run("Exec", func(b *testing.B) {
		s := row("exec true", "process.Start to envd")
		repeat(b, 200, 60*time.Second, func() {
			timed(b, &s.agent, func() error { _, err := box.exec("true"); return err })
			timed(b, &s.floor, func() error { _, err := direct.Exec(ctx, guest.Command{Cmd: "true"}); return err })
		})
		s.report(b)
	})
	b.Run("PauseResume", func(b *testing.B) {
		if err := bare.restoreDisk(bare.places[0]); err != nil {
			b.Fatal(err)
		}
		vm, err := bare.restore(ctx, bare.places[0])
		if err != nil {
			b.Fatal(err)
		}
		defer vm.end()
		pause, resume := row("pause", "QMP stop"), row("resume", "QMP cont, POST /init")
		repeat(b, 100, 60*time.Second, func() {
			timed(b, &pause.agent, box.pause)
			timed(b, &resume.agent, box.resume)
			timed(b, &pause.floor, func() error { return vm.qmp("stop") })
			timed(b, &resume.floor, func() error {
				if err := vm.qmp("cont"); err != nil {
					return err
				}
				_, err := vm.guest.Init(ctx, guest.Init{AccessToken: bare.token})
				return err
			})
		})
		pause.report(b)
	})
}

// copyMemMiB is what all sandboxes of BenchmarkCopies may have together: more
// than some machines have, for a fork takes what it writes.
const copyMemMiB = 64 << 10

// BenchmarkCopies times what writes a sandbox's state to disk and what comes
// back from there, beside copies of the bytes and bare restores of the same
// state: that of a twin, a sandbox with the same past.
func BenchmarkCopies(b *testing.B) {
	a := benchAgent(b, fmt.Sprintf("--max-memory=%d", copyMemMiB))
	box, twin := a.restoredBox(b), a.restoredBox(b)
	const most = 50
	bare := newBareHost(b, nil, box, most)
	for _, x := range []*sandbox{box, twin} {
		if _, err := x.exec("true"); err != nil {
			b.Fatal(err)
		}
	}
	bare.useStateOf(b, twin)
	if err := twin.destroy(); err != nil {
		b.Fatal(err)
	}
	ctx := b.Context()

	b.Run("Hibernate", func(b *testing.B) {
		hibernate := row("hibernate, 512 MiB", "QMP stop, cp of the memory and fsync, QMP quit")
		resume := row("resume from disk", "bare QEMU restores the same, POST /init")
		repeat(b, 20, 60*time.Second, func() {
			timed(b, &hibernate.agent, box.hibernate)
			timed(b, &resume.agent, box.resume)
			p := bare.places[0]
			if err := bare.restoreDisk(p); err != nil {
				b.Fatal(err)
			}
			var vm *bareVM
			defer func() { vm.end() }()
			timed(b, &resume.floor, func() (err error) { vm, err = bare.restore(ctx, p); return err })
			timed(b, &hibernate.floor, func() error {
				if err := vm.qmp("stop"); err != nil {
					return err
				}
				if err := bare.copyState(p.dir, true, "mem", "state"); err != nil {
					return err
				}
				return vm.quit()
			})
		})
		hibernate.report(b)
	})
	for _, c := range []struct{ forks, rounds int }{{1, 20}, {10, 3}, {most, 1}} {
		b.Run(fmt.Sprintf("Fork%d", c.forks), func(b *testing.B) {
			s := row(fmt.Sprintf("fork × %d", c.forks), fmt.Sprintf("cp of memory and disk, %d × a copy of the disk and a bare restore", c.forks))
			var still []time.Duration
			repeat(b, c.rounds, 60*time.Second, func() {
				var forks []*hostagentv1.SandboxInfo
				timed(b, &s.agent, func() error {
					resp, err := a.ForkSandbox(ctx, connect.NewRequest(&hostagentv1.ForkSandboxRequest{SandboxId: box.id, Count: int32(c.forks)}))
					if err != nil {
						return err
					}
					forks = resp.Msg.Sandboxes
					still = append(still, time.Duration(resp.Msg.PausedMs)*time.Millisecond)
					return nil
				})
				for _, f := range forks {
					if err := (&sandbox{b, a, f.SandboxId}).destroy(); err != nil {
						b.Fatal(err)
					}
				}
				vms := make([]*bareVM, c.forks)
				defer func() {
					for _, vm := range vms {
						vm.end()
					}
				}()
				timed(b, &s.floor, func() error {
					if err := bare.copyState(bare.places[0].dir, false, "mem", "state", "overlay.ext4"); err != nil {
						return err
					}
					turns := newTurns()
					atOnce(b, c.forks, func(i int) error {
						return turns.take(func() (err error) {
							p := bare.places[i]
							if err = bare.restoreDisk(p); err == nil {
								vms[i], err = bare.restore(ctx, p)
							}
							return err
						})
					})
					return nil
				})
			})
			s.report(b)
			remark("Fork × %d: %.0f ms for each (p50), the source stood still for %.0f ms.", c.forks,
				millis(percentile(s.agent, 50))/float64(c.forks), millis(percentile(still, 50)))
		})
	}
	b.Run("Snapshot", func(b *testing.B) {
		s := row("snapshot with a name", "QMP stop, cp of memory and disk and fsync, QMP cont")
		from := []*samples{ // the digests are checked once
			row("first create from that snapshot", "bare QEMU restores the same, POST /init"),
			row("next create from that snapshot", "bare QEMU restores the same, POST /init"),
		}
		p := bare.places[0]
		if err := bare.restoreDisk(p); err != nil {
			b.Fatal(err)
		}
		vm, err := bare.restore(ctx, p)
		if err != nil {
			b.Fatal(err)
		}
		defer func() { vm.end() }()
		repeat(b, 20, 60*time.Second, func() {
			if s.absent != "" {
				return
			}
			began := time.Now()
			resp, err := a.SnapshotSandbox(ctx, connect.NewRequest(&hostagentv1.SnapshotSandboxRequest{SandboxId: box.id}))
			took := time.Since(began)
			switch {
			case connect.CodeOf(err) == connect.CodeUnimplemented:
				s.absent = "this wrenn has none"
				from[0].absent, from[1].absent = s.absent, s.absent
				return
			case err != nil:
				b.Fatal(err)
			}
			s.agent = append(s.agent, took)
			name := resp.Msg.Snapshot.Name
			for _, f := range from {
				began := time.Now()
				made, err := a.CreateSandbox(ctx, connect.NewRequest(&hostagentv1.CreateSandboxRequest{Template: name}))
				if err != nil {
					b.Fatal(err)
				}
				f.agent = append(f.agent, time.Since(began))
				if err := (&sandbox{b, a, made.Msg.SandboxId}).destroy(); err != nil {
					b.Fatal(err)
				}
			}
			if _, err := a.DeleteSnapshot(ctx, connect.NewRequest(&hostagentv1.DeleteSnapshotRequest{Name: name})); err != nil {
				b.Fatal(err)
			}
			timed(b, &s.floor, func() error {
				if err := vm.qmp("stop"); err != nil {
					return err
				}
				if err := bare.copyState(p.dir, true, "mem", "state", "overlay.ext4"); err != nil {
					return err
				}
				return vm.qmp("cont")
			})
			vm.end()
			if err := bare.restoreDisk(p); err != nil {
				b.Fatal(err)
			}
			timed(b, &from[0].floor, func() (err error) { vm, err = bare.restore(ctx, p); return err })
		})
		from[1].floor = from[0].floor
		s.report(b)
	})
}

// copyState copies files of the saved state to a directory; with synced, to its
// disk. The copy is removed by the next one.
func (h *bareHost) copyState(dir string, synced bool, names ...string) error {
	to := filepath.Join(dir, "copy")
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	for _, name := range names {
		path := filepath.Join(to, name)
		if err := copyFile(path, filepath.Join(h.saved, name)); err != nil {
			return err
		}
		if !synced {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = f.Sync()
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}
