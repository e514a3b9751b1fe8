package sandbox

import (
	"context"
	"errors"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// stranger is a driver that has nothing to do with the VMs and snapshots of
// the other one, and says so.
type stranger struct{ vmm.Driver }

func (stranger) Name() string { return "stranger" }

func (stranger) Needs() vmm.Needs { return vmm.Needs{Link: vmm.Packet} }

func (stranger) Attach(context.Context, vmm.Handle) (vmm.VM, error) {
	return nil, errdefs.InvalidArgument.Errorf("not a handle of this driver")
}

func (stranger) Restore(context.Context, vmm.Spec, string) (vmm.VM, error) {
	return nil, errdefs.Unsupported.Errorf("snapshot is of another VMM")
}

func (stranger) SnapshotKey(context.Context, vmm.Spec) (string, error) {
	return "", errdefs.Unsupported.Errorf("not asked here")
}

// An agent that was told to use another VMM still has the sandboxes of the
// first: those that run and those that are hibernated.
func TestAnotherDriverAfterARestart(t *testing.T) {
	r := newRig(t)
	runs, sleeps := r.create(), r.create()
	if err := r.Hibernate(t.Context(), sleeps, Hibernation{}); err != nil {
		t.Fatal(err)
	}
	r.die()
	r.changed = func(c *Config) { c.Others, c.Driver = []vmm.Driver{c.Driver}, stranger{} }
	r.start()
	if len(r.found.Adopted) != 1 || r.found.Adopted[0] != runs {
		t.Errorf("found %+v, want %s adopted", r.found, runs)
	}
	r.wantState(runs, Running)
	if err := errors.Join(r.Pause(t.Context(), runs), r.Resume(t.Context(), runs), r.Resume(t.Context(), sleeps)); err != nil {
		t.Error(err)
	}
	r.wantState(sleeps, Running)

	// What neither of them knows is left alone, for the next that does.
	r.die()
	r.changed = func(c *Config) { c.Driver = stranger{} }
	r.start()
	if len(r.found.Unreachable) != 2 || len(r.host.Live()) != 2 {
		t.Errorf("found %+v with VMs %v, want both left", r.found, r.host.Live())
	}
	wantClass(t, r.Pause(t.Context(), runs), errdefs.Unavailable)
	r.die()
	r.changed = nil
	r.start()
	if len(r.found.Adopted) != 2 {
		t.Errorf("found %+v, want both adopted", r.found)
	}
	if info := r.wantState(runs, Running); info.Reason != "" {
		t.Errorf("it is still %s", info.Reason)
	}
}

// A driver that runs no kernel and takes no tap makes sandboxes as the others do.
func TestDriverWithItsOwnKernel(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Driver.(hookedDriver).Driver.(*vmmtest.Fake).OwnKernel = true })
	id := r.create()
	spec, ok := r.host.Spec(string(id))
	if !ok || spec.Kernel != (vmm.Kernel{}) || spec.Link.Kind != vmm.Packet || len(spec.Root.Layers) != 1 || spec.Root.Overlay == "" || !spec.Boot.Addr.IsValid() {
		t.Errorf("spec %+v", spec)
	}
	if err := errors.Join(r.Pause(t.Context(), id), r.Resume(t.Context(), id), r.Hibernate(t.Context(), id, Hibernation{}), r.Resume(t.Context(), id)); err != nil {
		t.Fatal(err)
	}
	r.die()
	r.start()
	if len(r.found.Adopted) != 1 || r.found.Adopted[0] != id {
		t.Errorf("found %+v, want %s adopted", r.found, id)
	}
	if err := r.Destroy(t.Context(), id); err != nil {
		t.Error(err)
	}
}
