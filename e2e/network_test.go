package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/host"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// The host's limits hold for a sandbox with a network from the pool: TCP finds
// the rate, both ways, and no more connections begin than may.
func TestHostLimits(t *testing.T) {
	const rate, size, connections = 500_000, 1_000_000, 5
	a := startAgent(t, "--net-in=500K", "--net-out=0.5M", fmt.Sprintf("--net-connections=%d", connections), "--egress=all", "--pool=1")
	slots := func(state string) (n int) {
		t.Helper()
		resp, err := http.Get(a.url + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		_, rest, ok := strings.Cut(string(body), fmt.Sprintf("wrenn_network_slots{state=%q} ", state))
		if _, err := fmt.Sscan(rest, &n); !ok || err != nil {
			t.Fatalf("the metrics do not say how many slots are %s", state)
		}
		return n
	}
	waitFor(t, "the pool to fill", func() bool { return slots("pool") == 1 })
	b := a.create(t, nil)
	waitFor(t, "the pool to fill again", func() bool { return slots("pool") == 1 })
	if open, reserved, fenced := slots("open"), slots("reserved"), slots("fenced"); open != 2 || reserved != 2 || fenced != 0 {
		t.Errorf("slots: %d open, %d reserved, %d fenced; want the sandbox's and the pool's", open, reserved, fenced)
	}

	b.sh(`cd /tmp && head -c ` + fmt.Sprint(size) + ` /dev/zero >big && cat >server.py <<'END'
import http.server, socketserver
class H(http.server.SimpleHTTPRequestHandler):
    def do_PUT(self):
        left = int(self.headers["Content-Length"])
        while left > 0:
            left -= len(self.rfile.read(min(left, 65536)))
        self.send_response(200); self.end_headers()
socketserver.TCPServer(("0.0.0.0", 8000), H).serve_forever()
END
nohup python3 server.py >/dev/null 2>&1 &`)
	url := fmt.Sprintf("http://%s:8000/big", b.addrs().HostIP)
	waitFor(t, "the guest's server", func() bool {
		resp, err := http.Head(url)
		if err == nil {
			resp.Body.Close()
		}
		return err == nil
	})
	least := time.Duration(float64(size-(64<<10)) / rate * float64(time.Second))
	for what, do := range map[string]func() (*http.Response, error){
		"out": func() (*http.Response, error) { return http.Get(url) },
		"in": func() (*http.Response, error) {
			req, err := http.NewRequest("PUT", url, bytes.NewReader(make([]byte, size)))
			if err != nil {
				return nil, err
			}
			return http.DefaultClient.Do(req)
		},
	} {
		began := time.Now()
		resp, err := do()
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		took := time.Since(began)
		if err != nil || resp.StatusCode != http.StatusOK || what == "out" && n != size {
			t.Fatalf("%s: status %d, %d bytes, %v", what, resp.StatusCode, n, err)
		}
		t.Logf("%s: %.3f of %.3f MB/s", what, size/1e6/took.Seconds(), rate/1e6)
		if took < least {
			t.Errorf("%s: %d bytes took %s, at the limit no less than %s", what, size, took, least)
		}
	}

	// Datagrams to many ports: the first may leave, those above the number are
	// refused, and the guest is told.
	got := b.sh(`python3 - <<'END'
import socket, time
refused, kept = 0, []
for port in range(9000, 9020):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.connect(("203.0.113.9", port))
    kept.append(s)
    try:
        for _ in range(40):
            s.send(b"x")
            time.sleep(0.005)
    except OSError as e:
        refused += e.strerror == "Network is unreachable"
print(20 - refused)
END`)
	// One of them may be the end of a connection that the snapshot's guest had.
	if got != fmt.Sprint(connections) && got != fmt.Sprint(connections-1) {
		t.Errorf("%s connections were let through, want %d", got, connections)
	}

	bad, err := exec.Command(filepath.Join(a.bin, "wrenn"), "serve", "--state-dir", a.stateDir,
		"--net-in=slow", "--net-out=1", "--net-connections=-1", "--dns=127.0.0.53").CombinedOutput()
	for _, want := range []string{"--net-in", "bytes per second out", "connections: -1", "--dns 127.0.0.53"} {
		if err == nil || !strings.Contains(string(bad), want) {
			t.Errorf("serve with bad limits: %v, %s; want it to name %q", err, bad, want)
		}
	}
	if len(network.HostResolvers()) == 0 && !strings.Contains(a.log.String(), "no resolver") {
		t.Error("the agent does not say that the host has no resolver for guests")
	}
}

// Another firewall that drops the sandboxes' packets is named by doctor, and
// what doctor says mends it.
func TestDoctorNamesFirewalls(t *testing.T) {
	testenv.Root(t)
	testenv.Program(t, "nft")
	// In a network namespace of its own, so that the host keeps its rules.
	script := `
nft -f "$1"
"$2" doctor --json >"$3" || true
sed -n 's/^ *"fix": "\(sudo nft .*\) #.*/\1/p' "$3" | sed 's/sudo //g; s/\\u0026/\&/g' >"$3.fix"
sh -e "$3.fix"
"$2" doctor --json >"$3.mended" || true`
	dir := t.TempDir()
	rules := filepath.Join(dir, "rules")
	if err := os.WriteFile(rules, []byte(`table inet other {
	chain passing {
		type filter hook forward priority filter
		policy drop
	}
}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	cmd := exec.Command("unshare", "--net", "sh", "-ec", script, "sh", rules, filepath.Join(binDir(t), "wrenn"), out)
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, msg)
	}
	firewall := func(file string) host.Check {
		t.Helper()
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var checks []host.Check
		if err := json.Unmarshal(b, &checks); err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(checks, func(c host.Check) bool { return c.Name == "firewall" })
		if i < 0 {
			t.Fatalf("doctor does not look at firewalls: %s", b)
		}
		return checks[i]
	}
	c := firewall(out)
	want := "sudo nft insert rule inet other passing iifname 'wrenn-*' accept && " +
		"sudo nft insert rule inet other passing oifname 'wrenn-*' accept"
	if c.OK || c.Unknown || !strings.Contains(c.Found, "inet other passing") || !strings.HasPrefix(c.Fix, want) {
		t.Errorf("doctor says %+v, want %q", c, want)
	}
	if c := firewall(out + ".mended"); !c.OK {
		t.Errorf("after doctor's own commands it says %+v", c)
	}
}
