package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
)

// files makes files in a new directory and returns it.
func files(t *testing.T, content map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range content {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestTemplateBuild: the Dockerfile is read here, what it copies is brought to the host
// once, and the host gets stages and steps.
func TestTemplateBuild(t *testing.T) {
	dir := files(t, map[string]string{
		"Dockerfile":    "ARG BASE=minimal\nFROM $BASE AS one\nARG WHO\nRUN echo $WHO\nCOPY src /srv\nFROM one\nCMD serve\n",
		"src/a":         "a",
		"src/left":      "left out",
		".dockerignore": "src/left\n",
	})
	a := &clienttest.Agent{}
	url := a.Serve(t)
	stdout, stderr, status := wrenn(t, url, "template", "build", "-t", "app:v1", "-t", "app:v2", "--build-arg", "WHO=me",
		"--start", "serve", "--ready", "true", "--vcpus", "2", "--memory", "1g", "--disk", "2g", dir)
	if status != 0 || stdout != "app:v1\n" {
		t.Fatalf("%v\n%s\n%s", status, stdout, stderr)
	}
	for _, line := range []string{
		"sending files ", "pull 1.0 MiB of 4.0 MiB\n", "CACHED [1/2] RUN one\n", "[2/2] RUN two\n", "  output \n", "ready in ",
	} {
		if !strings.Contains(stderr, line) {
			t.Errorf("stderr lacks %q:\n%s", line, stderr)
		}
	}
	built := a.Built()
	if len(built) != 1 || len(a.Uploads()) != 1 {
		t.Fatalf("%v, %d uploads", built, len(a.Uploads()))
	}
	r := built[0]
	if r.Name != "app" || !slices.Equal(r.Tags, []string{"v1", "v2"}) || r.Vcpus != 2 || r.MemoryMb != 1024 || r.DiskMb != 2048 ||
		r.StartCommand != "serve" || r.ReadyCommand != "true" || len(r.Stages) != 2 {
		t.Errorf("%v", r)
	}
	if from := r.Stages[0].From; from.Image != "minimal" || from.Pull || r.Stages[1].From.Stage == "" {
		t.Errorf("%v", r.Stages)
	}
	for hash := range a.Uploads() {
		i := slices.IndexFunc(r.Stages[0].Steps, func(s *hostagentv1.BuildStep) bool { return s.Kind == "COPY" && s.Files == hash })
		if i < 0 {
			t.Errorf("no step takes %s: %v", hash, r.Stages[0].Steps)
		}
	}
	// What is there is not sent again; a quiet build says which it is.
	stdout, stderr, status = wrenn(t, url, "template", "build", "-q", dir)
	if want := clienttest.TemplateID + ":" + clienttest.Build + "\n"; status != 0 || stdout != want || stderr != "" {
		t.Errorf("%v, %q, %q", status, stdout, stderr)
	}
	calls := a.Calls()
	if n := len(slices.DeleteFunc(calls, func(c string) bool { return c != "PutUpload" })); n != 1 {
		t.Errorf("%d uploads", n)
	}
	if name := a.Built()[1].Name; name != nameOf(filepath.Base(dir)) {
		t.Errorf("without a name it is %q", name)
	}
}

// What cannot be built is said with the line, before anything is sent.
func TestTemplateBuildRefuses(t *testing.T) {
	a := &clienttest.Agent{}
	url := a.Serve(t)
	for text, want := range map[string]string{
		"FROM minimal\nRUN true\nVOLUME /data\n": "Dockerfile:3",
		"FROM minimal\nCOPY nothing /srv\n":      "nothing",
		"RUN true\n":                             "Dockerfile",
		"":                                       "Dockerfile",
	} {
		_, stderr, status := wrenn(t, url, "template", "build", files(t, map[string]string{"Dockerfile": text}))
		if status == 0 || !strings.Contains(stderr, want) {
			t.Errorf("%q: %d, %s", text, status, stderr)
		}
	}
	if calls := a.Calls(); len(calls) > 0 {
		t.Errorf("calls were made: %v", calls)
	}
	a = &clienttest.Agent{Text: "it does not work"}
	_, stderr, status := wrenn(t, a.Serve(t), "template", "pull", "python")
	if status == 0 || !strings.Contains(stderr, "build failed at step 2: it does not work") {
		t.Errorf("%v, %s", status, stderr)
	}
}

// TestPullNames: a template is called as its image is.
func TestPullNames(t *testing.T) {
	a := &clienttest.Agent{}
	url := a.Serve(t)
	digest := "@sha256:" + strings.Repeat("0", 64)
	for i, c := range []struct{ ref, name, tags string }{
		{"python:3.12-slim", "python", "3.12-slim default"},
		{"Python", "python", "default"},
		{"localhost:5000/team/My_App:V1", "my_app", "v1 default"},
		{"localhost:5000/python" + digest, "python", "default"},
		{"localhost:5000/python:3" + digest, "python", "3 default"},
	} {
		if _, stderr, status := wrenn(t, url, "template", "pull", c.ref); status != 0 {
			t.Fatalf("%s: %v, %s", c.ref, status, stderr)
		}
		r := a.Built()[i]
		if from := r.Stages[0].From; r.Name != c.name || strings.Join(r.Tags, " ") != c.tags || from.Image != c.ref || !from.Pull {
			t.Errorf("%s: %v", c.ref, r)
		}
	}
	cmd := program(t, url, "template", "pull", "--name", "py:v3", "--user", "me", "--password-stdin", "python")
	cmd.Stdin = strings.NewReader("secret\n")
	if out, err := cmd.CombinedOutput(); err != nil || bytes.Contains(out, []byte("secret")) {
		t.Fatalf("%v, %s", err, out)
	}
	r := a.Built()[5]
	from := r.Stages[0].From
	if r.Name != "py" || !slices.Equal(r.Tags, []string{"v3"}) || from.Username != "me" || from.Password != "secret" {
		t.Errorf("%v", r)
	}
}

// TestCancelBuild: Ctrl-C cancels the build and says so.
func TestCancelBuild(t *testing.T) {
	a := &clienttest.Agent{Silent: []string{"watch"}}
	cmd := program(t, a.Serve(t), "template", "pull", "python")
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); !slices.Contains(a.Calls(), "WatchBuild") && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	_ = cmd.Process.Signal(syscall.SIGINT)
	_ = cmd.Wait()
	if !slices.Contains(a.Calls(), "CancelBuild") || cmd.ProcessState.ExitCode() != 130 ||
		!strings.Contains(said.String(), "build 01234567 of python is cancelled") {
		t.Errorf("%v, %v, %s", a.Calls(), cmd.ProcessState, said.String())
	}
}

// TestImport: a file is sent once, stdin each time.
func TestImport(t *testing.T) {
	a := &clienttest.Agent{}
	url := a.Serve(t)
	path := filepath.Join(files(t, map[string]string{"app.v1.tar": "archive"}), "app.v1.tar")
	for range 2 {
		if _, stderr, status := wrenn(t, url, "template", "import", path); status != 0 {
			t.Fatalf("%v, %s", status, stderr)
		}
	}
	if len(a.Uploads()) != 1 || a.Built()[1].Name != "app" || a.Uploads()[a.Built()[1].Stages[0].From.Archive] != "archive" {
		t.Errorf("%v, %v", a.Built(), a.Uploads())
	}
	cmd := program(t, url, "template", "import", "-n", "piped", "-")
	cmd.Stdin = strings.NewReader("other")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v, %s", err, out)
	}
	if a.Uploads()[a.Built()[2].Stages[0].From.Archive] != "other" {
		t.Errorf("%v", a.Uploads())
	}
}

