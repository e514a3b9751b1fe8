package gvisor

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	slots "git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// TestSlot: a guest in a sandbox's own network is reached by the sandbox's address, through
// its guard, rules and limits, also as a copy in another slot.
func TestSlot(t *testing.T) {
	s := subject(t)
	withEnvd(t, &s)
	plan := slots.DefaultPlan()
	plan.Instance = "vmmt"
	n := slots.New(plan, slots.Options{Egress: slots.Public})
	if err := n.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Teardown(context.Background()); err != nil {
			t.Error(err)
		}
	})
	var c *guest.Client
	s.Spec, c = inSlot(t, n, s.Spec)
	v := start(t, s)
	if err := c.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	in := guest.Init{Time: time.Now(), AccessToken: token, Hostname: "slot", SandboxID: "sb-slot", CloneKey: "key"}
	if _, err := c.Init(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	if got := run(t, c, "hostname"); got != "slot" {
		t.Error(got)
	}
	// Large answers are cut by the host, not by the guest.
	r, err := c.Exec(t.Context(), guest.Command{Cmd: "head", Args: []string{"-c", "3000000", "/dev/zero"}, MaxOutput: 4 << 20, Timeout: soon})
	if err != nil || len(r.Stdout) != 3000000 {
		t.Errorf("%d bytes, %v", len(r.Stdout), err)
	}
	dir := t.TempDir()
	if _, err := c.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := v.Snapshot(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	spec, k := inSlot(t, n, s.Clone())
	clone, err := s.Driver.(vmm.Restorer).Restore(t.Context(), spec, dir)
	if err != nil {
		t.Fatal(err)
	}
	ended(t, clone)
	if err := clone.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	in.Restored, in.Hostname, in.SandboxID = true, "copy", "sb-copy"
	if _, err := k.Init(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	if got := run(t, k, "hostname"); got != "copy" {
		t.Error(got)
	}
}

// inSlot puts a spec into a slot of its own, and returns the client of its guest.
func inSlot(t *testing.T, n *slots.Network, spec vmm.Spec) (vmm.Spec, *guest.Client) {
	t.Helper()
	slot, err := n.Acquire(t.Context(), vmm.Packet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(context.Background(), slot); err != nil {
			t.Error(err)
		}
		if err := n.Release(slot); err != nil {
			t.Error(err)
		}
	})
	if err := n.Open(t.Context(), slot); err != nil {
		t.Fatal(err)
	}
	a := n.Plan().Addrs(slot)
	spec.NetNS, spec.Link = a.NetNSPath, &vmm.Link{Kind: vmm.Packet, Name: slots.PacketEnd, MAC: slots.GuestMAC}
	spec.Boot.Addr, spec.Boot.Gateway = slots.GuestAddr, slots.GuestGateway
	c := guest.New(netip.AddrPortFrom(a.HostIP, guestapi.Port), token)
	t.Cleanup(c.Close)
	return spec, c
}
