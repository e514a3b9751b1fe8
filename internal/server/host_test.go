package server

import (
	"slices"
	"testing"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// GetHost says what the host may give, what is in use and what it runs sandboxes on; to a
// key, too.
func TestGetHost(t *testing.T) {
	p := newPlane(t)
	c := p.client()
	before, err := c.GetHost(t.Context(), connect.NewRequest(&pb.GetHostRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.CreateSandbox(t.Context(), connect.NewRequest(&pb.CreateSandboxRequest{Vcpus: 2, MemoryMb: 256})); err != nil {
		t.Fatal(err)
	}
	after, err := c.GetHost(t.Context(), connect.NewRequest(&pb.GetHostRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	was, is := before.Msg, after.Msg
	if is.Used.Sandboxes-was.Used.Sandboxes != 1 || is.Used.Vcpus-was.Used.Vcpus != 2 || is.Used.MemoryMb-was.Used.MemoryMb != 256+128+16 ||
		is.Used.DiskMb <= was.Used.DiskMb || is.Sandboxes["running"]-was.Sandboxes["running"] != 1 {
		t.Errorf("before %v, after %v", was, is)
	}
	if is.Limit.Sandboxes != 100 || is.Limit.Vcpus != 100 || is.Limit.MemoryMb != 1<<20 || is.DiskFreeBytes <= 0 ||
		is.Version != "1" || !slices.Equal(is.Templates, []string{"minimal"}) || is.Draining || is.Fault != "" {
		t.Errorf("got %v", is)
	}
	if len(is.Drivers) != 2 || is.Drivers[1].Name != "absent" || is.Drivers[1].Unusable != "absent is not installed" ||
		is.Drivers[0].Unusable != "" || is.Drivers[0].Why != "a test says so" || is.Drivers[0].Version != "7 (tcg)" ||
		is.Drivers[0].Name != "fake" || is.Drivers[0].SnapshotKey == "" ||
		is.Drivers[0].Acceleration != "tcg" || is.Drivers[0].Isolation != "emulation" {
		t.Errorf("drivers are %v", is.Drivers)
	}
	if _, ok := is.Sandboxes["waiting"]; ok {
		t.Error("waiting guests are told of")
	}
	secret, _, err := p.keys.CreateKey("", "")
	if err != nil {
		t.Fatal(err)
	}
	if code, message := p.callAs(secret, "GetHost", "{}"); code != "" {
		t.Errorf("with a key: %s, %s", code, message)
	}
}

// A create that names a driver is told of all that there are.
func TestCreateNamesADriver(t *testing.T) {
	p := newPlane(t)
	const all = "fake, absent (not usable: absent is not installed)"
	for _, c := range []struct{ request, code, says string }{
		{`{"vmm":"xen"}`, "invalid_argument", `no vmm is called "xen"; this host has ` + all},
		{`{"vmm":"absent"}`, "unavailable", "vmm absent is not usable on this host, which has " + all},
		{`{"isolation":"container"}`, "invalid_argument", ""},
		{`{"vmm":"fake"}`, "", ""},
	} {
		if code, message := p.call("CreateSandbox", c.request); code != c.code || c.says != "" && message != c.says {
			t.Errorf("%s: %s, %s", c.request, code, message)
		}
	}
	created, err := p.client().CreateSandbox(t.Context(), connect.NewRequest(&pb.CreateSandboxRequest{}))
	if err != nil || created.Msg.Vmm != "fake" || created.Msg.VmmWhy != "a test says so" {
		t.Fatalf("%v, %v", created, err)
	}
	got, err := p.client().GetSandbox(t.Context(), connect.NewRequest(&pb.GetSandboxRequest{SandboxId: created.Msg.SandboxId}))
	if err != nil || got.Msg.Sandbox.Vmm != "fake" || got.Msg.Sandbox.Isolation != created.Msg.Isolation {
		t.Errorf("%v, %v", got, err)
	}
}
