package e2e_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// An agent that is replaced while sandboxes are paused and hibernated has both afterwards;
// they go on, and all can be deleted at once, whatever their state.
func TestManyPausedAndHibernated(t *testing.T) {
	a := startAgent(t, "--on-shutdown=leave")
	var boxes []*sandbox
	for range 6 {
		boxes = append(boxes, a.create(t, &hostagentv1.CreateSandboxRequest{Vmm: "qemu"})) // whose disk is apart from its memory
	}
	for i, b := range boxes {
		b.sh("echo kept >/root/note")
		var err error
		switch i % 3 {
		case 0:
			err = b.pause()
		case 1:
			_, err = a.PauseSandbox(t.Context(), connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: b.id, ToDisk: true}))
		case 2:
			_, err = a.PauseSandbox(t.Context(), connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: b.id, FilesOnly: true}))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := a.signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := a.start("--on-shutdown=destroy"); err != nil {
		t.Fatal(err)
	}
	states := map[string]int{}
	for _, b := range boxes {
		states[b.info().GetStatus()]++
	}
	if states["paused"] != 2 || states["hibernated"] != 4 {
		t.Errorf("with the next agent: %v", states)
	}
	for _, b := range boxes[:3] {
		if err := b.resume(); err != nil {
			t.Fatal(err)
		}
		if note := b.sh("cat /root/note"); note != "kept" {
			t.Errorf("the note says %q", note)
		}
	}
	var wg sync.WaitGroup
	for _, b := range boxes {
		wg.Go(func() {
			if err := b.destroy(); err != nil {
				t.Errorf("destroy: %v", err)
			}
		})
	}
	wg.Wait()
	resp, err := a.ListSandboxes(t.Context(), connect.NewRequest(&hostagentv1.ListSandboxesRequest{All: true}))
	if err != nil || len(resp.Msg.Sandboxes) > 0 {
		t.Errorf("after all were destroyed: %v, %v", resp, err)
	}
	if left, _ := filepath.Glob(filepath.Join(a.stateDir, "sandboxes", "sb-*")); len(left) > 0 {
		t.Errorf("left on disk: %q", left)
	}
}

// The README's web server example survives being pasted: a shell that reads its lines one
// after the other gets the page, also where the server takes a while to listen.
func TestReadmeWebServer(t *testing.T) {
	a := sharedAgent(t)
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var script strings.Builder
	script.WriteString("set -e\n")
	inside := false
	for line := range strings.SplitSeq(string(readme), "\n") {
		typed, isCommand := strings.CutPrefix(line, "    $ ")
		inside = isCommand && (inside || typed == "id=$(wrenn create)")
		if inside {
			script.WriteString(strings.ReplaceAll(typed, "localhost:50051", strings.Replace(a.addr, "127.0.0.1", "localhost", 1)) + "\n")
		}
		if inside && strings.HasPrefix(typed, "curl") {
			break
		}
	}
	script.WriteString("wrenn rm $id >/dev/null\n")
	dir, err := filepath.Abs(a.bin)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh")
	cmd.Stdin = strings.NewReader(script.String())
	cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "WRENN_HOST="+a.url)
	began := time.Now()
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil || string(out) != "hello\n" {
		t.Errorf("after %v: %v, %q of\n%s", time.Since(began), err, out, script.String())
	}
}
