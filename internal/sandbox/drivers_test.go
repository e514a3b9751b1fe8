package sandbox

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/network"
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
	r.changed = func(c *Config) { c.Others, c.Drivers = c.Drivers, []vmm.Driver{stranger{}} }
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
	r.changed = func(c *Config) { c.Drivers = []vmm.Driver{stranger{}} }
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
	r := newRig(t, func(c *Config) { c.Drivers[0].(hookedDriver).Driver.(*vmmtest.Fake).OwnKernel = true })
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

// beside is a rig with a flat driver, which is the best one, beside a machine.
func beside(t *testing.T) *rig {
	r := newRig(t, nil)
	r.die()
	r.changed = func(c *Config) {
		flat := vmmtest.NewFake(r.host)
		flat.Flat, flat.Called, flat.Lenient = true, "flat", true
		c.Drivers = append([]vmm.Driver{hookedDriver{flat, r.faults}}, c.Drivers...)
	}
	r.start()
	return r
}

// A sandbox gets the best driver that can run it, or the one that its create names.
func TestChooseADriver(t *testing.T) {
	r := beside(t)
	for _, c := range []struct {
		req      CreateRequest
		noFlat   bool
		want     string
		refused  *errdefs.Class
		contains string
	}{
		{want: "flat"},
		{req: CreateRequest{VMM: "flat"}, want: "flat"},
		{req: CreateRequest{VMM: "fake"}, want: "fake"},
		{req: CreateRequest{Isolation: VMIsolation}, want: "fake"},
		{req: CreateRequest{OnTimeout: HibernateFilesOnTimeout}, want: "fake"},
		{noFlat: true, want: "fake"},
		{req: CreateRequest{VMM: "flat"}, noFlat: true, refused: errdefs.WrongState, contains: "build it again"},
		{req: CreateRequest{VMM: "flat", Isolation: VMIsolation}, refused: errdefs.WrongState, contains: "isolation vm"},
		{req: CreateRequest{VMM: "flat", OnEnd: HibernateFilesOnTimeout}, refused: errdefs.Unsupported, contains: "in its memory"},
		{req: CreateRequest{VMM: "xen"}, refused: errdefs.InvalidArgument, contains: "flat, fake"},
		{req: CreateRequest{Isolation: "moat"}, refused: errdefs.InvalidArgument, contains: "moat"},
	} {
		r.tmpl.noFlat.Store(c.noFlat)
		made, err := r.Create(t.Context(), c.req)
		if c.refused != nil {
			wantClass(t, err, c.refused)
			if !strings.Contains(err.Error(), c.contains) {
				t.Errorf("%+v: %v", c.req, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if made.VMM != c.want || (made.Isolation == vmm.UserSpaceKernel) != (c.want == "flat") {
			t.Errorf("%+v: driver %q with %q, want %s", c.req, made.VMM, made.Isolation, c.want)
		}
		if err := r.Destroy(t.Context(), made.ID); err != nil {
			t.Error(err)
		}
	}
	r.wantNothing()
}

// wantDriver looks whether a sandbox runs with the driver of that name, and with what such
// a one takes.
func (r *rig) wantDriver(what string, id ID, name string) {
	r.t.Helper()
	flat := name == "flat"
	spec, ok := r.host.Spec(string(id))
	info := r.wantState(id, Running)
	if !ok || info.VMM != name || (spec.Init != "") != flat || (spec.Kernel == vmm.Kernel{}) != flat {
		r.t.Errorf("%s: %s runs with %q: %+v", what, name, info.VMM, spec)
	}
	if !flat {
		return
	}
	if _, err := os.Stat(spec.Init); err != nil || spec.Root.Layers[0] != "/root.erofs" || spec.Link.Name != network.PacketEnd {
		r.t.Errorf("%s: %v, %+v", what, err, spec)
	}
}

// Each sandbox stays with its driver, whatever is done to it and whichever agent does it.
// A flat one has no disk by itself, and its guest keeps the image of init that it began with.
func TestDriversSideBySide(t *testing.T) {
	if newRig(t, nil).Builders().Flat() {
		t.Error("templates of a host of machines are to have EROFS images")
	}
	r := beside(t)
	if !r.Builders().Flat() {
		t.Error("templates of a host whose best driver is flat are to have none")
	}
	for _, name := range []string{"flat", "fake"} {
		ctx := t.Context()
		id := r.made(CreateRequest{VMM: name}).ID
		is := func(what string, id ID) { t.Helper(); r.wantDriver(what, id, name) }
		is("created", id)
		is("from a boot snapshot", r.made(CreateRequest{VMM: name}).ID)
		if err := errors.Join(r.Pause(ctx, id), r.Resume(ctx, id), r.Hibernate(ctx, id, Hibernation{})); err != nil {
			t.Fatal(err)
		}
		// Setup replaces what guests boot with.
		host := filepath.Join(r.dir, "init.erofs")
		if err := errors.Join(os.Remove(host), os.WriteFile(host, []byte("new"), 0o600)); err != nil {
			t.Fatal(err)
		}
		r.die()
		r.start()
		if err := r.Resume(ctx, id); err != nil {
			t.Fatal(err)
		}
		is("resumed by the next agent", id)
		forked, err := r.Fork(ctx, id, ForkRequest{Count: 2})
		if err != nil {
			t.Fatal(err)
		}
		is("forked", forked.Sandboxes[0].ID)
		snap, err := r.Snapshot(ctx, id, SnapshotRequest{Name: "of-" + name})
		if err != nil {
			t.Fatal(err)
		}
		cloned := r.made(CreateRequest{Template: snap.Name})
		is("cloned", cloned.ID)
		if data, err := os.ReadFile(r.store.initImage(cloned.ID)); name == "flat" && (err != nil || string(data) != "init") {
			t.Errorf("image of init: %q, %v", data, err)
		}
		r.die()
		r.start()
		is("adopted", cloned.ID)
	}
	for _, info := range r.List(true) {
		if err := r.Destroy(t.Context(), info.ID); err != nil {
			t.Error(err)
		}
	}
	r.wantNothing()
}

// What would need a disk by itself is refused, and changes nothing.
func TestFlatSandboxHasNoFilesAlone(t *testing.T) {
	r := beside(t)
	ctx := t.Context()
	id := r.made(CreateRequest{VMM: "flat"}).ID
	wantClass(t, r.Hibernate(ctx, id, Hibernation{FilesOnly: true}), errdefs.Unsupported)
	_, err := r.Snapshot(ctx, id, SnapshotRequest{FilesOnly: true})
	wantClass(t, err, errdefs.Unsupported)
	r.wantState(id, Running)
	snap, err := r.Snapshot(ctx, id, SnapshotRequest{Name: "s"})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Hibernate(ctx, id, Hibernation{}); err != nil {
		t.Fatal(err)
	}
	wantClass(t, r.coldBoot(id), errdefs.Unsupported)
	r.wantState(id, Hibernated)

	// Its memory fits neither another driver nor another root.
	_, err = r.Create(ctx, CreateRequest{Template: snap.Name, VMM: "fake"})
	wantClass(t, err, errdefs.Unsupported)
	_, err = r.Create(ctx, CreateRequest{Template: snap.Name, Isolation: VMIsolation})
	wantClass(t, err, errdefs.Unsupported)
	r.tmpl.noFlat.Store(true)
	_, err = r.Create(ctx, CreateRequest{Template: snap.Name})
	wantClass(t, err, errdefs.Unsupported)
	wantClass(t, r.Resume(ctx, id), errdefs.Unsupported)
	r.wantState(id, Hibernated)
	r.tmpl.noFlat.Store(false)
	if err := r.Resume(ctx, id); err != nil {
		t.Error(err)
	}

	// A build sandbox needs a disk that can be copied, so it is a machine.
	b := r.builder(BuilderRequest{})
	if spec, ok := r.host.Spec(string(b)); !ok || spec.Init != "" {
		t.Errorf("build sandbox %+v", spec)
	}
}

// The kernel of a flat driver has drawn its boot id before a boot snapshot is made, so each
// guest that starts from one gets another.
func TestFlatClonesGetABootID(t *testing.T) {
	r := beside(t)
	for _, name := range []string{"flat", "fake"} {
		r.made(CreateRequest{VMM: name})
		var fresh []bool
		r.told = func(_ string, in guest.Init) { fresh = append(fresh, in.NewBootID) }
		r.made(CreateRequest{VMM: name})
		if !slices.Equal(fresh, []bool{name == "flat"}) {
			t.Errorf("%s: told of a new boot id: %v", name, fresh)
		}
		r.told = nil
	}
}
