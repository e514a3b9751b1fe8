package server

import (
	"fmt"
	"testing"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// A name stands for the id in every call, for the sandbox's project alone.
func TestNames(t *testing.T) {
	p := newPlane(t)
	c := p.client()
	create := func(name string) (string, error) {
		resp, err := c.CreateSandbox(t.Context(), connect.NewRequest(&pb.CreateSandboxRequest{Name: name, DiskMb: 100, Workdir: "/srv"}))
		if err != nil {
			return "", err
		}
		return resp.Msg.SandboxId, nil
	}
	id, err := create("web")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := create("web"); connect.CodeOf(err) != connect.CodeAlreadyExists {
		t.Errorf("the name again: %v", err)
	}
	got, err := c.GetSandbox(t.Context(), connect.NewRequest(&pb.GetSandboxRequest{SandboxId: "web"}))
	if err != nil || got.Msg.Sandbox.SandboxId != id || got.Msg.Sandbox.Name != "web" || got.Msg.Sandbox.DiskMb != 100 ||
		got.Msg.Sandbox.Workdir != "/srv" {
		t.Errorf("get: %v, %v", got, err)
	}
	secret, _, err := p.keys.CreateKey("other", "")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range methods() {
		rpc := string(m.Name())
		if m.Input().Fields().ByName("sandbox_id") == nil {
			continue
		}
		request := func(name string) string { return fmt.Sprintf(`{"sandbox_id":%q}`, name) }
		// Another project learns nothing of the name.
		none, words := p.callAs(secret, rpc, request("no-one"))
		if code, message := p.callAs(secret, rpc, request("web")); code != "not_found" || none != code ||
			message != "no sandbox has the name web" || words != "no sandbox has the name no-one" {
			t.Errorf("%s with the key of another project: %s, %q; %s, %q", rpc, code, message, none, words)
		}
	}
	p.secret, _, err = p.keys.CreateKey("own", "")
	if err != nil {
		t.Fatal(err)
	}
	if code, message := p.call("CreateSandbox", `{"name":"web"}`); code != "" {
		t.Errorf("the name in another project: %s, %s", code, message)
	}
	for _, rpc := range []string{"PauseSandbox", "ResumeSandbox", "DestroySandbox"} {
		if code, message := p.call(rpc, `{"sandbox_id":"web"}`); code != "" {
			t.Errorf("%s: %s, %s", rpc, code, message)
		}
	}
	if code, _ := p.call("GetSandbox", `{"sandbox_id":"web"}`); code != "not_found" {
		t.Errorf("the name of a sandbox that was destroyed: %s", code)
	}
}
