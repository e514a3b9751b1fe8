package sandbox

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

var server = template.Program{
	Start: "serve", Ready: "is it there", Shell: []string{"/bin/bash", "-l", "-c"},
	Login: template.Login{User: "user", Workdir: "/srv", Env: map[string]string{"A": "b"}},
}

func withServer(r *rig) *rig {
	r.tmpl.start.Store(server)
	return r
}

// text is the command that a shell was given.
func text(cmd guest.Command) string { return cmd.Args[len(cmd.Args)-1] }

// TestProgramIsInTheSnapshot: the first create runs the program before it makes the boot
// snapshot; those after it get it running and run nothing.
func TestProgramIsInTheSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := withServer(newRig(t))
		var mu sync.Mutex // start and ready command run at the same time
		var ran []string
		tries := 0
		r.exec = func(ctx context.Context, cmd guest.Command) (guest.Result, error) {
			mu.Lock()
			ran = append(ran, text(cmd))
			mu.Unlock()
			if cmd.User != "user" || cmd.Cwd != "/srv" || cmd.Env["A"] != "b" || cmd.Cmd != "/bin/bash" ||
				!slices.Equal(cmd.Args[:2], []string{"-l", "-c"}) {
				t.Errorf("the command is %+v", cmd)
			}
			if text(cmd) == "serve" {
				return guest.Result{}, hang(ctx)
			}
			tries++
			return guest.Result{ExitCode: 3 - min(tries, 3)}, nil
		}
		var inits []guest.Init
		var shown []string
		r.told = func(token string, in guest.Init) { inits, shown = append(inits, in), append(shown, token) }
		began := time.Now()
		first, err := r.Create(t.Context(), CreateRequest{Login: Login{Env: map[string]string{"SECRET": "s"}}})
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took != 2*readyEvery || tries != 3 || first.From != FromBoot {
			t.Errorf("the first took %s and %d tries, from %s", took, tries, first.From)
		}
		if len(inits) != 2 || inits[0].Hostname != bootName || inits[0].SandboxID != "" || len(inits[0].Env) != 0 ||
			inits[0].AccessToken != shown[1] || inits[1].SandboxID != string(first.ID) || inits[1].NewBootID {
			t.Errorf("told %+v with %q", inits, shown)
		}
		if n := r.faults.count("guest.freeze"); n != 1 {
			t.Errorf("programs were stopped %d times for the snapshot", n)
		}
		boot := shown[1]
		inits, shown, ran = nil, nil, nil
		second, err := r.Create(t.Context(), CreateRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if second.From != FromReady || len(ran) != 0 {
			t.Errorf("the second is from %s and ran %q", second.From, ran)
		}
		if len(inits) != 1 || shown[0] != boot || !inits[0].NewBootID || !inits[0].Restored || inits[0].AccessToken == boot {
			t.Errorf("the second was told %+v with %q", inits, shown)
		}
	})
}

// TestWaitingGuestWithProgram: its program stands still until it is a sandbox.
func TestWaitingGuestWithProgram(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := withServer(newRig(t, warmOne))
		r.create()
		r.fillPool()
		var inits []guest.Init
		var shown []string
		r.told = func(token string, in guest.Init) { inits, shown = append(inits, in), append(shown, token) }
		c, err := r.Create(t.Context(), CreateRequest{})
		if err != nil || c.From != FromWarm {
			t.Fatalf("from %s: %v", c.From, err)
		}
		rec := r.lookup(c.ID).record()
		if len(inits) != 1 || shown[0] == rec.Token || inits[0].AccessToken != rec.Token || !inits[0].NewBootID {
			t.Errorf("told %+v with %q", inits, shown)
		}
	})
}

