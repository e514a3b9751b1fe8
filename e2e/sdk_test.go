package e2e_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// Clients of E2B's sandboxes work with ours where only the data plane is E2B's: the
// sandbox is made by this host's own API.
func TestDrivenByE2BClient(t *testing.T) {
	c := installClients(t)
	b := sharedBox(t)
	drive := func(args ...string) {
		t.Helper()
		cmd := c.node(t, "testdata/e2b/drive.mjs", append([]string{b.a.url}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	drive(b.id, "run", b.token())
	if err := b.pause(); err != nil {
		t.Fatal(err)
	}
	drive(b.id, "paused", b.token())
	if err := b.resume(); err != nil {
		t.Fatal(err)
	}
	drive("sb-0123456789abcdef", "paused", "none")
}

// The same with nothing but curl and JSON.
func TestDrivenByCurl(t *testing.T) {
	testenv.Program(t, "curl")
	b := sharedBox(t)
	curl := func(args ...string) string {
		t.Helper()
		args = append([]string{"-sS", "--max-time", "30", "-H", "E2b-Sandbox-Id: " + b.id, "-H", "X-Access-Token: " + b.token()}, args...)
		out, err := exec.Command("curl", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("curl %q: %v\n%s", args, err, out)
		}
		return strings.ReplaceAll(string(out), " ", "")
	}
	call := func(rpc, body string) string {
		t.Helper()
		return curl("-H", "Content-Type: application/json", "-d", body, b.a.url+"/"+rpc)
	}
	if got := curl("-o", "/dev/null", "-w", "%{http_code}", b.a.url+"/health"); got != "204" {
		t.Errorf("health: %s", got)
	}
	if got := curl("-F", "file=@testdata/e2b/drive.mjs",
		b.a.url+"/files?path=/tmp/curl/drive.mjs"); got != `[{"path":"/tmp/curl/drive.mjs","name":"drive.mjs","type":"file"}]`+"\n" {
		t.Errorf("upload: %s", got)
	}
	script, err := os.ReadFile("testdata/e2b/drive.mjs")
	if err != nil {
		t.Fatal(err)
	}
	if got := curl(b.a.url + "/files?path=/tmp/curl/drive.mjs"); got != strings.ReplaceAll(string(script), " ", "") {
		t.Errorf("download: %d bytes, %d were sent", len(got), len(script))
	}
	if got := call("filesystem.Filesystem/ListDir", `{"path":"/tmp/curl","depth":1}`); !strings.Contains(got, `"name":"drive.mjs"`) ||
		!strings.Contains(got, `"FILE_TYPE_FILE"`) {
		t.Errorf("list: %s", got)
	}
	if got := call("filesystem.Filesystem/Stat", `{"path":"/none"}`); !strings.Contains(got, `"code":"not_found"`) {
		t.Errorf("stat of nothing: %s", got)
	}
	if got := call("process.Process/List", `{}`); !strings.HasPrefix(got, "{") {
		t.Errorf("processes: %s", got)
	}
	// A stream of JSON: each message behind five bytes.
	start := filepath.Join(t.TempDir(), "start")
	body := `{"process":{"cmd":"sh","args":["-c","echo hi; exit 3"]}}`
	if err := os.WriteFile(start, append([]byte{0, 0, 0, 0, byte(len(body))}, body...), 0o600); err != nil {
		t.Fatal(err)
	}
	got := curl("-H", "Content-Type: application/connect+json", "--data-binary", "@"+start, b.a.url+"/process.Process/Start")
	for _, want := range []string{`"start":{"pid":`, `"stdout":"aGkK"`, `"exitCode":3,"exited":true`} {
		if !strings.Contains(got, want) {
			t.Errorf("start: %q lacks %s", got, want)
		}
	}
	call("filesystem.Filesystem/Remove", `{"path":"/tmp/curl"}`)
}
