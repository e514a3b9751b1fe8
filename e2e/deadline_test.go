package e2e_test

import (
	"maps"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// A sandbox with metadata, an owner key and a deadline, under an agent that is killed:
// the same request gets the same sandbox, which is hibernated to the moment.
func TestDeadlineOverAnAgentsDeath(t *testing.T) {
	a := startAgent(t)
	at := time.Now().Add(20 * time.Second)
	req := &hostagentv1.CreateSandboxRequest{
		OwnerKey: "key-1", Metadata: map[string]string{"user": "ü"}, Deadline: timestamppb.New(at), OnDeadline: "hibernate",
	}
	b := a.create(t, req)
	b.sh("echo kept > /root/file")
	if err := a.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := a.start(); err != nil {
		t.Fatal(err)
	}
	again, err := a.CreateSandbox(t.Context(), connect.NewRequest(req))
	if err != nil || again.Msg.SandboxId != b.id || again.Msg.StartedFrom != "" {
		t.Fatalf("the same request got %v, %v; want %s", again, err, b.id)
	}
	other := &hostagentv1.CreateSandboxRequest{OwnerKey: "key-1"}
	_, err = a.CreateSandbox(t.Context(), connect.NewRequest(other))
	wantCode(t, err, connect.CodeAlreadyExists, b.id)
	waitFor(t, "the deadline", func() bool { return b.info().Status == "hibernated" })
	if late := time.Since(at); late < 0 || late > 15*time.Second {
		t.Errorf("it is hibernated %s after its deadline", late)
	} else {
		t.Logf("hibernated %s after its deadline", late.Round(time.Millisecond))
	}
	if info := b.info(); !maps.Equal(info.Metadata, req.Metadata) || info.OwnerKey != "key-1" {
		t.Errorf("it has %v, %q", info.Metadata, info.OwnerKey)
	}
	if err := b.resume(); err != nil {
		t.Fatal(err)
	}
	if got := b.sh("cat /root/file"); got != "kept" {
		t.Errorf("the file has %q", got)
	}
	time.Sleep(2 * time.Second)
	if info := b.info(); info.Status != "running" || info.Deadline != nil {
		t.Errorf("after the resume it is %s, with the deadline %v", info.Status, info.Deadline)
	}
}
