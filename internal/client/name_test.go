package client

import (
	"testing"

	v1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// A name means a sandbox that has not ended before the last one that has.
func TestCalled(t *testing.T) {
	boxes := []*v1.SandboxInfo{
		{SandboxId: "sb-1", Name: "web", Status: "stopped"}, {SandboxId: "sb-2", Name: "web", Status: "stopped"},
		{SandboxId: "sb-3", Name: "db", Status: "paused"}, {SandboxId: "sb-4", Name: "db", Status: "stopped"},
		{SandboxId: "sb-5", Name: "db", Status: "stopping"}, {SandboxId: "sb-6"},
	}
	for name, want := range map[string]string{"web": "sb-2", "db": "sb-3"} {
		if got := called(boxes, name); len(got) != 1 || got[0] != want {
			t.Errorf("%s: %q, want %s", name, got, want)
		}
	}
	if got := called(boxes, "no-one"); len(got) != 0 {
		t.Errorf("a name that none has: %q", got)
	}
	boxes[1].Status = "running" // of another project
	if got := called(append(boxes, &v1.SandboxInfo{SandboxId: "sb-7", Name: "web", Status: "paused"}), "web"); len(got) != 2 {
		t.Errorf("of two projects: %q", got)
	}
}
