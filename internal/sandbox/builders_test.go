package sandbox

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// root is the root that build sandboxes of a test stand on.
func root(r *rig) template.Template {
	r.t.Helper()
	tmpl, err := r.tmpl.Get("minimal")
	if err != nil {
		r.t.Fatal(err)
	}
	tmpl.ID, tmpl.Build, tmpl.Name = "", "", "" // a stack that is not published
	return tmpl
}

func (r *rig) builder(req BuilderRequest) ID {
	r.t.Helper()
	if req.Root.Kernel == "" {
		req.Root = root(r)
	}
	id, err := r.Builders().Create(r.t.Context(), req)
	if err != nil {
		r.t.Fatalf("create build sandbox: %v", err)
	}
	return id
}

// TestBuilderIsHidden: a build sandbox takes of the host, and is no sandbox to anyone.
func TestBuilderIsHidden(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Quota = func(string) Quota { return Quota{Sandboxes: 1} } })
		before := r.Stats().Reserved
		id := r.builder(BuilderRequest{Project: "p", VCPUs: 2, MemMiB: 1024, DiskMiB: 2048})
		if got := r.Stats().Reserved.minus(before); got != need(2, 1024, 2048) {
			t.Errorf("the ledger has %+v, want %+v", got, need(2, 1024, 2048))
		}
		if list := r.List(true); len(list) != 0 {
			t.Errorf("it is in the list: %+v", list)
		}
		if _, err := r.Get(id); !errors.Is(err, errdefs.NotFound) {
			t.Errorf("get: %v", err)
		}
		if _, err := r.Exec(t.Context(), id, Command{Cmd: "x"}); !errors.Is(err, errdefs.NotFound) {
			t.Errorf("exec: %v", err)
		}
		if err := r.Destroy(t.Context(), id); !errors.Is(err, errdefs.NotFound) {
			t.Errorf("destroy as a sandbox: %v", err)
		}
		if _, err := r.Create(t.Context(), CreateRequest{Labels: Labels{Project: "p"}}); err != nil {
			t.Errorf("the quota of its project counts it: %v", err)
		}
		time.Sleep(2 * time.Hour) // nothing ends it by time
		if _, err := r.Builders().Guest(id); err != nil {
			t.Errorf("hours later: %v", err)
		}
		if err := r.Builders().Destroy(t.Context(), id); err != nil {
			t.Errorf("destroy: %v", err)
		}
		if err := r.Builders().Destroy(t.Context(), id); err != nil {
			t.Errorf("destroy again: %v", err)
		}
		err := r.Events(t.Context(), 0, false, func(e Event) error {
			if e.ID == id {
				t.Errorf("an event tells of it: %+v", e)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		for _, info := range r.List(true) {
			if err := r.Destroy(t.Context(), info.ID); err != nil {
				t.Error(err)
			}
		}
		r.wantNothing()
	})
}

// TestBuilderRuns: output streams in the order in which it comes, a copy of the disk is
// made while programs stand still, and another build sandbox goes on from it.
func TestBuilderRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.exec = func(_ context.Context, cmd guest.Command) (guest.Result, error) {
			if !cmd.Whole || cmd.MaxOutput != maxBuildOutput {
				t.Errorf("the command is %+v", cmd)
			}
			cmd.Output(false, []byte("out "))
			cmd.Output(true, []byte("err"))
			return guest.Result{ExitCode: 3}, nil
		}
		id := r.builder(BuilderRequest{})
		g, err := r.Builders().Guest(id)
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		result, err := g.Exec(t.Context(), Command{Cmd: "make"}, func(_ bool, data []byte) { out.Write(data) })
		if err != nil || result.ExitCode != 3 || out.String() != "out err" {
			t.Errorf("exec: %+v, %q, %v", result, out.String(), err)
		}
		var packed bytes.Buffer
		err = errors.Join(g.Unpack(t.Context(), "/", strings.NewReader("tar")), g.Pack(t.Context(), "/x", &packed))
		if err != nil || packed.String() != "/x" {
			t.Errorf("unpack and pack: %q, %v", packed.String(), err)
		}
		copied := filepath.Join(r.dir, "copy")
		if err := r.Builders().Capture(t.Context(), id, copied); err != nil {
			t.Fatalf("capture: %v", err)
		}
		if n := r.faults.count("guest.freeze"); n != 1 {
			t.Errorf("programs were stopped %d times", n)
		}
		if r.host.Paused(string(id)) {
			t.Error("it stands still after the capture")
		}
		next := r.builder(BuilderRequest{Overlay: copied})
		if _, err := os.Stat(r.store.overlay(next)); err != nil {
			t.Error(err)
		}
		_, err = r.Builders().Create(t.Context(), BuilderRequest{Root: root(r), Overlay: copied + "-gone"})
		if !errors.Is(err, errdefs.NotFound) {
			t.Errorf("from a disk that is not there: %v", err)
		}
		for _, id := range []ID{id, next} {
			if err := r.Builders().Destroy(t.Context(), id); err != nil {
				t.Error(err)
			}
		}
		r.wantNothing()
	})
}