// TestProgramFails: what fails says so, with the end of its output, and nothing is left.
func TestProgramFails(t *testing.T) {
	fails := func(which string, code int, said string) func(context.Context, guest.Command) (guest.Result, error) {
		return func(ctx context.Context, cmd guest.Command) (guest.Result, error) {
			if text(cmd) != which {
				if text(cmd) == "serve" {
					return guest.Result{}, hang(ctx)
				}
				return guest.Result{ExitCode: 1}, nil
			}
			cmd.Output(true, []byte(said))
			return guest.Result{ExitCode: code}, nil
		}
	}
	for name, c := range map[string]struct {
		exec func(context.Context, guest.Command) (guest.Result, error)
		want string
		took time.Duration
	}{
		"start ends badly": {fails("serve", 7, "no\nport\n"),
			"start command failed: exit status 7; the end of what its start command wrote: no | port", 0},
		"never ready": {fails("is it there", 1, "not yet\n"),
			"ready command timed out after 10m0s; the end of what its ready command wrote: not yet", readyTimeout},
		"start ends well": {fails("serve", 0, ""), "ready command timed out after 10m0s", readyTimeout},
		"ready hangs": {func(ctx context.Context, _ guest.Command) (guest.Result, error) { return guest.Result{}, hang(ctx) },
			"ready command timed out after 10m0s", readyTimeout},
		"no such user": {func(context.Context, guest.Command) (guest.Result, error) {
			return guest.Result{}, errdefs.InvalidArgument.Errorf("run command: invalid username: 'user'")
		}, "failed: run command: invalid username: 'user'", 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := withServer(newRig(t))
				r.exec = c.exec
				began := time.Now()
				_, err := r.Create(t.Context(), CreateRequest{})
				if !errors.Is(err, errdefs.WrongState) && !errors.Is(err, errdefs.InvalidArgument) || !strings.Contains(err.Error(), c.want) {
					t.Errorf("create: %v", err)
				}
				if took := time.Since(began); took < c.took || took > c.took+time.Second {
					t.Errorf("it took %s, want %s", took, c.took)
				}
				var said []string
				err = r.PrepareBuild(t.Context(), minimal.ID, minimal.Builds[0].ID, func(level, step, line string) {
					said = append(said, level+" "+step+" "+line)
				})
				if err == nil || !strings.Contains(err.Error(), c.want) || strings.HasPrefix(err.Error(), "create") {
					t.Errorf("prepare: %v", err)
				}
				if name == "start ends badly" && !slices.Equal(said, []string{"info start no", "info start port"}) {
					t.Errorf("said: %q", said)
				}
				r.wantNothing()
			})
		})
	}
}

// TestPrepareBuild makes the boot snapshot once, and no sandbox that anyone sees.
func TestPrepareBuild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := withServer(newRig(t))
		boot := ""
		r.told = func(token string, in guest.Init) {
			if boot == "" {
				boot = token
			}
			if token != boot { // that is what it takes until it is told another
				t.Errorf("it was shown %q, and takes %q", token, boot)
			}
		}
		for range 2 {
			if err := r.PrepareBuild(t.Context(), minimal.ID, minimal.Builds[0].ID, nil); err != nil {
				t.Fatal(err)
			}
			r.wantNothing()
		}
		if n := r.faults.count("guest.start"); n != 1 {
			t.Errorf("the program was started %d times", n)
		}
		if lines := r.history(0); len(lines) != 0 {
			t.Errorf("events tell of it: %q", lines)
		}
		r.told = nil
		c, err := r.Create(t.Context(), CreateRequest{})
		if err != nil || c.From != FromReady {
			t.Errorf("the first create is from %s: %v", c.From, err)
		}
		if err := r.PrepareBuild(t.Context(), minimal.ID, "00000000-0000-4000-8000-000000000001", nil); !errors.Is(err, errdefs.NotFound) {
			t.Errorf("a build that is not there: %v", err)
		}
		r.faults.on("snapshot", func(context.Context) error { return errdefs.Exhausted.Errorf("no room") })
		if err := r.Destroy(t.Context(), c.ID); err != nil {
			t.Fatal(err)
		}
		another := server
		another.Start = "another"
		r.tmpl.start.Store(another)
		if err := r.PrepareBuild(t.Context(), minimal.ID, minimal.Builds[0].ID, nil); !errors.Is(err, errdefs.Exhausted) {
			t.Errorf("a snapshot that cannot be made: %v", err)
		}
		r.wantNothing()
	})
}

