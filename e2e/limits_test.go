package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// statusOf reads a number of a /proc/PID/status.
func statusOf(t *testing.T, proc, name string) int {
	t.Helper()
	status, err := os.ReadFile(proc + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s of %s", name, proc)
	return 0
}

// What a sandbox takes of its host has a bound, and stays within what it is
// counted for, whatever it does.
func TestBoundsOfASandbox(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "--disk-rate", "4MiB")
	b := a.create(t, &hostagentv1.CreateSandboxRequest{})
	proc := "/proc/" + strconv.Itoa(b.vmmPID())

	began := time.Now()
	b.sh("dd if=/dev/zero of=/root/file bs=1M count=16 conv=fsync 2>/dev/null")
	if took := time.Since(began); took < 3*time.Second {
		t.Errorf("16 MiB took %s with 4 MiB/s", took)
	}
	if uid := statusOf(t, proc, "Uid"); uid < 1_900_000_000+32768 {
		t.Errorf("the VMM runs as %d, which is no user of its agent alone", uid)
	}

	// All of its memory, and much code that has to be translated.
	b.sh(`python3 - <<'EOF'
import glob
for f in glob.glob("/usr/lib/python3*/*.py")[:60]:
    compile(open(f).read(), f, "exec")
kept = []
free = int([l for l in open("/proc/meminfo") if l.startswith("MemAvailable")][0].split()[1]) >> 10
for i in range(max(0, free - 40)):
    kept.append(bytes([i % 256]) * (1 << 20))
EOF`)
	taken := statusOf(t, proc, "RssAnon") + statusOf(t, proc, "RssShmem")
	if counted := (512 + 128 + 512/16) << 10; taken > counted {
		t.Errorf("the VMM takes %d KiB, and is counted for %d", taken, counted)
	}
	t.Logf("the VMM takes %d KiB", taken)

	// The guest's console while no agent reads it: root can write to it at will.
	console := filepath.Join(a.stateDir, "sandboxes", b.id, "console.log")
	b.sh(`(while :; do echo "$(head -c 900 /dev/zero | tr '\0' x)"; done >/dev/ttyS0 2>&1 </dev/null &)`)
	waitFor(t, "console grows", func() bool { info, err := os.Stat(console); return err == nil && info.Size() > 50_000 })
	if err := a.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(console)
	if err != nil {
		t.Fatal(err)
	}
	used := cpuOf(t, proc)
	waitFor(t, "guest prints on", func() bool { return cpuOf(t, proc) > used+100 })
	after, err := os.Stat(console)
	if err != nil || after.Size() != before.Size() {
		t.Errorf("without an agent the console went from %d to %d bytes", before.Size(), after.Size())
	}
	if err := a.start("--disk-rate", "4MiB", "--on-shutdown=destroy"); err != nil {
		t.Fatal(err)
	}
	if got := b.sh("echo up"); strings.TrimSpace(got) != "up" {
		t.Errorf("after the restart: %q", got)
	}
	waitFor(t, "next agent hears the console", func() bool { info, err := os.Stat(console); return err == nil && info.Size() != after.Size() })
}

// cpuOf is what a process has used, in hundredths of a second.
func cpuOf(t *testing.T, proc string) (ticks int) {
	t.Helper()
	stat, err := os.ReadFile(proc + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	var user, system int
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		t.Fatal(err)
	}
	return user + system
}
