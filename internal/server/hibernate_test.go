package server

import (
	"testing"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// TestPauseWithoutMemory: files_only hibernates by itself, and the sandbox says so.
func TestPauseWithoutMemory(t *testing.T) {
	for _, toDisk := range []bool{false, true} {
		c := newPlane(t).client()
		made, err := c.CreateSandbox(t.Context(), connect.NewRequest(&pb.CreateSandboxRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		id := made.Msg.SandboxId
		want := func(status string, filesOnly bool) {
			t.Helper()
			got, err := c.GetSandbox(t.Context(), connect.NewRequest(&pb.GetSandboxRequest{SandboxId: id}))
			if err != nil {
				t.Fatal(err)
			}
			box := got.Msg.Sandbox
			if box.Status != status || box.FilesOnly != filesOnly || box.EnvdVersion != guestapi.E2BVersion {
				t.Errorf("it is %v", box)
			}
		}
		want("running", false)
		pause := &pb.PauseSandboxRequest{SandboxId: id, ToDisk: toDisk, FilesOnly: true}
		if _, err := c.PauseSandbox(t.Context(), connect.NewRequest(pause)); err != nil {
			t.Fatal(err)
		}
		want("hibernated", true)
		if _, err := c.ResumeSandbox(t.Context(), connect.NewRequest(&pb.ResumeSandboxRequest{SandboxId: id})); err != nil {
			t.Fatal(err)
		}
		want("running", false)
		// Its memory was kept, and is not wanted.
		pause.ToDisk, pause.FilesOnly = true, false
		if _, err := c.PauseSandbox(t.Context(), connect.NewRequest(pause)); err != nil {
			t.Fatal(err)
		}
		want("hibernated", false)
		boot := &pb.ResumeSandboxRequest{SandboxId: id, FilesOnly: true}
		if _, err := c.ResumeSandbox(t.Context(), connect.NewRequest(boot)); err != nil {
			t.Fatal(err)
		}
		want("running", false)
		if _, err := c.ResumeSandbox(t.Context(), connect.NewRequest(boot)); connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("of one that runs: %v", err)
		}
	}
}