// TestProgramAfterFilesOnly: a sandbox that boots from its own disk runs the program before
// its resume answers, and a program that fails leaves it hibernated.
func TestProgramAfterFilesOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := withServer(newRig(t))
		id := r.create()
		if err := r.Hibernate(t.Context(), id, filesOnly); err != nil {
			t.Fatal(err)
		}
		r.exec = func(context.Context, guest.Command) (guest.Result, error) { return guest.Result{ExitCode: 1}, nil }
		if err := r.Resume(t.Context(), id); !errors.Is(err, errdefs.WrongState) || !strings.Contains(err.Error(), "start command failed") {
			t.Errorf("resume: %v", err)
		}
		r.wantState(id, Hibernated)
		r.exec = nil
		before := r.faults.count("guest.start")
		if err := r.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if n := r.faults.count("guest.start") - before; n != 1 {
			t.Errorf("the program was started %d times", n)
		}
	})
}

// TestProgramUnderThePolicy: what others may get is made under the host's policy, what is a
// sandbox's own alone under its own.
func TestProgramUnderThePolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := withServer(newRig(t))
		var during []string
		look := func(id ID) func(context.Context) error {
			return func(context.Context) error {
				for _, b := range r.all() {
					if id == "" || b.id == id {
						r.net.mu.Lock()
						during = append(during, fmt.Sprint(r.net.policies[b.record().Slot].IsZero()))
						r.net.mu.Unlock()
					}
				}
				return nil
			}
		}
		r.faults.on("guest.start", look(""))
		c, err := r.Create(t.Context(), CreateRequest{Network: closed()})
		if err != nil {
			t.Fatal(err)
		}
		r.wantNetwork(c.ID, closed())
		if err := r.Hibernate(t.Context(), c.ID, filesOnly); err != nil {
			t.Fatal(err)
		}
		if err := r.Resume(t.Context(), c.ID); err != nil {
			t.Fatal(err)
		}
		r.wantNetwork(c.ID, closed())
		if want := []string{"true", "false"}; !slices.Equal(during, want) {
			t.Errorf("the host's policy was in force: %q, want %q", during, want)
		}
	})
}

// TestProgramAndStartSlots: another sandbox starts while a program is waited for.
func TestProgramAndStartSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := withServer(newRig(t, func(c *Config) { c.Capacity.Starts, c.Capacity.StartQueue = 1, time.Second }))
		r.exec = func(ctx context.Context, cmd guest.Command) (guest.Result, error) {
			if text(cmd) == "is it there" {
				time.Sleep(time.Minute)
			}
			return guest.Result{}, nil
		}
		made := make(chan error, 2)
		for range 2 {
			go func() {
				_, err := r.Create(t.Context(), CreateRequest{})
				made <- err
			}()
			time.Sleep(5 * time.Second)
			r.tmpl.start.Store(template.Program{})
		}
		if err := errors.Join(<-made, <-made); err != nil {
			t.Error(err)
		}
	})
}

// TestProgramLines: lines are told whole, those of each stream by themselves, and no more
// than is bearable.
func TestProgramLines(t *testing.T) {
	var told []string
	l := &lines{step: "start", log: func(_, _, line string) { told = append(told, line) }}
	l.write(false, []byte("one\ntw"))
	l.write(true, []byte("err\r\n"))
	l.write(false, []byte("o\n\nend"))
	l.flush()
	if want := []string{"one", "err", "two", "", "end"}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
	told = nil
	for range 300 {
		l.write(false, []byte(strings.Repeat("x", 2*maxProgramLine)+"\n"))
	}
	total := 0
	for _, line := range told {
		if len(line) > maxProgramLine {
			t.Fatalf("a line of %d bytes", len(line))
		}
		total += len(line)
	}
	if total > maxProgramLog || !strings.Contains(told[len(told)-1], "missing") {
		t.Errorf("%d bytes are told, the last is %q", total, told[len(told)-1])
	}
	if said := l.said(); len(said) > 2*errdefs.MaxForeign {
		t.Errorf("the end has %d bytes", len(said))
	}
}
