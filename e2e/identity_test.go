package e2e_test

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// printRandom is a program of the user's that never rests. What it draws goes to
// the console, one line at a time: a copy's console begins empty, so what is in it
// was drawn after the copy, except the first line, which was on its way.
const printRandom = `
import os, sys, termios, time, socket
name = sys.argv[1].encode()
f = os.open("/dev/ttyS0", os.O_WRONLY | os.O_NOCTTY)
while True:
    os.write(f, b"<%s %s %s %.3f>\n" % (name, socket.gethostname().encode(), os.urandom(12).hex().encode(), time.time()))
    termios.tcdrain(f)
`

var printed = regexp.MustCompile(`<(\S+) (\S+) ([0-9a-f]{24}) ([0-9.]+)>`)

type draw struct {
	host, value string
	at          time.Time
}

// draws returns what the program has printed on the console from a place on, once
// it is at least a few.
func (b *sandbox) draws(from int) []draw {
	b.t.Helper()
	path := filepath.Join(b.a.stateDir, "sandboxes", b.id, "console.log")
	for deadline := time.Now().Add(patience); ; time.Sleep(pollEvery) {
		data, err := os.ReadFile(path)
		if err != nil {
			b.t.Fatal(err)
		}
		_, data, _ = bytes.Cut(data[min(from, len(data)):], []byte("\n")) // may be half a line
		var list []draw
		begun := map[string]bool{}
		for _, m := range printed.FindAllSubmatch(data, -1) {
			if name := string(m[1]); !begun[name] {
				begun[name] = true
				continue
			}
			sec, err := strconv.ParseFloat(string(m[4]), 64)
			if err != nil {
				b.t.Fatal(err)
			}
			list = append(list, draw{string(m[2]), string(m[3]), time.UnixMilli(int64(sec * 1000))})
		}
		if len(list) >= 20 {
			return list
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("%s prints nothing; its console ends: %q", b.id, data[max(0, len(data)-300):])
		}
	}
}

func (b *sandbox) consoleSize() int {
	info, err := os.Stat(filepath.Join(b.a.stateDir, "sandboxes", b.id, "console.log"))
	if err != nil {
		b.t.Fatal(err)
	}
	return int(info.Size())
}

// distinct says whether copies go on as themselves from their first step on:
// nothing of the user's runs before they are who they are.
func distinct(t *testing.T, seen map[string]string, after time.Time, boxes ...*sandbox) {
	t.Helper()
	for _, b := range boxes {
		equal, foreign, stale := 0, 0, 0
		list := b.draws(0)
		for _, d := range list {
			if was := seen[d.value]; was != "" && was != b.id {
				equal++
			}
			if d.host != b.id {
				foreign++
			}
			if d.at.Before(after) {
				stale++
			}
			seen[d.value] = b.id
		}
		if equal+foreign+stale > 0 {
			t.Errorf("%s: of %d draws %d are another's, %d under another's name, %d at the time of the copy", b.id, len(list), equal, foreign, stale)
		}
	}
}

// TestIdentityOfCopies: a program that draws random numbers all the time, with its
// host name and the time of day, draws none in a copy before the copy has its
// own identity.
func TestIdentityOfCopies(t *testing.T) {
	a := startAgent(t)
	b := a.create(t, nil)
	b.sh("cat >/root/draw.py <<'EOF'\n" + printRandom + "\nEOF\n(setsid python3 /root/draw.py a >/dev/null 2>&1 &)")
	// One that left the cgroup that it was born in, as those of a container do.
	b.sh("mkdir /sys/fs/cgroup/elsewhere")
	for name, group := range map[string]string{"b": "/sys/fs/cgroup/elsewhere", "c": "/sys/fs/cgroup"} {
		b.sh("(sh -c 'echo $$ >" + group + "/cgroup.procs; exec setsid python3 /root/draw.py " + name + "' >/dev/null 2>&1 &)")
	}
	seen := map[string]string{}
	b.draws(0)
	fork := func(n int32) (forks []*sandbox) {
		t.Helper()
		resp, err := a.ForkSandbox(t.Context(), connect.NewRequest(&hostagentv1.ForkSandboxRequest{SandboxId: b.id, Count: n}))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%d forks took %d ms, the source stood still for %d ms", n, resp.Msg.TookMs, resp.Msg.PausedMs)
		for _, info := range resp.Msg.Sandboxes {
			forks = append(forks, &sandbox{t, a, info.SandboxId})
		}
		return forks
	}
	end := func(boxes []*sandbox) {
		t.Helper()
		for _, x := range boxes {
			if err := x.destroy(); err != nil {
				t.Error(err)
			}
		}
	}
	from := b.consoleSize()
	forks := fork(3)
	for _, d := range b.draws(from) { // it goes on
		seen[d.value] = b.id
	}
	distinct(t, seen, time.Time{}, forks...)
	end(forks)

	made, err := b.snapshot("drawing")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the snapshot took %d ms, the source stood still for %d ms", made.TookMs, made.PausedMs)
	after := time.Now()
	x, _ := a.from(t, "drawing", "snapshot")
	y, _ := a.from(t, "drawing", "snapshot")
	distinct(t, seen, after, x, y)
	end([]*sandbox{x, y})

	// One that was paused in the middle of something.
	if err := b.pause(); err != nil {
		t.Fatal(err)
	}
	forks = fork(2)
	if s := b.info().Status; s != "paused" {
		t.Errorf("the source is %s", s)
	}
	from = b.consoleSize()
	distinct(t, seen, time.Time{}, forks...)
	end(forks)
	if n := b.consoleSize(); n != from {
		t.Errorf("the paused source wrote %d bytes", n-from)
	}
	b.resumesInTime()
	if err := b.hibernate(); err != nil {
		t.Fatal(err)
	}
	b.resumesInTime()
	if got := b.sh("cat /sys/fs/cgroup/*/cgroup.freeze | sort -u; echo $E2B_SANDBOX_ID"); got != "0\n"+b.id {
		t.Errorf("it says %q", got)
	}
}

// resumesInTime resumes a sandbox whose program must draw nothing at the time of
// before.
func (b *sandbox) resumesInTime() {
	b.t.Helper()
	from, after := b.consoleSize(), time.Now()
	if err := b.resume(); err != nil {
		b.t.Fatal(err)
	}
	for _, d := range b.draws(from) {
		if d.at.Before(after) || d.host != b.id {
			b.t.Errorf("it draws as %s at %s, %s too early", d.host, d.at, after.Sub(d.at))
			return
		}
	}
}

// TestIdentityOfNewOnes: what starts from a ready snapshot, waiting or not, draws
// what no other does.
func TestIdentityOfNewOnes(t *testing.T) {
	a := startAgent(t, "--warm=1")
	seen := map[string]string{}
	ways := map[string]bool{}
	for deadline := time.Now().Add(2 * patience); len(ways) < 2 || len(seen) < 12; {
		if time.Now().After(deadline) {
			t.Fatalf("they start in the ways %v", ways)
		}
		resp, err := a.CreateSandbox(t.Context(), connect.NewRequest(&hostagentv1.CreateSandboxRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		b := &sandbox{t, a, resp.Msg.SandboxId}
		ways[resp.Msg.StartedFrom] = true
		out := b.sh("hostname; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '; cat /etc/machine-id /proc/sys/kernel/random/boot_id")
		for _, out := range strings.Fields(out) {
			if seen[out] != "" {
				t.Errorf("%s and %s (%s) have %s", b.id, seen[out], resp.Msg.StartedFrom, out)
			}
			seen[out] = b.id
		}
		if err := b.destroy(); err != nil {
			t.Error(err)
		}
	}
}
