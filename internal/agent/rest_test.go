package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/e2b"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// fuzzer is the program that makes requests of the OpenAPI document, and the library by
// which it chooses them: another version chooses others.
var fuzzer = []string{"schemathesis==4.32.5", "hypothesis==6.170.17"}

// Whatever requests the OpenAPI document lets through, and some that it does not: no
// answer is an error of the host, none is late, and nothing is left behind.
func TestRESTWithRequestsOfTheDocument(t *testing.T) {
	testenv.Program(t, "pip3", "python3")
	packages := testenv.Install(t, fuzzer, func(dir string) []*exec.Cmd {
		return []*exec.Cmd{testenv.Pip(dir, fuzzer...)}
	})
	r := newRig(t)
	r.cfg.Rates = auth.Rates{}
	keys, err := auth.Open(r.cfg.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	key, _, err := keys.CreateKey(auth.DefaultProject, "fuzz")
	if err != nil {
		t.Fatal(err)
	}
	r.start()
	// Builds are added and not started: no request has the id of one.
	r.newTemplate(key, "known")
	document, err := filepath.Abs("../../api/e2b/openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir() // it leaves a cache where it runs
	run := func(args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		args = append([]string{"-m", "schemathesis.cli"}, args...)
		cmd := exec.CommandContext(ctx, "python3", append(args, "run", document,
			"--url", "http://"+r.agent.Addr().String(), "-H", "X-API-KEY:"+key, "--checks", "not_a_server_error",
			"--phases", "examples,fuzzing", "--max-examples", "8", "--seed", "1", "--generation-database", "none", "--no-shrink",
			"--request-timeout", "60", "--workers", "1", "--no-color", "--warnings", "off", "--suppress-health-check", "all",
			"--exclude-operation-id", "killSandbox")...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PYTHONPATH="+packages, "PYTHONDONTWRITEBYTECODE=1")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if lines := strings.Split(strings.TrimSpace(string(out)), "\n"); len(lines) > 8 {
			t.Logf("%s", strings.Join(lines[len(lines)-8:], "\n"))
		}
	}
	run()
	// And once for a sandbox that is there.
	created, err := r.agent.base.manager.Create(t.Context(), sandbox.CreateRequest{Labels: sandbox.Labels{Project: auth.DefaultProject}})
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "settings.toml")
	text := fmt.Sprintf("[parameters]\n%q = %q\n%q = %q\n%q = %q\n", "path.sandboxID", created.ID.Short(),
		"path.templateID", "known", "path.hash", strings.Repeat("0a", 32))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	run("--config-file", config)
	if all, err := r.agent.templates.List(); err != nil || len(all) > 100 {
		t.Errorf("there are %d templates, %v", len(all), err)
	}
	for _, info := range r.agent.base.manager.List(true) {
		if err := r.agent.base.manager.Destroy(t.Context(), info.ID); err != nil {
			t.Errorf("destroy %s: %v", info.ID, err)
		}
	}
	if err := r.ended(); err != nil {
		t.Errorf("Run: %v", err)
	}
	r.wantNothing()
	if strings.Contains(r.log.String(), "level=ERROR") {
		t.Error("the agent logged an error")
	}
}

// A sandbox has the disk that it was made with, also when the agent makes others larger.
func TestRESTTellsTheSizeOfADisk(t *testing.T) {
	r := newRig(t)
	r.start()
	id := r.create()
	if err := r.ended(); err != nil {
		t.Fatal(err)
	}
	r.cfg.OverlayMiB = 128
	r.start()
	manager, _ := e2b.OfHost(r.agent.base.manager, r.agent.templates, r.cfg.OverlayMiB)
	if sb, err := manager.Get(sandbox.ID(id)); err != nil || sb.DiskMiB != 64 {
		t.Errorf("its disk has %d MiB, want 64, %v", sb.DiskMiB, err)
	}
}

// ask sends a request to the REST API and returns the answer.
func (r *rig) ask(method, path, key string, body io.Reader) (int, map[string]any) {
	r.Helper()
	if !strings.HasPrefix(path, "http") {
		path = "http://" + r.agent.Addr().String() + path
	}
	req, err := http.NewRequestWithContext(r.Context(), method, path, body)
	if err != nil {
		r.Fatal(err)
	}
	if key != "" {
		req.Header.Set("X-API-KEY", key)
		req.Header.Set("Content-Type", "application/json")
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		r.Fatal(err)
	}
	defer resp.Body.Close()
	var answer map[string]any
	_ = json.NewDecoder(resp.Body).Decode(&answer)
	return resp.StatusCode, answer
}

// newTemplate makes a template with a build that waits, and returns the build.
func (r *rig) newTemplate(key, name string) string {
	r.Helper()
	status, answer := r.ask("POST", "/v3/templates", key, strings.NewReader(fmt.Sprintf(`{"name":%q}`, name)))
	if status != http.StatusAccepted {
		r.Fatalf("new template: HTTP %d %v", status, answer)
	}
	return answer["buildID"].(string)
}

// A build waits for its archives, which come without a key at an address that only this
// agent takes, and ends with the agent.
func TestRESTUploads(t *testing.T) {
	r := newRig(t)
	keys, err := auth.Open(r.cfg.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	key, _, err := keys.CreateKey(auth.DefaultProject, "")
	if err != nil {
		t.Fatal(err)
	}
	r.start()
	made := r.newTemplate(key, "app")
	files := "/templates/app/files/" + strings.Repeat("0a", 32)
	wantPresent := func(want bool) string {
		t.Helper()
		status, answer := r.ask("GET", files, key, nil)
		if status != http.StatusCreated || answer["present"] != want {
			t.Fatalf("HTTP %d %v, want present %v", status, answer, want)
		}
		return answer["url"].(string)
	}
	wantStatus := func(want string) {
		t.Helper()
		if status, answer := r.ask("GET", "/templates/app/builds/"+made+"/status", key, nil); status != 200 || answer["status"] != want {
			t.Errorf("HTTP %d %v, want status %s", status, answer, want)
		}
	}
	url := wantPresent(false)
	// More than a request of the API may have, of a known length and in chunks.
	archive := bytes.Repeat([]byte("archive "), 1<<18)
	for _, body := range []io.Reader{bytes.NewReader(archive), io.LimitReader(bytes.NewReader(archive), 1<<21)} {
		if status, answer := r.ask("PUT", url, "", body); status != 200 {
			t.Fatalf("put: HTTP %d %v", status, answer)
		}
	}
	wantPresent(true)
	if status, answer := r.ask("PUT", url[:len(url)-4]+"AAAA", "", strings.NewReader("x")); status != 403 {
		t.Errorf("an address of one's own: HTTP %d %v", status, answer)
	}
	wantStatus("waiting")
	if err := r.ended(); err != nil {
		t.Fatal(err)
	}
	r.start()
	wantPresent(true)
	wantStatus("error")
	address := "http://" + r.agent.Addr().String() + url[strings.Index(url, "/uploads/"):]
	if status, answer := r.ask("PUT", address, "", strings.NewReader("x")); status != 403 {
		t.Errorf("an address of the agent before: HTTP %d %v", status, answer)
	}
	if err := r.ended(); err != nil {
		t.Fatal(err)
	}
	r.wantNothing()
}
