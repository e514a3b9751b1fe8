package server

import (
	"maps"
	"net/http"
	"strings"
	"testing"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
)

// client returns a client of the control plane.
func (p *plane) client() hostagentv1connect.HostAgentServiceClient {
	return hostagentv1connect.NewHostAgentServiceClient(http.DefaultClient, p.url)
}

// What a create says as metadata is in each answer, and lists go by it.
func TestMetadata(t *testing.T) {
	p := newPlane(t)
	c, metadata := p.client(), map[string]string{"user": "ü", "empty": ""}
	made, err := c.CreateSandbox(t.Context(), connect.NewRequest(&pb.CreateSandboxRequest{Metadata: metadata}))
	if err != nil {
		t.Fatal(err)
	}
	id := made.Msg.SandboxId
	got, err := c.GetSandbox(t.Context(), connect.NewRequest(&pb.GetSandboxRequest{SandboxId: id}))
	if err != nil || !maps.Equal(got.Msg.Sandbox.Metadata, metadata) {
		t.Errorf("get: %v, %v", got.Msg.GetSandbox().GetMetadata(), err)
	}
	for _, asked := range []struct {
		metadata map[string]string
		count    int
	}{{nil, 2}, {metadata, 1}, {map[string]string{"empty": ""}, 1}, {map[string]string{"empty": "x"}, 0}} {
		list, err := c.ListSandboxes(t.Context(), connect.NewRequest(&pb.ListSandboxesRequest{Metadata: asked.metadata}))
		if err != nil || len(list.Msg.Sandboxes) != asked.count {
			t.Errorf("list of %v: %v, %v", asked.metadata, list.Msg.GetSandboxes(), err)
		}
	}
	events, err := c.WatchEvents(t.Context(), connect.NewRequest(&pb.WatchEventsRequest{SandboxId: id, NoFollow: true}))
	if err != nil {
		t.Fatal(err)
	}
	defer events.Close()
	n := 0
	for events.Receive() {
		if e := events.Msg().Event; e != nil {
			n++
			if !maps.Equal(e.Metadata, metadata) || e.Actor.GetWhat() != "CreateSandbox" || !strings.HasPrefix(e.Actor.Address, "127.0.0.1:") {
				t.Errorf("event: %v", e)
			}
		}
	}
	if err := events.Err(); err != nil || n != 2 {
		t.Errorf("%d events, %v", n, err)
	}
}
