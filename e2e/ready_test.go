package e2e_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// record reads what the agent keeps of a sandbox.
func (b *sandbox) record() (rec struct {
	Restored bool
	HostIP   string
	Token    string
}) {
	b.t.Helper()
	data, err := os.ReadFile(filepath.Join(b.a.stateDir, "sandboxes", b.id, "record.json"))
	if err == nil {
		err = json.Unmarshal(data, &rec)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return rec
}

// does says whether a script succeeds.
func (b *sandbox) does(script string) bool {
	b.t.Helper()
	resp, err := b.exec("sh", "-c", script)
	if err != nil {
		b.t.Fatalf("%s: %v", script, err)
	}
	return resp.ExitCode == 0
}

// clockError is by how much the guest's clock is off, and how well that is
// known: the best of some round trips to envd.
func (b *sandbox) clockError() (off, known time.Duration) {
	b.t.Helper()
	rec := b.record()
	known = time.Hour
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections() // it ends with the VM
	for range 20 {
		body := fmt.Sprintf(`{"accessToken":%q,"timestamp":"2020-01-01T00:00:00Z"}`, rec.Token) // old news, which change nothing
		sent := time.Now()
		resp, err := client.Post(fmt.Sprintf("http://%s:%d%s", rec.HostIP, guestapi.Port, guestapi.PathInit), "application/json",
			strings.NewReader(body))
		if err != nil {
			b.t.Fatal(err)
		}
		trip := time.Since(sent)
		resp.Body.Close()
		ns, err := strconv.ParseInt(resp.Header.Get(guestapi.HeaderClock), 10, 64)
		if err != nil {
			b.t.Fatal(err)
		}
		if trip/2 < known {
			known, off = trip/2, time.Unix(0, ns).Sub(sent.Add(trip/2))
		}
	}
	return off, known
}

// restored makes n sandboxes that are restored from one ready snapshot.
func restoredBoxes(t *testing.T, a *agent, n int) []*sandbox {
	t.Helper()
	a.create(t, nil) // makes the snapshot if setup did not
	var boxes []*sandbox
	for range n {
		b := a.create(t, nil)
		if !b.record().Restored {
			t.Fatalf("sandbox %s was booted", b.id)
		}
		boxes = append(boxes, b)
	}
	return boxes
}

// TestClonesAreDifferent: sandboxes restored from one snapshot share no
// randomness, identity or secret, and know what time it is.
func TestClonesAreDifferent(t *testing.T) {
	a := startAgent(t)
	wantDifferent(t, restoredBoxes(t, a, 2))
}

// wantDifferent fails the test unless two sandboxes are strangers to each other.
func wantDifferent(t *testing.T, boxes []*sandbox) {
	t.Helper()
	for name, script := range map[string]string{
		"getrandom":                    "python3 -c 'import os; [print(os.getrandom(32).hex()) for _ in range(200)]'",
		"/dev/urandom":                 "for i in $(seq 20); do head -c 32 /dev/urandom | sha256sum | cut -c1-64; done",
		"/dev/random":                  "head -c 32 /dev/random | sha256sum | cut -c1-64",
		"/proc/sys/kernel/random/uuid": "for i in $(seq 20); do cat /proc/sys/kernel/random/uuid; done",
		"machine-id":                   "cat /etc/machine-id",
		"boot_id":                      "cat /proc/sys/kernel/random/boot_id",
		"host name":                    "hostname",
		"/etc/hostname":                "cat /etc/hostname",
		"E2B_SANDBOX_ID":               "echo $E2B_SANDBOX_ID",
	} {
		if name == "getrandom" && !boxes[0].does("command -v python3") {
			continue
		}
		seen := map[string]string{}
		for _, b := range boxes {
			out := strings.Fields(b.sh(script))
			if len(out) == 0 {
				t.Errorf("%s: nothing", name)
			}
			for _, line := range out {
				if was, again := seen[line]; again {
					t.Errorf("%s: %s in %s and in %s", name, line, was, b.id)
				}
				seen[line] = b.id
			}
		}
	}
	if x, y := boxes[0].record().Token, boxes[1].record().Token; x == y || x == "" {
		t.Error("both have the same token")
	}
	for i, b := range boxes {
		if name := strings.TrimSpace(b.sh("hostname")); name != b.id {
			t.Errorf("host name is %q, want %q", name, b.id)
		}
		off, known := b.clockError()
		t.Logf("clock of %s is off by %s, give or take %s", b.id, off, known)
		if off.Abs()+known > 50*time.Millisecond {
			t.Errorf("clock is off by %s (± %s), want less than 50 ms", off, known)
		}
		// The other's token opens nothing.
		req, _ := http.NewRequest(http.MethodGet, fmt.Sprintf("http://%s:%d%s", b.record().HostIP, guestapi.Port, guestapi.PathEnvs), nil)
		req.Header.Set(guestapi.HeaderToken, boxes[1-i].record().Token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("the other sandbox's token is answered with %s", resp.Status)
		}
	}
	// What one writes the other does not see.
	boxes[0].sh("echo mine >/root/file")
	if boxes[1].does("test -e /root/file") {
		t.Error("the disk is shared")
	}
}

// TestAdoptRestored: restored sandboxes outlive the agent as others do.
func TestAdoptRestored(t *testing.T) {
	a := startAgent(t)
	b := restoredBoxes(t, a, 1)[0]
	b.sh("echo 1 >/dev/shm/in-memory")
	if err := a.signal(9); err != nil {
		t.Fatal(err)
	}
	if err := a.start("--on-shutdown=destroy"); err != nil {
		t.Fatal(err)
	}
	if got := b.sh("cat /dev/shm/in-memory"); strings.TrimSpace(got) != "1" {
		t.Errorf("the file in memory says %q", got)
	}
}

// TestDamagedReadySnapshot: a snapshot that is not what was written is not
// used, and another takes its place.
func TestDamagedReadySnapshot(t *testing.T) {
	a := startAgent(t)
	restoredBoxes(t, a, 1)
	if err := a.signal(9); err != nil {
		t.Fatal(err)
	}
	found, err := filepath.Glob(filepath.Join(a.buildDir(t, "minimal"), "ready/*/mem"))
	if err != nil || len(found) == 0 {
		t.Fatalf("%q, %v", found, err)
	}
	for _, mem := range found {
		// Not in place: it may be a link to what others use.
		data, err := os.ReadFile(mem)
		if err == nil {
			data[len(data)/2] ^= 1
			err = os.Remove(mem)
		}
		if err == nil {
			err = os.WriteFile(mem, data, 0o444)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := a.start("--on-shutdown=destroy"); err != nil {
		t.Fatal(err)
	}
	if b := a.create(t, nil); b.record().Restored {
		t.Error("a damaged snapshot was restored")
	}
	if b := a.create(t, nil); !b.record().Restored {
		t.Error("no new snapshot was made")
	}
	if !strings.Contains(a.log.String(), "damaged") {
		t.Error("the log does not say that it is damaged")
	}
}
