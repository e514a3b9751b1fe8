package e2e_test

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

var uuid4 = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

// TestFork: forks have their source's memory and disk, and nothing in common
// with it or each other from then on.
func TestFork(t *testing.T) {
	a := startAgent(t)
	b := a.create(t, nil)
	b.count()
	b.next()
	b.sh("echo before >/root/file")
	boot := b.sh("cat /proc/sys/kernel/random/boot_id") // the kernel never draws another
	resp, err := a.ForkSandbox(t.Context(), connect.NewRequest(&hostagentv1.ForkSandboxRequest{SandboxId: b.id, Count: 3}))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("3 forks took %d ms, the source stood still for %d ms", resp.Msg.TookMs, resp.Msg.PausedMs)
	boxes := []*sandbox{b}
	for _, info := range resp.Msg.Sandboxes {
		if info.Status != "running" {
			t.Errorf("fork %s is %s", info.SandboxId, info.Status)
		}
		boxes = append(boxes, &sandbox{t, a, info.SandboxId})
	}
	if len(boxes) != 4 {
		t.Fatalf("%d sandboxes, want 4", len(boxes))
	}
	seen := map[string]string{}
	for i, x := range boxes {
		if got := x.sh("cat /root/file"); got != "before" {
			t.Errorf("%s: the file says %q", x.id, got)
		}
		for n := range i + 1 { // each counts for itself
			if got := x.next(); got != 2+n {
				t.Errorf("%s counts %d, want %d", x.id, got, 2+n)
			}
		}
		x.sh("echo " + x.id + " >/root/file")
		for _, script := range []string{"hostname", "cat /etc/machine-id", "cat /proc/sys/kernel/random/boot_id",
			"cat /proc/sys/kernel/random/uuid", "head -c 32 /dev/urandom | sha256sum", "echo $E2B_SANDBOX_ID"} {
			out := x.sh(script)
			if was, again := seen[out]; again && was != x.id {
				t.Errorf("%s: %s in %s and %s", script, out, was, x.id)
			}
			seen[out] = x.id
		}
		if name := x.sh("hostname"); name != x.id {
			t.Errorf("host name of %s is %q", x.id, name)
		}
		if off, known := x.clockError(); off.Abs()+known > 50*time.Millisecond {
			t.Errorf("clock of %s is off by %s (± %s)", x.id, off, known)
		}
		for _, y := range boxes[:i] {
			if x.record().Token == y.record().Token || x.record().HostIP == y.record().HostIP {
				t.Errorf("%s and %s share token or address", x.id, y.id)
			}
		}
	}
	for _, x := range boxes {
		if got := x.sh("cat /root/file"); got != x.id {
			t.Errorf("the disk of %s says %q", x.id, got)
		}
	}
	if got := b.sh("cat /proc/sys/kernel/random/boot_id"); got != boot {
		t.Errorf("the source's boot id was %s and is %s", boot, got)
	}
	// A fork hibernates as any other, after its source is gone.
	if err := b.destroy(); err != nil {
		t.Fatal(err)
	}
	last := boxes[3]
	boot = last.sh("cat /proc/sys/kernel/random/boot_id")
	if !uuid4.MatchString(boot) {
		t.Errorf("boot id %q is no UUID", boot)
	}
	if last.does("echo x >/proc/sys/kernel/random/boot_id") || last.does("ls -A /run | grep boot") {
		t.Error("the boot id can be written to, or its file is seen")
	}
	again, err := a.ForkSandbox(t.Context(), connect.NewRequest(&hostagentv1.ForkSandboxRequest{SandboxId: last.id}))
	if err != nil {
		t.Fatal(err)
	}
	child := &sandbox{t, a, again.Msg.Sandboxes[0].SandboxId}
	if got := child.sh("cat /proc/sys/kernel/random/boot_id"); got == boot || !uuid4.MatchString(got) {
		t.Errorf("the boot id of a fork's fork is %q, its source's %q", got, boot)
	}
	if got := child.sh("grep -c random/boot_id /proc/mounts"); got != "1" {
		t.Errorf("%s mounts lie over the boot id", got)
	}
	if err := last.hibernate(); err != nil {
		t.Fatal(err)
	}
	if err := last.resume(); err != nil {
		t.Fatal(err)
	}
	if got := last.sh("cat /proc/sys/kernel/random/boot_id"); got != boot {
		t.Errorf("hibernation changed the boot id from %s to %s", boot, got)
	}
	if got := last.next(); got != 6 {
		t.Errorf("it counts %d, want 6", got)
	}
}

// A program that runs on in a fork draws new numbers from the kernel, and the same as
// its source from a generator of its own.
func TestForkedGenerators(t *testing.T) {
	a := sharedAgent(t)
	source := a.create(t, nil)
	source.sh(`mkfifo /root/ask && (setsid python3 -c 'import os, random, uuid
random.random()
while True:
    open("/root/ask").read()
    text = "%s %s %s\n" % (random.random(), os.urandom(8).hex(), uuid.uuid4())
    open("/root/new", "w").write(text)
    os.rename("/root/new", "/root/drawn")' >/dev/null 2>&1 &)`)
	draw := func(b *sandbox) []string {
		b.t.Helper()
		return strings.Fields(b.sh("rm -f /root/drawn; echo >/root/ask; until cat /root/drawn 2>/dev/null; do sleep 0.05; done"))
	}
	draw(source)
	source.sh(`mkdir -p /etc/wrenn/on-resume.d && cd /etc/wrenn/on-resume.d &&
		printf '#!/bin/sh\necho $WRENN_GENERATION >>/root/told\n' >10-tell && chmod +x 10-tell`)
	resp, err := a.ForkSandbox(t.Context(), connect.NewRequest(&hostagentv1.ForkSandboxRequest{SandboxId: source.id}))
	if err != nil {
		t.Fatal(err)
	}
	fork := &sandbox{t, a, resp.Msg.Sandboxes[0].SandboxId}
	defer func() {
		if err := fork.destroy(); err != nil {
			t.Error(err)
		}
	}()
	one, two := draw(source), draw(fork)
	if len(one) != 3 || len(two) != 3 || one[0] != two[0] || one[1] == two[1] || one[2] == two[2] {
		t.Errorf("the source drew %v, its fork %v", one, two)
	}
	// A program of the guest learns of it.
	if told := fork.sh("until cat /root/told 2>/dev/null; do sleep 0.1; done; cat /run/wrenn/generation"); len(strings.Fields(told)) != 2 ||
		strings.Fields(told)[0] != strings.Fields(told)[1] {
		t.Errorf("the fork is told %q", told)
	}
	if told := source.sh("cat /root/told /run/wrenn/generation 2>&1 | grep -v 'No such file' || true"); told != "" {
		t.Errorf("the source is told %q", told)
	}
}
