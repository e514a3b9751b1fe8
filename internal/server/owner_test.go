package server

import (
	"testing"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// The same request with an owner key is answered with the same sandbox and token, also
// while it has no address.
func TestOwnerKey(t *testing.T) {
	p := newPlane(t)
	c := p.client()
	create := func(req *pb.CreateSandboxRequest) (*pb.CreateSandboxResponse, error) {
		resp, err := c.CreateSandbox(t.Context(), connect.NewRequest(req))
		if err != nil {
			return nil, err
		}
		return resp.Msg, nil
	}
	first, err := create(&pb.CreateSandboxRequest{OwnerKey: "key", Envs: map[string]string{"a": "1", "b": "2"}})
	if err != nil {
		t.Fatal(err)
	}
	again, err := create(&pb.CreateSandboxRequest{OwnerKey: "key", Envs: map[string]string{"b": "2", "a": "1"}})
	if err != nil || again.SandboxId != first.SandboxId || again.AccessToken != first.AccessToken || again.StartedFrom != "" {
		t.Errorf("again: %v, %v; first %v", again, err, first)
	}
	_, err = create(&pb.CreateSandboxRequest{OwnerKey: "key", Envs: map[string]string{"a": "1"}})
	if connect.CodeOf(err) != connect.CodeAlreadyExists {
		t.Errorf("another request: %v", err)
	}
	_, err = c.PauseSandbox(t.Context(), connect.NewRequest(&pb.PauseSandboxRequest{SandboxId: first.SandboxId, ToDisk: true}))
	if err != nil {
		t.Fatal(err)
	}
	again, err = create(&pb.CreateSandboxRequest{OwnerKey: "key", Envs: map[string]string{"a": "1", "b": "2"}})
	if err != nil || again.SandboxId != first.SandboxId || again.HostIp != "" || again.Status != "hibernated" {
		t.Errorf("hibernated: %v, %v", again, err)
	}
	got, err := c.GetSandbox(t.Context(), connect.NewRequest(&pb.GetSandboxRequest{SandboxId: first.SandboxId}))
	if err != nil || got.Msg.Sandbox.OwnerKey != "key" {
		t.Errorf("get: %v, %v", got, err)
	}
}