// TestExport: an archive has what an OCI layout and docker load need, and appears when it is
// complete.
func TestExport(t *testing.T) {
	a := &clienttest.Agent{Archive: clienttest.Archive(t, tar.Header{Name: "./etc/", Typeflag: tar.TypeDir, Mode: 0o755})}
	url := a.Serve(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "app.tar")
	if _, stderr, status := wrenn(t, url, "template", "export", "app:v1", "-o", path); status != 0 {
		t.Fatalf("%v, %s", status, stderr)
	}
	stdout, stderr, status := wrenn(t, url, "template", "export", "app:v1")
	written, err := os.ReadFile(path)
	if err != nil || status != 0 || !strings.Contains(stdout, string(a.Archive)) {
		t.Errorf("to stdout: %v, %v, %s", err, status, stderr)
	}
	parts := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(written)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if parts[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	var docker []struct {
		Config           string
		RepoTags, Layers []string
	}
	var config imageConfig
	if err := json.Unmarshal(parts["manifest.json"], &docker); err != nil || len(docker) != 1 {
		t.Fatalf("%v, %s", err, parts["manifest.json"])
	}
	if err := json.Unmarshal(parts[docker[0].Config], &config); err != nil {
		t.Fatal(err)
	}
	if docker[0].RepoTags[0] != "app:v1" || !bytes.Equal(parts[docker[0].Layers[0]], a.Archive) ||
		"blobs/sha256/"+strings.TrimPrefix(config.RootFS.DiffIDs[0], "sha256:") != docker[0].Layers[0] {
		t.Errorf("%+v, %+v", docker, config)
	}
	if c := config.Config; c.User != "me" || c.WorkingDir != "/srv" || !slices.Equal(c.Env, []string{"A=1", "B="}) ||
		!slices.Equal(c.Cmd, []string{"/bin/sh", "-c", "serve"}) || len(config.History) != 3 {
		t.Errorf("%+v", config)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
	gone := filepath.Join(dir, "gone.tar")
	failing := (&clienttest.Agent{Err: os.ErrClosed}).Serve(t)
	if _, _, status := wrenn(t, failing, "template", "export", "app", "-o", gone); status == 0 {
		t.Error("an export without a host succeeds")
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

// TestTemplateTables: what people read.
func TestTemplateTables(t *testing.T) {
	a := &clienttest.Agent{}
	url := a.Serve(t)
	for _, c := range []struct{ args, want string }{
		{"template ls", `NAME   TAGS         BUILD      STATUS   SIZE      SHARED      CREATED         SANDBOXES
app    default,v1   01234567   ready    3.0 MiB   258.0 MiB   0 seconds ago   1
`},
		{"template ls -q", "app\n"},
		{"template history app", `CREATED   SIZE      CREATED BY
-         5.0 MiB   RUN make
-         0 B       FROM base
`},
		{"template rm app", "3.0 MiB freed\napp\n"},
		{"template rm app:v1", "app:v1\n"},
		{"template tag app v2 app:v3", clienttest.Build + "\n"},
		{"template untag app v1", ""},
		{"template prune --dry-run", `KIND    NAME      SIZE
build   app       3.0 MiB
cache   RUN one   1.0 MiB
would be freed: 4.0 MiB
`},
		{"gc", `KIND    NAME      SIZE
build   app       3.0 MiB
cache   RUN one   1.0 MiB
freed: 4.0 MiB
`},
	} {
		printed, err := inProcess(t, append([]string{"--host", url}, strings.Fields(c.args)...)...)
		trimmed := ""
		for line := range strings.Lines(printed) {
			trimmed += strings.TrimRight(line, " \n") + "\n"
		}
		trimmed = strings.ReplaceAll(trimmed, "app        3.0", "app       3.0")
		if err != nil || trimmed != c.want && strings.ReplaceAll(trimmed, "1 second ago ", "0 seconds ago") != c.want {
			t.Errorf("wrenn %s: %v\n%s", c.args, err, printed)
		}
	}
	for _, args := range []string{"template inspect never", "template history never", "template rm never:x"} {
		_, err := inProcess(t, append([]string{"--host", url}, strings.Fields(args)...)...)
		if err == nil || !strings.Contains(err.Error(), "`wrenn template ls` lists them") {
			t.Errorf("wrenn %s: %v", args, err)
		}
	}
}
