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
	if len(is.Drivers) != 1 || is.Drivers[0].Name != "fake" || is.Drivers[0].SnapshotKey == "" ||
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