// TestBuilderRefusals: what cannot be is refused before anything is made.
func TestBuilderRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for _, req := range []BuilderRequest{{VCPUs: MaxVCPUs + 1}, {MemMiB: 1}, {VCPUs: -1}} {
			req.Root = root(r)
			if _, err := r.Builders().Create(t.Context(), req); !errors.Is(err, errdefs.InvalidArgument) {
				t.Errorf("%+v: %v", req, err)
			}
		}
		id := r.create()
		if _, err := r.Builders().Guest(id); !errors.Is(err, errdefs.NotFound) {
			t.Errorf("the guest of a sandbox: %v", err)
		}
		if err := r.Builders().Capture(t.Context(), id, filepath.Join(r.dir, "x")); !errors.Is(err, errdefs.NotFound) {
			t.Errorf("capture of a sandbox: %v", err)
		}
	})
}

// TestBuilderDies: a call in progress ends with the VM and says why, and nothing is left.
func TestBuilderDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.exec = func(ctx context.Context, _ guest.Command) (guest.Result, error) {
			return guest.Result{}, errdefs.Unavailable.Errorf("run command: %w", hang(ctx))
		}
		id := r.builder(BuilderRequest{})
		g, err := r.Builders().Guest(id)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() {
			_, err := g.Exec(t.Context(), Command{Cmd: "make"}, func(bool, []byte) {})
			ended <- err
		}()
		synctest.Wait()
		r.host.Die(string(id))
		if err := <-ended; !errors.Is(err, errdefs.Unavailable) || !strings.Contains(err.Error(), "the vm of sandbox") {
			t.Errorf("exec: %v", err)
		}
		synctest.Wait()
		if err := g.Pack(t.Context(), "/", &bytes.Buffer{}); !errors.Is(err, errdefs.NotFound) {
			t.Errorf("afterwards: %v", err)
		}
		r.wantNothing()
	})
}

// TestBuilderAtRestart: the next agent frees a build sandbox, and a shutdown does.
func TestBuilderAtRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.builder(BuilderRequest{})
		r.die()
		r.open.Store(0)
		r.start()
		if len(r.found.Freed) != 1 || r.found.Freed[0] != id {
			t.Errorf("found %+v", r.found)
		}
		r.wantNothing()
		r.builder(BuilderRequest{})
		if err := r.Shutdown(t.Context(), false); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		r.wantNothing()
	})
}

// TestBuilderOnAFullDisk: a build sandbox that fills the host's disk is stopped, its build
// is told, and its end gives the room back.
func TestBuilderOnAFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, free := diskRig(t)
		id := r.builder(BuilderRequest{})
		g, err := r.Builders().Guest(id)
		if err != nil {
			t.Fatal(err)
		}
		free.Store(8 << 20)
		passes(time.Second)
		r.grow(id, 16)
		passes(time.Second)
		_, err = g.Exec(t.Context(), Command{Cmd: "make"}, func(bool, []byte) {})
		if !errors.Is(err, errdefs.Exhausted) || !strings.Contains(err.Error(), "the host's disk is full") {
			t.Errorf("exec: %v", err)
		}
		if err := r.Builders().Destroy(t.Context(), id); err != nil {
			t.Error(err)
		}
		r.wantNothing()
	})
}
