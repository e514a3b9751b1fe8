package server

import (
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// A deadline goes through the API as it is, in both directions, and acts.
func TestDeadline(t *testing.T) {
	p := newPlane(t)
	c := p.client()
	at := time.Now().Add(time.Hour).UTC().Truncate(time.Millisecond)
	made, err := c.CreateSandbox(t.Context(), connect.NewRequest(&pb.CreateSandboxRequest{
		Deadline: timestamppb.New(at), TimeoutSec: 7200,
	}))
	if err != nil {
		t.Fatal(err)
	}
	id := made.Msg.SandboxId
	got, err := c.GetSandbox(t.Context(), connect.NewRequest(&pb.GetSandboxRequest{SandboxId: id}))
	if s := got.Msg.GetSandbox(); err != nil || !s.Deadline.AsTime().Equal(at) || s.OnDeadline != "destroy" || s.ExpiresAtUnix != at.Unix() {
		t.Errorf("get: %v, %v; the deadline was %s", s, err, at)
	}
	set := func(req *pb.SetDeadlineRequest) *pb.SandboxInfo {
		t.Helper()
		req.SandboxId = id
		resp, err := c.SetDeadline(t.Context(), connect.NewRequest(req))
		if err != nil {
			t.Fatal(err)
		}
		return resp.Msg.Sandbox
	}
	later := at.Add(30 * time.Minute)
	s := set(&pb.SetDeadlineRequest{Deadline: timestamppb.New(later), OnDeadline: "hibernate"})
	if !s.Deadline.AsTime().Equal(later) || s.OnDeadline != "hibernate" {
		t.Errorf("set: %v", s)
	}
	if s := set(&pb.SetDeadlineRequest{}); s.Deadline != nil || s.OnDeadline != "hibernate" {
		t.Errorf("none: %v", s)
	}
	set(&pb.SetDeadlineRequest{Deadline: timestamppb.Now(), OnDeadline: "destroy"})
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		got, err := c.GetSandbox(t.Context(), connect.NewRequest(&pb.GetSandboxRequest{SandboxId: id}))
		if err != nil || time.Now().After(end) {
			t.Fatalf("%v, %v", got, err)
		}
		if s := got.Msg.Sandbox; s.Status == "stopped" {
			if s.Reason != "expired" {
				t.Errorf("its reason is %s", s.Reason)
			}
			return
		}
	}
}
